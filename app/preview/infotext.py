"""Files opened on the Preview tab: a LoRA is added, the settings in a generated image can be used."""

from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from app.preview.loras import add_lora, lora_groups
from app.preview.request_form import form_data, load_fields, lora_rows, parse_strength, save_form
from app.state import AppState, Snapshot, take_snapshot
from app.templates import note_html, render
from lora_core.errors import DatasetError
from lora_core.generate.request import Infotext, WeightedLora, parse_infotext
from lora_core.settings.choices import SAMPLERS

LONGEST_SHOWN = 600


def open_file(app_state: AppState, file: Path) -> dict[str, Any]:
    """Take a file that was sent to the tab: a LoRA is added, the settings in a PNG are shown.

    Raises:
        LoraError: it is neither.
    """
    try:
        if file.suffix.lower() != ".safetensors":
            text, info = read_infotext(file)
            return {"html": infotext_table(file.name, info), "text": text}
        added = add_lora(app_state.project, file)
    finally:
        file.unlink(missing_ok=True)
    rows, kept = lora_rows(take_snapshot(app_state))
    save_form(app_state.project, [*rows, WeightedLora(str(added))], bool(kept.get("apart")))
    return {"html": note_html(f"{added.stem} is added."), "form": form_data(take_snapshot(app_state))}


def read_infotext(file: Path) -> tuple[str, Infotext]:
    """A1111's infotext in a PNG, as text and parsed; nothing in it is trusted.

    Raises:
        DatasetError: it is no image, or holds no settings.
    """
    try:
        with Image.open(file) as opened:
            text: Any = opened.info.get("parameters")
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{file.name} is not a readable image.") from error
    if not isinstance(text, str) or not text.strip():
        raise DatasetError(
            f"{file.name} holds no settings; sites and chats strip them when they re-encode images."
        )
    return text, parse_infotext(text)


def use_infotext(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """Put an infotext into the form."""
    missing = apply_infotext(take_snapshot(app_state), parse_infotext(str(sent.get("text", ""))))
    lost = f" Not found: {', '.join(missing)}; drop the LoRA file to add it." if missing else ""
    form = form_data(take_snapshot(app_state))
    return {"html": note_html(f"Its settings are in the form.{lost}"), "form": form}


def apply_infotext(snapshot: Snapshot, info: Infotext) -> list[str]:
    """Put an image's infotext into the form; returns the LoRAs that were not found."""
    project = snapshot.app_state.project
    fields = load_fields(snapshot)
    sampler = next((key for key, row in SAMPLERS.items() if info.sampler in (key, row.title)), None)
    said = {
        "steps": info.steps, "cfg": info.cfg, "seed": info.seed, "sampler": sampler,
        "cfg_rescale": (info.cfg_rescale or 0.0) if info.cfg is not None else None,
        "width": info.width, "height": info.height,
    }  # fmt: skip
    fields |= {name: value for name, value in said.items() if value is not None}
    fields |= {"prompt": info.prompt, "negative": info.negative}
    names: dict[str, str] = {}
    for _, files in lora_groups(snapshot):
        for _, file in files:
            names.setdefault(WeightedLora(file).name.casefold(), file)
    rows: list[WeightedLora] = []
    missing: list[str] = []
    for tag in info.loras:
        found = names.get(tag.name.casefold())
        if found is None:
            missing.append(tag.name)
        else:
            rows.append(WeightedLora(found, parse_strength(tag.strength), tag.text_strength))
    if not (info.prompt or info.loras):
        rows, kept = lora_rows(snapshot)
        save_form(project, rows, bool(kept.get("apart")), fields)
    else:
        save_form(project, rows, any(row.text_strength is not None for row in rows), fields)
    return missing


def infotext_table(name: str, info: Infotext) -> str:
    """The infotext of an image as a table, with a button that puts it into the form."""
    rows = {
        "Prompt": info.prompt[:LONGEST_SHOWN],
        "Negative": info.negative[:LONGEST_SHOWN],
        "LoRAs": ", ".join(f"{tag.name} {tag.strength:g}" for tag in info.loras),
        "Model": info.model,
        "Sampler": info.sampler,
        "Steps": info.steps,
        "Guidance": info.cfg,
        "CFG rescale": info.cfg_rescale,
        "Seed": info.seed,
        "Size": f"{info.width} \N{MULTIPLICATION SIGN} {info.height}" if info.width and info.height else "",
    }
    shown = [(title, value) for title, value in rows.items() if value not in (None, "")]
    return render("preview/infotext.html", name=name, rows=shown)
