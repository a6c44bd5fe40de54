"""The trial: what a run chooses by trying before its first step.

Nothing of the run is changed by it but where its weights lie and at which rates it learns.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from lora_core.models.denoise import prediction
from lora_core.models.device import limited, out_of_memory
from lora_core.models.encode import TextCondition, decoded_latents
from lora_core.models.prepacked import PLAIN, layout_of
from lora_core.spec import events
from lora_core.spec.choices import OPTIMIZERS
from lora_core.spec.config import RunConfig
from lora_core.training.loop import StepPlan, Trainee, micro_batch
from lora_core.training.memory import VAE_ASIDE, Ladder, free_memory
from lora_core.training.prepare import Plan, Say, Session
from lora_core.training.range_test import range_tested, take_rates
from lora_core.validation.gain import triple_losses

TEMPORARIES = 2
"""Tensors as large as all trained numbers that an optimizer's step may make besides its state."""


class Trial:
    """Chooses for one run, and keeps what there is to tell of it."""

    def __init__(self, session: Session, ladder: Ladder, config: RunConfig, goal: int, say: Say) -> None:
        """For a run that is to have `goal` steps; `say` may end the trial by what it raises."""
        self.found: list[events.Event] = []
        self._session = session
        self._ladder = ladder
        self._config = config
        self._steps = StepPlan.of(config, goal)
        self._say = say

    def plan(self, plan: Plan, fresh: bool) -> Plan:
        """The plan with all that it lacks; `fresh` where no step was ever taken.

        Raises:
            OutOfMemory: a step does not fit by any means.
            RunError: the range test learned nothing.
        """
        trainee = self._session.trainee
        if not plan.layout:
            layouts = map(layout_of, trainee.base.modules.values())
            plan = replace(plan, layout=next((one for one in layouts if one != PLAIN), PLAIN))
        if not plan.tried and (fresh or plan.cap) and limited(trainee.base.device):
            self._say("Trying the heaviest step", 0, 1)
            state = OPTIMIZERS[self._config.optim.name].state
            told, peak = chosen_rungs(self._session, self._ladder, self._steps, state)
            self.found += [events.Warned(message=sentence) for sentence in told]
            plan = replace(plan, rungs=self._ladder.taken, tried=True, peak=peak)
        if self._config.optim.range_test and plan.octave is None:
            found = range_tested(self._session, self._steps, self._say)
            take_rates(trainee.optimizer, found.octave)
            plan = replace(plan, octave=found.octave)
            rate = plan.rated(self._config).optim.lr
            self.found.append(events.RateFound(rate=rate, rates=found.rates, shares=found.shares))
        return plan


def chosen_rungs(session: Session, ladder: Ladder, plan: StepPlan, state: float) -> tuple[list[str], int]:
    """Try the heaviest step, a validation and a sample before the first real one, and climb until they fit.

    Args:
        session: the run, at step 0.
        ladder: takes the rungs.
        plan: of the steps.
        state: how many numbers the optimizer keeps for each that is trained.

    Returns:
        What there is to tell a person, and the peak in bytes where the device tells it.

    Raises:
        OutOfMemory: it does not fit with all rungs taken.
    """
    trainee = session.trainee
    told: list[str] = []
    device = trainee.base.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    while not _fits(trainee, lambda: _try_step(session, plan, state)):
        told.append(f"The heaviest step does not fit into memory as it is. {ladder.climb(0)}")
    while not _fits(trainee, lambda: _try_sample(session)):
        if ladder.next is None or ladder.next.name != VAE_ASIDE:
            told.append("Samples do not fit into memory beside the training, so they may be left out.")
            break
        told.append(f"Samples do not fit into memory as it is. {ladder.climb(0)}")
    return told, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _fits(trainee: Trainee, work: Callable[[], None]) -> bool:
    try:
        work()
        return True
    except Exception as error:
        if not out_of_memory(error):
            raise
        free_memory(trainee, error)
        return False
    finally:
        free_memory(trainee)


def _try_step(session: Session, plan: StepPlan, state: float) -> None:
    """What a step and a validation take, with nothing changed by it."""
    trainee, base = session.trainee, session.trainee.base
    numbers = sum(tensor.numel() for tensor in trainee.injected.parameters())
    held = torch.empty(int(state * numbers), device=base.device)
    micro_batch(trainee, session.batches, session.text, plan, session.batches.heaviest())
    temporary = torch.empty(TEMPORARIES * numbers, device=base.device)
    del temporary
    trainee.storage.clear()
    if session.held_out:
        largest = max(session.held_out, key=lambda measured: measured.latents.numel())
        triple_losses(base, [largest], session.text.condition)
    if session.measured.prior is not None:
        _guided_pass(session, session.measured.prior.side)
    del held


def _try_sample(session: Session) -> None:
    """What a sample takes: guided predictions, and the latents turned into an image."""
    base = session.trainee.base
    latents = _guided_pass(session, base.resolution)
    decoded_latents(base, latents)


def _guided_pass(session: Session, side: int) -> torch.Tensor:
    """One prediction with and without a prompt, as classifier-free guidance makes it, for an image of `side`
    pixels; returns the latents that it began with, (1, C, h, w)."""
    base = session.trainee.base
    edge = side // base.pixels_a_latent
    latents = torch.zeros(1, base.latent_channels, edge, edge, device=base.device)
    text = TextCondition.cat([session.text.negative(), session.text.condition("")])
    with torch.no_grad():
        prediction(base, torch.cat([latents, latents]), torch.zeros(1, device=base.device).long(), text)
    return latents
