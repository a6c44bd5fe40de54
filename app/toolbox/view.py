"""The Toolbox tab: its page, and the results of its tools."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from app.bindings import Bindings, html_block
from app.formatting import pluralize
from app.templates import part, render
from app.toolbox.tools import CHECKPOINT, TOOLS
from lora_core.model_files.families import FAMILIES
from lora_core.report.plots import (
    Bar,
    amplified_html,
    bars_plot,
    block_name,
    figure,
    figures,
    folded,
    intrinsic_html,
    left_out_html,
    paragraph,
    spectrum_html,
    square_plot,
    strength_html,
    table_html,
)
from lora_core.settings.choices import FORMATS
from lora_core.system.files import parse_json

Row = Mapping[str, Any]
MOST_PAIRS = 30


def build_toolbox(bindings: Bindings) -> None:
    """Lay out the tab."""
    formats = {key: row.title for key, row in FORMATS.items()}
    html_block(render("toolbox/page.html", tools=TOOLS, formats=formats), elem_classes="page page-toolbox")


def result_html(tool: str, request: Row, result: Row) -> str:
    """Render a tool's result.

    Args:
        tool: of `TOOLS`.
        request: what was asked.
        result: what the worker answered.
    """
    if TOOLS[tool].makes:
        return written_html(result)
    files = [request["file"]] if "file" in request else [row["file"] for row in request["files"]]
    names = [_name(file) for file in files]
    if tool == "check":
        return file_facts(names[0], result)
    shown = _stack(result["stack"], names) if tool == "stack" else SHOWN[tool](result)
    return render("toolbox/result.html", tool=tool, names=" and ".join(names), shown=shown)


def _name(file: str) -> str:
    """A file's name; run and step for a checkpoint."""
    path = Path(file)
    known = path.name == CHECKPOINT and len(path.parts) > 3
    return f"{path.parents[2].name}, {path.parent.name}" if known else path.name


def _spectrum(result: Row) -> str:
    about = file_facts("The file", {"report": result.get("report") or {}, "problem": " "})
    return spectrum_html(result["spectrum"]) + folded("Metadata", about)


def _measured(result: Row, shown: str, act: str = "", words: str = "") -> str:
    """A measurement, what it was made on, and a button that makes a file of it."""
    count = int(result.get("pictures", 0))
    on = f"Measured on {count} {'image' if count == 1 else 'images'}. {result.get('note', '')}".strip()
    button = part("button", words, tone="primary", data={"toolbox_act": act}) if act else ""
    return shown + paragraph(on, small=True) + button


def _intrinsic(result: Row) -> str:
    return _measured(result, intrinsic_html(result["intrinsic"]), "shrink", "Shrink to it")


def _strength(result: Row) -> str:
    found = result["strength"]
    shown = "".join(paragraph(sentence) for sentence in found["sentences"])
    shown += figures([strength_html(fit, fit["part"]) for fit in found["fits"]])
    numbers = " and ".join(f"{value:g}" for value in found["strengths"])
    bakes = all(value > 0 for value in found["strengths"])
    return _measured(result, shown, "bake" if bakes else "", f"Bake {numbers} into the file")


