"""Captions judged by the base, and words proposed for a trigger; the base is real and follows its prompts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.__main__ import main
from lora_core.data.dataset import split_holdout
from lora_core.data.images import ImageRecord
from lora_core.errors import DatasetError, RunError
from lora_core.evaluate.caption_scores import (
    image_rows,
    mark_outliers,
    measure_run_images,
    num_tokens,
    propose_triggers,
    score_captions,
    trigger_candidates,
)
from lora_core.evaluate.validator import validation_report
from lora_core.formats.io import save_adapter
from lora_core.lora.weights import AdapterWeights, LayerWeights, LoadedLora
from lora_core.models.load import BaseModel
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.system.files import DEMO_TRAIN


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [Path(row["picture"]).name for row in rows]


def test_two_swapped_captions_are_found_and_each_one_s_own_is_named(
    demo_base: BaseModel, swapped: list[ImageRecord]
) -> None:
    told: list[tuple[int, int]] = []
    found = score_captions(demo_base, swapped, draws=2, on_progress=lambda *how: told.append(how))
    one, other = swapped[1], swapped[4]
    assert set(names(found["rows"][:2])) == {one.path.name, other.path.name}
    for row in found["rows"][:2]:
        right = other if row["picture"] == str(one.path) else one
        assert row["suspect"]
        # The caption that fits better stands with the picture that it was swapped with.
        assert row["better"]["picture"] == str(right.path)
        assert row["better"]["caption"] == right.caption
        assert row["better"]["by"] > 2 * row["better"]["error"]
        assert right.path.name in row["sentence"]
        assert row["fits"] < 0
    assert [row["suspect"] for row in found["rows"][2:]] == [False] * 4
    done = [done for done, _ in told]
    assert done == sorted(done)
    assert len({total for _, total in told}) == 1


def test_right_captions_are_left_alone(demo_base: BaseModel, checked: list[ImageRecord]) -> None:
    checked = checked[:5]
    found = score_captions(demo_base, checked, draws=2)
    assert [row for row in found["rows"] if row["suspect"] or row["better"]] == []
    assert found["helped"] > 2 * found["standard_error"]
    # The same losses as the verb `validate` has for the same pictures and looks.
    loss = sum(row["loss"] for row in found["rows"]) / len(checked)
    assert loss == pytest.approx(validation_report(demo_base, checked, [], draws=2)["base_loss"], rel=1e-5)


def test_the_same_twice_and_cancelled_in_between(demo_base: BaseModel, checked: list[ImageRecord]) -> None:
    first = score_captions(demo_base, checked[:3], draws=2)
    assert score_captions(demo_base, checked[:3], draws=2) == first

    def said(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_captions(demo_base, checked[:3], draws=2, on_progress=said)


def test_captions_that_are_all_the_same_cannot_be_compared(
    demo_base: BaseModel, checked: list[ImageRecord]
) -> None:
    same = [replace(record, caption="a thing") for record in checked[:3]]
    with pytest.raises(DatasetError, match="at least two images with different captions"):
        score_captions(demo_base, same)


def test_candidates_are_short_and_new(demo_base: BaseModel) -> None:
    found = trigger_candidates(demo_base, ["a sks dog"], 0)
    assert "sks" not in found
    assert len(found) == len(set(found)) > 10
    assert all(num_tokens(demo_base, word) <= 3 and word.isascii() and word.islower() for word in found)
    assert trigger_candidates(demo_base, ["a sks dog"], 0) == found
    assert trigger_candidates(demo_base, ["a sks dog"], 1) != found


def test_words_are_ranked_by_how_little_the_base_reacts(
    demo_base: BaseModel, checked: list[ImageRecord]
) -> None:
    found = propose_triggers(demo_base, checked[:2], given="whale", draws=2)
    reactions = [row["reaction"] for row in found["rows"]]
    assert reactions == sorted(reactions)
    assert [row["word"] for row in found["rows"] if row["given"]] == ["whale"]
    best, whale = found["rows"][0], next(row for row in found["rows"] if row["given"])
    assert best["reaction"] < whale["reaction"]
    assert f"“{best['word']}”" in whale["sentence"]
    assert propose_triggers(demo_base, checked[:2], given="whale", draws=2) == found


def test_a_word_that_the_encoder_cannot_tell_from_nothing_would_be_the_best(
    demo_base: BaseModel, checked: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: an encoder that does not see one of the words."""
    from lora_core.evaluate import caption_scores as triggers
    from lora_core.models import encode

    hidden, *_ = trigger_candidates(demo_base, [record.caption for record in checked[:2]], 0)[5:]

    def blind(base: BaseModel, captions: list[str], *more: int) -> encode.PromptEmbeds:
        seen = [caption.removeprefix(f"{hidden}, ") for caption in captions]
        return encode.encode_prompt(base, seen, *more)

    monkeypatch.setattr(triggers, "encode_prompt", blind)
    found = propose_triggers(demo_base, checked[:2], draws=2)
    assert found["rows"][0]["word"] == hidden
    assert found["rows"][0]["reaction"] == pytest.approx(0.0, abs=1e-6)
    assert found["rows"][1]["reaction"] > 0.01


