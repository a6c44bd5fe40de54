"""Settings read back from a LoRA file: our own header, what kohya's trainer writes, or the layers themselves.

A header comes from anywhere: each value is checked as if a person had typed it, and what cannot be taken is
said.
"""

import re
import tomllib
from collections import Counter
from pathlib import Path

from lora_core.spec.config import FIELDS, RETIRED, flattened, retired
from lora_core.spec.errors import AdapterFileError
from lora_core.spec.kohya_header import from_kohya
from lora_core.spec.like import LONGEST, Like, in_short
from lora_core.spec.tensor_file import Header, read_header

CONFIG_KEY = "lora_easel.config"
PLACES = ("name", "dataset.path", "model.base", "model.vae", "adapter.init")
"""Settings that name files of the machine that the LoRA was made on."""


def like_file(path: Path) -> Like:
    """The settings that a LoRA file was trained with.

    Raises:
        AdapterFileError: it is no such file, or says nothing of its training.
    """
    header = read_header(path)
    texts = header.metadata
    if CONFIG_KEY in texts:
        found = _ours(texts[CONFIG_KEY])
    elif "ss_network_dim" in texts or "ss_network_module" in texts:
        found = from_kohya(texts)
    else:
        found = Like("its layers alone; no settings are written in it")
    if "adapter.rank" not in found.values:
        _from_layers(header, found)
    if not found.values:
        raise AdapterFileError(
            f"{path.name} says nothing of how it was trained, and no layer of it is known."
        )
    return found


def _ours(text: str) -> Like:
    found = Like("the settings that LoRA Easel wrote into it")
    try:
        values = flattened(tomllib.loads(text))
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"The settings in the file cannot be read: {str(error)[:LONGEST]}.") from error
    for name, value in values.items():
        if name in PLACES:
            continue
        if name in FIELDS:
            found.take(name, value)
        elif name in RETIRED:
            found.left += retired([(name, value)])
        else:
            found.left.append(f"{in_short(name)} is a setting that this version does not know.")
    found.base = in_short(values.get("model.base", ""))
    for name in ("model.vae", "adapter.init"):
        if values.get(name) not in (None, "", "default"):
            found.left.append(
                f"{FIELDS[name].metadata['title']} was {in_short(values[name])}; choose it yourself."
            )
    return found


def _from_layers(header: Header, found: Like) -> None:
    """The rank that most layers have, and which layers there are."""
    downs = {
        n: s for n, s in header.shapes.items() if re.search(r"(lora_down|lora_A)(\.\w+)?\.weight$", n) and s
    }
    if not downs:
        return
    rank = Counter(shape[0] for shape in downs.values()).most_common(1)[0][0]
    found.take("adapter.rank", rank)
    if "adapter.targets" not in found.values:
        convolutions = any(len(shape) == 4 and shape[2] > 1 for shape in downs.values())
        forward = any(re.search(r"ff[._]net|mlp[._]fc|proj_in", name) for name in downs)
        found.take("adapter.targets", "locon" if convolutions else "kohya" if forward else "attention")
    if not any("te" in name.split("_")[:2] or "te1" in name or "text" in name for name in downs):
        found.take("optim.text_encoder_lr", 0.0)
    if "adapter.alpha" not in found.values:
        found.left.append("Its alpha is not written in the header; set it to what you used, or to the rank.")
        found.take("adapter.alpha", float(rank))
