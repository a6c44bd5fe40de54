"""What a run's bits follow from besides its settings; a resume says what has changed since the run began."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

from lora_core.dataset.folder import ImageRecord
from lora_core.dataset.pictures import content_hash
from lora_core.spec.errors import RunError
from lora_core.spec.paths import write_atomically
from lora_core.spec.run_folder import RunFolder

PACKAGES = ("lora-easel", "torch", "diffusers", "transformers")


def versions() -> dict[str, str]:
    """The versions that bits may depend on."""
    return {name: version(name) for name in PACKAGES}


def inputs_of(run: RunFolder, records: list[ImageRecord], start: Path | None = None) -> dict[str, str]:
    """A short text for each input: the settings file, each picture with its caption, the LoRA that is
    continued, each
    package."""
    inputs = {"config.toml": hashlib.sha256(run.config_file.read_bytes()).hexdigest()}
    for record in records:
        words = f"{content_hash(record.path)} {record.repeats} {record.caption}"
        inputs[f"the picture {record.path.name}"] = hashlib.sha256(words.encode()).hexdigest()
    if start is not None:
        found = content_hash(start) if start.is_file() else ""
        inputs[f"the LoRA {start.name} that it continues"] = found
    return inputs | {f"the package {name}": found for name, found in versions().items()}


def check_inputs(
    run: RunFolder, records: list[ImageRecord], accept_changes: bool, start: Path | None = None
) -> None:
    """Write the inputs down at the first start; later, compare.

    Args:
        run: the run.
        records: its pictures.
        accept_changes: go on although something has changed.
        start: the LoRA that it continues, if there is one.

    Raises:
        RunError: something has changed and the person has not accepted it; names what.
    """
    now = inputs_of(run, records, start)
    try:
        before = json.loads(run.inputs_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = now
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed and not accept_changes:
        named = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise RunError(
            f"Since the run {run.name} began, this has changed: {named}. Put it back, or go on with"
            " --accept-changes; the result is then not that of an unbroken run."
        )
    write_atomically(run.inputs_file, json.dumps(now, ensure_ascii=False, indent=1).encode())
