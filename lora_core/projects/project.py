"""The open project: the user's images and the unsent form, both on disk, so that nothing typed is lost.

There is one object a window, whichever project is open, so that its holders follow when another is opened.
Images that were left out are moved aside into the project, with captions and masks. Moves are written to a
journal first, so that the next start completes what a killed process began.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from filelock import FileLock, Timeout

from lora_core.data.captions import CAPTION_SUFFIXES, caption_file, write_caption
from lora_core.data.concepts import concept_of, read_concept_file, write_concepts
from lora_core.data.dataset import (
    check_crop,
    crop_record,
    read_crops,
    read_holdout_list,
    scan,
    scan_again,
    write_crops,
    write_holdout_list,
)
from lora_core.data.images import (
    CROP_LIST,
    HOLDOUT_LIST,
    IMAGE_SUFFIXES,
    MASK_ENDINGS,
    MASK_OF,
    Dataset,
    FileProblem,
    ImageRecord,
    SizeCache,
    check_mask_png,
    folder_kind,
    is_junk,
    mask_file,
    stamp_files,
)
from lora_core.errors import DatasetError, wrap_os_errors
from lora_core.system.files import (
    DEMO_TRAIN,
    clean_text,
    clean_value,
    clear_abandoned,
    clear_abandoned_below,
    file_stamp,
    fold_name,
    read_json,
    read_object,
    read_small_file,
    replacing,
    unused_path,
    unused_stem,
    write_atomically,
)
from lora_core.system.processes import hold_lock

JOURNAL = "moving.json"
DEMO = "demo"
DEFAULT_TITLE, DEMO_TITLE = "My images", "Demo"
LABEL = "project.json"
_LOCK = ".lock"
_PATIENCE = 30.0
"""Seconds to wait for another process that changes the project."""
LONGEST_TITLE = 80
LARGEST_SENT_MASK = 16_000_000
"""Bytes of a former mask that a page gets, and can send back within a request's limit. A larger one is kept
in the project for `_KEPT_SECONDS`, and the page gets its name."""
_FORMER_MASKS, _KEPT_SECONDS = "former masks", 24 * 3600.0
_KEPT_MASK = re.compile(r"kept:([0-9a-f]{64})")
MEANT: ContextVar[str] = ContextVar("meant", default="")
"""The folder's name of the project that a page shows, while what it sent is carried out; else ""."""
OTHER_PROJECT = "Another page has opened another project, so nothing was changed here."


