"""Images from noise: classifier-free guidance around a diffusers scheduler, and a `Pipeline` that stays open.

The noise of an image depends on its seed and size alone and is drawn on the CPU, so that a seed means the
same image on every device, and base and adapter can be compared on the same noise.

A `Pipeline` merges what changes between two images and never reloads the base. On a card with too little
memory the text encoders wait in main memory and are on the card only while they read a new prompt; where that
is not enough, the UNet is quantized to 8 bits. How an adapter is truncated to a rank is passed in, because
the tools that do it import this folder.
"""

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lora_core.errors import ConfigError
from lora_core.formats.io import load_adapter
from lora_core.generate.latent_preview import OnLatents, fit_rgb_matrix, predict_clean
from lora_core.generate.request import GenerationRequest, WeightedLora
from lora_core.lora.inject import put_tokens
from lora_core.lora.weights import AdapterWeights, LoadedLora, Merger
from lora_core.model_files.families import is_text_encoder
from lora_core.models.device import WithoutWaiting, out_of_memory, release_failed
from lora_core.models.load import INT8, RESIDENT, BaseModel, encode_start, keep_in_less_memory, load_to_fit
from lora_core.models.prompts import encode_prompts
from lora_core.models.unet import PromptEmbeds, default_time_ids, to_device
from lora_core.models.vae import decode_latents
from lora_core.settings.schema import SAMPLERS, chosen
from lora_core.system.files import file_stamp

OnStep = Callable[[int, int], None]
"""Called with (steps done, number of steps); an exception from it ends the image."""


def make_scheduler(base: BaseModel, name: str) -> Any:
    """A fresh diffusers scheduler, configured as the base asks.

    Raises:
        ConfigError: no such sampler.
    """
    row = chosen(SAMPLERS, name, "sampler")
    return row.resolve().from_config(base.facts.scheduler, **row.defaults)


