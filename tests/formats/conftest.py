"""Small adapters built in code, and a way to write any safetensors file byte by byte."""

import dataclasses
import json
import struct

import pytest
import torch

from lora_core.lora.weights import AdapterWeights, LayerWeights
from lora_core.model_files.families import FAMILIES, TextEncoder

WIDTH = 32
"""Of the text encoder and the context in these tests."""


def linear(rank, alpha, inside=WIDTH, outside=24, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inside, generator=draw).to(dtype)
    return LayerWeights(down, torch.randn(outside, rank, generator=draw).to(dtype), alpha)


def convolution(rank, alpha, kernel=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, 8, kernel, kernel, generator=draw)
    return LayerWeights(down, torch.randn(12, rank, 1, 1, generator=draw), alpha)


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
CLIP = "text_model.encoder.layers.1"


def adapter(alphas=(2.0, 2.0, 2.0, 2.0, 2.0), ranks=(4, 4, 4, 4, 4)):
    return AdapterWeights(
        {
            ("unet", f"{BLOCK}.attn2.to_k"): linear(ranks[0], alphas[0], seed=1),
            ("unet", f"{BLOCK}.attn1.to_out.0"): linear(ranks[1], alphas[1], seed=2),
            ("unet", "up_blocks.1.attentions.2.proj_in"): convolution(ranks[2], alphas[2], kernel=1, seed=3),
            ("unet", "mid_block.resnets.1.conv1"): convolution(ranks[3], alphas[3], seed=4),
            ("text_encoder", f"{CLIP}.self_attn.q_proj"): linear(ranks[4], alphas[4], seed=5),
        }
    )


@pytest.fixture
def family():
    return dataclasses.replace(
        FAMILIES["tiny"], context_width=WIDTH, text_encoders=(TextEncoder("text_encoder", "lora_te", WIDTH),)
    )


def raw_file(path, header, data=b"", length=None):
    """A file with the header as given, legal or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def same_bits(a, b):
    assert a.layers.keys() == b.layers.keys()
    for key, layer in a.layers.items():
        other = b.layers[key]
        assert layer.alpha == other.alpha, key
        for one, two in ((layer.down, other.down), (layer.up, other.up)):
            assert one.dtype == two.dtype
            assert one.shape == two.shape
            assert one.numpy().tobytes() == two.numpy().tobytes(), key
    return True
