"""Best strengths of curves that are known, and alphas that carry them."""

import json
import math

import pytest
import torch

from lora_core.__main__ import main
from lora_core.errors import AdapterFileError, ConfigError
from lora_core.formats.io import load_adapter, save_adapter
from lora_core.lora.lycoris import LycorisUpdate
from lora_core.lora.weights import AdapterWeights, LoadedLora
from lora_core.tools.analysis import (
    bake_strength,
    fit_strength_curve,
    fit_strengths_apart,
    measure_strength,
    scale_alphas,
)
from lora_core.tools.delta import Rewrite
from lora_core.tools.shrink import shrink_file, shrink_to_intrinsic, truncate_file
from tests.tools.planted import LAYERS, TEXT, TINY, TO_K, dense, random_layer, saved

PICTURES, LOOKS = 8, 4


def curve(best, spread=0.0, calls=None, shape=lambda x: x - x * x / 2):
    """Gains whose mean is highest at `best`; each picture has a best of its own around it."""
    draw = torch.Generator().manual_seed(0)
    own = torch.randn(PICTURES, 1, generator=draw, dtype=torch.float64)
    own = (own - own.mean()) / own.std() * spread

    def gains_at(strength):
        if calls is not None:
            calls.append(strength)
        return (
            shape(strength / (best + own)).expand(PICTURES, LOOKS)
            if spread
            else torch.full((PICTURES, LOOKS), shape(strength / best), dtype=torch.float64)
        )

    return gains_at


@pytest.mark.parametrize("best", [0.23, 0.5, 0.77, 1.0, 1.31, 2.4, 3.3])
def test_the_top_is_found_in_few_measurements(best):
    calls = []
    fit = fit_strength_curve(curve(best, calls=calls))
    assert fit.strength == pytest.approx(best, abs=0.03)
    assert fit.gain == pytest.approx(0.5, abs=2e-3)
    assert len(calls) <= 11
    assert len(set(calls)) == len(calls)


@pytest.mark.parametrize("best", [0.6, 1.1, 1.9])
def test_no_better_one_is_among_thirty_on_a_crooked_curve(best):
    """x exp(-x) rises fast and falls slowly; its top is at 1."""
    gains_at = curve(best, 0.1, shape=lambda x: x * (torch.as_tensor(-x, dtype=torch.float64)).exp())
    fit = fit_strength_curve(gains_at)
    brute = [(float(gains_at(s).mean()), s) for s in torch.linspace(0, 3, 30).tolist()]
    assert fit.gain >= max(brute)[0] - 1e-4
    assert fit.low <= max(brute)[1] <= fit.high


def test_the_interval_by_hand():
    """Gains 2ax - x^2 of pictures with tops a: mean gain 2mx - x^2, best at m.

    Against the best the loss is (x - m)^2, and its error 2|x - m| sd(a)/sqrt(n): it is within two of them up
    to
    |x - m| = 4 sd(a)/sqrt(n).
    """
    tops = torch.linspace(0.8, 1.2, PICTURES, dtype=torch.float64)[:, None]
    fit = fit_strength_curve(lambda s: (2 * tops * s - s * s).expand(PICTURES, LOOKS))
    half = 4 * float(tops.std()) / math.sqrt(PICTURES)
    assert fit.strength == pytest.approx(1.0, abs=0.02)
    assert (fit.low, fit.high) == pytest.approx((1 - half, 1 + half), abs=0.04)
    assert f"strength {fit.strength:.2f}" in fit.sentence()
    rows = {row["strength"]: row for row in fit.document()["curve"]}
    assert rows[0.0] == {"strength": 0.0, "gain": 0.0, "standard_error": 0.0}
    # At 0.5 each picture gains a - 1/4.
    assert rows[0.5]["gain"] == pytest.approx(0.75)
    assert rows[0.5]["standard_error"] == pytest.approx(float(tops.std()) / math.sqrt(PICTURES))


def test_an_adapter_that_harms():
    fit = fit_strength_curve(lambda s: torch.full((PICTURES, LOOKS), -s, dtype=torch.float64))
    assert (fit.strength, fit.gain) == (0.0, 0.0)
    assert "gains at no strength" in fit.sentence()


def test_an_adapter_that_is_far_too_weak():
    fit = fit_strength_curve(curve(40.0))
    assert fit.strength == 4.0
    assert "may be best beyond that" in fit.sentence()


def test_unet_and_text_encoders_apart():
    weights = AdapterWeights({key: random_layer(key, 2, 2.0, 0) for key in (TO_K, TEXT)})

    def measured(adapters):
        (adapter,) = adapters
        unet, text = adapter.on("unet"), adapter.on("text_encoder")
        gain = 2 * unet * 1.2 - unet**2 + 2 * text * 0.4 - text**2 - 0.1 * unet * text
        return torch.full((PICTURES, LOOKS), gain, dtype=torch.float64)

    unet, text = fit_strengths_apart(weights, measured)
    # Of the text encoders 0.4 - unet / 20 at the first unet's 0.78; of the unet then 1.2 - text / 20.
    assert text.strength == pytest.approx(0.36, abs=0.03)
    assert unet.strength == pytest.approx(1.18, abs=0.03)
    with pytest.raises(ConfigError, match="unet alone"):
        fit_strengths_apart(AdapterWeights({TO_K: weights.layers[TO_K]}), measured)


