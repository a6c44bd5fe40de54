"""Edits of many captions at once, and masks by a model: previewed, applied to the open project, and undone.

Preview and edit use the same function. Each line of a caption is edited on its own, and a line that an edit
does not match keeps every character.
"""

import base64
import difflib
import hashlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image, ImageStat

from lora_core.data.captions import caption_file, rules_of, split_tags, with_trigger
from lora_core.data.images import ImageRecord, check_mask_png, mask_file
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
    "table": ("find", "tags changed by a table"),
    "caption": ("find", "captions by {0.find}"),
    "mask": ("find", "masks by {0.find}"),
    "set": ("find", "caption of {0.find} written"),
}
"""The edits, the field that each needs, and its description."""
PATIENCE = 5.0
"""Seconds that a pattern may take for all captions; one that backtracks could take for ever."""
# A pattern runs in a process of its own: `re` can neither be stopped nor shares the interpreter, and the
# package `regex`, which does both, takes gigabytes to compile `((a{1000}){1000}){10}`.
_PATTERN = """import json, re, sys
sent = json.load(sys.stdin)
pattern = re.compile(sent["find"], re.IGNORECASE if sent["any_case"] else 0)
json.dump([pattern.sub(sent["put"], text) for text in sent["texts"]], sys.stdout)"""

HOWS = {"missing": "Only where missing", "append": "Append", "replace": "Replace"}
"""The choices for existing captions when a model captions the images."""
MASK_HOWS = {how: HOWS[how] for how in ("missing", "replace")}
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
        texts: by name of the image, captions that are set, or what a captioner, `find`, says; `put` is then
            the trigger word of those whose concept has none, which stays in front. Of a mask model masks, as
            PNG in base64.
        how: one of `HOWS`, for these texts.
    """

    do: str
    find: str = ""
    put: str = ""
    regex: bool = False
    any_case: bool = False
    texts: Mapping[str, str] = field(default_factory=dict)
    how: str = "missing"


class Annotator:
    """What a captioner and a mask model have in common.

    Attributes:
        model: a folder or a hub id.
        download: fetch a hub id that is not on this computer.
        called: what such a model is called in messages.
        hows: choices for images that have one already.
    """

    model: str
    prompt: str
    download: bool
    called: ClassVar[str]
    hows: ClassVar[Mapping[str, str]]
    ranges: ClassVar[Mapping[str, tuple[float, float]]]

    def check(self) -> None:
        """Raise DatasetError for a value that cannot be used."""
        texts = (getattr(self, name, "") for name in ("model", "prompt", "exclude"))
        if not all(isinstance(text, str) for text in texts) or not self.model.strip():
            raise DatasetError(
                f"Give the folder of a {self.called}, or its id on the hub, such as owner/name."
            )
        for name, (least, most) in self.ranges.items():
            value = getattr(self, name)
            whole = isinstance(getattr(type(self), name), int)
            if not (isinstance(value, int if whole else int | float) and least <= value <= most):
                words, kind = name.replace("_", " "), "an integer" if whole else "a number"
                raise DatasetError(f"The {words} {value!r} is not {kind} from {least:g} to {most:g}.")

    @property
    def short_name(self) -> str:
        """The last part of the folder or hub id."""
        return re.split(r"[\\/]", self.model.strip().rstrip("\\/"))[-1]


@dataclass(frozen=True)
class Captioner(Annotator):
    """A local model that captions images, and its options.

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

    called: ClassVar[str] = "captioner"
    hows: ClassVar[Mapping[str, str]] = HOWS
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "threshold": (0, 1), "character_threshold": (0, 1), "max_tokens": (1, 1000),
    }  # fmt: skip


