"""Every file of a dataset is trained on, or the audit names it; nothing outside of the folder is read."""

import json
import os
import random
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_core.__main__ import main
from lora_core.data.audit import TrainingView, audit
from lora_core.data.dataset import open_dataset, require_clean, scan
from lora_core.errors import DatasetError
from lora_core.runs.preflight import preflight
from lora_core.settings.config import RunConfig
from tests.data.conftest import Draw, noise, packed

FOLDERS = ("", "10_cat", "sub/deep", "reg/1_cat", "Regularization", "mask", "masks/10_cat", "class_images")
STEMS = ("a", "b", "A", "c d", "held_out", "e_mask", "e", "f-masklabel", "f", "metadata", ".hidden", "ü")
ENDINGS = ("", ".png", ".jpg", ".PNG", ".txt", ".caption", ".json", ".jsonl", ".csv", ".npz", ".md", ".zip")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    found = audit(scan(folder), TrainingView(64, 8))
    json.dumps(found, ensure_ascii=False).encode()
    return found["problems"]


def kinds(folder: Path) -> dict[str, str]:
    """File to kind, of the rows on files."""
    return {Path(row["picture"]).relative_to(folder).as_posix(): row["kind"] for row in rows_of(folder)}


def fill(path: Path, draw: random.Random, number: int) -> None:
    """A file that is what its name says, mostly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = draw.random()
    if kind < 0.04:
        os.symlink(draw.choice(("/etc/hostname", "gone", path.name)), path)
    elif kind < 0.06 and hasattr(os, "mkfifo"):
        os.mkfifo(path)
    elif kind < 0.1:
        path.write_bytes(b"\xff\xfe\x00 neither text nor image")
    elif path.suffix.casefold() in (".png", ".jpg"):
        side = 8 if kind < 0.14 else 64
        noise(side, side, number).save(path, "PNG" if path.suffix.casefold() == ".png" else "JPEG")
    elif path.suffix == ".jsonl":
        path.write_text(json.dumps({"file_name": "a.png", "text": f"row {number}"}))
    elif path.suffix == ".csv":
        path.write_text(f"file_name,text\nb.png,row {number}\n")
    elif path.name == "held_out.txt":
        path.write_text("a.png\nb.png\nsub/deep/a.png\n")
    else:
        path.write_text(f"words {number}")


def has_words(path: Path, words: set[str]) -> bool:
    """Whether the text, or a row of the table, that `fill` wrote is among the words."""
    text = path.read_bytes().decode("latin1")
    return not words.isdisjoint([text, *re.findall(r"row \d+", text)])


def used_files(folder: Path) -> set[Path]:
    """Pictures that are trained on, and every text or table of which something arrives there."""
    dataset = scan(folder)
    records = [*dataset.records, *dataset.reg]
    words = {record.caption for record in records}
    used = {path for record in records for path in (record.path, record.mask) if path is not None}
    for path in folder.rglob("*"):
        if path.is_file() and path not in used and path.suffix in (".txt", ".caption", ".jsonl", ".csv"):
            used |= {path} & ({path} if has_words(path, words) else set())
    if any(record.held_out for record in records):
        used.add(folder / "held_out.txt")
    return used


@pytest.mark.parametrize("seed", range(25))
def test_every_file_is_used_or_named(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    folder = tmp_path / "set"
    for number in range(30):
        path = folder / draw.choice(FOLDERS) / (draw.choice(STEMS) + draw.choice(ENDINGS))
        if not path.exists() and not path.is_symlink():
            fill(path, draw, number)
    rows = rows_of(folder)
    named = {Path(row["picture"]) for row in rows}
    sentences = " ".join(row["sentence"] for row in rows)
    everything = {path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    hidden = {path for path in everything if path.name.startswith(".")}
    silent = everything - hidden - named - used_files(folder)
    assert {p.relative_to(folder).as_posix() for p in silent if p.name not in sentences} == set()
    assert not hidden or f"{len(hidden)} hidden" in sentences


def test_what_each_file_is_called(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "img" / "10_cat" / "a.png", caption="a cat")
    draw(tmp_path / "img" / "10_cat" / "a-masklabel.png")
    draw(tmp_path / "img" / "10_cat" / "a_mask.png")
    draw(tmp_path / "mask" / "a.png")
    draw(tmp_path / "reg" / "1_cat" / "r.png", caption="a cat")
    (tmp_path / "img" / "10_cat" / "a.caption").write_text("other")
    (tmp_path / "img" / "10_cat" / "a.npz").write_bytes(b"x")
    (tmp_path / "gone.txt").write_text("lonely")
    draw(tmp_path / "img" / "10_cat" / "two.png", seed=1, caption="two")
    draw(tmp_path / "img" / "10_cat" / "two.jpg", seed=2)
    Image.new("RGBA", (64, 64), (200, 30, 30, 120)).save(tmp_path / "clear.png")
    (tmp_path / "clear.txt").write_text("clear")
    found = {name: kind for name, kind in kinds(tmp_path).items() if kind not in ("twins", "blurred")}
    assert found == {
        "img/10_cat/a_mask.png": "mask",
        "mask/a.png": "mask",
        "img/10_cat/a.caption": "second caption",
        "img/10_cat/a.npz": "other file",
        "img/10_cat/two.txt": "shared caption",
        "gone.txt": "caption without picture",
        "clear.png": "transparent",
    }
    dataset = scan(tmp_path)
    require_clean(dataset)
    masks = {record.path.name: record.mask and record.mask.name for record in dataset.records}
    assert masks == {"a.png": "a-masklabel.png", "two.png": None, "two.jpg": None, "clear.png": None}


def test_a_picture_called_mask_without_another_is_trained_on(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "gas_mask.png", caption="a gas mask")
    draw(tmp_path / "10_masks" / "venice.png", seed=1, caption="a mask")
    assert [record.path.name for record in scan(tmp_path).records] == ["venice.png", "gas_mask.png"]
    assert scan(tmp_path).notes == []


def table_rows(*rows: tuple[str, str]) -> str:
    return "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows)


def test_rows_that_are_not_used_are_named_with_what_wins(
    tmp_path: Path, draw: Draw, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "a.png", caption="beside")
    draw(tmp_path / "sub" / "b.png", seed=1)
    draw(tmp_path / "c.png", seed=2)
    draw(tmp_path / "e.png", seed=3)
    (tmp_path / "metadata.jsonl").write_text(
        table_rows(("a.png", "x"), ("sub/b.png", "far"), ("c.png", "one"), ("c.png", "two"), ("e.png", "e"))
    )
    (tmp_path / "metadata.csv").write_text("file_name,text\nc.png,three\n")
    (tmp_path / "sub" / "metadata.csv").write_text("file_name,text\nb.png,near\n")
    dataset = scan(tmp_path)
    require_clean(dataset)
    assert {r.path.name: r.caption for r in dataset.records} == {
        "a.png": "beside",
        "b.png": "near",
        "c.png": "two",
        "e.png": "e",
    }
    said = {note.sentence for note in dataset.notes}
    assert {sentence.replace("has rows that are not used, as ", "") for sentence in said} == {
        "metadata.jsonl the text file beside the image is its caption (a.png).",
        "metadata.jsonl the row in sub/metadata.csv is the caption (sub/b.png).",
        "metadata.jsonl a later row for the same image is its caption (c.png).",
        "metadata.csv the row in metadata.jsonl is the caption (c.png).",
    }
    config = RunConfig().changed({"dataset.path": str(tmp_path), "model.base": "demo"})
    before_start = [
        problem for problem in preflight(config, tmp_path, card=lambda: None) if not problem.blocking
    ]
    assert said <= {problem.sentence for problem in before_start}
    assert main(["audit", str(tmp_path), "--workspace", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(f"  unused row: {sentence}\n" in printed for sentence in said)
    assert "Nothing is wrong" not in printed


@pytest.mark.parametrize("name", ["mask", "reg"])
def test_the_folder_that_is_given_is_what_the_person_means(tmp_path: Path, draw: Draw, name: str) -> None:
    draw(tmp_path / name / "1_cat" / "a.png", caption="a cat")
    assert len(scan(tmp_path / name).records) == 1
    with pytest.raises(DatasetError, match=r"There are no images in .* (for regularisation|mask)"):
        open_dataset(tmp_path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("mode", "fill_with", "transparent"),
    [
        ("RGBA", (9, 9, 9, 255), False),
        ("RGBA", (9, 9, 9, 254), True),
        ("LA", (9, 0), True),
        ("RGB", (9, 9, 9), False),
    ],
)
def test_transparent_pictures(
    tmp_path: Path, mode: str, fill_with: tuple[int, ...], transparent: bool
) -> None:
    Image.new(mode, (64, 64), fill_with).save(tmp_path / "a.png")
    assert scan(tmp_path).records[0].transparent is transparent


def test_what_is_not_used_is_said_before_the_start(
    tmp_path: Path, draw: Draw, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    for number in range(3):
        draw(folder / f"{number}.png", seed=number, caption=f"number {number}")
        draw(folder / "reg" / "1_cat" / f"{number}.png", seed=9)
        draw(folder / f"other {number}-masklabel.png")
        Image.new("RGBA", (64, 64), (0, 0, 90 * number, 9)).save(folder / f"clear {number}.png")
    config = RunConfig().changed({"dataset.path": str(folder), "model.base": "demo"})
    found = {problem.kind: problem for problem in preflight(config, tmp_path, card=lambda: None)}
    assert not any(problem.blocking for problem in found.values())
    assert found["mask"].sentence.startswith("3 masks belong to no image")
    assert found["regularisation"].sentence == (
        "Half of the steps show 3 images for regularisation, which count 1 (dataset.reg_weight)."
    )
    assert "3 images are partly transparent" in found["transparent"].sentence
    assert "dataset.background" in found["transparent"].sentence
    assert "(clear 0.png, clear 1.png, clear 2.png)" in found["transparent"].sentence
    assert main(["audit", str(folder), "--workspace", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for kind in ("mask", "transparent"):
        assert f"  {kind}: {found[kind].sentence}\n" in printed
    assert "Nothing is wrong" not in printed


@pytest.mark.parametrize(
    ("name", "reg", "mask"),
    [
        ("a-masklabel.png", [], "a-masklabel.png"),
        ("mask/a.png", [], "a.png"),
        ("reg/1_cat/b.png", ["b.png"], None),
        ("class_images/x.webp", ["x.webp"], None),
        ("reg/1_cat/a.txt", [], None),
        ("mask/readme.txt", [], None),
        (".reg/a.png", [], None),
        ("10_reg/b.png", [], None),
    ],
)
def test_what_a_file_is_for_follows_from_its_name_and_stops_no_run(
    tmp_path: Path, draw: Draw, name: str, reg: list[str], mask: str | None
) -> None:
    for stem in ("a", "c", "d"):
        draw(tmp_path / f"{stem}.png", (64, 64), ord(stem), caption="a cat")
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(64, 64, 7).save(path, "PNG")
    if path.suffix == ".txt":
        path.write_text("words")
    dataset = scan(tmp_path)
    assert [record.path.name for record in dataset.reg] == reg
    assert {record.path.name: record.mask and record.mask.name for record in dataset.records}["a.png"] == mask
    config = RunConfig().changed({"dataset.path": str(tmp_path), "model.base": "demo"})
    assert not any(one.blocking for one in preflight(config, tmp_path, card=lambda: None))


def test_what_a_zip_holds_beside_pictures(tmp_path: Path, draw: Draw) -> None:
    data = draw(tmp_path / "a.png").read_bytes()
    path = packed(
        tmp_path / "set.zip", ("a.png", data), ("a.txt", b"a"), ("latents.npz", b"x"), (".DS_Store", b"x")
    )
    for _ in range(2):  # unpacked now, and found unpacked
        notes = open_dataset(path, tmp_path / "cache").notes
        assert [(note.path.name, note.kind) for note in notes] == [
            ("latents.npz", "other file"),
            ("set.zip", "hidden"),
        ]


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may have about 100 letters
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


HOSTILE: dict[str, Callable[[Path], None]] = {
    "pipe": _fifo,
    "socket": _socket,
    "sparse": _sparse,
    "zero": _link("/dev/zero"),
    "terminal": _link("/dev/tty"),
    "process": _link("/proc/self/environ"),
    "kernel": _link("/proc/kmsg"),
    "secret": _link("/etc/passwd"),
    "loop": _link("loop.txt"),
    "dangling": _link("nowhere"),
    "home": _link("/etc"),
    "above": _link("../outside"),
}


@pytest.mark.skipif(os.name == "nt", reason="no pipes and devices there")
@pytest.mark.parametrize("ending", ["a.txt", "metadata.jsonl", "p.png", "folder", "held_out.txt", "n.npz"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_pipes_devices_and_links_out_are_named_and_never_read(
    tmp_path: Path, draw: Draw, kind: str, ending: str
) -> None:
    folder = tmp_path / "set"
    draw(folder / "a.png")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "private.txt").write_text("private")
    try:
        HOSTILE[kind](folder / ending)
    except OSError as error:
        pytest.skip(str(error))
    dataset = scan(folder)
    assert [record.path.name for record in dataset.records] in (["a.png"], [])
    assert all(record.caption == "" for record in dataset.records)
    rows = rows_of(folder)
    assert any(ending in (Path(row["picture"]).name, row["sentence"].split()[0]) for row in rows)


def test_links_inside_a_folder_are_fine(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "one" / "a.png", caption="shared words")
    (tmp_path / "one" / "b.png").symlink_to("a.png")
    (tmp_path / "one" / "b.txt").symlink_to(tmp_path / "one" / "a.txt")
    (tmp_path / "two").symlink_to("one")
    dataset = scan(tmp_path)
    assert [(r.path.name, r.caption) for r in dataset.records] == [
        ("a.png", "shared words"),
        ("b.png", "shared words"),
    ]
    assert [(note.path.name, note.kind) for note in dataset.notes] == [("two", "link")]
    require_clean(dataset)


def test_a_picture_may_be_a_link_to_elsewhere_but_no_caption(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "elsewhere" / "a.png", caption="from elsewhere")
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("a.png", "a.txt"):
        (folder / name).symlink_to(tmp_path / "elsewhere" / name)
    dataset = scan(folder)
    assert [record.caption for record in dataset.records] == [""]
    with pytest.raises(DatasetError, match=r"a\.txt is a link to a file outside of the folder"):
        require_clean(dataset)


def test_folders_that_link_to_each_other_are_walked_once(tmp_path: Path, draw: Draw) -> None:
    """Each of 12 folders with links to all others: followed, that would be billions of paths."""
    for number in range(12):
        draw(tmp_path / f"d{number}" / "a.png", (16, 16), seed=number)
        for other in range(12):
            (tmp_path / f"d{number}" / f"to{other}").symlink_to(tmp_path / f"d{other}")
    assert len(scan(tmp_path).records) == 12


def test_too_deep_a_folder_is_refused(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "a.png")
    draw(tmp_path.joinpath(*["d"] * 20) / "b.png")
    assert len(scan(tmp_path).records) == 2
    draw(tmp_path.joinpath(*["d"] * 300) / "c.png")
    with pytest.raises(DatasetError, match="is more than 20 folders deep"):
        require_clean(scan(tmp_path))


def test_names_that_are_not_utf8(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "a.png")
    try:
        shutil.copy(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    (row,) = [row for row in rows_of(tmp_path) if row["kind"] == "name"]
    assert row["sentence"] == "The name of �.png is not UTF-8; rename it."


@pytest.mark.parametrize(("name", "size"), [("a.txt", 1_000_001), ("metadata.jsonl", 50_000_001)])
def test_texts_that_are_too_large(tmp_path: Path, draw: Draw, name: str, size: int) -> None:
    draw(tmp_path / "a.png")
    with open(tmp_path / name, "wb") as file:
        file.truncate(size)
    (problem,) = scan(tmp_path).problems
    assert problem.sentence.startswith(f"{name} is larger than {size // 1_000_000} MB")


def test_a_table_of_nonsense_is_a_few_sentences(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text("x\n" * 100_000)
    problems = scan(tmp_path).problems
    assert len(problems) == 101
    assert problems[-1].sentence == "metadata.jsonl has 99900 more lines that cannot be used."
    rows = [json.dumps({"file_name": f"{n}.png", "text": ""}) for n in range(5000)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert len(scan(tmp_path).problems) == 101
