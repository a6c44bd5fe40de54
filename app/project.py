"""A project: the person's pictures and the form not yet sent, both on disk, so that nothing typed is ever
lost."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_core.dataset.folder import Dataset, ImageRecord, Problem, scan, write_caption
from lora_core.spec.errors import DatasetError
from lora_core.spec.paths import DEMO_TRAIN, write_atomically

DEMO = "demo"
DEFAULT_TITLE = "My pictures"


class Project:
    """One project folder: `pictures/` with copies and captions, `draft.json` with the unsent form."""

    def __init__(self, path: Path, title: str = DEFAULT_TITLE) -> None:
        """Open the project at `path`, making its folders if absent."""
        self.path = path
        self.title = title
        self.pictures = path / "pictures"
        self.pictures.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._draft: dict[str, Any] = self._read_draft()
        self._scanned: tuple[object, Dataset] | None = None
        self.notes: list[Problem] = []

    def _read_draft(self) -> dict[str, Any]:
        try:
            draft = json.loads((self.path / "draft.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return draft if isinstance(draft, dict) else {}

    def draft(self) -> dict[str, Any]:
        """A copy of the unsent form."""
        with self._lock:
            return dict(self._draft)

    def keep(self, **changes: Any) -> None:
        """Put values into the draft and write it, if anything changed."""
        with self._lock:
            changed = {**self._draft, **changes}
            if changed != self._draft:
                self._draft = changed
                write_atomically(self.path / "draft.json", json.dumps(changed, indent=1).encode())

    @property
    def uses_demo(self) -> bool:
        """Whether the demo's pictures are chosen in place of the person's own."""
        return bool(self.draft().get("dataset") == DEMO)

    @property
    def dataset_folder(self) -> Path:
        """The folder whose pictures are shown and trained on."""
        return DEMO_TRAIN if self.uses_demo else self.pictures

    @property
    def dataset_title(self) -> str:
        """What the header calls the pictures."""
        return "Demo pictures" if self.uses_demo else self.title

    def dataset(self) -> Dataset:
        """The pictures, read again only where the folder changed or `forget()` was called."""
        folder = self.dataset_folder
        with self._lock:
            try:
                key: object = (folder, folder.stat().st_mtime_ns)
            except OSError:
                return Dataset([], [])
            if self._scanned is None or self._scanned[0] != key:
                self._scanned = (key, scan(folder))
            return self._scanned[1]

    def forget(self) -> None:
        """Have the folder read again at the next look."""
        with self._lock:
            self._scanned = None

    def named(self, name: str) -> ImageRecord:
        """The picture of that name below the dataset folder.

        Raises:
            DatasetError: there is none.
        """
        folder = self.dataset_folder
        for record in self.dataset().records:
            if relative_name(record.path, folder) == name:
                return record
        raise DatasetError(f"There is no picture named {name!r} in the dataset any more.")

    def save_caption(self, name: str, text: str) -> None:
        """Write a picture's caption beside it.

        Raises:
            DatasetError: there is no such picture, or it is one of the demo's, or the disk refuses.
        """
        if self.uses_demo:
            raise DatasetError(
                "The demo's captions stay as they are; drop your own pictures to write captions."
            )
        record = self.named(name)
        write_caption(record.path, text)
        with self._lock:
            if self._scanned is not None:
                key, old = self._scanned
                fresh = [replace(r, caption=text) if r.path == record.path else r for r in old.records]
                folder = self.dataset_folder
                # Writing the caption touched the folder; it need not be read again for that.
                if isinstance(key, tuple) and key[0] == folder:
                    key = (folder, folder.stat().st_mtime_ns)
                self._scanned = (key, Dataset(fresh, old.problems))

    def leave_out(self, name: str) -> None:
        """Move a picture and its caption into the project's `left out` folder, from where it can be taken
        back.

        Raises:
            DatasetError: there is no such picture, or it is one of the demo's.
        """
        if self.uses_demo:
            raise DatasetError("The demo's pictures stay as they are.")
        record = self.named(name)
        aside = self.path / "left out"
        aside.mkdir(exist_ok=True)
        for path in (record.path, record.path.with_suffix(".txt")):
            if path.is_file():
                path.replace(aside / path.name)
        self.forget()


def relative_name(path: Path, folder: Path) -> str:
    """A picture's name below its dataset folder, with forward slashes."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
