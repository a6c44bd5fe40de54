"""Images of the Preview tab as HTML: base against LoRA, history, strength strip and grid."""

from pathlib import Path

from app.formatting import TIMES, pluralize, safe
from app.preview.render_queue import GridState, HistoryEntry, PreviewState, sampler_title
from app.routes import image_url
from app.state import Snapshot
from lora_core.generate.request import Axis, GenerationRequest

CROSS = (
    '<svg viewBox="0 0 16 16" aria-hidden="true"><path d="m4 4 8 8m0-8-8 8" stroke="currentColor"'
    ' stroke-width="1.6" stroke-linecap="round"/></svg>'
)
ARROW = (
    '<svg viewBox="0 0 16 16" aria-hidden="true"><path d="M8 2.5v8m0 0L4.5 7M8 10.5 11.5 7M3 13.5h10"'
    ' fill="none" stroke="currentColor" stroke-width="1.5" stroke-linecap="round"'
    ' stroke-linejoin="round"/></svg>'
)


def state_line(snapshot: Snapshot) -> str:
    """What the worker is doing; scripts read `#preview-state`."""
    view = snapshot.view
    words = {"error": view.message, "idle": _idle(view), "working": working_words(view)}[view.state]
    tone = "problem" if view.state == "error" else "small"
    busy = view.working
    why = "" if busy else ' disabled title="Nothing is being drawn."'
    # The moment of the wish makes each answer differ from the last, so that the page's own "working" is
    # replaced.
    return (
        f'<div class="row apart draw-state"><p id="preview-state" data-state="{view.state}"'
        f' data-busy="{int(busy)}" data-at="{view.wanted_at:.3f}" role="status" class="{tone} num">'
        f'{safe(words)}</p><button type="button" class="own" id="cancel-drawing"{why}>Cancel</button></div>'
    )


def _idle(view: PreviewState) -> str:
    if view.message:
        return view.message
    if view.shot is None:
        return "Nothing drawn yet."
    if view.strip_waits or view.grid_waits:
        return "Drawn. " + ("The strip follows." if view.strip_waits else "The grid follows.")
    return f"Drawn with seed {view.shot.seed}. {view.note}".strip()


def working_words(view: PreviewState) -> str:
    """Progress of the current image, or why it has not started."""
    if view.message:
        return view.message
    return f"Drawing, {view.done} of {view.total} steps" if view.total else "Drawing"


def comparison(snapshot: Snapshot) -> str:
    """Base and LoRA under one slider, with the history beside them."""
    return f'<div class="stage"><div class="stage-main">{_compare(snapshot)}</div>{_history(snapshot)}</div>'


def _compare(snapshot: Snapshot) -> str:
    view = snapshot.view
    shot = view.shot
    if shot is None:
        return (
            '<div class="compare empty" id="compare"><p class="small">Type a prompt and'
            " press Generate: the same noise, without and with the LoRA.</p></div>"
        )
    base, drawn, label = view.image(shot.alone()), view.image(shot), _label(shot)
    stale = ""
    if drawn is None and (near := _nearest(view, shot)) is not None:
        drawn, stale = near, " stale"
    prompt = safe(shot.prompt)
    pieces = []
    if base is not None:
        pieces.append(f'<div id="preview-base">{_image(snapshot, base, f"base: {shot.prompt}")}</div>')
    if shot.loras and drawn is not None:
        alt = f"{label}: {shot.prompt}"
        after = "after" if base is not None else "whole"
        pieces.append(f'<div id="preview-result" class="{after}{stale}">{_image(snapshot, drawn, alt)}</div>')
    look = f'<img class="look" alt="the picture as it is drawn: {prompt}" hidden>'
    marks = ""
    if base is not None:
        marks = '<span class="left">base</span>'
    if shot.loras and drawn is not None:
        marks += f'<span class="right num">{safe(label)}</span>'
        if base is not None:
            marks += (
                '<i></i><input type="range" class="split" min="0" max="100" value="50" aria-label="How much'
                ' of the picture shows the base">'
            )
    return (
        f'<div class="compare" id="compare" style="--ratio:{_ratio(shot):.4f}" data-strength="{safe(label)}">'
        f"{''.join(pieces)}{look}{marks}</div>{_facts(snapshot, shot, base, drawn if not stale else None)}"
    )


