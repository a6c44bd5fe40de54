"""The Export tab's answers as HTML: the checkpoints to choose from, and where the written file works."""

from typing import Any

from app.jobs import Watch
from app.moment import Moment
from app.routes import address
from app.words import chip, file_size, safe
from lora_core.spec.run_folder import runs_folder

MOST_NAMES = 40


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
    if chosen in map(str, steps):
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


SAME_STRENGTH = 0.05
"""The largest relative error of an update that rounding of the file's numbers can explain."""


def tool_rows(verified: dict[str, Any]) -> str:
    """A row a tool: a tick with how many keys it reads, or what goes wrong."""
    return f"<table>{''.join(_tool(row) for row in verified.get('tools', []))}</table>"


def _tool(row: dict[str, Any]) -> str:
    keys, matched = int(row.get("keys") or 0), int(row.get("matched") or 0)
    dropped: list[Any] = row.get("dropped_keys") or []
    error, note = row.get("max_delta_error"), str(row.get("note") or "")
    if not matched:
        return _row(row, note, chip("loads nothing", "bad"))
    if dropped or matched < keys:
        return _row(row, note, chip("drops keys", "bad"), _listed([str(name) for name in dropped]))
    if row.get("ok") and (error is None or row.get("unused_keys")):
        return _row(row, note, chip("\N{CHECK MARK} reads it whole", "good"))
    if error is None:
        return _row(row, note, chip("may differ", "warn"))
    if float(error) > SAME_STRENGTH:
        return _row(row, note, chip("wrong strength", "bad"))
    return _row(
        row, f"{matched:,} of {keys:,} keys, same strength", chip("\N{CHECK MARK} reads it whole", "good")
    )


def _listed(names: list[str]) -> str:
    """Names of keys, folded away."""
    more = [f"and {len(names) - MOST_NAMES:,} more"] if len(names) > MOST_NAMES else []
    lines = safe("\n".join(names[:MOST_NAMES] + more))
    return f'<details><summary>Which keys</summary><pre class="log" tabindex="0">{lines}</pre></details>'


def _row(row: dict[str, Any], said: str, verdict: str, listed: str = "") -> str:
    name = safe(row.get("tool", ""))
    return f'<tr><td>{name}</td><td class="num">{safe(said)}{listed}</td><td>{verdict}</td></tr>'


def verdict_chip(verified: dict[str, Any], fine: str) -> str:
    """The whole in one label; `fine` where all is well."""
    if verified.get("ok"):
        return chip(fine, "good")
    return chip("not every tool reads it", "bad")


def works_in(result: dict[str, Any] | None, portable: bool) -> str:
    """What each tool makes of the written file, from the worker's answer."""
    own = (
        ""
        if portable
        else (
            '<p class="small">This LoRA was made for the embedded base. Other tools read the format, but the'
            " file is of use only with that base, which no other tool has.</p>"
        )
    )
    if result is None:
        return (
            '<div class="panel"><h2>Works in</h2><p class="small">Once the file is written it is read back by'
            " the rules of six tools, and what each would add to the base is compared with what was trained."
            f" The answer stands here.</p>{own}</div>"
        )
    verified = result.get("works_in") or {}
    return (
        '<div class="panel"><div class="row apart"><h2>Works'
        f" in</h2>{verdict_chip(verified, 'read back and compared')}</div>{tool_rows(verified)}{own}</div>"
    )


def written_line(result: dict[str, Any], precision: str, address_of_file: str, place: str) -> str:
    """What was written, the link to have it again, and the line that says where it is."""
    size = file_size(float(result.get("bytes", 0)))
    name = str(result.get("file", "")).replace("\\", "/").rsplit("/", 1)[-1]
    return (
        f'<p class="small num" role="status">{safe(name)}, {size}, {safe(precision)},'
        f' {safe(result.get("modules", ""))} layers. <a href="{safe(address_of_file)}" download>Download'
        f" again</a></p>{place}"
    )
