"""The base picker: what a base is said to be, what choosing it does to the form; and the token meter."""

from pathlib import Path

import pytest

from app.dataset.gallery import count_caption_tokens, warn_of_long_captions
from app.state import AppState, OtherTools, take_snapshot
from app.train.form import Plan, current_values, form_values, preset_config
from app.train.start import blockers, facts
from app.train.train_form import base_choices, base_note, choose_base
from lora_core.model_files.detect import lookup_base
from lora_core.model_files.sizes import HEADER_A_LAYER, export_bytes
from lora_core.settings.config import RunConfig
from lora_core.system.other_tools import InstalledTool, Machine, RecentPaths, find_tools
from tests.app.bases import UNET, checkpoint, write_header


def draft_of(app_state: AppState) -> dict[str, object]:
    return current_values(app_state.project)


def choose(app_state: AppState, name: str) -> tuple[str, dict[str, object]]:
    said, level, values = choose_base(app_state, {**draft_of(app_state), "model.base": name})
    app_state.project.update_draft(values=values, level=level)
    return said, values


def test_the_embedded_base_is_described_from_its_files() -> None:
    found = lookup_base("demo")
    assert found.embedded
    assert found.facts is not None
    assert (found.problem, found.resolution, found.multiple) == ("", 128, 32)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("sd15", ("Stable Diffusion 1.x, trained at 512 px, predicts noise (a guess",)),
        (
            "sd2",
            ("Stable Diffusion 2.x, trained at 768 px, predicts velocity", "a guess", "change Prediction"),
        ),
        ("sdxl", ("Stable Diffusion XL, trained at 1024 px, predicts noise (a guess", "change Prediction")),
    ],
)
def test_a_single_file_says_what_it_is(tmp_path: Path, family: str, words: tuple[str, ...]) -> None:
    found = lookup_base(str(checkpoint(tmp_path / "böse base.safetensors", family)))
    assert found.problem == ""
    assert all(word in found.sentence for word in words)
    assert found.guessed


def test_the_prediction_that_was_set_counts(tmp_path: Path) -> None:
    file = str(checkpoint(tmp_path / "two.safetensors", "sd2"))
    found = lookup_base(file, "epsilon")
    assert "512 px, predicts noise (as set)" in found.sentence
    assert not found.guessed


