"""Settings from the header that kohya's trainer writes into a LoRA. Names: kohya-ss/sd-scripts,
train_network.py."""

import contextlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from lora_core.spec.choices import OPTIMIZERS
from lora_core.spec.config import FIELDS
from lora_core.spec.like import LONGEST, Like, in_short
from lora_core.spec.untrusted import parsed_json

CONVOLUTIONS = r"\.conv[12]$|samplers.*\.conv$"
"""What kohya gives `conv_dim` to: convolutions wider than one pixel."""

Texts = Mapping[str, str]


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _first_number(text: str) -> float:
    """The first number of `5e-05`, `[5e-05, 1e-05]` or `(512, 768)`."""
    found = re.search(r"[-+]?[0-9]+(?:\.\d+)?(?:[eE][-+]?\d+)?", text)
    return _number(found[0] if found else text)


def _whole(texts: Texts, *keys: str) -> int | None:
    """The first whole number under one of the keys, with at most 18 digits."""
    found = (re.fullmatch(r"[0-9]{1,18}", texts.get(key, "").strip()) for key in keys)
    return next((int(match[0]) for match in found if match), None)


def _truth(text: str) -> bool:
    return text.strip().lower() == "true"


PLAIN: tuple[tuple[str, str, Callable[[str], Any]], ...] = (
    ("ss_network_dim", "adapter.rank", _number),
    ("ss_network_alpha", "adapter.alpha", _number),
    ("ss_network_dropout", "adapter.dropout", _number),
    ("ss_text_encoder_lr", "optim.text_encoder_lr", _first_number),
    ("ss_max_grad_norm", "optim.clip", _number),
    ("ss_gradient_accumulation_steps", "train.accumulate", _number),
    ("ss_gradient_checkpointing", "train.checkpointing", _truth),
    ("ss_clip_skip", "train.clip_skip", _number),
    ("ss_min_snr_gamma", "loss.min_snr", _number),
    ("ss_noise_offset", "loss.noise_offset", _number),
    ("ss_caption_dropout_rate", "dataset.caption_dropout", _number),
    ("ss_caption_tag_dropout_rate", "dataset.tag_dropout", _number),
    ("ss_shuffle_caption", "dataset.shuffle_tags", _truth),
    ("ss_keep_tokens", "dataset.keep_tags", _number),
    ("ss_flip_aug", "dataset.flip", _truth),
    ("ss_seed", "seed", _number),
    ("modelspec.trigger_phrase", "dataset.trigger", str),
)
"""kohya's name, ours, and how its text is read."""
SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine_restarts",
}
HUBER_SCHEDULES = {"constant": "constant", "snr": "snr", "exponential": "exponential"}
LOSSES = {"l2": "mse", "l1": "l1", "huber": "huber", "smooth_l1": "huber"}
UNUSED = {
    "ss_multires_noise_iterations": "Multi-resolution noise",
    "ss_ip_noise_gamma": "Input perturbation",
    "ss_adaptive_noise_scale": "Adaptive noise scale",
    "ss_scale_weight_norms": "Limit of the weight norms",
    "ss_debiased_estimation": "Debiased estimation",
    "ss_face_crop_aug_range": "Face crop",
}
NOTHING = ("", "none", "0", "0.0", "false", "{}")


def from_kohya(texts: Texts) -> Like:
    """What such a header says."""
    found = Like("the header that kohya's trainer wrote into it")
    texts = {**_first_dataset(texts), **texts}
    for key, name, read in PLAIN:
        text = texts.get(key, "").strip()
        if text.lower() in ("", "none"):
            continue
        try:
            found.take(name, read(text))
        except ValueError:
            found.left.append(
                f"{FIELDS[name].metadata['title']} is {in_short(text)} there, which is no number."
            )
    _rates(texts, found)
    _lengths(texts, found)
    _named(texts, found)
    _network(texts, found)
    for key, title in UNUSED.items():
        if texts.get(key, "").strip().lower() not in NOTHING:
            found.left.append(f"{title} ({in_short(texts[key])}) is not known here.")
    found.base = texts.get("ss_sd_model_name", "")[:LONGEST]
    return found


def _first_dataset(texts: Texts) -> dict[str, str]:
    """What newer versions say for each dataset alone, of the first one, under the older names."""
    with contextlib.suppress(ValueError, KeyError, IndexError, TypeError, AttributeError):
        first = parsed_json(texts.get("ss_datasets", ""))[0]
        flat = {**(first.get("subsets") or [{}])[0], **first}
        return {f"ss_{key}": str(value) for key, value in flat.items() if not isinstance(value, dict | list)}
    return {}


def _rates(texts: Texts, found: Like) -> None:
    """The UNet's own rate counts more than the general one, which counts for text encoders without one."""
    general, unet = (texts.get(key, "").strip() for key in ("ss_learning_rate", "ss_unet_lr"))
    for text in (unet, general):
        with contextlib.suppress(ValueError):
            found.take("optim.lr", _first_number(text))
            break
    numbers = re.findall(r"[\d.]+(?:[eE][-+]?\d+)?", texts.get("ss_text_encoder_lr", ""))
    if len(numbers) > 1:
        with contextlib.suppress(ValueError):
            found.take("optim.text_encoder_2_lr", _number(numbers[1]))
    if "optim.text_encoder_lr" not in found.values and "optim.lr" in found.values:
        with contextlib.suppress(ValueError):
            found.take("optim.text_encoder_lr", _first_number(general))


