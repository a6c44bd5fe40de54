"""Adapters of families that cannot be used here are refused by name, whoever wrote the file."""

import json

import pytest
import torch

from lora_core.__main__ import main
from lora_core.formats import kinds
from lora_core.model_files.detect import family_layout
from lora_core.model_files.families import FAMILIES
from lora_core.model_files.header import other_family
from tests.formats.odd_files import CASES, FAMILIES_HERE, serialised

# Layers by the names that tools give them: sd-scripts and musubi-tuner (lora_unet_), OneTrainer
# (lora_transformer_), diffusers (transformer.), ComfyUI and ai-toolkit (diffusion_model.), PEFT
# (base_model.model.); and the layer's width.
LAYERS = {
    "lora_unet_double_blocks_0_img_attn_qkv": (3072, "Flux"),
    "lora_unet_single_blocks_0_linear1": (3072, "Flux"),
    "diffusion_model.double_blocks.0.img_attn.proj": (3072, "Flux"),
    "transformer.single_transformer_blocks.0.attn.to_q": (3072, "Flux or Hunyuan Video"),
    "lora_transformer_single_transformer_blocks_0_proj_mlp": (3072, "Flux or Hunyuan Video"),
    "transformer.transformer_blocks.0.attn.add_q_proj": (3072, "Flux, Stable Diffusion 3 or Qwen-Image"),
    "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj": (3072, "Flux 2"),
    "diffusion_model.distilled_guidance_layer.layers.0.in_layer": (3072, "Chroma"),
    "lora_unet_joint_blocks_0_x_block_attn_qkv": (1536, "Stable Diffusion 3"),
    "transformer.transformer_blocks.0.attn.to_q": (1536, "Stable Diffusion 3"),
    "transformer.transformer_blocks.37.attn.to_add_out": (2432, "Stable Diffusion 3"),
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": (4096, "Stable Diffusion 3"),
    "transformer.transformer_blocks.0.attn1.to_q": (1152, "PixArt"),
    "base_model.model.transformer_blocks.0.attn2.to_k": (1152, "PixArt"),
    "lora_unet_blocks_0_cross_attn_kv_linear": (1152, "PixArt"),
    "lora_unet_blocks_0_self_attn_q": (5120, "Wan"),
    "diffusion_model.blocks.0.cross_attn.k_img": (5120, "Wan"),
    "transformer.blocks.0.attn1.to_q": (5120, "Wan"),
    "lora_unet_double_blocks_0_img_mlp_fc1": (3072, "Hunyuan Video"),
    "diffusion_model.double_blocks.0.img_attn_qkv": (3072, "Hunyuan Video"),
    "transformer.context_embedder.token_refiner.refiner_blocks.0.attn.to_q": (3072, "Hunyuan Video"),
    "lora_unet_blocks_0_attn1_Wqkv": (1408, "Hunyuan-DiT"),
    "transformer.blocks.0.attn1.to_k": (1408, "Hunyuan-DiT"),
    "transformer.transformer_blocks.0.img_mlp.net.0.proj": (3072, "Qwen-Image"),
    "lora_unet_transformer_blocks_0_txt_mod_1": (3072, "Qwen-Image"),
    "transformer.transformer_blocks.59.attn.to_q": (3072, "Qwen-Image"),
    "lora_unet_layers_0_attention_qkv": (2304, "Lumina 2"),
    "transformer.layers.0.attn.to_q": (2304, "Lumina 2"),
    "diffusion_model.layers.0.attention.to_q": (3840, "Z-Image"),
    "transformer.joint_transformer_blocks.0.attn.to_q": (3072, "AuraFlow"),
    "diffusion_model.double_layers.0.attn.w1q": (3072, "AuraFlow"),
    "lora_prior_unet_down_blocks_0_2_attention_to_q": (1280, "Stable Cascade"),
    "lora_unet_down_blocks_0_2_attention_attn_out_proj": (1280, "Stable Cascade"),
    "transformer.double_stream_blocks.0.block.attn1.to_q": (2560, "HiDream"),
    "transformer.transformer_blocks.0.attn1.to_v": (2048, "LTX-Video"),
    "diffusion_model.transformer_blocks.0.attn1.to_out.0": (2048, "LTX-Video"),
    "transformer.transformer_blocks.3.attn1.to_q": (1920, "CogVideoX"),
    "transformer.transformer_blocks.0.attn1.to_k": (2240, "Sana"),
    "unet.encoder_hid_proj": (4096, "Kolors"),
    "diffusion_model.blocks.0.adaln_modulation_self_attn.1": (2048, "Cosmos or Anima"),
}


