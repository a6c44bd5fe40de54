"""Opening a base model from a diffusers folder, the embedded one, or the hub's local cache.

Only submodules of diffusers and transformers are imported: the whole pipeline zoo takes ten seconds more.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from lora_core.models.noise import NoiseSchedule
from lora_core.spec.errors import ModelFileError
from lora_core.spec.families import Family, family_of_context_width
from lora_core.spec.paths import DEMO_BASE

WEIGHT_FILES = {
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
    "text_encoder": ("model.safetensors", "model.fp16.safetensors"),
}
OTHER_FILES = ("scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt")


@dataclass
class BaseModel:
    """A frozen base model in memory.

    Attributes:
        name: what the person called it ("demo", a path, a hub id).
        path: the diffusers folder.
        family: its row.
        unet, vae, text_encoders, tokenizers: the components, the last two by part.
        noise: the noise schedule and what the UNet predicts.
        scheduler_config: the base's own sampler settings, for samplers to start from.
        device: where the components live.
        dtype: the number format of UNet and text encoders; the VAE is always fp32, where it cannot overflow.
    """

    name: str
    path: Path
    family: Family
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: dict[str, Any]
    tokenizers: dict[str, Any]
    noise: NoiseSchedule
    scheduler_config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """The components that an adapter can be put into, by part."""
        return {"unet": self.unet, **self.text_encoders}

    @property
    def pixels_a_latent(self) -> int:
        """How many pixels of a side become one latent."""
        config: Any = self.vae.config
        return int(2 ** (len(config.block_out_channels) - 1))

    @property
    def size_multiple(self) -> int:
        """Sides of pictures, in pixels, must be multiples of this, so that each level of the UNet divides
        evenly."""
        config: Any = self.unet.config
        return int(self.pixels_a_latent * 2 ** (len(config.block_out_channels) - 1))

    @property
    def resolution(self) -> int:
        """The side in pixels that the base was trained at: the UNet's own config says it, else the family."""
        config: Any = self.unet.config
        sample_size = config.sample_size
        return sample_size * self.pixels_a_latent if isinstance(sample_size, int) else self.family.resolution

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        config: Any = self.unet.config
        return int(config.in_channels)


def base_folder(name: str) -> Path:
    """The diffusers folder that `name` stands for.

    Raises:
        ModelFileError: nothing usable is there.
    """
    if name == "demo":
        return DEMO_BASE
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file() or path.suffix in (".safetensors", ".ckpt"):
        state = "is a single file" if path.is_file() else "does not exist"
        raise ModelFileError(
            f"The base {name} {state}; give the folder of a diffusers model (it holds unet/, vae/, ...)."
        )
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _hub_folder(name)
    raise ModelFileError(
        f"The base {name!r} does not exist; give `demo`, a diffusers folder, or a hub id like owner/name."
    )


def _hub_folder(repo: str) -> Path:
    patterns = [
        "*.json",
        "*.txt",
        "*/*.json",
        "*/*.txt",
        "*/model.safetensors",
        "*/diffusion_pytorch_model.safetensors",
    ]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelFileError(
            f"The base {repo!r} is no folder here, not in the local hub cache, and cannot be downloaded "
            f"({type(error).__name__}); check the name and the connection, or give a folder."
        ) from error


def checked_folder(path: Path) -> Family:
    """The family of a diffusers folder, once every file that opening it needs is there.

    Raises:
        ModelFileError: names all that is missing, or the family that cannot be trained.
    """
    unet_config = _read_json(path / "unet" / "config.json")
    if unet_config.get("in_channels", 4) == 9:
        raise ModelFileError(
            f"The base {path} is an inpainting model (9 input channels), which cannot be trained here."
        )
    width = unet_config.get("cross_attention_dim")
    if not isinstance(width, int):
        raise ModelFileError(
            f"The base {path} is of no family that can be trained here: its unet/config.json says"
            f" cross_attention_dim = {width}, which should be one number."
        )
    family = family_of_context_width(width)
    missing = [name for name in OTHER_FILES if not (path / name).is_file()]
    for part in ("unet", "vae", *(encoder.part for encoder in family.text_encoders)):
        if not (path / part / "config.json").is_file():
            missing.append(f"{part}/config.json")
        kinds = WEIGHT_FILES.get(part, WEIGHT_FILES["text_encoder"])
        if not any((path / part / name).is_file() for name in kinds):
            missing.append(f"{part}/{kinds[0]}")
    if missing:
        raise ModelFileError(
            f"The base {path} is not whole; it lacks {', '.join(missing)}. Download it again."
        )
    return family


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelFileError(
            f"{path.parent.parent} is no diffusers model: it lacks {path.parent.name}/{path.name}."
        ) from error
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ModelFileError(f"{path} holds no JSON object.")
    return found


def load_base(
    name: str, device: torch.device, dtype: torch.dtype, prediction: str = "auto", vae: str = ""
) -> BaseModel:
    """Open a base model, frozen, on `device`.

    Args:
        name: "demo", a diffusers folder, or a hub id.
        device: where to put the components.
        dtype: number format of UNet and text encoders.
        prediction: "auto", or what the UNet predicts, against its config.
        vae: folder of a VAE to use in place of the base's own, or "".

    Raises:
        ModelFileError: names what is missing or broken.
    """
    path = base_folder(name)
    family = checked_folder(path)
    scheduler_config = _read_json(path / "scheduler" / "scheduler_config.json")
    if prediction != "auto":
        scheduler_config["prediction_type"] = prediction
    scheduler_config.setdefault("prediction_type", family.prediction)
    vae_folder = Path(vae).expanduser() if vae else path / "vae"
    parts = [encoder.part for encoder in family.text_encoders]
    try:
        unet = _loaded(UNet2DConditionModel, path / "unet", **_how(path / "unet", dtype))
        autoencoder = _loaded(AutoencoderKL, vae_folder, **_how(vae_folder, torch.float32))
        encoders = {part: _loaded(CLIPTextModel, path / part, dtype=dtype) for part in parts}
        tokenizers = {
            part: CLIPTokenizer.from_pretrained(
                path / part.replace("text_encoder", "tokenizer"), local_files_only=True
            )
            for part in parts
        }
        noise = NoiseSchedule.of(DDPMScheduler.from_config(scheduler_config))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelFileError(
            f"The base {path} cannot be opened: {first.rstrip('.')}. Download it again or choose another."
        ) from error
    for module in (unet, autoencoder, *encoders.values()):
        module.requires_grad_(False).eval().to(device)
    return BaseModel(
        name=name, path=path, family=family, unet=unet, vae=autoencoder, text_encoders=encoders,
        tokenizers=tokenizers, noise=noise, scheduler_config=scheduler_config, device=device, dtype=dtype,
    )  # fmt: skip


def _loaded(kind: Any, folder: Path, **how: Any) -> Any:
    """A component from its folder.

    The libraries fill what a file lacks with random numbers and only log it; here it is an error.

    Raises:
        ModelFileError: the folder is not there, or the weights are not those that its config asks for.
    """
    if not folder.is_dir():
        raise ModelFileError(f"The folder {folder} does not exist.")
    module, report = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True, **how)
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelFileError(
            f"The weights in {folder} lack {missing[0]}{more}; download them again or choose another base."
        )
    return module


def _how(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    plain = (folder / "diffusion_pytorch_model.safetensors").is_file()
    return {
        "torch_dtype": dtype, "use_safetensors": True, "variant": None if plain else
        "fp16",
    }  # fmt: skip
