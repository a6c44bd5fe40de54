"""Similarity, interference, amplification and intruders of adapters whose directions are planted."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.__main__ import main
from lora_core.cli.terminal import show_result
from lora_core.errors import AdapterFileError
from lora_core.formats.io import load_adapter, save_adapter
from lora_core.generate.request import WeightedLora
from lora_core.lora.weights import AdapterWeights, LayerWeights
from lora_core.model_files.families import FAMILIES
from lora_core.model_files.header import read_header
from lora_core.tools import analysis
from lora_core.tools.analysis import (
    baseline,
    file_amplification,
    file_similarity,
    interference_report,
    intruder_count,
    phi,
    phi_table,
)
from lora_core.tools.delta import BaseWeights
from tests.tools.planted import (
    CONV,
    LAYERS,
    PROJ,
    TEXT,
    TO_K,
    TO_Q,
    dense,
    layer_of,
    orthonormal,
    random_layer,
    saved,
    shape_of,
)


def test_equation_4_by_hand():
    """In three dimensions: span(e1, e2) and span(e1, a) with a at 60 degrees between e2 and e3.

    The products are <e1, e1> = 1, <e2, a> = 1/2 and two zeros, so |U^T V|^2 = 1 + 1/4 and phi(2, 2) = 5/8; of
    the leading ones alone it is 1; e1 lies wholly in the second plane, so that phi(1, 2) = 1.
    """
    first = torch.tensor([[1.0, 0], [0, 1], [0, 0]])
    second = torch.tensor([[1.0, 0], [0, 0.5], [0, math.sqrt(3) / 2]])
    assert phi(first, second) == pytest.approx(5 / 8)
    torch.testing.assert_close(phi_table(first, second), torch.tensor([[1.0, 1.0], [1.0, 5 / 8]]))
    assert phi(first[:, :1], second) == 1.0
    assert phi(first[:, 1:], second[:, :1]) == 0.0


def test_the_baseline_is_the_mean_over_random_subspaces():
    """200 draws of 3 and 5 of 24 dimensions: 5/24; the deviation of one draw is about 0.06."""
    draw = torch.Generator().manual_seed(0)
    found = [phi(orthonormal(24, 3, draw), orthonormal(24, 5, draw)) for _ in range(200)]
    assert sum(found) / 200 == pytest.approx(baseline(3, 5, 24), abs=0.015)
    assert baseline(3, 5, 24) == 5 / 24


def sharing(key, shared, seed):
    """Rank 8 with equal singular values: 3 directions are of `shared`, the others orthogonal to them and
    random."""
    draw = torch.Generator().manual_seed(seed)
    sides = []
    for common in shared:
        rest = torch.randn(common.shape[0], 5, generator=draw, dtype=torch.float64)
        sides.append(torch.cat([common, torch.linalg.qr(rest - common @ (common.T @ rest)).Q], dim=1))
    turn = orthonormal(8, 8, draw)
    return layer_of(sides[0] @ turn, turn.T @ sides[1].T, key, 8.0)


def test_a_planted_subspace_shows(tmp_path):
    files, draw = ([], []), torch.Generator().manual_seed(5)
    one, two = {}, {}
    for number, key in enumerate(LAYERS):
        sizes = dense(random_layer(key, 1, 1.0, 0)).shape
        shared = [orthonormal(size, 3, draw) for size in sizes]
        one[key], two[key] = sharing(key, shared, 2 * number), sharing(key, shared, 2 * number + 1)
    files = saved(one, tmp_path / "a.safetensors"), saved(two, tmp_path / "b.safetensors", "diffusers")
    report = file_similarity(*files)
    for row in report["layers"]:
        out, inside = dense(one[row["part"], row["module"]]).shape
        assert row["rank"] == 8
        for name, size in (("phi", inside), ("phi_output", out)):
            # 3 of 8 directions in full, and 5 random ones of what is left against 5 others.
            expected = (3 + 5 * 5 / (size - 3)) / 8
            assert row[name] == pytest.approx(expected, abs=0.04)
        assert (row["baseline"], row["baseline_output"]) == (8 / inside, 8 / out)
    assert report["similarity"] > 3 * report["baseline"]
    assert len(report["table"]) == 8


def test_of_strangers_nothing_is_alike(tmp_path):
    files = [
        saved(
            {key: random_layer(key, 4, 4.0, seed + n) for n, key in enumerate(LAYERS)},
            tmp_path / f"{seed}.safetensors",
        )
        for seed in (0, 100)
    ]
    report = file_similarity(*files)
    assert report["similarity"] == pytest.approx(report["baseline"], abs=0.03)


def test_a_file_and_itself(tmp_path, capsys):
    path = saved(
        {key: random_layer(key, 4, 4.0, n) for n, key in enumerate(LAYERS)}, tmp_path / "a.safetensors"
    )
    assert main(["compare", str(path), str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["similarity"] == report["similarity_output"] == 1.0
    assert all(row["phi"] == 1.0 for row in report["layers"])
    assert main(["compare", str(path), str(path)]) == 0
    assert "Similarity 1.000" in capsys.readouterr().out


def test_the_lower_rank_counts_and_scale_and_format_do_not(tmp_path):
    """A cut adapter's directions are the leading ones of the whole."""
    u, v = (orthonormal(size, 6, torch.Generator().manual_seed(n)) for n, size in enumerate(shape_of(TO_K)))
    values = torch.tensor([9.0, 7, 5, 3, 2, 1]).double()
    whole = {TO_K: layer_of(u * values, v.T, TO_K, 6.0)}
    part = {TO_K: layer_of(-0.1 * u[:, :2] * values[:2], v[:, :2].T, TO_K, 9.0)}
    report = file_similarity(
        saved(whole, tmp_path / "a.safetensors"), saved(part, tmp_path / "b.safetensors")
    )
    assert report["layers"][0]["rank"] == 2
    assert report["similarity"] == pytest.approx(1.0, abs=1e-9)


