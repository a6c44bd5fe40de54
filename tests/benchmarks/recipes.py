"""Recipes at equal time: the gain of adapter kinds, optimizers, losses and noise levels beside the preset's.

    python -m tests.benchmarks.recipes [demo|second|subject] [SECONDS] [SEEDS] [GROUP ...] > table.md

Each recipe is the demo's preset with something changed, takes as many steps as fit into the same seconds of
training (30 unless given), and goes through the product's own queue and comparison. Its gain on the held-out
images of the run comes with the difference to the preset, paired by image and noise; a column beside it has
the gain on images of things that no run saw, by `tests/evaluator.py`, which shares no code with the trainer.
What the machine cannot run (an optional package is missing) is named below the table. See docs/recipes.md.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_core.errors import LoraError
from lora_core.model_files.starting_settings import starting_settings
from lora_core.runs.costs import Trial, compare_trials
from lora_core.runs.folder import RunFolder
from lora_core.runs.preflight import preflight, require_none_blocking
from lora_core.runs.queue import Queue, run_queue
from lora_core.settings.config import FIELDS, RunConfig, choices_of
from lora_core.train.autotune import time_steps
from tests.benchmarks.pictures import drawn_set, subject_set
from tests.benchmarks.rows import machine
from tests.evaluator import Evaluator

ROOT = Path(__file__).resolve().parents[2]
BASE, DEMO = ROOT / "assets" / "base", ROOT / "assets" / "demo"
SECONDS, SEEDS = 30.0, 1
EVERY = 6
"""Validations of a run."""
SAME: dict[str, Any] = {
    **starting_settings("demo", None), "sample.every": 0, "save.every": 0, "validation.patience": 0,
    "validation.draws_per_image": 16,
}  # fmt: skip
ONE_EACH = {
    "adapter": ("adapter.kind", "adapter.targets"),
    "optimizer": ("optimizer.name", "optimizer.schedule"),
    "loss": ("loss.type",),
    "timesteps": ("timesteps.distribution", "train.timesteps"),
}
"""Settings of which each choice is a recipe, by group, where there are such settings."""
OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "adapter": {
        "rank 2": {"adapter.rank": 2, "adapter.alpha": 2.0},
        "rank 16": {"adapter.rank": 16, "adapter.alpha": 16.0},
        "rank auto": {"adapter.rank": "auto"},
        "rsLoRA": {"adapter.rslora": True},
        "dropout 0.1": {"adapter.dropout": 0.1},
    },
    "optimizer": {
        "LoRA+ 4": {"optimizer.lora_plus": 4.0, "optimizer.lr": 1.5e-3},
        "EMA 0.9": {"save.ema": 0.9},
        "warm-up of 5%": {"optimizer.warmup": 0.05},
    },
    "loss": {
        "min-SNR off": {"loss.min_snr": 0.0},
        "min-SNR 1": {"loss.min_snr": 1.0},
        "noise offset 0.05": {"loss.noise_offset": 0.05},
    },
}


def recipes(group: str) -> dict[str, dict[str, Any]]:
    """What is compared, by name: the preset first."""
    found: dict[str, dict[str, Any]] = {"the preset": {}}
    for setting in ONE_EACH[group]:
        for key, row in (choices_of(setting) or {}).items() if setting in FIELDS else ():
            if key != SAME.get(setting, RunConfig().get(setting)):
                found[row.title] = {setting: key, **usual_rate(setting, row)}
    return found | OTHERS.get(group, {})


def usual_rate(setting: str, row: Any) -> dict[str, Any]:
    """An optimizer's own rate, by as much above AdamW's as the preset's is."""
    if setting != "optimizer.name":
        return {}
    alone = getattr(row, "one_rate", False)
    rate = getattr(row, "lr", 1e-4) * (1.0 if alone else SAME["optimizer.lr"] / 1e-4)
    return {"optimizer.lr": rate, "optimizer.text_encoder_lr": rate}


