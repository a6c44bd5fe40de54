"""Python processes that start in milliseconds: forks of one that has imported what takes seconds.

A process of `lora_core` imports torch and diffusers for seconds of processor time, one of the window gradio.
`program(kind)` is a program that takes `-m` and `-c` as `sys.executable` does, but has a server of that kind
fork a child for them; `Child` does the same with no process between. All processes that divide the tests
share one server of each kind, which starts with its first child and ends with the tests.

A child has its own session, arguments, environment, folder and streams. Only what libraries read of the
environment while they are imported is the server's.
"""

import contextlib
import io
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TextIO

IMPORTS = {
    "engine": ("lora_core.cli", "lora_core.train.trainer", "lora_core.worker"),
    "window": ("app.main",),
}
"""What each kind of server imports."""
FOLDER = "LORA_EASEL_TESTS_WARM"
"""Names the folder of the servers' sockets, the process that they end with, and Python itself."""
HERE = os.path.abspath(__file__)
ROOT = os.path.dirname(os.path.dirname(HERE))
FORKS = hasattr(os, "fork") and hasattr(socket, "send_fds")
WARM = sys.platform.startswith("linux")
"""Elsewhere `program` is Python itself: what macOS's own libraries do may not survive a fork."""
PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP")
LOOK_SECONDS = 2.0
"""How soon a server sees that the tests have ended."""


def set_up() -> None:
    """Choose the folder of the sockets, unless the process that started this one did."""
    import atexit
    import shutil
    import tempfile

    if not FORKS or FOLDER in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="warm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for kind in IMPORTS:
        file = os.path.join(folder, kind)
        with open(file, "w", encoding="utf-8") as script:
            script.write(
                f'#!/bin/sh\ncase "$1" in\n-m|-c) exec "{sys.executable}" -IS "{HERE}" {kind} "$@" ;;\n'
                f'*) exec "{sys.executable}" "$@" ;;\nesac\n'
            )
        os.chmod(file, 0o755)
    os.environ[FOLDER] = f"{folder}:{os.getpid()}:{sys.executable}"


def program(kind: str) -> str:
    """The path of a program like Python whose `-m` and `-c` are done by a child of the server of `kind`."""
    return os.path.join(_shared()[0], kind) if WARM else sys.executable


def _shared() -> list[str]:
    """The folder of the sockets, the process that the servers end with, and Python itself."""
    set_up()
    return os.environ[FOLDER].split(":", 2)