class Project:
    """One project folder: `pictures/` with copies and captions, `draft.json` with the unsent form."""

    def __init__(self, path: Path, image_folder: Path | None = None) -> None:
        """Open the project at `path`, making its folders if absent; `image_folder` may be elsewhere."""
        self._lock = threading.RLock()
        self._revision = 0
        self._unwritten = ""
        self.open(path, image_folder)

    def open(self, path: Path, image_folder: Path | None = None) -> None:
        """Switch this object to another project.

        Raises:
            DatasetError: the folder of its images cannot be made, or the draft of the project that is open
                cannot be written; that one stays open.
        """
        if not self.write_draft():
            raise DatasetError(self._unwritten)
        pictures = image_folder or path / "pictures"
        advice = "; move the file in its place elsewhere, or choose another workspace."
        with wrap_os_errors(DatasetError, f"The folder {pictures} cannot be made", advice):
            pictures.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self.path = path
            self.image_folder = pictures
            self.left_out_folder = path / "left out"
            self.title = read_title(path)
            self.sizes = SizeCache(path / "sizes.json")
            self._read_draft()
            self._scanned: tuple[object, Dataset] | None = None
            self._stamp: int | None = None
            self._named: tuple[Dataset, dict[str, ImageRecord]] | None = None
            self.notes: list[FileProblem] = []
            self._file_lock = FileLock(path / _LOCK)
            self.draft_problem = self._unwritten = ""
            self._revision += 1
            if MEANT.get():
                # Of a page that opens it: what follows is for this one.
                MEANT.set(path.name)
        self._repair()

    def importing(self) -> AbstractContextManager[None]:
        """Lock out other imports into the project: each looks for free names, and then takes them.

        Raises:
            RunError: another window or command imports for too long, or the folder cannot be written.
        """
        busy = f"Another import into the project {self.title} is running; wait until it is done."
        return hold_lock(self.path / ".importing", self.path / ".importing.json", busy, _PATIENCE)

    def require_meant(self, name: str) -> None:
        """Raise DatasetError where a page means the project of another folder; "" means any."""
        if name not in ("", self.path.name):
            raise DatasetError(OTHER_PROJECT)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock out other threads and processes while files are moved or captions written.

        Raises:
            DatasetError: another process holds it for too long, the folder cannot be written, or another
                project was opened meanwhile.
        """
        with self._lock:
            file_lock, name = self._file_lock, self.path.name
        with wrap_os_errors(DatasetError, f"The project {self.path} cannot be written"):
            try:
                file_lock.acquire(timeout=_PATIENCE)
            except Timeout as error:
                raise DatasetError(
                    f"The project {self.title} is being changed by another window or command; wait until that"
                    " is done."
                ) from error
        try:
            with self._lock:
                self.require_meant(name)
                self.require_meant(MEANT.get())
                yield
        finally:
            file_lock.release()

    @property
    def root(self) -> Path:
        """The folder of the images and of those that were left out."""
        return self.image_folder if self.path.is_relative_to(self.image_folder) else self.path

    def _repair(self) -> None:
        """Finish moves of a killed process."""
        clear_abandoned(self.path)
        clear_abandoned_below(self.image_folder)
        for file in (self.path / _FORMER_MASKS).glob("*"):
            with contextlib.suppress(OSError):
                if file.stat().st_mtime < time.time() - _KEPT_SECONDS:
                    file.unlink()
        if not (self.root / JOURNAL).exists():
            return
        # A project that cannot be written can still be shown; it is repaired when that is possible.
        with contextlib.suppress(DatasetError, OSError), self.lock():
            finish_moves(self.root)
            self.invalidate()

    @property
    def revision(self) -> int:
        """A number that changes with images and captions."""
        return self._revision

    def _read_draft(self) -> None:
        """Read the unsent form; one that cannot be read counts as empty, and is set aside before the next."""
        file = self.path / "draft.json"
        self._draft: dict[str, Any] = {}
        self._draft_is_unreadable = False
        self._draft_stamp = file_stamp(file)
        try:
            self._draft = read_object(file)
        except (OSError, ValueError) as error:
            self._draft_is_unreadable = not isinstance(error, FileNotFoundError)

    def draft(self) -> dict[str, Any]:
        """A copy of the unsent form."""
        with self._lock:
            return dict(self._draft)

    def update_draft(self, **changes: Any) -> None:
        """Put values into the draft and write it, if anything changed. Where the disk refuses,
        `draft_problem` says so, and the next call writes it.

        Raises:
            DatasetError: a page of another project has sent them.
        """
        with self._lock:
            self.require_meant(MEANT.get())
            self.set_unreadable_draft_aside()
            file = self.path / "draft.json"
            if not self._unwritten and file_stamp(file) != self._draft_stamp:
                # Another window or a command has changed it since.
                self._draft |= read_json(file)
            changed = {**self._draft, **clean_value(changes)}
            if changed != self._draft or self._unwritten:
                self._draft, before = changed, self._unwritten
                try:
                    write_atomically(file, json.dumps(changed, indent=1).encode())
                except OSError as error:
                    self._unwritten = self.draft_problem = (
                        f"The form cannot be written to {self.path}: {error.strerror or error}. Free some"
                        " space: until then only this window keeps it."
                    )
                else:
                    self._unwritten, self._draft_stamp = "", file_stamp(file)
                    if self.draft_problem == before:
                        self.draft_problem = ""

    def write_draft(self) -> bool:
        """Write a draft that the disk has refused; returns whether the disk has it. If not, it ends with this
        process."""
        if self._unwritten:
            self.update_draft()
        return not self._unwritten

    @contextmanager
    def editing(self) -> Iterator[None]:
        """While the context is open, no other thread changes the draft."""
        with self._lock:
            yield

    @contextmanager
    def without_draft(self) -> Iterator[None]:
        """An empty draft while the context is open."""
        with self._lock:
            kept, self._draft = self._draft, {}
            try:
                yield
            finally:
                self._draft = kept

    def set_draft_aside(self) -> None:
        """Start with an empty form; the draft moves to a file beside it, which `draft_problem` names."""
        with self._lock:
            aside = unused_path(self.path, "draft-set-aside", ".json")
            write_atomically(aside, json.dumps(self._draft, indent=1).encode())
            write_atomically(self.path / "draft.json", b"{}")
            self._draft = {}
            self._say_draft_is_kept("shown", aside)

    def set_unreadable_draft_aside(self) -> None:
        """Move a `draft.json` that could not be read to a file beside it, which `draft_problem` names.

        Raises:
            OSError: it cannot be moved; it stays, and `draft_problem` names it.
        """
        with self._lock:
            if self._draft_is_unreadable:
                # Another window may have set it aside and written a new one.
                self._read_draft()
            if self._draft_is_unreadable:
                self._say_draft_is_kept("read", self.path / "draft.json")
                aside = unused_path(self.path, "draft-set-aside", ".json")
                os.rename(self.path / "draft.json", aside)
                self._draft_is_unreadable = False
                self._say_draft_is_kept("read", aside)

    def _say_draft_is_kept(self, done: str, where: Path) -> None:
        self.draft_problem = (
            f"The settings of this project could not be {done}, so the form starts over; they are kept in "
            f"{where}."
        )

    @property
    def uses_demo(self) -> bool:
        """Whether the demo's images are chosen in place of the user's own."""
        return bool(self.draft().get("dataset") == DEMO)

    @property
    def dataset_folder(self) -> Path:
        """The folder of the images that are shown and trained on."""
        return DEMO_TRAIN if self.uses_demo else self.image_folder

    @property
    def linked_folders(self) -> list[Path]:
        """Folders whose images were linked instead of copied, so that links may lead there."""
        return [Path(str(folder)) for folder in self.draft().get("linked") or []]

    def link(self, folder: Path) -> None:
        """Note a folder whose images were linked; where a link leads is checked when it is shown."""
        with self.editing():
            self.update_draft(linked=list(dict.fromkeys([*map(str, self.linked_folders), str(folder)])))

    def dataset(self) -> Dataset:
        """The images, read again only after a change of the folder, or of a file and `invalidate()`."""
        folder = self.dataset_folder
        with self._lock:
            try:
                key: object = (folder, folder.stat().st_mtime_ns)
            except OSError:
                return Dataset([], [])
            if self._scanned is None or self._scanned[0] != key:
                before, known, self._stamp = self._scanned, self._stamp, stamp_files(folder)
                if before and known is not None and known == self._stamp:
                    self._scanned = (key, before[1])
                    return before[1]
                kept = self.path / "images.json"
                self._scanned = (key, scan_again(folder, self.sizes, self._stamp, kept))
                self.sizes.save(self.path, self.image_folder)
                if before is None or before[1] != self._scanned[1]:
                    self._revision += 1
            return self._scanned[1]

    def invalidate(self) -> None:
        """Check at the next access whether a file has changed."""
        with self._lock:
            if self._scanned is not None:
                # Kept for comparison: the revision changes only where something is different.
                self._scanned = (None, self._scanned[1])

    def images(self) -> dict[str, ImageRecord]:
        """The images by their names below the dataset folder; the same object until one changes."""
        with self._lock:
            dataset, folder = self.dataset(), self.dataset_folder
            if self._named is None or self._named[0] is not dataset:
                self._named = (dataset, {relative_name(one.path, folder): one for one in dataset.records})
            return self._named[1]

    def editable(self) -> dict[str, ImageRecord]:
        """`images`, and those for regularisation."""
        reg, folder = self.dataset().reg, self.dataset_folder
        return self.images() | {relative_name(one.path, folder): one for one in reg}

    def find_image(self, name: str) -> ImageRecord:
        """The image of that name below the dataset folder, also one for regularisation.

        Raises:
            DatasetError: there is none.
        """
        record = self.editable().get(name)
        if record is None or not record.path.is_file():
            self.invalidate()
            raise DatasetError(f"The dataset has no image named {name!r}.")
        return record

    def refuse_demo(self) -> None:
        """Refuse to change what came with the program.

        Raises:
            DatasetError: the demo's images are chosen.
        """
        if self.uses_demo:
            raise DatasetError("The demo's images stay as they are; drop your own to work on them.")

    def save_caption(self, name: str, text: str) -> None:
        """Write an image's caption beside it.

        Raises:
            DatasetError: no such image, it is one of the demo's, or the disk refuses.
        """
        if self.uses_demo:
            raise DatasetError(
                "The demo's captions stay as they are; drop your own images to write captions."
            )
        with self.lock():
            self.write_captions([(self.find_image(name), text)])

    def write_captions(self, texts: Sequence[tuple[ImageRecord, str]], wait: bool = True) -> None:
        """Write captions of images to the text files beside them; `wait` as for `write_caption`.

        Raises:
            DatasetError: the disk refuses; those before are written.
        """
        files = {caption_file(record): text for record, text in texts}
        with self._own_writes({file.name for file in files}) as changed:
            for record, text in texts:
                write_caption(record.path, text, wait, caption_file(record))
            # An image of the same stem has the same caption.
            stems = {_stem(file) for file in files}
            sharing = [one for one in self._records() if _stem(one.path) in stems]
            for record in sharing:
                if (file := caption_file(record)) in files:
                    # A scan strips captions, too.
                    changed[record.path] = replace(record, caption=files[file].strip())
        if len(changed) < len(sharing):
            self.invalidate()

    def _records(self) -> list[ImageRecord]:
        """The images of the last scan, though the folder may have been touched since."""
        return [*self._scanned[1].records, *self._scanned[1].reg] if self._scanned else []

    def hold_out(self, names: list[str], on: bool) -> None:
        """Hold images out for validation, or train on them again.

        Raises:
            DatasetError: it is the demo's, or the list cannot be written.
        """
        self.refuse_demo()
        with self.lock():
            wanted = set(names)
            by_name = self.images()
            held = {name for name, record in by_name.items() if record.held_out}
            held = held | (wanted & by_name.keys()) if on else held - wanted
            with self._own_writes({HOLDOUT_LIST}) as changed:
                write_holdout_list(self.image_folder, held)
                changed |= {r.path: replace(r, held_out=n in held) for n, r in by_name.items()}

    def crop(self, name: str, edges: Sequence[float] | None) -> tuple[float, ...] | None:
        """Train on a part of an image, or on all of it; returns what the crop was.

        Args:
            name: of the image, below the dataset folder.
            edges: left, top, right and bottom as shares of its upright sides, and perhaps a focus point,
                across and down; None for all of it.

        Raises:
            DatasetError: it is the demo's, there is no such image, the edges are not those of a crop or leave
                too little, or the list cannot be written.
        """
        self.refuse_demo()
        with self.lock():
            record = self.find_image(name)
            info = self.sizes.info(record.path, name)
            if isinstance(info, FileProblem):
                raise DatasetError(info.sentence)
            changed = replace(record, width=info.width, height=info.height, crop=None, focus=None)
            crop = None if edges is None else check_crop(edges, name)
            crop = None if crop == (0, 0, 1, 1) else crop
            changed = crop_record(changed, crop) if crop else changed
            crops = {
                fold_name(other): (other, edges) for other, edges in read_crops(self.image_folder).items()
            }
            _, before = crops.pop(fold_name(name), (name, None))
            with self._own_writes({CROP_LIST}) as put:
                write_crops(self.image_folder, dict(crops.values()) | ({name: crop} if crop else {}))
                put[record.path] = changed
            return before

    def write_mask(self, name: str, png: str | None, put_back: str = "") -> dict[str, str | None]:
        """Write `NAME-masklabel.png` beside an image, or remove the mask that the image has; returns the
        `file`, by its name below the dataset folder, and what it was `before`, in base64 or, if it is large,
        by the name under which the project keeps it, None for no file.

        Args:
            name: of the image, below the dataset folder.
            png: the mask in base64, white where the image counts; None for no mask.
            put_back: a `file` of an earlier answer, which becomes `png`, its `before`, byte for byte.

        Raises:
            DatasetError: it is the demo's, no such image, the mask is not a PNG, all black or of another
                shape, it cannot be written, or `put_back` is not the name of a mask.
        """
        self.refuse_demo()
        with self.lock(), wrap_os_errors(DatasetError, f"The mask of {name} cannot be written"):
            record = self.find_image(name)
            file = (png is None and record.mask) or mask_file(record)
            file = self._mask_named(put_back, record) if put_back else file
            before = {"file": relative_name(file, self.image_folder), "before": self._former_mask(file)}
            if png is None:
                file.unlink(missing_ok=True)
            elif put_back:
                write_atomically(file, self._put_back_bytes(png, name))
            else:
                data = check_mask_png(png, self.sizes.info(record.path, name), name)
                with self._own_writes({file.name}) as changed:
                    write_atomically(file, data)
                    changed[record.path] = replace(record, mask=file)
                if self._fits_alone(record, file):
                    return before
            self.invalidate()
            return before

    def _former_mask(self, file: Path) -> str | None:
        """What `write_mask` answers of a file that it is about to change."""
        if not file.is_file():
            return None
        data = file.read_bytes()
        if len(data) <= LARGEST_SENT_MASK:
            return base64.b64encode(data).decode()
        digest = hashlib.sha256(data).hexdigest()
        (self.path / _FORMER_MASKS).mkdir(exist_ok=True)
        write_atomically(self.path / _FORMER_MASKS / digest, data)
        return f"kept:{digest}"

    def _put_back_bytes(self, before: str, name: str) -> bytes:
        """The former mask of an image, from what `_former_mask` returned."""
        try:
            if kept := _KEPT_MASK.fullmatch(before):
                return (self.path / _FORMER_MASKS / kept[1]).read_bytes()
            return base64.b64decode(before, validate=True)
        except FileNotFoundError as error:
            raise DatasetError(f"The former mask of {name} was kept for a day and is gone.") from error
        except (ValueError, TypeError) as error:
            raise DatasetError(f"The mask of {name} is not in base64.") from error

    def _mask_named(self, name: str, record: ImageRecord) -> Path:
        """A file that can be a mask of an image: named like it, and beside it or in a folder of masks."""
        path, root = Path(os.path.normpath(self.image_folder / name)), self.image_folder
        stem, own = fold_name(path.stem), fold_name(record.path.stem)
        beside = path.parent == record.path.parent and stem != own
        is_masks = beside or folder_kind(relative_name(path, root)) == "mask"
        named = is_masks and stem in {own + ending for ending in ("", MASK_ENDINGS[0], *MASK_OF)}
        fits = "\0" not in name and path.suffix.casefold() in IMAGE_SUFFIXES and named
        if not fits or not path.parent.resolve().is_relative_to(root.resolve()):
            raise DatasetError(f"{name!r} is not a mask of {record.path.name}.")
        return path

    def _fits_alone(self, record: ImageRecord, file: Path) -> bool:
        """Whether a mask that was written makes no difference to other images, files and problems."""
        told = self._scanned[1].problems + self._scanned[1].notes if self._scanned else []
        others = [one for one in self._records() if _stem(one.path) == _stem(record.path)]
        return record.mask in (None, file) and len(others) == 1 and all(one.path != file for one in told)

    def change_concepts(self, change: Callable[[Path], str]) -> dict[str, str]:
        """Rewrite the `dataset.toml` of the images; returns its text `before` and `after`.

        Args:
            change: makes the new text, "" for no file; given the folder.

        Raises:
            DatasetError: it is the demo's, `change` refuses, or the file cannot be written.
        """
        self.refuse_demo()
        with self.lock():
            before = read_concept_file(self.image_folder)
            after = change(self.image_folder)
            write_concepts(self.image_folder, after)
            self.invalidate()
        return {"before": before, "after": after}

    @contextmanager
    def _own_writes(self, names: set[str]) -> Iterator[dict[Path, ImageRecord]]:
        """Put the records that are added meanwhile in place, without reading the folder again although it is
        touched; unless others touched more in it than the files of those names."""
        folder, changed = self.dataset_folder, dict[Path, ImageRecord]()
        self.dataset()
        before = _list_entries(folder)
        scanned_before = self._scanned and self._scanned[0] == (folder, folder.stat().st_mtime_ns)
        try:
            yield changed
        except BaseException:
            self.invalidate()
            raise
        if self._scanned is not None:
            # The time first, so that what comes between is read next time.
            key = (folder, folder.stat().st_mtime_ns)
            others = {name for name, _ in before ^ _list_entries(folder)} - names
            old = self._scanned[1]
            records, reg = ([changed.get(r.path, r) for r in part] for part in (old.records, old.reg))
            new = replace(old, records=records, reg=reg)
            self._scanned = (key if scanned_before and not others else None, new)
            self._revision += 1


def _stem(path: Path) -> str:
    """A file's path without its ending, as file systems compare it."""
    return fold_name(os.path.splitext(path)[0])