def sample_latents(
    base: BaseModel, request: GenerationRequest, text: PromptEmbeds, negative: PromptEmbeds,
    on_step: OnStep | None = None, on_latents: OnLatents | None = None, start: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Latents (1, C, h, w) after the last sampler step. No step waits for the device.

    With `start`, the latents of an image (1, C, h, w) on the CPU, noise is laid over them and only the last
    steps are done, the request's share of all. Five more channels are what an inpainting base sees with a
    mask; a share of 1 begins with noise alone then, as in diffusers.
    Source: Ho and Salimans 2022, equation 6, for the guidance; Meng et al. 2022 (SDEdit) for the start.

    Raises:
        ConfigError: a value is out of range, or the base cannot make that size.
    """
    request.check()
    width, height = base.image_size(request.width, request.height)
    scheduler = make_scheduler(base, request.sampler)
    try:
        # On the CPU: schedulers read them one by one, which would synchronize with a card.
        scheduler.set_timesteps(request.steps)
    except ValueError as error:
        # LCM picks its steps out of the 50 that its models were distilled from.
        steps = f"cannot take {request.steps} steps; take fewer"
        raise ConfigError(f"The sampler {request.sampler} {steps}.") from error
    factor = base.vae_scale_factor
    generator = torch.Generator().manual_seed(request.seed)
    shape = (1, base.latent_channels, height // factor, width // factor)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    share = 1.0 if start is None else request.denoising_strength
    timesteps = scheduler.timesteps[_begin(scheduler, request.steps, share) :]
    latents, seen = _noisy_start(scheduler, noise, start, timesteps[:1], share)
    guided = request.cfg > 1
    phi = base.facts.cfg_rescale(request.cfg_rescale)
    both = PromptEmbeds.cat([negative, text]) if guided else text
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    (on_device,) = to_device(base.device, timesteps)
    sizes = default_time_ids(len(both.context), height, width)
    latents, sizes, seen = to_device(base.device, latents, sizes, seen)
    with torch.no_grad():
        for done, timestep in enumerate(timesteps, start=1):
            at = on_device[done - 1]
            scaled = scheduler.scale_model_input(latents, timestep)
            given = torch.cat([scaled, seen], 1) if seen.numel() else scaled
            if guided:
                without, with_text = base.predict_noise(torch.cat([given, given]), at, both, sizes).chunk(2)
                output = without + request.cfg * (with_text - without)
                if phi:
                    output = rescale_guidance(output, with_text, phi)
            else:
                output = base.predict_noise(given, at, both, sizes)
            with WithoutWaiting() if base.device.type == "cuda" else contextlib.nullcontext():
                latents = scheduler.step(output, timestep, latents, **options).prev_sample
            if on_step is not None:
                on_step(done, len(timesteps))
            if on_latents is not None:
                on_latents(functools.partial(predict_clean, base, scaled, output, timestep))
    return latents


def _noisy_start(
    scheduler: Any, noise: torch.Tensor, start: torch.Tensor | None, timestep: torch.Tensor, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents to begin with, and what an inpainting base sees beside them, (1, 0 or 5, h, w)."""
    image, seen = (noise, noise[:, :0]) if start is None else start.tensor_split([noise.shape[1]], 1)
    if start is None or (seen.numel() and share == 1.0):
        return noise * scheduler.init_noise_sigma, seen
    return scheduler.add_noise(image, noise, timestep), seen


def _begin(scheduler: Any, steps: int, share: float) -> int:
    """Have a scheduler do the last `share` of its steps, at least one; returns where it begins.

    The beginning is always given: a search for the first timestep fails where Karras sigmas repeat it.
    """
    first: int = scheduler.order * (steps - max(1, int(steps * share)))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return first


def rescale_guidance(guided: torch.Tensor, with_text: torch.Tensor, phi: float) -> torch.Tensor:
    """phi guided s(with_text) / s(guided) + (1 - phi) guided, with s the standard deviation of each image.

    Guidance raises the contrast, which looks overexposed with a base that was trained down to pure noise.
    Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4.

    Args:
        guided: the guided prediction, (B, C, h, w).
        with_text: the prediction with the prompt, (B, C, h, w).
        phi: 0 leaves `guided` as it is, 1 gives it the spread of `with_text`.
    """
    wanted, given = (each.std(dim=(1, 2, 3), keepdim=True) for each in (with_text, guided))
    return guided * (phi * wanted / given + (1.0 - phi))


def sample_image(  # noqa: PLR0913 - one more for a run, which goes on
    base: BaseModel, request: GenerationRequest, text: PromptEmbeds, negative: PromptEmbeds,
    on_step: OnStep | None = None, on_latents: OnLatents | None = None, start: torch.Tensor | None = None,
    strict: bool = True,
) -> Image.Image:  # fmt: skip
    """The image (RGB) of encoded prompts, with the base's current adapters.

    Raises:
        ConfigError: it has values that are not finite, and is `strict`; else these are black.
    """
    latents = sample_latents(base, request, text, negative, on_step, on_latents, start)
    pixels = decode_latents(base, latents)[0].permute(1, 2, 0)
    if strict and not pixels.isfinite().all():
        raise ConfigError(
            "The image has values that are not finite (NaN), so it would be black: lower the strengths of the"
            " LoRAs, choose the precision fp32 or another VAE, or check what the base predicts."
        )
    return Image.fromarray((pixels.nan_to_num() * 255).round().numpy().astype(np.uint8))


def generate_image(base: BaseModel, request: GenerationRequest, on_step: OnStep | None = None) -> Image.Image:
    """The image (RGB) of a request, with whatever adapter is in the base.

    Raises:
        ConfigError: it has values that are not finite.
    """
    size = base.image_size(request.width, request.height)
    start = encode_start(base, request.image, size, request.mask)
    conditions = encode_prompts(base, request.prompt, request.negative, request.clip_skip, request.tokens)
    return sample_image(base, request, *conditions, on_step, start=start)


def infotext(base: BaseModel, request: GenerationRequest, extra: Mapping[str, str] | None = None) -> str:
    """Prompt and settings in the form of A1111, with the size and CFG rescale that `base` uses, and with
    more settings, name to value."""
    width, height = base.image_size(request.width, request.height)
    phi = base.facts.cfg_rescale(request.cfg_rescale) if request.cfg > 1 else 0.0
    return replace(request, base=base.name, width=width, height=height).infotext(phi, extra or {})


MOST_ADAPTERS = 8
"""Kept in memory after use, and as many that were truncated."""
MOST_PROMPTS = 32
IN_8_BITS = "The UNet is kept in 8 bits, as it does not fit into the graphics memory; images differ slightly."
Truncate = Callable[[AdapterWeights, int], AdapterWeights]


def open_pipeline(request: GenerationRequest, truncate: Truncate, precision: str = "auto") -> "Pipeline":
    """The pipeline of a request's base on the best device; see `load_to_fit`."""
    base, kept = load_to_fit(
        request.base, precision, request.prediction, request.vae, request.zero_terminal_snr
    )
    return Pipeline(base, truncate, kept)


class Pipeline:
    """A base with its merged adapters; the same request gives the same image, whatever came before."""

    def __init__(self, base: BaseModel, truncate: Truncate, kept: int = RESIDENT) -> None:
        """Generate with `base`, kept in one of three ways; `truncate` cuts an adapter to a rank."""
        self.base = base
        self.kept = kept
        self._merger = Merger(base.modules)
        keep = functools.lru_cache(MOST_ADAPTERS)
        self._read = keep(lambda file, stamp: load_adapter(Path(file), base.family, plain=False))
        self._truncated = keep(lambda rank, file, _: truncate(load_adapter(Path(file), base.family), rank))
        self._merged: tuple[object, ...] | None = ()
        self._merged_text: tuple[object, ...] = ()
        self._conditions = functools.lru_cache(MOST_PROMPTS)(self._encode_prompts)
        self._start = keep(lambda image, size, mask: encode_start(base, image[0], size, mask[0]))
        self.ready_in = 0.0
        """Seconds from the last request to the first step of its sampler: merging and encoding the prompt."""

    @property
    def note(self) -> str:
        """What the user should know of how the base is kept, or ""."""
        return IN_8_BITS if self.kept == INT8 else ""

    @functools.cached_property
    def rgb_matrix(self) -> torch.Tensor:
        """Latents to colours, for the latent preview."""
        return fit_rgb_matrix(self.base)

    def __call__(
        self, request: GenerationRequest, on_step: OnStep | None = None, on_latents: OnLatents | None = None
    ) -> Image.Image:
        """The image, RGB. Where a card runs out of memory, the base stays in a smaller form afterwards.

        Raises:
            LoraError: an adapter does not fit, or the base cannot make such an image.
        """
        while True:
            try:
                return self._generate(request, on_step, on_latents)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or self.kept == INT8 or self.base.device.type == "cpu":
                    raise
                release_failed(error, self.base.device)
            self.kept += 1
            keep_in_less_memory(self.base, self.kept)

    def _generate(
        self, request: GenerationRequest, on_step: OnStep | None, on_latents: OnLatents | None
    ) -> Image.Image:
        began = time.monotonic()
        self.set_adapters(request.loras)
        # As long as no adapter changes the text encoders, the conditions stay.
        asked = request.prompt, request.negative, request.clip_skip, request.tokens
        text, negative = self._conditions(self._merged_text, *asked)
        size = self.base.image_size(request.width, request.height)
        start = self._start(_version(request.image), size, _version(request.mask))
        self.ready_in = time.monotonic() - began
        return sample_image(self.base, request, text, negative, on_step, on_latents, start)

    def _encode_prompts(
        self, merged: tuple[object, ...], prompt: str, negative: str, clip_skip: int, tokens: int
    ) -> tuple[PromptEmbeds, PromptEmbeds]:
        if self.kept == RESIDENT:
            return encode_prompts(self.base, prompt, negative, clip_skip, tokens)
        # The largest text encoder takes more than the VAE.
        self.base.put("vae", torch.device("cpu"))
        found = encode_prompts(self.base, prompt, negative, clip_skip, tokens)
        self.base.put("vae", self.base.device)
        return found

    def infotext(self, request: GenerationRequest, extra: Mapping[str, str] | None = None) -> str:
        """The text for the PNG of a request."""
        bits = {"UNet": "8 bits"} if self.kept == INT8 else {}
        return infotext(self.base, request, bits | dict(extra or {}))

    def set_adapters(self, loras: tuple[WeightedLora, ...]) -> None:
        """Make the base act as with exactly these adapters; does nothing where it does already."""
        acting = [
            (key, LoadedLora(weights, lora.strength, lora.text_strength))
            for lora, (key, weights) in [(lora, self._load(lora)) for lora in loras]
            if lora.acts
        ]
        wanted = tuple((key, one.strength, one.text_strength) for key, one in acting)
        if wanted == self._merged:
            return
        # An exception while merging leaves the weights in an unknown state.
        self._merged = None
        self._merger.apply([one for _, one in acting])
        put_tokens(self.base, [one.weights for _, one in acting])
        self._merged_text = tuple(
            (key, part, one.on(part))
            for key, one in acting
            for part in (*one.weights.parts(), *one.weights.tokens)
            if is_text_encoder(part) and (one.on(part) or part in one.weights.tokens)
        )
        self._merged = wanted

    def _load(self, lora: WeightedLora) -> tuple[tuple[object, ...], AdapterWeights]:
        """The adapter in a file, read again where the file has changed, and what identifies it."""
        version = _version(lora.file)
        weights = self._truncated(lora.rank, *version) if lora.rank else self._read(*version)
        return (*version, lora.rank), weights


def _version(file: str) -> tuple[str, tuple[int, int] | None]:
    """A file with its time and size."""
    return file, file_stamp(file)
