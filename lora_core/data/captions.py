"""Samples a caption for each draw and counts its tokens.

Only `Random.random` is used: it alone is guaranteed to give the same values in every version of Python, and
a run resumed after an update must see the same captions.
"""

import functools
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from lora_core.errors import ModelFileError
from lora_core.settings.schema import DatasetSection

T = TypeVar("T")

# A bar inside a word may be part of a tag, such as |_|. Of several spaces only the first is tried: otherwise
# the time grows with their square.
_BAR = re.compile(r"(?<!\s)\s+\|\s+")
_DEEPEST = 50

# How CLIP cuts a text before byte pairs are merged. Source: Radford et al. 2021, clip/simple_tokenizer.py.
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_CLIP_MARKS = ("<|startoftext|>", "<|endoftext|>")
COMMA = ",</w>"
"""The token of a comma at the end of a word."""
CHUNK = 75
"""Tokens that a CLIP text encoder reads at once, its begin and end marks not counted."""
WRAP = 20
"""How many tokens back a full chunk looks for a comma to end at."""


@dataclass(frozen=True)
class CaptionRules:
    """How a caption varies from look to look.

    The dropouts are shares from 0 to 1; `keep_tags` is how many tags at the front stay as they are.
    """

    trigger: str
    caption_dropout: float
    tag_dropout: float
    shuffle_tags: bool
    keep_tags: int

    @classmethod
    def of(cls, section: DatasetSection) -> "CaptionRules":
        """As the settings of a run say."""
        return cls(
            section.trigger,
            section.caption_dropout,
            section.tag_dropout,
            section.shuffle_tags,
            section.keep_tags,
        )


def with_trigger(caption: str, trigger: str) -> str:
    """The caption with the trigger word in front, unless it already contains it, in any case.

    Each line is a caption of its own.
    """
    trigger = trigger.strip()
    if not trigger:
        return caption
    word = re.compile(rf"(?<!\w){re.escape(trigger)}(?!\w)", re.IGNORECASE)
    lines = [line.strip() for line in caption.splitlines() if line.strip()] or [""]
    return "\n".join(line if word.search(line) else _join_tags([trigger, line]) for line in lines)


def sample_caption(caption: str, rules: CaptionRules, draw: random.Random) -> str:
    """The caption of one look; it depends on the arguments only.

    With the chance `caption_dropout` it is empty. Else one of the caption's lines is drawn, then one of each
    `{red|blue}`, then one of the parts between bars; then tags are left out and shuffled, and the trigger put
    in front if it is not there.
    """
    if draw.random() < rules.caption_dropout:
        return ""
    lines = [line.strip() for line in caption.splitlines() if line.strip()]
    text = _choose(lines, draw) if lines else ""
    text = choose_parts(text, lambda parts: _choose(parts, draw))
    if rules.shuffle_tags or rules.tag_dropout > 0:
        text = _join_tags(_vary_tags(split_tags(text), rules, draw))
    return with_trigger(text, rules.trigger)


def plain_caption(caption: str, trigger: str) -> str:
    """One caption with nothing left to chance: the first alternative, the trigger in it, nothing dropped."""
    return sample_caption(caption, CaptionRules(trigger, 0.0, 0.0, False, 0), random.Random(0))


def varies_by_draw(caption: str, rules: CaptionRules) -> bool:
    """Whether a caption reads differently from look to look, other than by being left out."""
    return rules.shuffle_tags or rules.tag_dropout > 0 or any(mark in caption for mark in "|{\n")


def choose_parts(line: str, choose: Callable[[list[str]], str]) -> str:
    """A line of a caption with what `choose` takes of each `{red|blue}`, inner ones first, and then of the
    parts between bars.

    Braces without a bar are ordinary text, and so are braces more than 50 deep.
    """
    done: list[str] = []
    opened: list[int] = []
    for piece in re.split(r"([{}])", line):
        if piece == "}" and opened:
            start = opened.pop()
            inside = "".join(done[start + 1 :])
            if "|" in inside:
                done[start:] = [choose(inside.split("|")).strip()]
                continue
        if piece in ("{", "}") and (piece == "}" or len(opened) == _DEEPEST):
            # A brace that is ordinary text makes ordinary text of those around it.
            opened.clear()
        if piece == "{":
            opened.append(len(done))
        done.append(piece)
    return choose(_BAR.split("".join(done))).strip()


def split_tags(caption: str) -> list[str]:
    """The parts between commas and line ends, without those that are empty."""
    return [tag.strip() for tag in re.split(r"[,\n]", caption) if tag.strip()]