@dataclass(frozen=True)
class Masker(Annotator):
    """A local model that finds the subject of images, and how its mask is made.

    Attributes:
        model: a folder or a hub id of a CLIPSeg, or a background remover as an ONNX file.
        prompt: what CLIPSeg looks for, such as `a face`; commas between several.
        threshold: probability that a place needs.
        grow: percent of the longer side that the mask grows by; below 0 it shrinks.
        blur: percent of the longer side that its edge is blurred by.
        invert: mask all but the match, such as `a watermark`.
        download: fetch a hub id that is not on this computer.
    """

    model: str
    prompt: str = ""
    threshold: float = 0.3
    grow: float = 1.0
    blur: float = 0.5
    invert: bool = False
    download: bool = False

    called: ClassVar[str] = "mask model"
    hows: ClassVar[Mapping[str, str]] = MASK_HOWS
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "threshold": (0, 1), "grow": (-25, 25), "blur": (0, 25),
    }  # fmt: skip


def images_for(project: Project, do: str) -> dict[str, ImageRecord]:
    """The images that an edit is for: a captioner's also those for regularisation, which the bulk edits would
    give the trigger word."""
    return project.editable() if do in ("caption", "set") else project.images()


def left_to_do(annotator: Annotator, images: Mapping[str, ImageRecord], how: str) -> dict[str, ImageRecord]:
    """The images that a model is asked about.

    Raises:
        DatasetError: `how` is none of the model's.
    """
    if how not in annotator.hows:
        verb = "mask" if isinstance(annotator, Masker) else "caption"
        raise DatasetError(f"{how!r} is not a way to {verb}; choose one of {', '.join(annotator.hows)}.")
    there = "mask" if isinstance(annotator, Masker) else "caption"
    return {name: one for name, one in images.items() if how != "missing" or not getattr(one, there)}


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
    """The edited captions.

    Raises:
        DatasetError: something that the change needs is empty, or the pattern is wrong or takes too long.
    """
    if edit.do not in EDITS:
        raise DatasetError(f"{edit.do!r} is not an edit; choose one of {', '.join(EDITS)}.")
    if not getattr(edit, EDITS[edit.do][0]).strip() and not (edit.do == "replace" and edit.find):
        raise DatasetError("Type the text to find or add first.")
    if edit.do == "replace":
        return _replace(captions, edit)
    if edit.do in ("rename tag", "delete tag"):
        put = edit.put if edit.do == "rename tag" else ""
        return [_map_lines(caption, lambda line: _rename_tag(line, edit.find, put)) for caption in captions]
    if edit.do == "trigger":
        return [_add_trigger(caption, edit.put) for caption in captions]
    if edit.do == "table":
        table = read_tag_table(edit.find)
        return [_map_lines(caption, table.apply) for caption in captions]
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


@dataclass(frozen=True)
class TagTable:
    """Replacements of tags, in lower case, and which come first and last, in this order."""

    new: Mapping[str, str]
    first: Sequence[str]
    last: Sequence[str]

    def apply(self, line: str) -> str:
        """The tags of a line as the table has them, each once; the same line where nothing changes."""
        tags = split_tags(line)
        kept = [self.new.get(tag.casefold(), tag) for tag in tags]
        if kept != tags:
            kept = list({tag.casefold(): tag for tag in kept if tag}.values())
        ends = {tag: -len(self.first) + at for at, tag in enumerate(self.first)}
        ends |= {tag: 1 + at for at, tag in enumerate(self.last)}
        kept.sort(key=lambda tag: ends.get(tag.casefold(), 0))
        return line if kept == tags else ", ".join(kept)


