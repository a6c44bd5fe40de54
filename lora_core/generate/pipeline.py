"""Images from noise: classifier-free guidance around a diffusers scheduler, and a `Pipeline` that stays open.

The noise of an image depends on its seed and size alone and is drawn on the CPU, so that a seed means the
same image on every device, and base and adapter can be compared on the same noise.

The latent preview maps latents to colours by one small matrix. It is fitted once per base by least squares
between the latents of a few images and their colours averaged over the pixels of a latent. It leaves out
texture; decoding would cost as much as some steps of the sampler.

A `Pipeline` merges what changes between two images and never reloads the base. On a card with too little
memory the text encoders wait in main memory and are on the card only while they read a new prompt; where that
is not enough, the UNet is quantized to 8 bits. How an adapter is truncated to a rank is passed in, because
the tools that do it import this folder.
"""

import functools
import inspect
import io
import textwrap
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from lora_core.backends.int8 import WeightPolicy, quantize_int8
from lora_core.errors import ConfigError, OutOfMemory
from lora_core.formats.io import load_adapter
from lora_core.generate.request import GenerationRequest, Infotext, WeightedLora
from lora_core.lora.inject import Merger
from lora_core.lora.weights import AdapterWeights, LoadedLora
from lora_core.model_files.families import is_text_encoder
from lora_core.models.device import (
    available_memory,
    best_device,
    cap_memory,
    dtype_of,
    memory_of,
    out_of_memory,
    release_failed,
)
from lora_core.models.encode import encode_negative_prompt, encode_prompt
from lora_core.models.load import BaseModel, open_base
from lora_core.models.unet import PromptEmbeds, default_time_ids
from lora_core.models.vae import decode_latents, encode_image
from lora_core.settings.choices import SAMPLERS, chosen
from lora_core.system.files import DEMO_TRAIN, write_atomically

OnStep = Callable[[int, int], None]
"""Called with (steps done, number of steps); an exception from it ends the image."""
OnLatents = Callable[[Callable[[], torch.Tensor]], None]
"""Called after each step with a function that computes the predicted clean latents (1, C, h, w)."""


def make_scheduler(base: BaseModel, name: str) -> Any:
    """A fresh diffusers scheduler, configured as the base asks.

    Raises:
        ConfigError: there is no such sampler.
    """
    row = chosen(SAMPLERS, name, "sampler")
    return row.resolve().from_config(base.scheduler_config, **row.defaults)


def image_size(base: BaseModel, request: GenerationRequest) -> tuple[int, int]:
    """Width and height in pixels.

    Raises:
        ConfigError: the base cannot make that size.
    """
    multiple = base.size_multiple
    size = (request.width or base.resolution, request.height or base.resolution)
    for word, side in zip(("width", "height"), size, strict=True):
        if side < multiple or side > 4096 or side % multiple:
            raise ConfigError(
                f"{word} = {side} cannot be made; take a multiple of {multiple} between {multiple} and 4096."
            )
    return size


def _set_timesteps(scheduler: Any, request: GenerationRequest) -> None:
    """Set the timesteps on the CPU: schedulers read them one by one, which would synchronize with a card."""
    try:
        scheduler.set_timesteps(request.steps)
    except ValueError as error:
        # LCM picks its steps out of the 50 that its models were distilled from.
        raise ConfigError(
            f"The sampler {request.sampler} cannot take {request.steps} steps; take fewer."
        ) from error


