"""Whom to tell of a run's end, as the window keeps it; a command only from the computer itself."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from app.state import AppState, Bindings
from app.train.view import checked, chosen
from lora_core.errors import ConfigError
from lora_core.runs.diagnosis import VARIABLE, notify_file, write_recipient


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def from_host(host: str) -> SimpleNamespace:
    return SimpleNamespace(client=SimpleNamespace(host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_at_the_computer_itself_both_will_do(host: str) -> None:
    for whom in ("notify-send done", "https://ntfy.sh/x", "", None):
        checked(whom, from_host(host))


@pytest.mark.parametrize("host", ["192.168.1.7", "2001:db8::1", "testclient", ""])
def test_from_elsewhere_only_a_web_address(host: str) -> None:
    for whom in ("https://ntfy.sh/x", "HTTP://here/x", " "):
        checked(whom, from_host(host))
    with pytest.raises(ConfigError, match="on the computer itself alone"):
        checked("rm -r .", from_host(host))
    with pytest.raises(ConfigError, match="on the computer itself alone"):
        checked("rm -r .", None)


def test_what_is_kept_is_shown(app_state: AppState, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = Bindings(app_state)
    assert chosen(bindings) == ("", "")
    write_recipient(app_state.workspace, 'say "it is done"')
    assert chosen(bindings) == ('say "it is done"', "")
    monkeypatch.setenv(VARIABLE, "other")
    whom, note = chosen(bindings)
    assert whom == "other"
    assert "overrides this field" in note


def test_a_file_that_cannot_be_read_is_a_sentence(app_state: AppState, tmp_path: Path) -> None:
    notify_file(app_state.workspace).write_text("tell = <b>")
    whom, note = chosen(Bindings(app_state))
    assert whom == ""
    assert "fix or remove it" in note
    assert "<b>" not in note
