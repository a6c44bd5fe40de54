"""Lists the files of a dataset folder, in the same order on every system, and the records they become.

A folder may come from a stranger (a clone, an unpacked archive): links to folders are not followed, links
to files count only inside the folder, and pipes, devices and sockets are never opened. Names are compared
without case and in one Unicode form, as Windows and macOS do.
"""

import os
import re
import stat
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lora_core.errors import DatasetError
from lora_core.system.files import clean_text, fold_name


@dataclass(frozen=True)
class ImageRecord:
    """One usable image.

    Width and height are in pixels after EXIF rotation. The caption holds one alternative a line. `repeats` is
    how often the image is shown in an epoch. `held_out` says that it was chosen to measure on,
    `transparent` that parts of it are see-through, which are trained on as white, `animated` that it has more
    frames, of which the first is trained on.
    """

    path: Path
    width: int
    height: int
    caption: str
    repeats: int = 1
    held_out: bool = False
    transparent: bool = False
    animated: bool = False


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
    """The usable images in order of path, problems of the rest, and notes on unused files."""

    records: list[ImageRecord]
    problems: list[FileProblem]
    notes: list[FileProblem] = field(default_factory=list)


MOST_DEPTH = 20
"""Folders in one another; deeper ones are refused."""
_LEFT_BEHIND = frozenset({"__macosx", "thumbs.db", "desktop.ini"})
MASK_ENDINGS = ("-masklabel", "-condlabel")
_MASK_FOLDER = re.compile(r"masks?")
_IMAGES = r"[ _-]?(images?|imgs?|pictures|data|set)"
_REGULARISATION = re.compile(rf"(regs?|regulari[sz]ation)({_IMAGES})?|class{_IMAGES}")
_SHOWN_NAMES = 5


def is_junk(name: str) -> bool:
    """A hidden file or folder, or one that a system leaves behind."""
    return (name.startswith(".") and name.strip(".") != "") or fold_name(name) in _LEFT_BEHIND


def is_mask(path: Path) -> bool:
    """A mask of another image by its own name (`cat-masklabel.png` of `cat.png`)."""
    return fold_name(path.stem).endswith(MASK_ENDINGS)


def unused_folder_kind(shown: str) -> str:
    """ "mask" or "regularisation" for a file in a folder of such images, else "".

    Args:
        shown: path below the dataset folder, with forward slashes.
    """
    for part in fold_name(shown).split("/")[:-1]:
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
    try:
        found = path.stat()
    except OSError as error:
        raise DatasetError(
            f"{shown} cannot be opened ({error.strerror}); check that it is there and may be read."
        ) from error
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


def abbreviate(names: list[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:_SHOWN_NAMES])
    more = len(names) - _SHOWN_NAMES
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
        elif not os.path.isdir(path):
            yield _check_file(path, shown, *bounds)
        elif entry.is_symlink() or getattr(os.path, "isjunction", lambda _: False)(path):
            yield _check_folder_link(path, shown, bounds[0])
        elif shown.count("/") + 1 > MOST_DEPTH:
            sentence = f"The folder {shown} lies more than {MOST_DEPTH} folders deep; move it further up."
            yield FileProblem(path, "deep", sentence)
        else:
            yield from _walk_folder(path, f"{shown}/", bounds, hidden)


def _check_file(path: Path, shown: str, real: Path, may_lead_out: Container[str]) -> Path | FileProblem:
    try:
        found = path.stat()
    except OSError as error:
        sentence = f"{shown} cannot be opened ({error.strerror}); check that it is there and may be read."
        return FileProblem(path, "unreadable", sentence)
    if not stat.S_ISREG(found.st_mode):
        return FileProblem(path, "no file", f"{shown} is a pipe, a device or a socket; remove it.")
    if path.is_symlink() and path.suffix.casefold() not in may_lead_out and not _is_inside(path, real):
        sentence = f"{shown} is a link to a file outside of the folder; put a copy of the file there."
        return FileProblem(path, "link", sentence)
    return path


def _check_folder_link(path: Path, shown: str, real: Path) -> FileProblem:
    if _is_inside(path, real):
        sentence = f"{shown} is a link to a folder that is there already; it is not followed."
        return FileProblem(path, "link", sentence, False)
    sentence = f"{shown} is a link to a folder elsewhere, which is not followed; put the folder itself there."
    return FileProblem(path, "link", sentence)


def _is_inside(path: Path, real: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(real)
