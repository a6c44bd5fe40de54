"""A base of the hub in the window: size, button, progress, cancel, and the form once it is here."""

import functools
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.state import AppState, take_snapshot
from app.train.form import current_values
from app.train.start import blockers, notes
from app.train.train_form import adopt_downloaded_base, base_note, choose_base, download_note
from app.train.view import do_run_action
from lora_core.errors import RunError
from lora_core.model_files.detect import clear_base_cache
from tests.hub import Hub, hub_of, small_repo, use_hub
from tests.waiting import wait_for


@pytest.fixture
def hub(app_state: AppState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one base, which fills the form when it has arrived."""
    with hub_of(base=small_repo(tmp_path / "base")) as made:
        use_hub(monkeypatch, made, tmp_path / "cache")
        app_state.downloads.finished = functools.partial(adopt_downloaded_base, app_state)
        clear_base_cache()
        yield made
        app_state.downloads.cancel()


def choose(app_state: AppState, name: str) -> None:
    _, level, values = choose_base(app_state, {**current_values(app_state.project), "model.base": name})
    app_state.project.update_draft(values=values, level=level)


def shown(app_state: AppState) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", download_note(take_snapshot(app_state))))


def buttons(app_state: AppState) -> list[str]:
    bodies = re.findall(r'data-body="([^"]+)"', download_note(take_snapshot(app_state)))
    return [json.loads(html.unescape(body))["do"] for body in bodies]


def test_the_size_is_said_and_nothing_is_fetched_unasked(app_state: AppState, hub: Hub) -> None:
    choose(app_state, "owner/base")
    wait_for(lambda: "to download from the hub" in shown(app_state))
    assert re.search(r"[\d.]+ kB to download from the hub; [\d.]+ GB are free\.", shown(app_state))
    assert buttons(app_state) == ["download"]
    assert [path for _, path, _ in hub.asked if "resolve" in path] == []
    snapshot = take_snapshot(app_state)
    assert "The base model is not on this computer yet; download it, below its name." in blockers(snapshot)
    assert not any("owner/base" in note for note in notes(snapshot))
    assert 'class="problem"' not in base_note(snapshot)
    assert snapshot.app_state.places.read("bases") == []


def test_it_arrives_with_its_starting_values(app_state: AppState, hub: Hub) -> None:
    """From the demo's own preset, whose rate suits the embedded base alone."""
    app_state.project.update_draft(level="demo", goal="style", values={})
    choose(app_state, "owner/base")
    assert app_state.project.draft()["level"] == "demo"
    wait_for(lambda: buttons(app_state) == ["download"])
    hub.gate.clear()
    do_run_action(app_state, "download", "")
    assert take_snapshot(app_state).busy
    wait_for(lambda: re.search(r"of \d+ kB, [1-9]\d*%", shown(app_state)))
    assert re.search(r'role="progressbar".*aria-valuenow="[1-9]\d*"', download_note(take_snapshot(app_state)))
    with pytest.raises(RunError, match="owner/base is being downloaded"):
        do_run_action(app_state, "download", "")
    hub.gate.set()
    wait_for(lambda: not app_state.downloads.active)
    assert shown(app_state) == ""
    snapshot = take_snapshot(app_state)
    assert snapshot.plan.base.facts is not None
    assert not any("base model" in sentence for sentence in blockers(snapshot))
    assert (app_state.project.draft()["level"], snapshot.plan.config.optimizer.lr) == ("balanced", 1e-4)
    assert snapshot.plan.config == snapshot.plan.preset.changed(
        {name: snapshot.plan.config.get(name) for name in ("model.base", "dataset.path")}
    )
    assert app_state.places.read("bases") == ["owner/base"]


def test_cancelled_and_continued(app_state: AppState, hub: Hub) -> None:
    choose(app_state, "owner/base")
    wait_for(lambda: buttons(app_state) == ["download"])
    hub.gate.clear()
    do_run_action(app_state, "download", "")
    wait_for(
        lambda: buttons(app_state) == ["download-cancel"] and app_state.downloads.offer("owner/base").here
    )
    do_run_action(app_state, "download-cancel", "")
    hub.gate.set()
    wait_for(lambda: "are here already" in shown(app_state))
    assert "Download the rest" in shown(app_state)
    do_run_action(app_state, "download", "")
    wait_for(lambda: not take_snapshot(app_state).plan.base.remote)
    assert len(set(hub.sent("unet/diffusion_pytorch_model.safetensors"))) == 2


def test_a_refusal_is_a_sentence_with_a_second_try(app_state: AppState, hub: Hub) -> None:
    hub.refusals["owner/base"] = (401, "GatedRepo")
    choose(app_state, "owner/base")
    wait_for(lambda: buttons(app_state) == ["download-ask"])
    assert "accept terms first" in shown(app_state)
    hub.refusals.clear()
    do_run_action(app_state, "download-ask", "")
    wait_for(lambda: buttons(app_state) == ["download"])
    hub.refusals["owner/base"] = (503, "")
    do_run_action(app_state, "download", "")
    wait_for(lambda: "error 503" in shown(app_state) and buttons(app_state) == ["download"])


def test_what_does_not_fit_is_not_offered(
    app_state: AppState, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_core.model_files.hub.free_bytes", lambda path: 300_000)
    choose(app_state, "owner/base")
    wait_for(lambda: "Make room first" in shown(app_state))
    assert buttons(app_state) == []


def test_a_name_from_the_hub_is_escaped(app_state: AppState) -> None:
    choose(app_state, "nobody/nothing")
    wait_for(lambda: "cannot be downloaded" in shown(app_state))
    assert "HF_HUB_OFFLINE is set" in shown(app_state)
