"""A base of the hub in the window: size, button, progress, cancel, and the form once it is here."""

import functools
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.snapshot import moment_of
from app.state import Desk
from app.train.base_picker import base_arrived, base_chosen
from app.train.facts import base_note, blockers, download_note, notes
from app.train.form import standing_values
from app.train.routes import steer
from lora_core.errors import RunError
from lora_core.model_files.detect import forget_bases
from tests.hub import Hub, hub_of, small_repo, use_hub
from tests.waiting import wait_for


@pytest.fixture
def hub(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one base, which fills the form when it has arrived."""
    with hub_of(base=small_repo(tmp_path / "base")) as made:
        use_hub(monkeypatch, made, tmp_path / "cache")
        desk.downloads.finished = functools.partial(base_arrived, desk)
        forget_bases()
        yield made
        desk.downloads.cancel()


def choose(desk: Desk, name: str) -> None:
    _, level, values = base_chosen(desk, {**standing_values(desk.project), "model.base": name})
    desk.project.keep(values=values, level=level)


def shown(desk: Desk) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", download_note(moment_of(desk))))


def buttons(desk: Desk) -> list[str]:
    bodies = re.findall(r'data-body="([^"]+)"', download_note(moment_of(desk)))
    return [json.loads(html.unescape(body))["do"] for body in bodies]


def test_the_size_is_said_and_nothing_is_fetched_unasked(desk: Desk, hub: Hub) -> None:
    choose(desk, "owner/base")
    wait_for(lambda: "to download from the hub" in shown(desk))
    assert re.search(r"[\d.]+ kB to download from the hub; [\d.]+ GB are free\.", shown(desk))
    assert buttons(desk) == ["download"]
    assert [path for _, path, _ in hub.asked if "resolve" in path] == []
    moment = moment_of(desk)
    assert "The base model is not on this computer yet; download it, below its name." in blockers(moment)
    assert not any("owner/base" in note for note in notes(moment))
    assert 'class="problem"' not in base_note(moment)
    assert moment.desk.places.bases() == []


def test_it_arrives_with_its_starting_values(desk: Desk, hub: Hub) -> None:
    """From the demo's own preset, whose rate suits the embedded base alone."""
    desk.project.keep(level="demo", goal="style", values={})
    choose(desk, "owner/base")
    assert desk.project.draft()["level"] == "demo"
    wait_for(lambda: buttons(desk) == ["download"])
    hub.gate.clear()
    steer(desk, "download", "")
    assert moment_of(desk).busy
    wait_for(lambda: re.search(r"of \d+ kB, [1-9]\d*%", shown(desk)))
    assert re.search(r'role="progressbar".*aria-valuenow="[1-9]\d*"', download_note(moment_of(desk)))
    with pytest.raises(RunError, match="owner/base is being downloaded"):
        steer(desk, "download", "")
    hub.gate.set()
    wait_for(lambda: not desk.downloads.active)
    assert shown(desk) == ""
    moment = moment_of(desk)
    assert moment.plan.base.facts is not None
    assert not any("base model" in sentence for sentence in blockers(moment))
    assert (desk.project.draft()["level"], moment.plan.config.optim.lr) == ("balanced", 1e-4)
    assert moment.plan.config == moment.plan.preset.changed(
        {name: moment.plan.config.get(name) for name in ("model.base", "dataset.path")}
    )
    assert desk.places.bases() == ["owner/base"]


def test_cancelled_and_continued(desk: Desk, hub: Hub) -> None:
    choose(desk, "owner/base")
    wait_for(lambda: buttons(desk) == ["download"])
    hub.gate.clear()
    steer(desk, "download", "")
    wait_for(lambda: buttons(desk) == ["download-cancel"] and desk.downloads.offer("owner/base").here)
    steer(desk, "download-cancel", "")
    hub.gate.set()
    wait_for(lambda: "are here already" in shown(desk))
    assert "Download the rest" in shown(desk)
    steer(desk, "download", "")
    wait_for(lambda: not moment_of(desk).plan.base.remote)
    assert len(set(hub.sent("unet/diffusion_pytorch_model.safetensors"))) == 2


def test_a_refusal_is_a_sentence_with_a_second_try(desk: Desk, hub: Hub) -> None:
    hub.refusals["owner/base"] = (401, "GatedRepo")
    choose(desk, "owner/base")
    wait_for(lambda: buttons(desk) == ["download-ask"])
    assert "accept terms first" in shown(desk)
    hub.refusals.clear()
    steer(desk, "download-ask", "")
    wait_for(lambda: buttons(desk) == ["download"])
    hub.refusals["owner/base"] = (503, "")
    steer(desk, "download", "")
    wait_for(lambda: "error 503" in shown(desk))
    assert buttons(desk) == ["download"]


def test_what_does_not_fit_is_not_offered(desk: Desk, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_core.model_files.hub.free_bytes", lambda path: 300_000)
    choose(desk, "owner/base")
    wait_for(lambda: "Make room first" in shown(desk))
    assert buttons(desk) == []


def test_a_name_from_the_hub_is_escaped(desk: Desk) -> None:
    choose(desk, "nobody/nothing")
    wait_for(lambda: "cannot be downloaded" in shown(desk))
    assert "HF_HUB_OFFLINE is set" in shown(desk)
