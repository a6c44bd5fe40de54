"""Named choices as tables: optimizers, schedules, losses, samplers, targets, formats (`assets/choices.toml`).

A row names its code as "module:attribute", imported only when it is used, so that a window without torch
can list them all. The price: editors cannot follow the reference, so `tests/settings/test_choices.py`
resolves every row.
"""

import functools
import importlib
import importlib.util
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lora_core.errors import ConfigError
from lora_core.system.files import ASSETS


@dataclass(frozen=True)
class Choice:
    """One row: a name to choose.

    Attributes:
        title: what the user reads.
        help: one sentence on when to take it.
    """

    title: str
    help: str


@dataclass(frozen=True)
class Implementation(Choice):
    """A row that stands for code.

    Attributes:
        load: "module:attribute" of the code.
        defaults: keyword arguments that it is called with.
        package: the optional package that it needs, as the package index names it, or "".
    """

    load: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    package: str = ""

    def resolve(self) -> Any:
        """Import what `load` names.

        Raises:
            ConfigError: the optional package is not installed.
        """
        module, _, attribute = self.load.partition(":")
        if self.package:
            require_package(self.title, module, self.package)
        return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class OptimizerChoice(Implementation):
    """An optimizer.

    Attributes:
        one_rate: it works with one learning rate for everything that it trains.
        state: values that it keeps for each parameter.
        by_matrix: it looks at rows and columns, so that each factor has to be a tensor of its own.
        fused: one of torch whose step is one kernel on a card (`fused=True`).
    """

    one_rate: bool = False
    state: float = 2.0
    by_matrix: bool = False
    fused: bool = False


@dataclass(frozen=True)
class LayerSet(Choice):
    """A set of layers to adapt.

    Attributes:
        unet, text: full-match patterns for paths as diffusers names them; "" for none.
        blocks: the field of a family that narrows the UNet's further, or "".
    """

    unet: str
    text: str
    blocks: str = ""


def require_package(feature: str, module: str, package: str) -> None:
    """Check that an optional package is installed, without importing it.

    Args:
        feature: what needs it, for the message.
        module: its import name.
        package: its name on the package index.

    Raises:
        ConfigError: it is not installed; the message has the command that installs it into this environment.
    """
    if importlib.util.find_spec(module) is None:
        python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
        raise ConfigError(
            f"{feature} needs the package {package}, which is not installed. Install it with"
            f" `{python} -m pip install {package}`."
        )


Row = TypeVar("Row", bound=Choice)
Table = Mapping[str, Choice]


@functools.cache
def rows() -> dict[str, Any]:
    """The tables of `assets/choices.toml`."""
    return tomllib.loads((ASSETS / "choices.toml").read_text(encoding="utf-8"))


def _table(name: str, kind: type[Row]) -> dict[str, Row]:
    return {key: kind(**row) for key, row in rows()[name].items()}


OPTIMIZERS = _table("optimizers", OptimizerChoice)
SCHEDULES = _table("schedules", Implementation)
LOSSES = _table("losses", Implementation)
HUBER_SCHEDULES = _table("huber_schedules", Implementation)
FORMATS = _table("formats", Implementation)
SAMPLERS = _table("samplers", Implementation)
PREDICTIONS = _table("predictions", Choice)
ZERO_TERMINAL_SNR = _table("zero_terminal_snr", Choice)
PRECISIONS = _table("precisions", Choice)

_ATTENTION = r"attn[12]\.(?:to_q|to_k|to_v|to_out\.0)"
_TEXT_ATTENTION = r"self_attn\.(?:q_proj|k_proj|v_proj|out_proj)"
# Everything linear below a Transformer2DModel or a CLIP layer: kohya sd-scripts' default modules.
_KOHYA_UNET = rf".*\.attentions\.\d+\.(?:proj_in|proj_out|.*\.{_ATTENTION}|.*\.ff\.net\.(?:0\.proj|2))"
_KOHYA_TEXT = rf".*\.(?:{_TEXT_ATTENTION}|mlp\.fc1|mlp\.fc2)"
# What its convolution option adds: resnets and the changes of size between levels.
_CONVOLUTIONS = (
    r".*\.resnets\.\d+\.(?:conv1|conv2|conv_shortcut|time_emb_proj)|.*\.(?:down|up)samplers\.\d+\.conv"
)

TARGETS: dict[str, LayerSet] = {
    "attention": LayerSet(
        "Attention",
        "q, k, v and out of each attention layer; the default.",
        unet=rf".*\.{_ATTENTION}",
        text=rf".*\.{_TEXT_ATTENTION}",
    ),
    "kohya": LayerSet(
        "Attention, projections and feed-forward",
        "kohya's default set; fits more.",
        unet=_KOHYA_UNET,
        text=_KOHYA_TEXT,
    ),
    "locon": LayerSet(
        "All of these and the convolutions (LoCon)",
        "Fits textures and line work more closely; a larger file.",
        unet=f"{_KOHYA_UNET}|{_CONVOLUTIONS}",
        text=_KOHYA_TEXT,
    ),
    "style": LayerSet(
        "Style blocks only",
        "Only the blocks that carry how an image looks; mixes well with a subject. No text encoder.",
        unet=_KOHYA_UNET,
        text="",
        blocks="style_blocks",
    ),
    "subject": LayerSet(
        "Subject blocks only",
        "Only the blocks that carry what is shown; mixes well with a style. No text encoder.",
        unet=_KOHYA_UNET,
        text="",
        blocks="subject_blocks",
    ),
}
QUANTIZED: dict[str, Choice] = {
    "none": Choice("As it is", "In the dtype that precision names."),
    "int8": Implementation(
        "8 bits",
        "Rounded to 255 levels: half of bf16's memory, a quarter of fp32's.",
        "lora_core.backends.compact:quantize_int8",
    ),
}


def find_key(table: Table, name: str) -> str | None:
    """The key of the row `name`, found by key or by title, in any case."""
    wanted = name.strip().lower()
    return next((key for key, row in table.items() if wanted in (key, row.title.lower())), None)


def chosen(table: Mapping[str, Row], name: str, setting: str) -> Row:
    """The row `name`, found by key or by title, in any case.

    Raises:
        ConfigError: there is no such row; the sentence lists those that there are.
    """
    key = find_key(table, name)
    if key is None:
        raise ConfigError(f"{setting} = {name!r} is not known; choose one of {', '.join(table)}.")
    return table[key]
