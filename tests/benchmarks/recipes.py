"""Recipes at equal time: the gain of adapter kinds, optimizers, losses and noise levels beside the preset's.

    python -m tests.benchmarks.recipes [demo|second|subject] [STEPS] [SEEDS] [GROUP ...] > table.md

Each recipe is the demo's preset with something changed. It takes as many steps as the preset would take time
for its own (60 unless given), and goes through the product's queue and comparison. Its gain on the held-out
images of the run comes with the difference to the preset, paired by image and noise; a column beside it has
the gain on images of things that no run saw, by `tests/evaluator.py`, which shares no code with the trainer.
What the machine cannot run (an optional package is missing) is named below the table.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_core.errors import LoraError
from lora_core.model_files.starting_settings import starting_settings
from lora_core.runs.costs import Trial, compare_trials, cost_key
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
STEPS, SEEDS = 60, 1
VALIDATIONS, TIMINGS = 4, 2
"""Of each run; of each step that is timed, of which the shorter counts."""
SAME: dict[str, Any] = {
    **starting_settings("demo", None), "sample.every": 0, "save.every": 0, "validation.patience": 0,
    "validation.draws_per_image": 16,
}  # fmt: skip
ONE_EACH = {
    "adapter": ("adapter.kind", "adapter.targets"),
    "optimizer": ("optimizer.name", "optimizer.schedule"),
    "loss": ("loss.type",),
    "timesteps": ("loss.timesteps",),
}
"""Settings of which each choice is a recipe, by group, where there are such settings."""
OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "adapter": {
        "rank 2": {"adapter.rank": 2, "adapter.alpha": 2.0},
        "rank 16": {"adapter.rank": 16, "adapter.alpha": 16.0},
        "rank auto": {"adapter.rank": "auto"},
        "rsLoRA": {"adapter.rslora": True},
        "dropout 0.1": {"adapter.dropout": 0.1},
        "norm of weights at most 1": {"adapter.max_norm": 1.0},
    },
    "optimizer": {
        "LoRA+ 4": {"optimizer.lora_plus": 4.0, "optimizer.lr": 1.5e-3},
        "EMA 0.9": {"save.ema": 0.9},
        "warm-up of 5%": {"optimizer.warmup": 0.05},
    },
    "loss": {
        "min-SNR off": {"loss.min_snr": 0.0},
        "min-SNR 1": {"loss.min_snr": 1.0},
        "debiased": {"loss.debias": True},
        "noise offset 0.05": {"loss.noise_offset": 0.05},
        "multi-resolution noise, 6": {"loss.multires_noise": 6},
        "input perturbation 0.1": {"loss.input_perturbation": 0.1},
    },
    "timesteps": {
        "shift 3": {"loss.timestep_shift": 3.0},
        "shift 1/3": {"loss.timestep_shift": 1 / 3},
        "not below 200": {"loss.min_timestep": 200},
        "not above 800": {"loss.max_timestep": 800},
    },
}


def recipes(group: str) -> dict[str, dict[str, Any]]:
    """What is compared, by name: the preset first."""
    found: dict[str, dict[str, Any]] = {"the preset": {}}
    for setting in ONE_EACH[group]:
        for key, row in (choices_of(setting) or {}).items() if setting in FIELDS else ():
            if key != SAME.get(setting, RunConfig().get(setting)):
                found[row.title] = {setting: key}
    return found | OTHERS.get(group, {})


def settings_of(name: str, pictures: Path, changes: Mapping[str, Any]) -> RunConfig:
    """The settings of a recipe; changed after the preset, so that an optimizer brings its usual rate."""
    where = {"name": name, "dataset.path": str(pictures / "train")}
    return RunConfig().changed({**SAME, **where}).changed(changes)


class Clock:
    """Seconds of a step, measured once for all settings that cost the same."""

    def __init__(self) -> None:
        self._known: dict[str, float] = {}

    def seconds(self, config: RunConfig) -> float:
        """Of one step."""
        key = cost_key(config)
        if key not in self._known:
            with tempfile.TemporaryDirectory() as folder:
                times = [float(time_steps(config, Path(folder))["step"]) for _ in range(TIMINGS)]
            self._known[key] = min(times)
        return self._known[key]


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """The settings for so many steps."""
    return config.changed({"train.steps": steps, "validation.every": max(1, steps // VALIDATIONS)})


def compared(group: str, pictures: Path, steps: int, seeds: int, home: Path, clock: Clock) -> None:
    """Train the recipes of a group, and print their table."""
    names, missing, queue = dict[str, str](), list[str](), Queue(home)
    usual = clock.seconds(settings_of("usual", pictures, {}))
    for number, (title, changes) in enumerate(recipes(group).items()):
        try:
            config = settings_of(f"{group}-{number}", pictures, changes)
            require_none_blocking(preflight(config, home))
            config = with_steps(config, max(VALIDATIONS, round(steps * usual / clock.seconds(config))))
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
    numbers = [int(word) for word in words if word.isdigit()]
    steps, seeds = (numbers + [STEPS, SEEDS][len(numbers) :])[:2]
    with tempfile.TemporaryDirectory() as folder:
        made = {"second": drawn_set, "subject": subject_set}
        name = next((word for word in words if word in made), "demo")
        pictures = made[name](Path(folder) / name) if name in made else DEMO
        sys.stdout.write(f"{machine()}; the time of {steps} steps, {seeds} seeds, the {name} set\n\n")
        clock = Clock()
        for group in [one for one in ONE_EACH if one in words] or ONE_EACH:
            compared(group, pictures, steps, seeds, Path(folder) / group, clock)


if __name__ == "__main__":
    main()
