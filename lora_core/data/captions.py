"""Captions: read and written on disk, sampled for each draw, and their tokens counted; the weights that
prompts of images may have; and captions that other programs keep, for an import.

On disk they are a text file beside each image, or one table for a folder. To sample, only
`Random.random` is used: it alone is guaranteed to give the same values in every version of Python, and a run
resumed after an update must see the same captions.
"""

import csv
import functools
import html
import importlib
import io
import itertools
import os
import random
import re
import struct
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image, IptcImagePlugin

from lora_core.data.images import ImageRecord, check_regular_file
from lora_core.errors import ConfigError, DatasetError, ModelFileError, wrap_os_errors
from lora_core.settings.schema import DatasetSection, word_pattern
from lora_core.system.files import clean_text, parse_json, write_atomically

if TYPE_CHECKING:
    from tokenizers import Tokenizer


T = TypeVar("T")

CAPTION_BYTES = 1_000_000
TABLE_BYTES = 50_000_000
"""Larger captions and tables of captions are refused, not read."""
MOST_CAPTIONS = 50_000
"""Captions of which the length in tokens is remembered, 0.3 kB each."""
_BATCH = 256
"""Captions that are tokenized at once."""
_MOST_FAULTS = 100
_EXCERPT = 60
_LONGEST_NAME = 1000
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
PARQUET_TABLE = "metadata.parquet"
"""Another such table of Hugging Face's `imagefolder`, which is read where pyarrow is installed."""
_CAPTION_KEYS = ("text", "caption")

# A bar inside a word may be part of a tag, such as |_|. Of several spaces only the first is tried: otherwise
# the time grows with their square, here and below.
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
"""How many tokens back a full chunk may end at a comma."""
Prompt = tuple[tuple[str, float], ...]
"""Parts of a prompt with their weights."""
BREAK = ("BREAK", -1.0)
"""The part that ends a chunk."""
_BREAK = re.compile(r"(?:(?<!\s)\s+|\b)BREAK\b\s*")
_EMPHASIS = 1.1
_PROMPT_TOKENS = re.compile(r"\\[\\()\[\]]?|:\s*(?P<number>[+-]?[.\d]+)\s*\)|[()\[\]:]|[^\\()\[\]:]+")
_SQUARE = re.compile(r"(?<!\\)\[([^\[\]]*)(?<!\\)\]")
_WHEN = re.compile(r"\s*[+-]?[.\d]+\s*")


def with_trigger(caption: str, trigger: str) -> str:
    """The caption with the trigger word in front, unless it already contains it, in any case.

    Each line is a caption of its own.
    """
    trigger = trigger.strip()
    if not trigger:
        return caption
    word = word_pattern(trigger)
    lines = [line.strip() for line in caption.splitlines() if line.strip()] or [""]
    return "\n".join(line if word.search(line) else _join_tags([trigger, line]) for line in lines)


def rules_of(record: ImageRecord, rules: DatasetSection) -> DatasetSection:
    """The settings of an image: its concept's in place of the run's, and no trigger for regularisation."""
    own = dict(record.concept.rules) if record.concept else {}
    own |= {"trigger": ""} if record.reg else {}
    return rules.model_copy(update=own) if own else rules


def triggers_of(records: Iterable[ImageRecord], rules: DatasetSection) -> list[str]:
    """The trigger words of images, each once."""
    return [word for word in dict.fromkeys(rules_of(one, rules).trigger.strip() for one in records) if word]


def class_captions(records: Iterable[ImageRecord], rules: DatasetSection) -> list[str]:
    """The distinct captions of images without their trigger words; none of an image without a trigger, and no
    empty one."""
    found = []
    for record in records:
        if trigger := rules_of(record, rules).trigger.strip():
            words = word_pattern(trigger).sub(" ", plain_caption(record.full_caption, ""))
            found.append(_join_tags([" ".join(tag.split()) for tag in split_tags(words)]))
    return [caption for caption in dict.fromkeys(found) if caption]


def sample_caption(caption: str, rules: DatasetSection, draw: random.Random) -> str:
    """The caption of one sample; it depends on the arguments only.

    With the chance `caption_dropout` it is empty. Else one of the caption's lines is drawn, then one of each
    `{red|blue}`, then one of the parts between bars; then tags are left out and shuffled, and the trigger put
    in front if it is missing.
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
    return sample_caption(caption, DatasetSection(trigger=trigger, caption_dropout=0.0), random.Random(0))


def sample_record_caption(record: ImageRecord, rules: DatasetSection, draw: random.Random) -> str:
    """The caption of one sample of an image: `sample_caption` by the rules of its concept."""
    return sample_caption(record.full_caption, rules_of(record, rules), draw)


def triggered_caption(record: ImageRecord, rules: DatasetSection) -> str:
    """An image's caption with its alternatives and its own trigger in each line."""
    return with_trigger(record.full_caption, rules_of(record, rules).trigger)


