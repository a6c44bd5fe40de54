"""Everything before the first step: what is chosen for the machine, the adapter and its optimizer, the data.

`prepare` makes a `TrainSession` from a run's settings. Nothing stays in memory longer than needed: VAE and
text encoders are loaded and unloaded before the UNet.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lora_core.backends.int8 import WeightPolicy
from lora_core.backends.offload import offload_store_for
from lora_core.backends.onednn import DIRECT, PLAIN, choose_layout, prepack
from lora_core.data.captions import CaptionRules, plain_caption, varies_by_draw, with_trigger
from lora_core.data.dataset import open_dataset, require_clean
from lora_core.data.holdout import split_holdout
from lora_core.data.scan import ImageRecord
from lora_core.errors import AdapterFileError, ConfigError, InputsChanged
from lora_core.evaluate.validator import EvalImage
from lora_core.formats.detect import extras_sentence
from lora_core.formats.io import load_adapter
from lora_core.lora.flat_params import FlatParams
from lora_core.lora.inject import (
    BlockOverrides,
    Injected,
    LayerPlan,
    init_from_lora,
    inject_layers,
    plan_layers,
)
from lora_core.lora.layer import LoraLayer, LoraSpec
from lora_core.lora.weights import AdapterWeights, LayerKey
from lora_core.model_files.detect import GUESS, read_base_facts
from lora_core.model_files.families import Family, is_text_encoder, named_targets
from lora_core.model_files.header import read_header
from lora_core.model_files.hub import fetch_base
from lora_core.model_files.sizes import count_base_parameters
from lora_core.models.device import (
    bf16_is_faster,
    cap_memory,
    compute_deterministically,
    dtype_of,
    limited,
    out_of_memory,
    release_failed,
    use_device,
)
from lora_core.models.load import BaseModel, open_base
from lora_core.runs.folder import RunFolder
from lora_core.settings.choices import OPTIMIZERS, QUANTIZED, Implementation, chosen
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import AUTO, AdapterSection, OptimizerSection, TrainSection
from lora_core.system.files import write_atomically
from lora_core.train.data import (
    Batches,
    BatchSettings,
    LatentCache,
    PromptCache,
    TrainImage,
    all_views,
    assign_buckets,
    short_digest,
)
from lora_core.train.fingerprint import base_inputs, check_inputs, start_input
from lora_core.train.loop import EMA, TrainState
from lora_core.train.validation import ForgettingSet, ValidationSets, build_validation_sets, make_eval_image

FRESH = "default"
"""The value of `adapter.init` for an adapter from scratch."""
INT8, OFFLOAD = "int8", "offload"
"""Memory fallbacks, see `oom.FALLBACKS`, that change how the base is kept."""


def weight_policy(
    train: TrainSection, rungs: Sequence[tuple[str, int]], device: torch.device, folder: Path
) -> WeightPolicy:
    """How the weights of the base are kept: as the settings say, and as memory fallbacks before step 1 need.

    Args:
        train: the settings.
        rungs: names of the memory fallbacks, and the steps that they were applied after.
        device: what computes.
        folder: on whose drive weights may be offloaded to.
    """
    first = {name for name, step in rungs if step == 0}
    kind = INT8 if INT8 in first else train.quantize_base
    row = chosen(QUANTIZED, kind, "train.quantize_base")
    depot = offload_store_for(device, folder) if train.offload or OFFLOAD in first else None
    return WeightPolicy(row.resolve() if isinstance(row, Implementation) else None, depot)


@dataclass(frozen=True)
class AdapterPlan:
    """What is to be trained.

    Attributes:
        layers: each layer's shape and rate.
        start: the LoRA to start from, or None for a new one.
        name: of its file.
        notes: what a user should know, a sentence each.
    """

    layers: dict[LayerKey, LayerPlan]
    start: AdapterWeights | None
    name: str
    notes: list[str]

    @property
    def encoders_trained(self) -> bool:
        """Whether a text encoder is among the adapted parts."""
        return any(is_text_encoder(part) for part, _ in self.layers)


def start_file(section: AdapterSection) -> Path | None:
    """The file of the LoRA to start from, or None."""
    return None if section.init.strip() in ("", FRESH) else Path(section.init).expanduser()


def plan_adapter(base: BaseModel, config: RunConfig) -> AdapterPlan:
    """Choose the layers to train. The base's text encoders have to be loaded.

    Raises:
        ConfigError: no layer matches, or nothing would be trained.
        AdapterFileError: the LoRA to start from is missing, broken, or for another family.
    """
    section, optim = config.adapter, config.optimizer
    rates = part_rates(base.family, optim)
    targets = named_targets(section.targets, base.family)
    file = start_file(section)
    if file is not None and not file.is_file():
        raise AdapterFileError(
            f"The LoRA {file} that adapter.init names does not exist; choose another file."
        )
    start = load_adapter(file, base.family) if file is not None else None
    shape = LoraSpec(
        section.rank, section.alpha, section.dropout, section.rank_dropout, section.module_dropout
    )
    blocks = BlockOverrides(section.block_ranks, section.block_alphas, optim.block_lr, section.rslora)
    layers = plan_layers(base.modules, rates, targets, shape, blocks, start.layers if start else ())
    notes = [
        f"adapter.targets = {section.targets} names no layer of the {part.replace('_', ' ')}, so that is not"
        " trained, whatever its learning rate."
        for part, rate in rates.items()
        if rate > 0 and targets.pattern(part) is None
    ]
    if file is not None and (out := extras_sentence(read_header(file).shapes)):
        notes.append(f"{file.name}: {out}")
    if optim.text_encoder_2_lr and len(base.family.text_encoders) < 2:
        notes.append(
            f"optimizer.text_encoder_2_lr plays no part: the {base.family.title} has one text encoder."
        )
    return AdapterPlan(layers, start, file.name if file else "", notes)


def part_rates(family: Family, optim: OptimizerSection) -> dict[str, float]:
    """Learning rate by part: the UNet, then the text encoders in order."""
    rates = (optim.lr, optim.text_encoder_lr, optim.text_encoder_2_lr)
    return dict(zip(family.parts, rates, strict=False))


def inject_adapter(base: BaseModel, plan: AdapterPlan, seed: int) -> tuple[Injected, list[str]]:
    """Inject the adapter into the base; returns it, and what it could not take over from an earlier one.

    Raises:
        AdapterFileError: the LoRA to start from does not fit.
    """
    injected = inject_layers(base.modules, {key: layer.spec for key, layer in plan.layers.items()}, seed)
    notes = init_from_lora(injected, plan.start, plan.name) if plan.start is not None else []
    for key, layer in injected.layers.items():
        layer.requires_grad_(plan.layers[key].rate > 0)
        layer.base.requires_grad_(False)
    return injected, notes


def set_train_mode(base: BaseModel, checkpointing: bool) -> None:
    """Put the adapted parts into training mode, which checkpointing needs, without dropout in the base."""
    for module in base.modules.values():
        for layer in module.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
            if hasattr(layer, "attention_dropout"):
                setattr(layer, "attention_dropout", 0.0)  # noqa: B010 - a module's attributes are typed as tensors
        module.train()
    if checkpointing:
        enable_checkpointing(base)


def enable_checkpointing(base: BaseModel) -> None:
    """Recompute activations in the backward pass instead of keeping them."""
    denoiser: Any = base.denoiser
    denoiser.enable_gradient_checkpointing()
    for encoder in base.text_encoders.values():
        encoder.gradient_checkpointing_enable({"use_reentrant": False})


def build_optimizer(
    injected: Injected, plan: AdapterPlan, base: BaseModel, optim: OptimizerSection
) -> tuple[torch.optim.Optimizer, FlatParams]:
    """Build the optimizer and its flat parameters, with a group for each part and rate, a part's own rate
    first; `initial_lr` is a group's full rate, `until` the share of steps that it is trained for.

    With `optimizer.lora_plus` each group is two, for the down factors and for the up factors at a multiple of
    the rate. Source: Hayou et al. 2024, "LoRA+", section 4.

    Raises:
        ConfigError: the optimizer's package is missing, or it cannot work with these rates.
    """
    row = chosen(OPTIMIZERS, optim.name, "optimizer.name")
    own = part_rates(base.family, optim)
    members: list[list[LoraLayer]] = []
    groups: list[dict[str, Any]] = []
    for part in injected.parts():
        by_rate: dict[float, list[LoraLayer]] = {own[part]: []}
        for key, layer in injected.layers.items():
            if key[0] == part and plan.layers[key].rate > 0:
                by_rate.setdefault(plan.layers[key].rate, []).append(layer)
        until = optim.stop_text_encoder_at if is_text_encoder(part) else 1.0
        for rate, layers in by_rate.items():
            if layers:
                members.append(layers)
                groups.append({"lr": rate, "until": until})
    if row.one_rate and (len({group["lr"] for group in groups}) > 1 or optim.lora_plus != 1.0):
        raise ConfigError(
            f"{row.title} works with one learning rate; set the rates of the text encoders to optimizer.lr"
            f" ({optim.lr:g}) or to 0, optimizer.lora_plus to 1, and leave optimizer.block_lr empty."
        )
    storage = FlatParams(members, split_a_b=optim.lora_plus != 1.0)
    wholes = iter(storage.groups)
    parts = []
    for group, layers in zip(groups, members, strict=True):
        for names, ratio in zip(storage.factor_names, (1.0, optim.lora_plus), strict=False):
            rate, whole = group["lr"] * ratio, next(wholes)
            factors = [getattr(layer, name) for layer in layers for name in names]
            own_factors = factors if row.by_matrix else [whole]
            parts.append({**group, "lr": rate, "initial_lr": rate, "params": own_factors})
    how = dict(row.defaults)
    if row.fused and base.device.type == "cuda":
        how["fused"] = True
    try:
        optimizer: torch.optim.Optimizer = row.resolve()(parts, lr=groups[0]["lr"], **how)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"{row.title} does not take these settings: {error}.") from error
    return optimizer, storage


OnProgress = Callable[[str, int, int], None]
"""Called with (phase, done, total); what it raises ends the work."""

SAMPLE_PROMPTS = 2
_DEVICES = {
    "cpu": "the processor",
    "cuda": "a graphics card",
    "mps": "an Apple graphics card",
    "xpu": "an Intel graphics card",
}
ROOMIER = 1.1
"""From how many times the memory of before fewer fallbacks are tried."""
LARGE = 10**8
"""Numbers of a base; the embedded one has a twentieth, Stable Diffusion 1.5 ten times as many."""


@dataclass(frozen=True)
class RuntimePlan:
    """What was chosen for this machine; a resumed run reads it from `plan.json` and chooses nothing again.

    Attributes:
        precision: of the base.
        device, threads: what computes.
        rungs: memory fallbacks and the steps that they were applied after, see `oom.FALLBACKS`.
        tried: whether the heaviest step was tried before the first one.
        peak: bytes that it took, 0 where the device does not tell.
        layout: how the base's weights are laid out for the CPU; "" before that is decided.
        octave: log2 of the factor of all learning rates that a range test found, None without one.
        deterministic: whether a CUDA device computes with deterministic kernels alone.
        cap: bytes that the device's memory was limited to at the last fallback, or before the first step; 0
            for no limit.
        validate_every: steps between two validations as `max_time_share` allows, 0 where not known yet.
    """

    precision: str
    device: str
    threads: int
    rungs: list[tuple[str, int]] = field(default_factory=list)
    tried: bool = False
    peak: int = 0
    validate_every: int = 0
    layout: str = ""
    octave: int | None = None
    deterministic: bool = False
    cap: int = 0

    @classmethod
    def of(cls, run: RunFolder, config: RunConfig, accept_changes: bool = False) -> "RuntimePlan":
        """Read the plan of a run, else make and write one.

        Raises:
            InputsChanged: it was made on another kind of device, and that is not accepted.
            ConfigError: `train.device` is not there.
        """
        try:
            saved = cls(**_upgrade(json.loads(run.plan_file.read_text(encoding="utf-8"))))
            saved = replace(saved, rungs=[(str(name), int(step)) for name, step in saved.rungs])
        except (OSError, ValueError, TypeError):
            saved = None
        try:
            device = use_device(config.train.device)
        except ConfigError:
            # A run whose card was taken out goes on with what is there, if that is accepted.
            if saved is None or not accept_changes:
                raise
            device = use_device(AUTO)
        if saved is not None and saved.device == device.type:
            return saved
        if saved is not None and not accept_changes:
            raise InputsChanged(
                f"The run {run.name} began on {_DEVICES.get(saved.device, saved.device)}, and this"
                f" computer now computes on {_DEVICES.get(device.type, device.type)}. Make that device"
                " available again, or go on with --accept-changes; the result is then not that of an"
                " unbroken run.",
                ["the device"],
            )
        dtype = training_dtype(config, device)
        precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        plan = cls(
            precision,
            device.type,
            torch.get_num_threads(),
            deterministic=config.train.deterministic,
        )
        if saved is not None:
            plan = replace(saved, device=plan.device, precision=precision, threads=plan.threads, layout="")
        plan.write(run)
        return plan

    def within(self, cap: int) -> "RuntimePlan":
        """The plan for a process that may take `cap` bytes of the device's memory.

        If that is clearly more than when fallbacks were applied, another process held memory then: those that
        change no gradient are dropped, and tried again where they are needed.
        """
        if not self.cap or cap < ROOMIER * self.cap or not self.rungs:
            return replace(self, cap=self.cap or cap)
        return replace(self, cap=cap, tried=False, rungs=[rung for rung in self.rungs if rung[0] == INT8])

    def with_lr(self, config: RunConfig) -> RunConfig:
        """The config with the learning rates of the range test."""
        if not self.octave:
            return config
        optim, factor = config.optimizer, 2.0**self.octave
        rates = {n: getattr(optim, n) * factor for n in ("lr", "text_encoder_lr", "text_encoder_2_lr")}
        by_block = {pattern: rate * factor for pattern, rate in optim.block_lr.items()}
        optim = optim.model_copy(update={**rates, "block_lr": by_block})
        return config.model_copy(update={"optimizer": optim})

    def with_fallbacks(self, applied: list[tuple[str, int]]) -> "RuntimePlan":
        """The plan with memory fallbacks, and within how much memory they were applied."""
        return replace(self, rungs=applied, cap=cap_memory(torch.device(self.device)))

    def set_up(self) -> None:
        """Configure this process as planned. Call it before the first kernel on the device."""
        torch.set_num_threads(self.threads)
        if self.deterministic:
            compute_deterministically(torch.device(self.device))

    def notes(self) -> list[str]:
        """Settings that have no effect here, a sentence each."""
        if not self.deterministic or self.device in ("cpu", "cuda"):
            return []
        return [f"train.deterministic has no effect on {_DEVICES.get(self.device, self.device)}."]

    def write(self, run: RunFolder) -> None:
        """Write `plan.json`."""
        write_atomically(run.plan_file, json.dumps(vars(self)).encode())


def training_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """The dtype of the frozen base.

    On a CPU "auto" is bf16 where that is faster and the base is large: with a small one, conversions cost
    more than they save.

    Raises:
        ModelFileError: the base is missing or broken.
    """
    asked, name = config.train.precision, config.model.base
    if asked == "auto" and device.type == "cpu":
        fetch_base(name)
        if (
            count_base_parameters(read_base_facts(name, config.model.prediction)) or 0
        ) >= LARGE and bf16_is_faster():
            return torch.bfloat16
    return dtype_of(asked, device)


def _upgrade(plan: dict[str, Any]) -> dict[str, Any]:
    """Read a plan that was written before there was more than one layout."""
    before = plan.pop("prepacked", None)
    return plan if before is None else {"layout": DIRECT if before else PLAIN, **plan}


@dataclass
class TrainSession:
    """A run ready to train.

    Attributes:
        state: base, adapter, optimizer, scaler.
        batches: all micro-batches by number.
        text: embeddings of captions.
        validation_sets: images to validate on.
        train_items: images to train on.
        prompts: of the samples.
        notes: what a user should know before it starts, a sentence each.
        offload_folder: on whose drive the base may be offloaded to.
    """

    state: TrainState
    batches: Batches
    text: PromptCache
    validation_sets: ValidationSets
    train_items: list[TrainImage]
    prompts: list[str]
    notes: list[str]
    offload_folder: Path


def prepare(
    run: RunFolder, config: RunConfig, plan: RuntimePlan, say: OnProgress, accept_changes: bool = False
) -> TrainSession:
    """Load the base, encode images and captions, inject the adapter.

    Raises:
        ConfigError, DatasetError, ModelFileError, AdapterFileError: what is wrong.
        InputsChanged: images, settings or packages changed since it began, and that is not accepted.
    """
    cache = run.path.parent.parent / "cache"
    say("Reading the pictures", 0, 1)
    more = base_inputs(config.model) | start_input(start_file(config.adapter))
    train, held = _read_dataset(run, config, accept_changes, more)
    say("Opening the base model", 0, 1)
    device = torch.device(plan.device)
    base = _open_base(config, plan, device, cache)
    layout = plan_adapter(base, config)
    base.load("vae")
    latents = LatentCache(base, cache / "latents")
    resolution = config.train.resolution or base.resolution
    items, held_items = (
        assign_buckets(r, resolution, base.size_multiple) if r else [] for r in (train, held)
    )
    wanted = [*all_views(items, config.dataset.flip), *all_views(held_items, False)]
    _encode_pictures(base, latents, wanted, say)
    section, timesteps = config.validation, base.noise.num_timesteps

    def to_eval(image: TrainImage, caption: str) -> EvalImage:
        return make_eval_image(image, caption, latents, section.draws_per_image, config.seed, timesteps)

    sets = build_validation_sets(items, held_items, to_eval, section, config.dataset.trigger, config.seed)
    base.put("vae", torch.device("cpu"))
    base.load(*base.text_encoders)
    clip_skip, max_token_length = config.train.clip_skip, config.train.max_token_length
    text = PromptCache(base, cache / "text", layout.encoders_trained, clip_skip, max_token_length)
    rules = CaptionRules.of(config.dataset)
    prompts = sample_prompts(config, held or train)
    if section.forgetting and section.every and section.pictures:
        identity = short_digest(sorted(more.items()))
        sets.forgetting = ForgettingSet(base, text, cache / "prior", identity, section.forgetting, resolution)
    if not layout.encoders_trained:
        fixed = [record for record in train if not varies_by_draw(record.caption, rules)]
        captions = [plain_caption(record.caption, rules.trigger) for record in fixed]
        captions += [one.caption for one in (*sets.held_out, *sets.training)]
        captions += [*prompts, *(sets.forgetting.prompts if sets.forgetting else []), ""]
        _encode_captions(text, captions, say)
        if len(fixed) == len(train):
            text.release()
    base.load(base.family.denoiser)
    base.put("vae", device)
    state, notes = build_train_state(base, layout, config, plan.layout)
    looks = BatchSettings(config.train.batch_size, config.dataset.flip, rules, config.seed)
    batches = Batches(items, looks, latents)
    guess = [f"What the base predicts is {GUESS}."] if base.facts.guessed else []
    sentences = [*guess, *layout.notes, *notes, *sets.notes]
    return TrainSession(state, batches, text, sets, items, prompts, sentences, cache)


def _read_dataset(
    run: RunFolder, config: RunConfig, accept_changes: bool, more: dict[str, str]
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Training and validation images, compared with what the run began with; `more` are further inputs."""
    dataset = open_dataset(config.dataset.path, run.path.parent.parent / "cache" / "datasets")
    require_clean(dataset)
    check_inputs(run, dataset.records, accept_changes, more)
    return split_holdout(dataset.records, config.validation.pictures, config.seed)


