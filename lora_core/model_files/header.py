"""Reading the header of an untrusted safetensors file without torch, and naming what cannot be used here.

The safetensors library checks each claim of the header first, so that a broken file gets an error and never
more memory than its own size. Format: https://github.com/huggingface/safetensors#format
"""

import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.errors import AdapterFileError, LoraError, ModelFileError
from lora_core.system.files import parse_json, read_table
from lora_core.system.processes import without_collecting

MAX_HEADER = 16 * 2**20
"""Bytes. Real headers stay under 3 MB, even with the tags of a large dataset."""
LONGEST_NAME = 1000
"""Characters of a tensor's name; real ones stay under 200."""
DTYPE_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
"""Supported dtypes, and what torch calls them."""

_NOT_SAFETENSORS = (
    (b"PK\x03\x04", "a pickled torch file or a zip"),
    *((bytes((0x80, version)), "a pickled torch file, which can run code") for version in range(2, 6)),
    *((start, "an image") for start in (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8")),
    (b"<", "a web page: the download went wrong"),
    (b"version https://git-lfs", "a Git LFS pointer: the download went wrong"),
)


@dataclass(frozen=True)
class Header:
    """The checked header of a safetensors file.

    Attributes:
        tensors: name to dtype, shape and offsets, as in the file.
        metadata: the texts in the file.
        start: offset of the tensor data, in bytes.
    """

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    start: int

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Name to shape."""
        return {name: entry["shape"] for name, entry in self.tensors.items()}


def read_header(path: Path, error: type[LoraError] = AdapterFileError) -> Header:
    """The header of a safetensors file, with each of its claims checked against the file.

    Raises:
        LoraError: of the class `error`, `AdapterFileError` or `ModelFileError`: the problem.
    """
    # A megabyte that a window does not need until a file is opened.
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        if not path.is_file():
            raise error(f"{path} {what_is_there(path)}.")
        with open(path, "rb") as file:
            start = file.read(32)
            length = int.from_bytes(start[:8], "little")
            if refusal := _refusal(start, length, path.stat().st_size):
                raise error(f"{path} {refusal}.")
            # The collector would take most of the time, where there are hundreds of thousands of tensors.
            with without_collecting(False), safe_open(str(path), framework="np"):  # checks each claim
                file.seek(8)
                values = parse_json(file.read(length), _DECODER)
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}.") from problem
    except (SafetensorError, ValueError) as problem:
        reason = str(problem).removeprefix("Error while deserializing header: ")[:120]
        raise error(f"{path} is cut short, broken or no safetensors file: {reason}.") from problem
    metadata = values.pop("__metadata__", None) or {}
    for name, entry in values.items():
        # The library also takes a list of the three values, and sides that torch cannot hold.
        what = f"{entry['dtype']} {str(entry['shape'])[:60]}" if isinstance(entry, dict) else "a list"
        usable = isinstance(entry, dict) and entry["dtype"] in DTYPE_NAMES
        usable = usable and len(entry["shape"]) <= 8 and max(entry["shape"], default=0) < 2**63
        if len(name) > LONGEST_NAME or not usable:
            raise error(
                f"{path} holds the tensor {name[:200]!r} ({what}), which no tool writes into a model."
            )
    return Header(values, metadata, 8 + length)


def what_is_there(path: str | Path) -> str:
    """Why a path cannot be read as a safetensors file: nothing, a folder or no regular file is there."""
    path = Path(path)
    if path.is_dir():
        return "is a folder; give the .safetensors file in it"
    return "is not a regular file" if path.exists() else "does not exist"


def check_vae_path(path: Path) -> None:
    """Refuse a VAE that is neither a folder nor a regular file.

    Raises:
        ModelFileError: it is neither.
    """
    if not path.is_dir() and not path.is_file():
        raise ModelFileError(f"The VAE {path} {what_is_there(path)}; give a folder or a .safetensors file.")


def _refuse_duplicate_tensors(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the header; the library takes the last of several tensors of one name."""
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        for name, value in pairs:
            if name in seen and isinstance(value, dict):
                raise ValueError(f"it holds more than one tensor named {name[:60]!r}")
            seen.add(name)
    return table


_DECODER = json.JSONDecoder(parse_constant=lambda _: None, object_pairs_hook=_refuse_duplicate_tensors)


def _refusal(start: bytes, length: int, size: int) -> str:
    if size == 0:
        return "is empty"
    # A valid header starts with a brace at byte 8; its length before that can look like any magic number.
    for magic, what in _NOT_SAFETENSORS if start[8:9] != b"{" else ():
        if start.lstrip().startswith(magic):
            return f"is not a safetensors file but {what}"
    if MAX_HEADER < length <= size - 8:
        return f"claims a header of {length:,} bytes; no real file has more than {MAX_HEADER:,}"
    return ""


@functools.cache
def kind_tables() -> dict[str, Any]:
    """The rows of `assets/unsupported.toml`, with their patterns complete."""
    tables = read_table("unsupported.toml")
    kinds = [(row.replace("<unet>", tables["unet"]), title) for row, title in tables["kinds"]]
    return {**tables, "kinds": kinds}


def unsupported_kind(shapes: Mapping[str, Sequence[int]]) -> str:
    """The kind of a file, for messages, if it is not a Stable Diffusion checkpoint that makes images; else
    ""."""
    if kind := first_match("kinds", shapes):
        return kind
    entry = shapes.get("model.diffusion_model.input_blocks.0.0.weight")
    if entry is not None and len(entry) == 4:
        return channels_kind(entry[1])
    whole = any(key.startswith("model.diffusion_model.") for key in shapes)
    return "" if whole else first_match("parts", shapes)


def not_an_adapter(shapes: Mapping[str, Sequence[int]]) -> str:
    """What a file is without the tensors of a known adapter, for messages, after "it is"; else ""."""
    if not shapes:
        return "no adapter, for it holds no tensors"
    known = first_match("adapters", shapes)
    return "" if known else unsupported_kind(shapes) or "no adapter that is known here"


def first_match(table: str, names: Collection[str]) -> str:
    """The title of the first row of a table of `assets/unsupported.toml` whose pattern is found in a name, or
    ""."""
    rows = kind_tables()[table]
    return next((str(title) for pattern, title in rows if any(map(re.compile(pattern).search, names))), "")


INPAINTING_CHANNELS = 9
"""Of an inpainting UNet's input: noisy latents, a mask, and the latents of the image outside of it."""


def channels_kind(channels: object) -> str:
    """The kind of a UNet with this many input channels, for messages, if neither a text-to-image nor an
    inpainting model; else ""."""
    named = kind_tables()["channels"].get(str(channels), f"a model with {channels} input channels")
    return "" if channels in (4, INPAINTING_CHANNELS) else str(named)


_START = re.compile(
    r"^(?:(?:base_model\.model|model\.diffusion_model|diffusion_model|transformer|unet)\.|lora_(?:unet|transformer)_"
    r"|lycoris_|model\.)+"
)
"""Prefixes of a layer's name in adapter files of any tool."""

_OWN = re.compile(
    r"(?:(?:down|up)_blocks[._]\d+|mid_block)[._](?:attentions[._]\d+[._](?:transformer_blocks|proj)|resnets|\w+samplers)"
    r"|(?:input_blocks[._]\d+|output_blocks[._]\d+|middle_block)[._]\d"
    r"|(?:lora_te[12]?_|text_encoder(?:_2)?\.)?text_model[._]encoder"
)
"""Layers of Stable Diffusion's UNet and CLIP, which no other family has."""


def other_family(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str] | None = None) -> str:
    """The family of an adapter that is not for Stable Diffusion with a UNet, such as "Flux"; "" if none is
    recognized.

    Args:
        shapes: name of each tensor to its shape, in kohya's, diffusers' or ComfyUI's names.
        metadata: of the header, which takes precedence over the names.
    """
    stated = _family_in_header(metadata or {})
    if stated:
        return stated
    names = {key: name for key in shapes if not _OWN.match(name := _START.sub("", key))}
    flat = {key: name.replace(".", "_") for key, name in names.items()}
    if title := first_match("families", (*flat.values(), *names.values())):
        return title
    for row in kind_tables()["widths"]:
        found = re.compile(row["pattern"])
        keys = [key for key, name in flat.items() if found.search(name)]
        if keys:
            sizes = {str(size) for key in keys for size in shapes[key]}
            candidates = {family for width, family in row.get("family", {}).items() if width in sizes}
            return str(candidates.pop() if len(candidates) == 1 else row["title"])
    return ""


def check_family(path: Path, header: Header) -> None:
    """Refuse an adapter of a family that is not supported, by its name.

    Raises:
        AdapterFileError: it is of such a family.
    """
    other = other_family(header.shapes, header.metadata)
    if other:
        raise AdapterFileError(
            f"{path} is for {other}, which cannot be used here: only Stable Diffusion 1.x, 2.x and XL can."
        )


def _family_in_header(metadata: Mapping[str, str]) -> str:
    for key in ("modelspec.architecture", "ss_base_model_version"):
        text = metadata.get(key, "").lower().replace("_", "-").replace(" ", "-")
        for start, title in kind_tables()["headers"].items():
            if text.startswith(start):
                return str(title)
    return ""
