"""Image files: listed, decoded to plain RGB, and fitted to a bucket.

Files are listed in the same order on every system. A folder may come from a stranger (a clone, an unpacked
archive): links to folders are not followed, links to files count only inside the folder, and pipes, devices
and sockets are never opened.

Only the formats listed here are tried: a file's name proves nothing, and some of Pillow's other readers
start programs (EPS) or are rarely tested. Images are fully decoded, so a truncated file is found now and
not during a run. `SizeCache` remembers decoded sizes by modification time and length, which makes opening a
project of a thousand images instant; a run always decodes.

A bucket is the size that an image is trained at: about the area that the base was trained at, in the image's
aspect ratio, and never enlarged. Sides are rounded to what the model accepts; of the roundings near the ideal
size, the one that crops least is taken.
"""

import base64
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import stat
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import pillow_heif
from PIL import ExifTags, Image, ImageEnhance, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from lora_core.errors import ConfigError, DatasetError, wrap_os_errors
from lora_core.system.files import (
    clean_text,
    file_stamp,
    fold_name,
    parse_json,
    read_small_file,
    write_atomically,
)

Crop = tuple[float, float, float, float]
Given = ParamSpec("Given")
Found = TypeVar("Found")
T = TypeVar("T")


@dataclass(frozen=True)
class Concept:
    """Images with rules of their own: a folder of the dataset, or part of one.

    Attributes:
        folder: its path below the dataset folder, with forward slashes; "" is that folder itself.
        images: patterns of the names below the folder that belong to it; none where all do.
        role: one of `ROLES`.
        repeats: how often each image is shown in an epoch.
        share: the part of the looks that it gets, beside the shares of the other concepts; 0 where repeats
            count.
        class_tokens: the caption of images without one.
        prefix, suffix: texts around each caption.
        rules: settings of the section `dataset` that it has in place of the run's.
        number: its place in `dataset.toml`, from 1; 0 where it comes from a folder's name alone.
    """

    name: str
    folder: str = ""
    images: tuple[str, ...] = ()
    role: str = "subject"
    repeats: int = 1
    share: float = 0.0
    class_tokens: str = ""
    caption_extension: str = ""
    prefix: str = ""
    suffix: str = ""
    rules: tuple[tuple[str, Any], ...] = ()
    number: int = 0


ROLES = ("subject", "style", "regularisation")
"""The role of a concept's images: the subject, a style, or regularisation by the subject's class."""


@dataclass(frozen=True)
class ImageRecord:
    """One usable image.

    Width and height are in pixels after EXIF rotation, and of the crop where there is one: `crop` is the part
    that the user chose to train on, left, top, right and bottom as shares of the sides. The caption holds one
    alternative a line. `repeats` is how often the image is shown in an epoch. `held_out` says that it was
    chosen to measure on, `transparent` that parts of it are transparent, `animated` that it has more frames,
    of which the first is trained on. `mask` is the file that says which parts of it count: white ones in
    full, black ones `outside` of that. `background` is the colour that it is laid on. An image for
    regularisation (`reg`) shows the class without the subject; `weight` multiplies its loss. `concept` has
    the rules that `dataset.toml` gives it; None without such a file. `focus` is the point that stays in sight
    however it is cropped, across and down in pixels; None for its middle.
    """

    path: Path
    width: int
    height: int
    caption: str
    repeats: int = 1
    held_out: bool = False
    transparent: bool = False
    animated: bool = False
    crop: Crop | None = None
    mask: Path | None = None
    outside: float = 1.0
    background: str = "white"
    reg: bool = False
    weight: float = 1.0
    concept: Concept | None = None
    focus: tuple[float, float] | None = None

    @functools.cached_property
    def digest(self) -> str:
        """`hash_file` of the image as it was when this was first asked for."""
        return hash_file(self.path)

    @property
    def full_caption(self) -> str:
        """The caption as it is trained on: with its concept's prefix and suffix around each line.

        Source: kohya-ss/sd-scripts, library/train_util.py, `process_caption`.
        """
        concept = self.concept
        if concept is None or not (concept.prefix or concept.suffix):
            return self.caption
        lines = [line.strip() for line in self.caption.splitlines() if line.strip()] or [""]
        parts = ((concept.prefix, line, concept.suffix) for line in lines)
        return "\n".join(" ".join(filter(None, part)) for part in parts)

    @property
    def own_background(self) -> list[str]:
        """The background where it shows and is not the usual one."""
        return [self.background] if self.transparent and self.background != "white" else []


