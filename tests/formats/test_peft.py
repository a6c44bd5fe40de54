"""Folders as PEFT itself writes them, with alpha in a config beside the weights."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_core.errors import AdapterFileError
from lora_core.formats import kohya, peft
from lora_core.formats.io import load_adapter
from lora_core.formats.kinds import file_format
from lora_core.formats.verify import inspect_file, verify_adapter
from lora_core.lora.lycoris import LycorisUpdate
from lora_core.lora.weights import AdapterWeights
from lora_core.model_files.families import FAMILIES
from tests.checkpoints import components
from tests.formats.conftest import BLOCK, CLIP, adapter, linear, same_bits

PATH = f"{BLOCK}.attn1.to_q"


def pair(down, up, rank=4):
    return {down: torch.ones(rank, 6), up: torch.ones(5, rank)}


PEFT = pair(f"unet.{PATH}.lora_A.weight", f"unet.{PATH}.lora_B.weight")


def test_names(family):
    tensors = peft.to_tensors(adapter(), family)
    assert f"unet.{BLOCK}.attn1.to_out.0.lora_A.weight" in tensors
    assert f"text_encoder.{CLIP}.self_attn.q_proj.lora_B.weight" in tensors
    assert len(tensors) == 10


@pytest.mark.parametrize("keep_alphas", [True, False])
def test_kohya_to_diffusers_to_kohya_is_bit_for_bit(family, keep_alphas):
    one = adapter(alphas=(6.0,) * 5, ranks=(1, 2, 4, 8, 16))
    mixed = adapter(alphas=(2.0, 2.0, 5.0, 0.3, 1.0), ranks=(4, 8, 4, 4, 4))
    start = kohya.to_tensors(mixed if keep_alphas else one, family, keep_alphas)
    weights = peft.from_tensors(start, {})
    through = peft.from_tensors(peft.to_tensors(weights, family), peft.header(weights, family))
    assert same_bits(through, weights)
    end = kohya.to_tensors(through, family, keep_alphas)
    assert end.keys() == start.keys()
    for key, tensor in start.items():
        assert tensor.numpy().tobytes() == end[key].numpy().tobytes(), key


def test_header_holds_ranks_and_alphas(family):
    header = peft.header(adapter(alphas=(2.0, 2.0, 5.0, 0.5, 1.0), ranks=(4, 8, 4, 4, 2)), family)
    values = json.loads(header[peft.HEADER_KEY])
    assert values["unet.r"] == 4
    assert values["unet.lora_alpha"] == 2
    assert values["unet.rank_pattern"] == {f"{BLOCK}.attn1.to_out.0": 8}
    assert values["unet.alpha_pattern"] == {
        "up_blocks.1.attentions.2.proj_in": 5,
        "mid_block.resnets.1.conv1": 0.5,
    }
    assert values["text_encoder.lora_alpha"] == 1
    assert values["text_encoder.r"] == 2
    # Without text_model.: diffusers refuses targets with that level where transformers dropped it.
    assert values["text_encoder.target_modules"] == ["encoder.layers.1.self_attn.q_proj"]


def test_without_a_header_alpha_is_the_rank():
    (layer,) = peft.from_tensors(PEFT, {}).layers.values()
    assert layer.scale == 1


def with_header(**values):
    return {peft.HEADER_KEY: json.dumps({key.replace("__", "."): value for key, value in values.items()})}


def test_alpha_of_the_header():
    (layer,) = peft.from_tensors(
        PEFT, with_header(unet__lora_alpha=2, text_encoder__lora_alpha=9)
    ).layers.values()
    assert layer.alpha == 2


@pytest.mark.parametrize("pattern", [PATH, f"^{PATH}", "to_q", "attn1.to_q", "attn1\\.to_q$"])
def test_a_pattern_is_the_end_of_a_name(pattern):
    header = with_header(unet__lora_alpha=2, unet__alpha_pattern={"o_q": 7, "to_k": 8, pattern: 3})
    (layer,) = peft.from_tensors(PEFT, header).layers.values()
    assert layer.alpha == 3


def test_rslora_is_folded_into_alpha():
    header = with_header(unet__lora_alpha=2, unet__use_rslora=True)
    (layer,) = peft.from_tensors(PEFT, header).layers.values()
    assert layer.scale == pytest.approx(2 / 4**0.5)


UNET_Q, CLIP_Q = ("unet", PATH), ("text_encoder", f"{CLIP}.self_attn.q_proj")
UNET_OUT, CLIP_OUT = ("unet", f"{BLOCK}.attn1.to_out.0"), ("text_encoder", f"{CLIP}.self_attn.out_proj")
OLDER = {
    f"unet.{BLOCK}.attn1.processor.to_q_lora.{{}}.weight": UNET_Q,
    f"{BLOCK}.attn1.processor.to_out_lora.{{}}.weight": UNET_OUT,
    f"unet.{BLOCK}.attn1.to_q.lora.{{}}.weight": UNET_Q,
    f"unet.{BLOCK}.ff.net.0.proj.lora.{{}}.weight": ("unet", f"{BLOCK}.ff.net.0.proj"),
    f"text_encoder.{CLIP}.self_attn.q_proj.lora_linear_layer.{{}}.weight": CLIP_Q,
    f"text_encoder.{CLIP}.self_attn.to_out_lora.{{}}.weight": CLIP_OUT,
    "text_encoder.encoder.layers.1.self_attn.q_proj.lora_linear_layer.{}.weight": CLIP_Q,
    f"{CLIP}.self_attn.to_q_lora.{{}}.weight": CLIP_Q,
    f"text_encoder_2.{CLIP}.mlp.fc1.lora_linear_layer.{{}}.weight": ("text_encoder_2", f"{CLIP}.mlp.fc1"),
}
PEFTS_OWN = {
    f"base_model.model.{BLOCK}.attn1.to_q.lora_{{}}.weight": UNET_Q,
    f"unet.base_model.model.{BLOCK}.attn1.to_q.lora_{{}}.default.weight": UNET_Q,
    "text_encoder.encoder.layers.1.self_attn.q_proj.lora_{}.weight": CLIP_Q,
}


@pytest.mark.parametrize("name", [*OLDER, *PEFTS_OWN])
def test_other_spellings(name):
    halves = ("down", "up") if name in OLDER else ("A", "B")
    tensors = pair(*(name.format(half) for half in halves))
    assert file_format(tensors) == "diffusers"
    assert list(peft.from_tensors(tensors, {}).layers) == [(OLDER | PEFTS_OWN)[name]]


def test_alpha_among_the_tensors():
    tensors = PEFT | {f"unet.{PATH}.alpha": torch.tensor(2.0)}
    (layer,) = peft.from_tensors(tensors, {}).layers.values()
    assert layer.alpha == 2


BAD = {
    "no up": ({f"unet.{PATH}.lora_A.weight": torch.ones(4, 6)}, {}, "not the up half"),
    "unknown leaf": (
        PEFT | {f"unet.{PATH}.lora_magnitude_vector": torch.ones(5)},
        {},
        "lora_magnitude_vector",
    ),
    "unknown layer": (pair("unet.conv_9.lora_A.weight", "unet.conv_9.lora_B.weight"), {}, "conv_9"),
    "other base": (
        pair("unet.double_blocks.0.img_attn.lora_A.weight", "unet.double_blocks.0.img_attn.lora_B.weight"),
        {},
        "Flux",
    ),
    "twice": (PEFT | {f"unet.{PATH}.lora.down.weight": torch.ones(4, 6)}, {}, "twice"),
    "header no JSON": (PEFT, {peft.HEADER_KEY: "{"}, "not valid JSON"),
    "header no table": (PEFT, {peft.HEADER_KEY: "[]"}, "not a table"),
    "header too deep": (PEFT, {peft.HEADER_KEY: "[" * 100_000}, "not valid JSON"),
    "alpha no number": (PEFT, with_header(unet__lora_alpha="2"), "not a number"),
    "alpha true": (PEFT, with_header(unet__lora_alpha=True), "not a number"),
    "alpha infinite": (PEFT, with_header(unet__lora_alpha=float("inf")), "not a number"),
    "patterns no table": (PEFT, with_header(unet__lora_alpha=2, unet__alpha_pattern=[1]), "not a table"),
    "a real pattern": (
        PEFT,
        with_header(unet__lora_alpha=2, unet__alpha_pattern={"(a+)+": 1}),
        "not a layer's name",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_broken_contents_are_named(case):
    tensors, metadata, words = BAD[case]
    with pytest.raises(AdapterFileError, match=words):
        peft.from_tensors(tensors, metadata)


def test_what_cannot_be_written_is_said(family):
    with pytest.raises(AdapterFileError, match="has no part 'text_encoder_2'"):
        peft.to_tensors(AdapterWeights({("text_encoder_2", f"{CLIP}.mlp.fc1"): linear(2, 1.0)}), family)
    dora = LycorisUpdate("x", linear(4, 1.0), magnitude=torch.ones(1, 24))
    with pytest.raises(AdapterFileError, match="DoRA"):
        peft.to_tensors(AdapterWeights({}, others={("unet", "conv_in"): dora}), family)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_unet_saved_by_peft_is_read_at_its_strength(tmp_path, rslora):
    unet = next(module for part, module in components(FAMILIES["sd15"]) if part == "unet")
    config = LoraConfig(
        r=4, lora_alpha=10, target_modules=["to_q", "to_k"], use_rslora=rslora, init_lora_weights=False,
        rank_pattern={"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 2},
        alpha_pattern={"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 3},
    )  # fmt: skip
    model = get_peft_model(unet, config)
    model.save_pretrained(tmp_path)
    weights = load_adapter(tmp_path / "adapter_model.safetensors")
    base = model.base_model.model
    for (part, path), layer in weights.layers.items():
        assert part == "unet"
        theirs = base.get_submodule(path).get_delta_weight("default")
        torch.testing.assert_close(layer.delta(), theirs)
    assert len(weights.layers) == 64
    report = inspect_file(tmp_path / "adapter_model.safetensors")
    assert report["ranks"] == [2, 4]
    assert set(report["alphas"]) == {3, 10}
    # Nothing else looks at the config, and so nothing else finds the strength.
    verdict = verify_adapter(tmp_path / "adapter_model.safetensors", FAMILIES["sd15"])
    assert not verdict["ok"]


def test_a_broken_config_beside_is_told(tmp_path):
    unet = next(module for part, module in components(FAMILIES["sd15"]) if part == "unet")
    get_peft_model(unet, LoraConfig(r=4, target_modules=["to_q"])).save_pretrained(tmp_path)
    for text in ("{", json.dumps([1])):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterFileError, match=r"adapter_config\.json"):
            load_adapter(tmp_path / "adapter_model.safetensors")
