import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_core import api
from lora_core.data.captions import write_caption
from lora_core.data.dataset import scan, split_holdout
from lora_core.errors import RunError
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import ModelSection
from lora_core.train import setup
from lora_core.train.setup import base_inputs, check_inputs
from tests.checkpoints import write_single
from tests.train.runs import trained


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "ab":
        Image.new("RGB", (32, 32), "red").save(folder / f"{name}.png")
        write_caption(folder / f"{name}.png", name)
    return folder


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run", RunConfig())


def _caption(pictures, run, monkeypatch):
    write_caption(pictures / "a.png", "other words")
    return "the picture a.png"


def _picture(pictures, run, monkeypatch):
    Image.new("RGB", (32, 32), "blue").save(pictures / "b.png")
    return "the picture b.png"


def _gone(pictures, run, monkeypatch):
    (pictures / "b.png").unlink()
    return "the picture b.png"


def _settings(pictures, run, monkeypatch):
    run.config_file.write_text(run.config_file.read_text().replace("rank = 16", "rank = 8"))
    return "config.toml"


def _package(pictures, run, monkeypatch):
    monkeypatch.setattr(setup, "version", lambda name: "9.9" if name == "torch" else "1")
    return "the package torch"


@pytest.mark.parametrize("change", [_caption, _picture, _gone, _settings, _package])
def test_a_change_since_the_start_is_named_until_it_is_accepted(pictures, run, monkeypatch, change):
    check_inputs(run, scan(pictures).records, False)
    check_inputs(run, scan(pictures).records, False)
    named = change(pictures, run, monkeypatch)
    with pytest.raises(RunError, match=named.replace("picture", "image")):
        check_inputs(run, scan(pictures).records, False)
    check_inputs(run, scan(pictures).records, True)
    check_inputs(run, scan(pictures).records, False)


def test_a_change_in_a_large_set_is_named_too(pictures, run):
    check_inputs(run, scan(pictures).records, False)
    before = json.loads(run.inputs_file.read_text())
    more = {f"the image {'x' * 100}{n}": "0" for n in range(150_000)}
    run.inputs_file.write_text(json.dumps(before | more))
    assert run.inputs_file.stat().st_size > 16 * 2**20
    with pytest.raises(RunError, match="this has changed: the image x"):
        check_inputs(run, scan(pictures).records, False)


@pytest.mark.parametrize("vae", [False, True], ids=["the base", "its own VAE"])
def test_a_file_of_the_base_that_was_trained_on_is_named(pictures, run, tmp_path, vae):
    """As large and of the same layout: only the numbers differ."""
    file = write_single(tmp_path / "base.safetensors", "sd15", torch.float32)
    model = ModelSection(base="demo", vae=str(file)) if vae else ModelSection(base=str(file))
    check_inputs(run, scan(pictures).records, False, base_inputs(model))
    size = file.stat().st_size
    with safe_open(str(file), "pt") as opened:
        header = opened.metadata()
    save_file({name: 1.01 * tensor for name, tensor in load_file(file).items()}, file, header)
    assert file.stat().st_size == size
    with pytest.raises(RunError, match=f"the {'VAE' if vae else 'base'} base.safetensors. Put it back"):
        check_inputs(run, scan(pictures).records, False, base_inputs(model))
    check_inputs(run, scan(pictures).records, True, base_inputs(model))
    check_inputs(run, scan(pictures).records, False, base_inputs(model))


def test_a_run_remembers_what_it_held_out(own_toy):
    run = own_toy.run("one", validation__pictures=1, validation__every=0, train__steps=1)
    trained(run)
    records = scan(own_toy.pictures).records
    _, held = split_holdout(records, 1, run.config().seed)
    # Chosen by hand later.
    now = [replace(record, held_out=record not in held) for record in records]
    assert [one.path for one in run.held_out(now, run.config())] == [one.path for one in held]


def test_an_image_that_was_trained_on_is_never_called_held_out(own_toy, tmp_path):
    """What is held out later, accepted or not, was trained on before, unless it was added since."""
    pictures = tmp_path / "set"
    shutil.copytree(own_toy.pictures, pictures)
    run = own_toy.run(
        "one", dataset__path=str(pictures), validation__pictures=0.0, validation__every=0, train__steps=4
    )
    trained(run)
    first, *_ = sorted(record.path for record in scan(pictures).records)
    first = first.rename(first.with_name("renamed.png"))
    added = first.with_name("added.png")
    Image.new("RGB", (16, 16), "teal").save(added)
    for path in (first, added):
        api.hold_out(pictures, [path.name], workspace=tmp_path / "home")
    with pytest.raises(RunError, match="this has changed"):
        api.resume(run.path, steps=8)
    assert run.status() == "done"
    api.resume(run.path, steps=8, accept_changes=True)
    records = scan(pictures).records
    assert {record.path for record in records if record.held_out} == {first, added}
    assert [one.path for one in run.held_out(records, run.config())] == [added]
