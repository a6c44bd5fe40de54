"""Results of "Look inside" and of the report, as HTML."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from app.export.compatibility import report_html
from app.export.lora_tools import CHECKPOINT, TOOLS
from app.formatting import format_bytes, safe
from app.jobs import RunView
from lora_core.report.plots import Bar, bars_plot, figure, folded, paragraph, square_plot, table_html
from lora_core.report.rank_plots import (
    amplified_html,
    block_name,
    intrinsic_html,
    left_out_html,
    spectrum_html,
    strength_html,
)

Row = Mapping[str, Any]
MOST_PAIRS = 30


def result_html(tool: str, request: Row, result: Row) -> str:
    """Render a tool's result.

    Args:
        tool: of `inside.TOOLS`.
        request: what was asked.
        result: what the worker answered.
    """
    if TOOLS[tool].makes:
        return written_html(result)
    if tool == "stack":
        shown = _stack(result["stack"], [_name(row["file"]) for row in request["files"]])
    else:
        shown = SHOWN[tool](result)
    return f"{_heading(request)}{shown}{_NUMBERS}"


_NUMBERS = '<p class="small"><a href="/easel/inside/numbers.json" download>Save all numbers (JSON)</a></p>'


def _heading(request: Row) -> str:
    files = [request["file"]] if "file" in request else [row["file"] for row in request["files"]]
    names = " and ".join(_name(file) for file in files)
    return f'<h3 class="over-line">{safe(names)}</h3>'


def _name(file: str) -> str:
    """A file's name; run and step for a checkpoint."""
    path = Path(file)
    known = path.name == CHECKPOINT and len(path.parts) > 3
    return f"{path.parents[2].name}, {path.parent.name}" if known else path.name


def _spectrum(result: Row) -> str:
    report = result.get("report") or {}
    about = report_html("The file", {"report": report, "problem": " "})
    return spectrum_html(result["spectrum"]) + folded("Metadata", about)


def _on(result: Row) -> str:
    count = int(result.get("pictures", 0))
    words = f"Measured on {count} {'picture' if count == 1 else 'pictures'}. {result.get('note', '')}"
    return f'<p class="small">{safe(words.strip())}</p>'


def _button(do: str, words: str, tone: str = "") -> str:
    return f'<button type="button" class="own {tone}" data-inside-act="{do}">{safe(words)}</button>'


def _intrinsic(result: Row) -> str:
    found = result["intrinsic"]
    act = _button("shrink", "Shrink to it", "primary")
    return f'{intrinsic_html(found)}{_on(result)}<div class="row">{act}</div>'


def _strength(result: Row) -> str:
    found = result["strength"]
    said = "".join(paragraph(sentence) for sentence in found["sentences"])
    plots = "".join(strength_html(fit, fit["part"]) for fit in found["fits"])
    numbers = " and ".join(f"{value:g}" for value in found["strengths"])
    act = ""
    if all(value > 0 for value in found["strengths"]):
        act = _button("bake", f"Bake {numbers} into the file", "primary")
    return f'{said}<div class="figures">{plots}</div>{_on(result)}<div class="row">{act}</div>'


def _compare(result: Row) -> str:
    found = result["compare"]
    layers = found["layers"]
    times = found["similarity"] / found["baseline"] if found["baseline"] else 0.0
    said = paragraph(
        f"Of the directions that they read, {found['similarity']:.1%} are shared over {len(layers):,} layers,"
        f" where chance alone would give {found['baseline']:.1%} ({times:.1f} times as many); of those that"
        f" they write, {found['similarity_output']:.1%} against {found['baseline_output']:.1%}."
    )
    label = f"Similarity by rank, from 0 to 1; the leading direction alone: {found['table'][0][0]:.2f}"
    heat = square_plot(label, found["table"], ("rank of the first", "rank of the second"))
    by_block = _similarity_bars(layers)
    rows = [
        (f"{row['part']}.{row['module']}", row["rank"], f"{row['phi']:.3f}", f"{row['baseline']:.3f}",
         f"{row['phi_output']:.3f}", f"{row['baseline_output']:.3f}")
        for row in layers
    ]  # fmt: skip
    heads = ("Layer", "Rank", "Read", "By chance", "Written", "By chance")
    note = (
        "The mean over layers of the share that the leading directions have in common; a stronger colour is"
        " more."
    )
    return (
        f"{said}{left_out_html(found['left_out'])}<div"
        f' class="figures">{figure("By rank", heat, note)}{by_block}'
        f"</div>{folded('Table of all layers', table_html(heads, rows, 'By layer'))}"
    )


