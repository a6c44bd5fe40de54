"""Which layers of a base are adapted: named sets of layers, as patterns over diffusers' module paths.

The patterns themselves are rows of `choices.TARGETS` and of the families, so that a window without torch
knows them
too.
"""

import re
from dataclasses import dataclass, replace

from torch import nn

from lora_core.errors import ConfigError
from lora_core.model_files.families import Family
from lora_core.settings.choices import TARGETS, chosen

TEXT_LEVEL = "text_model."
Adaptable = nn.Linear | nn.Conv2d
"""The layers that a low-rank path can be put beside."""


@dataclass(frozen=True)
class Targets:
    """A set of layers.

    Attributes:
        unet, text: full-match patterns for the UNet's paths and for the text encoders'; "" for none.
        blocks: the field of a family that narrows the UNet's further, or "".
    """

    unet: str
    text: str
    blocks: str = ""

    def pattern(self, part: str) -> re.Pattern[str] | None:
        """The pattern for a part, or None where nothing of it is adapted."""
        text = self.unet if part == "unet" else self.text
        return re.compile(text) if text else None

    def within(self, family: Family) -> "Targets":
        """The same set with the family's blocks written into the pattern.

        Raises:
            ConfigError: the family does not say which blocks those are.
        """
        if not self.blocks:
            return self
        blocks = getattr(family, self.blocks)
        if not blocks:
            raise ConfigError(
                f"Which blocks of the {family.title} carry what is not known, so adapter.targets cannot"
                " choose them; choose attention, kohya or locon."
            )
        return replace(self, unet=rf"(?=(?:{blocks})\Z)(?:{self.unet})", blocks="")


def named_targets(name: str, family: Family | None = None) -> Targets:
    """The set of layers that `adapter.targets` names, narrowed to the family's blocks where it asks for that.

    Raises:
        ConfigError: there is no such set, or not for this family.
    """
    row = chosen(TARGETS, name, "adapter.targets")
    targets: Targets = row.resolve()(**row.defaults)
    return targets if family is None else targets.within(family)


ATTENTION, KOHYA, LOCON = (Targets(**TARGETS[name].defaults) for name in ("attention", "kohya", "locon"))


def canonical_path(part: str, path: str) -> str:
    """`path` as adapters name it: text encoders always with the `text_model.` level, which newer transformers
    dropped."""
    return path if part == "unet" or path.startswith(TEXT_LEVEL) else TEXT_LEVEL + path


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
    for candidate in (path, path.removeprefix(TEXT_LEVEL)) if part != "unet" else (path,):
        try:
            layer = module.get_submodule(candidate)
        except AttributeError:
            continue
        # An adapted layer hides the frozen one behind it.
        frozen = getattr(layer, "base", layer)
        if isinstance(frozen, Adaptable):
            return candidate, frozen
    return None
