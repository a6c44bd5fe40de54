"""What the window needs to know of a base model without loading it: read from the configs and file headers of
its folder."""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.spec.errors import ModelFileError
from lora_core.spec.families import Family, family_of_context_width
from lora_core.spec.paths import DEMO_BASE

# The sizes of SD 1.x, for a base whose configs cannot be read yet.
USUAL_RESOLUTION, USUAL_MULTIPLE = 512, 64
# What the file's header says of each layer: three tensors with long names.
HEADER_A_LAYER = 450
# Which weights a set of targets adapts, for the size of the file only; the trainer's own table is
# lora_core/adapters/targets.py, which needs torch.
ADAPTED = {
    "attention": r".*(attn[12]\.(to_[qkv]|to_out\.0)|self_attn\.(q|k|v|out)_proj)\.weight",
    "kohya": (
        r".*(attentions\.\d+\..*(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)|proj_in|proj_out)"
        r"|self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.weight"
    ),
}


@dataclass(frozen=True)
class BaseFacts:
    """A base model as its folder describes it."""

    folder: Path | None
    family: Family | None
    resolution: int
    multiple: int
    prediction: str
    problem: str = ""

    @property
    def sentence(self) -> str:
        """What a person should know of it, in one line."""
        if self.problem:
            return self.problem
        if self.family is None:
            return "What kind of base this is shows when the run starts."
        predicts = "velocity" if self.prediction == "v_prediction" else "noise"
        return f"{self.family.title}, trained at {self.resolution} px, predicts {predicts}."

    @property
    def tokenizer(self) -> Path:
        """The folder of its tokenizer; the embedded base's where it has none."""
        own = self.folder / "tokenizer" if self.folder else DEMO_BASE / "tokenizer"
        return own if own.is_dir() else DEMO_BASE / "tokenizer"


def base_facts(name: str) -> BaseFacts:
    """What is known of the base that a person named: `demo`, a folder, or a hub id (of which nothing is
    known)."""
    name = name.strip()
    folder = DEMO_BASE if name in ("demo", "") else Path(name).expanduser()
    if not folder.is_dir():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
        problem = "" if hub else f"There is no base model at {name}; give the folder of a diffusers model."
        return BaseFacts(None, None, USUAL_RESOLUTION, USUAL_MULTIPLE, "", problem)
    try:
        unet, vae = _config(folder, "unet/config.json"), _config(folder, "vae/config.json")
        family = family_of_context_width(int(unet["cross_attention_dim"]))
        pixels = 2 ** (len(vae["block_out_channels"]) - 1)
        size = unet.get("sample_size")
        resolution = size * pixels if isinstance(size, int) else family.resolution
        multiple = pixels * 2 ** (len(unet["block_out_channels"]) - 1)
        scheduler = _config(folder, "scheduler/scheduler_config.json")
        prediction = str(scheduler.get("prediction_type", family.prediction))
    except (OSError, ValueError, KeyError, TypeError, ModelFileError) as error:
        said = f"{error}" if isinstance(error, ModelFileError) else f"It is no diffusers model ({error})."
        return BaseFacts(folder, None, USUAL_RESOLUTION, USUAL_MULTIPLE, "", f"{folder}: {said}")
    return BaseFacts(folder, family, resolution, multiple, prediction)


def _config(folder: Path, name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return config


def export_bytes(facts: BaseFacts, targets: str, rank: int, text_encoder: bool) -> int | None:
    """About how large the exported fp16 file is: rank x (in + out) numbers an adapted layer. None where
    unknown."""
    if facts.folder is None or targets not in ADAPTED:
        return None
    files = [facts.folder / "unet" / "diffusion_pytorch_model.safetensors"]
    if text_encoder:
        files.append(facts.folder / "text_encoder" / "model.safetensors")
    try:
        found = [_sides(file, targets, file.stat().st_mtime_ns) for file in files]
    except (OSError, ValueError):
        return None
    return sum(2 * rank * sides + HEADER_A_LAYER * layers for sides, layers in found)


@functools.lru_cache(maxsize=32)
def _sides(file: Path, targets: str, changed_at: int) -> tuple[int, int]:
    """The sum of in + out over the adapted layers and their number, from the header of a safetensors file."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > 100_000_000:
            raise ValueError("not a safetensors header")
        header: dict[str, Any] = json.loads(opened.read(length))
    pattern = re.compile(ADAPTED[targets])
    shapes = [row["shape"] for name, row in header.items() if pattern.fullmatch(name)]
    return sum(shape[0] + shape[1] for shape in shapes), len(shapes)
