import pytest
import torch

from lora_core.errors import AdapterFileError
from lora_core.formats import kohya, peft
from lora_core.formats.kinds import file_format
from lora_core.lora.weights import AdapterWeights
from tests.formats.conftest import BLOCK, adapter, linear, same_bits

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def pair(rank=4, stem=STEM, **more):
    return {
        f"{stem}.lora_down.weight": torch.ones(rank, 6),
        f"{stem}.lora_up.weight": torch.ones(5, rank),
        **more,
    }


def test_names_and_alpha(family):
    tensors = kohya.to_tensors(adapter(), family)
    assert len(tensors) == 15
    assert {f"{STEM}.lora_down.weight", f"{STEM}.lora_up.weight", f"{STEM}.alpha"} <= tensors.keys()
    assert "lora_te_text_model_encoder_layers_1_self_attn_q_proj.alpha" in tensors
    for key in tensors:
        assert key.count(".") == (1 if key.endswith(".alpha") else 2)
    alpha = tensors[f"{STEM}.alpha"]
    assert alpha.shape == ()
    assert alpha.dtype == torch.float32
    assert float(alpha) == 2.0


def test_round_trip_is_bit_for_bit(family):
    weights = adapter(alphas=(3.0,) * 5, ranks=(1, 2, 4, 8, 16))
    assert same_bits(peft.from_tensors(kohya.to_tensors(weights, family), {}), weights)


def test_layers_that_differ_get_one_alpha_and_keep_their_update(family):
    weights = adapter(alphas=(2.0, 2.0, 5.0, 0.3, 2.0), ranks=(4, 8, 4, 4, 4))
    tensors = kohya.to_tensors(weights, family)
    assert {float(t) for key, t in tensors.items() if key.endswith(".alpha")} == {2.0}
    back = peft.from_tensors(tensors, {})
    for key, layer in weights.layers.items():
        torch.testing.assert_close(back.layers[key].delta(), layer.delta(), rtol=1e-6, atol=1e-6)
        if layer.alpha == 2.0:
            assert torch.equal(back.layers[key].up, layer.up)


def test_a_power_of_two_between_alphas_loses_nothing(family):
    weights = adapter(alphas=(4.0, 4.0, 4.0, 1.0, 16.0))
    back = peft.from_tensors(kohya.to_tensors(weights, family), {})
    for key, layer in weights.layers.items():
        assert torch.equal(back.layers[key].up * back.layers[key].scale, layer.up * layer.scale)


def test_keep_alphas_is_bit_for_bit(family):
    weights = adapter(alphas=(2.0, 2.0, 5.0, 0.25, 1.0), ranks=(4, 8, 4, 4, 4))
    assert same_bits(peft.from_tensors(kohya.to_tensors(weights, family, keep_alphas=True), {}), weights)


@pytest.mark.parametrize("alphas", [(0.0, 2.0, 2.0, 2.0, 2.0), (0.0,) * 5])
def test_alpha_zero_is_kept_bit_for_bit_on_request(family, alphas):
    weights = adapter(alphas)
    tensors = kohya.to_tensors(weights, family, keep_alphas=True)
    assert float(tensors[f"{STEM}.alpha"]) == 0
    assert same_bits(peft.from_tensors(tensors, {}), weights)


@pytest.mark.parametrize("alphas", [(0.0, 2.0, 2.0, 2.0, 2.0), (0.0,) * 5])
def test_alpha_zero_is_not_written_otherwise_since_kohya_reads_it_as_rank(family, alphas):
    tensors = kohya.to_tensors(adapter(alphas), family)
    assert float(tensors[f"{STEM}.alpha"]) != 0
    assert not tensors[f"{STEM}.lora_up.weight"].any()


def test_half_precision_is_scaled_in_fp32(family):
    weights = AdapterWeights(
        {
            ("unet", "conv_in"): linear(4, 1.0, seed=1, dtype=torch.float16),
            ("unet", "conv_out"): linear(4, 1.0, seed=2, dtype=torch.float16),
            ("unet", f"{BLOCK}.ff.net.2"): linear(4, 0.3, seed=3, dtype=torch.float16),
        }
    )
    tensors = kohya.to_tensors(weights, family)
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_2"
    assert tensors[f"{stem}.lora_up.weight"].dtype == torch.float32
    assert tensors["lora_unet_conv_in.lora_up.weight"].dtype == torch.float16


def test_without_alpha_the_scale_is_one():
    (layer,) = peft.from_tensors(pair(rank=3), {}).layers.values()
    assert layer.scale == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_any_single_number_is_an_alpha(dtype, shape):
    tensors = pair(rank=8, **{f"{STEM}.alpha": torch.full(shape, 4, dtype=dtype)})
    # A header is not asked about alphas that are there.
    (layer,) = peft.from_tensors(tensors, {peft.HEADER_KEY: "no JSON"}).layers.values()
    assert layer.alpha == 4.0
    assert layer.scale == 0.5


def test_leaves_of_peft_below_kohyas_stems_are_read():
    tensors = {f"{STEM}.lora_A.weight": torch.ones(4, 6), f"{STEM}.lora_B.weight": torch.ones(5, 4)}
    assert len(peft.from_tensors(tensors, {}).layers) == 1


def test_tucker_form_is_the_same_update():
    draw = torch.Generator().manual_seed(0)
    down, mid, up = (torch.randn(s, generator=draw) for s in ((4, 6, 1, 1), (4, 4, 3, 3), (5, 4, 1, 1)))
    stem = "lora_unet_mid_block_resnets_0_conv1"
    keys = {
        "lora_down.weight": down,
        "lora_mid.weight": mid,
        "lora_up.weight": up,
        "alpha": torch.tensor(2.0),
    }
    (layer,) = peft.from_tensors({f"{stem}.{k}": v for k, v in keys.items()}, {}).layers.values()
    # Each position of the kernel on its own: up, the middle at that position, down.
    for y in range(3):
        for x in range(3):
            expected = 0.5 * up[:, :, 0, 0] @ mid[:, :, y, x] @ down[:, :, 0, 0]
            torch.testing.assert_close(layer.delta()[:, :, y, x], expected)


