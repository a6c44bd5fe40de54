"""Everything before the first step: choices for the machine, inputs, the adapter and its optimizer, data.

`prepare` makes a `TrainSession` from a run's settings. Nothing stays in memory longer than needed: VAE and
text encoders are loaded and unloaded before the UNet. What a run's bits follow from besides its settings is
hashed at its start; a resume names what has changed since.
"""

import functools
import hashlib
import importlib.metadata
import inspect
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lora_core.backends.compact import WeightPolicy, offload_store_for
from lora_core.backends.onednn import DIRECT, PLAIN, choose_layout, prepack
from lora_core.data.captions import (
    class_captions,
    escape_prompt,
    plain_record_caption,
    rules_of,
    triggers_of,
    varies_by_draw,
    with_trigger,
)
from lora_core.data.concepts import balance_looks
from lora_core.data.dataset import apply_settings, at_resolutions, require_clean, run_dataset, split_holdout
from lora_core.data.images import ImageRecord, abbreviate, choose_bucket, draw_cut, hash_file
from lora_core.errors import ConfigError, DatasetError, InputsChanged, ModelFileError, first_line
from lora_core.evaluate.validator import mask_numbers, weigh_latents
from lora_core.formats.io import load_adapter
from lora_core.formats.kinds import extras_sentence
from lora_core.generate.request import GenerationRequest
from lora_core.lora.inject import (
    EMA,
    Average,
    Injected,
    LayerPlan,
    ScheduleFree,
    init_from_lora,
    inject_layers,
    plan_layers,
    put_tokens,
    start_tokens,
)
from lora_core.lora.layer import AdaptedLayer, FlatParams
from lora_core.lora.weights import AdapterWeights, LayerKey
from lora_core.model_files.detect import GUESS, read_base_facts, weight_paths
from lora_core.model_files.families import Family, is_text_encoder, named_targets
from lora_core.model_files.header import read_header
from lora_core.model_files.hub import fetch_base
from lora_core.model_files.sizes import INT8, OFFLOAD, TEXT_ON_CPU, VAE_ON_CPU, count_base_parameters
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
from lora_core.models.load import BaseModel, InpaintingModel, open_base
from lora_core.models.weight_files import PRECISIONS, SAMPLE, short_digest
from lora_core.runs.folder import RunFolder
from lora_core.runs.preflight import check_adapter
from lora_core.settings import schema
from lora_core.settings.config import RunConfig, sample_fields, split_sample
from lora_core.system.files import LARGEST_SMALL_FILE, expand_home, read_json, write_atomically
from lora_core.train.data import Batches, LatentCache, PromptCache, TrainImage
from lora_core.train.loop import TrainState, cosine, image_loss
from lora_core.train.objectives import InpaintingBatches, SliderBatches, inpainting_loss, slider_loss
from lora_core.train.validation import (
    ValidationSets,
    build_prior,
    build_slider_set,
    build_validation_sets,
    forgetting_set,
    prior_set,
)

OnProgress = Callable[[str, int, int], None]
"""Called with (phase, done, total); an exception ends the work."""

