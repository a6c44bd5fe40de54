"""Bases of the hub: what is fetched, how it is continued, and what each refusal says. The client is the real
one; the hub is `tests/hub.py`."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from safetensors.torch import save_file

from lora_core.cli import main
from lora_core.errors import ModelFileError
from lora_core.model_files.detect import is_remote, read_base_facts
from lora_core.model_files.hub import (
    Download,
    DownloadCancelled,
    download,
    fetch_base,
    find_download,
    needed_files,
)
from tests.hub import Hub, hub_of, small_repo, use_hub
from tests.waiting import PATIENCE

UNET = "unet/diffusion_pytorch_model.safetensors"
WEIGHT_BYTES = 160_000
"""Numbers of one file of `small_repo`: 200 x 400 in fp16."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_of(base=small_repo(tmp_path / "base"), half=small_repo(tmp_path / "half", "fp16")) as made:
        use_hub(monkeypatch, made, tmp_path / "cache")
        yield made


def quietly(found: Download, cancelled: threading.Event | None = None) -> list[tuple[int, int]]:
    told: list[tuple[int, int]] = []
    download(found, lambda here, size: told.append((here, size)), (cancelled or threading.Event()).is_set)
    return told


def test_size_first_then_bytes_then_a_base(hub: Hub, tmp_path: Path) -> None:
    assert is_remote("owner/base")
    with pytest.raises(ModelFileError, match="nor in the local hub cache"):
        read_base_facts("owner/base")
    found = find_download("owner/base")
    files = [path for path in (tmp_path / "base").rglob("*") if path.is_file()]
    assert found.size == sum(path.stat().st_size for path in files)
    assert (found.here, found.fits) == (0, True)
    told = quietly(found)
    assert told == sorted(told)
    assert len({here for here, _ in told}) > 3
    assert told[-1] == (found.size, found.size)
    assert not is_remote("owner/base")
    assert read_base_facts("owner/base").family.title == "Stable Diffusion 1.x"
    # Nothing is asked for a second time.
    hub.asked.clear()
    fetch_base("owner/base")
    assert hub.asked == []
    assert find_download("owner/base").here == found.size


def test_weights_in_half_precision_alone_are_enough(hub: Hub) -> None:
    quietly(find_download("owner/half"))
    assert not is_remote("owner/half")


def test_one_version_of_the_weights_and_no_safety_checker() -> None:
    stem = "unet/diffusion_pytorch_model"
    always = ["unet/config.json"]
    cases = {
        (f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{stem}.non_ema.safetensors"): [
            f"{stem}.safetensors"
        ],
        (
            f"{stem}.safetensors.index.json",
            f"{stem}-00001-of-00002.safetensors",
            f"{stem}.fp16.safetensors",
        ): [
            f"{stem}.safetensors.index.json",
            f"{stem}-00001-of-00002.safetensors",
        ],
        (f"{stem}.safetensors.index.fp16.json", f"{stem}-00001-of-00001.fp16.safetensors"): [
            f"{stem}.safetensors.index.fp16.json",
            f"{stem}-00001-of-00001.fp16.safetensors",
        ],
        (f"{stem}.fp16.safetensors.index.json", f"{stem}.fp16-00001-of-00001.safetensors"): [
            f"{stem}.fp16.safetensors.index.json",
            f"{stem}.fp16-00001-of-00001.safetensors",
        ],
    }
    others = ["safety_checker/config.json", "safety_checker/model.safetensors", "big.ckpt", "unet/x.bin"]
    for names, wanted in cases.items():
        assert set(needed_files("a/b", [*always, *names, *others])) == {*always, *wanted}, names


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["model.safetensors"], r"no unet/config\.json.*its \.safetensors file"),
        (["unet/config.json", "unet/x.bin"], "no .safetensors weights of its unet"),
    ],
)
def test_a_repository_without_a_base_is_refused_before_a_byte(paths: list[str], words: str) -> None:
    with pytest.raises(ModelFileError, match=words):
        needed_files("a/b", paths)


def test_what_breaks_off_is_taken_up_again(hub: Hub) -> None:
    hub.cut_after = 40_000
    quietly(find_download("owner/base"))
    first, second = hub.sent(UNET)
    assert first == "bytes=0-"
    assert int(second.removeprefix("bytes=").removesuffix("-")) >= 16_384
    assert not is_remote("owner/base")


