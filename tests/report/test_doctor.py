"""`lora-easel doctor`: what it finds, and that each thing wrong comes with its fix."""

import importlib.metadata
import json
import socket
import sys
from pathlib import Path

import pytest

from lora_core import api
from lora_core.__main__ import main
from lora_core.models import device
from lora_core.report import doctor
from lora_core.system.hardware import Card


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_card", lambda hidden: None)
    monkeypatch.setattr(doctor, "LITTLE_DISK", 0)
    monkeypatch.setattr(doctor, "LITTLE_MEMORY", 0)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=2.8", "numpy>=2.0"])


def wrong(home: Path) -> dict[str, str]:
    found = api.doctor(home)
    assert found["ok"] == all(row["ok"] for row in found["checks"])
    return {row["name"]: f"{row['found']} | {row['fix']}" for row in found["checks"] if not row["ok"]}


def test_a_computer_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--workspace", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for words in ("ok     Python: 3.", "torch 2.", "PyTorch sees: cpu", "Hub cache: ", "Nothing is wrong."):
        assert words in said
    assert main(["doctor", "--workspace", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert {frozenset(row) for row in found["checks"]} == {frozenset({"name", "found", "ok", "fix"})}


def test_a_card_that_pytorch_cannot_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = Card("NVIDIA GeForce RTX 3060", 0, 12 * 2**30, generation=8.6, driver="580.65")
    monkeypatch.setattr(doctor, "find_card", lambda hidden: card)
    found = {"device": "cpu", "torch": "2.9.0+cpu", "build": "CPU", "capability": "", "lacks_code": ""}
    monkeypatch.setattr(device, "describe_torch", lambda: found)
    assert main(["doctor", "--workspace", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "RTX 3060, 12.0 GB, driver 580.65, compute capability 8.6" in said
    assert "WRONG  PyTorch: 2.9.0+cpu, built for CPU\n       There is an NVIDIA GeForce RTX 3060, but" in said
    assert "Delete the folder .venv and start launch.py again" in said
    assert "1 wrong" in said


def test_cards_with_little_memory_or_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [
        {"device": "cuda:0", "name": "A", "capability": "8.6", "usable": True},
        {"device": "cuda:1", "name": "B", "capability": "6.1", "usable": False},
    ]
    monkeypatch.setattr(device, "devices", lambda: seen)
    monkeypatch.setattr(device, "free_memory", lambda name: (10**9, 8 * 10**9))
    monkeypatch.setattr(doctor, "LITTLE_MEMORY", 2 * 10**9)
    found = [row for row in api.doctor(tmp_path)["checks"] if row["name"] == "PyTorch sees"]
    assert found[0]["found"] == "cuda:0 A, compute capability 8.6, 1.0 of 8.0 GB free"
    assert found[0]["fix"] == "Close other programs that use cuda:0 A."
    assert found[1]["found"] == "cuda:1 B, compute capability 6.1, which this PyTorch has no code for"


def test_a_pytorch_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lora_core.models.device", None)
    assert "cannot be imported" in wrong(tmp_path)["PyTorch"]


def test_packages_that_are_absent_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = [
        "numpy>=99",
        "no-such-package>=1",
        'not-there; extra == "tensorboard"',
        'for-tests; extra == "test"',
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needs)
    found = wrong(tmp_path)
    assert set(found) == {"numpy", "no-such-package"}
    assert "it has to be >=99 | Delete the folder .venv" in found["numpy"]
    rows = {row["name"]: row["found"] for row in api.doctor(tmp_path)["checks"]}
    assert rows["Optional packages that are absent"] == "not-there"


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert "choose another with --workspace" in wrong(file / "home")["Workspace"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(file))
    assert "Set HF_HOME" in wrong(tmp_path / "home")["Hub cache"]
    monkeypatch.setattr(doctor, "LITTLE_DISK", 10**18)
    assert {"Workspace", "Caches", "Hub cache", "Temporary files"} <= set(wrong(tmp_path / "home"))


def test_long_paths_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "platform", "win32")
    monkeypatch.setattr(doctor, "_long_paths", lambda: False)
    assert "Long paths" not in {check.name for check in doctor._folders(tmp_path)}
    (found,) = (one for one in doctor._folders(tmp_path / ("x" * 140)) if one.name == "Long paths")
    assert "LongPathsEnabled = 1" in found.fix


def test_the_port_of_the_window() -> None:
    assert next(doctor._port(lambda port: port > 7861)).found.endswith("7862 is free")
    assert "--port" in next(doctor._port(lambda port: False)).fix
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert not doctor._is_free(taken.getsockname()[1])
