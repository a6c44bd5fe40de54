"""Edits of many captions at once: previewed, applied to the open project, and undone.

Preview and edit use the same function. Each line of a caption is edited on its own, and a line that an edit
does not match keeps every character.
"""

import difflib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_core.data.captions import caption_file, rules_of, split_tags, with_trigger
from lora_core.data.images import ImageRecord
from lora_core.errors import DatasetError, wrap_os_errors
from lora_core.projects.project import Project
from lora_core.settings.config import in_short
from lora_core.settings.schema import DatasetSection
from lora_core.system.files import read_json, sync_folder, write_atomically

EDITS = {
    "replace": ("find", "“{0.find}” replaced by “{0.put}”"),
    "prepend": ("put", "“{0.put}” put in front"),
    "append": ("put", "“{0.put}” put at the end"),
    "rename tag": ("find", "tag “{0.find}” renamed to “{0.put}”"),
    "delete tag": ("find", "tag “{0.find}” deleted"),
    "trigger": ("put", "trigger word “{0.put}” added"),
    "caption": ("find", "captions by {0.find}"),
}
"""What may be done, the field that it needs, and the change in words."""
PATIENCE = 5.0
"""Seconds that a pattern may take for all captions; one that backtracks could take for ever."""
# A pattern runs in a process of its own: `re` can neither be stopped nor shares the interpreter, and the
# package `regex`, which does both, takes gigabytes to compile `((a{1000}){1000}){10}`.
_PATTERN = """import json, re, sys
sent = json.load(sys.stdin)
pattern = re.compile(sent["find"], re.IGNORECASE if sent["any_case"] else 0)
json.dump([pattern.sub(sent["put"], text) for text in sent["texts"]], sys.stdout)"""

HOWS = {"missing": "Only where missing", "append": "Append", "replace": "Replace"}
"""What becomes of the captions that are there when a model captions the images."""
MOST_TOKENS = 1000
SHOWN_ROWS = 8
MOST_KEPT, MOST_BYTES = 20, 32_000_000
"""Edits that can be undone, and bytes that all but the last may take."""
_LARGEST = 2_000_000_000
_FILE = "undo.json"

_Change = tuple[str, ImageRecord, str]


@dataclass(frozen=True)
class Edit:
    """One change to many captions.

    Attributes:
        do: one of `EDITS`.
        find: the text, pattern or tag that is looked for.
        put: the text, tag or trigger that is put there.
        regex: `find` is a pattern, and `put` may refer to its groups by `\\1`.
        any_case: capitals and small letters count as the same; tags are always compared so.
        texts: what a captioner, `find`, says of images, by name; `put` is then the trigger word of those
            whose concept has none, which stays in front.
        how: one of `HOWS`, for these texts.
    """

    do: str
    find: str = ""
    put: str = ""
    regex: bool = False
    any_case: bool = False
    texts: Mapping[str, str] = field(default_factory=dict)
    how: str = "missing"


@dataclass(frozen=True)
class Captioner:
    """A local model that captions images, and what it is asked for.

    Attributes:
        model: a folder or a hub id: an image-to-text model of transformers, or model.onnx and
            selected_tags.csv.
        prompt: what a model is asked, or begins with; empty for the usual.
        max_tokens: of a caption.
        threshold: probability that a tag needs.
        character_threshold: probability that a character's name needs.
        exclude: tags that are left out, commas between.
        underscores: keep the underscores of tags; else they are spaces, but in emoticons.
        download: fetch a hub id that is not on this computer.
    """

    model: str
    prompt: str = ""
    max_tokens: int = 120
    threshold: float = 0.35
    character_threshold: float = 0.85
    exclude: str = ""
    underscores: bool = False
    download: bool = False

    def check(self) -> None:
        """Raise DatasetError for a value that cannot be used."""
        texts = (self.model, self.prompt, self.exclude)
        if not all(isinstance(text, str) for text in texts) or not self.model.strip():
            raise DatasetError("Give the folder of a captioner, or its id on the hub, such as owner/name.")
        for name in ("threshold", "character_threshold"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 <= value <= 1):
                raise DatasetError(f"The {name.replace('_', ' ')} {value!r} is no number from 0 to 1.")
        if not (isinstance(self.max_tokens, int) and 1 <= self.max_tokens <= MOST_TOKENS):
            raise DatasetError(f"A caption of {self.max_tokens!r} tokens is not from 1 to {MOST_TOKENS}.")

    @property
    def short_name(self) -> str:
        """The last part of the folder or hub id."""
        return re.split(r"[\\/]", self.model.strip().rstrip("\\/"))[-1]


