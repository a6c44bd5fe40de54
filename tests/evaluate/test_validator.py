import pytest
import torch

from lora_core.evaluate.validator import (
    EvalImage,
    clustered_error,
    eval_losses,
    eval_noise,
    gain_by_timestep,
    paired_gain,
)
from lora_core.models.load import load_base
from lora_core.models.unet import PromptEmbeds

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
