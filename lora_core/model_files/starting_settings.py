"""Starting configs by goal: TOML files in `assets/presets` that hold settings and nothing else."""

import contextlib
import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_core.errors import AdapterFileError, ConfigError
from lora_core.model_files.families import Family
from lora_core.model_files.header import Header, read_header
from lora_core.settings.choices import OPTIMIZERS
from lora_core.settings.config import FIELDS, RETIRED, checked_value, flattened, label_of, load_toml, retired
from lora_core.system.paths import PRESETS
from lora_core.system.untrusted import parse_json

GOALS = {"character": "Character", "style": "Style", "object": "Object"}
LEVELS = {"quick": "Quick", "balanced": "Balanced", "high": "High"}


def preset_names() -> list[str]:
    """All presets: `demo`, and each goal with each level ("style-balanced")."""
    return ["demo", *(f"{goal}-{level}" for goal in GOALS for level in LEVELS)]


def preset(name: str) -> dict[str, Any]:
    """The settings of a preset, dotted name to value. A level alone ("quick") means it for a character.

    Raises:
        ConfigError: there is no such preset.
    """
    wanted = f"character-{name}" if name in LEVELS else name
    if wanted not in preset_names():
        raise ConfigError(f"The preset {name!r} does not exist; choose one of {', '.join(preset_names())}.")
    return flattened(load_toml(PRESETS / f"{wanted}.toml"))


def starting_settings(name: str, family: Family | None) -> dict[str, Any]:
    """What a run starts from before a person changes anything, dotted name to value.

    Args:
        name: of a preset, or "" for the general defaults.
        family: of the base, whose own settings count more than the preset's; None where it is not known.

    Raises:
        ConfigError: there is no such preset.
    """
    return (preset(name) if name else {}) | dict(family.settings if family else {})


# What a LoRA file says of its training, value by value, each checked as if a person had typed it.


LONGEST = 80


@dataclass
class Like:
    """What a file says of its training.

    Attributes:
        source: who wrote that down, in words.
        values: dotted name to value, each legal.
        left: a sentence for each thing that could not be taken.
        base: what it was trained on, "" where the file does not say.
    """

    source: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    base: str = ""

    def take(self, name: str, value: Any, called: str = "") -> None:
        """Take a value if it is legal, else say so."""
        try:
            self.values[name] = checked_value(name, value)
        except (ConfigError, ValueError, OverflowError):
            title = called or label_of(name)
            self.left.append(f"{title} is {in_short(value)} there, which cannot be set here.")


def in_short(value: Any) -> str:
    """A value as one line that is never long."""
    try:
        text = " ".join(str(value).split())
    except (ValueError, RecursionError):  # an integer of over 4,300 digits, or a deep list
        text = f"a {type(value).__name__} too long to print"
    return f"{text[: LONGEST - 1]}…" if len(text) > LONGEST else text


# Settings from the header that kohya's trainer writes into a LoRA. Names: kohya-ss/sd-scripts,
# train_network.py.


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
    ("ss_text_encoder_lr", "optimizer.text_encoder_lr", _first_number),
    ("ss_max_grad_norm", "optimizer.max_grad_norm", _number),
    ("ss_gradient_accumulation_steps", "train.gradient_accumulation_steps", _number),
    ("ss_gradient_checkpointing", "train.gradient_checkpointing", _truth),
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
            found.left.append(f"{label_of(name)} is {in_short(text)} there, which is no number.")
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
        first = parse_json(texts.get("ss_datasets", ""))[0]
        flat = {**(first.get("subsets") or [{}])[0], **first}
        return {f"ss_{key}": str(value) for key, value in flat.items() if not isinstance(value, dict | list)}
    return {}


def _rates(texts: Texts, found: Like) -> None:
    """The UNet's own rate counts more than the general one, which counts for text encoders without one."""
    general, unet = (texts.get(key, "").strip() for key in ("ss_learning_rate", "ss_unet_lr"))
    for text in (unet, general):
        with contextlib.suppress(ValueError):
            found.take("optimizer.lr", _first_number(text))
            break
    numbers = re.findall(r"[\d.]+(?:[eE][-+]?\d+)?", texts.get("ss_text_encoder_lr", ""))
    if len(numbers) > 1:
        with contextlib.suppress(ValueError):
            found.take("optimizer.text_encoder_2_lr", _number(numbers[1]))
    if "optimizer.text_encoder_lr" not in found.values and "optimizer.lr" in found.values:
        with contextlib.suppress(ValueError):
            found.take("optimizer.text_encoder_lr", _first_number(general))


def _lengths(texts: Texts, found: Like) -> None:
    """Steps, warm-up, size of pictures and batch, caption length."""
    steps = _whole(texts, "ss_max_train_steps", "ss_steps")
    if steps is not None:
        found.take("train.steps", steps)
    warmup = _whole(texts, "ss_lr_warmup_steps")
    if warmup is not None and steps:
        found.take("optimizer.warmup", min(1.0, warmup / steps))
    sides = [int(side) for side in re.findall(r"\d{2,5}", texts.get("ss_resolution", ""))]
    if sides:
        # Ours is the side of a square of the same area, on the grid of 64 that all bases take.
        found.take("train.resolution", max(64, round(math.sqrt(sides[0] * sides[-1]) / 64) * 64))
    batch = _whole(texts, "ss_batch_size_per_device", "ss_total_batch_size")
    if batch is not None:
        found.take("train.batch_size", batch)
    length = _whole(texts, "ss_max_token_length")
    if length is not None:
        found.take("train.max_token_length", length)


