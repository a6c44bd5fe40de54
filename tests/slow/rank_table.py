"""What rank do I need? The demo trained at several ranks: gain on things that no training saw, size of the
file, and the rank that it turns out to need.

    python -m tests.slow.rank_table [FOLDER]
    python -m tests.slow.rank_table auto [STEPS] [demo|second|subject ...]

Prints the tables of docs/rank.md, the second that of `adapter.rank = auto` on three sets or those named, with
the demo's preset, all of its steps or STEPS. The gains are those of `tests/evaluator.py`, which shares no
code with the trainer; the needed rank is what `shrink --intrinsic` finds, on the same pictures with looks of
its own.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from lora_core.runs.events import RanksChosen, read_events
from lora_core.runs.folder import RunFolder
from tests.benchmarks.pictures import SETS, picture_set
from tests.evaluator import Evaluator, mean_and_error

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = ROOT / "assets" / "demo" / "held_out"
RANKS = (1, 2, 4, 8, 16, 32)
SETTINGS: dict[str, object] = {
    "adapter.targets": "attention", "optimizer.lr": 1e-3, "optimizer.text_encoder_lr": 5e-4,
    "optimizer.warmup": 0.05,
    "train.steps": 300, "sample.every": 0,
}  # fmt: skip
"""Attention alone, where the adapter has no room to spare and rank matters most."""


def said(*words: object) -> str:
    command = [sys.executable, "-m", "lora_core", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def automatic(home: Path, steps: list[str], sets: list[str]) -> None:
    """Train with `adapter.rank = auto` on each set; its file beside that of all ranks."""
    out = sys.stdout.write
    out("| set | rank 16 | auto | share | gain of rank 16 (standard error) | auto keeps | by the run |\n")
    out(f"|{'---|' * 7}\n")
    for name in sets:
        pictures = picture_set(name, home)
        words = ["--preset", "demo", "--set", "adapter.rank=auto", "--set", "sample.every=0", *steps]
        lines = said("train", pictures / "train", "--name", name, "--workspace", home, *words)
        cut = Path(lines.strip().splitlines()[-1])
        run = RunFolder(cut.parents[1])
        step = next(e.step for e in read_events(run.events_file)[0] if isinstance(e, RanksChosen))
        whole = ["--checkpoint", step, "--full-rank", "--name", "whole", "--workspace", home]
        full = Path(said("export", name, *whole).strip().splitlines()[-1])
        judge = Evaluator(ROOT / "assets" / "base", pictures / "held_out")
        base, of_all, of_cut = judge.losses(), judge.losses(full), judge.losses(cut)
        gain, error = mean_and_error(base - of_all)
        ranks = run.progress().ranks
        assert ranks is not None
        sizes = [file.stat().st_size for file in (full, cut)]
        lost, lost_error = mean_and_error(of_cut - of_all)
        kept = f"{1 - lost / gain:.2%} ± {lost_error / gain:.2%}"
        by_run = f"{ranks.kept:.2%} ± {ranks.standard_error:.2%}"
        figures = f"{sizes[0] / 1e6:.2f} MB | {sizes[1] / 1e6:.2f} MB | {sizes[1] / sizes[0]:.0%}"
        out(f"| {name} | {figures} | {gain:.4f} ({error:.4f}) | {kept} | {by_run} |\n")
        sys.stderr.write(f"{name}: {ranks.sentence}\n")
        sys.stdout.flush()


def main() -> None:
    """Train, measure, print."""
    if "auto" in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            steps = [f"train.steps={word}" for word in sys.argv[1:] if word.isdigit()]
            sets = [name for name in ("demo", *SETS) if name in sys.argv] or ["demo", *SETS]
            automatic(Path(folder), [word for one in steps for word in ("--set", one)], sets)
        return
    home = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    judge = Evaluator(ROOT / "assets" / "base", HELD_OUT)
    base = judge.losses()
    out = sys.stdout.write
    out("| rank | file | gain (standard error) | of the base's loss | rank that it needs | file at that |\n")
    out("|---|---|---|---|---|---|\n")
    for rank in RANKS:
        # The product of rate and alpha / rank stays the same, so that only the rank differs.
        settings = SETTINGS | {"adapter.rank": rank, "adapter.alpha": rank}
        more = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        lines = said("train", "demo", "--name", f"rank-{rank}", "--workspace", home, *more)
        export = Path(lines.strip().splitlines()[-1])
        shrunk = home / f"rank-{rank}-shrunk.safetensors"
        found = json.loads(
            said(
                "shrink",
                export,
                "--base",
                "demo",
                "--out",
                shrunk,
                "--intrinsic",
                "--dataset",
                HELD_OUT,
                "--json",
                "--precision",
                "fp16",
            )
        )
        gained = base - judge.losses(export)
        kept = base - judge.losses(shrunk)
        gain, error = mean_and_error(gained)
        lost, lost_error = mean_and_error(kept - 0.99 * gained)
        out(
            f"| {rank} | {export.stat().st_size / 1e6:.2f} MB | {gain:.4f} ({error:.4f}) |"
            f" {gain / float(base.mean()):.1%} | {found['rank']} |"
            f" {shrunk.stat().st_size / 1e6:.2f} MB, keeps {float(kept.mean()) / gain:.1%} |\n"
        )
        sys.stderr.write(
            f"rank {rank}: shrunk less 99% {lost:+.5f} ({lost_error:.5f}); {found['sentence']}\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
