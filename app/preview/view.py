"""The Preview tab: form, LoRA rows, comparison, strip, grid, and files dropped on it."""

import functools
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, UnidentifiedImageError

from app.bindings import QUIET, TYPING, Bindings, edit_events, html_block
from app.formatting import TIMES, safe
from app.preview.compare_view import comparison, grid_result, state_line, strength_strip
from app.preview.render_queue import GridState
from app.preview.request_form import (
    FIELDS,
    apply_infotext,
    base_for,
    build_request,
    find_loras,
    find_owner,
    list_run_loras,
    load_fields,
    lora_groups,
    lora_rows,
    new_lora_path,
    rows_data,
    save_request,
    save_rows,
    strip_is_on,
    strip_values,
    take_sent_rows,
)
from app.state import Snapshot, take_snapshot
from app.templates import note_html, problem_html
from app.train.base_picker import base_choices
from lora_core.data.scan import safe_name
from lora_core.errors import DatasetError, LoraError
from lora_core.generate.request import Axis, Infotext, WeightedLora, make_axis, parse_infotext, split_values
from lora_core.model_files.header import read_header
from lora_core.settings.choices import SAMPLERS

NOTHING = "none"
TITLES = {
    "strength": "LoRA strength", "checkpoint": "Checkpoint", "seed": "Seed", "prompt": "Prompt",
    "rank": "Rank",
}  # fmt: skip
STRENGTHS, RANKS = ("0", "0.25", "0.5", "0.75", "1", "1.25"), ("1", "2", "4", "8", "16", "32")
MOST_CHECKPOINTS = 40
Choices = list[tuple[str, str]]


def build_grid(bindings: Bindings, fields: dict[str, Any], rows_box: Any) -> None:
    """Lay out the grid's card and wire it; `fields` are the form's, `rows_box` carries the LoRA rows."""
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
    _wire_grid(bindings, fields, rows_box, ([*down, *across], draw, note))


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


def _wire_grid(
    bindings: Bindings, fields: dict[str, Any], rows_box: Any, own: tuple[list[Any], Any, Any]
) -> None:
    app_state = bindings.app_state
    axes, draw, note = own
    names = list(fields)

    def typed(*values: Any) -> None:
        app_state.project.update_draft(
            preview_grid=dict(zip(("rows", "row_values", "columns", "column_values"), values, strict=True))
        )

    def kind_chosen(start: str, kind: str) -> Any:
        if kind == _kept_kind(bindings, start):
            return gr.skip()  # The list was only left.
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
            return problem_html(error)
        return ""

    for start, kind, values in (("rows", *axes[:2]), ("columns", *axes[2:])):
        chosen = kind.input(functools.partial(kind_chosen, start), kind, values, **TYPING)
        chosen.then(typed, axes, None, **QUIET)
        values.input(typed, axes, None, **TYPING)
    flushed = "(...values) => [...values.slice(0, -1), window.easel.loraRows()]"
    bindings.refresh_after(draw.click(drawn, [*axes, *fields.values(), rows_box], note, js=flushed, **QUIET))


