"""Sound files come in, the others are named, and nothing that is there is lost."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_core.data import importer
from lora_core.data.dataset import scan
from lora_core.data.importer import TransferMode, import_files, import_folder
from lora_core.errors import DatasetError
from tests.data.conftest import Draw, listed, packed


def test_import_files(tmp_path: Path, draw: Draw) -> None:
    files = [
        draw(tmp_path / "from" / "a.png", caption="a"),
        tmp_path / "from" / "a.txt",
        draw(tmp_path / "from" / "b.jpg"),
        tmp_path / "from" / "text.png",
        tmp_path / "from" / "bad.txt",
        tmp_path / "from" / "clip.mp4",
        tmp_path / "from" / ".DS_Store",
        tmp_path / "from" / "gone.png",
    ]
    (tmp_path / "from" / "text.png").write_text("no image")
    (tmp_path / "from" / "bad.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "from" / "clip.mp4").write_bytes(b"video")
    (tmp_path / "from" / ".DS_Store").write_bytes(b"x")
    imported = import_files(files, tmp_path / "into")
    assert [path.name for path in imported.added] == ["a.png", "a.txt", "b.jpg"]
    assert sorted((problem.path.name, problem.kind) for problem in imported.skipped) == [
        ("bad.txt", "caption"),
        ("clip.mp4", "other file"),
        ("gone.png", "unreadable"),
        ("text.png", "unreadable"),
    ]
    assert listed(tmp_path / "into") == ["a.png", "a.txt", "b.jpg"]


def test_taken_names_get_a_number_together_with_their_caption(tmp_path: Path, draw: Draw) -> None:
    into = tmp_path / "into"
    draw(into / "cat.png", seed=1, caption="first")
    for seed, number in ((2, "-2"), (3, "-3")):
        folder = tmp_path / str(seed)
        files = [draw(folder / "Cat.png", seed=seed, caption=f"no. {seed}"), folder / "Cat.txt"]
        files.append(draw(folder / "Cat-masklabel.png", seed=seed))
        imported = import_files(files, into)
        assert sorted(path.name for path in imported.added) == [
            f"Cat{number}-masklabel.png",
            f"Cat{number}.png",
            f"Cat{number}.txt",
        ]
    captions = {record.path.name: record.caption for record in scan(into).records}
    assert captions == {"cat.png": "first", "Cat-2.png": "no. 2", "Cat-3.png": "no. 3"}


def test_a_mask_of_another_name_keeps_to_its_image(tmp_path: Path, draw: Draw) -> None:
    """Where the image gets a number, and where the dataset holds a mask of the same bytes."""
    into = tmp_path / "into"
    draw(into / "cat.png", seed=1)
    for seed, name in ((2, "cat"), (3, "dog")):
        files = [draw(tmp_path / name / f"{name}.png", seed=seed)]
        files.append(draw(tmp_path / name / f"{name}_mask.png", seed=9))
        files.append(draw(tmp_path / name / "gas_mask.png", seed=10 + seed))
        assert import_files(files, into).skipped == []
    masks = {record.path.name: record.mask and record.mask.name for record in scan(into).records}
    assert masks == {
        "cat.png": None, "cat-2.png": "cat-2-masklabel.png", "dog.png": "dog-masklabel.png",
        "gas_mask.png": None, "gas_mask-2.png": None,
    }  # fmt: skip


def test_masks_crops_and_held_out_images_keep_to_their_image(tmp_path: Path, draw: Draw) -> None:
    """Where an image here has its name, which keeps what it has."""
    into, source = tmp_path / "into", tmp_path / "from"
    draw(into / "cat.png", seed=1)
    draw(source / "cat.png", seed=2)
    for number, name in enumerate(
        ("mask/cat.png", "masks/dog_mask.png", "fox-condlabel.png", "fox-masklabel.png")
    ):
        draw(source / name, seed=10 + number)
    for number, name in enumerate(("dog.png", "fox.png", "in/fox.png")):
        draw(source / name, seed=20 + number)
    (source / "crops.json").write_text('{"cat.png": [0, 0, 0.5, 1], "gone.png": [0, 0, 1, 0.5]}')
    (source / "held_out.txt").write_text("cat.png\nin/fox.png\n")
    skipped = import_folder(source, into).skipped
    records = scan(into).records
    assert {one.path.relative_to(into).as_posix(): (one.crop, one.held_out) for one in records} == {
        "cat.png": (None, False), "cat-2.png": ((0, 0, 0.5, 1), True), "dog.png": (None, False),
        "fox.png": (None, False), "in/fox.png": (None, True),
    }  # fmt: skip
    masks = {one.path.name: one.mask for one in records if one.mask}
    assert {name: mask.name for name, mask in masks.items()} == {
        "cat-2.png": "cat-2-masklabel.png", "dog.png": "dog-masklabel.png", "fox.png": "fox-masklabel.png",
    }  # fmt: skip
    assert masks["fox.png"].read_bytes() == (source / "fox-masklabel.png").read_bytes()
    assert [one.sentence for one in skipped] == [
        "fox-condlabel.png is a conditioning image, which is not used; it was left out.",
        "crops.json was not taken for images that were not added (gone.png).",
    ]
    # Once more: all images are here already, and nothing of them changes.
    lists = [(into / name).read_text() for name in ("crops.json", "held_out.txt")]
    import_folder(source, into)
    assert [(into / name).read_text() for name in ("crops.json", "held_out.txt")] == lists
    (source / "crops.json").write_text('{"cat.png": 7}')
    assert "The crop of cat.png is not left" in " ".join(
        one.sentence for one in import_folder(source, tmp_path / "other").skipped
    )


def test_a_caption_that_comes_later(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "into" / "a.png")
    (tmp_path / "a.txt").write_text("late")
    assert [path.name for path in import_files([tmp_path / "a.txt"], tmp_path / "into").added] == ["a.txt"]
    (tmp_path / "a.txt").write_text("later")
    again = import_files([tmp_path / "a.txt"], tmp_path / "into")
    assert [problem.kind for problem in again.skipped] == ["already there"]
    assert (tmp_path / "into" / "a.txt").read_text() == "late"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("10_cat/a.png", "10_cat/a.png"),
        ("../../a.png", "a.png"),
        ("/etc/a.png", "etc/a.png"),
        (r"C:\pictures\a.png", "pictures/a.png"),
        ('we?ird: "name".png', "we\uff1fird\uff1a \uff02name\uff02.png"),
        ("aux.png", "_aux.png"),
        ("COM\N{SUPERSCRIPT TWO}.png", "_COM\N{SUPERSCRIPT TWO}.png"),
        ("conin$.png", "_conin$.png"),
        ("dir. /a.png", "dir/a.png"),
        ("ein Bär 熊.png", "ein Bär 熊.png"),
        ("é" * 300 + ".png", "é" * 88 + ".png"),
    ],
)
def test_names_of_the_sender(tmp_path: Path, draw: Draw, name: str, wanted: str) -> None:
    import_files([draw(tmp_path / "upload.png")], tmp_path / "into", [name])
    assert listed(tmp_path / "into") == [wanted]


def test_two_senders_names_that_become_one(tmp_path: Path, draw: Draw) -> None:
    files = [draw(tmp_path / f"{seed}.png", seed=seed) for seed in range(3)]
    import_files(files, tmp_path / "into", ["a\x01.png", "a\x02.png", "A_.png"])
    assert listed(tmp_path / "into") == ["A_-3.png", "a_-2.png", "a_.png"]


@pytest.mark.parametrize(("first", "second"), [("A.png", "a.jpg"), ("\u00e9.png", "e\u0301.jpg")])
def test_images_whose_names_differ_by_case_keep_their_own_captions(
    tmp_path: Path, draw: Draw, first: str, second: str
) -> None:
    source, into = tmp_path / "from", tmp_path / "into"
    draw(source / first, seed=1)
    draw(source / second, seed=2, caption="the second's")
    imported = import_folder(source, into)
    assert imported.skipped == []
    captions = {record.path.suffix: record.caption for record in scan(into).records}
    assert captions == {".png": "", ".jpg": "the second's"}


def test_tables_become_text_files(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "into" / "a.png", seed=5, caption="mine")
    source = tmp_path / "from"
    draw(source / "a.png", seed=1)
    draw(source / "sub" / "b.png", seed=2)
    draw(source / "c.png", seed=3, caption="beside")
    rows = [
        {"file_name": name, "text": text}
        for name, text in (("a.png", "A"), ("sub/b.png", "B"), ("c.png", "C"))
    ]
    lines = [json.dumps(row) for row in [*rows, {"file_name": "d.png", "text": "D"}]]
    (source / "metadata.jsonl").write_text("\n".join([*lines, "nonsense"]))
    imported = import_folder(source, tmp_path / "into")
    captions = {
        r.path.relative_to(tmp_path / "into").as_posix(): r.caption for r in scan(tmp_path / "into").records
    }
    assert captions == {"a.png": "mine", "a-2.png": "A", "c.png": "beside", "sub/b.png": "B"}
    assert [problem.kind for problem in imported.skipped] == ["metadata", "metadata", "unused row"]
    assert imported.skipped[-1].sentence.endswith("have a caption already (c.png).")
    assert scan(tmp_path / "into").problems == []


def test_import_folder_keeps_repeats(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "from" / "10_cat" / "a.png", caption="a")
    draw(tmp_path / "from" / "b.png", seed=1, caption="b")
    import_folder(tmp_path / "from", tmp_path / "into")
    assert [(r.path.name, r.repeats) for r in scan(tmp_path / "into").records] == [
        ("a.png", 10),
        ("b.png", 1),
    ]
    with pytest.raises(DatasetError, match="does not exist"):
        import_folder(tmp_path / "nowhere", tmp_path / "into")


def test_import_into_a_folder_inside(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "a.png")
    for _ in range(2):
        import_folder(tmp_path, tmp_path / "project")
    assert listed(tmp_path) == ["a.png", "project/a.png"]


def test_the_same_bytes_come_in_once(tmp_path: Path, draw: Draw) -> None:
    source, into = tmp_path / "from", tmp_path / "into"
    draw(source / "3_cat" / "a.png", seed=1, caption="a cat")
    draw(source / "b.png", seed=2)
    draw(source / "b-masklabel.png", seed=2)
    import_folder(source, into)
    first = listed(into)
    # Under another name too; a caption that was missing comes along, one that is there stays.
    draw(source / "c.png", seed=3)
    (source / "b.png").rename(source / "renamed.png")
    (source / "renamed.txt").write_text("late")
    again = import_folder(source, into)
    assert [path.name for path in again.added] == ["c.png", "b.txt"]
    assert (
        sorted(one.kind for one in again.skipped) == ["already there", "already there"] + ["same picture"] * 2
    )
    assert "renamed.png is already here, as b.png." in [one.sentence for one in again.skipped]
    assert listed(into) == sorted([*first, "b.txt", "c.png"])


def test_a_picture_that_disappears_meanwhile_is_no_fault(
    tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = draw(tmp_path / "into" / "kept.png", seed=1)
    walk = importer.walk_files

    def walk_and_lose(*arguments: Any) -> Iterator[Any]:
        yield from walk(*arguments)
        yield kept.with_name("lost.png")

    monkeypatch.setattr(importer, "walk_files", walk_and_lose)
    new = draw(tmp_path / "new.png", seed=2)
    assert [path.name for path in import_files([new], kept.parent).added] == ["new.png"]


def test_two_new_pictures_may_be_alike(tmp_path: Path, draw: Draw) -> None:
    files = [draw(tmp_path / name, seed=1) for name in ("a.png", "b.png")]
    assert len(import_files(files, tmp_path / "into").added) == 2


def test_import_zips(tmp_path: Path, draw: Draw) -> None:
    data = draw(tmp_path / "a.png").read_bytes()
    good = packed(
        tmp_path / "good.zip", ("set/10_cat/a.png", data), ("set/10_cat/a.txt", b"cat"), ("set/x.exe", b"")
    )
    bad = packed(tmp_path / "upload-123", ("../a.png", data))
    imported = import_files([good, bad], tmp_path / "into", ["good.zip", "bad.zip"])
    assert listed(tmp_path / "into") == ["set/10_cat/a.png", "set/10_cat/a.txt"]
    assert [problem.kind for problem in imported.skipped] == ["other file", "zip"]
    assert imported.skipped[1].sentence.startswith("bad.zip is refused")
    assert scan(tmp_path / "into").records[0].repeats == 10


def test_folder_that_cannot_be_written(tmp_path: Path, draw: Draw) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DatasetError, match="cannot be written"):
        import_files([draw(tmp_path / "a.png")], tmp_path / "file" / "into")


@pytest.mark.skipif(os.name == "nt", reason="no pipes and devices there")
@pytest.mark.parametrize("how", ["copy", "link"])
def test_only_regular_files_of_the_folder_are_taken(tmp_path: Path, draw: Draw, how: str) -> None:
    source = tmp_path / "from"
    draw(source / "a.png", caption="a")
    draw(tmp_path / "private.png", seed=1, caption="private")
    (source / "b.png").symlink_to("a.png")
    os.mkfifo(source / "pipe.png")
    os.mkfifo(source / "pipe.txt")
    (source / "link.png").symlink_to(tmp_path / "private.png")
    (source / "a.caption").symlink_to(tmp_path / "private.txt")
    (source / "zero.txt").symlink_to("/dev/zero")
    (source / "metadata.jsonl").symlink_to("/dev/zero")
    (source / "away").symlink_to(tmp_path)
    (source / "loop.png").symlink_to("loop.png")
    with open(source / "sparse.png", "wb") as file:
        file.truncate(1 << 40)
    with open(source / "sparse.txt", "wb") as file:
        file.truncate(1 << 40)
    imported = import_folder(source, tmp_path / "into", TransferMode(how))
    assert listed(tmp_path / "into") == ["a.png", "a.txt", "b.png"]
    assert {problem.path.name: problem.kind for problem in imported.skipped} == {
        "pipe.png": "no file",
        "pipe.txt": "no file",
        "link.png": "link",
        "a.caption": "link",
        "zero.txt": "no file",
        "metadata.jsonl": "no file",
        "away": "link",
        "loop.png": "unreadable",
        "sparse.png": "unreadable",
        "sparse.txt": "caption",
    }
    assert all(problem.path.name in problem.sentence for problem in imported.skipped)


@pytest.mark.parametrize(
    "name", ["n" * 5000, "d/" * 3000 + "a.png", "d" * 255 + "/" + "x" * 255, "\ud800.png"]
)
def test_a_row_with_an_impossible_name_is_said_alone(tmp_path: Path, draw: Draw, name: str) -> None:
    source = tmp_path / "from"
    draw(source / "a.png")
    rows = [{"file_name": name, "text": "x"}, {"file_name": "a.png", "text": "A"}]
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    imported = import_folder(source, tmp_path / "into")
    assert listed(tmp_path / "into") == ["a.png", "a.txt"]
    (problem,) = imported.skipped
    assert problem.kind == "metadata"
    problem.sentence.encode()
    assert len(problem.sentence) < 1500


def test_a_picture_that_comes_back_meanwhile_is_not_written_over(tmp_path: Path, draw: Draw) -> None:
    source, into = tmp_path / "from", tmp_path / "into"
    for name in ("a", "b"):
        draw(source / f"{name}.png", seed=1)
    back = draw(tmp_path / "b.png", seed=2).read_bytes()

    def said(phase: str, done: int, total: int) -> None:
        if phase == "Importing" and done == 1:
            (into / "b.png").write_bytes(back)

    import_folder(source, into, TransferMode(progress=said))
    assert listed(into) == ["a.png", "b-2.png", "b.png"]
    assert (into / "b.png").read_bytes() == back
