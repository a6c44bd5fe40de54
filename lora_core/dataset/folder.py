"""A dataset on disk: which pictures it holds, with which captions, and what is wrong with it.

Every picture is decoded once when a folder is read. That costs some milliseconds a picture, and buys that a
damaged file is named before a run starts.
"""

import posixpath
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lora_core.dataset.archive import unpack
from lora_core.dataset.by_hand import listed
from lora_core.dataset.known_sizes import Sizes
from lora_core.dataset.pictures import SUFFIXES, content_hash
from lora_core.dataset.records import Dataset, ImageRecord, Problem
from lora_core.dataset.sidecars import (
    CAPTION_SUFFIXES,
    METADATA_NAMES,
    folded,
    metadata_captions,
    read_text,
    write_caption,
)
from lora_core.dataset.walk import files_below, is_mask
from lora_core.spec.errors import DatasetError
from lora_core.spec.paths import DEMO_TRAIN

__all__ = [
    "Dataset",
    "ImageRecord",
    "Problem",
    "open_dataset",
    "require_clean",
    "scan",
    "write_caption",
]

_REPEATED = re.compile(r"([1-9]\d{0,3})_(.+)")
_SHOWN_PROBLEMS = 5
_THREADS = 4


@dataclass(frozen=True)
class _Listing:
    """The files of a folder in order, by their path relative to it: as it is, and folded."""

    root: Path
    sizes: Sizes
    exact: dict[str, Path] = field(default_factory=dict)
    folded: dict[str, Path] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    held_out: set[str] = field(default_factory=set)

    def shown(self, path: Path) -> str:
        """How a file is named in messages."""
        return path.relative_to(self.root).as_posix()

    def find(self, shown: str) -> Path | None:
        """The file of that name, whatever its case."""
        return self.exact.get(shown) or self.folded.get(folded(shown))


def scan(folder: Path, sizes: Sizes | None = None) -> Dataset:
    """Every picture below a folder with its caption, in an order that is the same on all systems.

    A caption is, in this order: the text file beside the picture, its row in the `metadata.jsonl` or `.csv`
    of the same or a higher folder, the name of a `10_name` folder. Hidden files, masks and what systems leave
    behind are not pictures. Nothing is raised for a file that is wrong; it becomes a problem.

    Args:
        folder: the dataset.
        sizes: what is known from before; without it every picture is decoded.
    """
    listing = _listing(folder, sizes or Sizes())
    tables = _tables(listing)
    pictures = [
        path for path in listing.exact.values() if path.suffix.casefold() in SUFFIXES and not is_mask(path)
    ]
    # Decoders let other threads run, and the order of the results does not depend on timing.
    with ThreadPoolExecutor(_THREADS) as threads:
        found = list(threads.map(lambda path: _record(path, listing, tables), pictures))
    records = [one for one in found if isinstance(one, ImageRecord)]
    problems = [one for one in found if isinstance(one, Problem)]
    return Dataset(records, [*listing.problems, *problems])


def open_dataset(where: str | Path, unpack_into: Path) -> Dataset:
    """The dataset that a person named.

    Args:
        where: `demo`, a folder, or a zip.
        unpack_into: where a zip is unpacked, in a folder named for its content; what is there already is used
        again.

    Raises:
        DatasetError: it does not exist, is neither, cannot be unpacked, or holds no picture file.
    """
    path = DEMO_TRAIN if str(where) == "demo" else Path(where).expanduser().absolute()
    if not path.exists():
        raise DatasetError(
            f"The dataset {where} does not exist; give a folder of pictures, a zip of one, or `demo`."
        )
    if path.is_dir():
        folder = path
    elif path.suffix.casefold() == ".zip":
        folder = unpack_into / content_hash(path)[:16]
        if not folder.is_dir():
            unpack(path, folder)
    else:
        raise DatasetError(
            f"The dataset {where} is neither a folder nor a zip; give a folder of pictures, a zip of one, or"
            " `demo`."
        )
    dataset = scan(folder)
    if not dataset.records and not any(
        problem.path.suffix.casefold() in SUFFIXES for problem in dataset.problems
    ):
        raise DatasetError(
            f"There are no pictures in {where}; put PNG, JPEG, WebP or HEIC files there, each with a .txt"
            " caption."
        )
    return dataset


