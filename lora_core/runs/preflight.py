"""Problems of a run before it starts, checked without torch: settings, files, machine and images.

All checks run and all problems are reported together. A problem blocks where the run would fail; else it is a
note.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from lora_core.data.captions import (
    CHUNK,
    check_prompt,
    class_captions,
    count_tokens,
    rules_of,
    triggered_caption,
    truncated_part,
    varies_by_draw,
)
from lora_core.data.concepts import balance_looks
from lora_core.data.dataset import (
    AUDIT_ONLY,
    apply_settings,
    at_resolutions,
    first_problems,
    num_holdout,
    run_dataset,
    split_holdout,
    summarize_notes,
    with_epochs,
)
from lora_core.data.images import Dataset, ImageRecord, choose_bucket, remember_latest
from lora_core.errors import (
    AdapterFileError,
    ConfigError,
    DatasetError,
    LoraError,
    ModelFileError,
    RunError,
    clip_message,
)
from lora_core.model_files import sizes
from lora_core.model_files.detect import (
    SINGLE_FILES,
    BaseFacts,
    check_base_folder,
    is_remote,
    read_base_facts,
)
from lora_core.model_files.families import Family, family_of_version, is_text_encoder, named_targets
from lora_core.model_files.header import check_vae_path, first_match, read_header, what_is_there
from lora_core.runs.folder import RunFolder, all_runs, check_run_name, runs_folder
from lora_core.settings.config import FIELDS, RunConfig, in_short, parse_sample, sample_fields
from lora_core.settings.schema import (
    ADAPTER_KINDS,
    NOT_AVERAGED,
    NOTHING_TRAINED,
    PRIOR_IMAGES,
    QUANTIZED,
    RATES,
    TARGETS,
    DatasetSection,
    LossSection,
    Quantization,
    last_matches,
    parse_new_tokens,
    require_package,
)
from lora_core.system.files import MARGIN, expand_home, folder_bytes, free_bytes, gigabytes
from lora_core.system.hardware import find_card

ADAPTER_COPIES = 4
"""Copies of each trained parameter in memory: itself, its gradient, and usually two of the optimizer's."""
_EXCERPT = 60
_LATENT_BYTES = 4 * 4 / 64
"""A pixel: four channels in fp32, one latent for 8 x 8 pixels."""
_FILE = 4096
_MEASURED = 16
"""How many training images are validated where none can be held out."""


@dataclass(frozen=True)
class RunProblem:
    """A problem that is in the way, or that a user should know before Start.

    Attributes:
        kind: for programs: name, package, epochs, base, vae, adapter, loss, targets, rate, disk, memory,
            busy, slider, dataset, picture, masks, regularisation, prior, caption, tokens, resolution,
            variants, sample, validation, unused, or the kind of a note on the dataset.
        sentence: for users, with what to do.
        blocking: whether the run would fail.
        setting, value: what to change, and to what, where that is one setting.
    """

    kind: str
    sentence: str
    blocking: bool = True
    setting: str = ""
    value: float = 0.0


_note = functools.partial(RunProblem, blocking=False)


def preflight(
    config: RunConfig,
    workspace: Path,
    dataset: Dataset | None = None,
    card: Callable[[], int | None] | None = None,
) -> list[RunProblem]:
    """Everything that is wrong with a run before it starts, and what a user should know.

    Args:
        config: of the run; an empty name is given later and not checked.
        workspace: where it will be.
        dataset: its images, where they were read already.
        card: asked for the free bytes of the graphics card, in place of its driver; None where there is none.

    Returns:
        Blocking problems first; empty where all is well.
    """
    facts, found = check_base(config)
    records: list[ImageRecord] = []
    texts = [("the slider", caption) for caption in config.slider.captions()]
    found += _slider(config)
    try:
        if not config.slider.on:
            dataset = dataset or run_dataset(config, workspace / "cache" / "datasets")
            records = dataset.records
            texts = [(one.path.name, triggered_caption(one, config.dataset)) for one in records]
            held = _found_by(lambda: _holdout(records, config), "validation")
            found = [*_images(dataset), *held, *found]
            found += [*_masks([*records, *dataset.reg], config), *_regularisation(dataset, config)]
    except DatasetError as error:
        found = [RunProblem("dataset", str(error)), *found]
    try:
        config = with_epochs(config, dataset or Dataset([], []))
    except LoraError as error:
        found += [] if isinstance(error, DatasetError) else [RunProblem("epochs", str(error))]
    family = facts.family if facts else None
    if facts is not None:
        found += [*_resolution(records, config, facts), *_variants(records, config, facts)]
        found += _captions(texts, config, facts)
    found += _new_tokens([text for _, text in texts], config, facts)
    if config.name:
        folder = runs_folder(workspace)
        found += _found_by(lambda: RunFolder(folder / check_run_name(config.name)).require_free(), "name")
    found += _found_by(lambda: require_packages(config), "package")
    found += _found_by(lambda: _check_vae(config.model.vae.strip()), "vae")
    found += _found_by(lambda: check_adapter(config, family), "adapter")
    found += _samples(config, facts.multiple if facts else 1)
    found += [*_loss(config, facts), *_prior(records, config), *_auto_rank(config)]
    found += [*rate_problems(config, family), *_without_effect(records, config, family)]
    if facts is not None and family is not None:
        targets = _found_by(lambda: named_targets(config.adapter.targets, family), "targets")
        own = None if card else find_card(config.train.device)
        free = card() if card else own.free() if own else None
        found += targets or _room(config, workspace, facts, records, free)
        found += [*_convolutions(config, facts), *_patterns(config, facts), *_skipped(config, facts)]
    found += _busy(workspace)
    return sorted(found, key=lambda problem: not problem.blocking)