def test_layers_of_one_file_alone_are_named(tmp_path):
    zero = random_layer(CONV, 2, 2.0, 1, size=0.0)
    one = saved({TO_K: random_layer(TO_K, 2, 2.0, 0), CONV: zero}, tmp_path / "a.safetensors")
    two = {
        TO_K: random_layer(TO_K, 2, 2.0, 1),
        CONV: random_layer(CONV, 2, 2.0, 1),
        TEXT: random_layer(TEXT, 2, 2.0, 2),
    }
    report = file_similarity(one, saved(two, tmp_path / "b.safetensors"))
    assert [row["module"] for row in report["layers"]] == [TO_K[1]]
    assert {(row["module"], row["reason"]) for row in report["left_out"]} == {
        (TEXT[1], "it is in b.safetensors alone"),
        (CONV[1], "it changes nothing"),
    }


def test_nothing_in_common(tmp_path, capsys):
    one = saved({TO_K: random_layer(TO_K, 2, 2.0, 0)}, tmp_path / "a.safetensors")
    two = saved({TEXT: random_layer(TEXT, 2, 2.0, 0)}, tmp_path / "b.safetensors")
    assert main(["compare", str(one), str(two)]) == 1
    assert "no layer in common" in capsys.readouterr().err


CONV_IN = ("unet", "conv_in")
XL = ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k")


def projector(matrix):
    """Onto the columns of a matrix, by its pseudo-inverse."""
    return matrix @ torch.linalg.pinv(matrix, rtol=1e-6)


@pytest.fixture
def files(tmp_path):
    """Three adapters that share some layers, at different strengths."""
    layers = [
        {
            TO_K: random_layer(TO_K, 4, 2.0, 1),
            CONV_IN: random_layer(CONV_IN, 3, 3.0, 2),
            TEXT: random_layer(TEXT, 2, 2.0, 3),
        },
        {
            TO_K: random_layer(TO_K, 6, 1.0, 4),
            CONV_IN: random_layer(CONV_IN, 5, 5.0, 5),
            TO_Q: random_layer(TO_Q, 2, 2.0, 6),
        },
        {TO_K: random_layer(TO_K, 2, 8.0, 7), TEXT: random_layer(TEXT, 4, 1.0, 8)},
    ]
    strengths = [(0.8, 0.5), (-1.5, None), (1.0, None)]
    return [
        WeightedLora(str(saved(layer, tmp_path / f"{n}.safetensors")), *strength)
        for n, (layer, strength) in enumerate(zip(layers, strengths, strict=True))
    ]


