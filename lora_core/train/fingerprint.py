"""What a run's bits follow from besides its settings; a resume says what has changed since the run began."""

import functools
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from lora_core.data.images import hash_file
from lora_core.data.scan import ImageRecord
from lora_core.errors import InputsChanged, ModelFileError
from lora_core.model_files.detect import read_base_facts, weight_paths
from lora_core.model_files.header import read_header
from lora_core.model_files.hub import fetch_base
from lora_core.models.weight_files import SAMPLE
from lora_core.runs.folder import RunFolder
from lora_core.settings.schema import ModelSection
from lora_core.system.files import write_atomically

PACKAGES = ("lora-easel", "torch", "diffusers", "transformers")
version = functools.cache(importlib.metadata.version)
_PLACES = 4096
"""So many places are read of a file without a table of its tensors."""
_CONFIGS = ("config.json", "scheduler_config.json", "vocab.json", "merges.txt")


def versions() -> dict[str, str]:
    """The versions that bits may depend on."""
    return {name: version(name) for name in PACKAGES}


def input_hashes(run: RunFolder, records: list[ImageRecord]) -> dict[str, str]:
    """A short text for each input: the settings file, each picture with its caption, each package."""
    inputs = {"config.toml": hashlib.sha256(run.config_file.read_bytes()).hexdigest()}
    for record in records:
        words = f"{hash_file(record.path)} {record.repeats} {record.caption}"
        words += "\nheld out by hand" if record.held_out else ""
        inputs[f"the picture {record.path.name}"] = hashlib.sha256(words.encode()).hexdigest()
    return inputs | {f"the package {name}": found for name, found in versions().items()}


def start_input(start: Path | None) -> dict[str, str]:
    """The same of the LoRA that a run continues, if there is one."""
    if start is None:
        return {}
    return {f"the LoRA {start.name} that it continues": hash_file(start) if start.is_file() else ""}


def base_inputs(model: ModelSection) -> dict[str, str]:
    """The same of the base: a text for each component of a folder, for a single file, for a VAE of its own.

    Raises:
        ModelFileError: the base is not there.
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
        place = Path(model.vae).expanduser()
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
    """What tells a file of weights from another: its size, its header, and 64 bytes from the middle of each
    tensor.

    A whole hash of a large base takes half a minute; another training, precision or merge changes every
    tensor. A `.ckpt` has no table of tensors that is safe to read, so 4,096 places are taken instead.
    """
    if not path.is_file():
        return ""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for place in _places(path, size, digest):
            file.seek(place)
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def _places(path: Path, size: int, digest: Any) -> list[int]:
    if path.suffix.lower() != ".safetensors":
        return [size * number // _PLACES for number in range(_PLACES)]
    header = read_header(path, ModelFileError)
    digest.update(json.dumps(header.tensors, sort_keys=True).encode())
    offsets = [header.start + sum(entry["data_offsets"]) // 2 for entry in header.tensors.values()]
    return sorted(offsets)


def check_inputs(
    run: RunFolder, records: list[ImageRecord], accept_changes: bool, more: dict[str, str] | None = None
) -> None:
    """Write the inputs down at the first start; later, compare.

    Args:
        run: the run.
        records: its pictures.
        accept_changes: go on although something has changed.
        more: a short text for each other input, as of the base.

    Raises:
        InputsChanged: something has changed and the person has not accepted it; names what.
    """
    now = input_hashes(run, records) | (more or {})
    try:
        before = json.loads(run.inputs_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = now
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed and not accept_changes:
        named = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise InputsChanged(
            f"Since the run {run.name} began, this has changed: {named}. Put it back, or go on with"
            " --accept-changes; the result is then not that of an unbroken run.",
            changed,
        )
    write_atomically(run.inputs_file, json.dumps(now, ensure_ascii=False, indent=1).encode())
