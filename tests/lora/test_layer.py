import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_core.errors import AdapterFileError, ConfigError
from lora_core.lora.inject import adapter_weights, inject, limit_norm, load_weights, target_modules
from lora_core.lora.layer import DropoutState, LoraLayer, LoraSpec
from lora_core.model_files.families import ATTENTION, KOHYA, Targets
from tests.tiny import tiny_text_encoder, tiny_unet


def _layer(base=None, moment=None, **drop):
    torch.manual_seed(0)
    layer = LoraLayer(
        base or nn.Linear(6, 5), "unet/x", LoraSpec(3, 3.0, **drop), moment or DropoutState(7), seed=1
    )
    with torch.no_grad():
        layer.up.normal_(generator=torch.Generator().manual_seed(2))
    return layer


def test_a_fresh_layer_is_the_base_bit_for_bit():
    base = nn.Linear(6, 5)
    layer = LoraLayer(base, "unet/x", LoraSpec(3, 3.0), DropoutState(), seed=1)
    x = torch.randn(4, 6)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize(
    "base", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3, stride=2, padding=1), nn.Conv2d(6, 5, 1)]
)
def test_the_update_is_alpha_over_rank_times_up_times_down(base):
    layer = LoraLayer(base, "unet/x", LoraSpec(2, 6.0), DropoutState(), seed=1)
    with torch.no_grad():
        layer.up.normal_()
    x = torch.randn(2, 6, 8, 8) if isinstance(base, nn.Conv2d) else torch.randn(4, 6)
    frozen = base(x)
    weight = base.weight.detach().clone()
    base.weight.data = weight + layer.layer_weights().delta()
    merged = base(x)
    base.weight.data = weight
    torch.testing.assert_close(layer(x), merged, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(frozen, merged)


@pytest.mark.parametrize("base", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3, padding=1)])
def test_the_norm_of_the_update_is_limited_and_its_direction_kept(base):
    layer = LoraLayer(base, "unet/x", LoraSpec(2, 6.0), DropoutState(), seed=1)
    with torch.no_grad():
        layer.up.normal_()
    before = layer.layer_weights().delta()
    limit_norm(layer, 2 * float(before.norm()))
    assert torch.equal(layer.layer_weights().delta(), before)
    limit_norm(layer, 0.5)
    torch.testing.assert_close(layer.layer_weights().delta(), 0.5 * before / before.norm())
    with torch.no_grad():
        layer.up.zero_()
    limit_norm(layer, 0.5)
    assert float(layer.layer_weights().delta().norm()) == 0.0


def test_the_start_follows_from_seed_and_name_alone():
    starts = [LoraLayer(nn.Linear(6, 5), name, LoraSpec(3, 3.0), DropoutState(), seed).down for name, seed in
              (("a", 1), ("a", 1), ("b", 1), ("a", 2))]  # fmt: skip
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0], starts[3])
    assert starts[0].abs().max() <= 6**-0.5


@pytest.mark.parametrize("drop", [{"dropout": 0.5}, {"rank_dropout": 0.5}, {"module_dropout": 0.5}])
def test_dropout_follows_from_the_moment_and_keeps_the_mean(drop):
    moment = DropoutState(7)
    layer = _layer(moment=moment, **drop)
    x = torch.randn(3, 6)
    first = layer(x)
    assert torch.equal(first, layer(x))
    outputs = []
    for micro_batch in range(3000):
        moment.micro_batch = micro_batch
        outputs.append(layer(x).detach())
    assert not torch.equal(outputs[0], outputs[1]) or not torch.equal(outputs[0], outputs[2])
    layer.eval()
    torch.testing.assert_close(torch.stack(outputs).mean(0), layer(x).detach(), rtol=0.1, atol=0.12)


def test_the_masks_of_earlier_versions_come_again_on_a_processor():
    """Values computed with version 0.1: a run that began with it resumes bit for bit."""
    moment = DropoutState(7)
    shape = LoraSpec(3, 3.0, dropout=0.5, rank_dropout=0.3, module_dropout=0.2)
    layer = LoraLayer(nn.Linear(6, 5), "unet/x", shape, moment, seed=1)
    with torch.no_grad():
        for weight, value in ((layer.weight, 0), (layer.bias, 0), (layer.down, 1), (layer.up, 1)):
            weight.fill_(value)
    seen = []
    for micro_batch in range(6):
        moment.micro_batch = micro_batch
        seen += layer(torch.arange(1.0, 13.0).view(2, 6))[:, 0].tolist()
    wanted = [
        150, 85.7143, 117.8571, 353.5714, 121.4286, 192.8571, 42.8571, 200, 53.5714, 300, 0, 0,
    ]  # fmt: skip
    assert seen == pytest.approx(wanted, rel=1e-5)


def test_a_checkpointed_layer_draws_the_same_mask_again():
    layer = _layer(dropout=0.5, rank_dropout=0.3)
    x = torch.randn(3, 6, requires_grad=True)
    layer(x).square().sum().backward()
    plain = layer.down.grad.clone()
    layer.down.grad = None
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(plain, layer.down.grad)


def test_a_bf16_base_keeps_fp32_factors():
    base = nn.Linear(6, 5).bfloat16()
    layer = LoraLayer(base, "unet/x", LoraSpec(3, 3.0), DropoutState(), seed=1)
    assert layer.down.dtype == layer.up.dtype == torch.float32
    assert layer(torch.randn(2, 6).bfloat16()).dtype == torch.bfloat16


def test_targets_find_the_layers_of_both_parts():
    unet, encoder = tiny_unet(), tiny_text_encoder()
    attention = target_modules("unet", unet, ATTENTION)
    assert len(attention) == 4 * 8
    assert all(name.endswith(("to_q", "to_k", "to_v", "to_out.0")) for name in attention)
    assert len(target_modules("unet", unet, KOHYA)) == 4 * 12
    text = target_modules("text_encoder", encoder, ATTENTION)
    assert set(text) == {
        f"text_model.encoder.layers.{n}.self_attn.{x}_proj" for n in (0, 1) for x in ("q", "k", "v", "out")
    }


def test_inject_leaves_the_weights_of_the_base_as_they_were():
    unet = tiny_unet()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    inject({"unet": unet}, ["unet"], ATTENTION, LoraSpec(2, 2.0), 0)
    after = {name.replace(".base.", "."): tensor for name, tensor in unet.state_dict().items()}
    assert set(before) < set(after)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_weights_go_out_and_in_bit_for_bit():
    first = inject({"unet": tiny_unet()}, ["unet"], ATTENTION, LoraSpec(2, 2.0), 0)
    with torch.no_grad():
        for tensor in first.parameters():
            tensor.normal_()
    second = inject({"unet": tiny_unet()}, ["unet"], ATTENTION, LoraSpec(2, 2.0), 9)
    load_weights(second, adapter_weights(first))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_what_does_not_fit_is_refused():
    other = inject({"unet": tiny_unet()}, ["unet"], ATTENTION, LoraSpec(3, 2.0), 0)
    mine = inject({"unet": tiny_unet()}, ["unet"], ATTENTION, LoraSpec(2, 2.0), 0)
    with pytest.raises(AdapterFileError, match="other shapes"):
        load_weights(mine, adapter_weights(other))
    with pytest.raises(ConfigError, match="no layer"):
        inject({"unet": tiny_unet()}, ["unet"], Targets("nothing", "nothing"), LoraSpec(2, 2.0), 0)
