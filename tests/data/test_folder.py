"""What is found in a folder, in which order, with which captions, and what is said of the rest."""

import json
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from lora_core.data import dataset as folder
from lora_core.data.captions import write_caption
from lora_core.data.dataset import open_dataset, require_clean, scan
from lora_core.data.images import Dataset, FileProblem, SizeCache
from lora_core.errors import DatasetError
from tests.data.conftest import Draw


def found(root: Path) -> dict[str, str]:
    """Relative path to caption, and nothing may be wrong."""
    dataset = scan(root)
    assert dataset.problems == []
    return {record.path.relative_to(root).as_posix(): record.caption for record in dataset.records}


def test_order_and_what_is_no_picture(tmp_path: Path, draw: Draw) -> None:
    for name in ("b.png", "A.jpg", "c/Z.webp", "C2/a.png", "é.bmp"):
        draw(tmp_path / name)
    for name in (".hidden.png", "__MACOSX/x.png", ".git/y.png", "b-masklabel.png"):
        draw(tmp_path / name)
    for name in ("Thumbs.db", ".DS_Store", "notes.md", "desktop.ini"):
        (tmp_path / name).write_bytes(b"\x00\x01")
    assert list(found(tmp_path)) == ["A.jpg", "b.png", "c/Z.webp", "C2/a.png", "é.bmp"]


def test_names_in_upper_case(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "IMG_1.JPG")
    (tmp_path / "IMG_1.TXT").write_text("a cat")
    assert found(tmp_path) == {"IMG_1.JPG": "a cat"}


def test_names_that_differ_by_case_only(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "a.png", caption="small")
    draw(tmp_path / "A.png", seed=1, caption="large")
    if len(os.listdir(tmp_path)) == 2:
        pytest.skip("this file system does not tell them apart")
    assert found(tmp_path) == {"A.png": "large", "a.png": "small"}


def test_name_in_two_unicode_forms(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / f"{unicodedata.normalize('NFC', 'Café')}.png")
    (tmp_path / f"{unicodedata.normalize('NFD', 'Café')}.txt").write_text("coffee")
    assert list(found(tmp_path).values()) == ["coffee"]


@pytest.mark.parametrize(
    ("data", "caption"),
    [
        (b"a cat\n", "a cat"),
        (b"\xef\xbb\xbfa cat", "a cat"),
        ("ein Bär, 熊\r\nzwei\r\n".encode(), "ein Bär, 熊\nzwei"),
        (b"", ""),
    ],
)
def test_text_files(tmp_path: Path, draw: Draw, data: bytes, caption: str) -> None:
    draw(tmp_path / "10_dog" / "a.png").with_suffix(".txt").write_bytes(data)
    assert list(found(tmp_path).values()) == [caption]


@pytest.mark.parametrize("data", [b"caf\xe9", "a cat".encode("utf-16")])
def test_caption_that_is_not_utf8(tmp_path: Path, draw: Draw, data: bytes) -> None:
    draw(tmp_path / "a.png").with_suffix(".txt").write_bytes(data)
    dataset = scan(tmp_path)
    assert dataset.records == []
    assert [(p.path.name, p.kind) for p in dataset.problems] == [("a.png", "caption")]
    assert dataset.problems[0].sentence.startswith("a.txt is not UTF-8 text")


@pytest.mark.parametrize("key", ["text", "caption"])
def test_metadata_jsonl(tmp_path: Path, draw: Draw, key: str) -> None:
    for name in ("a.png", "sub/b.png", "c.png"):
        draw(tmp_path / name)
    (tmp_path / "c.txt").write_text("beside")
    rows = [
        {"file_name": "a.png", key: "one"},
        {"file_name": "sub/b.png", key: None},
        {"file_name": "c.png", key: "x"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    assert found(tmp_path) == {"a.png": "one", "c.png": "beside", "sub/b.png": ""}


def test_metadata_csv_in_a_sub_folder(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "sub" / "a.png")
    draw(tmp_path / "sub" / "b.png")
    (tmp_path / "sub" / "metadata.csv").write_text(
        '\ufefffile_name,text\na.png,"red, big"\n./b.png,two\n', "utf-8"
    )
    assert found(tmp_path) == {"sub/a.png": "red, big", "sub/b.png": "two"}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metadata.jsonl", '{"file_name": "a.png"', r"metadata\.jsonl, line 1, cannot be read \(not JSON"),
        ("metadata.jsonl", "[1]\n", "line 1, has no file_name"),
        ("metadata.jsonl", '"a.png"\n', "line 1, has no file_name"),
        ("metadata.jsonl", '\n{"file_name": "a.png"}\n', "line 2, has neither text nor caption"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 3}\n', "line 1, has a caption that is not text"),
        ("metadata.jsonl", '{"file_name": "b.png", "text": "x"}\n', r"names b\.png, which does not exist"),
        ("metadata.jsonl", '{"file_name": "../../a.png", "text": "x"}\n', "does not exist"),
        ("metadata.csv", "file_name\na.png\n", "line 2, has neither text nor caption"),
        ("metadata.csv", "name,text\na.png,x\n", "line 2, has no file_name"),
        ("metadata.csv", "file_name,text\na.png," + "x" * 200_000, r"cannot be read \(not CSV"),
        ("metadata.csv", b"file_name,text\na.png,caf\xe9\n", r"metadata\.csv is not UTF-8"),
    ],
)
def test_broken_metadata(tmp_path: Path, draw: Draw, name: str, text: str | bytes, words: str) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    dataset = scan(tmp_path)
    assert len(dataset.records) == 1
    (problem,) = dataset.problems
    assert problem.kind == "metadata"
    with pytest.raises(DatasetError, match=words):
        require_clean(dataset)


def test_lone_surrogates_in_a_table(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "a.png")
    rows = [r'{"file_name": "a.png", "text": "a \ud800 cat"}', r'{"file_name": "\ud800.png", "text": "x"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    dataset = scan(tmp_path)
    assert [record.caption for record in dataset.records] == ["a � cat"]
    assert [problem.sentence.split(",")[0] for problem in dataset.problems] == ["metadata.jsonl names �.png"]


def test_kohya_folders(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "10_sks dog" / "a.png", caption="a dog")
    draw(tmp_path / "10_sks dog" / "b.png")
    draw(tmp_path / "10_sks dog" / "2_close" / "c.png", caption="c")
    draw(tmp_path / "0_none" / "d.png", caption="d")
    draw(tmp_path / "1920s" / "e.png", caption="e")
    repeats = {record.path.stem: (record.repeats, record.caption) for record in scan(tmp_path).records}
    assert repeats == {
        "a": (10, "a dog"),
        # As kohya's trainer does: the name is the caption of pictures that have none.
        "b": (10, "sks dog"),
        "c": (2, "c"),
        "d": (1, "d"),
        "e": (1, "e"),
    }


def test_size_is_that_of_the_upright_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "a.jpg", exif=exif)
    (record,) = scan(tmp_path).records
    assert (record.width, record.height) == (32, 64)


def test_one_bad_picture_does_not_keep_the_others_out(tmp_path: Path, draw: Draw) -> None:
    good = draw(tmp_path / "good.png", (320, 240), caption="fine")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:200])
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    dataset = scan(tmp_path)
    assert [record.path.name for record in dataset.records] == ["good.png"]
    assert {problem.sentence.split()[0]: problem.kind for problem in dataset.problems} == {
        "cut.png": "unreadable",
        "dot.png": "tiny",
        "empty.jpg": "unreadable",
        "sub/text.png": "unreadable",
    }


