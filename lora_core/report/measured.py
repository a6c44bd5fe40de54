"""What is measured of an adapter on a bench, as plain numbers: the intrinsic rank and the best strength."""

import tempfile
import time
from pathlib import Path
from typing import Any

from lora_core.adapters.weights import AdapterWeights
from lora_core.analysis.bench import Measured
from lora_core.analysis.intrinsic import intrinsic_rank
from lora_core.analysis.rewrite import Rewriting
from lora_core.analysis.shrink import SHRUNK_KEY, cut, decomposed, opened_plain
from lora_core.analysis.strength import fitted, fitted_apart
from lora_core.spec.families import Family


def measured_rank(file: Path, family: Family, measured: Measured) -> dict[str, Any]:
    """The intrinsic rank of an adapter file, and by how much the smaller file would be smaller.

    Args:
        file: a plain LoRA.
        family: of its base.
        measured: gives the gains of adapters, as `Bench.gains` does.

    Returns:
        The document of `shrink --intrinsic --json`; `ranks` by layer is what `cut_file` takes.

    Raises:
        AdapterFileError: it is no plain LoRA, or gains nothing on these pictures.
    """
    weights, known = opened_plain(file, family)
    smaller, found = intrinsic_rank(weights, measured)
    with tempfile.TemporaryDirectory() as folder:
        to = Rewriting(file, Path(folder) / file.name, "", time.time())
        to.write(smaller, known, SHRUNK_KEY, {"intrinsic": found.rank})
        times = to.times_smaller
    return {**found.document(times), "sentences": [found.sentence(times)]}


def cut_file(to: Rewriting, known: Family | None, ranks: dict[tuple[str, str], int], record: Any) -> str:
    """Write an adapter cut to the ranks that were found for it.

    Args:
        to: from where and where to.
        known: the family of the base, if there is one.
        ranks: by layer.
        record: what the header says of it.

    Returns:
        What was done, in a sentence.

    Raises:
        AdapterFileError: it is no plain LoRA, or cannot be written.
    """
    weights, family = opened_plain(to.source, known)
    smaller: AdapterWeights = cut(decomposed(weights), ranks)[0]
    to.write(smaller, family, SHRUNK_KEY, record)
    return f"The file is {to.times_smaller:.1f} times smaller."


def measured_strength(file: Path, family: Family, measured: Measured, apart: bool = False) -> dict[str, Any]:
    """The best strength of an adapter file, or one for the UNet and one for the text encoders.

    Returns:
        `fits`: rows of `part` ("" for the whole adapter, else "UNet" or "text encoders") and what `Fit` says;
        `strengths`: to bake in; `sentences`.

    Raises:
        LoraError: it is no plain LoRA, or changes one of the two alone.
    """
    weights = opened_plain(file, family)[0]
    if apart:
        unet, text = fitted_apart(weights, measured)
        fits = [("UNet", "On the UNet the adapter", unet), ("text encoders", "On the text encoders it", text)]
    else:
        fits = [("", "The adapter", fitted(weights, measured))]
    return {
        "fits": [{"part": part, **fit.document()} for part, _, fit in fits],
        "strengths": [fit.strength for _, _, fit in fits],
        "sentences": [fit.sentence(what) for _, what, fit in fits],
    }
