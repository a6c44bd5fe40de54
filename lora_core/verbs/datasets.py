"""Verbs for images and captions, projects, and other contents of a workspace."""

import hashlib
import tomllib
import webbrowser
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lora_core.data.captions import read_text
from lora_core.errors import DatasetError, LoraError, RunError
from lora_core.model_files.detect import read_base_facts
from lora_core.projects.caption_edits import (
    HOWS,
    MASK_HOWS,
    Annotator,
    Captioner,
    Edit,
    Masker,
    images_for,
    left_to_do,
)
from lora_core.runs.folder import find_run
from lora_core.settings.config import FIELDS, checked_value, parse_toml
from lora_core.system.files import IS_CHECKOUT, PACKAGE, SITE, expand_home
from lora_core.system.files import workspace as workspace_folder
from lora_core.verbs import File, Found, Measure, Place, Progress, choose_device, listed, load_images, verb

if TYPE_CHECKING:
    from lora_core.projects.project import Project
    from lora_core.projects.workspace import Projects


@verb
def audit(
    dataset: File,
    base: str = "demo",
    resolution: Annotated[int, "--resolution PX"] = 0,
    trigger: str = "",
    batch: int = 1,
    workspace: Place = None,
    note: Progress | None = None,
) -> Found:
    """Check a dataset: its problems, and what will be learned from it.

    Args:
        dataset: a folder of images, a zip of one, a project's name, or `demo`.
        base: the base to train.
        resolution: in pixels; 0 for the base's own.
        trigger: a word that may be in every caption.
        batch: images per batch, for their shares of the steps.
    """
    from lora_core.data.audit import TrainingView, kept_looks
    from lora_core.data.audit import audit as audited
    from lora_core.data.images import SizeCache

    checked_value("train.batch_size", batch, "--batch")
    side = checked_value("train.resolution", resolution, "--resolution")
    facts = read_base_facts(base)
    # Measurements of the images are kept: another audit takes seconds, and a cancelled one continues.
    name = hashlib.sha256(str(expand_home(dataset).absolute()).encode("utf-8", "surrogatepass")).hexdigest()
    kept = workspace_folder(workspace) / "cache" / "audits" / name[:16]
    sizes = SizeCache(kept / "sizes.json")
    found = load_images(dataset, workspace, sizes)
    sizes.save()
    training = TrainingView(
        side or facts.resolution, facts.multiple, facts.tokenizer, trigger, batch, reg=found.reg
    )
    with kept_looks(kept / "looks.npz") as looks:
        return audited(found, training, note, looks)


@verb
def concepts_list(
    dataset: File,
    base: str = "demo",
    resolution: Annotated[int, "--resolution PX"] = 0,
    batch: int = 1,
    pictures: float = float(str(FIELDS["validation.pictures"].default)),
    seed: int = 0,
    workspace: Place = None,
) -> list[Found]:
    """List the concepts of a dataset with their shares of the training.

    Args:
        dataset: a folder of images, a zip of one, a project's name, or `demo`.
        base: the base to train.
        resolution: in pixels; 0 for the base's own.
        batch: images per batch.
        pictures: held-out images, as `validation.pictures`.
        seed: of the run, which selects them.

    Returns:
        Rows {number, name, folder, role, trigger, images, num_repeats, asked, repeats, share}.
    """
    from lora_core.data.audit import TrainingView, concept_rows
    from lora_core.data.dataset import require_clean, split_holdout

    checked_value("validation.pictures", pictures, "--pictures")
    checked_value("train.batch_size", batch, "--batch")
    side = checked_value("train.resolution", resolution, "--resolution")
    facts = read_base_facts(base)
    found = load_images(dataset, workspace)
    require_clean(found)
    held = frozenset(record.path for record in split_holdout(found.records, pictures, seed)[1])
    size = (side or facts.resolution, facts.multiple)
    return concept_rows(found, TrainingView(*size, None, "", batch, held, found.reg))


@verb
def concepts_make(dataset: File, workspace: Place = None) -> Path:
    """Add a concept for each folder of images without one to `dataset.toml`; returns that file.

    Raises:
        DatasetError: each image has a concept already, or the file is invalid.
    """
    from lora_core.data.concepts import propose_concepts
    from lora_core.data.images import CONCEPT_LIST

    project = _pictures_of(dataset, workspace)
    project.change_concepts(lambda folder: propose_concepts(project.dataset(), folder))
    return project.image_folder / CONCEPT_LIST


