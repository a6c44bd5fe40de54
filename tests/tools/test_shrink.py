"""Smaller files against the tails of spectra, intrinsic ranks of known gains, and extracted LoRAs."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.__main__ import main
from lora_core.errors import AdapterFileError, ConfigError
from lora_core.formats.io import load_adapter
from lora_core.lora.weights import AdapterWeights, LayerKey, LayerWeights, LoadedLora
from lora_core.model_files.header import read_header
from lora_core.system.files import DEMO_BASE
from lora_core.tools.delta import BaseWeights
from lora_core.tools.shrink import (
    automatic_ranks,
    decompose,
    extract_lora,
    intrinsic_rank,
    pooled_ranks,
    pooled_ranks_of_energy,
    ranks_of_energy,
    shrink_adapter,
    truncate_to_ranks,
)
from lora_core.tools.svd import low_rank_pair
from tests.checkpoints import write_single
from tests.tools.planted import (
    CONV,
    LAYERS,
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


def layers():
    return {key: random_layer(key, 6 + n, 2.0 + n, n, 0.1 * (1 + n)) for n, key in enumerate(LAYERS)}


def values_of(layer):
    return np.linalg.svd(dense(layer).numpy(), compute_uv=False)[: layer.rank]


def error(one, two):
    """The relative difference of two adapters, formed; a layer that is left out is nothing."""
    lost = whole = 0.0
    for key, layer in one.items():
        other = dense(two[key]) if key in two else torch.zeros_like(dense(layer))
        lost += float((dense(layer) - other).square().sum())
        whole += float(dense(layer).square().sum())
    return math.sqrt(lost / whole)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_error_is_the_tail_of_the_spectrum(rank):
    before = layers()
    after, loss, _ = shrink_adapter(decompose(AdapterWeights(before)), rank=rank)
    spectra = [values_of(layer) for layer in before.values()]
    tail = math.sqrt(sum((s[rank:] ** 2).sum() for s in spectra) / sum((s**2).sum() for s in spectra))
    assert error(before, after.layers) == pytest.approx(tail, rel=1e-4)
    assert loss.overall == pytest.approx(tail, rel=1e-6)
    assert all(layer.rank == rank for layer in after.layers.values())
    assert after.layers[CONV].down.shape[1:] == before[CONV].down.shape[1:]


@pytest.mark.parametrize("share", [0.6, 0.9, 0.99])
def test_a_share_of_energy_is_kept_with_as_few_columns_as_can_be(share):
    parts = decompose(AdapterWeights(layers()))
    for key, rank in ranks_of_energy(parts, share).items():
        squares = values_of(parts.weights.layers[key]) ** 2
        assert squares[:rank].sum() >= share * squares.sum() * (1 - 1e-9)
        assert squares[: rank - 1].sum() < share * squares.sum()
    ranks = pooled_ranks_of_energy(parts, share)
    squares = np.sort(np.concatenate([values_of(layer) ** 2 for layer in layers().values()]))[::-1]
    columns = int((squares.cumsum() < share * squares.sum()).sum()) + 1
    assert sum(ranks.values()) == columns
    # Each layer keeps just those of its values that are among the largest of all.
    for key, rank in ranks.items():
        assert rank == int(
            (values_of(parts.weights.layers[key]) ** 2 >= squares[columns - 1] * (1 - 1e-6)).sum()
        )
    after, loss, said = shrink_adapter(parts, energy=share)
    assert error(layers(), after.layers) <= math.sqrt(1 - share) * (1 + 1e-6)
    numbers = sum(layer.up.numel() + layer.down.numel() for layer in after.layers.values())
    assert numbers == min(parts.parameters(ranks_of_energy(parts, share)), parts.parameters(ranks))
    assert f"{numbers:,} numbers" in said
    assert loss.overall == pytest.approx(error(layers(), after.layers), rel=1e-4)


def test_a_layer_that_keeps_nothing_is_left_out():
    parts = decompose(
        AdapterWeights({TO_K: random_layer(TO_K, 4, 4.0, 0), TO_Q: random_layer(TO_Q, 4, 4.0, 1, 1e-4)})
    )
    after, _ = truncate_to_ranks(parts, pooled_ranks(parts, 3))
    assert list(after.layers) == [TO_K]
    zero = decompose(AdapterWeights({TO_K: random_layer(TO_K, 4, 4.0, 0, 0.0)}))
    with pytest.raises(AdapterFileError, match="changes nothing"):
        shrink_adapter(zero, energy=0.9)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_the_file_keeps_format_precision_and_header(tmp_path, capsys, format):
    path, out = saved(layers(), tmp_path / "a.safetensors", format, "fp16"), tmp_path / "b.safetensors"
    assert main(["shrink", str(path), "--out", str(out), "--rank", "3"]) == 0
    said = capsys.readouterr().out
    assert f"{path.stat().st_size / out.stat().st_size:.1f} times smaller" in said
    header = read_header(out)
    assert {entry["dtype"] for key, entry in header.tensors.items() if not key.endswith(".alpha")} == {"F16"}
    assert header.metadata["modelspec.trigger_phrase"] == "zkw"
    record = json.loads(header.metadata["lora_easel.shrunk"])
    assert record["rank"] == 3
    assert record["from"]["name"] == "a"
    found = load_adapter(out).layers
    assert {layer.rank for layer in found.values()} == {3}
    assert error(load_adapter(path).layers, found) == pytest.approx(record["error"], rel=1e-3)
    wide = tmp_path / "c.safetensors"
    assert main(["shrink", str(path), "--out", str(wide), "--energy", "0.8", "--precision", "fp32"]) == 0
    assert {entry["dtype"] for entry in read_header(wide).tensors.values()} == {"F32"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank", "0"], "--rank 0 is out of range"),
        (["--energy", "1.5"], "--energy 1.5 is out of range"),
        (["--energy", "0"], "--energy 0 is out of range"),
        (["--intrinsic"], "give --dataset"),
    ],
)
def test_sizes_that_are_none(tmp_path, capsys, arguments, words):
    path = saved(layers(), tmp_path / "a.safetensors")
    assert main(["shrink", str(path), "--out", str(tmp_path / "b.safetensors"), *arguments]) == 1
    assert words in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors"]


def test_a_file_is_not_overwritten(tmp_path, capsys):
    path = saved(layers(), tmp_path / "a.safetensors")
    assert main(["shrink", str(path), "--out", str(path), "--rank", "2"]) == 1
    assert "already exists" in capsys.readouterr().err


def known_gain(useful, noise=0.0):
    """Gains of 6 pictures with 4 looks that grow with what is kept of some planted directions.

    Args:
        useful: layer to (directions (out, k), weight of each).
        noise: of each look; the same at every measurement.
    """
    draw = torch.Generator().manual_seed(0)
    scale = 1 + 0.2 * torch.randn(6, 4, generator=draw, dtype=torch.float64)

    def measured(adapters):
        (adapter,) = adapters
        gain = 0.0
        for key, (directions, weights) in useful.items():
            if key in adapter.weights.layers:
                delta = adapter.strength * dense(adapter.weights.layers[key])
                gain += float(((directions.T @ delta).norm(dim=1) * weights).sum())
        return gain * scale + noise

    return measured


def planted(ranks, columns=16):
    """Layers of rank `columns`, of whose directions only the leading ones are of use; and the measurement."""
    draw, found, useful = torch.Generator().manual_seed(1), {}, {}
    for key, rank in ranks.items():
        out, *inner = shape_of(key)
        u = orthonormal(out, columns, draw)
        v = orthonormal(torch.Size(inner).numel(), columns, draw)
        values = torch.linspace(2.0, 0.5, columns).double()
        found[key] = layer_of(u * values, v.T, key, float(columns))
        useful[key] = (u[:, :rank], 1 / values[:rank])
    return AdapterWeights(found), known_gain(useful)


def test_the_intrinsic_rank_is_found():
    """Every useful direction gives the same gain, so that 99% of it needs all of them."""
    weights, measured = planted({TO_K: 5, CONV: 5, TEXT: 5})
    smaller, found = intrinsic_rank(weights, measured)
    assert (found.trained, found.rank) == (16, 5)
    assert found.best.kept >= 0.99
    assert {layer.rank for layer in smaller.layers.values()} == {5}
    assert decompose(weights).own_parameters() / found.best.parameters == pytest.approx(16 / 5)
    assert found.best.standard_error == pytest.approx(0, abs=1e-6)
    assert found.document(3.1)["sentence"].startswith(
        "Trained at rank 16, needs 5, the file is 3.1 times smaller and keeps 100.0%"
    )
    assert len(found.tried) <= 10


def test_pooled_energies_win_where_layers_differ():
    weights, measured = planted({TO_K: 1, TO_Q: 9})
    big = {
        key: layer_of(layer.up.flatten(1) * (3 if key == TO_Q else 0.3), layer.down.flatten(1), key, 16.0)
        for key, layer in weights.layers.items()
    }
    smaller, found = intrinsic_rank(AdapterWeights(big), measured)
    assert found.rank == 9
    assert found.pooled is not None
    assert found.best.parameters < found.uniform.parameters
    assert (
        float(measured([type("At", (), {"weights": smaller, "strength": 1.0})]).mean()) >= 0.99 * found.gain
    )
    assert f"ranks of {min(r for r in found.best.ranks.values() if r)} to" in found.document(2.0)["sentence"]
    document = found.document(2.0)
    assert sum(row["rank"] for row in document["ranks"]) == sum(found.best.ranks.values())


def test_the_error_of_what_is_kept_is_paired():
    """Half of the pictures lose 10% by a cut and half nothing: kept is 95%, and its error that of these
    six."""
    weights, _ = planted({TO_K: 4})

    def measured(adapters):
        cut_down = adapters[0].weights.layers[TO_K].rank < 16
        gains = torch.ones(6, 2, dtype=torch.float64)
        return torch.where(torch.arange(6)[:, None] < 3, 0.9, 1.0) * gains if cut_down else gains

    _, found = intrinsic_rank(weights, measured, keep=0.94)
    assert found.rank == 1
    assert found.uniform.kept == pytest.approx(0.95)
    # Deviation of (0.9, 0.9, 0.9, 1, 1, 1) over sqrt(6).
    assert found.uniform.standard_error == pytest.approx(np.std([0.9] * 3 + [1.0] * 3, ddof=1) / math.sqrt(6))


def test_automatic_ranks_are_few_and_confirmed_by_draws_that_did_not_choose_them():
    """Of 3 x 16 columns the 15 useful ones are needed, and one seventh more are near enough."""
    weights, measured = planted({TO_K: 5, CONV: 5, TEXT: 5})
    asked = []

    def choose(adapters):
        asked.append(adapters)
        return measured(adapters)

    found = automatic_ranks(weights, choose, measured)
    assert 15 <= sum(found.ranks.values()) <= 15 * 1.15 + 1
    assert found.kept >= 0.99
    assert len(asked) <= 7
    # Draws that lose more: what looked enough is not, and the whole adapter stays.
    stricter = automatic_ranks(
        weights, measured, lambda a: measured(a) * (1.0 if a[0].weights.layers[TO_K].rank == 16 else 0.9)
    )
    assert stricter.kept == 1.0
    assert set(stricter.ranks.values()) == {16}


def test_automatic_ranks_need_a_gain_that_is_certain():
    weights, measured = planted({TO_K: 4})
    noisy = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    assert (
        automatic_ranks(weights, lambda adapters: 0.1 * measured(adapters).mean() + noisy, measured) is None
    )


def test_without_a_gain_there_is_nothing_to_keep():
    weights, measured = planted({TO_K: 4})
    with pytest.raises(AdapterFileError, match="gains nothing on these images"):
        intrinsic_rank(weights, lambda adapters: -measured(adapters))


def test_the_verb_measures_and_writes(tmp_path, capsys, three_pictures):
    """Random directions rarely gain; a tiny step against a worse one does: this one is trained for a
    moment."""
    path, out = trained(tmp_path, three_pictures), tmp_path / "small.safetensors"
    arguments = ["shrink", str(path), "--out", str(out), "--intrinsic", "--triples", "2", "--json"]
    assert main([*arguments, "--dataset", str(three_pictures)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trained"] == 4
    assert 1 <= found["rank"] <= 4
    assert found["kept"] >= 0.99
    assert found["times_smaller"] == pytest.approx(path.stat().st_size / out.stat().st_size)
    for name, strength in ((path, "1"), (out, "1")):
        assert (
            main(
                [
                    "validate",
                    "--lora",
                    f"{name}:{strength}",
                    "--dataset",
                    str(three_pictures),
                    "--triples",
                    "2",
                    "--json",
                ]
            )
            == 0
        )
    whole, small = (json.loads(text) for text in capsys.readouterr().out.replace("}\n{", "}\0{").split("\0"))
    assert whole["gain"] == pytest.approx(found["gain"], rel=1e-4)
    assert small["gain"] / whole["gain"] == pytest.approx(found["kept"], abs=2e-3)


def trained(folder: Path, pictures: Path) -> Path:
    """An adapter after some steps of plain gradient descent on the pictures' own looks."""
    from lora_core.data.dataset import scan
    from lora_core.evaluate.validator import encode_eval_images
    from lora_core.lora.inject import adapter_weights, inject
    from lora_core.lora.layer import LoraSpec
    from lora_core.model_files.families import ATTENTION
    from lora_core.models.encode import encode_prompt
    from lora_core.models.load import load_base

    base = load_base("demo", torch.device("cpu"), torch.float32)
    looks = encode_eval_images(base, scan(pictures).records, 2, 0)
    injected = inject(base.modules, ["unet"], ATTENTION, LoraSpec(4, 4.0), 0)
    optimizer = torch.optim.Adam(injected.parameters(), 2e-3)
    for _ in range(3):
        for picture in looks:
            noise, at = picture.draws.noise, picture.draws.timesteps
            latents = picture.latents.expand_as(noise)
            noisy, target = (
                base.noise.add_noise(latents, noise, at),
                base.noise.target(latents, noise, at),
            )
            text = encode_prompt(base, [picture.caption]).expand(len(noise))
            with torch.enable_grad():
                loss = (base.predict_noise(noisy, at, text, None) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return saved(adapter_weights(injected).layers, folder / "trained.safetensors")


def layer(key: LayerKey, values: Sequence[float], rank: int, seed: int) -> LayerWeights:
    """A layer with these singular values, in factors of a higher rank."""
    draw = torch.Generator().manual_seed(seed)
    out, inner = shape_of(key)[0], torch.Size(shape_of(key)[1:]).numel()
    mix = torch.randn(rank, len(values), generator=draw, dtype=torch.float64)
    up = orthonormal(out, len(values), draw) * torch.tensor(values, dtype=torch.float64)
    return layer_of(
        up @ torch.linalg.pinv(mix), mix @ orthonormal(inner, len(values), draw).T, key, float(rank)
    )


class Truth:
    """Gains that fall with the squared distance from a target, by picture."""

    def __init__(self, layers: dict[LayerKey, LayerWeights]) -> None:
        self.target = {key: dense(one) for key, one in layers.items()}
        self.whole = sum(float(d.square().sum()) for d in self.target.values())

    def __call__(self, adapters: Sequence[LoadedLora]) -> torch.Tensor:
        (adapter,) = adapters
        away = 0.0
        for key, target in self.target.items():
            found = adapter.weights.layers.get(key)
            away += float((target - (dense(found, adapter.strength) if found else 0.0)).square().sum())
        pictures = torch.tensor([0.8, 1.0, 1.2], dtype=torch.float64)
        return (pictures * (1 - away / self.whole))[:, None].expand(3, 4)


def test_pooled_energies_leave_out_what_does_nothing() -> None:
    """All of the gain is in one layer: a uniform rank keeps four columns of the other for nothing."""
    layers = {
        TO_K: layer(TO_K, [1.0, 1.0, 1.0, 1.0], 8, 0),
        TO_Q: layer(TO_Q, [0.01, 0.01, 0.01, 0.01], 8, 1),
    }
    _, found = intrinsic_rank(AdapterWeights(layers), Truth(layers))
    assert found.rank == 4
    assert found.pooled is not None
    assert found.pooled.ranks == {TO_K: 4, TO_Q: 0}
    assert "rank 4 and 1 of 2 layers left out" in found.document(4.0)["sentence"]
    assert found.best.kept >= 0.99


UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def hidden():
    return {key: random_layer(key, 3, 1.5, n, 0.05) for n, key in enumerate(LAYERS)}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, hidden):
    """The embedded base with an adapter merged into it by another verb, in fp32."""
    folder = tmp_path_factory.mktemp("tuned")
    wide = folder / "base"
    shutil.copytree(DEMO_BASE, wide, ignore=shutil.ignore_patterns("check", "make", "*.png"))
    for path in wide.rglob("*.safetensors"):
        save_file({key: tensor.float() for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    lora = saved(hidden, folder / "a.safetensors")
    assert main(["merge", str(lora), "--into-base", str(wide), "--out", str(folder / "tuned")]) == 0
    return folder / "tuned"


def test_what_was_hidden_comes_out(tuned, hidden, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert main(["extract", str(tuned), "--base", "demo", "--rank", "3", "--out", str(out)]) == 0
    found = load_adapter(out).layers
    assert found.keys() == hidden.keys()
    for key, layer in hidden.items():
        difference = (dense(found[key]) - dense(layer)).norm() / dense(layer).norm()
        assert float(difference) < 1e-4
    said = capsys.readouterr().out
    assert "Nothing is lost but rounding." in said
    assert "and rank 3 would hold 99% of the change" in said


def test_a_rank_that_is_too_low_loses_the_tail(tuned, hidden):
    weights, loss, spectra = extract_lora(BaseWeights(str(tuned)), BaseWeights("demo"), rank=1)
    tail = whole = 0.0
    for key, layer in hidden.items():
        values = torch.linalg.svdvals(dense(layer))
        whole, tail = whole + float(values.square().sum()), tail + float(values[1:].square().sum())
        best = (dense(layer) - dense(weights.layers[key])).square().sum()
        assert float(best) == pytest.approx(float(values[1:].square().sum()), rel=1e-3)
    assert loss.overall == pytest.approx((tail / whole) ** 0.5, rel=1e-3)
    assert spectra.rank_for(0.999) == 3


@pytest.mark.parametrize("probes", [False, True])
def test_an_energy_finds_the_rank_of_each_layer(tuned, hidden, monkeypatch, probes):
    if probes:
        monkeypatch.setattr("lora_core.tools.svd.EXACT_UP_TO", 32)
    weights, loss, _ = extract_lora(BaseWeights(str(tuned)), BaseWeights("demo"), energy=0.8)
    for key, layer in hidden.items():
        squares = torch.linalg.svdvals(dense(layer)).square()
        expected = int((squares.cumsum(0) < 0.8 * squares.sum()).sum()) + 1
        assert weights.layers[key].rank == expected
    assert loss.overall <= 0.2**0.5


def test_probes_double_until_they_hold_the_energy(monkeypatch):
    monkeypatch.setattr("lora_core.tools.svd.EXACT_UP_TO", 32)
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 100, generator=draw) @ torch.randn(100, 280, generator=draw)
    squares = torch.linalg.svdvals(matrix.double()).square()
    for share in (0.5, 0.9, 0.99, 1.0):
        (_, down), energy, _, _ = low_rank_pair(matrix, None, share)
        expected = int((squares.cumsum(0) < share * squares.sum() * (1 - 1e-9)).sum()) + 1
        assert down.shape[0] == pytest.approx(expected, abs=1 if share < 1 else 3)
        assert energy == pytest.approx(float(squares.sum()), rel=1e-5)


def test_what_cannot_be_extracted(tuned, tmp_path, capsys):
    out = tmp_path / "out.safetensors"

    def refused(*arguments):
        assert main(["extract", *map(str, arguments), "--out", str(out)]) == 1
        assert not out.exists()
        return capsys.readouterr().err

    assert "nothing to extract" in refused("demo", "--base", "demo", "--rank", "2")
    assert "--rank 0 is out of range" in refused(tuned, "--base", "demo", "--rank", "0")
    assert "--energy 2 is out of range" in refused(tuned, "--base", "demo", "--energy", "2")
    assert "does not exist" in refused(tmp_path / "no", "--base", "demo", "--rank", "2")


def test_changes_out_of_reach_are_told(tuned, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tuned, other)
    unet = load_file(other / UNET)
    unet["conv_in.weight"] = unet["conv_in.weight"] + 1.0
    save_file(unet, other / UNET, {"format": "pt"})
    from lora_core.tools.shrink import extraction_sentences

    found = extract_lora(BaseWeights(str(other)), BaseWeights("demo"), rank=3)
    assert ("unet", "conv_in") not in found[0].layers
    assert found[2].outside == pytest.approx(unet["conv_in.weight"].numel(), rel=1e-4)
    assert "layers that a LoRA does not reach" in extraction_sentences(*found)[-1]


def test_a_single_file_and_its_rounding(tmp_path):
    """Half precision against full: roundings are no change, what was changed is found."""
    base = write_single(tmp_path / "base.safetensors", "sd15")
    tensors = load_file(base)
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    rows, columns = tensors[name].shape
    change = torch.randn(rows, 2) @ torch.randn(2, columns) * 0.05
    half = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    half[name] = (tensors[name] + change).half()
    save_file(half, tmp_path / "tuned.safetensors")
    models = BaseWeights(str(tmp_path / "tuned.safetensors")), BaseWeights(str(base))
    weights, _, _ = extract_lora(*models, rank=2)
    (layer,) = weights.layers.values()
    assert float((dense(layer) - change).norm() / change.norm()) < 0.02
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert TEXT not in weights.layers
    assert CONV not in weights.layers
    assert TO_K not in weights.layers


def test_taking_out_what_was_merged_gives_the_base_back(tuned, hidden, tmp_path):
    """In fp32, to the rounding of one sum: 1e-6 of the largest weight."""
    lora = saved(hidden, tmp_path / "a.safetensors")
    out = tmp_path / "back"
    assert main(["merge", f"{lora}:-1", "--into-base", str(tuned), "--out", str(out)]) == 0
    for key in hidden:
        base = BaseWeights("demo").weight(key)
        assert float((BaseWeights(str(tuned)).weight(key) - base).norm() / base.norm()) > 1e-3
        assert float((BaseWeights(str(out)).weight(key) - base).abs().max() / base.abs().max()) < 1e-6


@pytest.mark.parametrize("given", [{}, {"rank": 2, "energy": 0.9}])
def test_a_library_user_gives_a_rank_or_an_energy(given):
    with pytest.raises(ConfigError, match="either a rank or a share"):
        shrink_adapter(decompose(AdapterWeights(layers())), **given)


def test_a_file_that_keeps_its_size_is_not_called_smaller_or_larger(tmp_path, capsys):
    """Rank 64 is more than there is."""
    path, out = saved(layers(), tmp_path / "f.safetensors"), tmp_path / "g.safetensors"
    assert main(["shrink", str(path), "--out", str(out), "--rank", "64"]) == 0
    assert "The file is about as large." in capsys.readouterr().out
