"""Checkpoints to choose from, and what each tool makes of a file: the written one, or any LoRA file."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from app.bindings import QUIET, Bindings, html_block
from app.formatting import format_bytes, pluralize, safe
from app.jobs import RunView
from app.routes import image_url
from app.state import Snapshot
from app.templates import chip, problem_html
from lora_core.model_files.families import FAMILIES
from lora_core.runs.folder import runs_folder
from lora_core.system.untrusted import parse_json

MOST_NAMES = 40


def checkpoint_cards(snapshot: Snapshot, run_view: RunView | None, chosen: str) -> str:
    """Best and last side by side, each with its latest sample and gain."""
    if run_view is None:
        return (
            '<div class="empty"><h3>Nothing to export yet</h3><p class="small">Train first: each run leaves'
            " checkpoints here, and each of them can become a file for other tools.</p></div>"
        )
    steps = run_view.run.checkpoint_steps()
    cards = []
    best = run_view.progress.best_step
    if best is not None and best in steps:
        title = "Best and last" if best == steps[-1] else "Best"
        cards.append(
            _card(
                snapshot, run_view, title, best, chosen == "best" or (chosen == "last" and best == steps[-1])
            )
        )
    if steps and best != steps[-1]:
        cards.append(_card(snapshot, run_view, "Last", steps[-1], chosen == "last"))
    if chosen in map(str, steps):
        cards.append(_card(snapshot, run_view, "Picked", int(chosen), True))
    return f'<div class="checkpoints">{"".join(cards)}</div>'


def _card(snapshot: Snapshot, run_view: RunView, title: str, step: int, on: bool) -> str:
    before = [p for p in run_view.progress.previews if p.step <= step and p.files]
    root = runs_folder(snapshot.app_state.workspace)
    image = '<div class="shot"></div>'
    if before:
        source = safe(image_url("run", root, run_view.run.path / before[-1].files[0]))
        image = f'<img src="{source}" alt="sample at step {before[-1].step}">'
    gain = next((v for v in run_view.progress.validations if v.step == step), None)
    note = f"gain {gain.gain:+.4f}" if gain else "not measured"
    return (
        f'<div class="panel tight{" on" if on else ""}"><div class="row apart"><b>{title}</b><span'
        f' class="small num">step {step:,}</span></div>{image}<span class="small num">{note}</span></div>'
    )


SAME_STRENGTH = 0.05
"""The largest relative error of an update that rounding of the file's numbers can explain."""


def tool_rows(verified: dict[str, Any]) -> str:
    """A row per tool: how many keys it reads, or what goes wrong."""
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
        return _row(row, note, chip("\N{CHECK MARK} loads all keys", "good"))
    if error is None:
        return _row(row, note, chip("may differ", "warn"))
    if float(error) > SAME_STRENGTH:
        return _row(row, note, chip("wrong strength", "bad"))
    return _row(
        row, f"{matched:,} of {keys:,} keys, same strength", chip("\N{CHECK MARK} loads all keys", "good")
    )


def _listed(names: list[str]) -> str:
    """Key names, folded."""
    more = [f"and {len(names) - MOST_NAMES:,} more"] if len(names) > MOST_NAMES else []
    lines = safe("\n".join(names[:MOST_NAMES] + more))
    return f'<details><summary>Which keys</summary><pre class="log" tabindex="0">{lines}</pre></details>'


def _row(row: dict[str, Any], said: str, verdict: str, listed: str = "") -> str:
    name = safe(row.get("tool", ""))
    return f'<tr><td>{name}</td><td class="num">{safe(said)}{listed}</td><td>{verdict}</td></tr>'


def verdict_chip(verified: dict[str, Any], fine: str) -> str:
    """All tools in one label; `fine` if all is well."""
    if verified.get("ok"):
        return chip(fine, "good")
    return chip("not every tool loads it", "bad")


def compatibility_card(result: dict[str, Any] | None, portable: bool) -> str:
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
    """What was written, a download link, and its location."""
    size = format_bytes(float(result.get("bytes", 0)))
    name = str(result.get("file", "")).replace("\\", "/").rsplit("/", 1)[-1]
    return (
        f'<p class="small num" role="status">{safe(name)}, {size}, {safe(precision)},'
        f' {safe(result.get("modules", ""))} layers. <a href="{safe(address_of_file)}" download>Download'
        f" again</a></p>{place}"
    )


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


