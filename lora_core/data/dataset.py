"""Reads a dataset folder: its images, their captions, its problems, and which images are held out.

Every image is decoded once, which costs some milliseconds each and finds damaged files before a run starts.
The user's own validation images are listed in `held_out.txt`, one path below the folder a line, so that the
list moves with the dataset; beside an image named `held_out` that file is its caption instead. The parts of
images that the user chose to train on are in `crops.json`: names, the four edges, and perhaps a focus point.
Without a list each image is ranked by a hash of seed and name, so that adding images hardly changes the
split. A validation image that is a copy of a training image (the same file, another size, format or quality)
would reward memorization, so near-duplicates stay on one side.

A fingerprint holds an image's lowest frequencies, as perceptual hashes do (Zauner 2010, "Implementation and
benchmarking of perceptual image hash functions"), but their values instead of their signs: in flat, symmetric
drawings half of them are near zero and their sign is chance. A 4 x 4 colour thumbnail separates drawings of
one shape in different colours.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import posixpath
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import TypeAdapter

from lora_core.data.captions import (
    CAPTION_SUFFIXES,
    METADATA_NAMES,
    TABLE_BYTES,
    read_metadata_captions,
    read_text,
    rules_of,
)
from lora_core.data.concepts import ConceptList, assign_concepts, balance_looks, kohya_folder, read_concepts
from lora_core.data.images import (
    CONCEPT_LIST,
    CROP_LIST,
    HOLDOUT_LIST,
    IMAGE_SUFFIXES,
    MASK_OF,
    MIN_SIDE,
    Bucket,
    Concept,
    Dataset,
    FileProblem,
    ImageInfo,
    ImageRecord,
    SizeCache,
    abbreviate,
    choose_buckets,
    crop_pixels,
    cut_at_focus,
    folder_kind,
    hash_file,
    index_images,
    is_mask,
    mask_owners,
    open_rgb,
    remember_latest,
    same_shape,
    walk_files,
)
from lora_core.data.importer import LIMITS, is_dataset_file, list_skipped_entries, unpack
from lora_core.errors import ConfigError, DatasetError, wrap_os_errors
from lora_core.model_files.detect import base_of
from lora_core.settings.config import RunConfig, limits_of
from lora_core.settings.schema import DatasetSection
from lora_core.system.files import (
    ASSETS,
    DEMO_TRAIN,
    PACKAGE,
    clean_text,
    expand_home,
    file_stamp,
    fold_name,
    parse_json,
    read_small_file,
    write_atomically,
)


def read_holdout_list(place: Path) -> set[str]:
    """The names on the list of a folder, or in a file, folded as file systems compare them; empty without a
    list.

    Raises:
        DatasetError: it cannot be read as text.
    """
    file = place / HOLDOUT_LIST if place.is_dir() else place
    if not file.is_file():
        return set()
    return {
        fold_name(line.strip())
        for line in read_text(file, HOLDOUT_LIST, TABLE_BYTES).split("\n")
        if line.strip()
    }


def write_holdout_list(folder: Path, names: Iterable[str]) -> None:
    """Write the list; none is left where no name is.

    Raises:
        DatasetError: a name has a line break, or the folder cannot be written.
    """
    wanted = sorted(set(names))
    if broken := next((name for name in wanted if "\n" in name or "\r" in name), None):
        raise DatasetError(f"{broken!r} has a line break in its name and cannot be listed; rename the file.")
    _write_list(folder / HOLDOUT_LIST, "\n".join(wanted))


def read_crops(place: Path) -> dict[str, tuple[float, ...]]:
    """The crops of images by their names below a folder, see `check_crop`, or those in a file; empty without
    a list.

    Raises:
        DatasetError: it cannot be read, or an entry is not a crop.
    """
    file = place / CROP_LIST if place.is_dir() else place
    if not file.is_file():
        return {}
    try:
        rows = parse_json(read_text(file, CROP_LIST, TABLE_BYTES))
        return {name: check_crop(edges, name) for name, edges in rows.items()}
    except (ValueError, AttributeError) as error:
        raise DatasetError(f"{CROP_LIST} is not a table of crops ({error}); fix or remove it.") from error


def write_crops(folder: Path, crops: Mapping[str, Sequence[float]]) -> None:
    """Write the list; none is left where no image is cropped.

    Raises:
        DatasetError: the folder cannot be written.
    """
    rows = [f"{json.dumps(name, ensure_ascii=False)}: {list(crops[name])}" for name in sorted(crops)]
    _write_list(folder / CROP_LIST, "{\n" + ",\n".join(rows) + "\n}" if rows else "")


def check_crop(edges: object, name: str) -> tuple[float, ...]:
    """The left, top, right and bottom edge of a crop of the image `name`; behind them its focus point, across
    and down, where it has one.

    Raises:
        DatasetError: they are not four or six numbers from 0 to 1, the crop is empty, or the point outside.
    """
    numbers = list(edges) if isinstance(edges, list | tuple) else []
    if len(numbers) in (4, 6) and all(type(edge) in (int, float) for edge in numbers):
        left, top, right, bottom, x, y = (*numbers, *numbers[:2])[:6]
        if 0 <= left <= x <= right <= 1 and 0 <= top <= y <= bottom <= 1 and left < right and top < bottom:
            return tuple(map(float, numbers))
    raise DatasetError(
        f"The crop of {name} is not left, top, right and bottom as shares of the image, such as"
        f" [0.1, 0.0, 0.9, 1.0], and perhaps a focus point inside: {edges!r}."
    )


def crop_record(record: ImageRecord, edges: Sequence[float]) -> ImageRecord:
    """The record of an uncropped image with a crop, see `check_crop`.

    Raises:
        DatasetError: less than the smallest image that can be trained on would be left.
    """
    crop, point = (edges[0], edges[1], edges[2], edges[3]), edges[4:]
    left, top, right, bottom = crop_pixels(crop, record.width, record.height)
    focus = (point[0] * record.width - left, point[1] * record.height - top) if point else None
    width, height = right - left, bottom - top
    if min(width, height) < MIN_SIDE:
        raise DatasetError(
            f"The crop of {record.path.name} is only {width} x {height} pixels; make its sides {MIN_SIDE} or"
            " more."
        )
    own = None if focus and crop == (0, 0, 1, 1) else crop
    return replace(record, width=width, height=height, crop=own, focus=focus)


def _write_list(file: Path, text: str) -> None:
    advice = "; check that the folder may be written."
    with wrap_os_errors(DatasetError, f"The list {file} cannot be written", advice):
        if text:
            write_atomically(file, (text + "\n").encode("utf-8", "replace"))
        else:
            file.unlink(missing_ok=True)


_SHOWN_PROBLEMS = 5
_SHOWN_ROWS = 100
_THREADS, _PART = 4, 32
AUDIT_ONLY = ("hidden", "link", "unread caption")
"""Notes that only the audit needs: a problem repeats them, or nothing is lost."""
UNUSED = ("no concept", "mask", "caption without picture", "second caption", "other file")
"""Notes on files that a user may think are used."""
_SUMMARIES = {
    "mask": "{} masks belong to no image or to one that has another mask, and are not used ({}).",
    "transparent": "{} images are partly transparent; dataset.background fills in behind them ({}).",
    "animated": "{} images are animated, and only their first frame is trained on ({}).",
    "caption without picture": "{} captions belong to no image, and are not used ({}).",
    "second caption": "{} captions are not used, as their images have another one ({}).",
    "shared caption": "{} captions are shared by images of the same name ({}).",
    "other file": "{} other files are not used ({}).",
    "no concept": "{} images are in no concept of dataset.toml, and are not used ({}).",
    "bare class": "{} images for regularisation lack captions; write them, or name the folder as 1_cat ({}).",
    "reg folder": "{} images are in a folder for regularisation, but their concepts are not is_reg ({}).",
    "sidecar": "{} files of other programs beside images gave no caption ({}).",
    "same picture": "{} images are already here and were skipped ({}).",
    "already there": "{} captions or masks are already here and were left as they are ({}).",
}
"""The summary of many notes of a kind: their number, and the names of some."""


@dataclass
class _Listing:
    """The files of a folder in order, by their path relative to it: as it is, and folded. `pictures`,
    `masks`, `texts` and `tables` of them count; `notes` says why the others do not."""

    root: Path
    sizes: SizeCache
    exact: dict[str, Path] = field(default_factory=dict)
    folded: dict[str, Path] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    masks: list[Path] = field(default_factory=list)
    texts: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    problems: list[FileProblem] = field(default_factory=list)
    notes: list[FileProblem] = field(default_factory=list)
    held_out: set[str] = field(default_factory=set)
    crops: dict[str, tuple[float, ...]] = field(default_factory=dict)
    concepts: dict[Path, Concept] | None = None

    def shown(self, path: Path) -> str:
        """How a file is named in messages."""
        # `Path.relative_to` would take a third of a scan's time.
        return str(path).removeprefix(self._above).replace(os.sep, "/")

    @functools.cached_property
    def _above(self) -> str:
        return os.path.join(self.root, "")

    def stem(self, path: Path) -> str:
        """How a file is named in messages, without its suffix."""
        return self.shown(path).removesuffix(path.suffix)

    def find(self, shown: str) -> Path | None:
        """The file of that name, whatever its case."""
        return self.exact.get(shown) or self.folded.get(fold_name(shown))

    def note(self, path: Path, kind: str, rest: str) -> None:
        """Note something of a file that does not block: its name, then `rest`."""
        self.notes.append(FileProblem(path, kind, f"{self.shown(path)} {rest}", False))


def scan(folder: Path, sizes: SizeCache | None = None) -> Dataset:
    """Every image below a folder with its caption, in an order that is the same on all systems.

    A caption is, in this order: the text file beside the image, its row in the `metadata.jsonl` or `.csv` of
    the same or a higher folder, the name of a `10_name` folder. Of several rows the one in the nearest folder
    counts, there `.jsonl` before `.csv`, and the last of one table. Images in a folder named `reg` or similar
    are for regularisation. A `dataset.toml` takes the place of what folders' names say, see `data/concepts`.
    A mask is, in this order, `NAME-masklabel.png` or `NAME_mask.png` beside the image, or its namesake in a
    `mask` folder. Nothing is raised for a file that is wrong; it becomes a problem. Each file or row that is
    not used is a problem or a note; hidden files share one. Without `sizes`, the known ones, every image is
    decoded.
    """
    listing = _list_files(folder, sizes or SizeCache())
    tables, rows_of = _read_tables(listing)
    masks = _match_masks(listing)
    # Decoders let other threads run, and the order of the results does not depend on timing.
    # Some at a time: to hand each to a thread would take longer than to read one that is known.
    parts = [listing.pictures[start : start + _PART] for start in range(0, len(listing.pictures), _PART)]
    with ThreadPoolExecutor(_THREADS) as threads:
        read = threads.map(lambda part: [_read_record(path, listing, tables, masks) for path in part], parts)
        found = list(itertools.chain.from_iterable(read))
        every = [one for one in found if isinstance(one, ImageRecord)]
        masked = [record for record in every if record.mask]
        unfit = [one for one in threads.map(lambda record: _check_mask(record, listing), masked) if one]
    loose = [] if listing.concepts is None else [one for one in every if one.concept is None]
    every = [one for one in every if one.concept] if listing.concepts is not None else every
    records, reg = ([one for one in every if one.reg is kind] for kind in (False, True))
    problems = [*(one for one in found if isinstance(one, FileProblem)), *unfit]
    for record in every:
        if record.transparent:
            sentence = "is partly transparent; dataset.background fills in behind it."
            listing.note(record.path, "transparent", sentence)
        if record.animated:
            listing.note(record.path, "animated", "is animated; only its first frame is trained on.")
        if record.reg and not record.full_caption:
            sentence = "is for regularisation without a caption; write one, or name its folder as 1_cat."
            listing.note(record.path, "bare class", sentence)
    _note_texts(every, listing)
    _note_rows(every, rows_of, listing)
    return Dataset(records, [*listing.problems, *problems], listing.notes, reg, loose, folder)


def scan_again(folder: Path, sizes: SizeCache, stamp: int | None, kept: Path) -> Dataset:
    """As `scan`, from the file `kept` where nothing has changed since it was written. A dataset with problems
    is not kept: what cannot be read now may be readable next time.

    Args:
        stamp: the earlier `stamp_files` of the folder; None where it has to be read, and is not kept.
    """
    if stamp is None:
        return scan(folder, sizes)
    # Another version, of which an update replaces some files, may read a folder in another way.
    files = sorted([*PACKAGE.rglob("*.py"), *ASSETS.glob("*.toml")])
    sources = [(file.name, *(file_stamp(file) or ())) for file in files]
    head = f"{json.dumps([str(folder), stamp, sources])}\n".encode()
    with contextlib.suppress(OSError, ValueError):
        if (data := read_small_file(kept)).startswith(head):
            return _share_concepts(_kept_form().validate_json(data[len(head) :]))
    found = scan(folder, sizes)
    # Without the file the folder is read once more, nothing else.
    with contextlib.suppress(OSError, ValueError):
        if not found.problems:
            write_atomically(kept, head + _kept_form().dump_json(found), sync=False)
    return found


@functools.cache
def _kept_form() -> TypeAdapter[Dataset]:
    return TypeAdapter(Dataset)


def _share_concepts(found: Dataset) -> Dataset:
    """The dataset with one object for each concept, as a scan makes it, and without the lists that JSON made
    of tuples."""
    known: dict[int, Concept] = {}

    def shared(record: ImageRecord) -> ImageRecord:
        if (one := record.concept) is None:
            return record
        if one.number not in known:
            rules = tuple(
                (key, tuple(value) if isinstance(value, list) else value) for key, value in one.rules
            )
            known[one.number] = replace(one, rules=rules)
        return replace(record, concept=known[one.number])

    return replace(found, records=list(map(shared, found.records)), reg=list(map(shared, found.reg)))


def summarize_notes(notes: Iterable[FileProblem], leave_out: Container[str] = ()) -> list[FileProblem]:
    """One note for each kind but those in `leave_out`, in the order in which they come first."""
    by_kind: dict[str, list[FileProblem]] = {}
    for note in (one for one in notes if one.kind not in leave_out):
        by_kind.setdefault(note.kind, []).append(note)
    found = []
    for kind, members in by_kind.items():
        if len(members) == 1 or kind not in _SUMMARIES:
            found += members
        else:
            names = abbreviate([clean_text(one.path.name) for one in members])
            sentence = _SUMMARIES[kind].format(len(members), names)
            found.append(FileProblem(members[0].path, kind, sentence, False))
    return found


def apply_settings(records: Iterable[ImageRecord], config: RunConfig) -> list[ImageRecord]:
    """The images with the masks, weights and backgrounds that the settings give them."""
    found = []
    for record in records:
        rules = rules_of(record, config.dataset)
        mask = record.mask or (record.path if rules.masks == "alpha" and record.transparent else None)
        mask, outside = (None, 1.0) if rules.masks == "off" else (mask, config.loss.unmasked_weight)
        weight = rules.reg_weight if record.reg else 1.0
        found.append(replace(record, mask=mask, outside=outside, background=rules.background, weight=weight))
    return found


def run_dataset(config: RunConfig, unpack_into: Path) -> Dataset:
    """The images that a run trains on, see `open_dataset`; a concept slider has none.

    Raises:
        DatasetError: it cannot be opened.
    """
    return Dataset([], []) if config.slider.on else open_dataset(config.dataset.path, unpack_into)


def measured_dataset(config: RunConfig, unpack_into: Path) -> Dataset:
    """The images of a run that is to be measured on them.

    Raises:
        DatasetError: it cannot be opened, an image cannot be used, or it is a slider.
    """
    if config.slider.on:
        raise DatasetError(
            f"{config.name} is a slider, trained without images: there are none to measure it on."
        )
    dataset = run_dataset(config, unpack_into)
    require_clean(dataset)
    return dataset


def open_dataset(where: str | Path, unpack_into: Path, sizes: SizeCache | None = None) -> Dataset:
    """Opens the dataset that the user named.

    Args:
        where: `demo`, a folder, or a zip.
        unpack_into: where a zip is unpacked, in a folder named by its hash; an existing one is reused.
        sizes: known sizes, see `scan`.

    Raises:
        DatasetError: it does not exist, is neither, cannot be unpacked, or holds no image file.
    """
    path = DEMO_TRAIN if str(where) == "demo" else expand_home(where).absolute()
    if not path.exists():
        raise DatasetError(
            f"The dataset {where} does not exist; give a folder of images, a zip of one, a project's name, or"
            " `demo`."
        )
    notes: list[FileProblem] = []
    if path.is_dir():
        folder = path
    elif path.suffix.casefold() == ".zip":
        folder = unpack_into / hash_file(path, LIMITS.total_bytes)[:16]
        if not folder.is_dir():
            unpack(path, folder)
        notes = list_skipped_entries(path)
    else:
        raise DatasetError(
            f"The dataset {where} is neither a folder nor a zip; give a folder of images, a zip of one, or"
            " `demo`."
        )
    dataset = scan(folder, sizes)
    dataset = replace(dataset, notes=[*notes, *dataset.notes])
    if not dataset.records and not any(
        problem.path.suffix.casefold() in IMAGE_SUFFIXES or problem.kind == "concepts"
        for problem in dataset.problems
    ):
        why = "".join(f" {note.sentence}" for note in summarize_notes(dataset.notes, AUDIT_ONLY))
        if dataset.reg:
            names = abbreviate([clean_text(one.path.name) for one in dataset.reg])
            why += f" Those in its folder for regularisation alone do not do ({names})."
        raise DatasetError(
            f"There are no images in {where}; put PNG, JPEG, WebP or HEIC files there, each with a .txt"
            f" caption.{why}"
        )
    return dataset


def first_problems(dataset: Dataset) -> list[str]:
    """A sentence for each of the first problems, and how many more there are."""
    sentences = [problem.sentence for problem in dataset.problems]
    more = len(sentences) - _SHOWN_PROBLEMS
    return [*sentences[:_SHOWN_PROBLEMS], f"And {more} more."] if more > 0 else sentences


def require_clean(dataset: Dataset) -> None:
    """Refuse a dataset with problems, rather than leave files out in silence.

    Raises:
        DatasetError: lists the problems.
    """
    if dataset.problems:
        raise DatasetError(" ".join(first_problems(dataset)))


def _list_files(root: Path, sizes: SizeCache) -> _Listing:
    listing = _Listing(root, sizes)
    for found in walk_files(root, IMAGE_SUFFIXES):
        if isinstance(found, Path):
            name = listing.shown(found)
            listing.exact[name] = found
            listing.folded.setdefault(fold_name(name), found)
        elif found.blocking and (is_dataset_file(found.path.name) or os.path.isdir(found.path)):
            listing.problems.append(found)
        else:
            listing.notes.append(replace(found, blocking=False))
    for path in listing.exact.values():
        _classify(path, listing)
    if (concept_list := read_concepts(root)) is not None:
        shown = {path: listing.shown(path) for path in listing.pictures}
        listing.concepts = assign_concepts(shown, concept_list, root) if concept_list.concepts else None
        _note_concepts(concept_list, listing)
    if not any(f"held_out{suffix}" in listing.folded for suffix in IMAGE_SUFFIXES):
        try:
            listing.held_out.update(read_holdout_list(root))
        except DatasetError as error:
            listing.problems.append(FileProblem(root / HOLDOUT_LIST, "held out", str(error)))
        listing.texts[:] = [path for path in listing.texts if path != root / HOLDOUT_LIST]
    try:
        listing.crops.update({fold_name(name): crop for name, crop in read_crops(root).items()})
    except DatasetError as error:
        listing.problems.append(FileProblem(root / CROP_LIST, "crop", str(error)))
    there = {fold_name(listing.shown(path)) for path in listing.pictures}
    for file, kind, names, what in (
        (HOLDOUT_LIST, "held out", listing.held_out, "held out"),
        (CROP_LIST, "crop", listing.crops.keys(), "cropped"),
    ):
        if missing := sorted(names - there):
            sentence = f"{file} names images that are not there ({abbreviate(missing)}); they are not {what}."
            listing.notes.append(FileProblem(root / file, kind, sentence, False))
    return listing


def _note_concepts(found: ConceptList, listing: _Listing) -> None:
    """Problems of `dataset.toml`, keys without effect, and images that it leaves out."""
    file = listing.root / CONCEPT_LIST
    listing.problems.extend(FileProblem(file, "concepts", sentence) for sentence in found.problems)
    listing.notes.extend(FileProblem(file, "concepts", sentence, False) for sentence in found.notes)
    concepts = listing.concepts
    for path in listing.pictures if concepts is not None else ():
        shown, concept = listing.shown(path), (concepts or {}).get(path)
        if concept is None:
            listing.note(path, "no concept", f"is in no concept of {CONCEPT_LIST}; it is not used.")
        elif folder_kind(shown) == "regularisation" and concept.role != "regularisation":
            sentence = f"is in a folder for regularisation, but its concept in {CONCEPT_LIST} is not is_reg."
            listing.note(path, "reg folder", sentence)


def _classify(path: Path, listing: _Listing) -> None:
    """Find out what a file is for."""
    suffix, shown = path.suffix.casefold(), listing.shown(path)
    kind = folder_kind(shown) == "mask"
    if suffix in IMAGE_SUFFIXES and (kind or _is_mask(path, listing)):
        listing.masks.append(path)
    elif suffix in IMAGE_SUFFIXES:
        listing.pictures.append(path)
    elif fold_name(path.name) in METADATA_NAMES and not kind:
        listing.tables.append(path)
    elif suffix in CAPTION_SUFFIXES and not kind:
        listing.texts.append(path)
    elif shown not in (CROP_LIST, CONCEPT_LIST):
        listing.note(path, "other file", "is neither an image nor a caption; it is not used.")


def _is_mask(path: Path, listing: _Listing) -> bool:
    """`cat-masklabel.png` always; `cat_mask.png`, `cat-mask.png`, `cat.mask.png` beside an image `cat`."""
    shown = listing.stem(path)
    if is_mask(path) or fold_name(shown[-5:]) not in MASK_OF:
        return is_mask(path)
    return _find_first(listing, [f"{shown[:-5]}{suffix}" for suffix in sorted(IMAGE_SUFFIXES)]) is not None


def _match_masks(listing: _Listing) -> dict[Path, Path]:
    """Image to mask, see `mask_owners`; masks that no image has are noted."""
    pictures = listing.pictures if listing.masks else []
    images = index_images((path, listing.stem(path)) for path in pictures)
    found: dict[Path, Path] = {}
    # A PNG first: the window writes one over a mask of another format.
    ranks = {
        path: (
            folder_kind(listing.shown(path)) == "mask",
            not is_mask(path),
            path.suffix.casefold() != ".png",
        )
        for path in listing.masks
    }
    for mask in sorted(ranks, key=ranks.__getitem__):
        owners = mask_owners(images, listing.stem(mask))
        free = [path for path in owners if path not in found]
        found |= dict.fromkeys(free, mask)
        if not free:
            why = "its image has another mask" if owners else "no image, or more than one, has that name"
            listing.note(mask, "mask", f"is a mask that is not used, as {why}.")
    return found


def _note_texts(records: list[ImageRecord], listing: _Listing) -> None:
    """Note the captions that no image has, and those that several have."""
    readers: dict[Path, list[ImageRecord]] = {}
    sidecars = {path: _find_sidecar(path, listing) for path in listing.pictures}
    for record in records:
        if sidecar := sidecars[record.path]:
            readers.setdefault(sidecar, []).append(record)
    spare = set(sidecars.values())
    with_caption = {fold_name(listing.stem(record.path)) for record in records}
    for text in listing.texts:
        if text in readers:
            if len(readers[text]) > 1:
                names = " and ".join(record.path.name for record in readers[text])
                listing.note(text, "shared caption", f"is the caption of {names}; rename one if they differ.")
        elif fold_name(listing.stem(text)) in with_caption:
            listing.note(text, "second caption", "is not used, as its image has another caption.")
        elif text in spare:
            listing.note(text, "unread caption", "belongs to an image that cannot be used.")
        else:
            listing.note(text, "caption without picture", "belongs to no image; it is not used.")


def _note_rows(records: list[ImageRecord], rows_of: dict[Path, list[Path]], listing: _Listing) -> None:
    """Note the rows of tables that no image has for a caption, in one note for each table and reason."""
    trained_on = {record.path for record in records}
    unused: dict[tuple[Path, str], list[str]] = {}
    for picture, tables in rows_of.items():
        winner = tables[-1]
        for number, table in enumerate(tables):
            if picture not in trained_on:
                why = "as nothing of that name is trained on"
            elif _find_sidecar(picture, listing):
                why = "as the text file beside the image is its caption"
            elif table != winner:
                why = f"as the row in {listing.shown(winner)} is the caption"
            elif number < len(tables) - 1:
                why = "as a later row for the same image is its caption"
            else:
                continue
            unused.setdefault((table, why), []).append(listing.shown(picture))
    for (table, why), names in unused.items():
        shown = abbreviate(list(dict.fromkeys(names)))
        listing.note(table, "unused row", f"has rows that are not used, {why} ({shown}).")


def _read_tables(listing: _Listing) -> tuple[dict[Path, str], dict[Path, list[Path]]]:
    """Image to caption, from all metadata files, and image to the table of each of its rows, of which the
    last is the caption; errors are added to the problems."""
    captions: dict[Path, str] = {}
    rows_of: dict[Path, list[Path]] = {}
    # A table nearer to the image has the last word.
    for table in sorted(listing.tables, key=lambda path: len(path.parts)):
        shown = listing.shown(table)
        rows, sentences, repeated = read_metadata_captions(table, shown)
        if not rows and not sentences:
            listing.note(table, "other file", "has no row; it is not used.")
        listing.problems.extend(FileProblem(table, "metadata", sentence) for sentence in sentences)
        missing: list[str] = []
        several = set(repeated)
        for name, caption in rows.items():
            picture = listing.find(posixpath.normpath(posixpath.join(posixpath.dirname(shown), name)))
            if picture is None:
                missing.append(name)
            else:
                captions[picture] = caption
                rows_of.setdefault(picture, []).extend([table] * (2 if name in several else 1))
        for name in missing[:_SHOWN_ROWS]:
            sentence = f"{shown} names {name}, which does not exist; add the image or remove the row."
            listing.problems.append(FileProblem(table, "metadata", sentence))
        if len(missing) > _SHOWN_ROWS:
            sentence = f"{shown} names {len(missing) - _SHOWN_ROWS} more images that are not there."
            listing.problems.append(FileProblem(table, "metadata", sentence))
    return captions, rows_of


def _read_record(
    path: Path, listing: _Listing, tables: dict[Path, str], masks: dict[Path, Path]
) -> ImageRecord | FileProblem:
    shown = listing.shown(path)
    folded = fold_name(shown)
    info = listing.sizes.info(path, shown)
    if isinstance(info, FileProblem):
        if path in masks:
            listing.note(masks[path], "unread caption", "is the mask of an image that cannot be used.")
        return info
    concept = (listing.concepts or {}).get(path)
    repeats, name = kohya_folder(path, listing.root)
    if concept:
        repeats, name = concept.repeats, concept.class_tokens
    sidecar = _find_sidecar(path, listing, concept.caption_extension if concept else "")
    try:
        caption = read_text(sidecar, listing.shown(sidecar)) if sidecar else tables.get(path, name)
    except DatasetError as error:
        return FileProblem(path, "caption", str(error))
    seen = (info.transparent, info.animated)
    reg = (concept.role if concept else folder_kind(shown)) == "regularisation"
    by_hand, size = folded in listing.held_out and not reg, (info.width, info.height)
    record = ImageRecord(path, *size, caption.strip(), repeats, by_hand, *seen, mask=masks.get(path), reg=reg)
    record = replace(record, concept=concept) if concept else record
    try:
        return crop_record(record, listing.crops[folded]) if folded in listing.crops else record
    except DatasetError as error:
        return FileProblem(path, "crop", str(error))


def _check_mask(image: ImageRecord, listing: _Listing) -> FileProblem | None:
    """The problem of a mask that cannot be read, has not the shape of its image, or leaves nothing of it."""
    if (mask := image.mask) is None:
        return None
    shown = listing.shown(mask)
    info = listing.sizes.info(mask, shown, mask=True)
    if isinstance(info, FileProblem):
        return info
    if info.black:
        sentence = f"The mask {shown} is black everywhere, so that nothing of its image counts; paint white"
        return FileProblem(mask, "black mask", f"{sentence} what should be learned, or remove it.")
    whole = listing.sizes.info(image.path, listing.shown(image.path))
    assert isinstance(whole, ImageInfo)
    if same_shape((info.width, info.height), (whole.width, whole.height)):
        return None
    sizes = f"{info.width} x {info.height} pixels, and its image {whole.width} x {whole.height}"
    sentence = f"The mask {shown} has {sizes}; give it the shape of its image, or remove it."
    return FileProblem(mask, "mask shape", sentence)


def _find_sidecar(picture: Path, listing: _Listing, first: str = "") -> Path | None:
    """The text file beside an image, if there are several the one with the ending `first`."""
    stem = listing.stem(picture)
    endings = dict.fromkeys([first, *CAPTION_SUFFIXES]) if first else CAPTION_SUFFIXES
    return _find_first(listing, [stem + suffix for suffix in endings])


def _find_first(listing: _Listing, names: list[str]) -> Path | None:
    return next((found for name in names if (found := listing.find(name))), None)


# Near-duplicates, and the images to measure on.

_SIDE, _KEPT = 32, 8
_FREQUENCIES = np.arange(_KEPT)[:, None]
# The lowest rows of the cosine transform (DCT-II), (8, 32).
_WAVES = np.cos(np.pi * _FREQUENCIES * (2 * np.arange(_SIDE) + 1) / (2 * _SIDE))
# Measured: copies at half the size, at JPEG quality 30 or 10% darker are at 0.999 or more; drawings of
# different things in one style and colour rarely reach 0.98.
_SAME_SHAPE = 0.98
# Mean difference of the colour thumbnails, of 255.
_COLOUR_APART = 12.0
# Takes the place of the lowest frequency, so that images without any shape are similar.
_FLAT = 10.0
_FEWEST_TO_TRAIN_ON = 2
_BLOCK = 256
"""Images whose shapes are compared at once: 40 MB at 20,000 images."""
_MOST_PRINTS = 50_000
"""Fingerprints that are remembered, 1.2 kB each."""


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """`shape` are weighted low frequencies of unit length, (64,); `colours` are 4 x 4 RGB values of 0 to 255,
    (48,)."""

    shape: np.ndarray
    colours: np.ndarray


def compute_fingerprint(image: Image.Image) -> Fingerprint:
    """The fingerprint of an RGB image for comparisons."""
    grey = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    # Low frequencies are the largest in nearly all images; the weight lets the others count as much.
    weight = np.hypot(_FREQUENCIES, _FREQUENCIES.T)
    shape = (_WAVES @ np.asarray(grey, dtype=np.float64) @ _WAVES.T) * weight
    shape[0, 0] = _FLAT
    colours = np.asarray(image.resize((4, 4), Image.Resampling.BOX), dtype=np.float64)
    return Fingerprint(shape.ravel() / np.linalg.norm(shape), colours.ravel())


def group_near_duplicates(prints: Sequence[Fingerprint | None]) -> list[int]:
    """For each image the index of the first one of its group; its own if nothing resembles it.

    Near-duplicates of near-duplicates are one group. None, an unreadable image, is alone.

    Sorted by their mean colour, near-duplicates are at most `_COLOUR_APART` apart, as the mean difference is
    at least the difference of the means; a block of images is compared with those alone.
    """
    group = np.arange(len(prints))
    means = np.array([one.colours.mean() if one else np.nan for one in prints])
    order = np.argsort(means, kind="stable")[: np.count_nonzero(~np.isnan(means))]
    means, known = means[order], [one for index in order if (one := prints[index])]
    if not known:
        return group.tolist()
    shapes, colours = (np.array([getattr(one, what) for one in known]) for what in ("shape", "colours"))
    first = np.searchsorted(means, means - _COLOUR_APART - 1e-6)
    for start in range(0, len(known), _BLOCK):
        end, low = min(start + _BLOCK, len(known)), first[start]
        similar = shapes[start:end] @ shapes[low:end].T >= _SAME_SHAPE
        for row in np.flatnonzero(similar.sum(1) > 1):
            index = start + row
            found = low + np.flatnonzero(similar[row, : index - low])
            # The nearest one first: often it is of the group that all the others are in too.
            for others in (found[-1:], found):
                others = others[group[order[others]] != group[order[index]]]
                others = others[np.abs(colours[others] - colours[index]).mean(1) <= _COLOUR_APART]
                if others.size:
                    joined = group[order[[*others, index]]]
                    group[np.isin(group, joined)] = joined.min()
    return group.tolist()


def compute_fingerprints(paths: Iterable[Path]) -> list[Fingerprint | None]:
    """The fingerprint of each image; None for one that cannot be read."""

    def compute(path: Path) -> Fingerprint | None:
        try:
            found = path.stat()
            return _fingerprint_of(path, found.st_mtime_ns, found.st_size)
        except (DatasetError, OSError):
            return None

    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(compute, paths))


@functools.lru_cache(maxsize=_MOST_PRINTS)
def _fingerprint_of(path: Path, changed_at: int, size: int) -> Fingerprint:
    """Cached by the file's time; a forecast in epochs asks with each change of a setting."""
    return compute_fingerprint(open_rgb(path, 2 * _SIDE))


