"""An image as data: everything it depends on, the axes of a grid, and the text in its PNG.

Window, command line and worker exchange these types, so that a cell of a grid and a single image with the
same settings are the same image. Nothing here imports torch.
"""

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_core.errors import ConfigError
from lora_core.model_files.families import is_text_encoder
from lora_core.settings.schema import AUTO, NumberOrAuto

Value = str | int | float
MOST_CELLS = 400
LARGEST_SEED = 2**63 - 1
LARGEST_RANK = 4096


def adapter_name(file: str) -> str:
    """The display name of an adapter file: its stem; for a checkpoint the name of the run and the step."""
    path = Path(file)
    if path.stem == "adapter" and path.parent.name.startswith("step-"):
        return f"{path.parent.parent.parent.name} {path.parent.name}".strip()
    return path.stem if path.suffix == ".safetensors" else path.name


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

    @property
    def name(self) -> str:
        """See `adapter_name`."""
        return adapter_name(self.file)

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
        """`<lora:name:strength>`, or `<lora:name:text encoder:UNet>` where the two strengths differ."""
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
    loras: tuple[WeightedLora, ...] = ()

    def check(self) -> None:
        """Raise a ConfigError for a value that no sampler supports."""
        phi = self.cfg_rescale
        for name, legal, hint in (
            ("seed", 0 <= self.seed <= LARGEST_SEED, "it is a whole number from 0 on"),
            ("steps", 1 <= self.steps <= 1000, "it must be between 1 and 1,000"),
            ("cfg", math.isfinite(self.cfg), "take a number such as 5"),
            ("cfg_rescale", phi == AUTO or 0.0 <= phi <= 1.0, "it must be between 0 and 1"),
        ):
            if not legal:
                raise ConfigError(f"{name} = {getattr(self, name)} is out of range; {hint}.")

    def alone(self) -> "GenerationRequest":
        """The base's own image."""
        return replace(self, loras=())

    def acting(self) -> "GenerationRequest":
        """The same image in its shortest form: without adapters and strengths that change nothing."""
        acting = (lora for lora in self.loras if lora.acts)
        same = (replace(one, text_strength=None) if one.on_text == one.strength else one for one in acting)
        return replace(self, loras=tuple(same))

    def at(self, kind: str, to: Value) -> "GenerationRequest":
        """The image with one thing changed.

        A strength is that of the only adapter; with several it multiplies all, so that 1 is the mix as set. A
        rank truncates all. A checkpoint replaces the first adapter.

        Raises:
            ConfigError: a strength or a rank without an adapter.
        """
        value: Any = to
        if kind in ("strength", "rank") and not self.loras:
            raise ConfigError(f"A {kind} needs a LoRA; add one first.")
        if kind == "checkpoint":
            first = replace(self.loras[0], file=value) if self.loras else WeightedLora(value)
            return replace(self, loras=(first, *self.loras[1:]))
        if kind == "rank":
            return replace(self, loras=tuple(replace(lora, rank=value) for lora in self.loras))
        if kind != "strength":
            return replace(self, **{kind: value})
        if len(self.loras) > 1:
            return replace(self, loras=tuple(lora.times(value) for lora in self.loras))
        (lora,) = self.loras
        if value == lora.strength:
            return self
        text = lora.text_strength
        if text is not None:
            text = text * value / lora.strength if lora.strength else value
        return replace(self, loras=(replace(lora, strength=value, text_strength=text),))


KINDS = ("checkpoint", "prompt", "seed", "strength", "rank")
"""What a grid can vary, applied in this order: strengths and ranks are those of a checkpoint."""


def parse_cfg_rescale(value: Any) -> NumberOrAuto:
    """CFG rescale from a form, an option or JSON.

    Raises:
        ConfigError: it is neither `auto` nor a number from 0 to 1.
    """
    if isinstance(value, str) and value.strip().lower() == AUTO:
        return AUTO
    try:
        number = float(str(value).replace(",", "."))
    except ValueError as error:
        raise ConfigError(f"CFG rescale {str(value)[:40]!r} should be a number or {AUTO}.") from error
    if not 0.0 <= number <= 1.0:
        raise ConfigError(f"CFG rescale {number:g} is out of range; it must be between 0 and 1.")
    return number


# The axes of a grid.