def count_tags(captions: Iterable[str]) -> dict[str, int]:
    """The number of captions with each tag, most frequent first; the first spelling represents all cases."""
    spelling: dict[str, str] = {}
    counts: dict[str, int] = {}
    for caption in captions:
        for key, tag in {tag.casefold(): tag for tag in reversed(split_tags(caption))}.items():
            spelling.setdefault(key, tag)
            counts[key] = counts.get(key, 0) + 1
    return {spelling[key]: counts[key] for key in sorted(counts, key=lambda key: (-counts[key], key))}


def count_tokens(text: str, tokenizer_folder: Path) -> int:
    """How many CLIP tokens a text has, without the marks of begin and end.

    Args:
        text: one caption.
        tokenizer_folder: holds `vocab.json` and `merges.txt`.

    Raises:
        ModelFileError: the folder holds no tokenizer of this kind.
    """
    return len(_clip_tokenizer(tokenizer_folder.absolute()).encode(text, add_special_tokens=False).ids)


def truncated_part(text: str, limit: int, tokenizer_folder: Path) -> str:
    """What of a text a limit of 75, 150 or 225 tokens leaves unread; "" where it leaves nothing.

    Raises:
        ModelFileError: the folder holds no tokenizer of this kind.
    """
    tokenizer = _clip_tokenizer(tokenizer_folder.absolute())
    encoded = tokenizer.encode(text, add_special_tokens=False)
    comma = tokenizer.token_to_id(COMMA)
    rows = split_chunks(encoded.ids, -1 if comma is None else comma, max(1, limit // CHUNK))
    read = sum(map(len, rows))
    return text[encoded.offsets[read][0] :] if len(encoded.offsets) > read else ""


def split_chunks(ids: list[int], comma: int, chunks: int) -> list[list[int]]:
    """A caption's tokens as the chunks of 75 that a text encoder reads one by one.

    A chunk that is full ends at its last comma where that is at most 20 tokens back, so that no tag is cut in
    two; the last chunk is simply cut. As A1111 does (its setting "prompt word wrap length limit", 20).

    Args:
        ids: token numbers without begin and end.
        comma: the comma's number, -1 where there is none.
        chunks: how many are read at most.

    Returns:
        At most `chunks` lists of at most 75; what does not fit is left out.
    """
    rows: list[list[int]] = []
    start = 0
    while len(rows) < chunks and (start < len(ids) or not rows):
        row = ids[start : start + CHUNK]
        # A comma that itself comes next, right after a full chunk, moves nothing.
        if len(rows) + 1 < chunks and len(ids) > start + CHUNK and ids[start + CHUNK] != comma:
            commas = [place for place, token in enumerate(row) if token == comma]
            if commas and CHUNK - commas[-1] <= WRAP:
                row = row[: commas[-1] + 1]
        rows.append(row)
        start += len(row)
    return rows


@functools.lru_cache(maxsize=8)
def _clip_tokenizer(folder: Path) -> Tokenizer:
    try:
        model = models.BPE.from_file(
            str(folder / "vocab.json"),
            str(folder / "merges.txt"),
            unk_token=_CLIP_MARKS[1],
            end_of_word_suffix="</w>",
        )
    except Exception as error:  # the library raises plain Exception
        raise ModelFileError(
            f"The tokenizer folder {folder} cannot be used ({error}); it needs vocab.json and merges.txt."
        ) from error
    lacking = [mark for mark in _CLIP_MARKS if model.token_to_id(mark) is None]
    if lacking:
        raise ModelFileError(
            f"The tokenizer folder {folder} cannot be used: its vocab.json lacks {lacking[0]}."
        )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in _CLIP_MARKS])
    return tokenizer


def _vary_tags(tags: list[str], rules: CaptionRules, draw: random.Random) -> list[str]:
    kept, rest = tags[: rules.keep_tags], tags[rules.keep_tags :]
    if rules.tag_dropout > 0:
        rest = [tag for tag in rest if draw.random() >= rules.tag_dropout]
    if rules.shuffle_tags:
        for last in range(len(rest) - 1, 0, -1):
            other = int(draw.random() * (last + 1))
            rest[last], rest[other] = rest[other], rest[last]
    return kept + rest


def _choose(values: Sequence[T], draw: random.Random) -> T:
    return values[int(draw.random() * len(values))] if len(values) > 1 else values[0]


def _join_tags(tags: list[str]) -> str:
    return ", ".join(tag for tag in tags if tag)
