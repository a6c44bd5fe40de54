"""Starting the window: ports, passwords, and a second start on the same workspace."""

import errno
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI

from app.main import _already_open, _listener, _password, _serve, _Server, build_parser, main
from app.state import AppState
from lora_core.errors import RunError
from tests.waiting import PATIENCE
from tests.warm import program

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5"])
def test_listening_wider_needs_a_password(
    host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--host", host, "--no-browser", "--workspace", str(tmp_path)]) == 1
    assert "--password-file" in capsys.readouterr().err


def test_a_password_file_must_hold_one(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        _password(tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(RunError, match="is empty"):
        _password(tmp_path / "empty")
    (tmp_path / "good").write_text("sésame\n", encoding="utf-8")
    assert _password(tmp_path / "good") == "sésame"


def test_images_are_listed_once_the_window_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr("app.main._say_ready", lambda *given: done.append("ready"))

    def prepare() -> None:
        done.append("listed")
        server.quit()

    server = _Server(uvicorn.Config(FastAPI(), lifespan="off", log_level="warning"), "", False, prepare)
    with _listener("127.0.0.1", None) as listener:
        serving = threading.Thread(target=server.run, args=([listener],))
        serving.start()
        serving.join(PATIENCE)
    assert (done, serving.is_alive()) == (["ready", "listed"], False)


def test_a_list_that_cannot_be_made_is_left_to_the_page(app_state: AppState) -> None:
    app_state.list_images = lambda: bytes(-1)
    app_state.prepare()


def test_a_busy_port_that_was_asked_for_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RunError, match="cannot be used"):
            _listener("127.0.0.1", taken.getsockname()[1])


def test_without_a_port_the_next_free_one_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    first = _listener("127.0.0.1", None)
    second = _listener("127.0.0.1", None)
    try:
        assert second.getsockname()[1] > first.getsockname()[1]
        assert "taken by another program; using" in capsys.readouterr().out
    finally:
        first.close()
        second.close()


def test_a_window_that_is_gone_is_not_pointed_to(app_state: AppState) -> None:
    assert _already_open(app_state) is None
    (app_state.workspace / "window.json").write_text(json.dumps({"port": 1}))
    assert _already_open(app_state) is None
    (app_state.workspace / "window.json").write_text("broken")
    assert _already_open(app_state) is None


def test_a_window_opens_on_a_full_disk(app_state: AppState, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("app.main.write_atomically", full)
    for name in ("app.main.signal.signal", "app.main.sys.setswitchinterval", "app.main._Server.run"):
        monkeypatch.setattr(name, lambda *given, **named: None)
    with _listener("127.0.0.1", None) as listener:
        assert _serve(app_state, listener, build_parser().parse_args(["--no-browser"]), "") == 0


def test_a_second_start_points_to_the_first_and_the_real_server_guards_itself(tmp_path: Path) -> None:
    code = "import sys, app.main; sys.exit(app.main.main(sys.argv[1:]))"
    words = ["-c", code, "--no-browser", "--workspace", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, *words, "--port", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as first:
        try:
            assert first.stdout is not None
            ready = first.stdout.readline().strip()
            assert ready.startswith("Ready at http://127.0.0.1:")
            port = int(ready.rpartition(":")[2])
            second = subprocess.run(
                [program("window"), *words],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
            assert (second.returncode, ready in second.stdout) == (0, True)
            assert status(port, "GET / HTTP/1.1\r\nHost: evil.example\r\n") == 403
            assert status(port, f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n") == 200
            upload = (
                f"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin:"
                " http://evil.example\r\n"
            )
            assert status(port, upload + "Content-Length: 0\r\n") == 403
        finally:
            first.terminate()


def status(port: int, request: str) -> int:
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(f"{request}Connection: close\r\n\r\n".encode())
        return int(connection.recv(100).split()[1])
