"""What is drawn from a caption at each look, and how long it is for the text encoder."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CaptionRules:
    """How a caption varies from look to look; shares from 0 to 1."""

    trigger: str
    caption_dropout: float
    tag_dropout: float
    shuffle_tags: bool
    keep_tags: int


def with_trigger(caption: str, trigger: str) -> str:
    """The caption with the trigger in front, unless it holds it already."""
    raise NotImplementedError


def drawn_caption(caption: str, rules: CaptionRules, draw: random.Random) -> str:
    """The caption of one look."""
    raise NotImplementedError


def token_count(text: str, tokenizer_folder: Path) -> int:
    """How many CLIP tokens a text has."""
    raise NotImplementedError


def tag_counts(captions: Iterable[str]) -> dict[str, int]:
    """In how many captions each tag stands."""
    raise NotImplementedError
