"""What a run starts from: presets by goal, and the settings that a LoRA file says it was trained with.

Presets are TOML files in `assets/presets`. A LoRA may come from anywhere: each value in its header is checked
as if a user had typed it, and what cannot be used is listed in a sentence each.
"""

import ast
import contextlib
import fnmatch
import functools
import itertools
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_core.errors import AdapterFileError, ConfigError, LoraError, wrap_os_errors
from lora_core.model_files.families import Family, family_of_version
from lora_core.model_files.header import Header, read_header
from lora_core.settings.config import (
    FIELDS,
    RETIRED,
    checked_value,
    flattened,
    in_short,
    label_of,
    load_toml,
    parse_sample,
    parse_toml,
    retired,
    split_sample,
    takes_class,
)
from lora_core.settings.schema import (
    ADAPTER_KINDS,
    OPTIMIZERS,
    OptimizerChoice,
    OptimizerSection,
    SampleSection,
)
from lora_core.system.files import (
    LARGEST_JSON,
    PRESETS,
    changed_at,
    clean_value,
    parse_json,
    parse_object,
    read_small_file,
    read_table,
)

GOALS = {"character": "Character", "style": "Style", "object": "Object", "slider": "Slider"}
LEVELS = {"quick": "Quick", "balanced": "Balanced", "high": "High"}


def preset_names() -> list[str]:
    """All presets: `demo` and a slider's for the same base, and each goal with each level
    ("style-balanced")."""
    return ["demo", *(f"{goal}-{level}" for goal in GOALS for level in LEVELS), "slider-demo"]


@functools.cache
def preset(name: str) -> Mapping[str, Any]:
    """The settings of a preset, dotted name to value. A level alone ("quick") means it for a character.

    Raises:
        ConfigError: no such preset.
    """
    wanted = f"character-{name}" if name in LEVELS else name
    if wanted not in preset_names():
        raise ConfigError(f"The preset {name!r} does not exist; choose one of {', '.join(preset_names())}.")
    return flattened(load_toml(PRESETS / f"{wanted}.toml"))


def starting_settings(name: str, family: Family | None) -> dict[str, Any]:
    """The starting settings of a run, dotted name to value.

    Args:
        name: of a preset, or "" for the general defaults.
        family: of the base, whose own settings override the preset's; None where it is not known.

    Raises:
        ConfigError: no such preset.
    """
    return {**(preset(name) if name else {}), **(family.settings if family else {})}


CONFIG_KEY = "lora_easel.config"
PLACES = ("name", "dataset.path", "model.base", "model.vae", "adapter.init")
"""Settings that name files of the machine that the LoRA was made on."""
LONGEST = 80
_LONGEST_ARGUMENTS = 1000
Texts = Mapping[str, str]


@dataclass
class LoraSettings:
    """The training settings in a LoRA file.

    Attributes:
        source: who wrote them, in words.
        values: dotted name to value, each legal.
        left: a sentence for each thing that cannot be used.
        base: its base model, "" if unknown.
        keys: of the configuration, those that were read.
        off: of the configuration, those without a value, or with one that is off.
        defaults: of `values`, those that the file leaves out: what its trainer does then.
        refused: settings whose value there is not legal here.
    """

    source: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    base: str = ""
    keys: list[str] = field(default_factory=list)
    off: list[str] = field(default_factory=list)
    defaults: dict[str, Any] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)

    def take(self, name: str, value: Any) -> None:
        """Take a value if it is legal, else list it; one that is off is legal."""
        try:
            self.values[name] = checked_value(name, value)
        except (ConfigError, ValueError, OverflowError):
            if not _is_off(value):
                self.refused.add(name)
                self.left.append(f"{label_of(name)} is {_short(value)} there, which cannot be set here.")

    def listed_values(self, defaults: bool) -> str:
        """The values that the file gives, or its trainer's defaults, with the window's labels."""
        names = self.defaults if defaults else [name for name in self.values if name not in self.defaults]
        return "; ".join(f"{label_of(name)} {_short(self.values[name])}" for name in names)

    def add_defaults(self, full: "LoraSettings") -> None:
        """Take from `full`, the same with the trainer's defaults filled in, what was not given."""
        kind = ADAPTER_KINDS[full.values.get("adapter.kind", FIELDS["adapter.kind"].default)]
        self.defaults = {
            name: value
            for name, value in full.values.items()
            if name not in self.refused and name not in kind.unused and self.values.get(name) != value
        }
        self.values |= self.defaults
        problems = tuple(map(label_of, full.refused - self.refused))
        self.left += [text for text in full.left if problems and text.startswith(problems)]

    def take_text(self, name: str, text: str, read: Callable[[str], Any]) -> None:
        """Take a text parsed by `read`; an empty text or "None" is skipped.

        Args:
            name: of the setting.
            text: as the header has it.
            read: raises KeyError for a name that is not known, ValueError for anything but a number.
        """
        if text.lower() in ("", "none"):
            return
        try:
            self.take(name, read(text))
        except KeyError:
            self.refused.add(name)
            self.left.append(f"The {label_of(name).lower()} {_short(text)} is not known here.")
        except ValueError:
            self.refused.add(name)
            self.left.append(f"{label_of(name)} is {_short(text)} there, which is not a number.")


def is_slider(path: Path) -> bool:
    """Whether a LoRA file says in its header that it is a concept slider; not where it cannot be read."""
    return _is_slider(path, changed_at(path))