def _image(snapshot: Snapshot, path: Path, alt: str) -> str:
    return f'<img src="{safe(image_url("generated", snapshot.app_state.generated, path))}" alt="{safe(alt)}">'


def _label(shot: GenerationRequest) -> str:
    """The strength, for a single LoRA."""
    if len(shot.loras) != 1:
        return f"{len(shot.loras)} LoRAs" if shot.loras else "base"
    lora = shot.loras[0]
    text = "" if lora.text_strength in (None, lora.strength) else f" / {lora.text_strength:.2f}"
    return f"{lora.strength:.2f}{text}"


def _ratio(shot: GenerationRequest) -> float:
    return shot.width / shot.height if shot.width and shot.height else 1.0


def _nearest(view: PreviewState, shot: GenerationRequest) -> Path | None:
    """The strip image nearest to the wanted strength, shown until that is ready."""
    if len(shot.loras) != 1:
        return None
    there = [one for one in view.strip_shots() if one.loras and one in view.images]
    wanted = shot.loras[0].strength
    nearest = min(there, key=lambda one: abs(one.loras[0].strength - wanted), default=None)
    return view.images[nearest] if nearest is not None else None


def _facts(snapshot: Snapshot, shot: GenerationRequest, base: Path | None, drawn: Path | None) -> str:
    """The settings in one line, and a link to the file."""
    size = f", {shot.width} {TIMES} {shot.height}" if shot.width and shot.height else ""
    words = f"Seed {shot.seed}, {sampler_title(shot.sampler)}, {pluralize(shot.steps, 'step')}"
    words += f", guidance {shot.cfg:g}{size}"
    file = drawn or base
    save = ""
    if file is not None:
        link = safe(image_url("generated", snapshot.app_state.generated, file))
        save = f'<a class="own" href="{link}" download="{safe(file.name)}" id="save-picture">Save PNG</a>'
    return (
        f'<div class="row apart stage-facts"><p class="small num" id="preview-facts">{safe(words)}</p><div'
        f' class="row">{_modes()}{save}</div></div>'
    )


def _modes() -> str:
    return (
        '<div class="seg" role="group" aria-label="How base and LoRA are compared"><button type="button"'
        ' data-compare="slider" aria-pressed="true">Slider</button><button type="button" data-compare="side"'
        ' aria-pressed="false">Side by side</button></div>'
    )


def _history(snapshot: Snapshot) -> str:
    kept = snapshot.app_state.render_queue.history.newest()
    if not kept:
        return ""
    cells = "".join(_cell(snapshot, one) for one in kept)
    return (
        f'<div class="recent" id="history"><h3>Drawn in this project</h3><div class="cells">{cells}</div><p'
        ' class="small">Click one to restore its settings.</p></div>'
    )


def _cell(snapshot: Snapshot, one: HistoryEntry) -> str:
    root = snapshot.app_state.generated
    shot, name = one.shot, safe(one.file.name)
    what = f"Grid of {shot.prompt}" if one.is_sheet else f"{shot.prompt}, {_label(shot)}, seed {shot.seed}"
    words = safe(what[:300])
    thumb = safe(image_url("generated", root, one.file, "thumb"))
    mark = "<em>grid</em>" if one.is_sheet else ""
    return (
        f'<div class="cell"><button type="button" data-put-back="{name}" title="{words}" aria-label="Settings'
        f' of: {words}"><img loading="lazy" decoding="async" src="{thumb}" alt="">{mark}</button><span><a'
        f' class="own icon" href="{safe(image_url("generated", root, one.file))}" download="{name}"'
        f' aria-label="Save {name}" title="Save PNG">{ARROW}</a><button type="button" class="own icon"'
        f' data-forget="{name}" aria-label="Delete {name}" title="Move it to the'
        f' trash">{CROSS}</button></span></div>'
    )


