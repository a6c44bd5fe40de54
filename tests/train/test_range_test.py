"""The range test: what it finds, that it leaves no trace but the rates, and what it says where it cannot."""

import math

import pytest
import torch

from lora_core.errors import LoraError, RunError
from lora_core.formats.io import load_adapter
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.runs.preflight import rate_problems
from lora_core.settings.config import RunConfig
from lora_core.train.autotune import EACH, HIGHEST, LOWEST, choose_octave, run_range_test
from lora_core.train.loop import StepSettings
from lora_core.train.setup import RuntimePlan, prepare
from tests.train.runs import Toy, broken_at, trained

COUNT = (HIGHEST - LOWEST) * EACH + 1
TRAINED_TEXT = {"optimizer__text_encoder_lr": 2e-4, "optimizer__block_lr": {"mid_block": 3e-4}}


def rising(middle: float, steep: float = 1.5, top: float = 0.4) -> list[float]:
    """Shares that rise around an octave."""
    octaves = [LOWEST + number / EACH for number in range(COUNT)]
    return [top / (1.0 + math.exp(-steep * (octave - middle))) for octave in octaves]


def found_in(run: RunFolder) -> events.RateFound:
    found = run.progress().rate
    assert found is not None
    return found


@pytest.mark.parametrize("middle", [-2.0, 0.0, 2.5, 5.0])
def test_it_takes_what_lies_an_octave_above_half_of_the_best(middle: float) -> None:
    assert abs(choose_octave(rising(middle)) - (middle + 1.0)) <= 0.75
    wild = rising(middle)
    wild[2] = 0.9  # one batch
    assert abs(choose_octave(wild) - choose_octave(rising(middle))) <= 1


def test_where_nothing_is_learned_it_says_so() -> None:
    for shares in ([], [0.001] * COUNT, [-0.1, -0.2]):
        with pytest.raises(RunError, match=r"optimizer\.lr = auto finds none; give optimizer\.lr a number"):
            choose_octave(shares)


def test_a_run_with_auto_is_the_run_with_the_rates_that_it_found(own_toy: Toy) -> None:
    auto = own_toy.run("auto", optimizer__lr="auto", **TRAINED_TEXT)
    trained(auto)
    found = found_in(auto)
    assert len(found.rates) == len(found.shares) <= COUNT
    assert found.rates == sorted(found.rates)
    assert found.rates[EACH] == 2 * found.rates[0]
    factor = found.rate / auto.config().optimizer.lr
    assert math.log2(factor).is_integer()
    rates = {
        "optimizer__lr": found.rate,
        "optimizer__text_encoder_lr": 2e-4 * factor,
        "optimizer__block_lr": {"mid_block": 3e-4 * factor},
    }
    numbers = own_toy.run("numbers", **rates)
    trained(numbers)
    assert numbers.progress().rate is None
    one, other = (load_adapter(run.path / run.progress().export).layers for run in (auto, numbers))
    assert one.keys() == other.keys()
    for key, layer in one.items():
        assert torch.equal(layer.down, other[key].down)
        assert torch.equal(layer.up, other[key].up)
    assert [e.lr for e in auto.progress().losses] == [e.lr for e in numbers.progress().losses]


def test_it_is_made_once(own_toy: Toy) -> None:
    run = own_toy.run("once", optimizer__lr="auto")
    broken_at(run, events.StepDone, 6)
    before = run.events_file.read_text().count('"RateFound"')
    trained(run)
    assert run.events_file.read_text().count('"RateFound"') == before == 1


@pytest.mark.parametrize("fails_at", [None, 3])
def test_it_leaves_everything_as_it_was(
    own_toy: Toy, fails_at: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = own_toy.run("trace", optimizer__lr="auto", save__ema=0.9)
    config = run.config()
    session = prepare(run, config, RuntimePlan.of(run, config), lambda *told: None)
    state = session.state
    before = state.flat_params.data.detach().clone()
    average = state.average

    def say(phase: str, done: int, total: int) -> None:
        if done == fails_at:
            raise KeyboardInterrupt

    try:
        run_range_test(session, StepSettings(config, 12), say)
        assert fails_at is None
    except KeyboardInterrupt:
        assert fails_at
    assert torch.equal(state.flat_params.data, before)
    assert not state.flat_params.grads.any()
    assert not state.optimizer.state
    assert [group["lr"] for group in state.optimizer.param_groups] == [config.optimizer.lr]
    assert state.average is average


def test_auto_is_a_word_for_a_switch() -> None:
    config = RunConfig().changed({"optimizer.lr": "Auto"})
    assert config.optimizer.range_test
    assert config.optimizer.lr == RunConfig().optimizer.lr
    assert RunConfig.from_dict(config.to_dict()) == config, "as a file has it, with both"
    assert not config.changed({"optimizer.lr": 1e-3}).optimizer.range_test
    with pytest.raises(LoraError, match=r"optimizer\.text_encoder_lr = 'auto' should be a number"):
        config.changed({"optimizer.text_encoder_lr": "auto"})


def test_what_it_does_not_go_with() -> None:
    for changes, words in (
        ({"optimizer.name": "prodigy", "optimizer.text_encoder_lr": 0.0}, "Prodigy finds its own rate"),
        (
            {"optimizer.lr": 0.0, "optimizer.range_test": True},
            "nothing to begin with where optimizer.lr is 0",
        ),
    ):
        config = RunConfig().changed({"optimizer.range_test": True, **changes})
        (problem,) = rate_problems(config, None)
        assert problem.blocking
        assert words in problem.sentence
    assert rate_problems(RunConfig().changed({"optimizer.lr": "auto", "adapter.alpha": 1.0}), None) == []
