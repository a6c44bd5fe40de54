"""A1111's text in a picture: written as its reader reads, read as its writer writes."""

import pytest

from app.preview.view import parse_infotext
from lora_core.generate.request import GenerationRequest, WeightedLora
from lora_core.settings.schema import SAMPLERS

HOSTILE = '<img src=x onerror="alert(1)"> {{7*7}} 😀 "quoted", Steps: 3'

# Written by A1111 1.10 in this form: see `create_infotext` in its modules/processing.py.
A1111 = """masterpiece, an owl <lora:owl style:0.8> <lora:detail:0.4:0.6>
on a branch
Negative prompt: blurry, bad
hands
Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 3121234567, Size: 512x768, \
Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Clip skip: 2, \
Lora hashes: "owl style: 0f1a, detail: 22", Version: v1.10.1"""


def test_a_text_of_a1111_is_read() -> None:
    info = parse_infotext(A1111)
    assert info.prompt == "masterpiece, an owl\non a branch"
    assert info.negative == "blurry, bad\nhands"
    assert (info.steps, info.cfg, info.seed, info.width, info.height) == (28, 6.5, 3121234567, 512, 768)
    assert (info.sampler, info.model, info.clip_skip) == ("DPM++ 2M Karras", "v1-5-pruned-emaonly", 2)
    # Its extra networks take the text encoder's strength first, then the UNet's.
    assert info.loras == (WeightedLora("owl style", 0.8), WeightedLora("detail", 0.6, 0.4))
    assert info.extra["Lora hashes"] == "owl style: 0f1a, detail: 22"


def test_named_strengths_of_a1111_are_read() -> None:
    assert parse_infotext("x <lora:a:te=0.3:unet=0.7>").loras == (WeightedLora("a", 0.7, 0.3),)
    assert parse_infotext("x <lora:a>").loras == (WeightedLora("a", 1.0),)
    assert parse_infotext("x <lora:a:much>").loras == ()


@pytest.mark.parametrize(
    ("shot", "extra"),
    [
        (GenerationRequest(prompt="an owl", sampler="euler_a", cfg=7.0, seed=1, width=128, height=128), {}),
        (GenerationRequest("a, b: c", prompt=HOSTILE, negative=HOSTILE, cfg=5.5, seed=2**63 - 1, width=96,
                           height=160, clip_skip=2,
                           loras=(WeightedLora("x y", 0.8), WeightedLora("größe", -0.5, 0.25))), {}),
        (GenerationRequest(prompt="two\nlines", negative="no\nno", steps=1, sampler="unipc", cfg=1.0,
                           width=64, height=64), {"Rows": 'prompt="a, b",c'}),
    ],
)  # fmt: skip
def test_what_is_written_is_read_back(shot: GenerationRequest, extra: dict[str, str]) -> None:
    found = parse_infotext(shot.infotext(0.7, extra))
    assert (found.sampler, found.model) == (SAMPLERS[shot.sampler].title, shot.base)
    for name in ("prompt", "negative", "loras", "steps", "cfg", "seed", "width", "height"):
        assert getattr(found, name) == getattr(shot, name)
    assert (found.cfg_rescale, found.clip_skip or 1) == (0.7, shot.clip_skip)
    assert found.extra.get("Rows") == extra.get("Rows")


def test_other_texts_are_all_prompt() -> None:
    assert parse_infotext("just words, nothing more").prompt == "just words, nothing more"
    assert parse_infotext("").prompt == ""
    assert parse_infotext('{"workflow": {"nodes": []}}').steps is None
    assert parse_infotext("Seed: 99999999999999999999999, Steps: x, Size: 9x").seed is None
    assert len(parse_infotext("a" * 10**6).prompt) <= 200_000
    parse_infotext('Steps: "' + '\\"' * 50_000)


def test_names_cannot_break_out_of_their_tag() -> None:
    assert WeightedLora("a:1> <lora:b", 1.0).tag == "<lora:a 1 lora b:1>"
