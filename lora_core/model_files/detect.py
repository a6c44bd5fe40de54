"""Recognizing a base model from its files without loading it: family, prediction type, size.

A diffusers folder has configs; a single file has the names and shapes of its tensors. No torch, so that the
window can tell as soon as a base is chosen, and no network.
"""

import functools
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_core.errors import ModelFileError, wrap_os_errors
from lora_core.model_files.families import (
    FAMILIES,
    Family,
    canonical_path,
    family_of_context_width,
    is_text_encoder,
)
from lora_core.model_files.header import (
    INPAINTING_CHANNELS,
    Header,
    channels_kind,
    read_header,
    unsupported_kind,
    what_is_there,
)
from lora_core.model_files.ldm_names import ldm_unet_path
from lora_core.settings.schema import ModelSection, NumberOrAuto
from lora_core.system.files import (
    CLIP_TOKENIZER,
    DEMO_BASE,
    FAMILY_CONFIGS,
    expand_home,
    file_stamp,
    parse_json,
    read_object,
    read_small_file,
)

EMBEDDED = "demo"
UNET, VAE = "model.diffusion_model.", "first_stage_model."
"""Prefixes of the UNet's and the VAE's tensors in a single file."""
CONV_IN = f"{UNET}input_blocks.0.0.weight"
"""The first convolution of a single file's UNet."""
VAE_SCALE_FACTOR = 8
"""Pixels a latent, for the VAE of every family that comes in single files."""
SINGLE_FILES = (".safetensors", ".ckpt")
UNET_CONFIG = "unet/config.json"
"""The file of a diffusers folder that shows that the hub's cache has it."""
TOKENIZER_FILES = ("vocab.json", "merges.txt")
VARIANTS = ("fp16", "bf16")
"""Variants of the weights in a diffusers folder, used where there are none without a variant."""
_CONTEXT = re.compile(re.escape(UNET) + r".*\.attn2\.to_k\.weight")
GUESS = "a guess: nothing in or beside the file says it; change Prediction if images come out as noise"
CFG_RESCALE = 0.7
"""phi for bases with zero terminal SNR, as Lin et al. 2023 (section 3.4) recommend."""
_ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@dataclass(frozen=True)
class BaseFacts:
    """A base model as its files describe it.

    Attributes:
        name: what the user called it ("demo", a path, a hub id).
        path: the diffusers folder or the file.
        family: its row, or None for a `.ckpt`, which has to be loaded first.
        resolution: the side in pixels that it was trained at.
        multiple: sides of images, in pixels, must be multiples of this.
        scheduler: its noise schedule and prediction type, as a diffusers scheduler config.
        prediction_source: how its prediction type is known, for messages.
        problem: from `lookup_base`, why it cannot be used, in a sentence; the rest is a guess then.
        remote: from `lookup_base`, whether it is on the hub and not on this computer.
        inpainting: whether its UNet sees a mask and the rest of the image, too.
    """

    name: str
    path: Path = Path(os.devnull)
    family: Family | None = None
    resolution: int = 512
    multiple: int = 64
    scheduler: dict[str, Any] = field(default_factory=dict)
    prediction_source: str = ""
    problem: str = ""
    remote: bool = False
    inpainting: bool = False

    @property
    def facts(self) -> "BaseFacts | None":
        """Itself, or None where it cannot be used."""
        return None if self.problem else self

    @property
    def embedded(self) -> bool:
        """Whether it is the bundled one."""
        return self.name in (EMBEDDED, "")

    @property
    def single_file(self) -> bool:
        """Whether all components are in one file."""
        return self.path.is_file()

    @property
    def guessed(self) -> bool:
        """Whether the prediction type is a guess, which the user may have to correct."""
        return self.prediction_source == GUESS

    @property
    def prediction(self) -> str:
        """The prediction type: "epsilon" or "v_prediction"."""
        return str(self.scheduler.get("prediction_type", "epsilon"))

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last timestep is pure noise (Lin et al. 2023)."""
        return bool(self.scheduler.get("rescale_betas_zero_snr"))

    def cfg_rescale(self, setting: NumberOrAuto) -> float:
        """phi of CFG rescale for a setting; 0: off.

        `auto` is off for the bundled base, whose white backgrounds turn grey with it.
        """
        if not isinstance(setting, str):
            return setting
        if self.path == DEMO_BASE:
            return 0.0
        return CFG_RESCALE if self.zero_terminal_snr and self.prediction == "v_prediction" else 0.0

    @property
    def configs(self) -> Path:
        """The folder with the components' configs: its own, or the family's."""
        if not self.single_file:
            return self.path
        assert self.family is not None
        return FAMILY_CONFIGS / self.family.configs

    @property
    def tokenizer(self) -> Path:
        """The folder of the first text encoder's tokenizer."""
        own = self.path / "tokenizer"
        return own if own.is_dir() else CLIP_TOKENIZER

    @property
    def sentence(self) -> str:
        """A description in one line."""
        if self.problem:
            return self.problem
        if self.family is None:
            return "A .ckpt file; what kind of base it is shows when the run starts."
        predicts = "velocity" if self.prediction == "v_prediction" else "noise"
        snr = ", zero terminal SNR" if self.zero_terminal_snr else ""
        source = f" ({self.prediction_source})" if self.prediction_source else ""
        title = f"{self.family.title}, for inpainting" if self.inpainting else self.family.title
        return f"{title}, trained at {self.resolution} px, predicts {predicts}{source}{snr}."


