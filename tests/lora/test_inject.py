import pytest
import torch

from lora_core.backends.compact import CompactConv2d, CompactLinear, WeightPolicy
from lora_core.errors import AdapterFileError
from lora_core.lora.inject import adapter_weights, inject
from lora_core.lora.layer import LoraSpec
from lora_core.lora.weights import AdapterWeights, LayerWeights, LoadedLora, Merger, layer_by_path
from lora_core.model_files.families import KOHYA
from tests.tiny import tiny_output, tiny_text_encoder, tiny_unet


def _adapter(seed: int, rank: int = 3) -> AdapterWeights:
    modules = {"unet": tiny_unet(), "text_encoder": tiny_text_encoder()}
    injected = inject(modules, ["unet", "text_encoder"], KOHYA, LoraSpec(rank, 2.0 * rank), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in injected.parameters():
            tensor.copy_(0.05 * torch.randn(tensor.shape, generator=generator))
    return adapter_weights(injected)


@pytest.fixture
def modules():
    return {"unet": tiny_unet(), "text_encoder": tiny_text_encoder()}


def test_merged_equals_unmerged(modules):
    injected = inject(modules, ["unet"], KOHYA, LoraSpec(3, 6.0), 0)
    with torch.no_grad():
        for tensor in injected.parameters():
            tensor.normal_(std=0.05)
    weights = adapter_weights(injected)
    for strength in (0.5, 1.0):
        injected.set_strength(strength)
        unmerged = tiny_output(modules["unet"])
        injected.set_strength(0.0)
        merger = Merger(modules)
        merger.apply([LoadedLora(weights, strength)])
        torch.testing.assert_close(tiny_output(modules["unet"]), unmerged, rtol=1e-4, atol=1e-5)
        merger.apply([])


def test_strength_zero_and_taking_out_are_bit_equal_to_the_base(modules):
    before = tiny_output(modules["unet"])
    merger = Merger(modules)
    merger.apply([LoadedLora(_adapter(1), 0.0)])
    assert torch.equal(tiny_output(modules["unet"]), before)
    for strength in (1.0, 0.3, 1.7):
        merger.apply([LoadedLora(_adapter(1), strength)])
    assert not torch.equal(tiny_output(modules["unet"]), before)
    merger.apply([])
    assert torch.equal(tiny_output(modules["unet"]), before)


def test_merging_again_does_not_drift(modules):
    merger = Merger(modules)
    merger.apply([LoadedLora(_adapter(1), 0.7)])
    once = tiny_output(modules["unet"])
    for strength in (0.1, 1.3, 0.7):
        merger.apply([LoadedLora(_adapter(1), strength)])
    assert torch.equal(tiny_output(modules["unet"]), once)


def test_factors_beside_a_frozen_weight_are_what_merging_gives_and_depend_on_no_history(modules):
    """The way of a card: each use of a layer makes the sum anew. Thin layers do so anywhere."""
    plain = {"unet": tiny_unet(), "text_encoder": tiny_text_encoder()}
    WeightPolicy().apply_to(modules["unet"])
    before = tiny_output(modules["unet"])
    beside, merged = Merger(modules), Merger(plain)
    adapters = [LoadedLora(_adapter(1), 0.7), LoadedLora(_adapter(2, rank=5), -0.4)]
    for merger in (beside, merged):
        merger.apply(adapters)
    once = tiny_output(modules["unet"])
    torch.testing.assert_close(once, tiny_output(plain["unet"]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(once, before, atol=1e-3)
    for strength in (0.1, 1.3, -2.0):
        beside.apply([LoadedLora(adapters[0].weights, strength)])
    beside.apply(adapters)
    assert torch.equal(tiny_output(modules["unet"]), once)
    beside.apply([LoadedLora(adapters[0].weights, 0.0)])
    assert torch.equal(tiny_output(modules["unet"]), before)
    frozen = dict(tiny_unet().named_parameters())
    for path, layer in modules["unet"].named_modules():
        if isinstance(layer, CompactLinear | CompactConv2d):
            assert torch.equal(layer.dequantize(), frozen[f"{path}.weight"])


def test_two_adapters_add_up(modules):
    layer = modules["unet"].get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    key = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    first, second = _adapter(1), _adapter(2, rank=5)
    original = layer.weight.detach().clone()
    Merger(modules).apply([LoadedLora(first, 0.5), LoadedLora(second, 2.0)])
    expected = original + 0.5 * first.layers[key].delta() + 2.0 * second.layers[key].delta()
    torch.testing.assert_close(layer.weight, expected)


def test_text_strength_stands_apart(modules):
    merger = Merger(modules)
    text = modules["text_encoder"].get_submodule("encoder.layers.0.self_attn.q_proj").weight
    before = text.detach().clone()
    merger.apply([LoadedLora(_adapter(1), 1.0, text_strength=0.0)])
    assert torch.equal(text, before)


def test_an_adapter_for_another_base_is_refused_and_nothing_changes(modules):
    before = tiny_output(modules["unet"])
    good = _adapter(1)
    wrong = dict(good.layers)
    wrong["unet", "mid_block.attentions.0.proj_in"] = LayerWeights(torch.ones(2, 7), torch.ones(5, 2), 1.0)
    merger = Merger(modules)
    for layers, words in (
        (wrong, "another base"),
        ({("unet", "no.such.layer"): good.layers["unet", "mid_block.attentions.0.proj_in"]}, "does not have"),
        ({("text_encoder_2", "x"): good.layers["unet", "mid_block.attentions.0.proj_in"]}, "does not have"),
    ):
        with pytest.raises(AdapterFileError, match=words):
            merger.apply([LoadedLora(AdapterWeights(layers))])
    assert torch.equal(tiny_output(modules["unet"]), before)


def test_several_adapters_add_up_exactly_in_any_order(modules):
    """Sum of strength x delta over the adapters, each layer on its own strength, whatever the ranks and the
    order."""
    adapters = [
        LoadedLora(_adapter(1), 0.5),
        LoadedLora(_adapter(2, rank=5), -1.25, text_strength=2.0),
        LoadedLora(_adapter(3, rank=1), 0.0, text_strength=0.25),
        LoadedLora(_adapter(4, rank=8), 1.5),
    ]
    originals = {
        key: layer_by_path(modules[key[0]], key[1])[1].weight.detach().double().clone()
        for key in adapters[0].weights.layers
    }
    merger = Merger(modules)
    results = []
    for order in (adapters, adapters[::-1], [adapters[2], adapters[0], adapters[3], adapters[1]]):
        merger.apply(order)
        results.append({key: layer_by_path(modules[key[0]], key[1])[1].weight.clone() for key in originals})
    for key, original in originals.items():
        expected = original
        # Each adapter's strength on this part; alpha / rank is 2 for all.
        strengths = (0.5, -1.25, 0.0, 1.5) if key[0] == "unet" else (0.5, 2.0, 0.25, 1.5)
        for adapter, strength in zip(adapters, strengths, strict=True):
            layer = adapter.weights.layers[key]
            product = layer.up.double().flatten(1) @ layer.down.double().flatten(1)
            expected = expected + strength * 2.0 * product.reshape(original.shape)
        for result in results:
            torch.testing.assert_close(result[key].double(), expected, rtol=1e-6, atol=1e-6)


def test_merged_adapters_and_live_layers_do_not_touch_each_other(modules):
    """The live layer's update comes on top of the merged weight, and its factors stay as they are."""
    injected = inject(modules, ["unet"], KOHYA, LoraSpec(3, 6.0), 0)
    with torch.no_grad():
        for tensor in injected.parameters():
            tensor.normal_(std=0.05)
    before = [tensor.detach().clone() for tensor in injected.parameters()]
    live, frozen = tiny_output(modules["unet"]), _adapter(1)
    merger = Merger(modules)
    merger.apply([LoadedLora(frozen, 0.8), LoadedLora(_adapter(2), 0.3)])
    both = tiny_output(modules["unet"])
    assert all(torch.equal(a, b) for a, b in zip(before, injected.parameters(), strict=True))
    # The same sum, all of it merged.
    trained = adapter_weights(injected)
    merger.apply([])
    assert torch.equal(tiny_output(modules["unet"]), live)
    injected.set_strength(0.0)
    merger.apply([LoadedLora(frozen, 0.8), LoadedLora(_adapter(2), 0.3), LoadedLora(trained)])
    torch.testing.assert_close(tiny_output(modules["unet"]), both, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both, live, atol=1e-3)
