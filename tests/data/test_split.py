"""Which pictures are held out."""

from pathlib import Path

import pytest

from lora_core.data.dataset import scan
from lora_core.data.holdout import split_holdout
from lora_core.data.scan import ImageRecord
from lora_core.errors import DatasetError
from tests.data.conftest import Draw, noise


def records(count: int) -> list[ImageRecord]:
    """Records of files that do not exist: without pixels nothing looks like anything else."""
    return [ImageRecord(Path(f"{index:03}.png"), 64, 64, "") for index in range(count)]


@pytest.mark.parametrize(
    ("count", "pictures", "wanted"),
    [
        (24, 0.1, 2),
        (24, 0.0, 0),
        (3, 0.1, 0),
        (1, 0.1, 0),
        (0, 0.1, 0),
        (10, 3, 3),
        (10, 8, 8),
        (100, 0.25, 25),
    ],
)
def test_how_many(count: int, pictures: float, wanted: int) -> None:
    train, measured = split_holdout(records(count), pictures, 0)
    assert len(measured) == wanted
    assert sorted(train + measured, key=lambda record: record.path) == records(count)
    assert train == sorted(train, key=lambda record: record.path)


@pytest.mark.parametrize(("count", "pictures"), [(10, 9), (10, 10), (10, 500), (10, 0.95), (2, 1), (1, 1)])
def test_two_must_stay(count: int, pictures: float) -> None:
    with pytest.raises(DatasetError, match=rf"of {count} pictures.*at most {max(0, count - 2)}\."):
        split_holdout(records(count), pictures, 0)


def test_it_follows_from_the_seed_alone() -> None:
    chosen = [tuple(r.path.name for r in split_holdout(records(50), 5, seed)[1]) for seed in range(20)]
    again = [tuple(r.path.name for r in split_holdout(records(50), 5, seed)[1]) for seed in range(20)]
    assert chosen == again
    assert len(set(chosen)) == 20


def test_golden() -> None:
    """The three smallest of the SHA-256 sums of "0\\n000.png" to "0\\n019.png", found with sha256sum."""
    assert [record.path.stem for record in split_holdout(records(20), 3, 0)[1]] == ["002", "009", "010"]


def test_more_pictures_change_little() -> None:
    """Of 40 pictures 8 are held out, of 41 one more or one other: never a new deal."""
    before = {record.path for record in split_holdout(records(40), 8, 0)[1]}
    after = {record.path for record in split_holdout(records(41), 8, 0)[1]}
    assert len(before & after) >= 7


def test_the_place_of_the_folder_does_not_matter() -> None:
    moved = [ImageRecord(Path("/elsewhere") / r.path, 64, 64, "") for r in records(30)]
    assert [r.path.name for r in split_holdout(moved, 5, 3)[1]] == [
        r.path.name for r in split_holdout(records(30), 5, 3)[1]
    ]


def test_twins_and_several_records_of_a_file_stay_together(tmp_path: Path, draw: Draw) -> None:
    for seed in range(6):
        path = draw(tmp_path / f"{seed}.png", (96, 72), seed)
        noise(64, 48, seed).save(path.with_suffix(".jpg"), quality=80)
    found = scan(tmp_path).records
    doubled = sorted([*found, *found], key=lambda record: record.path)
    for seed in range(10):
        train, measured = split_holdout(doubled, 8, seed)
        assert len(measured) == 8
        assert not {r.path.stem for r in train} & {r.path.stem for r in measured}


def test_nothing_is_held_out_where_all_look_the_same(tmp_path: Path, draw: Draw) -> None:
    for index in range(4):
        draw(tmp_path / f"{index}.png")
    assert split_holdout(scan(tmp_path).records, 1, 0)[1] == []
