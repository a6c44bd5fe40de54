import json

import pytest
import torch

from lora_core.__main__ import main
from lora_core.errors import AdapterFileError
from lora_core.formats.io import save_adapter
from lora_core.formats.verify import inspect_file
from lora_core.lora.weights import AdapterWeights
from lora_core.model_files.families import FAMILIES
from tests.formats.conftest import BLOCK, CLIP, adapter, linear
from tests.formats.odd_files import serialised

# The row of cli.md, and autov2.
KEYS = {"family", "format", "kind", "ranks", "alphas", "modules", "parameters", "bytes", "sha256", "autov2",
"autov3",
        "hash_matches", "problem", "extras", "new_tokens", "writer", "triggers", "metadata"}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "f.safetensors"


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_our_own_files(path, format):
    weights = AdapterWeights(
        {
            ("unet", f"{BLOCK}.attn2.to_k"): linear(4, 2.0, inside=128, outside=64),
            ("unet", f"{BLOCK}.attn1.to_q"): linear(8, 2.0, inside=64, outside=64),
            ("text_encoder", f"{CLIP}.self_attn.q_proj"): linear(4, 2.0, inside=128, outside=128),
        }
    )
    save_adapter(weights, path, FAMILIES["tiny"], format=format, dtype="fp16", metadata={"ss_seed": "1"})
    facts = inspect_file(path)
    assert facts.keys() == KEYS
    assert (facts["family"], facts["format"], facts["kind"]) == ("tiny", format, "LoRA")
    assert facts["ranks"] == [4, 8]
    assert facts["alphas"] == [2.0]
    assert facts["modules"] == 3
    assert facts["parameters"] == 4 * (128 + 64) + 8 * (64 + 64) + 4 * (128 + 128)
    assert facts["bytes"] == path.stat().st_size
    assert facts["hash_matches"] is True
    assert facts["metadata"]["ss_seed"] == "1"


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_convolutions_and_several_alphas(path, family, format):
    weights = adapter(alphas=(1.0, 2.0, 4.0, 4.0, 4.0))
    save_adapter(weights, path, family, format=format, keep_alphas=True)
    facts = inspect_file(path)
    assert facts["kind"] == "LoCon"
    assert facts["alphas"] == [1.0, 2.0, 4.0]


