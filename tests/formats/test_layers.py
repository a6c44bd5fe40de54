"""Names and shapes of layers against real models, which are built on the meta device and so cost nothing."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_core.errors import AdapterFileError
from lora_core.formats import layers
from lora_core.model_files.detect import family_layout
from lora_core.model_files.families import ATTENTION, FAMILIES, KOHYA, canonical_path
from lora_core.system.files import DEMO_BASE, FAMILY_CONFIGS

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
        stem = layers.prefix_of_layer("unet", path, FAMILY)
        assert stem == "lora_unet_" + path.replace(".", "_")
        assert layers.layer_of_prefix(stem) == ("unet", path)


def test_kohyas_default_targets_of_the_text_encoder_both_ways(clip):
    paths = [layers.with_text_model(name) for name in adaptable(clip)]
    assert len(paths) == 72
    for path in paths:
        assert path.startswith("text_model.encoder.layers.")
        stem = layers.prefix_of_layer("text_encoder", path, FAMILY)
        assert stem == "lora_te_" + path.replace(".", "_")
        assert layers.layer_of_prefix(stem) == ("text_encoder", path)


def test_each_linear_and_convolution_of_the_unet_has_a_name(unet):
    for path in adaptable(unet):
        assert layers.layer_of_prefix(layers.prefix_of_layer("unet", path, FAMILY)) == ("unet", path)


def test_stems_of_one_model_never_collide(unet):
    paths = list(adaptable(unet))
    assert len({layers.prefix_of_layer("unet", path, FAMILY) for path in paths}) == len(paths)


SDXL = FAMILIES["sdxl"]


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
def test_each_layer_of_a_family_both_ways_and_no_two_alike(name):
    family = FAMILIES[name]
    stems = {layer: layers.prefix_of_layer(*layer, family) for layer in family_layout(family)}
    assert len(set(stems.values())) == len(stems)
    for layer, stem in stems.items():
        assert layers.layer_of_prefix(stem) == layers.layer_of_prefix(stem, family) == layer


def test_sdxl_files_with_diffusers_block_names_are_read_too():
    for part, path in family_layout(SDXL):
        if part == "unet":
            assert layers.layer_of_prefix("lora_unet_" + path.replace(".", "_")) == (part, path)


# Names that sd-scripts' own conversion gives (library/sdxl_model_util.py, make_unet_conversion_map).
IN_SDXL = {
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    ),
    "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj": (
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj"
    ),
    "middle_block_0_emb_layers_1": "mid_block.resnets.0.time_emb_proj",
    "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_1_transformer_blocks_1_attn2_to_out_0": (
        "up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_out.0"
    ),
    "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks_8_0_out_layers_3": "up_blocks.2.resnets.2.conv2",
    "time_embed_0": "time_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "out_2": "conv_out",
}


@pytest.mark.parametrize("stem", IN_SDXL)
def test_original_block_names(stem):
    assert layers.layer_of_prefix(f"lora_unet_{stem}") == ("unet", IN_SDXL[stem])
    assert layers.prefix_of_layer("unet", IN_SDXL[stem], SDXL) == f"lora_unet_{stem}"


def test_original_names_of_sd1_count_its_own_blocks():
    """Its coarsest level has no attention: what is output_blocks 3 there is the first of level 1."""
    stem = "lora_unet_output_blocks_2_1_conv"
    assert layers.layer_of_prefix(stem, FAMILY) == ("unet", "up_blocks.0.upsamplers.0.conv")
    with pytest.raises(AdapterFileError, match="output_blocks_2_1_conv"):
        layers.layer_of_prefix(stem, SDXL)


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
    assert layers.layer_of_prefix(stem) == layer


@pytest.mark.parametrize(
    ("stem", "words"),
    [
        ("lora_unet_input_blocks_12_0_op", "input_blocks_12_0_op"),
        ("lora_unet_input_blocks_1_1_proj_in", "input_blocks_1_1_proj_in"),
        ("lora_unet_input_blocks_1_0_in_layers_0", "in_layers_0"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "Flux"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn3_to_q", "attn3_to_q"),
        ("lora_te3_encoder_block_0", "lora_te3_encoder_block_0"),
        ("nonsense", "nonsense"),
        ("lora_unet_", "lora_unet_"),
    ],
)
def test_unknown_stems_are_named(stem, words):
    with pytest.raises(AdapterFileError, match=words):
        layers.layer_of_prefix(stem)


def test_what_a_family_cannot_write_is_said():
    with pytest.raises(AdapterFileError, match="has no part 'text_encoder_2'"):
        layers.prefix_of_layer("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1", FAMILY)
    with pytest.raises(AdapterFileError, match="no name in the kohya format"):
        layers.prefix_of_layer("unet", "down_blocks.3.resnets.0.conv1", FAMILIES["sdxl"])
    with pytest.raises(AdapterFileError, match="no name in the kohya format"):
        layers.prefix_of_layer("unet", "down_blocks.0.something", FAMILY)


def real_layers(part, folder):
    with torch.device("meta"):
        if part == "unet":
            config = json.loads((folder / part / "config.json").read_text())
            model = UNet2DConditionModel.from_config(config)
        else:
            config = CLIPTextConfig.from_pretrained(folder / part)
            projected = "CLIPTextModelWithProjection" in (config.architectures or ())
            model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {
        name if name == "text_projection" else canonical_path(part, name): tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layout_is_that_of_the_real_models(name):
    family = FAMILIES[name]
    layout = family_layout(family)
    for part in family.parts:
        folder = FAMILY_CONFIGS / family.configs if family.configs else DEMO_BASE
        ours = {path: shape for (p, path), shape in layout.items() if p == part}
        assert ours == real_layers(part, folder)


# formats.md, the table of kohya keys.
COUNTS = {"sd15": 192 + 72, "sd2": 192 + 138, "sd2_v": 192 + 138, "sdxl": 722 + 72 + 192}


@pytest.mark.parametrize("name", COUNTS)
def test_kohyas_default_targets_are_as_many_as_the_specification_says(name):
    layout = family_layout(FAMILIES[name])
    assert sum(KOHYA.pattern(part).fullmatch(path) is not None for part, path in layout) == COUNTS[name]
    assert any(ATTENTION.pattern(part).fullmatch(path) for part, path in layout)
