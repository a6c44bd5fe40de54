"""The Export tab's answers as HTML: the checkpoints to choose from, and where the written file works."""

from typing import Any

from app.jobs import Watch
from app.moment import Moment
from app.routes import address
from app.words import chip, file_size, safe
from lora_core.spec.run_folder import runs_folder


def checkpoint_cards(moment: Moment, watch: Watch | None, chosen: str) -> str:
    """Best and last side by side, each with its newest sample and its gain."""
    if watch is None:
        return (
            '<div class="empty"><h3>Nothing to export yet</h3><p class="small">Train first: each run leaves'
            " checkpoints here, and each of them can become a file for other tools.</p></div>"
        )
    steps = watch.run.checkpoint_steps()
    cards = []
    best = watch.progress.best_step
    if best is not None and best in steps:
        title = "Best and last" if best == steps[-1] else "Best"
        cards.append(
            _card(moment, watch, title, best, chosen == "best" or (chosen == "last" and best == steps[-1]))
        )
    if steps and best != steps[-1]:
        cards.append(_card(moment, watch, "Last", steps[-1], chosen == "last"))
    if chosen.isdigit() and int(chosen) in steps:
        cards.append(_card(moment, watch, "Picked", int(chosen), True))
    return f'<div class="checkpoints">{"".join(cards)}</div>'


def _card(moment: Moment, watch: Watch, title: str, step: int, on: bool) -> str:
    before = [p for p in watch.progress.previews if p.step <= step and p.files]
    root = runs_folder(moment.desk.workspace)
    image = '<div class="shot"></div>'
    if before:
        source = safe(address("run", root, watch.run.path / before[-1].files[0]))
        image = f'<img src="{source}" alt="sample at step {before[-1].step}">'
    gain = next((v for v in watch.progress.validations if v.step == step), None)
    note = f"gain {gain.gain:+.4f}" if gain else "not measured"
    return (
        f'<div class="panel tight{" on" if on else ""}"><div class="row apart"><b>{title}</b><span'
        f' class="small num">step {step:,}</span></div>{image}<span class="small num">{note}</span></div>'
    )


def works_in(result: dict[str, Any] | None, portable: bool) -> str:
    """The table of tools from the worker's answer."""
    own = (
        ""
        if portable
        else (
            '<p class="small">This LoRA was made for the embedded base. Other tools read the file, but it is'
            " of use only with that base, which no other tool has.</p>"
        )
    )
    if result is None:
        return (
            '<div class="panel"><h2>Works in</h2><p class="small">Download writes the file, reads it back'
            f" bit for bit, and says here which tools read its format.</p>{own}</div>"
        )
    rows = "".join(_tool(row) for row in result.get("works_in", []))
    return (
        '<div class="panel"><div class="row apart"><h2>Works'
        f" in</h2>{chip('read back, bit for bit', 'good')}</div><table>{rows}</table>{own}</div>"
    )


def _tool(row: dict[str, Any]) -> str:
    loads = bool(row.get("loads"))
    verdict = chip("reads it", "good") if loads else chip("drops keys", "warn")
    return (
        f"<tr><td>{safe(row.get('tool', ''))}</td><td>{safe(row.get('note', ''))}</td><td>{verdict}</td></tr>"
    )


def written_line(result: dict[str, Any], precision: str, address_of_file: str) -> str:
    """What was written, and the link to have it again."""
    size = file_size(float(result.get("bytes", 0)))
    name = str(result.get("file", "")).replace("\\", "/").rsplit("/", 1)[-1]
    return (
        f'<p class="small num" role="status">{safe(name)}, {size}, {safe(precision)},'
        f' {safe(result.get("modules", ""))} layers. <a href="{safe(address_of_file)}" download>Download'
        " again</a></p>"
    )
