"""Patterns over layer names mean what they mean to `re`, and never take long."""

import contextlib
import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.settings.schema import LONGEST_PATTERN, PatternError, compile_pattern, last_matches

NAMES = [
    f"unet.{side}_blocks.{level}.attentions.{n}.transformer_blocks.0.{attention}.{layer}"
    for side in ("down", "up")
    for level in range(4)
    for n in range(3)
    for attention in ("attn1", "attn2")
    for layer in ("to_q", "to_k", "to_v", "to_out.0")
] + ["unet.mid_block.resnets.0.conv1", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"]

SINGLE = [
    "a",
    "b",
    "_",
    ".",
    r"\.",
    r"\d",
    r"\w",
    r"\W",
    "[ab]",
    "[^a]",
    "[a-c_]",
    "[]a]",
    "[{,2}]",
    r"[a\d]",
    "[-a]",
    "{",
    "]",
]
MARKS = ["^", "$", r"\b", r"\A", r"\Z", "{a}", "{}", "x{,}"]
TIMES = ["*", "+", "?", "*?", "{2}", "{1,2}", "{,2}", "{1,}", "{0}"]


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.lists(inner, max_size=4).map("".join),
        st.tuples(inner, inner).map("|".join),
        inner.map("({})".format),
        st.tuples(inner.map("(?:{})".format), st.sampled_from(TIMES)).map("".join),
        st.tuples(st.sampled_from(SINGLE), st.sampled_from(TIMES)).map("".join),
    )


expressions = st.recursive(st.sampled_from(SINGLE + MARKS), _larger, max_leaves=8)
scribbles = st.text(r"ab.*+?|()[]{}^$\d-,1:", max_size=12)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(expressions | scribbles, st.text("abc_.0 -", max_size=8))
def test_a_pattern_means_what_it_means_to_re(text: str, name: str) -> None:
    with warnings.catch_warnings(action="ignore"), contextlib.suppress(re.error, PatternError):
        wanted = re.search(text, name) is not None
        assert (compile_pattern(text).search(name) is not None) == wanted


@pytest.mark.parametrize("text", [*SINGLE, *MARKS, *TIMES[1:]])
def test_no_usual_pattern_is_refused(text: str) -> None:
    compile_pattern(text if text not in TIMES else f"a{text}")


@pytest.mark.parametrize(
    "text",
    [
        "mid_block", r"\.conv[12]$|samplers.*\.conv$", r"unet\..*attn1", "down_blocks.[12]",
        r"attn[12]\.to_q", "(^|\\.)attn2", r"layers\.(?:0|1)\.", "up_blocks.*to_out.0$", "a b'",
    ],
)  # fmt: skip
def test_usual_patterns_find_the_layers_that_re_finds(text: str) -> None:
    assert last_matches({text: 1}, NAMES) == {name: 1 for name in NAMES if re.search(text, name)}


def test_of_several_patterns_the_last_counts() -> None:
    found = last_matches(
        {"unet": 1, "attn2": 2, "to_q": 3}, ["unet.attn2.to_q", "unet.attn2.to_k", "te.q_proj"]
    )
    assert found == {"unet.attn2.to_q": 3, "unet.attn2.to_k": 2}


@pytest.mark.parametrize(
    "text",
    [
        "([a-z0-9_.]+)+!", r"(\w+\s?)*!", "(a|a)*(a|aa)*!", "(.*)*x!", ".*.*.*.*.*.*.*.*.*.*!", "(x+x+)+y",
        "(.?){60}!",
        "(((.+)+)+)+!", r"(\w*_\w*)*!", "(a|b|[a-z.])*o(_|.){40}!", "((.|..)+)+!", "^(.|.|.|.)*$!",
    ],
)  # fmt: skip
def test_no_pattern_takes_long(text: str) -> None:
    """Each of these keeps `re` busy for minutes or for ever on one such name."""
    begun = time.process_time()
    assert last_matches({text: 1}, [*NAMES, "a" * 500, "unet." + "a_" * 300]) == {}
    assert time.process_time() - begun < 2.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(?=a)", r"\(\?=.*without look-around"),
        (r"(a)\1", r"invalid escape sequence: \\1.*without look-around and back-references"),
        ("a*+", "bad repetition"),
        ("(a", "missing \\)"),
        ("a)", "unexpected \\)"),
        ("[a", "missing ]"),
        ("a\\", "trailing"),
        ("*", "no argument for repetition"),
        ("a**", "bad repetition"),
        ("a{2,1}", "invalid repetition size"),
        ("((((){300}){300}){300}){300}", "invalid repetition size"),
        ("\udcff", "UTF-8"),
        ("a" * (LONGEST_PATTERN + 1), "longer than"),
    ],
)
def test_what_cannot_be_matched_in_linear_time_is_refused(text: str, reason: str) -> None:
    with pytest.raises(PatternError, match=reason):
        compile_pattern(text)
