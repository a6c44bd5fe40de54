"""How runs end: why one broke off, where a resume continues, who is notified, and a zip for a bug report.

The parent of a trainer records how its process ended in `exit.json`, with a last look at memory, since a
killed process cannot. Without a parent, the events, the log and the boot time of the machine decide. The zip
holds settings, versions, events and the log; what users wrote or named, and every path, is replaced.

Whom to notify, a command or a web address, is kept in the workspace's `notify.toml` or the variable
LORA_EASEL_NOTIFY and never in a run's settings: those travel in config files, and a stranger's config must
not be able to run a command here.
"""

import contextlib
import getpass
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import psutil
import tomli_w

from lora_core.errors import AdapterFileError, ConfigError, OutOfMemory
from lora_core.model_files.header import read_header
from lora_core.runs.events import Progress, read_events
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import FIELDS
from lora_core.system.files import ASSETS, check_fields, file_bytes, parse_json, read_json, write_atomically
from lora_core.system.processes import log_tail

LESS_MEMORY = "lower train.batch_size or train.resolution, or set train.gradient_checkpointing"
NEARLY_FULL = 0.1
"""A kill is put down to full memory where less than this share was free."""
MOST_OF_IT = 0.75
"""Or where the process alone held this share of all memory."""
NO_MEMORY_CODES = (0xC0000017, 0xC000012D, 0xE0000008)
"""Windows: no memory, the commit limit, torch's own allocator."""
NATIVE_CODES = (0xC0000005, 0xC0000409, 0xC000001D, 0xC00000FD)
"""Windows: access violation, broken stack, illegal instruction, stack overflow."""
NATIVE_SIGNALS = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT", "SIGTRAP")
LOG_LINES, CRASH_LINES = 2000, 60
"""Lines from the end of the log that go into the zip, and that are searched for the reason of a crash."""
MOST_LETTERS = 300
LARGEST_EVENTS = 2_000_000
SHORTEST_WORD = 3
PATH = re.compile(r"""(?:[A-Za-z]:)?(?:[\\/][^\\/\s"'<>|:*?,;()]+){2,}[\\/]?""")
TAIL = r"""((?:[\\/][^"'<>\n:]*)?[\\/][^\\/\s"'<>|:*?,;()]*)?"""
"""What may follow a known folder: names with spaces too, up to the last separator of the line."""
OURS = ("<run>", "<app>", "<python>")
PACKAGES = ("lora-easel", "torch", "diffusers", "transformers", "gradio", "safetensors")

VARIABLE = "LORA_EASEL_NOTIFY"
COMMAND_TAKES = 60.0
"""Seconds that a command gets."""
ADDRESS_TAKES = 10.0
WEB = ("http://", "https://")
WORDS = {"done": "is done", "stopped": "was stopped", "paused": "is paused", "failed": "failed"}


@dataclass(frozen=True)
class ExitRecord:
    """How a trainer's process ended, as seen by its parent.

    Attributes:
        code: the exit code; minus the signal's number where one ended it.
        time: when, in seconds since the epoch.
        events: bytes of the run's events when the process was started.
        written: and when it had ended; more than that comes from a later process without a parent.
        log: bytes of the run's log when it was started.
        held: memory of the process at the last look, in bytes.
        free: memory that was free then.
        total: memory of the machine, or its limit.
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
        """Whether memory had all but run out at the last look."""
        return bool(self.total) and (
            self.free < NEARLY_FULL * self.total or self.held > MOST_OF_IT * self.total
        )


class Crash(NamedTuple):
    """Why a run broke off or failed: a sentence, "" where it did neither; its cause as in `events.Failed`."""

    reason: str = ""
    cause: str = ""


class ExitRecorder:
    """Lets the parent of a trainer record how its process ends."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._events, self._log = file_bytes(run.events_file), file_bytes(run.log_file)
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
        """Write down how it ended, if the disk takes it; `code` as `Popen.returncode`."""
        kills = max(0, _oom_kills() - self._kills)
        written = file_bytes(self._run.events_file)
        found = ExitRecord(code, time.time(), self._events, written, self._log, *self._memory, kills)
        with contextlib.suppress(OSError):
            write_atomically(exit_file(self._run), json.dumps(asdict(found)).encode())
        return found