FRESH = "default"
"""The value of `adapter.init` for an adapter from scratch."""
ROOMIER = 1.1
"""From how many times the memory of before fewer fallbacks are tried."""
TRIED_SIDE = 64
"""Its square is the least size of a tensor whose state bitsandbytes keeps in 8 bits."""
LARGE = 10**8
"""Parameters of a base; the embedded one has a twentieth, Stable Diffusion 1.5 ten times as many."""
PACKAGES = ("lora-easel", "torch", "diffusers", "transformers")
version = functools.cache(importlib.metadata.version)
_DEVICES = {
    "cpu": "the processor",
    "cuda": "a graphics card",
    "mps": "an Apple graphics card",
    "xpu": "an Intel graphics card",
}
_PLACES = 4096
"""Number of places read in a file without a table of its tensors."""
_CONFIGS = ("config.json", "scheduler_config.json", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class RuntimePlan:
    """The choices for this machine; a resumed run reads them from `plan.json` and chooses nothing again.

    Attributes:
        precision: of the base.
        device, threads: what computes.
        rungs: memory fallbacks and the steps that they were applied after, see `autotune.FALLBACKS`.
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
            ConfigError: `train.device` does not exist.
        """
        try:
            found = json.loads(run.plan_file.read_text(encoding="utf-8"))
            # Before there was more than one layout, plans had a flag.
            if (prepacked := found.pop("prepacked", None)) is not None:
                found = {"layout": DIRECT if prepacked else PLAIN, **found}
            saved = cls(**found)
            saved = replace(saved, rungs=[(str(name), int(step)) for name, step in saved.rungs])
        except (OSError, ValueError, TypeError, AttributeError):
            saved = None
        try:
            device = use_device(config.train.device)
        except ConfigError:
            # A run whose card was removed continues on another device, if that is accepted.
            if saved is None or not accept_changes:
                raise
            device = use_device(schema.AUTO)
        if saved is not None and saved.device == device.type:
            return saved
        if saved is not None and not accept_changes:
            raise InputsChanged(
                f"The run {run.name} began on {_DEVICES.get(saved.device, saved.device)}, and this"
                f" computer now computes on {_DEVICES.get(device.type, device.type)}. Make that device"
                " available again, or continue with --accept-changes; the result then differs from an "
                "uninterrupted run.",
                ["the device"],
            )
        dtype = training_dtype(config, device)
        precision = next(name for name, each in PRECISIONS.items() if each == dtype)
        fresh = saved or cls("", "", 0, deterministic=config.train.deterministic)
        threads = torch.get_num_threads()
        plan = replace(fresh, precision=precision, device=device.type, threads=threads, layout="")
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
        names = ("lr", "text_encoder_lr", "text_encoder_2_lr", "token_lr")
        rates = {name: getattr(optim, name) * factor for name in names}
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
        parameters = count_base_parameters(read_base_facts(name, config.model.prediction)) or 0
        if parameters >= LARGE and bf16_is_faster():
            return torch.bfloat16
    return dtype_of(asked, device)


def versions() -> dict[str, str]:
    """The versions that bits may depend on."""
    return {name: version(name) for name in PACKAGES}


def input_hashes(run: RunFolder, records: list[ImageRecord]) -> dict[str, str]:
    """A hash or version for each input: the settings file, each image with its caption, each package."""
    inputs = {"config.toml": hashlib.sha256(run.config_file.read_bytes()).hexdigest()}
    for record in records:
        words = f"{record.digest} {record.repeats} {record.caption}"
        words += "\nheld out by hand" if record.held_out else ""
        words += f"\ncrop {record.crop}" if record.crop else ""
        words += f"\nfocus {record.focus}" if record.focus else ""
        words += f"\nmask {hash_file(record.mask)}" if record.mask else ""
        words += f"\nconcept {replace(record.concept, number=0)}" if record.concept else ""
        # Concepts often number their images alike.
        folder = f"{record.concept.folder}/" if record.concept and record.concept.folder else ""
        name = f"the {'reg ' if record.reg else ''}picture {folder}{record.path.name}"
        if record.concept and name in inputs:
            # In the folders below a concept's there may be others of the name.
            words += f"\nbeside {inputs[name]}"
        inputs[name] = hashlib.sha256(words.encode()).hexdigest()
    return inputs | {f"the package {name}": found for name, found in versions().items()}


def base_inputs(model: schema.ModelSection) -> dict[str, str]:
    """A hash for each component of a folder, for a single file, and for a VAE of its own.

    Raises:
        ModelFileError: the base is missing.
    """
    fetch_base(model.base)
    facts = read_base_facts(model.base, model.prediction, model.zero_terminal_snr)
    found: dict[str, str] = {}
    if facts.single_file:
        found[f"the base {facts.path.name}"] = weights_digest(facts.path)
    else:
        assert facts.family is not None
        tokenizers = {encoder.tokenizer for encoder in facts.family.text_encoders}
        for part in (*facts.family.parts, "vae", "scheduler", *sorted(tokenizers)):
            found[f"the {part.replace('_', ' ')} of the base"] = _component_digest(facts.path / part, part)
    if model.vae:
        place = expand_home(model.vae)
        digest = _component_digest(place, "vae") if place.is_dir() else weights_digest(place)
        found[f"the VAE {place.name}"] = digest
    return found


def _component_digest(folder: Path, part: str) -> str:
    digest = hashlib.sha256()
    for name in _CONFIGS:
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    try:
        files = weight_paths(folder, part)
    except ModelFileError:
        # Tokenizers and schedulers have none; of a component that lacks its own, the loader says it.
        files = []
    for file in files:
        digest.update(weights_digest(file).encode())
    return digest.hexdigest()


def weights_digest(path: Path) -> str:
    """A hash of a file's size, its header, and 64 bytes from the middle of each tensor; "" without a file.

    A full hash of a large base takes half a minute; another training, precision or merge changes every
    tensor. A `.ckpt` has no table of tensors that is safe to read, so 4,096 places are taken instead.
    """
    if not path.is_file():
        return ""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    places = [size * number // _PLACES for number in range(_PLACES)]
    if path.suffix.lower() == ".safetensors":
        header = read_header(path, ModelFileError)
        digest.update(json.dumps(header.tensors, sort_keys=True).encode())
        places = sorted(header.start + sum(entry["data_offsets"]) // 2 for entry in header.tensors.values())
    with open(path, "rb") as file:
        for place in places:
            file.seek(place)
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def check_inputs(
    run: RunFolder, records: list[ImageRecord], accept_changes: bool, more: dict[str, str] | None = None
) -> None:
    """Write `inputs.json` at the first start; later, compare with it. `more` are further inputs, as the base.

    Raises:
        InputsChanged: something has changed and the user has not accepted it; names what.
    """
    now = input_hashes(run, records) | (more or {})
    before = read_json(run.inputs_file, LARGEST_SMALL_FILE) or now
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed and not accept_changes:
        named = abbreviate(changed).replace("the picture ", "the image ")
        raise InputsChanged(
            f"Since the run {run.name} began, this has changed: {named}. Put it back, or continue with "
            f"--accept-changes; the result then differs from an uninterrupted run.",
            changed,
        )
    write_atomically(run.inputs_file, json.dumps(now, ensure_ascii=False, indent=1).encode())


@dataclass(frozen=True)
class AdapterPlan:
    """The adapter to train: its layers, the LoRA to start from with its file's name, notes for the user, and
    new tokens."""

    layers: dict[LayerKey, LayerPlan]
    start: AdapterWeights | None
    name: str
    notes: list[str]
    tokens: list[schema.NewToken] = field(default_factory=list)

    @property
    def encoders_trained(self) -> bool:
        """Whether a text encoder is among the adapted parts, or gets new tokens."""
        return bool(self.tokens) or any(is_text_encoder(part) for part, _ in self.layers)


def start_file(section: schema.AdapterSection) -> Path | None:
    """The file of the LoRA to start from, or None."""
    return None if section.init.strip() in ("", FRESH) else expand_home(section.init)


def plan_adapter(base: BaseModel, config: RunConfig) -> AdapterPlan:
    """Choose the layers to train.

    Raises:
        ConfigError: no layer matches, or nothing would be trained.
        AdapterFileError: the LoRA to start from is missing, broken, or for another family.
    """
    section, optim = config.adapter, config.optimizer
    rates = part_rates(base.family, optim)
    targets = named_targets(section.targets, base.family)
    file = start_file(section)
    check_adapter(config, base.family)
    plain = section.kind == RunConfig().adapter.kind
    start = load_adapter(file, base.family, plain) if file is not None else None
    kept = start.every_layer() if start else ()
    layers = plan_layers(base.modules, rates, targets, section, optim.block_lr, kept)
    notes = [
        f"adapter.targets = {section.targets} names no layer of the {part.replace('_', ' ')}, so that is not"
        " trained, whatever its learning rate."
        for part, rate in rates.items()
        if rate > 0 and targets.pattern(part) is None
    ]
    if file is not None and (out := extras_sentence(read_header(file).shapes, with_tokens=True)):
        notes.append(f"{file.name}: {out}")
    if optim.text_encoder_2_lr and len(base.family.text_encoders) < 2:
        notes.append(
            f"optimizer.text_encoder_2_lr has no effect: the {base.family.title} has one text encoder."
        )
    tokens = schema.parse_new_tokens(section.new_tokens)
    return AdapterPlan(layers, start, file.name if file else "", notes, tokens)


def part_rates(family: Family, optim: schema.OptimizerSection) -> dict[str, float]:
    """Learning rate by part: the UNet, then the text encoders in order."""
    rates = (optim.lr, optim.text_encoder_lr, optim.text_encoder_2_lr)
    return dict(zip(family.parts, rates, strict=False))


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
    injected: Injected, plan: AdapterPlan, base: BaseModel, optim: schema.OptimizerSection
) -> tuple[torch.optim.Optimizer, FlatParams]:
    """Build the optimizer and its flat parameters, with a group for each part and rate, a part's own rate
    first, then new tokens; `initial_lr` is a group's full rate, `until` the share of steps that it is trained
    for.

    With `optimizer.lora_plus` each group is two, for the down factors and for the up factors at a multiple of
    the rate. Source: Hayou et al. 2024, "LoRA+", section 4.

    Raises:
        ConfigError: the optimizer's package is missing, or it cannot work with these rates.
    """
    row, own = optim.row, part_rates(base.family, optim)
    members: list[list[AdaptedLayer]] = []
    groups: list[dict[str, Any]] = []
    for part in injected.parts():
        by_rate: dict[float, list[AdaptedLayer]] = {own[part]: []}
        for key, layer in injected.layers.items():
            if key[0] == part and plan.layers[key].rate > 0:
                by_rate.setdefault(plan.layers[key].rate, []).append(layer)
        until = optim.stop_text_encoder_at if is_text_encoder(part) else 1.0
        for rate, layers in by_rate.items():
            if layers:
                members.append(layers)
                groups.append({"lr": rate, "until": until})
    for tokens in injected.tokens.values():
        members.append([tokens])
        groups.append({"lr": optim.token_lr, "until": optim.stop_text_encoder_at})
    if problem := optim.several_rates([group["lr"] for group in groups]):
        raise ConfigError(problem)
    storage = FlatParams(members, split_a_b=optim.lora_plus != 1.0)
    ratios = (1.0, optim.lora_plus) if optim.lora_plus != 1.0 else (1.0,)
    rates = [{**group, "lr": group["lr"] * ratio} for group in groups for ratio in ratios]
    tensors = storage.factors if row.by_matrix else [[whole] for whole in storage.groups]
    parts = [
        {**group, "initial_lr": group["lr"], "params": own} for group, own in zip(rates, tensors, strict=True)
    ]
    return make_optimizer(optim, parts, base.device), storage


def make_optimizer(
    optim: schema.OptimizerSection, groups: list[dict[str, Any]], device: torch.device
) -> torch.optim.Optimizer:
    """Make the optimizer of parameter groups with their rates.

    Raises:
        ConfigError: its package is missing, its arguments are wrong, or it cannot take a step on `device`.
    """
    row = optim.row
    how: dict[str, Any] = {"fused": True} if row.fused and device.type == "cuda" else {}
    how |= {name: tuple(one) if isinstance(one, list) else one
            for name, one in {**row.defaults, **optim.args}.items()}  # fmt: skip
    try:
        found = row.resolve()
        if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
            raise ConfigError(f"optimizer.name = {optim.name} is not an optimizer as torch.optim has them.")
        make: Callable[..., torch.optim.Optimizer] = found
        optimizer = make(groups, lr=groups[0]["lr"], **how)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"optimizer.name = {optim.name} cannot be used: {error}.") from error
    except (ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(f"{row.title} does not take these settings: {error}.") from error
    if row.package or optim.args:
        try:
            try_step(lambda parameters: make(parameters, lr=groups[0]["lr"], **how), device)
        except Exception as error:
            raise ConfigError(
                f"{row.title} cannot take a step on the device {device}; choose another optimizer.name, or"
                f" other optimizer.args. It ended with {type(error).__name__}: {error}"
            ) from error
    if average_of_its_own(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


# Learning-rate schedules beside `loop.cosine`, the default.


def constant(progress: float) -> float:
    """1 throughout."""
    return 1.0


def linear(progress: float) -> float:
    """Linearly from 1 to 0."""
    return 1.0 - progress


def cosine_restarts(progress: float) -> float:
    """Three times from 1 to 0 along half a cosine."""
    return cosine(progress * 3 % 1.0) if progress < 1.0 else 0.0


def try_step(
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], device: torch.device
) -> torch.Tensor:
    """Have a new optimizer of a matrix of zeros take a step: some lack code for a device, others want more
    than a gradient. Returns the matrix; raises what the optimizer does."""
    values = torch.nn.Parameter(torch.zeros(TRIED_SIDE, TRIED_SIDE, device=device))
    values.grad = torch.ones_like(values)
    optimizer: Any = make([values])
    if average_of_its_own(optimizer):
        optimizer.train()
    optimizer.step()
    return values.detach()


def average_of_its_own(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is schedule-free: it can be put into a mode for use."""
    return hasattr(optimizer, "eval") and hasattr(optimizer, "train")


@dataclass
class TrainSession:
    """A run ready to train: `prompts` are those of the samples with their options, `samples` what these ask
    for, `notes` what a user should know before it starts; the base may be offloaded to the drive of
    `offload_folder`; `fallbacks` are those that it was loaded with because memory is short, but for what
    `RuntimePlan.rungs` names."""

    state: TrainState
    batches: Batches
    text: PromptCache
    validation_sets: ValidationSets
    train_items: list[TrainImage]
    prompts: list[str]
    samples: list[GenerationRequest]
    notes: list[str]
    offload_folder: Path
    fallbacks: list[str]


def prepare(
    run: RunFolder, config: RunConfig, plan: RuntimePlan, say: OnProgress, accept_changes: bool = False
) -> TrainSession:
    """Load the base, encode images and captions, inject the adapter.

    Raises:
        ConfigError, DatasetError, ModelFileError, AdapterFileError: the problem. InputsChanged: images,
        settings or packages changed since it began, and that is not accepted.
    """
    cache = run.path.parent.parent / "cache"
    say("Reading the images", 0, 1)
    more = base_inputs(config.model)
    if (start := start_file(config.adapter)) is not None:
        more[f"the LoRA {start.name} that it continues"] = hash_file(start) if start.is_file() else ""
    dataset = run_dataset(config, cache / "datasets")
    require_clean(dataset)
    records = apply_settings(dataset.records, config)
    reg = apply_settings(dataset.reg, config) if config.dataset.reg_weight else []
    check_inputs(run, [*records, *reg], accept_changes, more)
    slider, section = config.slider, config.validation
    train, held = split_holdout(records, 0.0 if slider.on else section.pictures, config.seed)
    run.write_held_out(held, train)
    train, reg = balance_looks(train, reg)
    say("Opening the base model", 0, 1)
    device = torch.device(plan.device)
    base = open_base_for(config, device, dtype_of(plan.precision, device), plan.rungs, cache)
    layout = plan_adapter(base, config)
    base.load("vae")
    latents = LatentCache(base, cache / "latents")
    resolution, rules = config.resolution(base.resolution), config.dataset
    sides = (resolution, base.size_multiple, base.vae_scale_factor, rules)
    trained = [] if slider.on else assign_buckets([*train, *reg] if train else [], *sides)
    trained = [vary_image(item, rules, config.seed, base.vae_scale_factor) for item in trained]
    items = [item for item in trained if not item.record.reg]
    held_items = largest(assign_buckets(held, *sides)) if held else []
    measured = [*held_items, *(item for item in largest(items) if item.variants)]
    _encode_pictures(base, latents, all_views(trained, rules), measured, say)
    sets = build_validation_sets(largest(items), held_items, latents, config, base)
    base.put("vae", torch.device("cpu"))
    base.load(*base.text_encoders)
    clip_skip, max_token_length = config.train.clip_skip, config.train.max_token_length
    text = PromptCache(base, cache / "text", layout.encoders_trained, clip_skip, max_token_length)
    prompts = sample_prompts(config, held or train, base.family, reg)
    samples = sample_requests(base, config.sample, prompts)
    identity = short_digest(sorted(more.items()))
    own = (base, text, (cache / "prior", identity), resolution)
    sets.forgetting, prior = forgetting_set(*own, config), prior_set(*own, config, train)
    if not layout.encoders_trained:
        own_prompts = [prompt for one in (sets.forgetting, prior) if one for prompt in one.prompts]
        _encode_captions(text, config, [*train, *reg], sets, (samples, own_prompts), say)
    waiting = _load_denoiser(base, layout)
    state, notes = build_train_state(base, layout, config, plan.layout)
    fallbacks = _put_back(base, waiting, [name for name, step in plan.rungs if step == 0])
    batches = build_batches(config, base, trained, latents)
    if prior is not None:
        state.prior = build_prior(state, prior, config.train.batch_size, config.seed, say)
    sets.slider = build_slider_set(state, text, batches, config, (cache / "slider", identity), say)
    guess = [f"What the base predicts is {GUESS}."] if base.facts.guessed else []
    sentences = [*guess, *layout.notes, *notes, *sets.notes]
    return TrainSession(state, batches, text, sets, items, prompts, samples, sentences, cache, fallbacks)


def build_batches(
    config: RunConfig, base: BaseModel, items: list[TrainImage], latents: LatentCache
) -> Batches:
    """The micro-batches of a run: of its images, or of a concept slider's prompts."""
    count, slider = config.train.batch_size, config.slider
    if not slider.on:
        rest = items, latents, config.dataset, count, config.seed
        return InpaintingBatches(base, *rest) if isinstance(base, InpaintingModel) else Batches(*rest)
    side = config.resolution(base.resolution)
    bucket = choose_bucket(side, side, side, base.size_multiple)
    return SliderBatches(base, slider, count, bucket.width, config.seed)


def open_base_for(
    config: RunConfig, device: torch.device, dtype: torch.dtype, rungs: list[tuple[str, int]], folder: Path
) -> BaseModel:
    """Open the base, its weights kept as the settings say and as fallbacks before step 1 need (`rungs`:
    names and steps); `folder` is on the drive that weights may be offloaded to."""
    model, train = config.model, config.train
    first = {name for name, step in rungs if step == 0}
    name = INT8 if INT8 in first else train.quantize_base
    row = schema.chosen(schema.QUANTIZED, name, "train.quantize_base")
    store = offload_store_for(device, folder) if train.offload or OFFLOAD in first else None
    policy = WeightPolicy(None, store)
    if isinstance(row, schema.Quantization):
        policy.quantize, policy.width = row.resolve(), row.width
        try:
            policy.quantize(torch.ones(64, 64, dtype=dtype, device=device))
        except Exception as error:
            raise ConfigError(
                f"train.quantize_base = {name} does not work on the device {device}; choose another one."
                f" ({first_line(error)})"
            ) from error
    return open_base(model.base, device, dtype, model.prediction, model.vae, policy, model.zero_terminal_snr)


def build_train_state(
    base: BaseModel, layout: AdapterPlan, config: RunConfig, weights: str
) -> tuple[TrainState, list[str]]:
    """Inject the adapter and build its optimizer; returns the state, and notes for the user.

    `weights` is the layout of the base's weights on the CPU; "" for the best one. Text encoders that are not
    trained may be gone from `base`.

    Raises:
        AdapterFileError: the LoRA to start from does not fit.
        ConfigError: the optimizer's package is missing, or it cannot work with these rates.
    """
    specs = {key: layer.spec for key, layer in layout.layers.items()}
    injected = inject_layers(base.modules, specs, config.seed)
    injected.tokens = put_tokens(base, [start_tokens(base, layout.tokens)])
    notes = init_from_lora(injected, layout.start, layout.name) if layout.start is not None else []
    for key, layer in injected.layers.items():
        layer.requires_grad_(layout.layers[key].rate > 0)
        layer.base.requires_grad_(False)
    set_train_mode(base, config.train.gradient_checkpointing)
    trained = base.modules.values()
    weights = weights or (PLAIN if limited(base.device) else choose_layout(trained))
    for module in trained:
        prepack(module, weights)
    optimizer, storage = build_optimizer(injected, layout, base, config.optimizer)
    scaler = torch.amp.GradScaler(base.device.type, enabled=base.dtype == torch.float16)
    average: Average | None = EMA(injected, storage, config.save.ema) if config.save.ema else None
    if average_of_its_own(optimizer):
        if names := [name for name in schema.NOT_AVERAGED if config.get(name)]:
            title = config.optimizer.row.title
            raise ConfigError(f"{title} averages the adapter itself; set {' and '.join(names)} to 0.")
        average = ScheduleFree(injected, storage, optimizer)
    loss = inpainting_loss if isinstance(base, InpaintingModel) else image_loss
    how = config.adapter.max_norm, slider_loss if config.slider.on else loss
    return TrainState(base, injected, optimizer, storage, scaler, average, *how), notes


def assign_buckets(
    records: list[ImageRecord],
    resolution: int,
    multiple: int,
    factor: int = 8,
    rules: schema.DatasetSection | None = None,
) -> list[TrainImage]:
    """Choose the buckets of each image, see `at_resolutions`, and weigh its latents, of `factor` pixels a
    side; DatasetError if there is no image, or a mask leaves nothing of one."""
    if not records:
        raise DatasetError("No image is left to train on; add images or hold fewer of them out.")
    views = at_resolutions(records, rules or schema.DatasetSection(), resolution, multiple)
    return [TrainImage(record, bucket, weigh_latents(record, bucket, factor)) for record, bucket in views]


def vary_image(item: TrainImage, rules: schema.DatasetSection, seed: int, factor: int) -> TrainImage:
    """The image with its variants, where it has any: as many as the rules say, drawn by the seed and its
    name. Where a mask leaves nothing of one, the image as it is takes its place."""
    record, bucket, rules = item.record, item.bucket, rules_of(item.record, rules)
    if not rules.varies:
        return item
    draw = random.Random(f"{seed}/variants/{record.path.name}/{bucket.width}x{bucket.height}")
    variants = []
    # The same one twice where the image leaves no room.
    for cut in dict.fromkeys(
        draw_cut(record, bucket, rules.random_crop, rules.color_aug, draw) for _ in range(rules.variants)
    ):
        try:
            variants.append(TrainImage(record, cut, weigh_latents(record, cut, factor)))
        except DatasetError:
            variants.append(item)
    return replace(item, variants=tuple(variants))


def largest(items: list[TrainImage]) -> list[TrainImage]:
    """Each image once, at the largest of its sizes."""
    return list({item.record.path: item for item in items}.values())


def all_views(images: list[TrainImage], rules: schema.DatasetSection) -> list[tuple[TrainImage, bool]]:
    """Every (image, mirrored) that a run can ask for: what to encode before the first step."""
    views = ((image, (False, True) if rules_of(image.record, rules).flip else (False,)) for image in images)
    return [
        (shown, mirrored)
        for image, both in views
        for shown in image.variants or (image,)
        for mirrored in both
    ]


def sample_prompts(
    config: RunConfig, records: list[ImageRecord], family: Family, reg: Sequence[ImageRecord] = ()
) -> list[str]:
    """The prompts of samples: the user's, with the trigger word added, else captions of `records`, the last
    one without it where the class is to stay as it was: of `reg`, or by prior preservation; brackets of all
    stay text. For a concept slider those that it acts on, else what the family's bases generate well."""
    slider, trigger = config.slider, config.dataset.trigger
    if slider.on:
        own = [escape_prompt(target) for target in slider.target] or list(family.prior_prompts)
        return config.sample.prompts or own[: schema.SAMPLE_PROMPTS]
    if config.sample.prompts:
        parts, trigger = map(split_sample, config.sample.prompts), escape_prompt(trigger)
        # A prompt that names a concept is about that one.
        others = list(map(escape_prompt, triggers_of(records, config.dataset)))
        return [
            (
                words
                if any(with_trigger(words, one) == words for one in others)
                else with_trigger(words, trigger)
            )
            + (f" {options}" if options else "")
            for words, options in parts
        ]
    kept = [plain_record_caption(one, config.dataset) for one in reg]
    kept = kept or (class_captions(records, config.dataset) if config.keeps_prior else [])
    captions = dict.fromkeys(plain_record_caption(record, config.dataset) for record in records)
    captions = dict.fromkeys([*captions][: schema.SAMPLE_PROMPTS - any(kept)] + [*filter(None, kept)][:1])
    return list(map(escape_prompt, captions))


def sample_requests(
    base: BaseModel, section: schema.SampleSection, prompts: list[str]
) -> list[GenerationRequest]:
    """What the prompts of samples ask for.

    Raises:
        ConfigError: the base cannot make a size.
    """
    requests = [GenerationRequest(**sample_fields(section, prompt)) for prompt in prompts]
    for request in requests:
        base.image_size(request.width, request.height)
    return requests


def _encode_captions(
    text: PromptCache, config: RunConfig, records: list[ImageRecord], sets: ValidationSets,
    prompts: tuple[list[GenerationRequest], list[str]], say: OnProgress,
) -> None:  # fmt: skip
    """Encode every caption and prompt that comes again, of samples and of the base's own images too; free
    the text encoders where no other can come."""
    samples, own_prompts = prompts
    rules = config.dataset
    fixed = [record for record in records if not varies_by_draw(record, rules)]
    captions = [plain_record_caption(one, rules) for one in fixed]
    captions += [one.caption for one in (*sets.held_out, *sets.training)]
    captions += [*config.slider.captions(), *own_prompts, ""]
    captions = list(dict.fromkeys(captions))
    for done, caption in enumerate(captions):
        say("Encoding captions", done, len(captions))
        text.embed(caption)
    for one in samples:
        text.embed_prompts(one.prompt, one.negative)
    if len(fixed) == len(records):
        text.release()


def _encode_pictures(
    base: BaseModel, cache: LatentCache, views: list[tuple[TrainImage, bool]], measured: list[TrainImage],
    say: OnProgress,
) -> None:  # fmt: skip
    """Encode images, mirrored or not, and what an inpainting base sees of them with each of their masks, of
    those that are measured with the first; from one that does not fit into the device's memory on, on the
    CPU."""
    wanted = [(*view, mask_numbers(base, view[0].record)) for view in views]
    wanted += [(item, False, mask_numbers(base, item.record)[:1]) for item in measured]

    def encode(item: TrainImage, mirrored: bool, masks: range) -> None:
        for mask in (0, *masks):
            cache.latents(item.record, item.bucket, mirrored, mask)
        if isinstance(base, InpaintingModel):
            factor = base.vae_scale_factor
            base.blank_condition(item.bucket.height // factor, item.bucket.width // factor)

    for done, one in enumerate(wanted):
        say("Encoding images", done, len(wanted))
        try:
            encode(*one)
        except Exception as error:
            if not out_of_memory(error) or is_on_cpu(base.vae):
                raise
            release_failed(error, base.device)
            base.put("vae", torch.device("cpu"))
            encode(*one)
    say("Encoding images", len(wanted), len(wanted))


def _load_denoiser(base: BaseModel, layout: AdapterPlan) -> dict[str, list[str]]:
    """Load the denoiser; returns the components that wait on the CPU, so that the adapter takes its memory
    first, by the fallback that keeps them there."""
    waiting = {VAE_ON_CPU: ["vae"], TEXT_ON_CPU: [] if layout.encoders_trained else list(base.text_encoders)}
    for part in waiting[TEXT_ON_CPU]:
        base.put(part, torch.device("cpu"))
    base.load(base.family.denoiser)
    return waiting


def _put_back(base: BaseModel, waiting: dict[str, list[str]], applied: list[str]) -> list[str]:
    """Move components to the device unless their fallback was applied; returns the fallbacks for those that
    do not fit, which stay."""
    lacking = []
    for fallback, parts in waiting.items():
        try:
            for part in parts if fallback not in applied else ():
                base.put(part, base.device)
        except Exception as error:
            if not out_of_memory(error):
                raise
            release_failed(error, base.device)
            lacking.append(fallback)
            for part in parts:
                base.put(part, torch.device("cpu"))
    return lacking


def is_on_cpu(module: torch.nn.Module) -> bool:
    """Whether the weights of a module are on the CPU."""
    return next(module.parameters()).device.type == "cpu"
