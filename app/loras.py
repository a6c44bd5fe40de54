"""Which LoRAs there are to look at: the exports and checkpoints of all runs."""

from dataclasses import dataclass
from pathlib import Path

from app.jobs import Watch
from app.moment import Moment


@dataclass(frozen=True)
class Found:
    """One adapter file of a run."""

    title: str
    file: Path
    watch: Watch


def found_loras(moment: Moment) -> list[Found]:
    """Newest run first; in a run its export, then its checkpoints from the last back."""
    found = []
    for watch, _ in moment.runs:
        run = watch.run
        files = sorted(run.exports.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
        named = watch.progress.export
        main = run.path / named if named else None
        files.sort(key=lambda file: file != main)
        for file in files:
            title = run.name if file.stem == run.name else f"{run.name}, {file.stem}"
            found.append(Found(title, file, watch))
        for step in reversed(run.checkpoint_steps()):
            best = ", best" if step == watch.progress.best_step else ""
            found.append(
                Found(f"{run.name}, step {step:,}{best}", run.checkpoint(step) / "adapter.safetensors", watch)
            )
    return found


def owner(moment: Moment, file: str) -> Watch | None:
    """The run that a file belongs to."""
    return next((watch for watch, _ in moment.runs if Path(file).is_relative_to(watch.run.path)), None)


def checkpoint_choices(watch: Watch) -> list[tuple[str, str]]:
    """What can be exported of a run: best and last first, then each step that is on disk."""
    steps = watch.run.checkpoint_steps()
    best = watch.progress.best_step
    choices = []
    if best in steps:
        choices.append((f"Best, step {best:,}", "best"))
    if steps:
        choices.append((f"Last, step {steps[-1]:,}", "last"))
    return choices + [(f"Step {step:,}", str(step)) for step in reversed(steps)]
