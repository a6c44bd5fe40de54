"""How a setting is declared: a dataclass field that carries all there is to know of it."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lora_core.settings import choices
from lora_core.settings.choices import Table

AUTO: Literal["auto"] = "auto"
NumberOrAuto = float | Literal["auto"]
"""Type of a setting that is a number, or `auto` where the base decides it."""


class Form(NamedTuple):
    """The form of a text: a regular expression that it has to match, and the legal texts in words."""

    pattern: str
    words: str


def setting(
    default: Any,
    title: str,
    help: str,
    *,
    span: tuple[float, float] | None = None,
    above: float | None = None,
    among: "tuple[int, ...] | Form | None" = None,
    table: Table | None = None,
) -> Any:
    """A dataclass field that carries what people and programs need to know of it.

    Args:
        default: the value where none is given; a list or a table of patterns is copied for each config.
        title: the label in the window.
        help: one or two sentences: what it does and when to change it.
        span: smallest and largest legal value, both included; of a table, each of its values.
        above: values must be larger than this.
        among: the only legal numbers, or the form of the legal texts.
        table: the legal names, as a table of choices.
    """
    metadata = {
        "title": title,
        "help": help,
        "span": span,
        "above": above,
        "among": among,
        "table": table,
    }
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


# The sections of a run's settings: every setting declared once, with all there is to know of it.
#
# A field's metadata is the only place that holds its title, help, range and choices: the window's labels
# and tooltips, `--help`, the reading of TOML, validation and the table of settings all read it from here.


MIN_SNR = 5.0
"""gamma of min-SNR where it is on by default: the value that Hang et al. 2023 recommend."""


@dataclass(frozen=True)
class ModelSection:
    """The frozen base model."""

    base: str = setting(
        "demo",
        "Base model",
        "`demo` for the embedded one, a diffusers folder, a .safetensors file, or a hub id.",
    )
    vae: str = setting(
        "", "VAE", "A separate VAE, a folder or a file, in place of the base's own. Empty: the base's own."
    )
    prediction: str = setting(
        "auto",
        "Prediction",
        "What the base predicts: noise (epsilon) or velocity (v). Change it only if pictures come out as"
        " noise.",
        table=choices.PREDICTIONS,
    )
    zero_terminal_snr: str = setting(
        "auto",
        "Zero terminal SNR",
        "Whether nothing of the picture is left at the base's last timestep, as in NoobAI's velocity version."
        " Set it where the base's page says so and its file does not.",
        table=choices.ZERO_TERMINAL_SNR,
    )


@dataclass(frozen=True)
class AdapterSection:
    """The trained low-rank layers."""

    rank: int = setting(
        16,
        "Rank (size)",
        "How many directions each layer may learn. More learns more detail and makes a larger file.",
        span=(1, 1024),
    )
    alpha: float = setting(
        16.0,
        "Alpha",
        "The update is scaled by alpha / rank. Keep it equal to rank unless a recipe says otherwise.",
        above=0.0,
    )
    rslora: bool = setting(
        False,
        "Rank-stabilised scale",
        "Scales by alpha / sqrt(rank) instead of alpha / rank, so that large ranks learn as strongly as small"
        " ones (rsLoRA).",
    )
    targets: str = setting(
        "attention", "Layers", "Which layers of the base are adapted.", table=choices.TARGETS
    )
    init: str = setting(
        "default",
        "Start from",
        "`default` for a fresh adapter, or the file of a LoRA, of any rank, to go on with.",
    )
    block_ranks: dict[str, int] = setting(
        {},
        "Ranks by block",
        'Rank for the layers whose path holds a pattern, such as "mid_block" = 4 or "unet.*attn2" = 32; 0'
        " leaves them out. Of several patterns that match, the last counts.",
        span=(0, 1024),
    )
    block_alphas: dict[str, float] = setting(
        {},
        "Alphas by block",
        "Alpha for the layers whose path holds a pattern; the others keep alpha.",
        above=0.0,
    )
    dropout: float = setting(
        0.0, "Dropout", "Share of an adapted layer's inputs zeroed in training.", span=(0.0, 0.99)
    )
    rank_dropout: float = setting(
        0.0, "Rank dropout", "Share of the rank's directions left out at each step.", span=(0.0, 0.99)
    )
    module_dropout: float = setting(
        0.0, "Module dropout", "Chance that a whole layer's update is left out at a step.", span=(0.0, 0.99)
    )

    @property
    def scale(self) -> float:
        """What the update is multiplied by, where no block has numbers of its own."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class DatasetSection:
    """The pictures and their captions."""

    path: str = setting(
        "demo", "Dataset", "A folder of pictures with captions beside them, a zip of one, or `demo`."
    )
    trigger: str = setting(
        "",
        "Trigger word",
        "A word that calls up what is learned; put in front of each caption that lacks it.",
    )
    flip: bool = setting(
        False, "Flip", "Show each picture mirrored half of the time. Not for faces or writing."
    )
    caption_dropout: float = setting(
        0.05,
        "Caption dropout",
        "Share of looks at a picture without its caption; keeps guidance working.",
        span=(0.0, 1.0),
    )
    tag_dropout: float = setting(
        0.0, "Tag dropout", "Share of comma-separated tags left out at each look.", span=(0.0, 1.0)
    )
    shuffle_tags: bool = setting(
        False, "Shuffle tags", "Put comma-separated tags into a new order at each look."
    )
    keep_tags: int = setting(
        0, "Keep tags", "The first so many tags are neither shuffled nor left out.", span=(0, 100)
    )


