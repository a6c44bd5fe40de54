"""The table of families."""

import pytest

from lora_core.spec.errors import ModelFileError
from lora_core.spec.families import FAMILIES, family_of_context_width


def test_rows_are_told_apart_by_their_context_width() -> None:
    for name, family in FAMILIES.items():
        assert family.name == name
        assert family_of_context_width(family.context_width) is family


def test_context_is_the_encoders_side_by_side() -> None:
    for family in FAMILIES.values():
        assert sum(encoder.width for encoder in family.text_encoders) == family.context_width
        assert family.parts == ("unet", *(encoder.part for encoder in family.text_encoders))


def test_an_unknown_width_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ModelFileError, match=r"4096 channels wide.*128 .*768 "):
        family_of_context_width(4096)
