"""What a workspace remembers of places outside it: bases that were used, folders that were added, and where
LoRAs were copied to."""

import json
import threading
from pathlib import Path
from typing import Any

from lora_core.spec.paths import write_atomically
from lora_core.spec.untrusted import parsed_json

MOST_KEPT = 24


class Places:
    """Three lists in one small file, the newest first; a broken file counts as empty."""

    def __init__(self, file: Path) -> None:
        """Remember in `file`, which need not be there yet."""
        self.file = file
        self._lock = threading.RLock()
        self._lists = self._read()

    def _read(self) -> dict[str, list[str]]:
        try:
            found: Any = parsed_json(self.file.read_bytes())
        except (OSError, ValueError):
            return {}
        if not isinstance(found, dict):
            return {}
        return {k: [x for x in v if isinstance(x, str)] for k, v in found.items() if isinstance(v, list)}

    def bases(self) -> list[str]:
        """Bases that were chosen before."""
        return self._kept("bases")

    def folders(self) -> list[Path]:
        """Folders of tools or of models that a person added."""
        return [Path(name) for name in self._kept("folders")]

    def lora_folders(self) -> list[Path]:
        """Folders that LoRAs were copied to, the last one first."""
        return [Path(name) for name in self._kept("lora_folders")]

    def keep_base(self, name: str) -> None:
        """Remember a base that was chosen."""
        self._keep("bases", name)

    def keep_folder(self, folder: Path) -> None:
        """Remember a folder of a tool or of models."""
        self._keep("folders", str(folder))

    def keep_lora_folder(self, folder: Path) -> None:
        """Remember where LoRAs go."""
        self._keep("lora_folders", str(folder))

    def _kept(self, kind: str) -> list[str]:
        with self._lock:
            return list(self._lists.get(kind, []))

    def _keep(self, kind: str, name: str) -> None:
        with self._lock:
            before = self._lists.get(kind, [])
            after = [name, *(other for other in before if other != name)][:MOST_KEPT]
            if after != before:
                self._lists[kind] = after
                write_atomically(self.file, json.dumps(self._lists, indent=1, ensure_ascii=False).encode())