def _lengths(texts: Texts, found: Like) -> None:
    """Steps, warm-up, size of pictures and batch, caption length."""
    steps = _whole(texts, "ss_max_train_steps", "ss_steps")
    if steps is not None:
        found.take("train.steps", steps)
    warmup = _whole(texts, "ss_lr_warmup_steps")
    if warmup is not None and steps:
        found.take("optim.warmup", min(1.0, warmup / steps))
    sides = [int(side) for side in re.findall(r"\d{2,5}", texts.get("ss_resolution", ""))]
    if sides:
        # Ours is the side of a square of the same area, on the grid of 64 that all bases take.
        found.take("train.resolution", max(64, round(math.sqrt(sides[0] * sides[-1]) / 64) * 64))
    batch = _whole(texts, "ss_batch_size_per_device", "ss_total_batch_size")
    if batch is not None:
        found.take("train.batch_size", batch)
    length = _whole(texts, "ss_max_token_length")
    if length is not None:
        found.take("train.tokens", length)


def _named(texts: Texts, found: Like) -> None:
    """Optimizer, schedule, loss and number format, by the names that kohya has for them."""
    optimizer = re.split(r"[(\s]", texts.get("ss_optimizer", "").strip())[0].rpartition(".")[2].lower()
    plain = optimizer.removesuffix("8bit").removeprefix("paged")
    key = next((k for k in (optimizer, plain) if k in OPTIMIZERS), "")
    if key:
        found.take("optim.name", key)
    if optimizer and key != optimizer:
        instead = f"; {OPTIMIZERS[key].title} is taken for it" if key else ""
        found.left.append(f"The optimizer {in_short(optimizer)} is not known here{instead}.")
    for source, table, name in (
        ("ss_lr_scheduler", SCHEDULES, "optim.schedule"),
        ("ss_loss_type", LOSSES, "loss.kind"),
        ("ss_huber_schedule", HUBER_SCHEDULES, "loss.huber_schedule"),
    ):
        text = texts.get(source, "").strip().lower()
        if text in table:
            found.take(name, table[text])
        elif text not in NOTHING:
            found.left.append(
                f"The {FIELDS[name].metadata['title'].lower()} {in_short(text)} is not known here."
            )
    _huber(texts, found)
    if _truth(texts.get("ss_zero_terminal_snr", "")):
        found.left.append("It was trained with zero terminal SNR; set that by hand if its base has it.")
    if texts.get("ss_mixed_precision", "") in ("fp16", "bf16"):
        found.take("train.precision", texts["ss_mixed_precision"])


def _huber(texts: Texts, found: Like) -> None:
    """Huber's delta; where the loss is another one, what kohya writes of it says nothing."""
    if found.values.get("loss.kind") != "huber":
        found.values.pop("loss.huber_schedule", None)
        return
    # What the trainer takes where a header of its first versions with this loss says nothing.
    schedule = found.values.setdefault("loss.huber_schedule", "snr")
    with contextlib.suppress(ValueError):
        scale = _number(texts.get("ss_huber_scale", "") or "1")
        constant = schedule == "constant"
        found.take(
            "loss.huber_delta", _number(texts.get("ss_huber_c", "") or "0.1") * (scale if constant else 1)
        )
        if schedule == "exponential" and scale != 1.0:
            found.left.append(f"Huber's scale ({in_short(scale)}) is not known here for that schedule.")
    if texts.get("ss_loss_type", "").strip().lower() == "smooth_l1" and schedule != "constant":
        found.left.append(
            "Its loss is smooth_l1, which is Huber over delta; Huber is taken, so the noise levels weigh"
            " otherwise."
        )


def _network(texts: Texts, found: Like) -> None:
    """The kind of adapter and its arguments, convolutions included."""
    try:
        arguments = parsed_json(texts.get("ss_network_args", "") or "{}")
    except ValueError:
        arguments = {}
    known = {str(k): str(v) for k, v in arguments.items()} if isinstance(arguments, dict) else {}
    kind = known.pop("algo", "")
    if kind.lower() not in ("", "lora", "locon"):
        found.left.append(f"It is of the kind {in_short(kind)}; a LoRA of that rank is what is trained here.")
    found.take("adapter.targets", "kohya")
    for source, name in (("rank_dropout", "rank_dropout"), ("module_dropout", "module_dropout")):
        if known.get(source, "").lower() not in NOTHING:
            with contextlib.suppress(ValueError):
                found.take(f"adapter.{name}", _number(known[source]))
        known.pop(source, None)
    rank, alpha = known.pop("conv_dim", ""), known.pop("conv_alpha", "")
    if rank.lower() not in NOTHING:
        with contextlib.suppress(ValueError):
            found.take("adapter.targets", "locon")
            found.take("adapter.block_ranks", {CONVOLUTIONS: int(_number(rank))})
            found.take("adapter.block_alphas", {CONVOLUTIONS: _number(alpha or "1")})
    for name, value in known.items():
        if value.lower() not in NOTHING and name not in ("preset", "dropout"):
            found.left.append(f"The network argument {in_short(name)} = {in_short(value)} is not known here.")
