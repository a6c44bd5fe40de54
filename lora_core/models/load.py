"""Opening a base model: a diffusers folder, a single file, the bundled one, or one from the hub.

Components are built without memory for their weights and filled tensor by tensor, in the wanted dtype, from
wherever each parameter is: a base never takes more memory than its weights. Only submodules of diffusers and
transformers are imported: all pipelines take ten seconds more.
"""

import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import nn
from transformers.initialization import no_init_weights
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from lora_core.backends.compact import WeightPolicy, quantize_int8
from lora_core.data.images import Bucket, open_masked, open_rgb, resize_and_crop
from lora_core.errors import ConfigError, ModelFileError, OutOfMemory, first_line
from lora_core.model_files.detect import (
    CONV_IN,
    UNET,
    VAE,
    BaseFacts,
    check_base_folder,
    read_base_facts,
    read_single_file_facts,
)
from lora_core.model_files.families import Family, TextEncoder
from lora_core.model_files.header import Header, check_vae_path
from lora_core.model_files.hub import fetch_base
from lora_core.model_files.ldm_names import RESNETS, open_clip_path
from lora_core.models.device import (
    available_memory,
    best_device,
    cap_memory,
    dtype_of,
    memory_of,
    out_of_memory,
    release_failed,
    without_tf32,
)
from lora_core.models.unet import NoisePredictor, NoiseSchedule, PromptEmbeds, as_denoiser, to_device
from lora_core.models.weight_files import (
    WeightFile,
    WeightLocator,
    component_in_folder,
    open_weights,
    text_encoder_in_file,
    unet_in_file,
    vae_in_file,
)
from lora_core.settings.schema import ModelSection
from lora_core.system.files import CLIP_TOKENIZER, expand_home

RESIDENT, ASIDE, INT8 = range(3)
"""How a base is kept for images: all on the device; text encoders in main memory; the UNet in 8 bits, too."""
DECODING = 24
"""Bytes per pixel for each channel of the VAE's first level: the peak of its decoder in fp32."""
SAMPLING = 2**29
"""Bytes that a sampler step takes beside the UNet, SDXL at 1024 px with guidance."""
TITLES = {"unet": "UNet", "vae": "VAE"}
"""Names of components in messages."""


