"""Imports files into a dataset folder: dropped files, a folder, or a zip from a stranger.

Originals never change: files are copied, or linked on request, byte for byte, and nothing that exists is
overwritten. Files are judged one by one; what cannot be used is reported and does not block the others.
Nothing in a zip's or a tar's table of contents is trusted: names are checked first and bytes counted while
they are read. A table of captions, what other programs keep beside images or inside of them (`sidecars`) and
the class folders of Hugging Face's `imagefolder` become one text file an image, because images may get new
names and because the window edits text files.
"""

import contextlib
import errno
import filecmp
import functools
import itertools
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO

from lora_core.data.captions import (
    CAPTION_SUFFIXES,
    METADATA_NAMES,
    PARQUET_TABLE,
    SIDECAR_SUFFIXES,
    Sidecar,
    read_embedded,
    read_metadata_captions,
    read_sidecar,
    read_text,
    spaced_tag,
    write_caption,
)
from lora_core.data.images import (
    CONCEPT_LIST,
    CROP_LIST,
    HOLDOUT_LIST,
    IMAGE_SUFFIXES,
    MASK_ENDINGS,
    MASK_OF,
    MAX_FILE_BYTES,
    MOST_DEPTH,
    FileProblem,
    SizeCache,
    abbreviate,
    folder_kind,
    index_images,
    is_junk,
    is_mask,
    mask_owners,
    walk_files,
)
from lora_core.errors import DatasetError, wrap_os_errors
from lora_core.system.files import (
    clean_text,
    file_bytes,
    fold_name,
    plain_name,
    replacing,
    safe_name,
    unused_stem,
)

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Limits of a zip: entries, bytes of one file, bytes of all, and the largest compression ratio."""

    entries: int = 100_000
    file_bytes: int = 500_000_000
    total_bytes: int = 20_000_000_000
    ratio: int = 200
    # Small files may be packed at any ratio: a white bitmap is not an attack.
    ratio_from_bytes: int = 50_000_000


LIMITS = Limits()
_SHOWN_NAME = 200
ARCHIVES = (".zip", ".tar")
"""A tar is a shard of a webdataset. Of a packed one (`.tar.gz`) nothing is known before all is unpacked."""
_SPLITS = ("train", "test", "validation", "val", "dev", "eval")
"""Folders above the class folders of an `imagefolder`."""
_TWICE = "has the name of another entry; the first one is used."


@dataclass(frozen=True)
class Imported:
    """The files that were added, and those that were not and why."""

    added: list[Path]
    skipped: list[FileProblem]


def is_dataset_file(name: str) -> bool:
    """Whether a file belongs to a dataset: an image, a caption, a table of captions, the list of crops or of
    concepts."""
    suffix = PurePosixPath(name).suffix.casefold()
    return (
        suffix in IMAGE_SUFFIXES
        or suffix in CAPTION_SUFFIXES
        or fold_name(PurePosixPath(name).name) in METADATA_NAMES
        or name in (CROP_LIST, CONCEPT_LIST)
    )


def is_import_file(name: str) -> bool:
    """Whether an import reads a file: one of a dataset, or one that may contain a caption."""
    suffix = PurePosixPath(name).suffix.casefold()
    is_table = fold_name(PurePosixPath(name).name) == PARQUET_TABLE
    return is_dataset_file(name) or is_table or suffix in (*SIDECAR_SUFFIXES, ".aae")


class _Tar(contextlib.ExitStack):
    """A tar that is read as a zip is."""

    def __init__(self, path: Path) -> None:
        """Open it; packed ones are refused."""
        super().__init__()
        self._tar = self.enter_context(tarfile.open(path, "r:"))  # noqa: SIM115
        self._members: dict[int, tarfile.TarInfo] = {}

    def infolist(self) -> list[zipfile.ZipInfo]:
        """The entries, one more than may be at most."""
        entries: list[zipfile.ZipInfo] = []
        for member in itertools.islice(self._tar, LIMITS.entries + 1):
            entry = zipfile.ZipInfo(clean_text(member.name) + "/" * member.isdir())
            entry.file_size = entry.compress_size = member.size
            entry.flag_bits = 0x800
            is_link = member.issym() or member.islnk()
            plain = stat.S_IFDIR if member.isdir() else stat.S_IFREG
            odd = stat.S_IFLNK if is_link else stat.S_IFCHR
            is_plain = member.isdir() or (member.isreg() and not member.issparse())
            entry.external_attr = (plain if is_plain else odd) << 16
            self._members[id(entry)] = member
            entries.append(entry)
        return entries

    def open(self, entry: zipfile.ZipInfo) -> IO[bytes]:
        """The bytes of an entry of `infolist`."""
        found = self._tar.extractfile(self._members[id(entry)])
        assert found is not None
        return found


def unpack(
    zip_path: Path,
    into: Path,
    limits: Limits = Limits(),
    name_of: Callable[[str], PurePosixPath] = plain_name,
    shown: str = "",
    wanted: Callable[[str], bool] = is_dataset_file,
) -> Imported:
    """Unpack the images, captions and tables of captions of a zip or a tar into a folder that is made for it.

    Runs know images by their names, so a zip that is unpacked again gives each the same name: `name_of`.

    Args:
        zip_path: the archive.
        into: the folder.
        limits: of the archive.
        name_of: the path that an entry gets.
        shown: the name of the archive where its sender calls it otherwise.
        wanted: which entries are unpacked.

    Raises:
        DatasetError: the zip is damaged, encrypted, too large, or holds an entry that leads out of the
            folder; names the entry. Nothing is left of it then. Also if `into` exists.
    """
    if into.exists():
        raise DatasetError(f"{into} already exists; unpack {zip_path.name} into a new folder.")
    temporary = None
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        # Named so that the next start recognizes and removes what a kill leaves.
        prefix = f".{into.name}.{os.getpid()}-"
        temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".making", dir=into.parent))
        kind = PurePosixPath(shown or zip_path.name).suffix.casefold()
        with _Tar(zip_path) if kind == ".tar" else zipfile.ZipFile(zip_path) as archive:
            entries = archive.infolist()
            _check(entries, zip_path.name, limits, shutil.disk_usage(temporary).free)
            useful, skipped = _sort_entries(entries, zip_path, name_of, wanted)
            added, twice = _extract(archive, zip_path, temporary, limits, useful)
        os.replace(temporary, into)
    except DatasetError:
        raise
    except Exception as error:  # a damaged zip can raise anything inside a decompressor
        raise DatasetError(
            f"{zip_path.name} cannot be unpacked ({error}); pack it again, or unpack it yourself and give the"
            " folder."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    skipped = [one for one in skipped if one.kind != "hidden"] + twice
    return Imported([into / path for path in added], skipped)


def _check(entries: list[zipfile.ZipInfo], shown: str, limits: Limits, free: int) -> None:
    """Refuse what can be refused by the table of contents."""
    if len(entries) > limits.entries:
        raise DatasetError(
            f"{shown} has {len(entries)} entries, more than {limits.entries}; pack fewer files."
        )
    for entry in entries:
        if fault := _zip_fault(entry, limits):
            raise DatasetError(f"{shown} is refused: its entry {entry.filename[:_SHOWN_NAME]!r} {fault}.")
    total = sum(entry.file_size for entry in entries)
    if total > min(limits.total_bytes, free):
        raise DatasetError(
            f"{shown} would unpack to {total / 1e9:.1f} GB, more than the"
            f" {min(limits.total_bytes, free) / 1e9:.1f} GB there is room for; make it smaller or free some"
            " disk space."
        )


def _zip_fault(entry: zipfile.ZipInfo, limits: Limits) -> str:
    """Why an entry is refused, or nothing."""
    name = entry.filename.replace("\\", "/")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "has an absolute path; pack the files with relative paths"
    if ".." in name.split("/"):
        return "leads out of the folder with `..`; pack the files with plain paths"
    if kind == stat.S_IFLNK:
        return "is a symbolic link; pack the file itself"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is not a plain file; leave it out"
    if name.count("/") > MOST_DEPTH:
        return f"is more than {MOST_DEPTH} folders deep; pack it flatter"
    if entry.flag_bits & 0x1:
        return "is encrypted; pack it without a password"
    if entry.file_size > limits.file_bytes:
        return f"is larger than {limits.file_bytes / 1e6:.0f} MB; leave it out"
    if entry.file_size > max(limits.ratio_from_bytes, limits.ratio * entry.compress_size):
        return "unpacks to far more than an image can; leave it out"
    return ""


def list_skipped_entries(zip_path: Path) -> list[FileProblem]:
    """A note for each entry of a zip that `unpack` leaves out; hidden ones share one.

    Raises:
        DatasetError: the zip cannot be read.
    """
    try:
        with zipfile.ZipFile(zip_path) as archive:
            return _sort_entries(archive.infolist(), zip_path)[1]
    except (OSError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{zip_path.name} cannot be read ({error}); pack it again.") from error


def _sort_entries(
    entries: list[zipfile.ZipInfo],
    zip_path: Path,
    name_of: Callable[[str], PurePosixPath] = plain_name,
    wanted: Callable[[str], bool] = is_dataset_file,
) -> tuple[dict[PurePosixPath, zipfile.ZipInfo], list[FileProblem]]:
    """The useful entries by the relative path that they get, and a note on each of the others."""
    useful: dict[PurePosixPath, zipfile.ZipInfo] = {}
    notes: list[FileProblem] = []
    hidden: list[str] = []
    for entry in entries:
        name = _decode_name(entry)
        if entry.is_dir():
            continue
        if any(is_junk(part) for part in name.split("/")):
            hidden.append(name)
        elif not wanted(name):
            notes.append(_unused_entry(zip_path, name, "is neither an image nor a caption; it is not used."))
        elif name_of(name) in useful:
            notes.append(_unused_entry(zip_path, name, _TWICE))
        else:
            useful[name_of(name)] = entry
    if hidden:
        sentence = f"{len(hidden)} hidden in {zip_path.name}, not looked at ({abbreviate(hidden)})."
        notes.append(FileProblem(zip_path, "hidden", sentence, False))
    return useful, notes


def _unused_entry(zip_path: Path, name: str, why: str) -> FileProblem:
    return FileProblem(zip_path / safe_name(name), "other file", f"{name} in {zip_path.name} {why}", False)


def _extract(
    archive: "zipfile.ZipFile | _Tar",
    zip_path: Path,
    into: Path,
    limits: Limits,
    useful: dict[PurePosixPath, zipfile.ZipInfo],
) -> tuple[list[Path], list[FileProblem]]:
    """Write the useful entries; returns their paths relative to `into`, and a note on each left out."""
    added: list[Path] = []
    skipped: list[FileProblem] = []
    room = limits.total_bytes
    for name, entry in useful.items():
        target = into / name
        if target.exists():  # where the file system takes two names for one
            skipped.append(_unused_entry(zip_path, str(name), _TWICE))
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        room -= _write(archive, entry, target, min(room, limits.file_bytes))
        added.append(target.relative_to(into))
    return added, skipped


def _write(archive: "zipfile.ZipFile | _Tar", entry: zipfile.ZipInfo, target: Path, most: int) -> int:
    """Write one entry and return its bytes, counted as they come: the size in the table of contents may be
    false."""
    written = 0
    with archive.open(entry) as source, open(target, "xb") as file:
        while chunk := source.read(_CHUNK):
            written += len(chunk)
            if written > most:
                raise DatasetError(
                    f"The zip is refused: its entry {entry.filename!r} unpacks to more than {most / 1e6:.0f}"
                    " MB; leave it out."
                )
            file.write(chunk)
    return written


def _decode_name(entry: zipfile.ZipInfo) -> str:
    """The entry's name with slashes; undeclared UTF-8 is read as UTF-8."""
    name = entry.filename
    if not entry.flag_bits & 0x800:
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:
            name = entry.filename
    return name.replace("\\", "/")


