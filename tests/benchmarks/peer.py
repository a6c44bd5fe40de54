"""Whole processes beside diffusers' text-to-image LoRA script, and the time to a good adapter.

    EASEL_PEER_SCRIPT=train_text_to_image_lora.py python -m tests.benchmarks peer

The script is that of a diffusers release, as it is; it wants `datasets` and `torchvision`. Both sides start
as new processes on an empty workspace, with the same base, pictures, captions, batch and rank. For a whole
process both do the same work in the same number of steps; the time to a good adapter is that of the demo's
preset as it is, against the best of the script's rates. What they make is judged by `tests/evaluator.py`,
which shares no code with the trainer, on pictures new to both.

Besides the demo's pictures there are two sets on which nothing was tuned (`pictures.py`): photographs are not
at hand, so they are drawn by code, one in another style, with things and captions of its own, and one of a
subject.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_core.runs.events import CheckpointDone, Started, read_events
from lora_core.runs.folder import RunFolder
from tests.benchmarks.pictures import picture_set
from tests.benchmarks.rows import Row, ratio_row
from tests.evaluator import Evaluator

ROOT = Path(__file__).resolve().parents[2]
BASE, DEMO = ROOT / "assets" / "base", ROOT / "assets" / "demo"
RANK, BATCH, STEPS, EVERY = 8, 8, 300, 10
RATES = (1e-4, 3e-4, 1e-3, 2e-3)
JUDGED = {"demo": "the demo", "second": "a set that nothing was tuned on", "subject": "a set of a subject"}
BAR = 0.25
ROUNDS = 3
SAME_WORK: dict[str, object] = {
    "adapter.targets": "attention", "optimizer.text_encoder_lr": 0.0, "optimizer.lr": RATES[2],
    "train.steps": STEPS,
}  # fmt: skip
"""What the script does in a step; it has no other layers and leaves the text encoder alone."""
WEIGHTS = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Curve:
    """A training seen from outside: seconds from launch to each saved adapter, and its gain."""

    seconds: list[float]
    gains: list[float]

    def until(self, gain: float) -> float:
        """Seconds to the first that gains so much; infinite where none does."""
        return next((s for s, g in zip(self.seconds, self.gains, strict=True) if g >= gain), float("inf"))


def peer_rows() -> Iterator[Row]:
    """The demo in whole processes, and time to quality on each set; each row as soon as it is known."""
    script = os.environ.get("EASEL_PEER_SCRIPT", "")
    if not Path(script).is_file():
        raise SystemExit("EASEL_PEER_SCRIPT has to name diffusers' train_text_to_image_lora.py.")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        yield _whole_process(script, home / "whole")
        for name, title in JUDGED.items():
            yield _time_to_quality(title, script, picture_set(name, home), home / f"{name}-runs")


def _whole_process(script: str, home: Path) -> Row:
    ratios = []
    for turn in range(ROUNDS):
        seconds = []
        for side in ("easel", "peer"):
            place = home / f"{side}-{turn}"
            began = time.perf_counter()
            if side == "easel":
                _easel(DEMO / "train", place, every=0, more=SAME_WORK)
            else:
                _peer(script, _dataset(DEMO / "train", place), place / "out", RATES[2], every=0)
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[0] / seconds[1])
        sys.stderr.write(f"whole process: {seconds[0]:.1f} of {seconds[1]:.1f} s\n")
    what = f"Demo, launch to exported file ({STEPS} steps): of diffusers' script"
    return ratio_row(what, ratios, 0.5)


def _time_to_quality(name: str, script: str, pictures: Path, home: Path) -> Row:
    judge = Evaluator(BASE, pictures / "held_out", looks=8)
    base = float(judge.losses().mean())

    def gain(file: Path) -> float:
        return base - float(judge.losses(file).mean())

    theirs: dict[float, Curve] = {}
    for rate in RATES:
        out = home / f"peer-{rate:g}" / "out"
        seconds = _peer(script, _dataset(pictures / "train", out.parent), out, rate, EVERY)
        files = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
        theirs[rate] = Curve(seconds, [gain(file / WEIGHTS) for file in files])
        sys.stderr.write(f"{name}, script at {rate:g}: {max(theirs[rate].gains):.4f}\n")
    rate = max(RATES, key=lambda rate: max(theirs[rate].gains))
    target = max(theirs[rate].gains)
    run, began = _easel(pictures / "train", home / "easel", EVERY)
    saved = [event for event in read_events(run.events_file)[0] if isinstance(event, CheckpointDone)]
    mine = Curve(
        [event.time - began for event in saved],
        [gain(run.path / event.path / "adapter.safetensors") for event in saved],
    )
    ratio = mine.until(target) / theirs[rate].until(target)
    found = (
        f"{ratio:.2f} ({mine.until(target):.0f} of {theirs[rate].until(target):.0f} s to a gain of"
        f" {target:.4f}, {target / base:.0%} of the base's loss; the script's best rate is {rate:g}; our best"
        f" is {max(mine.gains):.4f})"
    )
    return Row(f"Time to the script's best held-out gain, {name}", found, f"at most {BAR}", ratio <= BAR)


def _easel(
    pictures: Path, home: Path, every: int, more: Mapping[str, object] | None = None
) -> tuple[RunFolder, float]:
    """Our side with the demo's preset and `more`; returns the run and when it was launched."""
    settings = {
        "adapter.rank": RANK, "train.batch_size": BATCH, "sample.every": 0, "validation.every": 0,
        "validation.pictures": 0, "save.every": every, "save.keep_last": 1000, **(more or {}),
    }  # fmt: skip
    changes = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "lora_core", "train", str(pictures), "--preset", "demo", "--name", "run"]
    began = time.time()
    subprocess.run([*command, "--workspace", str(home), *changes], cwd=ROOT, check=True, capture_output=True)
    run = RunFolder(home / "runs" / "run")
    assert any(isinstance(event, Started) for event in read_events(run.events_file)[0])
    return run, began


def _dataset(pictures: Path, home: Path) -> Path:
    """The pictures with their captions as the script reads them."""
    folder = home / "data"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = ["file_name,text"]
    for picture in sorted(pictures.glob("*.png")):
        shutil.copy(picture, folder)
        caption = picture.with_suffix(".txt").read_text().strip().replace('"', '""')
        lines.append(f'{picture.name},"{caption}"')
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def _peer(script: str, data: Path, out: Path, rate: float, every: int) -> list[float]:
    """The script; returns the seconds from its launch to each checkpoint."""
    command = [
        sys.executable, script, f"--pretrained_model_name_or_path={BASE}", f"--train_data_dir={data}",
        f"--output_dir={out}", "--resolution=128", f"--train_batch_size={BATCH}", "--seed=0",
        f"--max_train_steps={STEPS}", f"--learning_rate={rate}", f"--rank={RANK}", "--center_crop",
        f"--checkpointing_steps={every or 10 * STEPS}", f"--cache_dir={out.parent / 'cache'}",
        "--lr_scheduler=cosine", "--lr_warmup_steps=15",
    ]  # fmt: skip
    began = time.time()
    done = subprocess.run(
        command, cwd=out.parent, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    files = sorted(
        out.glob(f"checkpoint-*/{WEIGHTS}"), key=lambda path: int(path.parent.name.partition("-")[2])
    )
    return [file.stat().st_mtime - began for file in files]
