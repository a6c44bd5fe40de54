"""The form of the Preview tab as a page shows it: the LoRA files on this computer (of runs, added to the
project, in the folders of other tools), its fields, the axes of a grid; and the request that it makes."""

import os
import random
import shutil
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from app.jobs import RunView
from app.preview.sent_form import FIELDS, parse_rows, row_data, save_form, strip_values
from app.state import Snapshot
from app.templates import _, render
from lora_core.errors import AdapterFileError, ConfigError, DatasetError
from lora_core.generate.grid import Axis, make_axis, split_values
from lora_core.generate.request import DENOISING_STRENGTH, GenerationRequest, WeightedLora
from lora_core.model_files.detect import BaseFacts, lookup_base
from lora_core.model_files.header import check_family, not_an_adapter, read_header
from lora_core.model_files.starting_settings import is_slider
from lora_core.projects.project import Project
from lora_core.runs.events import Progress
from lora_core.settings.config import RunConfig, parse_cfg_rescale, sample_fields
from lora_core.settings.schema import AUTO, NumberOrAuto
from lora_core.system.files import changed_at, safe_name, unused_path

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
        best = _(", best") if step == run_view.progress.best_step else ""
        file = run.checkpoint(step) / "adapter.safetensors"
        found.append(FoundLora(_("{}, step {:,}{}", run.name, step, best), file, run_view))
    return found


def lora_groups(snapshot: Snapshot) -> list[Group]:
    """All LoRAs on offer, grouped by location."""
    own = snapshot.app_state.jobs.own
    found = [(own(one.run_view), (one.title, str(one.file))) for one in find_loras(snapshot)]
    groups: list[Group] = [(_("Runs"), [file for is_own, file in found if is_own])]
    period = int(time.monotonic() / LOOK_AGAIN)
    added = snapshot.app_state.project.path / ADDED
    groups.append((_("Added here"), _in_folder(added, changed_at(added), 0)))
    for tool, folder in snapshot.app_state.tools.lora_folders():
        groups.append((tool, _in_folder(folder, 0, period)))
    groups.append((_("Runs of other projects"), [file for is_own, file in found if not is_own]))
    return [(heading, files) for heading, files in groups if files]


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
        choices.append((_("Best, step {step:,}", step=best), "best"))
    if steps:
        choices.append((_("Last, step {step:,}", step=steps[-1]), "last"))
    return choices + [(_("Step {step:,}", step=step), str(step)) for step in reversed(steps)]


def add_lora(project: Project, file: Path) -> Path:
    """Move a LoRA file that was sent by a page into the project; returns its new path.

    Raises:
        LoraError: the file is not an adapter, or it cannot be moved.
    """
    header = read_header(file)
    if what := not_an_adapter(header.shapes):
        raise AdapterFileError(f"{file} cannot be used: it is {what}.")
    check_family(file, header)
    return keep_file(file, project.path / ADDED)


def keep_file(file: Path, folder: Path) -> Path:
    """Move a file that was sent by a page to a folder of the project; returns its new path.

    Raises:
        DatasetError: the disk refuses.
    """
    target = unused_path(folder, Path(safe_name(file.name).name).stem, file.suffix.lower())
    try:
        target.parent.mkdir(exist_ok=True)
        shutil.move(file, target)
    except OSError as error:
        raise DatasetError(_("{} cannot be kept: {}.", file.name, error.strerror or error)) from error
    return target


# Not in the demo's training set, so the result shows generalization.
DEMO_PROMPT = "house, duskprint style, on a sky blue background"
SEED = 1234
LARGEST_RANDOM = 2**32
GRID_SIDES = {"rows": "seed", "columns": "strength"}
"""Rows and columns, and what each varies at first."""
NOTHING = "none"
GRID_KINDS = {
    "strength": "LoRA strength", "checkpoint": "Checkpoint", "seed": "Seed", "prompt": "Prompt",
    "rank": "Rank", NOTHING: "Nothing",
}  # fmt: skip
MOST_CHECKPOINTS = 40


def load_fields(snapshot: Snapshot) -> dict[str, Any]:
    """The tab's fields: the draft over defaults that suit the shown run."""
    project, sample = snapshot.app_state.project, snapshot.plan.config.sample
    draft = project.draft().get("preview") or {}
    usual = sample_fields(
        sample, DEMO_PROMPT if project.uses_demo else _first_prompt(snapshot.shown.progress)
    )
    usual |= {"seed": SEED, "denoising_strength": DENOISING_STRENGTH}
    usual |= {side: usual[side] or None for side in ("width", "height")}
    return {name: draft[name] if draft.get(name) not in (None, "") else usual.get(name) for name in FIELDS}


def _first_prompt(progress: Progress) -> str:
    return next((sample.prompts[0] for sample in progress.previews[:1] if sample.prompts), "")