def require_none_blocking(problems: list[RunProblem]) -> None:
    """Refuse what cannot work, all of it at once.

    Raises:
        RunError: at least one problem blocks.
    """
    sentences = [problem.sentence for problem in problems if problem.blocking]
    if sentences:
        raise RunError(" ".join(sentences))


def check_base(config: RunConfig) -> tuple[BaseFacts | None, list[RunProblem]]:
    """The base that a config names, and its problems."""
    model = config.model
    name = model.base
    if is_remote(name):
        sentence = f"The base {name} is not on this computer yet; it is downloaded when the run starts."
        return None, [_note("base", sentence)]
    try:
        facts = read_base_facts(name, model.prediction, model.zero_terminal_snr)
        if facts.path.is_dir() and facts.family:
            check_base_folder(facts.path, facts.family)
        sizes.count_base_parameters(facts)
    except ModelFileError as error:
        return None, [RunProblem("base", str(error))]
    if not facts.guessed:
        return facts, []
    return facts, [_note("base", f"What the base predicts is {facts.prediction_source}.")]


def require_packages(config: RunConfig) -> None:
    """Check that the optional packages that the settings need are installed, and that the optimizer takes
    its arguments.

    Raises:
        ConfigError: one is missing; the message says how to install it. Or an argument is unknown or wrong.
    """
    ADAPTER_KINDS[config.adapter.kind].require()
    config.optimizer.row.require()
    if isinstance(kept := QUANTIZED[config.train.quantize_base], Quantization):
        kept.require()
    if problem := config.optimizer.argument_problem():
        raise ConfigError(problem)
    if config.save.tensorboard:
        require_package("save.tensorboard = true", "tensorboard", "tensorboard")
    if config.save.wandb:
        require_package("save.wandb = true", "wandb", "wandb")


def _found_by(check: Callable[[], object], kind: str) -> list[RunProblem]:
    """What a check raises, as a problem that blocks."""
    try:
        check()
    except LoraError as error:
        return [RunProblem(kind, str(error))]
    except OSError as error:  # such as a name that is too long
        return [RunProblem(kind, clip_message(f"{error.filename} cannot be read: {error.strerror}."))]
    return []


def _check_vae(name: str) -> None:
    place = expand_home(name)
    if not name:
        return
    check_vae_path(place)
    if place.is_file():
        if place.suffix.lower() != ".ckpt":
            read_header(place, ModelFileError)
    elif not (place / "config.json").is_file() or not any(place.glob("*.safetensors")):
        raise ModelFileError(f"The VAE {name} lacks its config.json or its weights.")


def check_adapter(config: RunConfig, family: Family | None) -> None:
    """The kind of adapter is possible; the LoRA to start from exists, is complete, and is for a base of this
    family where its header says so.

    Raises:
        ConfigError, AdapterFileError: one of these is not so.
    """
    name = config.adapter.init.strip()
    file = expand_home(name)
    check_kind(config)
    if name in ("", "default"):
        return
    if not file.is_file():
        raise AdapterFileError(
            f"The LoRA {file} that adapter.init names {what_is_there(file)}; choose another file."
        )
    if file.suffix.lower() in SINGLE_FILES[1:]:
        return
    own = family_of_version(read_header(file).metadata.get("ss_base_model_version", ""))
    if own and family and own.title != family.title:
        raise AdapterFileError(
            f"The LoRA {file} that adapter.init names is for {own.title}, and the base is {family.title};"
            " choose another file or another base."
        )


