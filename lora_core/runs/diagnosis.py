"""Why a run broke off, told from what it left on disk, and from which step it would go on.

Whoever starts a trainer writes down how its process ended, in `exit.json`, with what was known of its memory;
a process that is killed cannot do so itself. Where nobody did, the events, the log and the time at which the
machine was started have to do.
"""

import contextlib
import getpass
import importlib.metadata
import io
import json
import math
import platform
import re
import signal
import socket
import sys
import time
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import psutil
import tomli_w

from lora_core.errors import AdapterFileError, ConfigError
from lora_core.model_files.header import read_header
from lora_core.runs.events import read_events
from lora_core.runs.folder import RunFolder
from lora_core.runs.progress import Progress
from lora_core.settings.config import RunConfig
from lora_core.system.paths import ASSETS, write_atomically
from lora_core.system.processes import log_tail
from lora_core.system.untrusted import check_fields, parse_json

GIGABYTE = 1e9
LESS_MEMORY = "lower train.batch_size or train.resolution, or set train.checkpointing"
NEARLY_FULL = 0.1
"""A killed process is thought to be the victim of full memory where less than this share was left."""
MOST_OF_IT = 0.75
"""Or where it alone held this share of all memory."""
NO_MEMORY_CODES = (0xC0000017, 0xC000012D, 0xE0000008)
"""Windows: no memory, the commit limit, torch's own allocator."""
NATIVE_CODES = (0xC0000005, 0xC0000409, 0xC000001D, 0xC00000FD)
"""Windows: access violation, broken stack, illegal instruction, stack overflow."""
NATIVE_SIGNALS = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT", "SIGTRAP")
LINES_LOOKED_AT = 60
MOST_WORDS = 300


@dataclass(frozen=True)
class ExitRecord:
    """How a trainer's process ended, as seen by its parent.

    Attributes:
        code: the exit code; the signal's number with a minus where one ended it.
        time: when, in seconds since the epoch.
        events: bytes of the run's events when the process was started.
        written: and when it had ended; more than that comes from a later process, which nobody watched.
        log: bytes of the run's log when it was started.
        held: memory that it held when it was last looked at, in bytes.
        free: memory that was free then.
        total: memory of the machine, or what it may use of it.
        kills: how often the system killed something for lack of memory while it ran.
    """

    code: int
    time: float
    events: int = 0
    written: int = 0
    log: int = 0
    held: int = 0
    free: int = 0
    total: int = 0
    kills: int = 0

    @property
    def out_of_memory(self) -> bool:
        """Whether memory had all but run out when it was last looked at."""
        return bool(self.total) and (
            self.free < NEARLY_FULL * self.total or self.held > MOST_OF_IT * self.total
        )


class ExitRecorder:
    """Lets the parent of a trainer write down how its process ended, since one that is killed cannot."""

    def __init__(self, run: RunFolder) -> None:
        """Begin before the process is started."""
        self._run = run
        self._events = _size(run.events_file)
        self._log = _size(run.log_file)
        self._kills = _oom_kills()
        self._memory = (0, 0, 0)
        with contextlib.suppress(OSError):
            exit_file(run).unlink(missing_ok=True)

    def sample_memory(self, pid: int) -> None:
        """Note how much memory the process holds and how much is left."""
        try:
            held = psutil.Process(pid).memory_info().rss
            memory = psutil.virtual_memory()
        except psutil.Error:
            return
        if held:
            self._memory = (held, memory.available, memory.total)

    def record(self, code: int) -> ExitRecord:
        """Write down how it ended; a disk that takes nothing is no reason to fail.

        Args:
            code: as `Popen.returncode`.
        """
        kills = max(0, _oom_kills() - self._kills)
        written = _size(self._run.events_file)
        found = ExitRecord(code, time.time(), self._events, written, self._log, *self._memory, kills)
        with contextlib.suppress(OSError):
            write_atomically(exit_file(self._run), json.dumps(asdict(found)).encode())
        return found


def exit_file(run: RunFolder) -> Path:
    """Where it stands how the run's last process ended."""
    return run.path / "exit.json"