def _open_base(config: RunConfig, plan: RuntimePlan, device: torch.device, cache: Path) -> BaseModel:
    model = config.model
    policy = weight_policy(config.train, plan.rungs, device, cache)
    dtype = dtype_of(plan.precision, device)
    return open_base(model.base, device, dtype, model.prediction, model.vae, policy, model.zero_terminal_snr)


def build_train_state(
    base: BaseModel, layout: AdapterPlan, config: RunConfig, weights: str
) -> tuple[TrainState, list[str]]:
    """Inject the adapter and build its optimizer; returns the state, and notes for the user.

    Args:
        base: the base; its text encoders may be gone where they are not trained.
        layout: what is trained.
        config: how.
        weights: how the base's weights are laid out for the CPU; "" for what is best here.

    Raises:
        AdapterFileError: the LoRA to start from does not fit.
        ConfigError: the optimizer's package is missing, or it cannot work with these rates.
    """
    injected, notes = inject_adapter(base, layout, config.seed)
    set_train_mode(base, config.train.gradient_checkpointing)
    trained = base.modules.values()
    weights = weights or (PLAIN if limited(base.device) else choose_layout(trained))
    for module in trained:
        prepack(module, weights)
    optimizer, storage = build_optimizer(injected, layout, base, config.optimizer)
    scaler = torch.amp.GradScaler(base.device.type, enabled=base.dtype == torch.float16)
    average = EMA(injected, storage, config.save.ema) if config.save.ema else None
    return TrainState(base, injected, optimizer, storage, scaler, average), notes


