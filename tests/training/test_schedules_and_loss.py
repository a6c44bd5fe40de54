import pytest
import torch

from lora_core.models.noise import NoiseSchedule
from lora_core.training.loss import absolute_error, drawn, huber_error, min_snr_weight, squared_error
from lora_core.training.schedules import rate_factor


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        # (1 + cos(pi p)) / 2 at p = 0, 1/4, 1/2, 3/4, 1.
        ("cosine", [1, 0.853553, 0.5, 0.146447, 0]),
        ("cosine_restarts", [1, 0.146447, 0.5, 0.853553, 0]),
    ],
)
def test_factors_without_warm_up(schedule, factors):
    assert [rate_factor(s, 100, schedule, 0.0) for s in (0, 25, 50, 75, 100)] == pytest.approx(
        factors, abs=1e-6
    )


def test_warm_up_rises_in_a_line_and_never_starts_at_zero():
    factors = [rate_factor(step, 100, "cosine", 0.04) for step in range(5)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rate_factor(0, 10, "cosine", 1.0) > 0


def _schedule(prediction):
    return NoiseSchedule(torch.tensor([0.9, 0.5, 0.1, 0.0]), prediction)


def test_min_snr_weights_are_those_of_the_paper():
    # SNR is 9, 1, 1/9, 0. epsilon: min(SNR, 5) / SNR; velocity: min(SNR, 5) / (SNR + 1).
    timesteps = torch.arange(4)
    # At zero SNR the epsilon weight is its limit, 1, and not 0 / 0.
    epsilon = min_snr_weight(_schedule("epsilon"), timesteps, 5.0)
    assert epsilon.tolist() == pytest.approx([5 / 9, 1.0, 1.0, 1.0])
    velocity = min_snr_weight(_schedule("v_prediction"), timesteps, 5.0)
    assert velocity.tolist() == pytest.approx([0.5, 0.5, 0.1, 0.0])
    assert min_snr_weight(_schedule("epsilon"), timesteps, 0.0).tolist() == [1.0] * 4


def test_timesteps_are_stratified_over_the_batch_and_uniform():
    counts = torch.zeros(10)
    for seed in range(500):
        draw = drawn(torch.zeros(4, 4, 2, 2), 1000, 0.0, torch.Generator().manual_seed(seed))
        assert sorted((draw.timesteps // 250).tolist()) == [0, 1, 2, 3]
        counts += torch.bincount(draw.timesteps // 100, minlength=10)
    assert counts.min() > 150
    assert counts.max() < 250


def test_the_noise_offset_shifts_whole_channels():
    generator = torch.Generator().manual_seed(0)
    plain = drawn(torch.zeros(64, 4, 8, 8), 1000, 0.0, generator).noise
    shifted = drawn(torch.zeros(64, 4, 8, 8), 1000, 0.5, generator).noise
    # The mean of 64 pixels has deviation 1/8; the offset adds 0.5: sqrt(1/64 + 1/4) = 0.515.
    assert plain.mean((2, 3)).std() == pytest.approx(0.125, abs=0.02)
    assert shifted.mean((2, 3)).std() == pytest.approx(0.515, abs=0.06)


def test_kinds_of_error():
    predicted, target = torch.tensor([0.5, 3.0]), torch.zeros(2)
    assert squared_error(predicted, target).tolist() == [0.25, 9.0]
    assert absolute_error(predicted, target).tolist() == [0.5, 3.0]
    assert huber_error(predicted, target).tolist() == [0.125, 2.5]
