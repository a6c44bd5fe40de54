"""LoHa, LoKr, OFT and DoRA read and made plain. The expected updates are PEFT's own, and for kohya's DoRA and
for OFT by hand."""

import peft
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig
from torch import nn

from lora_core.errors import AdapterFileError, ConfigError
from lora_core.model_files.detect import family_layout
from lora_core.model_files.families import FAMILIES
from lora_core.tools.delta import BaseWeights, file_updates
from lora_core.tools.shrink import to_lora
from lora_core.tools.svd import low_rank_pair
from tests.formats.odd_files import serialised

TINY = FAMILIES["tiny"]
BLOCK = "down_blocks.1.attentions.0"
LINEAR = ("unet", f"{BLOCK}.transformer_blocks.0.attn2.to_k")
NARROW = ("unet", f"{BLOCK}.proj_in")
WIDE = ("unet", "down_blocks.1.resnets.0.conv1")
TEXT = ("text_encoder", "text_model.encoder.layers.0.mlp.fc1")
ALL = (LINEAR, NARROW, WIDE, TEXT)
VERSION = {"ss_base_model_version": TINY.base_version}


def stem(layer):
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[layer[0]] + layer[1].replace(".", "_")


def like(layer):
    """A layer of torch with the shape that the embedded base has there."""
    out, inside, *kernel = family_layout(TINY)[layer]
    module = nn.Conv2d(inside, out, kernel, bias=False) if kernel else nn.Linear(inside, out, bias=False)
    torch.nn.init.normal_(module.weight)
    return module


def in_peft(config, layer):
    """A module with one layer adapted by PEFT, all of its factors random: the layer, and its tensors by
    leaf."""
    torch.manual_seed(3)
    model = nn.Sequential()
    model.add_module("layer", like(layer))
    frozen = model.layer.weight.detach().clone()
    peft.inject_adapter_in_model(config, model)
    adapted = model.layer
    tensors = {}
    for name, tensor in adapted.named_parameters():
        if "base_layer" not in name:
            nn.init.normal_(tensor)
            tensors[name.replace(".default", "")] = tensor.detach().clone()
    return adapted, frozen, tensors


def write(path, tensors, metadata=VERSION):
    path.write_bytes(serialised(tensors, metadata))
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "other.safetensors"


