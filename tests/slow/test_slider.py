"""Concept sliders on the embedded base: what they are to change follows the strength in both directions, on
20 seeds, and what they are not to change stays nearer to the base than after the demo's training."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_core import api
from lora_core.generate.pipeline import open_pipeline
from lora_core.generate.request import GenerationRequest, WeightedLora
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.settings.schema import SLIDER_STRENGTHS
from lora_core.tools.svd import truncate_adapter

SEEDS = range(20)
THINGS = ["dog, noto style", "car, noto style", "apple, noto style", "house, noto style"]
UNSEEN = "tree, noto style"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(home: Path, dataset: str = "", **settings: object) -> RunFolder:
    changes = {name.replace("__", "."): value for name, value in settings.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        api.train(dataset, dataset or "slider", {"sample.every": 0, **changes}, workspace=home)
    return RunFolder.open(home / "runs" / (dataset or "slider"))


def forgetting(run: RunFolder) -> float:
    """How much worse the base's own images are predicted at the end, as a share of the base's loss."""
    last = [event for event in events.read_events(run.events_file)[0] if isinstance(event, events.Validated)][
        -1
    ]
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
        slider__preserve=THINGS,
    )  # fmt: skip
    means = brightness(next(run.exports.glob("*.safetensors")), UNSEEN)
    assert (np.diff(means.mean(0)) > 0).all(), means.mean(0)
    demo = trained(tmp_path, "demo")
    assert forgetting(run) < forgetting(demo)
