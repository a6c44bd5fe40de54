"""The updates that adapter files make to the weights of a base: LoRA, LoCon, LoHa, LoKr, and DoRA on each.

With s = alpha / rank, the update of a weight W0 is

    LoRA   s up @ down                                                      Hu et al. 2021, section 4.1
    LoHa   s (w1a @ w1b) * (w2a @ w2b), multiplied element by element       Yeh et al. 2023, section 4.1
    LoKr   s kron(w1, w2), each of which may be a product itself            the same
    DoRA   m (W0 + update) / |W0 + update| - W0, norms of rows or columns   Liu et al. 2024, equation 5

Files are read here and nothing is approximated; see `shrink.to_lora` for that. The weights of a base are read
layer by layer, without opening the base. New files are saved here, with what was done in the header.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lora_core.errors import AdapterFileError, ModelFileError
from lora_core.formats import kinds, peft
from lora_core.formats.io import (
    CONVERTIBLE,
    check_family,
    file_hashes,
    load_adapter,
    read_tensors,
    save_adapter,
)
from lora_core.formats.kinds import check_lycoris_factors, dora_update, magnitude_from_tensor
from lora_core.formats.layers import (
    Tensors,
    check_finite,
    is_finite,
    kernel_of,
    layer_from_tensors,
    read_alpha,
    reshape_adapter,
    tensors_by_layer,
)
from lora_core.formats.metadata import side_file
from lora_core.lora.weights import AdapterWeights, LayerKey, LayerWeights
from lora_core.model_files.detect import read_base_facts
from lora_core.model_files.families import Family
from lora_core.model_files.header import read_header
from lora_core.models.weight_files import (
    DTYPES,
    PRECISIONS,
    SafetensorsFile,
    TensorSource,
    WeightLocator,
    text_encoder_in_file,
    unet_in_file,
)
from lora_core.settings.schema import FORMATS
from lora_core.system.files import write_atomically

_LARGEST = 2**25
"""Elements of a weight. The largest of Stable Diffusion XL has 29.5 million; a broken file can claim more."""


@dataclass(frozen=True)
class Update:
    """The update of one layer.

    Attributes:
        name: of the layer, for error sentences.
        low: the two factors of a LoRA; None for other kinds.
        roles: the tensors of a LoHa or a LoKr, by LyCORIS' names.
        scale: alpha / rank of a LoHa or a LoKr.
        kernel: (height, width) into which a flattened convolution is unfolded; () for a linear layer.
        magnitude: of a DoRA: (out, 1) where rows are normed, (1, in) where columns are.
    """

    name: str
    low: LayerWeights | None = None
    roles: Mapping[str, torch.Tensor] | None = None
    scale: float = 1.0
    kernel: tuple[int, ...] = ()
    magnitude: torch.Tensor | None = None

    @property
    def size(self) -> tuple[int, ...]:
        """The shape of the update, (out, in) or (out, in, k, k), without computing it."""
        if self.low is not None:
            return (self.low.up.shape[0], *self.low.down.shape[1:])
        assert self.roles is not None
        shapes = {role: tensor.to("meta") for role, tensor in self.roles.items()}
        return tuple(replace(self, roles=shapes).product().shape)

    def check_base(self, shape: torch.Size) -> None:
        """Refuse a base in which the layer's weight has a shape that does not fit.

        Raises:
            AdapterFileError: names both shapes.
        """
        size = torch.Size(self.size)
        if size[0] != shape[0] or size.numel() != shape.numel():
            raise AdapterFileError(
                f"{self.name} has the shape {list(size)} in the file and {list(shape)} in the base; the file"
                " is for another base."
            )

    def product(self) -> torch.Tensor:
        """The update before magnitudes, in fp32."""
        if self.low is not None:
            return self.low.delta()
        assert self.roles is not None
        tensors = {role: tensor.float() for role, tensor in self.roles.items()}
        dense = self.scale * (_loha(tensors) if "hada_w1_a" in tensors else _lokr(tensors))
        if dense.dim() == 2 and self.kernel:
            return dense.reshape(dense.shape[0], -1, *self.kernel)
        return dense.flatten(1) if dense.shape[2:] == (1, 1) and not self.kernel else dense

    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(up, down) whose product is the update before magnitudes; None where their rank would not be low.

        An elementwise or Kronecker product of two products is a product of all pairs of their columns.
        """
        if self.low is not None:
            return self.low.scale * self.low.up.double(), self.low.down
        assert self.roles is not None
        pair = _paired({role: tensor.float() for role, tensor in self.roles.items()})
        if pair is None or 2 * pair[1].shape[0] > min(pair[0].shape[0], pair[1].shape[1]):
            return None
        up, down = self.scale * pair[0].double(), pair[1].reshape(pair[1].shape[0], *self.size[1:])
        return up.reshape(*up.shape, *(1 for _ in self.size[2:])), down

    def delta(self, weight: torch.Tensor | None) -> torch.Tensor:
        """The update at strength 1, in fp32; only a DoRA needs the frozen weight, in fp32 too.

        Raises:
            AdapterFileError: the weight has another shape.
        """
        product = self.product()
        if self.magnitude is None:
            return product
        assert weight is not None
        self.check_base(weight.shape)
        rows = self.magnitude.shape[1] == 1
        if self.magnitude.numel() != weight.shape[0 if rows else 1]:
            raise AdapterFileError(
                f"{self.name} has {self.magnitude.numel()} DoRA magnitudes for"
                f" {weight.shape[0 if rows else 1]} {'rows' if rows else 'columns'} of the base's layer."
            )
        return dora_update(weight, product, self.magnitude)


