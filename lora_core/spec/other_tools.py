"""Other picture tools on this computer: where their bases lie, and where they look for LoRAs.

A tool is known by files that only it has, and looked for where people put such tools: below the home folder,
at the top of each drive, and where managers of tools say. Never deeper: a search of the whole disk would take
minutes and wake up drives, and a person can always add a folder by hand.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from lora_core.spec.tool_settings import KINDS, Kind, json_path

WORDS = (
    "comfy",
    "webui",
    "forge",
    "automatic",
    "stable-diffusion",
    "stable diffusion",
    "stablediffusion",
    "sdnext",
    "sd.next",
    "invoke",
    "fooocus",
    "stabilitymatrix",
    "stability matrix",
    "pinokio",
)
"""A folder whose name holds one of these is looked into."""
NESTED = ("webui", "ComfyUI", "app", "Data")
"""Where a download's folder keeps the tool itself."""
MANAGED = ("Packages", "api", "Data/Packages")
"""Where managers of tools keep one folder a tool."""
USUAL_PLACES = ("", "AI", "ai", "apps", "git", "src", "Projects", "projects", "Programs")
# On a Mac the system asks a person for leave before a program looks into these.
PERSONAL_PLACES = ("Documents", "Desktop", "Downloads")
MOST_ENTRIES, MOST_SECONDS = 4_000, 2.0

SMALLEST_BASE = 100_000_000
"""Bytes. Smaller files beside bases are adapters, embeddings and VAEs."""
MOST_FILES, MOST_DEPTH = 200, 4
NO_BASES = {
    "lora", "loras", "lycoris", "vae", "controlnet", "control_net", "embedding", "embeddings", "clip",
    "clip_vision", "clip_embed", "text_encoders", "t5_encoder", "ip_adapter", "t2i_adapter", "upscale_models",
    "esrgan", "spandrel_image_to_image", "hypernetworks", "vae-approx", ".cache",
}  # fmt: skip
"""Folders among models that hold other things."""


@dataclass(frozen=True)
class Tool:
    """One tool on this computer.

    Attributes:
        name: what people call it.
        root: where it is installed.
        models: folders with bases.
        loras: the folder in which it looks for LoRAs, or None where it has none that files can be put into.
    """

    name: str
    root: Path
    models: tuple[Path, ...]
    loras: Path | None


@dataclass(frozen=True)
class Machine:
    """Where tools may lie.

    Attributes:
        places: folders whose children are looked at.
        settings: folders in which programs keep their settings.
        environment: variables.
    """

    places: tuple[Path, ...]
    settings: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def this_machine() -> Machine:
    """The home folder, the drives and the settings folders of this computer."""
    home = Path.home()
    usual = [home / place for place in USUAL_PLACES]
    if sys.platform == "darwin":
        settings = [home / "Library" / "Application Support"]
    else:
        usual += [home / place for place in PERSONAL_PLACES]
        settings = [home / ".config", home / "AppData" / "Roaming", home / "AppData" / "Local"]
    if sys.platform != "win32":
        usual += [Path("/opt"), Path("/workspace")]
    # The top of other drives; the system's own on Linux and macOS holds no programs of a person.
    for drive in psutil.disk_partitions(all=False):
        if drive.mountpoint not in ("/", "/boot", "/boot/efi") and drive.fstype and "cdrom" not in drive.opts:
            usual += [Path(drive.mountpoint) / place for place in ("", "AI")]
    return Machine(tuple(usual), tuple(settings), os.environ)


def found_tools(
    extra: Iterable[Path] = (), machine: Machine | None = None, seconds: float = MOST_SECONDS
) -> list[Tool]:
    """The tools on this computer, in the order in which they were found, each once.

    Args:
        extra: folders that a person added: of a tool, or just of models.
        machine: where to look; this computer where it is None.
        seconds: after so long the search ends with what it has.
    """
    search = _Search(seconds)
    tools: dict[Path, Tool] = {}
    for folder in extra:
        found = [tool for place in search.within(folder) if (tool := recognised(place))]
        if not found and folder.is_dir():
            found = [Tool(folder.name or str(folder), folder, (folder,), None)]
        tools |= {tool.root.resolve(): tool for tool in found}
    for place in search.candidates(machine or this_machine()):
        tool = recognised(place)
        if tool is not None:
            tools.setdefault(tool.root.resolve(), tool)
    return list(tools.values())


