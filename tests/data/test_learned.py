"""What will be learned: attributes on pictures made for them, and shares against a counted epoch."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lora_core.data.audit import (
    TrainingView,
    audit,
    find_attributes,
    name_colour,
    reduce_image,
    report_bias,
    step_shares,
)
from lora_core.data.concepts import repeat_reg
from lora_core.data.dataset import scan
from lora_core.data.images import ImageRecord
from lora_core.settings.schema import DatasetSection
from lora_core.train.data import Batches
from lora_core.train.setup import assign_buckets


def subject(seed: int, background: str = "white", size: tuple[int, int] = (96, 96)) -> Image.Image:
    """A few bars of random colours and places, which leave the edge free."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", size, background)
    for _ in range(6):
        left, top = random.integers(14, 50, 2).tolist()
        wide, high = random.integers(8, 30, 2).tolist()
        fill = tuple(random.integers(0, 256, 3).tolist())
        ImageDraw.Draw(image).rectangle((left, top, left + wide, top + high), fill=fill)
    return image


def noise(seed: int, low: int = 0, high: int = 256) -> Image.Image:
    values = np.random.default_rng(seed).integers(low, high, (24, 24, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((96, 96), Image.Resampling.NEAREST)


def framed(seed: int) -> Image.Image:
    image = Image.new("RGB", (96, 96), (20, 20, 20))
    image.paste(noise(seed, 120).resize((84, 84)), (6, 6))
    return image


def names(images: list[Image.Image], share: float = 1.0) -> set[str]:
    found = find_attributes([reduce_image(image) for image in images])
    return {one.name for one, members in found.items() if len(members) >= share * len(images)}


@pytest.mark.parametrize(
    ("images", "wanted"),
    [
        ([subject(n) for n in range(6)], {"white background"}),
        (
            [subject(n, "navy") for n in range(6)],
            {"blue background", "blue colours", "vivid colours", "dark"},
        ),
        ([noise(n, 80, 200) for n in range(6)], set()),
        ([noise(n).convert("L").convert("RGB") for n in range(6)], {"black and white"}),
        ([noise(n, 0, 100) for n in range(6)], {"dark"}),
        ([framed(n) for n in range(6)], {"frame"}),
    ],
)
def test_what_pictures_have_in_common(images: list[Image.Image], wanted: set[str]) -> None:
    assert {name for name in names(images) if name not in ("bright", "composition")} == wanted


def test_one_colour_and_one_composition() -> None:
    orange = np.array([255, 140, 20]) / 255
    images = [
        Image.fromarray((np.asarray(noise(n), dtype=float) * orange).astype(np.uint8)) for n in range(6)
    ]
    assert "orange colours" in names(images)
    same = [Image.blend(subject(3, "grey"), noise(n), 0.2) for n in range(6)]
    assert "composition" in names(same)
    assert "composition" not in names([noise(n) for n in range(6)], 0.5)


@pytest.mark.parametrize(
    ("colour", "name"),
    [
        # CSS colours of these names.
        ((255, 255, 255), "white"), ((0, 0, 0), "black"), ((128, 128, 128), "grey"), 
        ((255, 0, 0), "red"), ((255, 165, 0), "orange"), ((255, 255, 0), "yellow"), ((0, 128, 0), "green"),
        ((64, 224, 208), "turquoise"), ((0, 0, 205), "blue"), ((128, 0, 128), "pink"),
        ((101, 67, 33), "brown"),
        ((245, 245, 220), "white"), ((255, 228, 181), "beige"),
    ],
)  # fmt: skip
def test_names_of_colours(colour: tuple[int, int, int], name: str) -> None:
    assert name_colour(np.array(colour, dtype=float)) == name


def rows_of(captions: list[str], trigger: str = "sks", background: str = "white") -> list[dict[str, Any]]:
    records = [ImageRecord(Path(f"{n}.png"), 96, 96, caption) for n, caption in enumerate(captions)]
    thumbs = [reduce_image(subject(n, background)) for n in range(len(captions))]
    rows = report_bias(records, [r.path.name for r in records], thumbs, TrainingView(64, 8, trigger=trigger))
    json.dumps(rows)
    return rows


def named(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in rows if row["name"] == name)


def test_what_most_pictures_show_and_few_captions_say_goes_to_the_trigger() -> None:
    captions = ["sks cat"] * 11 + ["sks cat on a white background"]
    row = named(rows_of(captions), "white background")
    assert row["kind"] == "absorbed"
    assert row["counts"] == {"pictures": 12, "captions": 1, "of": 12}
    assert row["pictures"] == [f"{n}.png" for n in range(11)]
    assert "12 of 12 images have a white background, 11 of them without saying so" in row["sentence"]
    assert "learned with “sks”" in row["sentence"]


def test_what_captions_say_stays_with_its_words() -> None:
    row = named(rows_of(["a cat, plain background"] * 11 + ["a cat"]), "white background")
    assert (row["kind"], row["pictures"]) == ("named", [])
    half = named(rows_of(["a cat, plain background", "a cat"] * 6), "white background")
    assert (half["kind"], len(half["pictures"])) == ("absorbed", 6)


def test_words_that_come_to_mean_something_else_and_the_odd_one_out() -> None:
    captions = ["sks cat on a navy background"] * 5 + ["sks cat, plain background"]
    row = named(rows_of(captions, background="beige"), "navy")
    # CSS's beige is so pale that it counts as white.
    assert (row["kind"], row["counts"]) == ("meaning", {"captions": 5, "pictures": 5})
    assert (
        "“navy background” will come to mean white: 5 of the 5 images with these words have a white one"
        in row["sentence"]
    )
    # Blue and navy are one colour: nothing to say.
    assert [r["kind"] for r in rows_of(captions, background="navy") if r["name"] == "navy"] == []

    records = [ImageRecord(Path(f"{n}.png"), 96, 96, "sks on a white background") for n in range(6)]
    thumbs = [reduce_image(subject(n, "green" if n == 4 else "white")) for n in range(6)]
    rows = report_bias(records, [r.path.name for r in records], thumbs, TrainingView(64, 8))
    (odd,) = [row for row in rows if row["kind"] == "odd"]
    assert odd["pictures"] == ["4.png"]
    assert "says “white background”, but it has a green one; the other 5" in odd["sentence"]


def test_words_that_prompts_can_move() -> None:
    captions = ["sks cat, red hat"] * 4 + ["sks cat, asleep"] * 4
    (row,) = [row for row in rows_of(captions) if row["kind"] == "wording"]
    # "cat" stands in all: no prompt was seen without it.
    assert row["name"] == "asleep (4), hat (4), red (4)"
    (row,) = [row for row in rows_of(["sks cat"] * 8) if row["kind"] == "wording"]
    assert "No word" in row["sentence"]


def test_too_few_pictures_have_nothing_in_common() -> None:
    assert rows_of(["sks cat"] * 4) == []


RECORDS = [
    ImageRecord(Path("a.png"), 64, 64, "", repeats=3), ImageRecord(Path("b.png"), 64, 64, ""),
    ImageRecord(Path("c.png"), 64, 64, ""), ImageRecord(Path("d.png"), 64, 128, ""),
    ImageRecord(Path("e.png"), 128, 64, ""), ImageRecord(Path("f.png"), 128, 64, "", repeats=2),
]  # fmt: skip


class NoLatents:
    def latents(self, record: ImageRecord, bucket: object, flip: bool) -> Any:
        import torch

        return torch.zeros(4, 1, 1)


REG = [
    ImageRecord(Path("r.png"), 64, 64, "", reg=True), ImageRecord(Path("s.png"), 64, 128, "", reg=True),
    ImageRecord(Path("t.png"), 96, 64, "", reg=True),
]  # fmt: skip


@pytest.mark.parametrize(("batch", "reg"), [(1, []), (2, []), (4, []), (5, []), (4, REG)])
def test_shares_are_those_of_a_run(batch: int, reg: list[ImageRecord]) -> None:
    items = assign_buckets([*RECORDS, *repeat_reg(reg, 9)], 64, 8)
    rules = DatasetSection(caption_dropout=0.0)
    batches = Batches(items, NoLatents(), rules, batch, 0)  # type: ignore[arg-type]
    epochs = 200
    counted: Counter[str] = Counter()
    for number in range(epochs * batches._batches_per_epoch):
        counted.update(batches.batch(number).names)
    shares = step_shares(RECORDS, TrainingView(64, 8, batch_size=batch, reg=reg))
    assert reg or sum(shares) == pytest.approx(1)
    total = counted.total()
    real = {record.path.name: counted[record.path.name] / total for record in RECORDS}
    # A bucket's share is the same in each epoch; within it the fill is drawn, so it is so on average.
    for members in (RECORDS[:3], RECORDS[3:4], RECORDS[4:]):
        ours = sum(shares[RECORDS.index(record)] for record in members)
        assert sum(real[record.path.name] for record in members) == pytest.approx(ours)
    for record, share in zip(RECORDS, shares, strict=True):
        assert real[record.path.name] == pytest.approx(share, abs=0.02)


def test_a_picture_alone_in_its_bucket_is_told() -> None:
    training = TrainingView(64, 8, batch_size=4)
    rows = report_bias(RECORDS, [r.path.name for r in RECORDS], [None] * 6, training)
    assert [(row["kind"], row["name"]) for row in rows] == [
        ("bucket", "64 x 64"), ("bucket", "40 x 80"), ("bucket", "80 x 40"),
    ]  # fmt: skip
    assert "its batches shows it 4 times" in rows[1]["sentence"]
    assert "makes up over half of the samples of size 64 x 64, by its 3 repeats" in rows[0]["sentence"]


def test_a_picture_with_many_steps_is_told() -> None:
    records = [ImageRecord(Path(f"{n}.png"), 64, 64, "", repeats=1 + 5 * (n == 2)) for n in range(5)]
    (row,) = report_bias(records, [r.path.name for r in records], [None] * 5, TrainingView(64, 8))
    assert (row["kind"], row["pictures"]) == ("share", ["2.png"])
    # Six looks of ten, and an even share is one of five.
    assert row["counts"] == {"share": pytest.approx(0.6), "even": 0.2}
    assert "60% of all steps, 3.0 times an even share, by its 6 repeats" in row["sentence"]


def test_held_out_pictures_get_no_share(tmp_path: Path) -> None:
    for number in range(3):
        subject(number).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a")
    dataset = scan(tmp_path)
    out = frozenset({tmp_path / "1.png"})
    shares = [row["share"] for row in audit(dataset, TrainingView(64, 8, held_out=out))["shares"]]
    assert shares == [0.5, 0.0, 0.5]
