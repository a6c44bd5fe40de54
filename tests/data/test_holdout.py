"""What looks the same and what does not."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from lora_core.data import dataset, images
from lora_core.data.dataset import (
    Fingerprint,
    compute_fingerprint,
    compute_fingerprints,
    group_near_duplicates,
    read_holdout_list,
    scan,
    split_holdout,
    write_holdout_list,
)
from lora_core.data.images import HOLDOUT_LIST, FileProblem, ImageRecord, SizeCache
from lora_core.errors import DatasetError
from tests.data.conftest import Draw, noise


def are_near_duplicates(*prints: Fingerprint) -> bool:
    return group_near_duplicates(prints) == [0, 0]


def disc(colour: str, x: int = 64) -> Image.Image:
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).ellipse((x - 40, 24, x + 40, 104), fill=colour)
    return image


def test_copies_are_alike() -> None:
    for seed in range(10):
        image = noise(256, 192, seed)
        for copy in (image.resize((100, 75)), ImageEnhance.Brightness(image).enhance(0.95)):
            assert are_near_duplicates(compute_fingerprint(image), compute_fingerprint(copy))


def test_others_are_not() -> None:
    prints = [compute_fingerprint(noise(256, 192, seed)) for seed in range(40)]
    assert group_near_duplicates([*prints]) == list(range(40))


def test_one_shape_in_two_colours_is_two_pictures() -> None:
    assert not are_near_duplicates(compute_fingerprint(disc("red")), compute_fingerprint(disc("green")))
    assert are_near_duplicates(
        compute_fingerprint(disc("red")), compute_fingerprint(disc("red").resize((90, 90)))
    )


def test_a_fingerprint_is_computed_once_until_the_file_changes(
    tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = draw(tmp_path / "a.png", seed=1)
    (first,) = compute_fingerprints([file])
    monkeypatch.setattr(dataset, "open_rgb", lambda path, least: noise(256, 192, 5))
    assert compute_fingerprints([file]) == [first]
    draw(file, (64, 64), seed=2)
    assert compute_fingerprints([file]) != [first]


def test_groups_join_twins_of_twins(tmp_path: Path, draw: Draw) -> None:
    paths = [
        draw(tmp_path / "a.png", seed=1),
        draw(tmp_path / "b.png", seed=2),
        draw(tmp_path / "c.png", (128, 96), seed=1),
        tmp_path / "missing.png",
        draw(tmp_path / "d.png", (200, 150), seed=1),
        tmp_path / "missing too.png",
    ]
    assert group_near_duplicates(compute_fingerprints(paths)) == [0, 1, 0, 3, 0, 5]
    assert group_near_duplicates([]) == []


def many_prints(count: int, seed: int = 0) -> list[Fingerprint | None]:
    """Fingerprints of pictures of all brightnesses, a sixth of them near-duplicates of others."""
    draw = np.random.default_rng(seed)
    prints: list[Fingerprint | None] = []
    for index in range(count):
        shape, colours = draw.normal(size=64), draw.uniform(0, 255) + draw.normal(0, 20, 48)
        other = prints[int(draw.integers(index))] if index % 6 == 5 else None
        if other is not None:
            shape, colours = other.shape + 0.002 * shape, other.colours + draw.normal(0, 8, 48)
        shape /= np.linalg.norm(shape)
        prints.append(None if index % 50 == 49 else Fingerprint(shape, colours))
    return prints


def test_groups_are_those_of_every_pair_compared() -> None:
    prints = many_prints(700)
    group = list(range(len(prints)))
    for index, one in enumerate(prints):
        for earlier, other in enumerate(prints[:index]):
            # The two bars of `lora_core/data/dataset.py`.
            if (
                one
                and other
                and one.shape @ other.shape >= 0.98
                and abs(one.colours - other.colours).mean() <= 12
            ):
                first, last = sorted((group[earlier], group[index]))
                group = [first if each == last else each for each in group]
    assert 400 < len(set(group)) < 690
    assert group_near_duplicates(prints) == group


def test_few_pictures_are_compared_at_once_and_only_those_of_like_brightness(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[int] = []

    class Shapes(np.ndarray):
        def __matmul__(self, other: np.ndarray) -> np.ndarray:
            compared.append(self.shape[0] * other.shape[1])
            return np.asarray(self) @ np.asarray(other)

    plain = np.array
    prints = many_prints(3000)
    monkeypatch.setattr(dataset.np, "array", lambda *given, **more: plain(*given, **more).view(Shapes))
    group_near_duplicates(prints)
    assert sum(compared) < 0.2 * len(prints) ** 2
    assert max(compared) <= 256 * len(prints)


def test_a_thousand_copies_of_one_picture_are_one_group() -> None:
    (one,) = many_prints(1)
    assert set(group_near_duplicates([one] * 1000)) == {0}


# Which pictures are held out.


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
    with pytest.raises(DatasetError, match=rf"of {count} images.*at most {max(0, count - 2)}\."):
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


# Pictures that a person chose to measure on, and what is known of pictures from before.


def names(records) -> list[str]:
    return [record.path.name for record in records]


def test_the_list_decides_whatever_the_number_says(tmp_path: Path, draw: Draw) -> None:
    for seed in range(6):
        draw(tmp_path / ("3_more" if seed > 3 else "") / f"{seed} é.png", seed=seed)
    write_holdout_list(tmp_path, ["1 é.png", "3_more/5 é.png", "gone.png"])
    for pictures in (0, 0.2, 4):
        train, held = split_holdout(scan(tmp_path).records, pictures, seed=3)
        assert names(held) == ["1 é.png", "5 é.png"]
        assert len(train) == 4


def test_twins_of_those_chosen_are_not_trained_on(tmp_path: Path, draw: Draw) -> None:
    for seed in range(5):
        draw(tmp_path / f"{seed}.png", (96, 72), seed)
    noise(64, 48, 2).save(tmp_path / "copy.jpg", quality=80)
    write_holdout_list(tmp_path, ["2.png"])
    train, held = split_holdout(scan(tmp_path).records, 0, 0)
    assert sorted(names(held)) == ["2.png", "copy.jpg"]
    assert "copy.jpg" not in names(train)


def test_two_must_stay_to_train_on(tmp_path: Path, draw: Draw) -> None:
    for seed in range(3):
        draw(tmp_path / f"{seed}.png", seed=seed)
    write_holdout_list(tmp_path, ["0.png", "1.png"])
    with pytest.raises(DatasetError, match="choose fewer"):
        split_holdout(scan(tmp_path).records, 0, 0)


def test_a_caption_of_that_name_is_a_caption(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "held_out.png", caption="a.png")
    draw(tmp_path / "a.png", seed=1)
    assert [record.held_out for record in scan(tmp_path).records] == [False, False]


def test_an_empty_list_leaves_no_file(tmp_path: Path) -> None:
    write_holdout_list(tmp_path, ["a.png"])
    assert read_holdout_list(tmp_path) == {"a.png"}
    write_holdout_list(tmp_path, [])
    assert not (tmp_path / HOLDOUT_LIST).exists()
    with pytest.raises(DatasetError, match="line break"):
        write_holdout_list(tmp_path, ["a\nb.png"])


def test_a_list_that_cannot_be_read_is_a_problem(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / HOLDOUT_LIST).write_bytes(b"\xff\xfe\x00")
    assert [problem.kind for problem in scan(tmp_path).problems] == ["held out"]


def test_a_picture_is_decoded_once_until_it_changes(
    tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = draw(tmp_path / "pictures" / "a.png", (40, 30))
    file = tmp_path / "sizes.json"
    sizes = SizeCache(file)
    assert sizes.info(picture, "a.png") == (40, 30, False, False, False)
    sizes.save(tmp_path)
    decoded = []
    real = images.check_image
    monkeypatch.setattr(images, "check_image", lambda p, *more: decoded.append(p) or real(p, *more))
    again = SizeCache(file)
    assert again.info(picture, "a.png") == (40, 30, False, False, False)
    assert decoded == []
    picture.write_bytes(b"no image")
    assert isinstance(again.info(picture, "a.png"), FileProblem)
    assert isinstance(again.info(picture, "a.png"), FileProblem)
    assert len(decoded) == 2


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', '{"a": [1, 2, 3, 4]}', "\x00", '{"a": {"b": 1}}'])
def test_a_broken_memory_is_an_empty_one(tmp_path: Path, draw: Draw, text: str) -> None:
    (tmp_path / "sizes.json").write_text(text)
    picture = draw(tmp_path / "a.png", (40, 30))
    assert SizeCache(tmp_path / "sizes.json").info(picture, "a.png") == (40, 30, False, False, False)


def test_what_is_gone_is_forgotten_on_disk(tmp_path: Path, draw: Draw) -> None:
    inside, outside = draw(tmp_path / "in" / "a.png"), draw(tmp_path / "out" / "b.png", seed=1)
    sizes = SizeCache(tmp_path / "sizes.json")
    sizes.info(outside, "b.png")
    sizes.carry(outside, inside)
    sizes.save(tmp_path / "in")
    kept = (tmp_path / "sizes.json").read_text()
    assert os.fspath(inside).replace("\\", "\\\\") in kept
    assert "b.png" not in kept
