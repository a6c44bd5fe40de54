"""Going on from an existing LoRA: the start equals the file, or is its best approximation."""

import pytest
import torch

from lora_core.errors import AdapterFileError
from lora_core.lora.inject import adapter_weights, fit_to_rank, init_from_lora, inject
from lora_core.lora.layer import LoraSpec
from lora_core.lora.weights import AdapterWeights, LayerWeights, LoadedLora, Merger
from lora_core.model_files.families import KOHYA, LOCON
from tests.tiny import tiny_output, tiny_unet

CONV = "down_blocks.0.downsamplers.0.conv"


def _earlier(rank: int, alpha: float, seed: int = 3, targets=LOCON) -> AdapterWeights:
    injected = inject({"unet": tiny_unet()}, ["unet"], targets, LoraSpec(rank, alpha), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in injected.parameters():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return adapter_weights(injected)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 1.0), (9, 2.0)])
def test_the_first_step_computes_what_the_merged_file_computes(rank, alpha):
    earlier = _earlier(4, 6.0)
    merged = tiny_unet()
    base = tiny_output(merged)
    Merger({"unet": merged}).apply([LoadedLora(earlier)])
    unet = tiny_unet()
    injected = inject({"unet": unet}, ["unet"], LOCON, LoraSpec(rank, alpha), 7)
    assert init_from_lora(injected, earlier, "x.safetensors") == []
    torch.testing.assert_close(tiny_output(unet), tiny_output(merged), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tiny_output(unet), base, atol=1e-3)
    assert {(w.rank, w.alpha) for w in adapter_weights(injected).layers.values()} == {(rank, alpha)}


def test_the_same_rank_and_scale_give_the_factors_bit_for_bit():
    earlier = _earlier(4, 6.0)
    injected = inject({"unet": tiny_unet()}, ["unet"], LOCON, LoraSpec(4, 6.0), 7)
    init_from_lora(injected, earlier, "x")
    for key, layer in adapter_weights(injected).layers.items():
        assert torch.equal(layer.down, earlier.layers[key].down)
        assert torch.equal(layer.up, earlier.layers[key].up)


def test_a_higher_rank_has_something_left_to_learn_with():
    injected = inject({"unet": tiny_unet()}, ["unet"], LOCON, LoraSpec(6, 6.0), 7)
    init_from_lora(injected, _earlier(4, 4.0), "x")
    for layer in injected.layers.values():
        assert layer.down[4:].flatten(1).norm(dim=1).min() > 0
        assert not layer.up[:, 4:].any()


@pytest.mark.parametrize("shape", [(12, 10), (12, 5, 3, 3), (3, 20)])
def test_a_lower_rank_is_the_best_approximation(shape):
    generator = torch.Generator().manual_seed(0)
    tail = (1,) * (len(shape) - 2)
    given = LayerWeights(
        torch.randn(6, *shape[1:], generator=generator),
        torch.randn(shape[0], 6, *tail, generator=generator),
        3.0,
    )
    fresh = LayerWeights(torch.randn(2, *shape[1:]), torch.zeros(shape[0], 2, *tail), 5.0)
    begun, kept, lost = fit_to_rank(given, fresh)
    # The product itself and torch's own SVD of it.
    whole = (3.0 / 6.0) * (given.up.flatten(1).double() @ given.down.flatten(1).double())
    u, singular, v = torch.linalg.svd(whole, full_matrices=False)
    best = (u[:, :2] * singular[:2]) @ v[:2]
    torch.testing.assert_close(begun.delta().flatten(1).double(), best, rtol=1e-4, atol=1e-5)
    assert (begun.rank, begun.alpha) == (2, 5.0)
    assert kept == pytest.approx(float(singular[:2].square().sum()))
    assert lost == pytest.approx(float(singular[2:].square().sum()))
    # The two halves are of one size, so that neither learns much faster than the other.
    assert float(begun.up.norm()) == pytest.approx(float(begun.down.norm()), rel=1e-4)


def test_a_cut_is_told_with_what_is_left_of_it():
    earlier = _earlier(4, 6.0)
    injected = inject({"unet": tiny_unet()}, ["unet"], LOCON, LoraSpec(2, 2.0), 7)
    (note,) = init_from_lora(injected, earlier, "x.safetensors")
    whole = sum(float(layer.delta().square().sum()) for layer in earlier.layers.values())
    rest = sum(float(layer.delta().square().sum()) for layer in adapter_weights(injected).layers.values())
    assert f"{len(injected.layers)} layers of x.safetensors" in note
    assert f"{100 * rest / whole:.1f}%" in note


def test_layers_of_one_side_only(monkeypatch):
    """What the file lacks starts fresh; what the run lacks is counted in a sentence."""
    unet = tiny_unet()
    injected = inject({"unet": unet}, ["unet"], LOCON, LoraSpec(4, 4.0), 7)
    assert init_from_lora(injected, _earlier(4, 4.0, targets=KOHYA), "x") == []
    assert not injected.layers["unet", CONV].up.any()
    injected = inject({"unet": tiny_unet()}, ["unet"], KOHYA, LoraSpec(4, 4.0), 7)
    earlier = _earlier(4, 4.0)
    (note,) = init_from_lora(injected, earlier, "x")
    assert note.startswith(f"{len(earlier.layers) - 48} of the {len(earlier.layers)} layers of x are not")


def test_a_linear_layer_may_stand_in_for_a_small_convolution():
    """Some tools write the 1 x 1 convolutions proj_in and proj_out as linear layers."""
    name = "mid_block.attentions.0.proj_in"
    layer = _earlier(4, 4.0, targets=KOHYA).layers["unet", name]
    flat = LayerWeights(layer.down.flatten(1), layer.up.flatten(1), layer.alpha)
    injected = inject({"unet": tiny_unet()}, ["unet"], KOHYA, LoraSpec(4, 4.0), 7)
    init_from_lora(injected, AdapterWeights({("unet", name): flat}), "x")
    assert torch.equal(injected.layers["unet", name].layer_weights().delta(), layer.delta())


def test_what_does_not_fit_is_refused():
    injected = inject({"unet": tiny_unet()}, ["unet"], KOHYA, LoraSpec(4, 4.0), 7)
    name = "mid_block.attentions.0.proj_in"
    wrong = AdapterWeights({("unet", name): LayerWeights(torch.ones(2, 7), torch.ones(5, 2), 1.0)})
    with pytest.raises(
        AdapterFileError, match=r"x cannot be continued: its layer unet\.mid_block.*another base"
    ):
        init_from_lora(injected, wrong, "x")
    other = AdapterWeights({("text_encoder", "x"): LayerWeights(torch.ones(2, 7), torch.ones(5, 2), 1.0)})
    with pytest.raises(AdapterFileError, match="none of the layers"):
        init_from_lora(injected, other, "x")