@functools.lru_cache(maxsize=256)
def _is_slider(path: Path, changed: int) -> bool:
    with contextlib.suppress(LoraError, ValueError, AttributeError):
        settings = parse_toml(read_header(path).metadata.get(CONFIG_KEY, ""), str(path))
        return bool(settings.get("slider", {}).get("positive"))
    return False


def _short(value: Any) -> str:
    return in_short(value, str)


def settings_from_lora(path: str | Path) -> LoraSettings:
    """The settings that a LoRA file was trained with, or of a configuration that another trainer was given.

    Raises:
        AdapterFileError: it is neither, or has no record of its training.
        ConfigError: it is a configuration that cannot be read, or of no trainer that is known.
    """
    path = Path(path)
    if path.suffix.casefold() in CONFIG_SUFFIXES:
        return _with_usual(_from_trainer(path))
    header = read_header(path)
    texts = header.metadata
    if CONFIG_KEY in texts:
        found = _from_our_header(texts[CONFIG_KEY])
    elif "ss_network_dim" in texts or "ss_network_module" in texts:
        found = _from_header(texts, header.shapes)
    elif "ot_config" in texts and (read := _of_trainer(parse_object(texts["ot_config"]))[0]):
        found = read
    else:
        found = LoraSettings("its layers alone; no settings are written in it")
    if "adapter.rank" not in found.values:
        _take_from_layers(header, found)
    if not found.values:
        raise AdapterFileError(f"{path.name} has no record of its training, and no known layer.")
    return _with_usual(found)


def _with_usual(found: LoraSettings) -> LoraSettings:
    """The settings with the defaults of those that mean nothing to the kind of adapter, which other trainers
    ignore and which would keep a run from its start here."""
    row = ADAPTER_KINDS[found.values.get("adapter.kind", FIELDS["adapter.kind"].default)]
    for name in row.unused:
        value, usual = found.values.get(name), FIELDS[name].default
        if value not in (None, usual):
            found.left.append(
                f"{label_of(name)} is {_short(value)} there, which means nothing to {row.title}."
            )
            found.values[name] = usual
    return found


def _from_header(texts: Texts, layers: Iterable[str]) -> LoraSettings:
    """The settings in kohya's header, with its defaults for what is missing or None; rates of text encoders
    that have no layer are 0."""
    found = _from_kohya(texts)
    if "ss_learning_rate" in texts:
        trainer = read_table("other_trainers.toml")["kohya"]
        usual = {trainer["names"].get(key, ""): str(value) for key, value in trainer["defaults"].items()}
        usual = {name: text for name, text in usual.items() if name not in _NEVER_MISSING}
        given = {key: text for key, text in texts.items() if text.strip().lower() not in ("", "none")}
        found.add_defaults(_from_kohya(usual | given))
    prefixes = {layer.partition("_")[2].partition("_")[0] for layer in layers}
    for name, prefix in _TEXT_ENCODERS.items():
        trained = any(one.startswith(prefix) for one in prefixes)
        if found.values.get(name) and "unet" in prefixes and not trained:
            found.take(name, 0.0)
            found.defaults.pop(name, None)
    return found


def _from_header_as_json(given: Mapping[str, Any]) -> LoraSettings:
    """A header that was copied into a file, as A1111 and model pages show it."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}
    found = _from_header(texts, ())
    table = kohya_header()
    known = {key for _, keys, _ in table["read"] for key in keys.split()}
    known |= {*table["unused"], *_READ_APART}
    found.keys = [_short(key) for key in texts if key in known][:_MOST_KEYS]
    if rest := [_short(key) for key in texts if key not in known][:_MOST_KEYS]:
        found.left.append(f"Without a meaning here: {', '.join(rest)}.")
    return found


_READ_APART = (
    "ss_network_args", "ss_network_module", "ss_optimizer", "ss_datasets", "ss_lr_warmup_steps", "ss_huber_c",
    "ss_huber_scale", "ss_mixed_precision", "ss_zero_terminal_snr", "ss_sd_model_name",
    "ss_base_model_version",
)  # fmt: skip
_NEVER_MISSING = (
    "ss_network_dim", "ss_network_alpha", "ss_learning_rate", "ss_max_train_steps",
    "ss_lr_scheduler_num_cycles",
)  # fmt: skip
_TEXT_ENCODERS = {"optimizer.text_encoder_lr": "te", "optimizer.text_encoder_2_lr": "te2"}
"""The rates of text encoders, and how kohya's trainer names their layers, after `lora_`."""


def _from_our_header(text: str) -> LoraSettings:
    found = LoraSettings("the settings that LoRA Easel wrote into it")
    try:
        values = flattened(parse_toml(text, "The configuration in the file", math.inf), say=False)
    except ValueError as error:
        raise AdapterFileError(f"The settings in the file cannot be read: {str(error)[:LONGEST]}.") from error
    for name, value in values.items():
        if name in PLACES:
            continue
        if name in FIELDS and takes_class(name) and ":" in str(value):
            found.left.append(f"{label_of(name)} was {_short(value)}; choose it yourself.")
        elif name in FIELDS:
            found.take(name, value)
        elif name in RETIRED:
            found.left += retired([(name, value)])
        else:
            found.left.append(f"{_short(name)} is a setting that this version does not know.")
    found.base = _short(values.get("model.base", ""))
    for name in ("model.vae", "adapter.init"):
        if values.get(name) not in (None, "", "default"):
            found.left.append(f"{label_of(name)} was {_short(values[name])}; choose it yourself.")
    return found