@verb
def concepts_set(dataset: File, number: int, key: str, value: str, workspace: Place = None) -> None:
    """Set a key of a concept in its `dataset.toml`, in place of the run's setting.

    Args:
        number: of the concept, as `concepts list` shows it.
        key: of kohya's dataset configuration, or role, share, trigger, name, masks, background,
            resolutions, random_crop, color_aug or images.
        value: as in TOML, or a text; an empty one removes the key.

    Raises:
        DatasetError: no such concept, or it cannot have that value.
    """
    from lora_core.data.concepts import edit_concept

    try:
        read: Any = parse_toml(f"value = {value}", key)["value"]
    except tomllib.TOMLDecodeError:
        read = value
    _pictures_of(dataset, workspace).change_concepts(lambda folder: edit_concept(folder, number, key, read))


@verb
def concepts_move(
    dataset: File, folder: str, pictures: Sequence[str], workspace: Place = None
) -> dict[str, str]:
    """Move images into the folder of a concept, with captions, masks and crops.

    Args:
        folder: of the concept, below the dataset's; `.` for the dataset's own.
        pictures: paths below the folder of the dataset.

    Returns:
        The folder of each moved image before, by its name now.
    """
    from lora_core.projects.project import move_images

    return move_images(_pictures_of(dataset, workspace), dict.fromkeys(listed(pictures), folder))


@verb
def probe(
    dataset: File,
    base: str = "demo",
    triples: int = 4,
    seed: int = 0,
    trigger: str = "",
    workspace: Place = None,
    note: Progress | None = None,
) -> Found:
    """Score captions with a base: bad captions, and candidates for a trigger.

    Args:
        dataset: a folder of images, a zip of one, a project's name, or `demo`.
        base: the base.
        trigger: a trigger word to measure too.
    """
    measure = Measure(dataset, base, triples=triples, seed=seed, workspace=workspace)
    opened, records = measure.load("auto")
    from lora_core.evaluate.caption_scores import propose_triggers, score_captions

    found = score_captions(opened, records, triples, seed, on_progress=note)
    found["trigger"] = propose_triggers(opened, records, trigger, triples, seed, on_progress=note)
    return found


@verb
def pictures(
    run: File,
    checkpoint: Annotated[str, "--checkpoint STEP"] = "best",
    triples: int = 8,
    workspace: Place = None,
    note: Progress | None = None,
) -> Found:
    """Measure a run's gain on each of its images; saved in the run's folder too.

    Args:
        checkpoint: best, last, or the step of a checkpoint.
    """
    checked_value("validation.draws_per_image", triples, "--triples")
    folder = find_run(run, workspace)
    from lora_core.evaluate.caption_scores import measure_run_images

    return measure_run_images(folder, str(checkpoint), triples, note)


@verb
def caches_list(workspace: Place = None) -> dict[str, int]:
    """Show the size of each cache, in bytes, the largest first."""
    from lora_core.projects.workspace import cache_sizes

    return cache_sizes(workspace_folder(workspace))


@verb
def caches_clean(workspace: Place = None) -> int:
    """Delete all caches, which runs can rebuild; returns the bytes freed.

    Raises:
        RunError: a run is live, or the disk refuses.
    """
    from lora_core.projects.workspace import clean_caches

    return clean_caches(workspace_folder(workspace))


@verb
def trash_list(workspace: Place = None) -> list[Found]:
    """List the trash, newest first: id, name, kind, came_from, time."""
    from lora_core.projects.workspace import list_trash

    return [one.row() for one in list_trash(workspace_folder(workspace))]


@verb
def trash_restore(name: str, workspace: Place = None) -> Path:
    """Restore something from the trash, under another name if its own is taken; returns its path.

    Args:
        name: its name, or the id that `list` shows.

    Raises:
        RunError: nothing, or more than one thing, has that name.
    """
    from lora_core.projects.workspace import list_trash, restore

    place = workspace_folder(workspace)
    there = list_trash(place)
    found = [one for one in there if name in (one.name, one.place.name)]
    if len(found) == 1:
        return restore(found[0], place)
    if found:
        ids = ", ".join(one.place.name for one in found)
        raise RunError(f"The trash holds {len(found)} things named {name}; give one of the ids {ids}.")
    names = ", ".join(sorted({one.name for one in there})[:10])
    raise RunError(f"The trash holds no {name}; " + (f"it holds {names}." if names else "it is empty."))