def without_captioned(images: Mapping[str, ImageRecord], how: str) -> dict[str, ImageRecord]:
    """The images that a captioner is asked about.

    Raises:
        DatasetError: `how` is none of `HOWS`.
    """
    if how not in HOWS:
        raise DatasetError(f"{how!r} is no way to caption; choose one of {', '.join(HOWS)}.")
    return {name: record for name, record in images.items() if how != "missing" or not record.caption}


def add_text(caption: str, text: str, how: str, trigger: str) -> str:
    """A caption with what a model says of the image; the trigger word stays, in front, where it is there.

    Appended is only what a line does not say yet, so that nothing is added twice.
    """
    text = " ".join(text.split())
    if not text or (how == "missing" and caption.strip()):
        return caption
    if how == "append" and caption.strip():
        return _map_lines(caption, lambda line: _join_line(line, _unsaid(line, text), front=False))
    has_it = caption.strip() and _add_trigger(caption, trigger) == caption
    return with_trigger(text, trigger) if has_it else text


def _unsaid(line: str, text: str) -> str:
    there = {tag.casefold() for tag in split_tags(line)}
    return ", ".join(tag for tag in split_tags(text) if tag.casefold() not in there)


def apply_edit(captions: list[str], edit: Edit) -> list[str]:
    """What the captions become.

    Raises:
        DatasetError: something that the change needs is empty, or the pattern is wrong or takes too long.
    """
    if edit.do not in EDITS:
        raise DatasetError(f"{edit.do!r} is no change of captions; choose one of {', '.join(EDITS)}.")
    if not getattr(edit, EDITS[edit.do][0]).strip() and not (edit.do == "replace" and edit.find):
        raise DatasetError("Type first what is to be found or added.")
    if edit.do == "replace":
        return _replace(captions, edit)
    if edit.do in ("rename tag", "delete tag"):
        put = edit.put if edit.do == "rename tag" else ""
        return [_map_lines(caption, lambda line: _rename_tag(line, edit.find, put)) for caption in captions]
    if edit.do == "trigger":
        return [_add_trigger(caption, edit.put) for caption in captions]
    front = edit.do == "prepend"
    return [_map_lines(caption, lambda line: _join_line(line, edit.put, front)) for caption in captions]


def diff_captions(before: str, after: str) -> list[tuple[str, str]]:
    """Two captions as pieces: ("same", text), ("old", text) for what goes, ("new", text) for what comes."""
    if before and after.endswith(before) and before != after:
        return [("new", after.removesuffix(before)), ("same", before)]
    if before and after.startswith(before) and before != after:
        return [("same", before), ("new", after.removeprefix(before))]
    one, other = (re.findall(r"\w+|\W", text) for text in (before, after))
    pieces: list[tuple[str, str]] = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(("same", "".join(one[i:j])))
            continue
        if j > i:
            pieces.append(("old", "".join(one[i:j])))
        if m > k:
            pieces.append(("new", "".join(other[k:m])))
    return pieces


def _map_lines(caption: str, change: Callable[[str], str]) -> str:
    return "\n".join(change(line) for line in caption.split("\n"))