def list_axis_values(snapshot: Snapshot, kind: str) -> tuple[Choices, list[str]]:
    """Values on offer for an axis, and the default selection."""
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
    """All adapter files; those of the first LoRA's run are selected."""
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
    """Parse the chosen values of an axis; numbers typed together are split.

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


# A click sends the LoRA rows along, because their last change may still be in flight.
WITH_ROWS = "(...values) => [...values.slice(0, -1), window.easel.loraRows()]"


def build_preview(bindings: Bindings) -> None:
    """Lay out the tab and wire it."""
    with gr.Row(elem_classes="page page-preview"):
        with gr.Column(elem_classes="side card"):
            fields = _form(bindings)
            rows_box = gr.Textbox(visible="hidden", elem_id="lora-rows-now")
            draw = gr.Button("Generate", variant="primary", elem_id="generate", elem_classes="big")
            bindings.follow(html_block(), state_line)
            html_block('<p class="small">Ctrl+Enter draws too. A new strength needs no reload.</p>')
            _file_box(bindings, fields)
        with gr.Column(elem_classes="main"):
            with gr.Column(elem_classes="card"):
                html_block("<h2>Base against LoRA</h2>")
                bindings.follow(html_block(elem_id="stage"), comparison)
            with gr.Column(elem_classes="card"):
                at, follow, again = _strip(bindings)
                bindings.follow(html_block(elem_id="strength-strip"), strength_strip)
            build_grid(bindings, fields, rows_box)
    _wire(bindings, fields, rows_box, draw)
    _wire_strip(bindings, (at, follow, again), fields, rows_box)


def _form(bindings: Bindings) -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["prompt"] = gr.Textbox(label="Prompt", elem_id="prompt", lines=3, max_lines=8)
    made["negative"] = gr.Textbox(label="Negative prompt", elem_id="negative", lines=1, max_lines=4)
    # The rows belong to the page's script: a poll must not replace a slider being moved.
    html_block('<div id="loras" role="group" aria-label="LoRAs"></div>')
    bindings.follow(html_block(), _rows_piece)
    with gr.Row(elem_classes="pair"):
        samplers = [(row.title, key) for key, row in SAMPLERS.items()]
        made["sampler"] = gr.Dropdown(samplers, label="Sampler", elem_id="sampler")
        made["steps"] = gr.Number(label="Sampler steps", precision=0, elem_id="sampler-steps")
    with gr.Row(elem_classes="pair"):
        made["cfg"] = gr.Number(label="Guidance", step=0.5, elem_id="cfg")
        made["cfg_rescale"] = gr.Textbox(label="CFG rescale", lines=1, max_lines=1, elem_id="cfg-rescale")
    with gr.Row(elem_classes="pair"):
        made["width"] = gr.Number(label="Width", precision=0, elem_id="width", placeholder="auto")
        made["height"] = gr.Number(label="Height", precision=0, elem_id="height", placeholder="auto")
    with gr.Row(elem_classes="with-dice"):
        made["seed"] = gr.Number(label="Seed", precision=0, elem_id="seed")
        dice = gr.Button("Random", elem_id="dice", min_width=0, scale=0)
        last = gr.Button("Last used", elem_id="last-seed", min_width=0, scale=0)
    made = {name: made[name] for name in FIELDS}
    for name, field in made.items():
        bindings.fill_on_load(field, functools.partial(_kept_value, bindings, name))
    bindings.refresh_after(dice.click(lambda: -1, None, made["seed"], **QUIET))
    bindings.refresh_after(last.click(functools.partial(_last_seed, bindings), None, made["seed"], **QUIET))
    return made


def _kept_value(bindings: Bindings, name: str) -> Any:
    return load_fields(take_snapshot(bindings.app_state))[name]


def _last_seed(bindings: Bindings) -> Any:
    shot = bindings.app_state.render_queue.view().shot
    return shot.seed if shot is not None else gr.skip()


def _rows_piece(snapshot: Snapshot) -> str:
    """The rows as data for the page's script, and the base that is used."""
    data = json.dumps(rows_data(snapshot))
    base = base_for(snapshot, lora_rows(snapshot)[0])
    titles = {value: words for words, value in base_choices(snapshot.app_state)}
    name = titles.get(base.name) or Path(base.name).name or "Embedded base (tiny)"
    why = "" if base.facts is not None else f' <span class="problem">{safe(base.problem)}</span>'
    sides = f"sides in steps of {base.multiple}, {base.resolution} by default"
    return (
        f'<p class="small" id="preview-base-note" data-loras="{safe(data)}"'
        f' data-mark="{zlib.crc32(data.encode())}">Drawn with {safe(name)}, {sides}.{why}</p>'
    )


def _strip(bindings: Bindings) -> tuple[Any, Any, Any]:
    with gr.Row(elem_classes="strip-tools"):
        html_block("<h2>Strength strip</h2>")
        follow = gr.Checkbox(label="With each picture", elem_id="strip-follows", container=False, min_width=0)
        at = gr.Textbox(label="Strengths of the strip", elem_id="strip-values", lines=1, max_lines=1)
        again = gr.Button("Draw the strip", elem_id="draw-strip", min_width=0, scale=0)
    project = bindings.app_state.project
    bindings.fill_on_load(at, lambda: ", ".join(f"{value:g}" for value in strip_values(project)))
    bindings.fill_on_load(follow, lambda: strip_is_on(project, base_for(*_now(bindings))))
    return at, follow, again


def _now(bindings: Bindings) -> tuple[Snapshot, list[Any]]:
    snapshot = take_snapshot(bindings.app_state)
    return snapshot, lora_rows(snapshot)[0]


def _wire(bindings: Bindings, fields: dict[str, Any], rows_box: Any, draw: Any) -> None:
    app_state = bindings.app_state
    every = list(fields.values())

    def typed(*values: Any) -> None:
        app_state.project.update_draft(preview=dict(zip(FIELDS, values, strict=True)))

    def generate(*values: Any) -> None:
        typed(*values[:-1])
        snapshot = take_snapshot(app_state)
        loras = take_sent_rows(snapshot, values[-1])
        try:
            shot = build_request(snapshot, dict(zip(FIELDS, values, strict=False)), loras)
        except LoraError as error:
            app_state.render_queue.refuse(str(error))
            return
        on = strip_is_on(app_state.project, base_for(snapshot, loras))
        app_state.render_queue.want(shot, strip_values(app_state.project) if on else ())

    def put_back(name: str) -> list[Any]:
        try:
            kept = app_state.render_queue.history.named(name)
        except LoraError as error:
            app_state.render_queue.refuse(str(error))
            return [gr.skip() for _ in every]
        save_request(app_state.project, kept.shot)
        if not kept.is_sheet:
            app_state.render_queue.want(kept.shot, ())
        return _field_values(bindings)

    gr.on([event for field in every for event in edit_events(field)], typed, every, None, **TYPING)
    bindings.refresh_after(draw.click(generate, [*every, rows_box], None, js=WITH_ROWS, **TYPING))
    named = gr.Textbox(visible="hidden", elem_id="put-back-name")
    back = gr.Button("Put its settings back", elem_id="put-back", visible="hidden")
    bindings.refresh_after(back.click(put_back, named, every, js="() => [window.easel.putBack]", **TYPING))
    fill = gr.Button("Fill in again", elem_id="preview-fill", visible="hidden")
    bindings.refresh_after(fill.click(lambda: _field_values(bindings), None, every, **QUIET))


