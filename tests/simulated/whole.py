"""A whole run at a family's true shapes on a simulated card, from a single file to the export.

    python -m tests.simulated.whole sdxl [--gib 7] [--set NAME=VALUE ...]

The base has no weights, and the run has two steps; nothing else is cut: it validates before and after, draws
samples, saves and exports. Prints how it ended, its peak in GiB, what was done to fit, and what was
predicted. A minute or two.
"""

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image

from lora_core.data.dataset import scan
from lora_core.model_files.detect import read_base_facts
from lora_core.model_files.families import FAMILIES
from lora_core.model_files.sizes import CONTEXT, fit_on_card
from lora_core.runs.folder import RunFolder
from lora_core.runs.preflight import captions_vary
from lora_core.settings.config import RunConfig, parsed_assignment
from tests.app.bases import write_header
from tests.checkpoints import original_names
from tests.simulated.device import GIB, SimulatedDevice
from tests.simulated.footprints import components
from tests.train.runs import notes, trained

SHORT = {"train.steps": 2, "sample.steps": 1, "save.every": 2}


def base_file(path: Path, name: str) -> Path:
    """A single file of a family's true shapes, whose weights are a hole in the file."""
    family = FAMILIES[name]
    unet, vae, encoders = components(family)
    parts = {"unet": unet, "vae": vae}
    parts |= {row.part: encoder for row, encoder in zip(family.text_encoders, encoders, strict=True)}
    shapes = {}
    for part, module in parts.items():
        state = {key: torch.empty(weight.shape, device="meta") for key, weight in module.named_parameters()}
        shapes |= {key: list(found.shape) for key, found in original_names(part, state, family).items()}
    return write_header(path, shapes)


@contextlib.contextmanager
def blank_on_processor(*names: str) -> Iterator[None]:
    """Have a VAE on the processor, which takes minutes for an image of its true size, give blank ones."""

    def wrapped(decode: Callable[..., Any]) -> Callable[..., Any]:
        def blank(vae: Any, latents: torch.Tensor) -> Any:
            count, _, height, width = latents.shape
            image = torch.zeros(count, 3, height * 8, width * 8)
            return SimpleNamespace(sample=image) if latents.device.type == "cpu" else decode(vae, latents)

        return blank

    with contextlib.ExitStack() as stack:
        for name in names:
            blank = wrapped(getattr(AutoencoderKL, name))
            stack.enter_context(mock.patch.object(AutoencoderKL, name, blank))
        yield


def whole_run(folder: Path, name: str, gib: float, **changes: Any) -> dict[str, Any]:
    """Train a family with its default settings and `changes` on a card of `gib`."""
    pictures = folder / "pictures"
    pictures.mkdir()
    side = FAMILIES[name].resolution
    for number in range(4):
        Image.new("RGB", (side, side), (60 * number, 0, 0)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"a square, number {number}, plain")
    base = base_file(folder / f"{name}.safetensors", name)
    # Of a single file of SD 2 alone, headers do not tell 512 px from 768 px.
    prediction = FAMILIES[name].prediction
    settings = {
        "name": name, "model.base": str(base), "dataset.path": str(pictures), "model.prediction": prediction,
    }  # fmt: skip
    config = RunConfig().changed({**FAMILIES[name].settings, **SHORT, **settings, **changes})
    run = RunFolder.create(folder / "runs" / name, config)
    began = time.monotonic()
    with SimulatedDevice(gib=gib, numbers=False) as card, blank_on_processor("decode", "tiled_decode"):
        try:
            trained(run)
        finally:
            peak = card.peak
    facts, varied = read_base_facts(str(base), prediction), captions_vary(scan(pictures).records, config)
    as_set, fitted = (fit_on_card(config, facts, varied, free) for free in (None, gib * GIB + CONTEXT))
    assert as_set is not None
    assert fitted is not None
    return {
        "status": run.status(), "peak GiB": round(peak / GIB, 2), "GB with context": (peak + CONTEXT) / 1e9,
        "predicted GB": as_set[0] / 1e9, "to fit": fitted[0] / 1e9, "predicted rungs": fitted[1],
        "rungs": json.loads(run.plan_file.read_text())["rungs"], "seconds": round(time.monotonic() - began),
        "notes": notes(run), "validations": len(run.progress().validations),
        "samples": len(run.progress().previews),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.simulated.whole")
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--gib", type=float, default=80)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        found = whole_run(Path(made), given.family, given.gib, **dict(map(parsed_assignment, given.set)))
        print(json.dumps(found, indent=1))  # noqa: T201