def _list_entries(folder: Path) -> set[tuple[str, int]]:
    """The files of a folder by their names, and a number that is another where one took another's place."""
    with os.scandir(folder) as entries:
        # Each system gives one of them with the name, and the other for a call a file.
        return {(e.name, e.inode() if os.name == "posix" else e.stat().st_mtime_ns) for e in entries}


def relative_name(path: Path, folder: Path) -> str:
    """An image's name below its dataset folder, with forward slashes."""
    # `Path.relative_to` would take most of the time of listing many images.
    whole, root = str(path), f"{folder}{os.sep}"
    return clean_text(whole.removeprefix(root).replace(os.sep, "/") if whole.startswith(root) else path.name)


def read_title(path: Path) -> str:
    """The title of a project: its label, else its folder's name."""
    title = str(read_json(path / LABEL).get("title") or "").strip()
    return title[:LONGEST_TITLE] or (DEFAULT_TITLE if path.name == "default" else path.name)


@dataclass(frozen=True)
class Move:
    """One file to be moved, or to be copied where another image needs it too."""

    source: Path
    target: Path
    copy: bool = False


def leave_out(project: Project, names: list[str]) -> int:
    """Move images aside; also damaged ones. Returns how many.

    Raises:
        DatasetError: the demo is chosen, or there is no such image, or the disk refuses.
    """
    project.refuse_demo()
    with project.lock():
        dataset = project.dataset()
        damaged = (p.path for p in dataset.problems if p.path.suffix.casefold() in IMAGE_SUFFIXES)
        images = [*(record.path for record in (*dataset.records, *dataset.reg)), *damaged]
        return _move(project, names, images, project.image_folder, project.left_out_folder)


