"""Sums of adapters against dense sums worked out with nothing of the code between."""

import pytest
import torch

from lora_core.errors import AdapterFileError, ConfigError
from lora_core.lora.lycoris import LycorisUpdate
from lora_core.lora.weights import AdapterWeights, LayerWeights, LoadedLora
from lora_core.tools.merge import merge_adapters, parse_block_weights

BLOCK = "transformer_blocks.0"
TO_K = ("unet", f"down_blocks.0.attentions.0.{BLOCK}.attn2.to_k")
TO_Q = ("unet", f"mid_block.attentions.0.{BLOCK}.attn1.to_q")
CONV = ("unet", "up_blocks.1.resnets.0.conv1")
PROJ = ("unet", "up_blocks.1.attentions.0.proj_in")
TEXT = ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj")


def layer(shape, rank, alpha, seed):
    out, inside, *kernel = shape
    draw = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inside, *kernel, generator=draw)
    return LayerWeights(down, torch.randn(out, rank, *(1 for _ in kernel), generator=draw), alpha)


def first():
    return AdapterWeights(
        {
            TO_K: layer((24, 32), 4, 2.0, 1),
            TO_Q: layer((20, 20), 2, 8.0, 2),
            CONV: layer((12, 8, 3, 3), 3, 3.0, 3),
            TEXT: layer((16, 16), 4, 1.0, 4),
        }
    )


def second():
    return AdapterWeights(
        {
            TO_K: layer((24, 32), 6, 1.5, 11),
            CONV: layer((12, 8, 3, 3), 5, 0.5, 13),
            PROJ: layer((20, 20, 1, 1), 2, 2.0, 14),
            TEXT: layer((16, 16), 8, 16.0, 15),
        }
    )


def dense(adapter, key, factor=1.0):
    """factor x alpha / rank x up @ down in double precision, by einsum, or 0 where there is no such layer."""
    if key not in adapter.layers:
        return 0.0
    found = adapter.layers[key]
    up, down = found.up.double().flatten(1), found.down.double().flatten(1)
    return factor * found.alpha / found.down.shape[0] * torch.einsum("or,ri->oi", up, down)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_sum_has_no_cross_terms():
    one, two = first(), second()
    result, loss = merge_adapters([LoadedLora(one, 0.7, 0.2), LoadedLora(two, -1.3)])
    assert loss.layers == {}
    assert result.layers.keys() == one.layers.keys() | two.layers.keys()
    for key in result.layers:
        on_one = 0.2 if key == TEXT else 0.7
        close(dense(result, key), dense(one, key, on_one) + dense(two, key, -1.3))
    # What adding A to A and B to B would give is far from it.
    up = 0.7 * 0.5 * one.layers[TO_K].up.double() - 1.3 * 0.25 * two.layers[TO_K].up.double()[:, :4]
    wrong = up @ (one.layers[TO_K].down + two.layers[TO_K].down[:4]).double()
    assert (wrong - dense(result, TO_K)).norm() > 0.5 * dense(result, TO_K).norm()


def test_ranks_add_under_one_alpha():
    result, _ = merge_adapters([LoadedLora(first()), LoadedLora(second())])
    assert {key: layer.rank for key, layer in result.layers.items()} == {
        TO_K: 10, TO_Q: 2, CONV: 8, TEXT: 12, PROJ: 2,
    }  # fmt: skip
    assert {layer.alpha for layer in result.layers.values()} == {12.0}
    assert all(layer.up.dtype == layer.down.dtype == torch.float32 for layer in result.layers.values())
    assert result.layers[CONV].down.shape == (8, 8, 3, 3)
    assert result.layers[CONV].up.shape == (12, 8, 1, 1)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_rank_gives_the_best_approximation_that_there_is(rank):
    """Eckart and Young: the error is the norm of the singular values that are cut off."""
    one, two = first(), second()
    result, loss = merge_adapters([LoadedLora(one), LoadedLora(two, 0.5)], rank)
    squares, missing, shares = 0.0, 0.0, {}
    for key in result.layers:
        whole = dense(one, key) + dense(two, key, 0.5)
        u, values, vh = torch.linalg.svd(whole, full_matrices=False)
        best = u[:, :rank] * values[:rank] @ vh[:rank]
        close(dense(result, key), best)
        assert result.layers[key].rank == min(rank, int((values > 1e-6).sum()))
        cut = float(values[rank:].square().sum())
        squares, missing = squares + float(values.square().sum()), missing + cut
        shares[".".join(key)] = (cut / float(values.square().sum())) ** 0.5
    assert loss.overall == pytest.approx((missing / squares) ** 0.5, rel=1e-6)
    assert loss.worst[0] == max(shares, key=shares.get)
    assert loss.worst[1] == pytest.approx(max(shares.values()), rel=1e-6)
    assert f"{loss.overall:.2%}" in loss.sentence(rank)


def test_a_rank_that_is_high_enough_loses_nothing():
    result, loss = merge_adapters([LoadedLora(first()), LoadedLora(second())], 64)
    for key in result.layers:
        close(dense(result, key), dense(first(), key) + dense(second(), key))
    assert loss.overall < 1e-6
    assert "nothing is lost but rounding" in loss.sentence(64)
    assert result.layers[TO_K].rank == 10