def check_kind(config: RunConfig) -> None:
    """The kind of adapter knows the settings that are set, and can continue the file that is named.

    Raises:
        ConfigError: names the unknown ones.
    """
    kind, row = config.adapter.kind, ADAPTER_KINDS[config.adapter.kind]
    usual = RunConfig()
    unknown = [f"{name} = {config.get(name)}" for name in row.unused if config.get(name) != usual.get(name)]
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)} means nothing to adapter.kind = {kind}; leave it at its default, or set"
            " adapter.kind to lora."
        )
    section = config.adapter
    ranks = {"rank": section.rank, "conv_rank": section.conv_rank}
    ranks |= {f'block_ranks."{pattern}"': rank for pattern, rank in section.block_ranks.items()}
    for name, rank in ranks.items():
        if 0 < rank < row.least_rank:
            raise ConfigError(
                f"adapter.{name} = {rank} is too low for adapter.kind = {kind}, which learns nothing there;"
                f" set it to {row.least_rank} or more."
            )
    file = expand_home(config.adapter.init.strip())
    if config.adapter.init.strip() in ("", "default") or not file.is_file():
        return
    if (found := first_match("adapters", read_header(file).shapes)) not in (*row.continues, ""):
        able = [key for key, one in ADAPTER_KINDS.items() if found in one.continues]
        advice = f"set adapter.kind to {' or '.join(able)}" if able else "choose another file"
        raise ConfigError(
            f"The file {file} that adapter.init names is a {found}, which a {row.title} cannot continue;"
            f" {advice}."
        )


def _patterns(config: RunConfig, facts: BaseFacts) -> list[RunProblem]:
    """Patterns that match no layer or leave none, which stop the run when its base is opened."""
    tables = ("adapter.block_ranks", "adapter.block_alphas", "optimizer.block_lr")
    names, adapted = sizes.target_shapes(facts, config), sizes.adapted_layers(facts, config)
    if names and not adapted and not rate_problems(config, facts.family):
        return [RunProblem("rate", NOTHING_TRAINED)]
    # An adapter that is continued keeps layers that are not trained.
    fresh = config.adapter.init.strip() in ("", "default")
    return [
        RunProblem(
            "targets",
            f"{table} has the pattern {pattern!r}, which matches no adapted layer; layers are called like"
            f" {next(iter(names))}.",
        )
        for table in tables
        for pattern, value in config.get(table).items()
        if names and not last_matches({pattern: 1}, adapted if value and fresh else names)
    ]


def _skipped(config: RunConfig, facts: BaseFacts) -> Iterator[RunProblem]:
    """Text encoders of which only layers behind the one that is read would be trained."""
    named, adapted = sizes.target_shapes(facts, config), sizes.adapted_layers(facts, config)
    skip = config.train.clip_skip
    for part in filter(is_text_encoder, facts.family.parts if facts.family else ()):
        every, trained = (
            {int(name.split(".layers.")[1].split(".")[0]) for name in names if name.startswith(f"{part}.")}
            for names in (named, adapted)
        )
        if trained and min(trained) > max(every) + 1 - skip:
            yield RunProblem(
                "targets",
                f"train.clip_skip = {skip} skips all layers of the {part.replace('_', ' ')} that would be"
                " trained; lower it, or set their learning rate to 0.",
            )


def _convolutions(config: RunConfig, facts: BaseFacts) -> Iterator[RunProblem]:
    """A rank or an alpha of convolutions where none is adapted."""
    names = [name for name in ("conv_rank", "conv_alpha") if getattr(config.adapter, name)]
    adapted = sizes.adapted_layers(facts, config) if names else {}
    if adapted and all(math.prod(shape[2:]) == 1 for _, shape in adapted.values()):
        lacking = f"adapter.targets = {config.adapter.targets} has no convolution larger than 1 x 1"
        yield _note("targets", f"adapter.{names[0]} has no effect: {lacking}.")


def _prior(records: list[ImageRecord], config: RunConfig) -> Iterator[RunProblem]:
    """What prior preservation does before the run and in it."""
    if config.keeps_prior:
        prompts = class_captions(records, config.dataset)
        what = "captions without the trigger word" if prompts else "plain things, as there is no trigger word"
        first = f"the base makes {PRIOR_IMAGES} images first, of {what}"
        yield _note("prior", f"Prior preservation: {first}; a step takes about twice as long.")