def test_no_pictures_no_words(demo_base: BaseModel) -> None:
    with pytest.raises(DatasetError, match="needs images"):
        propose_triggers(demo_base, [])
    assert torch.is_grad_enabled()


LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"


def planted(size: float) -> AdapterWeights:
    draw = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 128, generator=draw), size * torch.randn(96, 2, generator=draw)
    return AdapterWeights({("unet", LAYER): LayerWeights(down, up, 2.0)})


CONFIG = RunConfig().changed({"train.batch_size": 2, "dataset.caption_dropout": 0.5})


def test_an_adapter_of_zeros_gains_exactly_nothing_and_a_wrong_caption_still_shows(
    demo_base: BaseModel, checked: list[ImageRecord]
) -> None:
    wrong = replace(checked[3], caption=checked[6].caption)
    records = [*checked[:3], wrong, *checked[4:]]
    rows = image_rows(demo_base, records, planted(0.0), CONFIG, draws=4)
    assert [row["gain"] for row in rows] == [0.0] * 8
    assert [row["picture"] for row in rows if row["suspect"]] == [str(wrong.path)]
    assert rows[0]["picture"] == str(wrong.path)
    assert "does not help the trained model" in rows[0]["sentence"]
    assert rows[0]["helps"] < 0 < min(row["helps"] for row in rows[1:])


def test_gains_shares_and_who_is_held_out(demo_base: BaseModel, checked: list[ImageRecord]) -> None:
    told: list[tuple[int, int]] = []
    checked = [replace(one, held_out=number < 2) for number, one in enumerate(checked)]
    rows = image_rows(
        demo_base, checked, planted(0.02), CONFIG, draws=2, on_progress=lambda *how: told.append(how)
    )
    assert sum(row["held_out"] for row in rows) == 2
    assert {row["share"] for row in rows if row["held_out"]} == {0.0}
    assert [row["share"] for row in rows if not row["held_out"]] == pytest.approx([1 / 6] * 6)
    # The verb `validate` measures the same adapter on the same looks, and says it for all pictures together.
    whole = validation_report(demo_base, checked, [LoadedLora(planted(0.02))], draws=2, seed=CONFIG.seed)
    assert whole["gain"] != 0
    assert sum(row["gain"] for row in rows) / 8 == pytest.approx(whole["gain"], rel=1e-4)
    assert sum(row["base_loss"] for row in rows) / 8 == pytest.approx(whole["base_loss"], rel=1e-5)
    for row in rows:
        assert row["learned"] == pytest.approx(row["gain"] / row["base_loss"])
        assert row["gain"] == pytest.approx(row["base_loss"] - row["adapted_loss"], abs=1e-9)
    assert told[-1] == (32, 32)
    # The base is as it was.
    assert validation_report(demo_base, checked, [], draws=2)["base_loss"] == pytest.approx(
        whole["base_loss"]
    )


