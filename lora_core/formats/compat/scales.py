"""What a tool multiplies each layer by: its own alpha, the component's, or what the header says."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from lora_core.errors import AdapterFileError
from lora_core.formats.compat.dialects import Leaves
from lora_core.formats.compat.reading import Case, Group, Refused, Taken
from lora_core.formats.peft import HEADER_KEY, header_values
from lora_core.lora.weights import LayerKey


@dataclass(frozen=True)
class Used:
    """What a tool does to one layer.

    Attributes:
        keys: of the file, that it takes for the layer.
        scale: of the product of the factors; None for what is no LoRA.
        kind: "LoRA", "LoHa", ...
        norm: what it divides DoRA magnitudes by, as in `Dialect.dora`; "" where it applies none.
        lost: whether it fails at the layer, which then stays as it was.
    """

    keys: tuple[str, ...]
    scale: float | None
    kind: str = "LoRA"
    norm: str = ""
    lost: bool = False


def used_layers(case: Case, taken: Taken) -> dict[LayerKey, Used]:
    """Each layer with its keys and scale.

    Raises:
        Refused: header and tensors contradict each other, at which the tool fails.
    """
    header = _header(case) if case.dialect.alphas != "own" else None
    common = _common_alphas(case) if case.dialect.alphas == "component" else {}
    if case.dialect.spelled and header is None:
        _check_projection(case, taken)
    used: dict[LayerKey, Used] = {}
    for layer, (group, kind) in taken.items():
        if isinstance(kind, str):
            lost = case.dialect.tucker_lokr == "lost" and ".lokr_t2" in group.keys
            norm = case.dialect.dora if ".dora_scale" in group.keys else ""
            used[layer] = Used(tuple(group.keys.values()), None, kind, norm, lost)
        elif header is None or header.targets(layer):
            used[layer] = _used(case, group, kind, header, common)
    for part in case.family.parts if header else ():
        if case.keys_of(part) and not any(layer[0] == part for layer in used):
            raise Refused(f"it fails at {part}, of which it finds none of the header's target_modules")
    return used


def _check_projection(case: Case, taken: Taken) -> None:
    """diffusers overlooks the rank of a text projection and takes the most frequent one of its encoder."""
    for part in case.family.parts[1:]:
        ranks = {
            layer: case.facts.shapes[group.keys[kind.down]][0]
            for layer in case.layout
            if layer[0] == part and layer in taken
            for group, kind in [taken[layer]]
            if isinstance(kind, Leaves)
        }
        own = ranks.pop((part, "text_projection"), None)
        if own is not None and ranks and own != Counter(ranks.values()).most_common(1)[0][0]:
            raise Refused(
                f"it fails at {part}.text_projection, whose rank {own} is not its encoder's usual one"
            )


def _used(case: Case, group: Group, pair: Leaves, header: "_Header | None", common: dict[str, float]) -> Used:
    keys = [group.keys[leaf] for leaf in (pair.down, pair.up, pair.mid, pair.alpha) if leaf in group.keys]
    rank = case.facts.shapes[group.keys[pair.down]][0]
    alpha = case.facts.alphas.get(group.keys.get(pair.alpha, ""))
    magnitudes = ".lora_magnitude_vector" if case.dialect.alphas == "header" else ".dora_scale"
    norm = case.dialect.dora if magnitudes in group.keys else ""
    if norm:
        keys.append(group.keys[magnitudes])
    if ".diff_b" in group.keys and {"full difference", "bias"} & {*case.dialect.others}:
        keys.append(group.keys[".diff_b"])
    if header is not None:
        scale = header.scale(group.layer, rank)
    elif group.layer[0] in common and (alpha is None or not _keeps_alpha(case, group.layer, keys[0])):
        scale = common[group.layer[0]] / rank
    elif alpha is None or (alpha == 0 and case.dialect.zero_is_rank):
        scale = 1.0
    else:
        scale = alpha / rank
    return Used(tuple(keys), scale, "DoRA" if norm else "LoRA", norm)


def _keeps_alpha(case: Case, layer: LayerKey, key: str) -> bool:
    pattern = dict(case.dialect.own_alpha).get(layer[0])
    if layer[1].startswith("text_model.") and ("text_model" in key) != _has_text_level(case, layer[0]):
        return False
    return pattern is not None and re.fullmatch(pattern, layer[1]) is not None


def _has_text_level(case: Case, part: str) -> bool:
    """Whether a text encoder's own names have the `text_model.` level: only those with a projection still
    do."""
    return (part, "text_projection") in case.layout


def _common_alphas(case: Case) -> dict[str, float]:
    """The most frequent alpha of each component; of equally frequent ones the first that the tool meets."""
    common: dict[str, float] = {}
    for part in case.family.parts:
        stems = [key.partition(".")[0] for key in case.keys_of(part) if key.endswith(".lora_down.weight")]
        if part == "unet" and case.originals:
            stems = _by_block(stems)
        alphas = [
            case.facts.alphas[f"{stem}.alpha"] for stem in stems if f"{stem}.alpha" in case.facts.alphas
        ]
        if alphas:
            common[part] = Counter(alphas).most_common(1)[0][0]
    return common


_BLOCK = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks)_(\d+)_")


def _by_block(stems: list[str]) -> list[str]:
    """Stems with original names in the order in which diffusers translates them.

    What lies in no block comes first, conv_in included; then the blocks, whose numbers it goes through as a
    set of whole numbers gives them out: not always in ascending order.
    """
    places = [None if stem.startswith("lora_unet_input_blocks_0_0") else _BLOCK.match(stem) for stem in stems]
    order: dict[tuple[str, int], int] = {}
    for kind in ("input_blocks", "middle_block", "output_blocks"):
        numbers = set()
        for place in places:
            if place and place[1] == kind:
                numbers.add(int(place[2]))
        order |= {(kind, number): len(order) + index for index, number in enumerate(numbers)}
    ranks = [order[place[1], int(place[2])] if place else -1 for place in places]
    return [stem for _, stem in sorted(zip(ranks, stems, strict=True), key=lambda pair: pair[0])]


class _Header:
    """The header's arguments of a PEFT LoraConfig, as diffusers and PEFT apply them."""

    def __init__(self, values: dict[str, Any], case: Case):
        self.values, self.case = values, case

    def _real_name(self, layer: LayerKey) -> str:
        """A layer's name in the model."""
        return layer[1] if _has_text_level(self.case, layer[0]) else layer[1].removeprefix("text_model.")

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