def at_equal_time(name: str, pictures: Path, changes: Mapping[str, Any], seconds: float) -> RunConfig:
    """The settings of a recipe, with as many steps as take so long."""
    where = {"name": name, "dataset.path": str(pictures / "train")}
    config = RunConfig().changed({**SAME, **changes, **where})
    with tempfile.TemporaryDirectory() as folder:
        steps = max(EVERY, round(seconds / float(time_steps(config, Path(folder))["step"])))
    return config.changed({"train.steps": steps, "validation.every": max(1, steps // EVERY)})


def compared(group: str, pictures: Path, seconds: float, seeds: int, home: Path) -> None:
    """Train the recipes of a group, and print their table and what is better beyond the error."""
    names, missing, queue = dict[str, str](), list[str](), Queue(home)
    for number, (title, changes) in enumerate(recipes(group).items()):
        try:
            config = at_equal_time(f"{group}-{number}", pictures, changes, seconds)
            require_none_blocking(preflight(config, home))
        except LoraError as error:
            missing.append(f"{title}: {error}")
            continue
        for seed in range(seeds):
            one = config.changed({"name": f"{config.name}-{seed}", "seed": seed})
            (run,) = queue.add_new([one])
            names[run.name] = title
    run_queue(home, lambda line: sys.stderr.write(f"{line}\n") and None)
    runs = {name: RunFolder(home / "runs" / name) for name in names}
    trials = {name: Trial(run, run.config(), run.progress()) for name, run in runs.items()}
    preset = [trial for name, trial in trials.items() if names[name] == "the preset"]
    judge = Evaluator(BASE, pictures / "held_out", looks=8)
    base = float(judge.losses().mean())
    write = sys.stdout.write
    write(f"| {group} | steps | gain | less the preset's | on unseen things | forgotten | time | file |\n")
    write(f"|{'---|' * 8}\n")
    for title in dict.fromkeys(names.values()):
        own = [trial for name, trial in trials.items() if names[name] == title]
        files = [trial.run.path / trial.progress.export for trial in own if trial.progress.export]
        if not files:
            missing.append(f"{title}: {own[0].progress.reason or 'it made no file'}")
            continue
        unseen = base - sum(float(judge.losses(file).mean()) for file in files) / len(files)
        write(f"| {title} | {own[0].config.train.steps} | {row_of(own, preset)[0]} | {unseen:+.4f} |")
        write(f" {row_of(own, preset)[1]} |\n")
        sys.stdout.flush()
    write("\n" + "".join(f"Not run: {line}\n" for line in missing))


def row_of(own: list[Trial], preset: list[Trial]) -> tuple[str, str]:
    """The cells of a recipe, before and after what the other judge says."""
    rows = compare_trials([*own, *(trial for trial in preset if trial not in own)])["rows"]
    mine = next(row for row in rows if own[0].run.name in row["runs"])
    against = ""
    if own[0] not in preset:
        other = next(row for row in rows if row is not mine)
        gap = mine if mine["against"] is not None else other
        sign = 1.0 if gap is mine else -1.0
        clear = "**" if abs(gap["against"]) > 2 * gap["against_error"] else ""
        against = f"{clear}{sign * gap['against']:+.4f} ± {gap['against_error']:.4f}{clear}"
    first = f"{mine['gain']:+.4f} ± {mine['standard_error']:.4f} | {against}"
    forgotten = f"{mine['forgetting']:+.3f} ± {mine['forgetting_error']:.3f}"
    return first, f"{forgotten} | {mine['seconds']:.0f} s | {mine['bytes'] / 1e6:.2f} MB"


def main() -> None:
    """Print the tables of a set."""
    words = sys.argv[1:]
    numbers = [float(word) for word in words if word.replace(".", "").isdigit()]
    seconds, seeds = (numbers + [SECONDS, SEEDS][len(numbers) :])[:2]
    with tempfile.TemporaryDirectory() as folder:
        made = {"second": drawn_set, "subject": subject_set}
        name = next((word for word in words if word in made), "demo")
        pictures = made[name](Path(folder) / name) if name in made else DEMO
        sys.stdout.write(f"{machine()}; {seconds:g} s of training each, {seeds:g} seeds, the {name} set\n\n")
        for group in [one for one in ONE_EACH if one in words] or ONE_EACH:
            compared(group, pictures, seconds, int(seeds), Path(folder) / group)


if __name__ == "__main__":
    main()
