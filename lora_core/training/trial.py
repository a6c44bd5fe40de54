"""The trial: the heaviest step, validation and sample before the first real one, which choose the rungs."""

from collections.abc import Callable

import torch

from lora_core.models.encode import decoded_latents
from lora_core.training.loop import StepPlan, Trainee, micro_batch
from lora_core.training.memory import VAE_ASIDE, Ladder, free_memory, out_of_memory
from lora_core.training.prepare import Session
from lora_core.validation.gain import triple_losses


def chosen_rungs(session: Session, ladder: Ladder, plan: StepPlan, state: float) -> tuple[list[str], int]:
    """Try the heaviest step, validation and sample before the first real one, and climb until they fit.

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
    trainee.storage.clear()
    if session.held_out:
        largest = max(session.held_out, key=lambda measured: measured.latents.numel())
        triple_losses(base, [largest], session.text.condition)
    del held


def _try_sample(session: Session) -> None:
    """What the end of a sample takes: its latents turned into a picture."""
    base = session.trainee.base
    side = base.resolution // base.pixels_a_latent
    decoded_latents(base, torch.zeros(1, base.latent_channels, side, side))