def _loha(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    halves = []
    for n in "12":
        a, b, core = tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"], tensors.get(f"hada_t{n}")
        # In the Tucker form the first factor is transposed.
        halves.append(a @ b if core is None else torch.einsum("ijkl,jr,ip->prkl", core, b, a))
    return halves[0] * halves[1]


def _lokr(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    first, second = (
        tensors[f"lokr_w{n}"] if f"lokr_w{n}" in tensors else _lokr_half(tensors, n) for n in "12"
    )
    return torch.kron(first.reshape(*first.shape, *(1,) * (second.dim() - 2)), second)


def _lokr_half(tensors: Mapping[str, torch.Tensor], n: str) -> torch.Tensor:
    a, b = tensors[f"lokr_w{n}_a"], tensors[f"lokr_w{n}_b"]
    if n == "2" and "lokr_t2" in tensors:
        return torch.einsum("ijkl,ip,jr->prkl", tensors["lokr_t2"], a, b).contiguous()
    return a @ b.flatten(1)


def _paired(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A LoHa or a LoKr as (up, down), or None where one of its two parts is no product."""
    if "hada_t1" in tensors or "lokr_t2" in tensors:
        return None
    if "hada_w1_a" in tensors:
        a, b, c, d = (tensors[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        up = a[:, :, None] * c[:, None, :]
        return up.flatten(1), (b[:, None, :] * d[None, :, :]).flatten(0, 1)
    if "lokr_w2" in tensors:
        return None
    if "lokr_w1" in tensors:
        first = tensors["lokr_w1"], torch.eye(tensors["lokr_w1"].shape[1])
    else:
        first = tensors["lokr_w1_a"], tensors["lokr_w1_b"]
    second = tensors["lokr_w2_a"], tensors["lokr_w2_b"].flatten(1)
    return torch.kron(first[0], second[0]), torch.kron(first[1], second[1])


Updates = dict[LayerKey, Update]


def shared_family(paths: Iterable[Path], why: str) -> Family | None:
    """The family that adapter files are for, None where none of them says it.

    Raises:
        AdapterFileError: they are for different ones; `why` ends the sentence.
    """
    families: dict[str, tuple[Path, Family]] = {}
    for path in paths:
        header = read_header(path)
        family = kinds.detect_family(header.shapes, header.metadata)
        if family is not None:
            families.setdefault(family.title, (path, family))
    if len(families) > 1:
        (one, first), (two, second), *_ = families.values()
        raise AdapterFileError(f"{one} is for {first.title} and {two} for {second.title}; {why}.")
    return next((family for _, family in families.values()), None)


def file_updates(path: Path, known: Family | None = None) -> tuple[Updates, dict[str, str], Family]:
    """The updates in an adapter file of any of these kinds, its metadata, and the family that it is for: the
    `known` one of the base that it is used with, if there is one.

    Raises:
        AdapterFileError: the file is broken, of another kind, for another family, or does not name its own.
    """
    header = read_header(path)
    plain = None
    if kinds.detect_kind(header.shapes) in CONVERTIBLE:
        check_family(path, header)
    else:
        plain = load_adapter(path, known)
    family = known or kinds.require_family(path, header.shapes, header.metadata, "it cannot be used")
    if plain is not None:
        return _plain_updates(plain, family), plain.metadata, family
    other = kinds.mismatch(header.shapes, header.metadata, known) if known else ""
    if other:
        raise AdapterFileError(f"{path} is for {other}, the base is the {family.title}.")
    tensors, metadata = read_tensors(path)
    try:
        return _mixed_updates(tensors, metadata, family), metadata, family
    except AdapterFileError as error:
        raise AdapterFileError(f"{path} cannot be used. {error}") from error


def _plain_updates(weights: AdapterWeights, family: Family) -> Updates:
    layers = reshape_adapter(weights, family).layers
    return {key: Update(".".join(key), layer) for key, layer in layers.items()}


def _mixed_updates(tensors: Tensors, metadata: Mapping[str, str], family: Family) -> Updates:
    """The updates of a file with LoHa, LoKr or DoRA in it, beside plain pairs."""
    extras = kinds.extra_keys(tensors)
    updates: Updates = {}
    pairs: dict[LayerKey, LayerWeights] = {}
    magnitudes, own_alphas = {}, set()
    found = tensors_by_layer({key: t for key, t in tensors.items() if key not in extras}, family)
    for layer, (name, roles) in found.items():
        if "magnitude" in roles:
            magnitudes[layer] = magnitude_from_tensor(name, roles.pop("magnitude"))
            if not roles.keys() - {"alpha"}:
                raise AdapterFileError(f"{name!r} has DoRA magnitudes, but no update.")
        factors = {role: tensor for role, tensor in roles.items() if role.startswith(("hada_", "lokr_"))}
        if factors:
            updates[layer] = _lycoris_update(name, layer, factors, roles.get("alpha"), family)
        else:
            pairs[layer] = layer_from_tensors(name, roles)
            own_alphas |= {layer} if "alpha" in roles else set()
    plain = peft.apply_header_alphas(pairs, metadata, own_alphas)
    check_finite(plain)
    updates |= _plain_updates(plain, family)
    return updates | {
        layer: replace(updates[layer], magnitude=magnitude) for layer, magnitude in magnitudes.items()
    }


def _lycoris_update(
    name: str, layer: LayerKey, roles: Tensors, alpha: torch.Tensor | None, family: Family
) -> Update:
    if alpha is None and "." in name:
        raise AdapterFileError(
            f"{name!r} is a LoHa or a LoKr under PEFT's names, where the strength is in no file; convert it"
            " with PEFT first."
        )
    check_lycoris_factors(name, roles)
    inner = next((roles[key] for key in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if key in roles), None)
    # Without a rank, as in a LoKr of two full matrices, alpha means nothing.
    scale = 1.0
    if alpha is not None and inner is not None:
        if alpha.numel() != 1:
            raise AdapterFileError(
                f"{name!r} has an alpha of shape {list(alpha.shape)}; it must be one number."
            )
        scale = read_alpha(alpha) / inner.shape[0]
    update = Update(".".join(layer), None, roles, scale, kernel_of(layer, family) or ())
    if not (math.isfinite(scale) and all(map(is_finite, roles.values()))):
        raise AdapterFileError(f"{name!r} holds numbers that are not finite (NaN or infinity).")
    try:
        size = update.size
    except RuntimeError as error:
        shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in roles.items())
        raise AdapterFileError(f"{name!r} has shapes that do not fit together: {shapes}.") from error
    if len(size) not in (2, 4) or torch.Size(size).numel() > _LARGEST:
        raise AdapterFileError(
            f"{name!r} claims a weight of the shape {list(size)}, which no layer here has."
        )
    return update


class BaseWeights:
    """The weights of a base on disk, by the layers that adapters name.

    A folder may hold a layer twice, in full and in half precision.
    """

    def __init__(self, name: str) -> None:
        """Read the headers of the base's files.

        Args:
            name: "demo", a diffusers folder, a `.safetensors` file, or a hub id that is in the local cache.

        Raises:
            ModelFileError: nothing usable is there; a `.ckpt` is not read.
        """
        facts = read_base_facts(name)
        if facts.family is None:
            raise ModelFileError(
                f"The base {name} is a .ckpt; this needs a .safetensors file or a diffusers folder, so"
                " convert it first."
            )
        self.path: Path = facts.path
        self.family: Family = facts.family
        self.single = facts.single_file
        self._finders = self._in_file() if self.single else {}
        self._files: dict[str, list[SafetensorsFile]] = {}

    def _in_file(self) -> dict[str, WeightLocator]:
        file = SafetensorsFile(self.path)
        encoders = {e.part: text_encoder_in_file(file, e) for e in self.family.text_encoders}
        return {self.family.denoiser: unet_in_file(file, self.family), **encoders}

    def places(self, layer: LayerKey) -> list[TensorSource]:
        """The tensors that hold a layer's weight; none, if the base has no such layer."""
        part, path = layer
        if self.single:
            source = self._finders[part](f"{path}.weight") if part in self._finders else None
            return [source] if source else []
        if part not in self._files:
            paths = sorted((self.path / part).glob("*.safetensors"))
            self._files[part] = [SafetensorsFile(found) for found in paths]
        # Newer transformers save text encoders without this level.
        names = dict.fromkeys((f"{path}.weight", f"{path.removeprefix('text_model.')}.weight"))
        return [TensorSource(file, key) for file in self._files[part] for key in names if key in file.shapes]

    def weight(self, layer: LayerKey) -> torch.Tensor:
        """A layer's weight in fp32.

        Raises:
            ModelFileError: the base has no such layer.
        """
        places = self.places(layer)
        if not places:
            raise ModelFileError(
                f"The base {self.path} has no layer {'.'.join(layer)}; the file is for another."
            )
        return places[0].read().float()


# New files.


def check_out(out: Path) -> None:
    """Refuse a path for a new adapter file before the work rather than after it.

    Raises:
        AdapterFileError: it exists, does not end in .safetensors, or is in a folder that does not exist.
    """
    if out.exists():
        raise AdapterFileError(f"{out} exists already; choose another name or remove it first.")
    if out.suffix.lower() != ".safetensors":
        raise AdapterFileError(f"--out {out} should end in .safetensors.")
    if not out.absolute().parent.is_dir():
        raise AdapterFileError(f"--out {out} cannot be written: its folder does not exist; make it first.")


def file_precision(path: Path) -> str:
    """The dtype of a file's factors; fp32 where they differ or have one that is not written here."""
    entries = read_header(path).tensors
    found = {DTYPES[entry["dtype"]] for key, entry in entries.items() if not key.endswith(".alpha")}
    if len(found) != 1:
        return "fp32"
    return next((name for name, dtype in PRECISIONS.items() if dtype in found), "fp32")


def file_record(path: Path) -> dict[str, str]:
    """How a header refers to a file: its name and the first 12 digits of its sha256."""
    return {"name": path.stem, "sha256": str(file_hashes(path)["sha256"])[:12]}


def titles(out: Path) -> dict[str, str]:
    """The metadata that every new file has."""
    return {
        "ss_output_name": out.stem,
        "modelspec.title": out.stem,
        "modelspec.date": datetime.now(UTC).replace(microsecond=0).isoformat(),
    }


def save_with_side_file(
    weights: AdapterWeights,
    family: Family,
    out: Path,
    precision: str,
    header: Mapping[str, str],
    file_format: str = "kohya",
) -> None:
    """Write an adapter file, and the side file that A1111 reads if there is none.

    Raises:
        AdapterFileError: the weights are not finite or do not fit, or the file cannot be written.
    """
    save_adapter(
        reshape_adapter(weights, family),
        out,
        family,
        format=file_format,
        dtype=precision,
        metadata=dict(header),
    )
    beside = out.with_suffix(".json")
    if not beside.exists():
        write_atomically(beside, side_file(header.get("modelspec.trigger_phrase", "")))


@dataclass(frozen=True)
class Rewrite:
    """An adapter file to be saved anew with other weights, in its own format and with its own metadata.

    Attributes:
        precision: "fp32", "fp16", "bf16", `io.AS_IT_IS`, or "" for that of the source.
    """

    source: Path
    out: Path
    precision: str = ""

    def save(self, weights: AdapterWeights, family: Family, key: str, record: Mapping[str, Any]) -> None:
        """Save the adapter.

        Args:
            weights: with the source's metadata.
            key: of the header, for the record.

        Raises:
            AdapterFileError: the weights are not finite or do not fit, or the file cannot be written.
        """
        named = kinds.file_format(read_header(self.source).shapes)
        done = {key: json.dumps({"from": file_record(self.source), **record})}
        save_with_side_file(
            weights,
            family,
            self.out,
            self.precision or file_precision(self.source),
            {**weights.metadata, **titles(self.out), **done},
            named if named in FORMATS else "kohya",
        )

    @property
    def times_smaller(self) -> float:
        """The size of the source over that of the saved file."""
        return self.source.stat().st_size / self.out.stat().st_size