def sample_prompts(config: RunConfig, records: list[ImageRecord]) -> list[str]:
    """The prompts of samples: the user's, with the trigger word added, else captions of `records`."""
    if config.sample.prompts:
        return [with_trigger(prompt, config.dataset.trigger) for prompt in config.sample.prompts]
    captions = dict.fromkeys(plain_caption(record.caption, config.dataset.trigger) for record in records)
    return list(captions)[:SAMPLE_PROMPTS]


def _encode_pictures(
    base: BaseModel, cache: LatentCache, wanted: list[tuple[TrainImage, bool]], say: OnProgress
) -> None:
    """Encode images; from the first that does not fit into the device's memory on, on the CPU."""
    for done, (item, mirrored) in enumerate(wanted):
        say("Encoding pictures", done, len(wanted))
        try:
            cache.latents(item.record, item.bucket, mirrored)
        except Exception as error:
            if not out_of_memory(error) or is_on_cpu(base.vae):
                raise
            release_failed(error, base.device)
            base.put("vae", torch.device("cpu"))
            cache.latents(item.record, item.bucket, mirrored)
    say("Encoding pictures", len(wanted), len(wanted))


def is_on_cpu(module: torch.nn.Module) -> bool:
    """Whether the weights of a module are on the CPU."""
    return next(module.parameters()).device.type == "cpu"


def _encode_captions(text: PromptCache, captions: list[str], say: OnProgress) -> None:
    """Encode fixed captions; those that vary are encoded as they are drawn."""
    wanted = list(dict.fromkeys(captions))
    for done, caption in enumerate(wanted):
        say("Encoding captions", done, len(wanted))
        text.embed(caption)
