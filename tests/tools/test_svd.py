"""Spectra against planted ranks and numpy's decomposition of the formed product."""

import math

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoKrConfig

from lora_core.__main__ import main
from lora_core.lora.lycoris import LycorisUpdate
from lora_core.tools.svd import (
    block_of,
    effective_rank,
    file_spectrum,
    flat_pair,
    rank_of_energy,
    singular_values,
    stable_rank,
    update_singular_values,
)
from tests.formats.odd_files import serialised
from tests.tools.planted import (
    CONV,
    LAYERS,
    TEXT,
    TO_K,
    dense,
    layer_of,
    orthonormal,
    random_layer,
    saved,
    shape_of,
)
from tests.tools.test_delta import LINEAR, VERSION, in_peft, stem


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def hidden(key, rank, columns, seed):
    """A product of rank `rank` with equal singular values, in `columns` columns that are mixed by a
    rotation."""
    out, *inner = shape_of(key)
    draw = torch.Generator().manual_seed(seed)
    up = torch.zeros(out, columns, dtype=torch.float64)
    down = torch.zeros(columns, torch.Size(inner).numel(), dtype=torch.float64)
    up[:, :rank] = orthonormal(out, rank, draw)
    down[:rank] = 3 * orthonormal(down.shape[1], rank, draw).T
    turn = orthonormal(columns, columns, draw)
    return layer_of(up @ turn, turn.T @ down, key, float(columns))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_a_hidden_rank_is_found_in_every_layer(path, rank, precision):
    layers = {key: hidden(key, rank, 16, seed) for seed, key in enumerate(LAYERS)}
    report = file_spectrum(saved(layers, path, precision=precision))
    assert {(row["part"], row["module"]) for row in report["layers"]} == set(layers)
    for row in report["layers"]:
        assert row["rank"] == 16
        assert row["numeric_rank"] == row["rank99"] == rank
        assert row["effective_rank"] == pytest.approx(rank, rel=0.01)
        assert row["stable_rank"] == pytest.approx(rank, rel=0.02)
        assert row["norm"] == pytest.approx(3 * math.sqrt(rank), rel=0.01)


def test_the_values_are_those_of_numpy(path):
    """Mixed ranks and alphas, convolutions, and a layer of more columns than rows."""
    layers = {key: random_layer(key, 2 + 3 * n, 0.5 + n, n) for n, key in enumerate(LAYERS)}
    layers[TEXT] = random_layer(TEXT, 200, 7.0, 9)
    for row in file_spectrum(saved(layers, path))["layers"]:
        layer = layers[row["part"], row["module"]]
        expected = np.linalg.svd(dense(layer).numpy(), compute_uv=False)[: len(row["singular_values"])]
        np.testing.assert_allclose(row["singular_values"], expected, rtol=1e-5)
        assert len(expected) == min(layer.rank, *dense(layer).shape)
        assert row["norm"] == pytest.approx(float(dense(layer).norm()), rel=1e-6)


def test_small_values_keep_their_digits(path):
    """Squares of the factors, as in a Gram matrix, would lose what is below 1e-8 of the largest."""
    draw = torch.Generator().manual_seed(0)
    values = 10.0 ** -torch.arange(0, 12, 2, dtype=torch.float64)
    out, inside = shape_of(TO_K)
    layer = layer_of(orthonormal(out, 6, draw), values[:, None] * orthonormal(inside, 6, draw).T, TO_K, 6.0)
    (row,) = file_spectrum(saved({TO_K: layer}, path))["layers"]
    np.testing.assert_allclose(row["singular_values"], values.numpy(), rtol=1e-5)


def test_ranks_by_hand():
    values = torch.tensor([3.0, 1.0])
    # Shares 3/4 and 1/4: exp(3/4 log(4/3) + 1/4 log 4); energy 9 and 1 of 10.
    assert effective_rank(values) == pytest.approx((4 / 3) ** 0.75 * 4**0.25)
    assert stable_rank(values) == pytest.approx(10 / 9)
    assert [rank_of_energy(values, share) for share in (0.5, 0.9, 0.91, 1.0)] == [1, 1, 2, 2]
    assert rank_of_energy(torch.ones(10), 0.9) == 9
    nothing = torch.zeros(3)
    assert (effective_rank(nothing), stable_rank(nothing), rank_of_energy(nothing, 0.9)) == (0, 0, 0)


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=3, alpha=6, target_modules=["layer"], init_weights=False),
        LoKrConfig(r=2, alpha=5, target_modules=["layer"], init_weights=False),
        LoKrConfig(r=2000, alpha=2000, target_modules=["layer"], init_weights=False),
    ],
    ids=["LoHa", "LoKr", "LoKr, whole"],
)
def test_other_kinds_have_a_spectrum_too(path, config):
    adapted, _, tensors = in_peft(config, LINEAR)
    file = {f"{stem(LINEAR)}.{leaf}": tensor for leaf, tensor in tensors.items()}
    path.write_bytes(serialised(file | {f"{stem(LINEAR)}.alpha": torch.tensor(float(config.alpha))}, VERSION))
    (row,) = file_spectrum(path)["layers"]
    expected = np.linalg.svd(adapted.get_delta_weight("default").detach().numpy(), compute_uv=False)
    found = np.array(row["singular_values"])
    np.testing.assert_allclose(found, expected[: len(found)], rtol=1e-3, atol=1e-4 * expected[0])
    assert row["norm"] == pytest.approx(float(np.linalg.norm(expected)), rel=1e-4)