@dataclass(frozen=True)
class TransferMode:
    """How files are transferred.

    Attributes:
        how: "copy"; "link", where images share the originals' place on the disk and captions are copied all
        the same, as the window writes them; or "move", for files that were made for the import only.
        progress: called with (phase, done, total); an exception ends the import.
        sizes: where the sizes of the images that were decoded are remembered.
    """

    how: str = "copy"
    progress: Callable[[str, int, int], None] = field(default=lambda phase, done, total: None)
    sizes: SizeCache = field(default_factory=SizeCache)


def transfer_file(source: Path, target: Path, way: TransferMode) -> None:
    """Take over one file.

    Raises:
        OSError: it cannot be read, or its place not be written; nothing is left there then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target, sync=False) as temporary:
        if way.how == "move":
            shutil.move(source, temporary)
        elif way.how == "link" and target.suffix.casefold() in IMAGE_SUFFIXES:
            _link_file(source, temporary)
        else:
            shutil.copyfile(source, temporary)
    way.sizes.carry(source, target)


def _link_file(source: Path, target: Path) -> None:
    """A hard link, which stays when the original is moved or removed; to another disk a symbolic one."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP):
            raise
        os.symlink(os.path.realpath(source), target)


_MASK = "-masklabel"
_THREADS = 4


