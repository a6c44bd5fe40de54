"""Bringing files from outside into a dataset folder: dropped files, a folder, a zip.

The originals are never changed: files are copied, or linked where the person wants that, byte for byte. Each
file is judged by itself: what cannot be used is reported and does not keep the others out. Nothing that
is there already is overwritten. A table of captions becomes one text file a picture, because pictures may get
new names here and because the window edits text files.
"""

import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from lora_core.dataset.known_sizes import Sizes
from lora_core.dataset.names import folded, free_stem, safe_name
from lora_core.dataset.pictures import MOST_BYTES, SUFFIXES
from lora_core.dataset.records import Problem
from lora_core.dataset.sidecars import (
    CAPTION_SUFFIXES,
    METADATA_NAMES,
    metadata_captions,
    read_text,
    write_caption,
)
from lora_core.dataset.taking import Way, take
from lora_core.dataset.walk import files_below, is_junk, is_mask
from lora_core.dataset.zips import Imported, Limits, is_useful, unpack
from lora_core.spec.errors import DatasetError
from lora_core.spec.paths import valid_text

__all__ = ["Imported", "Limits", "Way", "import_files", "import_folder", "unpack"]

_MASK = "-masklabel"
_THREADS = 4


@dataclass(frozen=True)
class _Incoming:
    """A file on its way in: where it lies, and its relative path from the sender, made safe."""

    source: Path
    name: PurePosixPath

    @property
    def suffix(self) -> str:
        """In lower case."""
        return self.name.suffix.casefold()

    @property
    def stem(self) -> str:
        """The picture's stem, of its mask and its caption too."""
        return self.name.stem[: -len(_MASK)] if self.is_mask else self.name.stem

    @property
    def set_name(self) -> str:
        """Shared by a picture, its mask and its caption, which must keep together."""
        return folded((self.name.parent / self.stem).as_posix())

    @property
    def is_mask(self) -> bool:
        """Whether it is a mask picture."""
        return is_mask(Path(self.name)) and self.suffix in SUFFIXES


@dataclass
class _Import:
    """One import under way."""

    into: Path
    way: Way
    added: list[Path] = field(default_factory=list)
    skipped: list[Problem] = field(default_factory=list)
    placed: dict[str, Path] = field(default_factory=dict)
    _names: dict[Path, set[str]] = field(default_factory=dict)
    _stems: dict[Path, set[str]] = field(default_factory=dict)

    def names(self, folder: Path) -> set[str]:
        """The folded names in a folder of the dataset, read once."""
        if folder not in self._names:
            there = [p.name for p in (folder.iterdir() if folder.is_dir() else ()) if not is_junk(p.name)]
            self._names[folder] = {folded(name) for name in there}
            self._stems[folder] = {folded(Path(name).stem) for name in there}
        return self._names[folder]

    def stems(self, folder: Path) -> set[str]:
        """The folded stems in a folder of the dataset."""
        self.names(folder)
        return self._stems[folder]

    def place(self, target: Path) -> None:
        """Note that a name is taken from now on."""
        self.added.append(target)
        self.names(target.parent).add(folded(target.name))
        self.stems(target.parent).add(folded(target.stem))

    def skip(self, source: Path, kind: str, sentence: str) -> None:
        """Note that a file was left out, and why."""
        self.skipped.append(Problem(source, kind, sentence))


def import_files(
    files: list[Path], into: Path, names: list[str] | None = None, way: Way | None = None
) -> Imported:
    """Take over pictures, their captions and masks into a dataset folder, and unpack zips.

    A name that is taken gets `-2`, a picture together with its caption. What is wrong with a file, a zip
    included, is told in `skipped`.

    Args:
        files: where they lie now.
        into: the dataset folder, made if absent.
        names: what their sender calls them, with sub-folders before slashes; default the files' own names.
        way: how; default is to copy.

    Raises:
        DatasetError: the folder cannot be written, or the disk is too full.
    """
    under_way = _started(into, files, way or Way())
    loose: list[_Incoming] = []
    for source, name in zip(files, map(valid_text, names or [file.name for file in files]), strict=True):
        if any(is_junk(part) for part in PurePosixPath(name.replace("\\", "/")).parts):
            continue
        if PurePosixPath(name).suffix.casefold() == ".zip":
            _import_zip(source, name, under_way)
        else:
            loose.append(_Incoming(source, safe_name(name)))
    _import_all(loose, under_way)
    return Imported(under_way.added, under_way.skipped)


def import_folder(folder: Path, into: Path, way: Way | None = None) -> Imported:
    """Take over the pictures, captions and masks below a folder into a dataset folder; `10_name` sub-folders
    stay.

    Raises:
        DatasetError: the folder does not exist, `into` cannot be written, or the disk is too full.
    """
    if not folder.is_dir():
        raise DatasetError(f"The folder {folder} does not exist; check its path.")
    found = list(files_below(folder))
    # A dataset folder inside the folder that is imported would be copied into itself.
    inner = into if into.is_relative_to(folder) else None
    files = [one for one in found if isinstance(one, Path) and not (inner and one.is_relative_to(inner))]
    under_way = _started(into, files, way or Way())
    under_way.skipped.extend(one for one in found if isinstance(one, Problem) and one.kind != "hidden")
    _import_all(
        [_Incoming(file, safe_name(file.relative_to(folder).as_posix())) for file in files], under_way
    )
    return Imported(under_way.added, under_way.skipped)