def require_clean(dataset: Dataset) -> None:
    """Refuse a dataset with problems, rather than leave files out in silence.

    Raises:
        DatasetError: lists what is wrong.
    """
    sentences = [problem.sentence for problem in dataset.problems]
    more = len(sentences) - _SHOWN_PROBLEMS
    if more > 0:
        sentences = [*sentences[:_SHOWN_PROBLEMS], f"And {more} more."]
    if sentences:
        raise DatasetError(" ".join(sentences))


def _listing(root: Path, sizes: Sizes) -> _Listing:
    listing = _Listing(root, sizes)
    for found in files_below(root):
        if isinstance(found, Problem):
            listing.problems.append(found)
        else:
            listing.exact[listing.shown(found)] = found
            listing.folded.setdefault(folded(listing.shown(found)), found)
    if not any(f"held_out{suffix}" in listing.folded for suffix in SUFFIXES):
        try:
            listing.held_out.update(listed(root))
        except DatasetError as error:
            listing.problems.append(Problem(root, "held out", str(error)))
    return listing


def _tables(listing: _Listing) -> dict[Path, str]:
    """Picture to caption, of all metadata files; what is wrong joins the problems."""
    captions: dict[Path, str] = {}
    # A table nearer to the picture has the last word.
    tables = [path for path in listing.exact.values() if folded(path.name) in METADATA_NAMES]
    for table in sorted(tables, key=lambda path: len(path.parts)):
        shown = listing.shown(table)
        rows, sentences = metadata_captions(table, shown)
        listing.problems.extend(Problem(table, "metadata", sentence) for sentence in sentences)
        for name, caption in rows.items():
            picture = listing.find(posixpath.normpath(posixpath.join(posixpath.dirname(shown), name)))
            if picture is None:
                sentence = f"{shown} names {name}, which is not there; add the picture or remove the row."
                listing.problems.append(Problem(table, "metadata", sentence))
            else:
                captions[picture] = caption
    return captions


def _record(path: Path, listing: _Listing, tables: dict[Path, str]) -> ImageRecord | Problem:
    size = listing.sizes.size(path, listing.shown(path))
    if isinstance(size, Problem):
        return size
    stem = listing.shown(path.with_suffix(""))
    mask = _first(listing, [f"{stem}-masklabel{suffix}" for suffix in (path.suffix, *sorted(SUFFIXES))])
    if mask is not None:
        mask_size = listing.sizes.size(mask, listing.shown(mask))
        if isinstance(mask_size, Problem):
            return mask_size
    repeats, name = _kohya(path, listing.root)
    sidecar = _first(listing, [stem + suffix for suffix in CAPTION_SUFFIXES])
    try:
        caption = read_text(sidecar, listing.shown(sidecar)) if sidecar else tables.get(path, name)
    except DatasetError as error:
        return Problem(path, "caption", str(error))
    by_hand = folded(listing.shown(path)) in listing.held_out
    return ImageRecord(path, *size, caption.strip(), mask, repeats, by_hand)


def _first(listing: _Listing, names: list[str]) -> Path | None:
    return next((found for name in names if (found := listing.find(name))), None)


def _kohya(path: Path, root: Path) -> tuple[int, str]:
    """Repeats and the caption of last resort, of the nearest `10_name` folder below the root; (1, "") without
    one."""
    for parent in reversed(path.relative_to(root).parts[:-1]):
        if match := _REPEATED.fullmatch(parent):
            return int(match[1]), match[2].replace("_", " ").strip()
    return 1, ""
