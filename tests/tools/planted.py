"""Adapters whose truth is known because it was put there: files for the embedded base with random factors."""

from pathlib import Path

import torch

from lora_core.formats.io import save_adapter
from lora_core.lora.weights import AdapterWeights, LayerKey, LayerWeights
from lora_core.model_files.detect import family_layout
from lora_core.model_files.families import FAMILIES

TINY = FAMILIES["tiny"]
BLOCK = "down_blocks.1.attentions.0"
TO_K = ("unet", f"{BLOCK}.transformer_blocks.0.attn2.to_k")
TO_Q = ("unet", f"{BLOCK}.transformer_blocks.0.attn1.to_q")
CONV = ("unet", "up_blocks.1.resnets.0.conv1")
PROJ = ("unet", f"{BLOCK}.proj_in")
TEXT = ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj")
LAYERS = (TO_K, TO_Q, CONV, PROJ, TEXT)


def shape_of(key: LayerKey) -> tuple[int, ...]:
    """Of the embedded base's weight."""
    return family_layout(TINY)[key]


def orthonormal(rows: int, columns: int, draw: torch.Generator) -> torch.Tensor:
    """Random directions, (rows, columns), fp64."""
    return torch.linalg.qr(torch.randn(rows, columns, generator=draw, dtype=torch.float64)).Q


def layer_of(up: torch.Tensor, down: torch.Tensor, key: LayerKey, alpha: float) -> LayerWeights:
    """(out, r) and (r, in) in the form that the layer has."""
    inner = shape_of(key)[1:]
    ones = (1,) * (len(inner) - 1)
    return LayerWeights(down.float().reshape(-1, *inner), up.float().reshape(*up.shape, *ones), alpha)


def random_layer(key: LayerKey, rank: int, alpha: float, seed: int, size: float = 1.0) -> LayerWeights:
    """Random factors."""
    out, *inner = shape_of(key)
    draw = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, torch.Size(inner).numel(), generator=draw)
    return layer_of(size * torch.randn(out, rank, generator=draw), down, key, alpha)


def dense(layer: LayerWeights, factor: float = 1.0) -> torch.Tensor:
    """factor x alpha / rank x up @ down in fp64, element by element over the rank."""
    up, down = layer.up.double().flatten(1), layer.down.double().flatten(1)
    return factor * layer.alpha / layer.down.shape[0] * torch.einsum("or,ri->oi", up, down)


def saved(
    layers: dict[LayerKey, LayerWeights], path: Path, format: str = "kohya", precision: str = "fp32"
) -> Path:
    """A file of these layers."""
    save_adapter(
        AdapterWeights(layers),
        path,
        TINY,
        format=format,
        dtype=precision,
        metadata={"modelspec.trigger_phrase": "zkw"},
    )
    return path
