"""What a page sends of the Preview tab's form: parsed, and stored in the project's draft. Each change gets
the next revision, so that a page knows which of two states is newer."""

import contextlib
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.state import AppState
from app.templates import _
from lora_core.errors import ConfigError, LoraError
from lora_core.generate.grid import make_axis, split_values
from lora_core.generate.request import WeightedLora
from lora_core.model_files.starting_settings import is_slider
from lora_core.projects.project import Project
from lora_core.settings.schema import SLIDER_STRENGTHS

FIELDS = ("prompt", "negative", "sampler", "steps", "cfg", "cfg_rescale", "seed", "width", "height", "image",
          "denoising_strength", "mask")  # fmt: skip
STRIP = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST_LORAS = 20
MOST_STRENGTH = 20.0


def take_rows(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """Store the form; if only strengths changed, redraw the shown image."""
    rows, rev = take_sent_form(app_state.project, sent)
    shot = app_state.render_queue.view().shot if sent.get("moved") and rows else None
    # Another file waits for Generate, because it may need another base.
    drawn = shot is not None and [lora.file for lora in shot.loras] == [row.file for row in rows]
    if shot is not None and drawn:
        app_state.render_queue.want(replace(shot, loras=tuple(rows)))
    return {"rev": rev, "drawn": drawn}


def take_sent_form(project: Project, sent: dict[str, Any]) -> tuple[list[WeightedLora], int]:
    """Store the form as a page sends it; returns its LoRAs and the new revision.

    Raises:
        ConfigError: the list of LoRAs is missing, or too long.
    """
    if not isinstance(sent.get("rows"), list):
        raise ConfigError(_("The LoRAs of the form did not arrive; try again."))
    if len(sent["rows"]) > MOST_LORAS:
        raise ConfigError(_("{} LoRAs are too many; the form takes up to {}.", len(sent["rows"]), MOST_LORAS))
    blank = parse_rows(sent["rows"], blank=True)
    rows = [row for row in blank if row.file]
    more, strip = dict[str, Any](), sent.get("strip")
    if isinstance(strip, dict):
        kept = {"on": bool(strip.get("on")), "values": list(strip_values(project, rows))}
        with contextlib.suppress(LoraError):
            # Reported when the strip is generated; a half-typed number is not an error yet.
            kept["values"] = list(parse_strengths(strip.get("values")))
        more["preview_strip_at"] = kept
    return rows, save_form(project, blank, bool(sent.get("apart")), sent.get("fields"), **more)


def parse_rows(rows: Iterable[Any], blank: bool = False) -> list[WeightedLora]:
    """Parse rows as a page sends them; those without a file only with `blank`."""
    found = []
    for row in filter(lambda row: isinstance(row, dict), rows):
        file, text = str(row.get("file") or "").strip().strip('"'), row.get("text")
        if file or blank:
            text = None if text is None else parse_strength(text)
            found.append(WeightedLora(file, parse_strength(row.get("strength")), text))
    return found


def parse_strength(value: Any) -> float:
    """A strength within its limits; 0 for anything but a number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return round(max(-MOST_STRENGTH, min(MOST_STRENGTH, number)), 3) if math.isfinite(number) else 0.0


def save_form(
    project: Project, rows: list[WeightedLora], apart: bool, fields: Any = None, **more: Any
) -> int:
    """Store the LoRAs, the fields if given, and other entries of the draft; returns the new revision."""
    if isinstance(fields, dict):
        plain = {name: value for name, value in fields.items() if isinstance(value, str | int | float)}
        more["preview"] = {name: plain.get(name) for name in FIELDS}
    with project.editing():
        rev = int((project.draft().get("preview_loras") or {}).get("rev") or 0) + 1
        project.update_draft(preview_loras={"rows": row_data(rows), "apart": apart, "rev": rev}, **more)
    return rev


def row_data(rows: list[WeightedLora]) -> list[dict[str, Any]]:
    """LoRAs as a page sends them."""
    return [{"file": row.file, "strength": row.strength, "text": row.text_strength} for row in rows]


def strip_values(project: Project, rows: Iterable[WeightedLora] = ()) -> tuple[float, ...]:
    """The strengths of the strip in the draft; until the user typed others, those that suit `rows`."""
    kept = (project.draft().get("preview_strip_at") or {}).get("values")
    values = tuple(kept) if isinstance(kept, list) and kept else STRIP
    if values not in (STRIP, SLIDER_STRENGTHS):
        return values
    return SLIDER_STRENGTHS if any(is_slider(Path(row.file)) for row in rows) else STRIP


def parse_strengths(text: Any) -> tuple[float, ...]:
    """The strengths of the strip, as typed.

    Raises:
        ConfigError: there is none, or one is not a number in range.
    """
    return tuple(float(v) for v in make_axis("strength", split_values(str(text or ""))).values)