@dataclass(frozen=True)
class Axis:
    """The rows or the columns of a grid."""

    kind: str
    values: tuple[Value, ...]

    def labels(self) -> list[str]:
        """The labels of the rows or columns."""
        if self.kind == "prompt":
            return [str(value) for value in self.values]
        if self.kind == "checkpoint":
            return [adapter_name(str(value)) for value in self.values]
        return [f"{self.kind} {_value_text(value)}" for value in self.values]

    def text(self) -> str:
        """As on the command line, but with the names of files only: an image with this text gets shared."""
        values = self.labels() if self.kind == "checkpoint" else [_value_text(value) for value in self.values]
        quoted = ['"{}"'.format(v.replace('"', '""')) if any(c in v for c in ',"\n') else v for v in values]
        return f"{self.kind}={','.join(quoted)}"


def _value_text(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse_axis(text: str) -> Axis:
    """Parse `KIND=V,V,...`; a value that contains a comma is in double quotes.

    Raises:
        ConfigError: an unknown kind, no value, or a value of the wrong type.
    """
    kind, _, rest = text.partition("=")
    return make_axis(kind.strip(), split_values(rest))


def split_values(text: str) -> list[str]:
    """Split at commas outside of double quotes and strip each value; empty ones are dropped."""
    rows = csv.reader(text.splitlines(), skipinitialspace=True)
    return [value.strip() for row in rows for value in row if value.strip()]


def make_axis(kind: str, values: Sequence[Value]) -> Axis:
    """An axis of checked values.

    Raises:
        ConfigError: as in `parse_axis`.
    """
    if kind not in KINDS:
        raise ConfigError(f"A grid cannot vary {kind!r}; it can vary {', '.join(sorted(KINDS))}.")
    if not values:
        raise ConfigError(f"The {kind} of a grid needs values, as in {kind}={_EXAMPLES[kind]}.")
    return Axis(kind, tuple(_check_value(kind, value) for value in values))


_EXAMPLES = {
    "strength": "0,0.5,1",
    "checkpoint": "a.safetensors,b.safetensors",
    "seed": "1,2,3",
    "prompt": '"an owl, sitting","a dog"',
    "rank": "1,4,16",
}
_RANGES = {"strength": (-100, 100), "seed": (0, LARGEST_SEED), "rank": (1, LARGEST_RANK)}


def _check_value(kind: str, value: Value) -> Value:
    if kind in ("prompt", "checkpoint"):
        return str(value)
    try:
        number = float(value) if kind == "strength" else int(value)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"The {kind} {value!r} of a grid is not a number.") from error
    lowest, highest = _RANGES[kind]
    if not (math.isfinite(number) and lowest <= number <= highest):
        raise ConfigError(
            f"The {kind} {value} of a grid is out of range; it must be between {lowest} and {highest}."
        )
    return number


def grid_requests(
    request: GenerationRequest, rows: Axis | None, columns: Axis | None
) -> list[list[GenerationRequest]]:
    """The images of a grid, row by row.

    Raises:
        ConfigError: both axes vary the same, there are too many cells, or there is no adapter to vary.
    """
    if rows is not None and columns is not None and rows.kind == columns.kind:
        raise ConfigError(f"Rows and columns both vary the {rows.kind}; choose another for one of them.")
    down = rows.values if rows else (None,)
    across = columns.values if columns else (None,)
    if len(down) * len(across) > MOST_CELLS:
        raise ConfigError(
            f"A grid of {len(down)} by {len(across)} is {len(down) * len(across)} images; at most"
            f" {MOST_CELLS} are drawn."
        )

    def cell(row: Value | None, column: Value | None) -> GenerationRequest:
        changes = {axis.kind: v for axis, v in ((rows, row), (columns, column)) if axis and v is not None}
        changed = request
        for kind in KINDS:
            if kind in changes:
                changed = changed.at(kind, changes[kind])
        return changed

    return [[cell(row, column) for column in across] for row in down]


def grid_settings(rows: Axis | None, columns: Axis | None) -> dict[str, str]:
    """The axes, for the infotext of a grid."""
    axes = {"Rows": rows, "Columns": columns}
    return {"Script": "Grid", **{name: axis.text() for name, axis in axes.items() if axis}}


# The settings in a PNG, in the form that A1111 writes and reads. Source: its `infotext_utils.py`, the extra
# networks' `<lora:name:te:unet>`, and "CFG Rescale" of its extension CFG_Rescale_webui.

