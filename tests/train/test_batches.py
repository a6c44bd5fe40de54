from collections import Counter
from dataclasses import replace

import pytest
import torch

from lora_core.data.dataset import at_resolutions, num_batches, open_dataset, with_epochs
from lora_core.data.images import ImageRecord
from lora_core.errors import ConfigError, DatasetError
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import DatasetSection
from lora_core.train.data import Batches
from lora_core.train.setup import all_views, assign_buckets

PLAIN = DatasetSection(caption_dropout=0.0)


class Numbers:
    """Stands in for the cache: the latents of a picture are its width, negative if mirrored."""

    def latents(self, record, bucket, flip):
        return torch.full((4, 1, 1), float(-record.width if flip else record.width))


def _records(tmp_path, sizes, repeats=1):
    return [
        ImageRecord(tmp_path / f"{n}.png", w, h, f"caption {n}, a, b, c", repeats)
        for n, (w, h) in enumerate(sizes)
    ]


def _batches(records, size=2, seed=0, flip=False, rules=PLAIN):
    rules = rules.model_copy(update={"flip": flip})
    return Batches(assign_buckets(records, 128, 32), Numbers(), rules, size, seed)


def test_a_batch_follows_from_seed_and_number_alone(tmp_path):
    rules = DatasetSection(caption_dropout=0.2, tag_dropout=0.2, shuffle_tags=True, keep_tags=1)
    records = _records(tmp_path, [(128 + n, 128) for n in range(7)])
    first, second = (_batches(records, flip=True, rules=rules) for _ in range(2))
    forwards = [first.batch(n) for n in range(30)]
    backwards = [second.batch(n) for n in reversed(range(30))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert one.captions == other.captions
        assert torch.equal(one.latents, other.latents)
    other = _batches(records, flip=True, rules=rules, seed=1)
    assert any(not torch.equal(other.batch(n).latents, forwards[n].latents) for n in range(30))


def test_each_epoch_shows_each_picture_as_often_as_it_repeats(tmp_path):
    records = _records(tmp_path, [(128, 128)] * 3, repeats=2) + _records(tmp_path / "x", [(128, 128)] * 2)
    batches = _batches(records, size=2)
    # 3 x 2 + 2 looks are 8, four batches of two.
    for epoch in range(3):
        names = Counter(name for n in range(4) for name in batches.batch(4 * epoch + n).names)
        assert sum(names.values()) == 8
        assert names == {"0.png": 3, "1.png": 3, "2.png": 2}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_an_epoch_has_the_number_of_batches_that_its_length_is_planned_with(tmp_path, size):
    records = _records(tmp_path, [(128, 128)] * 3, repeats=3) + _records(tmp_path / "x", [(256, 128)] * 5)
    batches, count = _batches(records, size=size), num_batches(at_resolutions(records, PLAIN, 128, 32), size)
    for epoch in range(2):
        rows = [name for n in range(count) for name in batches.batch(epoch * count + n).names]
        seen = Counter(rows)
        # Batches are filled up from their bucket, by less than one batch each.
        assert all(seen[f"{n}.png"] >= 3 for n in range(3))
        assert 14 <= len(rows) < 14 + 2 * size


def test_epochs_become_steps_when_a_run_is_made(own_toy):
    """Four pictures in batches of two."""
    how = {"train__epochs": 3, "save__every_epochs": 2, "sample__every_epochs": 1, "validation__every": 7}
    config = own_toy.run("plain", **how).config()
    assert (config.train.steps, config.save.every, config.sample.every) == (6, 4, 2)
    assert (config.train.epochs, config.validation.every) == (3, 7)
    config = own_toy.run("accumulated", **how, train__gradient_accumulation_steps=4).config()
    assert (config.train.steps, config.save.every, config.sample.every) == (2, 1, 1)
    assert [config.train.describe_epoch(step) for step in (0, 1, 2)] == [
        "epoch 1 of 3", "epoch 1 of 3", "epoch 2 of 3",
    ]  # fmt: skip
    assert own_toy.run("steps").config().train.describe_epoch(3) == ""
    dataset = open_dataset(str(own_toy.pictures), own_toy.home)
    reg = replace(dataset, reg=[replace(record, reg=True) for record in dataset.records])
    asked = RunConfig().changed({"train.epochs": 3, "validation.pictures": 0})
    assert with_epochs(asked, reg).train.steps == 24
    assert with_epochs(asked.changed({"dataset.reg_weight": 0}), reg).train.steps == 12
    dataset = replace(dataset, records=dataset.records * 6)
    many = RunConfig().changed({"train.epochs": 100_000, "train.batch_size": 2, "validation.pictures": 0})
    with pytest.raises(ConfigError, match=r"train\.epochs = 100,000 comes to 1,200,000 steps"):
        with_epochs(many, dataset)
    slider = many.changed({"slider.positive": "red", "slider.negative": "blue"})
    with pytest.raises(ConfigError, match=r"A slider has no images.*train\.epochs to 0"):
        with_epochs(slider, dataset)


def test_a_batch_is_of_one_bucket_and_always_full(tmp_path):
    records = _records(tmp_path, [(128, 128)] * 3 + [(256, 128)] * 5)
    batches = _batches(records, size=4)
    wide = {"3.png", "4.png", "5.png", "6.png", "7.png"}
    for number in range(12):
        names = batches.batch(number).names
        assert len(names) == 4
        assert len({name in wide for name in names}) == 1


def test_flips_are_half_of_the_looks(tmp_path):
    batches = _batches(_records(tmp_path, [(128, 128)]), size=1, flip=True)
    mirrored = sum(batches.batch(n).latents.mean() < 0 for n in range(400))
    assert 150 < mirrored < 250
    items = assign_buckets(_records(tmp_path, [(128, 128)] * 2), 128, 32)
    assert [len(all_views(items, DatasetSection(flip=flip))) for flip in (True, False)] == [4, 2]


def test_a_batch_says_the_sizes_of_its_pictures(tmp_path):
    batches = _batches(_records(tmp_path, [(200, 80), (200, 84)]), size=2)
    batch = batches.batch(0)
    by_name = dict(zip(batch.names, batch.sizes.tolist(), strict=True))
    # At 128 px with multiples of 32 both have the bucket 160 x 64: 0.8 x 80 = 64 and 0.8 x 84 = 67.2 px high.
    assert by_name == {"0.png": [80, 200, 0, 0, 64, 160], "1.png": [84, 200, 2, 0, 64, 160]}


def test_no_pictures_is_a_sentence(tmp_path):
    with pytest.raises(DatasetError, match="No image"):
        assign_buckets([], 128, 32)
