import pytest
from PIL import Image

from lora_core.dataset.folder import scan, write_caption
from lora_core.spec.config import RunConfig
from lora_core.spec.errors import RunError
from lora_core.spec.run_folder import RunFolder
from lora_core.training import inputs
from lora_core.training.inputs import check_inputs


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
    monkeypatch.setattr(inputs, "version", lambda name: "9.9" if name == "torch" else "1")
    return "the package torch"


@pytest.mark.parametrize("change", [_caption, _picture, _gone, _settings, _package])
def test_a_change_since_the_start_is_named_until_it_is_accepted(pictures, run, monkeypatch, change):
    check_inputs(run, scan(pictures).records, False)
    check_inputs(run, scan(pictures).records, False)
    named = change(pictures, run, monkeypatch)
    with pytest.raises(RunError, match=named):
        check_inputs(run, scan(pictures).records, False)
    check_inputs(run, scan(pictures).records, True)
    check_inputs(run, scan(pictures).records, False)