def test_links_in_a_circle(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "a" / "x.png", caption="x")
    try:
        (tmp_path / "a" / "back").symlink_to(tmp_path, target_is_directory=True)
    except OSError:
        pytest.skip("links cannot be made here")
    assert list(found(tmp_path)) == ["a/x.png"]


def test_open_the_demo(tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "shipped" / "a.png", caption="x")
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folder, "DEMO_TRAIN", tmp_path / "shipped")
    assert [record.caption for record in open_dataset("demo", tmp_path / "cache").records] == ["x"]


def test_open_a_folder(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "mit Ä und Leer" / "a.png", caption="x")
    dataset = open_dataset(str(tmp_path / "mit Ä und Leer"), tmp_path / "cache")
    assert [record.caption for record in dataset.records] == ["x"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "does not exist; give a folder"),
        (lambda path: path.mkdir(), "There are no images in"),
        (lambda path: path.write_text("x"), "is neither a folder nor a zip"),
    ],
)
def test_what_cannot_be_opened(tmp_path: Path, make: object, words: str) -> None:
    path = tmp_path / "cats"
    make(path)
    with pytest.raises(DatasetError, match=words) as caught:
        open_dataset(path, tmp_path / "cache")
    assert str(path) in str(caught.value)


def test_only_bad_pictures_are_not_the_same_as_none(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(DatasetError, match=r"a\.png is not an image"):
        require_clean(open_dataset(tmp_path, tmp_path / "cache"))


def test_require_clean() -> None:
    problems = [FileProblem(Path(f"{n}.png"), "unreadable", f"{n}.png is broken.") for n in range(7)]
    require_clean(Dataset([], []))
    with pytest.raises(DatasetError) as caught:
        require_clean(Dataset([], problems[:5]))
    assert (
        str(caught.value)
        == "0.png is broken. 1.png is broken. 2.png is broken. 3.png is broken. 4.png is broken."
    )
    with pytest.raises(DatasetError, match=r"4\.png is broken\. And 2 more\.$"):
        require_clean(Dataset([], problems))


def test_write_caption(tmp_path: Path, draw: Draw) -> None:
    picture = draw(tmp_path / "Bär.v2.png", caption="old")
    write_caption(picture, "ein Bär\nzwei")
    assert found(tmp_path) == {"Bär.v2.png": "ein Bär\nzwei"}
    assert (tmp_path / "Bär.v2.txt").read_bytes() == "ein Bär\nzwei".encode()
    assert len(list(tmp_path.iterdir())) == 2


def test_caption_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"a\.txt cannot be written"):
        write_caption(tmp_path / "missing" / "a.png", "x")


def test_a_file_that_is_known_is_asked_for_once(
    tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(40):
        draw(tmp_path / f"{seed}.png", seed=seed % 4, caption="a thing")
    sizes = SizeCache()
    before = scan(tmp_path, sizes)
    stats: list[str] = []
    plain = os.stat
    # Path.stat asks it too.
    monkeypatch.setattr(os, "stat", lambda one, **how: (stats.append(Path(one).name), plain(one, **how))[1])
    monkeypatch.setattr(os.path, "isdir", lambda path: pytest.fail(f"asked whether {path} is a folder"))
    assert scan(tmp_path, sizes) == before
    # Each image for its time, each caption for its length.
    assert sorted(name for name in stats if name[0].isdigit()) == sorted(os.listdir(tmp_path))
