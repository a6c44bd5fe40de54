import math

import pytest
import torch

from lora_core.evaluate.validator import (
    EvalImage,
    clustered_error,
    eval_losses,
    eval_noise,
    gain_by_timestep,
    is_better,
    is_worse,
    paired_difference,
    paired_gain,
    reason_to_stop,
)
from lora_core.models.load import load_base
from lora_core.models.unet import PromptEmbeds
from lora_core.runs.events import Validated

LATENTS = torch.zeros(4, 4, 4)


def test_looks_are_fixed_by_picture_and_seed():
    first = eval_noise("a", LATENTS, 6, 0, 1000)
    again = eval_noise("a", LATENTS, 6, 0, 1000)
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.timesteps, again.timesteps)
    for other in (eval_noise("b", LATENTS, 6, 0, 1000), eval_noise("a", LATENTS, 6, 1, 1000)):
        assert not torch.equal(first.noise, other.noise)


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_timesteps_are_one_a_stratum_and_noise_comes_in_opposite_pairs(count):
    looks = eval_noise("a", LATENTS, count, 3, 1000)
    assert (looks.timesteps * count // 1000).tolist() == list(range(count))
    for pair in range(0, count - 1, 2):
        assert torch.equal(looks.noise[pair], -looks.noise[pair + 1])


def test_the_error_is_clustered_by_picture():
    # By hand: the pictures' means are 1, 2 and 6; their deviation is sqrt(7), over sqrt(3) pictures.
    values = torch.tensor([[0.0, 2.0], [1.0, 3.0], [6.0, 6.0]])
    assert clustered_error(values) == pytest.approx((7 / 3) ** 0.5)
    gain = paired_gain(values + 1, torch.ones(3, 2))
    assert (gain.gain, gain.base_loss, gain.adapted_loss) == pytest.approx((3.0, 4.0, 1.0))


def test_bands_cut_the_timesteps():
    timesteps = torch.tensor([[100, 600], [200, 900]])
    rows = gain_by_timestep(
        torch.tensor([[4.0, 2.0], [2.0, 8.0]]), torch.ones(2, 2), timesteps, 1000, bands=2
    )
    assert [(r["from"], r["to"], r["gain"]) for r in rows] == [(0, 500, 2.0), (500, 1000, 4.0)]
    assert rows[0]["standard_error"] == pytest.approx(1.0)


def test_losses_are_the_plain_squared_error_and_do_not_depend_on_neighbours():
    base = load_base("demo", torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(0)
    pictures = []
    for name in "abc":
        latents = torch.randn(4, 16, 16, generator=generator)
        pictures.append(EvalImage(latents, eval_noise(name, latents, 5, 0, 1000), name))
    text = PromptEmbeds(torch.zeros(1, 77, base.family.context_width))
    losses = eval_losses(base, pictures, lambda caption: text)
    assert losses.shape == (3, 5)
    assert torch.equal(eval_losses(base, pictures[1:2], lambda caption: text), losses[1:2])
    picture, k = pictures[2], 3
    share = base.noise.alphas_cumprod[picture.draws.timesteps[k]]
    noise = picture.draws.noise[k]
    noisy = share.sqrt() * picture.latents + (1 - share).sqrt() * noise
    target = share.sqrt() * noise - (1 - share).sqrt() * picture.latents
    with torch.no_grad():
        said = base.denoiser(noisy[None], picture.draws.timesteps[k], text.context).sample[0]
    assert float(losses[2, k]) == pytest.approx(float((said - target).square().mean()), rel=1e-4)


def validated(step: int, best: bool, against: float = math.nan, error: float = math.nan) -> Validated:
    return Validated(
        step=step, gain=0.1, standard_error=0.05, base_loss=0.3, adapted_loss=0.2, best=best,
        against_best=against, against_best_error=error,
    )  # fmt: skip


def test_the_error_of_a_difference_is_that_of_the_pairs():
    # Each look lost 1, 2 and 3 less, whatever it lost before: by hand, mean 2 and sqrt(1 / 3).
    before = torch.tensor([[10.0, 10.0], [500.0, 500.0], [3.0, 3.0]])
    now = before - torch.tensor([[1.0], [2.0], [3.0]])
    assert paired_difference(before, now) == pytest.approx((2.0, (1 / 3) ** 0.5))


def test_two_pictures_that_agree_by_chance_do_not_make_it_certain():
    before, now = torch.zeros(2, 4), torch.tensor([[1.0, -1.0, 3.0, -3.0]] * 2)
    # By hand: the means are equal, but eight looks have a deviation of sqrt(40 / 7).
    assert paired_difference(before, now) == pytest.approx((0.0, (40 / 7) ** 0.5 / 8**0.5))
    assert paired_gain(before, now).standard_error == pytest.approx((40 / 7) ** 0.5 / 8**0.5)


def test_no_difference_where_the_looks_are_others():
    assert all(map(math.isnan, paired_difference(None, torch.zeros(2, 2))))
    assert all(map(math.isnan, paired_difference(torch.zeros(3, 2), torch.zeros(2, 2))))
    assert not is_better(math.nan, math.nan)
    assert not is_worse(math.nan, math.nan)


@pytest.mark.parametrize(
    ("gained", "error", "verdict"),
    [(0.2, 0.1, (True, False)), (0.05, 0.1, (False, False)), (-0.2, 0.1, (False, True))],
)
def test_better_and_worse_ask_for_more_than_the_error(gained, error, verdict):
    assert (is_better(gained, error), is_worse(gained, error)) == verdict


def test_a_run_ends_when_it_clearly_falls():
    seen = [validated(100, True), validated(200, False, -0.05, 0.02)]
    assert reason_to_stop(seen, 2) == ""
    seen.append(validated(300, False, -0.05, 0.02))
    assert "after step 100: 2 validations were no better" in reason_to_stop(seen, 2)
    assert "0.0500 below it (standard error 0.0200)" in reason_to_stop(seen, 2)
    assert reason_to_stop(seen, 3) == ""
    assert reason_to_stop(seen, 0) == ""


def test_a_run_that_only_stands_still_gets_twice_as_long():
    seen = [validated(100, True)]
    for step in (200, 300, 400):
        seen.append(validated(step, False, -0.01, 0.02))
        assert reason_to_stop(seen, 2) == ""
    seen.append(validated(500, False, 0.01, 0.02))
    assert "differs from it by +0.0100" in reason_to_stop(seen, 2)


def test_a_new_best_starts_the_count_anew():
    seen = [validated(100, True), validated(200, False, -0.1, 0.01), validated(300, True, 0.1, 0.01)]
    seen.append(validated(400, False, -0.1, 0.01))
    assert reason_to_stop(seen, 2) == ""
