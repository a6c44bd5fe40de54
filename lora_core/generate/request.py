"""An image as data: everything it depends on, and the text in its PNG.

Window, command line and worker exchange these types, so that a cell of a grid and a single image with the
same settings are the same image. Nothing here imports torch.
"""

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lora_core.errors import ConfigError
from lora_core.model_files.families import is_text_encoder
from lora_core.settings.config import parse_cfg_rescale
from lora_core.settings.schema import AUTO, SAMPLERS, NumberOrAuto, find_key

LARGEST_SEED = 2**63 - 1
DENOISING_STRENGTH = 0.6
NEGATIVE = "Negative prompt:"
"""What the negative prompt begins with in the text of a PNG."""


@dataclass(frozen=True)
class WeightedLora:
    """An adapter file and the strength that it is used at.

    Attributes:
        file: its path; in an infotext, where no path is known, its name.
        strength: on the UNet, and on the text encoders unless `text_strength` is set.
        text_strength: on the text encoders; None for the same.
        rank: truncate to this rank by SVD before use; 0 keeps the adapter as it is. Only images use it.
    """

    file: str
    strength: float = 1.0
    text_strength: float | None = None
    rank: int = 0
    __pydantic_config__ = ConfigDict(allow_inf_nan=False)

    @property
    def name(self) -> str:
        """What to call it: the file's stem; for a checkpoint the name of the run and the step."""
        path = Path(self.file)
        if path.stem == "adapter" and path.parent.name.startswith("step-"):
            return f"{path.parent.parent.parent.name} {path.parent.name}".strip()
        return path.stem if path.suffix == ".safetensors" else path.name

    @property
    def on_text(self) -> float:
        """The strength on the text encoders."""
        return self.strength if self.text_strength is None else self.text_strength

    @property
    def acts(self) -> bool:
        """Whether it changes anything."""
        return bool(self.strength or self.text_strength)

    @property
    def tag(self) -> str:
        """`<lora:name:strength>`, or `<lora:name:text encoder:UNet>` where the two strengths differ, as in
        A1111."""
        name = re.sub(r"[<>:\s]+", " ", self.name).strip()
        if self.on_text == self.strength:
            return f"<lora:{name}:{self.strength:g}>"
        return f"<lora:{name}:{self.on_text:g}:{self.strength:g}>"

    def on(self, part: str) -> float:
        """The strength on a part of the base."""
        return self.on_text if is_text_encoder(part) else self.strength

    def times(self, factor: float) -> "WeightedLora":
        """The same adapter with both strengths multiplied."""
        text = None if self.text_strength is None else self.text_strength * factor
        return replace(self, strength=self.strength * factor, text_strength=text)