def _compare(result: Row) -> str:
    found = result["compare"]
    layers = found["layers"]
    said = paragraph(
        f"{_likeness(found)}: {found['similarity']:.1%} of input directions in common (chance:"
        f" {found['baseline']:.1%}), {found['similarity_output']:.1%} of output directions (chance:"
        f" {found['baseline_output']:.1%}), over {len(layers):,} layers."
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
    shown = figures([figure("By rank", heat, note), by_block])
    table = folded("Table of all layers", table_html(heads, rows, "By layer"))
    return said + left_out_html(found["left_out"]) + shown + table


def _likeness(found: Row) -> str:
    similarity, chance = found["similarity"], found["baseline"]
    if similarity > 0.95:
        return "Almost identical"
    return "Alike" if similarity > 2 * chance else "Little in common"


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
    note = paragraph(
        "Survives: 100% where the others leave it alone, less where they take from it, more where they add to"
        " it. Untouched: its share outside all directions that the others read or write.",
        small=True,
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
        return f"{weakest} loses most when combined: {low:.0%} survives. Raise its strength a little."
    if high > 1.02:
        return (
            f"They overlap: combined, {strongest} is {high:.0%} as strong as alone. Lower the strengths, or"
            " use one of them."
        )
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
    # A file without a link is a base; training does not continue from one.
    return render(
        "toolbox/made.html",
        file=Path(str(result["file"])),
        size=float(result.get("bytes", 0)),
        sentences=result.get("sentences", []),
        link=result.get("link"),
        place=result.get("place", ""),
    )


SHOWN: dict[str, Callable[[Row], str]] = {
    "spectrum": _spectrum,
    "amplify": lambda result: amplified_html(result["amplify"]),
    "intrinsic": _intrinsic,
    "strength": _strength,
    "compare": _compare,
}


# What other tools make of a LoRA file, and what a file says of itself.

MOST_NAMES = 40
SAME_STRENGTH = 0.05
"""The largest relative error of an update that rounding of the file's numbers can explain."""


def tool_rows(verified: Mapping[str, Any]) -> str:
    """A row per tool: how many keys it reads, or what goes wrong."""
    return render("toolbox/tools.html", rows=[_tool(row) for row in verified.get("tools", [])])


def _tool(row: Mapping[str, Any]) -> dict[str, Any]:
    keys, matched = int(row.get("keys") or 0), int(row.get("matched") or 0)
    dropped = [str(name) for name in row.get("dropped_keys") or []]
    error, note, names = row.get("max_delta_error"), str(row.get("note") or ""), []
    if not matched:
        verdict, tone = "loads nothing", "bad"
    elif dropped or matched < keys:
        verdict, tone, names = "drops keys", "bad", dropped[:MOST_NAMES]
        if len(dropped) > MOST_NAMES:
            names.append(f"and {len(dropped) - MOST_NAMES:,} more")
    elif row.get("ok") and (error is None or row.get("unused_keys")):
        verdict, tone = "loads all keys", "good"
    elif error is None:
        verdict, tone = "may differ", "warn"
    elif float(error) > SAME_STRENGTH:
        verdict, tone = "wrong strength", "bad"
    else:
        verdict, tone, note = "loads all keys", "good", f"{matched:,} of {keys:,} keys, same strength"
    return {"tool": row.get("tool", ""), "note": note, "verdict": verdict, "tone": tone, "names": names}


def compatibility_card(result: Mapping[str, Any] | None) -> str:
    """What each tool makes of the written file, from the worker's answer."""
    verified = (result or {}).get("works_in") or {}
    return render("export/works_in.html", verified=verified if result else None, rows=tool_rows(verified))


MOST_TAGS = 12
# Texts of a header that one program writes, and what it is called; the more telling first.
WRITERS = (
    ("lora_easel.config", "LoRA Easel"),
    ("ot_branch", "OneTrainer"),
    ("ot_revision", "OneTrainer"),
    ("ss_sd_scripts_commit_hash", "kohya sd-scripts"),
    ("ss_network_module", "kohya sd-scripts"),
    ("lora_adapter_metadata", "diffusers or PEFT"),
)


def file_facts(name: str, result: Mapping[str, Any]) -> str:
    """What a file is, and a row per tool."""
    report: dict[str, Any] = dict(result.get("report") or {})
    metadata: dict[str, str] = dict(report.get("metadata") or {})
    family = str(report.get("family", "unknown"))
    rows = [
        ("For", FAMILIES[family].title if family in FAMILIES else family),
        ("Kind", f"{report.get('kind', '')}, {report.get('format', '')} format"),
        ("Written by", find_writer(metadata) or "unknown"),
        ("Rank", _numbers(report.get("ranks"))),
        ("Alpha", _numbers(report.get("alphas"))),
        ("Layers", f"{report.get('modules', 0):,}, {report.get('parameters', 0):,} parameters"),
        ("Trained", describe_training(metadata) or "unknown"),
    ]
    problem = str(result.get("problem") or "")
    verified: dict[str, Any] = dict(result.get("verify") or {})
    notes = [str(report.get(key) or "") for key in ("problem", "extras")]
    return render(
        "toolbox/facts.html",
        name=name,
        size=float(report.get("bytes", 0)),
        rows=rows,
        triggers=find_trigger_words(metadata),
        broken=report.get("hash_matches") is False,
        problem=problem,
        notes=[text for text in notes if text and text != problem],
        verified=verified,
        tools=tool_rows(verified),
    )


def _numbers(values: Any) -> str:
    """Distinct numbers: all of a few, else first and last."""
    found = [f"{float(value):g}" for value in values or []]
    return ", ".join(found) if len(found) <= 4 else f"{found[0]} to {found[-1]}, {len(found)} values"


def find_writer(metadata: Mapping[str, str]) -> str:
    """The program that wrote a file, "" if its metadata does not say."""
    software = _json(metadata.get("software", ""))
    if isinstance(software, dict) and software.get("name"):
        return f"{software['name']} {software.get('version') or ''}".strip()
    return next((name for key, name in WRITERS if key in metadata), "")


def find_trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """The trigger phrase in the metadata, else the tags of its captions, most frequent first."""
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return [phrase]
    tables = _json(metadata.get("ss_tag_frequency", ""))
    counts: dict[str, int] = {}
    for table in tables.values() if isinstance(tables, dict) else ():
        for tag, count in table.items() if isinstance(table, dict) else ():
            if isinstance(count, int):
                counts[str(tag).strip()] = counts.get(str(tag).strip(), 0) + count
    return sorted(counts, key=lambda tag: -counts[tag])[:MOST_TAGS]


def describe_training(metadata: Mapping[str, str]) -> str:
    """Base, images and steps, as far as the metadata says."""
    words = []
    base = metadata.get("ss_sd_model_name", "")
    if base:
        words.append(f"on {base}")
    for key, unit in (("ss_num_train_images", "image"), ("ss_steps", "step")):
        value = metadata.get(key, "")
        if re.fullmatch("[0-9]{1,18}", value) and int(value):
            words.append(pluralize(int(value), unit))
    return ", ".join(words)


def _json(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None
