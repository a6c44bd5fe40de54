"""Filling a component that was built without memory for its weights, one parameter at a time."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lora_core.models.sources import Finder, Source
from lora_core.models.thin import Thinner
from lora_core.spec.errors import ModelFileError


@dataclass(frozen=True)
class Where:
    """What a sentence on a problem says.

    Attributes:
        path: of the base.
        title: of the component.
        advice: what to do where weights are missing.
    """

    path: Path
    title: str
    advice: str


def fill(
    module: nn.Module, find: Finder, dtype: torch.dtype, device: torch.device, where: Where,
    thin: Thinner | None = None,
) -> None:  # fmt: skip
    """Read all parameters of `module`, frozen, in `dtype`, onto `device`.

    Nothing is left at a random start: a parameter that the files lack is an error, where the libraries only
    log it. All names and shapes are checked before the first number is read.
    Each layer is made thin as soon as its weight is there, where that is asked for.

    Raises:
        ModelFileError: the files lack a parameter, or it has another shape or holds NaN.
    """
    wanted = dict(module.named_parameters())
    places = _places(wanted, find, where)
    for name, place in places.items():
        tensor = place.read()
        if not tensor.is_floating_point():
            raise ModelFileError(f"{place.file.path} holds {place.key} in whole numbers; it is no weight.")
        tensor = tensor.reshape(wanted[name].shape)
        held = tensor.to(device, dtype)
        if not _finite(held):
            broken = not _finite(tensor.float())
            reason = "holds NaN or infinity" if broken else f"holds more than {str(dtype)[6:]} can"
            advice = "choose another file" if broken else "set train.precision to fp32 or bf16"
            raise ModelFileError(f"{place.file.path}: the tensor {place.key} {reason}; {advice}.")
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, nn.Parameter(held, requires_grad=False))
        if thin and leaf == "weight":
            thin.layer(module, parent)


def _places(wanted: dict[str, nn.Parameter], find: Finder, where: Where) -> dict[str, Source]:
    """Where each parameter lies."""
    found = {name: find(name) for name in wanted}
    missing = [name for name, place in found.items() if place is None]
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        lacks = where.title if len(missing) == len(found) else f"{missing[0]}{more} of the {where.title}"
        raise ModelFileError(f"The base {where.path} lacks {lacks}. {where.advice}")
    places = {name: place for name, place in found.items() if place is not None}
    for name, place in places.items():
        if place.numel != wanted[name].numel():
            raise ModelFileError(
                f"{place.file.path} holds {place.key} in the shape {place.file.shapes[place.key]}, not"
                f" {list(wanted[name].shape)}; its {where.title} is of another kind."
            )
    return places


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite, without a second tensor of the same size."""
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
