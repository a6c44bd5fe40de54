"""The verb about jobs one after the other: queue."""

import argparse

from lora_core.cli import Verbs, add_json, add_run, add_workspace, named_run, say, say_json
from lora_core.errors import RunError
from lora_core.runs.folder import RunFolder
from lora_core.runs.queue import FAILED, Queue
from lora_core.runs.runner import ensure_runner, pause_queue, run_queue
from lora_core.system.paths import workspace
from lora_core.system.processes import INTERRUPTED


def add_verbs(verbs: Verbs) -> None:
    """Add this module's verb and its parts."""
    add, move, remove, listing, run, pause = (
        verbs[f"queue {part}"] for part in ("add", "move", "remove", "list", "run", "pause")
    )
    add.add_argument("--start", action="store_true", help="and have the queue worked through")
    for part in (add, move, remove):
        add_run(part)
    move.add_argument("position", metavar="POSITION", type=int, help="1 is the next to start")
    for part in (listing, run):
        add_json(part)
    for part in (listing, run, pause):
        add_workspace(part)
    functions = (_add, _move, _remove, _list, _run, _pause)
    for part, function in zip((add, move, remove, listing, run, pause), functions, strict=True):
        part.set_defaults(run=function)


def _queued_run(options: argparse.Namespace) -> tuple[Queue, RunFolder]:
    """The run that a command line names, and the queue of its workspace.

    Raises:
        RunError: there is no such run.
    """
    run = named_run(options)
    return Queue(workspace(options.workspace) if options.workspace else run.path.parent.parent), run


def _add(options: argparse.Namespace) -> int:
    queue, run = _queued_run(options)
    queue.add(run)
    if options.start:
        ensure_runner(queue.workspace)
    say(f"{run.name} waits in the queue of {queue.workspace}")
    return 0


def _move(options: argparse.Namespace) -> int:
    queue, name = _job(options)
    queue.move(name, options.position)
    return 0


def _remove(options: argparse.Namespace) -> int:
    queue, name = _job(options)
    queue.remove(name)
    return 0


def _job(options: argparse.Namespace) -> tuple[Queue, str]:
    """The queue and the job that a person named; its folder may be gone."""
    queue = Queue(workspace(options.workspace))
    if any(job.run == options.run_name for job in queue.stored_jobs()):
        return queue, options.run_name
    queue, run = _queued_run(options)
    return queue, run.name


def _list(options: argparse.Namespace) -> int:
    queue = Queue(workspace(options.workspace))
    rows = queue.rows()
    if options.json:
        say_json(rows)
        return 0
    if not rows:
        say("The queue is empty. Put a run in with `lora-easel queue add RUN`.")
    for row in rows:
        place = "" if row["position"] is None else f"{row['position']}."
        steps = f"step {row['step']} of {row['steps']}" if row["steps"] else ""
        say(f"{place:>4} {row['name']:30}  {row['state']:8}  {steps}  {row['reason']}".rstrip())
    if any(row["position"] for row in rows) and queue.runner() is None:
        say("Nobody works through it: start it with `lora-easel queue run`.")
    return 0


def _run(options: argparse.Namespace) -> int:
    place = workspace(options.workspace)
    ended, interrupted = run_queue(place, (lambda line: None) if options.json else say)
    if options.json:
        say_json(Queue(place).rows())
    if interrupted:
        return INTERRUPTED
    failed = [job.run for job in ended if job.state == FAILED]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(ended)} jobs failed: {', '.join(failed)}; `lora-easel queue list` says"
            " why."
        )
    return 0


def _pause(options: argparse.Namespace) -> int:
    pause_queue(workspace(options.workspace))
    return 0
