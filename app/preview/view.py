"""The Preview tab: the values of its templates, its routes, and files opened on it. The form is filled by
`assets/preview.js`, so that no answer replaces a control that is in use: every change is posted, stored and
rendered. Images, strip, grid and history follow the render queue."""

import asyncio
import base64
import functools
import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response
from PIL import Image, UnidentifiedImageError

from app.preview.history import GridState, HistoryEntry
from app.preview.render_queue import PreviewState, strip_shots
from app.preview.request_form import (
    GRID_KINDS,
    add_lora,
    axis_data,
    base_for,
    build_request,
    build_run_request,
    find_owner,
    form_data,
    grid_axes,
    keep_file,
    list_run_loras,
    load_fields,
    lora_groups,
    lora_rows,
    save_request,
    strip_is_on,
    take_sent_axes,
)
from app.preview.sent_form import (
    parse_strength,
    parse_strengths,
    save_form,
    strip_values,
    take_rows,
    take_sent_form,
)
from app.routes import FRESH, Answer, add_actions, image_url, receive_file
from app.state import AppState, Bindings, Snapshot, take_snapshot
from app.templates import _, html_block, note_html, render
from app.train.train_form import base_choices
from lora_core.data.images import check_image, check_mask_png, make_thumbnail, open_rgb
from lora_core.errors import DatasetError, LoraError, RunError, wrap_os_errors
from lora_core.generate.grid import make_axis, vary
from lora_core.generate.request import NEGATIVE, GenerationRequest, WeightedLora, sampler_title
from lora_core.settings.schema import SAMPLERS
from lora_core.system.files import unused_path, write_atomically


def build_preview(bindings: Bindings) -> None:
    """Lay out the tab."""
    with gr.Row(elem_classes="page page-preview"):
        with gr.Column(elem_classes="side card"):
            samplers = {key: row.title for key, row in SAMPLERS.items()}
            html_block(lambda: render("preview/form.html", samplers=samplers))
            html_block(lambda: render("preview/file.html"))
            bindings.follow(html_block(), form_note)
        with gr.Column(elem_classes="main card"):
            html_block(lambda: render("preview/views.html"))
            bindings.follow(html_block(elem_id="stage", elem_classes="view-stage"), comparison)
            html_block(lambda: render("preview/strip_form.html"), elem_classes="view-strip")
            bindings.follow(html_block(elem_id="strength-strip", elem_classes="view-strip"), strength_strip)
            html_block(lambda: render("preview/grid_form.html", kinds=GRID_KINDS), elem_classes="view-grid")
            bindings.follow(html_block(elem_id="grid", elem_classes="view-grid"), grid_result)
            bindings.follow(html_block(), history)
    bindings.follow(html_block(elem_classes="foot"), foot)


def form_note(snapshot: Snapshot) -> str:
    """The form as data for the page's script, and the base that is used."""
    base = base_for(snapshot, lora_rows(snapshot)[0])
    titles = {value: words for words, value in base_choices(snapshot.app_state)}
    name = titles.get(base.name) or Path(base.name).name or _("Embedded base (tiny)")
    data = json.dumps(form_data(snapshot))
    return render("preview/note.html", base=base, name=name, data=data, mark=zlib.crc32(data.encode()))


def foot(snapshot: Snapshot) -> str:
    """What Generate makes, what the worker is doing or why it cannot, and the acts; scripts read
    `#preview-state`."""
    rows = lora_rows(snapshot)[0]
    act, problem = strength_label(GenerationRequest(loras=tuple(rows))), base_for(snapshot, rows).problem
    if len(rows) == 1:
        owner = find_owner(snapshot, rows[0].file)
        titles = {str(one.file): one.title for one in list_run_loras(owner)} if owner else {}
        act = f"{titles.get(rows[0].file, rows[0].name)}, {act}"
    base, drawn, stale = shown_images(snapshot.view)
    shown = {"file": base if stale else drawn or base, "working": working_words(snapshot.view)}
    return _render(snapshot, "foot", act=act, problem=problem, **shown)


def working_words(view: PreviewState) -> str:
    """Progress of the current image, or why it has not started."""
    if view.message:
        return view.message
    return _("Generating, step {} of {}", view.done, view.total) if view.total else _("Generating")


