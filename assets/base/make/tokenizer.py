"""Trains the tokenizer: byte-level BPE in CLIP's format, 4096 tokens, from emojibase's English words.

Names, styles and colours that the base is taught weigh most, so that each of their words is one token.

    python assets/base/make/tokenizer.py --build BUILD
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from catalog import BACKGROUNDS, STYLES, THINGS, caption
from pictures import english
from tokenizers import pre_tokenizers, trainers
from transformers import CLIPTokenizer

VOCABULARY = 4096
LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_tokens() -> dict[str, int]:
    """Returns CLIP's first 512 tokens: 256 bytes as printable characters, and the same ending a word."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {token: i for i, token in enumerate(letters + [letter + "</w>" for letter in letters])}


def sentences(build: Path) -> Iterator[str]:
    """Yields the text that the merges are learnt from."""
    for record in english(build):
        yield from [record["label"].lower(), " ".join(record.get("tags", [])).lower()]
    for thing in THINGS:
        for style in STYLES:
            for ground in BACKGROUNDS:
                yield caption(thing, style, ground)


def new_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> CLIPTokenizer:
    """Returns a CLIP tokenizer with these tables; START and END must be in the vocabulary."""
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=LENGTH,
    )


def learnt_merges(text: Iterator[str]) -> list[tuple[str, str]]:
    """Returns the BPE merges that CLIP's own pre-tokenizer and byte alphabet lead to."""
    first = byte_tokens()
    plain = new_tokenizer({**first, START: len(first), END: len(first) + 1}, [])
    backend = plain.backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2 + 256,  # the trainer lacks the unused half of the 512 byte tokens
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        min_frequency=1,
        show_progress=False,
    )
    backend.train_from_iterator(text, trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    return merges[: VOCABULARY - 2 - len(first)]


def write(folder: Path, tokenizer: CLIPTokenizer, merges: list[tuple[str, str]]) -> None:
    """Writes all files of a CLIP tokenizer, old form (vocab.json, merges.txt) and new (tokenizer.json)."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda both: both[1]))
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def make(build: Path) -> CLIPTokenizer:
    """Trains, writes `build/tokenizer` and returns the tokenizer."""
    merges = learnt_merges(sentences(build))
    vocabulary = byte_tokens()
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    for special in (START, END):
        vocabulary[special] = len(vocabulary)
    tokenizer = new_tokenizer(vocabulary, merges)
    write(build / "tokenizer", tokenizer, merges)
    return tokenizer


def words_split(tokenizer: CLIPTokenizer) -> Counter[str]:
    """Returns the words of the taught captions that take more than one token, with their token counts."""
    words = {word for name in (*THINGS, *STYLES, *BACKGROUNDS) for word in name.split()}
    counts = Counter({word: len(tokenizer.tokenize(word)) for word in words})
    return Counter({word: count for word, count in counts.items() if count > 1})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, required=True, help="folder for caches and checkpoints")
    build = parser.parse_args().build
    build.mkdir(parents=True, exist_ok=True)
    split = words_split(make(build))
    if split:
        raise SystemExit(f"these words should be one token each: {dict(split)}")
