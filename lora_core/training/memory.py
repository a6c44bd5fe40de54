"""Memory: a ladder of ways to take less of it, and the trial of the heaviest step that chooses a rung before
the first one.

Each rung costs time, or nothing, and changes a gradient by rounding alone. What was taken from which step on
is in `plan.json`, so that a resume takes the same rungs at the same steps.
"""

import gc
import importlib
import importlib.util
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lora_core.models.encode import decoded_latents
from lora_core.spec.config import RunConfig
from lora_core.spec.errors import OutOfMemory
from lora_core.training.loop import StepPlan, Trainee, micro_batch
from lora_core.training.prepare import Session
from lora_core.training.trainee import enable_checkpointing
from lora_core.validation.gain import triple_losses

EIGHT_BIT = "bitsandbytes"
VAE_ASIDE = "vae aside"


@dataclass(frozen=True)
class Rung:
    """One way to take less memory.

    Attributes:
        name: in `plan.json`.
        told: what is done and what it costs, a sentence.
        possible: whether it can be taken now.
        take: does it.
    """

    name: str
    told: str
    possible: Callable[[Trainee, RunConfig], bool]
    take: Callable[[Trainee], None]


def _eight_bit_possible(trainee: Trainee, config: RunConfig) -> bool:
    plain = type(trainee.optimizer) is torch.optim.AdamW and not trainee.optimizer.state
    return plain and importlib.util.find_spec(EIGHT_BIT) is not None


def _take_eight_bit(trainee: Trainee) -> None:
    known = ("params", "lr", "initial_lr", "until", "betas", "eps", "weight_decay")
    groups = [{key: group[key] for key in known} for group in trainee.optimizer.param_groups]
    trainee.optimizer = importlib.import_module(f"{EIGHT_BIT}.optim").AdamW8bit(groups)


def _put_vae_aside(trainee: Trainee) -> None:
    module: torch.nn.Module = trainee.base.vae
    module.to("cpu")


def _take_half(trainee: Trainee) -> None:
    trainee.split *= 2


LADDER = (
    Rung(
        VAE_ASIDE,
        "The VAE waits in the computer's own memory; samples take some seconds longer.",
        lambda trainee, config: trainee.base.vae.device.type != "cpu",
        _put_vae_aside,
    ),
    Rung(
        "checkpointing",
        "Gradient checkpointing is on: steps take about a third longer.",
        lambda trainee, config: not trainee.base.unet.is_gradient_checkpointing,
        lambda trainee: enable_checkpointing(trainee.base),
    ),
    Rung(
        "half",
        "Batches go through in parts of half the size that add up to the same gradient: steps take up to"
        " twice as long on a graphics card, and no longer on a processor.",
        lambda trainee, config: trainee.split < config.train.batch_size,
        _take_half,
    ),
    Rung(
        "8-bit optimizer",
        "AdamW keeps its state in 8 bits, a quarter of the memory, at about the same speed.",
        _eight_bit_possible,
        _take_eight_bit,
    ),
)
"""In the order in which they are taken; the first that is possible comes next. Text encoders are dropped
after caching in any case. A quantised or offloaded base would be the last rung and is not built yet."""


class Ladder:
    """Where a run stands on the ladder."""

    def __init__(self, trainee: Trainee, config: RunConfig, taken: list[tuple[str, int]]) -> None:
        """`taken` names rungs with the steps that they were taken after; the list is added to."""
        self._trainee = trainee
        self._config = config
        self.taken = taken
        self._reached = 0

    def reach(self, step: int) -> None:
        """Take what was taken after `step` steps or earlier by the process that did them."""
        while self._reached < len(self.taken) and self.taken[self._reached][1] <= step:
            name = self.taken[self._reached][0]
            self._reached += 1
            rung = next((rung for rung in LADDER if rung.name == name), None)
            if rung is not None and rung.possible(self._trainee, self._config):
                rung.take(self._trainee)

    @property
    def next(self) -> Rung | None:
        """The rung that would be taken next."""
        return next((rung for rung in LADDER if rung.possible(self._trainee, self._config)), None)

    def climb(self, step: int) -> str:
        """Take the next rung, from the step after `step` on; returns what that means.

        Raises:
            OutOfMemory: there is none left.
        """
        self.reach(step)
        rung = self.next
        if rung is None:
            raise OutOfMemory(self._nothing_left())
        # Rungs noted for later steps are no longer what will happen.
        del self.taken[self._reached :]
        self.taken.append((rung.name, step))
        self.reach(step)
        return rung.told

    def _nothing_left(self) -> str:
        tried = ["checkpointing is on"]
        tried += ["pictures go through one at a time"] if self._trainee.split > 1 else []
        eight = (
            "" if importlib.util.find_spec(EIGHT_BIT) else f" or install {EIGHT_BIT} for an 8-bit optimizer,"
        )
        return (
            f"The device ran out of memory although {' and '.join(tried)}; lower train.resolution or"
            f" adapter.rank,{eight} or close other programs that use the device. What is saved is whole."
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, of whichever kind."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if any(
        word in str(error) for word in ("can't allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc")
    ):
        return True
    # What oneDNN says when its allocation fails; without a limit it would mean something else.
    return "could not create a primitive" in str(error) and limited(torch.device("cpu"))


def free_memory(trainee: Trainee, error: BaseException | None = None) -> None:
    """Let go of all that a failed step holds."""
    while error is not None:
        # The frames of the step hold its activations for as long as the error is known.
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    trainee.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if trainee.base.device.type == "cuda":
        torch.cuda.empty_cache()
    elif trainee.base.device.type == "mps":
        torch.mps.empty_cache()


def limited(device: torch.device) -> bool:
    """Whether running out of memory would be an error here that can be caught.

    A processor's memory gives way to the disk, and then to the system's end of the process, without one;
    only a limit on the address space makes an error of it.
    """
    if device.type != "cpu":
        return True
    try:
        import resource
    except ImportError:
        return False
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


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
    trainee.optimizer.zero_grad(set_to_none=True)
    if session.held_out:
        largest = max(session.held_out, key=lambda measured: measured.latents.numel())
        triple_losses(base, [largest], session.text.condition)
    del held


def _try_sample(session: Session) -> None:
    """What the end of a sample takes: its latents turned into a picture."""
    base = session.trainee.base
    side = base.resolution // base.pixels_a_latent
    decoded_latents(base, torch.zeros(1, base.latent_channels, side, side))
