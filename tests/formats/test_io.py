import dataclasses
import hashlib
import os

import pytest
import safetensors
import safetensors.torch
import torch

from lora_core.errors import AdapterFileError, ConfigError
from lora_core.formats import io as adapter_file
from lora_core.formats.io import load_adapter, save_adapter
from lora_core.lora.weights import AdapterWeights
from lora_core.model_files.families import FAMILIES, TextEncoder
from lora_core.settings import schema
from tests.formats.conftest import BLOCK, CLIP, adapter, linear, same_bits
from tests.formats.odd_files import serialised


@pytest.fixture
def path(tmp_path):
    return tmp_path / "löra file.safetensors"


@pytest.mark.parametrize("format", schema.FORMATS)
def test_write_and_read_is_bit_for_bit(path, family, format):
    weights = adapter(alphas=(3.0,) * 5, ranks=(1, 2, 4, 8, 16))
    save_adapter(weights, path, family, format=format, metadata={"ss_tag_frequency": "{}"})
    back = load_adapter(path, family)
    assert same_bits(back, weights)
    assert back.metadata["ss_tag_frequency"] == "{}"
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("first", schema.FORMATS)
def test_from_file_to_file_and_back(path, tmp_path, family, first):
    second = next(name for name in schema.FORMATS if name != first)
    save_adapter(adapter(alphas=(3.0,) * 5), path, family, format=first, metadata={"ss_seed": "7"})
    other, again = tmp_path / "other.safetensors", tmp_path / "again.safetensors"
    for source, target, format in ((path, other, second), (other, again, first)):
        weights = load_adapter(source)
        save_adapter(weights, target, family, format=format, metadata=weights.metadata)
    start, end = safetensors.torch.load_file(path), safetensors.torch.load_file(again)
    assert start.keys() == end.keys()
    assert all(start[key].numpy().tobytes() == end[key].numpy().tobytes() for key in start)
    assert load_adapter(again).metadata["ss_seed"] == "7"


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_precisions(path, family, precision, dtype):
    weights = adapter()
    save_adapter(weights, path, family, dtype=precision)
    for name, tensor in safetensors.torch.load_file(path).items():
        assert tensor.dtype == (torch.float32 if name.endswith(".alpha") else dtype)
    layer = load_adapter(path).layers["unet", f"{BLOCK}.attn2.to_k"]
    assert torch.equal(layer.down, weights.layers["unet", f"{BLOCK}.attn2.to_k"].down.to(dtype))


def test_the_headers_hash_is_that_of_the_tensor_bytes(path, family):
    save_adapter(adapter(), path, family, dtype="fp16", metadata={"sshs_model_hash": "stale", "format": "pt"})
    raw = path.read_bytes()
    expected = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["sshs_model_hash"] == expected
    assert len(metadata["sshs_legacy_hash"]) == 8
    assert "format" not in metadata


def test_diffusers_own_key_is_in_its_files_only(path, family):
    weights = adapter()
    for format in schema.FORMATS:
        save_adapter(
            weights,
            path,
            family,
            format=format,
            metadata={"lora_adapter_metadata": '{"unet.lora_alpha": 99}'},
        )
        with safetensors.safe_open(path, "pt") as file:
            stored = file.metadata().get("lora_adapter_metadata")
        assert (stored is not None) == (format == "diffusers")
        assert stored is None or "99" not in stored


def test_equal_adapters_give_equal_files(path, tmp_path, family):
    other = tmp_path / "b.safetensors"
    header = {f"ss_{i}": "x" for i in range(30)}
    save_adapter(adapter(), path, family, metadata=header)
    save_adapter(adapter(), other, family, metadata=header)
    assert path.read_bytes() == other.read_bytes()


def changed(weights, **changes):
    key = ("unet", f"{BLOCK}.attn2.to_k")
    return AdapterWeights(weights.layers | {key: dataclasses.replace(weights.layers[key], **changes)})


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("what", ["down", "up", "alpha"])
def test_numbers_that_are_not_finite_are_never_written(path, family, number, what):
    value = number if what == "alpha" else torch.full((4, 32) if what == "down" else (24, 4), number)
    path.write_bytes(b"the old file")
    for format in schema.FORMATS:
        with pytest.raises(AdapterFileError, match=r"attn2\.to_k"):
            save_adapter(changed(adapter(), **{what: value}), path, family, format=format)
    assert path.read_bytes() == b"the old file"


