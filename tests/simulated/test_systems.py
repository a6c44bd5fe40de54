"""What Windows and macOS do otherwise, as far as it can be had on Linux: names that only some systems have,
files that are held open, signals, reserved names, letter case, encodings of files and consoles."""

import ast
import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from app import install
from lora_core.data import importer
from lora_core.system import files, processes
from tests.test_architecture import TREES, imports

ELSEWHERE_ABSENT = {
    "app/install.py: winreg": "after a look at sys.platform",
    "app/install.py: msvcrt": "after a look at sys.platform",
    "app/install.py: fcntl": "after a look at sys.platform",
    "lora_core/models/device.py: resource": "an ImportError is expected",
    "lora_core/report/doctor.py: winreg": "after a look at sys.platform",
    "lora_core/system/processes.py: os.getuid": "limit_spinning and others_spin do nothing but on Linux",
}
"""Each use of what a system lacks, and what keeps that system from it."""
OF_ONE_SYSTEM = {
    "fcntl", "grp", "msvcrt", "nt", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty", "winreg",
    "winsound", "_winapi",
}  # fmt: skip
SYSTEMS = ("linux", "win32", "darwin")


def holds(test: ast.expr, system: str) -> bool:
    """Whether a condition of a stub holds: of the system, or of Python's version, which is new enough."""
    if isinstance(test, ast.BoolOp):
        return (all if isinstance(test.op, ast.And) else any)(holds(one, system) for one in test.values)
    if isinstance(test, ast.Compare) and ast.unparse(test.left) == "sys.platform":
        return (ast.literal_eval(test.comparators[0]) == system) == isinstance(test.ops[0], ast.Eq)
    return not isinstance(test, ast.Compare) or isinstance(test.ops[0], ast.GtE)


def names(body: list[ast.stmt], system: str) -> Iterator[str]:
    """What a stub declares for a system."""
    for node in body:
        if isinstance(node, ast.If):
            yield from names(node.body if holds(node.test, system) else node.orelse, system)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign):
            yield ast.unparse(node.target)


def test_what_a_system_lacks_is_not_used_there() -> None:
    """By the declarations of the standard library that mypy has."""
    mypy = pytest.importorskip("mypy", reason="the extra `test` brings it: python launch.py test")
    stubs = Path(mypy.__file__).parent / "typeshed" / "stdlib"
    lacked: set[str] = set()
    for module, stub in (
        ("os", "os/__init__"),
        *((n, n) for n in ("signal", "socket", "subprocess", "time")),
    ):
        body = ast.parse((stubs / f"{stub}.pyi").read_text(encoding="utf-8")).body
        known = [set(names(body, system)) for system in SYSTEMS]
        lacked |= {f"{module}.{name}" for name in set.union(*known) - set.intersection(*known)}
    assert {"os.fork", "os.startfile", "signal.SIGKILL"} <= lacked
    used = {
        f"{file}: {ast.unparse(node)}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in lacked
    }
    used |= {
        f"{file}: {name}"
        for file in TREES
        for name in {imported.split(".")[0] for imported in imports(file)} & OF_ONE_SYSTEM
    }
    assert used == set(ELSEWHERE_ABSENT)


def test_no_process_is_forked_to_go_on_with_our_code() -> None:
    """`spawn`, which Windows and macOS have instead, would import all of it again: children are programs."""
    forking = ("multiprocessing", "concurrent.futures.process", "torch.multiprocessing")
    ours = [file for file in TREES if not file.startswith("assets/")]
    assert [(file, name) for file in ours for name in imports(file) if name.startswith(forking)] == []


def test_texts_are_utf_8_whatever_a_system_prefers() -> None:
    own = {"read_text": 0, "write_text": 1}
    without = []
    for file, tree in TREES.items():
        if file.startswith("assets/"):
            continue
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            given = {each.arg for each in call.keywords}
            text = name in own and len(call.args) <= own[name] and isinstance(call.func, ast.Attribute)
            modes = [arg.value for arg in call.args[1:] if isinstance(arg, ast.Constant)]
            opened = isinstance(call.func, ast.Name) and name == "open" and not any("b" in m for m in modes)
            if (text or opened) and "encoding" not in given:
                without.append(f"{file}: {ast.unparse(call)}")
    # Of the system or our own, with nothing but ASCII in them.
    kernel = ("vendor", "class", "mem_info", "total.read_text()", "window.json")
    assert [one for one in without if not any(word in one for word in kernel)] == []


