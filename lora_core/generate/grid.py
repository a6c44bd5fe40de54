"""Draws a labelled grid of images with Pillow's own font."""

import unicodedata
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
GAP = 8
MOST_LINES = 4
PAPER, INK = "#ffffff", "#1f1c18"
ELLIPSIS = "..."
"""Three dots, as not every build of Pillow's font has the single character."""


def make_image_grid(
    images: Sequence[Sequence[Image.Image | None]], rows: Sequence[str], columns: Sequence[str]
) -> Image.Image:
    """The images in a grid, RGB, none of them scaled.

    Args:
        images: row by row; None leaves a blank cell.
        rows: labels left of the rows; none for no labels.
        columns: labels above the columns; none for no labels.
    """
    present = [image for row in images for image in row if image is not None]
    width = max((image.width for image in present), default=64)
    height = max((image.height for image in present), default=64)
    font = ImageFont.load_default(size=max(11, min(28, width // 18 + 6)))
    line_height = int(font.getbbox("Ágj")[3]) + 3
    left = _wrap_labels(rows, max(96, min(width // 2, 320)), font)
    top = _wrap_labels(columns, width, font)
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


def _wrap_labels(labels: Sequence[str], width: int, font: Font) -> list[list[str]]:
    """Each label in at most `MOST_LINES` lines of at most `width` pixels; the rest is cut off."""
    texts = [_printable(label) for label in labels]
    if not isinstance(font, ImageFont.FreeTypeFont):
        # Without FreeType, Pillow has a font of Latin letters only.
        texts = [text.encode("ascii", "replace").decode() for text in texts]
    return [_wrap(text, width, font) for text in texts]


def _printable(label: str) -> str:
    """One line without control characters."""
    kept = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in label[:2000])
    return " ".join("".join(c for c in kept if unicodedata.category(c) not in ("Cf", "Cs", "Co")).split())


def _wrap(text: str, width: int, font: Font) -> list[str]:
    lines: list[str] = []
    rest = text
    while rest and len(lines) < MOST_LINES:
        count = _num_fitting(rest, width, font)
        if count < len(rest):
            blank = rest.rfind(" ", 1, count + 1)
            count = blank if blank > count // 3 else count
        lines.append(rest[:count].rstrip())
        rest = rest[count:].lstrip()
    if rest:
        short = lines[-1]
        while short and _width(short + ELLIPSIS, font) > width:
            short = short[:-1]
        lines[-1] = short.rstrip() + ELLIPSIS
    return lines


def _num_fitting(text: str, width: int, font: Font) -> int:
    """How many characters from the start fit, at least 1."""
    low, high = 1, min(len(text), 400)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _width(text[:middle], font) <= width else (low, middle - 1)
    return low


def _width(text: str, font: Font) -> int:
    return int(font.getlength(text)) + 1