def _without_effect(
    records: list[ImageRecord], config: RunConfig, family: Family | None
) -> Iterator[RunProblem]:
    """Settings that change nothing beside the others."""
    loss, sample, optim, valid = config.loss, config.sample, config.optimizer, config.validation
    adapter, save, usual, rates = config.adapter, config.save, RunConfig(), _part_rates(config, family)
    text = any(f"optimizer.{name}" in rates for name in RATES[1:]) or any(optim.block_lr.values())
    rules = [rules_of(one, config.dataset) for one in records] or [config.dataset]
    tags = config.slider.on or any(one.shuffle_tags or one.tag_dropout for one in rules)
    guidance = max(sample_fields(sample, line)["cfg"] for line in sample.prompts or [""])
    validates, unused = valid.every or valid.every_epochs, ADAPTER_KINDS[adapter.kind].unused
    no_alpha = "adapter.block_alphas" in unused and f"with adapter.kind = {adapter.kind}, which has no alpha"
    unread = all(one.caption_dropout == 1 for one in rules) and (
        "while dataset.caption_dropout is 1, which shows each image without its caption"
    )
    huber = loss.type != "huber" and f"while loss.type is {loss.type}; it is for huber"
    logit = loss.timesteps != "logit_normal" and f"while loss.timesteps is {loss.timesteps}"
    plain = guidance <= 1 and f"without guidance: sample.cfg or --l is {guidance:g}"
    never = not (validates and valid.pictures) and (
        f"while validation.{'pictures' if validates else 'every'} is 0"
    )
    slider = not config.slider.on and "without slider.positive and slider.negative, which make a slider"
    reasons: dict[str, object] = {
        "slider.target": slider,
        "slider.preserve": slider,
        "slider.guidance": slider,
        "adapter.alpha": adapter.alpha != adapter.rank and no_alpha,
        "adapter.conv_alpha": no_alpha,
        "adapter.new_tokens": unread,
        "dataset.trigger": unread,
        "dataset.keep_tags": not tags and "without dataset.shuffle_tags or dataset.tag_dropout",
        "optimizer.text_encoder_lr": optim.text_encoder_lr
        and not TARGETS[adapter.targets].text
        and f"with adapter.targets = {adapter.targets}, which names no layer of a text encoder",
        "optimizer.text_encoder_2_lr": family is not None
        and len(family.text_encoders) < 2
        and f"with this base: the {family.title} has one text encoder",
        "optimizer.token_lr": not adapter.new_tokens and "without adapter.new_tokens",
        "optimizer.stop_text_encoder_at": not (text or adapter.new_tokens)
        and "while no text encoder is trained",
        "loss.huber_delta": huber,
        "loss.huber_schedule": huber,
        "loss.multires_discount": not loss.multires_noise and "while loss.multires_noise is 0",
        "loss.prior_preservation": not slider and "for a slider, which keeps the base as it is",
        "loss.timestep_mean": logit,
        "loss.timestep_std": logit,
        "validation.draws_per_image": not valid.pictures and "while validation.pictures is 0",
        "validation.max_time_share": valid.max_time_share and never,
        "validation.forgetting": valid.forgetting and never,
        "validation.memorization": not slider and "for a slider, which has no images",
        "validation.patience": valid.patience and never,
        "sample.negative_prompt": plain,
        "sample.cfg_rescale": plain,
        "save.keep_last": not (save.every or save.every_epochs) and "while save.every is 0",
    }
    for name, why in reasons.items():
        if why and config.get(name) != usual.get(name):
            yield _note("unused", f"{name} has no effect {why}.")


def _loss(config: RunConfig, facts: BaseFacts | None) -> Iterator[RunProblem]:
    """Settings of the loss that exclude each other, or that leave the last timestep out."""
    loss = config.loss
    if loss.multires_noise and loss.noise_offset:
        sentence = "loss.multires_noise takes the place of loss.noise_offset; set one of them to 0."
        yield RunProblem("loss", sentence)
    low, high = loss.min_timestep, loss.max_timestep
    if low >= high:
        order = f"loss.min_timestep = {low} is not below loss.max_timestep = {high}"
        yield RunProblem("loss", f"{order}; nothing between them is left to train on.")
    velocity = facts is not None and facts.zero_terminal_snr and facts.prediction == "v_prediction"
    if velocity and (gamma := loss.gamma("v_prediction")):
        sentence = (
            f"loss.min_snr = {gamma:g} gives the last timestep no weight, as this base has zero terminal SNR;"
            " set loss.min_snr to auto or 0."
        )
        yield _note("loss", sentence)


def rate_problems(config: RunConfig, family: Family | None) -> list[RunProblem]:
    """Something is trained, at rates that the optimizer can work with and that are in a sane range.

    Args:
        config: of the run to come.
        family: of its base, where that is known.
    """
    optim, row = config.optimizer, config.optimizer.row
    rates = _part_rates(config, family)
    token_lr = [optim.token_lr] if config.adapter.new_tokens else []
    wrong = ""
    if not rates and not any(rate > 0 for rate in optim.block_lr.values()):
        wrong = NOTHING_TRAINED
    elif row.averages and (names := [name for name in NOT_AVERAGED if config.get(name)]):
        wrong = f"{row.title} averages the adapter itself; set {' and '.join(names)} to 0."
    elif problem := optim.several_rates([*rates.values(), *filter(None, optim.block_lr.values()), *token_lr]):
        wrong = problem
    elif config.adapter.new_tokens and not optim.stop_text_encoder_at:
        wrong = "optimizer.stop_text_encoder_at = 0 keeps new tokens as they start; raise it, or empty them."
    elif optim.range_test and config.slider.on:
        wrong = "The range test measures images, and a slider has none; give optimizer.lr a number."
    elif optim.range_test and row.one_rate:
        wrong = f"{row.title} finds its own rate; turn optimizer.range_test off."
    elif optim.range_test and not optim.lr:
        wrong = (
            "The range test has nothing to begin with where optimizer.lr is 0; turn optimizer.range_test off."
        )
    if wrong or optim.range_test:
        return [RunProblem("rate", wrong)] if wrong else []
    low, high = row.rates
    scale, product = (1.0, "") if row.one_rate else (config.adapter.scale, " x alpha / rank")
    found = []
    if row.averages and optim.schedule != "constant":
        sentence = (
            f"{row.title} is made for a constant learning rate, and optimizer.schedule is {optim.schedule};"
            " set optimizer.schedule to constant."
        )
        found.append(_note("rate", sentence))
    for name, rate in rates.items():
        effective = rate * scale
        if not low <= effective <= high:
            what = "much" if effective > high else "little"
            then = "images may burn" if effective > high else "hardly anything may be learned"
            sentence = (
                f"{name}{product} = {effective:.3g} is {what} for {row.title}, which is usually given"
                f" {in_full(low)} to {in_full(high)}; {then}."
            )
            found.append(_note("rate", sentence, setting=name, value=min(max(effective, low), high) / scale))
    return found


