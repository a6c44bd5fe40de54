"""Other image tools on this computer: where their base models are and where they look for LoRAs.

A tool is recognised by files that only it has, and searched for in the usual places: the home folder, the top
of each drive, and where managers of tools say. Searching the entire disk would take minutes; folders can be
added by hand.
"""

import contextlib
import filecmp
import itertools
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lora_core.errors import RunError, wrap_os_errors
from lora_core.system.files import read_json, read_table, replacing, tokens_folder, write_atomically

LARGEST_SETTINGS = 1_000_000

Folders = tuple[list[Path], list[Path]]
"""Folders with bases, and those with LoRAs, the one that files go into first."""


def _json_path(file: Path, key: str) -> Path | None:
    found = read_json(file).get(key)
    return Path(found) if isinstance(found, str) and found else None


def _text(file: Path) -> str:
    """A small settings file, or "" where there is none."""
    try:
        small = file.stat().st_size <= LARGEST_SETTINGS
        return file.read_text(encoding="utf-8", errors="replace") if small else ""
    except OSError:
        return ""


def extra_model_paths(file: Path) -> Folders:
    """What ComfyUI's `extra_model_paths.yaml` adds: its checkpoints and its LoRA folders, one a line.

    A section with `is_default: true` goes before the others.
    """
    models: list[Path] = []
    loras: list[Path] = []
    for section in _extra_sections(file):
        texts = {key: value for key, value in section.items() if isinstance(value, str)}
        base = file.parent / _expanded(texts.get("base_path", ""))
        for key, found in (("checkpoints", models), ("loras", loras)):
            lines = texts.get(key, "").splitlines()
            found += [base / _expanded(line.strip()) for line in lines if line.strip()]
    return models, loras


def _extra_sections(file: Path) -> list[dict[str, Any]]:
    """The sections, those that are the default first; none if the file is not YAML."""
    import yaml

    try:
        values = yaml.safe_load(_text(file)).values()
    # A value that contradicts its tag (`!!int ""`) raises one of the other errors.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError):
        return []
    sections = [one for one in values if isinstance(one, dict)]
    return sorted(sections, key=lambda section: section.get("is_default") is not True)


def _expanded(text: str) -> str:
    return os.path.expandvars(os.path.expanduser(text))


def command_options(root: Path) -> dict[str, list[Path]]:
    """The folders that A1111's and Forge's `webui-user` files give on the command line, by option."""
    found: dict[str, list[Path]] = {}
    for name in ("webui-user.sh", "webui-user.bat"):
        for line in _text(root / name).splitlines():
            if re.match(r"\s*(#|::|@?rem\b)", line, re.I):
                continue
            line = line.replace('\\"', '"')
            options = re.finditer(r"--([a-z-]+-dirs?)(?:=|\s+)(?:\"([^\"]+)\"|'([^']+)'|([^\s\"']+))", line)
            for option in options:
                value = _expanded(option[2] or option[3] or option[4])
                found.setdefault(option[1].rstrip("s"), []).append(root / value)
    return found


def _webui(root: Path) -> Folders:
    options = command_options(root)
    tops = options.get("models-dir") or [path / "models" for path in options.get("data-dir", [])]
    tops = tops or [root / "models"]
    models = [*options.get("ckpt-dir", []), *(top / "Stable-diffusion" for top in tops)]
    return models, [*options.get("lora-dir", []), *(top / "Lora" for top in tops)]


def _sdnext(root: Path) -> Folders:
    models, diffusers, loras = (
        _json_path(root / "config.json", key) for key in ("ckpt_dir", "diffusers_dir", "lora_dir")
    )
    return (
        [root / path for path in (models, diffusers, "models/Stable-diffusion", "models/Diffusers") if path],
        [root / path for path in (loras, "models/Lora") if path],
    )


def _comfy(root: Path) -> Folders:
    file = root / "extra_model_paths.yaml"
    models, loras = extra_model_paths(file)
    own = root / "models" / "loras"
    default = any(section.get("is_default") is True for section in _extra_sections(file)[:1])
    return (
        [root / "models" / "checkpoints", root / "models" / "diffusers", *models],
        [*loras, own] if default else [own, *loras],
    )


def _invoke(root: Path) -> Folders:
    named = re.search(r"^models_dir:\s*([^#\n]+)", _text(root / "invokeai.yaml"), re.M)
    folder = named[1].strip().strip("\"'") if named else "models"
    # Its database lists its models: a file that is only put among them is not seen. Old versions import from
    # here.
    return [root / _expanded(folder)], [root / "autoimport" / "lora"]


FOLDERS: dict[str, Callable[[Path], Folders]] = {
    "webui": _webui, "sdnext": _sdnext, "comfy": _comfy, "invoke": _invoke,
}  # fmt: skip
"""From the root of a tool to its folders, which may not exist."""
MOST_ENTRIES, MOST_SECONDS = 4_000, 15.0

