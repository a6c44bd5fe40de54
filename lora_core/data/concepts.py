"""Concepts: what `dataset.toml` in a dataset folder says of its images, and how often each is shown.

The file is one that kohya's sd-scripts reads (`--dataset_config`): a list of folders, each with repeats, the
caption of images without one, and rules for captions and flips. What kohya has no key for is in
`custom_attributes`, a table that its trainer leaves alone: a name, the role, a share in place of repeats, the
trigger, masks, background, and patterns of names for a part of a folder. What a concept does not say is a
setting of the run. Without the file, folder names such as `10_cat` and `reg` say it.

Unlike there, a concept has the images of the folders below its own too, unless these are a concept.

Source: kohya-ss/sd-scripts, library/config_util.py, `ConfigSanitizer`.
"""

import difflib
import fnmatch
import functools
import math
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import Array

from lora_core.data.captions import CAPTION_SUFFIXES, read_text
from lora_core.data.images import CONCEPT_LIST, ROLES, Concept, Dataset, ImageRecord, abbreviate
from lora_core.errors import ConfigError, DatasetError, wrap_os_errors
from lora_core.settings.config import checked_value, in_short, parse_toml
from lora_core.system.files import fold_name, read_table, write_atomically

MOST_REPEATS = 10_000
_REGULARISATION = ROLES[-1]
_CLOSE = 0.01
_MOST_ROUNDS = 50
"""Most repeats of the least shown image in an epoch, to hold shares within 1%."""
_OWN_RULES = ("trigger", "masks", "background", "resolutions", "random_crop", "color_aug")
"""Settings of the section `dataset` that are in `custom_attributes`."""
_SWITCHES = ("random_crop", "color_aug")
"""Numbers here that are true or false for kohya's trainer."""
_SWITCHED = 0.1
"""The meaning of `true`: a small crop or change, as in sd-scripts."""
_OWN = ("name", "role", "share", "images", *_OWN_RULES)
_TEXTS = ("class_tokens", "caption_prefix", "caption_suffix", "caption_extension")


@functools.cache
def _rule_keys() -> dict[str, str]:
    """kohya's keys for settings that a concept may have, by the tables of its configurations and headers."""
    names = read_table("other_trainers.toml")["kohya"]["names"]
    header = {key: row[0] for row in read_table("kohya_header.toml")["read"] for key in row[1].split()}
    rules = (
        "flip",
        "random_crop",
        "color_aug",
        "shuffle_tags",
        "keep_tags",
        "caption_dropout",
        "tag_dropout",
    )
    found = {key: header.get(name, name).removeprefix("dataset.") for key, name in names.items()}
    return {key: name for key, name in found.items() if name in rules}


@dataclass
class ConceptList:
    """The content of a `dataset.toml`: its concepts, and sentences on problems and on keys without effect."""

    concepts: list[Concept] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_concepts(folder: Path) -> ConceptList | None:
    """The concepts of a dataset folder; None where it has no `dataset.toml`."""
    if not (folder / CONCEPT_LIST).exists():
        return None
    try:
        return parse_concepts(read_concept_file(folder), folder)
    except DatasetError as error:
        return ConceptList(problems=[str(error)])


def read_concept_file(folder: Path) -> str:
    """The text of a folder's `dataset.toml`; "" where there is none.

    Raises:
        DatasetError: it cannot be read as text.
    """
    file = folder / CONCEPT_LIST
    return read_text(file, CONCEPT_LIST) if file.exists() else ""