def test_overflow_of_fp16_is_refused(path, family):
    weights = changed(adapter(), up=torch.full((24, 4), 70_000.0))
    with pytest.raises(AdapterFileError, match=r"7e\+04.*fp16.*bf16"):
        save_adapter(weights, path, family, dtype="fp16")
    assert not path.exists()
    for precision in ("bf16", "fp32"):
        save_adapter(weights, path, family, dtype=precision)


@pytest.mark.parametrize("small", ["up", "down"])
@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-7, 1e-9])
def test_small_factors_keep_their_product_in_fp16(path, family, size, small):
    """A factor that has hardly moved from 0, as after a few steps, is below what fp16 holds."""
    draw = torch.Generator().manual_seed(0)
    sizes = {"up": 0.03, "down": 0.03, small: size}
    factors = {"up": torch.randn(24, 4, generator=draw), "down": torch.randn(4, 32, generator=draw)}
    weights = changed(adapter(), **{name: sizes[name] * factor for name, factor in factors.items()})
    save_adapter(weights, path, family, dtype="fp16")
    key = ("unet", f"{BLOCK}.attn2.to_k")
    meant, found = weights.layers[key].delta(), load_adapter(path).layers[key].delta()
    assert (found - meant).norm() < (1e-3 if size > 1e-9 else 1e-2) * meant.norm()
    if size == 1e-3:
        kept = load_adapter(path).layers[key]
        assert torch.equal(kept.up, weights.layers[key].up.half())


def test_overflow_by_folding_alpha_is_refused(path, family):
    weights = changed(adapter(), alpha=1e30, up=torch.full((24, 4), 1e20))
    with pytest.raises(AdapterFileError, match="more than fp32"):
        save_adapter(weights, path, family)


def test_a_file_that_comes_back_changed_is_not_called_done(path, family, monkeypatch):
    path.write_bytes(b"the old file")
    write = adapter_file.write_pieces
    monkeypatch.setattr(
        adapter_file, "write_pieces", lambda p, data: write(p, [b"".join(data)[:-1] + b"\x55"])
    )
    with pytest.raises(AdapterFileError, match="read back"):
        save_adapter(adapter(), path, family)
    assert path.read_bytes() == b"the old file"
    assert os.listdir(path.parent) == [path.name]


def test_what_cannot_be_written_is_said(tmp_path, family):
    with pytest.raises(AdapterFileError, match="cannot be written"):
        save_adapter(adapter(), tmp_path / "none" / "f.safetensors", family)
    with pytest.raises(AdapterFileError, match="int3"):
        save_adapter(adapter(), tmp_path / "f.safetensors", family, dtype="int3")
    with pytest.raises(ConfigError, match="kohya, diffusers"):
        save_adapter(adapter(), tmp_path / "f.safetensors", family, format="onnx")


def test_broken_weights_are_found_on_reading(path):
    tensors = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 3),
        "lora_unet_conv_in.lora_up.weight": torch.ones(5, 2),
    }
    tensors["lora_unet_conv_in.lora_up.weight"][1, 1] = float("nan")
    path.write_bytes(serialised(tensors, {}))
    with pytest.raises(AdapterFileError, match=r"1 of 1 layers.*NaN.*unet.conv_in"):
        load_adapter(path)


def test_8_bit_floats_are_read(path):
    tensors = {"unet.conv_in.lora_A.weight": torch.ones(2, 3), "unet.conv_in.lora_B.weight": torch.ones(5, 2)}
    path.write_bytes(serialised({k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}, {}))
    assert load_adapter(path).layers["unet", "conv_in"].down.dtype == torch.float32


