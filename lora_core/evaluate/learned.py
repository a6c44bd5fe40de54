"""What a run has learned of each of its pictures, and what its caption did for that.

Base and adapter are measured on the same triples of every picture, held-out ones too. A wrong caption does
not show in the gain: the loss with it is high before, so there is much to gain. It shows in the adapted
model, which predicts such a picture no better with its caption than without one, while the others' captions
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

from lora_core.data.buckets import choose_bucket, size_conditioning
from lora_core.data.captions import with_trigger
from lora_core.data.dataset import open_dataset, require_clean
from lora_core.data.holdout import split_holdout
from lora_core.data.images import hash_file
from lora_core.data.scan import ImageRecord
from lora_core.data.statistics import TrainingView, step_shares
from lora_core.evaluate.caption_scores import OnProgress, plain_caption
from lora_core.evaluate.validator import EvalImage, eval_losses, eval_noise
from lora_core.formats.io import load_adapter
from lora_core.lora.inject import LoadedLora, Merger
from lora_core.lora.weights import AdapterWeights
from lora_core.models.device import best_device, dtype_of
from lora_core.models.encode import encode_image, encode_prompt, load_pixels
from lora_core.models.load import BaseModel, load_base
from lora_core.models.unet import PromptEmbeds
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import ModelSection
from lora_core.system.paths import write_atomically

FILE = "pictures.json"
OUTLIER = 2.5
"""So many spreads from the median, its own error included, and a picture stands out."""
_FEWEST = 5
_LITTLE = 0.25
Opened = Callable[[ModelSection], BaseModel]
"""From what names a base to the base with no adapter in it."""


def measure_run_images(
    run: RunFolder,
    which: str = "best",
    triples: int = 8,
    said: OnProgress | None = None,
    opened: Opened | None = None,
) -> dict[str, Any]:
    """Measure a run's adapter on each of its pictures, and write that to `pictures.json` of the run.

    Args:
        run: with at least one checkpoint.
        which: `best` (the last one where none was the best), `last`, or a step.
        triples: looks a picture.
        said: told how far it is.
        opened: opens the base; without it, it is opened here.

    Returns:
        `step`, `triples`, and `rows` as `picture_rows` gives them.

    Raises:
        RunError: there is no such checkpoint.
        DatasetError, ModelFileError, AdapterFileError: the pictures, the base or the adapter cannot be read.
    """
    config, step = run.config(), run.step_of(which)
    dataset = open_dataset(config.dataset.path, run.path.parent.parent / "cache" / "datasets")
    require_clean(dataset)
    base = (opened or _opened)(config.model)
    weights = load_adapter(run.checkpoint(step) / "adapter.safetensors", base.family)
    rows = image_rows(base, dataset.records, weights, config, triples, said)
    found = {"step": step, "triples": triples, "rows": rows}
    write_atomically(run.path / FILE, json.dumps(found, ensure_ascii=False).encode())
    return found


def _opened(model: ModelSection) -> BaseModel:
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
    triples: int = 8,
    said: OnProgress | None = None,
) -> list[dict[str, Any]]:
    """What was learned of each picture: those that stand out first, then the least learned ones.

    Args:
        base: with no adapter in it; it has none again when this ends.
        records: all pictures of the run.
        weights: the adapter.
        config: of the run.
        triples: looks a picture.
        said: told how far it is.

    Returns:
        Rows {picture, gain, standard_error, base_loss, adapted_loss, learned (the gain as a share of the
        base's loss), helps (how much lower the adapted loss is with the caption than without; None where
        there is no caption), helps_error, share (of the training steps), held_out, suspect, sentence}.
    """
    _, held = split_holdout(list(records), config.validation.pictures, config.seed)
    out = frozenset(record.path for record in held)
    count = itertools.count(1)

    def told(*_: int) -> None:
        if said is not None:
            said(next(count), 4 * len(records))

    pictures = []
    for record in records:
        pictures.append(_measured(base, record, config, triples))
        told()
    losses = _losses(base, pictures, weights, config, told)
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
    base: BaseModel, pictures: list[EvalImage], weights: AdapterWeights, config: RunConfig, told: OnProgress
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each picture: the base's losses, the adapted ones, and the adapted ones without a caption."""

    def encoded(caption: str) -> PromptEmbeds:
        with torch.no_grad():
            return encode_prompt(base, [caption], config.train.clip_skip, config.train.max_token_length)

    merger = Merger(base.modules)
    before = eval_losses(base, pictures, encoded, told)
    try:
        merger.apply([LoadedLora(weights)])
        # The adapter may be in the text encoder too, and without a caption all conditions are the same.
        empty = functools.lru_cache(maxsize=1)(encoded)
        after = eval_losses(base, pictures, encoded, told)
        bare = eval_losses(base, [replace(one, caption="") for one in pictures], empty, told)
    finally:
        merger.apply([])
    return list(zip(before, after, bare, strict=True))


def _measured(base: BaseModel, record: ImageRecord, config: RunConfig, triples: int) -> EvalImage:
    resolution = config.train.resolution or base.resolution
    bucket = choose_bucket(record.width, record.height, resolution, base.size_multiple)
    latents = encode_image(base, load_pixels(record, bucket))
    looks = eval_noise(hash_file(record.path), latents, triples, config.seed, base.noise.num_timesteps)
    sizes = torch.tensor(size_conditioning(record.width, record.height, bucket), dtype=torch.float32)
    caption = with_trigger(plain_caption(record.caption), config.dataset.trigger)
    return EvalImage(latents, looks, caption, sizes)


def _row(record: ImageRecord, share: float, held: bool, losses: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    before, after, bare = losses
    gain, helps = before - after, bare - after
    spoken = bool(plain_caption(record.caption))
    return {
        "picture": str(record.path),
        "gain": float(gain.mean()), "standard_error": _error(gain),
        "base_loss": float(before.mean()), "adapted_loss": float(after.mean()),
        "learned": float(gain.mean() / before.mean().clamp(min=1e-12)),
        "helps": float(helps.mean()) if spoken else None, "helps_error": _error(helps) if spoken else None,
        "share": share, "held_out": held, "suspect": False, "sentence": "",
    }  # fmt: skip


def _error(values: torch.Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0


def mark_outliers(rows: list[dict[str, Any]]) -> None:
    """Mark pictures that stand out: a caption that does not help, or far less learned than of the others."""
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
    """How far each value is below the median, in spreads of all values (by the median deviation) and its own
    error together; nothing stands out among too few."""
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