def take_back(project: Project, names: list[str]) -> int:
    """Move images that were left out back to where they were. Returns how many.

    Raises:
        DatasetError: there is no such image, or the disk refuses.
    """
    project.refuse_demo()
    with project.lock():
        found = project.left_out_folder.rglob("*")
        images = [path for path in found if path.suffix.casefold() in IMAGE_SUFFIXES]
        return _move(project, names, images, project.left_out_folder, project.image_folder)


def move_images(project: Project, folders: Mapping[str, str]) -> dict[str, str]:
    """Move images into other folders of the dataset, with captions, masks, crops and whether they are held
    out. A mask in a folder of masks moves next to its image.

    Args:
        project: the open one.
        folders: the folder of each image, below the dataset folder, by the image's name.

    Returns:
        The folder of each moved image before, by its name now.

    Raises:
        DatasetError: the demo is chosen, there is no such image or folder, a caption is in a table, or the
            disk refuses.
    """
    project.refuse_demo()
    with project.lock():
        root, dataset = project.image_folder, project.dataset()
        all_images = (*dataset.records, *dataset.reg, *dataset.loose)
        by_name = {relative_name(one.path, root): one for one in all_images}
        places = {name: _folder_below(root, folder) for name, folder in folders.items()}
        there = {
            name: place
            for name, place in places.items()
            if name not in by_name or (root / name).parent != place
        }
        images = [record.path for record in by_name.values()]
        leaving = [by_name[name] for name in there if name in by_name]
        users = Counter(record.mask for record in by_name.values())
        masks = {one.path: (mask, users[mask] > 1) for one in leaving if (mask := _mask_elsewhere(one, root))}
        by_path = {by_name[name].path: place for name, place in there.items() if name in by_name}
        moves, now = _plan_moves(list(there), images, root, by_path.__getitem__, masks)
        held, crops = read_holdout_list(root), read_crops(root)
        names = {fold_name(name): relative_name(path, root) for name, path in now.items()}
        # Under both names meanwhile, so that a kill parts none of them from its image.
        held |= {fold_name(new) for old, new in names.items() if old in held}
        crops |= {names[fold_name(old)]: crop for old, crop in crops.items() if fold_name(old) in names}
        _write_lists(root, held, crops)
        _carry_out(project, moves)
        crops = {name: crop for name, crop in crops.items() if fold_name(name) not in names}
        _write_lists(root, held - names.keys(), crops)
    return {
        relative_name(path, root): (root / name).parent.relative_to(root).as_posix()
        for name, path in now.items()
    }


