"""What lies beside an adapter file for people: a picture of what it does, and a page on what it is.

The picture goes into the header as well (`modelspec.thumbnail`, which SwarmUI and others show) and beside the
file
as `<stem>.preview.png`, which A1111, Forge and ComfyUI show. InvokeAI takes neither. The page, `<stem>.md`,
is
made of the header alone, so that it can be made for a file of any tool.
"""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lora_core.formats.detect import file_family
from lora_core.formats.peft import HEADER_KEY
from lora_core.model_files.families import Family
from lora_core.system.paths import write_atomically
from lora_core.system.untrusted import parse_json

THUMBNAIL_KEY = "modelspec.thumbnail"
THUMBNAIL_SIDE = 256
"""Pixels; the most that ModelSpec 1.0.0 suggests."""
_QUALITIES = (90, 80, 65, 50)
_MOST_BYTES = 24_000
"""Of the JPEG: the header that holds it is read by every tool that lists files."""


def thumbnail(picture: Path) -> bytes:
    """A JPEG of at most 256 pixels a side.

    Raises:
        OSError: the picture cannot be read.
    """
    with Image.open(picture) as image:
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


def thumbnail_text(jpeg: bytes) -> str:
    """A JPEG as the text of a header: a data URI."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


def preview_file(path: Path) -> Path:
    """Where the picture of an adapter file lies."""
    return path.with_name(f"{path.stem}.preview.png")


def card_file(path: Path) -> Path:
    """Where the page on an adapter file lies."""
    return path.with_suffix(".md")


def write_beside(path: Path, metadata: Mapping[str, str], picture: Path | None = None) -> None:
    """Write the picture, if there is one, and the page beside an adapter file.

    Args:
        path: the adapter file.
        metadata: its header's texts.
        picture: a PNG that was drawn with it.

    Raises:
        OSError: they cannot be written.
    """
    shown = []
    if picture is not None:
        write_atomically(preview_file(path), picture.read_bytes())
        shown.append(preview_file(path).name)
    card = model_card(metadata, path.name, shown)
    write_atomically(card_file(path), card.encode("utf-8", "replace"))


def model_card(metadata: Mapping[str, str], file_name: str, pictures: Sequence[str] = ()) -> str:
    """A page in Markdown on an adapter file, with the front matter that model sites read.

    Args:
        metadata: the texts of the file's header, of whichever tool.
        file_name: of the adapter file.
        pictures: names of files that lie beside it.
    """
    stem = Path(file_name).stem
    family = file_family({}, metadata)
    title = _line(metadata.get("modelspec.title") or metadata.get("ss_output_name") or stem)
    trigger = _line(metadata.get("modelspec.trigger_phrase", ""))
    front = ["---", "tags:", "- stable-diffusion", "- lora", "- text-to-image"]
    front += [f"instance_prompt: {json.dumps(trigger, ensure_ascii=False)}"] if trigger else []
    rows = [f"| {name} | {_cell(value)} |" for name, value in _facts(metadata, family, trigger) if value]
    parts = ["\n".join([*front, "---"]), f"# {title}"]
    parts += [f"![{_line(name)}](<{name}>)" for name in pictures]
    parts += ["\n".join(["| | |", "|---|---|", *rows])] if rows else []
    return "\n\n".join([*parts, *_use(metadata, family, file_name, trigger)]) + "\n"


def _facts(metadata: Mapping[str, str], family: Family | None, trigger: str) -> list[tuple[str, str]]:
    title = family.title if family else metadata.get("modelspec.architecture", "")
    name = metadata.get("ss_sd_model_name", "")
    rank, alpha = metadata.get("ss_network_dim", ""), metadata.get("ss_network_alpha", "")
    return [
        ("Base", f"{title} ({name})" if name and name != title else title),
        ("Trigger", trigger),
        ("Rank, alpha", f"{rank}, {alpha}" if rank and alpha else rank),
        ("Trained", _training(metadata)),
        ("Prediction", metadata.get("modelspec.prediction_type", "")),
        (
            "Clip skip",
            "" if metadata.get("ss_clip_skip") in ("1", "None", None) else metadata["ss_clip_skip"],
        ),
        ("Merged from", metadata.get("modelspec.merged_from", "")),
        ("Date", metadata.get("modelspec.date", "")[:10]),
        ("About", metadata.get("modelspec.description", "")),
    ]


def _training(metadata: Mapping[str, str]) -> str:
    """Steps, pictures and size in words, as far as the header says them."""
    steps = metadata.get("ss_steps") or metadata.get("ss_max_train_steps", "")
    counts = [
        entry["img_count"]
        for entry in _table(metadata.get("ss_dataset_dirs", "")).values()
        if isinstance(entry, dict) and isinstance(entry.get("img_count"), int)
    ]
    size = metadata.get("modelspec.resolution") or metadata.get("ss_resolution", "")
    words = [f"{steps} steps" if steps else "", f"on {sum(counts)} pictures" if counts else ""]
    return " ".join(word for word in (*words, f"at {size} px" if size else "") if word)


def _table(text: str) -> dict[str, Any]:
    try:
        found = parse_json(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _use(metadata: Mapping[str, str], family: Family | None, file_name: str, trigger: str) -> list[str]:
    """How to use the file in each tool that reads its format."""
    stem = Path(file_name).stem
    prompt = trigger or "your prompt"
    parts = ["## Use"]
    if family is not None and not family.portable:
        parts.append(f"Of use only with the {family.title.lower()}.")
    if HEADER_KEY in metadata:
        parts.append("In the format of diffusers, which the other tools do not read whole.")
    else:
        parts.append(
            "\n".join(
                [
                    (
                        "- **A1111, Forge**: put the file into `models/Lora` and write"
                        f" `<lora:{stem}:1> {prompt}` into the prompt."
                    ),
                    "- **ComfyUI**: put the file into `models/loras` and add the node *Load LoRA*.",
                    "- **InvokeAI**: add the file in the model manager.",
                    "- **diffusers**:",
                ]
            )
        )
    parts.append(
        "\n".join(
            [
                "```python",
                "import diffusers",
                "",
                'pipeline = diffusers.DiffusionPipeline.from_pretrained("the base")',
                f'pipeline.load_lora_weights(".", weight_name={json.dumps(file_name, ensure_ascii=False)})',
                f"image = pipeline({json.dumps(prompt, ensure_ascii=False)}).images[0]",
                "```",
            ]
        )
    )
    return parts


def _line(text: str) -> str:
    """A text of somebody on one line, without what Markdown or HTML would take for a command."""
    return re.sub(r"[\s`<>|\[\]]+", " ", text).strip()


def _cell(text: str) -> str:
    return _line(text) or " "