@dataclass(frozen=True)
class FileProblem:
    """A file that cannot be used, or is not used: `kind` for programs, `sentence` for users.

    `blocking` says that training refuses the dataset because of it.
    """

    path: Path
    kind: str
    sentence: str
    blocking: bool = True


@dataclass(frozen=True)
class Dataset:
    """The usable images in order of path, problems of the rest, notes on unused files, the images for
    regularisation, and those that `dataset.toml` leaves out, which are `loose`; `root` is their folder."""

    records: list[ImageRecord]
    problems: list[FileProblem]
    notes: list[FileProblem] = field(default_factory=list)
    reg: list[ImageRecord] = field(default_factory=list)
    loose: list[ImageRecord] = field(default_factory=list)
    root: Path | None = field(default=None, compare=False)


def remember_latest(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """Cache the function's newest result, which a window asks for repeatedly. Arguments must never change;
    identical lists are not compared, however long."""
    latest: tuple[Any, Found] | None = None

    @functools.wraps(function)
    def remembered(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        nonlocal latest
        known, given = latest, (args, kwargs)
        if known is None or known[0] != given:
            known = latest = (given, function(*args, **kwargs))
        return known[1]

    return remembered


MOST_DEPTH = 20
"""Folders in one another; deeper ones are refused."""
_LEFT_BEHIND = frozenset({"__macosx", "thumbs.db", "desktop.ini"})
CROP_LIST = "crops.json"
HOLDOUT_LIST = "held_out.txt"
CONCEPT_LIST = "dataset.toml"
MASK_ENDINGS = ("-masklabel", "-condlabel")
"""Files that accompany an image: its mask, and OneTrainer's conditioning image, which is not used."""
MASK_OF = ("_mask", "-mask", ".mask")
"""Of masks, if an image with the rest of the name exists; else the file is an image itself."""
_MASK_FOLDER = re.compile(r"masks?")
_IMAGES = r"[ _-]?(images?|imgs?|pictures|data|set)"
_REGULARISATION = re.compile(rf"(regs?|regulari[sz]ation)({_IMAGES})?|class{_IMAGES}")
_SHOWN_NAMES = 5
_SHAPES_APART = 0.01
_HUE = 0.1
"""Turns of the hue where the other colours vary by their full range: a tenth of the circle, 36 degrees."""
_LOOK = "; check that it is there and may be read."


def is_junk(name: str) -> bool:
    """A hidden file or folder, or one that a system leaves behind."""
    return (name.startswith(".") and name.strip(".") != "") or fold_name(name) in _LEFT_BEHIND


def is_mask(path: Path) -> bool:
    """A mask of another image by its own name (`cat-masklabel.png` of `cat.png`)."""
    return fold_name(path.stem).endswith(MASK_ENDINGS)


def index_images(names: Iterable[tuple[T, str]]) -> dict[str, list[T]]:
    """Images by their names without suffix, for `mask_owners`."""
    images: dict[str, list[T]] = {}
    for image, name in names:
        where = fold_name(name)
        for key in {where, f"*/{where.rpartition('/')[2]}"}:
            images.setdefault(key, []).append(image)
    return images


def mask_owners(images: Mapping[str, list[T]], name: str) -> list[T]:
    """The images of a mask, by its name without suffix: of that name without the ending and the `mask`
    folder, wherever there is one image alone of that name."""
    *folders, stem = fold_name(name).split("/")
    above = [part for part in folders if folder_kind(f"{part}/") != "mask"]
    stems = [stem.removesuffix(ending) for ending in ("", MASK_ENDINGS[0], *MASK_OF)]
    owners = next((own for one in stems if (own := images.get("/".join([*above, one])))), [])
    if not owners and len(above) < len(folders):
        owners = next((own for one in stems if len(own := images.get(f"*/{one}", [])) == 1), [])
    return owners


def folder_kind(shown: str) -> str:
    """ "mask" or "regularisation" for a file in a folder of such images, else ""; `shown` is its path below
    the dataset folder, with forward slashes."""
    return _kind_of_folder(shown.rpartition("/")[0])


@functools.lru_cache(maxsize=1000)
def _kind_of_folder(folder: str) -> str:
    for part in fold_name(folder).split("/"):
        if _REGULARISATION.fullmatch(part):
            return "regularisation"
        if _MASK_FOLDER.fullmatch(part):
            return "mask"
    return ""


def check_regular_file(path: Path, shown: str, most: int) -> int:
    """Bytes of a regular file that may be opened.

    Args:
        path: the file; a link is followed.
        shown: how to name it in a message.
        most: more bytes than this are refused.

    Raises:
        DatasetError: it is missing, a pipe, a device, a socket or a folder, or larger than `most`.
    """
    with wrap_os_errors(
        DatasetError, f"{shown} cannot be opened", "; check that it is there and may be read."
    ):
        found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise DatasetError(f"{shown} is not a regular file (a pipe, device, socket or folder); remove it.")
    if found.st_size > most:
        raise DatasetError(f"{shown} is larger than {most / 1e6:.0f} MB; make it smaller or remove it.")
    return found.st_size


def walk_files(root: Path, may_lead_out: Container[str] = ()) -> Iterator[Path | FileProblem]:
    """All regular files below a folder that are not hidden, sorted; a problem for everything else.

    Two kinds do not block: a link to a folder that is inside (its files are found there), and how many hidden
    files there are.

    Args:
        root: the folder; it may be a link itself.
        may_lead_out: suffixes, in lower case, of files that may be links to files elsewhere.
    """
    real = Path(os.path.realpath(root))
    hidden: list[str] = []
    yield from _walk_folder(root, "", (real, may_lead_out), hidden)
    if hidden:
        what = "hidden file or folder is" if len(hidden) == 1 else "hidden files or folders are"
        sentence = f"{len(hidden)} {what} not looked at ({abbreviate(hidden)})."
        yield FileProblem(root, "hidden", sentence, False)


def abbreviate(names: list[str], most: int = _SHOWN_NAMES) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:most])
    more = len(names) - most
    return f"{shown} and {more} more" if more > 0 else shown


