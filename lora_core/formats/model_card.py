"""The files beside an adapter file, for users: the image `<stem>.preview.png` and the card `<stem>.md`.

A1111, Forge and ComfyUI show the image; it goes into the header as well (`modelspec.thumbnail`, which SwarmUI
and others show). The card is made from the header alone, so it can be made for a file of any tool.
"""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lora_core.formats.detect import detect_family
from lora_core.formats.peft import HEADER_KEY
from lora_core.model_files.families import Family
from lora_core.system.files import parse_json, write_atomically

if TYPE_CHECKING:
    import jinja2

THUMBNAIL_KEY = "modelspec.thumbnail"
THUMBNAIL_SIDE = 256
"""Pixels; the most that ModelSpec 1.0.0 suggests."""
_QUALITIES = (90, 80, 65, 50)
_MOST_BYTES = 24_000
"""Of the JPEG: the header that holds it is read by every tool that lists files."""


def thumbnail(image_path: Path) -> bytes:
    """A JPEG of at most 256 pixels a side.

    Raises:
        OSError: the image cannot be read.
    """
    with Image.open(image_path) as image:
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    data = b""
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality, optimize=True)
        data = buffer.getvalue()
        if len(data) <= _MOST_BYTES:
            break
    return data


def thumbnail_uri(jpeg: bytes) -> str:
    """A JPEG as the text of a header: a data URI."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


def preview_file(path: Path) -> Path:
    """The path of an adapter file's preview image."""
    return path.with_name(f"{path.stem}.preview.png")


def card_file(path: Path) -> Path:
    """The path of an adapter file's model card."""
    return path.with_suffix(".md")


def write_beside(path: Path, metadata: Mapping[str, str], image: Path | None = None) -> None:
    """Write the preview image, if there is one, and the model card beside an adapter file.

    Args:
        path: the adapter file.
        metadata: of its header.
        image: a PNG that was generated with it.

    Raises:
        OSError: they cannot be written.
    """
    images = []
    if image is not None:
        write_atomically(preview_file(path), image.read_bytes())
        images.append(preview_file(path).name)
    card = model_card(metadata, path.name, images)
    write_atomically(card_file(path), card.encode("utf-8", "replace"))


def model_card(metadata: Mapping[str, str], file_name: str, images: Sequence[str] = ()) -> str:
    """A Markdown page on an adapter file (`model_card.md.j2`), with the front matter that model sites read.

    Args:
        metadata: of the file's header, by any tool.
        file_name: of the adapter file.
        images: names of files beside it.
    """
    family, stem = detect_family({}, metadata), Path(file_name).stem
    trigger = _one_line(metadata.get("modelspec.trigger_phrase", ""))
    return _template().render(
        title=metadata.get("modelspec.title") or metadata.get("ss_output_name") or stem,
        trigger=trigger,
        prompt=trigger or "your prompt",
        stem=stem,
        file_name=file_name,
        images=images,
        facts=[(name, value) for name, value in _facts(metadata, family, trigger) if value],
        only_for=family.title.lower() if family and not family.portable else "",
        diffusers_only=HEADER_KEY in metadata,
    )


@lru_cache(maxsize=1)
def _template() -> "jinja2.Template":
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    # Markdown: nothing is escaped as HTML; `one_line` takes out what either would read as a command.
    environment = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    environment.filters |= {"one_line": _one_line, "quoted": lambda t: json.dumps(t, ensure_ascii=False)}
    return environment.get_template("model_card.md.j2")


def _facts(metadata: Mapping[str, str], family: Family | None, trigger: str) -> list[tuple[str, str]]:
    title = family.title if family else metadata.get("modelspec.architecture", "")
    name, clip_skip = metadata.get("ss_sd_model_name", ""), metadata.get("ss_clip_skip", "")
    rank, alpha = metadata.get("ss_network_dim", ""), metadata.get("ss_network_alpha", "")
    return [
        ("Base", f"{title} ({name})" if name and name != title else title),
        ("Trigger", trigger),
        ("Rank, alpha", f"{rank}, {alpha}" if rank and alpha else rank),
        ("Trained", _training(metadata)),
        ("Prediction", metadata.get("modelspec.prediction_type", "")),
        ("Clip skip", "" if clip_skip in ("1", "None") else clip_skip),
        ("Merged from", metadata.get("modelspec.merged_from", "")),
        ("Date", metadata.get("modelspec.date", "")[:10]),
        ("About", metadata.get("modelspec.description", "")),
    ]


def _training(metadata: Mapping[str, str]) -> str:
    """Steps, images and size in words, as far as the header has them."""
    steps = metadata.get("ss_steps") or metadata.get("ss_max_train_steps", "")
    try:
        datasets = parse_json(metadata.get("ss_dataset_dirs") or "{}")
    except ValueError:
        datasets = {}
    entries = datasets.values() if isinstance(datasets, dict) else ()
    counts = [entry.get("img_count") for entry in entries if isinstance(entry, dict)]
    images = sum(count for count in counts if isinstance(count, int))
    size = metadata.get("modelspec.resolution") or metadata.get("ss_resolution", "")
    words = [f"{steps} steps" if steps else "", f"on {images} pictures" if images else ""]
    return " ".join(word for word in (*words, f"at {size} px" if size else "") if word)


def _one_line(text: str) -> str:
    """A text on one line, without what Markdown or HTML would take for a command."""
    return re.sub(r"[\s`<>|\[\]]+", " ", text).strip()
