"""The grammar of names against real models, which are built on the meta device and so cost nothing."""

import dataclasses

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from lora_core.formats import names
from lora_core.spec.errors import AdapterFileError
from lora_core.spec.families import FAMILIES

FAMILY = FAMILIES["sd15"]


@pytest.fixture(scope="module")
def unet():
    # The defaults of the class are the SD 1.x layout but for the width of the context.
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768)


@pytest.fixture(scope="module")
def clip():
    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))


def adaptable(model):
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def kohya_default(unet):
    """Each Linear and 1x1 Conv below a Transformer2DModel: formats.md, and networks/lora.py of sd-scripts."""
    return [name for name in adaptable(unet) if ".attentions." in name]


def test_kohyas_default_targets_of_the_unet_both_ways(unet):
    paths = kohya_default(unet)
    assert len(paths) == 192
    for path in paths:
        stem = names.stem_of_layer("unet", path, FAMILY)
        assert stem == "lora_unet_" + path.replace(".", "_")
        assert names.layer_of_stem(stem) == ("unet", path)


def test_kohyas_default_targets_of_the_text_encoder_both_ways(clip):
    paths = [names.with_text_model(name) for name in adaptable(clip)]
    assert len(paths) == 72
    for path in paths:
        assert path.startswith("text_model.encoder.layers.")
        stem = names.stem_of_layer("text_encoder", path, FAMILY)
        assert stem == "lora_te_" + path.replace(".", "_")
        assert names.layer_of_stem(stem) == ("text_encoder", path)


def test_each_linear_and_convolution_of_the_unet_has_a_name(unet):
    for path in adaptable(unet):
        assert names.layer_of_stem(names.stem_of_layer("unet", path, FAMILY)) == ("unet", path)


def test_stems_of_one_model_never_collide(unet):
    paths = list(adaptable(unet))
    assert len({names.stem_of_layer("unet", path, FAMILY) for path in paths}) == len(paths)


@pytest.mark.parametrize(
    ("stem", "layer"),
    [
        ("lora_te_encoder_layers_3_mlp_fc1", ("text_encoder", "text_model.encoder.layers.3.mlp.fc1")),
        (
            "lora_te1_text_model_encoder_layers_0_self_attn_out_proj",
            ("text_encoder", "text_model.encoder.layers.0.self_attn.out_proj"),
        ),
        (
            "lora_te2_text_model_encoder_layers_31_self_attn_k_proj",
            ("text_encoder_2", "text_model.encoder.layers.31.self_attn.k_proj"),
        ),
        ("lora_unet_mid_block_resnets_1_time_emb_proj", ("unet", "mid_block.resnets.1.time_emb_proj")),
        ("lora_unet_up_blocks_0_upsamplers_0_conv", ("unet", "up_blocks.0.upsamplers.0.conv")),
        ("lora_unet_time_embedding_linear_2", ("unet", "time_embedding.linear_2")),
    ],
)
def test_other_stems(stem, layer):
    assert names.layer_of_stem(stem) == layer


@pytest.mark.parametrize(
    ("stem", "words"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "Stable Diffusion XL"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "Flux"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn3_to_q", "attn3_to_q"),
        ("lora_te3_encoder_block_0", "lora_te3_encoder_block_0"),
        ("nonsense", "nonsense"),
        ("lora_unet_", "lora_unet_"),
    ],
)
def test_unknown_stems_are_named(stem, words):
    with pytest.raises(AdapterFileError, match=words):
        names.layer_of_stem(stem)


def test_what_a_family_cannot_write_is_said():
    with pytest.raises(AdapterFileError, match="has no part 'text_encoder_2'"):
        names.stem_of_layer("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1", FAMILY)
    with pytest.raises(AdapterFileError, match="cannot be written yet"):
        names.stem_of_layer("unet", "conv_in", dataclasses.replace(FAMILY, kohya_block_names="ldm"))
    with pytest.raises(AdapterFileError, match="no name in the kohya format"):
        names.stem_of_layer("unet", "down_blocks.0.something", FAMILY)