@dataclass(frozen=True)
class TrainSection:
    """How long, how large and in which number format."""

    steps: int = setting(
        800,
        "Steps",
        "Optimizer steps. About 100 a picture, between 800 and 3,000, is a good start.",
        span=(1, 1_000_000),
    )
    batch_size: int = setting(1, "Batch size", "Pictures that go through the model at once.", span=(1, 256))
    accumulate: int = setting(
        1, "Accumulate", "Batches summed into one step: a larger batch without more memory.", span=(1, 1024)
    )
    resolution: int = setting(
        0,
        "Resolution",
        "The side in pixels of a square with a bucket's area. 0: what the base was trained at.",
        span=(0, 4096),
    )
    device: str = setting(
        AUTO,
        "Device",
        "What computes: `auto` for the newest card, `cpu` for the processor, `cuda:0`, `cuda:1`, ... for a"
        " card by its number in nvidia-smi (ROCm's too), `mps` on a Mac, `xpu` for Intel's.",
        among=Form(r"auto|cpu|mps|(cuda|xpu)(:\d{1,3})?", "auto, cpu, cuda, cuda:0, cuda:1, ..., mps or xpu"),
    )
    precision: str = setting(
        "auto",
        "Precision",
        "Number format of the frozen base; the adapter is always fp32.",
        table=choices.PRECISIONS,
    )
    checkpointing: bool = setting(
        False,
        "Gradient checkpointing",
        "Computes activations twice and keeps far fewer: less memory, about a third slower.",
    )
    quantise: str = setting(
        "none",
        "Base in fewer bits",
        "Rounds the frozen weights of the UNet's blocks: much less memory, steps somewhat longer, and the"
        " LoRA is trained beside a base that is very slightly off.",
        table=choices.QUANTISED,
    )
    offload: bool = setting(
        False,
        "Offload the base",
        "Keeps the UNet's frozen weights outside of the device's memory and fetches each as it is used: far"
        " less memory, the same numbers, longer steps.",
    )
    deterministic: bool = setting(
        False,
        "Deterministic on a card",
        "Uses only deterministic CUDA kernels, so that a resumed run has the bits of an unbroken one; steps"
        " may be slower. A processor is deterministic anyway.",
    )
    clip_skip: int = setting(
        1,
        "Clip skip",
        "Which layer of the text encoder, counted from the last, conditions the picture. Many anime bases"
        " want 2. Bases that always take the layer before the last, such as SDXL, count it as 1 and 2.",
        span=(1, 8),
    )
    tokens: int = setting(
        75, "Caption tokens", "How much of a caption is read: 75, 150 or 225 tokens.", among=(75, 150, 225)
    )


