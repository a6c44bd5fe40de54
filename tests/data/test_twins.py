"""What looks the same and what does not."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance

from lora_core.data.near_duplicates import (
    are_near_duplicates,
    compute_fingerprint,
    compute_fingerprints,
    group_near_duplicates,
)
from tests.data.conftest import Draw, noise


def disc(colour: str, x: int = 64) -> Image.Image:
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).ellipse((x - 40, 24, x + 40, 104), fill=colour)
    return image


def test_copies_are_alike() -> None:
    for seed in range(10):
        image = noise(256, 192, seed)
        for copy in (image.resize((100, 75)), ImageEnhance.Brightness(image).enhance(0.95)):
            assert are_near_duplicates(compute_fingerprint(image), compute_fingerprint(copy))


def test_others_are_not() -> None:
    prints = [compute_fingerprint(noise(256, 192, seed)) for seed in range(40)]
    assert group_near_duplicates([*prints]) == list(range(40))


def test_one_shape_in_two_colours_is_two_pictures() -> None:
    assert not are_near_duplicates(compute_fingerprint(disc("red")), compute_fingerprint(disc("green")))
    assert are_near_duplicates(
        compute_fingerprint(disc("red")), compute_fingerprint(disc("red").resize((90, 90)))
    )


def test_groups_join_twins_of_twins(tmp_path: Path, draw: Draw) -> None:
    paths = [
        draw(tmp_path / "a.png", seed=1),
        draw(tmp_path / "b.png", seed=2),
        draw(tmp_path / "c.png", (128, 96), seed=1),
        tmp_path / "missing.png",
        draw(tmp_path / "d.png", (200, 150), seed=1),
        tmp_path / "missing too.png",
    ]
    assert group_near_duplicates(compute_fingerprints(paths)) == [0, 1, 0, 3, 0, 5]
    assert group_near_duplicates([]) == []
