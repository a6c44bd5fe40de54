"""Notification at a run's end: a command or a web address of the user's choice.

It is kept in the workspace's `notify.toml` or the environment variable LORA_EASEL_NOTIFY and never in a run's
settings: those travel in config files, and a stranger's config must not be able to run a command here.
"""

import contextlib
import json
import os
import shlex
import subprocess
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import tomli_w

from lora_core.errors import ConfigError
from lora_core.runs.folder import RunFolder
from lora_core.system.files import write_atomically

VARIABLE = "LORA_EASEL_NOTIFY"
COMMAND_TAKES = 60.0
"""Seconds that a command gets."""
ADDRESS_TAKES = 10.0
WEB = ("http://", "https://")
WORDS = {"done": "is done", "stopped": "was stopped", "paused": "is paused", "failed": "failed"}


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
        raise ConfigError(f"{file} cannot be read ({error}); mend or remove it.") from error
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
        run: the run; nobody is notified while it goes on.
        workspace: its workspace.
        reason: why it ended, where its events do not say so.
    """
    facts = _facts(run, reason)
    try:
        recipient = read_recipient(workspace) if facts else ""
        return _send(recipient, facts) if facts and recipient else ""
    except ConfigError as error:
        return f"No notification was sent: {error}"
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"The end of the run could not be told to {recipient}: {_short(error)}."


def send_test(recipient: str) -> str:
    """Notify somebody now, to see whether it works; returns a sentence where it does not, else ""."""
    recipient = recipient.strip()
    if not recipient:
        return "Give a command or a web address first."
    facts = {"run": "a-try", "path": "", "status": "done", "step": 0, "steps": 0, "reason": "", "export": ""}
    try:
        return _send(recipient, {**facts, "text": "LoRA Easel reaches you here."})
    except ConfigError as error:
        return str(error)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"{recipient} could not be told: {_short(error)}."


def _is_address(recipient: str) -> bool:
    return recipient.lower().startswith(WEB)


def _send(recipient: str, facts: dict[str, Any]) -> str:
    return _post(recipient, facts) if _is_address(recipient) else _run(recipient, facts)


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
        "run": run.name,
        "path": str(run.path),
        "status": status,
        "step": progress.step,
        "steps": progress.steps,
        "reason": reason,
        "export": export,
        "text": f"{sentence} {reason}".strip(),
    }


def _run(command: str, facts: dict[str, Any]) -> str:
    """Run the command without a shell; facts are in its environment alone, so that a run's name can never
    become part of it."""
    values = {f"LORA_EASEL_{key.upper()}": str(value).replace("\0", "") for key, value in facts.items()}
    done = subprocess.run(
        command if os.name == "nt" else _split(command),
        env={**os.environ, **values},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=COMMAND_TAKES,
        check=False,
    )
    if not done.returncode:
        return ""
    said = done.stderr.decode("utf-8", errors="replace").strip().splitlines()
    words = f": {said[-1][:200].rstrip('.')}" if said else ""
    return f"The command that tells of a run's end ({command}) ended with code {done.returncode}{words}."


def _split(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"The command {command!r} cannot be read: {error}.") from error


def _post(address: str, facts: dict[str, Any]) -> str:
    """One POST of JSON: `text` is what Slack and Mattermost show, `content` what Discord does."""
    body = json.dumps({**facts, "content": facts["text"]}).encode()
    headers = {"Content-Type": "application/json", "User-Agent": "lora-easel"}
    request = urllib.request.Request(address, body, headers, method="POST")
    with contextlib.closing(urllib.request.urlopen(request, timeout=ADDRESS_TAKES)) as answer:
        answer.read(1000)
    return ""


def _short(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"it took more than {COMMAND_TAKES:.0f} seconds"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason if not isinstance(error, urllib.error.HTTPError) else error).rstrip(".")
    return str(getattr(error, "strerror", None) or error).rstrip(".")
