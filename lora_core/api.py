"""What a library user needs, in one place; everything else may move without notice.

Each verb of the command line (`lora_core.verbs`) is a function here with plain arguments, which returns data
and prints nothing:

    >>> inspect(file)["kind"]
    'LoRA'
    >>> merge([WeightedLora(str(file), 0.5), file], merged)
    ['1 layer of rank 4 from 2 files.']

Below the verbs are the parts that they are made of: open a base, put an adapter into it, draw an image:

    >>> base = load_base("demo", torch.device("cpu"), torch.float32)
    >>> weights = load_adapter(file, base.family)
    >>> merger = Merger(base.modules)
    >>> merger.apply([LoadedLora(weights, 0.5)])
    >>> len(put_tokens(base, [weights]))
    0
    >>> generate_image(base, GenerationRequest(prompt="a red cat", seed=3)).save(out)

The base knows an adapter's new tokens by `put_tokens`, which returns them by text encoder: here none.

Paths are `str` or `Path`. A run is a folder or a name in the workspace; `workspace=None` means the
environment variable LORA_EASEL_HOME, else the platform's user data folder. Every problem that a user can fix
is a `LoraError`. Torch is imported by what needs it, not by `import lora_core.api`.
"""

import dataclasses
import importlib
from typing import Any

from lora_core.errors import LoraError
from lora_core.generate.request import WeightedLora, GenerationRequest
from lora_core.generate.grid import Axis
from lora_core.model_files.starting_settings import settings_from_lora
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.verbs import VERBS, Measure, verb

# fmt: off
from lora_core.verbs.runs import (
    debug, delete, export, forecast, notify, pause, preview, queue_add, queue_list, queue_move, queue_pause,
    queue_remove, queue_results, queue_run, queue_sweep, report, resume, run_config, runs, save, stop, train,
)
from lora_core.verbs.datasets import (
    audit, caption, caches_clean, caches_list, captions_delete_tag, captions_prefix, captions_rename_tag,
    captions_replace, captions_set, captions_suffix, captions_table, captions_trigger, captions_undo,
    concepts_list, concepts_make, concepts_move, concepts_set, crop, docs, doctor, hold_out, leave_out,
    left_out, masks_make, pictures, probe, projects_delete, projects_import, projects_list, projects_new,
    projects_open, projects_rename, take_back, trash_empty, trash_list, trash_restore,
)
from lora_core.verbs.adapters import (
    amplify, compare, convert, copy, extract, generate, grid, inspect, merge, merge_into_base, shrink,
    shrink_intrinsic, stack, strength, upload, validate, verify,
)
# fmt: on

_LAZY = {
    "AdapterWeights": "lora_core.lora.weights",
    "LayerWeights": "lora_core.lora.weights",
    "Merger": "lora_core.lora.weights",
    "LoadedLora": "lora_core.lora.weights",
    "adapter_weights": "lora_core.lora.inject",
    "generate_image": "lora_core.generate.pipeline",
    "inject": "lora_core.lora.inject",
    "inspect_file": "lora_core.formats.verify",
    "load_base": "lora_core.models.load",
    "put_tokens": "lora_core.lora.inject",
    "load_adapter": "lora_core.formats.io",
    "validation_report": "lora_core.evaluate.validator",
    "save_adapter": "lora_core.formats.io",
    "write_adapter": "lora_core.formats.io",
}
"""Names that need torch, and the modules that they are imported from when they are first asked for."""


_FORMER = {
    "LoraAt": "WeightedLora",
    "Picture": "GenerationRequest",
    "Shot": "GenerationRequest",
    "Strengthened": "LoadedLora",
    "like_file": "settings_from_lora",
    "read_adapter": "load_adapter",
}
"""Former names, which scripts may use, and the names of today."""


def __getattr__(name: str) -> Any:
    name = _FORMER.get(name, name)
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in globals():
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def generated_from_prompt(
    base: Any, picture: GenerationRequest, prompt: str, negative: str = "", on_step: Any = None
) -> Any:
    """Former form of `generate_image`."""
    from lora_core.generate.pipeline import generate_image

    return generate_image(base, dataclasses.replace(picture, prompt=prompt, negative=negative), on_step)


def validation(
    base: Any, records: Any, adapters: Any, triples: int = 8, seed: int = 0, shuffle_captions: bool = False
) -> dict[str, Any]:
    """Former form of `validation_report`."""
    from lora_core.evaluate.validator import validation_report

    return validation_report(base, records, adapters, triples, seed, shuffle_captions)


@verb
def serve() -> None:
    """Be the warm worker: JSON lines in on stdin, JSON lines out on stdout, until stdin ends."""
    from lora_core.worker import main

    main()


__all__ = [
    *_LAZY, *(function.__name__ for function in VERBS.values()), "Axis", "GenerationRequest", "LoraError",
    "Measure", "RunConfig", "RunFolder", "WeightedLora", "left_out", "settings_from_lora", "merge_into_base",
    "run_config", "shrink_intrinsic",
]  # fmt: skip