def test_a_cancelled_download_is_continued(hub: Hub) -> None:
    cancelled = threading.Event()
    hub.gate.clear()
    found = find_download("owner/base")

    def stop_at_once(here: int, size: int) -> None:
        cancelled.set()
        hub.gate.set()

    with pytest.raises(DownloadCancelled, match="kept"):
        download(found, stop_at_once, cancelled.is_set)
    assert is_remote("owner/base")
    here = find_download("owner/base").here
    assert 0 < here < WEIGHT_BYTES
    quietly(found)
    assert hub.sent(UNET) == ["bytes=0-", f"bytes={here}-"]
    assert not is_remote("owner/base")


def test_a_damaged_file_is_removed(hub: Hub, tmp_path: Path) -> None:
    found = find_download("owner/base")
    file = next(file for file in found.files if file.path == UNET)
    partial = found.blob(file).with_name(f"{file.blob}.incomplete")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * 1000)
    with pytest.raises(ModelFileError, match=r"unet/.* arrived damaged and was removed"):
        quietly(found)
    assert not partial.exists()
    quietly(found)
    assert not is_remote("owner/base")


def test_a_cache_that_another_program_left_half_is_completed(hub: Hub) -> None:
    quietly(find_download("owner/base"))
    folder = read_base_facts("owner/base").path
    for name in (UNET, "tokenizer/vocab.json"):
        (folder / name).unlink()
        assert is_remote("owner/base")
        fetch_base("owner/base")
        assert (folder / name).is_file()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "RepoNotFound", "no such model, or it is private; check the name"),
        (404, "RepoNotFound", "no such model"),
        (401, "GatedRepo", r"accept terms first; do so at http://.*/owner/base, then log in"),
        (403, "GatedRepo", "accept terms first"),
        (403, "", "error 403; log in"),
        (503, "", "error 503; try again later"),
    ],
)
def test_a_refusal_says_what_to_do(hub: Hub, status: int, code: str, words: str) -> None:
    hub.refusals["owner/base"] = (status, code)
    with pytest.raises(ModelFileError, match=words) as refused:
        fetch_base("owner/base")
    assert str(refused.value).startswith("The model 'owner/base' cannot be downloaded: ")
    assert "\n" not in str(refused.value)


def test_without_a_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelFileError, match=r"127\.0\.0\.1:9 cannot be reached \(ConnectError\)"):
        fetch_base("owner/base")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelFileError, match="HF_HUB_OFFLINE is set; unset it"):
        fetch_base("owner/base")


