"""Reads and writes captions on disk: a text file beside each image, or one table for a folder."""

import csv
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_core.data.scan import check_regular_file
from lora_core.errors import DatasetError
from lora_core.system.files import clean_text, parse_json, write_atomically

CAPTION_BYTES = 1_000_000
TABLE_BYTES = 50_000_000
"""Larger captions and tables of captions are refused, not read."""
_MOST_FAULTS = 100
_LONGEST_NAME = 1000
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
_CAPTION_KEYS = ("text", "caption")

# The temporary file of an atomic write is named for the process: two threads must not share it.
_writing = threading.Lock()


def read_text(path: Path, shown: str, most: int = CAPTION_BYTES) -> str:
    """A text file's content, without a byte order mark and with plain newlines.

    Args:
        path: the file.
        shown: how to name it in a message.
        most: bytes that it may have.

    Raises:
        DatasetError: it cannot be read, is not a regular file, is too large or not UTF-8; names the file.
    """
    size = check_regular_file(path, shown, most)
    try:
        with open(path, "rb") as file:
            text = file.read(size).decode("utf-8-sig")
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
    """Writes the caption to the `.txt` beside an image, atomically.

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
                write_without_sync(target, text.encode("utf-8", "replace"))
    except OSError as error:
        raise DatasetError(
            f"The caption {target} cannot be written ({error.strerror}); check that the folder may be"
            " written."
        ) from error


def write_without_sync(target: Path, data: bytes) -> None:
    """Writes a file atomically, without waiting for the disk."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read_metadata_captions(path: Path, shown: str) -> tuple[dict[str, str], list[str]]:
    """The captions in a `metadata.jsonl` or `metadata.csv`.

    Args:
        path: the file; its rows have `file_name`, relative to its folder, and `text` or `caption`.
        shown: how to name it in a message.

    Returns:
        File name, with forward slashes, to caption; and a sentence for each of the first 100 rows that cannot
        be used, and one for the others.
    """
    captions: dict[str, str] = {}
    sentences: list[str] = []
    try:
        text = read_text(path, shown, TABLE_BYTES)
        rows = _csv_rows(text) if path.suffix.casefold() == ".csv" else _json_rows(text)
    except DatasetError as error:
        return {}, [str(error)]
    faults = 0
    for line, row in rows:
        fault = _row_fault(row)
        if fault:
            faults += 1
            if faults <= _MOST_FAULTS:
                sentences.append(f"{shown}, line {line}, {fault}; correct it or remove the line.")
            continue
        value = next((row[key] for key in _CAPTION_KEYS if key in row), "")
        name = clean_text(row["file_name"]).replace("\\", "/").removeprefix("./")
        captions[name] = clean_text(value or "").strip()
    if faults > _MOST_FAULTS:
        sentences.append(f"{shown} has {faults - _MOST_FAULTS} more lines that cannot be used.")
    return captions, sentences


def _row_fault(row: Any) -> str:
    """What is wrong with a row, or nothing."""
    if isinstance(row, str):
        return f"cannot be read ({row})"
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"].strip():
        return "has no file_name"
    values = [row[key] for key in _CAPTION_KEYS if key in row]
    if not values:
        return "has neither text nor caption"
    if not isinstance(values[0], str | None):
        return "has a caption that is not text"
    if len(row["file_name"]) > _LONGEST_NAME:
        return f"has a file_name of more than {_LONGEST_NAME} letters"
    return (
        f"has a caption of more than {CAPTION_BYTES:,} letters"
        if len(values[0] or "") > CAPTION_BYTES
        else ""
    )


def _json_rows(text: str) -> Iterator[tuple[int, Any]]:
    """Line number and value, or the reason as text where a line is not JSON."""
    for number, line in enumerate(io.StringIO(text, newline="\n"), start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            yield number, f"not JSON: {error}"
        else:
            yield number, value if isinstance(value, dict) else {}


def _csv_rows(text: str) -> Iterator[tuple[int, Any]]:
    """Line number and row, or the reason as text where the table breaks off."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        yield reader.line_num, f"not CSV: {error}"
