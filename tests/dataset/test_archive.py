"""Hostile zips are refused and leave nothing; sound files come in, and nothing that is there is lost."""

import json
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_core.dataset import zips
from lora_core.dataset.archive import Limits, import_files, import_folder, unpack
from lora_core.dataset.folder import open_dataset, scan
from lora_core.spec.errors import DatasetError
from tests.dataset.conftest import Draw


def listed(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def packed(path: Path, *entries: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


def entry(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def encrypted(path: Path) -> Path:
    """A zip whose table of contents and entry say that it has a password (bit 0 of the flags)."""
    packed(path, ("a.png", b"secret"))
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    return path


def renamed(path: Path, name: bytes) -> Path:
    """A zip with a name in it that Python's own writer would change."""
    packed(path, ("x" * len(name), b"data"))
    path.write_bytes(path.read_bytes().replace(b"x" * len(name), name))
    return path


def lying(path: Path) -> Path:
    """A zip whose table of contents says that ten million bytes are ten."""
    packed(path, ("a.bmp", bytes(10_000_000)))
    true, false = (10_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(true, false))
    return path


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "climbing": (lambda p: packed(p, ("../out.png", b"x")), r"'\.\./out\.png' leads out"),
    "climbing inside": (lambda p: packed(p, ("a/../../out.png", b"x")), "leads out"),
    "climbing with backslashes": (lambda p: renamed(p, rb"a\..\..\out.png"), "leads out"),
    "absolute": (lambda p: packed(p, ("/tmp/out.png", b"x")), "absolute path"),
    "drive": (lambda p: packed(p, ("C:/out.png", b"x")), "absolute path"),
    "link": (lambda p: packed(p, (entry("a.png", stat.S_IFLNK | 0o777), b"/etc/passwd")), "symbolic link"),
    "pipe": (lambda p: packed(p, (entry("a.png", stat.S_IFIFO | 0o644), b"")), "not a plain file"),
    "encrypted": (encrypted, "'a.png' is encrypted"),
    "not a zip": (lambda p: p.write_bytes(b"not a zip") and p, "cannot be unpacked"),
    "cut short": (
        lambda p: p.write_bytes(packed(p, ("a.txt", b"x" * 999)).read_bytes()[:-30]) and p,
        "cannot be",
    ),
    "tight": (lambda p: packed(p, ("a.bmp", bytes(60_000_000))), "'a.bmp' unpacks to far more"),
    "lying": (lying, "cannot be unpacked"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_zips(tmp_path: Path, kind: str) -> None:
    make, words = HOSTILE[kind]
    bad = make(tmp_path / "bad.zip")
    with pytest.raises(DatasetError, match=words) as caught:
        unpack(bad, tmp_path / "into" / "deep")
    assert "bad.zip" in str(caught.value)
    assert listed(tmp_path) == ["bad.zip"]
    assert os.listdir(tmp_path / "into") == []


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(entries=2), "has 3 entries, more than 2"),
        (Limits(file_bytes=99), r"'b\.txt' is larger"),
        (Limits(total_bytes=200), "would unpack to"),
    ],
)
def test_limits(tmp_path: Path, limits: Limits, words: str) -> None:
    large = packed(tmp_path / "a.zip", ("a.txt", b"x"), ("b.txt", b"x" * 150), ("c.txt", b"x" * 90))
    with pytest.raises(DatasetError, match=words):
        unpack(large, tmp_path / "into", limits)
    assert listed(tmp_path) == ["a.zip"]
    assert len(unpack(large, tmp_path / "into", Limits(3, 150, 241)).added) == 3


def test_bytes_are_counted_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if nothing could be told from the table of contents."""
    monkeypatch.setattr(zips, "_check", lambda *_: None)
    large = packed(tmp_path / "a.zip", ("a.txt", b"x" * 100), ("b.txt", b"x" * 100))
    for limits in (Limits(file_bytes=99), Limits(total_bytes=199)):
        with pytest.raises(DatasetError, match=r"unpacks to more than"):
            unpack(large, tmp_path / "into", limits)
        assert listed(tmp_path) == ["a.zip"]


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zips.shutil, "disk_usage", lambda _: zips.shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(DatasetError, match="free some disk space"):
        unpack(packed(tmp_path / "a.zip", ("a.txt", b"x" * 11)), tmp_path / "into")
    with pytest.raises(DatasetError, match="free some disk space"):
        import_files([tmp_path / "a.zip"], tmp_path / "other")


def test_unpack_takes_what_is_of_use(tmp_path: Path, draw: Draw) -> None:
    data = draw(tmp_path / "a.png").read_bytes()
    good = packed(
        tmp_path / "good.zip",
        ("10_cat/", b""),
        ("10_cat/Bär.png", data),
        ("10_cat/Bär.txt", b"a bear"),
        ("metadata.jsonl", b""),
        ("__MACOSX/10_cat/._a.png", b"x"),
        (".DS_Store", b"x"),
        ("readme.md", b"hello"),
        ("run.py", b"print()"),
        ("con.txt", b"x"),
    )
    imported = unpack(good, tmp_path / "into")
    assert listed(tmp_path / "into") == ["10_cat/Bär.png", "10_cat/Bär.txt", "_con.txt", "metadata.jsonl"]
    assert sorted(path.relative_to(tmp_path / "into").as_posix() for path in imported.added) == listed(
        tmp_path / "into"
    )
    assert [problem.sentence.split()[0] for problem in imported.skipped] == ["readme.md", "run.py"]
    with pytest.raises(DatasetError, match="exists already"):
        unpack(good, tmp_path / "into")


def test_utf8_names_that_the_packer_did_not_announce(tmp_path: Path) -> None:
    name = "Bär.txt".encode()
    unpack(renamed(tmp_path / "a.zip", name), tmp_path / "into")
    assert listed(tmp_path / "into") == ["Bär.txt"]


def test_a_zip_is_unpacked_once(tmp_path: Path, draw: Draw) -> None:
    data = draw(tmp_path / "a.png").read_bytes()
    path = packed(tmp_path / "set.ZIP", ("a.png", data), ("a.txt", b"one"))
    first = open_dataset(path, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(folder.name) == 16
    (folder / "a.txt").write_text("edited")
    assert first.records[0].caption == "one"
    assert open_dataset(path, tmp_path / "cache").records[0].caption == "edited"
    packed(path, ("a.png", data), ("a.txt", b"two"))
    assert open_dataset(path, tmp_path / "cache").records[0].caption == "two"


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
    (tmp_path / "from" / "text.png").write_text("no picture")
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
        ('we?ird: "name".png', "we_ird_ _name_.png"),
        ("aux.png", "_aux.png"),
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
    import_files(files, tmp_path / "into", ["a?.png", "a*.png", "A_.png"])
    assert listed(tmp_path / "into") == ["A_-3.png", "a_-2.png", "a_.png"]


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
    assert [problem.kind for problem in imported.skipped] == ["metadata", "metadata"]
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
    assert listed(tmp_path) == ["a.png", "project/a-2.png", "project/a.png"]


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