class Held:
    """A file that a reader has open on Windows, which lets go of it after so many tries."""

    def __init__(self, tries: int, winerror: int = 32) -> None:
        self.left, self.winerror = tries, winerror

    def __call__(self, source: Path, target: Path) -> None:
        if self.left:
            self.left -= 1
            error = PermissionError(errno.EACCES, "The process cannot access the file", str(target))
            error.winerror = self.winerror  # type: ignore[attr-defined]
            raise error
        os.rename(source, target)


@pytest.mark.parametrize(
    ("held", "works"), [(Held(3), True), (Held(2, 5), True), (Held(99), False), (Held(1, 19), False)]
)
def test_a_file_that_is_held_open_is_waited_for(
    held: Held, works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(files.time, "sleep", waits.append)
    monkeypatch.setattr(files.os, "replace", held)
    if works:
        files.write_atomically(tmp_path / "plan.json", b"{}")
        assert (tmp_path / "plan.json").read_bytes() == b"{}"
    else:
        with pytest.raises(PermissionError):
            files.write_atomically(tmp_path / "plan.json", b"{}")
        assert list(tmp_path.iterdir()) == []
    assert sum(waits) < 1


def test_the_signals_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGINT, SIGTERM and SIGBREAK, by Ctrl-Break, which counts as a key; there is no SIGHUP."""
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    taken: list[int] = []
    with processes.catch_signals(taken.append):
        signal.raise_signal(signal.SIGUSR1)
    assert taken == [signal.SIGUSR1]
    left: list[int] = []
    monkeypatch.setattr(processes.os, "_exit", left.append)
    stopping = processes.StopRequest()
    with stopping.taken():
        signal.raise_signal(signal.SIGUSR1)
        assert stopping.came
        signal.raise_signal(signal.SIGUSR1)
    assert left == [processes.INTERRUPTED]


def test_a_run_outlives_the_console_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0x200, raising=False)
        patch.setattr(subprocess, "CREATE_NO_WINDOW", 0x8000000, raising=False)
        patch.setattr(os, "name", "nt")
        options = processes.detached()
    assert options == {"creationflags": 0x8000200}


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "cp932", "ascii"])
def test_a_console_without_our_letters_shows_others(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", console)
    install.say("To be removed: C:\\Users\\Žofie\\绘画\\.venv")
    said = console.buffer.getvalue().decode(encoding)
    assert said.startswith("To be removed: C:")
    assert said.endswith("\\.venv\n")


@pytest.mark.parametrize(
    "name", ["con", "NUL.png", "com1.txt", "LPT\u00b9", "aux .jpg", "a:b?.png", "dot. ", "x" * 400]
)
def test_a_name_that_windows_cannot_have_becomes_one_that_it_can(name: str) -> None:
    made = str(files.safe_name(name))
    assert not files.is_device(made)
    assert made == made.rstrip(". ")
    assert not set('<>:"|?*') & set(made)
    assert len(made.encode()) < 255


def test_names_that_differ_in_case_alone_do_not_meet(tmp_path: Path) -> None:
    """On Windows and macOS the second would replace the first."""
    for folder, name in (("a", "Cat.png"), ("b", "cat.PNG"), ("c", "CAT.png")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (64, 64), (len(name), ord(folder), 7)).save(tmp_path / folder / name)
    into = tmp_path / "images"
    into.mkdir()
    sources = [next((tmp_path / folder).iterdir()) for folder in "abc"]
    importer.import_files(sources, into)
    stems = [path.stem.casefold() for path in into.glob("*.*")]
    assert len(stems) == len(set(stems)) == 3
