"""Recipes beside the preset: the gain of adapter kinds, optimizers, losses and noise levels.

    python -m tests.benchmarks.recipes [demo] [second] [subject] [STEPS] [SEEDS] [GROUP ...] [--equal-steps]
        [--home FOLDER] [--table] > table.md

Each recipe is the demo's preset with something changed. It takes as many steps as the preset would take time
for its own (40 unless given), or the same number with `--equal-steps`. How long a step takes is measured
first, in rounds, and kept in FOLDER/clock.json; what is trained after that may share the machine with other
work. The gain on the held-out images of the run comes with the difference to the preset, paired by image and
noise; a column beside it has the difference on images of things that no run saw, by `tests/evaluator.py`,
which shares no code with the trainer. What cannot run (an optional package is missing) is named below the
table. Runs stay in FOLDER and are not trained again, so that a measurement can be broken off and gone on
with; `--table` trains none, and has the runs of any length that are there. The share is of the gain of the
preset's longest run.
"""

import argparse
import contextlib
import functools
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from lora_core.errors import LoraError
from lora_core.model_files.starting_settings import starting_settings
from lora_core.runs.costs import Trial, compare_trials, cost_key
from lora_core.runs.folder import RunFolder
from lora_core.runs.preflight import preflight, require_none_blocking
from lora_core.settings.config import FIELDS, RunConfig, choices_of
from lora_core.system.files import read_json, write_atomically
from lora_core.train.autotune import time_steps
from lora_core.verbs.runs import resume
from tests.benchmarks.pictures import SETS, picture_set
from tests.benchmarks.rows import machine
from tests.evaluator import Evaluator, mean_and_error

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "assets" / "base"
PRESET = "the preset"
STEPS, SEEDS = 40, 1
LEAST = 1e-3
"""A difference of gains that matters to anyone."""
ROUNDS = 4
"""How often each step is timed; the shortest counts."""
ALIKE = 0.05
"""Steps whose times differ by less count as equal: so much is left between rows that compute the same."""
LOOKS = 8
"""The judge's, on each image."""
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
    """Seconds of a step, kept in a file, once for all settings that cost the same."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._times: dict[str, list[float]] = read_json(file)

    def measure(self, configs: Iterable[RunConfig]) -> None:
        """Go on where it was broken off: in rounds, so that a busy minute does not strike one alone."""
        by_key = {cost_key(config): config for config in configs}
        for number in range(ROUNDS):
            for key, config in by_key.items():
                times = self._times.setdefault(key, [])
                if len(times) <= number:
                    with tempfile.TemporaryDirectory() as folder:
                        times.append(float(time_steps(config, Path(folder))["step"]))
                    write_atomically(self._file, json.dumps(self._times, indent=1).encode())

    def seconds(self, config: RunConfig) -> float:
        """Of one step."""
        return min(self._times[cost_key(config)])


def steps_of(config: RunConfig, steps: int, clock: Clock | None) -> int:
    """The length of a recipe: `steps`, or as many as take the time of the preset's by the clock."""
    if clock is None:
        return steps
    usual = settings_of("usual", Path(config.dataset.path).parent, {})
    ratio = clock.seconds(usual) / clock.seconds(config)
    return steps if abs(ratio - 1) <= ALIKE else max(1, round(steps * ratio))


def train_missing(
    groups: Iterable[str], sets: Mapping[str, Path], given: argparse.Namespace
) -> dict[str, str]:
    """Train what is not done, in this process; returns why some recipes cannot be."""
    configs: dict[tuple[str, str], RunConfig] = {}
    missing: dict[str, str] = {}
    for title, changes in {title: own for group in groups for title, own in recipes(group).items()}.items():
        for name, pictures in sets.items():
            try:
                config = settings_of(slug(title), pictures, changes)
                require_none_blocking(preflight(config, given.home))
                configs[name, title] = config
            except LoraError as error:
                missing[title] = str(error)
    clock = None if given.equal_steps else Clock(given.home / "clock.json")
    if clock is not None:
        usual = [settings_of("usual", pictures, {}) for pictures in sets.values()]
        clock.measure([*usual, *configs.values()])
    for (name, title), config in configs.items():
        steps = steps_of(config, given.steps, clock)
        for seed in range(given.seeds):
            run = RunFolder(given.home / "runs" / f"{name}-{slug(title)}-{steps}-{seed}")
            own = {"name": run.name, "seed": seed, "train.steps": steps, "validation.every": steps}
            try:
                if not run.config_file.is_file():
                    RunFolder.create(run.path, config.changed(own))
                if run.progress().ending != "done":
                    sys.stderr.write(f"{run.name}\n")
                    if resume(run.path).signalled:
                        raise SystemExit("Broken off; the same command goes on.")
            except LoraError as error:
                missing[title] = str(error)
    return missing


def slug(title: str) -> str:
    """The part of a run's name that a title gives."""
    return re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")


def found_runs(title: str, set_name: str, home: Path) -> dict[int, list[Trial]]:
    """The runs of a recipe that are done, by length, all seeds together."""
    named = re.compile(f"{set_name}-{slug(title)}-[0-9]+-[0-9]+")
    runs = [RunFolder(path) for path in home.glob("runs/*") if named.fullmatch(path.name)]
    found: dict[int, list[Trial]] = {}
    for trial in (Trial(run, run.config(), run.progress()) for run in runs):
        if trial.progress.ending == "done" and trial.progress.export:
            found.setdefault(trial.config.train.steps, []).append(trial)
    return dict(sorted(found.items()))