@dataclass(frozen=True)
class OptimSection:
    """The optimizer and its learning rates."""

    name: str = setting("adamw", "Optimizer", "The optimizer.", table=choices.OPTIMIZERS)
    lr: float = setting(
        1e-4,
        "Learning rate",
        "Of the UNet's adapter. What counts is this times alpha / rank.",
        span=(0.0, 10.0),
    )
    range_test: bool = setting(
        False,
        "Find the rate",
        "A short range test before the first step finds the learning rate; the others keep their ratio to it."
        " In a file or on the command line, `optim.lr = auto` says the same.",
    )
    text_encoder_lr: float = setting(
        5e-5,
        "Text encoder rate",
        "Of the (first) text encoder's adapter. 0: the text encoder is not trained.",
        span=(0.0, 10.0),
    )
    text_encoder_2_lr: float = setting(
        0.0,
        "Second text encoder rate",
        "Of the second text encoder's adapter, where a base has two. 0: it is not trained.",
        span=(0.0, 10.0),
    )
    text_encoder_until: float = setting(
        1.0,
        "Text encoder until",
        "Share of the steps after which the text encoders' adapter stays as it is; less keeps it from"
        " overfitting.",
        span=(0.0, 1.0),
    )
    block_lr: dict[str, float] = setting(
        {},
        "Rates by block",
        "Learning rate for the layers whose path holds a pattern; 0: they are not trained. The last match"
        " counts.",
        span=(0.0, 10.0),
    )
    lora_plus: float = setting(
        1.0,
        "Rate ratio (LoRA+)",
        "Learning rate of each layer's second matrix, which starts from zero, as a multiple of the first's."
        " 1: both alike.",
        span=(1.0, 64.0),
    )
    schedule: str = setting(
        "cosine", "Schedule", "How the rate changes over the run.", table=choices.SCHEDULES
    )
    warmup: float = setting(
        0.05, "Warm-up", "Share of the steps over which the rate rises from zero.", span=(0.0, 1.0)
    )
    clip: float = setting(
        1.0, "Gradient clipping", "Largest norm of the gradient. 0: no clipping.", span=(0.0, 1000.0)
    )


@dataclass(frozen=True)
class LossSection:
    """What is minimised."""

    kind: str = setting("mse", "Loss", "How an error is weighed.", table=choices.LOSSES)
    huber_delta: float = setting(
        0.1,
        "Huber delta",
        "Errors well below it count as in squared error, errors well above it linearly. Only for Huber.",
        span=(0.001, 10.0),
    )
    huber_schedule: str = setting(
        "snr",
        "Huber schedule",
        "How Huber's delta follows the noise level; little noise gets the larger one. Only for Huber.",
        table=choices.HUBER_SCHEDULES,
    )
    min_snr: NumberOrAuto = setting(
        AUTO,
        "Min-SNR",
        "Evens out the weight of the noise levels (gamma of Hang et al. 2023). `auto`: 5 for a base that"
        " predicts noise, off for one that predicts velocity. 0: off.",
        span=(0.0, 100.0),
    )
    noise_offset: float = setting(
        0.0,
        "Noise offset",
        "Lets very dark and very bright pictures be learned; 0.05 is usual. 0: off.",
        span=(0.0, 1.0),
    )

    def gamma(self, prediction: str) -> float:
        """gamma of min-SNR for a base that predicts `prediction`; 0: off.

        Off by default for velocity, whose own weight of the noise levels is even already: min-SNR would give
        the last timestep of a schedule with zero terminal SNR no weight at all.
        """
        if isinstance(self.min_snr, str):
            return MIN_SNR if prediction == "epsilon" else 0.0
        return self.min_snr


