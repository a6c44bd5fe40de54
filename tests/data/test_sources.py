"""Imports of what other programs leave: sidecars, words inside of images, class folders, shards, tables."""

import contextlib
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from lora_core.data.captions import read_embedded, read_sidecar
from lora_core.data.dataset import summarize_notes
from lora_core.data.importer import Imported, import_files, import_folder
from lora_core.errors import DatasetError

Draw = Callable[..., Path]


def captions(folder: Path) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): file.read_text() for file in sorted(folder.rglob("*.txt"))}


def said(imported: Imported) -> str:
    return "\n".join(one.sentence for one in imported.skipped)


def xmp(description: str = "", keywords: tuple[str, ...] = (), title: str = "") -> str:
    def text(field: str, words: str) -> str:
        alt = f'<rdf:Alt><rdf:li xml:lang="x-default">{words}</rdf:li></rdf:Alt>'
        return f"<dc:{field}>{alt}</dc:{field}>" if words else ""

    bag = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    return f"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
        xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:dc="http://purl.org/dc/elements/1.1/">
        <rdf:Description>{text("title", title)}{text("description", description)}
        <dc:subject><rdf:Bag>{bag}</rdf:Bag></dc:subject></rdf:Description></rdf:RDF></x:xmpmeta>"""


# Written after the fields that gallery-dl's extractors give, from its documentation.
GALLERY = {
    "danbooru": (
        {
            "tag_string": "1girl red_hair hatsune_miku vocaloid someone highres",
            "tag_string_general": "1girl red_hair u_u", "tag_string_character": "hatsune_miku",
            "tag_string_copyright": "vocaloid", "tag_string_artist": "someone", "tag_string_meta": "highres",
            "rating": "g", "category": "danbooru", "id": 1,
        },
        "hatsune miku, vocaloid, 1girl, red hair, u_u", ("tags of artist", "tags of meta"),
    ),
    "gelbooru": ({"tags": "1girl long_hair >_<", "rating": "general"}, "1girl, long hair, >_<", ()),
    "gelbooru with tags": (
        {"tags": "a b", "tags_general": "long_hair", "tags_character": "rem", "tags_metadata": "x"},
        "rem, long hair", (),
    ),
    "e621": (
        {"tags": {"general": ["red_eyes", "sitting"], "species": ["cat"], "artist": ["x"], "character": []},
         "description": "[b]hello[/b]"},
        "cat, red eyes, sitting", ("tags of artist", "description"),
    ),
    "pixiv": (
        {"tags": ["猫", "cat ears"], "title": "A cat", "caption": "I drew<br/>a &amp; b"},
        "猫, cat ears", ("caption", "title"),
    ),
    "pixiv with translations": ({"tags": [{"name": "猫", "translated_name": "cat"}]}, "猫", ()),
    "twitter": (
        {"content": "A cat\non a <b>mat</b>", "hashtags": [], "author": {"name": "x"}},
        "A cat on a mat", (),
    ),
    "flickr": ({"title": "Cat", "description": "", "tags": []}, "Cat", ()),
    "img2dataset": ({"caption": "a photo of a cat", "url": "http://x", "width": 3}, "a photo of a cat", ()),
    "nothing": ({"id": 4, "tags": None, "title": 5}, "", ()),
}  # fmt: skip


@pytest.mark.parametrize("site", GALLERY)
def test_the_fields_of_a_site_become_a_caption(site: str, tmp_path: Path) -> None:
    fields, caption, left = GALLERY[site]
    file = tmp_path / "a.jpg.json"
    file.write_text(json.dumps(fields))
    found = read_sidecar(file, "a.jpg.json")
    assert (found.caption, found.left) == (caption, left)


def test_a_gallery_is_imported_with_its_captions(tmp_path: Path, draw: Draw) -> None:
    source, into = tmp_path / "from", tmp_path / "into"
    for number, name in enumerate(("a.png", "b.png", "c.png", "d.png", "e.png")):
        draw(source / "artist" / name, seed=number)
    folder = source / "artist"
    (folder / "a.png.json").write_text('{"tags": "red_hair cat", "title": "A"}')
    (folder / "b.json").write_text('{"content": "on a mat"}')
    (folder / "c.txt").write_text("by hand")
    (folder / "c.png.json").write_text('{"tags": "other"}')
    (folder / "d.png.json").write_text('{"tags": ')
    (folder / "e.png.json").write_text('{"id": 1}')
    (folder / "info.json").write_text('{"title": "all of them"}')
    imported = import_folder(source, into)
    assert captions(into) == {
        "artist/a.txt": "red hair, cat", "artist/b.txt": "on a mat", "artist/c.txt": "by hand",
    }  # fmt: skip
    words = said(imported)
    for sentence in (
        "Captions were made of 2 files beside images (artist/a.png.json, artist/b.json). Of their fields not"
        " taken: title.",
        "1 files beside images were not taken, as these have a caption already (artist/c.png.json).",
        "artist/d.png.json is not JSON",
        "artist/e.png.json has no known description of its image",
        "artist/info.json belongs to no image",
    ):
        assert sentence in words
    # The same again changes nothing.
    again = import_folder(source, into)
    assert again.added == []
    assert captions(into)["artist/a.txt"] == "red hair, cat"


def test_lightroom_and_photos(tmp_path: Path, draw: Draw) -> None:
    source, into = tmp_path / "from", tmp_path / "into"
    for number, name in enumerate(("a.png", "b.png", "c.png", "d.png")):
        draw(source / name, seed=number)
    (source / "a.xmp").write_text(xmp("Anna &amp; a cat", ("lake", "portrait", "Lake"), "IMG 1"))
    (source / "b.png.xmp").write_text(xmp(title="The lake"))
    (source / "c.xmp").write_text("<x>")
    (source / "d.aae").write_text("<plist/>")
    words = said(imported := import_folder(source, into))
    assert captions(into) == {"a.txt": "Anna & a cat, lake, portrait", "b.txt": "The lake"}
    assert "Of their fields not taken: title." in words
    assert "c.xmp is not XML" in words
    assert "d.aae holds edits by Photos, and is not read" in words
    assert len(imported.added) == 6


@pytest.mark.parametrize(
    "text",
    [
        '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><x>&b;</x>',
        '<?xml version="1.0"?><!DOCTYPE x SYSTEM "file:///etc/passwd"><x/>',
    ],
)
def test_xml_with_entities_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.xmp").write_text(text)
    with pytest.raises(DatasetError, match="has a document type"):
        read_sidecar(tmp_path / "a.xmp", "a.xmp")
    (tmp_path / "a.xmp").write_bytes(text.encode("utf-16"))
    with pytest.raises(DatasetError, match="not UTF-8"):
        read_sidecar(tmp_path / "a.xmp", "a.xmp")


def iptc(*fields: tuple[int, bytes]) -> bytes:
    """As JPEG holds it: Photoshop's resource 0x0404 with datasets of record 2."""
    data = b"".join(
        b"\x1c\x02" + bytes([kind]) + len(text).to_bytes(2, "big") + text for kind, text in fields
    )
    resource = b"8BIM" + (0x0404).to_bytes(2, "big") + b"\0\0" + len(data).to_bytes(4, "big") + data
    body = b"Photoshop 3.0\0" + resource + b"\0" * (len(data) % 2)
    return b"\xff\xed" + (len(body) + 2).to_bytes(2, "big") + body


