"""What helps to find a defect, in one zip that can be shown to anybody: no pictures, no paths, no names of
people.

Whatever a person chose to write (names of runs and files, trigger words, prompts, captions) is replaced, and
so is every path; settings, versions, events and the log stay.
"""

import getpass
import importlib.metadata
import io
import json
import platform
import re
import socket
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import tomli_w

from lora_core.spec.config import RunConfig
from lora_core.spec.errors import ConfigError
from lora_core.spec.paths import ASSETS
from lora_core.spec.processes import log_tail
from lora_core.spec.run_folder import RunFolder

LOG_LINES = 2000
LARGEST_EVENTS = 2_000_000
SHORTEST_WORD = 3
PATH = re.compile(r"""(?:[A-Za-z]:)?(?:[\\/][^\\/\s"'<>|:*?,;()]+){2,}[\\/]?""")
TAIL = r"""((?:[\\/][^"'<>\n:]*)?[\\/][^\\/\s"'<>|:*?,;()]*)?"""
"""What may follow after a known folder: names with spaces too, up to the last separator of the line."""
OURS = ("<run>", "<app>", "<python>")
WRITTEN = ("dataset.trigger", "preview.prompts", "name")


def debug_zip(run: RunFolder, workspace: Path, card: str = "") -> bytes:
    """The zip of one run; `card` is the name of the graphics card."""
    clean = Cleaner(_known(run, workspace))
    files = {
        "about.json": json.dumps(_about(card), indent=1),
        "settings.toml": _settings(run),
        "events.jsonl": _events(run),
        "plan.json": _read(run.plan_file),
        "exit.json": _read(run.path / "exit.json"),
        "log.txt": "\n".join(log_tail(run.log_file, LOG_LINES)),
    }
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            if text:
                archive.writestr(name, clean.text(text).encode("utf-8", "replace"))
    return made.getvalue()


class Cleaner:
    """Takes out of a text what says who wrote it and where it lies."""

    def __init__(self, known: Iterable[tuple[str, str]]) -> None:
        """Replace known paths (what, by what), then every path that is left, then known words; each time the
        longest first."""
        pairs = sorted({pair for pair in known if len(pair[0]) >= SHORTEST_WORD}, key=lambda p: -len(p[0]))
        self._by = {what.lower(): instead for what, instead in pairs}
        self._paths = _any_of([what for what, _ in pairs if _is_path(what)], TAIL)
        self._words = _any_of([what for what, _ in pairs if not _is_path(what)], whole=True)

    def text(self, text: str) -> str:
        """The text without them."""
        text = PATH.sub(_shortened, self._paths.sub(self._known_path, text))
        return self._words.sub(lambda found: self._by[found[1].lower()], text)

    def _known_path(self, found: re.Match[str]) -> str:
        """What lies below our own folders may be read; what a person's folders hold is called as they
        like."""
        instead, tail = self._by[found[1].lower()], found[2] or ""
        return instead + (tail if instead in OURS else PurePosixPath(tail.replace("\\", "/")).suffix)


def _any_of(texts: list[str], tail: str = "", whole: bool = False) -> re.Pattern[str]:
    either = f"({'|'.join(re.escape(text) for text in texts) or '(?!)'})"
    # A picture called `car` is no reason to spoil each `card`.
    return re.compile(rf"(?<!\w){either}(?!\w)" if whole else f"{either}{tail}", re.IGNORECASE)


def _shortened(found: re.Match[str]) -> str:
    """A path that is nobody's own keeps its ending; of any other the kind of file stays."""
    path = found[0].replace("\\", "/")
    if "site-packages/" in path:
        return f"<python>/{path.partition('site-packages/')[2]}"
    return f"<path>{PurePosixPath(path).suffix}"


def _known(run: RunFolder, workspace: Path) -> list[tuple[str, str]]:
    """All that is known to be somebody's, and what stands in its place."""
    pairs: list[tuple[str, str]] = []
    for path, instead in (
        (run.path, "<run>"),
        (workspace, "<workspace>"),
        (ASSETS.parent, "<app>"),
        (Path(sys.prefix), "<python>"),
        (Path.home(), "<home>"),
    ):
        # JSON and Windows write the same path in different ways.
        for one in {str(path), str(path.resolve()), path.as_posix()}:
            pairs += [(form, instead) for form in _forms(one)]
    pairs += [(_user(), "<user>"), (socket.gethostname(), "<computer>"), (run.name, "<run name>")]
    config = _config(run)
    if config is not None:
        for name in ("dataset.path", "model.base", "model.vae", "adapter.init"):
            text = str(config.get(name))
            if _is_path(text):
                pairs += [(form, f"<{name}>") for form in _forms(text)]
        pairs.append((config.dataset.trigger, "<trigger>"))
        pairs += [(prompt, "<prompt>") for prompt in config.preview.prompts]
    for event in run.progress().previews:
        pairs += [(prompt, "<prompt>") for prompt in event.prompts]
    return pairs + _pictures(run)


def _config(run: RunFolder) -> RunConfig | None:
    try:
        return run.config()
    except ConfigError:
        return None


def _forms(text: str) -> set[str]:
    """A text as it is, and as JSON writes it with and without escapes for letters."""
    return {text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}


def _pictures(run: RunFolder) -> list[tuple[str, str]]:
    """The names of the pictures, which `inputs.json` lists, and of those that are new since."""
    try:
        names = list(json.loads(run.inputs_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        names = []
    found = []
    for number, name in enumerate(dict.fromkeys([*names, *run.progress().changed]), 1):
        path = PurePosixPath(str(name).removeprefix("the picture "))
        if path.suffix and str(name).startswith("the picture "):
            found += [(part, f"picture {number}") for part in (str(path), path.name, path.stem)]
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return ""


def _is_path(text: str) -> bool:
    return "/" in text or "\\" in text


def _settings(run: RunFolder) -> str:
    """The settings, paths cut down to a name and what a person wrote left out."""
    config = _config(run)
    if config is None:
        return ""
    values = config.to_dict()
    for name in WRITTEN:
        section, _, key = name.rpartition(".")
        table = values[section] if section else values
        table[key] = (
            [f"<prompt {i + 1}>" for i in range(len(table[key]))] if isinstance(table[key], list) else ""
        )
    return tomli_w.dumps(_cut(values))


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cut(item) for key, item in value.items()}
    if isinstance(value, str) and _is_path(value):
        return f"<path>{PureWindowsPath(value).suffix}"
    return value


def _events(run: RunFolder) -> str:
    """The events; of those that carry prompts only how many there were."""
    lines = []
    for line in _read(run.events_file, LARGEST_EVENTS).splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict):
            if "prompts" in values:
                values["prompts"] = len(values["prompts"])
            if "changed" in values:
                values["changed"] = len(values["changed"])
            # Names of pictures are looked for as they are written, which escapes would hide.
            lines.append(json.dumps(values, ensure_ascii=False))
    return "\n".join(lines)


def _read(path: Path, most: int = 200_000) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - most))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _about(card: str) -> dict[str, Any]:
    names = ("lora-easel", "torch", "diffusers", "transformers", "gradio", "safetensors")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "card": card or "none",
        "versions": versions,
    }