def test_all_numbers_are_those_of_the_formed_updates(files):
    report = interference_report(files)
    read = [load_adapter(Path(file.file)).layers for file in files]
    energies, kept, free = ([0.0] * 3 for _ in range(3))
    assert {row["module"] for row in report["layers"]} == {TO_K[1], CONV_IN[1], TEXT[1], TO_Q[1]}
    for row in report["layers"]:
        key = (row["part"], row["module"])
        on = [file.text_strength if key == TEXT and n == 0 else file.strength for n, file in enumerate(files)]
        deltas = {n: dense(layers[key], on[n]) for n, layers in enumerate(read) if key in layers}
        assert row["files"] == list(deltas)
        whole = sum(deltas.values())
        for place, (n, delta) in enumerate(deltas.items()):
            energy = float(delta.square().sum())
            assert row["survives"][place] == pytest.approx(float((whole * delta).sum()) / energy, rel=1e-5)
            left = delta
            others = [d for m, d in deltas.items() if m != n]
            if others:
                left = left - projector(torch.cat(others, dim=1)) @ left
                left = left - left @ projector(torch.cat(others).T)
            assert row["untouched"][place] == pytest.approx(float(left.square().sum()) / energy, rel=1e-4)
            for sums, value in zip(
                (energies, kept, free),
                (energy, float((whole * delta).sum()), float(left.square().sum())),
                strict=True,
            ):
                sums[n] += value
        for pair in row["pairs"]:
            a, b = deltas[pair["first"]], deltas[pair["second"]]
            assert pair["cosine"] == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-6)
            # The trace of the product of two projections is the sum of squared products of their bases.
            for name, one, two in (("column", a, b), ("row", a.T, b.T)):
                ranks = [int(torch.linalg.matrix_rank(m, rtol=1e-5)) for m in (one, two)]
                overlap = float((projector(one) * projector(two)).sum()) / min(ranks)
                assert pair[f"{name}_overlap"] == pytest.approx(overlap, abs=1e-5)
                assert pair[f"{name}_baseline"] == pytest.approx(max(ranks) / one.shape[0])
    for n, row in enumerate(report["files"]):
        assert row["norm"] == pytest.approx(energies[n] ** 0.5, rel=1e-5)
        assert row["survives"] == pytest.approx(kept[n] / energies[n], rel=1e-5)
        assert row["untouched"] == pytest.approx(free[n] / energies[n], rel=1e-4)


def test_what_survives_by_hand(tmp_path):
    """u v^T and -0.5 u v^T: half of the first is left, nothing is untouched; of strangers all is."""
    out, inside = shape_of(TO_K)
    draw = torch.Generator().manual_seed(0)
    u, v = orthonormal(out, 2, draw), orthonormal(inside, 2, draw)
    one = saved({TO_K: layer_of(u[:, :1], v[:, :1].T, TO_K, 1.0)}, tmp_path / "a.safetensors")
    against = saved({TO_K: layer_of(-0.5 * u[:, :1], v[:, :1].T, TO_K, 1.0)}, tmp_path / "b.safetensors")
    apart = saved({TO_K: layer_of(u[:, 1:], v[:, 1:].T, TO_K, 1.0)}, tmp_path / "c.safetensors")
    (pair,) = (report := interference_report([WeightedLora(str(one)), WeightedLora(str(against))]))["pairs"]
    assert pair["cosine"] == pytest.approx(-1)
    assert pair["column_overlap"] == pair["row_overlap"] == pytest.approx(1)
    assert report["files"][0]["survives"] == pytest.approx(0.5)
    assert report["files"][1]["survives"] == pytest.approx(-1)
    assert report["files"][0]["untouched"] == pytest.approx(0, abs=1e-9)
    report = interference_report([WeightedLora(str(one)), WeightedLora(str(apart))])
    assert report["pairs"][0]["cosine"] == pytest.approx(0, abs=1e-6)
    assert [row["survives"] for row in report["files"]] == pytest.approx([1, 1])
    assert [row["untouched"] for row in report["files"]] == pytest.approx([1, 1])


