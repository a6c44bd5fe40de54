"""Our processes: detached children, pid files, stop signals, spinning threads, keeping the computer awake.

Pids are reused, so a pid file holds the start time too, and both have to match. On Linux the start time is
in ticks since boot, because psutil's time of day moves when the clock is set. Ctrl-C, SIGTERM and SIGHUP
all mean: stop and keep the work.

torch's threads wait for each other hundreds of times a step. libgomp lets them spin meanwhile, which is fast
while each has a core of its own, and very slow beside any other program that computes. So only the process
that the user waits for spins, for as long as most waits take; all others sleep soon. Figures:
docs/decisions/speed.md.
"""

import contextlib
import ctypes
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from filelock import FileLock, Timeout

from lora_core.errors import RunError, wrap_os_errors
from lora_core.system.files import PACKAGE, parse_json, write_atomically

FIRST_PORT, PORTS_TRIED = 7860, 40
"""The window listens on the first free port of these."""
LANGUAGE = "LORA_EASEL_LANGUAGE"
"""The variable with the language of what the doctor finds, which the window sets; English without it."""
TRAINER = (sys.executable, "-m", "lora_core", "resume")
"""The command that a run's path is appended to."""
ACCEPTING = "--accept-changes"
"""Its option to continue although the run's inputs have changed."""
INTERRUPTED = 130
"""The exit code of a process that left on such a signal."""
_ENDING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
_KEYS = ("SIGINT", "SIGBREAK")
"""Signals sent from a keyboard."""
VARIABLE = "GOMP_SPINCOUNT"
SOON, AWHILE = "1000", "20000"
"""Turns after which a waiting thread goes to sleep; libgomp's own are 300,000 and more."""
COMPUTES, GIVES_WAY, SLEEPS = "computes", "gives way", "sleeps"
"""Kinds of processes: one that the user waits for, which spins if it holds the lock; one that asks
`others_spin` before each piece of work, and takes one thread where they do, which waits for nobody; any
other, whose waiting threads sleep soon."""
PATIENCE = 0.3
"""Seconds to wait for the lock: a check whether it is taken holds it for a moment."""
WHY = "A training run is in progress"
_CONTINUOUS, _SYSTEM_REQUIRED = 0x80000000, 0x00000001
_SYSTEMD = Path("/run/systemd/system")
"""There on machines that systemd runs, and nowhere else: sd_booted(3)."""

_kept: list[FileLock] = []


def detached() -> dict[str, Any]:
    """Options of Popen that make a child outlive the terminal and the process that started it."""
    if os.name == "nt":
        new_group = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
        return {"creationflags": new_group | getattr(subprocess, "CREATE_NO_WINDOW", 0)}
    return {"start_new_session": True}


def child_environment(workspace: Path) -> dict[str, str]:
    """The environment of a child that can import the project from any folder, with unbuffered output."""
    root = str(PACKAGE.parent)
    path = os.environ.get("PYTHONPATH", "")
    return {
        **os.environ,
        "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root,
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        "LORA_EASEL_HOME": str(workspace),
    }


def start_detached(
    command: list[str], log_file: Path, workspace: Path, stdin: int = subprocess.DEVNULL
) -> "subprocess.Popen[bytes]":
    """A child in its own session, its output appended to `log_file`."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with open(log_file, "ab") as log:
        return subprocess.Popen(
            command, stdin=stdin, stdout=log, stderr=subprocess.STDOUT,
            env=child_environment(workspace), **detached(),
        )  # fmt: skip


@contextmanager
def pid_file(file: Path) -> Iterator[None]:
    """While the context is open, `file` names this process, for readers that may not take its lock.

    Raises:
        RunError: the drive does not take the file.
    """
    me = psutil.Process()
    note = {"pid": me.pid, "started": me.create_time(), "ticks": _ticks(me.pid)}
    advice = "; make room or give the right to write there."
    with wrap_os_errors(RunError, f"{file} cannot be written", advice):
        write_atomically(file, json.dumps(note).encode())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


@contextmanager
def hold_lock(lock_file: Path, process_file: Path, busy: str, timeout: float = 0.0) -> Iterator[None]:
    """While the context is open, this process holds a lock, and `process_file` names it.

    Raises:
        RunError: another process holds it (`busy` is the message), or the folder cannot be written.
    """
    lock = FileLock(lock_file)
    with wrap_os_errors(RunError, f"{lock_file} cannot be written"):
        try:
            lock.acquire(timeout=timeout)
        except Timeout as error:
            raise RunError(busy) from error
    try:
        with pid_file(process_file):
            yield
    finally:
        lock.release()


def live_process(file: Path) -> psutil.Process | None:
    """The process that `file` names, if it lives."""
    try:
        named = parse_json(file.read_bytes())
        process = psutil.Process(int(named["pid"]))
        if named.get("ticks"):
            same = named["ticks"] == _ticks(process.pid)
        else:
            same = abs(process.create_time() - float(named["started"])) < 1.0
        alive = same and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError, psutil.Error):
        return None
    return process if alive else None


def _ticks(pid: int) -> str:
    """Which start of the machine, and ticks from it to the start of the process; "" where no such file
    exists."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        after_name = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        )
        return f"{boot}/{after_name.split()[19]}"
    except (OSError, IndexError):
        return ""