def _render(snapshot: Snapshot, template: str, **values: Any) -> str:
    url = functools.partial(image_url, "generated", snapshot.app_state.generated)
    shot = snapshot.view.shot
    ratio = shot.width / shot.height if shot and shot.width and shot.height else 1.0
    shown = {"view": snapshot.view, "shot": shot, "ratio": ratio, "strength": strength_label}
    return render(f"preview/{template}.html", url=url, **shown, **values)


def comparison(snapshot: Snapshot) -> str:
    """Base and LoRA under one slider or side by side, and their difference."""
    (base, drawn, stale), shot = shown_images(snapshot.view), snapshot.view.shot
    sampler = sampler_title(shot.sampler) if shot else ""
    return _render(snapshot, "stage", base=base, drawn=drawn, stale=stale, sampler=sampler)


def shown_images(view: PreviewState) -> tuple[Path | None, Path | None, bool]:
    """The images of the base and of the LoRA, and whether the latter is of another strength for now."""
    if (shot := view.shot) is None:
        return None, None, False
    drawn = view.image(shot) if shot.loras else None
    other = _nearest(view, shot) if drawn is None else None
    return view.image(shot.alone()), drawn or other, other is not None


def strength_label(shot: GenerationRequest) -> str:
    """The strength of a single LoRA, or how many LoRAs there are."""
    if len(shot.loras) != 1:
        return _("{count} LoRAs", count=len(shot.loras)) if shot.loras else _("base")
    lora = shot.loras[0]
    text = "" if lora.text_strength in (None, lora.strength) else f" / {lora.text_strength:.2f}"
    return f"{lora.strength:.2f}{text}"


def _nearest(view: PreviewState, shot: GenerationRequest) -> Path | None:
    """The strip image nearest to the wanted strength, shown until that is ready."""
    if len(shot.loras) != 1:
        return None
    there = [one for one in strip_shots(view.shot, view.strip) if one.loras and one in view.images]
    wanted = shot.loras[0].strength
    nearest = min(there, key=lambda one: abs(one.loras[0].strength - wanted), default=None)
    return view.images[nearest] if nearest is not None else None


def history(snapshot: Snapshot) -> str:
    """The images generated in this project, newest first."""
    return _render(snapshot, "history", entries=snapshot.app_state.render_queue.history.newest())


def strength_strip(snapshot: Snapshot) -> str:
    """The same seed at several strengths."""
    view = snapshot.view
    shots = strip_shots(view.shot, view.strip)
    return _render(snapshot, "strip", cells=list(zip(view.strip, shots, strict=False)))


def grid_result(snapshot: Snapshot) -> str:
    """The grid while it fills, then the finished sheet."""
    grid = snapshot.view.grid
    sheet = grid.sheet if grid and grid.sheet is not None and grid.sheet.is_file() else None
    return _render(snapshot, "grid", grid=grid, sheet=sheet)


def add_preview_routes(app: FastAPI, app_state: AppState) -> None:
    """Add the tab's routes to `app`."""
    render_queue = app_state.render_queue

    def now() -> dict[str, Any]:
        view = render_queue.view()
        main = view.shot is not None and view.drawing == view.shot.acting()
        return {
            "state": "working" if view.working else view.state,
            "made": len(view.images),
            "words": working_words(view) if view.state == "working" else "",
            "look": f"{view.wanted_at:.3f}-{view.looks}" if main and view.looks else "",
        }

    app_state.live.feeds["preview"] = now

    @app.get("/easel/preview/look")
    async def look() -> Response:
        data = render_queue.look()
        return Response(data, 200 if data else 204, FRESH, "image/jpeg" if data else None)

    add_actions(app, {f"preview/{name}": functools.partial(act, app_state) for name, act in ACTIONS.items()})

    @app.get("/easel/preview/axes")
    def axes(side: str = "", kind: str = "") -> Response:
        snapshot = take_snapshot(app_state)
        return Answer(axis_data(snapshot, side, kind) if kind else grid_axes(snapshot))

    @app.post("/easel/preview/file")
    async def file(request: Request, name: str) -> Response:
        path = await receive_file(request, opened_folder(app_state), name)
        try:
            return Answer(await asyncio.to_thread(open_file, app_state, path))
        except LoraError as error:
            # The folder is ours and means nothing to who sent it.
            raise RunError(str(error).replace(str(path), path.name)) from error

    @app.get("/easel/preview/strip.png")
    def strip() -> Response:
        path = strip_sheet(app_state)
        return FileResponse(path, filename=path.name, media_type="image/png", headers=FRESH)