def _join_line(line: str, put: str, front: bool) -> str:
    """The text before or after a line; a comma between where neither ends in a mark or a space. A line that
    has it there already stays, so that an edit changes nothing the second time."""
    core = put.strip(", ")
    if not line.strip():
        return core
    rest = line.removeprefix(core) if front else line.removesuffix(core)
    edge = core[-1:] + rest[:1] if front else rest[-1:] + core[:1]
    if rest != line and not (len(edge) == 2 and edge.isalnum()):
        return line
    first, last = (put, line) if front else (line, put)
    apart = first[-1:].isalnum() and last[:1].isalnum()
    return f"{first}, {last}" if apart else first + last


def _rename_tag(line: str, find: str, put: str) -> str:
    """A line with a tag renamed, or removed where the new name is empty or already present."""
    wanted = find.strip().casefold()
    tags = split_tags(line)
    if wanted not in (tag.casefold() for tag in tags):
        return line
    kept: list[str] = []
    others = {tag.casefold() for tag in tags if tag.casefold() != wanted}
    for tag in tags:
        if tag.casefold() != wanted:
            kept.append(tag)
        elif put.strip() and put.strip().casefold() not in others:
            kept.append(put.strip())
            others.add(put.strip().casefold())
    return ", ".join(kept)


def _add_trigger(caption: str, trigger: str) -> str:
    new = with_trigger(caption, trigger)
    lines = [line.strip() for line in caption.split("\n") if line.strip()]
    return caption if new == "\n".join(lines) else new


def _replace(captions: list[str], edit: Edit) -> list[str]:
    if not edit.regex and not edit.any_case:
        return [caption.replace(edit.find, edit.put) for caption in captions]
    find, put = (edit.find, edit.put) if edit.regex else (re.escape(edit.find), edit.put.replace("\\", r"\\"))
    try:
        pattern = re.compile(find, re.IGNORECASE if edit.any_case else 0)
    except (re.error, RecursionError, OverflowError) as error:
        raise DatasetError(f"The pattern {in_short(edit.find)} cannot be used: {error}.") from error
    try:
        # The replacement is parsed when something matches first; an error should show before.
        re.compile(f"{find}|").sub(put, "")
    except (re.error, IndexError) as error:
        raise DatasetError(f"The replacement {in_short(edit.put)} cannot be used: {error}.") from error
    if not edit.regex:
        return [pattern.sub(put, caption) for caption in captions]
    sent = {"find": find, "put": put, "any_case": edit.any_case, "texts": captions}
    command = [sys.executable, "-I", "-S", "-c", _PATTERN]
    try:
        done = subprocess.run(
            command, input=json.dumps(sent), capture_output=True, text=True, timeout=PATIENCE, check=True
        )
    except subprocess.TimeoutExpired as error:
        raise DatasetError(
            f"The pattern {in_short(edit.find)} takes longer than {PATIENCE:.0f} s; make it simpler,"
            " without repeats inside of repeats."
        ) from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["it ended at once"])[-1]
        raise DatasetError(f"The pattern {in_short(edit.find)} cannot be used: {last}.") from error
    return [str(text) for text in json.loads(done.stdout)]


def preview(project: Project, edit: Edit, only: Collection[str] | None) -> dict[str, Any]:
    """What an edit would do: how many captions it changes, and the first of them as pieces.

    Args:
        project: the open one.
        edit: to apply.
        only: the names of the images to edit, None for all.

    Raises:
        DatasetError: as `apply_edit`.
    """
    changes, asked = _changes(project, edit, only)
    rows = [
        {"picture": name, "pieces": diff_captions(record.caption, after)}
        for name, record, after in changes[:SHOWN_ROWS]
    ]
    return {"changed": len(changes), "asked": asked, "rows": rows}


def apply(project: Project, edit: Edit, only: Collection[str] | None) -> int:
    """Apply an edit and keep the captions from before; returns how many changed.

    Raises:
        DatasetError: as `apply_edit`; or the demo is chosen, or the disk refuses.
    """
    project.refuse_demo()
    changes, _ = _changes(project, edit, only)
    with project.lock():
        # A pattern may take a while: what has moved or changed since stays as it is.
        changes, before = _still_so(project, changes)
        alone = all(_is_caption(record, before[name]) for name, record, _ in changes)
        if not alone:
            project.invalidate()
            changes, before = _still_so(project, changes)
        if changes:
            after = {name: caption for name, _, caption in changes}
            kept = {"what": describe_edit(edit), "before": before, "after": after}
            _keep(project, [*_steps(project), kept])
            project.write_captions([(record, caption) for _, record, caption in changes], wait=False)
            sync_folder(project.image_folder)
            if not alone:
                project.invalidate()
    return len(changes)