def exit_file(run: RunFolder) -> Path:
    """The record of how the run's last process ended."""
    return run.path / "exit.json"


def read_exit(run: RunFolder) -> ExitRecord | None:
    """How the run's last process ended, where its parent recorded that."""
    try:
        found = check_fields(ExitRecord, parse_json(exit_file(run).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.written == file_bytes(run.events_file) else None


def find_crash(run: RunFolder) -> Crash:
    """Why a run broke off or failed, where it did."""
    if run.live_process() is not None:
        return Crash()
    progress, ended = run.progress(), read_exit(run)
    status = run.status(progress)
    is_silent = (
        ended is not None and ended.code not in (0, 130) and ended.events == file_bytes(run.events_file)
    )
    if status == "failed" and not is_silent:
        return Crash(progress.reason, progress.cause)
    if status != "interrupted" and not is_silent:
        return Crash()
    lines = _last_lines(run, ended)
    crash = _from_traceback(lines, progress, ended is not None) or _from_code(ended, progress)
    if crash is None and is_silent and lines:
        # It printed the error before it could write an event.
        return Crash(_as_sentence(lines[-1]))
    return crash or Crash(_silence_sentence(run, progress, lines))


def last_log_sentence(run: RunFolder) -> str:
    """The last line that the run's last process wrote to its log, or ""."""
    lines = _last_lines(run, read_exit(run))
    return _as_sentence(lines[-1]) if lines else ""


def resume_step(run: RunFolder) -> int:
    """The step of the newest complete checkpoint, where a resume would continue; 0 for none."""
    return next((step for step in reversed(run.checkpoint_steps()) if _is_whole(run.checkpoint(step))), 0)


def _is_whole(checkpoint: Path) -> bool:
    """Whether no file of a checkpoint is missing or cut short; its hashes are the trainer's to check."""
    try:
        record = parse_json((checkpoint / "state.json").read_bytes())
        for name in record["sha256"]:
            read_header(checkpoint / name)
    except (OSError, ValueError, KeyError, TypeError, AdapterFileError):
        return False
    return True


def _as_sentence(line: str) -> str:
    return f"{line[:MOST_LETTERS].rstrip('.')}."


def _where(progress: Progress) -> str:
    if progress.stepping and progress.step:
        return f"at step {progress.step}"
    return f"at “{progress.phase}”" if progress.phase else "before its first step"


def _last_lines(run: RunFolder, ended: ExitRecord | None) -> list[str]:
    """What the last process wrote to the log; without a record of its start, the log's end."""
    lines = log_tail(run.log_file, CRASH_LINES, ended.log if ended else 0)
    return [line for line in (re.sub(r"\x1b\[[0-9;]*K|\r", "", line).rstrip() for line in lines) if line]


def _from_traceback(lines: list[str], progress: Progress, are_its_own: bool) -> Crash | None:
    """From the last line of the last traceback in the log.

    Where the last process is not known to have written the lines, only a traceback at the very end counts, as
    an earlier one is of an earlier process.
    """
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    if not starts:
        return None
    end = next((i for i in range(starts[-1] + 1, len(lines)) if not lines[i].startswith(" ")), None)
    if end is None or not (are_its_own or end == len(lines) - 1):
        return None
    return Crash(f"A defect of the program {_where(progress)}: {lines[end].rstrip('.')}.", "defect")


def _from_code(ended: ExitRecord | None, progress: Progress) -> Crash | None:
    if ended is None or ended.code in (0, 1, 130):
        return None
    where, name, code = _where(progress), _signal_name(ended.code), ended.code & 0xFFFFFFFF
    if code in NO_MEMORY_CODES:
        return Crash(f"Its process ran out of memory {where}; {LESS_MEMORY}.", OutOfMemory.cause)
    if name == "SIGKILL" and (ended.kills or ended.out_of_memory):
        who = (
            f"The system killed its process {where} because"
            if ended.kills
            else f"Its process was killed {where}, probably because"
        )
        held = f": it held {ended.held / 1e9:.1f} of {ended.total / 1e9:.1f} GB" if ended.held else ""
        return Crash(f"{who} memory ran out{held}; {LESS_MEMORY}.", OutOfMemory.cause)
    if name == "SIGKILL":
        return Crash(f"Its process was killed {where} (signal 9), by a user or another program.")
    if name in NATIVE_SIGNALS or code in NATIVE_CODES:
        return Crash(
            f"Its process crashed {where} in compiled code ({name or f'code {code:#x}'}), which points to a"
            " graphics driver or a package; bring them up to date and resume."
        )
    how = f"was ended by the signal {name}" if name else f"ended with code {ended.code}"
    return Crash(f"Its process {how} {where}.")


def _silence_sentence(run: RunFolder, progress: Progress, lines: list[str]) -> str:
    """For an end without a record: the machine went down, or the parent died too."""
    where = _where(progress)
    written = read_events(run.events_file)[0]
    if psutil.boot_time() > (written[-1].time if written else math.inf):
        return f"The computer was shut down or lost power while the run was {where}."
    words = f"; its last words: {lines[-1][:MOST_LETTERS].rstrip('.')}" if lines else ""
    return f"Its process ended {where} without saying why{words}."


def _signal_name(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return ""


def _oom_kills() -> int:
    """How often this Linux has killed something for lack of memory; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/vmstat", encoding="ascii") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
    return 0


def debug_zip(
    run: RunFolder | None, workspace: Path, card: str = "", more: Mapping[str, str] | None = None
) -> bytes:
    """The zip for a bug report, of one run or of none.

    Args:
        run: the run, if it is about one.
        workspace: whose path is taken out.
        card: the name of the graphics card.
        more: other files, name to text.
    """
    anonymizer = Anonymizer(_known_words(run, workspace))
    files = {"about.json": json.dumps(_about(card), indent=1), **(more or {})}
    if run is not None:
        files |= {
            "settings.toml": _settings(run),
            "events.jsonl": _events(run),
            "plan.json": _read(run.plan_file),
            "exit.json": _read(exit_file(run)),
            "log.txt": "\n".join(_read(run.log_file, 200 * LOG_LINES).splitlines()[-LOG_LINES:]),
        }
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            if text:
                archive.writestr(name, anonymizer.text(text).encode("utf-8", "replace"))
    return made.getvalue()


class Anonymizer:
    """Removes names and paths from a text."""

    def __init__(self, known: Iterable[tuple[str, str]]) -> None:
        """Replace known paths, then every path that is left, then known words; each time the longest first.

        Args:
            known: (text, what to put instead).
        """
        pairs = sorted({pair for pair in known if len(pair[0]) >= SHORTEST_WORD}, key=lambda p: -len(p[0]))
        self._by = {what.lower(): instead for what, instead in pairs}
        self._paths = _any_of([what for what, _ in pairs if _is_path(what)], TAIL)
        self._words = _any_of([what for what, _ in pairs if not _is_path(what)], whole=True)

    def text(self, text: str) -> str:
        """The text without them."""
        text = PATH.sub(_shorten, self._paths.sub(self._replace_path, text))
        return self._words.sub(lambda found: self._by[found[1].lower()], text)

    def _replace_path(self, found: re.Match[str]) -> str:
        """Names below our own folders may be read; those in a user's folders are the user's."""
        instead, tail = self._by[found[1].lower()], found[2] or ""
        return instead + (tail if instead in OURS else PurePosixPath(tail.replace("\\", "/")).suffix)


def _any_of(texts: list[str], tail: str = "", whole: bool = False) -> re.Pattern[str]:
    either = f"({'|'.join(re.escape(text) for text in texts) or '(?!)'})"
    # An image called `car` must not spoil each `card`.
    return re.compile(rf"(?<!\w){either}(?!\w)" if whole else f"{either}{tail}", re.IGNORECASE)


def _shorten(found: re.Match[str]) -> str:
    """A path of an installed package keeps its end; any other the suffix."""
    path = found[0].replace("\\", "/")
    if "site-packages/" in path:
        return f"<python>/{path.partition('site-packages/')[2]}"
    return f"<path>{PurePosixPath(path).suffix}"


def _known_words(run: RunFolder | None, workspace: Path) -> list[tuple[str, str]]:
    """All that is known to be a user's, with its replacement."""
    pairs: list[tuple[str, str]] = []
    for path, instead in (
        *([(run.path, "<run>")] if run else []),
        (workspace, "<workspace>"),
        (ASSETS.parent, "<app>"),
        (Path(sys.prefix), "<python>"),
        (Path.home(), "<home>"),
    ):
        # JSON and Windows write the same path in different ways.
        for one in {str(path), str(path.resolve()), path.as_posix()}:
            pairs += [(form, instead) for form in _json_forms(one)]
    with contextlib.suppress(OSError, KeyError, ImportError):
        pairs.append((getpass.getuser(), "<user>"))
    pairs.append((socket.gethostname(), "<computer>"))
    if run is None:
        return pairs
    pairs.append((run.name, "<run name>"))
    config = run.config_or_none()
    if config is not None:
        for name in FIELDS:
            value = config.get(name)
            if isinstance(value, str) and _is_path(value):
                # A folder's name may have a dot too.
                suffix = PureWindowsPath(value).suffix
                instead = f"<{name}>{suffix if suffix in ('.safetensors', '.ckpt', '.zip') else ''}"
                pairs += [(form, instead) for form in _json_forms(value)]
        pairs.append((config.dataset.trigger, "<trigger>"))
        slider = [config.slider.positive, config.slider.negative, *config.slider.captions()]
        prompts = [*config.sample.prompts, config.sample.negative_prompt, *slider]
        pairs += [(prompt, "<prompt>") for prompt in prompts]
    progress = run.progress()
    pairs += [(prompt, "<prompt>") for event in progress.previews for prompt in event.prompts]
    return pairs + _image_names(run, progress.changed)


def _json_forms(text: str) -> set[str]:
    """A text as it is, and as JSON writes it with and without escapes for letters."""
    return {text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}


def _image_names(run: RunFolder, changed: list[str]) -> list[tuple[str, str]]:
    """The names of the images in `inputs.json`, and of those that are new since."""
    names = list(read_json(run.inputs_file))
    found = []
    for number, name in enumerate(dict.fromkeys([*names, *changed]), 1):
        path = PurePosixPath(str(name).removeprefix("the picture "))
        if path.suffix and str(name).startswith("the picture "):
            found += [(part, f"image {number}") for part in (str(path), path.name, path.stem)]
    return found


def _is_path(text: str) -> bool:
    return "/" in text or "\\" in text


def _settings(run: RunFolder) -> str:
    """The settings, without what a user wrote; paths are taken out with all others."""
    config = run.config_or_none()
    if config is None:
        return ""
    values = config.to_dict()
    values["name"] = values["dataset"]["trigger"] = values["sample"]["negative_prompt"] = ""
    for section, key in (("sample", "prompts"), ("slider", "target"), ("slider", "preserve")):
        values[section][key] = [f"<prompt {n}>" for n, _ in enumerate(values[section][key], 1)]
    for key in ("positive", "negative"):
        values["slider"][key] = values["slider"][key] and "<prompt>"
    return tomli_w.dumps(values)


def _events(run: RunFolder) -> str:
    """The events; of prompts and changed inputs only how many there were."""
    lines = []
    for line in _read(run.events_file, LARGEST_EVENTS).splitlines():
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            values = parse_json(line)
            counts = {key: len(values[key]) for key in ("prompts", "changed") if key in values}
            # Names of images are searched as they are written, which escapes would hide.
            lines.append(json.dumps({**values, **counts}, ensure_ascii=False))
    return "\n".join(lines)


def _read(path: Path, most: int = 200_000) -> str:
    """The end of a file; nothing of a link, which in a stranger's run may lead to any file of the user."""
    try:
        if path.is_symlink() or not path.is_file():
            return ""
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - most))
            return file.read(most).decode("utf-8", errors="replace")
    except OSError:
        return ""


def _about(card: str) -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    system = f"{platform.system()} {platform.release()}"
    about = {"python": platform.python_version(), "system": system, "machine": platform.machine()}
    return {**about, "card": card or "none", "versions": versions}


def notify_file(workspace: Path) -> Path:
    """Where a workspace keeps its recipient."""
    return workspace / "notify.toml"


def read_recipient(workspace: Path) -> str:
    """A command, an address that begins with http, or "".

    Raises:
        ConfigError: the file cannot be read.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return chosen.strip()
    file = notify_file(workspace)
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8-sig")).get("tell", "")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); fix or remove it.") from error
    if not isinstance(found, str):
        raise ConfigError(f"{file} says tell = {found!r}, which should be a text.")
    return found.strip()


def write_recipient(workspace: Path, recipient: str) -> None:
    """Keep whom to notify; "" for nobody.

    Raises:
        ConfigError: the command has an open quote.
    """
    recipient = recipient.strip()
    if not _is_address(recipient):
        _split(recipient)
    write_atomically(notify_file(workspace), tomli_w.dumps({"tell": recipient}).encode())


def notify_end(run: RunFolder, workspace: Path, reason: str = "") -> str:
    """Notify that a run has ended; returns a sentence where that did not work, else "".

    Args:
        run: the run; nobody is notified while it is live.
        workspace: its workspace.
        reason: why it ended, where its events do not say so.
    """
    facts = _facts(run, reason)
    try:
        recipient = read_recipient(workspace) if facts else ""
    except ConfigError as error:
        return f"No notification was sent: {error}"
    return _send(recipient, facts) if facts and recipient else ""


def send_test(recipient: str) -> str:
    """Notify somebody now, to see whether it works; returns a sentence where it does not, else ""."""
    recipient = recipient.strip()
    if not recipient:
        return "Give a command or a web address first."
    facts = {"run": "a-try", "path": "", "status": "done", "step": 0, "steps": 0, "reason": "", "export": ""}
    return _send(recipient, {**facts, "text": "LoRA Easel reaches you here."})


def _is_address(recipient: str) -> bool:
    return recipient.lower().startswith(WEB)


def _send(recipient: str, facts: dict[str, Any]) -> str:
    try:
        return _post(recipient, facts) if _is_address(recipient) else _run(recipient, facts)
    except ConfigError as error:
        return f"No notification was sent: {error}"
    except subprocess.TimeoutExpired:
        why = f"it took more than {COMMAND_TAKES:.0f} seconds"
    except urllib.error.HTTPError as error:
        why = str(error)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        why = str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)
    return f"The notification could not be sent to {recipient}: {why.rstrip('.')}."


def _facts(run: RunFolder, reason: str) -> dict[str, Any] | None:
    progress = run.progress()
    status = run.status(progress)
    if status in ("preparing", "running", "queued"):
        return None
    export = str(run.path / progress.export) if progress.export and status in ("done", "stopped") else ""
    status = "failed" if status == "interrupted" else status
    reason = (reason or progress.reason) if status in ("failed", "paused") else ""
    sentence = f"The run {run.name} {WORDS.get(status, status)} at step {progress.step} of {progress.steps}."
    return {
        "run": run.name, "path": str(run.path), "status": status, "step": progress.step,
        "steps": progress.steps, "reason": reason, "export": export, "text": f"{sentence} {reason}".strip(),
    }  # fmt: skip


def _run(command: str, facts: dict[str, Any]) -> str:
    """Run the command without a shell; facts are in its environment alone, so that a run's name can never
    become part of it."""
    values = {f"LORA_EASEL_{key.upper()}": str(value).replace("\0", "") for key, value in facts.items()}
    done = subprocess.run(
        command if os.name == "nt" else _split(command), env={**os.environ, **values},
        stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_TAKES, check=False,
    )  # fmt: skip
    if not done.returncode:
        return ""
    lines = done.stderr.decode("utf-8", errors="replace").strip().splitlines()
    words = f": {lines[-1][:200].rstrip('.')}" if lines else ""
    return f"The notification command ({command}) ended with code {done.returncode}{words}."


def _split(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"The command {command!r} cannot be read: {error}.") from error


def _post(address: str, facts: dict[str, Any]) -> str:
    """One POST of JSON: Slack and Mattermost show `text`, Discord `content`."""
    import urllib.request  # takes longer than most commands

    body = json.dumps({**facts, "content": facts["text"]}).encode()
    headers = {"Content-Type": "application/json", "User-Agent": "lora-easel"}
    request = urllib.request.Request(address, body, headers, method="POST")
    with urllib.request.urlopen(request, timeout=ADDRESS_TAKES) as answer:
        answer.read(1000)
    return ""