def plain_record_caption(record: ImageRecord, rules: DatasetSection) -> str:
    """The caption of an image with nothing left to chance: as `plain_caption`, with its own trigger."""
    return plain_caption(record.full_caption, rules_of(record, rules).trigger)


def varies_by_draw(record: ImageRecord, rules: DatasetSection) -> bool:
    """Whether an image's caption varies between samples, other than by dropout."""
    caption, rules = record.full_caption, rules_of(record, rules)
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


def spaced_tag(tag: str) -> str:
    """A tag with spaces for underscores, which emoticons such as `>_<` and `u_u` keep."""
    return tag.replace("_", " ") if re.search(r"[^\W_]{2}", tag) else tag


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
    """How many CLIP tokens a text has, without the marks of begin and end; `tokenizer_folder` holds
    `vocab.json` and `merges.txt`.

    Raises:
        ModelFileError: the folder holds no tokenizer of this kind.
    """
    return count_all_tokens([text], tokenizer_folder)[0]


def count_all_tokens(texts: Sequence[str], tokenizer_folder: Path) -> list[int]:
    """As `count_tokens`, of many texts, of which the numbers are remembered; other threads continue
    meanwhile.

    Raises:
        ModelFileError: the folder holds no tokenizer of this kind.
    """
    tokenizer, known = _clip_tokenizer(tokenizer_folder.absolute()), _known_counts(tokenizer_folder)
    counts = {text: known.get(text, -1) for text in texts}
    new = [text for text, count in counts.items() if count < 0]
    for start in range(0, len(new), _BATCH):
        batch = new[start : start + _BATCH]
        counts |= zip(batch, map(len, tokenizer.encode_batch(batch, add_special_tokens=False)), strict=True)
    if len(known) + len(new) > MOST_CAPTIONS:
        known.clear()
    known |= {text: counts[text] for text in new}
    return [counts[text] for text in texts]


@functools.lru_cache(maxsize=8)
def _known_counts(tokenizer_folder: Path) -> dict[str, int]:
    return {}