def build_check(bindings: Bindings) -> None:
    """Lay out the panel and wire it."""
    with gr.Column(elem_classes="card"):
        html_block(
            '<h2>Check a LoRA file</h2><p class="small">A file from any tool: its type, trigger words, and'
            " whether each tool loads all of it. No code in the file is run.</p>"
        )
        with gr.Row(elem_id="check-drop"):
            upload = gr.UploadButton(
                "Choose a file", file_types=[".safetensors"], elem_id="check-upload", min_width=0, scale=0
            )
            path = gr.Textbox(
                label="Path of a LoRA file",
                placeholder="or drop it, or its path",
                elem_id="check-path",
                lines=1,
                max_lines=1,
            )
            look = gr.Button("Check", elem_id="check-file", min_width=0, scale=0)
        report = html_block(elem_id="check-report")

    def uploaded(file: str | None) -> str:
        if not file:
            return ""
        return check_file(bindings, move_aside(bindings.app_state.workspace / "tmp" / "dropped", Path(file)))

    def from_path(text: str) -> str:
        name = text.strip().strip('"')
        if not name:
            return problem_html("Choose a file, or type its path first.")
        return check_file(bindings, Path(name).expanduser())

    busy = {**QUIET, "show_progress": "minimal"}
    upload.upload(uploaded, upload, report, **busy)
    look.click(from_path, path, report, **busy)
    path.submit(from_path, path, report, **busy)


def move_aside(folder: Path, file: Path) -> Path:
    """Move an uploaded file to its own folder, replacing the previous one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(file, folder / file.name))


def check_file(bindings: Bindings, file: Path) -> str:
    """Ask the worker about a file; returns HTML."""
    reply = bindings.app_state.worker.ask({"do": "verify", "file": str(file)})
    if reply.state == "error":
        return problem_html(reply.message)
    into = (
        f'<div class="row"><button type="button" class="own" data-inside-file="{safe(file)}">Look inside it'
        "</button></div>"
    )
    return report_html(file.name, reply.result) + into


def report_html(name: str, result: Mapping[str, Any]) -> str:
    """What a file is, and a row per tool."""
    report: dict[str, Any] = dict(result.get("report") or {})
    metadata: dict[str, str] = dict(report.get("metadata") or {})
    rows = [
        ("For", _family_title(str(report.get("family", "unknown")))),
        ("Kind", f"{report.get('kind', '')}, {report.get('format', '')} format"),
        ("Written by", find_writer(metadata) or "not said"),
        ("Rank", _numbers(report.get("ranks"))),
        ("Alpha", _numbers(report.get("alphas"))),
        ("Layers", f"{report.get('modules', 0):,}, {report.get('parameters', 0):,} numbers"),
        ("Trigger words", find_trigger_words(metadata) or "not said"),
        ("Trained", describe_training(metadata) or "not said"),
    ]
    table = "".join(f'<tr><th scope="row">{safe(k)}</th><td>{safe(v)}</td></tr>' for k, v in rows)
    size = format_bytes(float(report.get("bytes", 0)))
    broken = report.get("hash_matches") is False
    changed = chip("modified after it was written: its hash differs", "warn") if broken else ""
    verified: dict[str, Any] = dict(result.get("verify") or {})
    problem = str(result.get("problem") or "")
    tools = f'<p class="small">{safe(problem)}</p>' if problem else tool_rows(verified)
    said = [str(report.get(key) or "") for key in ("problem", "extras")]
    notes = "".join(f'<p class="small">{safe(text)}</p>' for text in said if text and text != problem)
    verdict = "" if problem else verdict_chip(verified, "right for its intended tools")
    return (
        f'<div class="check-result"><div class="row apart"><h3>{safe(name)},'
        f' {size}</h3>{changed}{verdict}</div><table class="facts-table">{table}</table>{notes}{tools}</div>'
    )


def _family_title(name: str) -> str:
    return FAMILIES[name].title if name in FAMILIES else name


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


def find_trigger_words(metadata: Mapping[str, str]) -> str:
    """The trigger phrase in the metadata, else the most frequent tags."""
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return phrase
    tables = _json(metadata.get("ss_tag_frequency", ""))
    counts: dict[str, int] = {}
    for table in tables.values() if isinstance(tables, dict) else ():
        for tag, count in table.items() if isinstance(table, dict) else ():
            if isinstance(count, int):
                counts[str(tag).strip()] = counts.get(str(tag).strip(), 0) + count
    often = sorted(counts, key=lambda tag: -counts[tag])[:MOST_TAGS]
    return f"most frequent tags: {', '.join(often)}" if often else ""


def describe_training(metadata: Mapping[str, str]) -> str:
    """Base, images and steps, as far as the metadata says."""
    words = []
    base = metadata.get("ss_sd_model_name", "")
    if base:
        words.append(f"on {base}")
    for key, unit in (("ss_num_train_images", "picture"), ("ss_steps", "step")):
        value = metadata.get(key, "")
        if re.fullmatch("[0-9]{1,18}", value) and int(value):
            words.append(pluralize(int(value), unit))
    return ", ".join(words)


def _json(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None
