"""The table of families."""

import re

import pytest

from lora_core.errors import ModelFileError
from lora_core.model_files.families import FAMILIES, family_of_context_width
from lora_core.settings.config import RunConfig


def test_rows_are_told_apart_by_context_width_and_prediction() -> None:
    for name, family in FAMILIES.items():
        assert family.name == name
        assert family_of_context_width(family.context_width, family.prediction) is family


def test_one_row_of_a_width_is_the_usual_one() -> None:
    """An unmarked file that is 1024 wide predicts velocity, as most tools take it."""
    for width in {family.context_width for family in FAMILIES.values()}:
        rows = [family for family in FAMILIES.values() if family.context_width == width]
        assert [family.usual for family in rows].count(True) == 1
        assert len({family.title for family in rows}) == 1
        assert family_of_context_width(width) in rows
    assert [f.prediction for f in FAMILIES.values() if f.usual and f.context_width == 1024] == [
        "v_prediction"
    ]


def test_blocks_are_regular_expressions_over_the_unets_paths() -> None:
    for family in FAMILIES.values():
        for blocks in (family.subject_blocks, family.style_blocks):
            assert re.compile(blocks).fullmatch("conv_in") is None


def test_what_a_family_takes_in_place_of_defaults_is_legal() -> None:
    for family in FAMILIES.values():
        config = RunConfig().changed(family.settings)
        assert {name: config.get(name) for name in family.settings} == dict(family.settings)


def test_context_is_the_encoders_side_by_side() -> None:
    for family in FAMILIES.values():
        assert sum(encoder.width for encoder in family.text_encoders) == family.context_width
        assert family.parts == ("unet", *(encoder.part for encoder in family.text_encoders))


def test_an_unknown_width_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ModelFileError, match=r"4096 channels wide.*128 .*768 "):
        family_of_context_width(4096)