SMALLEST_BASE = 100_000_000
"""Bytes. Smaller files beside bases are adapters, embeddings and VAEs."""
MOST_FILES, MOST_DEPTH = 200, 4


def _table() -> dict[str, Any]:
    return read_table("other_tools.toml")


@dataclass(frozen=True)
class InstalledTool:
    """One tool on this computer: where it is installed, its folders with bases, and the one in which it looks
    for LoRAs, None where it has none that files can be put into."""

    name: str
    root: Path
    models: tuple[Path, ...]
    loras: Path | None


@dataclass(frozen=True)
class Machine:
    """Where to look for tools: folders whose children are searched, settings folders of programs, and
    environment variables."""

    places: tuple[Path, ...]
    settings: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def detect_machine() -> Machine:
    """The home folder, the drives and the settings folders of this computer."""
    home = Path.home()
    usual = [home / place for place in _table()["usual_places"]]
    if sys.platform == "darwin":
        settings = [home / "Library" / "Application Support"]
    else:
        usual += [home / place for place in _table()["personal_places"]]
        settings = [home / ".config", home / "AppData" / "Roaming", home / "AppData" / "Local"]
    if sys.platform != "win32":
        usual += [Path("/opt"), Path("/workspace")]
    # The top of other drives; the system drive on Linux and macOS holds no user programs.
    for drive in psutil.disk_partitions(all=False):
        if drive.mountpoint not in ("/", "/boot", "/boot/efi") and drive.fstype and "cdrom" not in drive.opts:
            usual += [Path(drive.mountpoint) / place for place in ("", "AI")]
    return Machine(tuple(usual), tuple(settings), os.environ)


def find_tools(
    extra: Iterable[Path] = (), machine: Machine | None = None, seconds: float = MOST_SECONDS
) -> list[InstalledTool]:
    """The tools on this computer, in the order in which they were found, each once.

    Args:
        extra: folders that the user added: of a tool, or of models.
        machine: where to look; this computer where it is None.
        seconds: time limit; the search then returns its results so far.
    """
    search = _Search(seconds)
    tools: dict[Path, InstalledTool] = {}
    for folder in extra:
        found = [tool for place in search.within(folder) if (tool := recognise_tool(place))]
        if not found and folder.is_dir():
            found = [InstalledTool(folder.name or str(folder), folder, (folder,), None)]
        tools |= {tool.root.resolve(): tool for tool in found}
    for place in search.candidates(machine or detect_machine()):
        tool = recognise_tool(place)
        if tool is not None:
            tools.setdefault(tool.root.resolve(), tool)
    return list(tools.values())


def recognise_tool(folder: Path) -> InstalledTool | None:
    """The tool that is installed in `folder` itself, if one is."""
    try:
        for row in _table()["tools"]:
            if any(all((folder / path).exists() for path in paths) for paths in row["markers"]):
                if "folders" in row:
                    models, loras = FOLDERS[row["folders"]](folder)
                else:
                    models, loras = [folder / row["models"]], [folder / row["loras"]]
                there = tuple(dict.fromkeys(path for path in models if path.is_dir()))
                target = next((path for path in loras if path.is_dir()), None)
                return InstalledTool(row["name"], folder, there, target)
    except OSError:  # An unreadable folder is skipped.
        pass
    return None


class _Search:
    """A search that ends: after a time, and after a number of names looked at."""

    def __init__(self, seconds: float, entries: int = MOST_ENTRIES) -> None:
        self.ends_at = time.monotonic() + seconds
        self.entries_left = entries

    def entries(self, folder: Path) -> list["os.DirEntry[str]"]:
        """The entries of `folder`; fewer once the search is over, none if it cannot be read."""
        found: list[os.DirEntry[str]] = []
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                self.entries_left -= 1
                if self.entries_left < 0 or time.monotonic() > self.ends_at:
                    break
                found.append(entry)
        return found

    def children(self, folder: Path) -> list[Path]:
        """The folders in `folder` that are not hidden, sorted."""
        found = []
        for entry in self.entries(folder):
            with contextlib.suppress(OSError):
                if not entry.name.startswith(".") and entry.is_dir():
                    found.append(Path(entry.path))
        return sorted(found)

    def within(self, folder: Path) -> Iterator[Path]:
        """`folder`, and where downloads and managers keep the tool itself."""
        yield folder
        yield from (folder / name for name in _table()["nested"])
        for name in _table()["managed"]:
            for child in self.children(folder / name):
                yield child
                yield child / "app"

    def candidates(self, machine: Machine) -> Iterator[Path]:
        """Folders that may be a tool's: configured ones first, then those with a matching name."""
        if "INVOKEAI_ROOT" in machine.environment:
            yield Path(machine.environment["INVOKEAI_ROOT"])
        for settings in machine.settings:
            for program, file, key in (
                ("ComfyUI", "config.json", "basePath"),
                ("StabilityMatrix", "library.json", "LibraryPath"),
            ):
                named = _json_path(settings / program / file, key)
                yield from self.within(named) if named else ()
        for place in dict.fromkeys((*machine.places, *machine.settings)):
            for child in self.children(place):
                if any(word in child.name.lower() for word in _table()["words"]):
                    yield from self.within(child)