def row(name: str, learned: float, helps: float | None, held: bool = False) -> dict[str, Any]:
    return {
        "picture": name, "learned": learned, "base_loss": 1.0, "standard_error": 0.02, "helps": helps,
        "helps_error": None if helps is None else 0.02, "held_out": held, "suspect": False, "sentence": "",
    }  # fmt: skip


def test_who_stands_out() -> None:
    usual = [row(f"{n}.png", 0.5 + 0.02 * n, 0.2 + 0.01 * n) for n in range(6)]
    mark_outliers(usual)
    assert not any(one["suspect"] for one in usual)
    rows = [*usual, row("off.png", 0.05, 0.2), row("wrong.png", 0.7, -0.1), row("bare.png", 0.5, None)]
    # Held-out pictures are expected to have less.
    rows.append(row("held.png", 0.05, 0.2, held=True))
    mark_outliers(rows)
    assert {one["picture"]: one["sentence"].split(" (")[0] for one in rows if one["suspect"]} == {
        "off.png": "off.png was learned far less than the others",
        "wrong.png": "The caption of wrong.png does not help the trained model to predict it",
    }
    few = [row("off.png", 0.05, -0.2), *usual[:2]]
    mark_outliers(few)
    assert not any(one["suspect"] for one in few)


def test_a_run_s_pictures_are_written_beside_it(
    demo_base: BaseModel, checked: list[ImageRecord], tmp_path: Path
) -> None:
    for record in checked[:3]:
        for file in (record.path, record.path.with_suffix(".txt")):
            (tmp_path / "set" / file.name).parent.mkdir(exist_ok=True)
            (tmp_path / "set" / file.name).write_bytes(file.read_bytes())
    settings = {"dataset.path": str(tmp_path / "set"), "validation.pictures": 1}
    run = RunFolder.create(tmp_path / "runs" / "one", RunConfig().changed(settings))
    with pytest.raises(RunError, match="no checkpoint yet"):
        measure_run_images(run, open_base=lambda *_: demo_base)
    for step, size in ((5, 0.0), (10, 0.02)):
        run.checkpoint(step).mkdir(parents=True)
        save_adapter(planted(size), run.checkpoint(step) / "adapter.safetensors", demo_base.family)
    found = measure_run_images(run, draws=2, open_base=lambda *_: demo_base)
    assert found["step"] == 10
    assert json.loads((run.path / "pictures.json").read_text()) == found
    first = measure_run_images(run, "5", draws=2, open_base=lambda *_: demo_base)
    assert [one["gain"] for one in first["rows"]] == [0.0] * 3
    with pytest.raises(RunError, match=r"no checkpoint 7; take best, last or one of 5, 10"):
        measure_run_images(run, "7", open_base=lambda *_: demo_base)


def test_what_a_run_held_out_is_remembered(checked: list[ImageRecord], tmp_path: Path) -> None:
    config = RunConfig().changed({"validation.pictures": 2})
    run = RunFolder.create(tmp_path / "runs" / "one", config)
    now = run.held_out(checked, config)
    assert now == split_holdout(checked, 2, config.seed)[1]
    others = [one for one in checked if one not in now]
    run.write_held_out(others[:1])
    assert run.held_out([replace(one, held_out=one in now) for one in checked], config) == others[:1]
    assert run.held_out(now, config) == []


@pytest.mark.slow
def test_a_run_with_one_wrong_caption_names_its_picture(tmp_path: Path) -> None:
    shutil.copytree(DEMO_TRAIN, tmp_path / "set")
    (tmp_path / "set" / "car.txt").write_text("panda, duskprint style, on a white background")
    how = ["--name", "one", "--preset", "demo", "--workspace", str(tmp_path)]
    for setting in ("validation.every=0", "sample.every=0"):
        how += ["--set", setting]
    assert main(["train", str(tmp_path / "set"), *how]) == 0
    rows = measure_run_images(RunFolder.open(tmp_path / "runs" / "one"))["rows"]
    assert [Path(one["picture"]).name for one in rows if one["suspect"]] == ["car.png"]
    # Its gain is no sign: there was more to gain than anywhere else.
    assert rows[0]["gain"] == max(one["gain"] for one in rows)
