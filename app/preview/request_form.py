"""The form of the Preview tab: which LoRAs there are, the fields in the draft, and the request they make."""

import math
import os
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from app.jobs import RunView
from app.preview.render_queue import STRIP
from app.state import Snapshot
from lora_core.errors import ConfigError
from lora_core.generate.request import GenerationRequest, Infotext, WeightedLora, parse_cfg_rescale
from lora_core.model_files.detect import Base, lookup_base
from lora_core.projects.project import Project
from lora_core.settings.choices import SAMPLERS
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import AUTO, NumberOrAuto
from lora_core.system.untrusted import parse_json

MOST_OF_A_TOOL, MOST_DEPTH = 300, 4
LOOK_AGAIN = 20
"""Seconds after which another tool's folder is read again."""
ADDED = "loras"
"""The folder of a project for LoRA files that were dropped on the page."""

Group = tuple[str, list[tuple[str, str]]]
"""A heading, and (title, path) of each file below it."""


@dataclass(frozen=True)
class FoundLora:
    """One adapter file of a run."""

    title: str
    file: Path
    run_view: RunView


def find_loras(snapshot: Snapshot) -> list[FoundLora]:
    """Adapter files of all runs, newest run first."""
    return [found for run_view, _ in snapshot.runs for found in list_run_loras(run_view)]


def list_run_loras(run_view: RunView) -> list[FoundLora]:
    """A run's export, its other exports, then its checkpoints from the last back."""
    found, run = [], run_view.run
    files = sorted(run.exports.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
    named = run_view.progress.export
    main = run.path / named if named else None
    files.sort(key=lambda file: file != main)
    for file in files:
        title = run.name if file.stem == run.name else f"{run.name}, {file.stem}"
        found.append(FoundLora(title, file, run_view))
    for step in reversed(run.checkpoint_steps()):
        best = ", best" if step == run_view.progress.best_step else ""
        file = run.checkpoint(step) / "adapter.safetensors"
        found.append(FoundLora(f"{run.name}, step {step:,}{best}", file, run_view))
    return found


def lora_groups(snapshot: Snapshot) -> list[Group]:
    """All LoRAs on offer, grouped by location."""
    groups: list[Group] = [("Runs", [(one.title, str(one.file)) for one in find_loras(snapshot)])]
    period = int(time.monotonic() / LOOK_AGAIN)
    added = snapshot.app_state.project.path / ADDED
    groups.append(("Added here", _in_folder(added, _changed(added), 0)))
    for tool, folder in snapshot.app_state.tools.lora_folders():
        groups.append((tool, _in_folder(folder, 0, period)))
    return [(heading, files) for heading, files in groups if files]


def _changed(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=32)
def _in_folder(folder: Path, changed: int, period: int) -> list[tuple[str, str]]:
    """LoRA files below a folder; `changed` and `period` invalidate the cache."""
    found: list[tuple[str, str]] = []
    for place, folders, files in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if depth < MOST_DEPTH else []
        for name in sorted(files):
            if name.lower().endswith(".safetensors") and not name.startswith("."):
                path = Path(place) / name
                found.append((path.relative_to(folder).with_suffix("").as_posix(), str(path)))
        if len(found) >= MOST_OF_A_TOOL:
            break
    return found[:MOST_OF_A_TOOL]


def find_owner(snapshot: Snapshot, file: str) -> RunView | None:
    """The run that a file belongs to."""
    return next(
        (run_view for run_view, _ in snapshot.runs if Path(file).is_relative_to(run_view.run.path)), None
    )


def checkpoint_choices(run_view: RunView) -> list[tuple[str, str]]:
    """Checkpoints to export: best and last first, then each step on disk."""
    steps = run_view.run.checkpoint_steps()
    best = run_view.progress.best_step
    choices = []
    if best in steps:
        choices.append((f"Best, step {best:,}", "best"))
    if steps:
        choices.append((f"Last, step {steps[-1]:,}", "last"))
    return choices + [(f"Step {step:,}", str(step)) for step in reversed(steps)]


FIELDS = ("prompt", "negative", "sampler", "steps", "cfg", "cfg_rescale", "seed", "width", "height")
# Not in the demo's training set, so the result shows generalization.
DEMO_PROMPT = "house, duskprint style, on a sky blue background"
SEED = 1234
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
                WeightedLora(file, _strength(row.get("strength")), None if text is None else _strength(text))
            )
    return found


