"""The `adapter_config.json` that PEFT writes beside its `adapter_model.safetensors`: where alpha stands.

A file of this kind says nothing of alpha itself; without the config beside it, alpha is taken to be the rank.
Source: huggingface/peft, `PeftModel.save_pretrained`.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from lora_core.formats.diffusers import HEADER_KEY
from lora_core.spec.errors import AdapterFileError
from lora_core.spec.untrusted import parsed_json

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_TAKEN = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules")


def with_config_beside(path: Path, keys: Iterable[str], metadata: Mapping[str, str]) -> dict[str, str]:
    """A file's metadata, with what a PEFT config beside it says of alpha put where diffusers has it.

    Args:
        path: the adapter file.
        keys: the names of its tensors.
        metadata: its header's texts.

    Raises:
        AdapterFileError: the config is there and cannot be read.
    """
    config = path.with_name(CONFIG)
    if path.name != FILE or HEADER_KEY in metadata or not config.is_file():
        return dict(metadata)
    try:
        values = parsed_json(config.read_bytes())
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{config} cannot be read, so alpha is unknown: {error}.") from error
    if not isinstance(values, dict):
        raise AdapterFileError(f"{config} is no table, so alpha is unknown.")
    part = "text_encoder" if any("encoder.layers." in key for key in keys) else "unet"
    stated = {f"{part}.{key}": values[key] for key in _TAKEN if key in values}
    return {**metadata, HEADER_KEY: json.dumps(stated)}
