"""Sheets: where pictures lie, and what becomes of labels."""

import numpy as np
import pytest
from PIL import Image

from lora_core.generate.grid import GAP, make_image_grid

RED, BLUE = (200, 0, 0), (0, 0, 200)


def field(colour: tuple[int, int, int], size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_pictures_lie_where_the_labels_say_and_are_not_scaled() -> None:
    noise = Image.effect_noise((64, 48), 80).convert("RGB")
    made = make_image_grid([[field(RED), field(BLUE)], [None, noise]], ["one", "two"], ["a", "b"])
    # The last column ends one gap before the edge, the last row as well.
    right, bottom = made.width - GAP, made.height - GAP
    last = made.crop((right - 64, bottom - 48, right, bottom))
    assert last.tobytes() == noise.tobytes()
    above = made.crop((right - 64, bottom - 2 * 48 - GAP, right, bottom - 48 - GAP))
    assert set(above.getdata()) == {BLUE}
    left = made.crop((right - 2 * 64 - GAP, bottom - 48, right - 64 - GAP, bottom))
    assert set(left.getdata()) == {(255, 255, 255)}


def test_without_labels_there_is_no_margin() -> None:
    assert make_image_grid([[field(RED)]], [], []).size == (64 + 2 * GAP, 48 + 2 * GAP)


def test_labels_are_drawn_inside_their_places() -> None:
    plain = make_image_grid([[field(RED)] * 3], [], ["", "", ""])
    made = make_image_grid([[field(RED)] * 3], [], ["", "strength 0.5", ""])
    assert made.height > plain.height
    ink = np.asarray(made.convert("L")) < 100
    columns = np.flatnonzero(ink[: made.height - 48 - GAP].any(axis=0))
    assert columns.min() >= GAP + 64
    assert columns.max() <= 2 * GAP + 2 * 64


@pytest.mark.parametrize(
    "label",
    [
        "word " * 400,
        "x" * 5000,
        "",
        "\u202eright to left\u200b",
        "木 😀 <img onerror=x>\n{{7*7}}",
        "\x00\x1b[",
    ],
)
def test_any_label_fits(label: str) -> None:
    made = make_image_grid([[field(RED, (128, 128))]], [label], [label])
    assert made.width < 128 + 200
    assert made.height < 128 + 200