NOT_PLAIN = {
    "LoHa": ["lora_unet_conv_in.hada_w1_a", "lora_unet_conv_in.hada_w1_b", "lora_unet_conv_in.alpha"],
    "LoKr": ["lora_unet_conv_in.lokr_w1", "lora_unet_conv_in.lokr_w2"],
    "DoRA": [
        "lora_unet_conv_in.lora_down.weight",
        "lora_unet_conv_in.lora_up.weight",
        "lora_unet_conv_in.dora_scale",
    ],
    "whole checkpoint": [
        "model.diffusion_model.input_blocks.0.0.weight",
        "first_stage_model.quant_conv.weight",
    ],
    "textual-inversion embedding": ["emb_params"],
    "no adapter": ["weight", "bias"],
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_other_kinds_are_refused_by_name(path, kind):
    path.write_bytes(serialised({key: torch.ones(2, 2) for key in NOT_PLAIN[kind]}, {}))
    with pytest.raises(AdapterFileError, match=kind):
        load_adapter(path)


TINY, SD1 = FAMILIES["tiny"], FAMILIES["sd15"]


def context(width):
    return AdapterWeights({("unet", f"{BLOCK}.attn2.to_k"): linear(2, 1.0, inside=width)})


def text(width):
    return AdapterWeights({("text_encoder", f"{CLIP}.self_attn.q_proj"): linear(2, 1.0, inside=width)})


@pytest.mark.parametrize("format", schema.FORMATS)
@pytest.mark.parametrize(
    ("weights", "family", "words"),
    [
        (context(768), SD1, "is for Stable Diffusion 1.x, the base is the Embedded tiny base"),
        (text(768), SD1, "is for Stable Diffusion 1.x"),
        (context(128), SD1, "is for Stable Diffusion 1.x"),
        (context(1024), TINY, "is for Stable Diffusion 2.x, the base"),
        (context(2048), TINY, "is for Stable Diffusion XL, the base"),
        (context(640), TINY, "640 channels wide, the base"),
        (text(512), TINY, "512 channels wide, the base"),
    ],
)
def test_a_file_for_another_family_is_refused(path, format, weights, family, words):
    save_adapter(weights, path, family, format=format)
    with pytest.raises(AdapterFileError, match=words):
        load_adapter(path, TINY)
    assert load_adapter(path).layers.keys() == weights.layers.keys()


@pytest.mark.parametrize(
    "metadata",
    [
        {"ss_base_model_version": "sd_v1"},
        {"modelspec.architecture": "stable-diffusion-v1/lora"},
        {"ss_v2": "True"},
        {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
    ],
)
def test_what_the_header_says_counts_too(path, metadata):
    tensors = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 3),
        "lora_unet_conv_in.lora_up.weight": torch.ones(5, 2),
    }
    path.write_bytes(serialised(tensors, metadata))
    with pytest.raises(
        AdapterFileError, match=r"is for Stable Diffusion .*, the base is the Embedded tiny base\."
    ):
        load_adapter(path, TINY)


def test_files_without_any_claim_are_taken_at_their_shapes(path):
    for width, family in ((128, TINY), (768, SD1)):
        stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"
        tensors = {
            f"{stem}.lora_down.weight": torch.ones(2, width),
            f"{stem}.lora_up.weight": torch.ones(5, 2),
        }
        path.write_bytes(serialised(tensors, {"ss_base_model_version": "my own base"}))
        assert len(load_adapter(path, family).layers) == 1


def test_a_part_that_the_base_lacks_is_refused(path):
    double = dataclasses.replace(
        TINY,
        title="Double",
        text_encoders=(
            TextEncoder("text_encoder", "lora_te1", 128),
            TextEncoder("text_encoder_2", "lora_te2", 128),
        ),
    )
    weights = AdapterWeights({("text_encoder_2", f"{CLIP}.mlp.fc1"): linear(2, 1.0, inside=128)})
    save_adapter(weights, path, double)
    assert "lora_te2_text_model_encoder_layers_1_mlp_fc1.alpha" in safetensors.torch.load_file(path)
    with pytest.raises(AdapterFileError, match="the base is the Embedded tiny base"):
        load_adapter(path, TINY)
