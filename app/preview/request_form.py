"""The form of the Preview tab: which LoRAs there are, what a page sends of the form, and the request that it
makes. The form is stored in the project's draft; each change gets the next revision, so that a page knows
which of two states is newer."""

import contextlib
import math
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.jobs import RunView
from app.preview.loras import find_loras, find_owner, list_run_loras, lora_groups
from app.state import Snapshot
from lora_core.errors import ConfigError, LoraError
from lora_core.generate.request import (
    GenerationRequest,
    WeightedLora,
    make_axis,
    parse_cfg_rescale,
    split_values,
)
from lora_core.model_files.detect import BaseFacts, lookup_base
from lora_core.projects.project import Project
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import AUTO, NumberOrAuto

FIELDS = ("prompt", "negative", "sampler", "steps", "cfg", "cfg_rescale", "seed", "width", "height")
# Not in the demo's training set, so the result shows generalization.
DEMO_PROMPT = "house, duskprint style, on a sky blue background"
SEED = 1234
STRIP = (0.0, 0.25, 0.5, 0.75, 1.0)
LARGEST_RANDOM = 2**32
MOST_LORAS = 20
MOST_STRENGTH = 20.0


def load_fields(snapshot: Snapshot) -> dict[str, Any]:
    """The tab's fields: the draft over defaults that suit the shown run."""
    draft = snapshot.app_state.project.draft().get("preview") or {}
    preview = snapshot.plan.config.sample
    usual: dict[str, Any] = {"sampler": preview.sampler, "steps": preview.steps, "cfg": preview.cfg}
    usual["cfg_rescale"] = preview.cfg_rescale
    usual |= {"prompt": "", "negative": "", "seed": SEED, "width": None, "height": None}
    previews = snapshot.progress.previews
    if snapshot.app_state.project.uses_demo:
        usual["prompt"] = DEMO_PROMPT
    elif previews and previews[0].prompts:
        usual["prompt"] = previews[0].prompts[0]
    return {name: draft[name] if draft.get(name) not in (None, "") else usual[name] for name in FIELDS}


def lora_rows(snapshot: Snapshot) -> tuple[list[WeightedLora], dict[str, Any]]:
    """The LoRAs of the form and the draft's record of them; the project's newest until the user chose."""
    kept = snapshot.app_state.project.draft().get("preview_loras") or {}
    if isinstance(kept.get("rows"), list):
        rows = parse_rows(kept["rows"])
        runs = snapshot.app_state.workspace / "runs"
        # Files of deleted runs are dropped; typed paths stay as typed.
        there = [r for r in rows if not Path(r.file).is_relative_to(runs) or Path(r.file).is_file()]
        if there or not rows:
            return there, kept
    own = snapshot.app_state.jobs.own
    newest = next((found for found in find_loras(snapshot) if own(found.run_view)), None)
    return ([WeightedLora(str(newest.file))] if newest else []), {"apart": bool(kept.get("apart")), "rev": 0}


def parse_rows(rows: Iterable[Any]) -> list[WeightedLora]:
    """Parse rows as a page sends them: file, strength, and the text encoder's strength or None."""
    found = []
    for row in list(rows)[:MOST_LORAS]:
        if isinstance(row, dict) and str(row.get("file") or "").strip():
            text = row.get("text")
            file = str(row["file"]).strip().strip('"')
            found.append(
                WeightedLora(
                    file, parse_strength(row.get("strength")), None if text is None else parse_strength(text)
                )
            )
    return found


def parse_strength(value: Any) -> float:
    """A strength within its limits; 0 for what is no number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    number = number if math.isfinite(number) else 0.0
    return round(max(-MOST_STRENGTH, min(MOST_STRENGTH, number)), 3)


def save_form(
    project: Project, rows: list[WeightedLora], apart: bool, fields: dict[str, Any] | None = None, **more: Any
) -> int:
    """Store the LoRAs, the fields if given, and other entries of the draft; returns the new revision."""
    before = project.draft().get("preview_loras") or {}
    rev = int(before.get("rev") or 0) + 1
    if fields is not None:
        more["preview"] = {name: _plain(fields.get(name)) for name in FIELDS}
    project.update_draft(preview_loras={"rows": _row_data(rows), "apart": apart, "rev": rev}, **more)
    return rev


def _plain(value: Any) -> str | float | None:
    return value if isinstance(value, str | int | float) else None


def _row_data(rows: list[WeightedLora]) -> list[dict[str, Any]]:
    return [{"file": row.file, "strength": row.strength, "text": row.text_strength} for row in rows]


def take_sent_form(project: Project, sent: dict[str, Any]) -> tuple[list[WeightedLora], int]:
    """Store the form as a page sends it; returns its LoRAs and the new revision.

    Raises:
        ConfigError: it is not whole.
    """
    if not isinstance(sent.get("rows"), list):
        raise ConfigError("The LoRAs of the form did not arrive; try again.")
    rows = parse_rows(sent["rows"])
    more: dict[str, Any] = {}
    fields, strip = sent.get("fields"), sent.get("strip")
    if isinstance(strip, dict):
        kept = {"on": bool(strip.get("on")), "values": list(strip_values(project))}
        with contextlib.suppress(LoraError):
            # Reported when the strip is generated; a half-typed number is not an error yet.
            kept["values"] = list(parse_strengths(strip.get("values")))
        more["preview_strip_at"] = kept
    fields = fields if isinstance(fields, dict) else None
    return rows, save_form(project, rows, bool(sent.get("apart")), fields, **more)


def form_data(snapshot: Snapshot) -> dict[str, Any]:
    """The whole form as the page's script needs it."""
    rows, kept = lora_rows(snapshot)
    project = snapshot.app_state.project
    strip = ", ".join(f"{value:g}" for value in strip_values(project))
    return {
        "project": project.path.name,
        "rev": int(kept.get("rev") or 0),
        "apart": bool(kept.get("apart")),
        "rows": _row_data(rows),
        "groups": lora_groups(snapshot),
        "best": project.draft().get("best_strengths") or {},
        "fields": load_fields(snapshot),
        "strip": {"values": strip, "on": strip_is_on(project, base_for(snapshot, rows))},
    }


