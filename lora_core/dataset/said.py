"""What captions say of plain backgrounds, held against what their pictures show.

A colour is the one thing that both a caption and a thumbnail say plainly. Where all pictures of "white
background" are beige, the words will come to mean beige; where one of them is not, its caption is wrong.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lora_core.dataset.records import ImageRecord
from lora_core.dataset.seen import colour_of_word
from lora_core.spec.paths import valid_text

_BEHIND = re.compile(r"\b(\w+)[ -](?:background|backdrop)\b")
_FEWEST, _FEWEST_ODD = 3, 4
_MOSTLY = 0.75


def finding(
    kind: str, name: str, sentence: str, records: Sequence[ImageRecord], counts: Mapping[str, float]
) -> dict[str, Any]:
    """One thing that will be learned, as plain values: `records` are the pictures to look at."""
    pictures = [valid_text(str(record.path)) for record in records]
    return {"kind": kind, "name": name, "sentence": sentence, "pictures": pictures, "counts": dict(counts)}


def said_of_backgrounds(
    records: Sequence[ImageRecord], names: Sequence[str], colours: Sequence[str]
) -> list[dict[str, Any]]:
    """Words for a background that mean something else in these pictures, and captions that are odd ones out.

    Args:
        records: pictures.
        names: how each is named in sentences.
        colours: of each plain background, "" where there is none.
    """
    by_word: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        for word in set(_BEHIND.findall(record.caption.casefold())):
            if colour_of_word(word) and colours[index]:
                by_word.setdefault(word, []).append(index)
    rows = []
    for word, members in by_word.items():
        (shown, count), *_ = Counter(colours[i] for i in members).most_common(1)
        if count < _MOSTLY * len(members):
            continue
        odd = [i for i in members if colours[i] not in (shown, colour_of_word(word))]
        if shown != colour_of_word(word) and count >= _FEWEST:
            sentence = (
                f"{len(members)} captions say “{word} background”, and {count} of their pictures have"
                f" {_article(shown)} {shown} one: these words will come to mean that."
            )
            meant = [records[i] for i in members if colours[i] == shown]
            rows.append(
                finding("meaning", word, sentence, meant, {"captions": len(members), "pictures": count})
            )
        if len(members) >= _FEWEST_ODD:
            rows += [_odd(records[i], names[i], (word, colours[i], shown), count) for i in odd]
    return rows


def _odd(record: ImageRecord, name: str, colours: tuple[str, str, str], count: int) -> dict[str, Any]:
    word, own, shown = colours
    sentence = (
        f"The caption of {name} says “{word} background”, but it has {_article(own)} {own} one; the other"
        f" {count} with these words have {_article(shown)} {shown} one. Its caption is likely wrong."
    )
    return finding("odd", word, sentence, [record], {"pictures": count})


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