def redraw_loras(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """Store the form, with one more LoRA if the page asks to `add` one; returns its LoRAs as `html`."""
    if sent.get("add") and isinstance(sent.get("rows"), list):
        files = (file for _, files in lora_groups(take_snapshot(app_state)) for _, file in files)
        sent = {**sent, "rows": [*sent["rows"], {"file": next(files, ""), "strength": 1.0}]}
    kept = take_rows(app_state, sent)
    return {**kept, "html": form_data(take_snapshot(app_state))["loras"]}


def generate(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """Store the form and draw its image, its strip or its grid, as `what` says.

    Raises:
        LoraError: the grid cannot be drawn; a problem of image and strip is shown with them.
    """
    rows, rev = take_sent_form(app_state.project, sent)
    snapshot, what = take_snapshot(app_state), sent.get("what")
    fields = sent.get("fields") if isinstance(sent.get("fields"), dict) else {}
    try:
        shot = build_request(snapshot, fields or {}, rows)
        if what == "grid":
            app_state.render_queue.draw_grid(GridState.of(shot, *take_sent_axes(app_state.project, sent)))
            return {"rev": rev}
        on = what == "strip" or strip_is_on(app_state.project, base_for(snapshot, rows))
        strip = strip_values(app_state.project, rows) if on else ()
        if what == "strip":
            typed = sent.get("strip")
            strip = parse_strengths(typed.get("values") if isinstance(typed, dict) else "")
            vary(shot, "strength", 0.0)
    except LoraError as error:
        if what == "grid":
            raise
        app_state.render_queue.refuse(str(error))
    else:
        app_state.render_queue.want(shot, strip)
    return {"rev": rev}


def open_tab(app_state: AppState, sent: dict[str, Any] | None = None) -> dict[str, Any]:
    """When the tab opens: once, the strip of the run named in the draft."""
    name = str(app_state.project.draft().get("preview_strip") or "")
    if not name:
        return {"fill": False, "drawn": app_state.render_queue.view().shot is not None}
    snapshot = take_snapshot(app_state)
    try:
        shot = build_run_request(snapshot, name)
    except LoraError as error:
        state = next((state for run_view, state in snapshot.runs if run_view.run.name == name), "")
        if state not in ("running", "preparing"):
            # A live run has a file once it is done; the request is kept until then.
            app_state.project.update_draft(preview_strip="")
            app_state.render_queue.refuse(str(error))
        return {"fill": False, "drawn": True}
    app_state.project.update_draft(preview_strip="")
    save_request(app_state.project, shot)
    app_state.render_queue.want(shot, strip_values(app_state.project, shot.loras))
    return {"fill": True, "drawn": True}


def put_back(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """Put the settings of an image of the history into the form, which is returned, and show it.

    Raises:
        RunError: the image is gone.
    """
    kept = app_state.render_queue.history.named(sent.get("file"))
    save_request(app_state.project, kept.shot)
    if not kept.is_sheet:
        app_state.render_queue.want(kept.shot, ())
    return {"form": form_data(take_snapshot(app_state))}


def strip_sheet(app_state: AppState) -> Path:
    """The strip as one PNG, assembled from its images.

    Raises:
        RunError: an image of the strip is missing, or the worker could not write the sheet.
    """
    render_queue = app_state.render_queue
    view = render_queue.view()
    shots = strip_shots(view.shot, view.strip)
    if view.shot is None or not shots or any(shot not in view.images for shot in shots):
        raise RunError(_("The strip is not generated yet; generate it first."))
    columns = make_axis("strength", list(view.strip))
    first = view.images[shots[0]]
    out = first.with_name(f"{first.stem}-strip.png")
    request = GridState(view.shot, None, columns, [shots]).sheet_request(view.images, out)
    reply = app_state.worker.ask(request | {"columns": [f"{value:g}" for value in view.strip]})
    if reply.state == "error":
        raise RunError(reply.message)
    render_queue.history.add(HistoryEntry(out, view.shot, None, columns))
    return out


# Files opened on the tab. The settings in a PNG are text in the form that A1111 writes. Source: its
# `infotext_utils.py`, the extra networks' `<lora:name:te:unet>`, and "CFG Rescale" of its extension
# CFG_Rescale_webui.

STARTS = "starts"
"""The folder of a project for images that others start from."""
PAINTED_SIDE = 1024
"""The longer side of an image that a mask is painted on, in pixels."""
LONGEST_SHOWN = 600
LONGEST = 200_000
"""Characters that are parsed; no image tool writes more."""
_SETTING = re.compile(r'(?<!\s)\s*(\w[\w \-/]{0,60}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
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
    denoising_strength: float | None = None


def opened_folder(app_state: AppState) -> Path:
    """Where files go that a page sends."""
    return app_state.workspace / "tmp" / "opened"


def open_file(app_state: AppState, file: Path) -> dict[str, Any]:
    """Take a file that was sent to the tab: a LoRA is added, the settings of an image are shown.

    Raises:
        LoraError: it is neither.
    """
    if file.suffix.lower() != ".safetensors":
        open_rgb(file)
        text, info, problem = "", Infotext(), ""
        try:
            text, info = read_infotext(file)
        except DatasetError as error:
            problem = str(error)
        sent = file.relative_to(opened_folder(app_state)).as_posix()
        return {"html": infotext_table(file.name, info, sent, problem), "text": text}
    try:
        added = add_lora(app_state.project, file)
    finally:
        file.unlink(missing_ok=True)
    rows, kept = lora_rows(take_snapshot(app_state))
    save_form(app_state.project, [*rows, WeightedLora(str(added))], bool(kept.get("apart")))
    return {
        "html": note_html(_("{stem} is added.", stem=added.stem)),
        "form": form_data(take_snapshot(app_state)),
    }


def start_from(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """Keep an image that was opened in the project; the page puts it into the form.

    Raises:
        RunError: it is no longer there.
    """
    folder, name = opened_folder(app_state), str(sent.get("file"))
    file = next((path for path in folder.glob("*/*") if path.relative_to(folder).as_posix() == name), None)
    if file is None:
        raise RunError(_("This image is no longer there; open it again."))
    start = keep_file(file, app_state.project.path / STARTS)
    note = note_html(_("Images start from {}; empty its field to start from noise again.", start.name))
    return {"html": note, "image": str(start)}


def paint_mask(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """Keep a mask that was painted over the form's image in the project; without one, give the image to paint
    on and its mask if the form has one, as WebP in base64.

    Raises:
        DatasetError: the image or the mask cannot be used.
    """
    image = Path(str(sent.get("image") or "").strip().strip('"'))
    if not sent.get("png"):
        if not image.name:
            raise DatasetError(_("There is no image to paint on; give one to start from."))
        mask = Path(str(sent.get("mask") or "").strip().strip('"'))
        files = [("shown", image, False), ("painted", mask, True)][: 2 if mask.is_file() else 1]
        made = ((name, make_thumbnail(file, PAINTED_SIDE, is_mask)) for name, file, is_mask in files)
        return {name: base64.b64encode(data).decode() for name, data in made}
    data = check_mask_png(str(sent["png"]), check_image(image, image.name), image.name)
    file = unused_path(app_state.project.path / STARTS, f"{image.stem}-mask", ".png")
    with wrap_os_errors(DatasetError, f"{file} cannot be written"):
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, data)
    return {"mask": str(file)}


def read_infotext(file: Path) -> tuple[str, Infotext]:
    """A1111's infotext in a PNG, as text and parsed; nothing in it is trusted.

    Raises:
        DatasetError: it is not an image, or holds no settings.
    """
    try:
        with Image.open(file) as opened:
            text: Any = opened.info.get("parameters")
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DatasetError(_("{name} is not a readable image.", name=file.name)) from error
    if not isinstance(text, str) or not text.strip():
        raise DatasetError(
            _("{} holds no settings; sites and chats strip them when they re-encode images.", file.name)
        )
    return text, parse_infotext(text)


def use_infotext(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """Put an infotext into the form."""
    missing = apply_infotext(take_snapshot(app_state), parse_infotext(str(sent.get("text", ""))))
    lost = _(" Not found: {}; drop the file to add it.", ", ".join(missing)) if missing else ""
    form = form_data(take_snapshot(app_state))
    return {"html": note_html(_("Its settings are in the form.{lost}", lost=lost)), "form": form}


def apply_infotext(snapshot: Snapshot, info: Infotext) -> list[str]:
    """Put an image's infotext into the form; returns the files that were not found."""
    project = snapshot.app_state.project
    fields = load_fields(snapshot)
    sampler = next((key for key, row in SAMPLERS.items() if info.sampler in (key, row.title)), None)
    given = {
        "steps": info.steps, "cfg": info.cfg, "seed": info.seed, "sampler": sampler,
        "cfg_rescale": (info.cfg_rescale or 0.0) if info.cfg is not None else None,
        "width": info.width, "height": info.height, "denoising_strength": info.denoising_strength,
        "image": "" if info.cfg is not None and info.denoising_strength is None else None,
    }  # fmt: skip
    fields |= {name: value for name, value in given.items() if value is not None}
    fields |= {"prompt": info.prompt, "negative": info.negative}
    if not fields["image"]:
        fields["mask"] = ""
    names: dict[str, str] = {}
    for _heading, files in lora_groups(snapshot):
        for _title, file in files:
            names.setdefault(WeightedLora(file).name.casefold(), file)
    rows: list[WeightedLora] = []
    missing = (
        [_("the image that it started from")] if given["denoising_strength"] and not fields["image"] else []
    )
    for tag in info.loras:
        found = names.get(tag.name.casefold())
        if found is None:
            missing.append(tag.name)
        else:
            rows.append(WeightedLora(found, parse_strength(tag.strength), tag.text_strength))
    apart = any(row.text_strength is not None for row in rows)
    if not (info.prompt or info.loras):
        rows, kept = lora_rows(snapshot)
        apart = bool(kept.get("apart"))
    save_form(project, rows, apart, fields)
    return missing


def infotext_table(name: str, info: Infotext, sent: str = "", problem: str = "") -> str:
    """The infotext of an image as a table, or why there is none, with buttons that put it or the image `sent`
    into the form."""
    shown = {"name": name, "info": info, "most": LONGEST_SHOWN, "sent": sent, "problem": problem}
    return render("preview/infotext.html", **shown)


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
        denoising_strength=_denoising(found), seed=_parse_int(found.get("Seed")),
        width=int(size[1]) if size else None, height=int(size[2]) if size else None,
        model=found.get("Model", ""), clip_skip=_parse_int(found.get("Clip skip")), loras=loras, extra=found,
    )  # fmt: skip


def _denoising(found: Mapping[str, str]) -> float | None:
    """The denoising strength of an image that started from another; that of A1111's second pass is none."""
    strength = None if "Hires upscale" in found else _parse_float(found.get("Denoising strength"))
    return strength if strength and 0.0 < strength <= 1.0 else None


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


ACTIONS: dict[str, Callable[[AppState, dict[str, Any]], Any]] = {
    "rows": take_rows,
    "loras": redraw_loras,
    "generate": generate,
    "open": open_tab,
    "put-back": put_back,
    "forget": lambda state, sent: {"place": state.render_queue.forget(sent.get("file"), state.workspace)},
    "bring-back": lambda app_state, sent: app_state.render_queue.history.bring_back(
        sent.get("place"), app_state.workspace
    ),
    "star": lambda state, sent: state.render_queue.history.star(sent.get("file"), bool(sent.get("on"))),
    "cancel": lambda app_state, sent: app_state.render_queue.cancel(),
    "infotext": use_infotext,
    "start": start_from,
    "mask": paint_mask,
}
"""What a page may post below /easel/preview/."""
