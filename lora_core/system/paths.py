"""Paths of the bundled assets and of the workspace; atomic writes."""

import contextlib
import os
import re
import shutil
import tempfile
import threading
from pathlib import Path

import platformdirs
import psutil

from lora_core.errors import RunError

ASSETS = Path(__file__).resolve().parents[2] / "assets"
DEMO_BASE = ASSETS / "base"
DEMO_TRAIN = ASSETS / "demo" / "train"
PRESETS = ASSETS / "presets"
FAMILY_CONFIGS = ASSETS / "families"
CLIP_TOKENIZER = FAMILY_CONFIGS / "clip"
_SURROGATE = re.compile("[\ud800-\udfff]")
_DEVICE = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])\s*(\..*)?", re.IGNORECASE
)


def workspace(chosen: str | Path | None = None) -> Path:
    """The workspace folder, made if absent.

    `chosen`, else the environment variable LORA_EASEL_HOME, else the platform's user data folder.

    Raises:
        RunError: it cannot be made or written.
    """
    path = Path(
        chosen
        or os.environ.get("LORA_EASEL_HOME")
        or platformdirs.user_data_dir("lora-easel", appauthor=False)
    )
    path = path.expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise RunError(
            f"The workspace {path} cannot be written ({error.strerror or error}); choose another with"
            " --workspace."
        ) from error
    return path


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file atomically: temporary file beside it, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # A write that fails does not say of which file.
        error.filename = error.filename or str(path)
        raise
    finally:
        # What went wrong above matters; that there is nothing to clean up does not.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


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
