"""Captioners of true architecture and toy size, written to a folder as their makers publish them."""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
)

WORDS = ("a", "red", "blue", "cat", "dog", "on", "grass", "photo", "of")
TAGS = (
    ("1girl", 0), ("long_hair", 0), ("u_u", 0), ("general", 9), ("hatsune_miku", 4), ("rem_(re:zero)", 4),
)  # fmt: skip
"""Names and categories."""


def write_blip(folder: Path) -> Path:
    """A BLIP of random weights, for images of 32 pixels, with a vocabulary of a few words."""
    folder.mkdir(parents=True)
    marks = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")
    (folder / "vocab.txt").write_text("\n".join((*marks, *WORDS)))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), bos_token="[DEC]")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **sizes, "vocab_size": len(marks) + len(WORDS), "encoder_hidden_size": 16, "bos_token_id": 5,
        "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3, "max_position_embeddings": 64,
    }  # fmt: skip
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=8, image_text_hidden_size=8)
    model = BlipForConditionalGeneration(config)
    # So that tokens differ from image to image, and a caption does not end at once.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    model.text_decoder.cls.predictions.bias.data[:7] = -20
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


# An ONNX file is a protocol buffer. Numbers of fields from onnx/onnx.proto.


def _number(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _number(rest) if rest else bytes([low])


def _field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return _number(number << 3) + _number(value)
    value = value.encode() if isinstance(value, str) else value
    return _number(number << 3 | 2) + _number(len(value)) + value


def _node(kind: str, inputs: Iterable[str], output: str, axes: Iterable[int] = ()) -> bytes:
    ints = b"".join(_field(8, axis) for axis in axes)
    attribute = [_field(5, _field(1, "axes") + ints + _field(20, 7))] if ints else []
    keep = [_field(5, _field(1, "keepdims") + _field(3, 0) + _field(20, 2))] if ints else []
    names = [_field(1, name) for name in inputs]
    return b"".join([*names, _field(2, output), _field(4, kind), *attribute, *keep])


def _tensor(name: str, value: torch.Tensor) -> bytes:
    sizes = b"".join(_field(1, size) for size in value.shape)
    return sizes + _field(2, 1) + _field(8, name) + _field(9, value.float().contiguous().numpy().tobytes())


def _port(name: str, shape: Iterable[int]) -> bytes:
    sizes = b"".join(_field(1, _field(1, size)) for size in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, sizes)))


def write_tagger(folder: Path, weight: torch.Tensor, last: str = "Sigmoid") -> Path:
    """A tagger for images of 8 pixels: `last` of `weight` (3, tags) by the mean blue, green and red."""
    folder.mkdir(parents=True)
    nodes = [
        _node("ReduceMean", ["input"], "mean", axes=(1, 2)),
        _node("MatMul", ["mean", "weight"], "logits"),
        _node(last, ["logits"], "output"),
    ]
    graph = b"".join(_field(1, node) for node in nodes) + _field(2, "tagger")
    graph += _field(5, _tensor("weight", weight)) + _field(11, _port("input", (1, 8, 8, 3)))
    graph += _field(12, _port("output", (1, weight.shape[1])))
    model = _field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 13))
    (folder / "model.onnx").write_bytes(model)
    rows = [f"{number},{name},{category},1" for number, (name, category) in enumerate(TAGS)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *rows]))
    return folder
