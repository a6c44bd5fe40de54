"""A simulated CUDA or MPS device for a PyTorch without one, with autograd.

    with SimulatedDevice(gib=8) as card:    # or kind="mps"; numbers=False for shapes alone
        train(...)
    print(card.report())                    # or: python -m tests.simulated.device --gib 8 train demo ...

A tensor of the device (`DeviceTensor`) says cuda:0 and holds a tensor of the processor, so that losses and
files are those of the processor bit for bit, or (`numbers=False`) one of the meta device, so that SDXL fits
at its true shapes; what is copied off the device is ones then.

What it sees and a processor does not:

* tensors of two devices in one operation (RuntimeError), float64 on MPS (TypeError), kernels of oneDNN;
* `launches` by operation; `uploads`, `downloads` and `syncs` by the line of lora_core that made them;
  `draws`, random numbers drawn without a generator, which no resume can repeat;
* `live` and `peak` bytes, each storage rounded up to 512, and torch.OutOfMemoryError beyond the device's
  memory, beyond the fraction set by torch, and at allocation number `fail_at`.

What it does not see: time, kernels' rounding and temporaries, nondeterminism, streams, fragmentation,
the context (about 0.5 GiB) and library workspaces. A launch is one aten operation that is no view, and one of
fused attention. torch uses foreach kernels for plain tensors only, so that an unfused optimizer over many
tensors counts more launches here than on a card.

To C++ the tensors are of torch's device for extensions (PrivateUse1), registered from Python, so that no
compiler is needed; to Python they are of the simulated one. Backward passes run in the calling thread.
"""

import contextlib
import importlib
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

GIB = 2**30
_RUN_BACKWARD = torch.autograd.graph._engine_run_backward
BLOCK = 512
"""Bytes that an allocation is rounded up to, as by torch's allocator."""
UNCOUNTED = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "is_pinned",
    "record_stream", "_local_scalar_dense", "is_same_size", "_unsafe_view",
}  # fmt: skip
"""Operations that are no views and launch nothing."""
WAITING = {
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "_linalg_check_errors",
}  # fmt: skip
"""Operations whose result, or its size, the host waits for."""
BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""Operations that accept indices in the processor's memory."""
ALIKE = {"cat", "stack"}
"""Operations that do not even accept scalars in the processor's memory."""
RANDOM = {
    "rand", "randn", "normal_", "uniform_", "randint", "randperm", "bernoulli_", "bernoulli",
    "native_dropout", "rand_like", "randn_like", "multinomial", "exponential_", "random_",
}  # fmt: skip

PLAIN = {int, float, bool, str, torch.dtype, torch.device, torch.layout, torch.memory_format}
"""Types of arguments that hold no tensor, and of elements of lists without one."""

_active: "SimulatedDevice | None" = None
_extension: torch.device | None = None
_library = torch.library.Library("aten", "IMPL")


def _extension_device() -> torch.device:
    """The device that C++ takes the tensors to be on; registered once in a process."""
    global _extension
    if _extension is None:
        accelerators = getattr(torch._C, "_acc", None)
        if accelerators is None:
            raise RuntimeError(f"The simulated device needs PyTorch 2.10 or newer, not {torch.__version__}")

        class Hooks(accelerators.PrivateUse1Hooks):
            def has_primary_context(self, index: int) -> bool:
                return True

            def is_built(self) -> bool:
                return True

            def is_available(self) -> bool:
                return True

        class Guard(accelerators.DeviceGuard):
            def type_(self) -> Any:
                return torch._C._autograd.DeviceType.PrivateUse1

        torch.utils.rename_privateuse1_backend("simulated")
        # What torch asks of an extension's module, outside of the context too.
        torch._register_device_module(
            "simulated",
            types.SimpleNamespace(
                is_available=lambda: False, _is_in_bad_fork=lambda: False, manual_seed_all=lambda seed: None
            ),
        )
        accelerators.register_python_privateuseone_hook(Hooks())
        accelerators.register_python_privateuseone_device_guard(Guard())
        _extension = torch.device("simulated", 0)
        # An extension has none of these kernels, so that torch would put several operations in their place.
        for name in ("silu_backward", "mish_backward"):
            _library.impl(name, getattr(torch.ops.aten, name).default, "PrivateUse1")
    return _extension


