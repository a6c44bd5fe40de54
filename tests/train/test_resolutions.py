"""Several resolutions, and what varies an image from look to look: which sizes, parts and colours are shown,
how often, and that a resumed run goes on with the same ones."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from app.dataset.gallery import image_facts
from app.train.form import from_widget_value, to_widget_value
from lora_core.data.audit import TrainingView, step_shares
from lora_core.data.captions import rules_of
from lora_core.data.concepts import balance_looks
from lora_core.data.dataset import (
    apply_settings,
    at_resolutions,
    check_crop,
    num_batches,
    scan,
    write_crops,
)
from lora_core.data.images import (
    Bucket,
    Concept,
    ImageRecord,
    choose_buckets,
    crop_box,
    cut_at_focus,
    vary_colours,
)
from lora_core.errors import ConfigError, DatasetError
from lora_core.model_files.detect import lookup_base
from lora_core.model_files.header import read_header
from lora_core.models.vae import load_pixels
from lora_core.projects.project import Project
from lora_core.runs import events
from lora_core.runs.costs import cost_key, step_passes
from lora_core.runs.preflight import preflight
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import DatasetSection
from lora_core.train.data import Batches
from lora_core.train.setup import all_views, assign_buckets, largest, vary_image
from tests.data.test_concepts import images, written
from tests.train.runs import RANDOM, Toy, broken_at, result, trained
from tests.train.test_concepts import Mirrored


def config_of(**changes: object) -> RunConfig:
    return RunConfig().changed({name.replace("__", "."): value for name, value in changes.items()})


def looks_at(items: list, rules: DatasetSection, size: int, epochs: int = 1) -> Counter[tuple[str, int]]:
    """How often each image is shown at each width, in whole epochs."""
    batches = Batches(items, Mirrored(), rules, size, 0)  # type: ignore[arg-type]
    count = epochs * num_batches([(item.record, item.bucket) for item in items], size)
    seen: Counter[tuple[str, int]] = Counter()
    for batch in map(batches.batch, range(count)):
        seen.update((name, 8 * batch.latents.shape[-1]) for name in batch.names)
    return seen


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        ((2000, 2000), [512, 768, 1024]),
        ((1024, 1024), [512, 768, 1024]),
        ((900, 900), [512, 768, 896]),  # closer to 1024 than to 768
        ((880, 880), [512, 768]),
        ((600, 600), [512]),
        ((200, 200), [192]),
    ],
)
def test_an_image_is_trained_at_the_sizes_that_it_reaches_or_comes_close_to(
    size: tuple[int, int], sides: list[int]
) -> None:
    found = choose_buckets(*size, [1024, 512, 768, 512], 64)
    assert found == [Bucket(side, side) for side in sides]
    assert choose_buckets(*size, [512], 64) == found[:1]


@pytest.mark.parametrize("batch", [1, 3])
def test_each_image_keeps_its_part_of_the_looks_at_whatever_sizes_it_is_shown(batch: int) -> None:
    """Random images with repeats, of which some reach one, two or three sizes; a concept has its own."""
    draw = random.Random(batch)
    own = Concept("own", rules=(("resolutions", (64, 128)),))
    records = [
        ImageRecord(
            Path(f"{n}.png"), side, side, "", draw.choice((1, 1, 2, 5)), concept=draw.choice((None, own))
        )
        for n, side in enumerate(draw.choices((64, 130, 300), k=24))
    ]
    rules = DatasetSection(resolutions=[64, 128, 256], caption_dropout=0.0)
    items = assign_buckets(records, 64, 8, rules=rules)
    for item in items:
        assert item.bucket.width <= max(64, item.record.width)
    seen = looks_at(items, rules, batch, epochs=1 if batch == 1 else 60)
    looks = Counter[str]()
    for (name, _), count in seen.items():
        looks[name] += count
    if batch == 1:
        rounds = sum(looks.values()) / sum(record.repeats for record in records)
        assert looks == {record.path.name: rounds * record.repeats for record in records}
        # As often at each of its sizes.
        for record in records:
            assert len({count for (name, _), count in seen.items() if name == record.path.name}) == 1
    shares = step_shares(records, TrainingView(64, 8, batch_size=batch, rules=rules))
    measured = [looks[record.path.name] / looks.total() for record in records]
    assert measured == pytest.approx(shares, rel=1e-9 if batch == 1 else 0.05)


@pytest.mark.parametrize(("repeats", "parts"), [(2, [1, 1, 2]), (4, [2, 2, 4]), (1, [1, 1, 2])])
def test_repeats_are_divided_among_the_sizes_of_an_image(repeats: int, parts: list[int]) -> None:
    records = [ImageRecord(Path(f"{side}.png"), side, side, "", repeats) for side in (128, 64)]
    views = at_resolutions(records, DatasetSection(resolutions=[64, 128]), 64, 8)
    assert [record.repeats for record, _ in views] == parts


def test_one_resolution_is_an_epoch_of_one_round_and_changes_no_record() -> None:
    records = [ImageRecord(Path(f"{n}.png"), 64 + 8 * n, 64, "", 1 + n) for n in range(5)]
    for rules in (DatasetSection(), DatasetSection(resolutions=[64])):
        views = at_resolutions(records, rules, 64, 8)
        assert [record for record, _ in views] == records
        assert all(one is other for (one, _), other in zip(views, records, strict=True))


def test_a_run_at_several_resolutions_and_crops_is_measured_at_the_largest_and_broken_off_ends_the_same(
    own_toy: Toy,
) -> None:
    how = {name.replace(".", "__"): value for name, value in RANDOM.items()}
    how |= {"dataset__resolutions": [16, 32], "train__resolution": 0, "train__steps": 4, "save__every": 2}
    how |= {"validation__pictures": 1, "validation__every": 4, "sample__every": 0}
    how |= {"dataset__random_crop": 0.5, "dataset__color_aug": 0.2, "dataset__variants": 3}
    whole, broken = own_toy.run("whole", **how), own_toy.run("broken", **how)
    trained(whole)
    broken_at(broken, events.StepDone, 3)
    trained(broken)
    assert result(broken) == result(whole)
    header = next(whole.exports.glob("*.safetensors"))
    found = read_header(header).metadata
    assert found["ss_resolution"] == "(32, 32)"
    assert '"resolution": [16, 16], "count": 3' in found["ss_bucket_info"]
    assert '"resolution": [32, 32], "count": 3' in found["ss_bucket_info"]
    assert found["ss_num_train_images"] == "3"


def test_costs_and_measurements_are_those_of_the_largest_size() -> None:
    one, several = config_of(train__resolution=768), config_of(dataset__resolutions=[512, 768])
    assert step_passes(one) == step_passes(several)
    assert cost_key(one) != cost_key(several)
    # A file from before there was the setting.
    assert cost_key(one) == cost_key(config_of(train__resolution=768, dataset__resolutions=[]))
    assert several.resolution(512) == 768
    slider = {"slider__positive": "old", "slider__negative": "young"}
    assert config_of(dataset__resolutions=[768], **slider).resolution(512) == 512
    records = [ImageRecord(Path(f"{n}.png"), 64, 64, "") for n in range(2)]
    items = assign_buckets(records, 32, 8, rules=DatasetSection(resolutions=[32, 64]))
    assert [(item.record.path.name, item.bucket.width) for item in items] == [
        ("0.png", 32), ("0.png", 64), ("1.png", 32), ("1.png", 64),
    ]  # fmt: skip
    assert largest(items) == [items[1], items[3]]


def test_a_concept_has_resolutions_of_its_own_by_kohyas_key_and_ours(tmp_path: Path) -> None:
    images(tmp_path, "a/a.png", "b/b.png", "c/c.png", "d/d.png")
    written(
        tmp_path,
        'image_dir = "a"\nresolution = 32',
        'image_dir = "b"\nresolution = [64, 16]',
        'image_dir = "c"\ncustom_attributes = { resolutions = [32, 64] }',
        'image_dir = "d"',
    )
    dataset, config = scan(tmp_path), config_of(dataset__resolutions=[16])
    assert dataset.problems == []
    train, _ = balance_looks(apply_settings(dataset.records, config), [])
    views = at_resolutions(train, config.dataset, 16, 8)
    assert [(record.path.stem, bucket.width, record.repeats) for record, bucket in views] == [
        ("a", 32, 2), ("b", 32, 2), ("c", 32, 1), ("c", 64, 1), ("d", 16, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("value", ['"a lot"', "[1, 2, 3]", "0", "-512", "true", "[]", "10000000", "[64.5]"])
def test_a_resolution_that_is_none_is_refused_with_a_sentence(tmp_path: Path, value: str) -> None:
    images(tmp_path, "a/a.png")
    (problem,) = scan(written(tmp_path, f'image_dir = "a"\nresolution = {value}')).problems
    assert "subset 1: resolution" in problem.sentence


def test_what_resolutions_cannot_do_is_said_before_start(tmp_path: Path) -> None:
    images(tmp_path / "set", "a/a.png", "b/b.png")
    written(tmp_path / "set", 'image_dir = "a"\nresolution = 128', 'image_dir = "b"')
    config = config_of(dataset__path=str(tmp_path / "set"), validation__pictures=0.0)
    config = config.changed({"dataset.resolutions": [32, 64, 100], "train.resolution": 64})
    multiple = lookup_base("demo").multiple
    said = [one.sentence for one in preflight(config, tmp_path) if one.kind == "resolution"]
    parts = [
        "The resolution of a = 128 is more than the run's 100, which time is forecast for",
        "train.resolution = 64 has no effect beside dataset.resolutions; set it to 0",
        "No image is large enough for 100 of dataset.resolutions: 64 is as close to the size of each",
    ]
    if 100 % multiple:
        parts.append("dataset.resolutions = 100 becomes")
    for part in parts:
        assert any(part in sentence for sentence in said), (part, said)
    assert len(said) == len(parts)


def test_resolutions_are_typed_in_the_window_as_lines_or_with_commas() -> None:
    name = "dataset.resolutions"
    assert to_widget_value(name, [512, 768]) == "512\n768"
    for text in ("512\n768", "512, 768", " 512 768\n"):
        assert from_widget_value(name, text) == [512, 768]
    assert from_widget_value(name, "") == []
    for text, says in (
        ("512, many", "a list of integers"),
        ("64 " * 5, "a list of at most 4 integers"),
        ("8", "between 16 and 4,096"),
    ):
        with pytest.raises(ConfigError, match=says):
            from_widget_value(name, text)


VARIED = DatasetSection(random_crop=0.5, variants=6, caption_dropout=0.0)


def boxes(record: ImageRecord, rules: DatasetSection, seed: int = 0) -> list[tuple[float, ...]]:
    (item,) = (vary_image(one, rules, seed, 8) for one in assign_buckets([record], 64, 8, rules=rules))
    return [crop_box(record.width, record.height, one.bucket) for one in item.variants]


def test_a_random_crop_is_inside_of_the_shape_of_its_bucket_and_never_enlarged() -> None:
    draw, seen = random.Random(0), set()
    for number in range(60):
        size, focus = (draw.randint(64, 400), draw.randint(64, 400)), None
        if number % 2:
            focus = (draw.uniform(0, size[0]), draw.uniform(0, size[1]))
        record = ImageRecord(Path(f"{number}.png"), *size, "", focus=focus)
        (bucket,) = choose_buckets(*size, [64], 8)
        for left, top, right, bottom in boxes(record, VARIED):
            assert 0 <= left < right <= size[0]
            assert 0 <= top < bottom <= size[1]
            assert (right - left) / (bottom - top) == pytest.approx(bucket.width / bucket.height)
            assert right - left >= bucket.width - 1e-6
            assert right - left >= 0.5 * min(size[0], size[1] * bucket.width / bucket.height) - 1e-6
            if focus:
                assert left <= focus[0] <= right
                assert top <= focus[1] <= bottom
            seen.add((left, top, right, bottom))
    assert len(seen) > 300
    same = ImageRecord(Path("a.png"), 64, 64, "")
    assert boxes(same, VARIED) == [(0, 0, 64, 64)]
    larger = ImageRecord(Path("a.png"), 200, 150, "")
    assert boxes(larger, VARIED) == boxes(larger, VARIED) != boxes(larger, VARIED, seed=1)
    assert len(boxes(larger, VARIED)) == 6
    assert vary_image(assign_buckets([larger], 64, 8)[0], DatasetSection(), 0, 8).variants == ()


def test_pixels_mask_and_sizes_are_those_of_the_crop(tmp_path: Path) -> None:
    """White on black with a mask of the same: what is white counts, in each variant, mirrored too."""
    image = Image.new("RGB", (192, 96))
    image.paste("white", (64, 32, 128, 64))
    image.save(tmp_path / "a.png")
    image.convert("L").save(tmp_path / "a-masklabel.png")
    config = config_of(loss__unmasked_weight=0.0, dataset__random_crop=0.5, dataset__flip=True)
    (record,) = apply_settings(scan(tmp_path).records, config)
    (item,) = assign_buckets([record], 64, 8)
    item = vary_image(item, config.dataset, 0, 8)
    whole = (item.bucket.width, item.bucket.height)
    places = set()
    for one in item.variants:
        seen = torch.nn.functional.avg_pool2d(load_pixels(record, one.bucket)[:1] / 2 + 0.5, 8)
        assert one.weights is not None
        # Edges are smoothed by the pixels' filter.
        assert torch.allclose(one.weights / one.weights.max(), seen / seen.max(), atol=0.1)
        height, width, top, left, *target = one.sizes().tolist()
        across, down = load_pixels(record, one.bucket).shape[2], load_pixels(record, one.bucket).shape[1]
        assert (width, height, *target[::-1]) == (192, 96, across, down) == (192, 96, *whole)
        box = crop_box(192, 96, one.bucket)
        scale = across / (box[2] - box[0])
        assert (left, top) == (round(box[0] * scale), round(box[1] * scale))
        mirrored = one.sizes(True).tolist()
        assert mirrored[3] == round((192 - box[2]) * scale)
        assert mirrored[:3] + mirrored[4:] == [height, width, top, *target]
        places.add((left, top))
    assert len(places) > 4
    assert len(all_views([item], config.dataset)) == 2 * len(item.variants)


def test_where_a_mask_leaves_nothing_of_a_crop_the_image_is_shown_as_it_is(tmp_path: Path) -> None:
    image = Image.new("L", (256, 256))
    image.save(tmp_path / "a.png")
    image.paste(255, (0, 0, 16, 16))
    image.save(tmp_path / "a-masklabel.png")
    config = config_of(loss__unmasked_weight=0.0, dataset__random_crop=0.7, dataset__variants=20)
    (record,) = apply_settings(scan(tmp_path).records, config)
    (plain,) = assign_buckets([record], 64, 8)
    item = vary_image(plain, config.dataset, 0, 8)
    assert 1 < sum(one == plain for one in item.variants) < 20
    assert all(one.weights is not None and one.weights.max() > 0 for one in item.variants)


def test_the_variant_of_a_look_follows_from_seed_and_number_and_leaves_captions_as_they_were() -> None:
    records = [ImageRecord(Path(f"{n}.png"), 256, 256, f"{n}, a, b, c") for n in range(3)]
    rules = DatasetSection(flip=True, shuffle_tags=True, caption_dropout=0.2)
    varied = rules.model_copy(update={"random_crop": 0.5})

    class Boxes:
        def latents(self, record: ImageRecord, bucket: Bucket, flip: bool) -> torch.Tensor:
            return torch.tensor(crop_box(record.width, record.height, bucket)).view(4, 1, 1)

    def batches(rules: DatasetSection, seed: int = 0) -> Batches:
        items = [vary_image(one, rules, seed, 8) for one in assign_buckets(records, 64, 8)]
        return Batches(items, Boxes(), rules, 2, seed)  # type: ignore[arg-type]

    one, again, plain = batches(varied), batches(varied), batches(rules)
    forwards = [one.batch(number) for number in range(60)]
    backwards = [again.batch(number) for number in reversed(range(60))][::-1]
    for number, (first, second) in enumerate(zip(forwards, backwards, strict=True)):
        assert torch.equal(first.latents, second.latents)
        assert torch.equal(first.sizes, second.sizes)
        assert first.captions == plain.batch(number).captions
    shown = {tuple(row.flatten().tolist()) for batch in forwards for row in batch.latents}
    assert len(shown) == 3 * 8


def test_colours_vary_and_nothing_else(tmp_path: Path) -> None:
    image = Image.new("RGB", (128, 64), (180, 90, 60))
    image.paste((60, 90, 120), (0, 0, 64, 64))
    image.save(tmp_path / "a.png")
    mask = Image.new("L", (128, 64))
    mask.paste(255, (32, 0, 64, 64))
    mask.save(tmp_path / "a-masklabel.png")
    config = config_of(loss__unmasked_weight=0.0, dataset__color_aug=0.2, dataset__variants=5)
    (record,) = apply_settings(scan(tmp_path).records, config)
    (plain,) = assign_buckets([record], 64, 8)
    variants = vary_image(plain, config.dataset, 0, 8).variants
    assert len(variants) == 5
    pixels = [load_pixels(record, one.bucket) for one in variants]
    whole = load_pixels(record, plain.bucket)
    for one, seen in zip(variants, pixels, strict=True):
        assert torch.equal(one.weights, plain.weights)
        assert torch.equal(one.sizes(), plain.sizes())
        # Two plain halves, where they were.
        for half in (seen[..., : seen.shape[-1] // 2 - 4], seen[..., seen.shape[-1] // 2 + 4 :]):
            assert (half == half[:, :1, :1]).all()
        assert 0 < (seen - whole).abs().max() < 0.6
    assert len({tuple(seen[:, 0, 0].tolist()) for seen in pixels}) == 5
    assert vary_image(plain, DatasetSection(), 0, 8) is plain


@pytest.mark.parametrize(
    ("how", "becomes"),
    [
        ((1.0, 1.0, 1.0, 0.0), (200, 100, 50)),
        ((0.5, 1.0, 1.0, 0.0), (100, 50, 25)),
        ((1.0, 0.5, 1.0, 0.0), (162, 112, 87)),  # half the way to the mean grey of 124
        ((1.0, 1.0, 0.0, 0.0), (124, 124, 124)),  # ITU-R 601: 0.299 R + 0.587 G + 0.114 B
        ((1.0, 1.0, 1.0, 1 / 3), (50, 200, 100)),  # red becomes green
    ],
)
def test_what_varies_the_colours(how: tuple[float, ...], becomes: tuple[int, ...]) -> None:
    seen = vary_colours(Image.new("RGB", (4, 4), (200, 100, 50)), *how).getpixel((0, 0))
    assert seen == pytest.approx(becomes, abs=3)


def test_a_focus_point_is_kept_where_a_bucket_cuts_and_comes_with_the_list(tmp_path: Path) -> None:
    image = Image.new("RGB", (200, 64))
    image.paste("white", (180, 0, 200, 64))
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.png")
    write_crops(tmp_path, {"a.png": (0, 0, 1, 1, 0.95, 0.5), "b.png": (0.5, 0, 1, 1, 0.95, 0.5)})
    one, other = scan(tmp_path).records
    assert (one.crop, one.focus) == (None, (190, 32))
    assert (other.width, other.crop, other.focus) == (100, (0.5, 0, 1, 1), (90, 32))
    bucket = cut_at_focus(one.width, one.height, Bucket(64, 64), one.focus)
    assert crop_box(200, 64, bucket) == (136, 0, 200, 64)
    assert load_pixels(one, bucket)[0, 0, -1] == 1
    assert load_pixels(one, Bucket(64, 64))[0, 0, -1] == -1
    # Of the same size, though it is cut elsewhere: they share their batches.
    items = assign_buckets([one, replace(one, path=tmp_path / "c.png", focus=None)], 64, 32)
    assert num_batches([(item.record, item.bucket) for item in items], 2) == 1
    assert len(Batches(items, Mirrored(), VARIED, 2, 0).batch(0).names) == 2  # type: ignore[arg-type]
    facts = image_facts(one, tmp_path, (64,), 8)
    assert facts["box"] == pytest.approx((0, 0, 1, 1, 0.95, 0.5))
    assert image_facts(replace(one, focus=None), tmp_path, (64,), 8)["box"] is None


@pytest.mark.parametrize("edges", [[0, 0, 1, 1, 0.5], [0, 0, 0.5, 1, 0.7, 0.5], [0, 0, 1, 1, 0.5, 2.0]])
def test_a_focus_point_outside_of_its_crop_is_refused(edges: list[float]) -> None:
    with pytest.raises(DatasetError, match="and perhaps a focus point inside"):
        check_crop(edges, "a.png")


def test_a_project_keeps_focus_points_and_takes_them_back(tmp_path: Path) -> None:
    project = Project(tmp_path)
    Image.new("RGB", (200, 100)).save(project.image_folder / "a.png")
    before, edges = project.images(), (0.0, 0.0, 1.0, 1.0, 0.25, 0.5)
    assert project.crop("a.png", edges) is None
    assert project.images()["a.png"].focus == (50, 50)
    assert project.crop("a.png", None) == edges
    assert project.images() == before
    assert not (project.image_folder / "crops.json").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dataset__random_crop": 0.3, "train__resolution": 64}, "dataset.random_crop has no effect"),
        ({"dataset__variants": 3}, "dataset.variants has no effect without"),
        ({"dataset__random_crop": 0.3, "train__resolution": 32}, ""),
    ],
)
def test_variants_that_come_to_nothing_are_named(tmp_path: Path, changes: dict, says: str) -> None:
    images(tmp_path / "set", "a.png", "b.png")
    config = config_of(dataset__path=str(tmp_path / "set"), validation__pictures=0.0, **changes)
    said = [one.sentence for one in preflight(config, tmp_path) if one.kind == "variants"]
    assert len(said) == bool(says)
    assert all(sentence.startswith(says) for sentence in said)


def test_a_concept_has_a_random_crop_of_its_own(tmp_path: Path) -> None:
    images(tmp_path, "a/a.png", "b/b.png", "c/c.png")
    written(
        tmp_path,
        'image_dir = "a"\nrandom_crop = true',
        'image_dir = "b"\nrandom_crop = true\ncustom_attributes = { random_crop = 0.4 }',
        'image_dir = "c"\nrandom_crop = false',
    )
    rules = DatasetSection(random_crop=0.3)
    assert [rules_of(one, rules).random_crop for one in scan(tmp_path).records] == [0.1, 0.4, 0.0]
    (problem,) = scan(written(tmp_path, 'image_dir = "."\nrandom_crop = "much"')).problems
    assert "subset 1: random_crop = 'much' should be a number" in problem.sentence


def test_the_sizes_that_an_image_is_trained_at_are_shown(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    (record,) = scan(tmp_path).records
    facts = image_facts(record, tmp_path, (32, 64), 8)
    assert facts["buckets"] == [[64, 64], [32, 32]]
