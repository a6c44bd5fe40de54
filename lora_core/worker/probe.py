"""The worker's verb `probe`: what a step of some settings takes, by taking a few.

Base and adapter are those of the settings; pictures are noise, as their content costs nothing. All is let go
of again, whatever happens.
"""

import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lora_core.data.buckets import Bucket, bucket_of
from lora_core.errors import OutOfMemory
from lora_core.models.device import cap_memory, out_of_memory, use_device
from lora_core.models.encode import PromptEmbeds, encode_prompt
from lora_core.models.load import BaseModel, load_base
from lora_core.models.unet import predict_noise
from lora_core.settings.config import RunConfig
from lora_core.train.data import Batch, Batches, TextSource
from lora_core.train.loop import Step, StepPlan, Trainee, training_steps
from lora_core.train.setup import adapter_plan, trainee_in, training_dtype, weight_policy
from lora_core.worker.draw import Cancelled

Request = dict[str, Any]
STEPS = 4
"""The first one warms up and does not count."""
ENOUGH = 20.0
"""Where the steps so far took so many seconds, they have to do."""
CAPTION = "a picture of something"
GUIDED = 2
"""What one step of a sampler puts through the UNet: with the prompt and without."""


class Probe:
    """The verb, and how it tells and is told."""

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], None],
        cancelled: set[str],
        release: Callable[[Request], dict[str, Any]],
    ) -> None:
        """Send answers through `answer`; `cancelled` holds ids to be dropped; `release` empties the
        memory."""
        self._answer = answer
        self._cancelled = cancelled
        self._release = release

    def probe(self, request: Request) -> dict[str, Any]:
        """Take some steps of `config`: {"step", "draw", "steps", "peak", "device"}, times in seconds.

        `aside` is the folder on whose drive weights may be put aside.

        Raises:
            OutOfMemory: a step does not fit.
            Cancelled: by its sender, between two steps.
        """
        config = RunConfig.from_dict(request["config"])
        # Never two bases at once: there may be memory for one.
        self._release({})
        try:
            aside = Path(str(request.get("aside") or tempfile.gettempdir()))
            return self._measured(config, str(request["id"]), aside)
        except Exception as error:
            full = out_of_memory(error)
            # Its frames hold the base for as long as the error is known.
            traceback.clear_frames(error.__traceback__)
            if not full:
                raise
            raise OutOfMemory(
                "A step did not fit into memory as it is, so the run would take slower ways that need less;"
                " with a lower train.batch_size or train.resolution it needs none."
            ) from None
        finally:
            self._release({})

    def _measured(self, config: RunConfig, name: str, aside: Path) -> dict[str, Any]:
        device = use_device(config.train.device)
        cap_memory(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        model = config.model
        dtype = training_dtype(config, device)
        policy = weight_policy(config.train, [], device, aside)
        base = load_base(
            model.base, device, dtype, model.prediction, model.vae, policy, model.zero_terminal_snr
        )
        self._check(name)
        trainee, batches, text = _made(base, config)
        taken: list[float] = []
        for step in self._steps(training_steps(trainee, batches, text, _plan(config), 0), name):
            taken.append(step.seconds)
            if len(taken) > 1 and sum(taken) > ENOUGH:
                break
        # Where one step takes a minute, warming up is the least of it.
        counted = taken[1:] or taken
        draw = _draw_seconds(base, text.condition(CAPTION))
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        return {
            "step": statistics.median(counted), "draw": draw, "steps": len(counted), "peak": peak,
            "device": device.type,
        }  # fmt: skip

    def _steps(self, steps: Iterator[Step], name: str) -> Iterator[Step]:
        """The steps, said as they are taken; ends where the request is cancelled."""
        for done, step in enumerate(steps, start=1):
            self._answer({"id": name, "event": "progress", "done": done, "total": STEPS})
            yield step
            self._check(name)

    def _check(self, name: str) -> None:
        if name in self._cancelled:
            raise Cancelled


class _Noise(Batches):
    """Micro-batches of noise, all of one size."""

    def __init__(self, base: BaseModel, bucket: Bucket, count: int) -> None:
        side = base.vae_scale_factor
        shape = (count, base.latent_channels, bucket.height // side, bucket.width // side)
        self._latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        size = [bucket.height, bucket.width]
        self._sizes = torch.tensor([[*size, 0, 0, *size]] * count, dtype=torch.float32)

    def batch(self, number: int) -> Batch:
        """The same each time."""
        count = len(self._latents)
        return Batch(self._latents, [CAPTION] * count, ["noise"] * count, self._sizes)


class _OneCaption(TextSource):
    """One caption, encoded once; the encoders are let go of, as a run does it."""

    def __init__(self, base: BaseModel, clip_skip: int, tokens: int) -> None:
        with torch.no_grad():
            self._condition = encode_prompt(base, [CAPTION], clip_skip, tokens)
        base.text_encoders.clear()

    def conditions(self, captions: list[str]) -> PromptEmbeds:
        """The same for each."""
        return self._condition.expand(len(captions))


def _plan(config: RunConfig) -> StepPlan:
    return StepPlan.of(config, STEPS)


def _made(base: BaseModel, config: RunConfig) -> tuple[Trainee, Batches, TextSource]:
    """What the steps of a run need, as `training.prepare` makes it, but from noise."""
    layout = adapter_plan(base, config)
    train = config.train
    trained = layout.encoders_trained
    text = (
        TextSource(base, base.path, True, train.clip_skip, train.tokens)
        if trained
        else _OneCaption(base, train.clip_skip, train.tokens)
    )
    side = train.resolution or base.resolution
    bucket = bucket_of(side, side, side, base.size_multiple)
    trainee, _ = trainee_in(base, layout, config, "")
    return trainee, _Noise(base, bucket, train.batch_size), text


def _draw_seconds(base: BaseModel, text: PromptEmbeds) -> float:
    """Seconds of a sampler's step at the base's own size."""
    side = base.resolution // base.vae_scale_factor
    latents = torch.randn(GUIDED, base.latent_channels, side, side).to(base.device)
    timesteps = torch.full((GUIDED,), base.noise.num_timesteps // 2, device=base.device)
    base.unet.eval()
    taken = []
    with torch.no_grad():
        for _ in range(2):
            began = time.perf_counter()
            # Fetching a number waits for the device.
            float(predict_noise(base, latents, timesteps, text.expand(GUIDED)).float().sum())
            taken.append(time.perf_counter() - began)
    return min(taken)