def _field_values(bindings: Bindings) -> list[Any]:
    values = load_fields(take_snapshot(bindings.app_state))
    return [values[name] for name in FIELDS]


def _wire_strip(bindings: Bindings, own: tuple[Any, Any, Any], fields: dict[str, Any], rows_box: Any) -> None:
    app_state = bindings.app_state
    at, follow, again = own

    def kept(values: str, on: bool) -> tuple[float, ...]:
        found = tuple(float(v) for v in make_axis("strength", split_values(values or "")).values)
        app_state.project.update_draft(preview_strip_at={"values": list(found), "on": bool(on)})
        return found

    def changed(values: str, on: bool) -> None:
        try:
            kept(values, on)
        except LoraError:
            # Reported when the strip is generated; a half-typed number is not an error yet.
            return

    def drawn(values: str, on: bool, *form: Any) -> None:
        snapshot = take_snapshot(app_state)
        try:
            strengths = kept(values, on)
            app_state.project.update_draft(preview=dict(zip(FIELDS, form, strict=False)))
            shot = build_request(
                snapshot, dict(zip(FIELDS, form, strict=False)), take_sent_rows(snapshot, form[-1])
            )
            shot.at("strength", 0.0)
        except LoraError as error:
            app_state.render_queue.refuse(str(error))
            return
        app_state.render_queue.want(shot, strengths)

    gr.on([at.input, at.blur, follow.input], changed, [at, follow], None, **TYPING)
    inputs = [at, follow, *fields.values(), rows_box]
    bindings.refresh_after(again.click(drawn, inputs, None, js=WITH_ROWS, **QUIET))


def _file_box(bindings: Bindings, fields: dict[str, Any]) -> None:
    """A LoRA file or an image with infotext, chosen or dropped."""
    app_state = bindings.app_state
    read = gr.State(None)
    with gr.Row(elem_id="preview-drop"):
        upload = gr.UploadButton(
            "Open a LoRA or a picture",
            file_types=[".safetensors", ".png"],
            elem_id="preview-upload",
            min_width=0,
            scale=0,
        )
        html_block('<p class="small">or drop it here: a LoRA is added, a picture\'s settings are read.</p>')
    report = html_block(elem_id="preview-report")

    def uploaded(file: str | None) -> tuple[str, Any]:
        if not file:
            return "", None
        path = Path(file)
        try:
            if path.suffix.lower() == ".safetensors":
                return _add_lora(bindings, path), None
            info = read_infotext(path)
            return info_html(path.name, info), info
        except LoraError as error:
            return problem_html(error), None
        finally:
            # Gradio's copy is no longer needed.
            path.unlink(missing_ok=True)

    def sent(info: Infotext | None) -> list[Any]:
        if info is None:
            return [gr.skip(), *(gr.skip() for _ in fields)]
        missing = apply_infotext(take_snapshot(app_state), info)
        words = "Its settings are in the form."
        if missing:
            words += f" Not found: {', '.join(missing)}; drop the LoRA file to add it."
        return [note_html(words), *_field_values(bindings)]

    bindings.refresh_after(
        upload.upload(uploaded, upload, [report, read], **{**QUIET, "show_progress": "minimal"})
    )
    send = gr.Button("Send to form", elem_id="send-to-form", visible="hidden")
    bindings.refresh_after(send.click(sent, read, [report, *fields.values()], **QUIET))


def _add_lora(bindings: Bindings, file: Path) -> str:
    """Copy a LoRA file into the project and add a row for it."""
    read_header(file)
    project = bindings.app_state.project
    target = new_lora_path(project, safe_name(file.name).name)
    try:
        shutil.move(file, target)
    except OSError as error:
        raise DatasetError(f"{file.name} cannot be kept: {error.strerror or error}.") from error
    rows, kept = lora_rows(take_snapshot(bindings.app_state))
    save_rows(project, [*rows, WeightedLora(str(target))], bool(kept.get("apart")))
    return f'<p class="small" role="status">{safe(target.stem)} is added.</p>'


LONGEST_SHOWN = 600


def read_infotext(file: Path) -> Infotext:
    """Read A1111's infotext from a PNG; nothing in it is trusted.

    Raises:
        DatasetError: it is no picture, or holds no settings.
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
    return parse_infotext(text)


def info_html(name: str, info: Infotext) -> str:
    """The infotext as a table, with a button that sends it to the form."""
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
