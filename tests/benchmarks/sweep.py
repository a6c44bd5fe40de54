"""The sweep behind the demo's preset: held-out gain over steps for settings beside each other.

    python -m tests.benchmarks.sweep [demo|second] [settings|rates] > table.md

Each variant is trained as a separate process on one core, with equal rank and batch, from several seeds; its
checkpoints are judged by `tests/evaluator.py`. The preset was chosen on the demo's pictures alone; the second
set (`tests/benchmarks/pictures.py`) shows whether the choice holds elsewhere. See docs/sweep.md.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from lora_core.runs.events import CheckpointDone, read_events
from lora_core.runs.folder import RunFolder
from tests.benchmarks.pictures import drawn_set
from tests.benchmarks.rows import print_gains
from tests.evaluator import Evaluator

ROOT = Path(__file__).resolve().parents[2]
BASE, DEMO = ROOT / "assets" / "base", ROOT / "assets" / "demo"
SEEDS = (0, 1)
COLUMNS = (20, 40, 60, 80, 120)
SAME: dict[str, object] = {
    "adapter.rank": 8, "train.batch_size": 8, "train.steps": 120, "validation.every": 0,
    "validation.pictures": 0.0, "sample.every": 0, "save.every": 20, "save.keep_last": 1000,
    "optimizer.text_encoder_lr": 5e-4, "optimizer.warmup": 0.05,
}  # fmt: skip
Settings = Mapping[str, object]
T = TypeVar("T")
Gains = Callable[[Path, T, int, Evaluator, float], list[float]]


def variants() -> dict[str, Settings]:
    """What is compared: layers by rate, then one thing at a time beside the preset's choice."""
    found: dict[str, Settings] = {
        f"{targets}, {rate:g}": {"adapter.targets": targets, "optimizer.lr": rate}
        for targets in ("attention", "kohya", "locon")
        for rate in (1e-3, 3e-3, 6e-3)
    }
    chosen = {
        "adapter.targets": "locon", "optimizer.lr": 3e-3, "optimizer.text_encoder_lr": 3e-3,
        "optimizer.warmup": 0.0,
    }  # fmt: skip
    one_thing: dict[str, Settings] = {
        "as it is": {},
        **{
            f"text encoder at {rate:g}": {"optimizer.text_encoder_lr": rate}
            for rate in (0.0, 5e-4, 1.5e-3, 6e-3)
        },
        "UNet at 2e-3": {"optimizer.lr": 2e-3},
        "warm-up of 5%": {"optimizer.warmup": 0.05},
        "constant rate": {"optimizer.schedule": "constant"},
        "LoRA+ 4, UNet at 1.5e-3": {"optimizer.lora_plus": 4.0, "optimizer.lr": 1.5e-3},
        "LoRA+ 16, UNet at 7.5e-4": {"optimizer.lora_plus": 16.0, "optimizer.lr": 7.5e-4},
        "min-SNR 5": {"loss.min_snr": 5.0},
        "EMA 0.9": {"save.ema": 0.9},
        "alpha 16": {"adapter.alpha": 16.0},
        "Prodigy": {"optimizer.name": "prodigy", "optimizer.lr": 1.0, "optimizer.text_encoder_lr": 1.0},
        "Lion, 6e-4": {"optimizer.name": "lion", "optimizer.lr": 6e-4, "optimizer.text_encoder_lr": 1e-4},
    }
    return found | {f"the preset, {name}": {**chosen, **more} for name, more in one_thing.items()}


def rates() -> dict[str, Settings]:
    """Fixed rates beside the one that a range test finds, which begins far too low."""
    found: dict[str, Settings] = {}
    for targets, encoder in (("attention", 0.0), ("locon", 1.0)):
        same = {"adapter.targets": targets, "optimizer.warmup": 0.0}
        for octave in range(3, 7):
            rate = 1e-4 * 2**octave
            fixed = {"optimizer.lr": rate, "optimizer.text_encoder_lr": encoder * rate}
            found[f"{targets}, {rate:g}"] = {**same, **fixed}
        low = {
            "optimizer.lr": 1e-4,
            "optimizer.text_encoder_lr": encoder * 1e-4,
            "optimizer.range_test": "true",
        }
        found[f"{targets}, auto from 1e-4"] = {**same, **low}
    return found


def gains_of(pictures: Path, settings: Settings, seed: int, judge: Evaluator, base: float) -> list[float]:
    """The gain at each of `COLUMNS`."""
    with tempfile.TemporaryDirectory() as home:
        words = [w for k, v in (SAME | dict(settings)).items() for w in ("--set", f"{k}={v}")]
        command = [sys.executable, "-m", "lora_core", "train", str(pictures / "train"), "--preset", "demo"]
        command += ["--name", "run", "--workspace", home, "--set", f"seed={seed}", *words]
        one_core = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=one_core, check=True, capture_output=True)
        run = RunFolder(Path(home) / "runs" / "run")
        told = run.progress().rate
        if told is not None:
            sys.stderr.write(f"seed {seed}: the range test took {told.rate:g}\n")
        saved = {e.step: e for e in read_events(run.events_file)[0] if isinstance(e, CheckpointDone)}
        files = [run.path / saved[step].path / "adapter.safetensors" for step in COLUMNS]
        return [base - float(judge.losses(file).mean()) for file in files]


def print_table(what: str, steps: Sequence[int], rows: Mapping[str, T], gains: Gains[T]) -> None:
    """The table of the set that the command line names, "demo" or "second".

    Args:
        what: heads the names.
        steps: the columns.
        rows: what is compared, by name.
        gains: called with (pictures, what is compared, seed, judge, the base's loss); a gain for each step.
    """
    with tempfile.TemporaryDirectory() as folder:
        pictures = drawn_set(Path(folder) / "second") if "second" in sys.argv[1:] else DEMO
        judge = Evaluator(BASE, pictures / "held_out", looks=8)
        base = float(judge.losses().mean())
        found = (
            (name, [gains(pictures, row, seed, judge, base) for seed in SEEDS]) for name, row in rows.items()
        )
        print_gains(what, base, steps, found)


def main() -> None:
    """Print the table of a set."""
    chosen = rates if "rates" in sys.argv[1:] else variants
    print_table("settings", COLUMNS, chosen(), gains_of)


if __name__ == "__main__":
    main()
