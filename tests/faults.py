"""Faults for tests: the n-th write, read, step or allocation fails, the process is killed at a named point, a
file is corrupted. Nothing in the product knows of this module.

Inside a test's process, `armed` replaces the functions of the system and of the engine while a context is
open. For a process that may be killed there is a `Nursery`: its children have the engine imported, arm
themselves and train.

Points, by name:
    open       a file is opened for writing        write     bytes are written
    fsync      a file is seen onto the disk        rename    a file or folder gets its final name
    mkdir      a folder is made                    read      a file is opened for reading
    step       a micro-batch begins                apply     the optimizer begins its work
    validate   triples are measured                draw      a sample is drawn
"""

import contextlib
import dataclasses
import errno
import importlib
import io
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tests import warm

ROOT = Path(__file__).resolve().parents[1]
ENGINE = {
    "step": ("lora_core.train.loop", "diffusion_loss"),
    "apply": ("lora_core.train.loop", "optimizer_step"),
    "validate": ("lora_core.evaluate.validator", "eval_losses"),
    "draw": ("lora_core.train.callbacks", "sample_image"),
}
"""The engine's functions behind the points that are none of the system's."""

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
"""On Windows any signal ends a process at once, and its number is the exit code."""
NURSERY = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@dataclass
class Fault:
    """What goes wrong.

    Attributes:
        on: a point.
        path: regular expression that is searched in the path, where the point has one.
        nth: the how-manieth time it goes wrong first, counted from 1.
        times: how often from then on; 0 for always.
        do: "fail" with the error number `code`, "memory" for an error of the allocator, "kill" the process.
        code: the name of an error number, such as "ENOSPC".
        delay: a kill comes so many seconds after the point, from another thread.
        half: a failing write first writes half of its bytes.
    """

    on: str
    path: str = ""
    nth: int = 1
    times: int = 1
    do: str = "fail"
    code: str = "ENOSPC"
    delay: float = 0.0
    half: bool = False
    seen: int = 0

    def due(self, point: str, path: str) -> bool:
        """Whether it goes wrong now; counts the times."""
        if point != self.on or not re.search(self.path, path):
            return False
        self.seen += 1
        return self.seen >= self.nth and (not self.times or self.seen < self.nth + self.times)

    def strike(self, path: str) -> None:
        """Let it go wrong."""
        if self.do == "kill":
            threading.Thread(target=_kill_soon, args=(self.delay,), daemon=True).start()
            if not self.delay:
                time.sleep(60)
        elif self.do == "memory":
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        else:
            number = getattr(errno, self.code)
            raise OSError(number, os.strerror(number), path)


def _kill_soon(delay: float) -> None:
    time.sleep(delay)
    os.kill(os.getpid(), KILL)


