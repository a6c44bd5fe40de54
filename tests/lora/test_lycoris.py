"""The kinds of adapters beside LoRA: their formulas, their files, and what they can start from. The expected
values are PEFT's own layers for LoHa and LoKr, equation 5 of Liu et al. 2024 for DoRA, and section 3.3 of
Qiu et al. 2023 for OFT, with the rotation where LyCORIS has it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from lora_core.errors import AdapterFileError, ConfigError
from lora_core.formats.io import load_adapter, save_adapter
from lora_core.formats.verify import verify_adapter
from lora_core.lora.inject import (
    Injected,
    adapter_weights,
    init_from_lora,
    inject,
    inject_layers,
    load_weights,
    plan_layers,
)
from lora_core.lora.layer import DropoutState, FlatParams, LoraSpec
from lora_core.lora.lycoris import DoraLayer, OftLayer, PeftLayer, layer_maker
from lora_core.lora.weights import AdapterWeights, LoadedLora, Merger
from lora_core.model_files.families import FAMILIES, LOCON, Targets
from lora_core.runs.preflight import check_kind
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import ADAPTER_KINDS, AdapterSection
from tests.tiny import tiny_output, tiny_unet

OTHERS = ("dora", "loha", "lokr", "oft")
SOME = Targets(unet=r".*(?:attn2\.to_k|proj_in|conv1|ff\.net\.2)", text="")
BASES = {
    "linear": lambda: nn.Linear(12, 18),
    "convolution": lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1),
    "1 x 1 convolution": lambda: nn.Conv2d(8, 6, 1, bias=False),
}


def layer_of(kind: str, base: Any, rank: int = 3, alpha: float = 4.0) -> Any:
    """A layer with random factors."""
    base.requires_grad_(False)
    make = layer_maker(ADAPTER_KINDS[kind].resolve())
    layer = make(base, "x", LoraSpec(rank, alpha), DropoutState(), 5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for factor in layer.trained():
            factor.add_(0.3 * torch.randn(factor.shape, generator=generator))
    return layer


def inputs(base: Any, dtype: torch.dtype) -> torch.Tensor:
    shape = (2, base.in_channels, 7, 7) if isinstance(base, nn.Conv2d) else (2, 5, base.in_features)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def product(base: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if isinstance(base, nn.Conv2d):
        return F.conv2d(x, weight, base.bias, base.stride, base.padding)
    return F.linear(x, weight, base.bias)


def dora_by_the_paper(layer: DoraLayer, x: torch.Tensor) -> torch.Tensor:
    base: Any = layer.base
    scale = layer.spec.alpha / layer.spec.rank
    merged = base.weight + scale * (layer.up.flatten(1) @ layer.down.flatten(1)).view(base.weight.shape)
    norms = merged.detach().transpose(0, 1).flatten(1).norm(dim=1)
    gain = (layer.magnitude / norms).view(1, -1, *[1] * (merged.dim() - 2))
    return product(base, x, gain * merged)


def oft_by_the_paper(layer: OftLayer, x: torch.Tensor) -> torch.Tensor:
    base: Any = layer.base
    skew = layer.oft_blocks - layer.oft_blocks.transpose(1, 2)
    eye = torch.eye(skew.shape[1], dtype=skew.dtype)
    rotation = torch.block_diag(*[(eye + q) @ torch.linalg.inv(eye - q) for q in skew])
    return product(base, x, torch.einsum("nm,n...->m...", rotation, base.weight))


def by_peft(layer: PeftLayer, x: torch.Tensor) -> torch.Tensor:
    """PEFT's forward pass on the same base with the same parameters."""
    source = layer._source[0]
    source.base_layer = layer.base
    y: torch.Tensor = source(x)
    return y


