"""Concept sliders on the embedded base: what they are to change follows the strength in both directions, on
20 seeds, and what they are not to change stays nearer to the base than after the demo's training."""

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from lora_core import api
from lora_core.generate.pipeline import open_pipeline
from lora_core.generate.request import GenerationRequest, WeightedLora
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.settings.schema import SLIDER_STRENGTHS
from lora_core.tools.svd import truncate_adapter

SEEDS = range(20)
TARGET = "palm tree, noto style"
ALONE = [
    "fox, noto style, on a pink background", "cake, noto style, on a grey background",
    "key, noto style, on a white background", "owl, noto style, on a sky blue background",
    "drum, noto style, on a black background", "castle, noto style",
]  # fmt: skip
"""None of them is among the prompts that forgetting is measured on."""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("single_thread")]


def trained(home: Path, dataset: str = "", **settings: object) -> RunFolder:
    changes = {name.replace("__", "."): value for name, value in settings.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        api.train(dataset, dataset or "slider", {"sample.every": 0, **changes}, workspace=home)
    return RunFolder.open(home / "runs" / (dataset or "slider"))


def forgetting(run: RunFolder) -> float:
    """How much worse the base's own images are predicted at the end."""
    story = events.read_events(run.events_file)[0]
    *_, last = (event for event in story if isinstance(event, events.Validated))
    return -last.prior


def brightness(file: Path, prompt: str) -> np.ndarray:
    """The mean of all pixels, 0 to 255: (seeds, strengths)."""
    draw = open_pipeline(GenerationRequest(), truncate_adapter)
    rows = []
    for seed in SEEDS:
        shots = (
            GenerationRequest(prompt=prompt, seed=seed, cfg=3.0, loras=(WeightedLora(str(file), strength),))
            for strength in SLIDER_STRENGTHS
        )
        rows.append([float(np.asarray(draw(shot)).mean()) for shot in shots])
    return np.array(rows)


def test_a_slider_of_brightness(tmp_path: Path) -> None:
    run = trained(
        tmp_path, slider__positive="on a white background", slider__negative="on a black background",
        slider__target=[TARGET], slider__preserve=ALONE,
    )  # fmt: skip
    means = brightness(next(run.exports.glob("*.safetensors")), TARGET)
    assert (np.diff(means.mean(0)) > 0).all(), means.mean(0)
    assert (np.diff(means, axis=1) > 0).mean() > 0.95
    demo = trained(tmp_path, "demo")
    sys.stdout.write(f"mean of all pixels {means.mean(0).round(1)} at strengths {SLIDER_STRENGTHS}\n")
    sys.stdout.write(f"forgotten {forgetting(run):.4f}, after the demo {forgetting(demo):.4f}\n")
    assert forgetting(run) < forgetting(demo)