def _walk_folder(
    folder: Path, above: str, bounds: tuple[Path, Container[str]], hidden: list[str]
) -> Iterator[Path | FileProblem]:
    """The files of a folder; `above` is its path below the root, empty or ending with a slash."""
    try:
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: (fold_name(entry.name), entry.name))
    except OSError as error:
        sentence = f"The folder {folder} cannot be listed ({error.strerror}); check that it may be read."
        yield FileProblem(folder, "unreadable", clean_text(sentence))
        return
    for entry in entries:
        path, shown = folder / entry.name, clean_text(above + entry.name)
        if is_junk(entry.name):
            hidden.append(shown)
        elif clean_text(entry.name) != entry.name:
            yield FileProblem(path, "name", f"The name of {shown} is not UTF-8; rename it.")
        elif entry.is_file(follow_symlinks=False):
            # From the folder's entries: a `stat` of each file takes most of the time of listing many.
            yield path
        elif not os.path.isdir(path):
            yield _check_file(path, shown, *bounds)
        elif entry.is_symlink() or getattr(os.path, "isjunction", lambda _: False)(path):
            yield _check_folder_link(path, shown, bounds[0])
        elif shown.count("/") + 1 > MOST_DEPTH:
            sentence = f"The folder {shown} is more than {MOST_DEPTH} folders deep; move it further up."
            yield FileProblem(path, "deep", sentence)
        else:
            yield from _walk_folder(path, f"{shown}/", bounds, hidden)


def _check_file(path: Path, shown: str, real: Path, may_lead_out: Container[str]) -> Path | FileProblem:
    try:
        found = path.stat()
    except OSError as error:
        sentence = f"{shown} cannot be opened: {error.strerror}{_LOOK}"
        return FileProblem(path, "unreadable", sentence)
    if not stat.S_ISREG(found.st_mode):
        return FileProblem(path, "no file", f"{shown} is a pipe, a device or a socket; remove it.")
    if path.is_symlink() and path.suffix.casefold() not in may_lead_out and not _is_inside(path, real):
        sentence = f"{shown} is a link to a file outside of the folder; put a copy of the file there."
        return FileProblem(path, "link", sentence)
    return path


