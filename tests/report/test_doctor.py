"""`lora-easel doctor`: what it finds, and that each thing wrong comes with its fix."""

import errno
import importlib.metadata
import json
import socket
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_core import api
from lora_core.__main__ import main
from lora_core.models import device
from lora_core.report import doctor
from lora_core.system.hardware import Card


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_card", lambda hidden: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "find_tools", list)
    monkeypatch.setattr(doctor.webbrowser, "get", lambda: SimpleNamespace(name="firefox"))
    monkeypatch.setattr(doctor, "LITTLE_DISK", 0)
    monkeypatch.setattr(doctor, "LITTLE_MEMORY", 0)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=2.8", "numpy>=2.0"])


def wrong(home: Path) -> dict[str, str]:
    found = api.doctor(workspace=home)
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


def test_findings_and_fixes_are_in_the_language_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "LITTLE_MEMORY", 10**18)
    monkeypatch.setenv(doctor.LANGUAGE, "ja")
    (row,) = (row for row in api.doctor(workspace=tmp_path)["checks"] if row["name"] == "Memory")
    assert row["found"].startswith("空き ")
    assert row["fix"] == "ほかのプログラムを閉じてください。"
    monkeypatch.setenv(doctor.LANGUAGE, "no such language")
    assert "GB free" in wrong(tmp_path)["Memory"]


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
    assert "Run `python launch.py repair`" in said
    assert "1 wrong" in said


def test_cards_with_little_memory_or_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [
        {"device": "cuda:0", "name": "A", "capability": "8.6", "usable": True},
        {"device": "cuda:1", "name": "B", "capability": "6.1", "usable": False},
    ]
    monkeypatch.setattr(device, "devices", lambda: seen)
    monkeypatch.setattr(device, "free_memory", lambda name: (10**9, 8 * 10**9))
    monkeypatch.setattr(doctor, "LITTLE_MEMORY", 2 * 10**9)
    found = [row for row in api.doctor(workspace=tmp_path)["checks"] if row["name"] == "PyTorch sees"]
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
    assert "it has to be >=99 | Run `python launch.py repair`" in found["numpy"]
    rows = {row["name"]: row["found"] for row in api.doctor(workspace=tmp_path)["checks"]}
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


Patch = pytest.MonkeyPatch
NVIDIA = {"name": "NVIDIA GeForce RTX 3060", "used": 0, "total": 12 * 2**30, "generation": 8.6}


def refusing(*_: Any, **__: Any) -> Any:
    raise OSError(errno.EROFS, "Read-only file system")


def card(patch: Patch, build: str, lacks_code: str = "", **values: Any) -> None:
    """A card that PyTorch, built for `build`, does not compute on."""
    patch.setattr(doctor, "find_card", lambda hidden: Card(**{**NVIDIA, "driver": "580.65", **values}))
    found = {"device": "cpu", "torch": "2.9.0", "build": build, "capability": "", "lacks_code": lacks_code}
    patch.setattr(device, "describe_torch", lambda: found)


def windows(patch: Patch) -> None:
    patch.setattr(doctor.sys, "platform", "win32")
    patch.setattr(doctor, "_long_paths", lambda: False)
    patch.setattr(doctor, "LONGEST_PATH", doctor.LONGEST_BELOW + 10)


def intel_mac(patch: Patch) -> None:
    patch.setattr(doctor.sys, "platform", "darwin")
    patch.setattr(doctor.platform, "machine", lambda: "x86_64")


def read_only(patch: Patch) -> None:
    real = tempfile.TemporaryFile

    def refused(dir: Path) -> Any:
        return refusing() if "pytest-of-" in str(dir) else real(dir=dir)

    patch.setattr(tempfile, "TemporaryFile", refused)


