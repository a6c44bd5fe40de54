"""Pictures that a person chose to measure on, and what is known of pictures from before."""

import os
from pathlib import Path

import pytest

from lora_core.data import images
from lora_core.data.dataset import HOLDOUT_LIST, read_holdout_list, scan, write_holdout_list
from lora_core.data.holdout import split_holdout
from lora_core.data.images import SizeCache
from lora_core.data.scan import FileProblem
from lora_core.errors import DatasetError
from tests.data.conftest import Draw, noise


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
    assert sizes.info(picture, "a.png") == (40, 30, False)
    sizes.save(tmp_path)
    decoded = []
    real = images.check_image
    monkeypatch.setattr(images, "check_image", lambda p, s: decoded.append(p) or real(p, s))
    again = SizeCache(file)
    assert again.info(picture, "a.png") == (40, 30, False)
    assert decoded == []
    picture.write_bytes(b"no picture")
    assert isinstance(again.info(picture, "a.png"), FileProblem)
    assert isinstance(again.info(picture, "a.png"), FileProblem)
    assert len(decoded) == 2


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', '{"a": [1, 2, 3, 4]}', "\x00", '{"a": {"b": 1}}'])
def test_a_broken_memory_is_an_empty_one(tmp_path: Path, draw: Draw, text: str) -> None:
    (tmp_path / "sizes.json").write_text(text)
    picture = draw(tmp_path / "a.png", (40, 30))
    assert SizeCache(tmp_path / "sizes.json").info(picture, "a.png") == (40, 30, False)


def test_what_is_gone_is_forgotten_on_disk(tmp_path: Path, draw: Draw) -> None:
    inside, outside = draw(tmp_path / "in" / "a.png"), draw(tmp_path / "out" / "b.png", seed=1)
    sizes = SizeCache(tmp_path / "sizes.json")
    sizes.info(outside, "b.png")
    sizes.carry(outside, inside)
    sizes.save(tmp_path / "in")
    kept = (tmp_path / "sizes.json").read_text()
    assert os.fspath(inside).replace("\\", "\\\\") in kept
    assert "b.png" not in kept