def _check_folder_link(path: Path, shown: str, real: Path) -> FileProblem:
    if _is_inside(path, real):
        sentence = f"{shown} is a link to a folder that is listed already; it is not followed."
        return FileProblem(path, "link", sentence, False)
    sentence = f"{shown} is a link to a folder elsewhere, which is not followed; put the folder itself there."
    return FileProblem(path, "link", sentence)


def _is_inside(path: Path, real: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(real)


# Decoding.

# What phones call MPO is opened as JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "HEIF", "AVIF", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000")
# In others, further frames are a thumbnail, a depth map or a gain map.
ANIMATED = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")
_ENDINGS = (
    "png apng jpg jpeg jpe jfif mpo webp heic heif hif avif gif bmp dib tif tiff ppm pgm pbm pnm tga jp2"
)
IMAGE_SUFFIXES = frozenset(f".{ending}" for ending in _ENDINGS.split())
MIN_SIDE = 16
MAX_FILE_BYTES = 500_000_000
"""Of one image file."""
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485

# The turn that brings an image upright, by its EXIF orientation (Exif 2.3, tag 0x0112).
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = frozenset({5, 6, 7, 8})

pillow_heif.register_heif_opener()
# Pillow only warns between one and two times its limit; here both are refused. Set once for the process,
# because the standard library's way to catch warnings for a moment is not safe among threads.
warnings.simplefilter("error", Image.DecompressionBombWarning)
# A damaged EXIF block says nothing about the pixels.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


class ImageInfo(NamedTuple):
    """Facts of a decoded image: its upright size in pixels, whether any pixel is transparent, whether it has
    more than one frame, and whether a mask is all black."""

    width: int
    height: int
    transparent: bool
    animated: bool = False
    black: bool = False


def open_rgb(path: Path, least: int | None = None, background: str = "white") -> Image.Image:
    """The image as 8-bit RGB, upright.

    16-bit values are scaled, transparency is laid on the colour `background`, and of an animation the first
    frame is taken. It may be shrunk to sides of at least `least` pixels: JPEGs are reduced while decoding,
    several times faster.

    Raises:
        DatasetError: the file is not an image, is damaged, or has too many pixels; names the file.
    """
    with _load_image(path, str(path), least) as (image, _):
        return _apply_orientation(to_rgb(image, background), _orientation(image))


def mask_file(record: ImageRecord) -> Path:
    """The file beside an image that its mask is written to."""
    return record.path.with_name(f"{record.path.stem}{MASK_ENDINGS[0]}.png")


def open_mask(record: ImageRecord) -> Image.Image:
    """The mask of an image as 8-bit grey, upright and cut to its crop: the brightness of a file on black, or
    the opacity of the image itself.

    Raises:
        DatasetError: as `open_rgb`.
    """
    assert record.mask is not None
    with _load_image(record.mask, str(record.mask)) as (image, _):
        opacity = record.mask == record.path
        mask = _opacity(image) if opacity else to_rgb(image, "black").convert("L")
        mask = _apply_orientation(mask, _orientation(image))
        return mask.crop(crop_pixels(record.crop, *mask.size)) if record.crop else mask


def open_masked(path: Path, mask_path: Path) -> tuple[Image.Image, Image.Image]:
    """An image and its mask, as `open_rgb`; transparent parts of the mask are black.

    Raises:
        DatasetError: as `open_rgb`, or their shapes differ.
    """
    image, mask = open_rgb(path), open_rgb(mask_path, background="black")
    if not same_shape(mask.size, image.size):
        wide, high = mask.size
        raise DatasetError(
            f"The mask {mask_path} has {wide} x {high} pixels, and its image {path.name} {image.width} x"
            f" {image.height}; give it the shape of its image."
        )
    return image, mask


def crop_pixels(crop: Crop, width: int, height: int) -> tuple[int, int, int, int]:
    """The edges of a crop in pixels of an image of this size."""
    left, top, right, bottom = crop
    return round(left * width), round(top * height), round(right * width), round(bottom * height)


def open_image(record: ImageRecord, least: int | None = None) -> Image.Image:
    """As `open_rgb`, cut to the crop of the image."""
    if record.crop is None:
        return open_rgb(record.path, least, record.background)
    left, top, right, bottom = record.crop
    least = least and math.ceil(least / min(right - left, bottom - top))
    whole = open_rgb(record.path, least, record.background)
    return whole.crop(crop_pixels(record.crop, *whole.size))


def check_mask_png(png: str, image: "ImageInfo | FileProblem", shown: str) -> bytes:
    """A mask that was painted, in base64, as the bytes of a grey PNG.

    Raises:
        DatasetError: it is not a PNG of the image's shape, or black everywhere; names the image as `shown`.
    """
    try:
        with Image.open(io.BytesIO(base64.b64decode(png, validate=True)), formats=["PNG"]) as opened:
            if isinstance(image, FileProblem) or not same_shape(opened.size, (image.width, image.height)):
                raise DatasetError(
                    f"The mask of {shown} does not have the shape of its image; paint it again."
                )
            mask = to_rgb(opened, "black").convert("L")
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(f"The mask of {shown} is not a PNG in base64.") from error
    if mask.getbbox() is None:
        raise DatasetError(f"The mask of {shown} is black everywhere; paint what counts, or remove it.")
    return encode_file(mask, "PNG", optimize=True)


def same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes have the same aspect ratio, but for rounding and 1%."""
    high = one[0] * other[1] / other[0]
    return abs(one[1] - high) <= max(1.0, _SHAPES_APART * high)


def make_thumbnail(path: Path, side: int = 256, mask: bool | None = None) -> bytes:
    """A WebP of the image that fits into a square of `side` pixels; of a mask on black, as it counts. Without
    `mask`, the file's name tells whether it is one.

    Raises:
        DatasetError: as `open_rgb`.
    """
    if mask is None:
        named = fold_name(path.stem).endswith((*MASK_ENDINGS, *MASK_OF))
        mask = named or _MASK_FOLDER.fullmatch(fold_name(path.parent.name)) is not None
    small = open_rgb(path, side, "black" if mask else "white")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return encode_file(small, "WEBP", quality=80, method=2)


def encode_file(image: Image.Image, kind: str, **how: Any) -> bytes:
    """The file of an image, in memory; `how` are options of Pillow's writer."""
    data = io.BytesIO()
    image.save(data, kind, **how)
    return data.getvalue()


def save_png(image: Image.Image, path: Path, parameters: str) -> None:
    """Write a PNG with its settings inside, completely or not at all.

    Raises:
        ConfigError: it cannot be written there.
    """
    info = PngInfo()
    info.add_text("parameters", parameters)
    data = encode_file(image, "PNG", pnginfo=info)
    with wrap_os_errors(ConfigError, f"The image cannot be written to {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)


def hash_file(path: Path, most: int = sys.maxsize) -> str:
    """SHA-256 of the file's bytes, in hex: the key of everything that is cached for it; more than `most`
    bytes are refused.

    Raises:
        DatasetError: the file cannot be read, is not a regular file, or is too large.
    """
    check_regular_file(path, str(path), most)
    with wrap_os_errors(DatasetError, f"{path} cannot be opened", _LOOK), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_image(path: Path, shown: str, mask: bool = False) -> ImageInfo | FileProblem:
    """The facts of an image or a mask, after decoding the full file, or its problem, which names it as
    `shown`."""
    try:
        with _load_image(path, shown, 1) as (image, stated):
            # Decoding may change the size: a JPEG is shrunk on purpose, a TIFF is turned upright by Pillow.
            width, height = stated if image.format in ("JPEG", "MPO") else image.size
            if _orientation(image) in _SIDEWAYS:
                width, height = height, width
            animated = image.format in ANIMATED and bool(getattr(image, "is_animated", False))
            black = mask and to_rgb(image, "black").getbbox() is None
            info = ImageInfo(width, height, _is_transparent(image), animated, black)
    except DatasetError as error:
        return FileProblem(path, "unreadable", str(error))
    if min(width, height) >= MIN_SIDE:
        return info
    advice = f"remove it or use a copy with sides of {MIN_SIDE} or more"
    return FileProblem(path, "tiny", f"{shown} is only {width} x {height} pixels; {advice}.")


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """A decoded image of any mode as 8-bit RGB, on a colour that Pillow knows by name."""
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bit(image).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        behind = Image.new("RGBA", rgba.size, background)
        return Image.alpha_composite(behind, rgba).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _is_transparent(image: Image.Image) -> bool:
    """Whether a decoded image has a pixel that `to_rgb` lays on a background."""
    return image.has_transparency_data and bool(np.asarray(_opacity(image)).min() < 255)


def _opacity(image: Image.Image) -> Image.Image:
    """The alpha channel of a decoded image."""
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA").getchannel("A")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or of floats, as 8-bit grey; Pillow's own conversion would clip at 255."""
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        top = next((t for t in (1.0, 255.0, 65535.0) if values.max() <= t), float(values.max()))
    elif image.mode == "I" and (values.max() > 65535 or values.min() < 0):
        values = values.astype(np.int32).view(np.uint32)
        top = 2.0**32 - 1
    else:
        top = 65535.0
    scaled = np.clip(values.astype(np.float64) * (255.0 / top), 0, 255)
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; 1 where there is none or where the EXIF block is damaged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error, UserWarning):
        return 1
    return value if isinstance(value, int) else 1


def _apply_orientation(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


@contextmanager
def _load_image(
    path: Path, shown: str, least: int | None = None
) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """A decoded image, at full size or as `open_rgb`, and the size that its file states.

    Raises:
        DatasetError: as `open_rgb`; names the file as `shown`.
    """
    if not check_regular_file(path, shown, MAX_FILE_BYTES):
        raise DatasetError(f"{shown} is empty (0 bytes); copy it again from its source or remove it.")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            stated = image.size
            if least is not None:
                image.draft(None, (least, least))
            image.load()
            yield image, stated
    except Exception as error:  # a damaged file can raise anything inside a decoder
        raise DatasetError(_describe_error(shown, error)) from error


def _describe_error(shown: str, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return (
            f"{shown} has more than {MAX_PIXELS // 1_000_000} million pixels, too many to open safely; save a"
            " smaller copy of it."
        )
    if isinstance(error, UnidentifiedImageError):
        return f"{shown} is not an image despite its name; remove it, or save it as PNG or JPEG."
    if isinstance(error, OSError) and error.errno is not None:
        return f"{shown} cannot be opened: {error.strerror}{_LOOK}"
    return f"{shown} is damaged or cut short ({error}); copy it again from its source or remove it."


_Known = tuple[int, int, ImageInfo]


class SizeCache:
    """Path to modification time, bytes and decoded info; kept in a file if one is given."""

    def __init__(self, file: Path | None = None) -> None:
        """Read what `file` remembers; a broken file counts as empty."""
        self.file = file
        self._known: dict[str, _Known] = {}
        self._changed = False
        if file is not None:
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                for path, known in parse_json(read_small_file(file)).items():
                    time, length, width, height, *seen = map(int, known)
                    # Entries of earlier versions lack whether a mask is black.
                    if len(seen) == 3:
                        self._known[path] = (time, length, ImageInfo(width, height, *map(bool, seen)))

    def info(self, path: Path, shown: str, mask: bool = False) -> ImageInfo | FileProblem:
        """As `check_image`, without decoding a file that has not changed since it was decoded."""
        stamp = file_stamp(path)
        known = self._known.get(str(path))
        if stamp is not None and known is not None and known[:2] == stamp:
            return known[2]
        found = check_image(path, shown, mask)
        if stamp is not None and not isinstance(found, FileProblem):
            self._known[str(path)] = (*stamp, found)
            self._changed = True
        return found

    def carry(self, source: Path, target: Path) -> None:
        """Copies the entry of `source` to its copy."""
        known, stamp = self._known.get(str(source)), file_stamp(target)
        if known is not None and stamp is not None:
            self._known[str(target)] = (*stamp, known[2])
            self._changed = True

    def save(self, *below: Path) -> None:
        """Writes the entries, if anything is new; drops those of files that are not below one of the folders,
        where any are given."""
        if self.file is None or not self._changed:
            return
        self._changed = False
        kept = tuple(os.path.join(folder, "") for folder in below) or ""
        self._known = {path: known for path, known in dict(self._known).items() if path.startswith(kept)}
        # Without the file the images are decoded once more, nothing else.
        with contextlib.suppress(OSError):
            flat = {path: [*known[:2], *map(int, known[2])] for path, known in self._known.items()}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.file, json.dumps(flat).encode())


SETTLED = 3 * 10**9
"""Nanoseconds after which another change of a file shows in its time: FAT counts every other second."""


def stamp_files(folder: Path) -> int | None:
    """A number that changes with names, times and sizes of the files below a folder, equal in all processes;
    None if one is unreadable, or changed too recently for its next change to show."""
    rows = [(_checksum(folder), 0, 0, 0)]
    folders, now = [str(folder)], time.time_ns()
    try:
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    # Of hidden ones it counts that they are there.
                    if is_junk(entry.name):
                        rows.append((_checksum(entry), 0, 0, 0))
                        continue
                    found = entry.stat()
                    rows.append((_checksum(entry), found.st_mtime_ns, found.st_ctime_ns, found.st_size))
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
    except OSError:
        return None
    lately = any(abs(now - at) < SETTLED for row in rows for at in row[1:3])
    return None if lately else hash(frozenset(rows))


def _checksum(path: str | os.PathLike[str]) -> int:
    # Python's own hash of a text is another in each process.
    return zlib.crc32(os.fsencode(path))


@dataclass(frozen=True)
class Bucket:
    """A training size in pixels."""

    width: int
    height: int


@dataclass(frozen=True)
class Cut(Bucket):
    """A bucket that shows an image otherwise than its middle as it is.

    Attributes:
        box: the part that is shown: left, top, right and bottom, in pixels of the image.
        colours: what brightness, contrast and saturation are multiplied by, and how far the hue is turned, in
            turns; None for the image's own.
    """

    box: tuple[float, float, float, float]
    colours: tuple[float, float, float, float] | None = None


def choose_bucket(width: int, height: int, resolution: int, multiple: int) -> Bucket:
    """The size at which an image is trained.

    Its area is at most resolution^2 and its sides are multiples of `multiple`. It fits into the image, so
    that nothing is enlarged, unless a side of the image is shorter than `multiple`.

    Args:
        width, height: of the image, in pixels.
        resolution: side in pixels of a square with the largest area.
        multiple: what the sides must be divisible by, in pixels.
    """
    aspect = width / height
    area = max(resolution, multiple) ** 2
    scale = min(1.0, math.sqrt(area / (width * height)))
    most_wide, most_high = max(width, multiple), max(height, multiple)
    best = (math.inf, 0, Bucket(multiple, multiple))
    for w, h in _roundings(width * scale, height * scale, multiple):
        if w > most_wide or h > most_high or w * h > area:
            continue
        # To nine places, so that two shapes that crop the same differ by their area and not by rounding.
        error = round(abs(math.log(w / h / aspect)), 9)
        best = min(best, (error, -w * h, Bucket(w, h)), key=lambda one: one[:2])
    return best[2]


def choose_buckets(width: int, height: int, resolutions: Iterable[int], multiple: int) -> list[Bucket]:
    """The sizes at which an image is trained where there are several resolutions, the largest last: those of
    the lowest and of each that the image reaches, or comes closer to than to the next lower one.

    Args:
        width, height, multiple: as of `choose_bucket`.
        resolutions: sides in pixels of squares with the largest areas, at least one.
    """
    lower, found = 0, dict[Bucket, None]()
    for resolution in sorted(resolutions):
        if width * height > lower * resolution:
            found[choose_bucket(width, height, resolution, multiple)] = None
        lower = resolution
    return list(found)


def _roundings(width: float, height: float, multiple: int) -> Iterator[tuple[int, int]]:
    """Sizes near width x height: either side rounded down or up, the other as its shape then asks, down or
    up."""
    aspect = width / height
    for w in _down_and_up(width, multiple):
        for h in _down_and_up(w / aspect, multiple):
            yield w, h
    for h in _down_and_up(height, multiple):
        for w in _down_and_up(h * aspect, multiple):
            yield w, h


def _down_and_up(side: float, multiple: int) -> tuple[int, int]:
    down = max(1, math.floor(side / multiple + 1e-6)) * multiple
    return down, down + multiple


def crop_box(width: int, height: int, bucket: Bucket) -> tuple[float, float, float, float]:
    """The part of an image that a bucket shows: that of a `Cut`, else the largest centred one of its shape.

    Args:
        width, height: of the image, in pixels.
        bucket: the size it is trained at.

    Returns:
        Left, top, right, bottom, in pixels of the image.
    """
    if isinstance(bucket, Cut):
        return bucket.box
    scale = max(bucket.width / width, bucket.height / height)
    wide, high = min(width, bucket.width / scale), min(height, bucket.height / scale)
    left, top = (width - wide) / 2, (height - high) / 2
    return left, top, left + wide, top + high


def cut_at_focus(width: int, height: int, bucket: Bucket, focus: tuple[float, float] | None) -> Bucket:
    """A bucket that shows the part of an image around a focus point, as near to its middle as the edges
    allow; the bucket itself without one."""
    if focus is None:
        return bucket
    left, top, right, bottom = crop_box(width, height, bucket)
    wide, high = right - left, bottom - top
    left, top = (
        max(0.0, min(at - length / 2, side - length))
        for at, length, side in zip(focus, (wide, high), (width, height), strict=True)
    )
    box = (left, top, min(left + wide, width), min(top + high, height))
    return Cut(bucket.width, bucket.height, box)


def draw_cut(
    record: ImageRecord, bucket: Bucket, random_crop: float, color_aug: float, draw: random.Random
) -> Cut:
    """A bucket that shows a random part of an image, in random colours.

    Args:
        record: its focus point is in the part.
        bucket: its size.
        random_crop: the share of the sides of the largest part of its shape that is left out at most, not so
            much that an image would have to be enlarged; 0 for the part that the bucket shows.
        color_aug: how far from 1 the factors of the colours are at most; 0 for the image's own.
    """
    colours = None
    if color_aug:
        factors = [draw.uniform(1 - color_aug, 1 + color_aug) for _ in range(3)]
        colours = (factors[0], factors[1], factors[2], draw.uniform(-color_aug, color_aug) * _HUE)
    left, top, right, bottom = box = crop_box(record.width, record.height, bucket)
    if not random_crop:
        return Cut(bucket.width, bucket.height, box, colours)
    least = max(1.0 - random_crop, bucket.width / (right - left), bucket.height / (bottom - top))
    part = draw.uniform(min(1.0, least), 1.0)
    sides = ((part * (right - left), record.width), (part * (bottom - top), record.height))
    edges = []
    for number, (length, side) in enumerate(sides):
        low, high = 0.0, side - length
        if record.focus is not None:
            at = record.focus[number]
            low, high = max(low, at - length), min(high, at)
        start = draw.uniform(low, max(low, high))
        edges.append((start, min(start + length, side)))
    (left, right), (top, bottom) = edges
    return Cut(bucket.width, bucket.height, (left, top, right, bottom), colours)


def size_conditioning(
    width: int, height: int, bucket: Bucket, mirrored: bool = False
) -> tuple[int, int, int, int, int, int]:
    """SDXL's size conditioning of an image (Podell et al. 2023, section 2.2).

    Where the crop is the centred one, a mirrored image has the same numbers.

    Args:
        width, height: of the image on disk, in pixels.
        bucket: the size it is trained at.
        mirrored: whether the image is mirrored before it is cropped.

    Returns:
        Original height and width, in pixels of the image on disk; top and left of the crop, in pixels of the
        image as resized before cropping, rounded; height and width of the bucket.
    """
    left, top, right, bottom = crop_box(width, height, bucket)
    if mirrored and isinstance(bucket, Cut):
        left, right = width - right, width - left
    down, across = bucket.height / (bottom - top), bucket.width / (right - left)
    return height, width, round(top * down), round(left * across), bucket.height, bucket.width


def resize_and_crop(image: Image.Image, bucket: Bucket) -> Image.Image:
    """The image cropped by `crop_box` and resized to the bucket, in its colours."""
    box = crop_box(*image.size, bucket)
    if image.size == (bucket.width, bucket.height):
        fitted = image.copy()
    else:
        fitted = image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box)
    return vary_colours(fitted, *bucket.colours) if isinstance(bucket, Cut) and bucket.colours else fitted


def vary_colours(
    image: Image.Image, brightness: float, contrast: float, saturation: float, hue: float
) -> Image.Image:
    """An RGB image with each of the three multiplied, one after the other, and the hue turned, in turns.

    Source: torchvision.transforms.ColorJitter, which does it by the same functions of Pillow.
    """
    image = ImageEnhance.Brightness(image).enhance(brightness)
    image = ImageEnhance.Contrast(image).enhance(contrast)
    image = ImageEnhance.Color(image).enhance(saturation)
    turned, *others = image.convert("HSV").split()
    turned = turned.point([(value + round(256 * hue)) % 256 for value in range(256)])
    return Image.merge("HSV", (turned, *others)).convert("RGB")