@functools.lru_cache(MOST_CAPTIONS)
def truncated_part(text: str, limit: int, tokenizer_folder: Path) -> str:
    """The part of a text beyond a limit of 75, 150 or 225 tokens, or "".

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


def parse_prompt(text: str) -> str | Prompt:
    """A prompt of an image as A1111 reads it; the plain text where nothing is weighted and nothing breaks.

    `(x)` multiplies the weight of x by 1.1, `[x]` divides by it, `(x:1.3)` multiplies by 1.3. They nest, and
    an unclosed bracket reaches to the end. A backslash makes a bracket or a backslash ordinary text. BREAK
    ends a chunk of 75 tokens; in brackets it is a word, as there.

    Captions of training are not read so: their brackets are text.
    Source: A1111's `prompt_parser.py`.

    Raises:
        ConfigError: a weight is not a number, or more than 50 brackets are open at once.
    """
    parts: list[list[Any]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        for part in parts[opened[bracket].pop() :]:
            part[1] *= factor

    for found in _PROMPT_TOKENS.finditer(text):
        token, number = found[0], found["number"]
        if token.startswith("\\"):
            parts.append([token[1:], 1.0])
        elif token in opened:
            opened[token].append(len(parts))
            if sum(map(len, opened.values())) > _DEEPEST:
                raise ConfigError(
                    f"A prompt opens more than {_DEEPEST} brackets at once ({text[:_EXCERPT]!r}); close some,"
                    " or write \\( for one that is text."
                )
        elif opened["("] and (number or token == ")"):
            close("(", _weight(number) if number else _EMPHASIS)
        elif opened["["] and token == "]":
            close("[", 1 / _EMPHASIS)
        else:
            first, *more = _BREAK.split(token)
            parts.append([first, 1.0])
            parts += [part for words in more for part in (list(BREAK), [words, 1.0])]
    for bracket, factor in (("(", _EMPHASIS), ("[", 1 / _EMPHASIS)):
        while opened[bracket]:
            close(bracket, factor)
    runs = itertools.groupby(parts, itemgetter(1))
    prompt = tuple(("".join(words for words, _ in run), weight) for weight, run in runs)
    return prompt if any(weight != 1.0 for _, weight in prompt) else "".join(words for words, _ in prompt)


def _weight(number: str) -> float:
    try:
        return float(number)
    except ValueError as error:
        raise ConfigError(f"The weight {number!r} of a prompt is not a number; write (word:1.2).") from error


def check_prompt(text: str) -> None:
    """Raise a ConfigError for what A1111 reads in a prompt and `parse_prompt` does not."""
    parse_prompt(text)
    for found in _SQUARE.finditer(text):
        _, colon, last = found[1].rpartition(":")
        if "|" in found[1] or (colon and _WHEN.fullmatch(last)):
            raise ConfigError(
                f"{found[0][:_EXCERPT]!r} would change the prompt while an image is sampled, which is not"
                " supported; write \\[ and \\] for brackets that are text."
            )


def escape_prompt(caption: str) -> str:
    """A caption as a prompt of a sample that is read as the same text."""
    return re.sub(r"([\\()\[\]]|(?<=\bBREA)K\b|(?<!\S)--(?=[A-Za-z]))", r"\\\1", caption)


@functools.lru_cache(maxsize=8)
def _clip_tokenizer(folder: Path) -> "Tokenizer":
    # Three megabytes, for which a window has no use until captions are counted.
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    # Threads of its own would not outlive a fork, of which it warns; it lets ours go on as it is.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
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


def _vary_tags(tags: list[str], rules: DatasetSection, draw: random.Random) -> list[str]:
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


def read_text(path: Path, shown: str, most: int = CAPTION_BYTES) -> str:
    """A text file's content, without a byte order mark and with plain newlines.

    Args:
        shown: how to name it in a message.
        most: bytes that it may have.

    Raises:
        DatasetError: it cannot be read, is not a regular file, is too large or not UTF-8; names the file.
    """
    size = check_regular_file(path, shown, most)
    try:
        with (
            wrap_os_errors(DatasetError, f"{shown} cannot be read", "; check that it may be read."),
            open(path, "rb") as file,
        ):
            text = file.read(size).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{shown} is not UTF-8 text (byte {error.start}); save it again with the encoding UTF-8."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def caption_file(record: ImageRecord) -> Path:
    """The text file beside an image that its caption is written to, and then read from: of the ending that
    its concept names, else `.txt`."""
    return record.path.with_suffix((record.concept and record.concept.caption_extension) or ".txt")


def write_caption(picture: Path, text: str, wait: bool = True, file: Path | None = None) -> None:
    """Writes the caption to `file`, by default the `.txt` beside an image, atomically. It waits until the
    disk has it, unless `wait` is off, for many captions in a row that are kept elsewhere too.

    Raises:
        DatasetError: the folder cannot be written.
    """
    target = file or picture.with_suffix(".txt")
    advice = "; check that the folder may be written."
    with wrap_os_errors(DatasetError, f"The caption {target} cannot be written", advice):
        write_atomically(target, text.encode("utf-8", "replace"), wait)


def read_metadata_captions(path: Path, shown: str) -> tuple[dict[str, str], list[str], list[str]]:
    """The captions in a `metadata.jsonl`, `metadata.csv` or `metadata.parquet`.

    Args:
        path: the file; its rows have `file_name`, relative to its folder, and `text` or `caption`.
        shown: how to name it in a message.

    Returns:
        File name, with forward slashes, to caption, of which the last row of a name has the word; a sentence
        for each of the first 100 rows that cannot be used, and one for the others; and the names that have
        several rows.
    """
    captions: dict[str, str] = {}
    sentences: list[str] = []
    repeated: list[str] = []
    try:
        if path.suffix.casefold() == ".parquet":
            rows = _parquet_rows(path, shown)
        else:
            rows = _table_rows(read_text(path, shown, TABLE_BYTES), path.suffix.casefold() == ".csv")
    except DatasetError as error:
        return {}, [str(error)], []
    faults = 0
    for line, row in rows:
        fault = _row_fault(row)
        if fault:
            faults += 1
            if faults <= _MOST_FAULTS:
                sentences.append(f"{shown}, line {line}, {fault}; correct it or remove the line.")
            continue
        value = next((row[key] for key in _CAPTION_KEYS if key in row), "")
        name = clean_text(row["file_name"]).replace("\\", "/").removeprefix("./")
        if name in captions:
            repeated.append(name)
        captions[name] = clean_text(value or "").strip()
    if faults > _MOST_FAULTS:
        sentences.append(f"{shown} has {faults - _MOST_FAULTS} more lines that cannot be used.")
    return captions, sentences, list(dict.fromkeys(repeated))


def _row_fault(row: Any) -> str:
    if isinstance(row, str):
        return f"cannot be read ({row})"
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"].strip():
        return "has no file_name"
    values = [row[key] for key in _CAPTION_KEYS if key in row]
    if not values:
        return "has neither text nor caption"
    if not isinstance(values[0], str | None):
        return "has a caption that is not text"
    if len(row["file_name"]) > _LONGEST_NAME:
        return f"has a file_name of more than {_LONGEST_NAME} letters"
    return (
        f"has a caption of more than {CAPTION_BYTES:,} letters"
        if len(values[0] or "") > CAPTION_BYTES
        else ""
    )


def _parquet_rows(path: Path, shown: str) -> Iterator[tuple[int, Any]]:
    check_regular_file(path, shown, TABLE_BYTES)
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DatasetError(
            f"{shown} needs the package pyarrow, which is not installed: install it, or save the table as"
            " metadata.csv or metadata.jsonl."
        ) from error
    try:
        file = parquet.ParquetFile(path)
        groups = [file.metadata.row_group(n).total_byte_size for n in range(file.metadata.num_row_groups)]
        if sum(groups) > 10 * TABLE_BYTES:
            raise ValueError(f"larger than {10 * TABLE_BYTES // 10**6} MB")
        names = [name for name in ("file_name", *_CAPTION_KEYS) if name in file.schema_arrow.names]
        return enumerate(file.read(columns=names).to_pylist(), start=1)
    except Exception as error:  # the library's errors have no class in common
        raise DatasetError(f"{shown} cannot be read ({str(error)[:200]}); save it again.") from error


def _table_rows(text: str, is_csv: bool) -> Iterator[tuple[int, Any]]:
    """Line number and row, or the reason as text where a line is not JSON or the CSV breaks off."""
    if is_csv:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            yield reader.line_num, f"not CSV: {error}"
        return
    for number, line in enumerate(io.StringIO(text, newline="\n"), start=1):
        if line.strip():
            try:
                value = parse_json(line)
                yield number, value if isinstance(value, dict) else {}
            except ValueError as error:
                yield number, f"not JSON: {error}"


# Captions that other programs keep beside images or inside of them: `.json` of gallery-dl and of webdataset
# shards, `.xmp` of Lightroom and the like, XMP and IPTC in the image.
#
# All of it is a stranger's: sizes are limited, XML with a document type is refused, so that no entity is
# expanded, and what cannot be read is a sentence.

SIDECAR_SUFFIXES = (".json", ".xmp")
TAG_GROUPS = ("character", "copyright", "species", "general")
"""Groups of tags that say what an image shows, in the order of a caption. `artist`, `meta`, `rating` and the
like are not taken. Source: the tags of Danbooru, Gelbooru and e621, as gallery-dl writes them."""
TAG_FIELDS = ("tags", "tag_string", "hashtags", "keywords")
TEXT_FIELDS = ("caption", "text", "prompt", "content", "description", "summary", "title")
"""Fields of a JSON file: `content` is a post of Twitter, Mastodon and the like, `caption` and `title` are
Pixiv's, `caption` and `text` those of webdataset shards."""
_NOT_SHOWN = ("artist", "meta", "rating", "lore", "contributor", "invalid")
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_DC = "{http://purl.org/dc/elements/1.1/}"
_KEYWORD, _IPTC_CAPTION = (2, 25), (2, 120)
"""Datasets of IPTC."""