@dataclass(frozen=True)
class _Incoming:
    """An incoming file: its path, and its relative path from the sender, made safe."""

    source: Path
    name: PurePosixPath

    @property
    def suffix(self) -> str:
        return self.name.suffix.casefold()

    @property
    def is_mask(self) -> bool:
        return fold_name(self.name.stem).endswith(_MASK) and self.suffix in IMAGE_SUFFIXES

    @property
    def stem(self) -> str:
        """The image's stem, of its mask and its caption too."""
        return self.name.stem[: -len(_MASK)] if self.is_mask else self.name.stem

    @property
    def set_name(self) -> str:
        """Shared by an image, its mask and its caption, which must keep together."""
        return fold_name((self.name.parent / self.stem).as_posix())

    @property
    def is_picture(self) -> bool:
        """Whether it is an image to train on."""
        named = is_mask(Path(self.name)) or folder_kind(str(self.name)) == "mask"
        return self.suffix in IMAGE_SUFFIXES and not named

    def join_image(self, images: Mapping[str, list["_Incoming"]]) -> "_Incoming":
        """`cat_mask.png` or `mask/cat.png`, where an image `cat` comes too, under the name that keeps both
        together."""
        image = self.name.with_suffix("").as_posix()
        if self.is_picture:
            image = image[: -len(MASK_OF[0])] if fold_name(image).endswith(MASK_OF) else ""
        elif self.suffix not in IMAGE_SUFFIXES or folder_kind(str(self.name)) != "mask":
            image = ""
        if not (image and (owners := mask_owners(images, image))):
            return self
        owner = owners[0].name
        return replace(self, name=owner.with_name(f"{owner.stem}{_MASK}{self.name.suffix}"))