@dataclass(frozen=True)
class GenerationRequest:
    """Everything that an image depends on.

    Attributes:
        base, prediction, vae, zero_terminal_snr: the base, as in the settings of a run.
        cfg: guidance scale; at 1 or less the negative prompt is not used.
        cfg_rescale: phi of `pipeline.rescale_guidance`, 0 to 1; "auto" for what suits the base.
        sampler: a key or title of `choices.SAMPLERS`.
        width, height: in pixels; 0 for the base's own.
        tokens: length of the prompt in tokens, a multiple of 75.
        image: the file of an image to start from, "" to start from noise.
        denoising_strength: how much of it is regenerated: the share of the steps that are run.
        mask: the file of a mask of the image, white where an inpainting base paints it; "" for all of it.
        loras: adapters, all on at once.
    """

    base: str = "demo"
    prediction: str = "auto"
    vae: str = ""
    zero_terminal_snr: str = "auto"
    prompt: str = ""
    negative: str = ""
    seed: int = 0
    steps: int = 20
    cfg: float = 5.0
    cfg_rescale: NumberOrAuto = AUTO
    sampler: str = "ddim"
    width: int = 0
    height: int = 0
    clip_skip: int = 1
    tokens: int = 75
    image: str = ""
    denoising_strength: float = DENOISING_STRENGTH
    mask: str = ""
    loras: tuple[WeightedLora, ...] = ()
    __pydantic_config__ = ConfigDict(allow_inf_nan=False)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "GenerationRequest":
        """The request in a JSON object; keys that it has no field for are ignored, and one of `loras` may be
        a path.

        Raises:
            ConfigError: a value is of another type or out of range.
        """
        values, rows = dict(data), data.get("loras")
        if isinstance(rows, list):
            values["loras"] = [{"file": row} if isinstance(row, str) else row for row in rows]
        if "cfg_rescale" in data:
            values["cfg_rescale"] = parse_cfg_rescale(data["cfg_rescale"])
        try:
            request: GenerationRequest = _reader().validate_python(values)
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            name, value = ".".join(map(str, wrong["loc"])), str(wrong["input"])[:80]
            raise ConfigError(f"{name} = {value!r} is not understood: {wrong['msg']}.") from error
        request.check()
        return request

    def check(self) -> None:
        """Raise a ConfigError for a value that no sampler supports."""
        phi = self.cfg_rescale
        for name, legal, hint in (
            ("seed", 0 <= self.seed <= LARGEST_SEED, f"it must be between 0 and {LARGEST_SEED:,}"),
            ("steps", 1 <= self.steps <= 1000, "it must be between 1 and 1,000"),
            ("cfg", math.isfinite(self.cfg), "take a number such as 5"),
            ("cfg_rescale", phi == AUTO or 0.0 <= phi <= 1.0, "it must be between 0 and 1"),
            ("denoising_strength", 0.0 < self.denoising_strength <= 1.0, "it must be above 0 and at most 1"),
        ):
            if not legal:
                raise ConfigError(f"{name} = {getattr(self, name)} is out of range; {hint}.")
        if self.mask and not self.image:
            raise ConfigError(f"The mask {self.mask} is for an image; give that one, too.")

    def alone(self) -> "GenerationRequest":
        """The base's own image."""
        return replace(self, loras=())

    def acting(self) -> "GenerationRequest":
        """The same image in its shortest form: without adapters and strengths that change nothing."""
        acting = (lora for lora in self.loras if lora.acts)
        same = (replace(one, text_strength=None) if one.on_text == one.strength else one for one in acting)
        return replace(self, loras=tuple(same))

    def infotext(self, cfg_rescale: float, extra: Mapping[str, str]) -> str:
        """The text for the PNG: prompt, settings, the CFG rescale that was used, and more, name to value.

        Source: A1111's `infotext_utils.py`, and "CFG Rescale" of its extension CFG_Rescale_webui.
        """
        lines = [" ".join([self.prompt, *(lora.tag for lora in self.loras if lora.acts)])]
        if self.negative:
            lines.append(f"{NEGATIVE} {self.negative}")
        settings = {
            "Steps": self.steps,
            "Sampler": sampler_title(self.sampler),
            "CFG scale": f"{self.cfg:g}",
            "CFG Rescale": f"{cfg_rescale:g}" if cfg_rescale else None,
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}" if self.width and self.height else None,
            "Denoising strength": f"{self.denoising_strength:g}" if self.image else None,
            "Model": Path(self.base).stem or None,
            "Clip skip": self.clip_skip if self.clip_skip > 1 else None,
            **{f"LoRA rank of {lora.name}": lora.rank for lora in self.loras if lora.rank},
            **extra,
        }
        known = {key: str(value) for key, value in settings.items() if value is not None}
        for key, value in known.items():
            if re.search(r'[,:\n"]', value):
                known[key] = json.dumps(value, ensure_ascii=False)
        lines.append(", ".join(f"{key}: {value}" for key, value in known.items()))
        return "\n".join(lines)


_reader = functools.cache(lambda: TypeAdapter(GenerationRequest))


def sampler_title(name: str) -> str:
    """A sampler's name in A1111."""
    key = find_key(SAMPLERS, name)
    return name if key is None else SAMPLERS[key].title