@dataclass
class BaseModel(NoisePredictor):
    """A frozen base model in memory.

    A component that was not loaded yet has its layers and their shapes, but weights on the meta device.

    Attributes:
        name: what the user called it ("demo", a path, a hub id).
        path: the diffusers folder or the single file.
        denoiser: a `Denoiser`, or diffusers' UNet.
        vae, text_encoders, tokenizers: the other components, the last two by part.
        noise: the noise schedule and what the denoiser predicts.
        dtype: of the denoiser and the text encoders; the VAE is always fp32, where it cannot overflow.
        facts: what its files say about it.
    """

    name: str
    path: Path
    family: Family
    denoiser: nn.Module
    vae: AutoencoderKL
    text_encoders: dict[str, Any]
    tokenizers: dict[str, Any]
    noise: NoiseSchedule
    device: torch.device
    dtype: torch.dtype
    facts: BaseFacts
    waiting: dict[str, Callable[[], None]] = field(default_factory=dict)
    """By component, a function that reads its weights, which are not loaded yet."""
    decode_tile: int = 0
    """The side in pixels of the tiles that images are decoded in, because memory is short; 0 for none."""
    digests: dict[str, Callable[[], str]] = field(default_factory=dict)
    """By component, the function behind `digest`."""

    def digest(self, part: str) -> str:
        """Identify a component's weights: a hash of each tensor's name, shape, dtype and of 64 of its
        bytes, read from the files, wherever the weights are now."""
        return self.digests[part]()

    def load(self, *parts: str) -> None:
        """Read the weights of components that still lack them onto the device.

        Raises:
            ModelFileError: a file is broken.
            OutOfMemory: they do not fit.
        """
        for part in parts:
            if part in self.waiting:
                with _reading(self.path, self.device):
                    self.waiting[part]()
                del self.waiting[part]

    def put(self, part: str, device: torch.device) -> None:
        """Move a loaded component to `device`."""
        self.component(part).to(device)

    @contextmanager
    def on_device(self, part: str) -> Iterator[None]:
        """Have a component on the base's device while the context is open; then it goes back."""
        home = next(self.component(part).parameters()).device
        moved = home.type != self.device.type
        if moved:
            self.put(part, self.device)
        try:
            yield
        finally:
            if moved:
                self.put(part, home)

    def component(self, part: str) -> torch.nn.Module:
        """The component of a part, or "vae"."""
        return self.vae if part == "vae" else self.modules[part]

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """The components that an adapter can be put into, by part."""
        return {self.family.denoiser: self.denoiser, **self.text_encoders}

    @property
    def vae_scale_factor(self) -> int:
        """How many pixels of a side become one latent."""
        config: Any = self.vae.config
        return int(2 ** (len(config.block_out_channels) - 1))

    @property
    def shift_and_scale(self) -> tuple[float, float]:
        """What latents are shifted and scaled by for the denoiser."""
        config: Any = self.vae.config
        scale = config.get("scaling_factor", self.family.latent_scale)
        return float(config.get("shift_factor") or 0.0), float(scale)

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """The latents (C, H/f, W/f) of one image (3, H, W) in [-1, 1], in fp32 on the CPU: the mean of the
        VAE's posterior, shifted and scaled for the denoiser. One image at a time and without TF32, so that
        the bits never depend on other images."""
        shift, scale = self.shift_and_scale
        with torch.no_grad(), without_tf32():
            mean = self.vae.encode(pixels[None].to(self.vae.device, self.vae.dtype)).latent_dist.mean
        return ((mean - shift) * scale)[0].float().cpu()

    @property
    def size_multiple(self) -> int:
        """Sides of images, in pixels, must be multiples of this."""
        return self.vae_scale_factor * as_denoiser(self.denoiser).downscale

    @property
    def resolution(self) -> int:
        """The side in pixels that the base was trained at."""
        return self.facts.resolution

    def image_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of an image in pixels; in place of 0, the base's own.

        Raises:
            ConfigError: the base cannot make that size.
        """
        least, size = self.size_multiple, (width or self.resolution, height or self.resolution)
        for word, side in zip(("width", "height"), size, strict=True):
            if side < least or side > 4096 or side % least:
                raise ConfigError(
                    f"{word} = {side} cannot be made; take a multiple of {least} between {least} and 4096."
                )
        return size

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return as_denoiser(self.denoiser).latent_channels


@dataclass
class InpaintingModel(BaseModel):
    """A base whose UNet also sees a mask and the latents of the masked image."""

    blank: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    """By size, what `blank_condition` returns."""

    def mask_condition(self, pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What the UNet sees beside the noisy latents, (5, H/f, W/f) in fp32 on the CPU: the mask, then the
        latents of the image with grey in its place.

        Source: diffusers, `StableDiffusionInpaintPipeline.prepare_mask_latents`; for these latents we take
        the mean of the VAE's posterior where that draws from it.

        Args:
            pixels: of the image, (3, H, W) in [-1, 1].
            mask: (1, H, W); 0.5 or more where to paint.
        """
        covered = (mask >= 0.5).float()
        size = [side // self.vae_scale_factor for side in mask.shape[-2:]]
        small = F.interpolate(covered[None], size)[0]
        return torch.cat([small, self.encode_image(pixels * (1.0 - covered))])

    def blank_condition(self, height: int, width: int) -> torch.Tensor:
        """The condition of a mask over the full image, (5, height, width) in latents, on the CPU."""
        if (height, width) not in self.blank:
            sides = [side * self.vae_scale_factor for side in (height, width)]
            self.blank[height, width] = self.mask_condition(torch.zeros(3, *sides), torch.ones(1, *sides))
        return self.blank[height, width]

    def predict_noise(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, prompt: PromptEmbeds,
        sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """As of any base. `noisy_latents` are (B, 9, h, w) with the condition, or (B, 4, h, w), to which that
        of a full mask is added."""
        if noisy_latents.shape[1] == self.latent_channels:
            (blank,) = to_device(noisy_latents.device, self.blank_condition(*noisy_latents.shape[-2:]))
            noisy_latents = torch.cat([noisy_latents, blank.expand(len(noisy_latents), -1, -1, -1)], 1)
        return super().predict_noise(noisy_latents, timesteps, prompt, sizes)


def to_pixels(image: Image.Image, bucket: Bucket) -> torch.Tensor:
    """An image cropped and scaled to `bucket`, (3, H, W) in [-1, 1], fp32."""
    pixels = np.asarray(resize_and_crop(image, bucket), dtype=np.float32) / 127.5 - 1.0
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def encode_start(base: BaseModel, file: str, size: tuple[int, int], mask: str = "") -> torch.Tensor | None:
    """The latents (1, C, h, w) of an image to start from, cropped and scaled to a size; with the file of a
    mask, (1, C + 5, h, w), as an inpainting base sees it; None for "".

    Raises:
        ConfigError: the base takes no mask.
        DatasetError: a file is not an image, or they differ in shape.
    """
    if not mask:
        return base.encode_image(to_pixels(open_rgb(Path(file)), Bucket(*size)))[None] if file else None
    if not isinstance(base, InpaintingModel):
        raise ConfigError(
            f"The base {base.name} takes no mask, as it is not for inpainting (9 input channels); leave the"
            " mask out, or choose an inpainting checkpoint."
        )
    pixels, covered = (to_pixels(one, Bucket(*size)) for one in open_masked(Path(file), Path(mask)))
    seen = base.mask_condition(pixels, covered[:1] / 2 + 0.5)
    return torch.cat([base.encode_image(pixels), seen])[None]


def load_base(
    name: str | Path, device: torch.device | str, dtype: torch.dtype, prediction: str = "auto", vae: str = "",
    policy: WeightPolicy | None = None, zero_snr: str = "auto",
) -> BaseModel:  # fmt: skip
    """Open a base model, frozen, on `device`; see `open_base`."""
    base = open_base(name, device, dtype, prediction, vae, policy, zero_snr)
    base.load(*base.waiting)
    return base


def load_model(model: ModelSection, precision: str = "auto") -> BaseModel:
    """The base of a run's settings on the best device, in the dtype of `dtype_of`; see `open_base`."""
    device = best_device()
    names = (model.prediction, model.vae, None, model.zero_terminal_snr)
    return load_base(model.base, device, dtype_of(precision, device), *names)


def open_base(
    name: str | Path, device: torch.device | str, dtype: torch.dtype, prediction: str = "auto", vae: str = "",
    policy: WeightPolicy | None = None, zero_snr: str = "auto",
) -> BaseModel:  # fmt: skip
    """Open a base model without its weights: `BaseModel.load` reads those of the parts that are needed.

    Whether the denoiser fits is checked before anything is read.

    Args:
        name: "demo", a diffusers folder, a single file, or a hub id.
        device: where to put the components.
        dtype: of the denoiser and the text encoders.
        prediction: "auto", or what the denoiser predicts, whatever the files say.
        vae: a folder or file with a VAE to use instead of the base's own, or "".
        policy: how the denoiser's weights are kept from the moment they are read.
        zero_snr: "auto", or whether the base has zero terminal SNR ("on", "off"), whatever the files say.

    Raises:
        ModelFileError: names the missing or broken file.
        OutOfMemory: a component does not fit into the device's memory.
    """
    fetch_base(name)
    facts, device = read_base_facts(name, prediction, zero_snr), torch.device(device)
    parts = _ComponentBuilder(facts, (prediction, zero_snr), device)
    facts, family = parts.facts, parts.family
    with _reading(facts.path, device):
        autoencoder = parts.vae(str(vae))
        encoders = {encoder.part: parts.text_encoder(encoder, dtype) for encoder in family.text_encoders}
        tokenizers = {encoder.part: _tokenizer(facts, encoder) for encoder in family.text_encoders}
        unet = parts.unet(dtype, policy)
        noise = NoiseSchedule.from_scheduler(DDPMScheduler.from_config(facts.scheduler))
    available = available_memory(device)
    if available is not None and (policy or WeightPolicy()).resident_bytes(unet, dtype) > available:
        raise _too_large(facts.path, device)
    kind = InpaintingModel if facts.inpainting else BaseModel
    return kind(
        name=str(name), path=facts.path, family=family, denoiser=unet, vae=autoencoder,
        text_encoders=encoders, tokenizers=tokenizers, noise=noise, device=device, dtype=dtype,
        facts=facts, waiting=parts.waiting, digests=parts.digests,
    )  # fmt: skip


def load_to_fit(name: str, precision: str, prediction: str, vae: str, zero_snr: str) -> tuple[BaseModel, int]:
    """A base on the best device, for images, and how it is kept so that they fit into memory; arguments as of
    `open_base`, and the precision of `dtype_of`.

    Raises:
        ModelFileError: the base cannot be used.
        OutOfMemory: it does not fit in any way.
    """
    device = best_device()
    cap_memory(device)
    least = RESIDENT
    while True:
        policy = WeightPolicy()
        base = open_base(name, device, dtype_of(precision, device), prediction, vae, policy, zero_snr)
        kept = max(least, _fitting(base))
        policy.quantize = quantize_int8 if kept == INT8 else None
        try:
            base.load(base.family.denoiser)
            for part in base.text_encoders:
                base.load(part)
                if kept != RESIDENT:
                    base.put(part, torch.device("cpu"))
            base.load("vae")
            return base, kept
        except OutOfMemory as error:
            if device.type == "cpu":
                raise
            if kept == INT8:
                raise OutOfMemory(
                    f"The base {name} does not fit into the {memory_of(device)} that is free, even with its"
                    " UNet in 8 bits; close other programs that use it, or wait for the end of a run."
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


def keep_in_less_memory(base: BaseModel, kept: int) -> None:
    """Keep a loaded base in another way than before, ASIDE or INT8."""
    if kept == INT8:
        WeightPolicy(quantize_int8).apply_to(base.denoiser)
        return
    for part in base.text_encoders:
        base.put(part, torch.device("cpu"))


@contextmanager
def _reading(path: Path, device: torch.device) -> Iterator[None]:
    """Raise an error that names the base for one that reading it raises."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise _too_large(path, device) from error
        raise ModelFileError(
            f"The base {path} cannot be opened: {first_line(error)}. Download it again or choose another."
        ) from error


class _DivideByOne:
    """1 as a divisor: x / _DivideByOne() is x, where torch would copy x for a division by 1.0."""

    def __rtruediv__(self, dividend: Any) -> Any:
        return dividend


def streamline(module: torch.nn.Module) -> None:
    """Skip work of diffusers' blocks that changes no bit: divisions by a factor of 1, and the activation of
    the time embedding in each residual block, which is the same in all of them."""
    for block in module.modules():
        for factor in ("output_scale_factor", "rescale_output_factor"):
            if getattr(block, factor, None) == 1:
                setattr(block, factor, _DivideByOne())
    if isinstance(module, UNet2DConditionModel) and module.time_embed_act is None:
        blocks = [block for block in module.modules() if isinstance(block, ResnetBlock2D)]
        if all(isinstance(block.nonlinearity, torch.nn.SiLU) for block in blocks):
            module.time_embed_act = torch.nn.SiLU()
            for block in blocks:
                block.skip_time_act = True


def _too_large(path: Path, device: torch.device) -> OutOfMemory:
    return OutOfMemory(
        f"The base {path} does not fit into the {memory_of(device)} that is free; close other programs that"
        " use it, or set train.quantize_base to int8 or train.offload to true."
    )


class _ComponentBuilder:
    """Builds the components of a base, and registers the functions that read their weights."""

    def __init__(self, facts: BaseFacts, by_hand: tuple[str, str], device: torch.device) -> None:
        self.waiting: dict[str, Callable[[], None]] = {}
        self.digests: dict[str, Callable[[], str]] = {}
        self._file: WeightFile | None = None
        self._device = device
        if facts.single_file:
            self._file = open_weights(facts.path)
            if facts.family is None:
                entries = {key: {"shape": shape} for key, shape in self._file.shapes.items()}
                facts = read_single_file_facts(facts.name, facts.path, Header(entries, {}, 0), *by_hand)
        assert facts.family is not None
        self.facts = facts
        self.family = facts.family
        if not facts.single_file:
            check_base_folder(facts.path, self.family)

    def unet(self, dtype: torch.dtype, policy: WeightPolicy | None) -> UNet2DConditionModel:
        config = UNet2DConditionModel.load_config(self.facts.configs / self.family.denoiser)
        if self._file:
            config = unet_config(config, self._file.shapes, self.family)
            find = unet_in_file(self._file, self.family)
        else:
            find = component_in_folder(self.facts.path / self.family.denoiser, self.family.denoiser)
        with init_empty_weights(include_buffers=False), no_init_weights():
            unet = UNet2DConditionModel.from_config(config)
        return self._register(self.family.denoiser, unet, find, dtype, policy=policy)

    def vae(self, other: str) -> AutoencoderKL:
        """The VAE in fp32: the base's own, or the one that `other` names."""
        place = expand_home(other) if other else self.facts.path / "vae"
        if other:
            check_vae_path(place)
        if place.is_dir():
            config = AutoencoderKL.load_config(place)
            find = component_in_folder(place, "vae")
        else:
            file = open_weights(place) if other else self._file
            assert file is not None
            config = vae_config(AutoencoderKL.load_config(self.facts.configs / "vae"), file.shapes)
            find = vae_in_file(file, len(config["block_out_channels"]))
        with init_empty_weights(include_buffers=False), no_init_weights():
            vae = AutoencoderKL.from_config(config)
        advice = "Set model.vae to a VAE file." if self._file and not other else ""
        return self._register("vae", vae, find, torch.float32, advice)

    def text_encoder(self, encoder: TextEncoder, dtype: torch.dtype) -> Any:
        config = CLIPTextConfig.from_pretrained(self.facts.configs / encoder.part, local_files_only=True)
        if self._file:
            config = CLIPTextConfig(**text_config(config.to_dict(), self._file.shapes, encoder))
            find = text_encoder_in_file(self._file, encoder)
        else:
            find = component_in_folder(self.facts.path / encoder.part, encoder.part)
        kind: Any = CLIPTextModelWithProjection if encoder.pooled else CLIPTextModel
        with init_empty_weights(include_buffers=False), no_init_weights():
            module = kind(config)
        return self._register(encoder.part, module, find, dtype)

    def _register(
        self, part: str, module: Any, find: WeightLocator, dtype: torch.dtype, advice: str = "",
        policy: WeightPolicy | None = None,
    ) -> Any:  # fmt: skip
        title = TITLES.get(part, part.replace("_", " "))
        where = LoadContext(self.facts.path, title, advice or "It is incomplete or of another kind.")

        def read() -> None:
            fill(module, find, dtype, self._device, where, policy)
            module.to(self._device)

        names = [name for name, _ in module.named_parameters()]
        self.digests[part] = functools.partial(_digest, names, find)
        streamline(module)
        self.waiting[part] = read
        return module.eval()


def _digest(names: list[str], find: WeightLocator) -> str:
    sources = {name: find(name) for name in sorted(names)}
    keys: dict[WeightFile, list[str]] = {}
    for found in filter(None, sources.values()):
        keys.setdefault(found.file, []).append(found.key)
    samples = {file: file.samples(wanted) for file, wanted in keys.items()}
    digest = hashlib.sha256()
    for name, source in sources.items():
        identity = source.identify(samples[source.file][source.key]) if source else None
        digest.update(f"{name} {identity}\n".encode())
    return digest.hexdigest()


def _tokenizer(facts: BaseFacts, encoder: TextEncoder) -> Any:
    if not facts.single_file:
        return CLIPTokenizer.from_pretrained(facts.path / encoder.tokenizer, local_files_only=True)
    return CLIPTokenizer.from_pretrained(CLIP_TOKENIZER, pad_token=encoder.pad_token, local_files_only=True)


class LoadContext(NamedTuple):
    """What errors mention: the base's path, the component's title, what to do where weights are missing."""

    path: Path
    title: str
    advice: str


def fill(
    module: nn.Module, find: WeightLocator, dtype: torch.dtype, device: torch.device, where: LoadContext,
    policy: WeightPolicy | None = None,
) -> None:  # fmt: skip
    """Read all parameters of `module`, frozen, in `dtype`, onto `device`.

    Nothing is left at its random initialization: a parameter that the files lack is an error, where the
    libraries only log it. All names and shapes are checked before the first tensor is read. `policy` is
    applied to each layer as soon as its weight is there.

    Raises:
        ModelFileError: the files lack a parameter, or it has another shape or holds NaN.
    """
    wanted = dict(module.named_parameters())
    found = {name: find(name) for name in wanted}
    sources = {name: source for name, source in found.items() if source is not None}
    if missing := [name for name in wanted if name not in sources]:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        lacks = f"{missing[0]}{more} of the {where.title}" if sources else where.title
        raise ModelFileError(f"The base {where.path} lacks {lacks}. {where.advice}")
    for name, source in sources.items():
        if source.shape.numel() != wanted[name].numel():
            raise ModelFileError(
                f"{source.file.path} holds {source.key} in the shape {source.file.shapes[source.key]}, not"
                f" {list(wanted[name].shape)}; its {where.title} is of another kind."
            )
    for name, source in sources.items():
        tensor = source.read()
        if not tensor.is_floating_point():
            raise ModelFileError(f"{source.file.path} holds {source.key} as integers; it is not a weight.")
        loaded = tensor.reshape(wanted[name].shape).to(device, dtype)
        if not _finite(loaded):
            broken = not _finite(tensor.float())
            reason = "holds NaN or infinity" if broken else f"holds more than {str(dtype)[6:]} can"
            remedy = "choose another file" if broken else "set train.precision to fp32 or bf16"
            raise ModelFileError(f"{source.file.path}: the tensor {source.key} {reason}; {remedy}.")
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, nn.Parameter(loaded, requires_grad=False))
        if policy and leaf == "weight":
            policy.apply_to_layer(module, parent)


def _finite(tensor: torch.Tensor) -> bool:
    # Without a second tensor of the same size.
    return all(map(math.isfinite, torch.stack(tensor.aminmax()).tolist()))


# Configs of a single file's components: the family's, with the sizes of the file's tensors. Depths and widths
# show in names and shapes. How attention is cut into heads does not: that stays as in the family's config, or
# 64 channels a head where that does not divide.
Shapes = Mapping[str, Sequence[int]]
HEAD_WIDTH = 64
"""Channels of an attention head in every family from SD 2.x on, and in all CLIP text encoders."""


def unet_config(config: Mapping[str, Any], shapes: Shapes, family: Family) -> dict[str, Any]:
    """A UNet's config with the inputs, widths and depths of the file's tensors."""
    found = dict(config)
    if CONV_IN in shapes:
        found["in_channels"] = int(shapes[CONV_IN][1])
    levels = range(len(family.attention_levels))
    firsts = [f"{UNET}input_blocks.{1 + (RESNETS + 1) * level}" for level in levels]
    widths = [shapes.get(f"{first}.0.in_layers.2.weight") for first in firsts]
    channels = [int(width[0]) for width in widths if width]
    if len(channels) != len(firsts):
        return found
    found["block_out_channels"] = channels
    heads = config.get("attention_head_dim", 8)
    heads = list(heads) if isinstance(heads, list | tuple) else [heads] * len(channels)
    fitting = [_heads(own, width) for own, width in zip(heads, channels, strict=True)]
    found["attention_head_dim"] = fitting if len(set(fitting)) > 1 else fitting[0]
    depths = [_depth(shapes, f"{first}.1.transformer_blocks.") for first in firsts]
    if any(depths):
        kept = [depth or 1 for depth in depths]
        found["transformer_layers_per_block"] = kept if len(set(kept)) > 1 else kept[0]
    projection = next(
        (s for k, s in shapes.items() if k.startswith(UNET) and k.endswith(".proj_in.weight")), None
    )
    if projection:
        found["use_linear_projection"] = len(projection) == 2
    label = shapes.get(f"{UNET}label_emb.0.0.weight")
    if label and config.get("projection_class_embeddings_input_dim"):
        found["projection_class_embeddings_input_dim"] = int(label[1])
    return found


def _heads(own: int, channels: int) -> int:
    return own if channels % own == 0 else max(1, channels // HEAD_WIDTH)


def _depth(shapes: Shapes, start: str) -> int:
    """How many different numbers follow `start` in the names."""
    numbers = {match[1] for key in shapes if (match := re.match(re.escape(start) + r"(\d+)\.", key))}
    return len(numbers)


def vae_config(config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """A VAE's config with the widths of the file's tensors, in original or in diffusers' names."""
    found = dict(config)
    channels = []
    for level in range(len(config["block_out_channels"])):
        for key in (f"encoder.down.{level}.block.0", f"encoder.down_blocks.{level}.resnets.0"):
            if shape := shapes.get(f"{VAE}{key}.conv1.weight") or shapes.get(f"{key}.conv1.weight"):
                channels.append(int(shape[0]))
    if len(channels) == len(config["block_out_channels"]):
        found["block_out_channels"] = channels
    return found


def text_config(config: Mapping[str, Any], shapes: Shapes, encoder: TextEncoder) -> dict[str, Any]:
    """A text encoder's config with the widths and the depth of the file's tensors.

    OpenCLIP files of SD 2.x hold one layer more than is used, so the depth is never more than the config's.
    """
    found = dict(config)

    def shape(name: str) -> Sequence[int] | None:
        if encoder.open_clip:
            return shapes.get(encoder.single_file + open_clip_path(name)[0])
        return shapes.get(f"{encoder.single_file}text_model.{name}") or shapes.get(encoder.single_file + name)

    words, first = shape("embeddings.token_embedding.weight"), shape("encoder.layers.0.mlp.fc1.weight")
    if not words or not first:
        return found
    depth = max(
        _depth(shapes, encoder.single_file + layers)
        for layers in ("text_model.encoder.layers.", "encoder.layers.", "transformer.resblocks.")
    )
    width = int(words[1])
    found |= {
        "vocab_size": int(words[0]),
        "hidden_size": width,
        "intermediate_size": int(first[0]),
        "num_hidden_layers": min(depth, config["num_hidden_layers"]),
        "num_attention_heads": _heads(config["num_attention_heads"], width),
    }
    projection = shape("text_projection.weight") if encoder.pooled else None
    if projection:
        found["projection_dim"] = int(projection[1])
    return found