def _started(into: Path, files: list[Path], way: Way) -> _Import:
    """An import, after a look at whether there is room.

    Raises:
        DatasetError: the folder cannot be written, or the disk is too full for the files.
    """
    try:
        into.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(into).free
    except OSError as error:
        raise DatasetError(
            f"The folder {into} cannot be written ({error.strerror}); choose another."
        ) from error
    needed = sum(map(_bytes_to_copy, files)) if way.how == "copy" else 0
    if needed > free:
        raise DatasetError(
            f"The files need {needed / 1e6:.0f} MB, and {into} has room for {free / 1e6:.0f} MB; free some"
            " disk space."
        )
    return _Import(into, way)


def _bytes_to_copy(file: Path) -> int:
    """The size of a file that may be taken over; others are refused one by one."""
    is_zip = file.suffix.casefold() == ".zip"
    size = file.stat().st_size if (is_zip or is_useful(file.name)) and os.path.isfile(file) else 0
    return size if is_zip or size <= MOST_BYTES else 0


def _import_zip(source: Path, name: str, under_way: _Import) -> None:
    """Unpack into a hidden folder and take over what is in it."""
    way = under_way.way
    way.said("Unpacking", 0, 1)
    try:
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=under_way.into) as temporary:
            # The sender's name, so that messages do not speak of a temporary upload.
            inside = unpack(source, Path(temporary) / "files")
            inner = import_folder(Path(temporary) / "files", under_way.into, replace(way, how="move"))
    except DatasetError as error:
        under_way.skip(source, "zip", str(error).replace(source.name, PurePosixPath(name).name))
        return
    under_way.added.extend(inner.added)
    under_way.skipped.extend([*inside.skipped, *inner.skipped])


def _import_all(incoming: list[_Incoming], under_way: _Import) -> None:
    sets: dict[str, list[_Incoming]] = {}
    tables: list[_Incoming] = []
    for one in incoming:
        if folded(one.name.name) in METADATA_NAMES:
            tables.append(one)
        elif one.suffix in SUFFIXES or one.suffix in CAPTION_SUFFIXES:
            sets.setdefault(one.set_name, []).append(one)
        else:
            sentence = f"{one.name} is neither a picture nor a caption nor a zip; it was left out."
            under_way.skip(one.source, "other file", sentence)
    listed = [one for members in sets.values() for one in members]
    faults: dict[_Incoming, Problem | None] = {}
    said = under_way.way.said
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(lambda one: _fault(one, under_way.way.sizes), listed)
        for done, (one, fault) in enumerate(zip(listed, found, strict=True)):
            said("Checking", done, len(listed))
            faults[one] = fault
    under_way.skipped.extend(fault for fault in faults.values() if fault)
    for done, members in enumerate(sets.values()):
        said("Taking over", done, len(sets))
        _import_set([one for one in members if not faults[one]], under_way)
    for table in tables:
        _import_table(table, under_way)


def _fault(one: _Incoming, sizes: Sizes) -> Problem | None:
    """What is wrong with a picture or a caption."""
    if one.suffix in SUFFIXES:
        info = sizes.info(one.source, str(one.name))
        return info if isinstance(info, Problem) else None
    try:
        read_text(one.source, str(one.name))
    except DatasetError as error:
        return Problem(one.source, "caption", str(error))
    return None


def _import_set(members: list[_Incoming], under_way: _Import) -> None:
    """Copy a picture with its mask and caption under one free name."""
    if not members:
        return
    # Two of a kind arrive only where a sender's names differ in case or in letters that had to be replaced.
    kinds = {(one.is_mask, one.suffix): one for one in reversed(members)}
    firsts = [one for one in members if kinds[one.is_mask, one.suffix] is one]
    folder = under_way.into / members[0].name.parent
    stem = firsts[0].stem
    has_picture = any(one.suffix in SUFFIXES and not one.is_mask for one in firsts)
    if has_picture:
        stem = free_stem(stem, under_way.stems(folder))
        # One may have been taken back since the folder was read.
        while any(os.path.lexists(folder / f"{stem}{one.suffix}") for one in firsts):
            under_way.stems(folder).add(folded(stem))
            stem = free_stem(firsts[0].stem, under_way.stems(folder))
    for one in firsts:
        target = folder / f"{stem}{_MASK if one.is_mask else ''}{one.suffix}"
        if not has_picture and folded(target.name) in under_way.names(folder):
            sentence = f"{one.name} is there already and was left as it is; change it in its place."
            under_way.skip(one.source, "already there", sentence)
        else:
            _place(one, target, under_way)
    for one in members:
        if one not in firsts:
            _import_set([one], under_way)


def _place(one: _Incoming, target: Path, under_way: _Import) -> None:
    """Take over one file, whole or not at all."""
    try:
        take(one.source, target, under_way.way)
    except OSError as error:
        under_way.skip(
            one.source, "unreadable", f"{one.name} cannot be copied ({error.strerror}); try it again."
        )
        return
    under_way.place(target)
    under_way.placed[folded(one.name.as_posix())] = target


def _import_table(table: _Incoming, under_way: _Import) -> None:
    """Write the rows of a table as text files beside the pictures that have none."""
    captions, sentences = metadata_captions(table.source, str(table.name))
    for sentence in sentences:
        under_way.skip(table.source, "metadata", sentence)
    for name, caption in captions.items():
        shown = safe_name((table.name.parent / name).as_posix())
        picture = under_way.placed.get(folded(shown.as_posix())) or _there(under_way.into / shown)
        if picture is None:
            sentence = (
                f"{table.name} names {name}, which did not come along; add the picture and the table"
                " together."
            )
            under_way.skip(table.source, "metadata", sentence)
        elif not any(picture.with_suffix(suffix).exists() for suffix in CAPTION_SUFFIXES):
            write_caption(picture, caption, wait=False)
            under_way.added.append(picture.with_suffix(".txt"))


def _there(path: Path) -> Path | None:
    # `Path.is_file` raises where a name is too long for the file system.
    return path if os.path.isfile(path) else None