def print_group(group: str, sets: Mapping[str, Path], given: argparse.Namespace) -> None:
    """The table of a group: a row for each recipe and length, columns for each set."""
    write = sys.stdout.write
    heads = ("gain", "less the preset's", "on unseen things", "forgotten")
    columns = [group, "steps", "file", *(f"{name}: {head}" for name in sets for head in heads)]
    write(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n")
    presets = {name: found_runs(PRESET, name, given.home) for name in sets}
    for title in recipes(group):
        found = {name: found_runs(title, name, given.home) for name in sets}
        lengths = sorted({length for runs in found.values() for length in runs})
        for length in lengths:
            cells = list[str]()
            for name, pictures in sets.items():
                own = found[name].get(length)
                # Beside another length of the preset only where both took as much time.
                alike = presets[name].get(length if given.equal_steps else given.steps, [])
                whole = [*presets[name].values()][-1:]
                cells += cells_of(own, alike, *whole or [own], pictures) if own else ["", "", "", ""]
            one = next(runs[length][0] for runs in found.values() if length in runs)
            size = (one.run.path / str(one.progress.export)).stat().st_size
            rate = f" at {one.config.optimizer.lr:g}" if group == "optimizer" else ""
            write(f"| {' | '.join([title + rate, str(length), f'{size / 1e6:.2f} MB', *cells])} |\n")
            sys.stdout.flush()
    write("\n")


def cells_of(own: list[Trial], preset: list[Trial], whole: list[Trial], pictures: Path) -> list[str]:
    """What the runs tell of a set: differences are to `preset`, the share is of the gain of `whole`."""
    mine = row_among(own, own)
    share = mine["gain"] / row_among(whole, whole)["gain"]
    against = unseen = ""
    if not preset or own[0].run.path == preset[0].run.path:
        unseen = f"{float((base_losses(pictures) - unseen_losses(own, pictures)).mean()):+.3f}"
    else:
        first, other = row_among(own, [*own, *preset]), row_among(preset, [*own, *preset])
        sign, gap = (-1.0, other) if first["against"] is None else (1.0, first)
        against = difference(sign * gap["against"], gap["against_error"])
        if own[0].config.adapter.kind == "lora":  # diffusers, which the judge uses, reads no other
            less = unseen_losses(preset, pictures) - unseen_losses(own, pictures)
            unseen = difference(*mean_and_error(less))
    gain = f"{mine['gain']:+.3f} ± {mine['standard_error']:.3f} ({share:.0%})"
    return [gain, against, unseen, f"{mine['forgetting']:.2f} ± {mine['forgetting_error']:.2f}"]


def difference(value: float, error: float) -> str:
    """With its standard error; in bold where it is one."""
    clear = "**" if abs(value) > max(LEAST, 2 * error) else ""
    return f"{clear}{value:+.3f} ± {error:.3f}{clear}"


@functools.cache
def judge(pictures: Path) -> Evaluator:
    """The one of a set."""
    return Evaluator(BASE, pictures / "held_out", looks=LOOKS)


@functools.cache
def base_losses(pictures: Path) -> torch.Tensor:
    """The judge's of the base, (images, looks)."""
    return judge(pictures).losses()


def unseen_losses(trials: list[Trial], pictures: Path) -> torch.Tensor:
    """The judge's of some runs, (images, looks), their mean; each run's stay in its folder."""
    found = []
    for trial in trials:
        file = trial.run.path / "unseen.json"
        if not file.is_file():
            losses = judge(pictures).losses(trial.run.path / str(trial.progress.export))
            write_atomically(file, json.dumps({"losses": losses.tolist()}).encode())
        found.append(torch.tensor(read_json(file)["losses"], dtype=torch.float64))
    return torch.stack(found).mean(0)


def row_among(own: list[Trial], trials: list[Trial]) -> dict[str, Any]:
    """The row of a recipe in the comparison of several."""
    return next(row for row in compare_trials(trials)["rows"] if own[0].run.name in row["runs"])


def main() -> None:
    """Train, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--equal-steps", action="store_true")
    parser.add_argument("--home", type=Path)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    numbers = [int(word) for word in given.words if word.isdigit()]
    given.steps, given.seeds = (numbers + [STEPS, SEEDS][len(numbers) :])[:2]
    with contextlib.ExitStack() as stack:
        given.home = given.home or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sets = {name: picture_set(name, given.home) for name in ("demo", *SETS) if name in given.words}
        sets = sets or {"demo": picture_set("demo", given.home)}
        alike = "the same steps" if given.equal_steps else f"the time of {given.steps} steps"
        sys.stdout.write(f"{machine()}; {alike}, {given.seeds} seeds\n\n")
        groups = [one for one in ONE_EACH if one in given.words] or [*ONE_EACH]
        missing = {} if given.table else train_missing(groups, sets, given)
        for group in groups:
            print_group(group, sets, given)
        sys.stdout.write("".join(f"Not run: {title}: {why}\n" for title, why in missing.items()))


if __name__ == "__main__":
    main()
