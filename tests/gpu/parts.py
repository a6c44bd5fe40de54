"""The parts of `python -m tests.gpu`: each yields findings, on a card at the true size, else at toy size."""

import contextlib
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import nn

from lora_core.backends.compact import WeightPolicy, offload_store_for, quantize_int8
from lora_core.generate.pipeline import generate_image
from lora_core.generate.request import GenerationRequest
from lora_core.lora.inject import inject
from lora_core.lora.layer import FlatParams, LoraSpec
from lora_core.model_files.families import ATTENTION, FAMILIES, KOHYA, LOCON, Targets
from lora_core.models import load
from lora_core.models.device import cap_memory, compute_deterministically
from lora_core.models.load import load_base
from lora_core.runs import events
from lora_core.runs.events import read_events
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import FIELDS
from lora_core.train.setup import RuntimePlan
from lora_core.worker import Worker
from tests.benchmarks.sides import ENDINGS, Given, Sides, easel_step, plain_step, start_of
from tests.checkpoints import components, write_folder
from tests.counting import launches
from tests.faults import KILL, Fault, armed
from tests.tiny import tiny_folder, tiny_unet
from tests.train.runs import Toy, broken_at, result, trained, trouble

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
CPU = torch.device("cpu")
RANK = 16
RUNGS = ("none", "checkpointing", "int8", "offload")
BARS = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""How far a gradient may be from that of the processor in fp32, of its norm."""
HELD = {"validation__pictures": 1, "validation__every": 3, "sample__every": 6}


@dataclass
class Finding:
    """A row: what was found, the bar for it, and whether it is met."""

    what: str
    found: str
    bar: str = "none"
    met: bool = True
    part: str = ""
    seconds: float = 0.0


class Bench:
    """What is measured: a device, the size, and a folder for bases and runs."""

    def __init__(self, device: torch.device, toy: bool, folder: Path) -> None:
        self.device, self.toy, self.folder = device, toy, folder
        self.families = ("sd15",) if toy else ("sd15", "sdxl")
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            self.dtype = torch.float16

    def side(self, family: str) -> int:
        """Of an image in pixels."""
        return 32 if self.toy else FAMILIES[family].resolution

    def runs(self, family: str = "") -> Toy:
        """A base of random weights, a few images and a workspace; without a family, of toy size."""
        place = self.folder / (family or "toy")
        if not place.is_dir():
            place.mkdir(parents=True)
            _draw_images(place / "pictures", self.side(family) if family else 32)
            if family and not self.toy:
                write_folder(place / "base", family, torch.bfloat16, "full")
            else:
                tiny_folder(place / "base")
        return Toy(place / "base", place / "pictures", place / "home")

    def run(self, name: str, family: str = "", **changes: Any) -> RunFolder:
        """A new run on the device."""
        kind = (
            f"{self.device.type}:{self.device.index}" if self.device.index is not None else self.device.type
        )
        sizes = {"train__resolution": self.side(family), "train__precision": "auto"} if family else {}
        return self.runs(family).run(name, train__device=kind, **{**sizes, **changes})

    def denoiser(self, family: str) -> nn.Module:
        """A UNet with random weights, which the device makes in a moment and a processor in half a minute."""
        made = (
            ("", tiny_unet()) if self.toy else next(components(FAMILIES[family], "full", 0, str(self.device)))
        )
        return made[1].to(self.device, self.dtype).requires_grad_(False).train()

    def wait(self) -> None:
        """Wait for what the device still does."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


class Step(Given):
    """What a step is made of, on a device."""

    def __init__(self, unet: Any, device: torch.device, dtype: torch.dtype, side: int) -> None:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        self.noise = normal(1, 4, side, side).to(device)
        self.noisy = normal(1, 4, side, side).to(device, dtype)
        self.context = normal(1, 77, unet.config.cross_attention_dim).to(device, dtype)
        self.timesteps = torch.tensor([500], device=device)
        self.more: dict[str, torch.Tensor] = {}
        if unet.config.addition_embed_type:
            ids = torch.full((1, 6), 1024.0)
            self.more = {"text_embeds": normal(1, 1280).to(device, dtype), "time_ids": ids.to(device, dtype)}

    def loss(self, unet: nn.Module) -> torch.Tensor:
        said = unet(self.noisy, self.timesteps, self.context, added_cond_kwargs=self.more, return_dict=False)
        return nn.functional.mse_loss(said[0].float(), self.noise)


