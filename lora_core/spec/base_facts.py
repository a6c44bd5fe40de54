"""What a base model is, told from its files without loading it: family, prediction, size.

A diffusers folder says it in its configs; a single file in the names and shapes of its tensors. No torch, so
that the window can say it as soon as a base is chosen, and no network.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_core.spec.errors import ModelFileError
from lora_core.spec.families import FAMILIES, Family, family_of_context_width
from lora_core.spec.other_models import refused_kind
from lora_core.spec.paths import CLIP_TOKENIZER, DEMO_BASE, FAMILY_CONFIGS
from lora_core.spec.tensor_file import Header, read_header

UNET, VAE = "model.diffusion_model.", "first_stage_model."
"""How the names of a single file's UNet and VAE begin."""
PIXELS_A_LATENT = 8
"""Of the VAE of every family that comes in single files."""
SINGLE_FILES = (".safetensors", ".ckpt")
_CONTEXT = re.compile(re.escape(UNET) + r".*\.attn2\.to_k\.weight")
GUESS = "a guess: nothing in or beside the file says it; change Prediction if pictures come out as noise"
_ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@dataclass(frozen=True)
class BaseFacts:
    """A base model as its files describe it.

    Attributes:
        name: what the person called it ("demo", a path, a hub id).
        path: the diffusers folder or the file.
        family: its row, or None for a `.ckpt`, which only loading it tells.
        resolution: the side in pixels that it was trained at.
        multiple: what sides of pictures must be divisible by, in pixels.
        scheduler: its noise schedule and prediction type, as a diffusers scheduler config.
        told_by: what says how it predicts, for people.
    """

    name: str
    path: Path
    family: Family | None
    resolution: int
    multiple: int
    scheduler: dict[str, Any] = field(default_factory=dict)
    told_by: str = ""

    @property
    def single_file(self) -> bool:
        """Whether all components lie in one file."""
        return self.path.is_file()

    @property
    def guessed(self) -> bool:
        """Whether nothing says how it predicts, so that a person may have to."""
        return self.told_by == GUESS

    @property
    def prediction(self) -> str:
        """What the UNet predicts: "epsilon" or "v_prediction"."""
        return str(self.scheduler.get("prediction_type", "epsilon"))

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether nothing of the picture is left at its last timestep (Lin et al. 2023)."""
        return bool(self.scheduler.get("rescale_betas_zero_snr"))

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
        """What a person should know of it, in one line."""
        if self.family is None:
            return "A .ckpt file; what kind of base it is shows when the run starts."
        predicts = "velocity" if self.prediction == "v_prediction" else "noise"
        snr = ", zero terminal SNR" if self.zero_terminal_snr else ""
        told = f" ({self.told_by})" if self.told_by else ""
        return f"{self.family.title}, trained at {self.resolution} px, predicts {predicts}{told}{snr}."


def base_path(name: str) -> Path:
    """The folder or file that `name` stands for: "demo", a path, or a hub id in the local cache.

    Raises:
        ModelFileError: nothing is there.
    """
    if name in ("demo", ""):
        return DEMO_BASE
    path = Path(name).expanduser()
    if path.is_dir() or path.is_file():
        return path
    if is_hub_id(name):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "unet/config.json")
        if isinstance(found, str):
            return Path(found).parents[1]
        raise ModelFileError(f"The base {name!r} is no folder here and not in the local hub cache.")
    raise ModelFileError(
        f"The base {name!r} does not exist; give `demo`, a diffusers folder, a .safetensors file, or a hub id"
        " like owner/name."
    )


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/name of a hub id."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.endswith(SINGLE_FILES)


def base_facts(name: str, prediction: str = "auto") -> BaseFacts:
    """What is known of the base that a person named.

    Args:
        name: "demo", a diffusers folder, a single file, or a hub id that is in the local cache.
        prediction: "auto", or what it predicts, against all that the files say.

    Raises:
        ModelFileError: nothing is there, or it is nothing that can be trained here; the sentence names it.
    """
    path = base_path(name.strip())
    if path.is_dir():
        return _folder_facts(name, path, prediction)
    if path.suffix.lower() == ".ckpt":
        return BaseFacts(name, path, None, 512, 64)
    header = read_header(path, ModelFileError)
    return single_file_facts(name, path, header, prediction)


def single_file_facts(name: str, path: Path, header: Header, prediction: str = "auto") -> BaseFacts:
    """What a single file is, from the names and shapes of its tensors.

    Raises:
        ModelFileError: it is nothing that can be trained here; the sentence names what it is.
    """
    kind = refused_kind(header.shapes)
    if kind:
        raise ModelFileError(f"{path} is {kind}, which cannot be used as a base here.")
    width = next((shape[1] for key, shape in header.shapes.items() if _CONTEXT.fullmatch(key)), None)
    if width is None:
        raise ModelFileError(
            f"{path} holds no Stable Diffusion UNet (no names that begin with {UNET}), so it is no base"
            " model."
        )
    family_of_context_width(width)
    scheduler, told_by = _single_file_scheduler(path, header, width)
    if prediction != "auto":
        scheduler["prediction_type"], told_by = prediction, "as set"
    family = family_of_context_width(width, scheduler["prediction_type"])
    if not family.configs:
        raise ModelFileError(f"{path} is for the {family.title.lower()}, which is only used as a folder.")
    multiple = PIXELS_A_LATENT * 2 ** (len(family.attention_levels) - 1)
    return BaseFacts(name, path, family, family.resolution, multiple, scheduler, told_by)


def _single_file_scheduler(path: Path, header: Header, width: int) -> tuple[dict[str, Any], str]:
    """The scheduler config of a single file, and what says how it predicts.

    In this order: marker tensors, a config beside the file, the header's texts, the width.
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
    scheduler["prediction_type"] = usual.prediction
    rows = [family for family in FAMILIES.values() if family.context_width == width]
    return scheduler, GUESS if len(rows) > 1 else ""


