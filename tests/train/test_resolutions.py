"""Several resolutions, and what varies an image from look to look: which sizes, parts and colours are shown,
how often, and that a resumed run goes on with the same ones."""

import random
from collections import Counter
from pathlib import Path

import pytest

from app.dataset.gallery import image_facts
from app.train.form import from_widget_value, to_widget_value
from lora_core.data.audit import TrainingView, step_shares
from lora_core.data.concepts import balance_looks
from lora_core.data.dataset import apply_settings, at_resolutions, num_batches, scan
from lora_core.data.images import Bucket, Concept, ImageRecord, choose_buckets
from lora_core.errors import ConfigError
from lora_core.model_files.detect import lookup_base
from lora_core.runs.costs import cost_key, step_passes
from lora_core.runs.preflight import preflight
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import DatasetSection
from lora_core.train.data import Batches
from lora_core.train.setup import assign_buckets, largest
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
    seen = looks_at(items, rules, batch, epochs=1 if batch == 1 else 200)
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


def test_one_resolution_is_an_epoch_of_one_round_and_changes_no_record() -> None:
    records = [ImageRecord(Path(f"{n}.png"), 64 + 8 * n, 64, "", 1 + n) for n in range(5)]
    for rules in (DatasetSection(), DatasetSection(resolutions=[64])):
        views = at_resolutions(records, rules, 64, 8)
        assert [record for record, _ in views] == records
        assert all(one is other for (one, _), other in zip(views, records, strict=True))


def test_a_run_at_several_resolutions_is_measured_at_the_largest_and_broken_off_ends_the_same(
    own_toy: Toy,
) -> None:
    how = {name.replace(".", "__"): value for name, value in RANDOM.items()}
    how |= {"dataset__resolutions": [16, 32], "train__resolution": 0, "train__steps": 8}
    how |= {"validation__pictures": 1, "validation__every": 4}
    whole, broken = own_toy.run("whole", **how), own_toy.run("broken", **how)
    trained(whole)
    from lora_core.runs import events

    broken_at(broken, events.StepDone, 5)
    trained(broken)
    assert result(broken) == result(whole)
    header = next(whole.exports.glob("*.safetensors"))
    from lora_core.model_files.header import read_header

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
        "The resolution of a = 128 is more than the run's 100, which time and memory are forecast for",
        "train.resolution = 64 plays no part beside dataset.resolutions; set it to 0",
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
        ("512, many", "a list of whole numbers"),
        ("64 " * 5, "a list of at most 4 whole numbers"),
        ("8", "between 16 and 4,096"),
    ):
        with pytest.raises(ConfigError, match=says):
            from_widget_value(name, text)


def test_the_sizes_that_an_image_is_trained_at_are_shown(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    (record,) = scan(tmp_path).records
    facts = image_facts(record, tmp_path, (32, 64), 8)
    assert facts["buckets"] == [[64, 64], [32, 32]]