def test_a_full_disk_is_seen_before_it_begins(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_core.model_files.hub.free_bytes", lambda path: 400_000)
    found = find_download("owner/base")
    hub.asked.clear()
    with pytest.raises(ModelFileError, match=r"0\.\d MB are missing and 0\.4 MB are free.*HF_HOME"):
        quietly(found)
    assert hub.asked == []


def test_two_programs_do_not_write_one_file(hub: Hub) -> None:
    hub.gate.clear()
    found = find_download("owner/base")
    begun = threading.Event()
    first = threading.Thread(target=download, args=(found, lambda here, size: begun.set()), daemon=True)
    first.start()
    assert begun.wait(PATIENCE)
    with pytest.raises(ModelFileError, match="is being downloaded by another program"):
        quietly(found)
    hub.gate.set()
    first.join(PATIENCE)
    assert not is_remote("owner/base")


def test_no_torch_is_imported() -> None:
    code = "import sys, lora_core.model_files.hub; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Uploads


SECRET = "hf_neverToBeSeen"


@pytest.fixture
def adapter(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter of a user who is logged in, with its card and image beside it."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.root = tmp_path / "uploaded"
    hub.root.mkdir()
    file = tmp_path / "cat.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 4)}, file, {"ss_output_name": "cat"})
    file.with_name("cat.preview.png").write_bytes(b"image")
    return file


def test_an_adapter_goes_to_the_hub_with_card_and_licence(
    hub: Hub, adapter: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["upload", str(adapter), "owner/cat", "--license", "openrail++"]) == 0
    said = "".join(capfd.readouterr())
    assert said == f"{hub.address}/owner/cat\n"
    there = hub.root / "cat"
    assert {path.name for path in there.iterdir()} == {"cat.safetensors", "README.md", "cat.preview.png"}
    assert (there / "cat.safetensors").read_bytes() == adapter.read_bytes()
    front = yaml.safe_load((there / "README.md").read_text("utf-8").split("---\n")[1])
    assert front["license"] == "openrail++"
    assert {"lora", "stable-diffusion", "text-to-image"} <= set(front["tags"])
    assert hub.public == set()
    assert hub.tokens == {f"Bearer {SECRET}"}
    assert not any(SECRET.encode() in path.read_bytes() for path in there.iterdir())
    # Its new tokens go along. What its owner has written there stays, the file is the new one.
    (tokens := adapter.with_name("cat-tokens")).mkdir()
    (tokens / "zwx.safetensors").write_bytes(b"vectors")
    (there / "README.md").write_text("my own words")
    adapter.with_suffix(".md").write_text("---\ntags: []\n---\n")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 4)}, adapter)
    assert main(["upload", str(adapter), "owner/cat"]) == 0
    assert "Note: its README.md stays as it is.\n" in capfd.readouterr().out
    assert (there / "README.md").read_text() == "my own words"
    assert (there / "cat-tokens" / "zwx.safetensors").read_bytes() == b"vectors"
    assert (there / "cat.safetensors").read_bytes() == adapter.read_bytes()
    # And nothing is said to be written that is not.
    assert main(["upload", str(adapter), "owner/cat", "--license", "mit"]) == 0
    assert "README.md stays as it is, so the licence was not written" in capfd.readouterr().out
    assert main(["upload", str(adapter), "owner/cat", "--license", "mit", "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["files"] == ["cat.safetensors", "cat.preview.png", "cat-tokens/zwx.safetensors"]
    assert answer["kept"] == ["README.md"]


def test_what_others_see_is_asked_for(hub: Hub, adapter: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["upload", str(adapter), "owner/cat", "--public"]) == 0
    assert hub.public == {"owner/cat"}
    before = (hub.root / "cat" / "cat.safetensors").stat().st_mtime_ns
    assert main(["upload", str(adapter), "owner/cat"]) == 1
    assert "everybody can see it" in capfd.readouterr().err
    assert (hub.root / "cat" / "cat.safetensors").stat().st_mtime_ns == before
    hub.public.clear()
    assert main(["upload", str(adapter), "owner/cat", "--public"]) == 1
    said = capfd.readouterr().err
    assert "it is private" in said
    assert f"make it public at {hub.address}/owner/cat/settings, or leave out --public." in said
    assert (hub.root / "cat" / "cat.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("there", [True, False])
def test_a_file_goes_by_xet_and_where_that_fails_as_lfs(
    there: bool, hub: Hub, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    hub.xet = there
    save_file({"lora_unet_x.lora_down.weight": torch.randint(256, (100, 2000), dtype=torch.uint8)}, adapter)
    assert main(["upload", str(adapter), "owner/cat"]) == 0
    assert (hub.root / "cat" / "cat.safetensors").read_bytes() == adapter.read_bytes()
    asked = " ".join(path for _, path, _ in hub.asked)
    assert ("/xet/v1/xorbs/" in asked) == there
    assert ("/info/lfs/objects/batch" in asked) != there
    assert "telemetry" not in asked
    assert not huggingface_hub.constants.HF_HUB_DISABLE_XET


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["cat"], "give OWNER/NAME"),
        (["owner/cat", "--license", "My own"], "is not in the hub's list"),
        (["owner/shut"], "answered with error 403; log in with"),
        (["owner/limit"], "answered with error 429; try again later"),
    ],
)
def test_an_upload_that_is_refused_says_why(
    hub: Hub, adapter: Path, words: list[str], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.refusals |= {"owner/shut": (403, ""), "owner/limit": (429, "")}
    assert main(["upload", str(adapter), *words]) == 1
    said = capfd.readouterr().err
    assert reason in said
    assert SECRET not in said
    assert list(hub.root.iterdir()) == []


def test_nobody_logged_in_and_no_network(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["upload", str(adapter), "owner/cat"]) == 1
    assert "HF_HUB_OFFLINE is set" in capfd.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(adapter.parent / "no-token"))
    assert main(["upload", str(adapter), "owner/cat"]) == 1
    assert "Nobody is logged in to the hub" in capfd.readouterr().err
    assert hub.asked == []
