"""Hostile zips are refused and leave nothing; of the others comes out what is of use."""

import os
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_core.data import importer
from lora_core.data.dataset import open_dataset
from lora_core.data.importer import Limits, import_files, unpack
from lora_core.errors import DatasetError
from tests.data.conftest import Draw, listed, packed


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
    "deep": (lambda p: packed(p, ("d/" * 21 + "a.png", b"")), "is more than 20 folders deep"),
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
    monkeypatch.setattr(importer, "_check", lambda *_: None)
    large = packed(tmp_path / "a.zip", ("a.txt", b"x" * 100), ("b.txt", b"x" * 100))
    for limits in (Limits(file_bytes=99), Limits(total_bytes=199)):
        with pytest.raises(DatasetError, match=r"unpacks to more than"):
            unpack(large, tmp_path / "into", limits)
        assert listed(tmp_path) == ["a.zip"]


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importer.shutil, "disk_usage", lambda _: importer.shutil._ntuple_diskusage(100, 90, 10)
    )
    with pytest.raises(DatasetError, match="free some disk space"):
        unpack(packed(tmp_path / "a.zip", ("a.txt", b"x" * 11)), tmp_path / "into")
    with pytest.raises(DatasetError, match="free some disk space"):
        import_files([tmp_path / "a.zip"], tmp_path / "other")


def test_a_zip_that_is_unpacked_again_has_the_same_names(tmp_path: Path, draw: Draw) -> None:
    """A run knows its images by name, so that other names would be other images."""
    data = draw(tmp_path / "a.png").read_bytes()
    path = packed(tmp_path / "set.zip", ('10_what?/a:b<c>|"d"*.png', data), ("C D/e\x7f.png", data + b" "))
    known = ["10_what_/a_b_c___d__.png", "C D/e_.png"]
    for _ in range(2):
        open_dataset(path, tmp_path / "cache")
        (folder,) = (tmp_path / "cache").iterdir()
        assert listed(folder) == known
        shutil.rmtree(tmp_path / "cache")
    # What is imported is the user's own from then on, and keeps its letters.
    import_files([path], tmp_path / "own")
    assert sorted(p.name for p in (tmp_path / "own").rglob("*.png")) == [
        "a\uff1ab\uff1cc\uff1e\uff5c\uff02d\uff02\uff0a.png",
        "e_.png",
    ]


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
    with pytest.raises(DatasetError, match="already exists"):
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