def _take_from_layers(header: Header, found: LoraSettings) -> None:
    """The rank of most layers, and which layers are adapted."""
    downs = {
        name: shape
        for name, shape in header.shapes.items()
        if shape and re.search(r"(lora_down|lora_A)(\.\w+)?\.weight$", name)
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


# The header that kohya's trainer writes.


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _first_number(text: str) -> float:
    """The first number of `5e-05`, `[5e-05, 1e-05]` or `(512, 768)`."""
    found = re.search(r"[-+]?[0-9]+(?:\.\d+)?(?:[eE][-+]?\d+)?", text)
    return _number(found[0] if found else text)


def _is_true(text: str) -> bool:
    return text.lower() == "true"


def _side(text: str) -> int:
    """The side of a square of the same area, on the grid of 64 that all bases take."""
    sides = [int(side) for side in re.findall(r"\d{2,5}", text)]
    if not sides:
        raise ValueError(text)
    return max(64, round(math.sqrt(sides[0] * sides[-1]) / 64) * 64)


_READERS: Mapping[str, Callable[[str], Any]] = {
    "number": _number, "first number": _first_number, "true": _is_true, "side": _side, "text": str,
}  # fmt: skip


def kohya_header() -> dict[str, Any]:
    """The tables of `assets/kohya_header.toml`."""
    return read_table("kohya_header.toml")


def _read(kind: str, text: str) -> Any:
    words = kohya_header()["words"].get(kind)
    return words[text.lower()] if words else _READERS[kind](text)


_NOTHING = ("", "none", "0", "0.0", "false", "{}")
"""Texts of values that are off."""


def _from_kohya(texts: Texts) -> LoraSettings:
    found = LoraSettings("the header that kohya's trainer wrote into it")
    texts = {key: text.strip() for key, text in {**_first_dataset(texts), **texts}.items()}
    if texts.get("ss_network_dim", "").lower() == "dynamic":
        # Cut by kohya's resize_lora.py, to ranks by layer.
        found.take("adapter.auto_rank", True)
        texts["ss_network_dim"] = texts["ss_network_alpha"] = ""
    if (rank := _plain(texts.get("ss_network_dim", ""))) and isinstance(rank, float) and rank > _MOST_RANK:
        found.left.append(f"Rank (size) is {rank:g} there; the highest here, {_MOST_RANK}, is used.")
        texts["ss_network_dim"] = str(_MOST_RANK)
    if texts.get("ss_network_alpha") in ("0", "0.0"):
        # Which means the rank there.
        texts["ss_network_alpha"] = texts.get("ss_network_dim", "")
    if texts.get("ss_lr_scheduler", "").lower() in _RESTARTS and texts.get("ss_lr_scheduler_num_cycles"):
        _take_restarts(texts, found)
    for name, keys, kind in kohya_header()["read"]:
        given = (texts.get(key, "") for key in keys.split())
        text = next((text for text in given if text.lower() not in ("", "none")), "")
        found.take_text(name, text, functools.partial(_read, kind))
    rates = re.findall(r"[\d.]+(?:[eE][-+]?\d+)?", texts.get("ss_text_encoder_lr", ""))
    if len(rates) > 1:
        found.take_text("optimizer.text_encoder_2_lr", rates[1], _number)
    elif "optimizer.text_encoder_lr" in found.values and _has_two_encoders(texts):
        # One rate is that of both there.
        found.take("optimizer.text_encoder_2_lr", found.values["optimizer.text_encoder_lr"])
    _take_warmup(texts.get("ss_lr_warmup_steps", ""), found)
    if texts.get("ss_mixed_precision", "") in ("fp16", "bf16"):
        found.take("train.precision", texts["ss_mixed_precision"])
    _take_optimizer(texts.get("ss_optimizer", ""), found)
    _take_huber(texts, found)
    _take_network(texts.get("ss_network_args", ""), texts.get("ss_network_module", ""), found)
    if _is_true(texts.get("ss_zero_terminal_snr", "")):
        found.left.append("It was trained with zero terminal SNR; set that by hand if its base has it.")
    for key, title in kohya_header()["unused"].items():
        if texts.get(key, "").lower() not in _NOTHING:
            found.left.append(f"{title} ({_short(texts[key])}) is not known here.")
    found.base = texts.get("ss_sd_model_name", "")[:LONGEST]
    return found


_RESTARTS = ("cosine_with_restarts", "cosine_with_hard_restarts")


def _take_restarts(texts: dict[str, str], found: LoraSettings) -> None:
    """A cosine with one fall has no restart; ours has three falls."""
    falls = texts.pop("ss_lr_scheduler_num_cycles")
    if _plain(falls) == 1:
        texts["ss_lr_scheduler"] = "cosine"
    elif _plain(falls) != 3:
        found.left.append(f"The schedule has {_short(falls)} falls there; here it has 3.")


def _take_warmup(text: str, found: LoraSettings) -> None:
    """Warm-up in steps, or as a share below 1."""
    count, steps = _plain(text), found.values.get("train.steps")
    if not isinstance(count, int | float) or count < 1 or steps:
        whole = steps if steps and isinstance(count, int | float) and count >= 1 else 1
        found.take_text("optimizer.warmup", text, lambda text: min(1.0, _number(text) / whole))
    else:
        found.refused.add("optimizer.warmup")
        found.left.append(
            f"Warm-up is {count:g} steps there, in a run that is counted in epochs; set its share of all"
            " steps by hand."
        )


def _has_two_encoders(texts: Texts) -> bool:
    family = family_of_version(texts.get("ss_base_model_version", ""))
    return family is not None and len(family.text_encoders) > 1


def _first_dataset(texts: Texts) -> dict[str, str]:
    """The first dataset's values of newer versions, under the older names."""
    with contextlib.suppress(ValueError, KeyError, IndexError, TypeError, AttributeError):
        first = parse_json(texts.get("ss_datasets", ""))[0]
        flat = {**(first.get("subsets") or [{}])[0], **first}
        return {f"ss_{key}": str(value) for key, value in flat.items() if not isinstance(value, dict | list)}
    return {}


def _take_optimizer(text: str, found: LoraSettings) -> None:
    """The optimizer of a class and its arguments, `bitsandbytes.optim.AdamW8bit(weight_decay=0.1)`.

    One whose package is not installed is left for the plain one of its kind.
    """
    path, _, arguments = text.partition("(")
    name = path.strip().rpartition(".")[2].lower()
    plain = re.sub(r"^paged_?|_?(8|32)bit$", "", name)
    words = kohya_header()["words"]["optimizers"]
    known = words.get(name, name)
    here = [key for key in (known, words.get(plain, plain)) if key in OPTIMIZERS]
    key = next((key for key in here if _is_installed(OPTIMIZERS[key])), "".join(here[:1]))
    if key:
        found.take("optimizer.name", key)
    if name and key != known:
        why = "has no package here" if known in here else "is not known here"
        instead = f"; {OPTIMIZERS[key].title} is used instead" if key else ""
        found.left.append(f"The optimizer {_short(name)} {why}{instead}.")
    if key:
        _take_arguments(key, arguments.rpartition(")")[0], found)


def _is_installed(row: OptimizerChoice) -> bool:
    try:
        row.require()
    except ConfigError:
        return False
    return True


def _take_arguments(optimizer: str, text: str, found: LoraSettings) -> None:
    """The arguments `weight_decay=0.1,betas=(0.9, 0.99)` or `betas=0.9,0.99` that the optimizer has here
    too."""
    taken: dict[str, Any] = dict(kohya_header()["default_arguments"].get(optimizer, {}))
    for name, value in re.findall(r"(\w+)\s*=\s*(.*?)\s*(?=,\s*\w+\s*=|$)", text[:_LONGEST_ARGUMENTS]):
        try:
            read = ast.literal_eval(value)
            one = {name: list(read) if isinstance(read, tuple) else read}
            problem = OptimizerSection(name=optimizer, args=one).argument_problem()
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError) as error:
            problem = str(error)
        if f"{name}={value}" in kohya_header()["usual_arguments"]:
            continue
        if problem:
            found.left.append(f"The optimizer's argument {_short(name)} = {_short(value)} is not used here.")
        else:
            taken |= one
    if taken:
        found.take("optimizer.args", taken)