def gradients(layer: Any, y: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return list(torch.autograd.grad((y * weights).sum(), [x, *layer.trained()]))


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("shape", BASES)
def test_output_and_gradients_are_those_of_the_reference(kind: str, shape: str) -> None:
    base = BASES[shape]().double()
    layer = layer_of(kind, base).double()
    x = inputs(base, torch.float64).requires_grad_()
    y = layer(x)
    reference: Any = {"dora": dora_by_the_paper, "oft": oft_by_the_paper}.get(kind, by_peft)
    expected = reference(layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-9)
    for found, wanted in zip(gradients(layer, y, x), gradients(layer, expected, x), strict=True):
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("kind", OTHERS)
def test_flat_parameters_get_the_same_gradients(kind: str) -> None:
    """DoRA is fused as a LoRA is; the others add up into the flat gradients by autograd."""
    base: Any = BASES["convolution"]()
    layer = layer_of(kind, base)
    x = inputs(base, torch.float32).requires_grad_()
    wanted = gradients(layer, layer(x), x)
    flat = FlatParams([[layer]])
    weights = torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(2))
    for _ in range(2):
        (layer(x) * weights).sum().backward()
    flat.flush_grads()
    found = [factor.grad for factor in layer.trained()]
    for grad, once in zip(found, wanted[1:], strict=True):
        torch.testing.assert_close(grad, 2 * once, rtol=1e-4, atol=1e-5)
    assert flat.grads.count_nonzero() > 0


@pytest.mark.parametrize("kind", OTHERS)
def test_training_starts_at_the_base_and_follows_from_the_seed(kind: str) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    found = []
    for seed in (1, 1, 2):
        unet = tiny_unet(768)
        before = tiny_output(unet)
        torch.set_rng_state(state)
        injected = inject({"unet": unet}, ["unet"], SOME, LoraSpec(2, 2.0, kind=kind), seed)
        assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
        torch.testing.assert_close(tiny_output(unet), before, rtol=0, atol=0)
        found.append(torch.cat([factor.flatten() for factor in injected.parameters()]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2]) == (kind == "oft"), "which starts at no rotation"
    counted = sum(
        ADAPTER_KINDS[kind].count_parameters(2, tuple(layer.base.weight.shape))
        for layer in injected.layers.values()
    )
    assert counted == len(found[0]), "what the forecast counts"


def test_a_gain_near_one_is_not_lost_in_half_precision() -> None:
    """bf16 has no number between 1 and 1.0078."""
    base: Any = nn.Linear(64, 64)
    layer = layer_of("dora", base).requires_grad_(False)
    with torch.no_grad():
        layer.up.zero_()
        layer.magnitude.copy_(1.003 * layer._norms())
    x = inputs(base, torch.float32)
    wanted = layer(x) - base(x)
    layer.base = base.bfloat16()
    with torch.no_grad():
        layer.magnitude.copy_(1.003 * layer._norms())
    found = layer(x.bfloat16()).float() - base(x.bfloat16()).float()
    assert float((found * wanted).sum() / wanted.square().sum()) == pytest.approx(1.0, abs=0.2)