def _similarity_bars(layers: list[Row]) -> str:
    """The most and least similar layers, against chance."""
    ordered = sorted(layers, key=lambda row: row["baseline"] - row["phi"])
    half = MOST_PAIRS // 4
    shown = ordered if len(ordered) <= 2 * half else [*ordered[:half], *ordered[-half:]]
    bars = [Bar(row["module"], row["phi"], 0.0, f"{row['phi']:.2f} ({row['baseline']:.2f})") for row in shown]
    title = "Most and least alike layers" if len(ordered) > len(shown) else "By layer"
    return figure(
        title,
        bars_plot("Similarity of single layers", bars),
        "Of the directions that they read; in brackets what chance alone would give.",
    )


def _short(module: str) -> str:
    """Block and layer of a module name."""
    parts = module.split(".")
    if len(parts) < 5:
        return module
    return f"{'.'.join(parts[:2])} \N{HORIZONTAL ELLIPSIS} {'.'.join(parts[-2:])}"


def _stack(found: Row, names: list[str]) -> str:
    files = found["files"]
    rows = [
        (
            names[n],
            f"{row['strength']:g}",
            f"{row['norm']:.3g}",
            _share(row["survives"]),
            _share(row["untouched"]),
        )
        for n, row in enumerate(files)
    ]
    alone = table_html(("File", "Strength", "Norm", "Survives", "Untouched"), rows, "Each in the stack")
    pairs = [
        (f"{names[p['first']]} and {names[p['second']]}", f"{p['cosine']:+.3f}",
         f"{p['column_overlap']:.3f}, chance {p['column_baseline']:.3f}",
         f"{p['row_overlap']:.3f}, chance {p['row_baseline']:.3f}", p["layers"])
        for p in found["pairs"][:MOST_PAIRS]
        if p["layers"]
    ]  # fmt: skip
    apart = [p for p in found["pairs"] if not p["layers"]]
    said = paragraph(_stack_sentence(files, names))
    if apart:
        said += paragraph(
            f"{names[apart[0]['first']]} and {names[apart[0]['second']]} change no layer in common."
        )
    heads = ("Pair", "Cosine", "Written alike", "Read alike", "Layers")
    together = table_html(heads, pairs, "How each pair overlaps") if pairs else ""
    measured = found.get("validation")
    if measured:
        said += paragraph(measured["sentence"])
    note = (
        '<p class="small">Survives: 100% where the others leave it alone, less where they take from it, more'
        " where they add to it. Untouched: its share outside all directions that the others read or"
        " write.</p>"
    )
    return f"{said}{alone}{note}{together}{left_out_html(found['left_out'])}{_blocks(found)}"


def _stack_sentence(files: list[Row], names: list[str]) -> str:
    known = [
        (row["survives"], name) for row, name in zip(files, names, strict=True) if row["survives"] is not None
    ]
    if not known:
        return "None of them has any effect."
    (low, weakest), (high, strongest) = min(known), max(known)
    if low < 0.98:
        return f"{weakest} loses most in the stack: {low:.0%} of it survives."
    if high > 1.02:
        return f"They do the same in part: in the stack {strongest} is {high:.0%} as strong as alone."
    return "They hardly interfere: nearly all of each survives."


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _blocks(found: Row) -> str:
    rows = [
        (block_name({"part": row["part"], "block": row["module"]}), *(_share(v) for v in row["survives"][:2]))
        for row in found["layers"]
        if len(row["files"]) > 1
    ]
    if not rows:
        return ""
    return folded("Table of shared layers", table_html(("Layer", "First", "Second"), rows, "What survives"))


