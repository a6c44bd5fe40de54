"""Extracts a LoRA from a fine-tuned model: for each layer the best update of a rank to W_tuned - W_base.

Both models are read layer by layer, so that two layers are in memory at a time. For a share of the energy the
number of random probes doubles until they hold it. The leading singular values are known for every layer and
the total energy is known exactly, so the spectrum also suggests a rank.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_core.errors import ModelFileError
from lora_core.formats.io import save_adapter
from lora_core.formats.layer_shapes import family_layout, folder_layout, reshape_adapter
from lora_core.lora.weights import AdapterWeights, LayerKey
from lora_core.model_files.families import named_targets
from lora_core.tools.delta import BaseWeights
from lora_core.tools.save import check_out, titles
from lora_core.tools.shrink import ShrinkTarget
from lora_core.tools.svd import (
    OnLayer,
    Pair,
    Triples,
    TruncationLoss,
    adapter_from_pairs,
    rank_of_energy,
    split_triples,
    svd_of_matrix,
)

EXTRACTED_KEY = "lora_easel.extracted"
"""Our own key of a header: how it was extracted, as JSON."""
_FIRST_PROBES = 64
_EXTRA = 16
_ROUNDING = 0.5
"""Differences below this share of the dtype's epsilon are rounding."""


@dataclass
class Spectra:
    """The singular values of the differences, as far as they are known.

    Attributes:
        squares: by layer the leading squared singular values, descending.
        energies: by layer the total sum of squares.
        outside: the sum of squares in layers that no LoRA target includes.
    """

    squares: dict[LayerKey, torch.Tensor] = field(default_factory=dict)
    energies: dict[LayerKey, float] = field(default_factory=dict)
    outside: float = 0.0

    def rank_for(self, share: float) -> int | None:
        """The lowest rank for all layers that keeps a share of all energy; None if it is beyond the known
        ones."""
        whole, known = sum(self.energies.values()), min(map(len, self.squares.values()))
        deepest = max(map(len, self.squares.values()))
        kept = torch.zeros(deepest, dtype=torch.float64)
        for squares in self.squares.values():
            sums = squares.cumsum(0)
            kept += torch.cat([sums, sums[-1:].expand(deepest - len(sums))])
        rank = int((kept < share * whole * (1 - 1e-9)).sum()) + 1
        complete = all(
            len(s) >= rank or float(s.sum()) >= self.energies[k] * (1 - 1e-6) for k, s in self.squares.items()
        )
        return rank if rank <= deepest and (rank <= known or complete) else None

    def sentence(self) -> str:
        """The rank that the spectrum suggests, in words."""
        found = {share: self.rank_for(share) for share in (0.9, 0.99)}
        words = [f"rank {rank} would hold {share:.0%} of the change" for share, rank in found.items() if rank]
        known = max(map(len, self.squares.values()))
        if not words:
            return f"The change is of high rank: {known} does not hold 90% of it."
        more = "" if found[0.99] else f"; {known} does not hold 99%"
        text = " and ".join(words) + more
        return text[0].upper() + text[1:] + "."


def extract_lora(
    tuned: BaseWeights, base: BaseWeights, target: ShrinkTarget, on_layer: OnLayer | None = None
) -> tuple[AdapterWeights, TruncationLoss, Spectra]:
    """The LoRA between two models, in fp32 with one alpha; its error, and the spectra.

    Args:
        tuned: the fine-tuned model.
        base: what it was made from.
        target: a rank for all layers, or a share of energy for each.
        on_layer: called after each layer.

    Raises:
        ConfigError: the rank or the energy is out of range.
        ModelFileError: the two are of different kinds or widths, or do not differ.
    """
    target.check()
    if tuned.family.title != base.family.title:
        raise ModelFileError(
            f"{tuned.path} is of the kind {tuned.family.title} and {base.path} of {base.family.title}; give"
            " the base that it was made from."
        )
    loss, spectra = TruncationLoss(), Spectra()
    pairs: dict[LayerKey, Pair] = {}
    for key, delta in _differences(tuned, base, spectra, on_layer):
        pairs[key], spectra.squares[key], energy = _low_rank(delta, target)
        spectra.energies[key] = energy
        # Measured, since the difference of two sums of squares shows nothing below the root of a rounding.
        up, down = (factor.flatten(1) for factor in pairs[key])
        loss.layers[key] = (energy, float((delta.flatten(1) - up @ down).double().square().sum()))
    if not pairs:
        raise ModelFileError(
            f"{tuned.path} has the weights of {base.path} in every layer that a LoRA reaches; there is"
            " nothing to extract."
        )
    return adapter_from_pairs(pairs), loss, spectra


