"""Images of the class in a `reg` folder: how often they come, what they count, and under which captions."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_core.data.concepts import repeat_reg
from lora_core.data.dataset import apply_settings, scan
from lora_core.data.images import Bucket, ImageRecord
from lora_core.evaluate.validator import weigh_latents
from lora_core.model_files.families import FAMILIES
from lora_core.runs import events
from lora_core.runs.preflight import preflight
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import DatasetSection
from lora_core.train.data import Batches
from lora_core.train.setup import assign_buckets, sample_prompts
from tests.train.runs import RANDOM, Toy, broken_at, result, trained
from tests.train.test_batches import Numbers


def records(count: int, repeats: int = 1) -> list[ImageRecord]:
    return [ImageRecord(Path(f"{n}.png"), 64, 64, "", repeats, reg=True) for n in range(count)]


@pytest.mark.parametrize(
    ("count", "repeats", "looks", "expected"),
    # Worked out by hand after kohya's loop: each once with its repeats, then one more each, in turn.
    [
        (3, 1, 8, [3, 3, 2]),
        (3, 2, 8, [3, 3, 2]),
        (4, 1, 4, [1, 1, 1, 1]),
        (6, 1, 4, [1, 1, 1, 1]),
        (2, 5, 7, [5, 5]),
        (0, 1, 5, []),
    ],
)
def test_class_images_come_as_often_as_the_others(
    count: int, repeats: int, looks: int, expected: list[int]
) -> None:
    assert [one.repeats for one in repeat_reg(records(count, repeats), looks)] == expected


def test_half_of_an_epoch_is_class_images_without_the_trigger_and_with_their_weight(tmp_path: Path) -> None:
    for name, caption in (("10_cat/a.png", "on a mat"), ("reg/1_cat/b.png", ""), ("reg/1_cat/c.png", "two")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(path)
        path.with_suffix(".txt").write_text(caption) if caption else None
    dataset = scan(tmp_path)
    assert [(one.path.name, one.caption) for one in dataset.reg] == [("b.png", "cat"), ("c.png", "two")]
    assert (dataset.problems, dataset.notes) == ([], [])
    config = RunConfig().changed({"dataset.reg_weight": 0.25})
    reg = repeat_reg(apply_settings(dataset.reg, config), 10)
    items = assign_buckets([*apply_settings(dataset.records, config), *reg], 64, 8)

    class Square(Numbers):
        def latents(self, record: ImageRecord, bucket: Bucket, flip: bool) -> torch.Tensor:
            return torch.zeros(4, 8, 8)

    rules = DatasetSection(caption_dropout=0.0, trigger="zwx")
    batches = Batches(items, Square(), rules, 2, 0)  # type: ignore[arg-type]
    seen = []
    for number in range(10):
        batch = batches.batch(number)
        weights = torch.ones(2, 1, 8, 8) if batch.weights is None else batch.weights
        seen += zip(batch.names, batch.captions, weights.mean((1, 2, 3)).tolist(), strict=True)
    assert sorted(seen) == [
        *[("a.png", "zwx, on a mat", 1.0)] * 10, *[("b.png", "cat", 0.25)] * 5, *[("c.png", "two", 0.25)] * 5,
    ]  # fmt: skip


def test_the_weight_of_a_class_image_goes_with_its_mask(tmp_path: Path) -> None:
    mask = tmp_path / "m.png"
    Image.linear_gradient("L").resize((64, 64)).save(mask)
    record = ImageRecord(tmp_path / "a.png", 64, 64, "", mask=mask, outside=0.5)
    plain = weigh_latents(record, Bucket(64, 32), 8)
    weighed = weigh_latents(replace(record, weight=3.0), Bucket(64, 32), 8)
    assert plain is not None
    assert weighed is not None
    torch.testing.assert_close(weighed, 3.0 * plain)
    alone = weigh_latents(replace(record, mask=None, weight=3.0), Bucket(64, 32), 8)
    assert alone is not None
    assert torch.equal(alone, torch.full((1, 4, 8), 3.0))


def test_a_run_with_class_images_that_was_broken_off_ends_with_the_same_bits(
    own_toy: Toy, tmp_path: Path
) -> None:
    pictures = shutil.copytree(own_toy.pictures, tmp_path / "pictures")
    place = replace(own_toy, pictures=pictures)
    short = {"train__steps": 2, "dataset__reg_weight": 0.5}
    without = place.run("without", **short)
    trained(without)
    shutil.copytree(own_toy.pictures, pictures / "reg" / "1_dot")
    changes = {name.replace(".", "__"): value for name, value in RANDOM.items()}
    more = {"train__steps": 4, "save__every": 2, "dataset__reg_weight": 0.5}
    whole, broken = (place.run(name, **changes, **more) for name in ("whole", "broken"))
    with_them, off, before = (place.run(name, **short) for name in ("with them", "off", "before"))
    text = before.config_file.read_text()
    # A run of a version that left such images out, and one that says so in the words of another.
    before.config_file.write_text(text.replace("reg_weight = 0.5\n", ""))
    off.config_file.write_text(text.replace("reg_weight = 0.5\n", "ignore_unused = true\n"))
    for run in (whole, with_them, before, off):
        trained(run)
    broken_at(broken, events.StepDone, 3)
    trained(broken)
    assert result(broken) == result(whole)
    assert result(before)["export"] == result(off)["export"] == result(without)["export"]
    assert result(with_them)["export"] != result(without)["export"]


def test_a_sample_shows_the_class_without_the_trigger_where_it_is_to_stay() -> None:
    one, two = (ImageRecord(Path(f"{n}.png"), 64, 64, f"zwx cat, {n}") for n in ("sitting", "asleep"))
    reg = [replace(record, caption="a cat", reg=True) for record in records(2)]
    config = RunConfig().changed({"dataset.trigger": "zwx"})

    def prompts(of: list[ImageRecord], reg: list[ImageRecord], **changes: object) -> list[str]:
        found = config.changed({name.replace("__", "."): value for name, value in changes.items()})
        return sample_prompts(found, of, FAMILIES["sd15"], reg)

    assert prompts([one, two], []) == ["zwx cat, sitting", "zwx cat, asleep"]
    assert prompts([one, two], reg) == ["zwx cat, sitting", "a cat"]
    assert prompts([one], [], loss__prior_preservation=1.0) == ["zwx cat, sitting", "cat, sitting"]
    # Without a caption there is nothing to show, and a user's own prompts are all that is asked for.
    assert prompts([one, two], records(2)) == prompts([one, two], [])
    assert prompts([one, two], reg, sample__prompts=["a hat"]) == ["zwx, a hat"]


def test_what_class_images_do_is_said_before_the_start(own_toy: Toy, tmp_path: Path) -> None:
    pictures = shutil.copytree(own_toy.pictures, tmp_path / "pictures")
    config = RunConfig().changed({"dataset.path": str(pictures), "model.base": "demo"})

    def said(**changes: object) -> list[str]:
        found = config.changed({name.replace("__", "."): value for name, value in changes.items()})
        problems = preflight(found, tmp_path, card=lambda: None)
        return [one.sentence for one in problems if one.kind == "regularisation"]

    assert said() == []
    assert said(dataset__reg_weight=0.5) == [
        "dataset.reg_weight has no effect: there is no folder `reg` with images of the class."
    ]
    (pictures / "reg").mkdir()
    for number in range(6):
        shutil.copy(pictures / "0.png", pictures / "reg" / f"{number}.png")
    assert said(dataset__reg_weight=0.5) == [
        "Half of the steps show the first 4 of 6 images for regularisation, which count 0.5"
        " (dataset.reg_weight)."
    ]
    unused = "The dataset has 6 images for regularisation, not used, as dataset.reg_weight is 0."
    assert said(dataset__reg_weight=0) == said(dataset__ignore_unused=True) == [unused]
    assert said(dataset__ignore_unused=False) == said()