CONFIGS = {
    "LoHa": LoHaConfig(r=3, alpha=6, target_modules=["layer"], init_weights=False),
    "LoHa, Tucker": LoHaConfig(
        r=3, alpha=6, target_modules=["layer"], init_weights=False, use_effective_conv2d=True
    ),
    "LoKr": LoKrConfig(r=2, alpha=5, target_modules=["layer"], init_weights=False),
    "LoKr, both halves": LoKrConfig(
        r=1, alpha=5, target_modules=["layer"], init_weights=False, decompose_both=True, decompose_factor=4
    ),
    "LoKr, Tucker": LoKrConfig(
        r=2, alpha=5, target_modules=["layer"], init_weights=False, use_effective_conv2d=True
    ),
    "LoKr, whole": LoKrConfig(r=2000, alpha=2000, target_modules=["layer"], init_weights=False),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layer", ALL, ids=["linear", "1x1", "3x3", "text"])
def test_updates_are_those_of_peft(path, name, layer):
    config = CONFIGS[name]
    adapted, _, tensors = in_peft(config, layer)
    expected = adapted.get_delta_weight("default").detach()
    alpha = torch.tensor(float(config.alpha))
    file = {f"{stem(layer)}.{leaf}": tensor for leaf, tensor in tensors.items()}
    write(path, file | {f"{stem(layer)}.alpha": alpha})
    updates, _, family = file_updates(path)
    assert family is TINY
    ((key, update),) = updates.items()
    assert key == layer
    assert update.weight_shape == tuple(expected.shape)
    torch.testing.assert_close(update.delta(None), expected, rtol=1e-4, atol=1e-4)
    if "whole" not in name:
        # Half the alpha is half the update.
        write(path, file | {f"{stem(layer)}.alpha": alpha / 2})
        torch.testing.assert_close(
            file_updates(path)[0][layer].delta(None), expected / 2, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("layer", [LINEAR, WIDE, TEXT], ids=["linear", "3x3", "text"])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_dora_is_that_of_peft(path, format, layer):
    """PEFT normalises each row of W0 + update, which LyCORIS writes as dora_scale of (out, 1)."""
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["layer"], use_dora=True, init_lora_weights=False)
    adapted, frozen, tensors = in_peft(config, layer)
    magnitude = tensors["lora_magnitude_vector.weight"].abs_()
    adapted.lora_magnitude_vector["default"].weight.data.copy_(magnitude)
    adapted.merge()
    expected = adapted.base_layer.weight.detach() - frozen
    down, up = tensors["lora_A.weight"], tensors["lora_B.weight"]
    if format == "kohya":
        ones = (1,) * (frozen.dim() - 1)
        file = {
            f"{stem(layer)}.lora_down.weight": down,
            f"{stem(layer)}.lora_up.weight": up,
            f"{stem(layer)}.dora_scale": magnitude.reshape(-1, *ones),
            f"{stem(layer)}.alpha": torch.tensor(2.0),
        }
        write(path, file)
    else:
        start = ".".join(layer)
        file = {
            f"{start}.lora_A.weight": down,
            f"{start}.lora_B.weight": up,
            f"{start}.lora_magnitude_vector": magnitude,
        }
        header = f'{{"{layer[0]}.r": 4, "{layer[0]}.lora_alpha": 2}}'
        write(path, file, VERSION | {"lora_adapter_metadata": header})
    updates, _, _ = file_updates(path)
    assert any(update.magnitude is not None for update in updates.values())
    torch.testing.assert_close(updates[layer].delta(frozen), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [LINEAR, WIDE], ids=["linear", "3x3"])
def test_dora_of_columns_as_kohya_writes_it(path, layer):
    """dora_scale of (1, in): each input channel's slice of W0 + update is scaled to the magnitude."""
    frozen = like(layer).weight.detach()
    out, inside, *kernel = frozen.shape
    draw = torch.Generator().manual_seed(4)
    down = torch.randn(2, inside, *kernel, generator=draw)
    up = torch.randn(out, 2, *(1 for _ in kernel), generator=draw)
    magnitude = torch.rand(1, inside, *(1 for _ in kernel), generator=draw) + 1
    file = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": magnitude}
    write(path, {f"{stem(layer)}.{leaf}": tensor for leaf, tensor in file.items()})
    found = file_updates(path)[0][layer].delta(frozen) + frozen
    whole = frozen.double() + torch.einsum("or,ri...->oi...", up.flatten(1).double(), down.double())
    for channel in range(0, inside, 7):
        column = whole[:, channel]
        expected = column / column.norm() * magnitude.flatten()[channel]
        torch.testing.assert_close(found[:, channel].double(), expected, rtol=1e-4, atol=1e-5)


def test_doras_of_other_kinds(path):
    """LyCORIS puts magnitudes on a LoHa too: W0 + update of norm 1 a row has the magnitudes as norms."""
    _, frozen, tensors = in_peft(CONFIGS["LoHa"], LINEAR)
    magnitude = torch.rand(len(frozen), 1) + 1
    write(path, {f"{stem(LINEAR)}.{k}": t for k, t in (tensors | {"dora_scale": magnitude}).items()})
    updates, _, _ = file_updates(path)
    assert any(update.magnitude is not None for update in updates.values())
    rows = (updates[LINEAR].delta(frozen) + frozen).norm(dim=1)
    torch.testing.assert_close(rows, magnitude.flatten())


def mixed(path):
    """Each kind in one file, as LyCORIS writes with presets, and a plain LoRA."""
    draw = torch.Generator().manual_seed(8)
    tensors = {}
    for layer, name in ((LINEAR, "LoHa"), (WIDE, "LoKr"), (NARROW, "LoHa")):
        for leaf, tensor in in_peft(CONFIGS[name], layer)[2].items():
            tensors[f"{stem(layer)}.{leaf}"] = tensor
        tensors[f"{stem(layer)}.alpha"] = torch.tensor(2.0)
    out, inside = family_layout(TINY)[TEXT]
    tensors[f"{stem(TEXT)}.lora_down.weight"] = torch.randn(4, inside, generator=draw)
    tensors[f"{stem(TEXT)}.lora_up.weight"] = torch.randn(out, 4, generator=draw)
    tensors[f"{stem(TEXT)}.alpha"] = torch.tensor(1.0)
    return write(path, tensors)


@pytest.mark.parametrize("rank", [2, 6])
def test_a_plain_lora_is_the_best_of_its_rank_and_tells_its_error(path, rank):
    updates, _, _ = file_updates(mixed(path))
    assert set(updates) == set(ALL)
    weights, loss = to_lora(updates, rank)
    squares = missing = 0.0
    for key, update in updates.items():
        whole = update.delta(None).double()
        values = torch.linalg.svdvals(whole.flatten(1))
        best = values[rank:].square().sum()
        found = weights.layers[key].delta().double()
        assert found.shape == whole.shape
        assert float((whole - found).square().sum()) == pytest.approx(
            float(best), rel=1e-3, abs=1e-6 * float(whole.square().sum())
        )
        squares += float(whole.square().sum())
        missing += float((whole - found).square().sum())
    assert loss.overall == pytest.approx((missing / squares) ** 0.5, rel=1e-3)
    assert {layer.alpha for layer in weights.layers.values()} == {float(rank)}
    assert weights.layers[TEXT].rank == min(rank, 4)


def test_a_large_update_is_decomposed_nearly_as_well_as_can_be():
    """A LoHa of rank 24 has 576 singular values that fall slowly, the hard case for random probes."""
    draw = torch.Generator().manual_seed(5)
    a, b, c, d = (torch.randn(700, 24, generator=draw) for _ in range(4))
    matrix = (a @ b.T) * (c @ d.T)
    values = torch.linalg.svdvals(matrix)
    _, norm, lost, _ = low_rank_pair(matrix, 16)
    assert norm == pytest.approx(float(values.square().sum()), rel=1e-4)
    best = float(values[16:].square().sum())
    assert best <= lost * 1.0001
    assert lost <= best * 1.002


def test_dora_made_plain_against_the_embedded_base(path):
    base = BaseWeights("demo")
    frozen = base.weight(LINEAR)
    out, inside = frozen.shape
    draw = torch.Generator().manual_seed(1)
    down, up = torch.randn(4, inside, generator=draw), torch.randn(out, 4, generator=draw) * 0.1
    magnitude = (frozen + up @ down).norm(dim=1, keepdim=True)
    file = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": magnitude}
    write(path, {f"{stem(LINEAR)}.{leaf}": tensor for leaf, tensor in file.items()})
    updates, _, _ = file_updates(path, base.family)
    weights, loss = to_lora(updates, 4, base)
    # Magnitudes equal to the norms change nothing, so that what is left is a plain LoRA of rank 4.
    torch.testing.assert_close(weights.layers[LINEAR].delta(), up @ down, rtol=1e-3, atol=1e-4)
    assert loss.overall < 1e-3
    with pytest.raises(ConfigError, match="--rank 0"):
        to_lora(updates, 0, base)


@pytest.mark.parametrize("alpha", [None, 0.0, 1e-3, 1e3])
@pytest.mark.parametrize("layer", [LINEAR, WIDE, TEXT], ids=["linear", "3x3", "text"])
def test_an_oft_turns_outputs_within_its_limit(path, layer, alpha):
    """LyCORIS' and kohya's networks/oft.py limit |Q| to alpha times the outputs; its 0 is no limit."""
    base = BaseWeights("demo")
    weight = base.weight(layer)
    blocks = torch.randn(len(weight) // 8, 8, 8, generator=torch.Generator().manual_seed(0)) / 8
    limit = {} if alpha is None else {f"{stem(layer)}.alpha": torch.tensor(alpha)}
    write(path, {f"{stem(layer)}.oft_blocks": blocks, **limit})
    skew = blocks - blocks.mT
    most = (alpha or 1e9) * len(weight)
    skew = skew * min(1.0, most / float(skew.norm()))
    rotation = torch.block_diag(*[(torch.eye(8) + q) @ torch.linalg.inv(torch.eye(8) - q) for q in skew])
    expected = (rotation.T @ weight.flatten(1)).reshape(weight.shape) - weight
    ((key, update),) = file_updates(path)[0].items()
    assert (key, update.rank, update.needs_base) == (layer, 8, True)
    torch.testing.assert_close(update.delta(weight), expected, rtol=1e-4, atol=1e-5)
    if alpha is None:
        weights, loss = to_lora({key: update}, 4, base)
        found = weights.layers[layer].delta() - expected
        assert 0 < loss.overall < 1
        assert float(found.norm() / expected.norm()) == pytest.approx(loss.overall, rel=1e-3)


def good():
    tensors = in_peft(CONFIGS["LoHa"], LINEAR)[2]
    return {f"{stem(LINEAR)}.{k}": t for k, t in tensors.items()} | {
        f"{stem(LINEAR)}.alpha": torch.tensor(6.0)
    }


def without(leaf):
    return {k: t for k, t in good().items() if not k.endswith(leaf)}


def replaced(leaf, tensor):
    return good() | {f"{stem(LINEAR)}.{leaf}": tensor}


BROKEN = {
    "half a pair": (without("hada_w2_b"), "lacks hada_w2_b"),
    "half of Tucker": (replaced("hada_t1", torch.ones(3, 3, 3, 3)), "lacks hada_t2"),
    "ranks that differ": (replaced("hada_w1_b", torch.ones(4, 128)), "do not fit together"),
    "widths that differ": (replaced("hada_w2_b", torch.ones(3, 96)), "do not fit together"),
    "NaN": (replaced("hada_w1_b", torch.full((3, 128), float("nan"))), "not finite"),
    "alpha of several": (replaced("alpha", torch.ones(3)), "must be one number"),
    "alpha not finite": (replaced("alpha", torch.tensor(float("inf"))), "not finite"),
    "integers": (replaced("hada_w1_b", torch.ones(3, 128, dtype=torch.int32)), "integers"),
    "empty": (replaced("hada_w2_b", torch.ones(3, 0)), "empty"),
    "magnitudes alone": (good() | {"lora_unet_conv_in.dora_scale": torch.ones(4, 1)}, "no update"),
    "magnitudes of two axes": (replaced("dora_scale", torch.ones(4, 5)), "impossible shape"),
    "a layer of nothing": ({k.replace("attn2", "attn7"): t for k, t in good().items()}, "names no layer"),
    "a key of another kind": (good() | {f"{stem(TEXT)}.a1.foo": torch.ones(2, 2)}, "no plain LoRA"),
    "half a LoRA": (good() | {f"{stem(TEXT)}.lora_up.weight": torch.ones(2, 2)}, "not the down half"),
    "half a LoKr": ({f"{stem(LINEAR)}.lokr_w1": torch.ones(2, 2)}, "lacks lokr_w2_a, lokr_w2_b"),
    "a bomb": (
        {f"{stem(LINEAR)}.lokr_w1": torch.ones(900, 900), f"{stem(LINEAR)}.lokr_w2": torch.ones(900, 900)},
        r"claims a weight of the shape \[810000, 810000\]",
    ),
    "a BOFT": ({f"{stem(LINEAR)}.oft_blocks": torch.ones(2, 4, 8, 8)}, "such as BOFT"),
    "an older OFT": ({f"{stem(LINEAR)}.oft_diag": torch.ones(2, 8, 8)}, "OFT of LyCORIS"),
    "a rescaled OFT": (
        {f"{stem(LINEAR)}.oft_blocks": torch.ones(16, 8, 8), f"{stem(LINEAR)}.rescale": torch.ones(128, 1)},
        "rescale', which belongs to no",
    ),
    "PEFT's OFT": ({f"{'.'.join(LINEAR)}.oft_R.weight": torch.ones(4, 6)}, "OFT of LyCORIS"),
    "PEFT's LoHa": (
        {k.replace(stem(LINEAR), ".".join(LINEAR)): t for k, t in without("alpha").items()},
        "strength is in no file",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_get_one_sentence(path, case):
    tensors, words = BROKEN[case]
    with pytest.raises(AdapterFileError, match=words) as refused:
        file_updates(write(path, tensors))
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_does_not_say_its_family_needs_a_base(path):
    keys = [f"{stem(NARROW)}.{leaf}" for leaf in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")]
    shapes = [(96, 2), (2, 96), (96, 2), (2, 96)]
    write(path, {key: torch.ones(shape) for key, shape in zip(keys, shapes, strict=True)}, {})
    with pytest.raises(AdapterFileError, match="name its base with --base"):
        file_updates(path)
    assert file_updates(path, TINY)[0][NARROW].weight_shape[2:] == (1, 1)


def test_a_file_for_another_family_is_refused(path):
    write(path, good(), {"ss_base_model_version": "sd_v1"})
    with pytest.raises(AdapterFileError, match=r"is for Stable Diffusion 1.x, the base is the Embedded"):
        file_updates(path, TINY)


def test_a_dora_for_a_base_of_other_widths(path):
    file = {"lora_down.weight": torch.ones(2, 128), "lora_up.weight": torch.ones(20, 2)}
    file["dora_scale"] = torch.ones(20, 1)
    write(path, {f"{stem(LINEAR)}.{leaf}": tensor for leaf, tensor in file.items()})
    base = BaseWeights("demo")
    with pytest.raises(AdapterFileError, match="for another base"):
        to_lora(file_updates(path)[0], 2, base)
