"""Overlap of adapters against sums of formed products."""

import json
from pathlib import Path

import pytest
import torch

from lora_core.__main__ import main
from lora_core.errors import AdapterFileError
from lora_core.formats.io import load_adapter
from lora_core.generate.request import WeightedLora
from lora_core.tools.interference import interference_report
from tests.tools.planted import (
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

CONV_IN = ("unet", "conv_in")


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


def test_the_verb_measures_too(files, tmp_path, capsys, three_pictures):
    small = saved(
        {k: random_layer(k, 2, 2.0, n, 0.01) for n, k in enumerate(LAYERS)}, tmp_path / "s.safetensors"
    )
    arguments = [
        "stack",
        str(small),
        f"{small}:0.5",
        "--dataset",
        str(three_pictures),
        "--triples",
        "2",
        "--json",
    ]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"][0]["cosine"] == pytest.approx(1)
    validation = found["validation"]
    # The same measurement by the verb `validate` of one adapter at the strengths' sum.
    single = [
        "validate",
        "--lora",
        f"{small}:1.5",
        "--dataset",
        str(three_pictures),
        "--triples",
        "2",
        "--json",
    ]
    assert main(single) == 0
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
