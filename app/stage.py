"""The Preview tab's pictures as HTML: base and LoRA under one slider, and the strip of strengths."""

from app.moment import Moment
from app.routes import address
from app.studio import STRIP, View
from app.words import safe

# In no picture of the demo's training set: what is seen is carried over, not remembered.
DEMO_PROMPT = "house, duskprint style, on a sky blue background"


def state_line(moment: Moment) -> str:
    """What the worker is at; `#preview-state` is what scripts read."""
    view = moment.view
    words = {
        "error": view.message,
        "idle": "Drawn. Move the strength to see more or less of it." if view.scene else "Nothing drawn yet.",
        "working": _working(view),
    }
    tone = "problem" if view.state == "error" else "small"
    # The moment of the wish makes each answer differ from the last, so that the page's own "working" is
    # replaced.
    return (
        f'<p id="preview-state" data-state="{view.state}" data-at="{view.wanted_at:.3f}" role="status"'
        f' class="{tone} num">{safe(words[view.state])}</p>'
    )


def _working(view: View) -> str:
    if view.message:
        return view.message
    return f"Drawing, {view.done} of {view.total}" if view.total else "Drawing"


def stage(moment: Moment) -> str:
    """The two pictures under one slider, and beside them what was drawn before."""
    return f'<div class="stage">{_compare(moment)}{_recent(moment)}</div>'


def _compare(moment: Moment) -> str:
    view, root = moment.view, moment.desk.generated
    base = view.pictures.get(0.0)
    if view.scene is None or base is None:
        waiting = (
            "It appears here."
            if view.scene
            else "Press Generate: one noise, drawn without and with the LoRA."
        )
        return f'<div class="compare empty"><p class="small">{waiting}</p></div>'
    source = safe(address("generated", root, base))
    if not view.scene.lora:
        return (
            f'<div class="compare"><div id="preview-base"><img src="{source}" alt="base:'
            f' {safe(view.scene.prompt)}"></div><span>base</span></div>'
        )
    strength = _nearest(view)
    with_lora = safe(address("generated", root, view.pictures[strength])) if strength is not None else source
    label = f"{strength:.2f}" if strength is not None else "…"
    stale = " stale" if strength != view.strength else ""
    prompt = safe(view.scene.prompt)
    return (
        f'<div class="compare" data-strength="{label}"><div id="preview-base"><img src="{source}" alt="base:'
        f' {prompt}"></div><div id="preview-result" class="after{stale}"><img src="{with_lora}" alt="strength'
        f' {label}: {prompt}"></div><i></i><span class="left">base</span><span class="right'
        f' num">{label}</span><input type="range" class="split" min="0" max="100" value="50" aria-label="How'
        ' much of the picture shows the base"></div>'
    )


def _recent(moment: Moment) -> str:
    view, root = moment.view, moment.desk.generated
    if len(view.recent) < 2:
        return ""
    buttons = []
    for index, one in enumerate(view.recent):
        source, words = (
            safe(address("generated", root, one.picture)),
            safe(f"{one.scene.prompt}, {one.strength:.2f}"),
        )
        buttons.append(
            f'<button type="button" data-press="recent-{index}" title="{words}" aria-label="Settings of:'
            f' {words}"><img src="{source}" alt=""></button>'
        )
    note = '<p class="small">A click puts its settings back.</p>'
    return f'<div class="recent"><h3>Recent</h3><div>{"".join(buttons)}</div>{note}</div>'


def _nearest(view: View) -> float | None:
    """The strength to show: the one looked at, else the nearest that is there."""
    there = [s for s in view.pictures if s or view.strength == 0]
    return min(there, key=lambda s: abs(s - view.strength), default=None)


def strip(moment: Moment) -> str:
    """The same noise at six strengths."""
    view, root = moment.view, moment.desk.generated
    cells = []
    for strength in STRIP:
        picture = view.pictures.get(strength)
        image = (
            f'<img src="{safe(address("generated", root, picture))}" alt="strength {strength:.2f}">'
            if picture
            else '<div class="shot"></div>'
        )
        cells.append(f'<figure>{image}<figcaption class="small num">{strength:.2f}</figcaption></figure>')
    note = "Same prompt, same noise; only the strength differs."
    if view.scene and not view.scene.lora:
        note = "Choose a LoRA to see it at these strengths."
    return (
        '<div class="panel"><div class="row apart"><h2>Strength strip</h2>'
        f'<span class="small">{note}</span></div><div class="strip">{"".join(cells)}</div></div>'
    )
