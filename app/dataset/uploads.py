"""Import of images: files sent by a page, or a path on this computer, in a background thread.

A page sends file by file into a staging folder and then finishes the batch; after that nothing depends on the
page. One import at a time.
"""

import os
import shutil
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from app.templates import _, pluralize
from lora_core.data.images import IMAGE_SUFFIXES
from lora_core.data.importer import ARCHIVES, Imported, TransferMode, import_files, import_folder
from lora_core.errors import DatasetError, LoraError
from lora_core.model_files.detect import EMBEDDED
from lora_core.projects.project import DEFAULT_TITLE, DEMO_TITLE
from lora_core.projects.workspace import Projects
from lora_core.system.files import clear_abandoned, expand_home, parse_json

MOST_FILES = 100_000
MOST_BATCHES = 8
LARGEST_FILE = 500_000_000
LARGEST_ZIP = 20_000_000_000
LONGEST_LIST = 4_000_000
ROOM_LEFT = 200_000_000
"""Bytes that a disk keeps free, so that captions and the trainer's lines can still be written."""


class _BodyReader:
    """Reads the files of one request."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self.chunks = chunks
        self.held = b""

    async def listed(self) -> list[tuple[int, str, int]]:
        """What the first line says of the files.

        Raises:
            DatasetError: it says nothing of the kind.
        """
        while b"\n" not in self.held and len(self.held) < LONGEST_LIST:
            self.held += await anext(self.chunks, b"\n")
        try:
            line, self.held = self.held.split(b"\n", 1)
            listed = [(int(index), str(name), int(size)) for index, name, size in parse_json(line)]
        except (ValueError, TypeError, OverflowError) as error:
            raise DatasetError(_("The list of files did not arrive; drop them again.")) from error
        if any(not 0 <= index < MOST_FILES or size < 0 for index, _, size in listed):
            raise DatasetError(_("More than {:,} files cannot be taken at once; drop fewer.", MOST_FILES))
        return listed

    async def bytes(self, size: int, name: str) -> AsyncIterator[bytes]:
        """The next `size` bytes.

        Raises:
            DatasetError: the request ends before.
        """
        while size:
            if not self.held:
                self.held = await anext(self.chunks, b"")
            if not self.held:
                raise DatasetError(_("{name} did not arrive completely; drop it again.", name=name))
            part, self.held = self.held[:size], self.held[size:]
            size -= len(part)
            yield part


class _Cancelled(Exception):
    """The user cancelled the import."""


class Importer:
    """The one import of a window."""

    def __init__(self, projects: Projects, staging: Path) -> None:
        """Import into the open project; uploads are kept in `staging` until then."""
        self.projects, self.project = projects, projects.current
        self.staging = staging
        # Uploads of a killed window are useless; another window may still be taking its own.
        clear_abandoned(staging)
        self._batches: dict[str, dict[int, str]] = {}
        """Names on the page of the files being sent, by their number, which is their name in `staging`."""
        self._lock = threading.Lock()
        # Larger than those of a window before, whose pages would else wait for an import that went with it.
        self._state: dict[str, Any] = {"state": "idle", "number": time.time_ns() // 1_000_000}
        self._cancelled = 0
        """Number of the import that was cancelled last."""
        # Called once another project is open, and before an import counts as done.
        self.switched: Callable[[], object] = lambda: None
        self.after: Callable[[], object] = lambda: None

    def state(self) -> dict[str, Any]:
        """`state` (idle, working, done, failed), `phase`, `done`, `total`, `note`, the import's `number`, the
        `project` that it goes into, and `left_demo` if the form changed because of it."""
        return dict(self._state)

    @property
    def working(self) -> bool:
        """Whether an import is under way."""
        return bool(self._state["state"] == "working")

    def begin(self) -> str:
        """Start a batch; returns its name.

        Raises:
            DatasetError: the disk refuses.
        """
        while len(self._batches) >= MOST_BATCHES:
            # Batches of pages that were closed while sending.
            self.give_up(next(iter(self._batches)))
        folder = self.staging / f".{uuid.uuid4().hex}.{os.getpid()}.making"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise DatasetError(_("The folder {} cannot be made ({}).", folder, error.strerror)) from error
        self._batches[folder.name] = {}
        return folder.name

    async def receive(self, batch: str, chunks: AsyncIterator[bytes]) -> int:
        """Write the files of one parcel, counting their bytes as they come; returns how many.

        A parcel is a line of JSON, a list of (index, name, bytes), and then the files one after the other:
        small files would cost a request each otherwise.

        Raises:
            DatasetError: the batch is unknown, the request is incomplete, or a file is too large for its kind
                or for the disk.
        """
        names, folder = self._names(batch), self.staging / batch
        parcel = _BodyReader(chunks)
        listed = await parcel.listed()
        room = shutil.disk_usage(folder).free - ROOM_LEFT
        for index, name, size in listed:
            most = LARGEST_ZIP if name.casefold().endswith(ARCHIVES) else LARGEST_FILE
            if size > most:
                raise DatasetError(_("{} is larger than {:.0f} MB; leave it out.", name, most / 1e6))
            room -= size
            if room < 0:
                raise DatasetError(_("The disk is too full for {name}; free some space.", name=name))
            try:
                with open(folder / f"upload-{index}", "wb") as file:
                    async for part in parcel.bytes(size, name):
                        file.write(part)
            except OSError as error:
                raise DatasetError(
                    _("{} cannot be written ({}); free some space.", name, error.strerror)
                ) from error
            names[index] = name
        return len(listed)

    def _names(self, batch: str) -> dict[int, str]:
        if batch not in self._batches:
            raise DatasetError(_("This import is over; drop the files again."))
        return self._batches[batch]

    def finish(self, batch: str) -> None:
        """Import a batch.

        Raises:
            DatasetError: the batch is not known, or another import is under way.
        """
        names, folder = self._names(batch), self.staging / batch
        self._refuse_two()
        self._leave_demo()
        # The project of the request, even if another is opened before the thread begins.
        order, into = sorted(names), self.project.image_folder

        def work(way: TransferMode) -> Imported:
            try:
                paths = [folder / f"upload-{index}" for index in order]
                return import_files(paths, into, [names[n] for n in order], way)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

        # Where another import was quicker, the batch stays for a second try.
        self._start(work, "move")
        self._batches.pop(batch, None)

    def give_up(self, batch: str) -> None:
        """Discard a batch."""
        if self._batches.pop(batch, None) is not None:
            shutil.rmtree(self.staging / batch, ignore_errors=True)

    def from_path(self, text: str, link: bool) -> None:
        """Import a folder, zip or image of this computer, copied or linked.

        Raises:
            DatasetError: nothing is there, or another import is under way.
        """
        where = expand_home(text.strip().strip('"'))
        if not text.strip():
            raise DatasetError(_("Type the path of a folder of images first."))
        try:
            is_folder, is_file = where.is_dir(), where.is_file()
        except (OSError, ValueError):
            is_folder = is_file = False
        if not is_folder and not is_file:
            raise DatasetError(_("There is no folder at {where}.", where=where))
        self._refuse_two()
        self._leave_demo()
        if link:
            self.project.link(where if is_folder else where.parent)
        into = self.project.image_folder

        def work(way: TransferMode) -> Imported:
            return import_folder(where, into, way) if is_folder else import_files([where], into, way=way)

        self._start(work, "link" if link else "copy")

    def cancel(self) -> None:
        """Stop the running import after its current file; files added so far stay."""
        self._cancelled = self._state["number"]

    def _refuse_two(self) -> None:
        if self.working:
            raise DatasetError(_("Another import is running; wait until it is done."))

    def _leave_demo(self) -> None:
        """Open the project of the user's own images, so that they do not mix with the demo's runs."""
        if self.project.uses_demo and self.project.title == DEMO_TITLE:
            self.projects.open_titled(DEFAULT_TITLE)
            self.switched()

    def _start(self, work: Callable[[TransferMode], Imported], how: str) -> None:
        with self._lock:
            self._refuse_two()
            number = self._state["number"] + 1
            into = {"number": number, "project": self.project.path.name}
            self._state = {"state": "working", **into, "phase": "Looking", "done": 0, "total": 0}
        thread = threading.Thread(target=self._run, args=(work, how), daemon=True, name="import")
        thread.start()

    def _run(self, work: Callable[[TransferMode], Imported], how: str) -> None:
        project = self.project

        def report(phase: str, done: int, total: int) -> None:
            if self._cancelled == self._state["number"]:
                raise _Cancelled
            self._state = {**self._state, "phase": phase, "done": done, "total": total}

        state = "failed"
        note = _("The import failed because of a bug in LoRA Easel; its log has the details.")
        try:
            with project.importing():
                imported = work(TransferMode(how, report, project.sizes))
            project.notes = imported.skipped
            state, note = _summarize(imported)
            if imported.added and project.uses_demo:
                # The user's own images replace the demo, with a preset for them.
                with project.editing():
                    base = (project.draft().get("values") or {}).get("model.base", EMBEDDED)
                    project.update_draft(dataset="", level="", values={"model.base": base})
                self._state = {**self._state, "left_demo": True}
            self._state = {**self._state, "phase": "Reading captions", "done": 0, "total": 0}
            project.invalidate()
            self.after()
        except _Cancelled:
            note = _(
                "The import was cancelled. Files added so far stay; importing the same again skips them."
            )
            project.invalidate()
        except LoraError as error:
            note = str(error)
        except OSError as error:
            note = _("The images cannot be imported ({}); try it again.", error.strerror or error)
        finally:
            self._state = {**self._state, "state": state, "note": note}


def _summarize(imported: Imported) -> tuple[str, str]:
    """Whether anything came in or was here already, and a sentence on it."""
    pictures = sum(path.suffix.casefold() in IMAGE_SUFFIXES for path in imported.added)
    captions = len(imported.added) - pictures
    counts = [(pictures, "image"), (captions, "caption")]
    added = _(" and ").join(pluralize(count, word) for count, word in counts if count)
    same = sum(one.kind == "same picture" for one in imported.skipped)
    others = [one for one in imported.skipped if one.kind not in ("same picture", "already there", "taken")]
    parts = [_("{added} added.", added=added) if added else "" if same else _("Nothing was added.")]
    if same:
        parts.append(_("{images} already here, skipped.", images=pluralize(same, "image is", "images are")))
    if len(others) == 1:
        parts.append(_("1 file skipped: {sentence}", sentence=others[0].sentence))
    elif others:
        first = others[0].sentence
        parts.append(_("{count} files skipped, the first: {sentence}", count=len(others), sentence=first))
    return "done" if added or same else "failed", " ".join(filter(None, parts))