def randomized(kind: str, unet: Any, rank: int = 2) -> Injected:
    injected = inject({"unet": unet}, ["unet"], SOME, LoraSpec(rank, 1.5 * rank, kind=kind), 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for factor in injected.parameters():
            factor.add_(0.05 * torch.randn(factor.shape, generator=generator))
    return injected


ENDS = {
    "dora": {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"},
    "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
    "lokr": {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha"},
    "oft": {"oft_blocks", "alpha"},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_holds_the_adapter_under_the_names_of_lycoris(tmp_path: Path, kind: str) -> None:
    family = FAMILIES["sd15"]
    unet = tiny_unet(768)
    injected = randomized(kind, unet)
    weights, path = adapter_weights(injected), tmp_path / "x.safetensors"
    save_adapter(weights, path, family)
    assert {name.partition(".")[2] for name in load_file(path)} == ENDS[kind]
    again = load_adapter(path, plain=False)
    assert again.metadata["ss_network_module"] == "lycoris.kohya"
    before = tiny_output(unet)
    with torch.no_grad():
        for factor in injected.parameters():
            factor.zero_()
    load_weights(injected, again)
    assert torch.equal(tiny_output(unet), before), "bit for bit"
    injected.set_strength(0.0)
    base = tiny_output(unet)
    for strength in (1.0, 0.5):
        merger = Merger({"unet": unet})
        merger.apply([LoadedLora(again, strength)])
        merged = tiny_output(unet)
        merger.apply([])
        injected.set_strength(strength)
        torch.testing.assert_close(merged, tiny_output(unet), rtol=1e-4, atol=2e-5)
        injected.set_strength(0.0)
    assert torch.equal(tiny_output(unet), base)
    with pytest.raises(AdapterFileError, match="not a plain LoRA"):
        load_adapter(path)
    with pytest.raises(AdapterFileError, match=r"plain LoRA.*kohya format"):
        save_adapter(weights, path, family, "diffusers")


RUNS = json.loads((Path(__file__).parents[1] / "formats" / "loader_runs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", RUNS["kinds"])
def test_verify_says_which_tools_read_it(tmp_path: Path, kind: str) -> None:
    """As in the runs of the tools' own loaders: right up to 2e-3 of the update, the bar for fp16."""
    weights = adapter_weights(randomized(kind, tiny_unet(768)))
    path = tmp_path / "x.safetensors"
    save_adapter(weights, path, FAMILIES["sd15"], dtype="fp16")
    found = verify_adapter(path, FAMILIES["sd15"], live=weights)
    assert {tool["tool"]: tool["ok"] for tool in found["tools"]} == {
        tool: layers == 290 and error <= 2e-3
        for tool, (layers, error) in zip(RUNS["tools"], RUNS["kinds"][kind], strict=True)
    }
    written = load_adapter(path, plain=False).others
    for key, update in weights.others.items():
        weight = torch.randn(update.weight_shape, generator=torch.Generator().manual_seed(0))
        if update.magnitude is not None:
            rounded = replace(
                update, magnitude=weight.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1) * 1.01
            )
            half = replace(written[key], magnitude=rounded.magnitude)
            assert written[key].magnitude.dtype == torch.float32
        else:
            rounded, half = update, written[key]
        exact = rounded.delta(weight)
        assert (half.delta(weight) - exact).norm() <= 2e-3 * exact.norm()


@pytest.mark.parametrize("kind", OTHERS)
def test_on_a_card_the_update_is_added_to_the_frozen_weight(kind: str) -> None:
    from lora_core.backends.compact import WeightPolicy, compact_layers

    unet = tiny_unet(768)
    weights = adapter_weights(randomized(kind, tiny_unet(768)))
    merger = Merger({"unet": unet})
    merger.apply([LoadedLora(weights, 0.7)])
    expected = tiny_output(unet)
    other = tiny_unet(768)
    WeightPolicy().apply_to(other)
    assert compact_layers(other)
    merger = Merger({"unet": other})
    merger.apply([LoadedLora(weights, 0.7)])
    torch.testing.assert_close(tiny_output(other), expected, rtol=1e-4, atol=1e-5)


def start(kind: str, weights: AdapterWeights, rank: int = 2, alpha: float = 3.0) -> tuple[Any, list[str]]:
    unet = tiny_unet(768)
    injected = inject({"unet": unet}, ["unet"], SOME, LoraSpec(rank, alpha, kind=kind), 9)
    return unet, init_from_lora(injected, weights, "file")


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_of_the_kind_is_continued(kind: str) -> None:
    unet = tiny_unet(768)
    weights = adapter_weights(randomized(kind, unet))
    again, notes = start(kind, weights)
    assert torch.equal(tiny_output(again), tiny_output(unet))
    assert not notes
    assert weights.highest_rank == 2


def test_alpha_of_a_file_is_that_of_the_settings_to_the_digits_of_fp32(tmp_path: Path) -> None:
    made = inject({"unet": tiny_unet(768)}, ["unet"], SOME, LoraSpec(2, 0.3, kind="loha"), 0)
    save_adapter(adapter_weights(made), tmp_path / "x.safetensors", FAMILIES["sd15"])
    again = load_adapter(tmp_path / "x.safetensors", plain=False)
    assert start("loha", again, alpha=0.3)[1] == []
    with pytest.raises(AdapterFileError, match=r"at the scale 0\.15, and this run"):
        start("loha", again, alpha=0.31)


def test_a_dora_continues_a_lora_and_a_smaller_dora() -> None:
    for kind in ("lora", "dora"):
        unet = tiny_unet(768)
        weights = adapter_weights(randomized(kind, unet))
        again, _ = start("dora", weights, rank=4, alpha=2.0)
        torch.testing.assert_close(tiny_output(again), tiny_output(unet), rtol=1e-4, atol=1e-5)


def test_another_rank_of_a_loha_is_refused() -> None:
    weights = adapter_weights(randomized("loha", tiny_unet(768)))
    with pytest.raises(AdapterFileError, match=r"file cannot be continued: its layer .*adapter\.kind, rank"):
        start("loha", weights, rank=3)


def test_a_dora_of_rows_is_refused() -> None:
    weights = adapter_weights(randomized("dora", tiny_unet(768)))
    for key, update in weights.others.items():
        rows = torch.ones(update.weight_shape[0], 1)
        weights.others[key] = type(update)(update.name, update.low, magnitude=rows)
    with pytest.raises(AdapterFileError, match="magnitudes"):
        start("dora", weights)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("loha", "adapter.dropout", 0.1), ("lokr", "adapter.rslora", True),
        ("loha", "optimizer.lora_plus", 4.0), ("lokr", "adapter.module_dropout", 0.1),
        ("oft", "adapter.max_norm", 1.0), ("oft", "adapter.block_alphas", {"mid_block": 2.0}),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(kind: str, name: str, value: object) -> None:
    config = RunConfig().changed({"adapter.kind": kind, name: value})
    with pytest.raises(ConfigError, match=rf"{name} = .* means nothing to adapter\.kind = {kind}"):
        check_kind(config)
    check_kind(config.changed({"adapter.kind": "lora"}))


def test_a_rank_at_which_an_oft_learns_nothing_is_refused() -> None:
    for name, value in (("rank", 1), ("conv_rank", 1), ("block_ranks", {"mid_block": 1})):
        config = RunConfig().changed({"adapter.kind": "oft", f"adapter.{name}": value})
        with pytest.raises(ConfigError, match=rf"adapter\.{name}.* = 1 is too low .*set it to 2 or more"):
            check_kind(config)
        check_kind(config.changed({"adapter.kind": "lora"}))
    check_kind(RunConfig().changed({"adapter.kind": "oft", "adapter.block_ranks": {"mid_block": 0}}))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_adapter(adapter_weights(randomized("loha", tiny_unet(768))), path, FAMILIES["sd15"])
    for kind in ("lora", "dora", "lokr", "oft"):
        with pytest.raises(ConfigError, match=r"is a LoHa, which .*set adapter\.kind to loha"):
            check_kind(RunConfig().changed({"adapter.kind": kind, "adapter.init": str(path)}))
    check_kind(RunConfig().changed({"adapter.kind": "loha", "adapter.init": str(path)}))


def test_convolutions_have_a_rank_and_alpha_of_their_own() -> None:
    modules = {"unet": tiny_unet(768)}
    section = AdapterSection(rank=4, alpha=4.0, conv_rank=2, conv_alpha=1.0, block_ranks={"mid_block": 3})
    plans = plan_layers(modules, {"unet": 1e-4}, LOCON, section, {})
    specs = {name: (plan.spec.rank, plan.spec.alpha) for (_, name), plan in plans.items()}
    assert specs["down_blocks.0.resnets.0.conv1"] == (2, 1.0)
    assert specs["down_blocks.0.attentions.0.proj_in"] == (4, 4.0), "1 x 1"
    assert specs["mid_block.resnets.0.conv1"] == (3, 1.0)
    layers = inject_layers(modules, {key: plan.spec for key, plan in plans.items()}, 0).layers
    assert len(layers["unet", "down_blocks.0.resnets.0.conv1"].down) == 2
    usual = plan_layers({"unet": tiny_unet(768)}, {"unet": 1e-4}, LOCON, AdapterSection(), {})
    assert {(plan.spec.rank, plan.spec.alpha) for plan in usual.values()} == {(16, 16.0)}
