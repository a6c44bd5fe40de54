"""Odd but legal pictures give the right pixels; broken ones give a sentence that names them.

Golden colours: each follows from how its file was written here, with the arithmetic beside it.
"""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_core.data.dataset import scan
from lora_core.data.images import (
    FileProblem,
    ImageInfo,
    SizeCache,
    check_image,
    hash_file,
    make_thumbnail,
    open_rgb,
    to_rgb,
)
from lora_core.errors import DatasetError

ORIENTATION = 0x0112


def png(
    width: int, height: int, bits: int, colour_type: int, rows: bytes, *chunks: tuple[bytes, bytes]
) -> bytes:
    """A PNG written by hand; `rows` are the rows of pixels, each after a filter byte 0."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    body = b"".join(chunk(*one) for one in chunks)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + data + chunk(b"IEND", b"")


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    # 0x8080 = 128 * 257, so 128 of 255.
    (tmp_path / "a.png").write_bytes(png(2, 1, 16, 0, b"\x00" + struct.pack(">HH", 0x8080, 65535)))
    assert list(open_rgb(tmp_path / "a.png").get_flattened_data()) == [(128, 128, 128), (255, 255, 255)]


def test_16_bit_colour(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1, 1, 16, 2, b"\x00" + struct.pack(">HHH", 65535, 0x4040, 0)))
    assert open_rgb(tmp_path / "a.png").getpixel((0, 0)) == (255, 64, 0)


@pytest.mark.parametrize(
    ("values", "mode", "grey"),
    [
        (np.array([[0, 257 * 100, 65535]], np.uint16), "I;16", [0, 100, 255]),
        (np.array([[0, 257 * 100, 65535]], np.int32), "I", [0, 100, 255]),
        # 32 bits: 2^31 - 1 of 2^32 - 1 is just under a half.
        (np.array([[0, 2**31 - 1]], np.int32), "I", [0, 127]),
        (np.array([[0.0, 0.4, 1.0, np.nan]], np.float32), "F", [0, 102, 255, 0]),
        (np.array([[0.0, 102.0, 255.0]], np.float32), "F", [0, 102, 255]),
    ],
)
def test_wide_values(values: np.ndarray, mode: str, grey: list[int]) -> None:
    image = Image.fromarray(values)
    assert image.mode == mode
    assert [pixel[0] for pixel in to_rgb(image).get_flattened_data()] == grey


def test_cmyk(tmp_path: Path) -> None:
    # Ink for green: cyan and yellow full, magenta and black none.
    Image.new("CMYK", (16, 16), (255, 0, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert np.allclose(open_rgb(tmp_path / "a.jpg").getpixel((8, 8)), (0, 255, 0), atol=2)


def test_palette_with_a_transparent_entry(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 0, 0, 0])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=1)
    assert list(open_rgb(tmp_path / "a.png").get_flattened_data()) == [(200, 10, 20), (255, 255, 255)]


def test_palette_without_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (1, 1))
    image.putpalette([200, 10, 20])
    image.save(tmp_path / "a.gif")
    assert open_rgb(tmp_path / "a.gif").getpixel((0, 0)) == (200, 10, 20)


@pytest.mark.parametrize(("mode", "value", "grey"), [("L", 77, 77), ("1", 1, 255), ("1", 0, 0)])
def test_grey_and_one_bit(tmp_path: Path, mode: str, value: int, grey: int) -> None:
    Image.new(mode, (3, 3), value).save(tmp_path / "a.png")
    assert open_rgb(tmp_path / "a.png").getpixel((1, 1)) == (grey, grey, grey)


@pytest.mark.parametrize(
    ("mode", "value", "colour"),
    [
        # Over white: 0.2 * value + 0.8 * 255, as alpha 51 is a fifth.
        ("RGBA", (255, 0, 100, 51), (255, 204, 224)),
        ("RGBA", (1, 2, 3, 0), (255, 255, 255)),
        ("LA", (0, 51), (204, 204, 204)),
    ],
)
def test_alpha_is_laid_on_white(
    tmp_path: Path, mode: str, value: tuple[int, ...], colour: tuple[int, int, int]
) -> None:
    Image.new(mode, (2, 2), value).save(tmp_path / "a.png")
    assert open_rgb(tmp_path / "a.png").getpixel((0, 0)) == colour


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_first_frame_of_an_animation(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100, **options)
    assert open_rgb(tmp_path / name).getpixel((10, 10)) == (255, 0, 0)
    known = SizeCache(tmp_path / "sizes.json")
    assert known.info(tmp_path / name, name) == ImageInfo(20, 20, False, True)
    known.save(tmp_path)
    assert SizeCache(tmp_path / "sizes.json").info(tmp_path / name, name) == ImageInfo(20, 20, False, True)
    (note,) = (note for note in scan(tmp_path).notes if note.kind == "animated")
    assert note.sentence == f"{name} is animated; only its first frame is trained on."


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "heic", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, ending: str, orientation: int) -> None:
    """Red is the top left corner of the stored picture; EXIF says where that corner belongs (Exif 2.3,
    0x0112)."""
    stored = Image.new("RGB", (64, 32), "white")
    stored.paste((255, 0, 0), (0, 0, 32, 16))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    # As bytes: pillow-heif writes its own mark of rotation from bytes only, as phones do.
    stored.save(tmp_path / f"a.{ending}", exif=exif.tobytes())

    upright = open_rgb(tmp_path / f"a.{ending}")

    corners = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}
    wanted = (32, 64) if orientation > 4 else (64, 32)
    width, height = upright.size
    x = width // 8 if "l" in corners[orientation] else width * 7 // 8
    y = height // 8 if "t" in corners[orientation] else height * 7 // 8
    red, green, blue = upright.getpixel((x, y))
    assert upright.size == check_image(tmp_path / f"a.{ending}", "a")[:2] == wanted
    assert red > 200
    assert green < 60
    assert blue < 60


@pytest.mark.parametrize("ending", ["webp", "heic", "avif", "bmp", "ppm", "tga", "jp2"])
def test_other_formats(tmp_path: Path, ending: str) -> None:
    Image.new("RGB", (32, 32), (200, 100, 50)).save(tmp_path / f"a.{ending}")
    assert np.allclose(open_rgb(tmp_path / f"a.{ending}").getpixel((16, 16)), (200, 100, 50), atol=6)


def test_name_with_spaces_and_accents(tmp_path: Path) -> None:
    path = tmp_path / "ein Bär, 熊.png"
    Image.new("RGB", (16, 16), "red").save(path)
    assert open_rgb(path).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_reason_to_refuse(tmp_path: Path) -> None:
    Image.new("RGB", (32, 16)).save(
        tmp_path / "a.jpg", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12"
    )
    assert open_rgb(tmp_path / "a.jpg").size == (32, 16)


def cut(image: Image.Image, kind: str, share: float) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()[: int(buffer.tell() * share)]


NOISE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
BROKEN = {
    "text.png": (b"this is a shopping list\n", "is not an image"),
    "empty.jpg": (b"", "is empty"),
    "head.png": (b"\x89PNG\r\n\x1a\n", "damaged|not an image"),
    "cut.jpg": (cut(NOISE, "JPEG", 0.5), "damaged or cut short"),
    "cut.png": (cut(NOISE, "PNG", 0.5), "damaged or cut short"),
    "cut.webp": (cut(NOISE, "WEBP", 0.5), "damaged or cut short|not an image"),
    "cut.gif": (cut(NOISE, "GIF", 0.5), "damaged or cut short"),
    "cut.heic": (cut(NOISE, "HEIF", 0.5), "damaged or cut short|not an image"),
    "cut.avif": (cut(NOISE, "AVIF", 0.5), "damaged or cut short|not an image"),
    "cut.bmp": (cut(NOISE, "BMP", 0.5), "damaged or cut short"),
    # A PostScript program would be run by Ghostscript.
    "program.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", "is not an image"),
    # 60,000 x 60,000 pixels in 100 bytes.
    "bomb.png": (png(60_000, 60_000, 8, 2, b""), "million pixels"),
    # Between one and two times Pillow's limit, where it only warns.
    "large.png": (png(10_000, 10_000, 8, 2, b""), "million pixels"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(tmp_path: Path, name: str) -> None:
    data, words = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=words) as caught:
        open_rgb(path)
    assert str(path) in str(caught.value)
    problem = check_image(path, name)
    assert isinstance(problem, FileProblem)
    assert problem.kind == "unreadable"
    assert problem.sentence.startswith(name)
    assert problem.sentence.endswith(".")


def test_missing_file(tmp_path: Path) -> None:
    for read in (open_rgb, make_thumbnail, hash_file):
        with pytest.raises(DatasetError, match=r"a\.png cannot be opened"):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(1, 1), (15, 400), (400, 15)])
def test_tiny(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")
    problem = check_image(tmp_path / "a.png", "a.png")
    assert isinstance(problem, FileProblem)
    assert problem.kind == "tiny"
    assert f"{size[0]} x {size[1]}" in problem.sentence


def test_smallest_that_is_taken(tmp_path: Path) -> None:
    Image.new("RGB", (16, 17)).save(tmp_path / "a.png")
    assert check_image(tmp_path / "a.png", "a.png") == (16, 17, False, False, False)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_size_of_a_jpeg_is_that_of_the_file(tmp_path: Path, mode: str) -> None:
    """The check decodes JPEGs at an eighth, which must not show."""
    Image.new(mode, (1001, 333)).save(tmp_path / "a.jpg")
    assert check_image(tmp_path / "a.jpg", "a.jpg")[:2] == (1001, 333)


@pytest.mark.parametrize(
    ("name", "size", "wanted"), [("a.jpg", (1000, 500), (256, 128)), ("a.png", (64, 32), (64, 32))]
)
def test_thumbnail(tmp_path: Path, name: str, size: tuple[int, int], wanted: tuple[int, int]) -> None:
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / name)
    small = Image.open(io.BytesIO(make_thumbnail(tmp_path / name)))
    assert small.format == "WEBP"
    assert small.size == wanted
    assert np.allclose(small.convert("RGB").getpixel((5, 5)), (10, 200, 30), atol=6)


def test_content_hash(tmp_path: Path) -> None:
    """Golden value: the example "abc" of FIPS 180-2, appendix B.1."""
    (tmp_path / "a.png").write_bytes(b"abc")
    assert hash_file(tmp_path / "a.png") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