LONGEST = 200_000
"""Characters that are parsed; no image tool writes more."""
_SETTING = re.compile(r'\s*(\w[\w \-/]{0,60}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_TAG = re.compile(r"<lora:([^<>]+)>")
_NEGATIVE = "Negative prompt:"


@dataclass(frozen=True)
class Infotext:
    """Prompt and settings of an image; what a text does not name is None, or "" for words."""

    prompt: str = ""
    negative: str = ""
    steps: int | None = None
    sampler: str = ""
    cfg: float | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    model: str = ""
    clip_skip: int | None = None
    loras: tuple[WeightedLora, ...] = ()
    extra: Mapping[str, str] = field(default_factory=dict)
    cfg_rescale: float | None = None

    def text(self) -> str:
        """The text to store in a PNG under `parameters`."""
        lines = [" ".join([self.prompt, *(lora.tag for lora in self.loras)])]
        if self.negative:
            lines.append(f"{_NEGATIVE} {self.negative}")
        size = f"{self.width}x{self.height}" if self.width and self.height else None
        cfg = None if self.cfg is None else f"{self.cfg:g}"
        settings = {
            "Steps": self.steps, "Sampler": self.sampler or None, "CFG scale": cfg,
            "CFG Rescale": f"{self.cfg_rescale:g}" if self.cfg_rescale else None, "Seed": self.seed,
            "Size": size, "Model": self.model or None,
            "Clip skip": self.clip_skip if (self.clip_skip or 1) > 1 else None, **self.extra,
        }  # fmt: skip
        known = {key: str(value) for key, value in settings.items() if value is not None}
        lines.append(", ".join(f"{key}: {_quote(value)}" for key, value in known.items()))
        return "\n".join(lines)


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def _unquote(value: str) -> str:
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value.strip()


def parse_infotext(text: str) -> Infotext:
    """Parse the text under `parameters`; a text of another form is all prompt."""
    lines = text[:LONGEST].strip().split("\n")
    found = {}
    settings = _SETTING.findall(lines[-1])
    if len(settings) >= 3:
        lines.pop()
        found = {key.strip(): _unquote(value) for key, value in settings}
    start = next((n for n, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    prompt = "\n".join(lines[:start])
    negative = "\n".join(lines[start:]).removeprefix(_NEGATIVE).strip()
    loras = tuple(lora for match in _TAG.finditer(prompt) if (lora := _parse_tag(match[1])) is not None)
    size = re.fullmatch(r"\s*(\d{1,5})\s*x\s*(\d{1,5})\s*", found.get("Size", ""))
    return Infotext(
        prompt=re.sub(r" ?<lora:[^<>]+>", "", prompt).strip() if loras else prompt.strip(),
        negative=negative, steps=_parse_int(found.get("Steps")), sampler=_parse_sampler(found),
        cfg=_parse_float(found.get("CFG scale")), cfg_rescale=_parse_float(found.get("CFG Rescale")),
        seed=_parse_int(found.get("Seed")), width=int(size[1]) if size else None,
        height=int(size[2]) if size else None, model=found.get("Model", ""),
        clip_skip=_parse_int(found.get("Clip skip")), loras=loras, extra=found,
    )  # fmt: skip


def _parse_sampler(found: Mapping[str, str]) -> str:
    """The sampler with its schedule, which newer A1111 writes apart."""
    name, schedule = found.get("Sampler", ""), found.get("Schedule type", "")
    joined = schedule not in ("", "Automatic", "Uniform") and not name.endswith(schedule)
    return f"{name} {schedule}" if joined else name


def _parse_tag(text: str) -> WeightedLora | None:
    positional = [part for part in text.split(":") if "=" not in part]
    named = dict(part.split("=", 1) for part in text.split(":") if "=" in part)
    if not positional or not positional[0].strip():
        return None
    on_text = _parse_float(named.get("te", positional[1] if len(positional) > 1 else "1"))
    if on_text is None:
        return None
    on_unet = _parse_float(named.get("unet", positional[2] if len(positional) > 2 else str(on_text)))
    if on_unet is None:
        return None
    return WeightedLora(positional[0].strip(), on_unet, None if on_text == on_unet else on_text)


def _parse_float(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if abs(number) < 1e9 else None


def _parse_int(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch(r"-?\d{1,19}", text.strip()) else None