def _folder_below(root: Path, folder: str) -> Path:
    """A folder of the dataset; DatasetError if there is none of that name."""
    place = Path(os.path.normpath(root / folder))
    inner = place.relative_to(root) if place.is_relative_to(root) else None
    # What a link leads to is not read.
    if inner is None or not os.path.isdir(place) or place.resolve() != root.resolve() / inner:
        raise DatasetError(f"The dataset has no folder {folder!r}; make it first.")
    if folder_kind(f"{inner.as_posix()}/x") == "mask" or any(map(is_junk, inner.parts)):
        raise DatasetError(f"Images in the folder {folder!r} are not trained on; choose another.")
    return place


def _mask_elsewhere(record: ImageRecord, root: Path) -> Path | None:
    """The mask of an image in a folder of masks; DatasetError if the image's caption is not beside it."""
    files = _set_of(record.path)
    has_text = any(file.suffix.casefold() in CAPTION_SUFFIXES for file in files)
    if not has_text and record.caption not in ("", concept_of(record, root).class_tokens):
        raise DatasetError(
            f"The caption of {record.path.name} is a row of a table, which names it by its folder; write it"
            f" into {record.path.stem}.txt and remove the row first."
        )
    return record.mask if record.mask not in (None, record.path, *files) else None


def _write_lists(root: Path, held: set[str], crops: Mapping[str, tuple[float, ...]]) -> None:
    if held != read_holdout_list(root):
        write_holdout_list(root, held)
    if crops != read_crops(root):
        write_crops(root, crops)


