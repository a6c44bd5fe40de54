"""Which number format a run takes for its base on a processor."""

import pytest
import torch

from lora_core.spec.config import RunConfig
from lora_core.spec.errors import ModelFileError
from lora_core.training import prepare

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "numbers", "faster", "dtype"),
    [
        ("auto", 8 * 10**8, True, torch.bfloat16),
        ("auto", 8 * 10**8, False, torch.float32),
        ("auto", 5 * 10**6, True, torch.float32),
        ("fp32", 8 * 10**8, True, torch.float32),
        ("bf16", 5 * 10**6, False, torch.bfloat16),
    ],
)
def test_auto_is_bf16_where_that_is_faster_and_the_base_is_large(
    asked: str, numbers: int, faster: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "base_numbers", lambda facts: numbers)
    monkeypatch.setattr(prepare, "bf16_is_faster", lambda: faster)
    assert prepare.training_dtype(RunConfig().changed({"train.precision": asked}), CPU) == dtype


def test_the_embedded_base_is_small() -> None:
    config = RunConfig().changed({"train.precision": "auto"})
    assert prepare.training_dtype(config, CPU) == torch.float32


def test_a_base_that_is_not_there_is_a_sentence() -> None:
    config = RunConfig().changed({"train.precision": "auto", "model.base": "/nowhere/base.safetensors"})
    with pytest.raises(ModelFileError, match="nowhere"):
        prepare.training_dtype(config, CPU)