@verb
def trash_empty(workspace: Place = None) -> int:
    """Permanently delete everything in the trash; returns the bytes freed."""
    from lora_core.projects.workspace import empty_trash

    return empty_trash(workspace_folder(workspace))


@verb
def projects_list(workspace: Place = None) -> list[Found]:
    """List the projects, the open one first: key (its folder), title, path, is_open, pictures, runs, size."""
    projects = _projects(workspace)
    return [{**asdict(one), "path": str(projects.folder / one.key)} for one in projects.list_projects()]


@verb
def projects_new(title: str, workspace: Place = None) -> Path:
    """Make a project and open it in the window; returns its folder.

    Raises:
        RunError: the title is empty or taken.
    """
    projects = _projects(workspace)
    return projects.folder / projects.new(title)


@verb
def projects_open(project: str, workspace: Place = None) -> None:
    """Choose the project that the window opens."""
    projects = _projects(workspace)
    projects.open(projects.find_key(project))


@verb
def projects_rename(project: str, title: str, workspace: Place = None) -> None:
    """Give a project another title; its folder keeps its name.

    Raises:
        RunError: no such project, or the title is empty or taken.
    """
    projects = _projects(workspace)
    projects.rename(projects.find_key(project), title)


@verb
def projects_delete(project: str, workspace: Place = None) -> Path:
    """Move a project to the trash; returns where it is now.

    Raises:
        RunError: no such project, it is the only one, or a live run uses it.
    """
    projects = _projects(workspace)
    return projects.delete(projects.find_key(project))


@verb
def projects_import(project: str, source: File, link: bool = False, workspace: Place = None) -> Found:
    """Import images, captions and masks into a project: a folder, a zip or a file.

    Args:
        project: its title, or its folder's name.
        source: a folder, a zip or an image.
        link: link files instead of copying them.

    Returns:
        added (files) and skipped, a sentence for each file that was left out.

    Raises:
        LoraError: the source does not exist, or nothing in it can be used.
    """
    from lora_core.data.importer import TransferMode, import_files, import_folder
    from lora_core.projects.project import Project

    projects, where = _projects(workspace), expand_home(source).absolute()
    into = Project(projects.folder / projects.find_key(project))
    if not where.is_dir() and not where.is_file():
        raise DatasetError(f"There is no folder, zip or image at {where}.")
    way = TransferMode("link" if link else "copy", sizes=into.sizes)
    with into.importing():
        if where.is_dir():
            found = import_folder(where, into.image_folder, way)
        else:
            found = import_files([where], into.image_folder, way=way)
    if link:
        into.link(where if where.is_dir() else where.parent)
    return {"added": len(found.added), "skipped": [one.sentence for one in found.skipped]}


def _projects(workspace: Place) -> "Projects":
    from lora_core.projects.workspace import Projects

    return Projects(workspace_folder(workspace))


@verb
def leave_out(dataset: File, pictures: Sequence[str], workspace: Place = None) -> int:
    """Move images of a project aside, with their captions; returns how many.

    Args:
        pictures: paths below the folder.
    """
    from lora_core.projects.project import leave_out as moved

    return moved(_pictures_of(dataset, workspace), listed(pictures))


@verb
def take_back(dataset: File, pictures: Sequence[str], workspace: Place = None) -> int:
    """Put left-out images back; returns how many."""
    from lora_core.projects.project import take_back as moved

    return moved(_pictures_of(dataset, workspace), listed(pictures))


def left_out(dataset: File, workspace: Place = None) -> list[str]:
    """The images that were left out, as `take_back` takes them."""
    from lora_core.projects.project import list_left_out as aside
    from lora_core.projects.project import relative_name

    project = _pictures_of(dataset, workspace)
    return [relative_name(record.path, project.left_out_folder) for record in aside(project)]


@verb
def hold_out(
    dataset: File, pictures: Sequence[str], on: Annotated[bool, "--undo"] = True, workspace: Place = None
) -> None:
    """Hold images of a project out for validation; `on=False` (`--undo`) trains on them again."""
    project, names = _pictures_of(dataset, workspace), listed(pictures)
    for name in names:
        if project.find_image(name).reg:
            raise DatasetError(f"{name} is for regularisation, and nothing is measured on it; choose others.")
    project.hold_out(names, on)