def _take_huber(texts: Texts, found: LoraSettings) -> None:
    """Huber's delta; with another loss, kohya's values for Huber mean nothing."""
    if found.values.get("loss.type") != "huber":
        found.values.pop("loss.huber_schedule", None)
        return
    # The trainer's default, where a header of its first versions with this loss says nothing.
    schedule = found.values.setdefault("loss.huber_schedule", "snr")
    delta, scale = (texts.get(key, "") for key in ("ss_huber_c", "ss_huber_scale"))
    factor = scale if schedule == "constant" else ""
    found.take_text("loss.huber_delta", delta or "0.1", lambda c: _number(c) * _number(factor or "1"))
    if schedule == "exponential" and scale not in ("", "1", "1.0"):
        found.left.append(f"Huber's scale ({_short(scale)}) is not known here for that schedule.")
    if texts.get("ss_loss_type", "").lower() == "smooth_l1" and schedule != "constant":
        found.left.append(
            "Its loss is smooth_l1, which is Huber over delta; Huber is used, so the noise levels are"
            " weighted differently."
        )


_PRESETS = {"full": "locon", "attn-mlp": "kohya", "attn-only": "attention", "": "kohya"}
"""LyCORIS' sets of layers, and OneTrainer's of the same names, as ours."""
_MOST_RANK = 1024