def list_left_out(project: Project) -> list[ImageRecord]:
    """The images that were left out, without damaged ones."""
    if project.uses_demo or not project.left_out_folder.is_dir():
        return []
    found = scan(project.left_out_folder, project.sizes)
    return [*found.records, *found.reg]


def _move(project: Project, names: list[str], images: list[Path], source: Path, into: Path) -> int:
    """Move images by their names below `source` to the same place below `into`, all in one step; returns how
    many.

    Raises:
        DatasetError: one does not exist, or the disk refuses; then none has moved.
    """
    moves, now = _plan_moves(names, images, source, lambda path: into / path.parent.relative_to(source))
    _carry_out(project, moves)
    return len(now)


def _plan_moves(
    names: list[str], images: list[Path], source: Path, folder_of: Callable[[Path], Path],
    masks: Mapping[Path, tuple[Path, bool]] = MappingProxyType({}),
) -> tuple[list[Move], dict[str, Path]]:  # fmt: skip
    """The moves of images with captions and masks, and where each image will be, by its name below `source`;
    `masks` are those that are elsewhere, and whether others have them too.

    Raises:
        DatasetError: one does not exist.
    """
    by_name = {relative_name(path, source): path for path in images}
    paths = {name: by_name.get(name) for name in names}
    moves: list[Move] = []
    now: dict[str, Path] = {}
    taken: dict[Path, set[str]] = {}
    leaving = set(paths.values())
    for name, path in paths.items():
        if path is None or not path.is_file():
            raise DatasetError(f"There is no image named {name!r} here.")
        folder = folder_of(path)
        files = _set_of(path)
        if folder not in taken:
            there = folder.iterdir() if folder.is_dir() else ()
            taken[folder] = {fold_name(one.stem) for one in there if one.suffix.casefold() in IMAGE_SUFFIXES}
        # An image of that name, or a caption for it, may have come or been left out meanwhile.
        endings = {file: file.name[len(path.stem) :] for file in files}
        stem = unused_stem(path.stem, taken[folder], folder, endings.values())
        taken[folder].add(fold_name(stem))
        now[name] = folder / (stem + path.suffix)
        # Other images that share its captions.
        beside = (other for other in path.parent.iterdir() if other.suffix.casefold() in IMAGE_SUFFIXES)
        same = {other for other in beside if fold_name(other.stem) == fold_name(path.stem)}
        shared = bool(same - leaving)
        for file, ending in endings.items():
            moves.append(Move(file, folder / (stem + ending), copy=shared and file != path))
        if path in masks:
            mask, several = masks[path]
            moves.append(Move(mask, folder / f"{stem}{MASK_ENDINGS[0]}{mask.suffix}", copy=several))
    return moves, now


