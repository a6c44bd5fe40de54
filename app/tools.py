"""Other tools on this computer as the window offers them: looked for in the background, so that no page
waits."""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from lora_core.spec.other_tools import Tool, base_files, found_tools
from lora_core.spec.places import Places

Shelf = tuple[Tool, list[Path]]
"""A tool and the bases in its folders."""


class OtherTools:
    """What was found at the last look."""

    def __init__(self, places: Places, search: Callable[[Iterable[Path]], list[Tool]] = found_tools) -> None:
        """Look for tools with `search`, given the folders that a person added."""
        self._places = places
        self._search = search
        self._shelves: list[Shelf] = []
        self._looking = threading.Lock()

    def look(self, wait: bool = False) -> None:
        """Look again, in the background unless `wait`; one look at a time."""
        if not self._looking.acquire(blocking=wait):
            return
        thread = threading.Thread(target=self._look, daemon=True, name="other-tools")
        thread.start()
        if wait:
            thread.join()

    def _look(self) -> None:
        try:
            tools = self._search(self._places.folders())
            self._shelves = [(tool, base_files(tool)) for tool in tools]
        finally:
            self._looking.release()

    def shelves(self) -> list[Shelf]:
        """The tools found so far, each with its bases."""
        return self._shelves

    def lora_folders(self) -> list[tuple[str, Path]]:
        """Where tools look for LoRAs, as (tool, folder), each folder once."""
        found: dict[Path, tuple[str, Path]] = {}
        for tool, _ in self._shelves:
            if tool.loras is not None:
                found.setdefault(tool.loras.resolve(), (tool.name, tool.loras))
        return list(found.values())