def _take_network(text: str, module: str, found: LoraSettings) -> None:
    """The kind of adapter and its arguments, convolutions included."""
    given = {str(name): str(value) for name, value in parse_object(text).items()}
    given = {name: value for name, value in given.items() if value.lower() not in _NOTHING}
    algo = given.pop("algo", "lora").lower()
    kind = algo.replace("locon", "lora").removeprefix("diag-")
    if given.pop("dora_wd", "") and kind == "lora":
        kind = "dora"
    if kind not in ADAPTER_KINDS:
        found.left.append(f"It is of the kind {_short(kind)}; here a LoRA of that rank is trained.")
    elif kind != "lora":
        found.take("adapter.kind", kind)
    preset = given.pop("preset", "full" if module.startswith("lycoris") else "").lower()
    found.take("adapter.targets", _PRESETS.get(preset, "kohya"))
    if preset not in _PRESETS:
        found.left.append(f"Its set of layers {_short(preset)} is not known here; kohya's is used.")
    if ratio := given.pop("loraplus_lr_ratio", given.pop("loraplus_unet_lr_ratio", "")):
        found.take_text("optimizer.lora_plus", ratio, _number)
    for name in ("rank_dropout", "module_dropout", "dropout"):
        # kohya's trainer adds the last one for LyCORIS, beside its own.
        text = given.pop(name, "")
        found.take_text(f"adapter.{name}", "" if found.values.get(f"adapter.{name}") else text, _number)
    # 0 is that of the other layers, which LyCORIS takes; kohya's own LoRA takes 1.
    rank, alpha = given.pop("conv_dim", ""), given.pop("conv_alpha", "1" if algo == "lora" else "0")
    if rank:
        found.take("adapter.targets", "locon" if preset in ("", "full") else found.values["adapter.targets"])
        found.take_text("adapter.conv_rank", rank, lambda text: min(_MOST_RANK, int(_number(text))))
        found.take_text("adapter.conv_alpha", alpha, _number)
    if kind == "lokr" and (given.pop("full_matrix", "") or found.values.get("adapter.rank") == _MOST_RANK):
        # Where both factors are full matrices, alpha means nothing there.
        for name in ("rank", "alpha"):
            found.take(f"adapter.{name}", _MOST_RANK)
        found.values |= {
            name: 0 for name in ("adapter.conv_rank", "adapter.conv_alpha") if name in found.values
        }
    elif kind != "lokr":
        given.pop("full_matrix", "")
    for name, value in given.items():
        found.left.append(f"The network argument {_short(name)} = {_short(value)} is not known here.")


# The configurations of other trainers, by the tables of `assets/other_trainers.toml`.

CONFIG_SUFFIXES = {".toml", ".json", ".yaml", ".yml", ".sh", ".bat", ".cmd", ".ps1", ".txt"}
"""Of configurations; the last five hold a command line."""
_OFF = {"none", "", "false", "0", "0.0", "null", "not_set", "[]", "{}"}
_MOST_SENTENCES = 30
_MOST_KEYS = 1000
_MOST_VALUES = 20_000
"""Of a configuration; a concept of OneTrainer has 80."""
_LARGEST_TEXT = 100_000
"""Bytes of a YAML file or a script; real ones have 10 kB."""
_UNITS = {"": (1.0, 0.0), "%": (0.01, 0.0), "x1000": (1000.0, 0.0), "+1": (1.0, 1.0)}
"""Factors and terms of the units in a table."""


def _from_trainer(path: Path) -> LoraSettings:
    given = _read_configuration(path)
    header = given.get("__metadata__", given) if isinstance(given, dict) else {}
    if isinstance(header, dict) and ("ss_network_dim" in header or "ss_network_module" in header):
        return _from_header_as_json(header)
    found, keys = _of_trainer(given)
    if path.suffix.casefold() == ".toml" and isinstance(given, dict):
        ours = FIELDS.keys() & flattened(given, say=False).keys() - {"name", "seed", "dataset", "model"}
        if len(ours) > (len(found.keys) if found else 0):
            return _from_our_header(path.read_text("utf-8-sig"))
    if found is None:
        raise ConfigError(
            f"{path.name} takes its settings from {_short(keys['config_file'][0])}; import that file."
            if "config_file" in keys
            else f"{path.name} is not a configuration of LoRA Easel, kohya's trainer, OneTrainer, ai-toolkit"
            " or SimpleTuner; it has none of their keys."
        )
    return found


def _of_trainer(given: Any) -> tuple[LoraSettings | None, dict[str, list[Any]]]:
    """The settings of a trainer's configuration, None where the trainer is not known, and its keys."""
    trainers = [(_by_key(given, trainer), trainer) for trainer in read_table("other_trainers.toml").values()]
    # Some keys are the same in several of them.
    values, trainer = max(
        trainers, key=lambda one: [len(one[0].keys() & set(one[1][table])) for table in ("known_by", "names")]
    )
    found = _translate(values, trainer)
    if not (values.keys() & set(trainer["known_by"]) and set(found.keys) - {"script"}):
        return None, values
    if defaults := _defaults_of(values, trainer):
        found.add_defaults(_translate(values | defaults, trainer))
    return found, values