def _carry_out(project: Project, moves: list[Move]) -> None:
    """Move files, all in one step.

    Raises:
        DatasetError: the disk refuses; then none has moved.
    """
    project.invalidate()
    try:
        move_files(moves, project.root)
    except OSError as error:
        what = Path(error.filename).name if error.filename else "The images"
        raise DatasetError(f"{what} cannot be moved ({error.strerror}); close what uses it.") from error
    for move in moves:
        project.sizes.carry(move.source, move.target)


def _set_of(image: Path) -> list[Path]:
    """An image, its captions and its masks."""
    endings = (*MASK_ENDINGS, *MASK_OF)
    ends = [f"{ending}{suffix}" for ending in endings for suffix in sorted(IMAGE_SUFFIXES)]
    names = [image.name, *(f"{image.stem}{end}" for end in (*CAPTION_SUFFIXES, *ends))]
    return [file for file in map(image.with_name, names) if file.is_file()]


def move_files(moves: list[Move], root: Path) -> None:
    """Move files below `root`, all or none.

    Raises:
        OSError: a file cannot be moved; those before it are moved back.
    """
    if not moves:
        return
    finish_moves(root)
    pairs = (((move.source, move.target), move.copy) for move in moves)
    rows = [[*(path.relative_to(root).as_posix() for path in paths), copy] for paths, copy in pairs]
    write_atomically(root / JOURNAL, json.dumps(rows).encode())
    done: list[Move] = []
    try:
        for move in moves:
            _apply(move)
            done.append(move)
    except OSError:
        for move in reversed(done):
            # The first error is the one to report.
            with contextlib.suppress(OSError):
                move.target.unlink() if move.copy else os.replace(move.target, move.source)
        (root / JOURNAL).unlink()
        raise
    (root / JOURNAL).unlink()


def finish_moves(root: Path) -> None:
    """Completes the moves of a killed process below `root`, if there are any.

    Raises:
        OSError: a file cannot be moved.
    """
    try:
        rows = json.loads(read_small_file(root / JOURNAL))
        moves = [Move(_journal_path(root, a), _journal_path(root, b), bool(copy)) for a, b, copy in rows]
    except FileNotFoundError:
        return
    except (ValueError, TypeError, RecursionError):  # not ours
        moves = []
    for move in moves:
        if os.path.lexists(move.source) and not os.path.lexists(move.target):
            _apply(move)
    (root / JOURNAL).unlink()


def _apply(move: Move) -> None:
    move.target.parent.mkdir(parents=True, exist_ok=True)
    if move.copy:
        with replacing(move.target, sync=False) as temporary:
            shutil.copyfile(move.source, temporary)
    else:
        os.replace(move.source, move.target)


def _journal_path(root: Path, name: str) -> Path:
    """A file of the journal; ValueError where it is not below `root`."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(name)
    return root / path
