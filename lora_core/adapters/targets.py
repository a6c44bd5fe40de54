"""Which layers of a base are adapted: named sets of layers, as patterns over diffusers' module paths."""

import re
from dataclasses import dataclass

from torch import nn

TEXT_LEVEL = "text_model."
Adaptable = nn.Linear | nn.Conv2d
"""The layers that a low-rank path can be put beside."""


@dataclass(frozen=True)
class Targets:
    """A set of layers: full-match patterns for the UNet's paths and for the text encoders'."""

    unet: str
    text: str

    def pattern(self, part: str) -> re.Pattern[str]:
        """The pattern for a part."""
        return re.compile(self.unet if part == "unet" else self.text)


_ATTENTION = r"attn[12]\.(?:to_q|to_k|to_v|to_out\.0)"

ATTENTION = Targets(
    unet=rf".*\.{_ATTENTION}",
    text=r".*\.self_attn\.(?:q_proj|k_proj|v_proj|out_proj)",
)
# Everything linear below a Transformer2DModel: kohya sd-scripts' default modules.
KOHYA = Targets(
    unet=rf".*\.attentions\.\d+\.(?:proj_in|proj_out|.*\.{_ATTENTION}|.*\.ff\.net\.(?:0\.proj|2))",
    text=r".*\.(?:self_attn\.(?:q_proj|k_proj|v_proj|out_proj)|mlp\.fc1|mlp\.fc2)",
)


def canonical_path(part: str, path: str) -> str:
    """`path` as adapters name it: text encoders always with the `text_model.` level, which newer transformers
    dropped."""
    return path if part == "unet" or path.startswith(TEXT_LEVEL) else TEXT_LEVEL + path


def target_modules(part: str, module: nn.Module, targets: Targets) -> dict[str, tuple[str, Adaptable]]:
    """The layers of `module` to adapt: canonical path to (real path, layer), in the module's own order."""
    pattern = targets.pattern(part)
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