def not_installed(patch: Patch) -> None:
    def absent(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    patch.setattr(importlib.metadata, "requires", absent)


def little_disk(patch: Patch, cache: int = 0) -> None:
    patch.setattr(doctor, "LITTLE_DISK", 5 * 10**9)
    patch.setattr(doctor, "free_bytes", lambda path: 10**8)
    patch.setattr(doctor, "folder_bytes", lambda folder: cache)


def taken_card(patch: Patch) -> None:
    row = {"device": "cuda:0", "name": "RTX", "capability": "8.6", "usable": True}
    patch.setattr(device, "devices", lambda: [row])
    patch.setattr(device, "free_memory", lambda name: (10**8, 8 * 10**9))
    patch.setattr(doctor, "LITTLE_MEMORY", 10**9)


BROKEN: dict[str, tuple[Callable[[Patch], object], str, str]] = {
    "full disk": (little_disk, "Workspace", "choose a folder on another drive with --workspace"),
    "full disk, large cache": (
        lambda patch: little_disk(patch, 7 * 10**9),
        "Workspace",
        "Run `lora-easel caches clean`, which frees 7.0 GB",
    ),
    "read-only workspace": (read_only, "Workspace", "choose another with --workspace"),
    "files of root in the workspace": (
        lambda patch: patch.setattr(doctor.os, "access", lambda path, how: "queue" not in str(path)),
        "Permissions",
        'Run `sudo chown -R "$USER" ',
    ),
    "a network drive without locks": (
        lambda patch: patch.setattr(doctor, "FileLock", refusing),
        "File locks",
        "Choose a folder on a drive of this computer with --workspace",
    ),
    "no temporary folder": (
        lambda patch: patch.setattr(doctor.tempfile, "gettempdir", lambda: "/dev/null/tmp"),
        "Temporary files",
        "Set TMPDIR",
    ),
    "hub cache closed": (
        lambda patch: patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/dev/null/hub"),
        "Hub cache",
        "Set HF_HOME",
    ),
    "ports taken": (
        lambda patch: patch.setattr(doctor, "_is_free", lambda port: False),
        "Port of the window",
        "`python launch.py --port 8899`",
    ),
    "memory taken": (
        lambda patch: patch.setattr(doctor, "LITTLE_MEMORY", 10**18),
        "Memory",
        "Close other programs",
    ),
    "memory of the card taken": (taken_card, "PyTorch sees", "Close other programs that use cuda:0 RTX."),
    "wrong build": (lambda patch: card(patch, "CPU"), "PyTorch", "Run `python launch.py repair`"),
    "old driver": (
        lambda patch: card(patch, "CUDA 13.0", driver="470.82"),
        "PyTorch",
        "needs driver 580 or newer, and this is 470.82. Update the driver from nvidia.com",
    ),
    "driver without an answer": (
        lambda patch: patch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi"),
        "Graphics card, as its driver says",
        "Restart the computer; if `nvidia-smi` still names no card",
    ),
    "old card": (
        lambda patch: card(patch, "CUDA 13.0", generation=3.5),
        "PyTorch",
        "a newer card is needed",
    ),
    "card without code": (
        lambda patch: card(patch, "CUDA 13.0", "6.1", generation=6.1),
        "PyTorch",
        "no code for compute capability 6.1. Run `python launch.py repair`",
    ),
    "hidden card": (
        lambda patch: card(patch, "CUDA 13.0", hidden=True),
        "PyTorch",
        "CUDA_VISIBLE_DEVICES hides it. Unset it",
    ),
    "AMD card without rights": (
        lambda patch: card(patch, "ROCm 6.4", maker="AMD", name="AMD", driver="", generation=0.0),
        "PyTorch",
        "`sudo usermod -aG render,video $USER`",
    ),
    "broken PyTorch": (
        lambda patch: patch.setitem(sys.modules, "lora_core.models.device", None),
        "PyTorch",
        "Run `python launch.py repair`",
    ),
    "broken diffusers": (
        lambda patch: patch.setitem(sys.modules, "lora_core.models.load", None),
        "Engine",
        "Run `python launch.py repair`",
    ),
    "old package": (
        lambda patch: patch.setattr(importlib.metadata, "requires", lambda name: ["numpy>=99"]),
        "numpy",
        "Run `python launch.py repair`",
    ),
    "not installed": (not_installed, "Packages", "Start it by `python launch.py`"),
    "old Python": (
        lambda patch: patch.setattr(doctor, "_supported_pythons", lambda: ["3.8", "3.9"]),
        "Python",
        "Install a 64-bit Python 3.8 or 3.9 and start `python launch.py repair` with it",
    ),
    "Intel Mac": (intel_mac, "System", "PyTorch needs an Apple processor"),
    "long path on Windows": (windows, "Long paths", "LongPathsEnabled = 1"),
}


@pytest.mark.parametrize("machine", BROKEN)
def test_what_is_wrong_is_named_with_its_fix_and_nothing_else(
    machine: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    breaking, row, words = BROKEN[machine]
    (tmp_path / "queue.db").write_bytes(b"")
    breaking(monkeypatch)
    found = wrong(tmp_path)
    assert words in found[row]
    full = {"Workspace", "Caches", "Hub cache", "Temporary files"} if "disk" in machine else {row}
    assert set(found) <= full | ({"PyTorch sees"} if row == "Memory" else set())


def test_a_browser_and_other_tools_are_named(tmp_path: Path, monkeypatch: Patch) -> None:
    def none() -> None:
        raise doctor.webbrowser.Error

    tool = SimpleNamespace(name="ComfyUI", root=Path("/opt/ComfyUI"))
    monkeypatch.setattr(doctor.webbrowser, "get", none)
    monkeypatch.setattr(doctor, "find_tools", lambda: [tool])
    rows = {row["name"]: row for row in api.doctor(workspace=tmp_path)["checks"]}
    assert "--no-browser" in rows["Browser"]["found"]
    assert rows["Browser"]["ok"]  # a server has none
    assert rows["Other tools"]["found"] == f"ComfyUI in {tool.root}"
    assert not list(tmp_path.glob(".doctor*"))


def test_the_zip_says_nothing_private(tmp_path: Path, monkeypatch: Patch, capsys: Any) -> None:
    home = tmp_path / "Annabel's work"
    words = ["train", "demo", "--name", "annabel-1", "--queue", "--workspace", str(home)]
    assert main([*words, "--set", "dataset.trigger=annabel laughing"]) == 0
    (home / "runs" / "annabel-1" / "log.txt").write_text(f"in {home}/annabel\nRuntimeError: shapes differ\n")
    tool = SimpleNamespace(name="ComfyUI", root=Path("/mnt/my annabel/ComfyUI"))
    monkeypatch.setattr(doctor, "find_tools", lambda: [tool])
    monkeypatch.setattr(doctor.os, "access", lambda path, how: "annabel" not in str(path))
    target = tmp_path / "doctor.zip"
    assert main(["doctor", "--zip", str(target), "--workspace", str(home)]) == 1
    assert capsys.readouterr().out.rstrip().endswith(str(target))
    with zipfile.ZipFile(target) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    assert {"about.json", "doctor.txt", "settings.toml", "log.txt"} <= set(texts)
    assert "annabel" not in "".join(texts.values()).lower()
    assert str(Path.home()) not in "".join(texts.values())
    assert "RuntimeError: shapes differ" in texts["log.txt"]
    assert "WRONG Permissions: left out Run `sudo chown" in texts["doctor.txt"]
    assert "ok    Workspace: <workspace>, " in texts["doctor.txt"]
    assert main(["doctor", "--zip", str(target), "--workspace", str(tmp_path / "unused")]) == 0
    with zipfile.ZipFile(target) as archive:
        assert set(archive.namelist()) == {"about.json", "doctor.txt"}