@pytest.mark.parametrize("kind", ["missing", "html", "flux", "upscaling", "folder", "hub"])
def test_what_cannot_be_used_is_a_sentence(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "x.safetensors"
    if kind == "html":
        file.write_text("<!doctype html><html>" + " " * 100)
    elif kind == "flux":
        write_header(file, {"double_blocks.0.img_attn.norm.key_norm.scale": [128]})
    elif kind == "upscaling":
        checkpoint(file, "sd15", **{f"{UNET}input_blocks.0.0.weight": [320, 7, 3, 3]})
    elif kind == "folder":
        file = tmp_path
    found = lookup_base("nobody/nothing-here" if kind == "hub" else str(file))
    words = {
        "missing": "does not exist",
        "html": "a web page",
        "flux": "a Flux model",
        "upscaling": "an upscaling model",
        "folder": "not a diffusers model",
        "hub": "hub cache",
    }
    assert found.facts is None
    assert words[kind] in found.problem
    assert found.sentence == found.problem
    assert (found.resolution, found.multiple) == (512, 64)


def test_a_large_base_brings_its_starting_values(app_state: AppState, tmp_path: Path) -> None:
    xl, one = (
        checkpoint(tmp_path / "xl.safetensors", "sdxl"),
        checkpoint(tmp_path / "one.safetensors", "sd15"),
    )
    app_state.project.update_draft(goal="character", level="balanced")
    assert draft_of(app_state)["optimizer.text_encoder_lr"] == 5e-5
    values = {**draft_of(app_state), "train.resolution": 512, "optimizer.lr": 3e-4}
    app_state.project.update_draft(values=values)
    said, values = choose(app_state, str(xl))
    assert said == ""
    assert values["optimizer.text_encoder_lr"] == 0
    assert values["train.resolution"] == 0
    assert values["optimizer.lr"] == 3e-4
    snapshot = take_snapshot(app_state)
    assert snapshot.plan.preset.optimizer.text_encoder_lr == 0
    assert "starts with Text encoder rate 0." in base_note(snapshot)
    assert "1024 px" in base_note(snapshot)
    _, back = choose(app_state, str(one))
    assert back["optimizer.text_encoder_lr"] == 5e-5
    assert "starts with" not in base_note(take_snapshot(app_state))
    assert app_state.places.read("bases") == [str(one), str(xl)]


def test_the_demo_s_preset_is_for_the_embedded_base_alone(app_state: AppState, tmp_path: Path) -> None:
    app_state.project.update_draft(dataset="demo", level="demo", goal="style", values={})
    assert (draft_of(app_state)["optimizer.lr"], draft_of(app_state)["train.precision"]) == (3e-3, "fp32")
    _, values = choose(app_state, str(checkpoint(tmp_path / "one.safetensors", "sd15")))
    assert (values["optimizer.lr"], values["train.precision"]) == (1e-4, "auto")
    assert app_state.project.draft()["level"] == "balanced"


def test_a_base_below_a_home_that_nobody_has_is_a_sentence(app_state: AppState) -> None:
    app_state.project.update_draft(values={"model.base": "~no-such-user/base.safetensors"})
    snapshot = take_snapshot(app_state)
    assert "does not exist" in snapshot.plan.base.problem
    assert blockers(snapshot)


def test_a_refused_base_stands_in_the_way(app_state: AppState, tmp_path: Path) -> None:
    file = tmp_path / "<b>x.safetensors"
    file.write_text("<html>")
    before = draft_of(app_state)
    assert choose(app_state, str(file)) == ("", {**before, "model.base": str(file)})
    snapshot = take_snapshot(app_state)
    html = facts(snapshot)
    assert 'data-field="model.base"' in html
    assert "<b>" not in html
    assert snapshot.plan.base.problem in blockers(snapshot)
    assert app_state.places.read("bases") == []


def test_a_folder_full_of_bases_is_remembered_and_offered(app_state: AppState, tmp_path: Path) -> None:
    folder = tmp_path / "my bases"
    file = checkpoint(folder / "sub" / "one.safetensors", "sd15", size=150_000_000)
    app_state.tools = OtherTools(app_state.places, lambda extra: find_tools(extra, Machine(())))
    said, values = choose(app_state, str(folder))
    assert "1 model found" in said
    assert values["model.base"] == "demo"
    assert app_state.places.read("folders") == [str(folder)]
    assert ("my bases: sub/one.safetensors", str(file)) in base_choices(app_state)


def test_the_list_names_each_base_once(app_state: AppState, tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "ComfyUI" / "models" / "one.safetensors", "sd15", size=150_000_000)
    tools = [InstalledTool(name, file.parents[1], (file.parent,), None) for name in ("ComfyUI", "Other")]
    app_state.tools = OtherTools(app_state.places, lambda extra: tools)
    app_state.tools.look(wait=True)
    assert base_choices(app_state)[1:] == [("ComfyUI: one.safetensors", str(file))]
    app_state.places.keep("bases", str(file))
    app_state.places.keep("bases", str(tmp_path / "gone.safetensors"))
    app_state.places.keep("bases", str(checkpoint(tmp_path / "two.safetensors", "sd15")))
    assert [words for words, _ in base_choices(app_state)[1:]] == [
        "two.safetensors",
        "ComfyUI: one.safetensors",
    ]


def test_places_survive_and_a_broken_file_counts_as_empty(tmp_path: Path) -> None:
    places = RecentPaths(tmp_path / "places.json")
    for index in range(40):
        places.keep("bases", f"/ä/{index}")
    places.keep("lora_folders", str(tmp_path / "loras"))
    again = RecentPaths(tmp_path / "places.json")
    assert again.read("bases")[:2] == ["/ä/39", "/ä/38"]
    assert len(again.read("bases")) == 24
    assert again.read("lora_folders") == [str(tmp_path / "loras")]
    for text in ("{", "[]", '{"bases": [1, {}], "folders": "x"}'):
        (tmp_path / "places.json").write_text(text)
        assert RecentPaths(tmp_path / "places.json").read("bases") == []


def test_a_search_that_fails_leaves_the_last_result(tmp_path: Path) -> None:
    tools = OtherTools(
        RecentPaths(tmp_path / "p.json"), lambda extra: [InstalledTool("A", tmp_path, (), tmp_path)]
    )
    tools.look(wait=True)
    assert tools.lora_folders() == [("A", tmp_path)]
    tools.look(wait=True)


def config(**changes: object) -> RunConfig:
    rates = {"optimizer.text_encoder_lr": 0.0, "adapter.rank": 4}
    return RunConfig().changed(rates | {name.replace("__", "."): value for name, value in changes.items()})


def test_file_size_is_rank_times_both_sides(tmp_path: Path) -> None:
    facts = lookup_base(str(checkpoint(tmp_path / "one.safetensors", "sd15"))).facts
    assert facts is not None
    attention = (320 + 320) + (768 + 320)
    assert export_bytes(facts, config()) == 2 * 4 * attention + 2 * HEADER_A_LAYER
    kohya = attention + (4 * 320 + 320)
    assert export_bytes(facts, config(adapter__targets="kohya")) == 2 * 4 * kohya + 3 * HEADER_A_LAYER
    conv = kohya + (320 * 9 + 320)
    assert export_bytes(facts, config(adapter__targets="locon")) == 2 * 4 * conv + 4 * HEADER_A_LAYER
    blocks = {"adapter.block_ranks": {"attn2": 16, r"to_k$": 2}}
    sides = 16 * 640 + 2 * (768 + 320)
    assert export_bytes(facts, config(**blocks)) == 2 * sides + 2 * HEADER_A_LAYER


def test_text_encoders_of_single_files_count_with_their_rates(tmp_path: Path) -> None:
    """12 layers of width 768 and 32 of width 1280, four projections each: the models' cards."""
    facts = lookup_base(str(checkpoint(tmp_path / "xl.safetensors", "sdxl"))).facts
    assert facts is not None
    alone = export_bytes(facts, config())
    first = export_bytes(facts, config(optimizer__text_encoder_lr=1e-5))
    both = export_bytes(facts, config(optimizer__text_encoder_lr=1e-5, optimizer__text_encoder_2_lr=1e-5))
    assert alone is not None
    assert first is not None
    assert both is not None
    assert first - alone == 12 * 4 * (2 * 4 * 2 * 768 + HEADER_A_LAYER)
    assert both - first == 32 * 4 * (2 * 4 * 2 * 1280 + HEADER_A_LAYER)


def test_the_embedded_base_s_file_is_as_large_as_it_is_said_to_be() -> None:
    """An export of the demo, rank 8 on all layers of both parts, with a picture in its header: 1,013,592
    bytes."""
    facts = lookup_base("demo").facts
    assert facts is not None
    size = export_bytes(facts, preset_config("style", "demo"))
    assert size == pytest.approx(1_013_592, rel=0.05)


def test_unknown_kinds_have_no_size(tmp_path: Path) -> None:
    (tmp_path / "old.ckpt").write_bytes(b"PK\x03\x04")
    facts = lookup_base(str(tmp_path / "old.ckpt")).facts
    assert facts is not None
    assert export_bytes(facts, config()) is None


def plan_with(app_state: AppState, **changes: object) -> Plan:
    values = form_values(preset_config("style", "balanced"))
    app_state.project.update_draft(values=values | {n.replace("__", "."): v for n, v in changes.items()})
    return Plan(app_state.project)


def test_the_meter_counts_with_the_base_s_tokenizer(app_state: AppState, tmp_path: Path) -> None:
    """CLIP makes one token of each of these words, and of each comma (the published vocabulary)."""
    file = str(checkpoint(tmp_path / "one.safetensors", "sd15"))
    caption = ", ".join(["dog"] * 40)
    found = count_caption_tokens(caption, plan_with(app_state, model__base=file))
    assert (found.tokens, found.limit) == (79, 75)
    assert found.cut == ", dog, dog"
    found = count_caption_tokens(caption, plan_with(app_state, model__base=file, train__max_token_length=150))
    assert (found.tokens, found.limit, found.cut) == (79, 150, "")


def test_the_meter_counts_what_is_drawn(app_state: AppState, tmp_path: Path) -> None:
    plan = plan_with(app_state, model__base=str(checkpoint(tmp_path / "one.safetensors", "sd15")))
    assert count_caption_tokens("a {red|very very red} dog\ncat", plan).tokens == 5
    assert count_caption_tokens("", plan).tokens == 0
    app_state.project.update_draft(trigger="blue cat")
    assert count_caption_tokens("dog", Plan(app_state.project)).tokens == 4


def test_captions_that_are_cut_are_named(app_state: AppState, pictures: list[Path]) -> None:
    plan = plan_with(app_state)
    assert warn_of_long_captions(app_state.project.dataset(), plan) == ""
    app_state.project.save_caption(pictures[0].name, "dog " * 90)
    said = warn_of_long_captions(app_state.project.dataset(), plan)
    assert said.startswith("1 caption longer than the 75 tokens that are read (picture-0.png)")
    assert "150" in said or "225" in said
    # Of 140 tokens 131 are read, as the first chunk of 75 ends at its last comma, the 56th.
    app_state.project.save_caption(pictures[0].name, "dog " * 55 + ", " + "dog " * 84)
    said = warn_of_long_captions(
        app_state.project.dataset(), plan_with(app_state, train__max_token_length=150)
    )
    assert said.startswith("1 caption longer than the 150 tokens that are read (picture-0.png)")
