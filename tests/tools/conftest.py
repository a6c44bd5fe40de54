"""Pictures to measure on, few and small."""

import shutil
from pathlib import Path

import pytest

from lora_core.system.files import DEMO_TRAIN


@pytest.fixture(scope="session")
def three_pictures(tmp_path_factory) -> Path:
    """Three held-out pictures of the demo with their captions."""
    folder = tmp_path_factory.mktemp("three")
    for name in ("cactus", "koala", "robot"):
        for suffix in (".png", ".txt"):
            shutil.copy(DEMO_TRAIN.parent / "held_out" / f"{name}{suffix}", folder)
    return folder