def test_a_wide_merge_of_full_rank_is_exact_too():
    """More columns than the layer has rows: QR of a stack that is wider than high."""
    adapters = [LoadedLora(AdapterWeights({TO_Q: layer((20, 20), 16, 16.0, seed)}), 0.3) for seed in range(3)]
    whole = sum(dense(a.weights, TO_Q, 0.3) for a in adapters)
    close(dense(merge_adapters(adapters)[0], TO_Q), whole)
    result, loss = merge_adapters(adapters, 30)
    close(dense(result, TO_Q), whole)
    assert result.layers[TO_Q].rank == 20
    assert loss.overall < 1e-6


def test_linear_and_1x1_forms_of_one_layer():
    conv = AdapterWeights({PROJ: layer((20, 20, 1, 1), 2, 2.0, 1)})
    flat = AdapterWeights({PROJ: layer((20, 20), 3, 1.0, 2)})
    for adapters in ([conv, flat], [flat, conv]):
        result, _ = merge_adapters([LoadedLora(a) for a in adapters])
        close(dense(result, PROJ), dense(conv, PROJ) + dense(flat, PROJ))
        assert result.layers[PROJ].down.shape == (5, 20, 1, 1)
        assert result.layers[PROJ].up.shape == (20, 5, 1, 1)


@pytest.mark.parametrize("shape", [(24, 31), (23, 32), (24, 32, 3, 3)])
def test_layers_that_differ_are_refused(shape):
    other = AdapterWeights({TO_K: layer(shape, 2, 2.0, 1)})
    with pytest.raises(AdapterFileError, match=r"attn2\.to_k different shapes"):
        merge_adapters([LoadedLora(first()), LoadedLora(other)])


def test_strengths_of_zero_take_no_columns():
    result, _ = merge_adapters([LoadedLora(first(), 0.0, 1.0), LoadedLora(second())])
    assert TO_Q not in result.layers
    assert result.layers[TO_K].rank == 6
    with pytest.raises(AdapterFileError, match="nothing is left"):
        merge_adapters([LoadedLora(first(), 0.0)])


@pytest.mark.parametrize("rank", [0, -3, 5000])
def test_a_rank_that_no_layer_can_have(rank):
    with pytest.raises(ConfigError, match=f"--rank {rank}"):
        merge_adapters([LoadedLora(first())], rank)


def test_dora_is_refused():
    dora = AdapterWeights(
        {}, others={TO_K: LycorisUpdate("x", first().layers[TO_K], magnitude=torch.ones(1, 24))}
    )
    with pytest.raises(AdapterFileError, match="DoRA"):
        merge_adapters([LoadedLora(dora)])


@pytest.mark.parametrize("inline", [True, False])
def test_a_weight_for_each_block(tmp_path, inline):
    """The last row that matches counts; an unquoted dotted name of TOML is a nested table."""
    if inline:
        text = "unet=0.5, mid_block = 0, to_k=[2,-1],text_encoder=1"
    else:
        text = str(tmp_path / "blocks.toml")
        (tmp_path / "blocks.toml").write_text(
            "unet = 0.5\nmid_block = 0\n'to_(k|z)' = [2, -1]\ntext_model.encoder = 1\n"
        )
    one, two = first(), second()
    result, _ = merge_adapters([LoadedLora(one, 3.0), LoadedLora(two)], blocks=parse_block_weights(text, 2))
    assert TO_Q not in result.layers
    close(dense(result, TO_K), dense(one, TO_K, 6.0) + dense(two, TO_K, -1.0))
    close(dense(result, CONV), dense(one, CONV, 1.5) + dense(two, CONV, 0.5))
    close(dense(result, TEXT), dense(one, TEXT, 3.0) + dense(two, TEXT))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mid_blok=0.5", "'mid_blok' of --blocks matches no layer"),
        ("mid_block", "neither a TOML file nor a table"),
        ("mid_block=0.5,,", "neither a TOML file nor a table"),
        ("mid_block=half", "not a number"),
        ("mid_block=nan", "should be a number"),
        ("mid_block=true", "should be a number"),
        ("mid_block=[1,2,3]", "3 weights for 2 files"),
        ("mid_(block=1", "cannot be used: missing \\)"),
        ("nothing.toml", "does not exist"),
    ],
)
def test_a_table_that_is_none(text, words):
    with pytest.raises(ConfigError, match=words):
        merge_adapters([LoadedLora(first()), LoadedLora(second())], blocks=parse_block_weights(text, 2))


def test_a_merge_of_many_is_exact_to_a_millionth():
    adapters = [
        LoadedLora(AdapterWeights({TO_K: layer((24, 32), 2 + seed, 1.0 + seed, seed)}), 0.3 * (seed - 2))
        for seed in range(7)
    ]
    result, _ = merge_adapters(adapters)
    whole = sum(dense(a.weights, TO_K, a.strength) for a in adapters)
    assert float((dense(result, TO_K) - whole).norm() / whole.norm()) < 1e-6


def test_adapters_that_cancel_leave_nothing():
    """A - A is 0 up to rounding, which is no update of rank 2."""
    both = [LoadedLora(first(), 1.0), LoadedLora(first(), -1.0)]
    with pytest.raises(AdapterFileError, match="nothing is left"):
        merge_adapters(both, rank=2)