def _named(texts: Texts, found: Like) -> None:
    """Optimizer, schedule, loss and number format, by the names that kohya has for them."""
    optimizer = re.split(r"[(\s]", texts.get("ss_optimizer", "").strip())[0].rpartition(".")[2].lower()
    plain = optimizer.removesuffix("8bit").removeprefix("paged")
    key = next((k for k in (optimizer, plain) if k in OPTIMIZERS), "")
    if key:
        found.take("optimizer.name", key)
    if optimizer and key != optimizer:
        instead = f"; {OPTIMIZERS[key].title} is taken for it" if key else ""
        found.left.append(f"The optimizer {in_short(optimizer)} is not known here{instead}.")
    for source, table, name in (
        ("ss_lr_scheduler", SCHEDULES, "optimizer.schedule"),
        ("ss_loss_type", LOSSES, "loss.type"),
        ("ss_huber_schedule", HUBER_SCHEDULES, "loss.huber_schedule"),
    ):
        text = texts.get(source, "").strip().lower()
        if text in table:
            found.take(name, table[text])
        elif text not in NOTHING:
            found.left.append(f"The {label_of(name).lower()} {in_short(text)} is not known here.")
    _huber(texts, found)
    if _truth(texts.get("ss_zero_terminal_snr", "")):
        found.left.append("It was trained with zero terminal SNR; set that by hand if its base has it.")
    if texts.get("ss_mixed_precision", "") in ("fp16", "bf16"):
        found.take("train.precision", texts["ss_mixed_precision"])


def _huber(texts: Texts, found: Like) -> None:
    """Huber's delta; where the loss is another one, what kohya writes of it says nothing."""
    if found.values.get("loss.type") != "huber":
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
        arguments = parse_json(texts.get("ss_network_args", "") or "{}")
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


# Settings read back from a LoRA file: our own header, what kohya's trainer writes, or the layers
# themselves.
#
# A header comes from anywhere: each value is checked as if a person had typed it, and what cannot be taken
# is said.


CONFIG_KEY = "lora_easel.config"
PLACES = ("name", "dataset.path", "model.base", "model.vae", "adapter.init")
"""Settings that name files of the machine that the LoRA was made on."""


def like_file(path: Path) -> Like:
    """The settings that a LoRA file was trained with.

    Raises:
        AdapterFileError: it is no such file, or says nothing of its training.
    """
    header = read_header(path)
    texts = header.metadata
    if CONFIG_KEY in texts:
        found = _ours(texts[CONFIG_KEY])
    elif "ss_network_dim" in texts or "ss_network_module" in texts:
        found = from_kohya(texts)
    else:
        found = Like("its layers alone; no settings are written in it")
    if "adapter.rank" not in found.values:
        _from_layers(header, found)
    if not found.values:
        raise AdapterFileError(
            f"{path.name} says nothing of how it was trained, and no layer of it is known."
        )
    return found


def _ours(text: str) -> Like:
    found = Like("the settings that LoRA Easel wrote into it")
    try:
        values = flattened(tomllib.loads(text), say=False)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"The settings in the file cannot be read: {str(error)[:LONGEST]}.") from error
    for name, value in values.items():
        if name in PLACES:
            continue
        if name in FIELDS:
            found.take(name, value)
        elif name in RETIRED:
            found.left += retired([(name, value)])
        else:
            found.left.append(f"{in_short(name)} is a setting that this version does not know.")
    found.base = in_short(values.get("model.base", ""))
    for name in ("model.vae", "adapter.init"):
        if values.get(name) not in (None, "", "default"):
            found.left.append(f"{label_of(name)} was {in_short(values[name])}; choose it yourself.")
    return found


def _from_layers(header: Header, found: Like) -> None:
    """The rank that most layers have, and which layers there are."""
    downs = {
        n: s for n, s in header.shapes.items() if re.search(r"(lora_down|lora_A)(\.\w+)?\.weight$", n) and s
    }
    if not downs:
        return
    rank = Counter(shape[0] for shape in downs.values()).most_common(1)[0][0]
    found.take("adapter.rank", rank)
    if "adapter.targets" not in found.values:
        convolutions = any(len(shape) == 4 and shape[2] > 1 for shape in downs.values())
        forward = any(re.search(r"ff[._]net|mlp[._]fc|proj_in", name) for name in downs)
        found.take("adapter.targets", "locon" if convolutions else "kohya" if forward else "attention")
    if not any("te" in name.split("_")[:2] or "te1" in name or "text" in name for name in downs):
        found.take("optimizer.text_encoder_lr", 0.0)
    if "adapter.alpha" not in found.values:
        found.left.append("Its alpha is not written in the header; set it to what you used, or to the rank.")
        found.take("adapter.alpha", float(rank))
