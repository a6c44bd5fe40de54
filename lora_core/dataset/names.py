"""File names: how they are compared, and names from elsewhere made fit for every system."""

import re
import unicodedata
from collections.abc import Container
from pathlib import PurePosixPath

from lora_core.spec.paths import is_device

_ILLEGAL = re.compile(r'[<>:"|?*\x00-\x1f\x7f]')
# File systems take 255 bytes; some are left for `-2` and for the ending of a temporary file.
_MOST_BYTES = 180


def folded(name: str) -> str:
    """A name as it is compared: without case and in one Unicode form, as Windows and macOS do."""
    return unicodedata.normalize("NFC", name).casefold()


def safe_name(name: str) -> PurePosixPath:
    """A relative path that can be made on Windows, macOS and Linux and leads nowhere else.

    Args:
        name: parts between slashes or backslashes; `..` and drive letters are dropped, illegal letters
        replaced.
    """
    parts = [_safe_part(part) for part in re.sub(r"^[A-Za-z]:", "", name).replace("\\", "/").split("/")]
    return PurePosixPath(*[part for part in parts if part] or ["file"])


def _safe_part(part: str) -> str:
    # Windows drops dots and spaces at the end of a name without a word.
    part = _ILLEGAL.sub("_", part.encode("utf-8", "replace").decode()).rstrip(". ")
    if not part.strip(". "):
        return ""
    if is_device(part):
        part = f"_{part}"
    stem, dot, ending = part.rpartition(".")
    if not stem or len(ending) > 16:
        stem, dot, ending = part, "", ""
    room = _MOST_BYTES - len(f"{dot}{ending}".encode())
    return stem.encode()[:room].decode(errors="ignore") + dot + ending


def free_stem(stem: str, used: Container[str]) -> str:
    """The stem itself, or with `-2`, `-3`, ... the first that is not among the folded stems of `used`."""
    candidate, number = stem, 1
    while folded(candidate) in used:
        number += 1
        candidate = f"{stem}-{number}"
    return candidate
