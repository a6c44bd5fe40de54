import pytest
import torch

from lora_core.models.unet import NoiseSchedule
from lora_core.settings.schema import LossSection
from lora_core.train.loop import debiased_weight, lr_factor, min_snr_weight, sample_noise, squared_error
from lora_core.train.objectives import absolute_error, huber_error


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
    assert [lr_factor(s, 100, schedule, 0.0) for s in (0, 25, 50, 75, 100)] == pytest.approx(
        factors, abs=1e-6
    )


def test_warm_up_rises_in_a_line_and_never_starts_at_zero():
    factors = [lr_factor(step, 100, "cosine", 0.04) for step in range(5)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert lr_factor(0, 10, "cosine", 1.0) > 0


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
        draw = sample_noise(torch.zeros(4, 4, 2, 2), 1000, LossSection(), torch.Generator().manual_seed(seed))
        assert sorted((draw.timesteps // 250).tolist()) == [0, 1, 2, 3]
        counts += torch.bincount(draw.timesteps // 100, minlength=10)
    assert counts.min() > 150
    assert counts.max() < 250


def test_the_noise_offset_shifts_whole_channels():
    generator = torch.Generator().manual_seed(0)
    plain = sample_noise(torch.zeros(64, 4, 8, 8), 1000, LossSection(), generator).noise
    shifted = sample_noise(torch.zeros(64, 4, 8, 8), 1000, LossSection(noise_offset=0.5), generator).noise
    # The mean of 64 pixels has deviation 1/8; the offset adds 0.5: sqrt(1/64 + 1/4) = 0.515.
    assert plain.mean((2, 3)).std() == pytest.approx(0.125, abs=0.02)
    assert shifted.mean((2, 3)).std() == pytest.approx(0.515, abs=0.06)


def test_debiased_weights_are_those_of_the_paper():
    # SNR is 9, 1, 1/9, 0. epsilon: 1 / sqrt(SNR), here up to 1 / sqrt(0.001); velocity: 1 / (SNR + 1).
    timesteps = torch.arange(4)
    epsilon = debiased_weight(_schedule("epsilon"), timesteps)
    assert epsilon.tolist() == pytest.approx([1 / 3, 1.0, 3.0, 31.623], rel=1e-4)
    velocity = debiased_weight(_schedule("v_prediction"), timesteps)
    assert velocity.tolist() == pytest.approx([0.1, 0.5, 0.9, 0.999], rel=1e-3)
    # In place of min-SNR, unless that is asked for too.
    assert LossSection(debias=True).gamma("epsilon") == 0.0
    assert LossSection(debias=True, min_snr=5.0).gamma("epsilon") == 5.0


def test_multi_resolution_noise_adds_coarse_structure_of_the_same_strength():
    latents = torch.zeros(64, 4, 16, 16)
    draws = [
        sample_noise(latents, 1000, LossSection(multires_noise=many), torch.Generator().manual_seed(0)).noise
        for many in (0, 1, 6)
    ]
    plain, one, many = (float(torch.nn.functional.avg_pool2d(draw, 8).std()) for draw in draws)
    # The mean of 64 independent pixels has deviation 1/8; one level adds only noise of the same size.
    assert plain == pytest.approx(0.125, abs=0.01)
    assert one == pytest.approx(plain, abs=0.01)
    assert many > 1.2 * plain
    for draw in draws[1:]:
        assert torch.allclose(draw.std(dim=(1, 2, 3)), torch.ones(64), atol=1e-4)


def test_input_perturbation_is_in_the_input_and_not_in_the_target():
    rules = LossSection(input_perturbation=0.1)
    draw = sample_noise(torch.zeros(64, 4, 8, 8), 1000, rules, torch.Generator().manual_seed(0))
    plain = sample_noise(torch.zeros(64, 4, 8, 8), 1000, LossSection(), torch.Generator().manual_seed(0))
    assert torch.equal(draw.noise, plain.noise)
    assert plain.perturbed is None
    assert float((draw.perturbed - draw.noise).std()) == pytest.approx(0.1, rel=0.02)
    part = draw.rows(slice(3, 5))
    assert torch.equal(part.perturbed, draw.perturbed[3:5])


@pytest.mark.parametrize(
    ("rules", "quartiles"),
    [
        ({}, (0.25, 0.5, 0.75)),
        ({"min_timestep": 200, "max_timestep": 600}, (0.3, 0.4, 0.5)),
        # The logistic function of -0.6745, 0 and 0.6745, the quartiles of a normal variable.
        ({"timesteps": "logit_normal"}, (0.33748, 0.5, 0.66252)),
        (
            {"timesteps": "logit_normal", "timestep_mean": 1.0, "timestep_std": 0.5},
            (0.65985, 0.73106, 0.79204),
        ),
        # s u / (1 + (s - 1) u) at s = 3.
        ({"timestep_shift": 3.0}, (0.5, 0.75, 0.9)),
    ],
)
def test_timesteps_follow_the_distribution_that_is_set(rules, quartiles):
    section = LossSection(**rules)
    found = tuple(section.timestep_at(share) for share in (0.25, 0.5, 0.75))
    assert found == pytest.approx(quartiles, abs=1e-4)
    assert 0.0 <= section.timestep_at(0.0) < section.timestep_at(1 - 2**-53) <= 1.0
    latents = torch.zeros(400, 4, 1, 1)
    drawn = sample_noise(latents, 1000, section, torch.Generator().manual_seed(0)).timesteps.double()
    shares = torch.quantile(drawn / 1000, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    assert shares.tolist() == pytest.approx(quartiles, abs=0.01)


def test_min_snr_by_default_depends_on_the_prediction():
    usual = LossSection()
    assert usual.gamma("epsilon") == 5.0
    assert usual.gamma("v_prediction") == 0.0
    by_hand = LossSection(min_snr=3.0)
    assert by_hand.gamma("epsilon") == by_hand.gamma("v_prediction") == 3.0


def test_by_default_the_last_timestep_of_zero_terminal_snr_has_weight():
    noise = _schedule("v_prediction")
    weights = min_snr_weight(noise, torch.arange(4), LossSection().gamma(noise.objective))
    assert weights.tolist() == [1.0] * 4


def _errors(size=0.3, wrong=0.0):
    """Errors of a prediction: noise of a usual size (an SD loss is about 0.1), some elements far off."""
    errors = size * torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    errors[:, :, 0, 0] += wrong
    return errors.requires_grad_()


def _gradient(error, errors, delta=0.1):
    total = error(errors, torch.zeros_like(errors), lambda: torch.full((2,), delta)).mean()
    return torch.autograd.grad(total, errors)[0]


def test_kinds_of_error():
    predicted, target = torch.tensor([[[[0.5, 3.0]]]]), torch.zeros(1, 1, 1, 2)
    delta = lambda: torch.tensor([1.0])  # noqa: E731
    assert squared_error(predicted, target, delta).tolist() == [[[[0.25, 9.0]]]]
    assert absolute_error(predicted, target, delta).tolist() == [[[[0.5, 3.0]]]]
    # 2 (sqrt(e^2 + 1) - 1) at 0.5 and 3.
    found = huber_error(predicted, target, delta).flatten().tolist()
    assert found == pytest.approx([0.236068, 4.324555], abs=1e-6)


def test_huber_is_squared_error_where_errors_are_small():
    # Far below delta, where sqrt(e^2 + d^2) - d would have no digits left in fp32.
    errors = _errors(1e-5).detach()
    found = huber_error(errors, torch.zeros_like(errors), lambda: torch.full((2,), 0.1))
    assert torch.allclose(found, errors.square(), rtol=1e-6, atol=0.0)


def test_huber_at_the_size_of_diffusion_losses_is_not_a_multiple_of_squared_error():
    errors = _errors()
    huber, squared = _gradient(huber_error, errors), _gradient(squared_error, errors)
    # With delta 1, as it was, the gradients are parallel and an optimizer such as Adam cancels the factor.
    assert (
        torch.cosine_similarity(_gradient(huber_error, errors, 10.0).flatten(), squared.flatten(), 0) > 0.999
    )
    assert torch.cosine_similarity(huber.flatten(), squared.flatten(), 0) < 0.95
    ratio = huber_error(errors, torch.zeros_like(errors), lambda: torch.full((2,), 0.1)).mean()
    assert ratio / errors.square().mean() < 0.7


def test_huber_limits_what_an_outlier_pulls():
    errors = _errors(wrong=30.0)
    huber, squared = _gradient(huber_error, errors), _gradient(squared_error, errors)
    far = torch.zeros_like(errors, dtype=torch.bool)
    far[:, :, 0, 0] = True

    def share(gradient):
        return float(gradient[far].norm() / gradient.norm())

    assert share(squared) > 0.95
    assert share(huber) < 0.2
    # No element's gradient of the mean is above 2 delta / n.
    assert float(huber.abs().max()) <= 2 * 0.1 / errors.numel() * 1.0001


def test_huber_schedules():
    # Signal shares a: sigma = sqrt((1 - a) / a) is 1/3, 1, 3 and infinite; c = 0.1.
    noise, timesteps = _schedule("v_prediction"), torch.arange(4)

    def deltas(schedule):
        rules = LossSection(huber_delta=0.1, huber_schedule=schedule)
        return rules.delta_at(noise, timesteps).tolist()

    assert deltas("constant") == pytest.approx([0.1] * 4)
    # (1 - c) / (1 + sigma)^2 + c, as kohya sd-scripts computes it.
    assert deltas("snr") == pytest.approx([0.9 * 9 / 16 + 0.1, 0.325, 0.9 / 16 + 0.1, 0.1])
    # c^(t / T).
    assert deltas("exponential") == pytest.approx([1.0, 0.1**0.25, 0.1**0.5, 0.1**0.75])
