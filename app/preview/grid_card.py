"""The grid of the Preview tab: what rows and columns vary, typed or picked, and the sheet."""

import functools
from typing import Any

import gradio as gr

from app.bindings import QUIET, TYPING, Parts, piece
from app.formatting import safe
from app.preview.compare_view import grid_block
from app.preview.loras import found_loras, lora_groups, owner, run_loras
from app.preview.page_state import Grid
from app.preview.request_form import kept_fields, lora_rows, rows_sent, shot_of
from app.snapshot import Moment, moment_of
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


def build_grid(parts: Parts, fields: dict[str, Any], rows_box: Any) -> None:
    """Lay out the card and wire it; `fields` are the form's, `rows_box` brings the LoRA rows along."""
    with gr.Column(elem_classes="card", elem_id="grid-card"):
        piece("<h2>Grid</h2>")
        with gr.Row(elem_classes="axes"):
            down = _axis_fields("Rows", "grid-rows", "checkpoint")
            across = _axis_fields("Columns", "grid-columns", "strength")
            draw = gr.Button("Draw the grid", elem_id="draw-grid", min_width=0, scale=0)
        note = piece(elem_id="grid-note")
        parts.live(piece(elem_id="grid"), grid_block)
    for start, (kind, values) in (("rows", down), ("columns", across)):
        parts.fill(kind, functools.partial(_kept_kind, parts, start))
        parts.fill(values, functools.partial(_kept_values, parts, start))
    _wire(parts, fields, rows_box, ([*down, *across], draw, note))


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


def _wire(parts: Parts, fields: dict[str, Any], rows_box: Any, own: tuple[list[Any], Any, Any]) -> None:
    desk = parts.desk
    axes, draw, note = own
    names = list(fields)

    def typed(*values: Any) -> None:
        desk.project.keep(
            preview_grid=dict(zip(("rows", "row_values", "columns", "column_values"), values, strict=True))
        )

    def kind_chosen(start: str, kind: str) -> Any:
        if kind == _kept_kind(parts, start):
            return gr.skip()  # The list was merely left.
        choices, usual = offered(moment_of(desk), kind)
        return gr.update(choices=choices, value=usual)

    def drawn(*values: Any) -> str:
        typed(*values[:4])
        given = dict(zip(names, values[4:-1], strict=True))
        try:
            moment = moment_of(desk)
            shot = shot_of(moment, given, rows_sent(moment, values[-1]))
            rows, columns = chosen_axis(values[0], values[1]), chosen_axis(values[2], values[3])
            desk.studio.draw_grid(Grid.of(shot, rows, columns))
        except LoraError as error:
            return f'<p class="problem" role="alert">{safe(error)}</p>'
        return ""

    for start, kind, values in (("rows", *axes[:2]), ("columns", *axes[2:])):
        chosen = kind.input(functools.partial(kind_chosen, start), kind, values, **TYPING)
        chosen.then(typed, axes, None, **QUIET)
        values.input(typed, axes, None, **TYPING)
    flushed = "(...values) => [...values.slice(0, -1), window.easel.loraRows()]"
    parts.action(draw.click(drawn, [*axes, *fields.values(), rows_box], note, js=flushed, **QUIET))


def offered(moment: Moment, kind: str) -> tuple[Choices, list[str]]:
    """What can be picked for a kind, and what is picked at first."""
    fields = kept_fields(moment)
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
            return _checkpoints(moment)
    return [], []


def _checkpoints(moment: Moment) -> tuple[Choices, list[str]]:
    """All files; those of the run that the first LoRA is from are picked."""
    rows, _ = lora_rows(moment)
    watch = owner(moment, rows[0].file) if rows else None
    own = [str(one.file) for one in run_loras(watch)] if watch else []
    choices = [(one.title, str(one.file)) for one in found_loras(moment)]
    choices += [
        (f"{place}: {title}", file) for place, files in lora_groups(moment)[1:] for title, file in files
    ]
    steps = [file for file in own if "/checkpoints/" in file.replace("\\", "/")]
    picked = (steps or own)[:3][::-1] or [file for _, file in choices[:2]]
    return choices[:MOST_CHECKPOINTS], picked


def chosen_axis(kind: str, values: Any) -> Axis | None:
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


def _kept(parts: Parts, start: str) -> tuple[str, list[str], Choices]:
    """Kind, values and choices of the rows or the columns."""
    kept = parts.desk.project.draft().get("preview_grid") or {}
    kind = str(kept.get(start) or {"rows": "seed", "columns": "strength"}[start])
    choices, usual = offered(moment_of(parts.desk), kind)
    values = kept.get(f"{start.removesuffix('s')}_values")
    return kind, [str(value) for value in values] if isinstance(values, list) and values else usual, choices


def _kept_kind(parts: Parts, start: str) -> str:
    return _kept(parts, start)[0]


def _kept_values(parts: Parts, start: str) -> Any:
    _, values, choices = _kept(parts, start)
    return gr.update(choices=choices, value=values)
