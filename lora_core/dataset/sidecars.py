"""Captions as they lie on disk: a text file beside each picture, or one table for a folder."""

import csv
import io
import json
import os
import threading
import unicodedata
from pathlib import Path
from typing import Any

from lora_core.spec.errors import DatasetError
from lora_core.spec.paths import valid_text, write_atomically

CAPTION_SUFFIXES = (".txt", ".caption")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
_CAPTION_KEYS = ("text", "caption")

# The temporary file of an atomic write is named for the process: two threads must not share it.
_writing = threading.Lock()


def folded(name: str) -> str:
    """A name as it is compared: without case and in one Unicode form, as Windows and macOS do."""
    return unicodedata.normalize("NFC", name).casefold()


def read_text(path: Path, shown: str) -> str:
    """A text file's content, without a byte order mark and with plain newlines.

    Raises:
        DatasetError: it cannot be read or is not UTF-8; names the file.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{shown} is not UTF-8 text (byte {error.start}); save it again with the encoding UTF-8."
        ) from error
    except OSError as error:
        raise DatasetError(
            f"{shown} cannot be read ({error.strerror}); check that it may be read."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def write_caption(picture: Path, text: str, wait: bool = True) -> None:
    """Write the caption into the `.txt` beside a picture, whole or not at all.

    Args:
        picture: whose caption it is.
        text: the caption.
        wait: until the disk has it; many captions in a row, kept elsewhere too, need not wait each.

    Raises:
        DatasetError: the folder cannot be written.
    """
    target = picture.with_suffix(".txt")
    try:
        with _writing:
            if wait:
                write_atomically(target, text.encode("utf-8", "replace"))
            else:
                write_soon(target, text.encode("utf-8", "replace"))
    except OSError as error:
        raise DatasetError(
            f"The caption {target} cannot be written ({error.strerror}); check that the folder may be"
            " written."
        ) from error


def write_soon(target: Path, data: bytes) -> None:
    """Write a whole file or none, without waiting for the disk."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def metadata_captions(path: Path, shown: str) -> tuple[dict[str, str], list[str]]:
    """The captions in a `metadata.jsonl` or `metadata.csv`.

    Args:
        path: the file; its rows have `file_name`, relative to its folder, and `text` or `caption`.
        shown: how to name it in a message.

    Returns:
        File name, with forward slashes, to caption; and a sentence for each row that cannot be used.
    """
    captions: dict[str, str] = {}
    sentences: list[str] = []
    try:
        text = read_text(path, shown)
        rows = _csv_rows(text) if path.suffix.casefold() == ".csv" else _json_rows(text)
    except DatasetError as error:
        return {}, [str(error)]
    for line, row in rows:
        fault = _fault(row)
        if fault:
            sentences.append(f"{shown}, line {line}, {fault}; correct it or remove the line.")
            continue
        value = next((row[key] for key in _CAPTION_KEYS if key in row), "")
        name = valid_text(row["file_name"]).replace("\\", "/").removeprefix("./")
        captions[name] = valid_text(value or "").strip()
    return captions, sentences


def _fault(row: Any) -> str:
    """What is wrong with a row, or nothing."""
    if isinstance(row, str):
        return f"cannot be read ({row})"
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"].strip():
        return "has no file_name"
    values = [row[key] for key in _CAPTION_KEYS if key in row]
    if not values:
        return "has neither text nor caption"
    return "" if isinstance(values[0], str | None) else "has a caption that is not text"


def _json_rows(text: str) -> list[tuple[int, Any]]:
    """Line number and value, or the reason as text where a line is not JSON."""
    rows: list[tuple[int, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            rows.append((number, f"not JSON: {error}"))
        else:
            rows.append((number, value if isinstance(value, dict) else {}))
    return rows


def _csv_rows(text: str) -> list[tuple[int, Any]]:
    """Line number and row, or the reason as text where the table breaks off."""
    rows: list[tuple[int, Any]] = []
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            rows.append((reader.line_num, row))
    except csv.Error as error:
        rows.append((reader.line_num, f"not CSV: {error}"))
    return rows
