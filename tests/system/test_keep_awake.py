"""Keeping the computer awake: with stand-ins for the systems' programs, which really run and really end."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lora_core.system import processes as awake
from lora_core.system.processes import keep_awake
from tests.waiting import PATIENCE, wait_for

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="shell scripts")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs that note their arguments, then do as the real ones: run what they are given, or wait for a
    pid."""
    folder = tmp_path / "bin"
    folder.mkdir()
    note = f'echo "$0 $*" >> "{tmp_path}/said"\n'
    inhibit = "#!/bin/sh\n" + note + 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n'
    (folder / "systemd-inhibit").write_text(inhibit)
    (folder / "caffeinate").write_text(
        "#!/bin/sh\n" + note + 'while kill -0 "$3" 2>/dev/null; do sleep 0.05; done\n'
    )
    for path in folder.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(awake, "_SYSTEMD", tmp_path)
    return tmp_path


def said(folder: Path) -> str:
    return (folder / "said").read_text() if (folder / "said").exists() else ""


def wait_for_words(folder: Path) -> str:
    return wait_for(lambda: said(folder))


@pytest.mark.parametrize(
    ("system", "words"),
    [("linux", "systemd-inhibit --what=idle:sleep"), ("darwin", "caffeinate -i -w {process}")],
)
def test_a_program_holds_it_awake_and_ends(programs: Path, system: str, words: str) -> None:
    before = set(psutil.Process().children(recursive=True))
    with keep_awake(system):
        assert words.format(process=os.getpid()) in wait_for_words(programs)
        assert set(psutil.Process().children()) - before
    assert set(psutil.Process().children(recursive=True)) - before == set()


def test_it_ends_also_with_a_killed_trainer(programs: Path) -> None:
    code = (
        "import time; from pathlib import Path; from lora_core.system import processes as awake\n"
        f"awake._SYSTEMD = Path({str(programs)!r})\n"
        "with awake.keep_awake('linux'):\n    time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_for_words(programs)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.kill()
    process.wait()
    assert psutil.wait_procs(children, timeout=PATIENCE)[1] == []


@pytest.mark.parametrize("system", ["linux", "darwin", "win32", "plan9"])
def test_a_system_without_such_a_thing_is_no_reason_to_fail(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with keep_awake(system):
        pass


def test_a_program_that_refuses_is_no_reason_to_fail(programs: Path) -> None:
    (programs / "bin" / "systemd-inhibit").write_text("#!/bin/sh\nexit 1\n")
    with keep_awake("linux"):
        time.sleep(0.1)
    (programs / "bin" / "systemd-inhibit").write_text("no program at all")
    with keep_awake("linux"):
        pass