def list_base_files(tool: InstalledTool, most: int = MOST_FILES, seconds: float = MOST_SECONDS) -> list[Path]:
    """What may be a base in a tool's folders: large single files and diffusers folders, newest first.

    Args:
        tool: the tool.
        most: how many at most.
        seconds: time limit; the search then returns its results so far.
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
            for entry in search.entries(folder):
                if entry.name.lower().endswith((".safetensors", ".ckpt")) and entry.is_file():
                    status = entry.stat()
                    if status.st_size >= SMALLEST_BASE:
                        found[Path(entry.path)] = status.st_mtime
        except OSError:
            continue
        if depth < MOST_DEPTH:
            inside = (one for one in search.children(folder) if one.name.lower() not in _table()["no_bases"])
            waiting += [(one, depth + 1) for one in inside]
    return sorted(found, key=lambda path: (-found[path], str(path)))[:most]


SIDE_FILES = (".json", ".preview.png")
"""Files that other tools read next to `<stem>.safetensors`: trigger words and strength, and an image."""


@dataclass(frozen=True)
class CopiedFile:
    """The copied adapter and its side files; `kept` are existing side files that differ, `renamed` means that
    its name was taken. `tokens` is the folder of its new tokens, or "": their files are not copied, as tools
    would list them as LoRAs beside it."""

    file: Path
    beside: tuple[Path, ...]
    kept: tuple[Path, ...]
    renamed: bool
    tokens: str = ""


def copy_export(file: Path, folder: Path) -> CopiedFile:
    """Copy an adapter and its side files into `folder`, under a name that is free there.

    Raises:
        RunError: no such folder, or it cannot be written.
    """
    if not folder.is_dir():
        raise RunError(f"There is no folder at {folder}; make it first, or choose another.")
    stems = (f"{file.stem}-{number}" if number > 1 else file.stem for number in itertools.count(1))
    targets = ((stem, folder / f"{stem}{file.suffix}") for stem in stems)
    stem, target = next(one for one in targets if not os.path.lexists(one[1]) or _same(file, one[1]))
    beside, kept = [], []
    # The adapter comes last: a tool that sees it finds what belongs to it.
    pairs = [(file.with_name(f"{file.stem}{end}"), folder / f"{stem}{end}") for end in SIDE_FILES]
    with wrap_os_errors(RunError, f"{folder} cannot be written", "; nothing was replaced."):
        for source, copy in [(one, other) for one, other in pairs if one.is_file()] + [(file, target)]:
            if _same(source, copy):
                continue
            if copy.exists():
                # The tool or its user wrote this one.
                kept.append(copy)
                continue
            with replacing(copy) as temporary:
                shutil.copyfile(source, temporary)
            beside.append(copy)
    others, tokens = tuple(one for one in beside if one != target), tokens_folder(file)
    named = stem != file.stem, str(tokens) if tokens.is_dir() else ""
    return CopiedFile(target, others, tuple(kept), *named)


def _same(one: Path, other: Path) -> bool:
    try:
        return other.is_file() and filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


MOST_KEPT = 24


class RecentPaths:
    """Lists of paths in one small file, the newest first; a broken file counts as empty.

    Kinds: "bases" that were chosen, "folders" of tools or models that the user added, "lora_folders" that
    adapters were copied to.
    """

    def __init__(self, file: Path) -> None:
        """Remember in `file`, which need not be there yet."""
        self._file = file
        self._lock = threading.Lock()
        self._lists: dict[str, list[str]] = {
            kind: [path for path in paths if isinstance(path, str)]
            for kind, paths in read_json(file).items()
            if isinstance(paths, list)
        }

    def read(self, kind: str) -> list[str]:
        """The paths of a kind."""
        with self._lock:
            return list(self._lists.get(kind, []))

    def keep(self, kind: str, path: str) -> None:
        """Put a path at the front of its kind."""
        with self._lock:
            before = self._lists.get(kind, [])
            after = [path, *(other for other in before if other != path)][:MOST_KEPT]
            if after != before:
                self._lists[kind] = after
                write_atomically(self._file, json.dumps(self._lists, indent=1, ensure_ascii=False).encode())
