"""What the tools and files of drivers say about a card is read."""

from pathlib import Path

import pytest

from lora_core.system.hardware import Card, find_amd_card, parse_apps, parse_card


def test_what_nvidia_s_tool_says_is_read() -> None:
    found = parse_card("NVIDIA GeForce RTX 3060, rev, 5222, 12288, 580.65, 170.00, 8.6")
    assert found == Card(
        "NVIDIA GeForce RTX 3060, rev", 5222 * 2**20, 12288 * 2**20, 170.0, 8.6, driver="580.65"
    )
    assert parse_card("Card, 1, 2, 580.65, [N/A], 9.0").watts == 0.0
    assert parse_apps("12, 100\n13, [N/A]\n\n") == {12: 100 * 2**20}
    with pytest.raises(ValueError, match="unpack"):
        parse_card("no devices were found")


def test_amd_s_files_are_read(tmp_path: Path) -> None:
    device = tmp_path / "card0" / "device"
    device.mkdir(parents=True)
    (device / "mem_info_vram_total").write_text("8589934592\n")
    (device / "mem_info_vram_used").write_text("1000\n")
    assert find_amd_card(tmp_path) == Card("AMD graphics card", 1000, 8 * 2**30, maker="AMD")
    assert find_amd_card(tmp_path / "none") is None
