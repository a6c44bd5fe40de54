from collections import Counter

import pytest
import torch

from lora_core.data.images import ImageRecord
from lora_core.errors import DatasetError
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
    return Batches(assign_buckets(records, 128, 32), Numbers(), rules, size, flip, seed)


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
    assert (len(all_views(items, True)), len(all_views(items, False))) == (4, 2)


def test_a_batch_says_the_sizes_of_its_pictures(tmp_path):
    batches = _batches(_records(tmp_path, [(200, 80), (200, 84)]), size=2)
    batch = batches.batch(0)
    by_name = dict(zip(batch.names, batch.sizes.tolist(), strict=True))
    # At 128 px with multiples of 32 both have the bucket 160 x 64: 0.8 x 80 = 64 and 0.8 x 84 = 67.2 px high.
    assert by_name == {"0.png": [80, 200, 0, 0, 64, 160], "1.png": [84, 200, 2, 0, 64, 160]}


def test_no_pictures_is_a_sentence(tmp_path):
    with pytest.raises(DatasetError, match="No image"):
        assign_buckets([], 128, 32)
