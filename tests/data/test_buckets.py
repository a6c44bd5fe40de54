"""Properties of buckets over many sizes, and golden values worked out by hand."""

import math

import pytest
from PIL import Image

from lora_core.data.images import Bucket, choose_bucket, crop_box, resize_and_crop, size_conditioning

SIDES = (16, 40, 64, 100, 127, 128, 200, 333, 512, 640, 768, 1024, 1500, 4000)
SIZES = [(w, h) for w in SIDES for h in SIDES]


@pytest.mark.parametrize(("resolution", "multiple"), [(128, 16), (256, 64), (512, 64), (512, 8), (1024, 64)])
def test_properties(resolution: int, multiple: int) -> None:
    for width, height in SIZES:
        bucket = choose_bucket(width, height, resolution, multiple)
        assert bucket.width % multiple == bucket.height % multiple == 0
        assert bucket.width >= multiple
        assert bucket.height >= multiple
        assert bucket.width * bucket.height <= resolution**2
        assert bucket.width <= max(width, multiple)
        assert bucket.height <= max(height, multiple)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_shape_is_the_nearest_of_all_sizes_as_large(width: int, height: int) -> None:
    """Nothing legal is at least as wide and as high and nearer to the picture's shape."""
    bucket = choose_bucket(width, height, 512, 64)

    def error(w: int, h: int) -> float:
        return abs(math.log(w / h / (width / height)))

    for w in range(bucket.width, max(width, 64) + 1, 64):
        for h in range(bucket.height, max(height, 64) + 1, 64):
            if w * h <= 512 * 512:
                assert error(bucket.width, bucket.height) <= error(w, h) + 1e-9


def test_turned_pictures_get_turned_buckets() -> None:
    for width, height in SIZES:
        one, other = choose_bucket(width, height, 512, 64), choose_bucket(height, width, 512, 64)
        assert (one.width, one.height) == (other.height, other.width)


@pytest.mark.parametrize("resolution", [64, 128, 192, 256, 512, 768, 1024])
@pytest.mark.parametrize("side", [1024, 1333, 3024])
def test_squares(resolution: int, side: int) -> None:
    assert choose_bucket(side, side, resolution, 64) == Bucket(resolution, resolution)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        # 2:3 exactly: 384 x 576 = 221,184 px of at most 262,144.
        ((2000, 3000), Bucket(384, 576)),
        # 4:3 exactly: 512 x 384.
        ((1600, 1200), Bucket(512, 384)),
        # Smaller than the resolution: not enlarged.
        ((300, 300), Bucket(256, 256)),
        # 40:1 exactly.
        ((4000, 100), Bucket(2560, 64)),
        # Shorter than the smallest side, the one case of enlarging.
        ((20, 20), Bucket(64, 64)),
    ],
)
def test_golden(size: tuple[int, int], bucket: Bucket) -> None:
    assert choose_bucket(*size, 512, 64) == bucket


def test_crop_box_is_centred_inside_and_of_the_bucket_s_shape() -> None:
    for width, height in SIZES:
        bucket = choose_bucket(width, height, 256, 64)
        left, top, right, bottom = crop_box(width, height, bucket)
        assert left >= 0
        assert top >= 0
        assert math.isclose(left, width - right, abs_tol=1e-9)
        assert math.isclose(top, height - bottom, abs_tol=1e-9)
        assert math.isclose((right - left) / (bottom - top), bucket.width / bucket.height)
        assert math.isclose(right - left, width) or math.isclose(bottom - top, height)


def test_crop_box_golden() -> None:
    """A 300 x 100 picture in a square: 100 wide in the middle."""
    assert crop_box(300, 100, Bucket(64, 64)) == (100.0, 0.0, 200.0, 100.0)


@pytest.mark.parametrize(
    ("size", "bucket", "told"),
    [
        # Scaled by 0.48 to 96 x 38.4: 6.4 px are too much, half of them at the top, 3.2.
        ((200, 80), Bucket(96, 32), (80, 200, 3, 0, 32, 96)),
        # The same turned.
        ((80, 200), Bucket(32, 96), (200, 80, 0, 3, 96, 32)),
        # Scaled by 0.64 to 192 x 64: 128 px are too much, half of them at the left.
        ((300, 100), Bucket(64, 64), (100, 300, 0, 64, 64, 64)),
        # Nothing cut off, whatever the scale.
        ((2048, 1024), Bucket(1408, 704), (1024, 2048, 0, 0, 704, 1408)),
        # Enlarged: 20 x 40 to 64 x 128, half of 64 at the top.
        ((20, 40), Bucket(64, 64), (40, 20, 32, 0, 64, 64)),
    ],
)
def test_what_a_unet_is_told_of_the_size(
    size: tuple[int, int], bucket: Bucket, told: tuple[int, ...]
) -> None:
    """Height before width, and the crop in pixels of the resized picture (Podell et al. 2023, section
    2.2)."""
    assert size_conditioning(*size, bucket) == told


def test_fit_shows_the_middle() -> None:
    image = Image.new("RGB", (300, 100), "red")
    image.paste((0, 0, 255), (100, 0, 200, 100))
    fitted = resize_and_crop(image, Bucket(64, 64))
    assert fitted.size == (64, 64)
    assert fitted.getpixel((1, 32)) == fitted.getpixel((62, 32)) == (0, 0, 255)


def test_fit_leaves_a_picture_of_the_right_size_as_it_is() -> None:
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    assert resize_and_crop(image, Bucket(64, 64)).tobytes() == image.tobytes()
