"""The embedded base, which follows its prompts, and pictures that it has not seen with captions."""

from dataclasses import replace

import pytest
import torch

from lora_core.data.dataset import scan
from lora_core.data.images import ImageRecord
from lora_core.models.load import BaseModel, load_base
from lora_core.system.files import DEMO_BASE


@pytest.fixture(scope="session")
def demo_base() -> BaseModel:
    return load_base("demo", torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def checked() -> list[ImageRecord]:
    """Eight pictures in the base's own style, with right captions."""
    return scan(DEMO_BASE / "check").records[:8]


@pytest.fixture
def swapped(checked: list[ImageRecord]) -> list[ImageRecord]:
    """Six of them, but the captions of the second and of the fifth are each other's."""
    records = list(checked[:6])
    records[1] = replace(checked[1], caption=checked[4].caption)
    records[4] = replace(checked[4], caption=checked[1].caption)
    return records
