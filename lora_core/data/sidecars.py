"""Captions that other programs keep beside images or inside of them: `.json` of gallery-dl and of webdataset
shards, `.xmp` of Lightroom and the like, XMP and IPTC in the image.

All of it is a stranger's: sizes are limited, XML with a document type is refused, so that no entity is
expanded, and what cannot be read is a sentence.
"""

import html
import re
import struct
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, IptcImagePlugin

from lora_core.data.captions import CAPTION_BYTES, read_text, spaced_tag, split_tags
from lora_core.errors import DatasetError
from lora_core.system.files import clean_text, parse_json

SIDECAR_SUFFIXES = (".json", ".xmp")
GROUPS = ("character", "copyright", "species", "general")
"""Groups of tags that say what an image shows, in the order of a caption. `artist`, `meta`, `rating` and the
like are not taken. Source: the tags of Danbooru, Gelbooru and e621, as gallery-dl writes them."""
TAGS = ("tags", "tag_string", "hashtags", "keywords")
TEXTS = ("caption", "text", "prompt", "content", "description", "summary", "title")
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
"""What Pillow may raise for odd metadata."""


@dataclass(frozen=True)
class Sidecar:
    """The caption that a file gives, and the fields with words of the image that were not taken."""

    caption: str
    left: tuple[str, ...] = ()


def read_sidecar(path: Path, shown: str) -> Sidecar:
    """The caption in a `.json` or `.xmp` file; `shown` is how to name it.

    Raises:
        DatasetError: it cannot be read or is none; says why.
    """
    text = read_text(path, shown)
    if path.suffix.casefold() == ".xmp":
        return _read_xmp(text, shown)
    try:
        found = parse_json(text)
    except ValueError as error:
        raise DatasetError(f"{shown} is not JSON ({error}); its image has no caption of it.") from error
    if not isinstance(found, dict):
        raise DatasetError(f"{shown} is no JSON object; its image has no caption of it.")
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
        # An image that cannot be opened is told elsewhere.
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
        raise DatasetError(f"{shown} is not XML ({error}); its image has no caption of it.") from error
    tags = [item.text or "" for item in root.iterfind(f".//{_DC}subject//{_RDF}li")]
    texts: dict[str, str] = {}
    for field in ("description", "title"):
        said = [item.text or "" for item in root.iterfind(f".//{_DC}{field}//{_RDF}li")]
        texts[field] = next((_plain(one) for one in said if _plain(one)), "")
    description = texts["description"] or ("" if any(map(_plain, tags)) else texts["title"])
    left = ("title",) if texts["title"] not in ("", description) else ()
    return Sidecar(_joined([description, *tags]), left)


def _from_fields(found: dict[str, Any]) -> Sidecar:
    """Tags, or where there are none the first text."""
    groups = found["tags"] if isinstance(found.get("tags"), dict) else {}
    named = [(name, _tags(groups.get(name))) for name in GROUPS]
    for prefix in ("tag_string_", "tags_"):
        if not any(tags for _, tags in named):
            named = [(name, _tags(found.get(prefix + name))) for name in GROUPS]
    tags = [tag for _, group in named for tag in group]
    left = [f"tags of {name}" for name in _NOT_SHOWN if any(map(_tags, _group(found, groups, name)))]
    if not tags:
        tags = next((tags for key in TAGS if (tags := _tags(found.get(key)))), [])
    texts = {key: text for key in TEXTS if (text := _plain(found.get(key)))}
    if tags:
        return Sidecar(_joined(tags), (*left, *texts))
    key = next(iter(texts), "")
    return Sidecar(texts.get(key, ""), (*left, *(other for other in texts if other != key)))


def _group(found: dict[str, Any], groups: dict[str, Any], name: str) -> list[Any]:
    return [groups.get(name), found.get(f"tag_string_{name}"), found.get(f"tags_{name}")]


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