def read_exit(run: RunFolder) -> ExitRecord | None:
    """How the run's last process ended, where its parent saw that."""
    try:
        found = check_fields(ExitRecord, parse_json(exit_file(run).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.written == _size(run.events_file) else None


def crash_reason(run: RunFolder) -> str:
    """Why a run broke off or failed, in a sentence; "" where it did neither."""
    if run.live_process() is not None:
        return ""
    progress, ended = run.progress(), read_exit(run)
    status = run.status(progress)
    silent = ended is not None and ended.code not in (0, 130) and ended.events == _size(run.events_file)
    if status == "failed" and not silent:
        return progress.reason
    if status != "interrupted" and not silent:
        return ""
    said = _last_words(run, ended)
    sentence = _of_error(said, progress, ended is not None) or _of_code(ended, progress)
    if not sentence and silent and said:
        # It said what was wrong before it had an event to say it by.
        return _as_sentence(said[-1])
    return sentence or _of_silence(run, progress, said)


def last_log_sentence(run: RunFolder) -> str:
    """The last line that the run's last process wrote to its log, or ""."""
    said = _last_words(run, read_exit(run))
    return _as_sentence(said[-1]) if said else ""


def resume_step(run: RunFolder) -> int:
    """The step that a resume would go on from: that of the newest checkpoint that is whole, 0 for none."""
    return next((step for step in reversed(run.checkpoint_steps()) if _whole(run.checkpoint(step))), 0)


def _whole(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint are there and none is cut short; its hashes are the trainer's to
    check."""
    try:
        record = parse_json((checkpoint / "state.json").read_bytes())
        for name in record["sha256"]:
            read_header(checkpoint / name)
    except (OSError, ValueError, KeyError, TypeError, AdapterFileError):
        return False
    return True


def _as_sentence(line: str) -> str:
    return f"{line[:MOST_WORDS].rstrip('.')}."


def _where(progress: Progress) -> str:
    if progress.stepping and progress.step:
        return f"at step {progress.step}"
    return f"at “{progress.phase}”" if progress.phase else "before its first step"


def _last_words(run: RunFolder, ended: ExitRecord | None) -> list[str]:
    """What the last process wrote to the log; where nobody noted its beginning, the log's end."""
    lines = log_tail(run.log_file, LINES_LOOKED_AT)
    if ended is not None:
        with contextlib.suppress(OSError), open(run.log_file, "rb") as file:
            file.seek(max(ended.log, _size(run.log_file) - 200 * LINES_LOOKED_AT))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    return [line for line in (re.sub(r"\x1b\[[0-9;]*K|\r", "", line).rstrip() for line in lines) if line]


def _of_error(said: list[str], progress: Progress, its_own: bool) -> str:
    """The last line of the last traceback in the log.

    Args:
        said: lines of the log.
        progress: of the run.
        its_own: whether the lines are known to be of the last process; else only a traceback that ends the
            log counts, as an earlier one is of an earlier process.
    """
    starts = [
        index for index, line in enumerate(said) if line.startswith("Traceback (most recent call last)")
    ]
    if not starts:
        return ""
    end = next((i for i in range(starts[-1] + 1, len(said)) if not said[i].startswith(" ")), None)
    if end is None or not (its_own or end == len(said) - 1):
        return ""
    return f"A defect of the program {_where(progress)}: {said[end].rstrip('.')}."


def _of_code(ended: ExitRecord | None, progress: Progress) -> str:
    if ended is None or ended.code in (0, 1, 130):
        return ""
    where, name = _where(progress), _signal_name(ended.code)
    if ended.code & 0xFFFFFFFF in NO_MEMORY_CODES:
        return f"Its process ran out of memory {where}; {LESS_MEMORY}."
    if name == "SIGKILL":
        held = (
            f": it held {ended.held / GIGABYTE:.1f} of {ended.total / GIGABYTE:.1f} GB" if ended.held else ""
        )
        if ended.kills:
            return f"The system killed its process {where} because memory ran out{held}; {LESS_MEMORY}."
        if ended.out_of_memory:
            return f"Its process was killed {where}, probably because memory ran out{held}; {LESS_MEMORY}."
        return f"Its process was killed {where} (signal 9), by a person or by another program."
    if name in NATIVE_SIGNALS or ended.code & 0xFFFFFFFF in NATIVE_CODES:
        what = name or f"code {ended.code & 0xFFFFFFFF:#x}"
        return (
            f"Its process crashed {where} in compiled code ({what}), which points to a graphics driver or a"
            " package; bring them up to date and go on."
        )
    how = f"was ended by the signal {name}" if name else f"ended with code {ended.code}"
    return f"Its process {how} {where}."


def _of_silence(run: RunFolder, progress: Progress, said: list[str]) -> str:
    """Nobody saw how it ended: the machine went down, or the parent died too."""
    where = _where(progress)
    written = read_events(run.events_file)[0]
    last = written[-1].time if written else math.inf
    if psutil.boot_time() > last:
        return f"The computer was shut down or lost power while the run was {where}."
    words = f"; its last words: {said[-1][:MOST_WORDS].rstrip('.')}" if said else ""
    return f"Its process ended {where} without saying why{words}."


def _signal_name(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return ""


def _oom_kills() -> int:
    """How often this Linux has killed something for lack of memory; 0 where that is not told."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/vmstat", encoding="ascii") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
    return 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


# What helps to find a defect, in one zip that can be shown to anybody: no pictures, no paths, no names of
# people.
#
# Whatever a person chose to write (names of runs and files, trigger words, prompts, captions) is replaced,
# and so is every path; settings, versions, events and the log stay.


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
    clean = Anonymizer(_known(run, workspace))
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


class Anonymizer:
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
