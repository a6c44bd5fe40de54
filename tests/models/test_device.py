"""Which device computes: by setting, by what is there, by what this PyTorch has kernels for."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lora_core.errors import ConfigError
from lora_core.models import device
from lora_core.settings.config import RunConfig
from lora_core.system import hardware
from lora_core.system.hardware import Card, card_problem, list_nvidia_cards

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90a"]


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Has PyTorch see CUDA cards of some capability and GB, with kernels for some architectures."""

    def see(*found: tuple[tuple[int, int], int], kernels: list[str] = CUDA_13) -> list[int]:
        current = [0]
        state = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
        monkeypatch.setattr(device, "PartialState", lambda: state)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        for name, value in {
            "is_available": lambda: bool(found),
            "device_count": lambda: len(found),
            "get_device_capability": lambda number: found[number][0],
            "get_device_name": lambda number: f"Card {number}",
            "get_device_properties": lambda number: SimpleNamespace(total_memory=found[number][1] * 10**9),
            "get_arch_list": lambda: kernels,
            "current_device": lambda: current[0],
            "set_device": lambda to: current.__setitem__(0, to if isinstance(to, int) else to.index),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        return current

    yield see
    device._device.clear()


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ([((8, 6), 12)], 0),
        ([((6, 1), 11), ((8, 9), 8)], 1),  # the newer one, whatever the slot
        ([((8, 6), 8), ((8, 6), 12)], 1),  # the larger one
        ([((8, 6), 12), ((8, 6), 12)], 0),
        ([((7, 0), 32), ((7, 5), 8)], 1),  # CUDA 13 has no kernels for the first
    ],
)
def test_the_newest_card_computes(cards, found, best: int) -> None:
    current = cards(*found)
    assert device.use_device("auto").type == "cuda"
    assert current[0] == best
    assert device.use_device("cuda") == torch.device("cuda", best)


def test_the_card_is_a_setting(cards) -> None:
    current = cards(((8, 9), 24), ((6, 1), 8), kernels=CUDA_12)
    assert device.use_device("cuda:1") == torch.device("cuda", 1)
    assert device.best_device() == torch.device("cuda", 1)
    assert current == [1]  # where a plan's "cuda" computes
    assert device.use_device("cpu") == device.best_device() == torch.device("cpu")
    assert device.use_device("auto").type == "cuda"


def test_what_is_not_there_is_named_with_what_is(cards, monkeypatch: pytest.MonkeyPatch) -> None:
    cards(((8, 6), 12))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(ConfigError) as caught:
        device.use_device("cuda:1")
    assert str(caught.value) == (
        "train.device = cuda:1 does not exist; PyTorch sees cpu, cuda:0 (Card 0). CUDA_VISIBLE_DEVICES = '1'"
        " hides all other NVIDIA cards. Choose one of these, or auto."
    )
    with pytest.raises(ConfigError, match="mps does not exist"):
        device.use_device("mps")


def test_several_processes_get_theirs_from_accelerate(cards, monkeypatch: pytest.MonkeyPatch) -> None:
    cards(((8, 6), 12), ((8, 6), 12))
    device.PartialState().num_processes = 2
    with pytest.raises(ConfigError, match="accelerate gives each its own"):
        device.use_device("cuda:1")
    assert device.use_device("auto").type == "cuda"


def test_a_card_without_kernels_leaves_the_processor(cards) -> None:
    cards(((6, 1), 11))
    assert device.use_device("auto") == torch.device("cpu")
    assert device.describe_torch()["lacks_code"] == "6.1"


@pytest.mark.parametrize(
    ("capability", "kernels", "has"),
    [
        ((8, 9), CUDA_13, True),  # by sm_86
        ((12, 1), CUDA_13, True),
        ((13, 0), CUDA_13, True),  # compiled from compute_120 when it is first used
        ((7, 0), CUDA_13, False),
        ((6, 1), CUDA_12, True),
        ((10, 0), CUDA_12, False),
        ((9, 0), CUDA_12, True),
    ],
)
def test_which_cards_a_build_has_kernels_for(cards, capability, kernels: list[str], has: bool) -> None:
    cards((capability, 8), kernels=kernels)
    assert device.has_code(0) == has


