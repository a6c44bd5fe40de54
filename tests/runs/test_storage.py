"""Sizes against `du`, and caches that are cleaned only while nobody uses them."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from lora_core.errors import RunError
from lora_core.runs.folder import RunFolder, runs_folder
from lora_core.runs.storage import cache_sizes, clean_caches
from lora_core.settings.config import RunConfig
from lora_core.system.disk_space import folder_bytes


def filled(folder: Path, *sizes: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        (folder / f"{number}.safetensors").write_bytes(b"x" * size)
    return folder


def test_sizes_of_caches(tmp_path: Path) -> None:
    filled(tmp_path / "cache" / "latents", 100, 200)
    filled(tmp_path / "cache" / "text", 1000)
    filled(tmp_path / "cache" / "datasets" / "abc" / "deep", 30)
    filled(tmp_path / "projects" / "cats" / "pictures", 4000)
    assert list(cache_sizes(tmp_path).items()) == [("text", 1000), ("latents", 300), ("datasets", 30)]
    assert cache_sizes(tmp_path / "nowhere") == {}


@pytest.mark.skipif(shutil.which("du") is None, reason="no du")
def test_as_du_says(tmp_path: Path) -> None:
    filled(tmp_path / "a" / "b", 10, 20, 30)
    os.link(tmp_path / "a" / "b" / "2.safetensors", tmp_path / "a" / "again")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "b")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    said = subprocess.run(
        ["du", "-s", "--bytes", tmp_path], capture_output=True, text=True, check=True
    ).stdout
    folders = sum(path.stat().st_size for path in (tmp_path, tmp_path / "a", tmp_path / "a" / "b"))
    links = sum((tmp_path / "a" / name).lstat().st_size for name in ("link", "loop"))
    assert folder_bytes(tmp_path) == 60 + links
    # Older ones count the folders' own bytes too.
    assert int(said.split()[0]) in (60 + links, 60 + links + folders)


def test_many_files_take_no_time(tmp_path: Path) -> None:
    for number in range(40):
        folder = filled(tmp_path / str(number))
        for other in range(250):
            (folder / str(other)).touch()
    (tmp_path / "last").write_bytes(b"x" * 7)
    began = time.process_time()
    assert folder_bytes(tmp_path) == 7
    # 10,000 files; measured at 0.05 s.
    assert time.process_time() - began < 2.0


def test_caches_are_cleaned_and_nothing_else(tmp_path: Path) -> None:
    filled(tmp_path / "cache" / "latents", 100, 200)
    filled(tmp_path / "cache" / "text", 1000)
    (tmp_path / "cache" / "stray").write_bytes(b"x" * 5)
    filled(tmp_path / "cache" / ".latents.abc.going", 50)  # left by a cleaning that was killed
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "keep").write_bytes(b"keep")
    (tmp_path / "cache" / "link").symlink_to(tmp_path / "outside")
    link = (tmp_path / "cache" / "link").lstat().st_size
    run = RunFolder.create(runs_folder(tmp_path) / "one", RunConfig())
    with run.hold(), pytest.raises(RunError, match="one is going on"):
        clean_caches(tmp_path)
    assert cache_sizes(tmp_path) == {"text": 1000, "latents": 300}
    assert clean_caches(tmp_path) == 1355 + link
    assert list((tmp_path / "cache").iterdir()) == []
    assert (tmp_path / "outside" / "keep").read_bytes() == b"keep"
    assert run.config_file.is_file()
    assert clean_caches(tmp_path) == 0
    assert clean_caches(tmp_path / "nowhere") == 0