_ODD = (
    OSError, ValueError, SyntaxError, LookupError, TypeError, AttributeError, EOFError, struct.error,
    ArithmeticError, RuntimeError, MemoryError, Image.DecompressionBombError,
)  # fmt: skip
"""Exceptions of Pillow on odd metadata."""


@dataclass(frozen=True)
class Sidecar:
    """The caption in a file, and the descriptive fields that were not used."""

    caption: str
    left: tuple[str, ...] = ()


def read_sidecar(path: Path, shown: str) -> Sidecar:
    """The caption in a `.json` or `.xmp` file; `shown` is how to name it.

    Raises:
        DatasetError: it cannot be read or has none.
    """
    text = read_text(path, shown)
    if path.suffix.casefold() == ".xmp":
        return _read_xmp(text, shown)
    try:
        found = parse_json(text)
    except ValueError as error:
        raise DatasetError(f"{shown} is not JSON ({error}); its image gets no caption from it.") from error
    if not isinstance(found, dict):
        raise DatasetError(f"{shown} is not a JSON object; its image gets no caption from it.")
    return _from_fields(found)


def read_embedded(path: Path, shown: str) -> Sidecar:
    """Description and keywords inside of an image: of XMP, else of IPTC.

    Raises:
        DatasetError: they are broken.
    """
    try:
        with Image.open(path) as image:
            xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
            words = IptcImagePlugin.getiptcinfo(image) or {}
    except _ODD:
        # An image that cannot be opened is reported elsewhere.
        return Sidecar("")
    if xmp and len(xmp) <= CAPTION_BYTES:
        text = xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else str(xmp)
        found = _read_xmp(text.strip("\0 \ufeff"), f"The XMP in {shown}")
        if found.caption:
            return found
    (caption, tags) = (_iptc(words.get(key)) for key in (_IPTC_CAPTION, _KEYWORD))
    return Sidecar(_joined([*caption, *tags]))


