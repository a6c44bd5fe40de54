"""What the window starts on this computer, and for whom: the file manager, for its files, and TensorBoard."""

import importlib.util
import os
import sys
import urllib.request
import webbrowser
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from app import jobs
from app.export.view import add_export_routes
from app.routes import add_routes
from app.state import AppState, FileManager, file_manager_commands, missing_file_manager
from tests.waiting import PATIENCE, wait_for

NAME = "my, 'lora' $(touch x).safetensors"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file, and a desktop whose programs write down what they are asked."""
    monkeypatch.setattr(sys, "platform", "linux")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, code in (("dbus-send", 1), ("xdg-open", 0)):
        (programs / name).write_text(
            f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >> "{tmp_path}/asked"\nexit {code}\n'
        )
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DISPLAY", ":9")
    made = tmp_path / NAME
    made.write_bytes(b"x")
    return made


def asked(file: Path, last: str) -> list[str]:
    """What the desktop's programs were asked, once it ends so."""
    said = file.parent / "asked"

    def look() -> list[str]:
        lines = said.read_text().splitlines() if said.exists() else []
        return lines if lines[-1:] == [last] else []

    return wait_for(look)


def client(app_state: AppState, near: str = "127.0.0.1", host: str = "127.0.0.1:7860") -> TestClient:
    app = FastAPI()
    add_routes(app, app_state)
    add_export_routes(app, app_state)
    return TestClient(app, base_url=f"http://{host}", client=(near, 5000))


def test_a_file_that_was_named_is_shown(app_state: AppState, file: Path) -> None:
    page = client(app_state)
    refused = page.post("/easel/show-file", json={"file": str(file)}).json()
    assert "was not written by the window" in refused["problem"]
    assert "Show in folder" in app_state.files.place(file, "It is at")
    assert page.post("/easel/show-file", json={"file": str(file)}).json() == {"done": True}
    lines = asked(file, str(file.parent))
    assert lines[0] == "dbus-send"
    assert f"array:string:{file.as_uri()}" in lines
    assert "," not in file.as_uri()
    assert lines[-2:] == ["xdg-open", str(file.parent)]
    assert not (file.parent / "x").exists()
    file.unlink()
    assert "no longer exists" in page.post("/easel/show-file", json={"file": str(file)}).json()["problem"]


@pytest.mark.parametrize(
    ("near", "host", "headers"),
    [
        ("192.168.1.7", "127.0.0.1:7860", {}),
        ("127.0.0.1", "studio.lan:7860", {}),
        ("127.0.0.1", "127.0.0.1:7860", {"X-Forwarded-For": "192.168.1.7"}),
    ],
)
def test_only_for_a_page_on_this_computer(
    app_state: AppState, file: Path, near: str, host: str, headers: dict[str, str]
) -> None:
    app_state.files.place(file, "It is at")
    page = client(app_state, near, host)
    answer = page.post("/easel/show-file", json={"file": str(file)}, headers=headers)
    assert "open to other computers" in answer.json()["problem"]
    assert not (file.parent / "asked").exists()
    answer = page.post("/easel/tensorboard", json={}, headers=headers)
    assert "only on the computer that runs this window" in answer.json()["problem"]
    answer = page.post("/easel/export/upload", json={"repo": "a/b"}, headers=headers)
    assert "token of the computer that runs this window" in answer.json()["problem"]


def test_where_it_cannot_be_shown_the_path_stays_with_the_reason(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = FileManager()
    files.shared = True
    assert "open to other computers" in files.place(file, "It is at")
    files.shared = False
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    shown = files.place("/tmp/<b>.safetensors", "It is at")
    assert "No desktop session is running" in shown
    assert "Copy path" in shown
    assert "Show in folder" not in shown
    assert "<b>" not in shown
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert files.problem == ""
    monkeypatch.setenv("PATH", "")
    assert "dbus-send or xdg-open" in files.problem


def test_the_commands_of_each_system() -> None:
    file = Path("/home/a b/x.safetensors")
    assert file_manager_commands(file, "darwin") == [["open", "-R", str(file)]]
    assert file_manager_commands(file, "win32") == [["explorer", "/select,", str(file)]]
    assert missing_file_manager("darwin", {}) == missing_file_manager("win32", {}) == ""


def test_tensorboard_opens_once_and_ends_with_the_window(
    app_state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(jobs, "TENSORBOARD_SECONDS", PATIENCE)
    page = client(app_state)
    try:
        address = page.post("/easel/tensorboard", json={}).json()["address"]
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address) as answer:
            assert "TensorBoard" in answer.read().decode()
        assert page.post("/easel/tensorboard", json={}).json()["address"] == address
        wait_for(lambda: opened == [address, address])
    finally:
        app_state.close()
    assert app_state.tensorboard._process is not None
    assert app_state.tensorboard._process.poll() is not None


def test_a_tensorboard_that_cannot_start_says_why(
    app_state: AppState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    page = client(app_state)
    problem = page.post("/easel/tensorboard", json={}).json()["problem"]
    assert "needs the package tensorboard" in problem
    assert "pip install tensorboard" in problem
    monkeypatch.undo()
    broken = tmp_path / "python"
    broken.write_text('#!/bin/sh\necho "no module of that name" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    if importlib.util.find_spec("tensorboard"):
        problem = page.post("/easel/tensorboard", json={}).json()["problem"]
        assert problem == "TensorBoard did not start: no module of that name"
        process = app_state.tensorboard._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdin.closed


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    """A package tensorboard that says something and then hangs."""
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "__init__.py").touch()
    code = f"import time\ndef run_main():\n    print({says!r})\n    time.sleep(3600)\n"
    (folder / "tensorboard" / "main.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def test_a_tensorboard_ends_with_a_window_that_is_killed(
    app_state: AppState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, "TensorBoard 2 at http://127.0.0.1:9/ (press CTRL+C)")
    monkeypatch.setattr(webbrowser, "open", lambda address: None)
    monkeypatch.setattr(jobs, "TENSORBOARD_SECONDS", PATIENCE)
    try:
        assert app_state.tensorboard.open() == "http://127.0.0.1:9/"
        process = app_state.tensorboard._process
        assert process is not None
        assert process.stdin is not None
        # What the system does with the files of a process that is killed.
        process.stdin.close()
        assert process.wait(PATIENCE) == 0
    finally:
        app_state.close()


def test_a_tensorboard_that_hangs_at_its_start_is_ended(
    app_state: AppState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, "still loading")
    monkeypatch.setattr(jobs, "TENSORBOARD_SECONDS", 0.3)
    problem = client(app_state).post("/easel/tensorboard", json={}).json()["problem"]
    assert "TensorBoard did not start: no address within" in problem
    assert app_state.tensorboard._process is not None
    assert app_state.tensorboard._process.poll() is not None