def parse_concepts(text: str, folder: Path) -> ConceptList:
    """The concepts that a text defines for the images in `folder`."""
    found = ConceptList()
    try:
        tables = parse_toml(text, CONCEPT_LIST)
    except (ConfigError, tomllib.TOMLDecodeError) as error:
        found.problems.append(f"{CONCEPT_LIST} is not valid TOML ({error}); fix or remove it.")
        return found
    reader = _Reader(folder, found)
    general = reader.table(tables.pop("general", {}), "[general]")
    datasets = reader.tables(tables.pop("datasets", []), "datasets")
    reader.check_keys(tables, ["general", "datasets"], "")
    reader.note_unused(general, "[general]")
    number = 0
    for place, dataset in enumerate(datasets, 1):
        subsets = reader.tables(dataset.pop("subsets", []), f"subsets of dataset {place}")
        reader.note_unused(dataset, f"dataset {place}")
        for subset in subsets:
            number += 1
            where = f"subset {number}"
            reader.note_unused(subset, where)
            above = [one.get("custom_attributes", {}) for one in (general, dataset, subset)]
            own = {key: value for one in above for key, value in reader.table(one, where).items()}
            reader.add({**general, **dataset, **subset}, own, number)
    if not found.concepts and not found.problems:
        found.problems.append(f"{CONCEPT_LIST} lists no folder; add [[datasets]] and [[datasets.subsets]].")
    _check_shares(found)
    return found


def _check_shares(found: ConceptList) -> None:
    shares: dict[bool, list[Concept]] = {False: [], True: []}
    for concept in found.concepts:
        shares[concept.role == _REGULARISATION].append(concept)
    for members in shares.values():
        without = [one.name for one in members if not one.share]
        if 0 < len(without) < len(members):
            found.problems.append(
                f"{CONCEPT_LIST} gives some concepts a share and others none ({abbreviate(without)}); give"
                " each a share, or none."
            )
        asked = [one.share for one in members if one.share]
        if asked and max(asked) / MOST_REPEATS > min(asked):
            found.problems.append(
                f"{CONCEPT_LIST} has shares of {min(asked):g} and {max(asked):g}, which are more than"
                f" {MOST_REPEATS:,} times apart; change them."
            )
    if any(one.share for one in shares[True]) and not any(one.share for one in shares[False]):
        found.problems.append(
            f"{CONCEPT_LIST} gives a share to regularisation alone; give the other concepts one too."
        )