class _Watched:
    """A file whose writes can go wrong."""

    def __init__(self, file: Any, hit: Callable[..., Any], path: str) -> None:
        self._file, self._hit, self._path = file, hit, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Watched":
        self._file.__enter__()
        return self

    def __exit__(self, *why: Any) -> Any:
        return self._file.__exit__(*why)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def write(self, data: Any) -> int:
        self._hit("write", self._path, lambda: (self._file.write(data[: len(data) // 2]), self._file.flush()))
        return self._file.write(data)


@contextlib.contextmanager
def armed(*faults: Fault) -> Iterator[None]:
    """The faults strike while the context is open."""
    names: dict[int, str] = {}
    real_open, real_os_open, real_write = io.open, os.open, os.write
    real_fsync, real_rename, real_replace, real_mkdir = os.fsync, os.rename, os.replace, os.mkdir

    def hit(point: str, path: Any, half: Callable[[], Any] | None = None) -> None:
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)
        for fault in faults:
            if fault.due(point, text):
                if fault.half and half is not None:
                    half()
                fault.strike(text)

    def opened(file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        if isinstance(file, int):
            return real_open(file, mode, *more, **named)
        writes = any(letter in mode for letter in "wax+")
        hit("open" if writes else "read", file)
        handle = real_open(file, mode, *more, **named)
        if not writes:
            return handle
        names[handle.fileno()] = os.fsdecode(file)
        return _Watched(handle, hit, os.fsdecode(file))

    def os_opened(path: Any, flags: int, *more: Any, **named: Any) -> int:
        writes = flags & (os.O_WRONLY | os.O_RDWR)
        if writes:
            hit("open", path)
        handle = real_os_open(path, flags, *more, **named)
        names[handle] = os.fsdecode(path)
        return handle

    def written(handle: int, data: Any) -> int:
        hit("write", names.get(handle, ""), lambda: real_write(handle, bytes(data)[: len(data) // 2]))
        return real_write(handle, data)

    def synced(handle: Any) -> None:
        hit("fsync", names.get(handle if isinstance(handle, int) else handle.fileno(), ""))
        real_fsync(handle)

    def renamed(real: Callable[..., None]) -> Callable[..., None]:
        def rename(source: Any, target: Any, **named: Any) -> None:
            hit("rename", target)
            real(source, target, **named)

        return rename

    def made(path: Any, *more: Any, **named: Any) -> None:
        hit("mkdir", path)
        real_mkdir(path, *more, **named)

    with contextlib.ExitStack() as stack:
        for name, new in (
            ("builtins.open", opened), ("io.open", opened), ("os.open", os_opened), ("os.write", written),
            ("os.fsync", synced), ("os.rename", renamed(real_rename)), ("os.replace", renamed(real_replace)),
            ("os.mkdir", made),
        ):  # fmt: skip
            stack.enter_context(mock.patch(name, new))
        for point in {fault.on for fault in faults} & set(ENGINE):
            stack.enter_context(_engine_point(point, hit))
        yield


def _engine_point(point: str, hit: Callable[..., None]) -> Any:
    place, name = ENGINE[point]
    module = importlib.import_module(place)
    real = getattr(module, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        hit(point, "")
        return real(*arguments, **named)

    return mock.patch.object(module, name, wrapped)


def corrupt(path: Path, how: str = "flip") -> None:
    """Spoil a file: "flip" turns a byte in its middle, "cut" takes its second half, "empty" all of it."""
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 0xFF
    path.write_bytes(data if how == "flip" else data[: len(data) // 2] if how == "cut" else b"")


class Nursery:
    """Runs the command line in children of a process that has the engine imported (`tests/warm.py`)."""

    def __init__(self, **environment: str) -> None:
        """`environment` is set while the engine is imported too, in a process of this nursery alone."""
        warm.set_up()
        self._environment = environment

    def command(self, words: Iterable[object], *faults: Fault, **limits: Any) -> tuple[int, str, int]:
        """Run the command line in a child; returns its exit code, negative for a signal, what it said on
        stderr, and the bytes of memory that it held at most.

        Args:
            words: its arguments.
            faults: what goes wrong.
            limits: `file_size`, the largest file in bytes; `memory`, bytes that may be taken beyond what is
                held at the first micro-batch.
        """
        order = {
            "words": [str(word) for word in words],
            "faults": [dataclasses.asdict(fault) for fault in faults],
            "limits": limits,
        }
        code = "import sys, tests.faults; tests.faults.obey(sys.argv[1])"
        own = self._environment
        environment = {**os.environ, **NURSERY, **own}
        words = ["-c", code, json.dumps(order)]
        child, said = warm.captured(
            2, "engine", words, environment=environment, imported_with=own, folder=str(ROOT)
        )
        with said:
            errors = said.read()
        return child.wait(), errors, child.peak

    def train(self, run: Path, *faults: Fault, **limits: Any) -> tuple[int, str]:
        """Train a run in a child; exit code and stderr as from `command`."""
        return self.command(["resume", run], *faults, **limits)[:2]

    def close(self) -> None:
        """End the process of this nursery alone."""
        if self._environment:
            warm.end_server("engine", self._environment)


def obey(text: str) -> None:
    """A child: do as the command line does, and leave."""
    code, order = 1, json.loads(text)
    try:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for its whole life
        _limit(order["limits"])
        from lora_core.__main__ import main

        with armed(*(Fault(**fault) for fault in order["faults"])):
            code = main(order["words"])
    except BaseException:  # noqa: BLE001 - it is shown, and the child ends in any case
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _limit(limits: dict[str, Any]) -> None:
    import resource

    if limits.get("file_size"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_size"], limits["file_size"]))
    if limits.get("memory"):
        from lora_core.train import trainer

        real = trainer.MemoryFallback

        def ladder(*arguments: Any) -> Any:
            import psutil

            most = psutil.Process().memory_info().vms + limits["memory"]
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            return real(*arguments)

        trainer.MemoryFallback = ladder  # type: ignore[misc,assignment]