@verb
def crop(
    dataset: File, picture: str, box: Annotated[str, "LEFT,TOP,RIGHT,BOTTOM[,X,Y]"], workspace: Place = None
) -> None:
    """Train on a part of an image.

    Args:
        box: the edges as shares of width and height, such as 0.1,0,0.9,1; 0,0,1,1 for all of the image.
            Behind them the focus point, across and down, that stays in sight, such as 0,0,1,1,0.5,0.3.

    Raises:
        DatasetError: no such image, or the box cannot be used.
    """
    try:
        edges = [float(edge) for edge in box.split(",")]
    except ValueError as error:
        raise DatasetError(f"The box {box!r} is not four or six numbers, such as 0.1,0,0.9,1.") from error
    _pictures_of(dataset, workspace).crop(str(picture), edges)


@verb
def captions_set(dataset: File, picture: str, text: str, workspace: Place = None) -> None:
    """Write the caption of one image."""
    project, name = _pictures_of(dataset, workspace), str(picture)
    project.find_image(name)
    _edit(project, False, Edit("set", name, texts={name: text}))


@verb
def captions_replace(
    dataset: File,
    find: str,
    put: str,
    regex: bool = False,
    any_case: bool = False,
    dry_run: bool = False,
    workspace: Place = None,
) -> Found:
    """Find and replace in all captions.

    Args:
        find: a text, or with `regex` a regular expression.
        put: the replacement; may refer to groups of a regular expression.
        regex: FIND is a regular expression.
        any_case: ignore case.
        dry_run: show the changes without making them.

    Returns:
        changed and asked (captions), and rows {picture, pieces} of the first, where pieces are (kind, text)
        with the kinds same, old and new.
    """
    return _edit(_pictures_of(dataset, workspace), dry_run, Edit("replace", find, put, regex, any_case))


@verb
def captions_prefix(dataset: File, text: str, dry_run: bool = False, workspace: Place = None) -> Found:
    """Put a text in front of all captions; as `captions_replace`."""
    return _edit(_pictures_of(dataset, workspace), dry_run, Edit("prepend", "", text))


@verb
def captions_suffix(dataset: File, text: str, dry_run: bool = False, workspace: Place = None) -> Found:
    """Put a text at the end of all captions; as `captions_replace`."""
    return _edit(_pictures_of(dataset, workspace), dry_run, Edit("append", "", text))


@verb
def captions_rename_tag(
    dataset: File, tag: str, new: str, dry_run: bool = False, workspace: Place = None
) -> Found:
    """Give a tag another name; as `captions_replace`."""
    return _edit(_pictures_of(dataset, workspace), dry_run, Edit("rename tag", tag, new))


@verb
def captions_delete_tag(dataset: File, tag: str, dry_run: bool = False, workspace: Place = None) -> Found:
    """Delete a tag; as `captions_replace`."""
    return _edit(_pictures_of(dataset, workspace), dry_run, Edit("delete tag", tag))


@verb
def captions_table(dataset: File, table: File, dry_run: bool = False, workspace: Place = None) -> Found:
    """Change tags by a table of synonyms, removals, and first or last tags.

    Args:
        table: a text file with lines `kitty, kitten -> cat`, `watermark ->`, `first: sks, cat` and `last:
            simple background`.

    Raises:
        DatasetError: the file cannot be read, or a line is invalid.
    """
    text = read_text(expand_home(table), str(table))
    return _edit(_pictures_of(dataset, workspace), dry_run, Edit("table", text))


@verb
def captions_trigger(dataset: File, word: str, dry_run: bool = False, workspace: Place = None) -> Found:
    """Add a trigger word to all captions that lack it; as `captions_replace`."""
    return _edit(_pictures_of(dataset, workspace), dry_run, Edit("trigger", "", word))


@verb
def caption(  # noqa: PLR0913 - one option each
    dataset: File,
    captioner: Captioner,
    how: Annotated[str, tuple(HOWS)] = "missing",
    trigger: str = "",
    device: str = "auto",
    dry_run: bool = False,
    workspace: Place = None,
    note: Progress | None = None,
) -> Found:
    """Caption images with a local model: BLIP, Florence-2 and the like, or a tagger; as `captions_replace`.

    Args:
        captioner: the model and its options.
        how: only where a caption is missing, append to existing ones, or replace them.
        trigger: a word that stays in front of captions that have it; else the project's.

    Raises:
        LoraError: the captioner is missing, broken or of another kind; no caption is changed then.
    """
    project = _pictures_of(dataset, workspace)
    texts = _annotate(project, captioner, how, device, note)
    word = trigger or str(project.draft().get("trigger") or "")
    edit = Edit("caption", captioner.short_name, word, texts=texts, how=how)
    return _edit(project, dry_run, edit)