# The settings of what happens between two steps: validation, samples, checkpoints.
#
# The others are in `settings/schema.py`.


@dataclass(frozen=True)
class ValidationSection:
    """The measurement on pictures that are kept out of training."""

    every: int = setting(
        100, "Validate every", "Steps between two validations. 0: never.", span=(0, 1_000_000)
    )
    pictures: float = setting(
        0.1,
        "Held-out pictures",
        "Kept out of training and used to measure: a share below 1, or a number. 0: none.",
        span=(0.0, 10_000.0),
    )
    triples: int = setting(
        4, "Looks a picture", "Fixed (noise, timestep) pairs for each held-out picture.", span=(1, 1000)
    )
    budget: float = setting(
        0.05,
        "Share of time",
        "Of the time that training takes: where validating costs more, it is done more rarely. 0: no limit.",
        span=(0.0, 1.0),
    )
    gauge: bool = setting(
        True,
        "Memorisation gauge",
        "Measure training pictures too: a gain on them that held-out pictures do not have is learned by"
        " heart.",
    )
    prior: int = setting(
        4,
        "Pictures of the base",
        "Made by the base itself before the first step, to measure what is forgotten. 0: none.",
        span=(0, 1000),
    )
    patience: int = setting(
        4,
        "Patience",
        "Stop after so many validations without a better one, if the last is clearly worse than the best, or"
        " after twice as many if it is not. 0: never stop early.",
        span=(0, 1000),
    )


@dataclass(frozen=True)
class PreviewSection:
    """The samples drawn while training."""

    every: int = setting(
        100, "Sample every", "Steps between two rounds of samples. 0: never.", span=(0, 1_000_000)
    )
    prompts: list[str] = setting(
        [], "Sample prompts", "One a line. Empty: captions of held-out or training pictures."
    )
    seed: int = setting(
        0,
        "Sample seed",
        "The same noise at every round, so that only the adapter differs.",
        span=(0, 2**32 - 1),
    )
    steps: int = setting(20, "Sampler steps", "Steps of the sampler for each sample.", span=(1, 200))
    cfg: float = setting(5.0, "Guidance", "How strongly a sample follows its prompt.", span=(1.0, 30.0))
    cfg_rescale: NumberOrAuto = setting(
        AUTO,
        "CFG rescale",
        "Takes back the contrast that guidance adds: 0 not at all, 1 all of it (phi of Lin et al. 2023)."
        " `auto`: 0.7 for a base with zero terminal SNR that predicts velocity, off for others and for the"
        " embedded base.",
        span=(0.0, 1.0),
    )
    sampler: str = setting("ddim", "Sampler", "The sampler.", table=choices.SAMPLERS)


@dataclass(frozen=True)
class SaveSection:
    """Checkpoints."""

    every: int = setting(
        100, "Save every", "Steps between two checkpoints. 0: only at the end.", span=(0, 1_000_000)
    )
    keep_last: int = setting(
        3, "Keep last", "How many of the newest checkpoints stay on disk.", span=(1, 1000)
    )
    keep_best: bool = setting(True, "Keep best", "Keep the checkpoint with the best validation too.")
    ema: float = setting(
        0.0,
        "Averaged adapter",
        "Decay of a running average of the adapter, 0.99 for instance: it evens out the last steps. Average"
        " and raw adapter are both sampled, measured and exported (NAME and NAME-raw). 0: off.",
        span=(0.0, 0.99999),
    )
    tensorboard: bool = setting(
        False,
        "TensorBoard",
        "Write curves and samples for TensorBoard too, into the run's folder. Needs the package tensorboard.",
    )
