"""New tokens: how they are found in captions, what is trained, which files hold them, and what is refused."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_core.data.images import ImageRecord
from lora_core.errors import AdapterFileError, ConfigError
from lora_core.formats.io import (
    convert_adapter,
    load_adapter,
    read_tensors,
    save_adapter,
    write_tokens,
)
from lora_core.formats.kinds import bundled_tokens
from lora_core.formats.verify import inspect_file, verify_adapter
from lora_core.generate.pipeline import Pipeline
from lora_core.generate.request import GenerationRequest, WeightedLora
from lora_core.lora.inject import at_strength, merged, put_tokens, start_tokens
from lora_core.lora.weights import AdapterWeights, LayerWeights, LoadedLora, Merger
from lora_core.model_files.families import FAMILIES
from lora_core.model_files.header import read_header
from lora_core.models.encode import encode_prompt, tokenize
from lora_core.models.load import BaseModel, load_base
from lora_core.models.prompts import TokenizerWithTokens
from lora_core.runs import events
from lora_core.runs.preflight import preflight
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import NewToken, parse_new_tokens
from lora_core.system.files import tokens_folder
from lora_core.tools.svd import truncate_adapter
from lora_core.train.data import PromptCache
from lora_core.train.setup import RuntimePlan, prepare
from lora_core.train.validation import prior_set
from tests.train.runs import RANDOM, Toy, broken_at, notes, result, trained, trouble

ZWX: dict[str, Any] = {
    "adapter__new_tokens": ["zwx*2 = red dot"], "dataset__trigger": "zwx", "optimizer__token_lr": 1e-2,
}  # fmt: skip


def opened(toy: Toy) -> BaseModel:
    return load_base(str(toy.base), torch.device("cpu"), torch.float32)


def test_a_line_is_a_token_its_vectors_and_the_words_that_it_starts_from() -> None:
    lines = [" zwx = grey cat ", "my-dog*12=dog"]
    assert parse_new_tokens(lines) == [NewToken("zwx", 0, "grey cat"), NewToken("my-dog", 12, "dog")]


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (["zwx"], "has 'zwx'; write zwx = cat"),
        (["z.x = cat"], "has 'z.x = cat'"),
        (["zwx*33 = cat"], "at most 32"),
        (["zwx = "], "has 'zwx = '"),
        (["zwx = cat", "ZWX = dog"], "has the token zwx twice"),
        ([f"a{n} = cat" for n in range(7)], "has 7 tokens; every tool takes a file with at most 6"),
    ],
)
def test_a_line_that_is_none_is_refused(lines: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.new_tokens") as caught:
        RunConfig().changed({"adapter.new_tokens": lines})
    assert why in str(caught.value)


def test_a_token_is_found_by_the_ids_of_its_name_the_longest_first(shared_toy: Toy) -> None:
    plain = opened(shared_toy).tokenizers["text_encoder"]
    words = TokenizerWithTokens(plain, {"zwx": 2, "zwx-red": 1})
    ids = tokenize(plain, "a")
    assert tokenize(words, "a ZWX a zwx-red a") == [*ids, -1, -2, *ids, -3, *ids]
    assert tokenize(words, "a dot, plain") == tokenize(plain, "a dot, plain")
    assert tokenize(words, "zwxq") == tokenize(plain, "zwxq")
    assert words.eos_token_id == plain.eos_token_id


def test_a_token_that_starts_from_words_is_read_as_these_and_leaves_with_its_adapter(shared_toy: Toy) -> None:
    """One vector for each token of the words: the hidden states are those of the words, bit for bit."""
    base = opened(shared_toy)
    wanted = encode_prompt(base, ["a red dot, plain"]).context
    own = start_tokens(base, [NewToken("zwx", 0, "red dot")])
    layers = put_tokens(base, [own])
    assert torch.equal(encode_prompt(base, ["a zwx, plain"]).context, wanted)
    assert layers["text_encoder"].counts == {"zwx": len(own.tokens["text_encoder"]["zwx"])}
    put_tokens(base, [])
    assert not torch.equal(encode_prompt(base, ["a zwx, plain"]).context, wanted)
    assert torch.equal(encode_prompt(base, ["a red dot, plain"]).context, wanted)


def test_only_the_new_rows_get_a_gradient_and_it_is_that_of_autograd(own_toy: Toy) -> None:
    """Against a plain embedding table with the rows behind it; at strength 0 the token is where it began."""
    run = own_toy.run("one", **ZWX)
    session = prepare(run, run.config(), RuntimePlan.of(run, run.config()), lambda *_: None)
    state = session.state
    layer = state.injected.tokens["text_encoder"]
    with state.flat_params.mutate():
        layer.vectors.detach().add_(0.1)
    table = torch.cat([layer.base.weight, layer.vectors.detach()]).requires_grad_()
    ids = torch.tensor([[5, -1, -2, 7], [-2, -2, 0, 1]])
    direction = torch.randn(2, 4, table.shape[1], generator=torch.Generator().manual_seed(0))
    rows = torch.where(ids < 0, len(layer.base.weight) - 1 - ids, ids)
    (torch.nn.functional.embedding(rows, table) * direction).sum().backward()
    state.flat_params.zero_grad()
    (layer(ids) * direction).sum().backward()
    assert table.grad is not None
    assert torch.equal(state.flat_params.grads[-layer.vectors.numel() :], table.grad[-2:].flatten())
    assert not state.flat_params.grads[: -layer.vectors.numel()].any()
    assert layer.base.weight.grad is None
    with at_strength(state.injected, 0.0):
        assert torch.equal(layer(ids)[ids < 0], layer.start[[0, 1, 1, 1]])


def test_a_run_that_was_broken_off_ends_as_an_unbroken_one(own_toy: Toy) -> None:
    """With an average, dropout, and all else that is drawn at random."""
    more = {key.replace(".", "__"): value for key, value in RANDOM.items()}
    own = {**ZWX, **more, "save__ema": 0.9, "train__steps": 4, "save__every": 2}
    whole, broken = (own_toy.run(name, **own) for name in ("whole", "broken"))
    trained(whole)
    broken_at(broken, events.StepDone, 3)
    trained(broken)
    bits = result(whole)
    assert result(broken) == bits
    assert "bundle_emb.zwx.clip_l" in bits["export"]
    assert bits["raw export"]["bundle_emb.zwx.clip_l"] != bits["export"]["bundle_emb.zwx.clip_l"]


def test_the_tokens_are_in_the_file_and_in_one_of_their_own_and_work_in_prompts(own_toy: Toy) -> None:
    run = own_toy.run("one", **ZWX, train__steps=3, save__every=3)
    file = trained(run).export
    assert file is not None
    tokens = load_adapter(file).tokens["text_encoder"]
    assert list(tokens) == ["zwx"]
    (own,) = tokens_folder(file).iterdir()
    assert own.name == "zwx.safetensors"
    assert {name: rows.shape for name, rows in load_file(own).items()} == {"emb_params": (2, 768)}
    torch.testing.assert_close(load_file(own)["emb_params"], tokens["zwx"], atol=1e-3, rtol=1e-3)
    assert inspect_file(file)["new_tokens"] == {"zwx": 2}
    assert inspect_file(file)["extras"] == ""
    assert "zwx" in read_tensors(file)[1]["modelspec.trigger_phrase"]

    base = opened(own_toy)
    pipeline = Pipeline(base, truncate_adapter)
    request = GenerationRequest(prompt="a zwx", width=16, height=16, steps=1, seed=3, sampler="ddim")
    (checkpoint,) = run.checkpoints.glob("step-*/adapter.safetensors")
    with_file = replace(request, loras=(WeightedLora(str(checkpoint)),))
    bare, drawn, cut, again = (
        pipeline(one).tobytes()
        for one in (request, with_file, replace(request, loras=(WeightedLora(str(file), rank=2),)), request)
    )
    assert bare == again
    assert len({bare, drawn, cut}) > 1
    pipeline.set_adapters(with_file.loras)
    own_words = AdapterWeights({}, tokens=load_adapter(checkpoint).tokens)
    read = encode_prompt(base, ["a zwx"]).context
    pipeline.set_adapters(())
    put_tokens(base, [own_words])
    assert torch.equal(encode_prompt(base, ["a zwx"]).context, read)


def test_two_encoders_have_a_token_each_under_one_name(tmp_path: Path) -> None:
    """Shapes and names of SDXL: clip_l is 768 wide, clip_g 1280, as A1111 and OneTrainer have them."""
    family = FAMILIES["sdxl"]
    layer = LayerWeights(torch.ones(1, 640), torch.ones(640, 1), 1.0)
    key = ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    tokens = {"text_encoder": {"zwx": torch.ones(2, 768)}, "text_encoder_2": {"zwx": torch.ones(2, 1280)}}
    file = tmp_path / "xl.safetensors"
    save_adapter(AdapterWeights({key: layer}, tokens=tokens), file, family)
    shapes = read_header(file).shapes
    assert [tuple(shapes[f"bundle_emb.zwx.clip_{one}"]) for one in "lg"] == [(2, 768), (2, 1280)]
    found = load_adapter(file, family)
    assert {part: rows["zwx"].shape for part, rows in found.tokens.items()} == {
        part: rows["zwx"].shape for part, rows in tokens.items()
    }
    notes = convert_adapter(file, tmp_path / "new.safetensors", "diffusers")
    assert any("bundled embeddings" in note for note in notes)
    own = load_file(tmp_path / "new-tokens" / "zwx.safetensors")
    assert {name: rows.shape for name, rows in own.items()} == {"clip_l": (2, 768), "clip_g": (2, 1280)}
    assert not any("bundle_emb" in name for name in read_header(tmp_path / "new.safetensors").shapes)
    said = {row["tool"]: row for row in verify_adapter(file, family)["tools"]}
    assert (said["A1111"]["ok"], said["ComfyUI"]["ok"]) == (True, False)
    assert "in files of their own" in said["ComfyUI"]["note"]
    assert "convert it to diffusers" in said["diffusers"]["note"]


@pytest.mark.parametrize("key", ["string_to_param.*", "emb_params", "clip_l"])
def test_a_token_is_read_under_every_name_that_a1111_takes(key: str) -> None:
    found = bundled_tokens({f"bundle_emb.zwx.{key}": torch.ones(3, 768).half()})
    assert found["text_encoder"]["zwx"].shape == (3, 768)
    assert not bundled_tokens({"bundle_emb.zwx.clip_l_out": torch.ones(3, 768)})
    with pytest.raises(AdapterFileError, match="holds no vectors of a token"):
        bundled_tokens({f"bundle_emb.zwx.{key}": torch.ones(3, 3, 768)})


def test_a_token_of_another_width_is_refused(shared_toy: Toy) -> None:
    wide = AdapterWeights({}, tokens={"text_encoder": {"zwx": torch.ones(1, 1024)}})
    with pytest.raises(AdapterFileError, match="zwx is 1024 wide, the base's tokens 768; it is for another"):
        put_tokens(opened(shared_toy), [wide])


def test_two_loras_with_one_token_are_refused_unless_it_is_the_same(shared_toy: Toy) -> None:
    def with_token(token: str, value: float) -> AdapterWeights:
        return AdapterWeights({}, tokens={"text_encoder": {token: torch.full((1, 768), value)}})

    base, one = opened(shared_toy), with_token("zwx", 1.0)
    with pytest.raises(AdapterFileError, match="have a new token ZWX, each with vectors of its own"):
        put_tokens(base, [one, with_token("ZWX", 2.0)])
    layers = put_tokens(base, [one, with_token("zwx", 1.0), with_token("zwy", 2.0)])
    assert layers["text_encoder"].counts == {"zwx": 1, "zwy": 1}


def test_a_file_with_tokens_is_continued_or_told_of(own_toy: Toy) -> None:
    first = own_toy.run("first", **ZWX, train__steps=2)
    file = trained(first).export
    start = {"adapter__init": str(file), "train__steps": 1, "optimizer__token_lr": 1e-12, "save__every": 1}
    second = own_toy.run("second", **ZWX | start)
    trained(second)
    rows = [load_adapter(run.checkpoint(run.checkpoint_steps()[-1]) / "adapter.safetensors").tokens
            for run in (first, second)]  # fmt: skip
    torch.testing.assert_close(rows[0], rows[1], atol=1e-4, rtol=1e-3)
    plain = own_toy.run("plain", **start)
    trained(plain)
    assert any("new tokens that are not continued" in note and "zwx" in note for note in notes(plain))
    other = own_toy.run("other", **ZWX | start | {"adapter__new_tokens": ["zwx = dot"]})
    assert "has the new tokens" in trouble(other)


def test_what_a_run_cannot_do_with_tokens_is_said_before_it_starts(own_toy: Toy) -> None:
    def said(**changes: object) -> dict[str, bool]:
        config = own_toy.run(f"r{len(list((own_toy.home / 'runs').glob('*')))}", **changes).config()
        problems = preflight(config.changed({"name": "another"}), own_toy.home, card=lambda: None)
        return {
            one.sentence: one.blocking
            for one in problems
            if one.kind in ("tokens", "rate") or "new_tokens" in one.sentence
        }

    zwx = {"adapter__new_tokens": ["zwx = dot"]}
    (sentence,) = said(**zwx)
    assert sentence.startswith("The new token zwx is in no caption")
    assert not said(**ZWX)
    for changes, start in (
        ({"adapter__auto_rank": True}, "adapter.rank = auto cannot cut an adapter with new tokens"),
        ({"slider__positive": "red", "slider__negative": "blue"}, "A slider is trained without captions"),
    ):
        assert any(one.startswith(start) and stops for one, stops in said(**ZWX, **changes).items())
    assert said(adapter__new_tokens=["dot = zwx"]) == {
        "The new token dot is a word that the base knows, and with the LoRA means the new token everywhere. A"
        " word of your own leaves it alone.": False
    }
    assert any("cannot start from itself" in one for one in said(adapter__new_tokens=["dot = a dot"]))
    (unread,) = said(**ZWX, dataset__caption_dropout=1.0)
    assert unread.startswith("adapter.new_tokens has no effect while dataset.caption_dropout is 1")
    (two,) = said(**ZWX, optimizer__name="prodigy", optimizer__lr=1.0)
    assert "optimizer.token_lr to optimizer.lr" in two
    assert not said(**ZWX | {"optimizer__token_lr": 1.0}, optimizer__name="prodigy", optimizer__lr=1.0)
    (frozen,) = said(**ZWX, optimizer__stop_text_encoder_at=0.0)
    assert frozen.startswith("optimizer.stop_text_encoder_at = 0 keeps new tokens as they start")


def test_the_base_makes_prior_images_of_the_words_that_a_token_starts_from(shared_toy: Toy) -> None:
    """It does not know the token, and what is kept must not be what is to be learned."""
    base, text = opened(shared_toy), PromptCache(opened(shared_toy), Path(), True, 1, 75)
    records = [
        ImageRecord(Path(f"{n}.png"), 32, 32, f"zwx, a STY dot, {n}, sty-like, styx") for n in range(2)
    ]
    own = {"dataset.trigger": "zwx", "loss.prior_preservation": 1.0, "adapter.new_tokens": ["sty = red hat"]}
    made = prior_set(base, text, (Path(), ""), 32, RunConfig().changed(own), records)
    assert made is not None
    assert sorted(made.prompts) == [f"a red hat dot, {n}, red hat-like, styx" for n in range(2)]


def test_captions_are_as_long_as_the_vectors_of_their_tokens_make_them(own_toy: Toy, tmp_path: Path) -> None:
    own_toy = replace(own_toy, pictures=shutil.copytree(own_toy.pictures, tmp_path / "pictures"))
    (own_toy.pictures / "0.txt").write_text("zwx zwy zwz the end")
    for vectors, count in ((12, 0), (32, 1)):
        tokens = [f"{name}*{vectors} = dot" for name in ("zwx", "zwy", "zwz")]
        config = own_toy.run(f"r{vectors}", adapter__new_tokens=tokens).config().changed({"name": "another"})
        said = [one.sentence for one in preflight(config, own_toy.home, card=lambda: None)]
        long = [one for one in said if one.startswith("1 caption is longer than the 75 tokens")]
        assert len(long) == count
        assert all("the end” is not" in one for one in long)


def test_diffusers_reads_a_token_s_own_file_as_we_do(shared_toy: Toy, tmp_path: Path) -> None:
    """The installed library's `load_textual_inversion`, with two vectors, on the same text encoder."""
    from diffusers import StableDiffusionPipeline

    base = opened(shared_toy)
    tokens = start_tokens(base, [NewToken("zwx", 2, "red dot")])
    rows = tokens.tokens["text_encoder"]["zwx"].mul_(1.5)
    (file,) = write_tokens(tokens, tmp_path / "one.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(shared_toy.base, safety_checker=None)
    pipeline.load_textual_inversion(str(file), token="zwx")
    theirs = pipeline.encode_prompt("a zwx, plain", torch.device("cpu"), 1, False)[0]
    assert len(rows) == 2
    put_tokens(base, [tokens])
    torch.testing.assert_close(encode_prompt(base, ["a zwx, plain"]).context, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("word", ["/tmp/../x", "../up", "C:\\up", "con"])
def test_a_word_that_is_a_path_stays_in_the_folder(word: str, tmp_path: Path) -> None:
    """The word comes from a stranger's file."""
    weights = AdapterWeights({}, tokens={"text_encoder": {word: torch.ones(1, 4)}})
    (file,) = write_tokens(weights, tmp_path / "lora.safetensors")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    assert file.parent == tmp_path / "lora-tokens"
    assert file.stem.lower() != "con"


def test_two_encoders_read_a_token_as_the_words_that_it_starts_from(shared_toy: Toy) -> None:
    """SDXL's two, small, both with the end mark of old configs, which is looked for as the highest id: hidden
    states and pooled projection are those of the words, bit for bit."""
    one = opened(shared_toy)
    tokenizer, family = one.tokenizers["text_encoder"], FAMILIES["sdxl"]
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 2,
        "intermediate_size": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    encoders = {
        "text_encoder": CLIPTextModel(CLIPTextConfig(hidden_size=32, **sizes)),
        "text_encoder_2": CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=48, projection_dim=24, **sizes)
        ),
    }
    base = replace(one, family=family, text_encoders=encoders, tokenizers=dict.fromkeys(encoders, tokenizer))
    wanted = encode_prompt(base, ["a red dot, plain"])
    layers = put_tokens(base, [start_tokens(base, [NewToken("zwx", 0, "red dot")])])
    found = encode_prompt(base, ["a zwx, plain"])
    assert {part: layer.vectors.shape[1] for part, layer in layers.items()} == {
        "text_encoder": 32, "text_encoder_2": 48,
    }  # fmt: skip
    assert torch.equal(found.context, wanted.context)
    assert found.pooled is not None
    assert wanted.pooled is not None
    assert torch.equal(found.pooled, wanted.pooled)
    found.pooled.sum().backward()
    assert layers["text_encoder_2"].vectors.grad is not None


def test_tokens_go_with_another_kind_of_adapter(own_toy: Toy) -> None:
    run = own_toy.run("one", **ZWX, adapter__kind="lokr", train__steps=1, save__every=1)
    file = trained(run).export
    assert file is not None
    found = load_adapter(file, FAMILIES["sd15"], plain=False)
    assert found.others
    assert found.tokens["text_encoder"]["zwx"].shape == (2, 768)


def test_a_measurement_knows_the_tokens_wherever_a_preview_does(shared_toy: Toy) -> None:
    """At strength 0 on the UNet alone the text encoders still read them."""
    base = opened(shared_toy)
    adapter, merger = start_tokens(base, [NewToken("zwx", 1, "red")]), Merger(base.modules)
    for strengths in ((1.0, None), (0.0, 0.5), (0.0, None), (0.0, 0.0)):
        with merged(base, merger, [LoadedLora(adapter, *strengths)]):
            known = isinstance(base.tokenizers["text_encoder"], TokenizerWithTokens)
        assert known == WeightedLora("any", *strengths).acts, strengths