def test_a_strength_goes_into_alpha_alone():
    weights = AdapterWeights({key: random_layer(key, 2 + n, 2.0, n) for n, key in enumerate(LAYERS)})
    baked = scale_alphas(weights, 0.83, 0.4)
    for key, layer in weights.layers.items():
        strength = LoadedLora(weights, 0.83, 0.4).on(key[0])
        assert torch.equal(baked.layers[key].up, layer.up)
        assert torch.equal(baked.layers[key].down, layer.down)
        torch.testing.assert_close(dense(baked.layers[key]), dense(layer, strength))
    for strength in (0.0, -0.5, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="cannot be baked in"):
            scale_alphas(weights, strength)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_the_verb_bakes_exactly(tmp_path, capsys, three_pictures, monkeypatch, format, precision):
    layers = {key: random_layer(key, 2, 2.0, n, 0.01) for n, key in enumerate(LAYERS)}
    path, out = saved(layers, tmp_path / "a.safetensors", format, precision), tmp_path / "b.safetensors"
    gains = curve(0.83)
    monkeypatch.setattr("lora_core.evaluate.validator.Evaluator.__init__", lambda self, *rest: None)
    monkeypatch.setattr(
        "lora_core.evaluate.validator.Evaluator.gains", lambda self, adapters: gains(adapters[0].strength)
    )
    arguments = ["strength", str(path), "--dataset", str(three_pictures), "--bake", str(out), "--json"]
    assert main(arguments) == 0
    strength = json.loads(capsys.readouterr().out)["strength"]
    assert strength == pytest.approx(0.83, abs=0.02)
    before, after = load_adapter(path).layers, load_adapter(out).layers
    assert before.keys() == after.keys()
    for key, layer in before.items():
        assert torch.equal(after[key].up, layer.up)
        assert torch.equal(after[key].down, layer.down)
        assert after[key].alpha == pytest.approx(strength * layer.alpha, rel=1e-12)


def test_the_verb_measures_what_validate_does(tmp_path, capsys, three_pictures):
    path = saved(
        {key: random_layer(key, 2, 2.0, n, 0.02) for n, key in enumerate(LAYERS)}, tmp_path / "a.safetensors"
    )
    measuring = ["--dataset", str(three_pictures), "--triples", "1", "--json"]
    assert main(["strength", str(path), *measuring]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["validate", "--lora", f"{path}:1.5", *measuring]) == 0
    alone = json.loads(capsys.readouterr().out)
    (row,) = [row for row in found["curve"] if row["strength"] == 1.5]
    assert row["gain"] == pytest.approx(alone["gain"], abs=1e-9)
    assert row["standard_error"] == pytest.approx(alone["standard_error"], abs=1e-9)
    if found["strength"] <= 0:
        assert main(["strength", str(path), *measuring, "--bake", str(tmp_path / "b.safetensors")]) == 1
        assert "above 0" in capsys.readouterr().err


def test_new_tokens_are_measured_and_stay(tmp_path):
    """In the file with another strength, and in one that is cut; a gain measured without them is another."""
    layers, tokens = {TO_K: random_layer(TO_K, 4, 4.0, 0)}, {"text_encoder": {"zwx": torch.ones(2, 96)}}
    source = tmp_path / "a.safetensors"
    save_adapter(AdapterWeights(layers, tokens=tokens), source, TINY, dtype="fp32")
    seen = []

    def gains(adapters):
        seen.append(adapters[0].weights.tokens.keys() == tokens.keys())
        return torch.ones(2, 2, dtype=torch.float64)

    measure_strength(source, TINY, gains)
    bake_strength(Rewrite(source, tmp_path / "b.safetensors"), None, [0.5])
    shrink_to_intrinsic(Rewrite(source, tmp_path / "c.safetensors"), TINY, gains)
    truncate_file(Rewrite(source, tmp_path / "d.safetensors"), None, {TO_K: 1}, {})
    done = shrink_file(Rewrite(source, tmp_path / "e.safetensors"), 1)
    assert not [sentence for sentence in done if "Left out" in sentence]
    assert all(seen)
    for name in "bcde":
        kept = load_adapter(tmp_path / f"{name}.safetensors").tokens
        assert torch.equal(kept["text_encoder"]["zwx"], tokens["text_encoder"]["zwx"])


def test_another_kind_is_measured_and_not_baked(tmp_path, capsys):
    """A DoRA, whose strength is that of its whole update."""
    layer = random_layer(TO_K, 2, 2.0, 0)
    dora = LycorisUpdate("to_k", layer, magnitude=torch.ones(layer.up.shape[0], 1))
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_adapter(AdapterWeights({}, others={TO_K: dora}), source, TINY, dtype="fp32")
    gains = curve(0.77)
    found = measure_strength(source, TINY, lambda adapters: gains(adapters[0].strength))
    assert found["strengths"] == [pytest.approx(0.77, abs=0.03)]
    with pytest.raises(AdapterFileError, match=r"merge a\.safetensors .*--base BASE` makes a plain LoRA"):
        bake_strength(Rewrite(source, out), None, [0.5])
    # Before anything is measured.
    assert main(["strength", str(source), "--dataset", str(tmp_path), "--bake", str(out)]) == 1
    assert "makes a plain LoRA of it" in capsys.readouterr().err
    assert main(["compare", str(source), str(source)]) == 1
    assert "depends on the weights of its base" in capsys.readouterr().err
    assert main(["shrink", str(source), "--out", str(out), "--rank", "8", "--base", "demo"]) == 0
    assert "times larger" in capsys.readouterr().out
