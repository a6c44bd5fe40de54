"""The metadata of an exported file's header, and the JSON file beside it: what other tools show.

Users share these files, so nothing that is written may name a folder of the machine.
"""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import tomli_w

from lora_core.model_files.families import Family

CONFIG_KEY = "lora_easel.config"
"""Our own key: the run's settings as TOML, from which the training can be repeated."""


@dataclass(frozen=True)
class ExportFacts:
    """Facts about a run for the header of its exported adapter.

    Attributes:
        name: the stem of the file; in A1111 an alias of it.
        family: of the base.
        base_title: of the base, for users.
        rank: the most frequent one.
        alpha: of the file.
        steps: optimizer steps done.
        resolution: (width, height) in pixels.
        num_images: that were trained on, without repeats.
        started_at: when the run began, in seconds since the epoch.
        finished_at: when this state was reached, in seconds since the epoch.
        version: of this program.
        clip_skip: as in A1111, 1 or less if none.
        seed: of the run.
        trigger: the trigger word, or "".
        tag_frequency: dataset name to tag to how many captions have it.
        datasets: dataset name to (repeats, images).
        buckets: (width, height) in pixels to number of images.
        prediction: "epsilon" or "v_prediction".
        min_snr: gamma of min-SNR, 0 for none.
        settings: the run's settings as TOML.
        network_args: more about the adapter, such as dropout.
    """

    name: str
    family: Family
    base_title: str
    rank: int
    alpha: float
    steps: int
    resolution: tuple[int, int]
    num_images: int
    started_at: float
    finished_at: float
    version: str
    clip_skip: int = 1
    seed: int = 0
    trigger: str = ""
    tag_frequency: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    datasets: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    buckets: Mapping[tuple[int, int], int] = field(default_factory=dict)
    prediction: str = "epsilon"
    min_snr: float = 0.0
    settings: str = ""
    network_args: Mapping[str, Any] = field(default_factory=dict)


_FROM_SETTINGS = {
    "ss_optimizer": "optimizer.name",
    "ss_lr_scheduler": "optimizer.schedule",
    "ss_learning_rate": "optimizer.lr",
    "ss_unet_lr": "optimizer.lr",
    "ss_text_encoder_lr": "optimizer.text_encoder_lr",
    "ss_batch_size_per_device": "train.batch_size",
    "ss_gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "ss_noise_offset": "loss.noise_offset",
    "ss_network_dropout": "adapter.dropout",
}
"""kohya's key to our setting, for the table that A1111 shows."""


def export_metadata(facts: ExportFacts) -> dict[str, str]:
    """The header of an exported file, without the hashes, which `io.save_adapter` adds.

    Raises:
        tomllib.TOMLDecodeError: `facts.settings` is not TOML.
    """
    width, height = facts.resolution
    settings = _shareable(tomllib.loads(facts.settings))
    trained = sum(repeats * count for repeats, count in facts.datasets.values()) or facts.num_images
    texts = {
        "ss_output_name": _last_name(facts.name),
        "ss_base_model_version": facts.family.base_version,
        "ss_v2": str(facts.family.base_version.startswith("sd_v2")),
        "ss_sd_model_name": _last_name(facts.base_title),
        "ss_clip_skip": str(max(1, facts.clip_skip)),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(facts.rank),
        "ss_network_alpha": str(float(facts.alpha)),
        "ss_network_args": _json(dict(facts.network_args)),
        "ss_training_started_at": str(facts.started_at),
        "ss_training_finished_at": str(facts.finished_at),
        "ss_resolution": f"({width}, {height})",
        "ss_num_train_images": str(trained),
        "ss_num_reg_images": "0",
        "ss_max_train_steps": str(facts.steps),
        "ss_steps": str(facts.steps),
        "ss_seed": str(facts.seed),
        "ss_min_snr_gamma": str(facts.min_snr),
        "ss_tag_frequency": _json(
            {_last_name(name): dict(tags) for name, tags in facts.tag_frequency.items()}
        ),
        "ss_dataset_dirs": _json(
            {
                _last_name(name): {"n_repeats": repeats, "img_count": count}
                for name, (repeats, count) in facts.datasets.items()
            }
        ),
        "ss_bucket_info": _json(
            {
                "buckets": {
                    str(index): {"resolution": list(size), "count": count}
                    for index, (size, count) in enumerate(sorted(facts.buckets.items()))
                }
            }
        ),
    }
    texts |= _modelspec(facts)
    texts |= {
        key: str(value) for key, name in _FROM_SETTINGS.items() if (value := _get(settings, name)) is not None
    }
    if settings:
        texts[CONFIG_KEY] = tomli_w.dumps(settings)
    return texts


def _modelspec(facts: ExportFacts) -> dict[str, str]:
    """The ModelSpec fields. Source: https://github.com/Stability-AI/ModelSpec, version 1.0.0."""
    finished = datetime.fromtimestamp(facts.finished_at, UTC).replace(microsecond=0)
    texts = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": facts.family.modelspec,
        "modelspec.implementation": "diffusers",
        "modelspec.title": _last_name(facts.name),
        "modelspec.date": finished.isoformat(),
        "modelspec.resolution": "x".join(map(str, facts.resolution)),
        "modelspec.prediction_type": "v" if facts.prediction == "v_prediction" else facts.prediction,
        "modelspec.description": (
            f"LoRA adapter for {_last_name(facts.base_title)}, made with LoRA Easel {facts.version}"
        ),
    }
    if facts.trigger:
        texts["modelspec.trigger_phrase"] = facts.trigger
    return texts


def side_file(trigger: str, strength: float = 0.0, description: str = "") -> bytes:
    """The file `<stem>.json` beside an adapter, from which A1111, Forge and InvokeAI read the trigger words.

    Args:
        trigger: what to put into a prompt, or "".
        strength: the default one; 0 leaves it to the tool.
        description: for users.
    """
    values = {
        "description": description,
        "activation text": trigger,
        "preferred weight": strength,
        "negative text": "",
        "notes": "",
    }
    return (json.dumps(values, ensure_ascii=False, indent=4) + "\n").encode("utf-8", "replace")


def _json(value: dict[Any, Any]) -> str:
    """JSON without NaN and infinity, which not every parser reads."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _get(settings: Mapping[str, Any], dotted: str) -> Any:
    section, _, key = dotted.partition(".")
    table = settings.get(section)
    return table.get(key) if isinstance(table, Mapping) else None


def _shareable(value: Any) -> Any:
    """Settings with each path reduced to its last name."""
    if isinstance(value, dict):
        return {key: _shareable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shareable(item) for item in value]
    return _last_name(value) if isinstance(value, str) else value


def _last_name(text: str) -> str:
    """The last name of an absolute or relative path; any other text, such as a hub id, unchanged."""
    if PureWindowsPath(text).drive or text.startswith("\\"):
        return PureWindowsPath(text).name
    if text.startswith(("/", "~", "./", "../")):
        return PurePosixPath(text).name
    return text