BAD = {
    "no up": ({f"{STEM}.lora_down.weight": torch.ones(4, 6)}, "not the up half"),
    "no down": ({f"{STEM}.lora_up.weight": torch.ones(4, 6)}, "not the down half"),
    "only alpha": (
        {**pair(stem="lora_unet_conv_in"), f"{STEM}.alpha": torch.tensor(1.0)},
        "not the down half",
    ),
    "ranks differ": (
        {f"{STEM}.lora_down.weight": torch.ones(4, 6), f"{STEM}.lora_up.weight": torch.ones(5, 3)},
        "ranks differ",
    ),
    "one-dimensional": (
        {f"{STEM}.lora_down.weight": torch.ones(4), f"{STEM}.lora_up.weight": torch.ones(4)},
        "no linear layer or convolution",
    ),
    "rank zero": (pair(rank=0), "no linear layer or convolution"),
    "up kernel": (
        {
            f"{STEM}.lora_down.weight": torch.ones(4, 6, 1, 1),
            f"{STEM}.lora_up.weight": torch.ones(5, 4, 3, 3),
        },
        "must be 1 x 1",
    ),
    "integers": (
        {f"{STEM}.lora_down.weight": torch.ones(4, 6).long(), f"{STEM}.lora_up.weight": torch.ones(5, 4)},
        "floating-point",
    ),
    "alpha is a vector": (pair(**{f"{STEM}.alpha": torch.ones(3)}), "must be one number"),
    "alpha is NaN": (pair(**{f"{STEM}.alpha": torch.tensor(float("nan"))}), "not a finite number"),
    "unknown leaf": (pair(**{f"{STEM}.bias_thing": torch.ones(3)}), "bias_thing"),
    "unknown stem": (pair(stem="lora_unet_left_blocks_0_to_q"), "left_blocks"),
    "both leaves": (pair(**{f"{STEM}.lora_A.weight": torch.ones(4, 6)}), "twice"),
    "both prefixes": (
        pair(stem="lora_te_encoder_layers_0_mlp_fc1") | pair(stem="lora_te1_encoder_layers_0_mlp_fc1"),
        "twice",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_broken_contents_are_named(case):
    tensors, words = BAD[case]
    with pytest.raises(AdapterFileError, match=words) as caught:
        peft.from_tensors(tensors, {})
    assert "\n" not in str(caught.value)
    assert "lora_" in str(caught.value) or "text_encoder." in str(caught.value)


def test_nothing_is_refused(family):
    with pytest.raises(AdapterFileError, match="no layer"):
        kohya.to_tensors(AdapterWeights({}), family)


def test_header(family):
    header = kohya.header(adapter(alphas=(3.0, 3.0, 1.0, 3.0, 3.0), ranks=(4, 8, 8, 8, 4)), family)
    assert header["ss_network_dim"] == "8"
    assert header["ss_network_alpha"] == "3.0"
    assert header["ss_base_model_version"] == "easel_tiny"
    assert header["ss_v2"] == "False"
    assert file_format(["lora_te_encoder_layers_0_mlp_fc1.alpha"]) == "kohya"
    assert file_format(["unet.conv_in.lora_A.weight", "lora_controlnet"]) == "diffusers"


@pytest.mark.parametrize("alpha", [0.3, 0.1, 7.7, 1e-4, 12345.678, 1.0, 1e30])
def test_an_alpha_comes_back_as_the_number_that_was_written(family, alpha):
    weights = adapter(alphas=(alpha,) * 5)
    assert same_bits(peft.from_tensors(kohya.to_tensors(weights, family), {}), weights)


ALPHAS = {
    "no dimension": (torch.tensor(2.0), 2.0),
    "one element": (torch.tensor([2.0]), 2.0),
    "fp16": (torch.tensor(0.5, dtype=torch.float16), 0.5),
    "bf16": (torch.tensor([3.0], dtype=torch.bfloat16), 3.0),
    "integer": (torch.tensor(8), 8.0),
    # At its word, as five of six tools do; kohya's own loader alone reads it as the rank (formats.md).
    "zero": (torch.tensor(0.0), 0.0),
    "absent": (None, 4.0),
}


@pytest.mark.parametrize("case", ALPHAS)
def test_forms_of_alpha(case):
    stored, alpha = ALPHAS[case]
    tensors = pair() if stored is None else pair(**{f"{STEM}.alpha": stored})
    (layer,) = peft.from_tensors(tensors, {}).layers.values()
    assert (layer.alpha, layer.scale) == (alpha, alpha / 4)


def test_original_names_count_the_blocks_of_the_family_that_the_file_is_for():
    """SD 1.x has no attention in its coarsest level, so its upsampler there is at place 1
    (openaimodel.py)."""
    stem = "lora_unet_output_blocks_2_1_conv"
    context = "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k"
    tensors = {
        f"{stem}.lora_down.weight": torch.ones(4, 8, 3, 3),
        f"{stem}.lora_up.weight": torch.ones(8, 4, 1, 1),
        f"{context}.lora_down.weight": torch.ones(4, 768),
        f"{context}.lora_up.weight": torch.ones(8, 4),
    }
    assert set(peft.from_tensors(tensors, {}).layers) == {
        ("unet", "up_blocks.0.upsamplers.0.conv"),
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"),
    }
