"""Pictures that were left out: moved aside into the project, with captions and masks, and taken back."""

from pathlib import Path

from lora_core.dataset.folder import ImageRecord, scan
from lora_core.dataset.names import folded, free_stem
from lora_core.dataset.pictures import SUFFIXES
from lora_core.dataset.project import Project, relative_name
from lora_core.dataset.sidecars import CAPTION_SUFFIXES
from lora_core.spec.errors import DatasetError


def leave_out(project: Project, names: list[str]) -> int:
    """Move pictures aside; also files that were found to be no pictures. Returns how many.

    Raises:
        DatasetError: the demo is chosen, or there is no such picture, or the disk refuses.
    """
    project.refuse_demo()
    dataset = project.dataset()
    there = {relative_name(r.path, project.pictures): r.path for r in dataset.records}
    there |= {
        relative_name(p.path, project.pictures): p.path
        for p in dataset.problems
        if p.path.suffix.casefold() in SUFFIXES
    }
    return _move(project, [there.get(name) for name in names], names, project.pictures, project.aside)


def take_back(project: Project, names: list[str]) -> int:
    """Move pictures that were left out back to where they were. Returns how many.

    Raises:
        DatasetError: there is no such picture, or the disk refuses.
    """
    project.refuse_demo()
    there = {relative_name(path, project.aside): path for path in _pictures(project.aside)}
    return _move(project, [there.get(name) for name in names], names, project.aside, project.pictures)


def left_out(project: Project) -> list[ImageRecord]:
    """The pictures that lie aside; damaged ones among them are not shown."""
    if project.uses_demo or not project.aside.is_dir():
        return []
    return scan(project.aside, project.sizes).records


def _pictures(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix.casefold() in SUFFIXES]


def _move(project: Project, paths: list[Path | None], names: list[str], source: Path, into: Path) -> int:
    for path, name in zip(paths, names, strict=True):
        if path is None or not path.is_file():
            project.forget()
            raise DatasetError(f"There is no picture named {name!r} here any more.")
        folder = into / path.parent.relative_to(source)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # A picture of that name may have come or been left out meanwhile.
            stem = free_stem(path.stem, {folded(other.stem) for other in folder.iterdir()})
            for file in _set_of(path):
                target = folder / (stem + file.name[len(path.stem) :])
                file.replace(target)
                project.sizes.carry(file, target)
        except OSError as error:
            raise DatasetError(f"{name} cannot be moved ({error.strerror}); close what uses it.") from error
    project.forget()
    return len(paths)


def _set_of(picture: Path) -> list[Path]:
    """A picture, its captions and its mask."""
    captions = [picture.with_suffix(suffix) for suffix in CAPTION_SUFFIXES]
    masks = [picture.with_name(f"{picture.stem}-masklabel{suffix}") for suffix in sorted(SUFFIXES)]
    return [file for file in (picture, *captions, *masks) if file.is_file()]
