"""Which layers are adapted, how large and at which rate: numbers for all, and tables by block."""

import pytest
import torch

from lora_core.errors import ConfigError
from lora_core.lora.inject import adapter_weights, inject_layers, plan_layers
from lora_core.lora.layer import LoraSpec
from lora_core.model_files.families import ATTENTION, KOHYA, Targets
from lora_core.settings.schema import AdapterSection
from tests.tiny import tiny_text_encoder, tiny_unet

SECTION, SPEC = AdapterSection(rank=8, alpha=4.0), LoraSpec(8, 4.0)
RATES = {"unet": 1e-4, "text_encoder": 5e-5}
MIDDLE = "mid_block.attentions.0.transformer_blocks.0"


@pytest.fixture(scope="module")
def modules():
    return {"unet": tiny_unet(), "text_encoder": tiny_text_encoder()}


def _plans(modules, ranks=None, alphas=None, rates=None):
    section = AdapterSection(rank=8, alpha=4.0, block_ranks=ranks or {}, block_alphas=alphas or {})
    return plan_layers(modules, RATES, KOHYA, section, rates or {})


def test_without_tables_all_layers_are_alike(modules):
    plans = _plans(modules)
    assert len(plans) == 48 + 12
    assert {plan.spec for plan in plans.values()} == {SPEC}
    assert {(part, plan.rate) for (part, _), plan in plans.items()} == set(RATES.items())


def test_the_last_pattern_that_is_found_counts(modules):
    plans = _plans(
        modules,
        ranks={"attn1": 3, r"unet\.mid_block": 5, "attn2": 2, "text_encoder": 0, r"layers\.1.*q_proj": 6},
        alphas={"^unet": 9.0, "mid_block.*to_q$": 1.5},
    )
    shapes = {key: plan.spec for key, plan in plans.items()}
    assert shapes["unet", f"{MIDDLE}.attn1.to_q"] == LoraSpec(5, 1.5)
    assert shapes["unet", f"{MIDDLE}.attn2.to_q"] == LoraSpec(2, 1.5)
    assert shapes["unet", f"{MIDDLE}.ff.net.2"] == LoraSpec(5, 9.0)
    assert shapes["unet", "down_blocks.0.attentions.0.proj_in"] == LoraSpec(8, 9.0)
    assert [key for key in shapes if key[0] == "text_encoder"] == [
        ("text_encoder", "text_model.encoder.layers.1.self_attn.q_proj")
    ]


def test_rates_by_block_stand_above_those_of_the_parts(modules):
    plans = plan_layers(
        modules, {"unet": 0.0, "text_encoder": 5e-5}, ATTENTION, SECTION,
        {"mid_block": 2e-4, r"layers\.0": 0.0},
    )  # fmt: skip
    rates = {key: plan.rate for key, plan in plans.items()}
    assert len(rates) == 8 + 4
    assert {rate for (part, _), rate in rates.items() if part == "unet"} == {2e-4}
    assert all("mid_block" in name for part, name in rates if part == "unet")
    assert all("layers.1." in name for part, name in rates if part == "text_encoder")


def test_what_an_earlier_adapter_has_stays_in_it_untrained(modules):
    untrained = ("unet", f"{MIDDLE}.attn1.to_q")
    plans = plan_layers(
        modules, {"unet": 1e-4, "text_encoder": 0.0}, ATTENTION, SECTION, {"mid_block": 0.0},
        {untrained, ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj")},
    )  # fmt: skip
    assert plans[untrained].rate == 0.0
    assert [name for part, name in plans if "mid_block" in name] == [untrained[1]]
    # A part that is not trained at all is left alone, since its encoder may leave memory.
    assert {part for part, _ in plans} == {"unet"}


@pytest.mark.parametrize(("rank", "alpha"), [(4, 1.0), (16, 16.0), (9, 3.0)])
def test_rslora_scales_by_the_root_of_the_rank(modules, rank, alpha):
    plans = plan_layers(
        {"unet": modules["unet"]},
        {"unet": 1.0},
        ATTENTION,
        AdapterSection(rank=rank, alpha=alpha, rslora=True),
        {},
    )
    (shape,) = {plan.spec for plan in plans.values()}
    # Kalajdzievski 2023, section 3: gamma = alpha / sqrt(r).
    assert shape.alpha / shape.rank == pytest.approx(alpha / rank**0.5)


def test_the_layers_act_at_their_own_scale():
    modules = {"unet": tiny_unet()}
    plans = plan_layers(
        modules,
        {"unet": 1.0},
        ATTENTION,
        AdapterSection(rank=4, alpha=2.0, rslora=True, block_ranks={"to_q$": 16}, block_alphas={"to_k": 8.0}),
        {},
    )
    injected = inject_layers(modules, {key: plan.spec for key, plan in plans.items()}, 0)
    with torch.no_grad():
        for tensor in injected.parameters():
            tensor.normal_()
    weights = adapter_weights(injected)
    for name, scale in (("to_q", 2.0 / 4.0), ("to_k", 8.0 / 2.0), ("to_v", 2.0 / 2.0)):
        layer = injected.layers["unet", f"{MIDDLE}.attn1.{name}"]
        x = torch.randn(3, layer.weight.shape[1])
        update = scale * (x @ layer.down.T @ layer.up.T)
        torch.testing.assert_close(layer(x) - layer.base(x), update, rtol=1e-4, atol=1e-4)
        delta = weights.layers["unet", f"{MIDDLE}.attn1.{name}"].delta()
        torch.testing.assert_close(x @ delta.T, update, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("blocks", "named"),
    [
        ({"ranks": {"mid_blok": 4}}, r"adapter\.block_ranks has the pattern 'mid_blok'"),
        ({"ranks": {"mid_blok": 0}}, r"adapter\.block_ranks has the pattern 'mid_blok'"),
        ({"alphas": {"resnets": 4.0}}, r"adapter\.block_alphas has the pattern 'resnets'"),
        ({"rates": {"text_encoder_2": 1e-4}}, r"optimizer\.block_lr has the pattern 'text_encoder_2'"),
        # Found, but left out by another table.
        ({"ranks": {"mid_block": 0}, "alphas": {"mid_block": 2.0}}, r"adapter\.block_alphas"),
        ({"rates": {"mid_block": 0.0}, "ranks": {"mid_block": 2}}, r"adapter\.block_ranks"),
    ],
)
def test_a_pattern_that_does_nothing_is_named(modules, blocks, named):
    with pytest.raises(ConfigError, match=named):
        _plans(modules, **blocks)


def test_nothing_to_train_is_a_sentence(modules):
    for rates, ranks, block_lr in (
        ({"unet": 0.0, "text_encoder": 0.0}, {}, {}),
        (RATES, {}, {"": 0.0}),
        (RATES, {"": 0}, {}),
    ):
        with pytest.raises(ConfigError, match="Nothing would be trained"):
            plan_layers(modules, rates, KOHYA, AdapterSection(rank=8, block_ranks=ranks), block_lr)


def test_a_part_without_patterns_is_left_out_and_one_without_layers_is_refused(modules):
    plans = plan_layers(modules, RATES, Targets(KOHYA.unet, ""), SECTION, {})
    assert {part for part, _ in plans} == {"unet"}
    with pytest.raises(ConfigError, match="The text_encoder of this base has no layer"):
        plan_layers(modules, RATES, Targets(KOHYA.unet, "nothing"), SECTION, {})
