"""Every family from a single file to the file for other tools, with no network: opened, trained, exported.

Trained by the real command line in processes of its own, which cannot open a socket to anywhere.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from lora_core.__main__ import main
from lora_core.runs.folder import RunFolder
from tests.checkpoints import write_folder, write_single
from tests.faults import Nursery

MODULES = {"sd15": 264, "sd2_v": 330, "sdxl": 986}
"""Of kohya's default targets. Source: kohya sd-scripts' own count for each family."""
NO_NETWORK = """
import socket
def refuse(*_args, **_more):
    raise SystemExit("the network was asked")
socket.socket.connect = socket.getaddrinfo = refuse
"""


def pictures(folder: Path, side: int) -> Path:
    """Two pictures with captions."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(2):
        small = draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((side, side)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"thing {number}, a drawing")
    return folder


class Offline:
    """The command line without a network, and the peak of its memory."""

    def __init__(self, nursery: Nursery, place: Path) -> None:
        self.nursery, self.place = nursery, place
        self.peak = 0

    def trained(self, base: Path, side: int, **settings: object) -> Path:
        """The exported file of a short run."""
        dataset = self.place / f"images {side}"
        if not dataset.exists():
            pictures(dataset, side)
        number = len(list(self.place.glob("runs/*")))
        chosen = {
            "train.resolution": side, "sample.every": 0, "validation.pictures": 0, "adapter.rank": 4,
        } | {key.replace("__", "."): value for key, value in settings.items()}  # fmt: skip
        given = [word for key, value in chosen.items() for word in ("--set", f"{key}={value}")]
        where = ["--base", base, "--workspace", self.place, "--name", f"run-{number}"]
        code, said, self.peak = self.nursery.command(["train", dataset, *where, *given])
        assert code == 0, said[-2000:]
        run = RunFolder(self.place / "runs" / f"run-{number}")
        return run.exports / f"{run.name}.safetensors"


@pytest.fixture(scope="module")
def without_network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    place = tmp_path_factory.mktemp("offline")
    (place / "sitecustomize.py").write_text(NO_NETWORK)
    made = Nursery(PYTHONPATH=str(place), HF_HOME=str(place / "hub"), HF_HUB_OFFLINE="0")
    yield made
    made.close()


@pytest.fixture
def offline(without_network: Nursery, tmp_path: Path) -> Offline:
    return Offline(without_network, tmp_path)


def stems(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as opened:
        return {key.partition(".")[0] for key in opened.keys()}  # noqa: SIM118 - no dict


@pytest.mark.parametrize("name", MODULES)
def test_a_single_file_is_opened_trained_and_exported_whole(
    name: str, tmp_path: Path, offline: Offline, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_single(tmp_path / f"{name} ü.safetensors", name, torch.float16, size="deep")
    rates = {
        "optimizer__text_encoder_lr": 1e-4,
        "optimizer__text_encoder_2_lr": 1e-4 if name == "sdxl" else 0,
    }
    file = offline.trained(
        base, 64, train__steps=2, adapter__targets="kohya", train__precision="fp32", **rates
    )
    base.unlink()
    assert len(stems(file)) == MODULES[name]

    def document(verb: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main([verb, str(file), "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    report = document("inspect")
    assert (report["modules"], report["kind"], report["format"]) == (MODULES[name], "LoRA", "kohya")
    assert [tool["dropped"] for tool in document("verify")["tools"]] == [0] * 6


@pytest.mark.parametrize("name", MODULES)
def test_a_folder_trains_too(name: str, tmp_path: Path, offline: Offline) -> None:
    base = write_folder(tmp_path / "base", name, torch.float16)
    file = offline.trained(base, 64, train__steps=2, adapter__targets="locon", train__precision="fp32")
    assert any("conv1" in stem or "in_layers_2" in stem for stem in stems(file))


@pytest.mark.slow
class TestFullSize:
    """True widths: what memory a base really takes from the launch to the first optimizer step."""

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_sd15_takes_little_more_than_its_weights(self, precision, tmp_path, offline, capsys):
        base = write_single(tmp_path / "base.safetensors", "sd15", torch.float32, size="full")
        frozen = {"optimizer__text_encoder_lr": 0, "train__steps": 1, "train__precision": precision}
        offline.trained(base, 256, **frozen)
        size = 4 if precision == "fp32" else 2
        # UNet and text encoder as the run holds them; the VAE is always fp32.
        held = (859_520_964 + 123_060_480) * size + 83_653_863 * 4
        with capsys.disabled():
            sys.stdout.write(
                f"\n  SD 1.5, {precision}: peak {offline.peak / 1e9:.2f} GB, {offline.peak / held:.2f} x\n"
            )
        assert offline.peak <= 1.6 * held
        base.unlink()

    def test_sdxl_trains_within_14_gb(self, tmp_path, offline, capsys):
        base = write_single(tmp_path / "base.safetensors", "sdxl", torch.bfloat16, size="full")
        offline.trained(base, 512, train__steps=1, train__precision="bf16")
        with capsys.disabled():
            sys.stdout.write(f"\n  SDXL, bf16, 512 px: peak {offline.peak / 1e9:.2f} GB\n")
        assert offline.peak <= 14e9
        base.unlink()

    @pytest.mark.parametrize("name", MODULES)
    def test_all_layers_train_and_export(self, name, tmp_path, offline):
        base = write_single(tmp_path / "base.safetensors", name, torch.bfloat16, size="full")
        rates = {
            "optimizer__text_encoder_lr": 1e-4,
            "optimizer__text_encoder_2_lr": 1e-4 if name == "sdxl" else 0,
        }
        file = offline.trained(
            base, 256, train__steps=2, adapter__targets="kohya", train__precision="bf16", **rates
        )
        assert len(stems(file)) == MODULES[name]
        base.unlink()
