"""What a PNG says of how it was made, in the form that A1111 writes and reads: written and read back.

Source of the form: A1111's `infotext_utils.py` and the extra networks' `<lora:name:te:unet>`; "CFG Rescale"
is what its extension CFG_Rescale_webui writes.
"""

import csv
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_core.errors import ConfigError
from lora_core.settings.schema import AUTO, NumberOrAuto

LONGEST = 200_000
"""Characters that are looked at; what is longer was not written by a picture tool."""
_SETTING = re.compile(r'\s*(\w[\w \-/]{0,60}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_TAG = re.compile(r"<lora:([^<>]+)>")
_NEGATIVE = "Negative prompt:"


@dataclass(frozen=True)
class Tag:
    """An adapter in a prompt: its name and strengths; `text_strength` is None where it is the same."""

    name: str
    strength: float
    text_strength: float | None = None

    def text(self) -> str:
        """`<lora:name:strength>`, or `<lora:name:text encoder:UNet>` where the two differ."""
        name = re.sub(r"[<>:\s]+", " ", self.name).strip()
        if self.text_strength is None or self.text_strength == self.strength:
            return f"<lora:{name}:{self.strength:g}>"
        return f"<lora:{name}:{self.text_strength:g}:{self.strength:g}>"


@dataclass(frozen=True)
class Infotext:
    """What is said of a picture. What a text does not say is None, or "" where it is words."""

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
    loras: tuple[Tag, ...] = ()
    extra: Mapping[str, str] = field(default_factory=dict)
    cfg_rescale: float | None = None

    def text(self) -> str:
        """The text to put into a PNG under `parameters`."""
        lines = [" ".join([self.prompt, *(tag.text() for tag in self.loras)])]
        if self.negative:
            lines.append(f"{_NEGATIVE} {self.negative}")
        size = f"{self.width}x{self.height}" if self.width and self.height else None
        cfg = None if self.cfg is None else f"{self.cfg:g}"
        said = {
            "Steps": self.steps, "Sampler": self.sampler or None, "CFG scale": cfg,
            "CFG Rescale": f"{self.cfg_rescale:g}" if self.cfg_rescale else None, "Seed": self.seed,
            "Size": size, "Model": self.model or None,
            "Clip skip": self.clip_skip if (self.clip_skip or 1) > 1 else None, **self.extra,
        }  # fmt: skip
        lines.append(", ".join(f"{key}: {_quoted_value(str(v))}" for key, v in said.items() if v is not None))
        return "\n".join(lines)


def _quoted_value(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value.strip()


def parse_infotext(text: str) -> Infotext:
    """What a text under `parameters` says; a text of another form is all prompt."""
    lines = text[:LONGEST].strip().split("\n")
    found = {}
    settings = _SETTING.findall(lines[-1])
    if len(settings) >= 3:
        lines.pop()
        found = {key.strip(): _unquoted(value) for key, value in settings}
    start = next((n for n, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    prompt = "\n".join(lines[:start])
    negative = "\n".join(lines[start:]).removeprefix(_NEGATIVE).strip()
    tags = tuple(tag for match in _TAG.finditer(prompt) if (tag := _tag(match[1])) is not None)
    width, height = _size(found.get("Size", ""))
    return Infotext(
        prompt=re.sub(r" ?<lora:[^<>]+>", "", prompt).strip() if tags else prompt.strip(),
        negative=negative, steps=_whole(found.get("Steps")), sampler=_sampler(found),
        cfg=_number(found.get("CFG scale")), cfg_rescale=_number(found.get("CFG Rescale")),
        seed=_whole(found.get("Seed")), width=width, height=height,
        model=found.get("Model", ""), clip_skip=_whole(found.get("Clip skip")), loras=tags, extra=found,
    )  # fmt: skip


def _sampler(found: Mapping[str, str]) -> str:
    """Newer A1111 writes the schedule apart."""
    name, schedule = found.get("Sampler", ""), found.get("Schedule type", "")
    joined = schedule not in ("", "Automatic", "Uniform") and not name.endswith(schedule)
    return f"{name} {schedule}" if joined else name


def _tag(text: str) -> Tag | None:
    positional = [part for part in text.split(":") if "=" not in part]
    named = dict(part.split("=", 1) for part in text.split(":") if "=" in part)
    if not positional or not positional[0].strip():
        return None
    on_text = _number(named.get("te", positional[1] if len(positional) > 1 else "1"))
    if on_text is None:
        return None
    on_unet = _number(named.get("unet", positional[2] if len(positional) > 2 else str(on_text)))
    if on_unet is None:
        return None
    return Tag(positional[0].strip(), on_unet, None if on_text == on_unet else on_text)


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if abs(number) < 1e9 else None


def _whole(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch(r"-?\d{1,19}", text.strip()) else None


def _size(text: str) -> tuple[int | None, int | None]:
    match = re.fullmatch(r"\s*(\d{1,5})\s*x\s*(\d{1,5})\s*", text)
    return (int(match[1]), int(match[2])) if match else (None, None)


# A picture as data: all that it depends on, and what a row or a column of a grid changes in it.
#
# Window, command line and worker speak of pictures in these words, so that a cell of a grid, a cell of a
# strip and a single picture with the same settings are the same picture.


Value = str | int | float
MOST_CELLS = 400
LARGEST_SEED = 2**63 - 1
LARGEST_RANK = 4096


def adapter_name(file: str) -> str:
    """What people call an adapter file: its stem; of a run's checkpoint the run's name and the step."""
    path = Path(file)
    if path.stem == "adapter" and path.parent.name.startswith("step-"):
        return f"{path.parent.parent.parent.name} {path.parent.name}".strip()
    return path.stem


@dataclass(frozen=True)
class WeightedLora:
    """An adapter file in a picture.

    Attributes:
        file: its path.
        strength: on the UNet, and on the text encoders where they have none of their own.
        text_strength: on the text encoders, or None.
        rank: cut to this rank by SVD; 0 leaves it whole.
    """

    file: str
    strength: float = 1.0
    text_strength: float | None = None
    rank: int = 0

    @property
    def name(self) -> str:
        """What people call it."""
        return adapter_name(self.file)

    @property
    def acts(self) -> bool:
        """Whether it changes anything."""
        return bool(self.strength or self.text_strength)

    def plainly(self) -> "WeightedLora":
        """The same, a text encoders' strength that is no other than the UNet's left out."""
        return replace(self, text_strength=None) if self.text_strength == self.strength else self

    def times(self, factor: float) -> "WeightedLora":
        """The same at a multiple of its strengths."""
        text = None if self.text_strength is None else self.text_strength * factor
        return replace(self, strength=self.strength * factor, text_strength=text)


@dataclass(frozen=True)
class GenerationRequest:
    """All that a picture depends on. Sides of 0 are the base's own; the rest as in `generate/pipeline.py`."""

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

    def alone(self) -> "GenerationRequest":
        """The base's own picture of it."""
        return replace(self, loras=())

    def acting(self) -> "GenerationRequest":
        """The same without adapters that change nothing, so that equal pictures are equal data."""
        return replace(self, loras=tuple(lora.plainly() for lora in self.loras if lora.acts))

    def at(self, kind: str, value: Value) -> "GenerationRequest":
        """The picture with one thing changed.

        A strength is that of the one adapter; of several it multiplies all, so that 1 is the mix as it was
        set. A rank cuts all. A checkpoint takes the place of the first adapter.

        Raises:
            ConfigError: a strength or a rank without an adapter.
        """
        if kind in ("strength", "rank") and not self.loras:
            raise ConfigError(f"A {kind} needs a LoRA; add one first.")
        return _CHANGES[kind](self, value)


def parse_cfg_rescale(value: Any) -> NumberOrAuto:
    """CFG rescale as a user or a request gives it.

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
        raise ConfigError(f"CFG rescale {number:g} is out of range; it goes from 0 to 1.")
    return number


def _at_strength(shot: GenerationRequest, value: Any) -> GenerationRequest:
    if len(shot.loras) > 1:
        return replace(shot, loras=tuple(lora.times(value) for lora in shot.loras))
    (lora,) = shot.loras
    if value == lora.strength:
        return shot
    text = lora.text_strength
    if text is not None:
        text = text * value / lora.strength if lora.strength else value
    return replace(shot, loras=(replace(lora, strength=value, text_strength=text),))


def _at_checkpoint(shot: GenerationRequest, value: Any) -> GenerationRequest:
    first = replace(shot.loras[0], file=value) if shot.loras else WeightedLora(value)
    return replace(shot, loras=(first, *shot.loras[1:]))


_CHANGES: dict[str, Callable[[GenerationRequest, Any], GenerationRequest]] = {
    "checkpoint": _at_checkpoint,
    "prompt": lambda shot, value: replace(shot, prompt=value),
    "seed": lambda shot, value: replace(shot, seed=value),
    "strength": _at_strength,
    "rank": lambda shot, value: replace(shot, loras=tuple(replace(lora, rank=value) for lora in shot.loras)),
}
"""What a grid can vary. A checkpoint is put in first, as the strengths and ranks are meant for it."""
KINDS = tuple(_CHANGES)


@dataclass(frozen=True)
class Axis:
    """The rows or the columns of a grid."""

    kind: str
    values: tuple[Value, ...]

    def labels(self) -> list[str]:
        """What stands beside or above the pictures."""
        if self.kind == "prompt":
            return [str(value) for value in self.values]
        if self.kind == "checkpoint":
            return [adapter_name(str(value)) for value in self.values]
        return [f"{self.kind} {value:g}" if isinstance(value, float) else f"{self.kind} {value}"
                for value in self.values]  # fmt: skip

    def text(self) -> str:
        """As on the command line; files by their names alone, since a picture with this inside is shown
        around."""
        values = self.labels() if self.kind == "checkpoint" else [_plain(value) for value in self.values]
        return f"{self.kind}={','.join(map(_quoted, values))}"


def _plain(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _quoted(value: str) -> str:
    doubled = value.replace('"', '""')
    return f'"{doubled}"' if any(mark in value for mark in ',"\n') else value


def parse_axis(text: str) -> Axis:
    """`KIND=V,V,...` taken apart; a value with a comma stands in double quotes.

    Raises:
        ConfigError: an unknown kind, no value, or a value of the wrong type.
    """
    kind, _, rest = text.partition("=")
    return make_axis(kind.strip(), split_values(rest))


def split_values(text: str) -> list[str]:
    """Values between commas, blanks around them dropped; double quotes keep a comma."""
    rows = csv.reader(text.splitlines(), skipinitialspace=True)
    return [value.strip() for row in rows for value in row if value.strip()]


def make_axis(kind: str, values: Sequence[Value]) -> Axis:
    """An axis of checked values.

    Raises:
        ConfigError: as in `axis_of`.
    """
    if kind not in KINDS:
        raise ConfigError(f"A grid cannot vary {kind!r}; it can vary {', '.join(sorted(KINDS))}.")
    if not values:
        raise ConfigError(f"The {kind} of a grid needs values, as in {kind}={_EXAMPLES[kind]}.")
    return Axis(kind, tuple(_checked(kind, value) for value in values))


_EXAMPLES = {
    "strength": "0,0.5,1",
    "checkpoint": "a.safetensors,b.safetensors",
    "seed": "1,2,3",
    "prompt": '"an owl, sitting","a dog"',
    "rank": "1,4,16",
}


def _checked(kind: str, value: Value) -> Value:
    if kind in ("prompt", "checkpoint"):
        return str(value)
    try:
        number = float(value) if kind == "strength" else int(value)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"The {kind} {value!r} of a grid is not a number.") from error
    lowest, highest = {"strength": (-100, 100), "seed": (0, LARGEST_SEED), "rank": (1, LARGEST_RANK)}[kind]
    if not (math.isfinite(number) and lowest <= number <= highest):
        raise ConfigError(
            f"The {kind} {value} of a grid is out of range; it goes from {lowest} to {highest}."
        )
    return number


def grid_requests(
    shot: GenerationRequest, rows: Axis | None, columns: Axis | None
) -> list[list[GenerationRequest]]:
    """The pictures of a grid, row by row.

    Raises:
        ConfigError: rows and columns vary the same, there are too many pictures, or no adapter to vary.
    """
    if rows is not None and columns is not None and rows.kind == columns.kind:
        raise ConfigError(f"Rows and columns both vary the {rows.kind}; choose another for one of them.")
    down = rows.values if rows else (None,)
    across = columns.values if columns else (None,)
    if len(down) * len(across) > MOST_CELLS:
        raise ConfigError(
            f"A grid of {len(down)} by {len(across)} is {len(down) * len(across)} pictures; at most"
            f" {MOST_CELLS} are drawn."
        )

    def cell(row: Value | None, column: Value | None) -> GenerationRequest:
        changes = {axis.kind: v for axis, v in ((rows, row), (columns, column)) if axis and v is not None}
        made = shot
        for kind in KINDS:
            if kind in changes:
                made = made.at(kind, changes[kind])
        return made

    return [[cell(row, column) for column in across] for row in down]


def grid_settings(rows: Axis | None, columns: Axis | None) -> dict[str, str]:
    """What a sheet's PNG says of its axes, beside the settings of its pictures."""
    said = {"Rows": rows, "Columns": columns}
    return {"Script": "Grid", **{name: axis.text() for name, axis in said.items() if axis}}
