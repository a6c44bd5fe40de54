"""Grids: images that differ in one or two things, the axes that say in what, and the labelled sheet.

Nothing here imports torch, and Pillow only what draws.
"""

import csv
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_core.errors import ConfigError
from lora_core.generate.request import LARGEST_SEED, GenerationRequest, WeightedLora

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

    Font = FreeTypeFont | ImageFont

Value = str | int | float
MOST_CELLS = 400
LARGEST_RANK = 4096
KINDS = ("checkpoint", "prompt", "seed", "strength", "rank")
"""What a grid can vary, applied in this order: strengths and ranks are those of a checkpoint."""


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
            return [WeightedLora(str(value)).name for value in self.values]
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


def vary(request: GenerationRequest, kind: str, to: Value) -> GenerationRequest:
    """The image with one thing changed.

    A strength is that of the only adapter; with several it multiplies all, so that 1 is the mix as set. A
    rank truncates all. A checkpoint replaces the first adapter.

    Raises:
        ConfigError: a strength or a rank without an adapter.
    """
    value: Any = to
    loras = request.loras
    if kind in ("strength", "rank") and not loras:
        raise ConfigError(f"A {kind} needs a LoRA; add one first.")
    if kind == "checkpoint":
        first = replace(loras[0], file=value) if loras else WeightedLora(value)
        return replace(request, loras=(first, *loras[1:]))
    if kind == "rank":
        return replace(request, loras=tuple(replace(lora, rank=value) for lora in loras))
    if kind != "strength":
        return replace(request, **{kind: value})
    if len(loras) > 1:
        return replace(request, loras=tuple(lora.times(value) for lora in loras))
    (lora,) = loras
    if value == lora.strength:
        return request
    text = lora.text_strength
    if text is not None:
        text = text * value / lora.strength if lora.strength else value
    return replace(request, loras=(replace(lora, strength=value, text_strength=text),))


def grid_requests(
    request: GenerationRequest, rows: Axis | None, columns: Axis | None
) -> list[list[GenerationRequest]]:
    """The images of a grid, row by row.

    Raises:
        ConfigError: both axes vary the same, too many cells, or no adapter to vary.
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
                changed = vary(changed, kind, changes[kind])
        return changed

    return [[cell(row, column) for column in across] for row in down]


def grid_settings(rows: Axis | None, columns: Axis | None) -> dict[str, str]:
    """The axes, for the infotext of a grid."""
    axes = {"Rows": rows, "Columns": columns}
    return {"Script": "Grid", **{name: axis.text() for name, axis in axes.items() if axis}}


GAP = 8
MOST_LINES, MOST_LETTERS = 4, 400
PAPER, INK = "#ffffff", "#1f1c18"
ELLIPSIS = "..."
"""Three dots, as not every build of Pillow's font has the single character."""


def make_image_grid(
    images: Sequence[Sequence["Image | None"]], rows: Sequence[str], columns: Sequence[str]
) -> "Image":
    """The images in a grid, RGB, none of them scaled, with labels in Pillow's own font.

    Args:
        images: row by row; None leaves a blank cell.
        rows: labels left of the rows; none for no labels.
        columns: labels above the columns; none for no labels.
    """
    from PIL import Image, ImageDraw, ImageFont

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


def _wrap(label: str, width: int, font: "Font") -> list[str]:
    """A label in at most `MOST_LINES` lines of at most `width` pixels; the rest is cut off."""
    from PIL.ImageFont import FreeTypeFont

    text = "".join(c for c in " ".join(label[:MOST_LETTERS].split()) if c.isprintable())
    if not isinstance(font, FreeTypeFont):
        # Without FreeType, Pillow has a font of Latin letters only.
        text = text.encode("ascii", "replace").decode()
    average = _width(text, font) / max(1, len(text))
    for count in range(min(len(text), int(1.5 * width / average)) + len(ELLIPSIS), len(ELLIPSIS) - 1, -1):
        lines = textwrap.wrap(text, count, max_lines=MOST_LINES, placeholder=ELLIPSIS)
        if all(_width(line, font) <= width for line in lines):
            return lines
    return []


def _width(text: str, font: "Font") -> int:
    return int(font.getlength(text)) + 1
