"""Files opened on the Preview tab: a LoRA is added, the settings in a generated image can be used.

The settings are text in the form that A1111 writes. Source: its `infotext_utils.py`, the extra networks'
`<lora:name:te:unet>`, and "CFG Rescale" of its extension CFG_Rescale_webui.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from app.preview.loras import add_lora, lora_groups
from app.preview.request_form import form_data, load_fields, lora_rows
from app.preview.sent_form import parse_strength, save_form
from app.state import AppState, Snapshot, take_snapshot
from app.templates import note_html, render
from lora_core.errors import DatasetError
from lora_core.generate.request import NEGATIVE, WeightedLora
from lora_core.settings.choices import SAMPLERS

LONGEST_SHOWN = 600
LONGEST = 200_000
"""Characters that are parsed; no image tool writes more."""
_SETTING = re.compile(r'\s*(\w[\w \-/]{0,60}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_TAG = re.compile(r"<lora:([^<>]+)>")


@dataclass(frozen=True)
class Infotext:
    """Prompt and settings of an image; what a text does not name is None, or "" for words."""

    prompt: str = ""
    negative: str = ""
    steps: int | None = None
    sampler: str = ""
    cfg: float | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    model: str = ""
    clip_skip: int | None = None
    loras: tuple[WeightedLora, ...] = ()
    extra: Mapping[str, str] = field(default_factory=dict)
    cfg_rescale: float | None = None


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


def parse_infotext(text: str) -> Infotext:
    """Parse the text under `parameters`; a text of another form is all prompt."""
    lines = text[:LONGEST].strip().split("\n")
    found = {}
    settings = _SETTING.findall(lines[-1])
    if len(settings) >= 3:
        lines.pop()
        found = {key.strip(): _unquote(value) for key, value in settings}
    start = next((n for n, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    prompt = "\n".join(lines[:start])
    negative = "\n".join(lines[start:]).removeprefix(NEGATIVE).strip()
    loras = tuple(lora for match in _TAG.finditer(prompt) if (lora := _parse_tag(match[1])) is not None)
    size = re.fullmatch(r"\s*(\d{1,5})\s*x\s*(\d{1,5})\s*", found.get("Size", ""))
    return Infotext(
        prompt=re.sub(r" ?<lora:[^<>]+>", "", prompt).strip() if loras else prompt.strip(),
        negative=negative, steps=_parse_int(found.get("Steps")), sampler=_parse_sampler(found),
        cfg=_parse_float(found.get("CFG scale")), cfg_rescale=_parse_float(found.get("CFG Rescale")),
        seed=_parse_int(found.get("Seed")), width=int(size[1]) if size else None,
        height=int(size[2]) if size else None, model=found.get("Model", ""),
        clip_skip=_parse_int(found.get("Clip skip")), loras=loras, extra=found,
    )  # fmt: skip


def _unquote(value: str) -> str:
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value.strip()


def _parse_sampler(found: Mapping[str, str]) -> str:
    """The sampler with its schedule, which newer A1111 writes apart."""
    name, schedule = found.get("Sampler", ""), found.get("Schedule type", "")
    joined = schedule not in ("", "Automatic", "Uniform") and not name.endswith(schedule)
    return f"{name} {schedule}" if joined else name


def _parse_tag(text: str) -> WeightedLora | None:
    positional = [part for part in text.split(":") if "=" not in part]
    named = dict(part.split("=", 1) for part in text.split(":") if "=" in part)
    if not positional or not positional[0].strip():
        return None
    on_text = _parse_float(named.get("te", positional[1] if len(positional) > 1 else "1"))
    if on_text is None:
        return None
    on_unet = _parse_float(named.get("unet", positional[2] if len(positional) > 2 else str(on_text)))
    if on_unet is None:
        return None
    return WeightedLora(positional[0].strip(), on_unet, None if on_text == on_unet else on_text)


def _parse_float(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if abs(number) < 1e9 else None


def _parse_int(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch(r"-?\d{1,19}", text.strip()) else None