def in_full(rate: float) -> str:
    """A learning rate without an exponent."""
    return f"{rate:.8f}".rstrip("0").rstrip(".")


def _part_rates(config: RunConfig, family: Family | None) -> dict[str, float]:
    """The learning rate of each part that has layers to train."""
    optim, row = config.optimizer, TARGETS[config.adapter.targets]
    settings = ("optimizer.lr", "optimizer.text_encoder_lr", "optimizer.text_encoder_2_lr")
    values = (optim.lr, optim.text_encoder_lr, optim.text_encoder_2_lr)
    parts = len(family.parts) if family else len(settings)
    patterns = (row.unet, row.text, row.text)
    known = list(zip(settings, values, patterns, strict=True))[:parts]
    return {name: rate for name, rate, pattern in known if pattern and rate > 0}


def _images(dataset: Dataset) -> Iterator[RunProblem]:
    yield from (RunProblem("picture", sentence) for sentence in first_problems(dataset))
    if not dataset.records and not dataset.problems:
        yield RunProblem("dataset", "There are no images yet; add some.")
    yield from (_note(one.kind, one.sentence) for one in summarize_notes(dataset.notes, AUDIT_ONLY))


def _slider(config: RunConfig) -> Iterator[RunProblem]:
    """What keeps a concept slider from having a direction, and what has no effect for it."""
    slider, usual = config.slider, RunConfig()
    if not slider.on:
        return
    if empty := next((name for name in ("positive", "negative") if not getattr(slider, name).strip()), ""):
        yield RunProblem("slider", f"slider.{empty} is empty; a slider needs two opposite prompts.")
    elif slider.positive.strip() == slider.negative.strip():
        sentence = f"slider.positive and slider.negative are both {slider.positive!r}; give opposite prompts."
        yield RunProblem("slider", sentence)
    if config.adapter.auto_rank:
        sentence = "adapter.rank = auto measures images, and a slider has none; give adapter.rank a number."
        yield RunProblem("slider", sentence)
    if config.optimizer.text_encoder_lr or config.optimizer.text_encoder_2_lr:
        others = "changes other prompts too; optimizer.text_encoder_lr = 0 leaves them alone"
        yield _note("slider", f"A slider with a trained text encoder {others}.")
    names = [name for name in FIELDS if name.startswith("dataset.") and name != "dataset.path"]
    names += ["loss.input_perturbation", "loss.unmasked_weight"]
    if unused := ", ".join(name for name in names if config.get(name) != usual.get(name)):
        yield _note("slider", f"A slider is trained without images, so that {unused} can do nothing.")


def _new_tokens(captions: Sequence[str], config: RunConfig, facts: BaseFacts | None) -> Iterator[RunProblem]:
    """New tokens that could not be trained, or that the base knows as words."""
    tokens = parse_new_tokens(config.adapter.new_tokens)
    if tokens and (config.slider.on or config.adapter.auto_rank):
        yield RunProblem(
            "tokens",
            "A slider is trained without captions, so that adapter.new_tokens has no meaning; empty it."
            if config.slider.on
            else "adapter.rank = auto cannot cut an adapter with new tokens; give adapter.rank a number.",
        )
        return
    for token in tokens:
        name, words, word = token.name, token.words, token.word
        if not any(map(word.search, captions)):
            sentence = (
                f"The new token {name} is in no caption, so nothing could be learned of it; put it into"
                f" captions, or set dataset.trigger to {name}."
            )
            yield RunProblem("tokens", sentence, bool(captions))
        if word.search(words):
            sentence = f"The new token {name} cannot start from itself, {words!r}; name other words."
            yield RunProblem("tokens", sentence)
        with contextlib.suppress(ModelFileError):
            if facts and count_tokens(name, facts.tokenizer) == 1:
                sentence = (
                    f"The new token {name} is a word that the base knows, and with the LoRA means the new"
                    " token everywhere. A word of your own leaves it alone."
                )
                yield _note("tokens", sentence)


