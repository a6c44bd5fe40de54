"""Runs written by hand as a trainer would write them."""

import json

import psutil

from app.state import AppState
from lora_core.runs import events
from lora_core.runs.folder import RunFolder, runs_folder
from lora_core.settings.config import RunConfig

HOSTILE = '<img src=x onerror="alert(1)">'


def make_run(app_state: AppState, name: str, *lines: events.Event, **settings: object) -> RunFolder:
    """A run with these events; settings by dotted name with two underscores for the dot."""
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    run = RunFolder.create(
        runs_folder(app_state.workspace) / name, RunConfig().changed({"name": name, **changes})
    )
    if lines:
        run.events_file.write_text("".join(events.to_line(line) for line in lines))
    return run


def started(steps: int = 100) -> events.Event:
    return events.Started(steps=steps, pid=1, device="cpu", threads=1, versions={})


def step(number: int, time: float | None = None, seconds: float = 0.5) -> events.Event:
    when = {} if time is None else {"time": time}
    return events.StepDone(step=number, loss=0.2, lr=1e-4, seconds=seconds, **when)


def come_alive(run: RunFolder) -> None:
    """Make this very process the trainer."""
    me = psutil.Process()
    run.process_file.write_text(json.dumps({"pid": me.pid, "started": me.create_time()}))