def read_tag_table(text: str) -> TagTable:
    """A table of tags: lines `kitty, kitten -> cat` for synonyms, `watermark ->` for what goes, `first: sks,
    cat` and `last: simple background` for the order. Lines that begin with # are not read.

    Raises:
        DatasetError: a line is none of these, or names a tag that a line before named; says which.
    """
    new, order = dict[str, str](), {"first": list[str](), "last": list[str]()}
    for number, line in enumerate(text.splitlines(), start=1):
        left, arrow, right = (part.strip() for part in line.partition("->"))
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        place, colon, names = (part.strip() for part in line.partition(":"))
        tags = split_tags(left if arrow else names)
        taken = new if arrow else (*order["first"], *order["last"])
        again = [tag for tag in tags if tag.casefold() in taken]
        if not tags or "," in right or not (arrow or (colon and place in order)):
            raise DatasetError(
                f"Line {number} of the table, {in_short(line)}, is neither `old tag, other -> new tag`, nor"
                " `old tag ->`, nor `first: tags` or `last: tags`."
            )
        if again:
            raise DatasetError(f"Line {number} of the table names {again[0]!r} a second time; remove one.")
        if arrow:
            new |= dict.fromkeys((tag.casefold() for tag in tags), right)
        else:
            order[place] += [tag.casefold() for tag in tags]
    if not new and not any(order.values()):
        raise DatasetError("The table of tags is empty.")
    return TagTable(new, order["first"], order["last"])


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
    """Preview an edit: how many captions it changes, and the first of them as pieces.

    Args:
        project: the open one.
        edit: to apply.
        only: the names of the images to edit, None for all.

    Raises:
        DatasetError: as `apply_edit`.
    """
    changes, asked = _changes(project, edit, only)
    rows: list[dict[str, Any]] = []
    for name, record, after in changes[:SHOWN_ROWS]:
        if edit.do == "mask":
            rows.append({"picture": name, "pieces": [], "mask": after, "share": _white_share(after)})
        else:
            rows.append({"picture": name, "pieces": diff_captions(record.caption, after)})
    found = {"changed": len(changes), "asked": asked, "rows": rows}
    nothing = [name for name, text in edit.texts.items() if not text and (only is None or name in only)]
    return found | ({"nothing": nothing} if edit.do == "mask" else {})


def apply(project: Project, edit: Edit, only: Collection[str] | None) -> int:
    """Apply an edit and keep the captions or masks from before; returns how many changed.

    Raises:
        DatasetError: as `apply_edit`; or the demo is chosen, or the disk refuses.
    """
    project.refuse_demo()
    changes, _ = _changes(project, edit, only)
    masks = edit.do == "mask"
    with project.lock():
        # A pattern may take a while: files that have moved or changed since stay untouched.
        changes, before = _still_so(project, changes, masks)
        alone = not masks and all(_is_caption(record, before[name]) for name, record, _ in changes)
        if not alone:
            project.invalidate()
            changes, before = _still_so(project, changes, masks)
        if changes:
            sizes = project.sizes
            pngs = [
                (mask_file(record), check_mask_png(png, sizes.info(record.path, name), name))
                for name, record, png in (changes if masks else ())
            ]
            names = [name for name, _, _ in changes]
            written = [_digest(png) for _, png in pngs] or [caption for _, _, caption in changes]
            after = dict(zip(names, written, strict=True))
            kept = {"what": EDITS[edit.do][1].format(edit), "masks": masks, "before": before, "after": after}
            _keep(project, [*_steps(project), kept])
            for file, png in pngs:
                with wrap_os_errors(DatasetError, f"The mask {file.name} cannot be written"):
                    write_atomically(file, png, sync=False)
            if not masks:
                project.write_captions([(record, caption) for _, record, caption in changes], wait=False)
            sync_folder(project.image_folder)
            if not alone:
                project.invalidate()
    return len(changes)


def last_change(project: Project) -> str:
    """The last edit that can be undone, in words, or ""."""
    steps = [] if project.uses_demo else _steps(project)
    return str(steps[-1]["what"]) if steps else ""


def undoes_masks(project: Project) -> bool:
    """Whether the last edit that can be undone made masks."""
    steps = [] if project.uses_demo else _steps(project)
    return bool(steps) and steps[-1].get("masks") is True


def undo(project: Project) -> tuple[int, int]:
    """Undo the last edit, except where a caption or mask was changed since; returns how many are as before
    and how many are not.

    Raises:
        DatasetError: there is nothing to undo, or the disk refuses.
    """
    project.refuse_demo()
    with project.lock():
        project.invalidate()
        steps = _steps(project)
        if not steps:
            raise DatasetError("No edit of captions is left to undo.")
        last = steps.pop()
        masks = last.get("masks") is True
        by_name = project.editable()
        done = 0
        for name, old in last["before"].items():
            if (record := by_name.get(name)) and _is_so(record, str(last["after"].get(name, "")), masks):
                _put(_file(record, masks), old, masks)
                done += 1
        _keep(project, steps)
        project.invalidate()
    return done, len(last["before"]) - done


