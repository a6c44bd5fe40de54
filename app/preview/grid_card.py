"""The grid of the Preview tab: what rows and columns vary, typed or picked, and the sheet."""

import functools
from typing import Any

import gradio as gr

from app.bindings import QUIET, TYPING, Bindings, html_block
from app.formatting import safe
from app.preview.compare_view import grid_result
from app.preview.loras import find_loras, find_owner, list_run_loras, lora_groups
from app.preview.page_state import GridState
from app.preview.request_form import build_request, load_fields, lora_rows, take_sent_rows
from app.snapshot import Snapshot, take_snapshot
from lora_core.errors import LoraError
from lora_core.generate.request import Axis, make_axis, split_values

NOTHING = "none"
TITLES = {
    "strength": "LoRA strength", "checkpoint": "Checkpoint", "seed": "Seed", "prompt": "Prompt",
    "rank": "Rank",
}  # fmt: skip
STRENGTHS, RANKS = ("0", "0.25", "0.5", "0.75", "1", "1.25"), ("1", "2", "4", "8", "16", "32")
MOST_CHECKPOINTS = 40
Choices = list[tuple[str, str]]


def build_grid(bindings: Bindings, fields: dict[str, Any], rows_box: Any) -> None:
    """Lay out the card and wire it; `fields` are the form's, `rows_box` brings the LoRA rows along."""
    with gr.Column(elem_classes="card", elem_id="grid-card"):
        html_block("<h2>Grid</h2>")
        with gr.Row(elem_classes="axes"):
            down = _axis_fields("Rows", "grid-rows", "checkpoint")
            across = _axis_fields("Columns", "grid-columns", "strength")
            draw = gr.Button("Draw the grid", elem_id="draw-grid", min_width=0, scale=0)
        note = html_block(elem_id="grid-note")
        bindings.follow(html_block(elem_id="grid"), grid_result)
    for start, (kind, values) in (("rows", down), ("columns", across)):
        bindings.fill_on_load(kind, functools.partial(_kept_kind, bindings, start))
        bindings.fill_on_load(values, functools.partial(_kept_values, bindings, start))
    _wire(bindings, fields, rows_box, ([*down, *across], draw, note))


def _axis_fields(title: str, name: str, kind: str) -> tuple[Any, Any]:
    choices = [(words, key) for key, words in TITLES.items()]
    if title == "Rows":
        choices.append(("Nothing", NOTHING))
    return (
        gr.Dropdown(choices, value=kind, label=title, elem_id=name),
        gr.Dropdown(
            [], label=f"Values of the {title.lower()}", multiselect=True, allow_custom_value=True,
            elem_id=f"{name}-values",
        ),
    )  # fmt: skip


def _wire(bindings: Bindings, fields: dict[str, Any], rows_box: Any, own: tuple[list[Any], Any, Any]) -> None:
    app_state = bindings.app_state
    axes, draw, note = own
    names = list(fields)

    def typed(*values: Any) -> None:
        app_state.project.keep(
            preview_grid=dict(zip(("rows", "row_values", "columns", "column_values"), values, strict=True))
        )

    def kind_chosen(start: str, kind: str) -> Any:
        if kind == _kept_kind(bindings, start):
            return gr.skip()  # The list was merely left.
        choices, usual = list_axis_values(take_snapshot(app_state), kind)
        return gr.update(choices=choices, value=usual)

    def drawn(*values: Any) -> str:
        typed(*values[:4])
        given = dict(zip(names, values[4:-1], strict=True))
        try:
            snapshot = take_snapshot(app_state)
            shot = build_request(snapshot, given, take_sent_rows(snapshot, values[-1]))
            rows, columns = parse_axis(values[0], values[1]), parse_axis(values[2], values[3])
            app_state.render_queue.draw_grid(GridState.of(shot, rows, columns))
        except LoraError as error:
            return f'<p class="problem" role="alert">{safe(error)}</p>'
        return ""

    for start, kind, values in (("rows", *axes[:2]), ("columns", *axes[2:])):
        chosen = kind.input(functools.partial(kind_chosen, start), kind, values, **TYPING)
        chosen.then(typed, axes, None, **QUIET)
        values.input(typed, axes, None, **TYPING)
    flushed = "(...values) => [...values.slice(0, -1), window.easel.loraRows()]"
    bindings.refresh_after(draw.click(drawn, [*axes, *fields.values(), rows_box], note, js=flushed, **QUIET))


def list_axis_values(snapshot: Snapshot, kind: str) -> tuple[Choices, list[str]]:
    """What can be picked for a kind, and what is picked at first."""
    fields = load_fields(snapshot)
    match kind:
        case "strength":
            return [(value, value) for value in STRENGTHS], ["0", "0.5", "1"]
        case "rank":
            return [(value, value) for value in RANKS], ["1", "4", "16"]
        case "seed":
            first = max(0, int(fields["seed"]))
            seeds = [str(first + number) for number in range(6)]
            return [(value, value) for value in seeds], seeds[:3]
        case "prompt":
            prompt = str(fields["prompt"])
            return ([(prompt, prompt)], [prompt]) if prompt else ([], [])
        case "checkpoint":
            return _checkpoints(snapshot)
    return [], []


def _checkpoints(snapshot: Snapshot) -> tuple[Choices, list[str]]:
    """All files; those of the run that the first LoRA is from are picked."""
    rows, _ = lora_rows(snapshot)
    run_view = find_owner(snapshot, rows[0].file) if rows else None
    own = [str(one.file) for one in list_run_loras(run_view)] if run_view else []
    choices = [(one.title, str(one.file)) for one in find_loras(snapshot)]
    choices += [
        (f"{place}: {title}", file) for place, files in lora_groups(snapshot)[1:] for title, file in files
    ]
    steps = [file for file in own if "/checkpoints/" in file.replace("\\", "/")]
    picked = (steps or own)[:3][::-1] or [file for _, file in choices[:2]]
    return choices[:MOST_CHECKPOINTS], picked


def parse_axis(kind: str, values: Any) -> Axis | None:
    """What a person chose as rows or columns; numbers typed in one go are taken apart.

    Raises:
        ConfigError: there is no value, or one is not legal.
    """
    if kind == NOTHING:
        return None
    listed = [str(value) for value in values or []]
    if kind in ("strength", "seed", "rank"):
        listed = [part for value in listed for part in split_values(value)]
    return make_axis(kind, listed)


def _kept(bindings: Bindings, start: str) -> tuple[str, list[str], Choices]:
    """Kind, values and choices of the rows or the columns."""
    kept = bindings.app_state.project.draft().get("preview_grid") or {}
    kind = str(kept.get(start) or {"rows": "seed", "columns": "strength"}[start])
    choices, usual = list_axis_values(take_snapshot(bindings.app_state), kind)
    values = kept.get(f"{start.removesuffix('s')}_values")
    return kind, [str(value) for value in values] if isinstance(values, list) and values else usual, choices


def _kept_kind(bindings: Bindings, start: str) -> str:
    return _kept(bindings, start)[0]


def _kept_values(bindings: Bindings, start: str) -> Any:
    _, values, choices = _kept(bindings, start)
    return gr.update(choices=choices, value=values)
