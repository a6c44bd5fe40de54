"""Adapter files: `load_adapter` and `save_adapter`, and the functions that they use.

Reading goes through the safetensors library, after `model_files/header.py` has checked each claim of the
header. Writing does not: the library orders metadata differently at each save, and equal adapters shall give
equal bytes (hashes, tests, resumed runs); and merged checkpoints are streamed through the same header.
"""

import hashlib
import importlib
import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lora_core.errors import AdapterFileError, wrap_os_errors
from lora_core.formats import kinds
from lora_core.formats.layers import (
    LYCORIS_ROLES,
    Tensors,
    check_finite,
    layer_from_tensors,
    reshape_adapter,
    tensors_by_layer,
)
from lora_core.formats.peft import HEADER_KEY, add_peft_config, apply_header_alphas, from_tensors
from lora_core.lora.lycoris import LycorisUpdate
from lora_core.lora.weights import AdapterWeights, LayerKey, LayerWeights
from lora_core.model_files.families import Family
from lora_core.model_files.header import Header, check_family, read_header
from lora_core.models.weight_files import DTYPES, PRECISIONS, SafetensorsFile
from lora_core.settings.schema import FORMATS, chosen
from lora_core.system.files import replacing, safe_name, tokens_folder

AS_IT_IS = "as it is"
"""In place of a dtype: each tensor keeps its own."""

CONVERTIBLE = ("LoHa", "LoKr", "OFT", "DoRA")
"""Kinds of adapters that `tools/shrink.py` turns into plain LoRAs."""