def _changes(project: Project, edit: Edit, only: Collection[str] | None) -> tuple[list[_Change], int]:
    """The captions that change, and how many were considered."""
    images = images_for(project, edit.do).items()
    wanted = [(name, record) for name, record in images if only is None or name in only]
    if edit.do == "mask":
        found = [(name, one, edit.texts.get(name, "")) for name, one in wanted]
        return [row for row in found if row[2] and (edit.how == "replace" or not row[1].mask)], len(wanted)
    if edit.do == "set":
        after = [edit.texts.get(name, one.caption) for name, one in wanted]
    elif edit.do == "caption":
        rules = DatasetSection(trigger=edit.put)
        after = [
            add_text(one.caption, edit.texts.get(name, ""), edit.how, rules_of(one, rules).trigger)
            for name, one in wanted
        ]
    else:
        after = apply_edit([record.caption for _, record in wanted], edit)
    pairs = zip(wanted, after, strict=True)
    return [(name, record, new) for (name, record), new in pairs if new != record.caption], len(wanted)


def _still_so(
    project: Project, changes: list[_Change], masks: bool
) -> tuple[list[_Change], dict[str, str | None]]:
    """The changes of images that are still the same, and the contents of their files."""
    now = project.editable()
    changes = [one for one in changes if now.get(one[0]) == one[1]]
    return changes, {name: _bytes(_file(record, masks), masks) for name, record, _ in changes}


def _is_so(record: ImageRecord, after: str, masks: bool) -> bool:
    """Whether an image has the caption or the mask that an edit wrote."""
    if not masks:
        return record.caption == after.strip()
    file = mask_file(record)
    return file.is_file() and _digest(file.read_bytes()) == after


def _digest(png: bytes) -> str:
    return hashlib.sha256(png).hexdigest()


def _white_share(png: str) -> float:
    with Image.open(io.BytesIO(base64.b64decode(png))) as mask:
        return round(ImageStat.Stat(mask).mean[0] / 255, 4)


def _file(record: ImageRecord, masks: bool) -> Path:
    return mask_file(record) if masks else caption_file(record)


def _steps(project: Project) -> list[dict[str, Any]]:
    steps = read_json(project.path / _FILE, _LARGEST).get("steps")
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _keep(project: Project, steps: list[dict[str, Any]]) -> None:
    advice = ". Nothing was changed; free some disk space."
    with wrap_os_errors(DatasetError, "The captions before the edit cannot be saved", advice):
        project.path.mkdir(exist_ok=True)
        rows = [json.dumps(step) for step in steps[-MOST_KEPT:]]
        while len(rows) > 1 and sum(map(len, rows)) > MOST_BYTES:
            rows.pop(0)
        write_atomically(project.path / _FILE, f'{{"steps": [{", ".join(rows)}]}}'.encode())


def _is_caption(record: ImageRecord, text: str | None) -> bool:
    """Whether the text file beside an image, read as `_bytes`, is still its caption, which saves reading the
    folder again."""
    return text is not None and text.strip() == record.caption and record.path.is_file()


def _bytes(file: Path, masks: bool) -> str | None:
    """A file byte for byte, as text that JSON can hold; None where there is none."""
    if not file.is_file():
        return None
    data = file.read_bytes()
    return base64.b64encode(data).decode() if masks else data.decode("utf-8", "surrogateescape")


def _put(file: Path, old: str | None, masks: bool) -> None:
    with wrap_os_errors(DatasetError, f"{file.name} cannot be written"):
        if old is None:
            file.unlink(missing_ok=True)
        else:
            data = base64.b64decode(old) if masks else old.encode("utf-8", "surrogateescape")
            write_atomically(file, data, sync=False)