def lora_rows(snapshot: Snapshot, blank: bool = False) -> tuple[list[WeightedLora], dict[str, Any]]:
    """The LoRAs of the form and the draft's record of them; the project's newest until the user chose. Rows
    without a file only with `blank`."""
    kept = snapshot.app_state.project.draft().get("preview_loras") or {}
    if isinstance(kept.get("rows"), list):
        rows = parse_rows(kept["rows"], blank)
        runs = snapshot.app_state.workspace / "runs"
        # Files of deleted runs are dropped; typed paths stay as typed.
        there = [r for r in rows if not Path(r.file).is_relative_to(runs) or Path(r.file).is_file()]
        if there or not rows:
            return there, kept
    own = snapshot.app_state.jobs.own
    newest = next((found for found in find_loras(snapshot) if own(found.run_view)), None)
    return ([WeightedLora(str(newest.file))] if newest else []), {"apart": bool(kept.get("apart")), "rev": 0}


def form_data(snapshot: Snapshot) -> dict[str, Any]:
    """The form as the page's script needs it."""
    rows, kept = lora_rows(snapshot, blank=True)
    project, groups, loras = snapshot.app_state.project, lora_groups(snapshot), [r for r in rows if r.file]
    strip = ", ".join(f"{value:g}" for value in strip_values(project, loras))
    values = {
        "rows": row_data(rows), "apart": bool(kept.get("apart")), "groups": groups,
        "known": [file for _, files in groups for _, file in files],
        "best": project.draft().get("best_strengths") or {},
        "sliders": [row.file for row in loras if is_slider(Path(row.file))],
    }  # fmt: skip
    return {
        "project": project.path.name,
        "rev": int(kept.get("rev") or 0),
        "loras": render("preview/loras.html", **values),
        "fields": load_fields(snapshot),
        "strip": {"values": strip, "on": strip_is_on(project, base_for(snapshot, loras))},
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
        ConfigError: a side is not a multiple of the base's, or a number is out of range.
    """
    config = settings_for(snapshot, loras)
    base = base_for(snapshot, loras)
    seed = int(_number(given, "seed"))
    image, mask = (str(given.get(name) or "").strip().strip('"') for name in ("image", "mask"))
    denoising_strength = _number(given, "denoising_strength") if image else DENOISING_STRENGTH
    return GenerationRequest(
        **vars(config.model), cfg_rescale=_rescale(given),
        prompt=str(given.get("prompt") or ""), negative=str(given.get("negative") or ""),
        seed=random.randrange(LARGEST_RANDOM) if seed < 0 else seed,
        steps=int(_number(given, "steps")), cfg=_number(given, "cfg"),
        sampler=str(given.get("sampler") or "ddim"),
        width=_side(given, "width", base), height=_side(given, "height", base),
        clip_skip=config.train.clip_skip, tokens=config.train.max_token_length, image=image,
        denoising_strength=denoising_strength, mask=mask, loras=tuple(loras),
    )  # fmt: skip


def _rescale(given: dict[str, Any]) -> NumberOrAuto:
    value = given.get("cfg_rescale")
    return parse_cfg_rescale(AUTO if value in (None, "") else value)


NUMBERS: dict[str, tuple[str, float, float, float]] = {
    "seed": ("The seed", SEED, -1, 2**63 - 1), "steps": ("Steps", 20, 1, 200),
    "denoising_strength": ("The denoising strength", DENOISING_STRENGTH, 0.01, 1),
    "cfg": ("Guidance", 5.0, 1, 30), "width": ("The width", 0, 0, 4096), "height": ("The height", 0, 0, 4096),
}  # fmt: skip
"""What each number is called, its usual value, and its range."""


def _number(given: dict[str, Any], name: str) -> float:
    value, (title, usual, lowest, highest) = given.get(name), NUMBERS[name]
    try:
        number = usual if value is None or value == "" else float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(_("{} should be a number, not {!r}.", _(title), str(value)[:40])) from error
    if not lowest <= number <= highest:
        raise ConfigError(
            _("{} {:g} is out of range; it must be between {} and {}.", _(title), number, lowest, highest)
        )
    return number


def _side(given: dict[str, Any], name: str, base: BaseFacts) -> int:
    """A side in pixels, 0 for the base's default."""
    value = int(_number(given, name))
    multiple = base.multiple
    if value % multiple:
        below, above = value // multiple * multiple, (value // multiple + 1) * multiple
        near = _("{below} or {above}", below=below, above=above) if below else str(above)
        raise ConfigError(
            _("{} {} is not a multiple of {}; take {}.", _(NUMBERS[name][0]), value, multiple, near)
        )
    return value


def strip_is_on(project: Project, base: BaseFacts) -> bool:
    """Whether each image gets a strip: the user's choice, else only for the embedded base, which is fast."""
    chosen = (project.draft().get("preview_strip_at") or {}).get("on")
    return base.embedded if chosen is None else bool(chosen)


def save_request(project: Project, shot: GenerationRequest) -> None:
    """Put a request's settings into the form."""
    apart = any(lora.text_strength is not None for lora in shot.loras)
    fields = {name: getattr(shot, name) for name in FIELDS}
    fields |= {"width": shot.width or None, "height": shot.height or None}
    save_form(project, list(shot.loras), apart, fields)


def build_run_request(snapshot: Snapshot, name: str) -> GenerationRequest:
    """A run's export at its own first sample prompt, with the sampler, seed and size of that sample.

    Raises:
        ConfigError: no such run, or it has no file yet.
    """
    run_view: RunView | None = next((w for w, _ in snapshot.runs if w.run.name == name), None)
    files = list_run_loras(run_view) if run_view else []
    if run_view is None or not files:
        raise ConfigError(_("The run {name} has no file yet; try it after its first checkpoint.", name=name))
    sample = (run_view.config() or snapshot.plan.config).sample
    asked = sample_fields(sample, _first_prompt(run_view.progress))
    asked["prompt"] = asked["prompt"] or load_fields(snapshot)["prompt"]
    return build_request(snapshot, asked, [WeightedLora(str(files[0].file))])


def _sent_axis(sent: Any) -> tuple[str, list[str]]:
    sent = sent if isinstance(sent, dict) else {}
    values = sent.get("values")
    return str(sent.get("kind")), [str(value) for value in values] if isinstance(values, list) else []


def take_sent_axes(project: Project, sent: dict[str, Any]) -> list[Axis | None]:
    """Store rows and columns as a page sends them; returns them parsed.

    Raises:
        ConfigError: a value is missing or invalid.
    """
    grid = sent.get("grid")
    axes = {side: _sent_axis(grid.get(side) if isinstance(grid, dict) else None) for side in GRID_SIDES}
    project.update_draft(preview_grid=axes)
    return [parse_axis(*axis) for axis in axes.values()]


def parse_axis(kind: str, values: list[str]) -> Axis | None:
    """Parse the chosen values of an axis; numbers typed together are split.

    Raises:
        ConfigError: a value is missing or invalid.
    """
    if kind == NOTHING:
        return None
    if kind in ("strength", "seed", "rank"):
        values = [part for value in values for part in split_values(value)]
    return make_axis(kind, values)


def grid_axes(snapshot: Snapshot) -> dict[str, Any]:
    """Rows and columns in the draft, as `axis_data` gives them."""
    kept = snapshot.app_state.project.draft().get("preview_grid") or {}
    return {
        side: axis_data(snapshot, side, *(axis if isinstance(axis := kept.get(side), list) else [usual]))
        for side, usual in GRID_SIDES.items()
    }


def axis_data(snapshot: Snapshot, side: str, kind: str, values: Any = None) -> dict[str, Any]:
    """An axis with its values, without any those that are usual, and the fields for them as HTML."""
    choices, usual = list_axis_values(snapshot, kind)
    listed = [str(value) for value in values] if isinstance(values, list) and values else usual
    html = render("preview/axis.html", side=side, kind=kind, values=listed, choices=choices)
    return {"kind": kind, "values": listed, "html": html}


def list_axis_values(snapshot: Snapshot, kind: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Checkpoints on offer as (title, file), and the values selected by default."""
    fields = load_fields(snapshot)
    if kind == "checkpoint":
        return _list_checkpoints(snapshot)
    try:
        first = max(0, int(fields["seed"]))
    except ValueError:
        first = SEED
    usual = {
        "strength": ["0", "0.5", "1"],
        "rank": ["1", "4", "16"],
        "seed": [str(first + number) for number in range(3)],
        "prompt": [str(fields["prompt"])] if fields["prompt"] else [],
    }
    return [], usual.get(kind, [])


def _list_checkpoints(snapshot: Snapshot) -> tuple[list[tuple[str, str]], list[str]]:
    """All adapter files; those of the first LoRA's run are selected."""
    rows, _ = lora_rows(snapshot)
    run_view = find_owner(snapshot, rows[0].file) if rows else None
    own = [str(one.file) for one in list_run_loras(run_view)] if run_view else []
    choices = [
        (title if place == "Runs" else f"{place}: {title}", file)
        for place, files in lora_groups(snapshot)
        for title, file in files
    ]
    steps = [file for file in own if "/checkpoints/" in file.replace("\\", "/")]
    picked = (steps or own)[:3][::-1] or [file for _, file in choices[:2]]
    return choices[:MOST_CHECKPOINTS], picked
