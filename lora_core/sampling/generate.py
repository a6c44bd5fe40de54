"""One picture from noise: classifier-free guidance around a diffusers scheduler.

The noise of a picture depends on its seed and size alone and is drawn on the CPU, so that a seed means the
same picture on every device, and base and adapter can be compared on the same noise.
"""

import functools
import inspect
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora_core.models.denoise import own_sizes, prediction
from lora_core.models.encode import TextCondition, decoded_latents, negative_condition, text_condition
from lora_core.models.load import BaseModel
from lora_core.spec.choices import SAMPLERS, chosen
from lora_core.spec.errors import ConfigError
from lora_core.spec.infotext import Info, Tag
from lora_core.spec.paths import write_atomically
from lora_core.spec.setting import AUTO, NumberOrAuto

OnStep = Callable[[int, int], None]
"""Called with (steps done, steps in all); what it raises ends the picture."""
OnClean = Callable[[Callable[[], torch.Tensor]], None]
"""Called after each step with what computes the latents (1, C, h, w) that the picture is heading for."""


@dataclass(frozen=True)
class Picture:
    """What a picture is made from, text aside.

    Attributes:
        seed: of the noise.
        steps: of the sampler.
        cfg: guidance scale; 1 or less leaves the negative prompt out.
        sampler: a key or title of `choices.SAMPLERS`.
        width, height: in pixels; 0 is the base's own.
        cfg_rescale: phi of `rescaled_guidance`, 0 for none; "auto" is what suits the base.
    """

    seed: int = 0
    steps: int = 20
    cfg: float = 5.0
    sampler: str = "ddim"
    width: int = 0
    height: int = 0
    cfg_rescale: NumberOrAuto = AUTO

    def __post_init__(self) -> None:
        """Refuse what no sampler can do."""
        for word, value, legal in (
            ("seed", self.seed, 0 <= self.seed < 2**63),
            ("steps", self.steps, 1 <= self.steps <= 1000),
            ("cfg", self.cfg, math.isfinite(self.cfg)),
            ("cfg_rescale", self.cfg_rescale, self.cfg_rescale == AUTO or 0.0 <= self.cfg_rescale <= 1.0),
        ):
            if not legal:
                raise ConfigError(f"{word} = {value} is out of range.")


def sampler_of(base: BaseModel, name: str) -> Any:
    """A fresh diffusers scheduler for `name`, configured as the base asks.

    Raises:
        ConfigError: there is no such sampler.
    """
    row = chosen(SAMPLERS, name, "sampler")
    return row.resolve().from_config(base.scheduler_config, **row.defaults)


def picture_size(base: BaseModel, picture: Picture) -> tuple[int, int]:
    """Width and height in pixels.

    Raises:
        ConfigError: the base cannot make that size.
    """
    multiple = base.size_multiple
    size = (picture.width or base.resolution, picture.height or base.resolution)
    for word, side in zip(("width", "height"), size, strict=True):
        if side < multiple or side > 4096 or side % multiple:
            raise ConfigError(
                f"{word} = {side} cannot be made; take a multiple of {multiple} between {multiple} and 4096."
            )
    return size


def _set_steps(scheduler: Any, picture: Picture) -> None:
    """Set the timesteps on the CPU: schedulers read them one by one, and a card would be waited for."""
    try:
        scheduler.set_timesteps(picture.steps)
    except ValueError as error:
        # LCM picks its steps out of the 50 that its models were distilled from.
        raise ConfigError(
            f"The sampler {picture.sampler} cannot take {picture.steps} steps; take fewer."
        ) from error