class _Block:
    """The memory of a storage."""

    def __init__(self, nbytes: int, card: "SimulatedDevice") -> None:
        self.card, self.nbytes = card, 0
        rounded = -(-nbytes // BLOCK) * BLOCK
        card.allocate(rounded)
        self.nbytes = rounded

    def __del__(self) -> None:
        self.card.live -= self.nbytes


class DeviceTensor(torch.Tensor):
    """A tensor of the simulated device; `inner` holds its values, or its shape alone."""

    inner: torch.Tensor
    block: _Block
    card: "SimulatedDevice"

    @staticmethod
    def __new__(cls, inner: torch.Tensor, card: "SimulatedDevice") -> "DeviceTensor":
        assert type(inner) is not DeviceTensor
        if card.kind == "mps" and inner.dtype in (torch.float64, torch.complex128):
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
                " Please use float32 instead."
            )
        tensor: DeviceTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device=_extension_device(),
        )  # fmt: skip
        storage = inner.untyped_storage()
        block = card.blocks.get(storage._cdata)
        if block is None:
            block = card.blocks[storage._cdata] = _Block(storage.nbytes(), card)
        tensor.inner, tensor.block, tensor.card = inner, block, card
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        card = next(tensor.card for tensor in _tensors((args, kwargs)) if isinstance(tensor, DeviceTensor))
        return card.run(func, args, kwargs or {})

    device = property(lambda self: self.card.device)  # type: ignore[assignment]
    is_cuda = property(lambda self: self.card.kind == "cuda")
    is_mps = property(lambda self: self.card.kind == "mps")

    @property  # type: ignore[override]
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, new: "DeviceTensor") -> None:
        torch._C.TensorBase.data.__set__(self, new)  # type: ignore[attr-defined]
        self.inner, self.block = new.inner, new.block

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As torch's, for which the device is another one than in Python."""
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        here = device is None or self.card.owns(device)
        if here and dtype in (None, self.dtype) and layout is None and not copy:
            return self
        more: dict[str, Any] = {} if here else {"device": device}
        more |= {} if layout is None else {"memory_format": layout}
        return torch.ops.aten._to_copy(self, dtype=dtype or self.dtype, non_blocking=non_blocking, **more)

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.to("cpu", *args, **kwargs)

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def record_stream(self, stream: Any) -> None:
        pass

    def __repr__(self, **kwargs: Any) -> str:
        return f"DeviceTensor({self.inner!r}, device='{self.device}')"


