"""Amplification and intruder dimensions against formed matrices and planted directions."""

import json
import math

import pytest
import torch

from lora_core.__main__ import main
from lora_core.tools import analysis
from lora_core.tools.analysis import file_amplification, intruder_count
from lora_core.tools.delta import BaseWeights
from tests.tools.planted import CONV, LAYERS, TO_K, dense, layer_of, random_layer, saved


def test_the_factor_is_that_of_the_paper(tmp_path):
    """Section 7.3 with numpy's order of things: U and V from the SVD of the formed update."""
    layers = {key: random_layer(key, 3, 1.5, n, 0.1) for n, key in enumerate(LAYERS)}
    base = BaseWeights("demo")
    report = file_amplification(saved(layers, tmp_path / "a.safetensors"), base)
    assert len(report["layers"]) == len(LAYERS)
    norms = projections = 0.0
    for row in report["layers"]:
        key = (row["part"], row["module"])
        delta, weight = dense(layers[key]), base.weight(key).double().flatten(1)
        u, _, vh = torch.linalg.svd(delta, full_matrices=False)
        projected = float((u[:, :3].T @ weight @ vh[:3].T).norm())
        assert row["rank"] == 3
        assert row["projected"] == pytest.approx(projected, rel=1e-4)
        assert row["amplification"] == pytest.approx(float(delta.norm()) / projected, rel=1e-4)
        assert row["base_norm"] == pytest.approx(float(weight.norm()), rel=1e-5)
        chance = float(delta.norm()) / (3 * float(weight.norm()) / math.sqrt(weight.numel()))
        assert row["chance"] == pytest.approx(chance, rel=1e-4)
        norms, projections = norms + row["norm"] ** 2, projections + projected**2
    assert report["amplification"] == pytest.approx(math.sqrt(norms / projections), rel=1e-4)
    assert sum(row["layers"] for row in report["blocks"]) == len(LAYERS)
    assert sum(row["intruders"] for row in report["blocks"]) == report["intruders"]


def test_an_update_along_the_base_itself(tmp_path):
    """By hand: a tenth of the base's own leading triple is amplified by 0.1."""
    u, values, vh = torch.linalg.svd(BaseWeights("demo").weight(TO_K), full_matrices=False)
    path = saved({TO_K: layer_of(0.1 * values[0] * u[:, :1], vh[:1], TO_K, 1.0)}, tmp_path / "a.safetensors")
    (row,) = file_amplification(path, BaseWeights("demo"))["layers"]
    assert row["amplification"] == pytest.approx(0.1, rel=1e-4)
    assert row["intruders"] == 0


def planted(size, count, seed):
    """A weight with falling singular values, and an update of `count` new strong directions, none of them
    old."""
    draw = torch.Generator().manual_seed(seed)
    out, inside = size
    weight = torch.randn(out, inside, generator=draw) / math.sqrt(out)
    u, values, vh = torch.linalg.svd(weight, full_matrices=False)
    # An even mix of all old directions has a cosine of 1/sqrt(n) with each.
    signs = torch.where(torch.rand(values.numel(), count, generator=draw) < 0.5, -1.0, 1.0)
    new = torch.linalg.qr(u @ signs).Q
    read = torch.linalg.qr(torch.randn(inside, count, generator=draw)).Q
    return weight, 5 * values[0] * new @ read.T, u, vh


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("size", [(60, 90), (120, 80)])
def test_planted_intruders_are_counted(size, count):
    weight, delta, u, vh = planted(size, count, 0)
    assert intruder_count(weight, delta) == count
    # An update along old directions, however strong, adds none; nor does a weak one.
    assert intruder_count(weight, 9.0 * u[:, 3:5] @ vh[3:5]) == 0
    assert intruder_count(weight, 1e-3 * delta) == 0
    assert intruder_count(weight, torch.zeros_like(weight)) == 0
    # More than are looked at cannot be counted.
    assert intruder_count(weight, delta, leading=1) == 1


def test_large_layers_give_the_same_by_probes(monkeypatch):
    full = []
    whole = torch.linalg.eigh
    weight, delta, u, vh = planted((150, 140), 2, 1)
    monkeypatch.setattr(analysis, "EXACT_UP_TO", 64)
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: full.append(len(m)) or whole(m))
    along_old = 9.0 * u[:, :2] @ vh[:2]
    assert intruder_count(weight, along_old) == 0
    # Nothing seemed to be one, so that no whole weight was decomposed.
    assert full == []
    assert intruder_count(weight, delta) == 2
    assert full == [140, 140]


def test_the_verb(tmp_path, capsys):
    path = saved(
        {TO_K: random_layer(TO_K, 2, 2.0, 0), CONV: random_layer(CONV, 2, 2.0, 1, 0.0)},
        tmp_path / "a.safetensors",
    )
    assert main(["amplify", str(path), "--base", "demo", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["module"] for row in report["left_out"]] == [CONV[1]]
    assert report["layers"][0]["intruders"] == report["intruders"]
    assert main(["amplify", str(path), "--base", "demo"]) == 0
    assert "intruder dimensions" in capsys.readouterr().out
