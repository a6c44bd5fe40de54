"""What a run starts from: presets by goal, and the settings that a LoRA file says it was trained with.

Presets are TOML files in `assets/presets`. A LoRA may come from anywhere: each value in its header is checked
as if a user had typed it, and what cannot be used is listed in a sentence each.
"""

import ast
import contextlib
import functools
import json
import math
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_core.errors import AdapterFileError, ConfigError, wrap_os_errors
from lora_core.model_files.families import Family
from lora_core.model_files.header import Header, read_header
from lora_core.settings.config import (
    FIELDS,
    RETIRED,
    checked_value,
    flattened,
    in_short,
    label_of,
    load_toml,
    retired,
    takes_class,
)
from lora_core.settings.schema import ADAPTER_KINDS, OPTIMIZERS, OptimizerChoice, OptimizerSection
from lora_core.system.files import PRESETS, changed_at, parse_json, parse_object, read_small_file, read_table

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
    """

    source: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    base: str = ""

    def take(self, name: str, value: Any) -> None:
        """Take a value if it is legal, else list it."""
        try:
            self.values[name] = checked_value(name, value)
        except (ConfigError, ValueError, OverflowError):
            self.left.append(f"{label_of(name)} is {_short(value)} there, which cannot be set here.")

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
            self.left.append(f"The {label_of(name).lower()} {_short(text)} is not known here.")
        except ValueError:
            self.left.append(f"{label_of(name)} is {_short(text)} there, which is not a number.")


def is_slider(path: Path) -> bool:
    """Whether a LoRA file says in its header that it is a concept slider; not where it cannot be read."""
    return _is_slider(path, changed_at(path))


@functools.lru_cache(maxsize=256)
def _is_slider(path: Path, changed: int) -> bool:
    with contextlib.suppress(AdapterFileError, ValueError, RecursionError, AttributeError):
        settings = tomllib.loads(read_header(path).metadata.get(CONFIG_KEY, ""))
        return bool(settings.get("slider", {}).get("positive"))
    return False


def _short(value: Any) -> str:
    return in_short(value, str)


def settings_from_lora(path: Path) -> LoraSettings:
    """The settings that a LoRA file was trained with, or of a configuration that another trainer was given.

    Raises:
        AdapterFileError: it is neither, or has no record of its training.
        ConfigError: it is a configuration that cannot be read, or of no trainer that is known.
    """
    if path.suffix.casefold() in CONFIG_SUFFIXES:
        return _with_usual(_from_trainer(path))
    header = read_header(path)
    texts = header.metadata
    if CONFIG_KEY in texts:
        found = _from_our_header(texts[CONFIG_KEY])
    elif "ss_network_dim" in texts or "ss_network_module" in texts:
        found = _from_kohya(texts)
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


def _from_our_header(text: str) -> LoraSettings:
    found = LoraSettings("the settings that LoRA Easel wrote into it")
    try:
        values = flattened(tomllib.loads(text), say=False)
    except (ValueError, RecursionError) as error:
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
    if texts.get("ss_network_alpha") in ("0", "0.0"):
        # Which means the rank there.
        texts["ss_network_alpha"] = texts.get("ss_network_dim", "")
    for name, keys, kind in kohya_header()["read"]:
        given = (texts.get(key, "") for key in keys.split())
        text = next((text for text in given if text.lower() not in ("", "none")), "")
        found.take_text(name, text, functools.partial(_read, kind))
    rates = re.findall(r"[\d.]+(?:[eE][-+]?\d+)?", texts.get("ss_text_encoder_lr", ""))
    if len(rates) > 1:
        found.take_text("optimizer.text_encoder_2_lr", rates[1], _number)
    if found.values.get("train.steps"):
        steps = found.values["train.steps"]
        warmup = texts.get("ss_lr_warmup_steps", "")
        found.take_text("optimizer.warmup", warmup, lambda text: min(1.0, _number(text) / steps))
    if texts.get("ss_mixed_precision", "") in ("fp16", "bf16"):
        found.take("train.precision", texts["ss_mixed_precision"])
    _take_optimizer(texts.get("ss_optimizer", ""), found)
    _take_huber(texts, found)
    _take_network(texts.get("ss_network_args", ""), found)
    if _is_true(texts.get("ss_zero_terminal_snr", "")):
        found.left.append("It was trained with zero terminal SNR; set that by hand if its base has it.")
    for key, title in kohya_header()["unused"].items():
        if texts.get(key, "").lower() not in _NOTHING:
            found.left.append(f"{title} ({_short(texts[key])}) is not known here.")
    found.base = texts.get("ss_sd_model_name", "")[:LONGEST]
    return found


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
    plain = name.removesuffix("8bit").removeprefix("paged")
    known = kohya_header()["words"]["optimizers"].get(name, name)
    here = [key for key in (known, plain) if key in OPTIMIZERS]
    key = next((key for key in here if _is_installed(OPTIMIZERS[key])), "".join(here[:1]))
    if key:
        found.take("optimizer.name", key)
    if name and key != known:
        why = "has no package here" if known in here else "is not known here"
        instead = f"; {OPTIMIZERS[key].title} is used instead" if key else ""
        found.left.append(f"The optimizer {_short(name)} {why}{instead}.")
    if key and arguments:
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
    taken: dict[str, Any] = {}
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


def _take_network(text: str, found: LoraSettings) -> None:
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
    found.take("adapter.targets", "kohya")
    for name in ("rank_dropout", "module_dropout", "dropout"):
        # kohya's trainer adds the last one for LyCORIS, beside its own.
        text = given.pop(name, "")
        found.take_text(f"adapter.{name}", "" if f"adapter.{name}" in found.values else text, _number)
    # 0 is that of the other layers, which LyCORIS takes; kohya's own LoRA takes 1.
    rank, alpha = given.pop("conv_dim", ""), given.pop("conv_alpha", "1" if algo == "lora" else "0")
    if rank:
        found.take("adapter.targets", "locon")
        found.take_text("adapter.conv_rank", rank, lambda text: int(_number(text)))
        found.take_text("adapter.conv_alpha", alpha, _number)
    for name, value in given.items():
        if name != "preset":
            found.left.append(f"The network argument {_short(name)} = {_short(value)} is not known here.")


# The configurations of other trainers, by the tables of `assets/other_trainers.toml`.

CONFIG_SUFFIXES = {".toml", ".json", ".yaml", ".yml", ".sh", ".bat", ".cmd", ".ps1", ".txt"}
"""Of configurations; the last five hold a command line."""
_OFF = {"none", "", "false", "0", "0.0", "null", "not_set", "[]", "{}"}
_MOST_SENTENCES = 30
_UNITS = {"%": 0.01, "x1000": 1000.0}
"""Factors of the units in a table."""


def _from_trainer(path: Path) -> LoraSettings:
    given = _read_configuration(path)
    ours = path.suffix.casefold() == ".toml"
    if ours and FIELDS.keys() & flattened(given, say=False).keys() - {"name", "seed", "dataset", "model"}:
        return _from_our_header(path.read_text("utf-8-sig"))
    pairs = list(_leaves_of(given, ""))
    trainers = [(_by_key(pairs, trainer), trainer) for trainer in read_table("other_trainers.toml").values()]
    # Some keys are the same in several of them.
    values, trainer = max(
        trainers, key=lambda one: [len(one[0].keys() & set(one[1][table])) for table in ("known_by", "names")]
    )
    if values.keys() & set(trainer["known_by"]):
        defaults = {key: [value] for key, value in trainer.get("defaults", {}).items()}
        return _translate(defaults | values, trainer)
    raise ConfigError(
        f"{path.name} is not a configuration of LoRA Easel, kohya's trainer, OneTrainer, ai-toolkit or"
        " SimpleTuner; it has none of their keys."
    )


def _read_configuration(path: Path) -> dict[str, Any]:
    """The tables of a TOML, JSON or YAML file, or the options of a command line in a script."""
    suffix = path.suffix.casefold()
    if suffix == ".toml":
        return load_toml(path)
    import yaml

    with wrap_os_errors(ConfigError, f"The config {path} cannot be read"):
        data = read_small_file(path)
    try:
        text = data.decode("utf-8-sig")
        if suffix not in (".json", ".yaml", ".yml"):
            return _options_of(text)
        given = parse_json(text) if suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        kind = "text" if isinstance(error, UnicodeDecodeError) else suffix[1:].upper()
        raise ConfigError(f"The config {path} is not valid {kind}: {_short(error)}.") from error
    if not isinstance(given, dict):
        raise ConfigError(f"The config {path} holds no table of settings.")
    return {str(key): value for key, value in given.items()}


def _options_of(text: str) -> dict[str, Any]:
    """The options of a command, `--network_dim=16 --flip_aug`; several words of one are a list."""
    options: dict[str, Any] = {}
    for line in re.sub(r"[\\^`]\s*\n", " ", re.sub(r"(?im)^\s*(rem\b|::).*", "", text)).splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # an open quote
            words = line.split()
        name = ""
        for word in words:
            if word.startswith("--"):
                name, equals, value = word[2:].partition("=")
                options[name] = value if equals else True
            elif word.endswith(".py"):  # what comes before are options of `accelerate launch`
                name = ""
            elif name:
                options[name] = word if options[name] is True else [*_list_of(options[name]), word]
    return options


def _leaves_of(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and plain values or lists of them; the entries of a list of tables are counted from 0."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves_of(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from _leaves_of(inner, f"{place}.{number}")
    else:
        yield place, value


def _by_key(pairs: list[tuple[str, Any]], trainer: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The values of each key, as the trainer's table names it, N for a number."""
    found: dict[str, list[Any]] = {}
    for key, value in pairs:
        name = re.sub(r"(?<=\.)\d+(?=\.|$)", "N", key)
        for start in trainer.get("strip", []):
            name = name.removeprefix(start)
        found.setdefault(name.rpartition(".")[2] if trainer.get("leaf") else name, []).append(value)
    return found


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
            self.network.update(str(part).partition("=")[::2] for part in _list_of(value))
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
            self.ours.setdefault(name, []).extend(map(str, _list_of(value)))
        else:
            plain = _plain(value)
            is_number = isinstance(plain, int | float) and unit
            self.ours[name] = round(plain * _UNITS[unit], 9) if is_number else plain

    def settings(self, title: str) -> LoraSettings:
        """The legal ones of the values, and a sentence for each that is not."""
        texts = dict(self.texts)
        arguments = re.sub(r"\s+(?=\w+=)", ",", texts.pop("ss_optimizer_args", "").strip())
        if arguments:  # AdamW is their default
            texts["ss_optimizer"] = f"{texts.get('ss_optimizer') or 'AdamW'}({arguments})"
        found = _from_kohya(texts | ({"ss_network_args": json.dumps(self.network)} if self.network else {}))
        found.source, found.base = f"a configuration of {title}", self.base
        for name, value in self.ours.items():
            found.take(name, value)
        more = len(self.left) - _MOST_SENTENCES
        found.left += self.left[:_MOST_SENTENCES]
        found.left += [f"And {more} more are not known here."] if more > 0 else []
        return found


