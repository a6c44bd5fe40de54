"""Weights in prompts: as A1111 reads them, and to the bit as before where there are none."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_core.data.captions import check_prompt, escape_prompt, parse_prompt
from lora_core.errors import ConfigError
from lora_core.model_files.families import FAMILIES
from lora_core.models.encode import encode_prompt
from lora_core.models.load import load_base
from lora_core.models.prompts import encode_prompts
from lora_core.settings.config import RunConfig
from lora_core.train.setup import sample_prompts

CPU = torch.device("cpu")
RECORDED = json.loads(Path(__file__).with_name("a1111_prompts.json").read_text(encoding="utf-8"))
ROWS = RECORDED["rows"]
"""What A1111's own code makes of prompts on the embedded base; the file says how it was made."""


@pytest.fixture(scope="module")
def base():
    return load_base("demo", CPU, torch.float32)


def test_prompts_are_parsed_as_in_a1111():
    assert len(ROWS) >= 30
    for row in ROWS:
        theirs = tuple((words, float(weight)) for words, weight in row["parsed"])
        ours = parse_prompt(row["prompt"])
        assert (((ours, 1.0),) if isinstance(ours, str) else ours) == theirs, row["prompt"]


def test_embeddings_are_those_of_a1111(base):
    with torch.no_grad():
        for row in ROWS:
            # What has no weights is as long as asked for; A1111 reads all of it.
            ours = encode_prompts(base, row["prompt"], tokens=75 * row["chunks"])[0].context
            assert ours.shape[1] == 77 * row["chunks"], row["prompt"]
            values = ours.flatten()[:: RECORDED["stride"]]
            torch.testing.assert_close(
                values, torch.tensor(row["values"]), atol=2e-5, rtol=0, msg=row["prompt"]
            )


def test_without_weights_nothing_changes(base):
    prompt = "a red fox, snow: at night"
    with torch.no_grad():
        text, negative = encode_prompts(base, prompt, "blurry")
        assert torch.equal(text.context, encode_prompt(base, [prompt]).context)
        assert torch.equal(negative.context, encode_prompt(base, ["blurry"]).context)
        # A caption with brackets is the same text as a prompt.
        caption = r"miku (vocaloid), [:\, (smile:1.2)"
        assert parse_prompt(escape_prompt(caption)) == caption
        escaped = encode_prompts(base, escape_prompt(caption))[0]
        assert torch.equal(escaped.context, encode_prompt(base, [caption]).context)
        assert not torch.equal(escaped.context, encode_prompts(base, caption)[0].context)


def test_brackets_of_the_trigger_stay_text_in_samples():
    lines = [r"saber \(fate\), (smiling:1.2)", "on a beach --d 3"]
    config = RunConfig().changed({"dataset.trigger": "saber (fate)", "sample.prompts": lines})
    made = sample_prompts(config, [], FAMILIES["sd15"])
    assert made == [lines[0], r"saber \(fate\), on a beach --d 3"]


def test_both_prompts_of_an_image_have_one_length(base):
    with torch.no_grad():
        text, negative = encode_prompts(base, "a BREAK b BREAK c", "red")
        alone = encode_prompt(base, ["red"]).context
        empty = encode_prompt(base, [""]).context
    assert text.context.shape == negative.context.shape == (1, 3 * 77, alone.shape[-1])
    torch.testing.assert_close(negative.context, torch.cat([alone, empty, empty], dim=1))


def large_base(base):
    """As much of SDXL as encodes prompts, of toy size, with the embedded base's tokenizer."""
    torch.manual_seed(0)
    tokenizer = base.tokenizers["text_encoder"]
    how = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    first, second = CLIPTextModel(CLIPTextConfig(**how)), CLIPTextModelWithProjection(CLIPTextConfig(**how))
    return SimpleNamespace(
        family=FAMILIES["sdxl"], device=CPU, on_device=lambda part: contextlib.nullcontext(),
        text_encoders={"text_encoder": first.eval(), "text_encoder_2": second.eval()},
        tokenizers={"text_encoder": tokenizer, "text_encoder_2": tokenizer},
    )  # fmt: skip


def test_each_text_encoder_of_a_large_base_is_weighted_by_itself_and_the_pooled_is_not(base):
    base = large_base(base)
    with torch.no_grad():
        plain = encode_prompt(base, ["a red owl"])
        found = encode_prompts(base, "a (red:1.5) owl")[0]
    assert torch.equal(found.pooled, plain.pooled)
    weights = torch.ones(1, 77)
    weights[0, 2] = 1.5
    # Worked out by hand: A1111 has an emphasis of its own in each of the two encoders.
    for ours, theirs in zip(found.context.split(32, dim=-1), plain.context.split(32, dim=-1), strict=True):
        weighted = theirs * weights[..., None]
        torch.testing.assert_close(ours, weighted * theirs.mean() / weighted.mean())


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("an (owl:1.2.3)", "'1.2.3' of a prompt is not a number"),
        ("[cat:dog:0.5]", r"write \[ and \]"),
        ("a [cat|dog]", "'[cat|dog]'"),
        ("[from: 10 ]", "not supported"),
        ("([a" * 20_000 + "])" * 20_000, "more than 50 brackets at once"),
    ],
)
def test_what_cannot_be_read_as_there_is_a_sentence(prompt, words):
    with pytest.raises(ConfigError) as found:
        check_prompt(prompt)
    assert words in str(found.value)


def test_brackets_that_are_text_are_no_problem():
    for prompt in ("[a], [(b:1.2)]", r"\[a|b\]", "a|b", "(a|b:0.5)", "a: [b]"):
        check_prompt(prompt)
