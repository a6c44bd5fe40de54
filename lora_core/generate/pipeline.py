"""A picture while it is made, for next to nothing: colours straight from latents, by one small matrix.

The matrix is fitted once a base, by least squares between the latents of a few pictures and their own colours
averaged over the pixels of a latent. It leaves out texture, which a look at something half done does not
need; decoding would cost as much as some steps of the sampler.
"""

import functools
import inspect
import io
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora_core.backends.int8 import WeightPolicy, quantize_int8
from lora_core.errors import ConfigError, OutOfMemory
from lora_core.formats.io import read_adapter
from lora_core.generate.request import GenerationRequest, Infotext, Tag, WeightedLora
from lora_core.lora.inject import LoadedLora, Merger
from lora_core.lora.weights import AdapterWeights
from lora_core.models.device import (
    available_memory,
    best_device,
    cap_memory,
    dtype_of,
    memory_of,
    out_of_memory,
    release_failed,
)
from lora_core.models.encode import (
    PromptEmbeds,
    decode_latents,
    encode_image,
    encode_negative_prompt,
    encode_prompt,
)
from lora_core.models.load import BaseModel, open_base
from lora_core.models.unet import default_time_ids, predict_noise
from lora_core.settings.choices import SAMPLERS, chosen
from lora_core.settings.schema import AUTO, NumberOrAuto
from lora_core.system.paths import DEMO_TRAIN, write_atomically

FITTED_ON = 6
"""Pictures: of 256 latents each where a latent is 8 pixels wide, for a matrix of 15 numbers."""
SIDE = 128


def fit_rgb_matrix(base: BaseModel) -> torch.Tensor:
    """(C + 1, 3) in fp32: latents with a 1 behind them, times this, are colours in [0, 1]."""
    latents, colours = [], []
    for path in _pictures():
        with Image.open(path) as opened:
            image = opened.convert("RGB").resize((SIDE, SIDE))
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
        latents.append(encode_image(base, pixels * 2 - 1).flatten(1).T)
        means = torch.nn.functional.avg_pool2d(pixels[None], base.vae_scale_factor)[0]
        colours.append(means.flatten(1).T)
    known = torch.cat(latents).double()
    ones = torch.ones(len(known), 1, dtype=torch.float64)
    solved = torch.linalg.lstsq(torch.cat([known, ones], dim=1), torch.cat(colours).double())
    return solved.solution.float()