def test_words_inside_of_images(tmp_path: Path) -> None:
    source, into = tmp_path / "from", tmp_path / "into"
    source.mkdir()
    Image.new("RGB", (80, 80), "red").save(source / "a.jpg", xmp=xmp("a red field", ("red",)).encode())
    extra = PngImagePlugin.PngInfo()
    extra.add_itxt("XML:com.adobe.xmp", xmp(keywords=("blue", "field")))
    Image.new("RGB", (80, 80), "blue").save(source / "b.png", pnginfo=extra)
    plain = io.BytesIO()
    Image.new("RGB", (80, 80), "green").save(plain, "JPEG")
    words = iptc((120, "a gr\u00fcn field".encode()), (25, b"green"), (25, "gr\u00fcn".encode("latin-1")))
    (source / "c.jpg").write_bytes(plain.getvalue()[:2] + words + plain.getvalue()[2:])
    Image.new("RGB", (80, 80), "white").save(source / "d.jpg", xmp=b"<broken")
    Image.new("RGB", (80, 80), "grey").save(source / "e.jpg", xmp=xmp("not this").encode())
    (source / "e.txt").write_text("by hand")
    imported = import_folder(source, into)
    assert captions(into) == {
        "a.txt": "a red field, red", "b.txt": "blue, field", "c.txt": "a gr\u00fcn field, green, gr\u00fcn",
        "e.txt": "by hand",
    }  # fmt: skip
    assert "descriptions and keywords inside 3 images (a.jpg, b.png, c.jpg)" in said(imported)
    assert "The XMP in d.jpg is not XML" in said(imported)