def base_path(name: str) -> Path:
    """The folder or file of a base: `name` is "demo", a path, or a hub id in the local cache.

    Raises:
        ModelFileError: nothing is there.
    """
    if name in (EMBEDDED, ""):
        return DEMO_BASE
    path = expand_home(name)
    if os.path.isdir(path) or os.path.isfile(path):  # pathlib raises where the name is too long
        return path
    if os.path.exists(path):
        raise ModelFileError(
            f"The base {name!r} {what_is_there(path)}; give a folder or a .safetensors file."
        )
    if is_hub_id(name):
        cached = _cached_folder(name)
        if cached is not None:
            return cached
        raise ModelFileError(f"The base {name!r} is neither a folder here nor in the local hub cache.")
    raise ModelFileError(
        f"The base {name!r} does not exist. A base is demo, a diffusers folder, a .safetensors file, or a"
        " hub id like owner/name."
    )


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/name of a hub id."""
    return re.fullmatch(r"(?=.{,96}$)[\w.-]+/[\w.-]+", name) is not None and not name.endswith(SINGLE_FILES)


def is_remote(name: str | Path) -> bool:
    """Whether `name` is a hub id that is not yet completely downloaded."""
    name = str(name).strip()
    return is_hub_id(name) and not expand_home(name).exists() and _cached_folder(name) is None


def _cached_folder(repo: str) -> Path | None:
    """The diffusers folder of a hub id in the local cache; None if a file is missing."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo, UNET_CONFIG)
    except HFValidationError:
        return None
    if not isinstance(found, str):
        return None
    folder = Path(found).parents[1]
    try:
        family = family_of_context_width(_json(Path(found)).get("cross_attention_dim", 0))
    except ModelFileError:
        # Reading it reports its kind.
        return folder
    return None if missing_files(folder, family) else folder


def missing_files(folder: Path, family: Family) -> list[str]:
    """The files that a diffusers folder of `family` lacks, as "component/name"."""
    missing = [name for name in ("scheduler/scheduler_config.json",) if not (folder / name).is_file()]
    for encoder in family.text_encoders:
        own = (f"{encoder.tokenizer}/{name}" for name in TOKENIZER_FILES)
        missing += [name for name in own if not (folder / name).is_file()]
    for part in (*family.parts, "vae"):
        if not (folder / part / "config.json").is_file():
            missing.append(f"{part}/config.json")
        try:
            files = weight_paths(folder / part, part)
        except ModelFileError as error:
            missing.append(f"{part}/{error}".replace(f"The folder {folder / part} lacks ", "").rstrip("."))
        else:
            missing += [f"{part}/{file.name}" for file in files if not file.is_file()]
    return missing