def settings_for(snapshot: Snapshot, loras: list[WeightedLora]) -> RunConfig:
    """The config that a LoRA was trained with; the Train tab's for files from elsewhere."""
    run_views = (find_owner(snapshot, lora.file) for lora in loras)
    config = next((c for run_view in run_views if run_view and (c := run_view.config())), None)
    return config or snapshot.plan.config


def base_for(snapshot: Snapshot, loras: list[WeightedLora]) -> BaseFacts:
    """The base that images with these LoRAs are generated with."""
    model = settings_for(snapshot, loras).model
    return lookup_base(model.base, model.prediction, model.zero_terminal_snr)


def build_request(snapshot: Snapshot, given: dict[str, Any], loras: list[WeightedLora]) -> GenerationRequest:
    """Build the request described by the form. A seed of -1 becomes random.

    Raises:
        ConfigError: a side is no multiple of what the base needs, or a number is out of range.
    """
    config = settings_for(snapshot, loras)
    base = base_for(snapshot, loras)
    seed = int(_number(given, "seed", SEED, -1, 2**63 - 1))
    return GenerationRequest(
        **vars(config.model), cfg_rescale=_rescale(given),
        prompt=str(given.get("prompt") or ""), negative=str(given.get("negative") or ""),
        seed=random.randrange(LARGEST_RANDOM) if seed < 0 else seed,
        steps=int(_number(given, "steps", 20, 1, 200)), cfg=_number(given, "cfg", 5.0, 1, 30),
        sampler=str(given.get("sampler") or "ddim"),
        width=_side(given, "width", base), height=_side(given, "height", base),
        clip_skip=config.train.clip_skip, tokens=config.train.max_token_length, loras=tuple(loras),
    )  # fmt: skip


def _rescale(given: dict[str, Any]) -> NumberOrAuto:
    value = given.get("cfg_rescale")
    return parse_cfg_rescale(AUTO if value in (None, "") else value)


def _number(given: dict[str, Any], name: str, usual: float, lowest: float, highest: float) -> float:
    value = given.get(name)
    try:
        number = usual if value is None or value == "" else float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{_TITLES[name]} should be a number, not {str(value)[:40]!r}.") from error
    if not lowest <= number <= highest:
        raise ConfigError(
            f"{_TITLES[name]} {number:g} is out of range; it must be between {lowest} and {highest}."
        )
    return number


_TITLES = {
    "seed": "The seed", "steps": "Steps", "cfg": "Guidance", "width": "The width", "height": "The height",
}  # fmt: skip


def _side(given: dict[str, Any], name: str, base: BaseFacts) -> int:
    """A side in pixels, 0 for the base's default."""
    value = int(_number(given, name, 0, 0, 4096))
    multiple = base.multiple
    if value % multiple:
        below, above = value // multiple * multiple, (value // multiple + 1) * multiple
        near = f"{below} or {above}" if below else str(above)
        raise ConfigError(f"{_TITLES[name]} {value} is no multiple of {multiple}; take {near}.")
    return value


def strip_values(project: Project) -> tuple[float, ...]:
    """The strengths of the strip in the draft."""
    kept = (project.draft().get("preview_strip_at") or {}).get("values")
    return tuple(kept) if isinstance(kept, list) and kept else STRIP


def strip_is_on(project: Project, base: BaseFacts) -> bool:
    """Whether each image gets a strip: the user's choice, else only for the embedded base, which is fast."""
    chosen = (project.draft().get("preview_strip_at") or {}).get("on")
    return base.embedded if chosen is None else bool(chosen)


def parse_strengths(text: Any) -> tuple[float, ...]:
    """The strengths of the strip, as they are typed.

    Raises:
        ConfigError: there is none, or one is no number in range.
    """
    return tuple(float(v) for v in make_axis("strength", split_values(str(text or ""))).values)


def save_request(project: Project, shot: GenerationRequest) -> None:
    """Put a request's settings into the form."""
    apart = any(lora.text_strength is not None for lora in shot.loras)
    fields = {name: getattr(shot, name) for name in FIELDS}
    fields |= {"width": shot.width or None, "height": shot.height or None}
    save_form(project, list(shot.loras), apart, fields)


def build_run_request(snapshot: Snapshot, name: str) -> GenerationRequest:
    """A run's export at its own first sample prompt, with the sampler and seed of its samples.

    Raises:
        ConfigError: there is no such run, or it has no file yet.
    """
    run_view: RunView | None = next((w for w, _ in snapshot.runs if w.run.name == name), None)
    files = list_run_loras(run_view) if run_view else []
    if run_view is None or not files:
        raise ConfigError(f"The run {name} has no file yet; try it after its first checkpoint.")
    config = run_view.config() or snapshot.plan.config
    previews = run_view.progress.previews
    prompt = previews[0].prompts[0] if previews and previews[0].prompts else ""
    fields = load_fields(snapshot) | {
        "seed": config.sample.seed, "steps": config.sample.steps, "cfg": config.sample.cfg,
        "cfg_rescale": config.sample.cfg_rescale, "sampler": config.sample.sampler,
        "width": None, "height": None, "negative": "",
    }  # fmt: skip
    shot = build_request(snapshot, fields, [WeightedLora(str(files[0].file))])
    return replace(shot, prompt=prompt or str(fields["prompt"]))
