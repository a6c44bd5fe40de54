"""Writes the checkpoints of a build as a stable-diffusion folder in half precision.

Files of the folder are replaced one by one, each at once, so that a program reading the old base is not hurt.
Without a checkpoint the weights are random: the folder then has the final shape and nothing learnt.

    python assets/base/make/pack.py --build BUILD --to assets/base
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from decoder import polished_vae
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer
from unet import new_models, new_scheduler
from vae import new_vae

FAMILY = {"family": "tiny"}


def trained_models(build: Path, tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """Returns UNet and text encoder with the averaged weights of the checkpoint, if there is one."""
    models = new_models(tokenizer)
    if (build / "unet.pt").exists():
        average = torch.load(build / "unet.pt", weights_only=True)["average"]
        models.load_state_dict({**models.state_dict(), **average})
    return models


def newest_vae(build: Path) -> AutoencoderKL:
    """Returns the VAE of the checkpoint, or a new one."""
    return polished_vae(build) if (build / "vae.pt").exists() else new_vae()


def save_text_encoder(encoder: CLIPTextModel, folder: Path) -> None:
    """Writes the weights under `text_model.`, the names that all tools but the newest transformers expect.

    The configuration asks for float32 like the other parts, which say nothing and are loaded so: transformers
    would follow the file's own half precision and leave a pipeline of two kinds of numbers.
    """
    weights = {}
    for name, weight in encoder.state_dict().items():
        if not name.endswith("position_ids"):
            weights[f"text_model.{name.removeprefix('text_model.')}"] = weight.contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_base(build: Path, folder: Path) -> None:
    """Writes all files of the base into an empty folder."""
    tokenizer = CLIPTokenizer.from_pretrained(build / "tokenizer")
    models = trained_models(build, tokenizer)
    StableDiffusionPipeline(
        vae=newest_vae(build).half(),
        text_encoder=models["text_encoder"].half(),
        tokenizer=tokenizer,
        unet=models["unet"].half(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    save_text_encoder(models["text_encoder"], folder / "text_encoder")
    shutil.copytree(build / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    (folder / "easel.json").write_text(json.dumps(FAMILY) + "\n", encoding="utf-8")


def pack(build: Path, target: Path) -> int:
    """Puts the base into `target` and returns its size in bytes."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        write_base(build, Path(scratch))
        files = [path for path in Path(scratch).rglob("*") if path.is_file()]
        for path in files:
            place = target / path.relative_to(scratch)
            place.parent.mkdir(exist_ok=True)
            os.replace(path, place)
            place.chmod(0o644)
    return sum((target / path.relative_to(scratch)).stat().st_size for path in files)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, required=True, help="folder for caches and checkpoints")
    parser.add_argument("--to", type=Path, required=True, help="the base's folder")
    given = parser.parse_args()
    pack(given.build, given.to)