def strength_strip(snapshot: Snapshot) -> str:
    """The same noise at several strengths."""
    view = snapshot.view
    if view.shot is None or not view.shot.loras:
        words = (
            "Choose a LoRA to see it at these strengths."
            if view.shot
            else "It fills once an image is generated."
        )
        return (
            f'<p class="small" id="strip-note">{words} Same prompt, same noise; only the strength'
            " differs.</p>"
        )
    if not view.strip:
        return '<p class="small" id="strip-note">Same prompt, same noise; only the strength differs.</p>'
    cells = []
    for value, shot in zip(view.strip, view.strip_shots(), strict=True):
        file = view.images.get(shot)
        here = " drawing" if file is None and view.drawing == shot else ""
        image = _image(snapshot, file, f"strength {value:.2f}") if file else f'<div class="shot{here}"></div>'
        cells.append(f'<figure>{image}<figcaption class="small num">{value:.2f}</figcaption></figure>')
    mixed = " 1.00 is the mix as set above." if len(view.shot.loras) > 1 else ""
    whole = all(shot in view.images for shot in view.strip_shots())
    save = (
        '<a class="own" href="/easel/preview/strip.png" download id="save-strip">Save PNG</a>'
        if whole
        else ""
    )
    shape = f"--ratio:{_ratio(view.shot):.4f};--count:{max(4, min(8, len(cells)))}"
    return (
        f'<div class="strip" style="{shape}">{"".join(cells)}</div><div class="row apart"><p'
        f' class="small">Same prompt, same noise; only the strength differs.{mixed}</p>{save}</div>'
    )


def grid_result(snapshot: Snapshot) -> str:
    """The grid while it fills, then the finished sheet."""
    view = snapshot.view
    grid = view.grid
    if grid is None:
        return (
            '<p class="small" id="grid-state" data-state="none">Two things against each other, such as three'
            " checkpoints at three strengths, on one labelled sheet.</p>"
        )
    count = f"{sum(shot in view.images for shot in grid.shots)} of {len(grid.shots)}"
    if grid.sheet is not None and grid.sheet.is_file():
        link = safe(image_url("generated", snapshot.app_state.generated, grid.sheet))
        name = safe(grid.sheet.name)
        return (
            f'<div id="grid-state" data-state="done"><a href="{link}" target="_blank" rel="noopener"'
            f' class="sheet"><img src="{link}" alt="{safe(_grid_words(grid))}"></a></div><div class="row'
            ' apart"><p class="small">Its settings are inside the PNG.</p><a class="own" id="save-grid"'
            f' href="{link}" download="{name}">Save PNG</a></div>'
        )
    state = "error" if grid.problem else "working"
    said = grid.problem or f"Drawing, {count} pictures"
    tone = "problem" if grid.problem else "small num"
    return (
        f'<p class="{tone}" id="grid-state" data-state="{state}" role="status">{safe(said)}</p>'
        f"{_table(snapshot, grid)}"
    )


def _grid_words(grid: GridState) -> str:
    axes = [("Rows", grid.rows), ("Columns", grid.columns)]
    return ". ".join(f"{name}: {', '.join(axis.labels())}" for name, axis in axes if axis)[:1000]


def _table(snapshot: Snapshot, grid: GridState) -> str:
    heads = _heads(grid.columns)
    labels = grid.rows.labels() if grid.rows else [""] * len(grid.cells)
    rows = []
    for label, row in zip(labels, grid.cells, strict=True):
        cells = []
        for shot in row:
            file = snapshot.view.images.get(shot)
            cells.append(f"<td>{_image(snapshot, file, '') if file else '<div class=shot></div>'}</td>")
        head = f'<th scope="row" class="small">{safe(label[:120])}</th>' if grid.rows else ""
        rows.append(f"<tr>{head}{''.join(cells)}</tr>")
    corner = "<td></td>" if grid.rows and heads else ""
    top = f"<tr>{corner}{heads}</tr>" if heads else ""
    return f'<div class="sheet"><table class="cells-table">{top}{"".join(rows)}</table></div>'


def _heads(axis: Axis | None) -> str:
    if axis is None:
        return ""
    return "".join(f'<th scope="col" class="small">{safe(label[:120])}</th>' for label in axis.labels())