def recognised(folder: Path) -> Tool | None:
    """The tool that is installed in `folder` itself, if one is."""
    try:
        kind = next((kind for kind in KINDS if _marked(folder, kind)), None)
        if kind is None:
            return None
        models, loras = kind.folders(folder)
        there = tuple(dict.fromkeys(path for path in models if path.is_dir()))
        return Tool(kind.name, folder, there, next((path for path in loras if path.is_dir()), None))
    except OSError:
        # A folder that may not be read is nobody's; the next one may.
        return None


def _marked(folder: Path, kind: Kind) -> bool:
    return any(all((folder / name).exists() for name in names) for names in kind.markers)


class _Search:
    """A search that ends: after a time, and after a number of names looked at."""

    def __init__(self, seconds: float, entries: int = MOST_ENTRIES) -> None:
        self.ends_at = time.monotonic() + seconds
        self.entries_left = entries

    def children(self, folder: Path) -> list[Path]:
        """The folders in `folder`, sorted; none where it cannot be read or the search is over."""
        found = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    self.entries_left -= 1
                    if self.entries_left < 0 or time.monotonic() > self.ends_at:
                        break
                    if not entry.name.startswith(".") and entry.is_dir():
                        found.append(Path(entry.path))
        except OSError:
            return sorted(found)
        return sorted(found)

    def within(self, folder: Path) -> Iterator[Path]:
        """`folder`, and where downloads and managers keep the tool itself."""
        yield folder
        yield from (folder / name for name in NESTED)
        for name in MANAGED:
            for child in self.children(folder / name):
                yield child
                yield child / "app"

    def candidates(self, machine: Machine) -> Iterator[Path]:
        """Folders that may be a tool's: first those that somebody names, then those with a telling name."""
        if "INVOKEAI_ROOT" in machine.environment:
            yield Path(machine.environment["INVOKEAI_ROOT"])
        for settings in machine.settings:
            for program, file, key in (
                ("ComfyUI", "config.json", "basePath"),
                ("StabilityMatrix", "library.json", "LibraryPath"),
            ):
                named = json_path(settings / program / file, key)
                yield from self.within(named) if named else ()
        for place in dict.fromkeys((*machine.places, *machine.settings)):
            for child in self.children(place):
                if any(word in child.name.lower() for word in WORDS):
                    yield from self.within(child)


def base_files(tool: Tool, most: int = MOST_FILES, seconds: float = MOST_SECONDS) -> list[Path]:
    """What may be a base in a tool's folders: large single files and diffusers folders, newest first.

    Args:
        tool: the tool.
        most: how many at most.
        seconds: after so long the search ends with what it has.
    """
    search = _Search(seconds)
    seen: set[tuple[int, int]] = set()
    found: dict[Path, float] = {}
    waiting = [(folder, 0) for folder in tool.models]
    while waiting:
        folder, depth = waiting.pop(0)
        try:
            status = folder.stat()
            # Links are followed, as tools share folders by them, but no folder is looked into twice.
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            if (folder / "model_index.json").is_file():
                found[folder] = status.st_mtime
                continue
            found |= _large_files(folder, search)
        except OSError:
            continue
        if depth < MOST_DEPTH:
            waiting += [(c, depth + 1) for c in search.children(folder) if c.name.lower() not in NO_BASES]
    return sorted(found, key=lambda path: (-found[path], str(path)))[:most]


def _large_files(folder: Path, search: _Search) -> dict[Path, float]:
    """Files of `folder` that are as large as bases are, with their times."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            search.entries_left -= 1
            if search.entries_left < 0 or time.monotonic() > search.ends_at:
                break
            if entry.name.lower().endswith((".safetensors", ".ckpt")) and entry.is_file():
                status = entry.stat()
                if status.st_size >= SMALLEST_BASE:
                    found[Path(entry.path)] = status.st_mtime
    return found