def _strength(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    number = number if math.isfinite(number) else 0.0
    return round(max(-MOST_STRENGTH, min(MOST_STRENGTH, number)), 3)


def save_rows(project: Project, rows: list[WeightedLora], apart: bool) -> int:
    """Store the LoRAs in the draft; returns the new revision."""
    before = project.draft().get("preview_loras") or {}
    rev = int(before.get("rev") or 0) + 1
    listed = [{"file": r.file, "strength": r.strength, "text": r.text_strength} for r in rows]
    project.update_draft(preview_loras={"rows": listed, "apart": apart, "rev": rev})
    return rev


def take_sent_rows(snapshot: Snapshot, text: str) -> list[WeightedLora]:
    """The LoRAs sent with a click, stored in the draft if they changed; the draft's if none were sent."""
    before, _ = lora_rows(snapshot)
    try:
        sent = parse_json(text)
        rows, apart = parse_rows(sent["rows"]), bool(sent["apart"])
    except (ValueError, KeyError, TypeError):
        return before
    if rows != before:
        save_rows(snapshot.app_state.project, rows, apart)
    return rows


def rows_data(snapshot: Snapshot) -> dict[str, Any]:
    """The rows as the page's script needs them."""
    rows, kept = lora_rows(snapshot)
    listed = [{"file": r.file, "strength": r.strength, "text": r.text_strength} for r in rows]
    return {
        "project": snapshot.app_state.project.path.name,
        "rev": int(kept.get("rev") or 0),
        "apart": bool(kept.get("apart")),
        "rows": listed,
        "groups": lora_groups(snapshot),
    }


def settings_for(snapshot: Snapshot, loras: list[WeightedLora]) -> RunConfig:
    """The config that a LoRA was trained with; the Train tab's for files from elsewhere."""
    run_views = (find_owner(snapshot, lora.file) for lora in loras)
    config = next((c for run_view in run_views if run_view and (c := run_view.config())), None)
    return config or snapshot.plan.config


def base_for(snapshot: Snapshot, loras: list[WeightedLora]) -> Base:
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
    number = usual if value is None or value == "" else float(value)
    if not lowest <= number <= highest:
        raise ConfigError(f"{_TITLES[name]} {number:g} is out of range; it goes from {lowest} to {highest}.")
    return number


_TITLES = {
    "seed": "The seed",
    "steps": "Steps",
    "cfg": "Guidance",
    "width": "The width",
    "height": "The height",
}


def _side(given: dict[str, Any], name: str, base: Base) -> int:
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


def strip_is_on(project: Project, base: Base) -> bool:
    """Whether each image gets a strip: the user's choice, else only for the embedded base, which is fast."""
    chosen = (project.draft().get("preview_strip_at") or {}).get("on")
    return base.embedded if chosen is None else bool(chosen)


def fields_of(shot: GenerationRequest) -> dict[str, Any]:
    """A request's fields as the form shows them."""
    values = {name: getattr(shot, name) for name in FIELDS}
    return values | {"width": shot.width or None, "height": shot.height or None}


def save_request(project: Project, shot: GenerationRequest) -> None:
    """Put a request's settings into the form."""
    apart = any(lora.text_strength is not None for lora in shot.loras)
    save_rows(project, list(shot.loras), apart)
    project.update_draft(preview=fields_of(shot))


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
    project.update_draft(preview=fields | {"prompt": info.prompt, "negative": info.negative})
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
            rows.append(WeightedLora(found, _strength(tag.strength), tag.text_strength))
    if info.prompt or info.loras:
        save_rows(project, rows, any(row.text_strength is not None for row in rows))
    return missing


def new_lora_path(project: Project, name: str) -> Path:
    """A free path for a LoRA file dropped on the page."""
    folder = project.path / ADDED
    folder.mkdir(parents=True, exist_ok=True)
    path, number = folder / name, 2
    while path.exists():
        path, number = folder / f"{Path(name).stem}-{number}.safetensors", number + 1
    return path


def build_run_request(snapshot: Snapshot, name: str) -> GenerationRequest:
    """A run's export at its own first sample prompt, with the sampler and seed of its samples.

    Raises:
        ConfigError: there is no such run, or it has no file yet.
    """
    run_view: RunView | None = next((w for w, _ in snapshot.runs if w.run.name == name), None)
    files = list_run_loras(run_view) if run_view else []
    if run_view is None or not files:
        raise ConfigError(f"The run {name} has no file yet; it can be looked at once it has saved one.")
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