def written_html(result: Row) -> str:
    """A file that was made: location, cost, next steps."""
    file = Path(str(result["file"]))
    said = "".join(paragraph(sentence) for sentence in result.get("sentences", []))
    size = format_bytes(float(result.get("bytes", 0)))
    link = (
        f'<a class="own primary" href="{safe(result["link"])}" download>Download</a>'
        if result.get("link")
        else ""
    )
    # A file without a link is a base; training does not continue from one.
    go_on = _go_on(file) if link else ""
    return (
        f'<div class="made"><h3 class="over-line">{safe(file.name)}, {size}</h3>{said}<div class="row">{link}'
        f"{go_on}</div>{result.get('place', '')}</div>"
    )


def _go_on(file: Path) -> str:
    words = "Continue training from this file"
    return f'<button type="button" class="own" data-inside-go-on="{safe(file)}">{words}</button>'


SHOWN: dict[str, Callable[[Row], str]] = {
    "spectrum": _spectrum,
    "amplify": lambda result: amplified_html(result["amplify"]),
    "intrinsic": _intrinsic,
    "strength": _strength,
    "compare": _compare,
}


REPORT = "report.html"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""A report is made of what people and files say; whatever got into it, nothing of it may run in this
window."""

FRAME = "<h2>Report</h2>"
STATE = (
    '<div class="making small num" id="report-state" data-state="idle"><span id="report-words"'
    ' role="status"></span><button type="button" class="own quiet" id="report-cancel"'
    " hidden>Cancel</button></div>"
)


def report_card(run_view: RunView | None) -> str:
    """The button that makes a run's report, and the report if it exists."""
    if run_view is None:
        return (
            '<div class="row"><button type="button" class="own" id="report-make" disabled title="There is no'
            ' checkpoint yet; train something first.">Make the report</button><span class="small">There is no'
            " run to tell of yet.</span></div>"
        )
    name = safe(run_view.run.name)
    file = run_view.run.path / REPORT
    try:
        size = f", {format_bytes(file.stat().st_size)}"
        there = report_links(run_view.run.name, size)
    except OSError:
        there = ""
    return (
        '<div class="made"><p class="small">The whole run as one page, to send to a friend: samples, curves,'
        " rank, settings and what came of it. It opens anywhere and holds no paths and no pictures that the"
        ' run was trained on.</p><div class="row'
        f' report-row"><button type="button" class="own" id="report-make" data-report-run="{name}">Make the'
        ' report</button><label class="tick"><input type="checkbox" id="report-measure" checked>measure rank'
        f" and strength, some minutes</label></div>{there}"
    )


def report_entry(run_view: RunView, learned: bool) -> str:
    """A run's report in the list of runs: a link, or a button that makes a quick one.

    Args:
        run_view: the run.
        learned: whether it has a checkpoint, without which there is nothing to tell.
    """
    name = run_view.run.name
    if (run_view.run.path / REPORT).is_file():
        return (
            f'<a class="own quiet" href="{safe(_address(name))}" target="_blank"'
            f' data-report-of="{safe(name)}" aria-label="Open the report of {safe(name)}">Report</a>'
        )
    if not learned:
        return ""
    return (
        f'<button type="button" class="own quiet" data-report-run="{safe(name)}" data-report-quick'
        ' title="The run as one page, in some seconds. On the Export tab it can measure rank and strength'
        f' too." aria-label="Make the report of {safe(name)}">Make report</button>'
    )


def _address(name: str) -> str:
    return f"/easel/report/of/{quote(name)}"


def report_links(name: str, words: str) -> str:
    """Links to open and to download a report."""
    address = _address(name)
    return (
        f'<p class="small" id="report-links"><a href="{safe(address)}" target="_blank" id="report-open">Open'
        f' the report</a>{safe(words)} &middot; <a href="{safe(address)}?download=1" download'
        ' id="report-download">Download it</a></p>'
    )


def report_done(name: str, result: dict[str, Any]) -> str:
    """The note that a report was made."""
    return f'<p class="small" role="status">The report of {safe(name)} is made.</p>'
