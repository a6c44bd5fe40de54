"""Where things are, atomic writes, room on a drive, and text and JSON that may come from anyone."""

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import re
import shutil
import stat
import tempfile
import threading
import time
import tomllib
import types
import typing
import unicodedata
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import platformdirs
import psutil

from lora_core.errors import NoRoom, RunError, wrap_os_errors

PACKAGE = Path(__file__).resolve().parents[1]
IS_CHECKOUT = not (PACKAGE / "assets").is_dir()
"""Whether launch.py and the sources are next to the packages; a wheel has the assets inside this one."""
ASSETS = (PACKAGE.parent if IS_CHECKOUT else PACKAGE) / "assets"
SITE = (PACKAGE.parent if IS_CHECKOUT else ASSETS) / "site" / "index.html"
"""The first page of the documents, where `mkdocs build` made them."""
DEMO_BASE = ASSETS / "base"
DEMO_TRAIN = ASSETS / "demo" / "train"
PRESETS = ASSETS / "presets"
FAMILY_CONFIGS = ASSETS / "families"
CLIP_TOKENIZER = FAMILY_CONFIGS / "clip"
LARGEST_SMALL_FILE = 50_000_000
_ILLEGAL = re.compile(r'[<>:"|?*\x00-\x1f\x7f]')
# File systems take 255 bytes; some are left for `-2` and for the ending of a temporary file.
_NAME_BYTES = 180
_FULL_WIDTH = 0xFEE0
"""From a printable ASCII character to its full-width form."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_DEVICE = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])\s*(\..*)?", re.IGNORECASE
)


@functools.cache
def read_table(name: str) -> dict[str, Any]:
    """A TOML file of `assets`, by its path below it; read once, so callers do not change it."""
    return tomllib.loads((ASSETS / name).read_text(encoding="utf-8"))


def workspace_path(chosen: str | Path | None = None) -> Path:
    """`chosen`, else the environment variable LORA_EASEL_HOME, else the platform's user data folder."""
    path = Path(
        chosen
        or os.environ.get("LORA_EASEL_HOME")
        or platformdirs.user_data_dir("lora-easel", appauthor=False)
    )
    return expand_home(path).absolute()


def workspace(chosen: str | Path | None = None) -> Path:
    """The workspace folder, at `workspace_path`, made if absent.

    Raises:
        RunError: it cannot be made or written.
    """
    path = workspace_path(chosen)
    with wrap_os_errors(
        RunError, f"The workspace {path} cannot be written", "; choose another with --workspace."
    ):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    return path


_HALF_WRITTEN = re.compile(r"\..+\.\w+\.\d+-\d+\.tmp", re.DOTALL)
_LONGEST_WRITE = 24 * 3600.0


