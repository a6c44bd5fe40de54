"""Which dtype a run takes for its base on a processor, and whether a card computes deterministically."""

import pytest
import torch

from lora_core.errors import LoraError, ModelFileError
from lora_core.settings.config import RunConfig
from lora_core.train import setup, trainer
from lora_core.train.setup import RuntimePlan
from tests.train.runs import Toy, trained

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
    monkeypatch.setattr(setup, "count_base_parameters", lambda facts: numbers)
    monkeypatch.setattr(setup, "bf16_is_faster", lambda: faster)
    assert setup.training_dtype(RunConfig().changed({"train.precision": asked}), CPU) == dtype


def test_the_embedded_base_is_small() -> None:
    config = RunConfig().changed({"train.precision": "auto"})
    assert setup.training_dtype(config, CPU) == torch.float32


def test_a_base_that_is_not_there_is_a_sentence() -> None:
    config = RunConfig().changed({"train.precision": "auto", "model.base": "/nowhere/base.safetensors"})
    with pytest.raises(ModelFileError, match="nowhere"):
        setup.training_dtype(config, CPU)


def test_deterministic_training_is_planned_and_set_up_before_anything_is_computed(
    own_toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(setup, "compute_deterministically", lambda device: done.append(device.type))

    def prepared(*_: object) -> None:
        done.append("prepared")
        raise LoraError("enough")

    monkeypatch.setattr(trainer, "prepare", prepared)
    run = own_toy.run("one", train__deterministic=True)
    for _ in range(2):
        with pytest.raises(LoraError, match="enough"):
            trained(run)
    assert done == ["cpu", "prepared"] * 2
    assert RuntimePlan.of(run, RunConfig()).deterministic, "the plan counts, as for all that is chosen once"


def test_where_it_has_no_effect_a_note_says_so() -> None:
    (note,) = RuntimePlan("fp32", "mps", 1, deterministic=True).notes()
    assert "train.deterministic has no effect on an Apple graphics card" in note
    assert RuntimePlan("fp32", "cuda", 1, deterministic=True).notes() == []
    assert RuntimePlan("fp32", "mps", 1).notes() == []