def test_an_alpha_that_is_no_number_is_not_the_rank(path):
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    pair = {f"{stem}.lora_down.weight": torch.ones(4, 96), f"{stem}.lora_up.weight": torch.ones(96, 4)}
    path.write_bytes(serialised(pair | {f"{stem}.alpha": torch.tensor(float("nan"))}, {}))
    facts = inspect_file(path)
    assert (facts["ranks"], facts["alphas"]) == ([4], [])
    assert "not finite" in facts["problem"]


Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
XL = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
OTHERS = {
    "SDXL": (
        {f"{XL}.lora_down.weight": (8, 2048), f"{XL}.lora_up.weight": (640, 8), f"{XL}.alpha": (),
         "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (8, 1280),
         "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (5120, 8)},
        {"family": "sdxl", "format": "kohya", "kind": "LoRA", "ranks": [8], "alphas": [1.0],
        "modules": 2},
    ),
    "SD2": (
        {f"{Q}.lora_down.weight": (8, 1024), f"{Q}.lora_up.weight": (64, 8)},
        {"family": "sd2", "alphas": [8.0]},
    ),
    "SD1": ({f"{Q}.lora_down.weight": (8, 768), f"{Q}.lora_up.weight": (64, 8)}, {"family": "sd15"}),
    "SD1 in the old diffusers spelling": (
        {f"unet.{BLOCK}.attn2.processor.to_k_lora.down.weight": (8, 768),
         f"unet.{BLOCK}.attn2.processor.to_k_lora.up.weight": (64, 8),
         f"unet.{BLOCK}.attn2.processor.to_q_lora.down.weight": (8, 64),
         f"unet.{BLOCK}.attn2.processor.to_q_lora.up.weight": (64, 8)},
        {"family": "sd15", "format": "diffusers", "kind": "LoRA", "ranks": [8], "modules": 2},
    ),
    "LoHa": (
        {f"{Q}.hada_w1_a": (64, 4), f"{Q}.hada_w1_b": (4, 768), f"{Q}.hada_w2_a": (64, 4), f"{Q}.hada_w2_b":
        (4, 768),
         f"{Q}.alpha": ()},
        {"family": "sd15", "format": "kohya", "kind": "LoHa", "ranks": [4], "alphas": [1.0], "modules": 1},
    ),
    "LoKr": (
        {f"{Q}.lokr_w1": (8, 8), f"{Q}.lokr_w2_a": (8, 4), f"{Q}.lokr_w2_b": (4, 96), f"{Q}.alpha": ()},
        {"format": "kohya", "kind": "LoKr", "ranks": [4], "modules": 1},
    ),
    "DoRA": (
        {f"{Q}.lora_down.weight": (8, 768), f"{Q}.lora_up.weight": (64, 8), f"{Q}.dora_scale": (64, 1)},
        {"family": "sd15", "kind": "DoRA", "ranks": [8], "modules": 1},
    ),
    "DoRA of PEFT": (
        {f"unet.{BLOCK}.attn1.to_q.lora_A.weight": (8, 64), f"unet.{BLOCK}.attn1.to_q.lora_B.weight": (64, 8),
         f"unet.{BLOCK}.attn1.to_q.lora_magnitude_vector": (64,)},
        {"format": "diffusers", "kind": "DoRA", "ranks": [8], "modules": 1, "family": "unknown"},
    ),
    "Flux": (
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (8, 64),
         "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": (64, 8)},
        {"family": "Flux", "kind": "LoRA"},
    ),
    "whole checkpoint": ({"model.diffusion_model.out.2.weight": (4, 4)}, {"kind": "whole checkpoint",
    "format": "unknown"}), "nothing known": ({"x": (2,)}, {"kind": "unknown", "format": "unknown", "family":
    "unknown", "ranks": []}),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_files_of_others(path, case):
    shapes, expected = OTHERS[case]
    path.write_bytes(serialised({key: torch.ones(shape) for key, shape in shapes.items()}, {}))
    facts = inspect_file(path)
    assert facts.keys() == KEYS
    assert {key: facts[key] for key in expected} == expected
    assert facts["hash_matches"] is None
    assert facts["problem"] == ""


def test_a_broken_header_of_diffusers_does_not_matter(path):
    shapes = {
        f"unet.{BLOCK}.attn1.to_q.lora_A.weight": (8, 64),
        f"unet.{BLOCK}.attn1.to_q.lora_B.weight": (64, 8),
    }
    tensors = {key: torch.ones(shape) for key, shape in shapes.items()}
    path.write_bytes(serialised(tensors, {"lora_adapter_metadata": "{"}))
    assert inspect_file(path)["alphas"] == [8.0]


def test_a_broken_file_is_one_sentence(path):
    path.write_bytes(b"<html>")
    with pytest.raises(AdapterFileError, match="web page"):
        inspect_file(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats(path, dtype):
    down, up = torch.ones(4, 768).to(dtype), torch.ones(64, 4).to(dtype)
    path.write_bytes(serialised({f"{Q}.lora_down.weight": down, f"{Q}.lora_up.weight": up}, {}))
    assert inspect_file(path)["problem"] == ""
    down[1, 2] = float("nan")
    path.write_bytes(serialised({f"{Q}.lora_down.weight": down, f"{Q}.lora_up.weight": up}, {}))
    assert "not finite" in inspect_file(path)["problem"]


BROKEN = {
    "a LoHa without a factor": (
        {k: torch.ones(4, 4) for k in OTHERS["LoHa"][0] if "w2_a" not in k},
        "hada_w2_a",
    ),
    "a LoKr without a factor": ({f"{Q}.lokr_w1": torch.ones(4, 4), f"{Q}.alpha": torch.ones(())}, "lokr_w2"),
    "an alpha alone": ({f"{Q}.alpha": torch.ones(())}, "an alpha, but no weights"),
    "magnitudes alone": ({f"{Q}.dora_scale": torch.ones(4, 1)}, "DoRA magnitudes, but no weights"),
    "no tensors": ({}, "holds no tensors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_said_and_fails(path, case, capsys):
    tensors, words = BROKEN[case]
    path.write_bytes(serialised(tensors, {}))
    assert main(["inspect", str(path)]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_a_file_without_tensors_is_refused_by_all_verbs(path, tmp_path, capsys):
    path.write_bytes(serialised({}, {"ss_base_model_version": "sd_v1"}))
    out = str(tmp_path / "o.safetensors")
    for verb, *more in (["verify"], ["merge", "--out", out], ["convert", out, "--to", "kohya"]):
        assert main([verb, str(path), *more]) == 1
        assert "holds no tensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metadata", "program"),
    [
        ({"software": '{"name": "ai-toolkit", "version": "0.5"}'}, "ai-toolkit 0.5"),
        ({"ot_branch": "master", "modelspec.implementation": "x"}, "OneTrainer"),
        ({"ss_sd_scripts_commit_hash": "abc", "ss_network_module": "networks.lora"}, "kohya sd-scripts"),
        ({"ss_network_module": "networks.lora"}, "kohya sd-scripts"),
        ({"lora_easel.config": "x", "ss_network_module": "networks.lora"}, "LoRA Easel"),
        ({"modelspec.implementation": "diffusers"}, ""),
        ({"software": "{"}, ""),
        ({}, ""),
    ],
)
def test_who_wrote_a_file(path, metadata, program, capsys):
    path.write_bytes(serialised({f"{Q}.lora_down.weight": torch.ones(4, 8)}, metadata))
    assert inspect_file(path)["writer"] == program
    main(["inspect", str(path)])
    assert (f"written by    {program}\n" in capsys.readouterr().out) == bool(program)


TAGS = json.dumps({"10_dog": {"zwx dog": 12, "grass": 3}, "5_more": {"grass": 20, "bad": "x"}, "odd": 7})


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"modelspec.trigger_phrase": " zwx ", "ss_tag_frequency": TAGS}, ["zwx"]),
        ({"ss_tag_frequency": TAGS}, ["grass", "zwx dog"]),
        ({"ss_tag_frequency": "[1"}, []),
    ],
)
def test_trigger_words_are_those_said_else_the_frequent_tags(path, metadata, words, capsys):
    path.write_bytes(serialised({f"{Q}.lora_down.weight": torch.ones(4, 8)}, metadata))
    assert inspect_file(path)["triggers"] == words
    main(["inspect", str(path)])
    assert (f"triggers      {', '.join(words)}\n" in capsys.readouterr().out) == bool(words)