def last_change(project: Project) -> str:
    """The last edit that can be undone, in words, or ""."""
    steps = [] if project.uses_demo else _steps(project)
    return str(steps[-1]["what"]) if steps else ""


def undo(project: Project) -> tuple[int, int]:
    """Undo the last edit, except where a caption was changed since; returns how many are as before and how
    many are not.

    Raises:
        DatasetError: there is nothing to undo, or the disk refuses.
    """
    project.refuse_demo()
    with project.lock():
        project.invalidate()
        steps = _steps(project)
        if not steps:
            raise DatasetError("There is no change of many captions left to take back.")
        last = steps.pop()
        by_name = project.images()
        done = 0
        for name, old in last["before"].items():
            record = by_name.get(name)
            if record is not None and record.caption == last["after"].get(name, "").strip():
                _put(caption_file(record), old)
                done += 1
        _keep(project, steps)
        project.invalidate()
    return done, len(last["before"]) - done


def describe_edit(edit: Edit) -> str:
    """An edit in words."""
    return EDITS[edit.do][1].format(edit)


def _changes(project: Project, edit: Edit, only: Collection[str] | None) -> tuple[list[_Change], int]:
    """The captions that change, and how many were considered."""
    wanted = [(name, record) for name, record in project.images().items() if only is None or name in only]
    if edit.do == "caption":
        rules = DatasetSection(trigger=edit.put)
        after = [
            add_text(one.caption, edit.texts.get(name, ""), edit.how, rules_of(one, rules).trigger)
            for name, one in wanted
        ]
    else:
        after = apply_edit([record.caption for _, record in wanted], edit)
    pairs = zip(wanted, after, strict=True)
    return [(name, record, new) for (name, record), new in pairs if new != record.caption], len(wanted)


def _still_so(project: Project, changes: list[_Change]) -> tuple[list[_Change], dict[str, str | None]]:
    """The changes of images that are as they were, and the texts beside them."""
    now = project.images()
    changes = [one for one in changes if now.get(one[0]) == one[1]]
    return changes, {name: _bytes(caption_file(record)) for name, record, _ in changes}


def _steps(project: Project) -> list[dict[str, Any]]:
    steps = read_json(project.path / _FILE, _LARGEST).get("steps")
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _keep(project: Project, steps: list[dict[str, Any]]) -> None:
    advice = ". Nothing was changed; free some disk space."
    with wrap_os_errors(DatasetError, "What the captions were before cannot be kept", advice):
        project.path.mkdir(exist_ok=True)
        rows = [json.dumps(step) for step in steps[-MOST_KEPT:]]
        while len(rows) > 1 and sum(map(len, rows)) > MOST_BYTES:
            rows.pop(0)
        write_atomically(project.path / _FILE, f'{{"steps": [{", ".join(rows)}]}}'.encode())


def _is_caption(record: ImageRecord, text: str | None) -> bool:
    """Whether the text file beside an image, read as `_bytes`, is still its caption, so that there is no need
    to read the whole folder again."""
    return text is not None and text.strip() == record.caption and record.path.is_file()


def _bytes(file: Path) -> str | None:
    """A caption file byte for byte, as text that JSON can hold; None where there is none."""
    return file.read_bytes().decode("utf-8", "surrogateescape") if file.is_file() else None


def _put(file: Path, old: str | None) -> None:
    with wrap_os_errors(DatasetError, f"The caption {file.name} cannot be written"):
        if old is None:
            file.unlink(missing_ok=True)
        else:
            write_atomically(file, old.encode("utf-8", "surrogateescape"), sync=False)
