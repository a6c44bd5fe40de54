"""What a run has learned of each of its images, and what the caption contributed.

Base and adapter are measured on the same draws of every image, held-out ones too. A wrong caption does not
show in the gain: the loss with it is high before, so there is much to gain. It shows in the adapted model,
which predicts such an image no better with its caption than without one, while the captions of the others
help.
"""

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_core.data.audit import TrainingView, step_shares
from lora_core.data.captions import plain_caption
from lora_core.data.dataset import open_dataset, require_clean
from lora_core.data.holdout import split_holdout
from lora_core.data.scan import ImageRecord
from lora_core.evaluate.validator import (
    EvalImage,
    OnProgress,
    encode_eval_image,
    eval_losses,
    standard_error,
)
from lora_core.formats.io import load_adapter
from lora_core.lora.inject import Merger
from lora_core.lora.weights import AdapterWeights, LoadedLora
from lora_core.models.device import best_device, dtype_of
from lora_core.models.encode import encode_prompt
from lora_core.models.load import BaseModel, load_base
from lora_core.models.unet import PromptEmbeds
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import ModelSection
from lora_core.system.files import write_atomically

FILE = "pictures.json"
OUTLIER = 2.5
"""An image is an outlier from this many spreads below the median, its own error included."""
_FEWEST = 5
_LITTLE = 0.25
OpenBase = Callable[[ModelSection], BaseModel]
"""From the model settings to the base with no adapter in it."""


def measure_run_images(
    run: RunFolder,
    which: str = "best",
    draws: int = 8,
    on_progress: OnProgress | None = None,
    open_base: OpenBase | None = None,
) -> dict[str, Any]:
    """Measure a run's adapter on each of its images, and write the result to `pictures.json` of the run.

    Args:
        run: with at least one checkpoint.
        which: `best` (the last one where none was the best), `last`, or a step.
        draws: noise draws per image.
        on_progress: called in each of four passes over the images.
        open_base: None to load the base here.

    Returns:
        `step`, `triples` (the draws), and `rows`, see `image_rows`.

    Raises:
        RunError: there is no such checkpoint.
        DatasetError, ModelFileError, AdapterFileError: the images, the base or the adapter cannot be read.
    """
    config, step = run.config(), run.step_of(which)
    dataset = open_dataset(config.dataset.path, run.path.parent.parent / "cache" / "datasets")
    require_clean(dataset)
    base = (open_base or _load_base)(config.model)
    weights = load_adapter(run.checkpoint(step) / "adapter.safetensors", base.family)
    rows = image_rows(base, dataset.records, weights, config, draws, on_progress)
    found = {"step": step, "triples": draws, "rows": rows}
    write_atomically(run.path / FILE, json.dumps(found, ensure_ascii=False).encode())
    return found


def _load_base(model: ModelSection) -> BaseModel:
    device = best_device()
    return load_base(
        model.base, device, dtype_of("auto", device), model.prediction, model.vae,
        zero_snr=model.zero_terminal_snr,
    )  # fmt: skip


def image_rows(
    base: BaseModel,
    records: Sequence[ImageRecord],
    weights: AdapterWeights,
    config: RunConfig,
    draws: int = 8,
    on_progress: OnProgress | None = None,
) -> list[dict[str, Any]]:
    """What was learned of each image: outliers first, then the least learned ones.

    Args:
        base: with no adapter in it, before and after.
        records: all images of the run.
        weights: the adapter.
        config: of the run.
        draws: noise draws per image.
        on_progress: called in each of four passes over the images.

    Returns:
        Rows {picture, gain, standard_error, base_loss, adapted_loss, learned (the gain as a share of the
        base's loss), helps (how much lower the adapted loss is with the caption than without; None without a
        caption), helps_error, share (of the training steps), held_out, suspect, sentence}.
    """
    _, held = split_holdout(list(records), config.validation.pictures, config.seed)
    out = frozenset(record.path for record in held)
    count = itertools.count(1)

    def advance(*_: int) -> None:
        if on_progress is not None:
            on_progress(next(count), 4 * len(records))

    images = []
    for record in records:
        caption = plain_caption(record.caption, config.dataset.trigger)
        images.append(encode_eval_image(base, record, caption, draws, config.seed, config.train.resolution))
        advance()
    losses = _losses(base, images, weights, config, advance)
    training = TrainingView(
        config.train.resolution or base.resolution, base.size_multiple, batch_size=config.train.batch_size,
        held_out=out,
    )  # fmt: skip
    shares = step_shares(records, training)
    rows = [
        _row(record, share, record.path in out, of_one)
        for record, share, of_one in zip(records, shares, losses, strict=True)
    ]
    mark_outliers(rows)
    return sorted(rows, key=lambda row: (not row["suspect"], row["learned"]))


