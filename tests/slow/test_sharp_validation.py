"""Whether validation's error bars are true and small: many sets of pictures that no training saw, in the
demo's style, drawn and printed as the demo's own were."""

import statistics
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_core.data.dataset import open_dataset
from lora_core.data.images import ImageRecord
from lora_core.evaluate.validator import EvalImage, EvalNoise, encode_eval_images, eval_losses, paired_gain
from lora_core.formats.io import load_adapter
from lora_core.lora.weights import AdapterWeights, LoadedLora, Merger
from lora_core.model_files.starting_settings import starting_settings
from lora_core.models.encode import encode_prompt
from lora_core.models.load import BaseModel, load_base
from lora_core.models.unet import PromptEmbeds
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.train.trainer import train

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo"
SETS, PICTURES, LOOKS = 40, 20, 4
DIVISIONS = 200

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("single_thread")]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base("demo", torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterWeights]:
    """The demo's adapter as it begins to gain, and at its end."""
    home = tmp_path_factory.mktemp("runs")
    never = {"sample.every": 0, "validation.every": 0}
    found = {}
    for name, changes in (("early", {"train.steps": 8, "optimizer.lr": 5e-4}), ("end", {})):
        settings = {**starting_settings("demo", None), **never, **changes, "name": name}
        run = RunFolder.create(home / "runs" / name, RunConfig().changed(settings))
        with run.hold(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = train(run, None, lambda event: None)
        assert outcome.export is not None
        found[name] = load_adapter(outcome.export)
    return found


@pytest.fixture(scope="module")
def population(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> list[ImageRecord]:
    """800 pictures, each of another thing or on another ground than all others; none is in the demo."""
    sys.path[:0] = [str(DEMO), str(DEMO.parent / "base" / "make")]
    import make
    from catalog import BACKGROUNDS, THINGS, caption
    from painter import load_base as opened
    from painter import paint

    folder = tmp_path_factory.mktemp("population")
    known = set(make.TRAIN.items())
    both = [(thing, ground) for thing in THINGS for ground in BACKGROUNDS if (thing, ground) not in known]
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(1)).tolist()
    chosen = [both[index] for index in order[: SETS * PICTURES]]
    drawn = paint(
        opened(make.BASE), [caption(thing, make.DRAWN_AS, ground) for thing, ground in chosen], 90_000
    )
    grain = np.random.default_rng(0)
    for number, ((thing, ground), picture) in enumerate(zip(chosen, drawn, strict=True)):
        stem = folder / f"{number:03d}"
        make.dusk_print(picture, grain).save(stem.with_suffix(".png"))
        stem.with_suffix(".txt").write_text(caption(thing, make.TRIGGER, ground), encoding="utf-8")
    return open_dataset(str(folder), folder / "cache").records


def losses(base: BaseModel, pictures: list[EvalImage], adapter: AdapterWeights | None) -> torch.Tensor:
    def condition(caption: str) -> PromptEmbeds:
        return encode_prompt(base, [caption])

    merger = Merger(base.modules)
    merger.apply([LoadedLora(adapter)] if adapter else [])
    try:
        return eval_losses(base, pictures, condition)
    finally:
        merger.apply([])


def test_the_stated_error_is_the_true_one(
    base: BaseModel, adapters: dict[str, AdapterWeights], population: list[ImageRecord]
) -> None:
    """Of 40 disjoint sets at least 36 lie within two stated errors of their mean. How many depends on which
    pictures share a set: the first division is told, and the mean over many is what is asserted."""
    generator = torch.Generator().manual_seed(7)
    for name, adapter in adapters.items():
        pictures = encode_eval_images(base, population, LOOKS, seed=3)
        gained = [losses(base, pictures, None), losses(base, pictures, adapter)]
        orders = [torch.arange(SETS * PICTURES)]
        orders += [torch.randperm(SETS * PICTURES, generator=generator) for _ in range(DIVISIONS)]
        found = [calibration([part[order] for part in gained]) for order in orders]
        (first, ratio), insides = found[0], [inside for inside, _ in found[1:]]
        mean, stated = statistics.mean(insides), statistics.mean(stated for _, stated in found[1:])
        enough = statistics.mean(inside >= 36 for inside in insides)
        sys.stdout.write(
            f"\n{name}: of {SETS} sets {first} lie within 2 errors, stated / true {ratio:.2f}; over"
            f" {DIVISIONS} other divisions {mean:.1f} and {stated:.2f}, 36 or more in {enough:.0%} of them\n"
        )
        assert mean >= 36
        assert 0.8 <= stated <= 1.25


def calibration(gained: list[torch.Tensor]) -> tuple[int, float]:
    """How many sets lie within two stated errors of the mean of all, and the stated error by the true one."""
    sets = [
        paired_gain(*(part[start : start + PICTURES] for part in gained))
        for start in range(0, SETS * PICTURES, PICTURES)
    ]
    gains, errors = torch.tensor([(g.gain, g.standard_error) for g in sets]).T
    inside = int(((gains - gains.mean()).abs() <= 2 * errors).sum())
    return inside, float(errors.square().mean().sqrt() / gains.std())


@pytest.mark.parametrize(("name", "most"), [("early", 0.25), ("end", 0.5)])
def test_pairs_are_sharper_than_losses_that_are_not_paired(
    base: BaseModel, adapters: dict[str, AdapterWeights], name: str, most: float
) -> None:
    """How far a gain strays that is measured again and again on the same pictures with the same number of
    UNet
    calls: on the fixed kind of looks, and from two losses with looks of their own, timesteps and noise drawn
    freely, as trainers that show a validation loss draw them."""
    records = open_dataset(str(DEMO / "held_out"), DEMO / "none").records
    generator = torch.Generator().manual_seed(5)

    def free(picture: EvalImage) -> EvalImage:
        steps = torch.randint(0, base.noise.num_timesteps, (8,), generator=generator)
        noise = torch.randn(8, *picture.latents.shape, generator=generator)
        return EvalImage(picture.latents, EvalNoise(steps, noise), picture.caption, picture.sizes)

    paired, unpaired, shares = [], [], []
    for seed in range(12):
        pictures = encode_eval_images(base, records, 8, seed)
        gain = paired_gain(losses(base, pictures, None), losses(base, pictures, adapters[name]))
        paired.append(gain.gain)
        shares.append(gain.gain / gain.base_loss)
        before, after = (
            losses(base, [free(picture) for picture in pictures], adapter).mean()
            for adapter in (None, adapters[name])
        )
        unpaired.append(float(before - after))
    spreads = statistics.stdev(paired), statistics.stdev(unpaired)
    share = statistics.mean(shares)
    sys.stdout.write(f"\n{name}: gain {share:.1%}, paired {spreads[0]:.5f}, unpaired {spreads[1]:.5f}\n")
    assert spreads[0] <= most * spreads[1]
    if name == "early":
        assert 0 < share <= 0.1