class _Import:
    """One import into a dataset folder."""

    def __init__(self, into: Path, files: list[Path], way: TransferMode) -> None:
        """Check the folder and its free space."""
        with wrap_os_errors(DatasetError, f"The folder {into} cannot be written", "; choose another."):
            into.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(into).free
        needed = sum(map(_bytes_to_copy, files)) if way.how == "copy" else 0
        if needed > free:
            raise DatasetError(
                f"The files need {needed / 1e6:.0f} MB, and {into} has room for {free / 1e6:.0f} MB; free"
                " some disk space."
            )
        self.into, self.way = into, way
        self.done = Imported([], [])
        self._came: set[str] = set()
        self._placed: dict[str, Path] = {}
        self._new: set[Path] = set()
        self._sidecars: dict[str, list[str]] = {"read": [], "inside": [], "captioned": []}
        self._fields_left: set[str] = set()
        self._taken: dict[Path, tuple[set[str], set[str]]] = {}

    def skip(self, one: _Incoming, kind: str, rest: str) -> None:
        """Note why a file is not added: its name, then `rest`."""
        self.done.skipped.append(FileProblem(one.source, kind, f"{one.name} {rest}"))

    def add(self, incoming: list[_Incoming]) -> Imported:
        """Add images with their masks and captions, then their data from tables and sidecars."""
        sidecars: list[_Incoming] = []
        sets: dict[str, list[_Incoming]] = {}
        tables: list[_Incoming] = []
        lists: list[_Incoming] = []
        pictures = [(one, one.name.with_suffix("").as_posix()) for one in incoming if one.is_picture]
        images = index_images(pictures)
        for one in (each.join_image(images) for each in incoming):
            if one.name.name in (CROP_LIST, HOLDOUT_LIST) and not mask_owners(images, one.set_name):
                lists.append(one)
            elif one.suffix in IMAGE_SUFFIXES and fold_name(one.name.stem).endswith(MASK_ENDINGS[1]):
                self.skip(one, "other file", "is a conditioning image, which is not used; it was left out.")
            elif fold_name(one.name.name) in (*METADATA_NAMES, PARQUET_TABLE):
                tables.append(one)
            elif one.name == PurePosixPath(CONCEPT_LIST):
                self._add_concepts(one)
            elif one.suffix in IMAGE_SUFFIXES or one.suffix in CAPTION_SUFFIXES:
                sets.setdefault(one.set_name, []).append(one)
            elif one.suffix in SIDECAR_SUFFIXES:
                sidecars.append(one)
            elif one.suffix == ".aae":
                self.skip(one, "sidecar", "holds edits by Photos, and is not read; export the edited image.")
            else:
                self.skip(one, "other file", "is neither an image nor a caption nor a zip; it was left out.")
        listed = [one for members in sets.values() for one in members]
        self._came = {fold_name(one.name.as_posix()) for one in listed if one.is_picture}
        faults: dict[_Incoming, FileProblem | None] = {}
        threads = ThreadPoolExecutor(_THREADS)
        try:
            for done, (one, fault) in enumerate(zip(listed, threads.map(self._fault, listed), strict=True)):
                self.way.progress("Checking", done, len(listed))
                faults[one] = fault
        finally:
            threads.shutdown(cancel_futures=True)
        self.done.skipped.extend(fault for fault in faults.values() if fault)
        for done, members in enumerate(sets.values()):
            self.way.progress("Importing", done, len(sets))
            self._add_set([one for one in members if not faults[one]])
        for table in tables:
            self._add_table(table)
        for one in lists:
            self._add_list(one)
        for done, one in enumerate(sidecars):
            self.way.progress("Importing", done, len(sidecars))
            self._add_sidecar(one)
        for one in (each for each in listed if each.is_picture):
            self._add_embedded(one)
        if not tables:
            self._add_classes([one for one in listed if one.is_picture])
        self._tell_sidecars()
        return self.done

    def _placed_picture(self, one: _Incoming) -> Path | None:
        """The image that a sidecar is of: `cat.jpg` of `cat.jpg.json`, or of `cat.json`."""
        stem = one.name.with_suffix("")
        names = [stem, *(one.name.with_suffix(suffix) for suffix in sorted(IMAGE_SUFFIXES))]
        # Of what came along first: an image of that name that was here before is another one.
        came = [name for name in names if fold_name(name.as_posix()) in self._came]
        there = (self._placed.get(fold_name(name.as_posix())) for name in came)
        found = filter(None, there) if came else (self.into / name for name in names)
        return next(
            (path for path in found if path.suffix.casefold() in IMAGE_SUFFIXES and os.path.isfile(path)),
            None,
        )

    def _add_sidecar(self, one: _Incoming) -> None:
        picture = self._placed_picture(one)
        if picture is None:
            self.skip(one, "other file", "belongs to no image; it was left out.")
            return
        self._caption_from(one, picture, read_sidecar)

    def _add_embedded(self, one: _Incoming) -> None:
        picture = self._placed.get(fold_name(one.name.as_posix()))
        if picture and picture in self._new and not _is_captioned(picture):
            self._caption_from(one, picture, read_embedded)

    def _caption_from(self, one: _Incoming, picture: Path, read: Callable[[Path, str], Sidecar]) -> None:
        """Write another program's description of an image as its caption, if it has none."""
        inside = read is read_embedded
        try:
            found = read(picture if inside else one.source, str(one.name))
        except DatasetError as error:
            self.done.skipped.append(FileProblem(one.source, "sidecar", str(error)))
            return
        if not found.caption:
            if not inside:
                self.skip(one, "sidecar", "has no known description of its image; it was left out.")
        elif _is_captioned(picture):
            self._sidecars["captioned"].append(str(one.name))
        else:
            write_caption(picture, found.caption, wait=False)
            self.done.added.append(picture.with_suffix(".txt"))
            self._sidecars["inside" if inside else "read"].append(str(one.name))
        self._fields_left.update(found.left)

    def _add_classes(self, pictures: list[_Incoming]) -> None:
        """Caption images by their class folders, as `train/cat/1.png` of an `imagefolder`, if none has a
        caption."""
        placed = [(one, self._placed.get(fold_name(one.name.as_posix()))) for one in pictures]
        split = [
            (one.name.parts[-2], path)
            for one, path in placed
            if path
            and path in self._new
            and len(one.name.parts) > 2
            and fold_name(one.name.parts[-3]) in _SPLITS
        ]
        classes = {name for name, _ in split}
        if len(classes) < 2 or len(split) < len(pictures) or any(_is_captioned(path) for _, path in split):
            return
        for name, path in split:
            write_caption(path, spaced_tag(name), wait=False)
            self.done.added.append(path.with_suffix(".txt"))
        sentence = (
            f"The images have the names of their class folders as captions ({abbreviate(sorted(classes))})."
        )
        self.done.skipped.append(FileProblem(self.into, "taken", sentence, False))

    def _tell_sidecars(self) -> None:
        """Which sidecars were used, and which were not."""
        fields = (
            f" Of their fields not taken: {', '.join(sorted(self._fields_left))}."
            if self._fields_left
            else ""
        )
        words = {
            "read": "Captions were made of {} files beside images ({}).",
            "inside": "Captions were made of the descriptions and keywords inside {} images ({}).",
            "captioned": "{} files beside images were not taken, as these have a caption already ({}).",
        }
        for kind, names in self._sidecars.items():
            if names:
                sentence = words[kind].format(len(names), abbreviate(names)) + (
                    fields if kind == "read" else ""
                )
                self.done.skipped.append(FileProblem(self.into, "taken", sentence, False))

    def add_zip(self, source: Path, name: str) -> None:
        """Unpack into a hidden folder and add its content."""
        self.way.progress("Unpacking", 0, 1)
        try:
            end = f".zip.{os.getpid()}-0.tmp"
            with tempfile.TemporaryDirectory(end, ".unpacking-", self.into) as temporary:
                folder = Path(temporary) / "files"
                inside = unpack(source, folder, name_of=safe_name, shown=name, wanted=is_import_file)
                inner = import_folder(Path(temporary) / "files", self.into, replace(self.way, how="move"))
        except DatasetError as error:
            # The sender's name, so that messages do not speak of a temporary upload.
            sentence = str(error).replace(source.name, PurePosixPath(name).name)
            self.done.skipped.append(FileProblem(source, "zip", sentence))
            return
        self.done.added.extend(inner.added)
        self.done.skipped.extend([*inside.skipped, *inner.skipped])

    def _fault(self, one: _Incoming) -> FileProblem | None:
        """The problem of an image or a caption."""
        if one.suffix in IMAGE_SUFFIXES:
            info = self.way.sizes.info(one.source, str(one.name))
            return info if isinstance(info, FileProblem) else None
        try:
            read_text(one.source, str(one.name))
        except DatasetError as error:
            return FileProblem(one.source, "caption", str(error))
        return None

    @functools.cached_property
    def _by_size(self) -> dict[int, list[Path]]:
        """The images that were in the dataset before this import, by their bytes."""
        found: dict[int, list[Path]] = {}
        for path in walk_files(self.into, IMAGE_SUFFIXES):
            if isinstance(path, Path) and _Incoming(path, self._name_of(path)).is_picture:
                found.setdefault(file_bytes(path), []).append(path)
        return found

    def _same_picture(self, file: Path) -> Path | None:
        """The image with the bytes of `file` that was in the dataset before this import, if any."""
        for path in self._by_size.get(file_bytes(file), []):
            with contextlib.suppress(OSError):
                if filecmp.cmp(path, file, shallow=False):
                    return path
        return None

    def _name_of(self, path: Path) -> PurePosixPath:
        """The name of a file of the dataset, with its folders."""
        return PurePosixPath(path.relative_to(self.into).as_posix())

    def _names_in(self, folder: Path) -> tuple[set[str], set[str]]:
        """The folded names and stems in a folder of the dataset, read once."""
        if folder not in self._taken:
            there = [p.name for p in (folder.iterdir() if folder.is_dir() else ()) if not is_junk(p.name)]
            self._taken[folder] = ({fold_name(n) for n in there}, {fold_name(Path(n).stem) for n in there})
        return self._taken[folder]

    def _add_set(self, members: list[_Incoming]) -> None:
        """Add an image with its mask and caption under one free name."""
        if not members:
            return
        # Two of a kind arrive only where a sender's names differ in case or in letters that had to be
        # replaced; an image of another case keeps its own caption.
        images = [one.stem for one in members if one.is_picture]
        others = {stem for stem in images if stem != images[0]}
        kinds = {(one.is_mask, one.suffix): one for one in reversed(members) if one.stem not in others}
        firsts = [one for one in members if one in kinds.values()]
        same = {one: found for one in firsts if one.is_picture and (found := self._same_picture(one.source))}
        has_picture = any(one.is_picture and one not in same for one in firsts)
        folder, stem = self.into / members[0].name.parent, firsts[0].stem
        if same and not has_picture:
            # Its caption and mask go next to the existing image.
            there = next(iter(same.values()))
            folder, stem = there.parent, there.stem
        names, stems = self._names_in(folder)
        if has_picture:
            # One may have been taken back since the folder was read.
            stem = unused_stem(stem, stems, folder, [one.suffix for one in firsts])
        for one in firsts:
            target = folder / f"{stem}{_MASK if one.is_mask else ''}{one.suffix}"
            if one in same:
                self.skip(one, "same picture", f"is already here, as {self._name_of(same[one])}.")
                self._placed[fold_name(one.name.as_posix())] = same[one]
                continue
            if not has_picture and fold_name(target.name) in names:
                self.skip(one, "already there", "already exists and was not replaced; edit it in place.")
                continue
            try:
                transfer_file(one.source, target, self.way)
            except OSError as error:
                self.skip(one, "unreadable", f"cannot be copied ({error.strerror}); try it again.")
                continue
            self.done.added.append(target)
            self._new.add(target)
            names.add(fold_name(target.name))
            stems.add(fold_name(target.stem))
            self._placed[fold_name(one.name.as_posix())] = target
        self._add_set([one for one in members if one not in firsts])

    def _add_concepts(self, one: _Incoming) -> None:
        """Add the list of concepts, whose folders keep their names, where there is none yet."""
        target = self.into / CONCEPT_LIST
        if os.path.lexists(target):
            self.skip(one, "already there", "already exists and was not replaced; edit it in place.")
            return
        try:
            transfer_file(one.source, target, self.way)
        except OSError as error:
            self.skip(one, "unreadable", f"cannot be copied ({error.strerror}); try it again.")

    def _add_list(self, one: _Incoming) -> None:
        """Take the new images' crops, or which of them are held out, by the names that they have here."""
        from lora_core.data import dataset

        try:
            crops, held = dataset.read_crops(self.into), dataset.read_holdout_list(self.into)
            is_crops = one.name.name == CROP_LIST
            named = dataset.read_crops(one.source) if is_crops else dataset.read_holdout_list(one.source)
            here = {name: self._placed.get(fold_name((one.name.parent / name).as_posix())) for name in named}
            new = {self._name_of(path).as_posix(): name for name, path in here.items() if path in self._new}
            if isinstance(named, dict):
                dataset.write_crops(self.into, crops | {name: named[old] for name, old in new.items()})
            else:
                dataset.write_holdout_list(self.into, held | new.keys())
        except DatasetError as error:
            self.done.skipped.append(FileProblem(one.source, "other file", str(error)))
            return
        if others := abbreviate(sorted(name for name in named if name not in new.values())):
            self.skip(one, "unused row", f"was not taken for images that were not added ({others}).")

    def _add_table(self, table: _Incoming) -> None:
        """Write the rows of a table as text files beside the images that have none."""
        captions, sentences, repeated = read_metadata_captions(table.source, str(table.name))
        if repeated:
            names = abbreviate(repeated)
            self.skip(table, "unused row", f"has several rows for {names}; the last of each was taken.")
        self.done.skipped.extend(FileProblem(table.source, "metadata", sentence) for sentence in sentences)
        captioned: list[str] = []
        for name, caption in captions.items():
            shown = safe_name((table.name.parent / name).as_posix())
            picture = self._placed.get(fold_name(shown.as_posix()), self.into / shown)
            # `Path.is_file` raises where a name is too long for the file system.
            if not os.path.isfile(picture):
                missing = f"names {name}, which was not added; add the image and the table together."
                self.skip(table, "metadata", missing)
            elif _is_captioned(picture):
                captioned.append(name)
            else:
                write_caption(picture, caption, wait=False)
                self.done.added.append(picture.with_suffix(".txt"))
        if captioned:
            why = f"as their images have a caption already ({abbreviate(captioned)})."
            self.skip(table, "unused row", f"has rows that were not taken, {why}")


