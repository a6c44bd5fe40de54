"""The layers of a family's models and the shapes of their weights, from its configs alone.

No model is built, so this takes milliseconds; the price is that the layout of UNet2DConditionModel and
CLIPTextModel is repeated here. A test compares it with the real classes.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora_core.lora.weights import AdapterWeights, LayerKey, LayerWeights
from lora_core.model_files.families import Family, is_text_encoder
from lora_core.system.files import DEMO_BASE, FAMILY_CONFIGS, parse_json

Layout = dict[LayerKey, tuple[int, ...]]
"""Each linear layer and convolution to the shape of its weight, in the models' own order."""


def family_layout(family: Family) -> Layout:
    """The layers of a family's UNet and text encoders; read-only."""
    return folder_layout(FAMILY_CONFIGS / family.configs if family.configs else DEMO_BASE, family)


def folder_layout(folder: Path, family: Family) -> Layout:
    """The layers of a base with its configs in a diffusers folder; read-only."""
    return _layout(folder, family.parts)


@lru_cache(maxsize=8)
def _layout(folder: Path, parts: tuple[str, ...]) -> Layout:
    layers: Layout = {}
    for part in parts:
        config = parse_json((folder / part / "config.json").read_bytes())
        found = _text_encoder(config) if is_text_encoder(part) else _unet(config)
        layers |= {(part, path): shape for path, shape in found}
    return layers


def kernel_of(layer: LayerKey, family: Family) -> tuple[int, ...] | None:
    """(height, width) of a layer's kernel, () for a linear layer, None for a layer that the family lacks."""
    shape = family_layout(family).get(layer)
    return None if shape is None else tuple(shape[2:])


def reshape_adapter(weights: AdapterWeights, family: Family) -> AdapterWeights:
    """The same update, 1 x 1 convolutions and linear layers each as the family has them.

    Some tools write one as the other, which means the same and which others refuse.
    """
    layers = {key: _reshape(layer, kernel_of(key, family)) for key, layer in weights.layers.items()}
    return AdapterWeights(layers, weights.metadata)


def _reshape(layer: LayerWeights, kernel: tuple[int, ...] | None) -> LayerWeights:
    if layer.down.dim() == 2 and kernel == (1, 1):
        return replace(layer, down=layer.down[..., None, None], up=layer.up[..., None, None])
    if layer.down.dim() == 4 and kernel == () and layer.down.shape[2:] == (1, 1):
        return replace(layer, down=layer.down.flatten(1), up=layer.up.flatten(1))
    return layer


_NORMS = {
    ".conv1": ".norm1",
    ".conv2": ".norm2",
    ".proj_in": ".norm",
    ".attn1.to_q": ".norm1",
    ".attn2.to_q": ".norm2",
    ".ff.net.0.proj": ".norm3",
    ".self_attn.q_proj": ".layer_norm1",
    ".mlp.fc1": ".layer_norm2",
}
"""The end of a layer's path, to that of the norm layer before it."""


def norm_layers(layout: Layout) -> list[LayerKey]:
    """The norm layers of the models with these layers."""
    found = [(part, "conv_norm_out") for part, path in layout if path == "conv_out"]
    for part, path in layout:
        for end, norm in _NORMS.items():
            if path.endswith(end):
                found.append((part, path.removesuffix(end) + norm))
    encoders = dict.fromkeys(part for part, _ in layout if is_text_encoder(part))
    return [*found, *((part, "text_model.final_layer_norm") for part in encoders)]


Layers = Iterator[tuple[str, tuple[int, ...]]]


def _text_encoder(config: dict[str, Any]) -> Layers:
    width, inner = config["hidden_size"], config["intermediate_size"]
    for number in range(config["num_hidden_layers"]):
        start = f"text_model.encoder.layers.{number}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield f"{start}.self_attn.{name}", (width, width)
        yield f"{start}.mlp.fc1", (inner, width)
        yield f"{start}.mlp.fc2", (width, inner)
    if "CLIPTextModelWithProjection" in config.get("architectures", ()):
        yield "text_projection", (config["projection_dim"], width)


def _unet(config: dict[str, Any]) -> Layers:
    widths, depths = config["block_out_channels"], config.get("transformer_layers_per_block", 1)
    depths = [depths] * len(widths) if isinstance(depths, int) else depths
    time = 4 * widths[0]
    resnets = config["layers_per_block"]
    yield "conv_in", (widths[0], config["in_channels"], 3, 3)
    yield "time_embedding.linear_1", (time, widths[0])
    yield "time_embedding.linear_2", (time, time)
    if config.get("addition_embed_type"):
        yield "add_embedding.linear_1", (time, config["projection_class_embeddings_input_dim"])
        yield "add_embedding.linear_2", (time, time)
    skips = [widths[0]]
    for block, kind in enumerate(config["down_block_types"]):
        for index in range(resnets):
            if kind.startswith("CrossAttn"):
                start = f"down_blocks.{block}.attentions.{index}"
                yield from _transformer(start, widths[block], depths[block], config)
            yield from _resnet(f"down_blocks.{block}.resnets.{index}", skips[-1], widths[block], time)
            skips.append(widths[block])
        if block < len(widths) - 1:
            yield f"down_blocks.{block}.downsamplers.0.conv", (widths[block], widths[block], 3, 3)
            skips.append(widths[block])
    below = widths[-1]
    for block, kind in enumerate(config["up_block_types"]):
        width, depth = widths[-1 - block], depths[-1 - block]
        for index in range(resnets + 1):
            if kind.startswith("CrossAttn"):
                yield from _transformer(f"up_blocks.{block}.attentions.{index}", width, depth, config)
            yield from _resnet(f"up_blocks.{block}.resnets.{index}", below + skips.pop(), width, time)
            below = width
        if block < len(widths) - 1:
            yield f"up_blocks.{block}.upsamplers.0.conv", (width, width, 3, 3)
    yield from _transformer("mid_block.attentions.0", widths[-1], depths[-1], config)
    yield from _resnet("mid_block.resnets.0", widths[-1], widths[-1], time)
    yield from _resnet("mid_block.resnets.1", widths[-1], widths[-1], time)
    yield "conv_out", (config["out_channels"], widths[0], 3, 3)


def _resnet(start: str, inside: int, width: int, time: int) -> Layers:
    yield f"{start}.conv1", (width, inside, 3, 3)
    yield f"{start}.time_emb_proj", (width, time)
    yield f"{start}.conv2", (width, width, 3, 3)
    if inside != width:
        yield f"{start}.conv_shortcut", (width, inside, 1, 1)


def _transformer(start: str, width: int, depth: int, config: dict[str, Any]) -> Layers:
    ends = (width, width) if config.get("use_linear_projection") else (width, width, 1, 1)
    yield f"{start}.proj_in", ends
    for number in range(depth):
        block = f"{start}.transformer_blocks.{number}"
        for attention, inside in (("attn1", width), ("attn2", config["cross_attention_dim"])):
            yield f"{block}.{attention}.to_q", (width, width)
            yield f"{block}.{attention}.to_k", (width, inside)
            yield f"{block}.{attention}.to_v", (width, inside)
            yield f"{block}.{attention}.to_out.0", (width, width)
        yield f"{block}.ff.net.0.proj", (8 * width, width)
        yield f"{block}.ff.net.2", (width, 4 * width)
    yield f"{start}.proj_out", ends