def check_base_folder(folder: Path, family: Family) -> None:
    """Refuse an incomplete diffusers folder.

    Raises:
        ModelFileError: names every missing file.
    """
    missing = missing_files(folder, family)
    if missing:
        raise ModelFileError(
            f"The base {folder} is incomplete; it lacks {', '.join(missing)}. Download it again."
        )


def weight_names(part: str) -> list[tuple[str, tuple[str, ...]]]:
    """Possible file names of a diffusers component's weights, the best first.

    Returns:
        For each, the name of the file, and those of the index of its shards.
    """
    stem = "model" if is_text_encoder(part) else "diffusion_pytorch_model"
    found: list[tuple[str, tuple[str, ...]]]
    found = [(f"{stem}.safetensors", (f"{stem}.safetensors.index.json",))]
    for variant in VARIANTS:
        name = f"{stem}.{variant}.safetensors"
        found.append((name, (f"{name}.index.json", f"{stem}.safetensors.index.{variant}.json")))
    return found


def weight_paths(folder: Path, part: str) -> list[Path]:
    """The files that hold a component's weights; several where they are sharded.

    Raises:
        ModelFileError: there is none, or the index of the shards cannot be used.
    """
    names = weight_names(part)
    for name, tables in names:
        if (folder / name).is_file():
            return [folder / name]
        for table in tables:
            if (folder / table).is_file():
                return _shards(folder / table)
    others = any(folder.glob("*.bin")) or any(folder.glob("*.msgpack"))
    other = " It holds weights in another format; only .safetensors can be used." if others else ""
    raise ModelFileError(f"The folder {folder} lacks {names[0][0]}.{other}")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(parse_json(read_small_file(index))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{index} is not an index of weight files.") from error
    # A table must not lead out of its folder.
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ModelFileError(f"{index} is not an index of weight files.")
    return [index.parent / name for name in names]


Layout = dict[tuple[str, str], tuple[int, ...]]
"""Each linear layer and convolution, by part and path as adapters name it, to the shape of its weight."""


def family_layout(family: Family) -> Layout:
    """The layers of a family's UNet and text encoders, in the models' own order; read-only.

    Stored beside the configs, so that no model has to be built; a test compares them with the real classes.
    """
    return _stored_layout(family.configs) if family.configs else base_layout(DEMO_BASE, family)


@functools.cache
def _stored_layout(configs: str) -> Layout:
    parts = _json(FAMILY_CONFIGS / configs / "layers.json")
    return {(part, path): tuple(shape) for part, layers in parts.items() for path, shape in layers.items()}


def base_layout(path: Path, family: Family) -> Layout:
    """The layers of a base, a folder or a single file, from the headers of its weights; read-only.

    Raises:
        ModelFileError: weights are missing or broken.
    """
    return _base_layout(path, family.name, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _base_layout(path: Path, family_name: str, changed_at: int) -> Layout:
    family = FAMILIES[family_name]
    if path.is_file():
        layout, shapes = dict(family_layout(family)), read_header(path, ModelFileError).shapes
        # The text encoders of single files never differ.
        for part, layer in [key for key in layout if key[0] == family.denoiser]:
            shape = shapes.get(f"{UNET}{ldm_unet_path(layer, family.attention_levels)}.weight")
            if shape is None:
                del layout[part, layer]
            else:
                layout[part, layer] = tuple(shape)
        return layout
    return {
        (part, canonical_path(part, name.removesuffix(".weight"))): tuple(shape)
        for part in family.parts
        for file in weight_paths(path / part, part)
        for name, shape in read_header(file, ModelFileError).shapes.items()
        if name.endswith(".weight") and len(shape) in (2, 4) and "embeddings." not in name
    }


def read_base_facts(name: str | Path, prediction: str = "auto", zero_snr: str = "auto") -> BaseFacts:
    """Recognize the base that the user named.

    Args:
        name: "demo", a diffusers folder, a single file, or a hub id in the local cache.
        prediction: "auto", or the prediction type, whatever the files say.
        zero_snr: "auto", or whether it has zero terminal SNR ("on", "off"), whatever the files say.

    Raises:
        ModelFileError: nothing is there, or it cannot be trained here; the message names its kind.
    """
    name = str(name)
    path = base_path(name.strip())
    if path.is_dir():
        return _folder_facts(name, path, prediction, zero_snr)
    if path.suffix.lower() == ".ckpt":
        return BaseFacts(name, path)
    header = read_header(path, ModelFileError)
    return read_single_file_facts(name, path, header, prediction, zero_snr)


def read_single_file_facts(
    name: str, path: Path, header: Header, prediction: str = "auto", zero_snr: str = "auto"
) -> BaseFacts:
    """Recognize a single file by the names and shapes of its tensors.

    Raises:
        ModelFileError: it cannot be trained here; the message names its kind.
    """
    kind = unsupported_kind(header.shapes)
    if kind:
        raise ModelFileError(f"{path} is {kind}, which cannot be used as a base here.")
    width = next((shape[1] for key, shape in header.shapes.items() if _CONTEXT.fullmatch(key)), None)
    if width is None:
        raise ModelFileError(
            f"{path} holds no Stable Diffusion UNet (no names that begin with {UNET}), so it is not a"
            " base model."
        )
    family_of_context_width(width)
    inpainting = header.shapes.get(CONV_IN, [0, 4])[1] == INPAINTING_CHANNELS
    scheduler, prediction_source = _single_file_scheduler(path, header, width, inpainting)
    prediction_source = _set_by_hand(path, scheduler, prediction_source, prediction, zero_snr)
    family = family_of_context_width(width, scheduler["prediction_type"])
    if not family.configs:
        raise ModelFileError(f"{path} is for the {family.title.lower()}, which is only used as a folder.")
    multiple = VAE_SCALE_FACTOR * 2 ** (len(family.attention_levels) - 1)
    return BaseFacts(
        name, path, family, family.resolution, multiple, scheduler, prediction_source, inpainting=inpainting
    )


def _single_file_scheduler(
    path: Path, header: Header, width: int, inpainting: bool
) -> tuple[dict[str, Any], str]:
    """The scheduler config of a single file, and how its prediction type is known.

    In this order: marker tensors, a config beside the file, the header's metadata, the width. The inpainting
    checkpoint of each family predicts noise, that of SD 2.x too.
    """
    usual = next(f for f in FAMILIES.values() if f.context_width == width and f.usual)
    scheduler = _json(FAMILY_CONFIGS / usual.configs / "scheduler" / "scheduler_config.json")
    beside, where = _config_beside(path)
    scheduler |= beside
    marked = [marker for marker in ("v_pred", "ztsnr") if marker in header.tensors]
    if "ztsnr" in marked:
        scheduler |= _ZERO_SNR
    if marked:
        scheduler["prediction_type"] = "v_prediction"
        return scheduler, f"the file's marker {marked[0]} says so"
    if "prediction_type" in beside:
        return scheduler, f"{where} says so"
    stated = header.metadata.get("modelspec.prediction_type", "").lower()
    words = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
    if stated in words:
        scheduler["prediction_type"] = words[stated]
        return scheduler, "the file's header says so"
    scheduler["prediction_type"] = "epsilon" if inpainting else usual.prediction
    return scheduler, GUESS


def _set_by_hand(path: Path, scheduler: dict[str, Any], source: str, prediction: str, zero_snr: str) -> str:
    """Override what the files say with the settings; returns how the prediction type is known.

    Raises:
        ModelFileError: zero terminal SNR for a base that predicts noise, of which nothing can be learned at
            a timestep without a signal (Lin et al. 2023, section 3.1).
    """
    if prediction != "auto":
        scheduler["prediction_type"], source = prediction, "as set"
    if zero_snr == "on":
        if scheduler["prediction_type"] != "v_prediction":
            raise ModelFileError(
                f"The base {path} predicts noise, and zero terminal SNR is for bases that predict velocity;"
                " set model.prediction to v_prediction, or model.zero_terminal_snr to auto."
            )
        scheduler |= _ZERO_SNR
    elif zero_snr == "off":
        scheduler["rescale_betas_zero_snr"] = False
    return source


def _config_beside(path: Path) -> tuple[dict[str, Any], str]:
    """A scheduler config beside a file, and its name; A1111's `.yaml` files too."""
    yaml = path.with_suffix(".yaml")
    if yaml.is_file():
        with wrap_os_errors(ModelFileError, f"{yaml} cannot be read"):
            text = read_small_file(yaml).decode("utf-8", "replace")
        stated = re.search(r"^[ \t]*parameterization:\s*[\"']?(\w+)", text, re.M)
        return {"prediction_type": "v_prediction" if stated and stated[1] == "v" else "epsilon"}, yaml.name
    for place in ("scheduler_config.json", "scheduler/scheduler_config.json"):
        config = path.parent / place
        if config.is_file():
            return _json(config), place
    return {}, ""


def _folder_facts(name: str, path: Path, prediction: str, zero_snr: str) -> BaseFacts:
    unet, vae = _json(path / "unet" / "config.json"), _json(path / "vae" / "config.json")
    kind = channels_kind(unet.get("in_channels", 4))
    if kind:
        raise ModelFileError(f"The base {path} is {kind}, which cannot be trained here.")
    width = unet.get("cross_attention_dim")
    if not isinstance(width, int):
        raise ModelFileError(
            f"The base {path} is not of a family that can be trained here: its unet/config.json says"
            f" cross_attention_dim = {width}, which should be one number."
        )
    scheduler = _json(path / "scheduler" / "scheduler_config.json")
    rows = [family for family in FAMILIES.values() if family.context_width == width]
    # A config from before there was a choice has no prediction type and means epsilon; where a width has two
    # rows, it may mean either.
    prediction_source = GUESS if "prediction_type" not in scheduler and len(rows) > 1 else ""
    scheduler.setdefault("prediction_type", family_of_context_width(width).prediction)
    prediction_source = _set_by_hand(path, scheduler, prediction_source, prediction, zero_snr)
    family = family_of_context_width(width, scheduler["prediction_type"])
    pixels = 2 ** (_count(path, vae, "vae") - 1)
    size = unet.get("sample_size")
    return BaseFacts(
        name, path, family, size * pixels if isinstance(size, int) else family.resolution,
        pixels * 2 ** (_count(path, unet, "unet") - 1), scheduler, prediction_source,
        inpainting=unet.get("in_channels") == INPAINTING_CHANNELS,
    )  # fmt: skip


def _count(path: Path, config: dict[str, Any], part: str) -> int:
    blocks = config.get("block_out_channels")
    if not isinstance(blocks, list) or not blocks:
        raise ModelFileError(f"{path / part / 'config.json'} does not say block_out_channels.")
    return len(blocks)


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError as error:
        raise ModelFileError(
            f"{path.parent.parent} is not a diffusers model: it lacks {path.parent.name}/{path.name}."
        ) from error
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read as JSON: {error}.") from error


FRESH_SECONDS = 20
"""Pages ask each second; files beside a base, such as a config, are read again after this time."""


def lookup_base(name: str, prediction: str = "auto", zero_snr: str = "auto") -> BaseFacts:
    """`read_base_facts`, cached, and with the problem in place of an error; arguments as there."""
    name = name.strip().strip('"')
    period = int(time.monotonic() / FRESH_SECONDS)
    return _base(name, prediction, zero_snr, file_stamp(expand_home(name)), period)


def base_of(model: ModelSection) -> BaseFacts:
    """`lookup_base` of the base in a run's settings, with their overrides."""
    return lookup_base(model.base, model.prediction, model.zero_terminal_snr)


@functools.lru_cache(maxsize=16)
def _base(name: str, prediction: str, zero_snr: str, stamp: tuple[int, int] | None, period: int) -> BaseFacts:
    try:
        return read_base_facts(name, prediction, zero_snr)
    except ModelFileError as error:
        return BaseFacts(name, problem=str(error), remote=is_remote(name))


def clear_base_cache() -> None:
    """Read the files of every base again."""
    _base.cache_clear()