def log_tail(path: Path, lines: int, start: int = 0) -> list[str]:
    """The last lines of a log from byte `start` on, read from its end so that its size does not matter."""
    try:
        with open(path, "rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - 200 * lines))
            return file.read(200 * lines).decode("utf-8", errors="replace").splitlines()[-lines:]
    except OSError:
        return []


def last_log_line(path: Path) -> str:
    """The last non-empty line of a log, "" if none."""
    lines = log_tail(path, 40)
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _numbers(names: tuple[str, ...]) -> list[signal.Signals]:
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


@contextmanager
def catch_signals(take: Callable[[int], None]) -> Iterator[None]:
    """While the context is open, `take` is called with the number of each signal that would end the process.

    Python lets only the main thread do so; in another nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        take(number)

    kept = {number: signal.signal(number, on_signal) for number in _numbers(_ENDING)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


class StopRequest:
    """Whether a signal asked this process to end (`came`). A second Ctrl-C ends it at once.

    Only that one: closing a terminal sends SIGHUP from the shell and from the system, and a supervisor may
    send SIGTERM twice.
    """

    def __init__(self) -> None:
        self.came = False
        self._by_key = False
        self._raises = False
        self._taken = False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take the signals while the context is open; inside another such context it changes nothing."""
        if self._taken:
            yield
            return
        self._taken = True
        try:
            with catch_signals(self._take):
                yield
        finally:
            self._taken = False

    @contextmanager
    def raising(self) -> Iterator[None]:
        """A signal ends the work inside the context, such as an import, by a KeyboardInterrupt.

        An import ends where the next module would be searched for: raised at any other point of it, the
        KeyboardInterrupt may pass through the C++ that initializes torch, which aborts the process.

        Raises:
            KeyboardInterrupt: a signal came, also where a library passed over it or made another error of it.
        """
        self._raises = True
        sys.meta_path.insert(0, self)
        try:
            self._raise_if_came()
            yield
        except Exception:
            self._raise_if_came()
            raise
        finally:
            self._raises = False
            sys.meta_path.remove(self)
        self._raise_if_came()

    def find_spec(self, *asked: object) -> None:
        """The module finder that `raising` installs: finds nothing, but ends the import."""
        self._raise_if_came()

    def _raise_if_came(self) -> None:
        if self.came:
            raise KeyboardInterrupt

    def _take(self, number: int) -> None:
        if number in _numbers(_KEYS):
            if self._by_key:
                os._exit(INTERRUPTED)
            self._by_key = True
        self.came = True
        if self._raises and not _is_importing():
            raise KeyboardInterrupt


def _is_importing() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def limit_spinning(kind: str) -> None:
    """Sets how long waiting threads spin, by the kind of this process.

    Call it before torch is imported. Nothing of it changes a result. The right ends with the process, however
    it ends. The user's own setting is kept.
    """
    if not sys.platform.startswith("linux") or os.environ.get(VARIABLE, SOON) not in (SOON, AWHILE):
        return
    if kind == COMPUTES and not _kept:
        with contextlib.suppress(Timeout, OSError):
            lock = _spin_lock()
            lock.acquire(timeout=PATIENCE)
            _kept.append(lock)
    spins = kind == GIVES_WAY or (kind == COMPUTES and bool(_kept))
    os.environ[VARIABLE] = AWHILE if spins else SOON


def others_spin() -> bool:
    """Whether another of our processes has the right to spin now."""
    if _kept or not sys.platform.startswith("linux"):
        return False
    lock = _spin_lock()
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


def _spin_lock() -> FileLock:
    return FileLock(Path(tempfile.gettempdir()) / f"lora-easel-processor-{os.getuid()}.lock")


@contextlib.contextmanager
def without_collecting(freeze: bool = True) -> Iterator[None]:
    """Imports without the garbage collector, for a process that has just started. Objects made by imports
    stay, yet the collector goes through all of it again and again: a fifth of the processor time of importing
    the trainer (3.7 s with it, 3.0 s without, two shared cores). They are left out of later collections too
    (the first time only: later it would keep garbage forever). Where much is made that goes again, it is not:
    `freeze`.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if freeze and not gc.get_freeze_count():
            gc.freeze()
        if was_on:
            gc.enable()


@contextmanager
def keep_awake(system: str = sys.platform) -> Iterator[None]:
    """The computer does not go to sleep by itself while the context is open; its screen may.

    Best effort: where a system has no means or refuses, nothing changes. The process that holds it awake ends
    with this one, however this one ends.
    """
    library: Any = getattr(ctypes, "windll", None) if system == "win32" else None
    holder: subprocess.Popen[bytes] | None = None
    if library is not None:
        library.kernel32.SetThreadExecutionState(ctypes.c_uint(_CONTINUOUS | _SYSTEM_REQUIRED))
    elif command := _awake_command(system):
        # Ctrl-C is for the trainer, which still has work to save.
        quiet: dict[str, Any] = {
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
            "start_new_session": True,
        }
        with contextlib.suppress(OSError):
            holder = subprocess.Popen(command, stdin=subprocess.PIPE, **quiet)
    try:
        yield
    finally:
        if library is not None:
            library.kernel32.SetThreadExecutionState(ctypes.c_uint(_CONTINUOUS))
        if holder:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                if holder.stdin is not None:
                    holder.stdin.close()
                holder.terminate()
                holder.wait(5)


def _awake_command(system: str) -> list[str]:
    """The program that keeps this system awake, or [] where there is none."""
    if system == "darwin" and shutil.which("caffeinate"):
        return ["caffeinate", "-i", "-w", str(os.getpid())]
    if system == "linux" and shutil.which("systemd-inhibit") and _SYSTEMD.is_dir():
        # `cat` ends when its input does, and that ends with this process, even if it is killed.
        return ["systemd-inhibit", "--what=idle:sleep", "--who=LoRA Easel", f"--why={WHY}", "cat"]
    return []