class _Reader:
    """Reads the tables of a file, and collects their problems."""

    def __init__(self, folder: Path, found: ConceptList) -> None:
        self.folder, self.found = folder, found
        self.unused: dict[str, Any] = read_table("other_trainers.toml")["kohya"]["dataset"]

    def problem(self, where: str, sentence: str) -> None:
        self.found.problems.append(f"{CONCEPT_LIST}{where and ', '}{where}: {sentence}")

    def table(self, value: Any, where: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        self.problem(where, "is not a table; write its keys below that line.")
        return {}

    def tables(self, value: Any, where: str) -> list[dict[str, Any]]:
        if isinstance(value, list) and all(isinstance(one, dict) for one in value):
            return value
        self.problem(where, "is not a list of tables; write [[datasets]] and [[datasets.subsets]].")
        return []

    def check_keys(self, given: Iterable[str], known: Sequence[str], where: str) -> None:
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]}?" if near else self.unused["instead"].get(key, "remove it.")
                self.problem(where, f"the key {in_short(key, str)} is not known here; {hint}")

    def note_unused(self, given: Mapping[str, Any], where: str) -> None:
        """Check the keys of a table, and note those that have no effect here."""
        run, off, moot = self.unused["run"], self.unused["off"], self.unused["moot"].split()
        folders = ["image_dir", "is_reg", "alpha_mask"] if where.startswith("subset") else []
        plain = [*_rule_keys(), *_TEXTS, "num_repeats", "resolution", "custom_attributes", *folders]
        self.check_keys(given, [*plain, *run, *off, *moot], where)
        for key, value in given.items():
            if key in run:
                sentence = f"{key} = {in_short(value)} has no effect here; set {run[key]} of the run."
            elif key in off and value not in (off[key], ""):
                sentence = f"{key} = {in_short(value)} has no effect here."
            elif key in moot:
                sentence = f"{key} = {in_short(value)} needs no setting here."
            else:
                continue
            self.found.notes.append(f"{CONCEPT_LIST}, {where}: {sentence}")

    def add(self, given: dict[str, Any], own: dict[str, Any], number: int) -> None:
        """Add the concept of a subset, with defaults from the tables above it; `own` are its custom
        attributes."""
        before, where = len(self.found.problems), f"subset {number}"
        self.check_keys(own, _OWN, f"{where}, custom_attributes")
        folder = self._folder(given.get("image_dir"), where)
        names = self._patterns(own.get("images", []), where)
        role = self._role(given.get("is_reg", False), own, where)
        rules = self._rules(given, own, where)
        if role == _REGULARISATION and own.get("trigger"):
            self.problem(where, "has a trigger, but regularisation is without; remove one of the two.")
        words, prefix, suffix, ending = (self._text(given.get(key, ""), key, where) for key in _TEXTS)
        ending = f".{ending.lstrip('.').casefold()}" if ending else ""
        if ending and ending not in CAPTION_SUFFIXES:
            self.problem(where, f"caption_extension = {ending!r} is not read; captions are .txt or .caption.")
        repeats, share = given.get("num_repeats", 1), own.get("share", 0)
        if type(repeats) is not int or not 1 <= repeats <= MOST_REPEATS:
            most = f"an integer from 1 to {MOST_REPEATS:,}"
            self.problem(where, f"num_repeats = {in_short(repeats)} is not {most}; change it.")
        if type(share) not in (int, float) or not 0 <= share < math.inf:
            self.problem(where, f"share = {in_short(share)} is not a number of 0 or more; change it.")
        name = self._text(own.get("name", ""), "name", where)
        name = name or (f"{folder}/" if folder and names else folder or "") + ", ".join(names) or "."
        if len(self.found.problems) == before:
            folder, share = folder or "", float(share)
            concept = Concept(name, folder, names, role, repeats, share, words, ending, prefix, suffix, rules)
            self.found.concepts.append(replace(concept, number=number))

    def _folder(self, given: Any, where: str) -> str | None:
        if not isinstance(given, str) or not given.strip():
            self.problem(where, "has no image_dir; name the folder of its images.")
            return None
        # As it may come from Windows.
        path = Path(given.strip().replace("\\", "/"))
        root = self.folder.absolute()
        place = Path(os.path.normpath(root / path))
        if not place.is_relative_to(root):
            inner = (part for part in reversed(path.parts) if part not in ("..", path.anchor))
            near = next((part for part in inner if os.path.isdir(root / part)), "")
            hint = f"did you mean {near!r}?" if near else "put it there, and write its path below that one."
            self.problem(where, f"image_dir = {given!r} is outside of the folder of {CONCEPT_LIST}; {hint}")
        elif not os.path.isdir(place):
            self.problem(where, f"image_dir = {given!r} does not exist; create it, or remove the subset.")
        else:
            shown = place.relative_to(root).as_posix()
            return "" if shown == "." else shown
        return None

    def _patterns(self, given: Any, where: str) -> tuple[str, ...]:
        patterns = [given] if isinstance(given, str) else given
        if isinstance(patterns, list) and all(isinstance(one, str) and one.strip() for one in patterns):
            return tuple(patterns)
        self.problem(where, f'images = {in_short(given)} is not a list such as ["cat*.png"]; change it.')
        return ()

    def _role(self, is_reg: Any, own: Mapping[str, Any], where: str) -> str:
        role = own.get("role", _REGULARISATION if is_reg is True else ROLES[0])
        if not isinstance(is_reg, bool):
            self.problem(where, f"is_reg = {in_short(is_reg)} is neither true nor false; change it.")
        elif role not in ROLES:
            self.problem(where, f"role = {in_short(role)} is not one of {', '.join(ROLES)}; change it.")
        elif (role == _REGULARISATION) is not is_reg:
            self.problem(where, f"role = {role!r} and is_reg = {str(is_reg).lower()} differ; remove one.")
        return str(role)

    def _rules(
        self, given: Mapping[str, Any], own: Mapping[str, Any], where: str
    ) -> tuple[tuple[str, Any], ...]:
        """The settings that a subset has in place of the run's."""
        keys = {key: (name, given[key]) for key, name in _rule_keys().items() if key in given}
        if "alpha_mask" in given:
            keys["alpha_mask"] = ("masks", "alpha" if given["alpha_mask"] is True else "on")
            if not isinstance(given["alpha_mask"], bool):
                value = in_short(given["alpha_mask"])
                self.problem(where, f"alpha_mask = {value} is neither true nor false; change it.")
        if "resolution" in given:
            keys["resolution"] = ("resolutions", [_side(given["resolution"])])
        for key in _SWITCHES:
            if isinstance(on := given.get(key), bool):
                keys[key] = (key, _SWITCHED * on)
        keys |= {key: (key, own[key]) for key in _OWN_RULES if key in own}
        found: dict[str, Any] = {}
        for key, (name, value) in keys.items():
            try:
                value = checked_value(f"dataset.{name}", value, key)
                found[name] = tuple(value) if isinstance(value, list) else value
            except ConfigError as error:
                self.problem(where, str(error))
        return tuple(sorted(found.items()))

    def _text(self, value: Any, key: str, where: str) -> str:
        if isinstance(value, str):
            return value.strip()
        self.problem(where, f"{key} = {in_short(value)} is not text; put it in quotes.")
        return ""


