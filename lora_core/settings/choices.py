"""Named choices as tables: optimizers, schedules, losses, samplers, targets, formats.

A row names its code as "module:attribute", imported only when it is used, so that a window without torch
can list them all. The price: editors cannot follow the reference, so `tests/settings/test_choices.py`
resolves every row.
"""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lora_core.errors import ConfigError


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

OPTIMIZERS: dict[str, OptimizerChoice] = {
    "adamw": OptimizerChoice(
        "AdamW", "The safe default.", "torch.optim:AdamW", {"weight_decay": 0.01}, fused=True
    ),
    "adam": OptimizerChoice("Adam", "AdamW without weight decay.", "torch.optim:Adam", fused=True),
    "nadam": OptimizerChoice("NAdam", "Adam with Nesterov momentum.", "torch.optim:NAdam"),
    "radam": OptimizerChoice("RAdam", "Adam that needs less warm-up.", "torch.optim:RAdam"),
    "adafactor": OptimizerChoice(
        "Adafactor",
        "Keeps far less state; for very large ranks.",
        "torch.optim:Adafactor",
        state=0.2,
        by_matrix=True,
    ),
    "sgd": OptimizerChoice(
        "SGD",
        "Plain gradient descent with momentum; needs a much higher rate.",
        "torch.optim:SGD",
        {"momentum": 0.9},
        state=1.0,
    ),
    "lion": OptimizerChoice(
        "Lion",
        "Half of AdamW's state; use a third of its learning rate.",
        "lion_pytorch:Lion",
        package="lion-pytorch",
        state=1.0,
    ),
    "prodigy": OptimizerChoice(
        "Prodigy",
        "Finds its own learning rate; set the learning rate to 1.",
        "prodigyopt:Prodigy",
        {"safeguard_warmup": True, "use_bias_correction": True},
        package="prodigyopt",
        one_rate=True,
        state=4.0,
    ),
}

SCHEDULES: dict[str, Implementation] = {
    "constant": Implementation(
        "Constant", "The same learning rate throughout.", "lora_core.train.loop:constant"
    ),
    "linear": Implementation("Linear", "Falls to zero in a straight line.", "lora_core.train.loop:linear"),
    "cosine": Implementation(
        "Cosine", "Falls to zero slowly at both ends; the default.", "lora_core.train.loop:cosine"
    ),
    "cosine_restarts": Implementation(
        "Cosine with restarts",
        "Three cosine falls, each from the full rate.",
        "lora_core.train.loop:cosine_restarts",
    ),
}

LOSSES: dict[str, Implementation] = {
    "mse": Implementation(
        "Squared error", "What the base was trained with.", "lora_core.train.loss:squared_error"
    ),
    "l1": Implementation(
        "Absolute error", "Less weight on a few large errors.", "lora_core.train.loss:absolute_error"
    ),
    "huber": Implementation(
        "Huber",
        "Squared where small, linear where large; robust to outliers and wrong captions.",
        "lora_core.train.loss:huber_error",
    ),
}

HUBER_SCHEDULES: dict[str, Implementation] = {
    "constant": Implementation(
        "Constant", "The same delta at each noise level.", "lora_core.train.loss:constant_delta"
    ),
    "snr": Implementation(
        "By signal-to-noise ratio",
        "From 1 without noise down to delta, as the signal fades; the default.",
        "lora_core.train.loss:snr_delta",
    ),
    "exponential": Implementation(
        "Exponential",
        "From 1 at the first timestep down to delta at the last.",
        "lora_core.train.loss:exponential_delta",
    ),
}

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
FORMATS: dict[str, Implementation] = {
    "kohya": Implementation(
        "kohya (all tools)",
        "A1111, Forge, ComfyUI, InvokeAI, kohya and diffusers read it.",
        "lora_core.formats.kohya:to_tensors",
    ),
    "diffusers": Implementation(
        "diffusers / PEFT",
        "For diffusers scripts; most other tools do not read it.",
        "lora_core.formats.peft:to_tensors",
    ),
}

# Named as in A1111; each is a diffusers scheduler and how it is configured.
SAMPLERS: dict[str, Implementation] = {
    "ddim": Implementation("DDIM", "Plain and deterministic.", "diffusers:DDIMScheduler"),
    "euler": Implementation("Euler", "Fast and smooth.", "diffusers:EulerDiscreteScheduler"),
    "euler_a": Implementation(
        "Euler a", "Adds noise at each step; livelier.", "diffusers:EulerAncestralDiscreteScheduler"
    ),
    "heun": Implementation("Heun", "Two model calls per step.", "diffusers:HeunDiscreteScheduler"),
    "dpmpp_2m": Implementation("DPM++ 2M", "Sharp in 20 steps.", "diffusers:DPMSolverMultistepScheduler"),
    "dpmpp_2m_karras": Implementation(
        "DPM++ 2M Karras",
        "DPM++ 2M with more steps where detail forms.",
        "diffusers:DPMSolverMultistepScheduler",
        {"use_karras_sigmas": True},
    ),
    "unipc": Implementation("UniPC", "Good in few steps.", "diffusers:UniPCMultistepScheduler"),
    "lcm": Implementation(
        "LCM",
        "4 to 8 steps at a CFG of 1 to 2, with a LoRA or base that was distilled for it.",
        "diffusers:LCMScheduler",
    ),
}

PREDICTIONS: dict[str, Choice] = {
    "auto": Choice("As the base says", "Read from the base's own config."),
    "epsilon": Choice("epsilon", "The base predicts the noise."),
    "v_prediction": Choice("v", "The base predicts velocity."),
}

ZERO_TERMINAL_SNR: dict[str, Choice] = {
    "auto": Choice("As the base says", "Read from the file's markers or the base's own config."),
    "on": Choice("On", "The last timestep is pure noise; only for bases that predict velocity."),
    "off": Choice("Off", "A little of the image is left at the last timestep, as usual."),
}

PRECISIONS: dict[str, Choice] = {
    "auto": Choice(
        "Automatic", "bf16 where the device is fast at it, else fp16 with tensor cores, else fp32."
    ),
    "fp32": Choice("fp32", "Full precision; the most memory."),
    "bf16": Choice("bf16", "Half the memory; for recent GPUs and CPUs."),
    "fp16": Choice("fp16", "Half the memory; for older GPUs."),
}

QUANTIZED: dict[str, Choice] = {
    "none": Choice("As it is", "In the dtype that precision names."),
    "int8": Implementation(
        "8 bits",
        "Rounded to 255 levels: half of bf16's memory, a quarter of fp32's.",
        "lora_core.backends.int8:quantize_int8",
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