def _losses(
    base: BaseModel,
    images: list[EvalImage],
    weights: AdapterWeights,
    config: RunConfig,
    advance: OnProgress,
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each image: the base's losses, the adapted ones, and the adapted ones without a caption."""

    def encode(caption: str) -> PromptEmbeds:
        with torch.no_grad():
            return encode_prompt(base, [caption], config.train.clip_skip, config.train.max_token_length)

    merger = Merger(base.modules)
    before = eval_losses(base, images, encode, advance)
    try:
        merger.apply([LoadedLora(weights)])
        # The adapter may be in the text encoder too; without a caption all embeddings are the same.
        encode_empty = functools.lru_cache(maxsize=1)(encode)
        after = eval_losses(base, images, encode, advance)
        bare = eval_losses(base, [replace(one, caption="") for one in images], encode_empty, advance)
    finally:
        merger.apply([])
    return list(zip(before, after, bare, strict=True))


def _row(record: ImageRecord, share: float, held: bool, losses: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    before, after, bare = losses
    gain, helps = before - after, bare - after
    captioned = bool(plain_caption(record.caption, ""))
    return {
        "picture": str(record.path),
        "gain": float(gain.mean()), "standard_error": standard_error(gain),
        "base_loss": float(before.mean()), "adapted_loss": float(after.mean()),
        "learned": float(gain.mean() / before.mean().clamp(min=1e-12)),
        "helps": float(helps.mean()) if captioned else None,
        "helps_error": standard_error(helps) if captioned else None,
        "share": share, "held_out": held, "suspect": False, "sentence": "",
    }  # fmt: skip


def mark_outliers(rows: list[dict[str, Any]]) -> None:
    """Mark images whose caption does not help, or of which far less was learned than of the others."""
    captioned = [row for row in rows if row["helps"] is not None]
    helps = [row["helps"] for row in captioned]
    for row, low in zip(captioned, _below(helps, [row["helps_error"] for row in captioned]), strict=True):
        usual = _median(helps)
        if low > OUTLIER and row["helps"] < _LITTLE * usual:
            row["suspect"] = True
            row["sentence"] = (
                f"The caption of {Path(row['picture']).name} does not help the trained model to predict it"
                f" ({row['helps']:+.3f} ± {row['helps_error']:.3f}, for most {usual:+.3f}): it is likely"
                " wrong."
            )
    trained = [row for row in rows if not row["held_out"]]
    gains = [row["learned"] for row in trained]
    errors = [row["standard_error"] / max(row["base_loss"], 1e-12) for row in trained]
    for row, low in zip(trained, _below(gains, errors), strict=True):
        if low > OUTLIER and not row["suspect"] and row["learned"] < _median(gains) / 2:
            row["suspect"] = True
            row["sentence"] = (
                f"{Path(row['picture']).name} was learned far less than the others ({row['learned']:.0%} of"
                f" the base's loss, for most {_median(gains):.0%}): its caption is wrong, or it is of another"
                " style."
            )


def _below(values: list[float], errors: list[float]) -> list[float]:
    """How far each value is below the median, in units of the spread of all (from the median deviation) and
    its
    own error; zeros for too few values."""
    if len(values) < _FEWEST:
        return [0.0] * len(values)
    middle = _median(values)
    spread = 1.4826 * _median([abs(value - middle) for value in values])
    return [
        (middle - value) / max((spread**2 + error**2) ** 0.5, 1e-12)
        for value, error in zip(values, errors, strict=True)
    ]


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))
