"""What a tool multiplies each layer by: its own alpha, the component's, or what the header says."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from lora_core.adapters.weights import LayerKey
from lora_core.formats.diffusers import HEADER_KEY, header_values
from lora_core.formats.reading import Case, Group, Refused, Taken
from lora_core.formats.tools import Leaves
from lora_core.spec.errors import AdapterFileError


@dataclass(frozen=True)
class Used:
    """What a tool does to one layer.

    Attributes:
        keys: of the file, that it takes for the layer.
        scale: of the product of the factors; None for what is no plain LoRA.
        kind: "LoRA", "LoHa", ...
    """

    keys: tuple[str, ...]
    scale: float | None
    kind: str = "LoRA"


def used_layers(case: Case, taken: Taken) -> dict[LayerKey, Used]:
    """Each layer with its keys and scale.

    Raises:
        Refused: header and tensors contradict each other, at which the tool fails.
    """
    header = _header(case) if case.dialect.alphas != "own" else None
    common = _common_alphas(case) if case.dialect.alphas == "component" else {}
    used: dict[LayerKey, Used] = {}
    for layer, (group, kind) in taken.items():
        if isinstance(kind, str):
            used[layer] = Used(tuple(group.keys.values()), None, kind)
        elif header is None or header.targets(layer):
            used[layer] = _used(case, group, kind, header, common)
    return used


def _used(case: Case, group: Group, pair: Leaves, header: "_Header | None", common: dict[str, float]) -> Used:
    keys = [group.keys[leaf] for leaf in (pair.down, pair.up, pair.mid, pair.alpha) if leaf in group.keys]
    rank = case.facts.shapes[group.keys[pair.down]][0]
    alpha = case.facts.alphas.get(group.keys.get(pair.alpha, ""))
    if "DoRA" in case.dialect.others and ".dora_scale" in group.keys:
        return Used((*keys, group.keys[".dora_scale"]), None, "DoRA")
    if header is not None:
        scale = header.scale(group.layer, rank)
    elif group.layer[0] in common and (alpha is None or not _keeps_alpha(case, group.layer)):
        scale = common[group.layer[0]] / rank
    elif alpha is None or (alpha == 0 and case.dialect.zero_is_rank):
        scale = 1.0
    else:
        scale = alpha / rank
    return Used(tuple(keys), scale)


def _keeps_alpha(case: Case, layer: LayerKey) -> bool:
    pattern = dict(case.dialect.own_alpha).get(layer[0])
    return pattern is not None and re.fullmatch(pattern, layer[1]) is not None


def _common_alphas(case: Case) -> dict[str, float]:
    """The most frequent alpha of each component; of equally frequent ones the first that the tool meets."""
    common: dict[str, float] = {}
    for part in case.family.parts:
        stems = [key.partition(".")[0] for key in case.keys_of(part) if key.endswith(".lora_down.weight")]
        if part == "unet" and case.originals and not case.both_namings():
            stems.sort(key=_block_order)
        alphas = [
            case.facts.alphas[f"{stem}.alpha"] for stem in stems if f"{stem}.alpha" in case.facts.alphas
        ]
        if alphas:
            common[part] = Counter(alphas).most_common(1)[0][0]
    return common


def _block_order(stem: str) -> tuple[int, int]:
    """diffusers sorts original names by block; what lies in none, conv_in included, comes first."""
    match = re.match(r"lora_unet_(input_blocks|middle_block|output_blocks)_(\d+)", stem)
    if match is None or stem.startswith("lora_unet_input_blocks_0_0"):
        return 0, 0
    return 1 + ("input_blocks", "middle_block", "output_blocks").index(match[1]), int(match[2])


class _Header:
    """The header's arguments of a PEFT LoraConfig, as diffusers and PEFT apply them."""

    def __init__(self, values: dict[str, Any], case: Case):
        self.values, self.case = values, case

    def _real_name(self, layer: LayerKey) -> str:
        """A layer's name in the model: text encoders without a projection lost the `text_model.` level."""
        part, path = layer
        flat = part != "unet" and (part, "text_projection") not in self.case.layout
        return path.removeprefix("text_model.") if flat else path

    def targets(self, layer: LayerKey) -> bool:
        """Whether PEFT adapts the layer: in the UNet whatever the file holds, else what the header lists."""
        wanted = self.values.get(f"{layer[0]}.target_modules")
        if layer[0] == "unet" or not isinstance(wanted, list):
            return True
        return any(f".{self._real_name(layer)}".endswith(f".{name}") for name in wanted)

    def scale(self, layer: LayerKey, rank: int) -> float:
        """The layer's scale; PEFT takes 8 for a rank or an alpha that the header does not give."""
        part = layer[0]
        if self._number("rank_pattern", "r", layer) != rank:
            raise Refused(f"it fails at {'.'.join(layer)}, whose rank {rank} is not the one in the header")
        root = rank**0.5 if self.values.get(f"{part}.use_rslora") is True else rank
        return self._number("alpha_pattern", "lora_alpha", layer) / root

    def _number(self, patterns: str, default: str, layer: LayerKey) -> float:
        part, name = layer[0], self._real_name(layer)
        number = self.values.get(f"{part}.{default}", 8)
        for pattern, own in (self.values.get(f"{part}.{patterns}") or {}).items():
            plain = pattern.removesuffix("$").replace("\\.", ".")
            whole = plain.startswith("^")
            if name == plain[1:] if whole else f".{name}".endswith(f".{plain}"):
                number = own
                break
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise Refused(f"it fails at the header's {part}.{default}, which is not a number")
        return float(number)


def _header(case: Case) -> _Header | None:
    """The file's own header, None without one.

    Raises:
        Refused: it cannot be read, or it contradicts the tensors.
    """
    if not case.facts.metadata.get(HEADER_KEY):
        return None
    try:
        values = header_values(case.facts.metadata)
    except AdapterFileError as error:
        raise Refused(f"it fails at the header: {str(error).rstrip('.')}") from error
    if case.dialect.alphas == "component" and case.facts.alphas:
        raise Refused("it refuses files that have alphas both among the tensors and in the header")
    for part in case.family.parts:
        if case.keys_of(part) and not values.get(f"{part}.target_modules"):
            raise Refused(f"it fails at {part}, about which the header says nothing")
    return _Header(values, case)