def _side(resolution: Any) -> Any:
    """kohya's resolution, a number or width and height, as the side of a square; anything else is returned as
    it is."""
    sides = resolution if isinstance(resolution, list) else [resolution]
    if len(sides) in (1, 2) and all(type(side) is int and side > 0 for side in sides):
        return math.isqrt(sides[0] * sides[-1])
    return resolution


def assign_concepts(shown: Mapping[Path, str], found: ConceptList, root: Path) -> dict[Path, Concept]:
    """The concept of each image, by its name below the dataset folder; images that have none are left out.

    The nearest folder above an image counts, and there the concept that names it by a pattern. Problems are
    added to those of `found`.
    """
    owners: dict[Path, Concept] = {}
    twice: dict[tuple[Concept, ...], list[str]] = {}
    matched: set[tuple[Concept, str]] = set()
    folders = [(one, f"{fold_name(one.folder)}/" if one.folder else "") for one in found.concepts]
    for path, name in shown.items():
        ranked: dict[tuple[int, bool], list[Concept]] = {}
        folded = fold_name(name)
        for concept, above in folders:
            if not folded.startswith(above):
                continue
            inside = folded.removeprefix(above)
            hits = [one for one in concept.images if fnmatch.fnmatchcase(inside, fold_name(one))]
            matched |= {(concept, one) for one in hits}
            if hits or not concept.images:
                ranked.setdefault((above.count("/"), bool(hits)), []).append(concept)
        best = ranked[max(ranked)] if ranked else []
        if len(best) > 1:
            twice.setdefault(tuple(best), []).append(name)
        if best:
            owners[path] = best[0]
    for concepts, images in twice.items():
        count = "an image" if len(images) == 1 else f"{len(images)} images"
        names = " and ".join(one.name for one in concepts)
        listed = {(one.folder, one.images) for one in concepts}
        once = (
            " Several sizes of a folder are one subset with custom_attributes = { resolutions = [512, 768] }."
        )
        found.problems.append(
            f"{CONCEPT_LIST} has {count} in two concepts, {names} ({abbreviate(images)}); give each image to"
            f" one of them.{once if len(listed) == 1 else ''}"
        )
    used = set(owners.values())
    for concept in found.concepts:
        lacking = [one for one in concept.images if (concept, one) not in matched]
        if concept not in used:
            found.problems.append(
                f"{CONCEPT_LIST}: the concept {concept.name} has no image of its own; put some into"
                f" {root / concept.folder}, or remove its subset."
            )
        elif lacking:
            found.problems.append(
                f"{CONCEPT_LIST}: no image of {concept.name} is named {abbreviate(lacking)}; remove it from"
                " images."
            )
    return owners


# How often each image is shown.