HALVES = {
    "linear": {"lokr_w1": (4, 6), "lokr_w2": (8, 10)},
    "tall and wide": {"lokr_w1": (12, 2), "lokr_w2": (3, 20)},
    "factors": {"lokr_w1_a": (6, 2), "lokr_w1_b": (2, 4), "lokr_w2": (8, 9)},
    "convolution": {"lokr_w1": (4, 3), "lokr_w2": (5, 6, 3, 3)},
    "Tucker": {"lokr_w1": (4, 3), "lokr_w2_a": (2, 8), "lokr_w2_b": (2, 6), "lokr_t2": (2, 2, 3, 3)},
}


@pytest.mark.parametrize("case", HALVES)
def test_a_kronecker_product_has_the_products_of_its_factors_singular_values(case):
    draw = torch.Generator().manual_seed(0)
    roles = {role: torch.randn(shape, generator=draw) for role, shape in HALVES[case].items()}
    update = LycorisUpdate("layer", None, roles, scale=-0.5)
    found, expected = update_singular_values(update), singular_values(flat_pair(update))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected[0]))


def test_dora_is_left_out_and_the_rest_is_told(path):
    low = random_layer(LINEAR, 2, 2.0, 0)
    other = f"{stem(TEXT)}"
    file = {
        f"{stem(LINEAR)}.lora_down.weight": low.down,
        f"{stem(LINEAR)}.lora_up.weight": low.up,
        f"{stem(LINEAR)}.dora_scale": torch.ones(low.up.shape[0], 1),
        f"{other}.lora_down.weight": torch.ones(1, shape_of(TEXT)[1]),
        f"{other}.lora_up.weight": torch.ones(shape_of(TEXT)[0], 1),
    }
    path.write_bytes(serialised(file, VERSION))
    report = file_spectrum(path)
    assert [row["module"] for row in report["layers"]] == [TEXT[1]]
    (out,) = report["left_out"]
    assert out["module"] == LINEAR[1]
    assert "DoRA" in out["reason"]


def test_a_layer_that_changes_nothing(path):
    layer = random_layer(TO_K, 4, 4.0, 0, size=0.0)
    (row,) = file_spectrum(saved({TO_K: layer}, path))["layers"]
    assert row["norm"] == row["rank90"] == row["numeric_rank"] == row["effective_rank"] == 0


def test_norms_by_block(path):
    layers = {key: random_layer(key, 2, 2.0, n) for n, key in enumerate(LAYERS)}
    rows = file_spectrum(saved(layers, path))["blocks"]
    assert [(row["part"], row["block"], row["layers"]) for row in rows] == [
        ("unet", "down_blocks.1", 3), ("unet", "up_blocks.1", 1), ("text_encoder", "layers.0", 1),
    ]  # fmt: skip
    inside = [key for key in layers if key[1].startswith("down_blocks.1")]
    expected = math.sqrt(sum(float(dense(layers[key]).square().sum()) for key in inside))
    assert rows[0]["norm"] == pytest.approx(expected, rel=1e-5)
    assert block_of(("unet", "mid_block.resnets.0.conv1")) == "mid_block"
    assert block_of(("unet", "conv_in")) == "conv_in"


def test_the_verb(path, capsys):
    import json

    saved({CONV: random_layer(CONV, 3, 3.0, 0)}, path)
    assert main(["inspect", str(path), "--spectrum", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    keys = ["part", "module", "rank", "alpha", "norm", "effective_rank", "stable_rank", "rank90", "rank99"]
    assert all(key in report["layers"][0] for key in [*keys, "singular_values"])
    assert report["kind"] == "LoCon"
    assert main(["inspect", str(path), "--spectrum"]) == 0
    assert "99% in 3" in capsys.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    assert "layers" not in json.loads(capsys.readouterr().out)
