"""The layers of a base that `model_files.families.Targets` names, in its modules."""

from torch import nn

from lora_core.backends.base import Adaptable
from lora_core.model_files.families import TEXT_LEVEL, Targets, canonical_path


def target_modules(part: str, module: nn.Module, targets: Targets) -> dict[str, tuple[str, Adaptable]]:
    """The layers of `module` to adapt: canonical path to (real path, layer), in the module's own order."""
    pattern = targets.pattern(part)
    if pattern is None:
        return {}
    found: dict[str, tuple[str, Adaptable]] = {}
    for path, layer in module.named_modules():
        name = canonical_path(part, path)
        if isinstance(layer, Adaptable) and pattern.fullmatch(name):
            found[name] = (path, layer)
    return found


def layer_by_path(part: str, module: nn.Module, path: str) -> tuple[str, Adaptable] | None:
    """The (real path, frozen layer) that a canonical path names in `module`, or None."""
    for candidate in dict.fromkeys((path, path.removeprefix(TEXT_LEVEL))):
        try:
            layer = module.get_submodule(candidate)
        except AttributeError:
            continue
        # An adapted layer hides the frozen one behind it.
        frozen = getattr(layer, "base", layer)
        if isinstance(frozen, Adaptable):
            return candidate, frozen
    return None
