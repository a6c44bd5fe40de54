"""What the processes beside the main one do: open the same run, and compute their share of each step.

They write nothing, decide nothing and keep nothing: each step begins with the weights that the main process
sends.
"""

from dataclasses import dataclass
from pathlib import Path

from lora_core.models.device import keep_freed_memory
from lora_core.spec.run_folder import RunFolder
from lora_core.training.fellows import Fellows
from lora_core.training.loop import Call, StepPlan, shared_parts
from lora_core.training.memory import Ladder
from lora_core.training.prepare import Plan, Session, prepared


@dataclass(frozen=True)
class Beginning:
    """What the main process tells before the first step: the run's folder, what was chosen for it, and to how
    many steps it goes."""

    run: Path
    plan: Plan
    goal: int


def follow(fellows: Fellows) -> None:
    """Serve the main process until it lets this one go.

    Raises:
        RunError: it ended without a word, or the run cannot go on.
    """
    beginning: Beginning | None = fellows.told()
    if beginning is None:
        return
    run = RunFolder(beginning.run)
    config = beginning.plan.rated(run.config())
    session = fellows.agreed(lambda: _opened(run, beginning.plan))
    trainee = session.trainee
    trainee.fellows = fellows
    plan = StepPlan.of(config, beginning.goal)
    ladder = Ladder(trainee, config, beginning.plan.rungs)
    keep_freed_memory()
    while (call := fellows.told()) is not None:
        assert isinstance(call, Call)
        ladder.reach(call.step)
        if call.scaler:
            trainee.scaler.load_state_dict(call.scaler)
        shared_parts(trainee, session.batches, session.text, plan, call.step)


def _opened(run: RunFolder, plan: Plan) -> Session:
    """The run as the main process prepared it: everything is in the caches."""
    plan.set_up()
    return prepared(run, plan.rated(run.config()), plan, lambda phase, done, total: None)
