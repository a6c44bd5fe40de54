"""What stands in the way of a run, found before it starts: all that can be told without its pictures.

Everything is looked at and everything is said, so that nobody mends one thing only to meet the next. A
problem either blocks (the run would fail) or is a note. `dataset/preflight.py` adds what the pictures and
captions say.
"""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from lora_core.spec.base_facts import SINGLE_FILES, BaseFacts, base_facts, is_remote, missing_files
from lora_core.spec.choices import OPTIMIZERS, TARGETS, require_package
from lora_core.spec.config import RunConfig
from lora_core.spec.errors import AdapterFileError, ConfigError, ModelFileError, RunError
from lora_core.spec.families import Family, family_of_version
from lora_core.spec.problems import Problem, rate_problems
from lora_core.spec.room import MARGIN, checkpoint_bytes, free_bytes, needed_bytes
from lora_core.spec.run_folder import RunFolder, all_runs, checked_name, runs_folder
from lora_core.spec.sections import LossSection
from lora_core.spec.sizes import base_numbers, export_bytes, weight_files
from lora_core.spec.tensor_file import read_header

ADAPTER_COPIES = 4
"""Of each trained number there are in memory: itself, its gradient, and usually two of the optimizer's."""
GIGABYTE = 1e9


@dataclass(frozen=True)
class Encoded:
    """Bytes that a run's encoded pictures and captions take: what is not on `disk` yet, and captions in
    `memory`."""

    disk: int
    memory: int


def base_of(config: RunConfig) -> tuple[BaseFacts | None, list[Problem]]:
    """The base that a config names, and what is wrong with it."""
    model = config.model
    name = model.base
    if is_remote(name):
        sentence = f"The base {name} is not on this computer yet; it is downloaded when the run starts."
        return None, [Problem("base", sentence, False)]
    try:
        facts = base_facts(name, model.prediction, model.zero_terminal_snr)
        lacking = missing_files(facts.path, facts.family) if facts.path.is_dir() and facts.family else []
        if lacking:
            raise ModelFileError(
                f"The base {facts.path} is not whole; it lacks {', '.join(lacking)}. Download it again."
            )
        base_numbers(facts)
    except ModelFileError as error:
        return None, [Problem("base", str(error))]
    guess = [Problem("base", f"What the base predicts is {facts.told_by}.", False)] if facts.guessed else []
    return facts, guess


def problems_of(
    config: RunConfig,
    workspace: Path,
    facts: BaseFacts | None,
    encoded: Encoded,
    card: Callable[[], int | None],
) -> list[Problem]:
    """All problems that can be told from the settings, the base's files and the machine.

    Args:
        config: of the run to come.
        workspace: where it would lie.
        facts: of its base, where that can be read.
        encoded: what its pictures and captions take once they are encoded.
        card: asked for the free bytes of the graphics card; None where there is none.
    """
    found = [
        *_name(config, workspace),
        *_packages(config),
        *_vae(config),
        *_adapter(config, facts),
        *_loss(config, facts),
        *rate_problems(config, facts.family if facts else None),
    ]
    if facts is not None and facts.family is not None:
        found += _targets(config, facts.family)
        if not any(problem.kind == "targets" for problem in found):
            found += _disk(config, workspace, facts, encoded.disk)
            found += _memory(config, facts, card(), encoded.memory)
    return found + _busy(workspace)


def _name(config: RunConfig, workspace: Path) -> list[Problem]:
    if not config.name:
        return []
    try:
        path = runs_folder(workspace) / checked_name(config.name)
    except RunError as error:
        return [Problem("name", str(error))]
    if not path.exists() or _holds_nothing(RunFolder(path)):
        return []
    return [
        Problem(
            "name",
            f"A run named {path.name} exists already in {path.parent}; go on with it by `resume {path}`, or"
            " choose another --name.",
        )
    ]


def _holds_nothing(run: RunFolder) -> bool:
    """Whether it is a run that failed before its first step, which `RunFolder.create` replaces."""
    if not run.config_file.is_file():
        return False
    progress = run.progress()
    return run.status(progress) == "failed" and not progress.step and not run.checkpoint_steps()


def require_packages(config: RunConfig) -> None:
    """Check that the optional packages that the settings need are installed.

    Raises:
        ConfigError: one is missing; the message says how to install it.
    """
    optimizer = OPTIMIZERS[config.optim.name]
    if optimizer.package:
        feature = f"optim.name = {config.optim.name}"
        require_package(feature, optimizer.load.partition(":")[0], optimizer.package)
    if config.save.tensorboard:
        require_package("save.tensorboard = true", "tensorboard", "tensorboard")


def _packages(config: RunConfig) -> list[Problem]:
    try:
        require_packages(config)
    except ConfigError as error:
        return [Problem("package", str(error))]
    return []


