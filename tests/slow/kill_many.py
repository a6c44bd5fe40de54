"""Kills trainers with SIGKILL at random moments of each phase, resumes each until it is done, and compares
bits.

    python -m tests.slow.kill_many [KILLS_A_PHASE] [SEED]

The kill comes from a thread of the trainer itself, a random time after it entered the phase: the system ends
the process as it would from outside. The toy run has all that is random switched on, an average, validation
and samples. After each kill everything with a final name is read and has to be whole.
"""

import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lora_core.runs.events import Working, read_events
from lora_core.runs.folder import RunFolder
from tests.faults import Fault, Nursery
from tests.train.runs import RANDOM, Toy, check_story, check_whole, result, toy

SETTINGS = {
    **RANDOM, "train.steps": 12, "save.every": 3, "save.ema": 0.9, "validation.pictures": 1,
    "validation.every": 4, "sample.every": 6, "optimizer.name": "adamw",
    "optimizer.schedule": "cosine_restarts",
}  # fmt: skip
KILLED = -9
BETWEEN = ("StepDone", "Resumed", "Validated", "CheckpointDone", "PreviewDone")
"""The last event of a process that was killed while it stepped."""


@dataclass(frozen=True)
class Phase:
    """A phase: how a trainer is killed in it, and how it shows that it was."""

    fault: Callable[[random.Random], Fault]
    inside: Callable[[RunFolder], bool]
    fresh_cache: bool = False


def _last(run: RunFolder) -> str:
    """The kind of the last event, and of long work between two steps what it is."""
    story = read_events(run.events_file)[0]
    if not story:
        return ""
    return story[-1].phase if isinstance(story[-1], Working) else story[-1].kind


PHASES = {
    "preparing": Phase(
        lambda draw: Fault(
            *draw.choice([("write", "latents"), ("rename", "cache/"), ("read", "png$"), ("fsync", "inputs")]),
            nth=draw.randint(1, 4), do="kill", delay=draw.uniform(0, 0.02),
        ),
        lambda run: _last(run) in ("", "Started", "Preparing"),
        fresh_cache=True,
    ),
    "stepping": Phase(
        lambda draw: Fault("step", nth=draw.randint(1, 9), do="kill", delay=draw.uniform(0, 0.06)),
        lambda run: _last(run) in BETWEEN,
    ),
    "writing a checkpoint": Phase(
        lambda draw: Fault("mkdir", r"step-\d+\.making", nth=draw.randint(1, 2), do="kill",
                           delay=draw.uniform(0, 0.03)),
        lambda run: any(run.checkpoints.glob(".*.making")),
    ),
    "validating": Phase(
        lambda draw: Fault("validate", nth=draw.randint(1, 3), do="kill", delay=draw.uniform(0, 0.02)),
        lambda run: _last(run) in (*BETWEEN[:2], "Validating"),
    ),
    "exporting": Phase(
        lambda draw: Fault("open", r"export/.*\.(draft|tmp)", nth=draw.randint(1, 3), do="kill",
                           delay=draw.uniform(0, 0.004)),
        lambda run: run.progress().step == SETTINGS["train.steps"] and not run.progress().ending,
    ),
}  # fmt: skip


@dataclass
class Report:
    """What came of it: kills by phase, those seen to have struck inside it, runs that they were spread
    over."""

    kills: Counter[str] = field(default_factory=Counter)
    inside: Counter[str] = field(default_factory=Counter)
    repeated: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    seconds: float = 0.0

    def table(self) -> str:
        """For people."""
        lines = [f"{'phase':22} {'kills':>6} {'seen inside':>12} {'steps done again, at most':>26}"]
        for phase in PHASES:
            lines.append(
                f"{phase:22} {self.kills[phase]:6} {self.inside[phase]:12} {self.repeated[phase]:26}"
            )
        total = sum(self.kills.values())
        lines.append(
            f"{total} kills over {self.runs} runs in {self.seconds:.0f} s: every run ended in the bits of the"
            " unbroken one, every file was whole after every kill, and each step was seen once."
        )
        return "\n".join(lines)


def killed_many(toy_set: Toy, nursery: Nursery, kills: int, seed: int) -> Report:
    """Kill trainers until so many were seen to be struck inside each phase, over as many runs as that takes.

    Raises:
        AssertionError: something was lost, doubled, half or different.
    """
    draw = random.Random(seed)
    report, began = Report(), time.monotonic()
    changes = {key.replace(".", "__"): value for key, value in SETTINGS.items()}
    whole = toy_set.run("whole", **changes)
    assert nursery.train(whole.path) == (0, "")
    wanted = result(whole)
    while any(report.inside[phase] < kills for phase in PHASES):
        report.runs += 1
        run = toy_set.run(f"killed-{report.runs}", **changes)
        _killed_until_done(nursery, run, kills, draw, report)
        assert result(run) == wanted, f"{run.path} ended in other bits"
        check_story(run)
        shutil.rmtree(run.path)
    report.seconds = time.monotonic() - began
    return report


def _killed_until_done(
    nursery: Nursery, run: RunFolder, kills: int, draw: random.Random, report: Report
) -> None:
    while True:
        open_phases = [phase for phase in PHASES if report.inside[phase] < kills]
        # An export comes once a run, so it is waited for until the others have had their share of this run.
        here = [p for p in open_phases if p != "exporting"] if draw.random() < 0.8 else open_phases
        name = draw.choice(here or open_phases or [""])
        faults = []
        if name:
            if PHASES[name].fresh_cache:
                shutil.rmtree(run.path.parent.parent / "cache", ignore_errors=True)
            faults = [PHASES[name].fault(draw)]
        before = run.progress().step
        code, said = nursery.train(run.path, *faults)
        assert code in (KILLED, 0), said
        check_whole(run)
        steps = [event.step for event in run.progress().losses]
        assert steps == list(range(1, len(steps) + 1)), steps
        if run.status() == "done":
            # It came to its end, or was killed after it had said so.
            return
        assert code == KILLED
        report.kills[name] += 1
        report.inside[name] += PHASES[name].inside(run)
        assert report.kills[name] <= 10 * kills, f"hardly any kill strikes while {name}\n{report.table()}"
        kept = (run.checkpoint_steps() or [0])[-1]
        report.repeated[name] = max(report.repeated[name], run.progress().step - kept)
        assert run.status() in ("interrupted", "queued"), run.status()
        assert run.progress().step >= min(before, kept)


def main() -> None:
    """Run it and print the table."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    nursery = Nursery()
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = killed_many(toy(Path(folder)), nursery, kills, seed)
    finally:
        nursery.close()
    sys.stdout.write(report.table() + "\n")


if __name__ == "__main__":
    main()