def _masks(records: list[ImageRecord], config: RunConfig) -> Iterator[RunProblem]:
    rule, outside = config.dataset.masks, config.loss.unmasked_weight
    masked = sum(record.mask is not None for record in apply_settings(records, config))
    unused = sum(record.mask is not None for record in records) - masked
    if masked:
        sentence = (
            f"{masked} of {len(records)} images {'has a mask' if masked == 1 else 'have masks'}: the area "
            f"outside counts {outside:g} (loss.unmasked_weight) beside 1 inside, in validation too."
        )
    elif unused > 0:
        sentence = f"{unused} {'mask is' if unused == 1 else 'masks are'} not used, as dataset.masks is off."
    elif rule == "alpha" or outside != LossSection().unmasked_weight:
        name = "dataset.masks = alpha" if rule == "alpha" else "loss.unmasked_weight"
        sentence = f"{name} has no effect: no image has a mask."
    else:
        return
    yield _note("masks", sentence)


def _regularisation(dataset: Dataset, config: RunConfig) -> Iterator[RunProblem]:
    count, weight = len(dataset.reg), config.dataset.reg_weight
    images = f"{count} {'image' if count == 1 else 'images'} for regularisation"
    train, reg = balance_looks(dataset.records, dataset.reg)
    shown, looks = len(reg), sum(record.repeats for record in reg)
    part = looks / max(1, looks + sum(record.repeats for record in train))
    if count and not weight:
        sentence = f"The dataset has {images}, not used, as dataset.reg_weight is 0."
    elif count:
        first = f" the first {shown} of" if shown < count else ""
        many = "Half" if not any(one.concept and one.concept.share for one in reg) else f"{part:.0%}"
        sentence = f"{many} of the steps show{first} {images}, which count {weight:g} (dataset.reg_weight)."
    elif weight != DatasetSection().reg_weight:
        sentence = "dataset.reg_weight has no effect: there is no folder `reg` with images of the class."
    else:
        return
    yield _note("regularisation", sentence)


def _holdout(records: list[ImageRecord], config: RunConfig) -> None:
    if any(record.held_out for record in records):
        split_holdout(records, config.validation.pictures, config.seed)
    elif records:  # counting is enough, without reading images
        num_holdout(len(records), config.validation.pictures)


def _auto_rank(config: RunConfig) -> Iterator[RunProblem]:
    """What decides the ranks of the file where no gain can be measured."""
    validation = config.validation
    if config.adapter.auto_rank and not (validation.every and validation.pictures):
        sentence = (
            "adapter.rank = auto has no held-out images to measure on, so the file keeps what has 99% of the"
            " energy; set validation.every and validation.pictures to have it keep 99% of the gain."
        )
        yield _note("validation", sentence)


def _resolution(records: list[ImageRecord], config: RunConfig, facts: BaseFacts) -> list[RunProblem]:
    """Resolutions that no square image can have, that no image reaches or that have no effect."""
    several = [] if config.slider.on else config.dataset.resolutions
    one, multiple = config.train.resolution, facts.multiple
    largest = config.resolution(facts.resolution)
    asked = [("train.resolution", one)] if one else []
    asked += [("dataset.resolutions", side) for side in several]
    asked += [(f"The resolution of {name}", side) for name, side in _concept_resolutions(records)]
    found = []
    for name, side in dict.fromkeys(asked):
        if side % multiple:
            square = choose_bucket(side, side, side, multiple).width
            found.append(
                f"{name} = {side} becomes {square}: this base takes images whose sides are multiples of"
                f" {multiple} pixels."
            )
        if name.startswith("The") and side > largest:
            found.append(
                f"{name} = {side} is more than the run's {largest}, which time is forecast for; a step of its"
                " images takes longer."
            )
    rows = [each for each in records if not (each.concept and "resolutions" in dict(each.concept.rules))]
    if several and one:
        found.append(f"train.resolution = {one} has no effect beside dataset.resolutions; set it to 0.")
    elif rows and all(each.width * each.height < one**2 for each in rows):
        found.append(
            f"No image is as large as train.resolution = {one}, and none is enlarged: each is trained at its"
            " own size. Lower it, or add larger images."
        )
    for lower, side in itertools.pairwise(sorted(set(several))):
        if rows and not any(one.width * one.height > lower * side for one in rows):
            found.append(
                f"No image is large enough for {side} of dataset.resolutions: {lower} is as close to the size"
                " of each; remove it, or add larger images."
            )
    return [_note("resolution", sentence) for sentence in found]