class _Kind:
    """What follows from an operation's schema."""

    def __init__(self, func: Any) -> None:
        self.name: str = func.overloadpacket.__name__
        schema = func._schema
        infos = [returned.alias_info for returned in schema.returns]
        self.view = any(info is not None and not info.is_write for info in infos)
        self.launches = not self.view and self.name not in UNCOUNTED
        self.waits, self.draws = self.name in WAITING, self.name in RANDOM
        self.by_index, self.alike = self.name in BY_INDEX, self.name in ALIKE
        # The arguments that are returned, of an operation that writes to them.
        written = {
            frozenset(argument.alias_info.before_set): (place, argument.name)
            for place, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        self.returned = [
            written[frozenset(info.before_set)] for info in infos if info is not None and info.is_write
        ]
        self.alone = len(schema.returns) == 1
        self.onednn = "mkldnn" in str(func)


@dataclass(frozen=True)
class _Shape:
    """A tensor of the meta device."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def made(self) -> torch.Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")


def _described(leaf: Any) -> Any:
    return _Shape(tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf


class _Mode(TorchDispatchMode):
    """Sees operations in which no tensor of the device takes part: factories, and copies to it."""

    def __init__(self, card: "SimulatedDevice") -> None:
        super().__init__()
        self._card = card

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would be imported, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._card.run(func, args, kwargs or {})


class SimulatedDevice:
    """One device, there while the context is open.

    Args:
        kind: "cuda" or "mps".
        gib: its memory.
        numbers: whether tensors have values.
        capability: of a CUDA device: below (8, 0) it has no bf16.
        others: bytes of it that other processes hold.
    """

    def __init__(
        self, kind: str = "cuda", gib: float = 12, numbers: bool = True,
        capability: tuple[int, int] = (8, 6), others: int = 0,
    ) -> None:  # fmt: skip
        self.kind, self.total, self.numbers, self.capability = kind, int(gib * GIB), numbers, capability
        self.others = others
        self.device = torch.device(kind, 0)
        self.limit = self.total
        """Bytes that this process may take, as torch.cuda.set_per_process_memory_fraction says."""
        self.pinnable: int | None = None
        """Bytes of host memory that may be pinned; None for any number."""
        self.fail_at = 0
        """The number of the allocation that fails, counted from 1."""
        self.blocks: weakref.WeakValueDictionary[int, _Block] = weakref.WeakValueDictionary()
        self.live = self.allocations = self.failures = 0
        self._failed: torch.OutOfMemoryError | None = None
        self._kinds: dict[Any, _Kind] = {}
        self._known: dict[Any, Any] = {}
        self.clear()

    def clear(self) -> None:
        """Count anew from here on."""
        self.launches: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.downloads: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.draws: Counter[str] = Counter()
        self.uploaded = self.downloaded = self.pinned = 0
        self.peak = self.live

    def report(self) -> dict[str, Any]:
        """The sums of all that is counted."""
        return {
            "launches": self.launches.total(), "uploads": self.uploads.total(),
            "downloads": self.downloads.total(), "syncs": self.syncs.total(), "draws": self.draws.total(),
            "uploaded MB": round(self.uploaded / 1e6, 3), "downloaded MB": round(self.downloaded / 1e6, 3),
            "pinned MB": round(self.pinned / 1e6, 3), "peak GiB": round(self.peak / GIB, 3),
            "live GiB": round(self.live / GIB, 3), "allocations": self.allocations,
            "out of memory": self.failures,
        }  # fmt: skip

    # --- memory

    def allocate(self, nbytes: int) -> None:
        """Take memory.

        Raises:
            torch.OutOfMemoryError: there is not so much; in a backward pass at the end of the pass, since C++
                cannot unwind through this device's guards, which are Python.
        """
        self.allocations += nbytes > 0
        full = self.live + nbytes > min(self.limit, self.total - self.others)
        if self._failed is None and (full or (nbytes and self.allocations == self.fail_at)):
            self.failures += 1
            if torch._C._current_graph_task_id() == -1:
                raise self._out_of_memory(nbytes)
            self._failed = self._out_of_memory(nbytes)
        self.live += nbytes
        if self._failed is None:
            self.peak = max(self.peak, self.live)

    def _out_of_memory(self, nbytes: int) -> torch.OutOfMemoryError:
        return torch.OutOfMemoryError(
            f"CUDA out of memory. Tried to allocate {nbytes / 2**20:.2f} MiB."
            f" {self.live / GIB:.2f} GiB are allocated on the simulated device."
        )

    def _run_backward(self, *arguments: Any, **more: Any) -> Any:
        """torch's backward pass; an allocation that failed in it is raised after it."""
        if torch._C._current_graph_task_id() != -1:  # a pass within a pass
            return _RUN_BACKWARD(*arguments, **more)
        try:
            done = _RUN_BACKWARD(*arguments, **more)
        finally:
            failed, self._failed = self._failed, None
        try:
            if failed is not None:
                raise failed
        finally:
            del failed  # an error that its own frame holds would keep the memory of all frames
        return done

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Host memory is pinned in powers of two by torch's allocator."""
        nbytes = 1 << max(0, tensor.nbytes - 1).bit_length()
        if self.pinnable is not None and self.pinned + nbytes > self.pinnable:
            raise RuntimeError("CUDA error: out of memory (cudaHostAlloc)")
        self.pinned += nbytes
        return tensor

    # --- operations

    def owns(self, device: Any) -> bool:
        """Whether `device` is this one, by either of its names."""
        return device is not None and torch.device(device).type in (self.kind, "simulated")

    @property
    def _inside(self) -> torch.device:
        return torch.device("cpu" if self.numbers else "meta")

    def _wrapped(self, leaf: Any) -> Any:
        return DeviceTensor(leaf, self) if isinstance(leaf, torch.Tensor) else leaf

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Do one operation, with all that the device makes of it."""
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _Kind(func)
        others: list[torch.Tensor] = []
        inner_args, ours = _unwrapped(args, others)
        made_here, inner_kwargs = False, kwargs
        if kwargs:
            values, named = _unwrapped(kwargs.values(), others)
            inner_kwargs, ours = dict(zip(kwargs, values, strict=True)), ours or named
            made_here = self.owns(kwargs.get("device"))
        if not ours and not made_here:
            return self._on_host(func, kind.name, args, kwargs)
        if kind.name == "_to_copy":
            return self._converted(func, args[0], kwargs)
        if kind.name == "copy_":
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            return self._overwritten(func, args[0], args[1], waits)
        if kind.name == "_local_scalar_dense":
            self.syncs[f"item, {_line()}"] += 1
            return func(args[0].inner) if self.numbers else _one(args[0].dtype)
        if kind.onednn or (ours and others):
            self._check(kind, others)
        if kind.waits:
            self.syncs[f"{kind.name}, {_line()}"] += 1
        if kind.draws and kwargs.get("generator") is None:
            self.draws[f"{kind.name}, {_line()}"] += 1
        if kind.launches:
            self.launches[kind.name] += 1
        if kind.returned and not self.numbers:
            return self._written(kind, args, kwargs)
        if made_here:
            inner_kwargs["device"] = self._inside
            inner_kwargs.pop("pin_memory", None)
        if not self.numbers and (others or kind.draws):
            inner_args, inner_kwargs = _mapped(_without_values, (inner_args, inner_kwargs))
        if kind.view or self.numbers:
            out = func(*inner_args, **inner_kwargs)
        else:
            out = self._shapes(func, inner_args, inner_kwargs)
        if kind.returned:
            return self._written(kind, args, kwargs)
        return DeviceTensor(out, self) if type(out) is torch.Tensor else _mapped(self._wrapped, out)

    def _shapes(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation returns without values; torch takes long to find that out, so it is kept."""
        key = (func, _mapped(_described, (args, tuple(kwargs.items()))))
        if key not in self._known:
            self._known[key] = _mapped(_described, func(*args, **kwargs))
        return _mapped(lambda leaf: leaf.made() if isinstance(leaf, _Shape) else leaf, self._known[key])

    def _on_host(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation in the processor's memory, which may be pinned."""
        if name == "_pin_memory":
            return self._pin(args[0].clone())
        if kwargs.get("pin_memory"):
            return self._pin(func(*args, **{**kwargs, "pin_memory": False}))
        return False if name == "is_pinned" else func(*args, **kwargs)

    def _check(self, kind: _Kind, others: list[torch.Tensor]) -> None:
        """Refuse what the device's kernels refuse; `others` are tensors of the host beside the device's."""
        if kind.onednn:
            raise NotImplementedError(f"Could not run 'aten::{kind.name}' on the '{self.kind}' backend")
        odd = [one for one in others if one.dim() > 0 or one.device.type != "cpu" or kind.alike]
        if odd and kind.by_index:
            self.syncs[f"{kind.name} by an index of the host, {_line()}"] += 1
        elif odd:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices,"
                f" {self.device} and {odd[0].device}! (simulated; {kind.name}, {_line()})"
            )

    def _written(self, kind: _Kind, args: Any, kwargs: dict[str, Any]) -> Any:
        """What an operation returns that wrote to its arguments: these."""
        returned = [args[place] if place < len(args) else kwargs[name] for place, name in kind.returned]
        for tensor in _tensors(returned):
            if tensor.shape != tensor.inner.shape:
                raise NotImplementedError(f"The simulated device cannot change shapes in place ({kind.name})")
        return returned[0] if kind.alone else tuple(returned)

    def _converted(self, func: Any, tensor: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """A tensor in another format, or on another device."""
        target = kwargs.get("device")
        arrives = isinstance(tensor, DeviceTensor) if target is None else self.owns(target)
        how = {
            key: kwargs[key] for key in ("dtype", "layout", "memory_format") if kwargs.get(key) is not None
        }
        if isinstance(tensor, DeviceTensor) and arrives:
            self.launches["_to_copy"] += 1
            return DeviceTensor(func(tensor.inner, **how), self)
        if arrives:
            self._upload(tensor, waits=not kwargs.get("non_blocking"))
            return DeviceTensor(func(tensor, device=self._inside, **how), self)
        assert isinstance(tensor, DeviceTensor)
        self._download(tensor, waits=not kwargs.get("non_blocking"))
        if self.numbers or torch.device(target).type == "meta":
            return func(tensor.inner, device=target, **how)
        return torch.ones(tensor.shape, dtype=kwargs.get("dtype") or tensor.dtype)

    def _overwritten(self, func: Any, to: torch.Tensor, source: torch.Tensor, waits: bool) -> torch.Tensor:
        """A tensor with the values of another one."""
        if isinstance(to, DeviceTensor):
            if isinstance(source, DeviceTensor):
                self.launches["copy_"] += 1
            else:
                self._upload(source, waits)
            inner = source.inner if isinstance(source, DeviceTensor) else source
            func(to.inner, inner if self.numbers else _without_values(inner))
        else:
            assert isinstance(source, DeviceTensor)
            self._download(source, waits)
            func(to, source.inner) if self.numbers else to.fill_(1)
        return to

    def _upload(self, tensor: torch.Tensor, waits: bool) -> None:
        line = _line()
        self.uploads[line] += 1
        self.uploaded += tensor.nbytes
        if waits:  # torch copies, then waits for the stream
            self.syncs[f"copy to the device, {line}"] += 1

    def _download(self, tensor: torch.Tensor, waits: bool) -> None:
        line = _line()
        self.downloads[line] += 1
        self.downloaded += tensor.nbytes
        if waits:
            self.syncs[f"copy to the host, {line}"] += 1

    # --- torch's own names

    def __enter__(self) -> "SimulatedDevice":
        global _active
        assert _active is None, "There is one simulated device at a time"
        _extension_device()
        if not self.numbers:
            importlib.import_module("torch._dynamo")  # shapes need it, and it must see torch as it is
        _active = self
        self._open = contextlib.ExitStack()
        self._open.enter_context(_state_of_accelerate())
        for owner, name, value in self._names():
            self._open.enter_context(mock.patch.object(owner, name, value, create=True))
        # Else modules would keep their parameters' objects, and so their kind.
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._open.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        self._open.enter_context(torch.autograd.set_multithreading_enabled(False))
        for module in (torch.autograd, torch.autograd.graph):
            self._open.enter_context(mock.patch.object(module, "_engine_run_backward", self._run_backward))
        self._open.enter_context(_Mode(self))
        return self

    def __exit__(self, *error: Any) -> None:
        global _active
        _active = None
        self._open.close()

    def _names(self) -> Iterator[tuple[Any, str, Any]]:
        yield F, "scaled_dot_product_attention", _attention
        yield torch.Tensor, "to", self._to
        yield torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor.to(self.device)
        yield torch, "Generator", self._generator()
        for name in ("tensor", "as_tensor"):
            yield torch, name, self._then_moved(getattr(torch, name))
        if self.kind == "mps":
            yield torch.backends.mps, "is_available", lambda: True
            yield torch.backends.mps, "is_built", lambda: True
            yield torch.backends.mps, "is_macos_or_newer", lambda major, minor: (major, minor) <= (14, 0)
            for name in ("empty_cache", "manual_seed"):
                yield torch.mps, name, lambda *args: None
            yield torch.mps, "synchronize", lambda: self.syncs.update([f"synchronize, {_line()}"])
            yield torch.mps, "current_allocated_memory", lambda: self.live
            yield torch.mps, "driver_allocated_memory", lambda: self.live
            yield torch.mps, "recommended_max_memory", lambda: self.total
            return
        for name, value in self._cuda().items():
            yield torch.cuda, name, value

    @property
    def _to(self) -> Callable[..., torch.Tensor]:
        """Without an index, torch would ask the device itself for it."""
        real = torch.Tensor.to

        def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            args, kwargs = _mapped(self._indexed, (args, kwargs))
            if args and isinstance(args[0], DeviceTensor):
                args = (self.device, args[0].dtype, *args[1:])
            return real(tensor, *args, **kwargs)

        return to

    def _indexed(self, leaf: Any) -> Any:
        return self.device if isinstance(leaf, str | torch.device) and self.owns(leaf) else leaf

    def _generator(self) -> Any:
        """Generators of the device are those of the processor: they draw other numbers than a card's."""
        real = torch.Generator

        class Kind(type):
            def __instancecheck__(cls, instance: Any) -> bool:
                return isinstance(instance, real)

        class Generator(metaclass=Kind):
            def __new__(cls, device: Any = "cpu") -> Any:
                return real("cpu" if self.owns(device) else device)

        return Generator

    def _then_moved(self, real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            if not self.owns(device):
                return real(*args, device=device, **kwargs)
            gradient = kwargs.pop("requires_grad", False)
            return real(*args, **kwargs).to(self.device).requires_grad_(gradient)

        return make

    def _cuda(self) -> dict[str, Any]:
        name = "Simulated RTX"
        properties = types.SimpleNamespace(
            name=name, major=self.capability[0], minor=self.capability[1], total_memory=self.total,
            multi_processor_count=28,
        )  # fmt: skip

        def bf16(including_emulation: bool = True) -> bool:
            return including_emulation or self.capability >= (8, 0)

        def fraction(share: float, device: Any = None) -> None:
            self.limit = int(share * self.total)

        def live(device: Any = None) -> int:
            return self.live

        def peak(device: Any = None) -> int:
            return self.peak

        def reset_peak(device: Any = None) -> None:
            self.peak = self.live

        def free(device: Any = None) -> tuple[int, int]:
            return max(0, self.total - self.others - self.live), self.total

        def synchronize(device: Any = None) -> None:
            self.syncs[f"synchronize, {_line()}"] += 1

        nothing = (
            "set_device", "_lazy_init", "init", "empty_cache", "ipc_collect", "manual_seed",
            "manual_seed_all",
        )  # fmt: skip
        return {
            # Each a function of its own, as torch's compiler wants names to be unique.
            **{name: lambda *args, **kwargs: None for name in nothing},
            "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
            "is_initialized": lambda: True, "get_device_properties": lambda device=None: properties,
            "get_device_name": lambda device=None: name, "is_bf16_supported": bf16,
            "get_device_capability": lambda device=None: self.capability,
            "get_arch_list": lambda: [f"sm_{self.capability[0]}{self.capability[1]}"],
            "synchronize": synchronize, "memory_allocated": live, "max_memory_allocated": peak,
            "memory_reserved": live, "max_memory_reserved": peak, "reset_peak_memory_stats": reset_peak,
            "mem_get_info": free, "set_per_process_memory_fraction": fraction, "Stream": _Stream,
            "Event": _Event, "current_stream": _Stream, "default_stream": _Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "device": lambda device: contextlib.nullcontext(),
        }  # fmt: skip


@contextlib.contextmanager
def _state_of_accelerate() -> Iterator[None]:
    """accelerate asks once in a process which device there is."""
    from accelerate import PartialState

    before = dict(PartialState._shared_state)
    PartialState._shared_state.clear()
    try:
        yield
    finally:
        PartialState._shared_state.clear()
        PartialState._shared_state.update(before)


def _without_values(leaf: Any) -> Any:
    """As an operation gets it whose result has a shape alone."""
    if isinstance(leaf, torch.Tensor):
        return leaf if leaf.device.type == "meta" else leaf.to("meta")
    return None if isinstance(leaf, torch.Generator) else leaf


def _unwrapped(values: Iterable[Any], others: list[torch.Tensor]) -> tuple[tuple[Any, ...], bool]:
    """Arguments with what the device's tensors hold in their place, and whether there is one; tensors of the
    host are appended to `others`. Every operation comes by here, so it asks by exact type first."""
    found: list[Any] = []
    ours = False
    for value in values:
        kind = type(value)
        if kind is DeviceTensor:
            found.append(value.inner)
            ours = True
        elif kind in PLAIN:
            found.append(value)
        elif kind in (list, tuple) and not (value and type(value[0]) in PLAIN):
            inner, within = _unwrapped(value, others)
            found.append(inner)
            ours = ours or within
        else:
            if isinstance(value, torch.Tensor):
                others.append(value)
            found.append(value)
    return tuple(found), ours


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """A nest of tuples, lists (which become tuples) and dicts with its leaves changed; torch's own function
    takes several times as long."""
    if isinstance(tree, tuple | list):
        return tuple([_mapped(change, branch) for branch in tree])
    if isinstance(tree, dict):
        return {key: _mapped(change, branch) for key, branch in tree.items()}
    return change(tree)


def _tensors(tree: Any) -> list[torch.Tensor]:
    """All tensors of such a nest."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        return []
    return [tensor for branch in tree for tensor in _tensors(branch)]


def _one(dtype: torch.dtype) -> Any:
    """What is read of a tensor without values."""
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _line() -> str:
    """The innermost line of lora_core that is at work."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        _, found, file = frame.f_code.co_filename.rpartition("/lora_core/")
        if found:
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


_attention_of_torch = F.scaled_dot_product_attention


class _FusedAttention(torch.autograd.Function):
    """One kernel each way, which keeps its inputs, its output and a number for each row."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, mask: Any, how: dict[str, Any]) -> torch.Tensor:
        card = q.card
        card.launches["attention"] += 1
        for other in (k, v, mask):
            assert other is None or isinstance(other, DeviceTensor), "attention over two devices"
        inner = [None if one is None else one.inner for one in (q, k, v, mask)]
        if card.numbers:
            values = _attention_of_torch(*inner, **how)
        else:  # heads beside each other in memory, as the kernels leave them
            shape = (q.shape[0], q.shape[2], q.shape[1], v.shape[3])
            values = torch.empty(shape, dtype=q.dtype, device="meta").transpose(1, 2)
        out = DeviceTensor(values, card)
        rows = torch.empty(q.shape[:-1], dtype=torch.float32, device=card.device)
        ctx.save_for_backward(q, k, v, mask, out, rows)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors[:4]
        q.card.launches["attention backward"] += 1
        if not q.card.numbers:
            return (*map(torch.empty_like, (q, k, v)), None, None)
        inputs = [one.inner.detach().requires_grad_() for one in (q, k, v)]
        with torch.enable_grad():
            out = _attention_of_torch(*inputs, None if mask is None else mask.inner, **ctx.how)
        grads = torch.autograd.grad(out, inputs, grad.inner)  # type: ignore[attr-defined]
        return (*(DeviceTensor(one, q.card) for one in grads), None, None)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """torch chooses the kernel by the C++ device, and knows none for extensions."""
    how = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if not isinstance(query, DeviceTensor):
        return _attention_of_torch(query, key, value, attn_mask, **how)
    result: torch.Tensor = _FusedAttention.apply(query, key, value, attn_mask, how)
    return result


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    wait = record

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        if _active is not None:
            _active.syncs[f"event, {_line()}"] += 1

    def elapsed_time(self, other: "_Event") -> float:
        return 1.0


class _Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    wait_stream = wait_event

    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None:
        if _active is not None:
            _active.syncs[f"stream, {_line()}"] += 1

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *error: Any) -> None:
        pass


def _main() -> int:
    """The command line of lora_core on a simulated device, and what it saw on stderr."""
    import argparse

    from lora_core.__main__ import main

    parser = argparse.ArgumentParser(prog="tests.simulated.device")
    parser.add_argument("--kind", default="cuda")
    parser.add_argument("--gib", type=float, default=12)
    parser.add_argument("--capability", default="8.6")
    parser.add_argument("--fail-at", type=int, default=0)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    major, minor = map(int, options.capability.split("."))
    card = SimulatedDevice(options.kind, options.gib, capability=(major, minor))
    card.fail_at = options.fail_at
    try:
        with card:
            return main(options.words)
    finally:
        print(card.report(), file=sys.stderr)  # noqa: T201
        for name in ("syncs", "uploads", "downloads", "draws"):
            print(name, dict(getattr(card, name).most_common(20)), file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    sys.exit(_main())
