"""LoRAs out of models in which one was hidden."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.__main__ import main
from lora_core.formats.io import load_adapter
from lora_core.system.files import DEMO_BASE
from lora_core.tools.delta import BaseWeights
from lora_core.tools.shrink import ShrinkTarget, extract_lora
from lora_core.tools.svd import low_rank_pair
from tests.checkpoints import write_single
from tests.tools.planted import CONV, LAYERS, TEXT, TO_K, dense, random_layer, saved

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
    assert "Nothing is lost." in said
    assert "and rank 3 would hold 99% of the change" in said


def test_a_rank_that_is_too_low_loses_the_tail(tuned, hidden):
    weights, loss, spectra = extract_lora(BaseWeights(str(tuned)), BaseWeights("demo"), ShrinkTarget(rank=1))
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
    weights, loss, _ = extract_lora(BaseWeights(str(tuned)), BaseWeights("demo"), ShrinkTarget(energy=0.8))
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

    found = extract_lora(BaseWeights(str(other)), BaseWeights("demo"), ShrinkTarget(rank=3))
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
    weights, _, _ = extract_lora(*models, ShrinkTarget(rank=2))
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