@functools.cache
def _pictures() -> tuple[str, ...]:
    """A few of the demo's, evenly chosen."""
    found = sorted(path for path in DEMO_TRAIN.iterdir() if path.suffix.lower() != ".txt")
    return tuple(str(path) for path in found[:: max(1, len(found) // FITTED_ON)][:FITTED_ON])


def latent_preview(latents: torch.Tensor, matrix: torch.Tensor) -> Image.Image:
    """A small RGB picture, a pixel a latent, of latents (1, C, h, w)."""
    flat = latents[0].detach().float().cpu()
    colours = torch.einsum("chw,cr->hwr", flat, matrix[:-1]) + matrix[-1]
    return Image.fromarray((colours.nan_to_num().clamp(0, 1) * 255).round().byte().numpy())


# One picture from noise: classifier-free guidance around a diffusers scheduler.
#
# The noise of a picture depends on its seed and size alone and is drawn on the CPU, so that a seed means
# the same picture on every device, and base and adapter can be compared on the same noise.


OnStep = Callable[[int, int], None]
"""Called with (steps done, steps in all); what it raises ends the picture."""
OnPreview = Callable[[Callable[[], torch.Tensor]], None]
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


def make_scheduler(base: BaseModel, name: str) -> Any:
    """A fresh diffusers scheduler for `name`, configured as the base asks.

    Raises:
        ConfigError: there is no such sampler.
    """
    row = chosen(SAMPLERS, name, "sampler")
    return row.resolve().from_config(base.scheduler_config, **row.defaults)


def image_size(base: BaseModel, picture: Picture) -> tuple[int, int]:
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


def sample_latents(
    base: BaseModel,
    picture: Picture,
    text: PromptEmbeds,
    negative: PromptEmbeds,
    on_step: OnStep | None = None,
    on_clean: OnPreview | None = None,
) -> torch.Tensor:
    """Latents (1, 4, h, w) after the last sampler step. A step waits for nothing that the device computes.

    Source: Ho and Salimans 2022, equation 6, for the guidance.
    """
    width, height = image_size(base, picture)
    scheduler = make_scheduler(base, picture.sampler)
    _set_steps(scheduler, picture)
    factor = base.vae_scale_factor
    generator = torch.Generator().manual_seed(picture.seed)
    shape = (1, base.latent_channels, height // factor, width // factor)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    latents = noise.to(base.device) * scheduler.init_noise_sigma
    guided = picture.cfg > 1
    phi = base.facts.cfg_rescale(picture.cfg_rescale)
    both = PromptEmbeds.cat([negative, text]) if guided else text
    draws = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if draws else {}
    on_device = scheduler.timesteps.to(base.device)
    sizes = default_time_ids(len(both.context), height, width).to(base.device)
    with torch.no_grad():
        for done, timestep in enumerate(scheduler.timesteps, start=1):
            at = on_device[done - 1]
            seen = scheduler.scale_model_input(latents, timestep)
            if guided:
                without, with_text = predict_noise(base, torch.cat([seen, seen]), at, both, sizes).chunk(2)
                output = without + picture.cfg * (with_text - without)
                if phi:
                    output = rescale_guidance(output, with_text, phi)
            else:
                output = predict_noise(base, seen, at, both, sizes)
            latents = scheduler.step(output, timestep, latents, **options).prev_sample
            if on_step is not None:
                on_step(done, len(scheduler.timesteps))
            if on_clean is not None:
                on_clean(functools.partial(_clean, base, seen, output, timestep))
    return latents


def rescale_guidance(guided: torch.Tensor, with_text: torch.Tensor, phi: float) -> torch.Tensor:
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
    step = int(timestep.round().clamp(0, base.noise.num_timesteps - 1))
    share = base.noise.alphas_cumprod[step].clamp(min=1e-4)
    signal, spread = float(share.sqrt()), float((1 - share).sqrt())
    if base.noise.objective == "epsilon":
        return (seen - spread * output) / signal
    return signal * seen - spread * output


def sample_image(
    base: BaseModel,
    picture: Picture,
    text: PromptEmbeds,
    negative: PromptEmbeds,
    on_step: OnStep | None = None,
    on_clean: OnPreview | None = None,
) -> Image.Image:
    """The finished picture, RGB."""
    return to_image(decode_latents(base, sample_latents(base, picture, text, negative, on_step, on_clean)))


def to_image(pixels: torch.Tensor) -> Image.Image:
    """The RGB picture of pixels (1, 3, H, W) in [0, 1]."""
    return Image.fromarray((pixels[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def generate_image(
    base: BaseModel, picture: Picture, prompt: str, negative: str = "", on_step: OnStep | None = None
) -> Image.Image:
    """The finished picture of a prompt, RGB."""
    with torch.no_grad():
        text, unwanted = encode_prompt(base, [prompt]), encode_negative_prompt(base, negative)
    return sample_image(base, picture, text, unwanted, on_step)


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
    width, height = image_size(base, picture)
    phi = base.facts.cfg_rescale(picture.cfg_rescale) if picture.cfg > 1 else 0.0
    return Infotext(
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


# A base that stays open and draws one shot after the other; what changes between two is merged, never
# reloaded.
#
# On a card with too little memory, the text encoders wait in the computer's memory and are on the card only
# while they read a new prompt; where that is not enough, the UNet is kept in 8 bits. How an adapter is cut
# to a rank is handed in: that is analysis, which stands right of here.


MOST_ADAPTERS = 8
"""Kept in memory after use."""
MOST_PROMPTS = 32
RESIDENT, ASIDE, INT8 = range(3)
"""How a base is kept: all on the device; without the text encoders; the UNet in 8 bits, too."""
DECODING = 24
"""Bytes a pixel for each channel of the VAE's first level: the peak of its decoder in fp32."""
SAMPLING = 2**29
"""Bytes that a step of the sampler takes beside the UNet, SDXL at 1024 px with guidance."""
IN_8_BITS = (
    "The UNet is kept in 8 bits, as it does not fit into the graphics memory; pictures differ slightly."
)
Reduce = Callable[[AdapterWeights, int], AdapterWeights]
FileKey = tuple[str, int, int, int]
"""Path, time, size, and the rank that it is cut to."""


def open_pipeline(shot: GenerationRequest, reduce: Reduce, precision: str = "auto") -> "Pipeline":
    """The artist of a shot's base, on the best device, kept so that its pictures fit into the memory.

    Raises:
        ModelFileError: the base cannot be used.
        OutOfMemory: it does not fit in any way.
    """
    device = best_device()
    cap_memory(device)
    least = RESIDENT
    while True:
        policy = WeightPolicy()
        base = open_base(
            shot.base, device, dtype_of(precision, device), shot.prediction, shot.vae, policy,
            shot.zero_terminal_snr,
        )  # fmt: skip
        kept = max(least, _fitting(base))
        policy.quantize = quantize_int8 if kept == INT8 else None
        try:
            base.load("unet")
            for part in base.text_encoders:
                base.load(part)
                if kept != RESIDENT:
                    base.put(part, torch.device("cpu"))
            base.load("vae")
            return Pipeline(base, reduce, kept)
        except OutOfMemory as error:
            if device.type == "cpu":
                raise
            if kept == INT8:
                raise OutOfMemory(
                    f"The base {shot.base} does not fit into the {memory_of(device)} that is free, even with"
                    " its UNet in 8 bits; close other programs that use it, or wait for the end of a run."
                ) from error
            release_failed(error, device)
            least = kept + 1


def _fitting(base: BaseModel) -> int:
    """How a base that is not loaded yet should be kept, by its size and the memory that is free."""
    room = available_memory(base.device)
    if room is None:
        return RESIDENT
    unet, *encoders = (
        sum(tensor.numel() for tensor in module.parameters()) * base.dtype.itemsize
        for module in base.modules.values()
    )
    config: Any = base.vae.config
    decoding = DECODING * config.block_out_channels[0] * base.resolution**2
    vae = sum(tensor.nbytes for tensor in base.vae.parameters())
    if unet + sum(encoders) + vae + max(decoding, SAMPLING) <= room:
        return RESIDENT
    return ASIDE if unet + max(*encoders, vae + SAMPLING) <= room else INT8


class Pipeline:
    """A base with its merged adapters."""

    def __init__(self, base: BaseModel, reduce: Reduce, kept: int = RESIDENT) -> None:
        """Draw with `base`, kept in one of three ways; `reduce` cuts an adapter to a rank."""
        self.base = base
        self.kept = kept
        self._reduce = reduce
        self._merger = Merger(base.modules)
        self._adapters: OrderedDict[FileKey, AdapterWeights] = OrderedDict()
        self._mixed: tuple[object, ...] | None = ()
        self._text_mixed: tuple[object, ...] = ()
        self._conditions: OrderedDict[object, tuple[PromptEmbeds, PromptEmbeds]] = OrderedDict()
        self._matrix: torch.Tensor | None = None
        self.ready_in = 0.0
        """Seconds from the last shot to the first step of its sampler: merging and reading the prompt."""

    @property
    def note(self) -> str:
        """What the user should know of how the base is kept, or ""."""
        return IN_8_BITS if self.kept == INT8 else ""

    @property
    def matrix(self) -> torch.Tensor:
        """Latents to colours, fitted at the first use."""
        if self._matrix is None:
            self._matrix = fit_rgb_matrix(self.base)
        return self._matrix

    def drawn(
        self, shot: GenerationRequest, on_step: OnStep | None = None, on_clean: OnPreview | None = None
    ) -> Image.Image:
        """The picture, RGB. Where a card runs out of memory, the base is kept in a smaller way from then on.

        Raises:
            LoraError: an adapter does not fit, or the base cannot make such a picture.
        """
        while True:
            try:
                return self._drawn(shot, on_step, on_clean)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or self.kept == INT8 or self.base.device.type == "cpu":
                    raise
                release_failed(error, self.base.device)
            self._shrink()

    def _drawn(
        self, shot: GenerationRequest, on_step: OnStep | None, on_clean: OnPreview | None
    ) -> Image.Image:
        began = time.monotonic()
        how = picture_of(shot)
        self.mix(shot.loras)
        text, unwanted = self._condition(shot)
        self.ready_in = time.monotonic() - began
        latents = sample_latents(self.base, how, text, unwanted, on_step, on_clean)
        return to_image(decode_latents(self.base, latents))

    def _shrink(self) -> None:
        """Keep the base in the next smaller way."""
        self.kept += 1
        if self.kept == INT8:
            WeightPolicy(quantize_int8).apply_to(self.base.unet)
            return
        for part in self.base.text_encoders:
            self.base.put(part, torch.device("cpu"))

    def _condition(self, shot: GenerationRequest) -> tuple[PromptEmbeds, PromptEmbeds]:
        """What the text encoders make of both prompts, kept for as long as no adapter changes them."""
        asked = (shot.prompt, shot.negative, shot.clip_skip, shot.tokens, self._text_mixed)
        if asked not in self._conditions:
            if self.kept != RESIDENT:
                # The largest text encoder takes more than the VAE.
                self.base.put("vae", torch.device("cpu"))
            with torch.no_grad():
                text = encode_prompt(self.base, [shot.prompt], shot.clip_skip, shot.tokens)
                unwanted = encode_negative_prompt(self.base, shot.negative, shot.clip_skip, shot.tokens)
            self.base.put("vae", self.base.device)
            self._conditions[asked] = text, unwanted
        self._conditions.move_to_end(asked)
        while len(self._conditions) > MOST_PROMPTS:
            self._conditions.popitem(last=False)
        return self._conditions[asked]

    def infotext(self, shot: GenerationRequest, extra: dict[str, str] | None = None) -> str:
        """What the PNG of a shot says of it."""
        more = {"Clip skip": str(shot.clip_skip)} if shot.clip_skip > 1 else {}
        more |= {"UNet": "8 bits"} if self.kept == INT8 else {}
        more |= {f"LoRA rank of {lora.name}": str(lora.rank) for lora in shot.loras if lora.rank}
        uses = [(lora.name, lora.strength, lora.text_strength) for lora in shot.loras if lora.acts]
        return infotext(self.base, picture_of(shot), shot.prompt, shot.negative, uses, more | (extra or {}))

    def mix(self, loras: tuple[WeightedLora, ...]) -> None:
        """Make the base act as with exactly these adapters; nothing is done where it does already."""
        read = [(lora, *self._adapter(lora)) for lora in loras]
        wanted = tuple((key, lora.strength, lora.text_strength) for lora, key, _ in read if lora.acts)
        if wanted == self._mixed:
            return
        # If this breaks off halfway, what the weights are is not known.
        self._mixed = None
        acting = [
            (key, LoadedLora(w, lora.strength, lora.text_strength)) for lora, key, w in read if lora.acts
        ]
        self._merger.apply([one for _, one in acting])
        self._text_mixed = tuple(
            (key, one.on("text")) for key, one in acting if one.on("text") and one.weights.parts() != ["unet"]
        )
        self._mixed = wanted

    def _adapter(self, lora: WeightedLora) -> tuple[FileKey, AdapterWeights]:
        """The adapter in a file, read again where the file has changed."""
        path = Path(lora.file)
        status = path.stat() if path.is_file() else None
        whole = (str(path), status.st_mtime_ns if status else 0, status.st_size if status else 0)
        key = (*whole, lora.rank)
        if key not in self._adapters:
            if lora.rank:
                _, weights = self._adapter(WeightedLora(lora.file))
                self._adapters[key] = self._reduce(weights, lora.rank)
            else:
                self._adapters[key] = read_adapter(path, self.base.family)
        self._adapters.move_to_end(key)
        while len(self._adapters) > MOST_ADAPTERS:
            self._adapters.popitem(last=False)
        return key, self._adapters[key]


def picture_of(shot: GenerationRequest) -> Picture:
    """How a shot is sampled."""
    return Picture(shot.seed, shot.steps, shot.cfg, shot.sampler, shot.width, shot.height, shot.cfg_rescale)