@contextlib.contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """A temporary file beside `path` for the body to write; it replaces `path` unless the body fails.

    `sync` waits until the disk has it.
    """
    name = os.fsencode(path.name)[-_NAME_BYTES:].decode(errors="ignore")
    temporary = path.with_name(f".{name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        if sync:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        patiently(os.replace, temporary, path)
    except OSError as error:
        # A failed write names no file, and others the temporary one.
        if str(error.filename or temporary) == str(temporary):
            error.filename = str(path)
        raise
    finally:
        # What went wrong above matters; that there is nothing to clean up does not.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    if sync:
        sync_folder(path.parent)


_IN_USE, _WAITS = (5, 32), (0.01, 0.05, 0.2, 0.5)


def patiently(move: Callable[[Path, Path], object], source: Path, target: Path) -> None:
    """`os.rename` or `os.replace`, again for most of a second while another process has a file of them open.

    Windows refuses it then, as ERROR_ACCESS_DENIED or ERROR_SHARING_VIOLATION; a reader such as the window or
    a virus scanner soon lets go.
    """
    for wait in (*_WAITS, 0.0):
        try:
            move(source, target)
            return
        except PermissionError as error:
            if getattr(error, "winerror", None) not in _IN_USE or not wait:
                raise
            time.sleep(wait)


def tokens_folder(adapter: Path) -> Path:
    """Where the new tokens of an adapter's file have files of their own."""
    return adapter.with_name(f"{adapter.stem}-tokens")


def write_atomically(path: Path, data: bytes, sync: bool = True) -> None:
    """Write a file atomically; `sync` waits until the disk has it."""
    with replacing(path, sync) as temporary:
        temporary.write_bytes(data)


def read_small_file(path: Path, most: int = LARGEST_SMALL_FILE) -> bytes:
    """The bytes of a regular file; a pipe would block and a device never end.

    Raises:
        OSError: it cannot be read, is not a regular file, or has more than `most` bytes.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"larger than {most / 1e6:.3g} MB", str(path))
    return path.read_bytes()


def clean_text(text: str) -> str:
    """The text with U+FFFD in place of each lone surrogate, so that it can be encoded as UTF-8.

    JSON (`"\\ud800"`) and file names that are not UTF-8 bring surrogates in; pages and files cannot hold
    them.
    """
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def is_device(name: str) -> bool:
    """Whether a file name means a device on Windows, whatever its ending; superscript digits count there."""
    return _DEVICE.fullmatch(name) is not None


def clear_abandoned(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder: `.NAME.PID....tmp`, `.draft` or `.making`.

    What another living process is just writing stays: its number is in the name.
    """
    for end in ("tmp", "draft", "making"):
        for path in folder.glob(f".*.{end}"):
            owner = re.search(rf"\.(\d+)[\w-]*\.{end}$", path.name)
            if owner and _still_writing(int(owner[1]), path):
                continue
            _remove(path)


def clear_abandoned_below(folder: Path, seconds: float = 1.0) -> None:
    """Remove what killed processes left half-written by `replacing`, or unpacked, in a user's folder and
    those below it.

    Other files stay, and so does what changed within a day: a process may still be writing it, perhaps on
    another computer. After `seconds` the other folders are left for the next time.
    """
    end, before = time.monotonic() + seconds, time.time() - _LONGEST_WRITE
    for place, folders, names in os.walk(folder):
        for name in filter(_HALF_WRITTEN.fullmatch, (*folders, *names)):
            with contextlib.suppress(OSError):
                if (path := Path(place, name)).lstat().st_mtime < before:
                    _remove(path)
        if time.monotonic() > end:
            return


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _still_writing(pid: int, path: Path) -> bool:
    """Whether `path` may be the work of another living process; one that began later has only its number."""
    try:
        return pid != os.getpid() and psutil.Process(pid).create_time() <= path.stat().st_mtime + 2.0
    except (OSError, psutil.Error):
        return False


def sync_folder(path: Path) -> None:
    """Make renames in a folder durable, where the platform can (Windows cannot open folders)."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


MARGIN = 2**20
"""Bytes that a write must leave free, so that events and requests can still be written."""


def free_bytes(path: Path) -> int:
    """Free bytes on the drive of `path`, which need not exist yet.

    Raises:
        OSError: the drive is gone.
    """
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def require_room(path: Path, need: int, what: str) -> None:
    """Refuse to begin a write that the drive has no room for.

    Args:
        path: the folder to write to.
        need: bytes.
        what: subject of the error's sentence: "The checkpoint of step 500".

    Raises:
        NoRoom: there is too little room, or the folder is gone.
    """
    if not path.exists():
        raise NoRoom(f"{what} cannot be written: {path} is gone. Connect its drive again and resume.")
    free = free_bytes(path)
    if free < need + MARGIN:
        raise NoRoom(
            f"{what} needs {_megabytes(need + MARGIN)}, and the drive of {path} has {_megabytes(free)} free."
            " Everything saved is complete; free some space and resume."
        )


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MB"


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; links are not followed, and hard links count once.

    Files that disappear during the count are 0.
    """
    total = 0
    linked: set[tuple[int, int]] = set()
    waiting = [str(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                        continue
                    found = entry.stat(follow_symlinks=False)
                    if found.st_nlink > 1:
                        if (found.st_dev, found.st_ino) in linked:
                            continue
                        linked.add((found.st_dev, found.st_ino))
                    total += found.st_size
        except OSError:
            continue
    return total


def format_bytes(size: float) -> str:
    """A size in GB, MB, kB or bytes, whichever fits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.0f} kB" if size >= 1e3 else f"{size:.0f} bytes"


def gigabytes(size: float) -> str:
    """A size in GB, or in MB below 0.1 GB, for comparisons."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def file_bytes(path: Path) -> int:
    """Size of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def file_stamp(path: str | Path) -> tuple[int, int] | None:
    """Modification time in ns and bytes of a file; None where it is not there."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size


def changed_at(path: str | Path) -> int:
    """When a file or folder was last changed, in nanoseconds; 0 where there is none."""
    return (file_stamp(path) or (0, 0))[0]


_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_DECODER = json.JSONDecoder(parse_constant=lambda _: None)
_LARGEST = 2**63 - 1
LARGEST_JSON = 16 * 2**20
"""Bytes; larger files were not written here."""

T = TypeVar("T")


def clean_value(value: Any) -> Any:
    """A JSON value with valid texts only, integers clamped to 64 bits, and null for NaN and infinity."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        return {clean_value(k) if isinstance(k, str | int) else k: clean_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean_value(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if not isinstance(value, int) else max(-_LARGEST, min(value, _LARGEST))


def expand_home(path: str | Path) -> Path:
    """Expand `~`; unlike `Path.expanduser`, an unknown user is not an error."""
    return Path(os.path.expanduser(path))


def fold_name(name: str) -> str:
    """A name for comparison: casefolded and normalized, as on Windows and macOS."""
    return unicodedata.normalize("NFC", name).casefold()


def safe_name(name: str) -> PurePosixPath:
    """A relative path that can be made on Windows, macOS and Linux and leads nowhere else.

    Args:
        name: parts between slashes or backslashes; `..` and drive letters are dropped, illegal letters
        become their full-width forms.
    """
    parts = [_safe_part(part) for part in re.sub(r"^[A-Za-z]:", "", name).replace("\\", "/").split("/")]
    return PurePosixPath(*[part for part in parts if part] or ["file"])


def plain_name(name: str) -> PurePosixPath:
    """Like `safe_name`, with `_` for each illegal letter, as for the images of a zip."""
    return safe_name(_ILLEGAL.sub("_", re.sub(r"^[A-Za-z]:", "", name)))


def _lookalike(found: re.Match[str]) -> str:
    """The full-width form of a character that file names cannot hold, so that the name still reads alike."""
    return chr(ord(found[0]) + _FULL_WIDTH) if found[0] in '<>:"|?*' else "_"


def _safe_part(part: str) -> str:
    # Windows drops dots and spaces at the end of a name without a word.
    part = _ILLEGAL.sub(_lookalike, part.encode("utf-8", "replace").decode()).rstrip(". ")
    if not part.strip(". "):
        return ""
    if is_device(part):
        part = f"_{part}"
    stem, dot, ending = part.rpartition(".")
    if not stem or len(ending) > 16:
        stem, dot, ending = part, "", ""
    room = _NAME_BYTES - len(f"{dot}{ending}".encode())
    return stem.encode()[:room].decode(errors="ignore") + dot + ending


def unused_stem(stem: str, used: Container[str], folder: Path = Path(), endings: Iterable[str] = ()) -> str:
    """The stem itself, or with `-2`, `-3`, ... the first that is not among the folded stems of `used`, nor
    with one of the endings a file in the folder."""
    candidate, number = stem, 1
    while fold_name(candidate) in used or any(os.path.lexists(folder / (candidate + end)) for end in endings):
        number += 1
        candidate = f"{stem}-{number}"
    return candidate


def unused_path(folder: Path, stem: str, ending: str) -> Path:
    """`stem` with `ending` in a folder, or the first of `stem-2`, `stem-3`, ... that does not exist."""
    return folder / f"{unused_stem(stem, (), folder, [ending])}{ending}"


def parse_json(text: str | bytes, decoder: json.JSONDecoder = _DECODER) -> Any:
    """The value of a JSON text, its texts made valid; NaN and Infinity, which are not JSON, become null.

    Raises:
        ValueError: it is not JSON, or nested too deep to be read.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = decoder.decode(text)
        return clean_value(value) if _ESCAPED_SURROGATE.search(text) else value
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def parse_object(text: str) -> dict[str, Any]:
    """The object of a JSON text by anyone; what is none counts as empty."""
    try:
        found = parse_json(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def read_json(file: Path, most: int = LARGEST_JSON) -> dict[str, Any]:
    """The object in a JSON file of at most this many bytes; {} if it is missing or broken."""
    try:
        return read_object(file, most)
    except (OSError, ValueError):
        return {}


def read_object(file: Path, most: int = LARGEST_JSON) -> dict[str, Any]:
    """Like `read_json`, but raises OSError or ValueError if the file is missing or broken."""
    found = parse_json(read_small_file(file, most))
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found


def check_fields(kind: type[T], values: Any) -> T:
    """An instance of a dataclass, each value of the type that its field says.

    Raises:
        TypeError: `values` is not a table, lacks a field, or has an unknown or mistyped one.
    """
    fields = {one.name: one.type for one in dataclasses.fields(typing.cast(Any, kind))}
    for name, value in dict(values).items():
        if name in fields and not _fits(value, fields[name]):
            raise TypeError(f"{name} = {str(value)[:80]!r}")
    return kind(**values)


def _fits(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) in (int, float) and (math.isnan(value) or abs(value) <= _LARGEST)
    if kind is int:
        return type(value) is int and abs(value) <= _LARGEST
    if kind in (str, bool):
        return isinstance(value, kind)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(one, inner[0]) for one in value)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(one, inner[1]) for one in value.values())
    return kind is Any or isinstance(value, kind)