def _config_beside(path: Path) -> tuple[dict[str, Any], str]:
    """What a scheduler config beside a file says, and the config's name; A1111's `.yaml` files too."""
    yaml = path.with_suffix(".yaml")
    if yaml.is_file():
        stated = re.search(
            r"^\s*parameterization:\s*[\"']?(\w+)", yaml.read_text(encoding="utf-8", errors="replace"), re.M
        )
        return {"prediction_type": "v_prediction" if stated and stated[1] == "v" else "epsilon"}, yaml.name
    for place in ("scheduler_config.json", "scheduler/scheduler_config.json"):
        config = path.parent / place
        if config.is_file():
            return _json(config), place
    return {}, ""


def _folder_facts(name: str, path: Path, prediction: str) -> BaseFacts:
    unet, vae = _json(path / "unet" / "config.json"), _json(path / "vae" / "config.json")
    _check_channels(path, unet)
    width = unet.get("cross_attention_dim")
    if not isinstance(width, int):
        raise ModelFileError(
            f"The base {path} is of no family that can be trained here: its unet/config.json says"
            f" cross_attention_dim = {width}, which should be one number."
        )
    scheduler = _json(path / "scheduler" / "scheduler_config.json")
    told_by = ""
    if prediction != "auto":
        scheduler["prediction_type"], told_by = prediction, "as set"
    scheduler.setdefault("prediction_type", family_of_context_width(width).prediction)
    family = family_of_context_width(width, scheduler["prediction_type"])
    pixels = 2 ** (_count(path, vae, "vae") - 1)
    size = unet.get("sample_size")
    return BaseFacts(
        name=name,
        path=path,
        family=family,
        resolution=size * pixels if isinstance(size, int) else family.resolution,
        multiple=pixels * 2 ** (_count(path, unet, "unet") - 1),
        scheduler=scheduler,
        told_by=told_by,
    )


def _check_channels(path: Path, unet: dict[str, Any]) -> None:
    channels = unet.get("in_channels", 4)
    if channels == 9:
        raise ModelFileError(
            f"The base {path} is an inpainting model (9 input channels), which cannot be trained here."
        )
    if channels != 4:
        raise ModelFileError(
            f"The base {path} takes {channels} input channels, not the 4 of Stable Diffusion's text-to-image"
            " models; it cannot be trained here."
        )


def _count(path: Path, config: dict[str, Any], part: str) -> int:
    blocks = config.get("block_out_channels")
    if not isinstance(blocks, list) or not blocks:
        raise ModelFileError(f"{path / part / 'config.json'} does not say block_out_channels.")
    return len(blocks)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelFileError(
            f"{path.parent.parent} is no diffusers model: it lacks {path.parent.name}/{path.name}."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ModelFileError(f"{path} holds no JSON object.")
    return found
