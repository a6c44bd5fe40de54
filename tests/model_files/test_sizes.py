"""Room on a drive: by hand, and refused before a write begins."""

import shutil
from pathlib import Path

import pytest

from lora_core.errors import NoRoom
from lora_core.model_files import sizes
from lora_core.settings.config import RunConfig
from lora_core.system import files

NUMBERS = 1_000_000


@pytest.mark.parametrize(
    ("name", "ema", "copies"), [("adamw", 0.0, 3), ("lion", 0.0, 2), ("sgd", 0.9, 3), ("prodigy", 0.0, 5)]
)
def test_a_checkpoint_is_so_many_copies_of_4_bytes(name: str, ema: float, copies: int) -> None:
    config = RunConfig().changed({"optimizer.name": name, "save.ema": ema})
    assert sizes.checkpoint_bytes(config, NUMBERS) == copies * 4 * NUMBERS + 65_536


def test_a_run_needs_its_checkpoints_samples_and_export() -> None:
    """3 + the best + the one to go back to + the new one; 10 rounds of 2 samples of 512 x 512 at 2 bytes."""
    config = RunConfig().changed({"train.steps": 800, "sample.every": 100, "save.keep_last": 3})
    one = sizes.checkpoint_bytes(config, NUMBERS)
    need = sizes.needed_bytes(config, 2 * NUMBERS)
    assert need == 6 * one + 2 * NUMBERS + 10 * 2 * 512 * 512 * 2 + files.MARGIN
    seldom = config.changed({"save.every": 0, "sample.every": 0})
    assert sizes.needed_bytes(seldom, 2 * NUMBERS) == 2 * one + 2 * NUMBERS + files.MARGIN


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=3 * 2**20))
    files.require_room(tmp_path, 2 * 2**20, "The file")
    with pytest.raises(NoRoom, match=r"The file needs 3\.0 MB, and the drive of .* has 3\.0 MB free"):
        files.require_room(tmp_path, 2 * 2**20 + 1, "The file")
    with pytest.raises(NoRoom, match="is gone"):
        files.require_room(tmp_path / "gone", 1, "The file")
    assert files.free_bytes(tmp_path / "gone" / "deeper") == 3 * 2**20