@functools.lru_cache(maxsize=4)
def _group_files(files: tuple[tuple[Path, tuple[int, int] | None], ...]) -> list[int]:
    """The groups of near-duplicates among files as they were at these times."""
    return group_near_duplicates(compute_fingerprints(path for path, _ in files))


def split_holdout(
    records: list[ImageRecord], pictures: float, seed: int
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """The records to train on, and those to measure on, each in their old order.

    Args:
        pictures: a share if below 1, else a number of images. Where near-duplicates would have to be
        separated, it is fewer. Ignored where the user listed images.

    Raises:
        DatasetError: fewer than two images would be left to train on.
    """
    by_hand = any(record.held_out for record in records)
    wished = 0 if by_hand else num_holdout(len(records), pictures)
    if not by_hand and not wished:
        return list(records), []
    by_look = _group_files(tuple((record.path, file_stamp(record.path)) for record in records))
    # The first of several files counts.
    first: dict[str, int] = {}
    groups = [by_look[first.setdefault(str(record.path), index)] for index, record in enumerate(records)]
    if by_hand:
        # Near-duplicates of the user's choice would otherwise be trained on.
        chosen = {group for group, record in zip(groups, records, strict=True) if record.held_out}
    else:
        chosen, sizes = set(), Counter(groups)
        left = Counter(record.concept for record in records)
        members: dict[int, Counter[Concept | None]] = {}
        for group, record in zip(groups, records, strict=True):
            members.setdefault(group, Counter())[record.concept] += 1
        for group in sorted(sizes, key=lambda group: (_rank_by_hash(records[group], seed), group)):
            # Each concept keeps something to train on.
            empties = any(one and left[one] <= count for one, count in members[group].items())
            if sizes[group] <= wished and not empties:
                chosen.add(group)
                wished -= sizes[group]
                left -= members[group]
    train = [record for group, record in zip(groups, records, strict=True) if group not in chosen]
    held = [record for group, record in zip(groups, records, strict=True) if group in chosen]
    if by_hand and (gone := {one.concept for one in held} - {one.concept for one in train} - {None}):
        names = abbreviate(sorted(one.name for one in gone if one))
        raise DatasetError(
            f"All images of {names} are held out, by hand or as they look the same; train on some."
        )
    if by_hand and len(train) < _FEWEST_TO_TRAIN_ON:
        raise DatasetError(
            f"Holding out {len(held)} of {len(records)} images, those that look the same included, leaves"
            f" fewer than {_FEWEST_TO_TRAIN_ON} to train on; choose fewer of them by hand."
        )
    return train, held


EPOCHS = {
    "train.steps": "train.epochs",
    "validation.every": "validation.every_epochs",
    "sample.every": "sample.every_epochs",
    "save.every": "save.every_epochs",
}
"""Settings in steps, and those that give the same in epochs."""


@remember_latest
def with_epochs(config: RunConfig, dataset: Dataset) -> RunConfig:
    """The config with its epochs converted to steps for these images.

    Raises:
        DatasetError: the images that are held out do not leave enough.
        ConfigError: it would be too many steps, or there are no images to pass over.
    """
    asked = {steps: config.get(epochs) for steps, epochs in EPOCHS.items() if config.get(epochs)}
    if asked and config.slider.on:
        names = ", ".join(EPOCHS[steps] for steps in asked)
        raise ConfigError(f"A slider has no images to count epochs of; set {names} to 0.")
    if not asked or not dataset.records:
        return config
    train, base = config.train, base_of(config.model)
    images, _ = split_holdout(dataset.records, config.validation.pictures, config.seed)
    images, reg = balance_looks(images, dataset.reg if config.dataset.reg_weight else [])
    side = config.resolution(base.resolution)
    views = at_resolutions([*images, *reg], config.dataset, side, base.multiple)
    epoch = num_batches(views, train.batch_size) / train.gradient_accumulation_steps
    found = {steps: max(1, math.ceil(epochs * epoch)) for steps, epochs in asked.items()}
    most = int((limits_of("train.steps") or (0, math.inf))[1])
    for steps, count in found.items():
        if count > most:
            raise ConfigError(
                f"{EPOCHS[steps]} = {asked[steps]:,} comes to {count:,} steps, more than {most:,}; lower it."
            )
    return config.changed(found)


def at_resolutions(
    images: Iterable[ImageRecord], rules: DatasetSection, resolution: int, multiple: int
) -> list[tuple[ImageRecord, Bucket]]:
    """An epoch's images with their buckets: each at every resolution that it is large enough for, the largest
    last.

    An image with fewer sizes than others is shown more often at each, so that all keep their shares of the
    samples. An epoch has as many rounds over the images as that takes.

    Args:
        images: with their repeats.
        rules: settings; those of an image's concept count before them.
        resolution: in pixels, where neither names several.
        multiple: what a bucket's sides are divisible by, in pixels.
    """
    found = []
    for record in images:
        several = rules_of(record, rules).resolutions or [resolution]
        found.append((record, choose_buckets(record.width, record.height, several, multiple)))
    rounds = math.lcm(*(len(sizes) // math.gcd(len(sizes), record.repeats) for record, sizes in found))
    return [
        (
            replace(record, repeats=record.repeats * rounds // len(sizes))
            if len(sizes) != rounds
            else record,
            cut_at_focus(record.width, record.height, bucket, record.focus),
        )
        for record, sizes in found
        for bucket in sizes
    ]


def num_batches(images: Iterable[tuple[ImageRecord, Bucket]], size: int) -> int:
    """Micro-batches of `size` images in an epoch: each bucket has its own, the last one filled up."""
    members: Counter[tuple[int, int]] = Counter()
    for record, bucket in images:
        members[bucket.width, bucket.height] += record.repeats
    return sum(math.ceil(count / size) for count in members.values())


def num_holdout(count: int, pictures: float) -> int:
    """How many of `count` images are to be held out, 0 for none; `pictures` is a share if below 1, else a
    number of images.

    Raises:
        DatasetError: fewer than two would be left to train on.
    """
    wished = round(pictures * count) if pictures < 1 else int(pictures)
    if wished <= 0:
        return 0
    most = count - _FEWEST_TO_TRAIN_ON
    if wished > most:
        raise DatasetError(
            f"Holding out {wished} of {count} images leaves fewer than {_FEWEST_TO_TRAIN_ON} to train on;"
            f" set validation.pictures to at most {max(0, most)}."
        )
    return wished


def _rank_by_hash(record: ImageRecord, seed: int) -> str:
    name = fold_name(record.path.name)
    return hashlib.sha256(f"{seed}\n{name}".encode("utf-8", "surrogatepass")).hexdigest()