def _defaults_of(values: Mapping[str, list[Any]], trainer: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The trainer's defaults for keys without a value, none where another file may have them."""
    if not values.keys() & set(trainer.get("runs", trainer["known_by"])):
        return {}
    given = {key for key, found in values.items() if found[0] not in (None, "")}
    missing = {key: [value] for key, value in trainer["defaults"].items() if key not in given}
    for key, text, other, value in trainer.get("defaults_when", []):
        if other in missing and str(values.get(key, [""])[0]).casefold() == text:
            missing[other] = [value]
    for key, elsewhere in trainer.get("elsewhere", {}).items():
        if key in given and not _is_off(values[key][0]):
            missing = {key: value for key, value in missing.items() if not _is_in(key, elsewhere)}
    names = trainer["names"]
    meant = {_name_of(key, trainer).partition(" ")[0] for key in given} - {""}
    for group in trainer.get("first", []):
        meant |= {
            names[key] for key in group if any(key in given and not _is_off(values[key][0]) for key in group)
        }
    return {
        key: value for key, value in missing.items() if names.get(key, key).partition(" ")[0] not in meant
    }


def _is_in(key: str, patterns: str) -> bool:
    """Whether a key is in a list of names, some with `*`."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns.split())


def _read_configuration(path: Path) -> dict[str, Any] | list[Any]:
    """The tables of a TOML, JSON or YAML file, a list of them, or the options of a script's command line."""
    suffix = path.suffix.casefold()
    if suffix == ".toml":
        return load_toml(path)
    from yaml import YAMLError

    with wrap_os_errors(ConfigError, f"The config {path} cannot be read"):
        data = read_small_file(path, LARGEST_JSON if suffix == ".json" else _LARGEST_TEXT)
    try:
        script = suffix not in (".json", ".yaml", ".yml")
        # Comments of scripts may be in the system's own encoding.
        text = data.decode("utf-8-sig", "replace" if script and b"\0" not in data else "strict")
        if script:
            return _options_of(text)
        given = parse_json(text) if suffix == ".json" else _load_yaml(text)
    except (ValueError, RecursionError, YAMLError) as error:
        kind = "text" if isinstance(error, UnicodeDecodeError) else suffix[1:].upper()
        raise ConfigError(f"The config {path} is not valid {kind}: {_short(error)}.") from error
    if isinstance(given, list) and given and all(isinstance(one, dict) for one in given):
        return given
    if not isinstance(given, dict):
        raise ConfigError(f"The config {path} holds no table of settings.")
    more = [given.pop(key) for key in _EXTRA_OPTIONS if isinstance(given.get(key), str)]
    return {str(key): value for key, value in (given | _options_of("\n".join(more))).items()}


def _load_yaml(text: str) -> Any:
    """The value of a YAML text by anyone: a few lines of aliases can stand for billions of values."""
    import yaml

    known: dict[int, float] = {}

    def weigh(node: Any) -> float:
        if isinstance(node.value, str):
            return len(node.value)
        if id(node) not in known:
            known[id(node)] = math.inf  # of a node that holds itself
            inner = (one if isinstance(one, tuple) else (one,) for one in node.value)
            known[id(node)] = 1 + sum(map(weigh, itertools.chain.from_iterable(inner)))
        return known[id(node)]

    loader = yaml.SafeLoader(text)
    if (node := loader.get_single_node()) is None:
        return None
    if weigh(node) > 10 * _LARGEST_TEXT:
        raise ValueError("its aliases stand for too many values; write them out")
    return clean_value(loader.construct_document(node))


_EXTRA_OPTIONS = ("additional_parameters", "extra_args")
"""Keys of kohya_ss that hold a command line."""


def _options_of(text: str) -> dict[str, Any]:
    """The options of a command, `--network_dim=16 --flip_aug`; several words of one are a list.

    `script` is the program's file. Variables of the text, `$rank = 8` and `--network_dim=$rank`, are
    replaced.
    """
    options: dict[str, Any] = {}
    text = re.sub(r"[\\^`]\s*\n", " ", re.sub(r"(?im)^[ \t]*(rem\b|::).*", "", text))
    variables = {name: value.strip("\"' ") for name, value in _VARIABLE.findall(text)}
    # Backslashes of paths on Windows are no escapes.
    windows = bool(re.search(r"\b[A-Za-z]:\\", text))
    for line in text.splitlines():
        name = ""
        for word in _shell_words(line, variables, windows):
            if word in _SEPARATORS:
                name = ""
            elif word.startswith("--"):
                name, equals, value = word[2:].partition("=")
                options[name] = value if equals else True
            elif re.fullmatch(r"[^=$]+\.py", word):  # what comes before are options of `accelerate launch`
                name = ""
                if "script" in options:
                    options["commands"] = options.get("commands", 1) + 1
                options["script"] = word.replace("\\", "/").rpartition("/")[2]
                options.pop("config_file", None)
            elif name:
                options[name] = word if options[name] is True else [*_list_of(options[name]), word]
    return options


def _shell_words(line: str, variables: Mapping[str, str], windows: bool) -> Iterator[str]:
    """The words of a line, with variables replaced; one that holds options is several words."""
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.escape = True, "" if windows else "\\"
    try:
        words = list(lexer)
    except ValueError:  # an open quote
        words = line.split()
    for word in words:
        text = _USE.sub(lambda found: variables.get(found[1] or found[2] or found[3], found[0]), word)
        yield from text.split() if text.startswith("--") and word[:2] != "--" else [text]


_SEPARATORS = ("&&", "||", "|", "&", ";", ">", ">>", "2>&1")
_VARIABLE = re.compile(
    r"""(?m)^[ \t]*(?:\$|export |set "?|local )?(\w+)\s*=\s*("[^"\n]*"|'[^'\n]*'|[^\s#"'$(@-][^\s#]*)"""
)
_USE = re.compile(r"\$\{?(\w+)\}?|%(\w+)%|!(\w+)!")


def _leaves_of(value: Any, place: str, on: bool = True) -> Iterator[tuple[str, Any]]:
    """Dotted keys and plain values or lists of them; the entries of a list of tables are counted from 0, and
    the values of one that is switched off are `_UNUSED`.

    A table of arguments, as LoRA_Easy_Training_Scripts writes it, is the list of its `key=value`.
    """
    if isinstance(value, dict) and re.search(r"args\.\w+_args$", place):
        yield place, [f"{key}={inner}" for key, inner in value.items()]
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves_of(inner, f"{place}.{key}" if place else str(key), on)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            off = isinstance(inner, dict) and (inner.get("enabled") is False or inner.get("disabled") is True)
            yield from _leaves_of(inner, f"{place}.{number}", on and not off)
    else:
        yield place, value if on else _UNUSED


def _by_key(given: Any, trainer: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The values of each key, as the trainer's table names it, N for a number."""
    found: dict[str, list[Any]] = {}
    given = {trainer["list"]: given} if isinstance(given, list) and "list" in trainer else given
    known = {*trainer["names"], *trainer["defaults"], *trainer["moot"].split(), *trainer["places"].split()}
    leaves = list(itertools.islice(_leaves_of(given, ""), _MOST_VALUES + 1))
    if len(leaves) > _MOST_VALUES:
        raise ConfigError(f"A configuration with more than {_MOST_VALUES:,} values is of no known trainer.")
    for key, value in leaves:
        name = re.sub(r"(?<=\.)\d+(?=\.|$)", "N", key)
        for start in trainer.get("strip", []):
            name = name.removeprefix(start)
        name = name.rpartition(".")[2] if trainer.get("leaf") else name
        if trainer.get("leaf") and name not in known and len(name) > 5:
            # argparse takes the beginning of an option's name too.
            longer = [one for one in known if one.startswith(name)]
            name = longer[0] if len(longer) == 1 else name
        found.setdefault(name, []).extend([] if value is _UNUSED else [value])
    return {name: listed or [None] for name, listed in found.items()}


@dataclass
class _Translation:
    """The content of a configuration: texts of kohya's header, its network's arguments, and values of
    `ours`."""

    leaf: bool
    texts: dict[str, str] = field(default_factory=dict)
    network: dict[str, str] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    base: str = ""

    def give(self, target: str, value: Any, key: str) -> None:
        """Note the value of `key`, which means `target`: a name as in the tables."""
        name, _, unit = target.partition(" ")
        if name == "base":
            self.base = str(value)[:LONGEST]
        elif name.startswith("ss_network_args."):
            self.network[name.rpartition(".")[2]] = str(value).rpartition("/")[2]
        elif name == "ss_network_args":
            self.network.update(part.partition("=")[::2] for part in _words_of(value))
        elif name == "ss_optimizer_args":
            self.texts[name] = " ".join(_words_of(value))
        elif name == "ss_resolution" and isinstance(area := _plain(value), int | float) and 0 < area <= 16:
            self.texts[name] = str(round(1000 * math.sqrt(area)))  # in megapixels
        elif name == "ss_resolution" and not self.leaf and len(several := _sizes_of(value)) > 1:
            self.ours["dataset.resolutions"] = sorted(
                {int(size) if math.isfinite(size) else size for size in several}
            )
        elif name.startswith("ss_optimizer_args."):
            if not _is_off(value):
                before = self.texts.get("ss_optimizer_args", "")
                self.texts["ss_optimizer_args"] = f"{before} {name.rpartition('.')[2]}={value}"
        elif name.startswith("ss_"):
            self.texts[name] = " ".join(map(str, _list_of(value)))
        elif name not in FIELDS:
            if not _is_off(value):
                self.left.append(f"{key} = {_short(value)} has no setting here.")
        elif isinstance(FIELDS[name].default, list):
            lines = value.splitlines() if isinstance(value, str) else map(str, _list_of(value))
            kept = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            self.ours.setdefault(name, []).extend(kept)
        else:
            plain = _plain(value)
            is_number = isinstance(plain, int | float) and unit
            factor, more = _UNITS[unit]
            self.ours[name] = round(plain * factor + more, 9) if is_number else plain

    def settings(self, title: str) -> LoraSettings:
        """The legal ones of the values, and a sentence for each that is not."""
        texts = dict(self.texts)
        arguments = re.sub(r"(?<!\s)\s+(?=\w+=)", ",", texts.pop("ss_optimizer_args", "").strip())
        betas = dict(re.findall(r"\b(beta[12])=([\d.]+)", arguments))
        if betas:
            arguments = re.sub(r"\bbeta[12]=[\d.]+,?", "", arguments)
            both = f"betas=[{betas.get('beta1', '0.9')}, {betas.get('beta2', '0.999')}]"
            arguments = ",".join(filter(None, (arguments.strip(","), both)))
        if arguments:  # AdamW is their default
            texts["ss_optimizer"] = f"{texts.get('ss_optimizer') or 'AdamW'}({arguments})"
        found = _from_kohya(texts | ({"ss_network_args": json.dumps(self.network)} if self.network else {}))
        found.source, found.base = f"a configuration of {title}", self.base
        for name, value in self.ours.items():
            found.take(name, value)
        for number, line in enumerate(found.values.get("sample.prompts", [])):
            try:
                parse_sample(SampleSection(), line)
            except ConfigError as error:
                found.left.append(f"{error} The prompt is taken without its options.")
                found.values["sample.prompts"][number] = split_sample(line)[0]
        found.left = self.left + found.left
        return found


def _translate(values: dict[str, list[Any]], trainer: Mapping[str, Any]) -> LoraSettings:
    read = _Translation(trainer.get("leaf", False))
    text_of = {key: str(found[0]).casefold() for key, found in values.items()}
    instead = {row[0]: "".join(row[3:]) for row in trainer["unless"] if text_of.get(row[1]) == row[2]}
    for group in trainer.get("first", []):
        on = [key for key in group if not _is_off(text_of.get(key, ""))]
        instead |= dict.fromkeys(on[1:], "")
    aside: dict[str, list[str]] = {}
    foreign: dict[str, list[str]] = {"model": [], "method": []}
    sentences: list[str] = []
    for key, found in values.items():
        name, text, short = instead.get(key, _name_of(key, trainer)), text_of[key], _short(found[0])
        if len(set(map(str, found))) > 1 and name != "sample.prompts" and (name or ".N." not in key):
            read.left.append(f"{key} has several values; {short} is used.")
        kind = "moot" if instead.get(key) == "" else _kind_of(key, text, name, trainer)
        if text in _BLANK:
            kind = "off"
        elif kind in foreign:
            foreign[kind].append(f"{key} = {short}")
        elif kind == "unknown":
            sentences.append(f"{key} = {short} is not known here{trainer.get('hints', {}).get(key, '')}.")
        elif kind == "keys" and name:
            words = trainer.get("words", {}).get(key, {})
            for value in found if name == "sample.prompts" else found[:1]:
                read.give(name, words.get(str(value).casefold(), value), key)
        aside.setdefault(kind, []).append(key)
    for key, text, name, value, *_ in trainer["when"]:
        if text_of.get(key) == text:
            read.give(name, value, key)
    for optimizer, argument, sentence in trainer.get("own_rate", []):
        chosen = read.texts.get("ss_optimizer", "").casefold() == optimizer
        if chosen and argument not in read.texts.get("ss_optimizer_args", ""):
            read.left.append(sentence)
    if rank := read.texts.get("ss_network_dim"):
        read.texts.setdefault("ss_network_alpha", rank)
    if trainer.get("conv_alpha_is_rank") and (rank := read.network.get("conv_dim")):
        read.network.setdefault("conv_alpha", rank)
    file = read.base.replace("\\", "/").rpartition("/")[2]
    for version, pattern in kohya_header()["base_names"].items():
        if re.search(pattern, file, re.IGNORECASE):
            read.texts.setdefault("ss_base_model_version", version)
    result = read.settings(trainer["title"])
    refused = [
        (foreign["model"], f"this cannot be trained here. {_WHAT_TRAINS}"),
        (foreign["method"], "here an adapter is trained, with these settings."),
    ]
    result.left = [f"{', '.join(given)}: {sentence}" for given, sentence in refused if given] + result.left
    result.left += sentences[:_MOST_SENTENCES]
    names = {kind: list(map(_short, keys[:_MOST_KEYS])) for kind, keys in aside.items()}
    if more := names.get("unknown", [])[_MOST_SENTENCES:]:
        result.left.append(
            f"And {len(aside['unknown']) - _MOST_SENTENCES} more are not known here: {', '.join(more)}."
        )
    result.keys, result.off = names.get("keys", []), names.get("off", [])
    result.keys += [key for kind in ("model", "method") for key in names.get(kind, [])]
    if "places" in names:
        result.left.append(f"Not taken, as they name places of that machine: {', '.join(names['places'])}.")
    if "moot" in names:
        result.left.append(f"Without a meaning here: {', '.join(names['moot'])}.")
    return result


_UNUSED = object()
_BLANK = ("none", "", "[]", "{}")


def _kind_of(key: str, text: str, name: str, trainer: Mapping[str, Any]) -> str:
    """What becomes of a key whose value is `text`: the part of the report that it is in."""
    for kind, table in (("model", "trains"), ("method", "methods")):
        if key in trainer[table] and not re.fullmatch(trainer[table][key], text):
            return kind
    if name:
        is_file = name == "sample.prompts" and re.fullmatch(r"[^\n]*\.(txt|json|toml)", text)
        return "places" if is_file else "keys"
    if any(key == row[0] and text == row[1] and not row[4:] for row in trainer["when"]):
        return "keys"
    if text in trainer["usual"].get(key, "").split("|") or _is_in(key, trainer["moot"]):
        return "moot"
    if text in _OFF:
        return "off"
    if _is_in(key, trainer["places"]):
        return "places"
    return "keys" if key in trainer["trains"] or key in trainer["methods"] else "unknown"


_WHAT_TRAINS = "LoRA Easel trains Stable Diffusion 1.x, 2.x and XL; for these the other settings are taken."


def _words_of(value: Any) -> list[str]:
    """The parts of a list of arguments, or of one text such as `"a=1" "b=2"`."""
    return re.split(r"(?<!\s)\s+(?=\w+=)", " ".join(map(str, _list_of(value))).replace('"', " ").strip())


def _name_of(key: str, trainer: Mapping[str, Any]) -> str:
    """What a key means; `a.*` in the table names all keys below."""
    names = trainer["names"]
    name: str = names.get(key, names.get(f"{key.rpartition('.')[0]}.*", ""))
    return name.replace("*", key.rpartition(".")[2])


def _is_off(value: Any) -> bool:
    return _short(value).casefold() in _OFF


def _sizes_of(value: Any) -> list[float]:
    """The numbers of a list, or of `512,768`."""
    parts = value.split(",") if isinstance(value, str) else _list_of(value)
    return [size for size in map(_plain, parts) if isinstance(size, int | float)]


def _list_of(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _plain(value: Any) -> Any:
    """A text that is a number, true or false, as that."""
    if isinstance(value, str):
        if value.casefold() in ("true", "false"):
            return _is_true(value)
        with contextlib.suppress(ValueError):
            return _number(value)
    return value