class Child:
    """A child of a server, which is killed where nobody waits for it any more.

    Args:
        kind: of the server.
        words: Python's arguments, `-m module ...` or `-c code ...`.
        streams: file descriptors of its stdin, stdout and stderr.
        environment: its environment; this process's own without it.
        imported_with: what is set while the libraries are imported, which gives it a server of its own.
        folder: its working directory.

    Raises:
        RuntimeError: the server cannot import.
    """

    def __init__(
        self,
        kind: str,
        words: Sequence[str],
        streams: Sequence[int] = (0, 1, 2),
        environment: Mapping[str, str] | None = None,
        imported_with: Mapping[str, str] | None = None,
        folder: str = "",
    ) -> None:
        self.returncode: int | None = None
        self.peak = 0
        """Bytes of memory that it held at most, known once it has ended."""
        self._server = _connected(kind, imported_with or {})
        order = {
            "words": [*words],
            "folder": folder or os.getcwd(),
            "environment": dict(environment or os.environ),
        }
        text = json.dumps(order).encode()
        socket.send_fds(self._server, [len(text).to_bytes(8)], streams)
        self._server.sendall(text)
        self._answers = self._server.makefile("rb")
        answer = self._answers.readline()
        if not answer:
            with open(f"{self._server.getpeername()}.log", encoding="utf-8") as log:
                raise RuntimeError(log.read())
        self.pid = int(answer)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, negative for a signal."""
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                import subprocess

                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode, self.peak = json.loads(self._answers.readline())
            self._answers.close()
            self._server.close()
        return self.returncode

    def poll(self) -> int | None:
        """Its exit code, None while it lives."""
        if self.returncode is None and select.select([self._server], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)


def end_server(kind: str, imported_with: Mapping[str, str]) -> None:
    """End the server that children with this environment have for themselves."""
    with _connected(kind, imported_with) as connection:
        os.unlink(connection.getpeername())
        connection.sendall(bytes(8))


def captured(stream: int, *arguments: Any, **named: Any) -> tuple[Child, TextIO]:
    """A child, and what it says on its stdout (1) or stderr (2); it has no stdin."""
    reading, writing = os.pipe()
    with open(os.devnull) as nothing:
        streams = [nothing.fileno(), 1, 2]
        streams[stream] = writing
        child = Child(*arguments, streams=streams, **named)
    os.close(writing)
    return child, open(reading, encoding="utf-8", errors="replace")


def _connected(kind: str, imported_with: Mapping[str, str]) -> socket.socket:
    """A connection to the server of a kind, which is started where there is none."""
    import fcntl

    made = socket.socket(socket.AF_UNIX)
    folder, _, python = _shared()
    number = hash(tuple(sorted(imported_with.items())))
    address = os.path.join(folder, f"{kind}-{os.getpid()}{number}" if imported_with else f"{kind}-shared")
    with open(f"{address}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            made.connect(address)
            return made
        with socket.socket(socket.AF_UNIX) as listener, open(f"{address}.log", "wb") as log:
            listener.bind(address)
            listener.listen(64)
            listener.set_inheritable(True)
            code = f"from tests.warm import serve; serve({kind!r}, {listener.fileno()})"
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": f"{folder}/hf", **imported_with}
            environment["PYTHONPATH"] = f"{environment.get('PYTHONPATH', '')}{os.pathsep}{ROOT}"
            os.posix_spawn(
                python,
                [python, "-c", code],
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    *((os.POSIX_SPAWN_DUP2, log.fileno(), stream) for stream in (1, 2)),
                ],
                setsid=True,
            )
        made.connect(address)
    return made


def _stand_in(kind: str, words: Sequence[str]) -> NoReturn:
    """Be the child for whoever started this process: pass signals on, and end as it ends."""
    early: list[int] = []
    for name in PASSED_ON:
        signal.signal(getattr(signal, name), lambda number, frame: early.append(number))
    child = Child(kind, words)
    for name in PASSED_ON:
        signal.signal(getattr(signal, name), lambda number, frame: os.kill(child.pid, number))
    for number in early:
        os.kill(child.pid, number)
    code = child.wait()
    if code < 0:
        with contextlib.suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(kind: str, listening: int) -> None:
    """The process of a server: import, then fork a child for each connection."""
    import importlib

    # Children start others that are warm too.
    sys.executable = program("engine")
    from lora_core.cli import quiet_libraries, set_up_cuda
    from lora_core.system.processes import without_collecting

    if kind == "engine":
        quiet_libraries()
        set_up_cuda()
    with without_collecting():
        for name in IMPORTS[kind]:
            importlib.import_module(name)
    with socket.socket(fileno=listening) as listener:
        order = _next_order(listener)
    if order is not None:
        _run(**order)


def _next_order(listener: socket.socket) -> dict[str, Any] | None:
    """Fork a child for each order, in which this returns the order; None in the server, once the tests have
    ended."""
    owner = int(_shared()[1])
    children: dict[int, socket.socket] = {}
    bell, ringing = socket.socketpair()
    bell.setblocking(False)
    ringing.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(ringing.fileno())
    while True:
        ready, _, _ = select.select([listener, bell, *children.values()], [], [], LOOK_SECONDS)
        if bell in ready:
            bell.recv(4096)
        ended = not _lives(owner)
        for pid, connection in children.items():
            # Nothing is said after an order, so whoever gave it has left.
            if ended or connection in ready:
                os.kill(pid, signal.SIGKILL)
        _bury(children)
        if ended:
            return None
        if listener in ready:
            connection, _ = listener.accept()
            size, streams, _, _ = socket.recv_fds(connection, 8, 3)
            if size and not streams:
                return None
            text = connection.recv(int.from_bytes(size), socket.MSG_WAITALL) if size else b""
            if len(text) < max(1, int.from_bytes(size)):
                # Whoever connected was killed before it had given its order.
                for stream in (*streams, connection.detach()):
                    os.close(stream)
                continue
            order = json.loads(text)
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for other in (bell, ringing, connection, *children.values()):
                    other.close()
                return {**order, "streams": streams}
            children[pid] = connection
            for stream in streams:
                os.close(stream)
            # Nobody may be there any more; then the child is killed next.
            with contextlib.suppress(OSError):
                connection.sendall(f"{pid}\n".encode())


def _bury(children: dict[int, socket.socket]) -> None:
    """Tell of each child that has ended."""
    with contextlib.suppress(ChildProcessError):
        while (end := os.wait4(-1, os.WNOHANG))[0]:
            pid, status, used = end
            with contextlib.suppress(OSError), children.pop(pid) as connection:
                end = [os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024]
                connection.sendall(json.dumps(end).encode() + b"\n")


def _lives(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def _run(words: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> None:
    """In a child: do as Python does that was started with these words."""
    import runpy
    import types

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    _open_streams()
    sys.path[:0] = ["", *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    how, what, *others = words
    if how == "-m":
        sys.argv = [what, *others]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *others]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)


def _open_streams() -> None:
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
    at_once = bool(os.environ.get("PYTHONUNBUFFERED"))
    output = open(1, "wb", 0 if at_once else -1, closefd=False)  # noqa: SIM115 - for its whole life
    sys.stdin = open(0, encoding=encoding, errors=errors or None, closefd=False)  # noqa: SIM115
    sys.stdout = io.TextIOWrapper(output, encoding, errors or None, write_through=at_once)
    sys.stderr = open(2, "w", 1, encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115


if __name__ == "__main__":
    _stand_in(sys.argv[1], sys.argv[2:])