def lora(name, width):
    leaves = ("lora_A.weight", "lora_B.weight") if "." in name else ("lora_down.weight", "lora_up.weight")
    return {f"{name}.{leaves[0]}": torch.ones(4, width), f"{name}.{leaves[1]}": torch.ones(width, 4)}


@pytest.mark.parametrize("name", LAYERS)
def test_each_verb_refuses_it_by_name(tmp_path, capsys, name):
    width, title = LAYERS[name]
    # Beside a CLIP layer, which alone would be one of Stable Diffusion.
    clip = lora("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", 768) if "." not in name else {}
    path, out = tmp_path / "f.safetensors", str(tmp_path / "o.safetensors")
    path.write_bytes(serialised(clip | lora(name, width), {}))
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == title
    for words in (
        ["verify", str(path)],
        ["verify", str(path), "--base", "demo"],
        ["convert", str(path), out, "--to", "kohya"],
        ["merge", str(path), "--out", out],
        ["shrink", str(path), "--rank", "2", "--out", out],
    ):
        assert main(words) == 1
        sentence = capsys.readouterr().err
        assert f"is for {title}, which cannot be used here" in sentence
        assert sentence.count("\n") == 1
        assert "--base" not in sentence


def test_a_lokr_of_another_family_gets_no_offer_to_merge(tmp_path, capsys):
    path = tmp_path / "f.safetensors"
    name = "diffusion_model.double_blocks.0.img_attn.proj"
    factors = {f"{name}.lokr_w1": torch.ones(4, 4), f"{name}.lokr_w2": torch.ones(768, 768)}
    path.write_bytes(serialised(factors, {}))
    for words in (
        ["verify", str(path)],
        ["merge", str(path), "--rank", "4", "--out", str(tmp_path / "o.safetensors")],
    ):
        assert main(words) == 1
        assert "is for Flux, which cannot be used here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metadata", "title"),
    [
        ({"modelspec.architecture": "flux-1-dev/lora"}, "Flux"),
        ({"modelspec.architecture": "Kolors/lora"}, "Kolors"),
        ({"ss_base_model_version": "sd3"}, "Stable Diffusion 3"),
        ({"ss_base_model_version": "wan2.1"}, "Wan"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, ""),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, ""),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, ""),
    ],
)
def test_the_header_tells_too(metadata, title):
    assert other_family({}, metadata) == title


@pytest.mark.parametrize("name", FAMILIES_HERE)
def test_no_name_of_our_own_families_is_taken_for_another(name):
    family = FAMILIES_HERE[name]
    layout = {layer: (4, 4, *shape[2:]) for layer, shape in family_layout(family).items()}
    for case in CASES:
        keys = CASES[case](family, layout)
        assert other_family({key: tuple(tensor.shape) for key, tensor in keys.items()}) == "", case
    assert other_family({}, {"ss_base_model_version": FAMILIES[name].base_version}) == ""


OTHER_KINDS = {
    "ControlNet-LLLite": "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.mid.0.weight",
    "ControlNet": "control_model.input_blocks.0.0.weight",
    "IP-Adapter": "ip_adapter.1.to_k_ip.weight",
    "textual-inversion embedding": "emb_params",
    "T2I-Adapter": "adapter.body.0.resnets.0.block1.weight",
    "OFT": "lora_unet_mid_block_attentions_0_proj_in.oft_blocks",
    "whole checkpoint": "model.diffusion_model.out.2.weight",
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_files_are_named(tmp_path, capsys, kind):
    path = tmp_path / "f.safetensors"
    path.write_bytes(serialised({OTHER_KINDS[kind]: torch.ones(4, 4)}, {}))
    assert main(["convert", str(path), str(tmp_path / "o.safetensors"), "--to", "kohya"]) == 1
    assert f"it is of the kind '{kind}', not a plain LoRA" in capsys.readouterr().err


def test_a_base_told_by_its_width_alone_is_not_asked_for(tmp_path, capsys):
    """The refiner of Stable Diffusion XL, whose text context is 1280 wide: no --base helps."""
    path = tmp_path / "f.safetensors"
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    path.write_bytes(serialised(lora(stem, 1280), {}))
    out = str(tmp_path / "o.safetensors")
    for verb in (["verify"], ["merge", "--out", out], ["shrink", "--rank", "2", "--out", out]):
        assert main([verb[0], str(path), *verb[1:]]) == 1
        sentence = capsys.readouterr().err
        assert "is for a base whose text context is 1280 channels wide" in sentence
        assert "--base" not in sentence


def test_an_embedding_by_its_token_alone():
    assert kinds.detect_kind({"<cat>": (3, 768)}) == "textual-inversion embedding"
    assert kinds.detect_kind({"0.to_q_lora.down.weight": (4, 4)}) == "IP-Adapter"