def _vae(config: RunConfig) -> list[Problem]:
    name = config.model.vae.strip()
    place = Path(name).expanduser()
    if not name or place.suffix.lower() == ".ckpt":
        return []
    if not place.exists():
        return [Problem("vae", f"The VAE {name} does not exist; give a folder or a .safetensors file.")]
    if place.is_dir():
        whole = (place / "config.json").is_file() and weight_files(place)
        return [] if whole else [Problem("vae", f"The VAE {name} lacks its config.json or its weights.")]
    try:
        read_header(place, ModelFileError)
    except ModelFileError as error:
        return [Problem("vae", str(error))]
    return []


def _adapter(config: RunConfig, facts: BaseFacts | None) -> list[Problem]:
    """The LoRA to go on with is there, whole, and for a base of this family where its header says."""
    name = config.adapter.init.strip()
    if name in ("", "default"):
        return []
    file = Path(name).expanduser()
    if not file.is_file():
        sentence = f"The LoRA {file} that adapter.init names does not exist; choose another file."
        return [Problem("adapter", sentence)]
    if file.suffix.lower() in SINGLE_FILES[1:]:
        return []
    try:
        version = read_header(file).metadata.get("ss_base_model_version", "")
    except AdapterFileError as error:
        return [Problem("adapter", str(error))]
    family = family_of_version(version)
    if family is None or facts is None or facts.family is None or family.title == facts.family.title:
        return []
    sentence = (
        f"The LoRA {file} that adapter.init names is for {family.title}, and the base is"
        f" {facts.family.title}; choose another file or another base."
    )
    return [Problem("adapter", sentence)]


def _loss(config: RunConfig, facts: BaseFacts | None) -> list[Problem]:
    """Settings of the loss that do nothing with this kind of it, or that leave the last timestep out."""
    loss, found = config.loss, []
    usual = LossSection()
    for name in ("huber_delta", "huber_schedule"):
        if loss.kind != "huber" and getattr(loss, name) != getattr(usual, name):
            sentence = f"loss.{name} plays no part where loss.kind is {loss.kind}; it is for huber."
            found.append(Problem("loss", sentence, False))
    velocity = facts is not None and facts.zero_terminal_snr and facts.prediction == "v_prediction"
    if velocity and loss.gamma("v_prediction"):
        sentence = (
            f"loss.min_snr = {loss.gamma('v_prediction'):g} gives the last timestep no weight, as this base"
            " has zero terminal SNR; set loss.min_snr to auto or 0."
        )
        found.append(Problem("loss", sentence, False))
    return found


def _targets(config: RunConfig, family: Family) -> list[Problem]:
    blocks = TARGETS[config.adapter.targets].defaults.get("blocks", "")
    if not blocks or getattr(family, blocks):
        return []
    return [
        Problem(
            "targets",
            f"Which blocks of the {family.title} carry what is not known, so adapter.targets cannot choose"
            " them; choose attention, kohya or locon.",
        )
    ]


def _disk(config: RunConfig, workspace: Path, facts: BaseFacts, caches: int) -> list[Problem]:
    """Room for all that a run writes, or at least for its first checkpoint and the export."""
    export = export_bytes(facts, config)
    if export is None:
        return []
    free = free_bytes(workspace)
    all_of_it = caches + needed_bytes(config, export)
    least = caches + checkpoint_bytes(config, export // 2) + export + MARGIN
    if free >= all_of_it:
        return []
    need = (
        f"The run needs about {_size(all_of_it)} in {workspace} (pictures and captions {_size(caches)}, each"
        f" checkpoint {_size(checkpoint_bytes(config, export // 2))}), and {_size(free)} are free; make room,"
        " or lower save.keep_last."
    )
    return [Problem("disk", need, free < least)]


def _memory(config: RunConfig, facts: BaseFacts, card: int | None, captions: int) -> list[Problem]:
    """Weights and adapter against what is free: rough, since how much the pictures take is seen when they
    run."""
    numbers, export = base_numbers(facts), export_bytes(facts, config)
    if not numbers or not export:
        return []
    asked = config.train.precision
    width = 4 if asked == "fp32" or (asked == "auto" and card is None) else 2
    need = numbers * width + (export // 2) * 4 * ADAPTER_COPIES
    need += captions if card is None else 0
    free, where = (psutil.virtual_memory().available, "memory") if card is None else (card, "graphics memory")
    if need <= free:
        return []
    advice = "" if width == 2 else ", or set train.precision to bf16"
    sentence = (
        f"The base and the adapter alone take about {_size(need)} of {where}, a rough figure to which the"
        f" pictures come, and {_size(free)} are free; close other programs{advice}."
    )
    return [Problem("memory", sentence, False)]


def _busy(workspace: Path) -> list[Problem]:
    live = [run.name for run in all_runs(workspace) if run.live_process() is not None]
    if not live:
        return []
    sentence = f"The run {live[0]} is going on too; both get slower and share the memory."
    return [Problem("busy", sentence, False)]


def gpu_free_bytes() -> int | None:
    """Free memory of the first NVIDIA card, or None where there is none or it does not say."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout
        return int(said.split()[0]) * 2**20
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def _size(size: int) -> str:
    return f"{size / GIGABYTE:.1f} GB" if size >= 0.1 * GIGABYTE else f"{size / 1e6:.1f} MB"