def _iptc(value: Any) -> list[str]:
    parts = value if isinstance(value, list) else [value]
    return [_decoded(part) for part in parts if isinstance(part, bytes) and len(part) <= CAPTION_BYTES]


def _decoded(part: bytes) -> str:
    try:
        return part.decode("utf-8")
    except UnicodeDecodeError:
        return part.decode("latin-1")


def _read_xmp(text: str, shown: str) -> Sidecar:
    # An entity could name a file or grow without end.
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DatasetError(f"{shown} has a document type, which XMP has not; it is not read.")
    try:
        root = ET.fromstring(text)
    except (ET.ParseError, ValueError, RecursionError) as error:
        raise DatasetError(f"{shown} is not XML ({error}); its image gets no caption from it.") from error
    tags = [item.text or "" for item in root.iterfind(f".//{_DC}subject//{_RDF}li")]
    texts: dict[str, str] = {}
    for field in ("description", "title"):
        found = [item.text or "" for item in root.iterfind(f".//{_DC}{field}//{_RDF}li")]
        texts[field] = next((_plain(one) for one in found if _plain(one)), "")
    description = texts["description"] or ("" if any(map(_plain, tags)) else texts["title"])
    left = ("title",) if texts["title"] not in ("", description) else ()
    return Sidecar(_joined([description, *tags]), left)


def _from_fields(found: dict[str, Any]) -> Sidecar:
    """Tags, or where there are none the first text."""
    groups = found["tags"] if isinstance(found.get("tags"), dict) else {}
    named = [(name, _tags(groups.get(name))) for name in TAG_GROUPS]
    for prefix in ("tag_string_", "tags_"):
        if not any(tags for _, tags in named):
            named = [(name, _tags(found.get(prefix + name))) for name in TAG_GROUPS]
    tags = [tag for _, group in named for tag in group]
    left = [
        f"tags of {name}"
        for name in _NOT_SHOWN
        if any(map(_tags, (groups.get(name), found.get(f"tag_string_{name}"), found.get(f"tags_{name}"))))
    ]
    if not tags:
        tags = next((tags for key in TAG_FIELDS if (tags := _tags(found.get(key)))), [])
    texts = {key: text for key in TEXT_FIELDS if (text := _plain(found.get(key)))}
    if tags:
        return Sidecar(_joined(tags), (*left, *texts))
    key = next(iter(texts), "")
    return Sidecar(texts.get(key, ""), (*left, *(other for other in texts if other != key)))


def _tags(value: Any) -> list[str]:
    """Tags in a text, with commas or else spaces between; or of a list of words or of objects with a name."""
    if isinstance(value, str):
        return [spaced_tag(tag) for tag in (split_tags(value) if "," in value else value.split())]
    parts = value if isinstance(value, list) else []
    names = [part.get("name") or part.get("tag") if isinstance(part, dict) else part for part in parts]
    return [spaced_tag(name.strip()) for name in names if isinstance(name, str) and name.strip()]


def _plain(value: Any) -> str:
    """A text in one line, without HTML."""
    text = html.unescape(re.sub(r"<[^<>]*>", " ", value)) if isinstance(value, str) else ""
    return " ".join(clean_text(text).split())


def _joined(parts: Iterable[str]) -> str:
    """Words and tags with commas between, each once."""
    words: dict[str, str] = {}
    for part in parts:
        word = _plain(part).strip(", ")
        words.setdefault(word.casefold(), word)
    return ", ".join(filter(None, words.values()))