def test_no_layer_in_common(tmp_path):
    files = [
        WeightedLora(str(saved({key: random_layer(key, 2, 2.0, 0)}, tmp_path / f"{n}.safetensors")))
        for n, key in enumerate((TO_K, PROJ))
    ]
    report = interference_report(files)
    assert report["pairs"][0]["layers"] == 0
    assert [row["survives"] for row in report["files"]] == pytest.approx([1, 1])
    with pytest.raises(AdapterFileError, match="two adapters or more"):
        interference_report(files[:1])


def test_files_for_two_kinds_of_base_are_named(tmp_path):
    one = saved({TO_K: random_layer(TO_K, 2, 2.0, 0)}, tmp_path / "a.safetensors")
    two = tmp_path / "b.safetensors"
    down, up = torch.ones(2, 2048), torch.ones(640, 2)
    save_adapter(AdapterWeights({XL: LayerWeights(down, up, 2.0)}), two, FAMILIES["sdxl"])
    with pytest.raises(AdapterFileError, match=r"Embedded tiny base and .* Stable Diffusion XL; they cannot"):
        file_similarity(one, two)


def test_layers_that_are_unknown_without_the_base_are_left_out_for_all(tmp_path, capsys):
    """A DoRA's update is unknown, and so is what survives of another's there."""
    layers = {TO_K: random_layer(TO_K, 2, 2.0, 0), PROJ: random_layer(PROJ, 2, 2.0, 1)}
    plain = saved(layers, tmp_path / "plain.safetensors")
    tensors = load_file(plain)
    name = next(key for key in tensors if "attn2_to_k" in key and "lora_up" in key)
    rows = torch.ones(tensors[name].shape[0], 1)
    dora = tmp_path / "dora.safetensors"
    save_file(
        tensors | {name.replace("lora_up.weight", "dora_scale"): rows}, dora, read_header(plain).metadata
    )
    report = interference_report([WeightedLora(str(plain)), WeightedLora(str(dora))])
    assert [(row["part"], row["module"]) for row in report["layers"]] == [PROJ]
    assert [row["survives"] for row in report["files"]] == pytest.approx([2, 2])
    assert [(row["part"], row["module"]) for row in report["left_out"]] == [TO_K]
    report["left_out"] *= 140
    show_result("stack", report, {})
    assert capsys.readouterr().out.count("140 layers are left out, unet.") == 1
    one = saved({TO_K: layers[TO_K]}, tmp_path / "one.safetensors")
    only = tmp_path / "only.safetensors"
    save_file(
        load_file(one) | {name.replace("lora_up.weight", "dora_scale"): rows}, only, read_header(one).metadata
    )
    with pytest.raises(AdapterFileError, match="a DoRA or an OFT, whose update depends"):
        interference_report([WeightedLora(str(one)), WeightedLora(str(only))])


def test_the_verb_measures_too(files, tmp_path, capsys, three_pictures):
    small = saved(
        {k: random_layer(k, 2, 2.0, n, 0.01) for n, k in enumerate(LAYERS)}, tmp_path / "s.safetensors"
    )
    on = ["--dataset", str(three_pictures), "--triples", "2", "--json"]
    assert main(["stack", str(small), f"{small}:0.5", *on]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"][0]["cosine"] == pytest.approx(1)
    validation = found["validation"]
    # The same measurement by the verb `validate` of one adapter at the strengths' sum.
    assert main(["validate", "--lora", f"{small}:1.5", *on]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert validation["stack"]["gain"] == pytest.approx(alone["gain"], abs=1e-6)
    gains = [row["gain"] for row in validation["alone"]]
    assert validation["lost"]["gain"] == pytest.approx(sum(gains) - validation["stack"]["gain"])
    assert validation["against_best"]["gain"] == pytest.approx(validation["stack"]["gain"] - max(gains))
    assert f"{abs(validation['lost']['gain']):.4f}" in validation["sentence"]
    words = "less" if validation["lost"]["gain"] > 0 else "more"
    assert f"{words} than the sum of each alone" in validation["sentence"]
    assert main(["stack", str(small), f"{small}:0.5"]) == 0
    assert "survives in the stack" in capsys.readouterr().out


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