def sampled_latents(
    base: BaseModel,
    picture: Picture,
    text: TextCondition,
    negative: TextCondition,
    on_step: OnStep | None = None,
    on_clean: OnClean | None = None,
) -> torch.Tensor:
    """Latents (1, 4, h, w) after the last sampler step. A step waits for nothing that the device computes.

    Source: Ho and Salimans 2022, equation 6, for the guidance.
    """
    width, height = picture_size(base, picture)
    scheduler = sampler_of(base, picture.sampler)
    _set_steps(scheduler, picture)
    factor = base.pixels_a_latent
    generator = torch.Generator().manual_seed(picture.seed)
    shape = (1, base.latent_channels, height // factor, width // factor)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    latents = noise.to(base.device) * scheduler.init_noise_sigma
    guided = picture.cfg > 1
    phi = base.facts.cfg_rescale(picture.cfg_rescale)
    both = TextCondition.cat([negative, text]) if guided else text
    draws = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if draws else {}
    on_device = scheduler.timesteps.to(base.device)
    sizes = own_sizes(len(both.context), height, width).to(base.device)
    with torch.no_grad():
        for done, timestep in enumerate(scheduler.timesteps, start=1):
            at = on_device[done - 1]
            seen = scheduler.scale_model_input(latents, timestep)
            if guided:
                without, with_text = prediction(base, torch.cat([seen, seen]), at, both, sizes).chunk(2)
                output = without + picture.cfg * (with_text - without)
                if phi:
                    output = rescaled_guidance(output, with_text, phi)
            else:
                output = prediction(base, seen, at, both, sizes)
            latents = scheduler.step(output, timestep, latents, **options).prev_sample
            if on_step is not None:
                on_step(done, len(scheduler.timesteps))
            if on_clean is not None:
                on_clean(functools.partial(_clean, base, seen, output, timestep))
    return latents


def rescaled_guidance(guided: torch.Tensor, with_text: torch.Tensor, phi: float) -> torch.Tensor:
    """phi guided s(with_text) / s(guided) + (1 - phi) guided, with s the standard deviation of each picture.

    Guidance raises the contrast, which a base that has learned pure noise as its start shows as overexposure.
    Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4.

    Args:
        guided: what guidance gives, (B, C, h, w).
        with_text: what the UNet predicts with the prompt, (B, C, h, w).
        phi: 0 leaves `guided` as it is, 1 gives it the spread of `with_text`.
    """
    wanted, given = (each.std(dim=(1, 2, 3), keepdim=True) for each in (with_text, guided))
    return guided * (phi * wanted / given + (1.0 - phi))


def _clean(base: BaseModel, seen: torch.Tensor, output: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Latents without their noise, as the UNet's output has them.

    What the UNet sees has the variance of the forward process whichever the sampler, so that this needs no
    word from the scheduler. Source: Ho et al. 2020, equation 15; Salimans and Ho 2022, appendix D.
    """
    step = int(timestep.round().clamp(0, base.noise.timesteps - 1))
    share = base.noise.alphas_cumprod[step].clamp(min=1e-4)
    signal, spread = float(share.sqrt()), float((1 - share).sqrt())
    if base.noise.prediction == "epsilon":
        return (seen - spread * output) / signal
    return signal * seen - spread * output


def generated(
    base: BaseModel,
    picture: Picture,
    text: TextCondition,
    negative: TextCondition,
    on_step: OnStep | None = None,
    on_clean: OnClean | None = None,
) -> Image.Image:
    """The finished picture, RGB."""
    return image_of(decoded_latents(base, sampled_latents(base, picture, text, negative, on_step, on_clean)))


def image_of(pixels: torch.Tensor) -> Image.Image:
    """The RGB picture of pixels (1, 3, H, W) in [0, 1]."""
    return Image.fromarray((pixels[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def generated_from_prompt(
    base: BaseModel, picture: Picture, prompt: str, negative: str = "", on_step: OnStep | None = None
) -> Image.Image:
    """The finished picture of a prompt, RGB."""
    with torch.no_grad():
        text, unwanted = text_condition(base, [prompt]), negative_condition(base, negative)
    return generated(base, picture, text, unwanted, on_step)


AdapterUse = tuple[str, float] | tuple[str, float, float | None]
"""An adapter's name, its strength on the UNet, and that on the text encoders where it differs."""


def infotext(
    base: BaseModel,
    picture: Picture,
    prompt: str,
    negative: str,
    adapters: Sequence[AdapterUse],
    extra: Mapping[str, str] | None = None,
) -> str:
    """Prompt and settings in the form that A1111 writes into its pictures and reads back.

    Args:
        base: what drew it.
        picture: how.
        prompt: its prompt.
        negative: its negative prompt.
        adapters: what was in the base.
        extra: more settings, name to value.
    """
    width, height = picture_size(base, picture)
    phi = base.facts.cfg_rescale(picture.cfg_rescale) if picture.cfg > 1 else 0.0
    return Info(
        prompt=prompt, negative=negative, steps=picture.steps,
        sampler=chosen(SAMPLERS, picture.sampler, "sampler").title, cfg=picture.cfg, cfg_rescale=phi,
        seed=picture.seed, width=width, height=height, model=Path(base.name).stem,
        loras=tuple(Tag(*use) for use in adapters), extra=extra or {},
    ).text()  # fmt: skip


def save_png(image: Image.Image, path: Path, parameters: str) -> None:
    """Write a PNG with its settings inside, whole or not at all.

    Raises:
        ConfigError: it cannot be written there.
    """
    info = PngInfo()
    info.add_text("parameters", parameters)
    data = io.BytesIO()
    image.save(data, format="PNG", pnginfo=info)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data.getvalue())
    except OSError as error:
        raise ConfigError(f"The picture cannot be written to {path}: {error.strerror or error}.") from error