def sample_latents(
    base: BaseModel,
    request: GenerationRequest,
    text: PromptEmbeds,
    negative: PromptEmbeds,
    on_step: OnStep | None = None,
    on_latents: OnLatents | None = None,
) -> torch.Tensor:
    """Latents (1, C, h, w) after the last sampler step. No step waits for the device.

    Source: Ho and Salimans 2022, equation 6, for the guidance.

    Raises:
        ConfigError: a value is out of range, or the base cannot make that size.
    """
    request.check()
    width, height = image_size(base, request)
    scheduler = make_scheduler(base, request.sampler)
    _set_timesteps(scheduler, request)
    factor = base.vae_scale_factor
    generator = torch.Generator().manual_seed(request.seed)
    shape = (1, base.latent_channels, height // factor, width // factor)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    latents = noise.to(base.device) * scheduler.init_noise_sigma
    guided = request.cfg > 1
    phi = base.facts.cfg_rescale(request.cfg_rescale)
    both = PromptEmbeds.cat([negative, text]) if guided else text
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if takes_generator else {}
    on_device = scheduler.timesteps.to(base.device)
    sizes = default_time_ids(len(both.context), height, width).to(base.device)
    with torch.no_grad():
        for done, timestep in enumerate(scheduler.timesteps, start=1):
            at = on_device[done - 1]
            scaled = scheduler.scale_model_input(latents, timestep)
            if guided:
                without, with_text = base.predict_noise(torch.cat([scaled, scaled]), at, both, sizes).chunk(2)
                output = without + request.cfg * (with_text - without)
                if phi:
                    output = rescale_guidance(output, with_text, phi)
            else:
                output = base.predict_noise(scaled, at, both, sizes)
            latents = scheduler.step(output, timestep, latents, **options).prev_sample
            if on_step is not None:
                on_step(done, len(scheduler.timesteps))
            if on_latents is not None:
                on_latents(functools.partial(_predict_clean, base, scaled, output, timestep))
    return latents


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


def _predict_clean(
    base: BaseModel, scaled: torch.Tensor, output: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Clean latents from the UNet's output.

    The UNet's input has the variance of the forward process with every sampler, so the scheduler is not
    asked.
    Source: Ho et al. 2020, equation 15; Salimans and Ho 2022, appendix D.
    """
    step = int(timestep.round().clamp(0, base.noise.num_timesteps - 1))
    share = base.noise.alphas_cumprod[step].clamp(min=1e-4)
    signal, spread = float(share.sqrt()), float((1 - share).sqrt())
    if base.noise.objective == "epsilon":
        return (scaled - spread * output) / signal
    return signal * scaled - spread * output


def sample_image(
    base: BaseModel,
    request: GenerationRequest,
    text: PromptEmbeds,
    negative: PromptEmbeds,
    on_step: OnStep | None = None,
    on_latents: OnLatents | None = None,
) -> Image.Image:
    """The image (RGB) of conditions that are encoded already, with whatever adapter is in the base."""
    latents = sample_latents(base, request, text, negative, on_step, on_latents)
    pixels = decode_latents(base, latents)[0].permute(1, 2, 0).numpy()
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def generate_image(base: BaseModel, request: GenerationRequest, on_step: OnStep | None = None) -> Image.Image:
    """The image (RGB) of a request's prompts, with whatever adapter is in the base."""
    with torch.no_grad():
        text = encode_prompt(base, [request.prompt], request.clip_skip, request.tokens)
        negative = encode_negative_prompt(base, request.negative, request.clip_skip, request.tokens)
    return sample_image(base, request, text, negative, on_step)


def infotext(base: BaseModel, request: GenerationRequest, extra: Mapping[str, str] | None = None) -> str:
    """Prompt and settings in the form of A1111.

    Args:
        base: what made the image.
        extra: more settings, name to value.
    """
    width, height = image_size(base, request)
    phi = base.facts.cfg_rescale(request.cfg_rescale) if request.cfg > 1 else 0.0
    return Infotext(
        prompt=request.prompt, negative=request.negative, steps=request.steps,
        sampler=chosen(SAMPLERS, request.sampler, "sampler").title, cfg=request.cfg, cfg_rescale=phi,
        seed=request.seed, width=width, height=height, model=Path(base.name).stem,
        clip_skip=request.clip_skip, loras=tuple(lora for lora in request.loras if lora.acts),
        extra={f"LoRA rank of {lora.name}": str(lora.rank) for lora in request.loras if lora.rank}
        | dict(extra or {}),
    ).text()  # fmt: skip


def save_png(image: Image.Image, path: Path, parameters: str) -> None:
    """Write a PNG with its settings inside, completely or not at all.

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
        raise ConfigError(f"The image cannot be written to {path}: {error.strerror or error}.") from error


# The latent preview.

FIT_IMAGES = 6
"""Enough for a matrix of 15 entries: each has 256 latents where a latent is 8 pixels wide."""
FIT_SIDE = 128


def fit_rgb_matrix(base: BaseModel) -> torch.Tensor:
    """(C + 1, 3) in fp32: latents with a 1 appended, times this, are colours in [0, 1]."""
    latents, colours = [], []
    for path in _fit_images():
        with Image.open(path) as opened:
            image = opened.convert("RGB").resize((FIT_SIDE, FIT_SIDE))
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
        latents.append(encode_image(base, pixels * 2 - 1).flatten(1).T)
        means = torch.nn.functional.avg_pool2d(pixels[None], base.vae_scale_factor)[0]
        colours.append(means.flatten(1).T)
    known = torch.cat(latents).double()
    ones = torch.ones(len(known), 1, dtype=torch.float64)
    solved = torch.linalg.lstsq(torch.cat([known, ones], dim=1), torch.cat(colours).double())
    return solved.solution.float()


@functools.cache
def _fit_images() -> tuple[str, ...]:
    """A few of the demo's images, evenly spaced."""
    found = sorted(path for path in DEMO_TRAIN.iterdir() if path.suffix.lower() != ".txt")
    return tuple(str(path) for path in found[:: max(1, len(found) // FIT_IMAGES)][:FIT_IMAGES])


def latent_preview(latents: torch.Tensor, matrix: torch.Tensor) -> Image.Image:
    """A small RGB image, one pixel for each latent of (1, C, h, w)."""
    flat = latents[0].detach().float().cpu()
    colours = torch.einsum("chw,cr->hwr", flat, matrix[:-1]) + matrix[-1]
    return Image.fromarray((colours.nan_to_num().clamp(0, 1) * 255).round().byte().numpy())


# A base that stays open.

MOST_ADAPTERS = 8
"""Kept in memory after use."""
MOST_PROMPTS = 32
RESIDENT, ASIDE, INT8 = range(3)
"""How a base is kept: everything on the device; text encoders in main memory; the UNet in 8 bits, too."""
DECODING = 24
"""Bytes per pixel for each channel of the VAE's first level: the peak of its decoder in fp32."""
SAMPLING = 2**29
"""Bytes that a sampler step takes beside the UNet, SDXL at 1024 px with guidance."""
IN_8_BITS = "The UNet is kept in 8 bits, as it does not fit into the graphics memory; images differ slightly."
Truncate = Callable[[AdapterWeights, int], AdapterWeights]
FileKey = tuple[str, int, int, int]
"""Path, time and size of a file, and the rank that it is truncated to."""


def open_pipeline(request: GenerationRequest, truncate: Truncate, precision: str = "auto") -> "Pipeline":
    """The pipeline of a request's base on the best device, kept so that its images fit into memory.

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
            request.base, device, dtype_of(precision, device), request.prediction, request.vae, policy,
            request.zero_terminal_snr,
        )  # fmt: skip
        kept = max(least, _fitting(base))
        policy.quantize = quantize_int8 if kept == INT8 else None
        try:
            base.load(base.family.denoiser)
            for part in base.text_encoders:
                base.load(part)
                if kept != RESIDENT:
                    base.put(part, torch.device("cpu"))
            base.load("vae")
            return Pipeline(base, truncate, kept)
        except OutOfMemory as error:
            if device.type == "cpu":
                raise
            if kept == INT8:
                raise OutOfMemory(
                    f"The base {request.base} does not fit into the {memory_of(device)} that is free, even"
                    " with its UNet in 8 bits; close other programs that use it, or wait for the end of a"
                    " run."
                ) from error
            release_failed(error, device)
            least = kept + 1


def _fitting(base: BaseModel) -> int:
    """How to keep a base that is not loaded yet, by its size and the free memory."""
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
    """A base with its merged adapters; the same request gives the same image, whatever came before."""

    def __init__(self, base: BaseModel, truncate: Truncate, kept: int = RESIDENT) -> None:
        """Generate with `base`, kept in one of three ways; `truncate` cuts an adapter to a rank."""
        self.base = base
        self.kept = kept
        self._truncate = truncate
        self._merger = Merger(base.modules)
        self._files: OrderedDict[FileKey, AdapterWeights] = OrderedDict()
        self._merged: tuple[object, ...] | None = ()
        self._merged_text: tuple[object, ...] = ()
        self._conditions: OrderedDict[object, tuple[PromptEmbeds, PromptEmbeds]] = OrderedDict()
        self._rgb_matrix: torch.Tensor | None = None
        self.ready_in = 0.0
        """Seconds from the last request to the first step of its sampler: merging and encoding the prompt."""

    @property
    def note(self) -> str:
        """What the user should know of how the base is kept, or ""."""
        return IN_8_BITS if self.kept == INT8 else ""

    @property
    def rgb_matrix(self) -> torch.Tensor:
        """Latents to colours, fitted at the first use."""
        if self._rgb_matrix is None:
            self._rgb_matrix = fit_rgb_matrix(self.base)
        return self._rgb_matrix

    def __call__(
        self, request: GenerationRequest, on_step: OnStep | None = None, on_latents: OnLatents | None = None
    ) -> Image.Image:
        """The image, RGB. Where a card runs out of memory, the base is kept in a smaller way from then on.

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
            self._use_less_memory()

    def _generate(
        self, request: GenerationRequest, on_step: OnStep | None, on_latents: OnLatents | None
    ) -> Image.Image:
        began = time.monotonic()
        self.set_adapters(request.loras)
        text, negative = self._encode_prompts(request)
        self.ready_in = time.monotonic() - began
        return sample_image(self.base, request, text, negative, on_step, on_latents)

    def _use_less_memory(self) -> None:
        self.kept += 1
        if self.kept == INT8:
            WeightPolicy(quantize_int8).apply_to(self.base.denoiser)
            return
        for part in self.base.text_encoders:
            self.base.put(part, torch.device("cpu"))

    def _encode_prompts(self, request: GenerationRequest) -> tuple[PromptEmbeds, PromptEmbeds]:
        """The conditions of both prompts, kept for as long as no adapter changes the text encoders."""
        asked = (request.prompt, request.negative, request.clip_skip, request.tokens, self._merged_text)
        if asked not in self._conditions:
            if self.kept != RESIDENT:
                # The largest text encoder takes more than the VAE.
                self.base.put("vae", torch.device("cpu"))
            with torch.no_grad():
                text = encode_prompt(self.base, [request.prompt], request.clip_skip, request.tokens)
                negative = encode_negative_prompt(
                    self.base, request.negative, request.clip_skip, request.tokens
                )
            self.base.put("vae", self.base.device)
            self._conditions[asked] = text, negative
        self._conditions.move_to_end(asked)
        while len(self._conditions) > MOST_PROMPTS:
            self._conditions.popitem(last=False)
        return self._conditions[asked]

    def infotext(self, request: GenerationRequest, extra: Mapping[str, str] | None = None) -> str:
        """The text for the PNG of a request."""
        bits = {"UNet": "8 bits"} if self.kept == INT8 else {}
        return infotext(self.base, request, bits | dict(extra or {}))

    def set_adapters(self, loras: tuple[WeightedLora, ...]) -> None:
        """Make the base act as with exactly these adapters; does nothing where it does already."""
        files = [(lora, *self._load(lora)) for lora in loras]
        wanted = tuple((key, lora.strength, lora.text_strength) for lora, key, _ in files if lora.acts)
        if wanted == self._merged:
            return
        # An exception while merging leaves the weights in an unknown state.
        self._merged = None
        acting = [
            (key, LoadedLora(weights, lora.strength, lora.text_strength))
            for lora, key, weights in files
            if lora.acts
        ]
        self._merger.apply([one for _, one in acting])
        self._merged_text = tuple(
            (key, strength)
            for key, one in acting
            for strength in {one.on(part) for part in one.weights.parts() if is_text_encoder(part)}
            if strength
        )
        self._merged = wanted

    def _load(self, lora: WeightedLora) -> tuple[FileKey, AdapterWeights]:
        """The adapter in a file, read again where the file has changed."""
        path = Path(lora.file)
        status = path.stat() if path.is_file() else None
        version = (str(path), status.st_mtime_ns if status else 0, status.st_size if status else 0)
        key = (*version, lora.rank)
        if key not in self._files:
            if lora.rank:
                _, weights = self._load(WeightedLora(lora.file))
                self._files[key] = self._truncate(weights, lora.rank)
            else:
                self._files[key] = load_adapter(path, self.base.family)
        self._files.move_to_end(key)
        while len(self._files) > MOST_ADAPTERS:
            self._files.popitem(last=False)
        return key, self._files[key]


# Draws a labelled grid of images with Pillow's own font.


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
GAP = 8
MOST_LINES, MOST_LETTERS = 4, 400
PAPER, INK = "#ffffff", "#1f1c18"
ELLIPSIS = "..."
"""Three dots, as not every build of Pillow's font has the single character."""


def make_image_grid(
    images: Sequence[Sequence[Image.Image | None]], rows: Sequence[str], columns: Sequence[str]
) -> Image.Image:
    """The images in a grid, RGB, none of them scaled.

    Args:
        images: row by row; None leaves a blank cell.
        rows: labels left of the rows; none for no labels.
        columns: labels above the columns; none for no labels.
    """
    present = [image for row in images for image in row if image is not None]
    width = max((image.width for image in present), default=64)
    height = max((image.height for image in present), default=64)
    font = ImageFont.load_default(size=max(11, min(28, width // 18 + 6)))
    line_height = int(font.getbbox("Ágj")[3]) + 3
    left = [_wrap(label, max(96, min(width // 2, 320)), font) for label in rows]
    top = [_wrap(label, width, font) for label in columns]
    margin = max((_width(line, font) for lines in left for line in lines), default=0)
    head = max((len(lines) for lines in top), default=0) * line_height
    x0, y0 = GAP + (margin + GAP if margin else 0), GAP + (head + GAP if head else 0)
    across = max((len(row) for row in images), default=0)
    grid = Image.new("RGB", (x0 + across * (width + GAP), y0 + len(images) * (height + GAP)), PAPER)
    draw = ImageDraw.Draw(grid)
    for number, lines in enumerate(top):
        x = x0 + number * (width + GAP)
        for index, line in enumerate(lines):
            indent = max(0, (width - _width(line, font)) // 2)
            y = y0 - GAP - (len(lines) - index) * line_height
            draw.text((x + indent, y), line, fill=INK, font=font)
    for number, lines in enumerate(left):
        y = y0 + number * (height + GAP) + max(0, (height - len(lines) * line_height) // 2)
        for index, line in enumerate(lines):
            draw.text((GAP, y + index * line_height), line, fill=INK, font=font)
    for down, row in enumerate(images):
        for right, image in enumerate(row):
            if image is not None:
                grid.paste(image, (x0 + right * (width + GAP), y0 + down * (height + GAP)))
    return grid


def _wrap(label: str, width: int, font: Font) -> list[str]:
    """A label in at most `MOST_LINES` lines of at most `width` pixels; the rest is cut off."""
    text = "".join(c for c in " ".join(label[:MOST_LETTERS].split()) if c.isprintable())
    if not isinstance(font, ImageFont.FreeTypeFont):
        # Without FreeType, Pillow has a font of Latin letters only.
        text = text.encode("ascii", "replace").decode()
    average = _width(text, font) / max(1, len(text))
    for count in range(min(len(text), int(1.5 * width / average)) + len(ELLIPSIS), len(ELLIPSIS) - 1, -1):
        lines = textwrap.wrap(text, count, max_lines=MOST_LINES, placeholder=ELLIPSIS)
        if all(_width(line, font) <= width for line in lines):
            return lines
    return []


def _width(text: str, font: Font) -> int:
    return int(font.getlength(text)) + 1
