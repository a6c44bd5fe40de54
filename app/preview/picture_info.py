"""What a dropped picture says of how it was made: A1111's text in a PNG, nothing of it trusted."""

from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from app.words import TIMES, safe
from lora_core.spec.errors import DatasetError
from lora_core.spec.infotext import Info, parsed

LONGEST_SHOWN = 600


def picture_info(file: Path) -> Info:
    """The settings inside a picture.

    Raises:
        DatasetError: it is no picture, or holds no settings.
    """
    try:
        with Image.open(file) as opened:
            text: Any = opened.info.get("parameters")
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{file.name} is no picture that can be read.") from error
    if not isinstance(text, str) or not text.strip():
        raise DatasetError(
            f"{file.name} holds no settings; pictures lose them when a site or a chat packs them anew."
        )
    return parsed(text)


def info_html(name: str, info: Info) -> str:
    """What was read, with the button that sends it to the form."""
    size = f"{info.width} {TIMES} {info.height}" if info.width and info.height else ""
    loras = ", ".join(f"{tag.name} {tag.strength:g}" for tag in info.loras)
    rows = {
        "Prompt": info.prompt[:LONGEST_SHOWN], "Negative": info.negative[:LONGEST_SHOWN],
        "LoRAs": loras, "Model": info.model, "Sampler": info.sampler, "Steps": info.steps,
        "Guidance": info.cfg, "CFG rescale": info.cfg_rescale, "Seed": info.seed, "Size": size,
    }  # fmt: skip
    table = "".join(
        f'<tr><th scope="row">{title}</th><td>{safe(value)}</td></tr>'
        for title, value in rows.items()
        if value not in (None, "")
    )
    return (
        f'<div class="check-result"><div class="row apart"><h3>{safe(name)}</h3><button type="button"'
        ' class="own" data-press="send-to-form">Send to form</button></div><table'
        f' class="facts-table">{table}</table></div>'
    )