def _variants(records: list[ImageRecord], config: RunConfig, facts: BaseFacts) -> Iterator[RunProblem]:
    """What random crops and colours need, or why they come to nothing."""
    rules, usual = config.dataset, DatasetSection()
    if not any(rules_of(record, rules).varies for record in records):
        if records and rules.variants != usual.variants:
            without = "dataset.random_crop or dataset.color_aug"
            yield _note("variants", f"dataset.variants has no effect without {without}.")
        return
    size = _latent_bytes(records, config, facts)
    cropped = [record for record in records if rules_of(record, rules).random_crop]
    shown = at_resolutions(cropped, rules, config.resolution(facts.resolution), facts.multiple)
    if size > psutil.virtual_memory().available / 2:
        large = f"The encoded images take {gigabytes(size)} of memory, over half of the free memory"
        yield _note("variants", f"{large}; lower dataset.variants, which is {rules.variants}.")
    elif shown and all(one.width * one.height <= cut.width * cut.height for one, cut in shown):
        sentence = (
            "dataset.random_crop has no effect: no image is larger than its training size, and none is "
            "enlarged; use larger images, or a lower resolution."
        )
        yield _note("variants", sentence)


def at_largest(config: RunConfig, records: Sequence[ImageRecord], own: int) -> RunConfig:
    """The settings at the largest resolution that images are trained at, which decides a run's memory; `own`
    is the base's."""
    usual, of_concepts = config.resolution(own), {id(one.concept): one for one in records}.values()
    sides = (max(rules_of(one, config.dataset).resolutions, default=usual) for one in of_concepts)
    largest = max(sides, default=usual)
    if largest == usual or config.slider.on:
        return config
    return config.changed({"dataset.resolutions": [], "train.resolution": largest})


def _concept_resolutions(records: Iterable[ImageRecord]) -> Iterator[tuple[str, int]]:
    for concept in dict.fromkeys(record.concept for record in records):
        if concept:
            yield from ((concept.name, side) for side in dict(concept.rules).get("resolutions", ()))


