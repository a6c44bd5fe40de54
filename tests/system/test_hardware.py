"""What the tools and files of drivers say about a card is read."""

from pathlib import Path

import pytest

from lora_core.system import hardware
from lora_core.system.hardware import (
    Card,
    Gpu,
    Hardware,
    card_problem,
    choose_card,
    find_card,
    find_cards,
    list_amd_cards,
    parse_apps,
    parse_card,
)


def test_what_nvidia_s_tool_says_is_read() -> None:
    found = parse_card("NVIDIA GeForce RTX 3060, rev, 5222, 12288, 580.65, 8.6")
    assert found == Card("NVIDIA GeForce RTX 3060, rev", 5222 * 2**20, 12288 * 2**20, 8.6, driver="580.65")
    assert parse_card("Card, 1, 2, 580.65, [N/A]").generation == 0.0
    assert parse_apps("12, 100\n13, [N/A]\n\n") == {12: 100 * 2**20}
    with pytest.raises(ValueError, match="unpack"):
        parse_card("no devices were found")


def test_amd_s_files_are_read(tmp_path: Path) -> None:
    device = tmp_path / "card0" / "device"
    device.mkdir(parents=True)
    (device / "mem_info_vram_total").write_text("8589934592\n")
    (device / "mem_info_vram_used").write_text("1000\n")
    assert list_amd_cards(tmp_path) == [Card("AMD graphics card", 1000, 8 * 2**30, maker="AMD")]
    assert list_amd_cards(tmp_path / "none") == []


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[Card]:
    found = [
        Card("GT 1030", 100, 2 * 2**30, generation=6.1),
        Card("RTX 3060", 5 * 2**30, 12 * 2**30, generation=8.6),
        Card("RTX 3060 Ti", 200, 8 * 2**30, generation=8.6),
    ]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: name)
    monkeypatch.setattr(hardware, "_run_command", lambda tool, query: f"7, {2 * 2**10}")
    monkeypatch.setattr(hardware, "list_nvidia_cards", lambda tool: found)
    return found


def test_the_card_is_the_one_that_the_setting_names(cards: list[Card]) -> None:
    wanted = {
        "auto": "RTX 3060", "cuda": "RTX 3060", "cuda:0": "GT 1030", "cuda:2": "RTX 3060 Ti", "cuda:3": None,
        "cpu": None, "mps": None, "xpu": None,
    }  # fmt: skip
    for device, name in wanted.items():
        card = choose_card(find_cards(), device)
        assert (card.name if card else None) == name, device
    chosen = ["cuda:0"]
    window = Hardware(lambda: chosen[0].partition(":")[0], lambda: chosen[0])
    window.look()
    assert (window.device, window.has_gpu) == ("GT 1030", True)
    chosen[0] = "cpu"
    assert (window.device, window.has_gpu) == (hardware.PROCESSOR, False)
    # A run that goes on has its own.
    assert window.card("cuda:1") == choose_card(find_cards(), "auto")


def test_auto_means_fp32_without_tensor_cores_and_on_a_mac(
    cards: list[Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [""]
    window = Hardware(lambda: chosen[0].partition(":")[0], lambda: chosen[0])
    window.look()
    monkeypatch.setattr(hardware.sys, "platform", "darwin")
    monkeypatch.setattr(hardware.platform, "machine", lambda: "arm64")
    found = [window.gpu(7) for chosen[0] in ("cuda:0", "cuda:1", "mps", "cpu")]
    assert found == [Gpu(7, True), Gpu(7, False), Gpu(7, True), None]


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("2,0", ["RTX 3060 Ti", "GT 1030"]),
        ("1", ["RTX 3060"]),
        ("2,-1,0", ["RTX 3060 Ti"]),
        ("GPU-1b", ["GT 1030", "RTX 3060", "RTX 3060 Ti"]),
    ],
)
def test_cards_are_numbered_as_torch_numbers_them(
    visible: str, names: list[str], cards: list[Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [(card.device, card.name) for card in find_cards()] == [
        (f"cuda:{number}", name) for number, name in enumerate(names)
    ]


@pytest.mark.parametrize("visible", ["", "-1", " ", "3", "-1,0", "none"])
def test_hidden_cards_are_taken_by_no_run(
    visible: str, cards: list[Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    window = Hardware()
    window.look()
    assert (find_card(), find_card("cuda:1"), window.card(), window.has_gpu) == (None, None, None, False)
    # Who asks why there is none is told.
    assert "hides it" in card_problem(find_card(hidden=True), {"build": "CUDA 13.0"}, "Linux")
    assert window.card(hidden=True).name == "RTX 3060"


def test_what_processes_that_will_have_ended_hold_counts_as_free(cards: list[Card]) -> None:
    card = choose_card(find_cards(), "cuda:1")
    assert card is not None
    assert (card.free(), card.free(None, 9), card.free(7)) == (7 * 2**30, 7 * 2**30, 9 * 2**30)
