"""Telling the end of a run: real commands, a real server, and nothing that a name can smuggle in."""

import http.server
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_core.errors import ConfigError
from lora_core.runs import diagnosis, events
from lora_core.runs.diagnosis import notify_end, notify_file, read_recipient, send_test, write_recipient
from lora_core.runs.events import EventWriter
from lora_core.runs.folder import RunFolder, runs_folder
from lora_core.settings.config import RunConfig
from tests.waiting import PATIENCE


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(diagnosis.VARIABLE, raising=False)


def ended(home: Path, *more: events.Event, name: str = "one") -> RunFolder:
    run = RunFolder.create(runs_folder(home) / name, RunConfig())
    writer = EventWriter(run.events_file)
    writer.write(events.Started(steps=9, pid=1, device="cpu", threads=1, versions={}))
    writer.write(events.StepDone(step=8, loss=1.0, lr=1.0, seconds=0.1))
    for event in more:
        writer.write(event)
    writer.close()
    return run


def writing(home: Path) -> tuple[str, Path]:
    """A command that writes what it is told, and where."""
    script, told = home / "tell it.py", home / "told.json"
    script.write_text(
        "import json, os, sys\n"
        "values = {k: v for k, v in os.environ.items() if k.startswith('LORA_EASEL_')}\n"
        "json.dump([sys.argv[2:], values], open(sys.argv[1], 'w'))\n"
    )
    return f'"{sys.executable}" "{script}" "{told}" hello', told


def test_a_command_is_told_in_its_environment(tmp_path: Path) -> None:
    command, told = writing(tmp_path)
    write_recipient(tmp_path, command)
    assert read_recipient(tmp_path) == command
    run = ended(tmp_path, events.Finished(step=9, export="export/one.safetensors"))
    assert notify_end(run, tmp_path) == ""
    arguments, values = json.loads(told.read_text())
    assert arguments == ["hello"]
    assert values["LORA_EASEL_RUN"] == "one"
    assert values["LORA_EASEL_STATUS"] == "done"
    assert (values["LORA_EASEL_STEP"], values["LORA_EASEL_STEPS"]) == ("8", "9")
    assert values["LORA_EASEL_EXPORT"] == str(run.path / "export/one.safetensors")
    assert values["LORA_EASEL_TEXT"] == "The run one is done at step 8 of 9."


@pytest.mark.skipif(os.name == "nt", reason="no such names on Windows")
def test_no_name_and_no_reason_becomes_a_command(tmp_path: Path) -> None:
    command, told = writing(tmp_path)
    write_recipient(tmp_path, command)
    hostile = f"$(touch {tmp_path}/evil) `touch {tmp_path}/evil` ; touch {tmp_path}/evil \n \0 ü"
    name = "$(touch evil); `touch evil` 'quoted' \"x\""
    run = ended(tmp_path, events.Failed(step=8, reason=hostile), name=name)
    assert notify_end(run, tmp_path) == ""
    values = json.loads(told.read_text())[1]
    assert values["LORA_EASEL_RUN"] == name
    assert values["LORA_EASEL_REASON"] == hostile.replace("\0", "")
    assert not (tmp_path / "evil").exists()
    # The person's own words are words too: no shell reads them.
    write_recipient(tmp_path, f"{command} ; touch {tmp_path}/evil")
    notify_end(run, tmp_path)
    assert json.loads(told.read_text())[0] == ["hello", ";", "touch", f"{tmp_path}/evil"]
    assert not (tmp_path / "evil").exists()


class Listener(http.server.BaseHTTPRequestHandler):
    heard: list[tuple[str, dict[str, object]]] = []
    answer = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.heard.append((self.path, json.loads(body)))
        self.send_response(self.answer)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        """Nothing."""


@pytest.fixture
def address() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Listener)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Listener.heard.clear()
    Listener.answer = 200
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_address_gets_json(tmp_path: Path, address: str) -> None:
    write_recipient(tmp_path, f"{address}/hook?a=b")
    run = ended(tmp_path, events.Paused(step=8, reason="The drive is full."))
    assert notify_end(run, tmp_path) == ""
    ((path, told),) = Listener.heard
    assert path == "/hook?a=b"
    assert (told["run"], told["status"], told["reason"]) == ("one", "paused", "The drive is full.")
    assert told["text"] == told["content"] == "The run one is paused at step 8 of 9. The drive is full."
    # Killed: its parent says why, and to the person it failed.
    notify_end(ended(tmp_path, name="two"), tmp_path, "It was killed.")
    assert (Listener.heard[1][1]["status"], Listener.heard[1][1]["reason"]) == ("failed", "It was killed.")


def test_what_goes_wrong_is_one_sentence(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ended(tmp_path, events.Finished(step=9, export=""))
    Listener.answer = 404
    failing = f'"{sys.executable}" -c "import sys; sys.exit(\'no bell\')"'
    for whom, words in (
        (f"{address}/x", "could not be sent to http://127.0.0.1"),
        ("http://127.0.0.1:9/x", "could not be sent"),
        ("https://[", "could not be sent"),
        (str(tmp_path / "no-such-program"), "could not be sent"),
        (failing, "ended with code 1: no bell"),
    ):
        monkeypatch.setenv(diagnosis.VARIABLE, whom)
        said = notify_end(run, tmp_path)
        assert words in said
        assert said.endswith(".")
        assert "\n" not in said
    monkeypatch.setattr(diagnosis, "COMMAND_TAKES", 0.3)
    monkeypatch.setenv(diagnosis.VARIABLE, f'"{sys.executable}" -c "import time; time.sleep(600)"')
    began = time.monotonic()
    assert "took more than 0 seconds" in notify_end(run, tmp_path)
    assert time.monotonic() - began < PATIENCE


def test_a_broken_file_and_a_broken_command(tmp_path: Path) -> None:
    run = ended(tmp_path, events.Finished(step=9, export=""))
    assert notify_end(run, tmp_path) == ""  # nobody is to be told
    with pytest.raises(ConfigError, match="cannot be read: No closing quotation"):
        write_recipient(tmp_path, "say 'hello")
    for text in ("tell = ", "tell = 3"):
        notify_file(tmp_path).write_text(text)
        assert "No notification was sent" in notify_end(run, tmp_path)
    write_recipient(tmp_path, "")
    assert read_recipient(tmp_path) == ""


def test_nothing_is_told_of_a_run_that_goes_on(tmp_path: Path, address: str) -> None:
    write_recipient(tmp_path, address)
    run = ended(tmp_path)
    with run.hold():
        assert notify_end(run, tmp_path) == ""
    assert Listener.heard == []


def test_it_is_no_setting_of_a_run() -> None:
    """A config file of somebody else must not be able to run a command."""
    from lora_core.settings.config import FIELDS

    assert [name for name in FIELDS if "notify" in name or "command" in name] == []


def test_it_can_be_tried(tmp_path: Path, address: str) -> None:
    command, told = writing(tmp_path)
    assert send_test(command) == ""
    assert json.loads(told.read_text())[1]["LORA_EASEL_TEXT"] == "LoRA Easel reaches you here."
    assert send_test(f" {address}/a ") == ""
    assert [path for path, _ in Listener.heard] == ["/a"]
    assert "command or a web address" in send_test(" ")
    assert "No closing quotation" in send_test("say 'hello")
    assert "could not be sent" in send_test(str(tmp_path / "no-such-program"))