def _samples(config: RunConfig, multiple: int) -> list[RunProblem]:
    """Sample prompts whose options or weights cannot be used."""
    section = config.sample

    def check(line: str) -> None:
        fields = parse_sample(section, line)
        check_prompt(fields["prompt"])
        check_prompt(fields["negative"])
        for letter, name in (("w", "width"), ("h", "height")):
            if (side := fields[name]) % multiple:
                near = ", ".join(str(n * multiple) for n in (side // multiple, side // multiple + 1) if n)
                called = f"--{letter} in the sample prompt {in_short(line)}"
                raise ConfigError(f"{called} is not a multiple of {multiple}; take {near}.")

    lines = (*section.prompts, "")
    found = [problem for line in lines for problem in _found_by(functools.partial(check, line), "sample")]
    return list(dict.fromkeys(found))


def _captions(texts: list[tuple[str, str]], config: RunConfig, facts: BaseFacts) -> list[RunProblem]:
    """Captions, each with its image, that are too long to be read to the end."""
    limit, tokenizer = config.train.max_token_length, facts.tokenizer
    cut: list[tuple[str, str]] = []
    try:
        for token in parse_new_tokens(config.adapter.new_tokens):
            # Room for as many vectors as the token has.
            more = (token.vectors or count_tokens(token.words, tokenizer)) - count_tokens(
                token.name, tokenizer
            )
            texts = [(name, token.word.sub(token.name + " a" * more, text)) for name, text in texts]
        for name, text in texts:
            parts = (truncated_part(line, limit, tokenizer) for line in text.splitlines())
            beyond = max(parts, key=len, default="")
            if beyond:
                cut.append((name, beyond))
    except ModelFileError as error:
        return [_note("caption", f"The length of the captions could not be checked. {error}")]
    if not cut:
        return []
    name, beyond = max(cut, key=lambda one: len(one[1]))
    excerpt = beyond if len(beyond) <= _EXCERPT else f"{beyond[:_EXCERPT]}..."
    count = "1 caption is" if len(cut) == 1 else f"{len(cut)} captions are"
    sentence = (
        f"{count} longer than the {limit} tokens that are read; of {name}, “{excerpt}” is not. Shorten it, or"
        " raise train.max_token_length."
    )
    return [_note("caption", sentence)]


def _room(
    config: RunConfig, workspace: Path, facts: BaseFacts, records: list[ImageRecord], card: int | None
) -> list[RunProblem]:
    """Disk and memory against the sizes of caches, checkpoints, base and adapter."""
    cache = workspace / "cache"
    again, drawn = caption_bytes(records, config, facts)
    lacking = (
        _latent_bytes(records, config, facts) - folder_bytes(cache / "latents"),
        again - folder_bytes(cache / "text"),
    )
    on_disk = sum(max(0, size) for size in lacking)
    memory = _memory(
        at_largest(config, records, facts.resolution),
        facts,
        card,
        again + drawn,
        captions_vary(records, config),
    )
    return _disk(config, workspace, facts, on_disk) + memory


def _disk(config: RunConfig, workspace: Path, facts: BaseFacts, caches: int) -> list[RunProblem]:
    """Room for all that a run writes, or at least for its first checkpoint and the export."""
    export = sizes.export_bytes(facts, config)
    if export is None:
        return []
    free = free_bytes(workspace)
    all_of_it = caches + sizes.needed_bytes(config, export)
    least = caches + sizes.checkpoint_bytes(config, export // 2) + export + MARGIN
    if free >= all_of_it:
        return []
    checkpoint = gigabytes(sizes.checkpoint_bytes(config, export // 2))
    need = (
        f"The run needs about {gigabytes(all_of_it)} in {workspace} (images and captions"
        f" {gigabytes(caches)}, each checkpoint {checkpoint}), and {gigabytes(free)} are free; make room, or"
        " lower save.keep_last."
    )
    return [RunProblem("disk", need, free < least)]


def _memory(
    config: RunConfig, facts: BaseFacts, card: int | None, captions: int, varied: bool
) -> list[RunProblem]:
    """Weights and adapter against free memory; rough, since activations come on top. No problem on a card
    where the trainer fits the run into its memory."""
    parameters, export = sizes.count_base_parameters(facts), sizes.export_bytes(facts, config)
    if not parameters or not export:
        return []
    asked = config.train.precision
    width = 4 if asked == "fp32" or (asked == "auto" and card is None) else 2
    need = parameters * width + (export // 2) * 4 * ADAPTER_COPIES
    need += captions if card is None else 0
    free, where = (psutil.virtual_memory().available, "memory") if card is None else (card, "graphics memory")
    fitted = sizes.fit_on_card(config, facts, varied, card) if card is not None else None
    if need <= free or (fitted and fitted[0] + sizes.CARD_SPARE <= free):
        return []
    advice = "" if width == 2 else ", or set train.precision to bf16"
    sentence = (
        f"The base and the adapter alone take about {gigabytes(need)} of {where}, a rough figure to which the"
        f" images come, and {gigabytes(free)} are free; close other programs{advice}."
    )
    return [_note("memory", sentence)]


def _busy(workspace: Path) -> Iterator[RunProblem]:
    if live := next((run.name for run in all_runs(workspace) if run.live_process() is not None), ""):
        yield _note("busy", f"The run {live} is running too; both get slower and share the memory.")


@remember_latest
def _count_fixed(records: Sequence[ImageRecord], rules: DatasetSection) -> int:
    """How many captions read the same in every draw."""
    return sum(not varies_by_draw(record, rules) for record in records)


def captions_vary(records: Sequence[ImageRecord], config: RunConfig) -> bool:
    """Whether a caption of the images reads differently from draw to draw."""
    fixed: int = _count_fixed(records, config.dataset)
    return fixed < len(records)


def caption_bytes(records: Sequence[ImageRecord], config: RunConfig, facts: BaseFacts) -> tuple[int, int]:
    """About what a run's encoded captions take where no text encoder is trained, else nothing.

    Returns:
        Bytes of those that come again, which are kept on disk and in memory, and of those that vary from look
        to look, which are kept in memory up to a limit.
    """
    trained = config.optimizer.text_encoder_lr or config.optimizer.text_encoder_2_lr
    if facts.family is None or trained or config.adapter.new_tokens:
        return 0, 0
    width = 2 if config.train.precision in ("bf16", "fp16") else 4
    one = config.train.max_token_length // CHUNK * (CHUNK + 2) * facts.family.context_width * width + _FILE
    validation, fixed = config.validation, _count_fixed(records, config.dataset)
    # Those that vary are measured without chance: the held-out ones, and about as many of the others.
    held = validation.pictures * (1 if validation.pictures >= 1 else len(records))
    again = min(len(records), fixed + _MEASURED + math.ceil(2 * held)) if records else 0
    again += len(config.sample.prompts) + validation.forgetting + 1
    draws = config.train.steps * config.train.batch_size * config.train.gradient_accumulation_steps
    return again * one, min(sizes.DRAWN_CAPTIONS_BYTES, draws * one) if fixed < len(records) else 0


def _latent_bytes(records: list[ImageRecord], config: RunConfig, facts: BaseFacts) -> int:
    """Bytes of encoded images on disk; what an inpainting base sees with each mask is a quarter larger."""
    used = apply_settings(records, config)
    shown = at_resolutions(used, config.dataset, config.resolution(facts.resolution), facts.multiple)
    found = 0
    for record, bucket in shown:
        masks = (1 if record.mask else sizes.RANDOM_MASKS) if facts.inpainting else 0
        one = int(bucket.width * bucket.height * _LATENT_BYTES * (1 + 1.25 * masks)) + _FILE * (1 + masks)
        rules = rules_of(record, config.dataset)
        found += one * (rules.variants + 1 if rules.varies else 1) * (2 if rules.flip else 1)
    return found