def _draw_images(folder: Path, side: int) -> None:
    folder.mkdir()
    for number, colour in enumerate(("red", "blue", "green", "white")):
        image = Image.new("RGB", (side, side), colour)
        ImageDraw.Draw(image).ellipse((side // 8, side // 8, side // 2 + number, side // 2), fill="orange")
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"dot, number {number}, plain")


def _adapted(unet: nn.Module, targets: Targets, rung: str, device: torch.device, folder: Path) -> FlatParams:
    """Put LoRA layers with random factors into a UNet, and take a rung of the memory ladder."""
    injected = inject({"unet": unet}, ["unet"], targets, LoraSpec(RANK, float(RANK)), 0)
    layers = list(injected.layers.values())
    for number, layer in enumerate(layers):
        start_of(layer.down, layer.up, number)
    if rung == "checkpointing":
        unet.enable_gradient_checkpointing()
    if rung in ("int8", "offload"):
        WeightPolicy(
            quantize_int8 if rung == "int8" else None,
            offload_store_for(device, folder) if rung == "offload" else None,
        ).apply_to(unet)
    return FlatParams([layers])


def correctness(bench: Bench) -> Iterator[Finding]:
    """Gradients of all adapted layers and an image, beside the processor's in fp32."""
    dtypes = [torch.float32, torch.bfloat16]
    if bench.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        dtypes.append(torch.float16)

    def gradient(device: torch.device, dtype: torch.dtype, targets: Targets, rung: str) -> torch.Tensor:
        unet = tiny_unet().to(device, dtype).requires_grad_(False).train()
        storage = _adapted(unet, targets, rung, device, bench.folder)
        given = Step(unet, device, dtype, 8)
        return easel_step(unet, storage, given)[1]().cpu().float()

    for name, targets in {"attention": ATTENTION, "kohya": KOHYA, "locon": LOCON}.items():
        for rung in RUNGS if name == "locon" else RUNGS[:1]:
            truth = gradient(CPU, torch.float32, targets, "int8" if rung == "int8" else "none")
            for dtype in dtypes:
                mine = gradient(bench.device, dtype, targets, rung)
                apart = float((mine - truth).norm() / truth.norm())
                what = (
                    f"Gradient, {name}, {rung}, {str(dtype).removeprefix('torch.')}: distance from the CPU's"
                )
                yield Finding(what, f"{apart:.1e}", f"at most {BARS[dtype]:g}", apart <= BARS[dtype])
    images = []
    for device in (CPU, bench.device):
        base = load_base(str(bench.runs().base), device, torch.float32)
        drawn = generate_image(base, GenerationRequest(prompt="a dot", seed=3, steps=4, width=32, height=32))
        images.append(np.asarray(drawn, dtype=np.float64))
    error = float(np.square(images[0] - images[1]).mean())
    decibel = 10 * np.log10(255**2 / max(error, 1e-9))
    yield Finding(
        "Image of 4 steps, PSNR to the CPU's", f"{decibel:.0f} dB", "at least 40 dB", bool(decibel >= 40)
    )


@contextlib.contextmanager
def _kernels(bench: Bench, deterministic: bool) -> Iterator[None]:
    """Deterministic kernels if asked for, or where what is inside chooses them; afterwards the usual ones."""
    cudnn, sdp = torch.backends.cudnn.benchmark, torch.backends.cuda.cudnn_sdp_enabled()
    try:
        if deterministic:
            compute_deterministically(bench.device)
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_cudnn_sdp(sdp)
        torch.backends.cudnn.benchmark = cudnn


def resume(bench: Bench) -> Iterator[Finding]:
    """A run that was broken off, or killed, beside an unbroken one."""
    with _kernels(bench, deterministic=False):
        yield from _resumed(bench)


def _resumed(bench: Bench) -> Iterator[Finding]:
    exact = {"train__deterministic": True} if "train.deterministic" in FIELDS else {}
    rows = {"fp32": {}, "int8, offload, EMA": {
        "train__quantize_base": "int8", "train__offload": True, "save__ema": 0.9,
        "train__gradient_checkpointing": True,
    }}  # fmt: skip
    if bench.device.type == "cuda":
        rows |= {"bf16": {"train__precision": "bf16"}, "fp16": {"train__precision": "fp16"}}
    for number, (name, changes) in enumerate(rows.items()):
        if bench.toy and not changes:
            continue  # the last runs are of this kind
        runs = [
            bench.run(f"{kind}{number}", **{**exact, **changes}) for kind in ("unbroken", "again", "broken")
        ]
        for run in runs[:2]:
            trained(run)
        broken_at(runs[2], events.StepDone, 6)
        trained(runs[2])
        yield _same(f"{name}: twice unbroken", *runs[:2], bar=bool(exact))
        yield _same(f"{name}: broken off and resumed", runs[0], runs[2], bar=bool(exact))
    whole, killed = bench.run("whole", **exact), bench.run("killed", **exact)
    trained(whole)
    code = _child(killed, step=6).wait()
    trained(killed)
    same = _same(f"killed (-{KILL.value}) and resumed", whole, killed, bar=bool(exact))
    same.met &= abs(code) == KILL.value  # positive on Windows
    yield replace(same, found=f"{same.found}, exit code {code}")


def _same(what: str, one: RunFolder, other: RunFolder, bar: bool) -> Finding:
    """Whether two runs left the same bits, else how far they are apart; `bar`: whether that is asked for."""
    if result(one) == result(other):
        return Finding(what, "the same bits", "the same bits")
    files = [run.exports / f"{run.name}.safetensors" for run in (one, other)]
    first, second = (torch.cat([t.flatten().float() for t in load_file(file).values()]) for file in files)
    apart = float((first - second).norm() / first.norm())
    return Finding(what, f"{apart:.1e} apart", "the same bits" if bar else "none", not bar)


def _child(run: RunFolder, gigabytes: float = 0, step: int = 0) -> subprocess.Popen[bytes]:
    """Train a run in a process of its own; what it prints goes nowhere, what it ends with is an event."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # what other parts left in the cache of this process
    command = [sys.executable, "-m", "tests.gpu.child", str(run.path), str(gigabytes), str(step)]
    # The same bits need the same number of threads.
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def step_time(bench: Bench) -> Iterator[Finding]:
    """Seconds of a step beside diffusers with PEFT and beside the frozen base, taking turns (ABAB)."""
    pairs = 3 if bench.toy else 20
    for family in bench.families:
        room = torch.cuda.mem_get_info()[0] if bench.device.type == "cuda" else 0
        if family == "sdxl" and room < 20 * GIB:
            yield Finding("SDXL beside PEFT", "left out: two bases need 20 GB")
            continue
        rung = "checkpointing" if family == "sdxl" else "none"
        for name, side, bar in (("diffusers + PEFT", _peft, 0.75), ("the frozen base", _frozen, 1.35)):
            mine, theirs = _easel(bench, family, rung), side(bench, family, rung)
            times = [[_timed(bench, step) for step in (mine, theirs)] for _ in range(pairs)]
            ratios = sorted(a / b for a, b in times)
            ratio = statistics.median(ratios)
            seconds = [statistics.median(column) for column in zip(*times, strict=True)]
            found = (
                f"{ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}; {seconds[0]:.4f} of {seconds[1]:.4f} s)"
            )
            what = f"Step of {family}, of {name}'s"
            # At toy size the time says nothing.
            yield Finding(what, found) if bench.toy else Finding(what, found, f"at most {bar}", ratio <= bar)
            if name == "the frozen base":
                counts = launches(mine), launches(theirs)
                found = f"{counts[0] / counts[1]:.2f} ({counts[0]:,} of {counts[1]:,})"
                yield Finding(f"Kernels that a step of {family} launches, of {name}'s", found)
            del mine, theirs


def _timed(bench: Bench, step: Callable[[], object]) -> float:
    bench.wait()
    began = time.perf_counter()
    step()
    bench.wait()
    return time.perf_counter() - began


def _warm(sides: Sides) -> Callable[[], None]:
    for _ in range(3):
        sides[0]()
    return sides[0]


def _easel(bench: Bench, family: str, rung: str) -> Callable[[], None]:
    unet = bench.denoiser(family)
    storage = _adapted(unet, ATTENTION, rung, bench.device, bench.folder)
    return _warm(easel_step(unet, storage, Step(unet, bench.device, bench.dtype, bench.side(family) // 8)))


def _peft(bench: Bench, family: str, rung: str) -> Callable[[], None]:
    from peft import LoraConfig

    unet = bench.denoiser(family)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(ENDINGS)))
    factors = [factor for name, factor in unet.named_parameters() if "lora_" in name]
    for factor in factors:
        factor.data = factor.data.float()
    if rung == "checkpointing":
        unet.enable_gradient_checkpointing()
    given = Step(unet, bench.device, bench.dtype, bench.side(family) // 8)
    plain = given.loss

    def loss(unet: nn.Module) -> torch.Tensor:
        with torch.autocast(bench.device.type, bench.dtype, enabled=bench.dtype != torch.float32):
            return plain(unet)

    given.loss = loss
    return _warm(plain_step(unet, given, factors))


def _frozen(bench: Bench, family: str, rung: str) -> Callable[[], None]:
    unet = bench.denoiser(family)
    if rung == "checkpointing":
        unet.enable_gradient_checkpointing()
    given = Step(unet, bench.device, bench.dtype, bench.side(family) // 8)
    given.noisy.requires_grad_()

    def step() -> None:
        given.noisy.grad = None
        given.loss(unet).backward()

    return _warm((step, lambda: torch.zeros(0)))


def switches(bench: Bench) -> Iterator[Finding]:
    """Seconds of a step of SD 1.5 with what might make it faster or exact, of one without, taking turns. Only
    the first is in the program: nothing has a bar, and what fails is a row."""
    pairs, plain = (3 if bench.toy else 20), _easel(bench, "sd15", "none")
    for name, build in {
        "train.deterministic": _deterministic,
        "channels_last": _channels_last,
        "CUDA graph": _graph,
        "torch.compile": _compiled,
    }.items():
        what = f"Step of sd15 with {name}, of one without"
        if name != "channels_last" and bench.device.type != "cuda":
            yield Finding(what, "left out: for CUDA cards")
            continue
        began = time.perf_counter()
        try:
            step = _warm((build(bench), lambda: torch.zeros(0)))
            warm = time.perf_counter() - began
            times = [[_timed(bench, one) for one in (step, plain)] for _ in range(pairs)]
            ratios = sorted(a / b for a, b in times)
            found = (
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), after {warm:.0f} s"
            )
        except Exception as error:  # noqa: BLE001 - what a card does is not known
            found = f"fails: {type(error).__name__}: {str(error)[:150]}"
        yield Finding(what, found)


def _parts(bench: Bench) -> tuple[nn.Module, FlatParams, Step]:
    unet = bench.denoiser("sd15")
    storage = _adapted(unet, ATTENTION, "none", bench.device, bench.folder)
    return unet, storage, Step(unet, bench.device, bench.dtype, bench.side("sd15") // 8)


def _deterministic(bench: Bench) -> Callable[[], None]:
    plain = _easel(bench, "sd15", "none")

    def step() -> None:
        with _kernels(bench, deterministic=True):
            plain()

    return step


def _channels_last(bench: Bench) -> Callable[[], None]:
    unet, storage, given = _parts(bench)
    unet.to(memory_format=torch.channels_last)
    given.noisy = given.noisy.to(memory_format=torch.channels_last)
    return easel_step(unet, storage, given)[0]


def _compiled(bench: Bench) -> Callable[[], None]:
    unet, storage, given = _parts(bench)
    unet.compile()
    return easel_step(unet, storage, given)[0]


def _graph(bench: Bench) -> Callable[[], None]:
    """Forward and backward pass as one launch; clipping and optimizer as they are."""
    unet, storage, given = _parts(bench)
    optimizer = torch.optim.AdamW(storage.groups, 1e-4, weight_decay=1e-2)

    def differentiate() -> None:
        storage.zero_grad()
        given.loss(unet).backward()
        storage.flush_grads()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            differentiate()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        differentiate()

    def step() -> None:
        graph.replay()
        factor = 1.0 / (torch.linalg.vector_norm(storage.grads) + 1e-6)
        if factor < 1.0:
            storage.grads.mul_(factor)
        optimizer.step()

    return step


def memory(bench: Bench) -> Iterator[Finding]:
    """The peak of a step by family and rung, allocated and reserved."""
    cap_memory(bench.device)  # else drivers of Windows move memory to RAM in place of an error
    for family in bench.families:
        for rung in RUNGS:
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            what = f"Step of {family} at {bench.side(family)} px, kohya's layers, {rung}"
            unet = bench.denoiser(family)
            storage = _adapted(unet, KOHYA, rung, bench.device, bench.folder)
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            step = easel_step(unet, storage, Step(unet, bench.device, bench.dtype, bench.side(family) // 8))[
                0
            ]
            try:
                seconds = [_timed(bench, step) for _ in range(2)]
            except torch.OutOfMemoryError:
                yield Finding(what, "does not fit")
                continue
            finally:
                del step, unet, storage
            words = f"{seconds[-1]:.3f} s"
            if bench.device.type == "cuda":
                peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
                words += f", {peaks[0] / GIB:.2f} GiB allocated, {peaks[1] / GIB:.2f} reserved"
            yield Finding(what, words)


def ladder(bench: Bench) -> Iterator[Finding]:
    """Whole runs, from opening to export, on a card that seems to have 6, 8 or 12 GB."""
    for family in bench.families:
        for gigabytes in (6,) if bench.toy else (6, 8, 12):
            run = bench.run(f"cap{gigabytes}", family, train__batch_size=1, **HELD, train__steps=6)
            if bench.toy:
                # A toy fits into any card; `resume` takes the way through a child.
                with armed(Fault("step", nth=3, do="memory")):
                    trained(run)
            else:
                _child(run, gigabytes).wait()
            rungs = [name for name, _ in json.loads(run.plan_file.read_text())["rungs"]]
            found = f"{run.status()}; {', '.join(rungs) or 'no rung'}; {_pace(run)}"
            if run.status() != "done":
                found += f"; {run.progress().reason}"
            limit = "out of memory in a step" if bench.toy else f"within {gigabytes} GB"
            what = f"{family} at {bench.side(family)} px, {limit}"
            yield Finding(what, found, "done", run.status() == "done")


def _pace(run: RunFolder) -> str:
    seconds = [event.seconds for event in _all(run) if isinstance(event, events.StepDone)]
    return f"{statistics.median(seconds):.2f} s a step" if seconds else "no step"


def _all(run: RunFolder) -> list[events.Event]:
    return list(read_events(run.events_file)[0])


def preview(bench: Bench) -> Iterator[Finding]:
    """An image drawn by the warm worker while a run goes on on the same device."""
    for family in bench.families:
        run = bench.run("beside", family, train__batch_size=1, train__steps=60 if not bench.toy else 4)
        answers: list[dict[str, Any]] = []
        worker, beside = Worker(answers.append), ""
        request = {
            "id": "1", "do": "generate", "base": run.config().model.base, "prompt": "a dot", "steps": 4,
            "width": bench.side(family), "height": bench.side(family), "out": str(bench.folder / "drawn"),
        }  # fmt: skip

        def draw(worker: Worker = worker, request: dict[str, Any] = request) -> None:
            worker.handle(request)

        if bench.toy:
            trained(
                run, lambda event: draw() if isinstance(event, events.StepDone) and event.step == 2 else None
            )
        else:
            process = _child(run)
            while process.poll() is None and not any(isinstance(e, events.StepDone) for e in _all(run)):
                time.sleep(0.2)
            draw()
            beside = "" if process.poll() is None else "; the run had ended before"
            process.wait()
        worker.handle({"id": "2", "do": "release"})
        last = next(
            answer for answer in answers if answer["event"] in ("done", "error") and answer["id"] == "1"
        )
        fits = last["event"] == "done"
        words = (f"{last['seconds']:.1f} s" if fits else str(last["message"])) + beside
        met = fits or "memory" in words
        yield Finding(f"Preview of {family} beside a run", words, "drawn, or says that it does not fit", met)
        yield Finding("The run beside it", f"{run.status()}; {_pace(run)}", "done", run.status() == "done")


def bad_moments(bench: Bench) -> Iterator[Finding]:
    """Memory, disk and device give out, at each place; a run goes on or ends in a sentence."""
    for place in ("step", "draw") if bench.toy else ("step", "apply", "validate", "draw"):
        run = bench.run(f"full-{place}", train__steps=6, **HELD)
        words = _outcome(run, Fault(place, nth=2, do="memory"))
        yield Finding(f"Out of memory in {place}", words, "done", run.status() == "done")
    run, fill = bench.run("full-opening"), load.fill

    def full(module: Any, find: Any, dtype: Any, device: Any, where: Any, policy: Any = None) -> None:
        if where.title == "UNet" and not policy:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        fill(module, find, dtype, device, where, policy)

    with mock.patch.object(load, "fill", full):
        words = _outcome(run)
    yield Finding("Out of memory while the base opens", words, "done", run.status() == "done")
    run = bench.run("disk")
    words = _outcome(run, Fault("write", path="checkpoints", times=0, code="ENOSPC"))
    paused = run.status() == "paused"
    trained(run)
    yield Finding(
        "The disk is full, then it is not", words, "paused, then done", paused and run.status() == "done"
    )
    run = bench.run("moved")
    plan = RuntimePlan.of(run, run.config())
    run.plan_file.write_text(
        json.dumps({**vars(plan), "device": "xpu" if bench.device.type != "xpu" else "mps"})
    )
    words = trouble(run)
    yield Finding("A plan of another device", words, "asks", "--accept-changes" in words)


def _outcome(run: RunFolder, *faults: Fault) -> str:
    """Train with faults, and say how it ended."""
    with contextlib.redirect_stderr(io.StringIO()), armed(*faults), contextlib.suppress(Exception):
        trained(run)
    rungs = json.loads(run.plan_file.read_text())["rungs"] if run.plan_file.exists() else []
    words = f"{run.status()}; {', '.join(name for name, _ in rungs) or 'no rung'}"
    return f"{words}; {run.progress().reason}" if run.progress().reason else words
