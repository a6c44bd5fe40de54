"""Captioners and mask models of true architecture and toy size, written as their makers publish them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTokenizer,
    CLIPVisionConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
)

from lora_core.system.files import DEMO_BASE

WORDS = ("a", "red", "blue", "cat", "dog", "on", "grass", "photo", "of")
TAGS = (
    ("1girl", 0), ("long_hair", 0), ("u_u", 0), ("general", 9), ("hatsune_miku", 4), ("rem_(re:zero)", 4),
)  # fmt: skip
"""Names and categories."""


def _vary(model: Any) -> Any:
    """A model whose tokens differ from image to image."""
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4, generator=draw)
    return model


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
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=8, image_text_hidden_size=8)
    model = _vary(BlipForConditionalGeneration(config))
    # No caption ends at once.
    model.text_decoder.cls.predictions.bias.data[:7] = -20
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def _word_tokenizer() -> PreTrainedTokenizerFast:
    """Of the words of `WORDS` and of the prompts, and the mark of an image."""
    prompts = "Describe with a paragraph what is shown in the image. this image one sentence."
    words = dict.fromkeys(("<s>", "<pad>", "</s>", "<unk>", "<image>", *WORDS, *prompts.split()))
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def write_florence(folder: Path) -> Path:
    """A Florence-2 of random weights; its prompt is a task, which its processor puts in words."""
    tokenizer = _word_tokenizer()
    vision = {
        "embed_dim": [8, 8, 8, 16], "num_heads": [1] * 4, "num_groups": [1] * 4, "depths": [1] * 4,
        "window_size": 2, "projection_dim": 16,
    }  # fmt: skip
    text = {
        "model_type": "bart", "vocab_size": len(tokenizer) + 2, "d_model": 16, "encoder_layers": 1,
        "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64, "bos_token_id": 0,
        "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
    }  # fmt: skip
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=image_token)
    _vary(Florence2ForConditionalGeneration(config)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    # Of 32 pixels one token is left, and one of the mean.
    images.image_seq_length = 2
    Florence2Processor(images, tokenizer).save_pretrained(folder)
    return folder


def write_llava(folder: Path) -> Path:
    """A LLaVA of random weights: a chat model, whose template has the question between two words."""
    tokenizer = _word_tokenizer()
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=32, patch_size=16)
    text = LlamaConfig(
        **sizes, vocab_size=len(tokenizer), num_hidden_layers=1, num_key_value_heads=2, bos_token_id=0,
        pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_token)
    _vary(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    template = (
        "a {% for message in messages %}{% for part in message.content %}"
        "{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %}{% endfor %} of"
    )
    images = CLIPImageProcessor(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_clipseg(folder: Path) -> Path:
    """A CLIPSeg of random weights, for images of 32 pixels, with the demo's tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(DEMO_BASE / "tokenizer")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPSegConfig(
        text_config={**sizes, **marks, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=16, reduce_dim=8,
        extract_layers=[0, 1], decoder_num_attention_heads=2, decoder_intermediate_size=16,
    )  # fmt: skip
    _vary(CLIPSegForImageSegmentation(config)).save_pretrained(folder)
    CLIPSegProcessor(ViTImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
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


def write_remover(file: Path) -> Path:
    """A background remover for images of 8 pixels: the mean of red, green and blue, as they were sent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    graph = _field(1, _node("ReduceMean", ["input"], "output", axes=(1,))) + _field(2, "remover")
    graph += _field(11, _port("input", (1, 3, 8, 8))) + _field(12, _port("output", (1, 8, 8)))
    file.write_bytes(_field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 13)))
    return file


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


def another_kind(folder: Path) -> None:
    """Have a model's folder name a kind that does nothing of what is asked."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))


def cut(folder: Path) -> None:
    """Leave half of a model's weights."""
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
