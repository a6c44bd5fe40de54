"""Unpacking a zip that a stranger may have made.

Nothing in a zip's table of contents is trusted: names are checked before a byte is written, and bytes are
counted while they come out. All is unpacked into a temporary folder beside the wanted one and renamed at the
end, so that a zip that is refused halfway leaves nothing behind.
"""

import os
import re
import shutil
import stat
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_core.dataset.names import folded, safe_name
from lora_core.dataset.pictures import SUFFIXES
from lora_core.dataset.records import Problem
from lora_core.dataset.sidecars import CAPTION_SUFFIXES, METADATA_NAMES
from lora_core.dataset.walk import MOST_DEPTH, is_junk, shortened
from lora_core.spec.errors import DatasetError

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What a zip may hold: entries, bytes of one file, bytes of all, and bytes that one packed byte may
    become."""

    entries: int = 20_000
    file_bytes: int = 500_000_000
    total_bytes: int = 20_000_000_000
    ratio: int = 200
    # A small file may be packed as tightly as it likes: a white bitmap is no attack.
    ratio_from_bytes: int = 50_000_000


LIMITS = Limits()
_SHOWN_NAME = 200


@dataclass(frozen=True)
class Imported:
    """The files that were added, and what was not and why."""

    added: list[Path]
    skipped: list[Problem]


def is_useful(name: str) -> bool:
    """Whether a file belongs to a dataset: a picture, a caption or a table of captions."""
    suffix = PurePosixPath(name).suffix.casefold()
    return (
        suffix in SUFFIXES or suffix in CAPTION_SUFFIXES or folded(PurePosixPath(name).name) in METADATA_NAMES
    )


def unpack(zip_path: Path, into: Path, limits: Limits = Limits()) -> Imported:
    """Unpack a zip's pictures, captions and tables of captions into a folder that is made for it.

    Raises:
        DatasetError: the zip is damaged, encrypted, too large, or holds an entry that leads out of the
            folder; names the entry. Nothing is left of it then. Also if `into` exists.
    """
    if into.exists():
        raise DatasetError(f"{into} exists already; unpack {zip_path.name} into a new folder.")
    temporary = None
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        # Named so that what a kill leaves of it is known for what it is, and goes with the next start.
        prefix = f".{into.name}.{os.getpid()}-"
        temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".making", dir=into.parent))
        with zipfile.ZipFile(zip_path) as archive:
            _check(archive, zip_path.name, limits, shutil.disk_usage(temporary).free)
            added, skipped = _extract(archive, zip_path, temporary, limits)
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
    return Imported([into / path for path in added], skipped)


def _check(archive: zipfile.ZipFile, shown: str, limits: Limits, free: int) -> None:
    """Refuse what can be refused by the table of contents.

    Raises:
        DatasetError: names the zip and the entry.
    """
    entries = archive.infolist()
    if len(entries) > limits.entries:
        raise DatasetError(
            f"{shown} has {len(entries)} entries, more than {limits.entries}; pack fewer files."
        )
    for entry in entries:
        if fault := _fault(entry, limits):
            raise DatasetError(f"{shown} is refused: its entry {entry.filename[:_SHOWN_NAME]!r} {fault}.")
    total = sum(entry.file_size for entry in entries)
    if total > min(limits.total_bytes, free):
        raise DatasetError(
            f"{shown} would unpack to {total / 1e9:.1f} GB, more than the"
            f" {min(limits.total_bytes, free) / 1e9:.1f} GB there is room for; make it smaller or free some"
            " disk space."
        )


def _fault(entry: zipfile.ZipInfo, limits: Limits) -> str:
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
        return f"lies more than {MOST_DEPTH} folders deep; pack it flatter"
    if entry.flag_bits & 0x1:
        return "is encrypted; pack it without a password"
    if entry.file_size > limits.file_bytes:
        return f"is larger than {limits.file_bytes / 1e6:.0f} MB; leave it out"
    if entry.file_size > max(limits.ratio_from_bytes, limits.ratio * entry.compress_size):
        return "unpacks to far more than a picture can; leave it out"
    return ""


def not_unpacked(zip_path: Path) -> list[Problem]:
    """A note for each entry of a zip that `unpack` leaves out; hidden ones share one.

    Raises:
        DatasetError: the zip cannot be read.
    """
    try:
        with zipfile.ZipFile(zip_path) as archive:
            return _sorted(archive, zip_path)[1]
    except (OSError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{zip_path.name} cannot be read ({error}); pack it again.") from error


def _sorted(
    archive: zipfile.ZipFile, zip_path: Path
) -> tuple[dict[PurePosixPath, zipfile.ZipInfo], list[Problem]]:
    """The useful entries by the relative path that they get, and a note on each of the others."""
    useful: dict[PurePosixPath, zipfile.ZipInfo] = {}
    notes: list[Problem] = []
    hidden: list[str] = []
    for entry in archive.infolist():
        name = _true_name(entry)
        if entry.is_dir():
            continue
        if any(is_junk(part) for part in name.split("/")):
            hidden.append(name)
        elif not is_useful(name):
            sentence = f"{name} in {zip_path.name} is neither a picture nor a caption; it is not used."
            notes.append(Problem(zip_path / safe_name(name), "other file", sentence, False))
        elif safe_name(name) in useful:
            sentence = f"{name} stands in {zip_path.name} twice; the first one is used."
            notes.append(Problem(zip_path / safe_name(name), "other file", sentence, False))
        else:
            useful[safe_name(name)] = entry
    if hidden:
        sentence = (
            f"{len(hidden)} hidden in {zip_path.name}, not looked at ({shortened(hidden, len(hidden))})."
        )
        notes.append(Problem(zip_path, "hidden", sentence, False))
    return useful, notes


def _extract(
    archive: zipfile.ZipFile, zip_path: Path, into: Path, limits: Limits
) -> tuple[list[Path], list[Problem]]:
    """Write the useful entries; the paths are relative to `into`."""
    added: list[Path] = []
    useful, skipped = _sorted(archive, zip_path)
    room = limits.total_bytes
    for name, entry in useful.items():
        target = into / name
        if target.exists():  # where the file system takes two names for one
            sentence = f"{name} stands in {zip_path.name} twice; the first one is used."
            skipped.append(Problem(zip_path / name, "other file", sentence, False))
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        room -= _write(archive, entry, target, min(room, limits.file_bytes))
        added.append(target.relative_to(into))
    return added, [one for one in skipped if one.kind != "hidden"]


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, most: int) -> int:
    """Write one entry and return its bytes, counted as they come: the size in the table of contents can
    lie."""
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


def _true_name(entry: zipfile.ZipInfo) -> str:
    """The entry's name with slashes; UTF-8 that a packer did not announce is read as what it is."""
    name = entry.filename
    if not entry.flag_bits & 0x800:
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:
            name = entry.filename
    return name.replace("\\", "/")
