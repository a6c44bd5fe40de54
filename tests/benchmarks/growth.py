"""How cost grows: with the batch, the tokens, the pictures and the steps. Nothing may grow faster than it."""

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from PIL import Image

from lora_core.backends.onednn import DIRECT, prepack
from lora_core.lora.inject import inject
from lora_core.lora.layer import FlatParams, LoraSpec
from lora_core.model_files.families import ATTENTION
from lora_core.model_files.starting_settings import starting_settings
from lora_core.models.load import BaseModel, load_base
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from tests.benchmarks.rows import Row
from tests.tiny import tiny_folder

ROOT = Path(__file__).resolve().parents[2]
REPEATS = 15
MOST = 2.1
MEGABYTE = 2**20


def _doubled(what: str, cost: Callable[[int], Callable[[], object]], sizes: tuple[int, ...]) -> Row:
    """Each size is twice the one before; the worst ratio counts. Sizes take turns."""
    works = [cost(size) for size in sizes]
    for work in works:
        work()
    taken: list[list[float]] = [[] for _ in sizes]
    for _ in range(REPEATS):
        for place, work in enumerate(works):
            began = time.process_time()
            work()
            taken[place].append(time.process_time() - began)
    medians = [statistics.median(times) for times in taken]
    ratios = [after / before for before, after in itertools.pairwise(medians)]
    listed = ", ".join(
        f"{size}: {1e3 * seconds:.0f} ms" for size, seconds in zip(sizes, medians, strict=True)
    )
    return Row(what, f"{max(ratios):.2f} ({listed})", f"at most {MOST}", max(ratios) <= MOST)


def _adapted_base() -> tuple[BaseModel, FlatParams]:
    base = load_base("demo", torch.device("cpu"), torch.float32)
    base.denoiser.requires_grad_(False)
    injected = inject({"unet": base.denoiser}, ["unet"], ATTENTION, LoraSpec(8, 8.0), 0)
    storage = FlatParams([list(injected.layers.values())])
    prepack(base.denoiser, DIRECT)
    return base, storage


def step_rows() -> list[Row]:
    """The embedded base's forward and backward pass."""
    base, storage = _adapted_base()
    width = base.denoiser.config.cross_attention_dim

    def work(batch: int, tokens: int) -> Callable[[], object]:
        latents, context = torch.randn(batch, base.latent_channels, 16, 16), torch.randn(batch, tokens, width)
        timesteps = torch.full((batch,), 500)

        def once() -> None:
            storage.zero_grad()
            base.denoiser(latents, timesteps, context, return_dict=False)[0].square().mean().backward()

        return once

    return [
        _doubled("Step: the batch doubled, 4 to 32", lambda size: work(size, 77), (4, 8, 16, 32)),
        _doubled("Step: tokens doubled, 75 to 300", lambda size: work(4, size), (75, 150, 300)),
    ]


def picture_rows(folder: Path) -> list[Row]:
    """Preparation of 10 to 1,280 pictures of one size, to the first step; and memory."""
    seconds, memory, counts = [], [], (10, 20, 40, 80, 160, 320, 640, 1280)
    for count in counts:
        run = _toy_run(folder / str(count), count, 1)
        began = time.perf_counter()
        memory.append(_peak_of(run))
        story = events.read_events(run.events_file)[0]
        first = next(event for event in story if isinstance(event, events.Preparing))
        last = next(event for event in story if isinstance(event, events.StepDone))
        seconds.append(last.time - first.time)
        sys.stderr.write(f"{count} images: {seconds[-1]:.1f} s, {time.perf_counter() - began:.1f} s in all\n")
    ratios = [after / before for before, after in itertools.pairwise(seconds)]
    listed = ", ".join(f"{count}: {taken:.1f} s" for count, taken in zip(counts, seconds, strict=True))
    # What a latent and a caption take in memory, 16 kB and 200 kB, is what a picture may add.
    added = (memory[-1] - memory[0]) / (counts[-1] - counts[0])
    return [
        Row("Preparation: images doubled, 10 to 1,280", f"{max(ratios):.2f} ({listed})", f"at most {MOST}",
            max(ratios) <= MOST),
        Row("Memory for each further image", f"{added / 1024:.0f} kB", "at most 300 kB",
            added <= 300 * 1024),
    ]  # fmt: skip


def memory_row(folder: Path, steps: int = 10_000) -> Row:
    """10,000 steps of a toy base: memory in the first 1,000 and in the last 1,000 before the export."""
    run = _toy_run(folder / "long", 8, steps)
    seen: list[tuple[int, int]] = []
    process = _begun(run)
    reader = psutil.Process(process.pid)
    while process.poll() is None:
        time.sleep(0.5)
        try:
            size = reader.memory_info().rss
        except psutil.NoSuchProcess:
            break
        step = run.progress().step
        if step:
            seen.append((step, size))
    assert process.returncode == 0
    early = max(size for step, size in seen if step <= steps // 10)
    late = max(size for step, size in seen if steps * 9 // 10 <= step < steps)
    grown = (late - early) / MEGABYTE
    return Row(
        f"Memory grown from step {steps // 10:,} to {steps:,}", f"{grown:.1f} MB", "below 5 MB", grown < 5
    )


def _toy_run(home: Path, count: int, steps: int) -> RunFolder:
    pictures = home / "pictures"
    pictures.mkdir(parents=True)
    for number in range(count):
        Image.effect_noise((64, 64), number % 100 + 1).convert("RGB").save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"noise, number {number % 7}")
    base = tiny_folder(home / "base")
    settings = {
        **starting_settings("demo", None), "name": "toy", "model.base": str(base),
        "dataset.path": str(pictures),
        "train.steps": steps, "train.batch_size": 1, "train.resolution": 64, "validation.every": 0,
        "validation.pictures": 0.0, "sample.every": 0, "save.every": 0, "optimizer.text_encoder_lr": 0.0,
    }  # fmt: skip
    return RunFolder.create(home / "home" / "runs" / "toy", RunConfig().changed(settings))


def _begun(run: RunFolder) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "lora_core", "resume", str(run.path)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)


def _peak_of(run: RunFolder) -> int:
    process = _begun(run)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, run.log_file.read_text()
    return usage.ru_maxrss * 1024


def growth_rows() -> list[Row]:
    """All of it."""
    with tempfile.TemporaryDirectory() as folder:
        return [*step_rows(), *picture_rows(Path(folder)), memory_row(Path(folder))]
