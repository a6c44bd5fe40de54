"""Recipes beside the preset: the gain of adapter kinds, optimizers, losses and noise levels.

    python -m tests.benchmarks.recipes [demo|second|subject] [STEPS] [SEEDS] [GROUP ...] [--equal-steps]
        [--home FOLDER] [--table] > table.md

Each recipe is the demo's preset with something changed. It takes as many steps as the preset would take time
for its own (60 unless given), or the same number with `--equal-steps`, where the machine has other work and
seconds mean nothing. Its gain on the held-out images of the run comes with the difference to the preset,
paired by image and noise; a column beside it has the gain on images of things that no run saw, by
`tests/evaluator.py`, which shares no code with the trainer. What cannot run (an optional package is missing)
is named below the table. Runs stay in FOLDER and are not trained again, so that a measurement can be broken
off and gone on with; `--table` trains none, and has the runs of any length that are there. The share is of
the gain of the preset's longest run.
"""

import argparse
import contextlib
import re
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
from tests.benchmarks.pictures import SETS, picture_set
from tests.benchmarks.rows import machine
from tests.evaluator import Evaluator

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "assets" / "base"
PRESET = "the preset"
STEPS, SEEDS = 60, 1
LEAST = 1e-3
"""A difference of gains that matters to anyone."""
VALIDATIONS, TIMINGS = 2, 2
"""Of each run; of each step that is timed, of which the shorter counts."""
SAME: dict[str, Any] = {
    **starting_settings("demo", None), "sample.every": 0, "save.every": 0, "validation.patience": 0,
    "validation.draws_per_image": 8, "validation.memorization": False,
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
        "Huber, constant delta": {"loss.type": "huber", "loss.huber_schedule": "constant"},
        "Huber, exponential": {"loss.type": "huber", "loss.huber_schedule": "exponential"},
        "min-SNR 1": {"loss.min_snr": 1.0},
        "min-SNR 5": {"loss.min_snr": 5.0},
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
    found: dict[str, dict[str, Any]] = {PRESET: {}}
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


def steps_of(config: RunConfig, steps: int, clock: Clock | None) -> int:
    """The length of a recipe: `steps`, or as many as take the time of the preset's by the clock."""
    if clock is None:
        return steps
    usual = settings_of("usual", Path(config.dataset.path).parent, {})
    return max(VALIDATIONS, round(steps * clock.seconds(usual) / clock.seconds(config)))


def add_runs(group: str, pictures: Path, given: argparse.Namespace, clock: Clock | None) -> list[str]:
    """Queue the runs of a group that are not done; a line on each that cannot run."""
    missing, queue = list[str](), Queue(given.home)
    for title, changes in recipes(group).items():
        try:
            config = settings_of(slug(title), pictures, changes)
            require_none_blocking(preflight(config, given.home))
        except LoraError as error:
            missing.append(f"{title}: {error}")
            continue
        config = with_steps(config, steps_of(config, given.steps, clock))
        for seed in range(given.seeds):
            name = f"{given.set}-{slug(title)}-{config.train.steps}-{seed}"
            run = RunFolder(given.home / "runs" / name)
            if not run.config_file.is_file():
                queue.add_new([config.changed({"name": name, "seed": seed})])
            elif run.progress().ending != "done":
                queue.add(run)
    return missing


def slug(title: str) -> str:
    """The part of a run's name that a title gives."""
    return re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")


def found_runs(title: str, given: argparse.Namespace) -> list[list[Trial]]:
    """The runs of a recipe that are done, all seeds of a length together."""
    runs = [RunFolder(path) for path in given.home.glob(f"runs/{given.set}-{slug(title)}-*")]
    named = re.compile(f"{given.set}-{slug(title)}-[0-9]+-[0-9]+")
    trials = [Trial(run, run.config(), run.progress()) for run in runs if named.fullmatch(run.name)]
    done = [trial for trial in trials if trial.progress.ending == "done" and trial.progress.export]
    lengths = sorted({trial.config.train.steps for trial in done})
    return [[trial for trial in done if trial.config.train.steps == length] for length in lengths]


def compared(group: str, pictures: Path, given: argparse.Namespace, clock: Clock | None) -> None:
    """Train the recipes of a group, and print their table."""
    missing = [] if given.table else add_runs(group, pictures, given, clock)
    if not given.table:
        run_queue(given.home, lambda line: sys.stderr.write(f"{line}\n") and None)
    presets = found_runs(PRESET, given)
    judge = Evaluator(BASE, pictures / "held_out", looks=8)
    base = float(judge.losses().mean())
    write = sys.stdout.write
    heads: tuple[str, ...] = ("rate", "steps", "gain", "share", "less the preset's", "on unseen things")
    heads += ("forgotten", "file", *(("time",) if clock else ()))
    write(f"| {' | '.join((group, *heads))} |\n|{'---|' * (1 + len(heads))}\n")
    for title in recipes(group):
        if not (lengths := found_runs(title, given)) and not any(title in line for line in missing):
            missing.append(title)
        for own in lengths:
            config = own[0].config
            # Beside a longer or shorter run of the preset only where both took as much time.
            alike = [one for one in presets if clock or one[0].config.train.steps == config.train.steps]
            row = row_of(own, alike[0] if alike else [], presets[-1] if presets else own)
            unseen = ""
            if config.adapter.kind == "lora":  # diffusers, which the judge uses, reads no other
                after = [judge.losses(one.run.path / one.progress.export) for one in own]
                unseen = f"{base - sum(float(each.mean()) for each in after) / len(after):+.4f}"
            cells = [title, f"{config.optimizer.lr:g}", str(config.train.steps), row["gain"], row["share"]]
            cells += [
                row["against"],
                unseen,
                row["forgotten"],
                row["file"],
                *([row["time"]] if clock else []),
            ]
            write(f"| {' | '.join(cells)} |\n")
            sys.stdout.flush()
    write("\n" + "".join(f"Not run: {line}\n" for line in missing) + "\n")


def row_of(own: list[Trial], preset: list[Trial], whole: list[Trial]) -> dict[str, str]:
    """The cells that the runs tell: the difference is to `preset`, the share of the gain of `whole`."""
    mine = row_among(own, own)
    against = ""
    if preset and own[0].run.path != preset[0].run.path:
        first, other = row_among(own, [*own, *preset]), row_among(preset, [*own, *preset])
        sign, gap = (-1.0, other) if first["against"] is None else (1.0, first)
        clear = "**" if abs(gap["against"]) > max(LEAST, 2 * gap["against_error"]) else ""
        against = f"{clear}{sign * gap['against']:+.4f} ± {gap['against_error']:.4f}{clear}"
    return {
        "gain": f"{mine['gain']:+.4f} ± {mine['standard_error']:.4f}", "against": against,
        "share": f"{mine['gain'] / row_among(whole, whole)['gain']:.0%}",
        "forgotten": f"{mine['forgetting']:+.3f} ± {mine['forgetting_error']:.3f}",
        "time": f"{mine['seconds']:.0f} s", "file": f"{mine['bytes'] / 1e6:.2f} MB",
    }  # fmt: skip


def row_among(own: list[Trial], trials: list[Trial]) -> dict[str, Any]:
    """The row of a recipe in the comparison of several."""
    return next(row for row in compare_trials(trials)["rows"] if own[0].run.name in row["runs"])


def main() -> None:
    """Print the tables of a set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--equal-steps", action="store_true")
    parser.add_argument("--home", type=Path)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    numbers = [int(word) for word in given.words if word.isdigit()]
    given.steps, given.seeds = (numbers + [STEPS, SEEDS][len(numbers) :])[:2]
    given.set = next((word for word in given.words if word in SETS), "demo")
    with contextlib.ExitStack() as stack:
        given.home = given.home or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pictures = picture_set(given.set, given.home)
        alike = "the same steps" if given.equal_steps else f"the time of {given.steps} steps"
        sys.stdout.write(f"{machine()}; {alike}, {given.seeds} seeds, the {given.set} set\n\n")
        clock = None if given.equal_steps else Clock()
        for group in [one for one in ONE_EACH if one in given.words] or ONE_EACH:
            compared(group, pictures, given, clock)


if __name__ == "__main__":
    main()