def packed(path: Path, *entries: tuple[str, bytes], **odd: Any) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in entries:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in odd.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_shards_of_a_webdataset(tmp_path: Path, draw: Draw) -> None:
    first, second, third = (draw(tmp_path / f"{n}.png", seed=n).read_bytes() for n in range(3))
    source, into = tmp_path / "from", tmp_path / "into"
    source.mkdir()
    packed(
        source / "shard-0.tar",
        ("0001.png", first), ("0001.txt", b"a cat"), ("0001.json", b'{"caption": "other"}'),
        ("0002.png", second), ("0002.json", b'{"caption": "a dog", "url": "x"}'), ("0002.cls", b"3"),
    )  # fmt: skip
    packed(source / "shard-1.tar", ("0001.png", third), ("0001.txt", b"a bird"))
    imported = import_folder(source, into)
    assert captions(into) == {"0001-2.txt": "a bird", "0001.txt": "a cat", "0002.txt": "a dog"}
    assert (into / "0001-2.png").read_bytes() == third
    assert "0002.cls in shard-0.tar is neither an image nor a caption" in said(imported)
    # One shard alone, as a page sends it.
    upload = packed(tmp_path / "upload-0", ("a/b.png", first))
    assert len(import_files([upload], tmp_path / "own", ["shard.tar"]).added) == 1
    assert [path.name for path in into.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("entry", "odd", "sentence"),
    [
        ("../a.png", {}, "leads out of the folder"),
        ("/a.png", {}, "has an absolute path"),
        ("a.png", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is a symbolic link"),
        ("a.png", {"type": tarfile.LNKTYPE, "linkname": "b.png"}, "is a symbolic link"),
        ("a.png", {"type": tarfile.FIFOTYPE}, "is not a plain file"),
        ("a.png", {"type": tarfile.CHRTYPE}, "is not a plain file"),
        ("/".join("abcdefghijklmnopqrstuvwxyz") + ".png", {}, "folders deep"),
    ],
)
def test_a_hostile_shard_is_refused(entry: str, odd: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    shard = packed(tmp_path / "bad.tar", (entry, b""), **odd)
    imported = import_files([shard], tmp_path / "into")
    assert imported.added == []
    assert sentence in said(imported)
    assert list((tmp_path / "into").iterdir()) == []


def test_a_broken_or_packed_shard_is_a_sentence(tmp_path: Path, draw: Draw) -> None:
    image = draw(tmp_path / "a.png").read_bytes()
    whole = packed(tmp_path / "a.tar", ("a.png", image)).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: 512 + len(image) // 2])
    (tmp_path / "none.tar").write_bytes(b"no tar at all" * 100)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(tmp_path / "a.png", "a.png")
    for name in ("cut.tar", "none.tar", "packed.tar"):
        imported = import_files([tmp_path / name], tmp_path / "into")
        assert f"{name} cannot be unpacked" in said(imported)
        assert imported.added == []


def test_class_folders(tmp_path: Path, draw: Draw) -> None:
    source = tmp_path / "from"
    for number, name in enumerate(("train/tabby_cat/1.png", "train/dog/1.png", "validation/dog/2.png")):
        draw(source / name, seed=number)
    imported = import_folder(source, tmp_path / "into")
    assert captions(tmp_path / "into") == {
        "train/dog/1.txt": "dog", "train/tabby_cat/1.txt": "tabby cat", "validation/dog/2.txt": "dog",
    }  # fmt: skip
    assert "names of their class folders as captions (dog, tabby_cat)" in said(imported)
    # Not where one has a caption, nor without the folder of a split.
    (source / "train" / "dog" / "1.txt").write_text("by hand")
    import_folder(source, tmp_path / "other")
    import_folder(source / "train", tmp_path / "third")
    assert list(captions(tmp_path / "other").values()) == ["by hand"]
    assert list(captions(tmp_path / "third").values()) == ["by hand"]


def test_a_parquet_table(tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "from" / "a.png")
    (tmp_path / "from" / "metadata.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    words = said(import_folder(tmp_path / "from", tmp_path / "into"))
    assert "metadata.parquet needs the package pyarrow, which is not installed" in words
    monkeypatch.undo()
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = {"file_name": ["a.png", "gone.png"], "text": ["a field", "x"], "label": [1, 2]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "from" / "metadata.parquet")
    words = said(import_folder(tmp_path / "from", tmp_path / "second"))
    assert captions(tmp_path / "second") == {"a.txt": "a field"}
    assert "names gone.png, which was not added" in words


def test_sidecars_in_a_zip(tmp_path: Path, draw: Draw) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(draw(tmp_path / "a.png"), "in/a.png")
        archive.writestr("in/a.png.json", '{"tags": "red_hair"}')
    imported = import_files([tmp_path / "a.zip"], tmp_path / "into")
    assert captions(tmp_path / "into") == {"in/a.txt": "red hair"}
    assert "Captions were made of 1 files" in said(imported)


def test_malformed_sidecars_are_sentences(tmp_path: Path) -> None:
    """Whole files with bytes changed, cut and doubled, and values of every kind in every field."""
    draw = random.Random(0)
    image = tmp_path / "a.jpg"
    Image.new("RGB", (8, 8)).save(image, xmp=xmp("a", ("b",)).encode())
    seeds = {
        ".json": [json.dumps(fields).encode() for fields, _, _ in GALLERY.values()],
        ".xmp": [xmp("a cat", ("b", "c"), "d").encode()],
        ".jpg": [image.read_bytes()],
    }
    for _ in range(400):
        suffix = draw.choice(list(seeds))
        data = bytearray(draw.choice(seeds[suffix]))
        for _ in range(draw.randint(1, 8)):
            at = draw.randrange(len(data))
            data[at : at + draw.randint(0, 4)] = draw.randbytes(draw.randint(0, 4))
        file = tmp_path / f"fuzz{suffix}"
        file.write_bytes(data)
        with contextlib.suppress(DatasetError):
            (read_embedded if suffix == ".jpg" else read_sidecar)(file, file.name)
    values: list[Any] = [
        None,
        5,
        1e9,
        True,
        "",
        "a_b",
        [],
        [1, None, {}, {"name": 3}],
        {},
        {"general": 7},
        [[]],
    ]
    for key in ("tags", "tag_string_general", "caption", "content", "hashtags", "title"):
        for value in values:
            (tmp_path / "b.json").write_text(json.dumps({key: value}))
            assert isinstance(read_sidecar(tmp_path / "b.json", "b.json").caption, str)
    for text in ("[" * 100_000, "null", "[1]", '"a"', '"\\ud800"', "\0"):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(DatasetError, match=r"b\.json is no"):
            read_sidecar(tmp_path / "b.json", "b.json")


def test_many_sidecars_that_are_not_read_are_one_note(tmp_path: Path, draw: Draw) -> None:
    for number in range(3):
        draw(tmp_path / "from" / f"{number}.png", seed=number)
        (tmp_path / "from" / f"{number}.aae").write_text("<plist/>")
    (note,) = summarize_notes(import_folder(tmp_path / "from", tmp_path / "into").skipped)
    assert note.sentence == ("3 files of other programs beside images gave no caption (0.aae, 1.aae, 2.aae).")


def test_a_sidecar_does_not_caption_another_image_of_its_name(tmp_path: Path, draw: Draw) -> None:
    source, into = tmp_path / "from", tmp_path / "into"
    draw(source / "cat.jpg", seed=1)
    draw(source / "dog.jpg").write_bytes(b"broken")
    for name in ("cat", "dog"):
        (source / f"{name}.json").write_text(json.dumps({"tags": [name]}))
        # Here before, and without a caption.
        draw(into / f"{name}.{'png' if name == 'cat' else 'jpg'}", seed=2)
    imported = import_folder(source, into)
    assert captions(into) == {"cat-2.txt": "cat"}
    assert "dog.json belongs to no image" in said(imported)
    # Brought alone it is of the image that is here.
    import_files([source / "dog.json"], into)
    assert captions(into) == {"cat-2.txt": "cat", "dog.txt": "dog"}