_WRITER_KEYS = {
    HEADER_KEY, "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "format",
}  # fmt: skip
"""Header keys that `save_adapter` alone decides on."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def load_adapter(path: str | Path, family: Family | None = None, plain: bool = True) -> AdapterWeights:
    """The adapter in a file of any known format; `family` is the base's, if it is to be used with one.

    `plain`: whether a LoHa, a LoKr, an OFT or a DoRA is refused; else its layers are in `others`.

    Raises:
        AdapterFileError: the file is broken, of a kind that cannot be used, holds values that are not finite,
            or is for another family.
    """
    path = Path(path)
    header = read_header(path)
    kind = kinds.detect_kind(header.shapes)
    if kind != "unknown":
        check_family(path, header)
    is_plain = kind in (kinds.LORA, kinds.LOCON)
    if not is_plain and (plain or kind not in CONVERTIBLE):
        what = kinds.describe_kind(kind, header.shapes) + ("" if kind == "unknown" else ", not a plain LoRA")
        base, offer = " --base BASE" if kind in (kinds.DORA, "OFT") else "", ""
        if kind in CONVERTIBLE:
            verb = f"lora-easel merge {path.name} --out NEW.safetensors --rank 32{base}"
            offer = f" `{verb}` makes a plain LoRA of it."
        raise AdapterFileError(f"{path} cannot be used: it is {what}.{offer}")
    tensors, texts = read_tensors(path)
    metadata = add_peft_config(path, tensors, texts)
    if is_plain and kinds.file_format(tensors) not in FORMATS:
        raise AdapterFileError(f"{path} cannot be used: its tensors are named like no known format.")
    if not is_plain and family is None:
        family = kinds.require_family(path, header.shapes, header.metadata, "it cannot be used")
    other = kinds.mismatch(header.shapes, metadata, family) if family else ""
    if family and other:
        raise AdapterFileError(f"{path} is for {other}, the base is the {family.title}.")
    try:
        if is_plain:
            weights: AdapterWeights = from_tensors(tensors, metadata)
        else:
            assert family is not None
            weights = _mixed_weights(tensors, metadata, family)
        weights = replace(weights, tokens=kinds.bundled_tokens(tensors))
        check_finite(weights)
    except AdapterFileError as error:
        raise AdapterFileError(f"{path} cannot be used. {error}") from error
    parts = dict.fromkeys([*weights.parts(), *weights.tokens])
    extra = [part for part in parts if family and part not in family.parts]
    if family and extra:
        raise AdapterFileError(f"{path} adapts {', '.join(extra)}, which the {family.title} does not have.")
    return weights


def _mixed_weights(tensors: Tensors, metadata: Mapping[str, str], family: Family) -> AdapterWeights:
    """The adapter in a file with LoHa, LoKr, OFT or DoRA in it, beside plain pairs."""
    extras = kinds.extra_keys(tensors)
    others: dict[LayerKey, LycorisUpdate] = {}
    pairs: dict[LayerKey, LayerWeights] = {}
    magnitudes, own_alphas = {}, set()
    found = tensors_by_layer({key: t for key, t in tensors.items() if key not in extras}, family)
    for layer, (name, roles) in found.items():
        if "magnitude" in roles:
            magnitudes[layer] = kinds.magnitude_from_tensor(name, roles.pop("magnitude"))
            if not roles.keys() - {"alpha"}:
                raise AdapterFileError(f"{name!r} has DoRA magnitudes, but no update.")
        factors = {role: tensor for role, tensor in roles.items() if role.startswith(LYCORIS_ROLES)}
        if factors:
            others[layer] = kinds.lycoris_update(name, layer, factors, roles.get("alpha"), family)
        else:
            pairs[layer] = layer_from_tensors(name, roles)
            own_alphas |= {layer} if "alpha" in roles else set()
    plain = reshape_adapter(apply_header_alphas(pairs, metadata, own_alphas), family)
    for layer, magnitude in magnitudes.items():
        update = others.get(layer) or LycorisUpdate(".".join(layer), plain.layers.pop(layer))
        others[layer] = replace(update, magnitude=magnitude)
    return AdapterWeights(plain.layers, plain.metadata, dict(others))


def save_adapter(
    weights: AdapterWeights,
    path: Path,
    family: Family,
    format: str = "kohya",
    dtype: str = "fp32",
    metadata: Mapping[str, str] | None = None,
    keep_alphas: bool = False,
) -> None:
    """Write an adapter file atomically, and read it back before it replaces anything.

    Args:
        path: the file; an existing one is replaced.
        family: whose layer names to use.
        format: a row of `FORMATS`.
        dtype: "fp32", "fp16", "bf16" or `AS_IT_IS`.
        metadata: of the header; what follows from the weights is added. None for the adapter's own.
        keep_alphas: see `kohya.to_tensors`.

    Raises:
        AdapterFileError: the weights are not finite or do not fit the dtype, the file cannot be written, or
            reading it back gives something else.
    """
    chosen(FORMATS, format, "format")
    if dtype not in (*PRECISIONS, AS_IT_IS):
        raise AdapterFileError(f"{dtype!r} is not a file precision; choose one of {', '.join(PRECISIONS)}.")
    check_finite(weights)
    if dtype == "fp16":
        weights = replace(weights, layers={key: _balanced(one) for key, one in weights.layers.items()})
    translator = _translator(format)
    tensors = {
        name: tensor if name.endswith((".alpha", ".dora_scale")) else _cast(name, tensor, dtype)
        for name, tensor in translator.to_tensors(weights, family, keep_alphas).items()
    }
    given = weights.metadata if metadata is None else metadata
    texts = {key: value for key, value in given.items() if key not in _WRITER_KEYS}
    texts |= translator.header(weights, family)
    write_tensors(Path(path), tensors, texts | header_hashes(tensors, texts))


def write_tokens(weights: AdapterWeights, path: Path) -> list[Path]:
    """Write each new token of the adapter in `path` to a file of its own: tools take the word from the file's
    name, and diffusers one tensor, or each of SDXL's two.

    Raises:
        AdapterFileError: one cannot be written.
    """
    folder, found = tokens_folder(path), []
    for token in dict.fromkeys(token for tokens in weights.tokens.values() for token in tokens):
        tensors = {kinds.TOKEN_PARTS[part]: tokens[token] for part, tokens in weights.tokens.items()}
        if len(tensors) == 1:
            tensors = {"emb_params": tensors.popitem()[1]}
        # In a file of somebody else the word can be a path.
        found.append(folder / safe_name(re.sub(r"[/\\]", "_", f"{token}.safetensors")).name)
        with wrap_os_errors(AdapterFileError, f"{folder} cannot be written"):
            folder.mkdir(exist_ok=True)
        write_tensors(found[-1], tensors, {})
    return found


def write_adapter(
    weights: AdapterWeights, path: Path, format: str, precision: str, family: Family,
    header: Mapping[str, str], keep_alphas: bool = False,
) -> None:  # fmt: skip
    """`save_adapter`, by its former name and order of arguments, for scripts."""
    save_adapter(weights, path, family, format, precision, header, keep_alphas)


def convert_adapter(source: Path, target: Path, format: str, keep_alphas: bool = False) -> list[str]:
    """Write `source` in another format to `target`; factors keep their dtype, bit for bit.

    Args:
        source: a LoRA file of any known format.
        format: a row of `FORMATS`.
        keep_alphas: keep an alpha of its own for each layer of a kohya file.

    Returns:
        What to know about the new file, in sentences.

    Raises:
        AdapterFileError: the source cannot be read, its family has no names here, or the target cannot be
            written.
    """
    header = read_header(source)
    weights = load_adapter(source)
    lost = "its layers have no names in another format"
    family = kinds.require_family(source, header.shapes, header.metadata, lost, "")
    reshaped = reshape_adapter(weights, family)
    left_out = kinds.extras_sentence(header.shapes, format == "kohya")
    notes = [left_out] if left_out else []
    if any(reshaped.layers[key].down.shape != layer.down.shape for key, layer in weights.layers.items()):
        notes.append("1 x 1 convolutions and linear layers now have the shapes that the base's layers have.")
    if any(key.endswith("lora_mid.weight") for key in header.tensors):
        notes.append("layers of three factors (Tucker) now have two, with the same product.")
    # A1111 shows two files of one alias as one.
    metadata = header.metadata | {"ss_output_name": target.stem, "modelspec.title": target.stem}
    save_adapter(reshaped, target, family, format, AS_IT_IS, metadata, keep_alphas)
    if files := write_tokens(reshaped, target):
        notes.append(f"new tokens are in files of their own too, in {files[0].parent}.")
    alphas = {layer.alpha for layer in weights.layers.values()}
    if 0.0 in alphas and keep_alphas and format == "kohya":
        notes.append("some layers have an alpha of 0, which kohya's own loader reads as the rank.")
    if format == "diffusers":
        notes.append("only diffusers reads this format completely; the other tools need the kohya format.")
    elif len(alphas) > 1 and keep_alphas:
        notes.append(
            "the layers have different alphas, which diffusers reads at the wrong strength; A1111, Forge,"
            " ComfyUI, InvokeAI and kohya read it right."
        )
    elif len(alphas) > 1:
        notes.append(
            "the layers had different alphas; the file has one, and the factors were scaled to match. To keep"
            " every bit, give --keep-alphas."
        )
    return notes


def _translator(name: str) -> ModuleType:
    """The module behind a row of `FORMATS`: to_tensors and header."""
    return importlib.import_module(FORMATS[name].load.partition(":")[0])


def _balanced(layer: LayerWeights) -> LayerWeights:
    """The layer with factors of like size where fp16 would round one of them coarsely: one divided and the
    other multiplied by a power of 2, which leaves their product as it is."""
    down, up = (factor.float().square().mean().sqrt() for factor in (layer.down, layer.up))
    if not 0 < min(down, up) < torch.finfo(torch.float16).tiny:
        return layer
    shift = 2.0 ** round(float(torch.log2(down / up)) / 2)
    return replace(layer, down=layer.down.float() / shift, up=layer.up.float() * shift)


def _cast(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    cast = tensor.detach().cpu().to(PRECISIONS.get(dtype, tensor.dtype))
    if not torch.isfinite(cast).all():
        largest = float(tensor.abs().max())
        raise AdapterFileError(
            f"{name} holds {largest:.4g}, which is more than {dtype} can hold; export as fp32 or bf16."
        )
    return cast


def read_tensors(path: Path, only: str = "", header: Header | None = None) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Nothing in a file is ever executed.

    Args:
        only: the end of the names of tensors to read.
        header: of the file, where it was read already.

    Raises:
        AdapterFileError: one sentence on the problem.
    """
    header = header or read_header(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            wanted = [name for name in header.tensors if name.endswith(only)]
            return {name: file.get_tensor(name) for name in wanted}, header.metadata
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise AdapterFileError(f"{path} cannot be read: {error}.") from error


def write_tensors(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, and read it back before it replaces anything.

    Raises:
        AdapterFileError: it cannot be written, or reading it back gives something else.
    """
    with wrap_os_errors(AdapterFileError, f"{path} cannot be written"), replacing(path) as draft:
        write_pieces(draft, serialize(tensors, metadata))
        _check_written(draft, tensors)


def _check_written(path: Path, meant: Tensors) -> None:
    file = SafetensorsFile(path)
    if file.shapes.keys() != meant.keys():
        raise AdapterFileError(
            f"{path} was read back with other tensors than were written; is the disk failing?"
        )
    for name, tensor in meant.items():
        found = file.tensor(name)
        same = found.dtype == tensor.dtype and found.shape == tensor.shape
        # As bytes, since NaN is unlike itself and -0.0 equals 0.0.
        if not same or not torch.equal(as_bytes(found), as_bytes(tensor)):
            raise AdapterFileError(f"{name} was read back from {path} changed; is the disk failing?")


def write_pieces(path: Path, data: Iterable[bytes | memoryview]) -> None:
    """Write a file."""
    with open(path, "wb") as file:
        for piece in data:
            file.write(piece)


def serialize(tensors: Tensors, metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """A safetensors file piece by piece, the header first; equal contents give equal bytes.

    Tensors are ordered by item size and then by name, so that each is aligned.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries, end = {}, 0
    for name in order:
        tensor = tensors[name]
        offsets = [end, end + tensor.numel() * tensor.dtype.itemsize]
        dtype = _DTYPE_NAMES[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    yield encode_header(entries, metadata)
    for name in order:
        yield as_bytes(tensors[name]).numpy().data


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes as in a file, as a flat tensor of uint8."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def encode_header(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file: its length and the header, padded so that tensors are aligned."""
    header: dict[str, Any] = {}
    if metadata:
        # A lone surrogate, as from a badly decoded file name, would make the header unreadable for others.
        header["__metadata__"] = {
            key: metadata[key].encode("utf-8", "replace").decode("utf-8") for key in sorted(metadata)
        }
    raw = json.dumps(header | dict(entries), separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def header_hashes(tensors: Tensors, metadata: Mapping[str, str]) -> dict[str, str]:
    """The two hashes that tools expect in a file's header.

    `sshs_model_hash` is the SHA-256 of the tensor bytes alone. `sshs_legacy_hash` is A1111's old one: 64 KiB
    from 1 MiB on, of the file with only `ss_` keys in its header (so that later edits do not change it).
    """
    whole, window, start = hashlib.sha256(), hashlib.sha256(), 0
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    for number, piece in enumerate(serialize(tensors, kept)):
        if number:
            whole.update(piece)
        window.update(piece[max(0, 0x100000 - start) : max(0, 0x110000 - start)])
        start += len(piece)
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": window.hexdigest()[:8]}


def file_hashes(path: Path, header: Header | None = None) -> dict[str, Any]:
    """The hashes by which users and sites know a file; `header` is its own, where it was read already.

    Returns:
        `sha256` of the file, `autov2` (its first 10 digits), `autov3` (the first 12 of the tensor bytes'
        hash), and `hash_matches`: whether the header's own hash is right, None if it has none.

    Raises:
        AdapterFileError: one sentence on the problem.
    """
    header = header or read_header(path)
    whole, data = hashlib.sha256(), hashlib.sha256()
    with wrap_os_errors(AdapterFileError, f"{path} cannot be read"), open(path, "rb") as file:
        whole.update(file.read(header.start))
        while chunk := file.read(2**20):
            whole.update(chunk)
            data.update(chunk)
    claimed = header.metadata.get("sshs_model_hash")
    return {
        "sha256": whole.hexdigest(),
        "autov2": whole.hexdigest()[:10],
        "autov3": data.hexdigest()[:12],
        "hash_matches": None if claimed is None else claimed.lower().removeprefix("0x") == data.hexdigest(),
    }
