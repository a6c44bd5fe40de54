"""Captions judged by the base, and words proposed for a trigger; the base is real and follows its prompts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.data.scan import ImageRecord
from lora_core.errors import DatasetError
from lora_core.evaluate.captions import num_tokens, propose_triggers, score_captions, trigger_candidates
from lora_core.evaluate.validator import validation_report
from lora_core.models.load import BaseModel


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
    with pytest.raises(DatasetError, match="at least two pictures with different captions"):
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
    found = propose_triggers(demo_base, checked[:4], given="whale", draws=2)
    reactions = [row["reaction"] for row in found["rows"]]
    assert reactions == sorted(reactions)
    assert [row["word"] for row in found["rows"] if row["given"]] == ["whale"]
    best, whale = found["rows"][0], next(row for row in found["rows"] if row["given"])
    assert best["reaction"] < whale["reaction"]
    assert f"“{best['word']}”" in whale["sentence"]
    assert propose_triggers(demo_base, checked[:4], given="whale", draws=2) == found


def test_a_word_that_the_encoder_cannot_tell_from_nothing_would_be_the_best(
    demo_base: BaseModel, checked: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: an encoder that does not see one of the words."""
    from lora_core.evaluate import captions as triggers
    from lora_core.models import encode

    hidden, *_ = trigger_candidates(demo_base, [record.caption for record in checked[:2]], 0)[5:]

    def blind(base: BaseModel, captions: list[str]) -> encode.PromptEmbeds:
        return encode.encode_prompt(base, [caption.removeprefix(f"{hidden}, ") for caption in captions])

    monkeypatch.setattr(triggers, "encode_prompt", blind)
    found = propose_triggers(demo_base, checked[:2], draws=2)
    assert found["rows"][0]["word"] == hidden
    assert found["rows"][0]["reaction"] == pytest.approx(0.0, abs=1e-6)
    assert found["rows"][1]["reaction"] > 0.01


def test_no_pictures_no_words(demo_base: BaseModel) -> None:
    with pytest.raises(DatasetError, match="needs pictures"):
        propose_triggers(demo_base, [])
    assert torch.is_grad_enabled()