def _is_captioned(picture: Path) -> bool:
    return any(picture.with_suffix(suffix).exists() for suffix in CAPTION_SUFFIXES)


def _bytes_to_copy(file: Path) -> int:
    """The size of a file that may be imported; others are refused one by one."""
    is_zip = file.suffix.casefold() in ARCHIVES
    size = file.stat().st_size if (is_zip or is_dataset_file(file.name)) and os.path.isfile(file) else 0
    return size if is_zip or size <= MAX_FILE_BYTES else 0


def import_files(
    files: list[Path], into: Path, names: list[str] | None = None, way: TransferMode | None = None
) -> Imported:
    """Take over images, their captions and masks into a dataset folder, and unpack zips.

    A name that is taken gets `-2`, an image together with its caption; an image that the dataset holds byte
    for byte is skipped. Problems of files, zips included, are listed in `skipped`.

    Args:
        files: their paths.
        into: the dataset folder, made if absent.
        names: what their sender calls them, with sub-folders before slashes; default the files' own names.
        way: how; default is to copy.

    Raises:
        DatasetError: the folder cannot be written, or the disk is too full.
    """
    under_way = _Import(into, files, way or TransferMode())
    loose: list[_Incoming] = []
    for source, name in zip(files, map(clean_text, names or [file.name for file in files]), strict=True):
        if any(is_junk(part) for part in PurePosixPath(name.replace("\\", "/")).parts):
            continue
        if PurePosixPath(name).suffix.casefold() in ARCHIVES:
            under_way.add_zip(source, name)
        else:
            loose.append(_Incoming(source, safe_name(name)))
    return under_way.add(loose)


def import_folder(folder: Path, into: Path, way: TransferMode | None = None) -> Imported:
    """Take over the images, captions and masks below a folder into a dataset folder; `10_name` sub-folders
    stay.

    Raises:
        DatasetError: the folder does not exist, `into` cannot be written, or the disk is too full.
    """
    if not folder.is_dir():
        raise DatasetError(f"The folder {folder} does not exist; check its path.")
    found = list(walk_files(folder))
    # A dataset folder inside the folder that is imported would be copied into itself.
    inner = into if into.is_relative_to(folder) else None
    files = [one for one in found if isinstance(one, Path) and not (inner and one.is_relative_to(inner))]
    under_way = _Import(into, files, way or TransferMode())
    under_way.done.skipped.extend(
        one for one in found if isinstance(one, FileProblem) and one.kind != "hidden"
    )
    # Of a webdataset all shards together; zips in a folder are left out, as before.
    for shard in (file for file in files if file.suffix.casefold() == ".tar"):
        under_way.add_zip(shard, shard.relative_to(folder).as_posix())
    files = [file for file in files if file.suffix.casefold() != ".tar"]
    return under_way.add([_Incoming(file, safe_name(file.relative_to(folder).as_posix())) for file in files])
