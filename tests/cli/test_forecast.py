"""What a run will take, before it starts; settings of a LoRA file; into the queue in place of a start."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_core import api
from lora_core.cli import main
from lora_core.cli.parser import parse
from lora_core.model_files.sizes import FALLBACKS
from lora_core.runs.queue import Queue
from lora_core.system.hardware import Card


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_EASEL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def lora(path: Path, **header: str) -> Path:
    tensors = {
        "lora_unet_x.lora_down.weight": torch.zeros(4, 8),
        "lora_unet_x.lora_up.weight": torch.zeros(8, 4),
    }
    save_file(tensors, path, header)
    return path


def test_a_forecast(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forecast", "demo", "--set", "train.steps=240", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pictures"], found["steps"], found["problems"]) == (24, 240, [])
    assert found["looks"] == pytest.approx(240 * api.run_config("demo").train.batch_size / 24)
    assert found["learning_rate"] == pytest.approx(api.run_config("demo").optimizer.lr)
    assert 0.5e6 < found["file_bytes"] < 2e6
    assert found["memory_bytes"] > 0.6e9
    # Nothing was timed yet.
    assert (found["seconds"], found["source"]) == (None, "")
    assert not (home / "runs").exists()


def test_a_forecast_says_what_is_done_to_fit_a_card(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = [Card("Toy", 0, 1_200_000_000, device="cuda:0")]
    monkeypatch.setattr("lora_core.system.hardware.find_cards", lambda: cards)
    assert main(["forecast", "demo", "--set", "train.batch_size=64"]) == 0
    said = capsys.readouterr().out
    assert "of the card's memory. To fit:\n" in said
    assert said.count(FALLBACKS["half"]) == 1


def test_a_forecast_says_what_is_in_the_way(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forecast", str(home / "nowhere")]) == 0
    said = capsys.readouterr().out
    assert "0 images" in said
    assert "Problem: The dataset" in said


def test_a_slider_takes_no_dataset(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["--set", "slider.positive=old", "--set", "slider.negative=young"]
    assert main(["forecast", *prompts]) == 0
    assert "0 images; 80 steps." in capsys.readouterr().out
    assert main(["forecast", "demo", "--set", "train.steps=1"]) == 0
    assert capsys.readouterr().out.startswith(
        "24 images, 24 with a caption; 1 step looks at each about 1 time.\n"
    )
    assert main(["train", "demo", *prompts]) == 1
    assert "leave out the dataset demo" in capsys.readouterr().err
    with pytest.raises(SystemExit) as wrong:
        main(["train"])
    assert wrong.value.code == 2


def test_train_says_the_forecast_and_may_wait_in_the_queue(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "demo", "--name", "first", "--queue"]) == 0
    said = capsys.readouterr().out
    assert "Forecast: time known after some steps" in said
    assert "effective learning rate 0.003" in said
    assert "24 images, 24 with a caption" in said
    assert [job.run for job in Queue(home).stored_jobs()] == ["first"]
    assert not (home / "runs" / "first" / "requests.jsonl").exists()


def test_settings_of_a_file(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = lora(
        tmp_path / "a.safetensors", ss_network_dim="12", ss_network_alpha="6", ss_max_train_steps="77",
        ss_optimizer="bitsandbytes.optim.adamw.AdamW8bit", ss_adaptive_noise_scale="0.1",
    )  # fmt: skip
    words = ["train", "demo", "--like", str(file), "--set", "train.steps=5"]
    config = parse(words).arguments()["training"].run_config(None)
    assert (config.adapter.rank, config.adapter.alpha, config.train.steps) == (12, 6.0, 5)
    assert main([*words, "--queue", "--name", "like"]) == 0
    said = capsys.readouterr().out
    assert "Like a.safetensors: " in said
    assert "Note: Adaptive noise scale (0.1) is not known here." in said
    assert main(["train", "demo", "--like", str(tmp_path / "no.safetensors"), "--queue"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
