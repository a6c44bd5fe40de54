"""launch.py and app/install.py without an installation: versions, stamps, which PyTorch, what pip's lines
become."""

import ast
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

import launch
from app import install
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from tests.waiting import PATIENCE
from tests.warm import program

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with a .venv that looks whole, without a stamp."""
    root = tmp_path / "my éasel"
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("")
    (root / "pyproject.toml").write_text('[project]\ndependencies = ["torch>=2.8", "numpy"]\n')
    (root / ".venv" / "pyvenv.cfg").write_text(f"home = {tmp_path}\nversion = 3.11.7\n")
    monkeypatch.setattr(install, "ROOT", root)
    monkeypatch.setattr(install, "VENV", root / ".venv")
    monkeypatch.setattr(install, "PYTHON", python)
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    return root


@pytest.mark.parametrize("version", [(3, 11), (3, 12, 1), (3, 13, 9, "final", 0)])
def test_versions_that_fit(version: tuple[int, ...]) -> None:
    assert launch.version_problem(version) == ""


@pytest.mark.parametrize("version", [(2, 7), (3, 6), (3, 10, 12), (3, 14)])
def test_other_versions_get_one_sentence(version: tuple[int, ...]) -> None:
    problem = launch.version_problem(version)
    assert problem.startswith(f"LoRA Easel needs Python 3.11 to 3.13, and this is Python 3.{version[1]}") or (
        version == (2, 7) and "this is Python 2.7" in problem
    )
    assert "`python3.13 launch.py`" in problem
    assert "\n" not in problem


def test_the_versions_are_those_of_the_project() -> None:
    oldest, newest = launch.OLDEST, launch.NEWEST
    declared = f">={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"
    assert f'requires-python = "{declared}"' in (ROOT / "pyproject.toml").read_text()


def test_an_old_python_gets_as_far_as_the_sentence() -> None:
    """Parsed with the grammar of 3.6; and nothing is imported at the top that came later."""
    tree = ast.parse((ROOT / "launch.py").read_text(encoding="utf-8"), feature_version=(3, 6))
    tops = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {name.name for node in tops for name in node.names} == {"contextlib", "os", "subprocess", "sys"}


def test_a_stamp_makes_it_ready(place: Path) -> None:
    assert not install.is_ready("")
    install.write_stamp("", "3.11")
    assert install.is_ready("")
    assert not install.is_ready("test")


def test_a_changed_project_is_installed_again(place: Path) -> None:
    install.write_stamp("test", "3.11")
    assert install.is_ready("test")
    with open(place / "pyproject.toml", "a") as file:
        file.write("# changed\n")
    assert not install.is_ready("test")


@pytest.mark.parametrize("text", ["", "[]", "7", "{", '{"pyproject": "0"}'])
def test_a_broken_stamp_counts_for_nothing(place: Path, text: str) -> None:
    (place / ".venv" / "launch.json").write_text(text)
    assert not install.is_ready("")


def test_a_moved_folder_is_installed_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install.write_stamp("", "3.11")
    moved = place.with_name("moved")
    place.rename(moved)
    monkeypatch.setattr(install, "ROOT", moved)
    monkeypatch.setattr(install, "VENV", moved / ".venv")
    monkeypatch.setattr(install, "PYTHON", moved / ".venv" / "bin" / "python")
    assert install.written_stamp()["place"] == str(place)
    assert not install.is_ready("")


@pytest.mark.parametrize("gone", ["bin/python", "pyvenv.cfg"])
def test_a_broken_environment_is_noticed(place: Path, gone: str) -> None:
    install.write_stamp("", "3.11")
    (place / ".venv" / gone).unlink()
    assert not install.is_ready("")


def test_an_environment_whose_python_was_removed_is_noticed(place: Path) -> None:
    install.write_stamp("", "3.11")
    (place / ".venv" / "pyvenv.cfg").write_text(f"home = {place / 'nowhere'}\n")
    assert not install.is_ready("")


def test_an_upgrade_behind_the_same_name_is_noticed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(install.PYTHON))
    install.write_stamp("", f"{sys.version_info[0]}.{sys.version_info[1]}")
    assert install.is_ready("")
    install.write_stamp("", "3.1")
    assert not install.is_ready("")


def test_a_new_card_or_driver_is_noticed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cards = [nvidia(570, 8.6)]
    monkeypatch.setattr(install, "find_cards", lambda: cards[-1])
    monkeypatch.setattr(install, "list_cards", lambda: str(cards))
    monkeypatch.setattr(install.platform, "system", lambda: "Linux")
    backend = install.torch_backend("Linux", cards[-1])
    install.write_stamp("", "3.11", backend)
    assert install.is_ready("")
    cards[0] = nvidia(575, 8.6)  # has the same build
    install.note_new_card()
    assert (capsys.readouterr().out, install.written_stamp()["cards"]) == ("", str(cards))
    for cards[0], said in ((nvidia(580, 8.6), True), (install.Cards(), True), (nvidia(575, 8.6), False)):
        install.note_new_card()
        assert ("`python launch.py repair` installs the PyTorch for it" in capsys.readouterr().out) == said
        assert install.is_ready("")
    # A stamp of an earlier version does not know its card.
    (place / ".venv" / "launch.json").write_text(json.dumps({**install.expected_stamp(""), "python": "3.11"}))
    install.note_new_card()
    assert (capsys.readouterr().out, install.is_ready("")) == ("", True)
    monkeypatch.undo()
    before = install.list_cards()
    assert install.list_cards() == before
    monkeypatch.setattr(install, "windows_adapters", lambda: ["NVIDIA GeForce RTX 3060", "32.0.15.6094"])
    assert install.list_cards() != before


def test_half_an_environment_has_no_version(place: Path) -> None:
    assert install.environment_version() == ""


def test_an_environment_that_runs_has_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "PYTHON", Path(sys.executable))
    assert install.environment_version() == f"{sys.version_info[0]}.{sys.version_info[1]}"
    (place / ".venv" / "pyvenv.cfg").write_text("home = /nowhere\n")
    assert install.environment_version() == ""


def nvidia(driver: int, *capabilities: float) -> install.Cards:
    return install.Cards(nvidia=True, driver=driver, capabilities=capabilities)


NONE = install.Cards()
AMD, INTEL = install.Cards(amd=True), install.Cards(intel=True)


@pytest.mark.parametrize(
    ("system", "cards", "backend"),
    [
        ("Linux", install.Cards(), "cpu"),
        ("Linux", AMD, "rocm6.4"),
        ("Linux", INTEL, "xpu"),
        ("Linux", install.Cards(nvidia=True, driver=580, capabilities=(8.6,), amd=True), ""),
        ("Linux", nvidia(470), "cu126"),
        ("Linux", nvidia(580, 8.6), ""),
        ("Linux", nvidia(0), ""),
        ("Linux", nvidia(550, 8.6), "cu126"),
        ("Linux", nvidia(580, 6.1), "cu126"),
        ("Linux", nvidia(580, 8.9, 6.1), "cu126"),  # which serves both
        ("Linux", nvidia(580, 3.5, 8.9), ""),  # no build serves the older one
        ("Linux", nvidia(580, 12.0, 6.1), ""),  # none serves both
        ("Linux", nvidia(572, 12.0, 6.1), "cu128"),
        ("Windows", install.Cards(), ""),
        ("Windows", AMD, ""),
        ("Windows", INTEL, "xpu"),
        ("Windows", nvidia(0), "cu130"),
        ("Windows", nvidia(591, 12.0), "cu130"),
        ("Windows", nvidia(572, 12.0), "cu128"),
        ("Windows", nvidia(560, 8.9), "cu126"),
        ("Windows", nvidia(580, 6.1), "cu126"),
        ("Darwin", install.Cards(), ""),
    ],
)
def test_which_pytorch(system: str, cards: install.Cards, backend: str) -> None:
    assert install.torch_backend(system, cards) == backend


@pytest.mark.parametrize(
    ("system", "cards", "words"),
    [
        ("Linux", nvidia(470), "driver 470 is too old for PyTorch: install driver 580"),
        ("Windows", nvidia(580, 3.5), "compute capability 3.5"),
        ("Windows", AMD, "no build for AMD cards on Windows"),
        ("Windows", install.Cards(nvidia=True, driver=580, amd=True), ""),
        ("Linux", AMD, ""),
        ("Linux", nvidia(550, 8.6), ""),
        ("Linux", nvidia(0), ""),
    ],
)
def test_a_card_that_cannot_be_used_is_named(system: str, cards: install.Cards, words: str) -> None:
    found = install.card_notes(system, cards)
    assert len(found) == bool(words)
    assert words in " ".join(found)


@pytest.mark.parametrize(
    ("driver", "capability", "card"),
    [
        ("580.65.06\n", "8.6\n", nvidia(580, 8.6)),
        ("572.16\n572.16\n", "12.0\n6.1\n", nvidia(572, 12.0, 6.1)),
        ("470.82.01\n", None, nvidia(470)),  # a driver that does not know compute_cap
        ("[N/A]\n", "[N/A]\n", nvidia(0)),
        ("", "", nvidia(0)),
    ],
)
def test_what_nvidia_smi_says(
    driver: str, capability: str | None, card: install.Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        answer = driver if command[1] == "--query-gpu=driver_version" else capability
        if answer is None:
            raise subprocess.CalledProcessError(2, command)
        return subprocess.CompletedProcess(command, 0, stdout=answer)

    monkeypatch.setattr(install.subprocess, "run", run)
    monkeypatch.setattr(install.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(install.os.path, "exists", lambda path: False)
    monkeypatch.setattr(install, "intel_card", lambda: False)
    assert install.find_cards() == card


@pytest.mark.parametrize(
    ("names", "cards"),
    [
        (["Intel(R) UHD Graphics 770", "NVIDIA GeForce RTX 3060"], install.Cards(nvidia=True)),
        (["AMD Radeon(TM) Graphics", "AMD Radeon RX 7800 XT"], AMD),
        (["AMD Radeon(TM) Graphics"], install.Cards()),
        (["Intel(R) Arc(TM) A770 Graphics"], INTEL),
    ],
)
def test_what_windows_calls_its_cards(
    names: list[str], cards: install.Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "nvidia_smi", lambda field: [])
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    monkeypatch.setattr(install.os.path, "exists", lambda path: False)
    monkeypatch.setattr(install, "intel_card", lambda: False)
    monkeypatch.setattr(install, "windows_adapters", lambda: names)
    assert install.find_cards() == cards


@pytest.mark.parametrize(
    ("place", "vendor", "kind", "found"),
    [
        ("0000:03:00.0", "0x8086", "0x030000", True),
        ("0000:00:02.0", "0x8086", "0x030000", False),  # the processor's own graphics
        ("0000:03:00.0", "0x8086", "0x020000", False),  # a network card
        ("0000:03:00.0", "0x10de", "0x030000", False),
    ],
)
def test_cards_of_intel_on_linux(tmp_path: Path, place: str, vendor: str, kind: str, found: bool) -> None:
    (tmp_path / place).mkdir()
    (tmp_path / place / "vendor").write_text(vendor + "\n")
    (tmp_path / place / "class").write_text(kind + "\n")
    assert install.intel_card(tmp_path) == found


def install_calls(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    works: tuple[str, ...],
    *,
    cards: install.Cards = NONE,
    reachable: bool = True,
) -> list[tuple[str, ...]]:
    """The installations that `install_torch` asks for on Linux, where `works` names those that succeed."""
    calls: list[tuple[str, ...]] = []

    def installed(command: list[str], quiet: bool = False) -> bool:
        words = tuple(command[command.index("install") + 1 :])
        calls.append(words)
        kind = next(
            (kind for mark, kind in MARKS.items() if any(word.startswith(mark) for word in words)), "tool"
        )
        return kind in works

    monkeypatch.setattr(install, "run_install", installed)
    monkeypatch.setattr(install, "answers", lambda url: reachable)
    monkeypatch.setattr(install.platform, "system", lambda: "Linux")
    install.install_torch(cards)
    return calls


MARKS = {"--no-index": "local", "--torch-backend": "uv", "--index-url": "index"}
LOCAL = ("--no-index", "--no-deps", "torch>=2.8")
TOOL = ("uv", "--only-binary", ":all:")
INDEX = ("torch>=2.8", "--index-url", install.TORCH_INDEX + "cpu")


def by_uv(backend: str) -> tuple[str, ...]:
    return ("--python", str(install.PYTHON), f"--torch-backend={backend}", "torch>=2.8")


def test_a_pytorch_that_is_there_is_taken(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert install_calls(place, monkeypatch, ("local",)) == [LOCAL]


@pytest.mark.parametrize(
    ("cards", "backend"),
    [
        (install.Cards(), "auto"),
        (AMD, "auto"),
        (INTEL, "xpu"),
        (nvidia(580, 6.1), "cu126"),  # which cards a build has code for, uv does not know
        (nvidia(550, 8.6), "cu126"),
    ],
)
def test_uv_finds_the_build(
    place: Path, monkeypatch: pytest.MonkeyPatch, cards: install.Cards, backend: str
) -> None:
    calls = install_calls(place, monkeypatch, ("tool", "uv"), cards=cards)
    assert calls == [LOCAL, TOOL, by_uv(backend)]


def test_pip_takes_over_where_uv_cannot(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install_calls(place, monkeypatch, ("tool", "index")) == [LOCAL, TOOL, by_uv("auto"), INDEX]
    assert install_calls(place, monkeypatch, ("index",)) == [LOCAL, TOOL, INDEX]
    assert "default build" not in capsys.readouterr().out


def test_an_index_that_fails_or_is_silent_is_left(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install_calls(place, monkeypatch, ())[-1] == INDEX
    assert "the default build is taken instead" in capsys.readouterr().out
    # Nothing is fetched, uv neither, where PyTorch's index is out of reach.
    assert install_calls(place, monkeypatch, (), reachable=False) == [LOCAL]
    assert "does not answer" in capsys.readouterr().out


def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "PROBE_SECONDS", 0.2)
    assert not install.answers("http://127.0.0.1:9/")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Downloading torch-2.8.0-cp311.whl (184.0 MB)", "Downloading torch-2.8.0-cp311.whl (184.0 MB)"),
        ("Downloading six-1.16.0-py2.whl (11 kB)", ""),
        ("Downloading gradio_client-2.7.whl (1.5 MB)", ""),
        ("Installing collected packages: a, b, c", "unpacking 3 packages"),
        ("Requirement already satisfied: six", ""),
    ],
)
def test_what_is_said_of_pips_lines(line: str, said: str) -> None:
    assert install.worth_saying(line) == said


def test_the_errors_of_pips_log(place: Path) -> None:
    stamp = "2026-01-01T12:00:00,000 "
    lines = ["Collecting nothing", "ERROR: Could not find a version", "  detail", "ERROR: No matching é"]
    (place / ".venv" / "pip.log").write_text("\n".join(stamp + line for line in lines), encoding="utf-8")
    assert install.pip_errors() == "  ERROR: Could not find a version\n  ERROR: No matching é"


def test_a_failed_installation_says_what_to_do_and_leaves_no_stamp(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(*arguments: str, quiet: bool = False) -> bool:
        (place / ".venv" / "pip.log").write_text("T ERROR: No space left on device")
        return False

    monkeypatch.setattr(install, "pip", pip)
    monkeypatch.setattr(install, "environment_version", lambda: "3.11")
    monkeypatch.setattr(install, "install_torch", lambda cards: None)
    with pytest.raises(install.SetupError, match=r"(?s)ERROR: No space left on device.*start again"):
        install.set_up("")
    assert install.written_stamp() == {}


@pytest.mark.parametrize(
    ("card", "extras"),
    [(False, "optimizers,tensorboard,kinds"), (True, "optimizers,tensorboard,kinds,eight-bit")],
)
def test_what_the_window_offers_is_installed(
    card: bool, extras: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: list[tuple[str, ...]] = []
    monkeypatch.setattr(install, "pip", lambda *arguments, quiet=False: installed.append(arguments) or True)
    monkeypatch.setattr(install, "uv", lambda *arguments: False)
    monkeypatch.setattr(install, "environment_version", lambda: "3.11")
    monkeypatch.setattr(install, "install_torch", lambda cards: None)
    monkeypatch.setattr(install, "find_cards", lambda: install.Cards(nvidia=card))
    install.set_up("")
    assert installed == [("--editable", f".[{extras}]")]


def test_one_process_sets_up_and_the_other_finds_it_done(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: list[tuple[str, ...]] = []
    inside = threading.Event()

    def pip(*arguments: str, quiet: bool = False) -> bool:
        installed.append(arguments)
        inside.set()
        second.join(0.5)
        assert second.is_alive()
        return True

    monkeypatch.setattr(install, "pip", pip)
    monkeypatch.setattr(install, "uv", lambda *arguments: False)
    monkeypatch.setattr(install, "environment_version", lambda: "3.11")
    monkeypatch.setattr(install, "install_torch", lambda cards: None)
    first = threading.Thread(target=install.set_up, args=("test",))
    second = threading.Thread(target=lambda: inside.wait(PATIENCE) and install.set_up("test"))
    second.start()
    first.start()
    first.join()
    second.join()
    assert installed == [("--editable", ".[optimizers,tensorboard,kinds,test]")]
    assert json.loads((place / ".venv" / "launch.json").read_text())["extra"] == "test"


def test_a_folder_that_cannot_be_written_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "VENV", place / "pyproject.toml" / ".venv")
    with pytest.raises(install.SetupError, match="cannot be written"):
        install.set_up("")


def test_a_broken_environment_does_not_start_for_ever(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install.write_stamp("", "3.11")
    monkeypatch.setenv(launch.AGAIN, "1")
    assert launch.main(["--no-browser"]) == 1
    assert "is broken: delete it and start again" in capsys.readouterr().out


def test_pytest_gets_its_arguments_and_the_app_its_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[tuple[str, ...]] = []
    monkeypatch.setattr(launch, "go_on", lambda *command: began.append(command) or 7)
    monkeypatch.chdir(place)
    install.write_stamp("test", "3.11")
    monkeypatch.delenv(launch.AGAIN, raising=False)
    assert launch.main(["test", "-k", "x y"]) == 7
    assert launch.main(["--port", "1"]) == 7
    assert launch.main(["test"]) == 7
    python, script = str(install.PYTHON), str(install.ROOT / "launch.py")
    assert began == [
        (python, "-m", "pytest", "-k", "x y"),
        (python, script, "--port", "1"),
        (python, "-m", "pytest", *launch.ALL_TESTS),
    ]
    assert launch.AGAIN not in os.environ


class CutIndex(http.server.BaseHTTPRequestHandler):
    """A package index whose answers break off: the n-th ends after the share of it that CUTS says."""

    CUTS: list[float] = []
    WHEEL = b""
    asked: list[str] = []

    def do_GET(self) -> None:
        share = self.CUTS[len(self.asked)] if len(self.asked) < len(self.CUTS) else 1.0
        self.asked.append(self.path)
        page = self.path.endswith("/")
        body = b'<a href="/toy-1-py3-none-any.whl">toy-1-py3-none-any.whl</a>' if page else self.WHEEL
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if page else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: int(share * len(body))])

    def log_message(self, *words: object) -> None:
        pass


CUTS = [0.0, 0.3, 1.0, 0.0, 1.0, 0.5, 1.0, 0.999]
"""At five points: twice of the page, then of the wheel, whose page is asked for each time."""


def test_a_set_up_goes_on_where_the_network_is_cut_at_five_points(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = place / "toy.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy.py", "x = 1\n" + "#" * 100_000)
        archive.writestr("toy-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1\n")
        archive.writestr(
            "toy-1.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: a\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("toy-1.dist-info/RECORD", "")
    monkeypatch.setattr(CutIndex, "WHEEL", wheel.read_bytes())
    monkeypatch.setattr(CutIndex, "asked", [])
    monkeypatch.setattr(CutIndex, "CUTS", CUTS)
    monkeypatch.setattr(install, "PYTHON", Path(program("engine")))
    monkeypatch.setenv("PIP_RETRIES", "0")  # of pip itself, which waits between them
    monkeypatch.setenv("PIP_RESUME_RETRIES", "0")
    monkeypatch.setattr(install, "TRIES", 6)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), CutIndex) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/simple"
        target = place / "installed"
        assert install.pip(
            "toy", "--no-cache-dir", "--index-url", address, "--target", str(target), quiet=True
        )
        server.shutdown()
    assert (target / "toy.py").is_file()
    assert sum(share < 1 for share in CUTS) == 5
    assert len(CutIndex.asked) > len(CUTS)


def test_a_failure_that_is_no_broken_connection_is_not_repeated(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def run_install(command: list[str], quiet: bool) -> bool:
        calls.append(command)
        (place / ".venv" / "pip.log").write_text("T ERROR: No space left on device\n")
        return False

    monkeypatch.setattr(install, "run_install", run_install)
    assert not install.pip("x")
    assert len(calls) == 1


def test_a_folder_of_wheels_is_all_that_is_asked(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / install.WHEELS).mkdir()
    seen: list[dict[str, str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        seen.append(options["env"])
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(install.subprocess, "run", run)
    install.run_install(["pip", "install"], quiet=True)
    install.run_install(["pip", "download"], quiet=True)
    offline, online = seen
    assert offline["PIP_NO_INDEX"] == "1"
    assert offline["PIP_FIND_LINKS"] == (place / "wheels").as_uri()
    assert "PIP_NO_INDEX" not in online
    monkeypatch.setattr(install, "find_cards", install.Cards)
    monkeypatch.setattr(install, "pip", lambda *arguments, quiet=False: False)
    monkeypatch.setattr(install, "environment_version", lambda: "3.11")
    monkeypatch.setattr(install, "install_torch", lambda cards: None)
    with pytest.raises(install.SetupError, match=r"wheels alone: make it by `python launch.py wheels`"):
        install.set_up("")


@pytest.mark.parametrize(("backend", "index"), [("cpu", True), ("", False)])
def test_wheels_are_those_of_this_machine(
    backend: str, index: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(place / "pyproject.toml", "a") as file:
        file.write('[build-system]\nrequires = ["hatchling>=1"]\n')
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(install, "pip", lambda *arguments, verb: calls.append((verb, *arguments)) or True)
    monkeypatch.setattr(install, "torch_backend", lambda system, cards: backend)
    monkeypatch.setattr(install, "find_cards", install.Cards)
    install.download_wheels()
    (verb, *first), second = calls
    assert verb == "download"
    assert first[2:4] == ["torch>=2.8", "--no-deps"]
    assert first[4:] == (["--index-url", install.TORCH_INDEX + "cpu"] if index else [])
    everything = f".[{','.join(install.EXTRAS)}]"
    assert {everything, "hatchling>=1", "editables", "pip", "--find-links"} <= set(second)


def test_repair_makes_the_environment_afresh(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install.write_stamp("test", "3.11")
    made: list[str] = []
    monkeypatch.setattr(install, "make_environment", lambda: made.append("made"))
    monkeypatch.setattr(install, "uv", lambda *arguments: False)
    monkeypatch.setattr(install, "environment_version", lambda: "3.11")
    monkeypatch.setattr(install, "install_torch", lambda cards: None)
    monkeypatch.setattr(install, "find_cards", install.Cards)
    monkeypatch.setattr(install, "pip", lambda *arguments: made.append(arguments[1]) or True)
    assert launch.main(["repair"]) == 0
    assert made == ["made", ".[optimizers,tensorboard,kinds,test]"]


def test_what_removes_the_environment_runs_outside_of_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[tuple[str, ...]] = []
    monkeypatch.setattr(launch, "go_on", lambda *command: began.append(command) or 7)
    monkeypatch.setattr(sys, "prefix", str(place / ".venv"))
    base = place / "python3"
    base.write_text("")
    (place / ".venv" / "pyvenv.cfg").write_text(f"home = {place}\nexecutable = {base}\n")
    for word in ("repair", "uninstall"):
        assert launch.main([word, "--yes"]) == 7
    script = str(place / "launch.py")
    assert began == [(str(base), script, "repair", "--yes"), (str(base), script, "uninstall", "--yes")]
    base.unlink()
    assert launch.main(["repair"]) == 1


def test_uninstalling_says_what_goes_and_keeps_the_workspace(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = place / "workspace"
    (home / "projects").mkdir(parents=True)
    monkeypatch.setattr(install, "find_workspace", lambda: home)
    monkeypatch.setattr("builtins.input", lambda question: "no")
    assert launch.main(["uninstall"]) == 1
    assert (place / ".venv").is_dir()
    assert launch.main(["uninstall", "--all"]) == 1
    said = capsys.readouterr().out
    assert f"To be removed: {place / '.venv'}" in said
    assert f"Stays: {home}, with images" in said
    assert "Nothing was removed." in said
    assert "not --all" in said
    assert launch.main(["uninstall", "--yes"]) == 0
    assert not (place / ".venv").exists()
    assert (home / "projects").is_dir()
    monkeypatch.setattr("builtins.input", lambda question: "yes")
    assert launch.main(["uninstall", "--workspace"]) == 0
    assert not home.exists()
    home.mkdir()  # which nothing says is one
    assert launch.main(["uninstall", "--workspace", "--yes"]) == 1
    assert home.is_dir()


@pytest.mark.parametrize("above", ["the home folder", "the checkout"])
def test_uninstalling_keeps_what_is_more_than_a_workspace(
    above: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = place.parent / "home"
    (home / "projects").mkdir(parents=True)
    monkeypatch.setattr(Path, "home", lambda: home)
    folder = home if above == "the home folder" else place
    (folder / "projects").mkdir(exist_ok=True)
    monkeypatch.setattr(install, "find_workspace", lambda: folder)
    assert launch.main(["uninstall", "--workspace", "--yes"]) == 1
    assert (folder / "projects").is_dir()
    assert (place / ".venv").is_dir()


def test_uninstalling_waits_for_what_is_trained(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(install, "find_workspace", lambda: place / "workspace")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run = RunFolder.create(place / "workspace" / "runs" / "cat", RunConfig())
    with run.hold():
        assert launch.main(["uninstall", "--yes"]) == 1
    assert "Stop the running training first (cat)" in capsys.readouterr().out
    assert (place / ".venv").is_dir()
    assert launch.main(["uninstall", "--yes"]) == 0


@pytest.mark.parametrize("found", [True, False])
def test_uninstalling_says_where_it_cannot_check_what_is_trained(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: bool
) -> None:
    """A Python that runs, without the engine: as where a setup broke off."""
    monkeypatch.setattr(install, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(install, "LIVE", "raise SystemExit(1)")
    monkeypatch.setattr(install, "find_workspace", lambda: place / "workspace" if found else None)
    monkeypatch.setattr("builtins.input", lambda question: "yes")
    assert launch.main(["uninstall"]) == 1
    assert "could not be checked" in capsys.readouterr().out
    assert (place / ".venv").is_dir()
    assert launch.main(["uninstall", "--yes"]) == 0


def test_the_workspace_is_the_one_that_a_start_uses(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "ROOT", ROOT)
    monkeypatch.setenv("LORA_EASEL_HOME", str(place / "elsewhere"))
    assert install.find_workspace() is None  # an empty file is no Python
    monkeypatch.setattr(install, "PYTHON", Path(sys.executable))
    assert install.find_workspace() == place / "elsewhere"
    assert not (place / "elsewhere").exists()


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_an_update_pulls_and_then_sets_up(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, above = place / "copy", place / "above"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "-q", str(above)], check=True)
    shutil.copy(ROOT / "launch.py", above)
    subprocess.run([*git, "add", "."], cwd=above, check=True)
    subprocess.run([*git, "commit", "-qm", "one"], cwd=above, check=True)
    subprocess.run([*git, "clone", "-q", str(above), str(copy)], check=True)
    (above / "new.txt").write_text("new")
    subprocess.run([*git, "add", "."], cwd=above, check=True)
    subprocess.run([*git, "commit", "-qm", "two"], cwd=above, check=True)
    monkeypatch.setattr(launch, "__file__", str(copy / "launch.py"))
    done: list[str] = []
    monkeypatch.setattr(install, "set_up", done.append)
    assert launch.main(["update"]) == 0
    assert (copy / "new.txt").is_file()
    assert done == [""]
    above.rename(place / "gone")
    assert launch.main(["update"]) == 1
    monkeypatch.setattr(launch, "__file__", str(place / "launch.py"))
    assert launch.main(["update"]) == 1
    said = capsys.readouterr().out
    assert "nothing was changed" in said
    assert "unpack the newest version" in said
    assert done == [""]


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.parametrize(
    ("pythons", "words"),
    [
        ({"python3": 1, "python3.12": 0}, "python3.12 launch.py --port 1\n"),
        ({"python3": 0, "python3.12": 1}, "python3 launch.py --port 1\n"),
        ({"python3": 1, "uv": 0}, "uv run --no-project --python 3.13 launch.py --port 1\n"),
        ({"python3": 1}, "LoRA Easel needs Python 3.11, 3.12 or 3.13"),
    ],
)
def test_a_double_click_finds_a_python_that_fits(tmp_path: Path, pythons: dict[str, int], words: str) -> None:
    for name, code in pythons.items():
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit {code}\necho {name} "$@"\n')
        script.chmod(0o755)
    (tmp_path / "dirname").symlink_to(shutil.which("dirname") or "")
    command, environment = [str(ROOT / "launch.command"), "--port", "1"], {"PATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.startswith(words)
    assert done.returncode == ("needs" in words)


def test_the_scripts_to_double_click_know_the_versions() -> None:
    for name in ("launch.bat", "launch.command"):
        text = (ROOT / name).read_bytes().decode()
        assert set(map(int, re.findall(r"\b3\.(\d+)\b", text))) == set(
            range(launch.OLDEST[1], launch.NEWEST[1] + 1)
        )
    assert b"\r\n" in (ROOT / "launch.bat").read_bytes()


def test_uv_installs_the_project_where_pip_has_no_index_of_its_own(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(install, "run_install", lambda command, quiet=False: calls.append(command) or True)
    monkeypatch.setattr(install, "environment_version", lambda: "3.11")
    monkeypatch.setattr(install, "install_torch", lambda cards: None)
    monkeypatch.setattr(install, "find_cards", install.Cards)
    install.set_up("")
    tool, project = calls
    assert tool[-3:] == list(TOOL)
    assert project[1:4] == ["-m", "uv", "pip"]
    assert project[-2:] == ["--editable", install.wanted(install.Cards())]
    install.PYTHON.with_name("uv").touch()
    calls.clear()
    assert install.uv("x")
    assert [command[1:4] for command in calls] == [["-m", "uv", "pip"]]  # it is there already
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example/simple")
    calls.clear()
    install.set_up("test")
    ((*_, editable, _),) = calls
    assert "uv" not in calls[0]
    assert editable == "--editable"