@pytest.mark.parametrize("value", ["gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "rocm", ""])
def test_a_device_that_means_nothing_gets_a_sentence(value: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.device = .* is not known; choose auto, cpu, cuda, cuda:0"):
        RunConfig().changed({"train.device": value})
    assert RunConfig().changed({"train.device": " CUDA:1 "}).train.device == "cuda:1"


def test_cards_are_numbered_as_nvidia_smi_does() -> None:
    script = "import lora_core.cli as m, os; m.set_up_cuda(); print(os.environ['CUDA_DEVICE_ORDER'])"
    for given, order in (({}, "PCI_BUS_ID"), ({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, "FASTEST_FIRST")):
        env = {key: value for key, value in os.environ.items() if key != "CUDA_DEVICE_ORDER"} | given
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
        assert done.stdout.strip() == order, done.stderr


RTX, OLD = Card("NVIDIA GeForce RTX 3060", 0, 0, generation=8.6, driver="580.65"), Card("K80", 0, 0, 3.7)
PASCAL = Card("GTX 1080", 0, 0, generation=6.1, driver="580.1")
AMD = Card("AMD graphics card", 0, 0, maker="AMD")


@pytest.mark.parametrize(
    ("card", "build", "lacks", "system", "words"),
    [
        (RTX, "CPU", "", "Linux", "There is an NVIDIA GeForce RTX 3060, but this PyTorch (2.9"),
        (RTX, "CPU", "", "Windows", "Run `python launch.py repair`"),
        (RTX, "ROCm 6.4", "", "Linux", "the build for other devices. Run `python launch.py repair`"),
        (replace(RTX, driver="550.9"), "CUDA 13.0", "", "Linux", "580 or newer, and this is 550.9"),
        (replace(RTX, driver="470.1"), "CUDA 12.6", "", "Linux", "needs driver 525 or newer"),
        (RTX, "CUDA 13.0", "", "Linux", "its driver does not answer. Restart"),
        (PASCAL, "CUDA 13.0", "6.1", "Linux", "no code for compute capability 6.1. Run `python launch"),
        (OLD, "CUDA 12.6", "3.7", "Linux", "3.7 is below 5.0, which no build supports"),
        (AMD, "CPU", "", "Windows", "no build for AMD cards on Windows. Train on Linux"),
        (AMD, "CPU", "", "Linux", "Run `python launch.py repair`"),
        (AMD, "CUDA 13.0", "", "Linux", "Run `python launch.py repair`"),
        (AMD, "ROCm 6.4", "", "Linux", "groups render and video"),
    ],
)  # fmt: skip
def test_each_reason_why_a_card_is_not_used_has_a_repair(
    card: Card, build: str, lacks: str, system: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    said = card_problem(card, {"torch": "2.9", "build": build, "lacks_code": lacks}, system)
    assert words in said
    assert "cannot use it: " in said
    assert said.endswith(".")


def test_a_hidden_card_is_called_hidden() -> None:
    said = card_problem(
        replace(RTX, hidden=True), {"torch": "2.9", "build": "CUDA 13.0", "lacks_code": ""}, "Linux"
    )
    assert "CUDA_VISIBLE_DEVICES hides it. Unset it" in said


def test_an_old_driver_is_asked_for_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(tool: str, query: str) -> str:
        if "compute_cap" in query:
            raise subprocess.CalledProcessError(2, tool)
        return "Quadro P4000, 10, 8192, 470.82.01\nTesla K80, 1, 11441, 470.82.01\n"

    monkeypatch.setattr(hardware, "_run_command", said)
    names = [(card.name, card.driver, card.generation) for card in list_nvidia_cards("nvidia-smi")]
    assert names == [("Quadro P4000", "470.82.01", 0.0), ("Tesla K80", "470.82.01", 0.0)]
