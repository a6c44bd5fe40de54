"""What other tools make of a LoRA file, and what a file says of itself."""

import re
from collections.abc import Mapping
from typing import Any

from app.formatting import pluralize
from app.templates import render
from lora_core.model_files.families import FAMILIES
from lora_core.system.files import parse_json

MOST_NAMES = 40
SAME_STRENGTH = 0.05
"""The largest relative error of an update that rounding of the file's numbers can explain."""


def tool_rows(verified: Mapping[str, Any]) -> str:
    """A row per tool: how many keys it reads, or what goes wrong."""
    return render("export/tools.html", rows=[_tool(row) for row in verified.get("tools", [])])


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
        "export/facts.html",
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
