"""Capacity and free space of a drive, and whether it is a network drive."""

import ctypes
import os
import shutil
import sys
from pathlib import Path

import psutil

from lora_core.errors import NoRoom

MARGIN = 2**20
"""Bytes that a write must leave free, so that events and requests can still be written."""
NETWORK_TYPES = ("nfs", "cifs", "smb", "afp", "webdav", "davfs", "9p", "sshfs", "vboxsf", "ceph", "lustre")
"""Parts of the names by which Linux and macOS call file systems that other machines can write too."""
_WINDOWS_REMOTE = 4


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
            " What is saved is whole; make room and resume."
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


def file_bytes(path: Path) -> int:
    """Size of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def is_network_drive(path: Path) -> bool:
    """Whether `path` is on a drive that other machines can write too, as far as the system says so."""
    path = Path(os.path.abspath(path))
    if sys.platform == "win32":
        root = path.anchor
        return root.startswith("\\\\") or ctypes.windll.kernel32.GetDriveTypeW(root) == _WINDOWS_REMOTE
    try:
        drives = psutil.disk_partitions(all=True)
    except (OSError, psutil.Error):
        return False
    holding = [drive for drive in drives if path.is_relative_to(drive.mountpoint)]
    kind = max(holding, key=lambda drive: len(drive.mountpoint)).fstype.lower() if holding else ""
    return any(word in kind for word in NETWORK_TYPES)