@verb
def masks_make(
    dataset: File,
    masker: Masker,
    how: Annotated[str, tuple(MASK_HOWS)] = "missing",
    device: str = "auto",
    dry_run: bool = False,
    workspace: Place = None,
    note: Progress | None = None,
) -> Found:
    """Mask images with a local model: CLIPSeg by a prompt, or a background remover.

    Args:
        masker: the model and its options.
        how: only where an image has no mask, or replace existing ones.

    Returns:
        changed and asked (images), rows {picture, share} of the first, where share is how much counts, and
        the images in which nothing was found, which get no mask. `captions undo` takes it back.

    Raises:
        LoraError: the model is missing, broken or of another kind; no mask is changed then.
    """
    project = _pictures_of(dataset, workspace)
    texts = _annotate(project, masker, how, device, note)
    found = _edit(project, dry_run, Edit("mask", masker.short_name, texts=texts, how=how))
    return found | {"rows": [{key: row[key] for key in ("picture", "share")} for row in found["rows"]]}


def _annotate(
    project: "Project", annotator: Annotator, how: str, device: str, note: Progress | None
) -> dict[str, str]:
    """What a local model makes of the images that are to be done, by their names."""
    project.refuse_demo()
    annotator.check()
    what = "mask" if isinstance(annotator, Masker) else "caption"
    asked = left_to_do(annotator, images_for(project, what), how)
    from lora_core.model_files.hub import annotator_folder

    annotator_folder(annotator.model, annotator.called, annotator.download)
    if not asked:
        return {}
    from lora_core.evaluate.annotation import make_masks, write_texts

    def phase(words: str, done: int, total: int) -> None:
        if note and total:
            note(done, total)

    if isinstance(annotator, Masker):
        return make_masks(annotator, asked, choose_device(device), phase)
    assert isinstance(annotator, Captioner)
    return write_texts(annotator, asked, choose_device(device), phase)


@verb
def captions_undo(dataset: File, workspace: Place = None) -> Found:
    """Undo the last bulk edit of captions or masks.

    Returns:
        How many are undone, and kept as changed since; `masks` where it were masks.
    """
    from lora_core.projects.caption_edits import undo, undoes_masks

    project = _pictures_of(dataset, workspace)
    masks = undoes_masks(project)
    undone, kept = undo(project)
    return {"undone": undone, "kept": kept} | ({"masks": masks} if masks else {})


def _edit(project: "Project", dry_run: bool, edit: Edit) -> Found:
    """Change all captions, or show the changes."""
    from lora_core.projects import caption_edits

    found = caption_edits.preview(project, edit, None)
    if not dry_run:
        found["changed"] = caption_edits.apply(project, edit, None)
    return found


def _pictures_of(dataset: File, workspace: Place) -> "Project":
    from lora_core.projects.workspace import open_images

    return open_images(str(dataset), workspace_folder(workspace))


@verb
def docs(no_browser: bool = False) -> Path:
    """Open the documents in the browser: the site, or the README if it was not built.

    Args:
        no_browser: only print their location.

    Raises:
        LoraError: they were not installed.
    """
    page = SITE if SITE.is_file() else PACKAGE.parent / "README.md"
    if not (SITE.is_file() or IS_CHECKOUT):
        raise LoraError(
            "This installation was built without its documents: read them in the folder docs of the sources;"
            " `lora-easel VERB --help` has the options of each command."
        )
    if not no_browser:
        webbrowser.open(page.as_uri())
    return page


@verb
def doctor(workspace: Place = None, zip_to: Annotated[File | None, "--zip F.zip"] = None) -> Found:
    """Check this computer, with a fix for each problem.

    Args:
        zip_to: a zip for a bug report: this, the newest run's settings and log; no paths, names, prompts.

    Returns:
        ok, checks [{name, found, ok, fix}], and zip, where one was written.
    """
    from lora_core.report.doctor import diagnosis, write_zip

    place = Path(workspace) if workspace else None
    found = diagnosis(place)
    if zip_to:
        target = expand_home(zip_to).absolute()
        write_zip(target, found, place)
        found["zip"] = str(target)
    return found