def _differences(
    tuned: BaseWeights, base: BaseWeights, spectra: Spectra, on_layer: OnLayer | None
) -> Iterator[tuple[LayerKey, torch.Tensor]]:
    """The layers that differ by more than rounding, with their differences in fp32."""
    layout = family_layout(base.family) if base.single else folder_layout(base.path, base.family)
    targets = named_targets("locon")
    for done, key in enumerate(layout, 1):
        places = tuned.places(key), base.places(key)
        if bool(places[0]) != bool(places[1]):
            lacking = base if places[0] else tuned
            raise ModelFileError(
                f"{lacking.path} lacks the layer {'.'.join(key)}, which the other model has."
            )
        if not places[0]:
            continue
        ours, theirs = places[0][0].read(), places[1][0].read()
        if ours.shape != theirs.shape:
            raise ModelFileError(
                f"The layer {'.'.join(key)} has the shapes {list(ours.shape)} and {list(theirs.shape)} in the"
                " two models; give the base that this one was made from."
            )
        delta = ours.float() - theirs.float()
        steps = {torch.finfo(tensor.dtype).eps for tensor in (ours, theirs)}
        rounding = _ROUNDING * max(steps) * float(theirs.float().norm()) if len(steps) > 1 else 0.0
        norm = float(delta.norm())
        if not math.isfinite(norm):
            raise ModelFileError(
                f"The layer {'.'.join(key)} holds numbers that are not finite in one of the two."
            )
        pattern = targets.pattern(key[0])
        if norm > rounding and pattern is not None and pattern.fullmatch(key[1]):
            yield key, delta
        elif norm > rounding:
            spectra.outside += norm**2
        if on_layer is not None:
            on_layer(done, len(layout))


def _low_rank(delta: torch.Tensor, target: ShrinkTarget) -> tuple[Pair, torch.Tensor, float]:
    """The pair closest to a difference, the squares of its leading singular values, and its energy."""
    matrix = delta.flatten(1)
    energy = float(matrix.double().square().sum())
    full = min(matrix.shape)
    columns = (target.rank or _FIRST_PROBES - _EXTRA) + _EXTRA
    while True:
        u, values, vh = svd_of_matrix(matrix, columns)
        squares = values.double().square()
        if target.rank is not None:
            kept = min(target.rank, full)
            break
        reached = squares.cumsum(0) >= (target.energy or 0.0) * energy * (1 - 1e-9)
        # The last probes are inaccurate, so the rank must not be found among them.
        if len(values) == full or bool(reached[: columns - _EXTRA].any()):
            kept = int((~reached).sum()) + 1 if bool(reached.any()) else rank_of_energy(values, 1.0)
            break
        columns *= 2
    kept = max(1, min(kept, int((values > 0).sum())))
    return split_triples(Triples(u, values, vh.T).leading(kept), delta.shape[1:]), squares, energy


def extraction_sentences(weights: AdapterWeights, loss: TruncationLoss, spectra: Spectra) -> list[str]:
    """What was extracted and what it cost."""
    ranks = [layer.rank for layer in weights.layers.values()]
    span = f"rank {ranks[0]}" if min(ranks) == max(ranks) else f"ranks {min(ranks)} to {max(ranks)}"
    sentences = [f"{len(ranks)} layers of {span}.", loss.sentence(), spectra.sentence()]
    whole = spectra.outside + sum(spectra.energies.values())
    if spectra.outside > 1e-6 * whole:
        share = math.sqrt(spectra.outside / whole)
        sentences.append(
            f"{share:.2%} of the change is in layers that a LoRA does not reach, and is left out."
        )
    return sentences


def extract_file(
    tuned: str,
    base: str,
    out: Path,
    target: ShrinkTarget,
    precision: str,
    now: float,
    on_layer: OnLayer | None = None,
) -> list[str]:
    """Write the LoRA between two models as a file of the kohya format.

    Args:
        tuned, base: as `--base` names them.
        out: the file to make.
        target: a rank for all layers, or a share of energy for each.
        precision: "fp32", "fp16" or "bf16".
        now: the time, in seconds since the epoch.
        on_layer: called after each layer.

    Returns:
        What was extracted, what it cost and which rank the spectrum suggests, in sentences.

    Raises:
        LoraError: one sentence on what is wrong; nothing is written then.
    """
    check_out(out)
    models = BaseWeights(tuned), BaseWeights(base)
    weights, loss, spectra = extract_lora(*models, target, on_layer)
    family = models[1].family
    header = {
        **titles(out, now),
        "ss_sd_model_name": models[1].path.name,
        "modelspec.implementation": "diffusers",
        "modelspec.description": (
            f"LoRA between {models[1].path.stem} and {models[0].path.stem}, extracted with LoRA Easel"
        ),
        EXTRACTED_KEY: json.dumps({"rank": target.rank, "energy": target.energy, "error": loss.overall}),
    }
    save_adapter(reshape_adapter(weights, family), out, family, dtype=precision, metadata=header)
    return extraction_sentences(weights, loss, spectra)
