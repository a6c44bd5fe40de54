"""The token meter: how much of a caption the base reads, counted with its own tokenizer, and the part that is
cut.

Bases with two text encoders count with the first one's tokenizer; both have the same words. What is counted
is what may be read at a look: the trigger word in front, one line of several, the longest of alternatives.
"""

import functools
import typing
from dataclasses import dataclass
from pathlib import Path

from app.formatting import pluralize
from app.train.form import Plan
from lora_core.data.captions import choose_parts, count_tokens, truncated_part, with_trigger
from lora_core.data.scan import Dataset
from lora_core.errors import LoraError
from lora_core.settings.config import FIELDS
from lora_core.system.paths import clean_text

LIMITS: tuple[int, ...] = typing.get_args(FIELDS["train.tokens"].annotation)


@dataclass(frozen=True)
class TokenCount:
    """One caption against the limit.

    Attributes:
        tokens: of the longest text that is drawn from it; None where the base's tokenizer cannot be used.
        limit: how many are read.
        cut: what of that text is not read.
    """

    tokens: int | None
    limit: int
    cut: str = ""


def count_caption_tokens(caption: str, plan: Plan) -> TokenCount:
    """A caption as the run to come would read it."""
    return _counted(clean_text(caption), plan.trigger, plan.config.train.tokens, plan.base.tokenizer)


@functools.lru_cache(maxsize=4096)
def _counted(caption: str, trigger: str, limit: int, tokenizer: Path) -> TokenCount:
    lines = [line for line in caption.splitlines() if line.strip()] or [""]
    texts = [with_trigger(_longest(line), trigger) for line in lines]
    try:
        counts = [count_tokens(text, tokenizer) for text in texts]
        most = max(counts)
        return TokenCount(most, limit, truncated_part(texts[counts.index(most)], limit, tokenizer))
    except (LoraError, OSError, NotImplementedError):
        return TokenCount(None, limit)


def _longest(line: str) -> str:
    """The line with the longest of each group of alternatives, and of what stands between bars."""
    return choose_parts(line, lambda parts: max(parts, key=len))


def warn_of_long_captions(dataset: Dataset, plan: Plan) -> str:
    """A sentence on the captions of which a part is not read, or ""."""
    cut = [record.path.name for record in dataset.records if count_caption_tokens(record.caption, plan).cut]
    if not cut:
        return ""
    limit, most = plan.config.train.tokens, LIMITS[-1]
    advice = "shorten them" if limit == most else f"shorten them, or raise Caption tokens to up to {most}"
    named = ", ".join(cut[:3]) + (" and others" if len(cut) > 3 else "")
    return (
        f"{pluralize(len(cut), 'caption')} longer than the {limit} tokens that are read ({named}): {advice}."
    )


def meter_version(plan: Plan) -> str:
    """What the browser compares to know that captions have to be counted again."""
    return f"{plan.config.train.tokens} {plan.base.tokenizer} {plan.trigger}"