def _translate(values: dict[str, list[Any]], trainer: Mapping[str, Any]) -> LoraSettings:
    read = _Translation(trainer.get("leaf", False))
    text_of = {key: str(found[0]).casefold() for key, found in values.items()}
    instead = {row[0]: "".join(row[3:]) for row in trainer["unless"] if text_of.get(row[1]) == row[2]}
    handled = {key for key, text, *_ in trainer["when"] if text_of.get(key) == text}
    aside: dict[str, list[str]] = {"places": [], "moot": []}
    for key, found in values.items():
        name = instead.get(key, trainer["names"].get(key, ""))
        words = trainer.get("words", {}).get(key, {})
        several = len(set(map(str, found))) > 1 and name != "sample.prompts"
        if several and (name or ".N." not in key):
            read.left.append(f"{key} has several values; {_short(found[0])} is used.")
        for value in found if name == "sample.prompts" else found[:1]:
            if value in (None, "") or instead.get(key) == "":
                continue
            if name:
                read.give(name, words.get(str(value).casefold(), value), key)
            elif not _is_off(value) and key not in handled:
                kind = next((kind for kind in aside if key in trainer[kind].split()), "")
                sentence = f"{key} = {_short(value)} is not known here."
                (aside[kind] if kind else read.left).append(key if kind else sentence)
    for key, text, name, value in trainer["when"]:
        if text_of.get(key) == text and name != "moot":
            read.give(name, value, key)
    if rank := read.texts.get("ss_network_dim"):
        read.texts.setdefault("ss_network_alpha", str(trainer.get("alpha", rank)))
    if trainer.get("conv_alpha_is_rank") and (rank := read.network.get("conv_dim")):
        read.network.setdefault("conv_alpha", rank)
    result = read.settings(trainer["title"])
    if aside["places"]:
        names = ", ".join(aside["places"])
        result.left.append(f"Not taken, as they name places of that machine: {names}.")
    if aside["moot"]:
        result.left.append(f"Without a meaning here: {', '.join(aside['moot'])}.")
    return result


def _is_off(value: Any) -> bool:
    return str(value).casefold() in _OFF


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