def balance_looks(
    train: Sequence[ImageRecord], reg: Sequence[ImageRecord]
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """The images of an epoch with the repeats that their shares come to.

    With shares all images of a concept have the same repeats, the smallest integers whose looks are
    within 1% of the shares. Images for regularisation without a share get as many looks as all others.

    Args:
        train: the images that are trained on.
        reg: those for regularisation.
    """
    sharing = [*train, *(one for one in reg if _share(one))]
    counts = Counter(record.concept for record in sharing if _share(record))
    if counts:
        # How often an image is shown beside the one that is shown least.
        rates = {concept: concept.share / count for concept, count in counts.items() if concept}
        least = min(rates.values())
        repeats = _whole_repeats({concept: rate / least for concept, rate in rates.items()})
        train = [_repeated(record, repeats) for record in train]
        reg = [_repeated(record, repeats) for record in reg]
    if not any(map(_share, reg)):
        reg = repeat_reg(reg, sum(record.repeats for record in train))
    return list(train), list(reg)


def _share(record: ImageRecord) -> float:
    return record.concept.share if record.concept else 0.0


def _repeated(record: ImageRecord, repeats: Mapping[Concept, int]) -> ImageRecord:
    concept = record.concept
    return replace(record, repeats=repeats[concept]) if concept and concept in repeats else record


def _whole_repeats(rates: Mapping[Concept, float]) -> dict[Concept, int]:
    """Integers in the ratio of `rates`, of which the smallest is 1, as small as 1% allows."""

    def off(rounds: int) -> float:
        return max(abs(round(rounds * rate) / (rounds * rate) - 1) for rate in rates.values())

    tried = range(1, _MOST_ROUNDS + 1)
    rounds = next((one for one in tried if off(one) <= _CLOSE), min(tried, key=off))
    return {concept: round(rounds * rate) for concept, rate in rates.items()}


def repeat_reg(reg: Sequence[ImageRecord], looks: int) -> list[ImageRecord]:
    """The regularisation images, repeated or cut to `looks` samples, as many as of the others.

    Source: kohya-ss/sd-scripts, library/train_util.py, DreamBoothDataset.
    """
    repeats: Counter[int] = Counter()
    while reg and repeats.total() < looks:
        for index, record in enumerate(reg):
            repeats[index] += 1 if repeats[index] else record.repeats
            if repeats.total() >= looks:
                break
    return [replace(reg[index], repeats=count) for index, count in repeats.items()]


# The file, made from folders and edited.

_REPEATED = re.compile(r"([1-9]\d{0,3})_(.+)")


def kohya_folder(path: Path, root: Path) -> tuple[int, str]:
    """Repeats and the caption of last resort, of the nearest `10_name` folder below the root; (1, "") without
    one."""
    # Many images are in one folder.
    return _kohya_parent(os.path.dirname(path), root)


@functools.lru_cache(maxsize=1000)
def _kohya_parent(folder: str, root: Path) -> tuple[int, str]:
    for parent in reversed(Path(folder).relative_to(root).parts):
        if match := _REPEATED.fullmatch(parent):
            return int(match[1]), match[2].replace("_", " ").strip()
    return 1, ""


def concept_of(record: ImageRecord, root: Path) -> Concept:
    """The concept of an image: its own, or the one implied by the names of its folders."""
    if record.concept:
        return record.concept
    folder = record.path.parent.relative_to(root).as_posix() if record.path.is_relative_to(root) else "."
    repeats, words = kohya_folder(record.path, root) if record.path.is_relative_to(root) else (1, "")
    role = _REGULARISATION if record.reg else ROLES[0]
    return Concept(folder, "" if folder == "." else folder, (), role, repeats, class_tokens=words)


def propose_concepts(dataset: Dataset, root: Path) -> str:
    """The text of a `dataset.toml` with a concept for each folder of images that has none yet, appended.

    Raises:
        DatasetError: the file is invalid, or nothing is lacking.
    """
    images = [*dataset.records, *dataset.reg, *dataset.loose]
    lacking = {concept_of(one, root): None for one in images if one.concept is None}
    there = read_concepts(root)
    if there is not None and there.problems:
        raise DatasetError(there.problems[0])
    if not lacking:
        raise DatasetError(f"Each image is in a concept of {CONCEPT_LIST} already, or there are no images.")
    document = _parse(read_concept_file(root))
    datasets = document.setdefault("datasets", tomlkit.aot())
    if not datasets:
        datasets.append(tomlkit.table())
    subsets = datasets[-1].setdefault("subsets", tomlkit.aot())
    for concept in sorted(lacking, key=lambda one: one.folder):
        subset = tomlkit.inline_table() if isinstance(subsets, Array) else tomlkit.table()
        subset["image_dir"] = concept.folder or "."
        subset["num_repeats"] = concept.repeats
        if concept.class_tokens:
            subset["class_tokens"] = concept.class_tokens
        if concept.role == _REGULARISATION:
            subset["is_reg"] = True
        subsets.append(subset)
    return tomlkit.dumps(document)


def _parse(text: str) -> Any:
    try:
        # tomlkit accepts some invalid TOML and rejects some valid TOML, and only later.
        parse_toml(text, CONCEPT_LIST)
        document = tomlkit.parse(text)
        document.unwrap()
        return document
    except (ConfigError, tomllib.TOMLDecodeError, TOMLKitError) as error:
        raise DatasetError(f"{CONCEPT_LIST} cannot be edited ({error}); fix or remove it.") from error


def edit_concept(folder: Path, number: int, key: str, value: Any) -> str:
    """The `dataset.toml` with a key of a concept changed and comments kept.

    Args:
        number: of the concept in the file, from 1.
        key: one of kohya's, or of the custom attributes.
        value: None or "" to remove it; without its image_dir the concept goes.

    Raises:
        DatasetError: no such concept, or the key cannot have this value.
    """
    text = read_concept_file(folder)
    document = _parse(text)
    lists = [one["subsets"] for one in _tables_of(document, "datasets") if _tables_of(one, "subsets")]
    subsets = [(listed, index) for listed in lists for index in range(len(listed))]
    if not 1 <= number <= len(subsets):
        raise DatasetError(f"{CONCEPT_LIST} has no concept {number}; it has {len(subsets)}.")
    listed, index = subsets[number - 1]
    subset = listed[index]
    if key == "image_dir" and value in (None, ""):
        del listed[index]
        return str(tomlkit.dumps(document)) if len(subsets) > 1 else ""
    if key == "role":
        _put(subset, "is_reg", True if value == _REGULARISATION else None)
        value = None if value == _REGULARISATION else value
    if key in _OWN:
        attributes = subset.get("custom_attributes", {})
        own = dict(attributes) if isinstance(attributes, Mapping) else {}
        _put(own, key, value)
        # A new table, as tomlkit adds to one in a line without a space.
        table = tomlkit.inline_table()
        table.update(own)
        _put(subset, "custom_attributes", table if own else None)
    else:
        _put(subset, key, value)
    changed = str(tomlkit.dumps(document))
    before, after = parse_concepts(text, folder).problems, parse_concepts(changed, folder)
    where = f"{CONCEPT_LIST}, subset {number}"
    for problem in after.problems:
        if problem.startswith((f"{where}:", f"{where},")) and problem not in before:
            raise DatasetError(problem)
    if after.problems and not after.concepts and not before:
        raise DatasetError(after.problems[0])
    if key == "role" and after.concepts and all(one.role == _REGULARISATION for one in after.concepts):
        raise DatasetError("Regularisation alone teaches nothing; leave one concept a subject or a style.")
    return changed


def _tables_of(table: Mapping[str, Any], key: str) -> list[Any]:
    """A list of tables, empty where it is none, as `_Reader.tables` has it."""
    listed = table.get(key)
    if isinstance(listed, list) and all(isinstance(one, Mapping) for one in listed):
        return list(listed)
    return []


def _put(table: Any, key: str, value: Any) -> None:
    if value in (None, ""):
        table.pop(key, None)
    else:
        table[key] = value


def write_concepts(folder: Path, text: str) -> None:
    """Write the `dataset.toml` of a folder; none is left where the text is empty.

    Raises:
        DatasetError: the folder cannot be written.
    """
    file = folder / CONCEPT_LIST
    advice = "; check that the folder may be written."
    with wrap_os_errors(DatasetError, f"The list {file} cannot be written", advice):
        if text:
            write_atomically(file, text.encode())
        else:
            file.unlink(missing_ok=True)
