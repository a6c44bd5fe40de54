"""How long a training step of some settings takes, by taking a few.

Base and adapter are those of the settings; the images are noise, since their content costs nothing. Nothing
is kept in memory afterwards, whatever happens.
"""

import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_core.data.buckets import Bucket, choose_bucket
from lora_core.errors import OutOfMemory
from lora_core.models.device import cap_memory, out_of_memory, use_device
from lora_core.models.encode import encode_prompt
from lora_core.models.load import BaseModel, load_base
from lora_core.models.unet import PromptEmbeds
from lora_core.settings.config import RunConfig
from lora_core.train.data import Batch, Batches, PromptCache
from lora_core.train.loop import StepSettings, TrainState, training_steps
from lora_core.train.setup import build_train_state, plan_adapter, training_dtype, weight_policy

STEPS = 4
"""The first one warms up and does not count."""
MAX_SECONDS = 20.0
"""No further step is taken after so many seconds."""
CAPTION = "a picture of something"
CFG_BATCH = 2
"""What one step of a sampler puts through the UNet: with the prompt and without."""


def time_steps(
    config: RunConfig, offload_folder: Path, on_step: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Take some training steps and a sampler's step.

    Args:
        config: the settings.
        offload_folder: on the drive that weights may be offloaded to.
        on_step: called with (done, total) after each step; what it raises ends the measurement.

    Returns:
        step and draw (seconds of a training step and of a sampler's step), steps (how many counted), peak
        (bytes of the device's memory, 0 on a CPU) and device (its kind).

    Raises:
        OutOfMemory: a step does not fit.
    """
    try:
        return _time_steps(config, offload_folder, on_step or (lambda done, total: None))
    except Exception as error:
        full = out_of_memory(error)
        # Its frames hold the base for as long as the error is known.
        traceback.clear_frames(error.__traceback__)
        if not full:
            raise
        raise OutOfMemory(
            "A step did not fit into memory as it is, so the run would take slower ways that need less; with"
            " a lower train.batch_size or train.resolution it needs none."
        ) from None


def _time_steps(
    config: RunConfig, offload_folder: Path, on_step: Callable[[int, int], None]
) -> dict[str, Any]:
    device = use_device(config.train.device)
    cap_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = config.model
    dtype = training_dtype(config, device)
    policy = weight_policy(config.train, [], device, offload_folder)
    base = load_base(model.base, device, dtype, model.prediction, model.vae, policy, model.zero_terminal_snr)
    on_step(0, STEPS)
    trainee, batches, text = _set_up(base, config)
    seconds: list[float] = []
    for step in training_steps(trainee, batches, text, StepSettings.of(config, STEPS), 0):
        seconds.append(step.seconds)
        on_step(len(seconds), STEPS)
        if len(seconds) > 1 and sum(seconds) > MAX_SECONDS:
            break
    # Where one step takes a minute, warming up is the least of it.
    counted = seconds[1:] or seconds
    return {
        "step": statistics.median(counted),
        "draw": _time_sampler_step(base, text.embed(CAPTION)),
        "steps": len(counted),
        "peak": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        "device": device.type,
    }


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


class _OneCaption(PromptCache):
    """One caption, encoded once; the text encoders are then dropped, as in a run."""

    def __init__(self, base: BaseModel, clip_skip: int, tokens: int) -> None:
        with torch.no_grad():
            self._condition = encode_prompt(base, [CAPTION], clip_skip, tokens)
        base.text_encoders.clear()

    def embed_batch(self, captions: list[str]) -> PromptEmbeds:
        """The same for each."""
        return self._condition.expand(len(captions))


def _set_up(base: BaseModel, config: RunConfig) -> tuple[TrainState, Batches, PromptCache]:
    """What the steps of a run need, as `train.setup` makes it, but from noise."""
    layout, train = plan_adapter(base, config), config.train
    text = (
        PromptCache(base, base.path, True, train.clip_skip, train.max_token_length)
        if layout.encoders_trained
        else _OneCaption(base, train.clip_skip, train.max_token_length)
    )
    side = train.resolution or base.resolution
    bucket = choose_bucket(side, side, side, base.size_multiple)
    trainee, _ = build_train_state(base, layout, config, "")
    return trainee, _Noise(base, bucket, train.batch_size), text


def _time_sampler_step(base: BaseModel, text: PromptEmbeds) -> float:
    """Seconds of a sampler's step at the base's own size, the faster of two."""
    side = base.resolution // base.vae_scale_factor
    latents = torch.randn(CFG_BATCH, base.latent_channels, side, side).to(base.device)
    timesteps = torch.full((CFG_BATCH,), base.noise.num_timesteps // 2, device=base.device)
    base.denoiser.eval()
    taken = []
    with torch.no_grad():
        for _ in range(2):
            began = time.perf_counter()
            # Fetching a number waits for the device.
            float(base.predict_noise(latents, timesteps, text.expand(CFG_BATCH)).float().sum())
            taken.append(time.perf_counter() - began)
    return min(taken)
