"""`dataset.toml`: what is read, what is refused, and how it is made and edited."""

import contextlib
import itertools
import os
import random
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from PIL import Image

from lora_core.data import dataset
from lora_core.data.audit import TrainingView, audit, concept_rows
from lora_core.data.concepts import edit_concept, propose_concepts
from lora_core.data.dataset import apply_settings, open_dataset, scan, scan_again, split_holdout
from lora_core.data.images import Dataset, SizeCache
from lora_core.data.importer import import_folder
from lora_core.errors import DatasetError
from lora_core.projects.project import Project, move_images
from lora_core.runs.folder import RunFolder
from lora_core.runs.preflight import preflight
from lora_core.settings.config import RunConfig
from lora_core.train.setup import input_hashes
from lora_core.verbs.datasets import concepts_list, concepts_make, concepts_move, concepts_set


def images(folder: Path, *names: str) -> Path:
    """Images of different colours, each with its name for a caption, but for those in `bare`."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (40 * number % 256, 90, 200)).save(path)
        if path.parent.name != "bare":
            path.with_suffix(".txt").write_text(path.stem)
    return folder


def written(folder: Path, *subsets: str, above: str = "[[datasets]]") -> Path:
    listed = "\n".join(f"[[datasets.subsets]]\n{subset}" for subset in subsets)
    (folder / "dataset.toml").write_text(f"{above}\n{listed}\n")
    return folder


def sentences(folder: Path) -> list[str]:
    return [one.sentence for one in scan(folder).problems]


def test_a_scan_that_was_kept_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = images(tmp_path / "set", "a/1.png", "a/2.png", "b/3.png", "bare/4.png", "reg/5.png", "c/6.png")
    shutil.copy(folder / "b/3.png", folder / "b/3-masklabel.png")
    (folder / "crops.json").write_text('{"a/1.png": [0, 0, 0.5, 0.5, 0.25, 0.25]}')
    (folder / "held_out.txt").write_text("a/2.png\n")
    written(
        folder,
        'image_dir = "a"\nresolution = 256\ncustom_attributes = {share = 2, trigger = "ohwx"}',
        'image_dir = "b"\ncustom_attributes = {share = 1}',
        'image_dir = "bare"\nclass_tokens = "a thing"\ncustom_attributes = {share = 1}',
        'image_dir = "reg"\nis_reg = true',
    )
    made, kept = scan(folder), tmp_path / "kept.json"
    assert (len(made.records), len(made.reg), len(made.loose), len(made.problems)) == (4, 1, 1, 0)
    (folder / "b/broken.png").write_bytes(b"no image")
    assert len(scan_again(folder, SizeCache(), 1, kept).problems) == 1
    (folder / "b/broken.png").unlink()
    assert scan_again(folder, SizeCache(), 1, kept) == made
    monkeypatch.setattr(dataset, "scan", lambda *given: Dataset([], []))
    again = scan_again(folder, SizeCache(), 1, kept)
    assert (again, again.root) == (made, folder)
    # Concepts are compared by their values, and many images have the same object.
    assert {one.concept for one in again.records} == {one.concept for one in made.records}
    assert again.records[0].concept is again.records[1].concept
    # What `dataset.toml` may hold is in a table, not in the code.
    (tmp_path / "other_trainers.toml").write_text("")
    monkeypatch.setattr(dataset, "ASSETS", tmp_path)
    assert scan_again(folder, SizeCache(), 1, kept) == Dataset([], [])
    assert (
        scan_again(folder, SizeCache(), 2, kept)
        == scan_again(folder, SizeCache(), None, kept)
        == Dataset([], [])
    )


# From the documentation of sd-scripts (docs/config_README-en.md), with the folders of this test.
KOHYA = """
[general]
shuffle_caption = true
caption_extension = ".txt"
keep_tokens = 1
enable_bucket = true

[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = "hoge"
  class_tokens = "hoge girl"

  [[datasets.subsets]]
  image_dir = 'fuga'
  class_tokens = "fuga boy"
  keep_tokens = 3
  num_repeats = 10
  flip_aug = true
  caption_prefix = "photo of"

[[datasets]]
resolution = [768, 768]

  [[datasets.subsets]]
  is_reg = true
  image_dir = "bare"
  class_tokens = "human"
  color_aug = true
  face_crop_aug_range = "0.5,1.0"
"""


def test_a_plain_file_of_kohyas_trainer_is_read_with_all_its_keys(tmp_path: Path) -> None:
    images(tmp_path, "hoge/a.png", "hoge/deep/b.png", "fuga/c.png", "bare/d.png", "10_other/e.png")
    (tmp_path / "dataset.toml").write_text(KOHYA)
    dataset = scan(tmp_path)
    assert dataset.problems == []
    found = {one.path.name: one for one in (*dataset.records, *dataset.reg)}
    assert {name: one.concept and one.concept.name for name, one in found.items()} == {
        "a.png": "hoge", "b.png": "hoge", "c.png": "fuga", "d.png": "bare",
    }  # fmt: skip
    assert found["a.png"].concept is not None
    assert found["c.png"].concept is not None
    first = {"shuffle_tags": True, "resolutions": (512,)}
    assert dict(found["a.png"].concept.rules) == {**first, "keep_tags": 2}
    assert dict(found["c.png"].concept.rules) == {**first, "keep_tags": 3, "flip": True}
    assert found["d.png"].concept is not None
    rules = dict(found["d.png"].concept.rules)
    assert (rules["resolutions"], rules["color_aug"]) == ((768,), 0.1)
    assert [(one.repeats, one.reg) for one in found.values()] == [
        (10, False),
        (1, False),
        (1, False),
        (1, True),
    ]
    assert (found["d.png"].caption, found["c.png"].full_caption) == ("human", "photo of c")
    assert [one.path.name for one in dataset.loose] == ["e.png"]
    said = " ".join(note.sentence for note in dataset.notes)
    for part in (
        "[general]: enable_bucket = True needs no setting here",
        "dataset 1: batch_size = 4 has no effect here; set train.batch_size",
        "subset 3: face_crop_aug_range = '0.5,1.0' has no effect here",
        "10_other/e.png is in no concept of dataset.toml; it is not used.",
    ):
        assert part in said


def test_a_file_that_says_what_folders_say_leads_to_the_same_images(tmp_path: Path) -> None:
    images(tmp_path, "10_red_cat/a.png", "b.png", "reg/1_cat/bare/c.png")
    before = scan(tmp_path)
    (tmp_path / "dataset.toml").write_text(propose_concepts(before, tmp_path))
    after = scan(tmp_path)
    plain = [
        [(one.path, one.caption, one.repeats, one.reg) for one in (*found.records, *found.reg)]
        for found in (before, after)
    ]
    assert plain[0] == plain[1]
    assert (after.problems, after.notes, after.loose) == ([], [], [])
    assert all(one.concept for one in after.records)


@pytest.mark.parametrize(
    ("subsets", "says"),
    [
        (
            ['image_dir = "gone"'],
            "subset 1: image_dir = 'gone' does not exist; create it, or remove the subset.",
        ),
        (['image_dir = "/data/cat"'], "outside of the folder of dataset.toml; did you mean 'cat'?"),
        (['image_dir = "../elsewhere"'], "'../elsewhere' is outside of the folder of dataset.toml; put it"),
        (["num_repeats = 2"], "subset 1: has no image_dir; name the folder of its images."),
        (
            ['image_dir = "cat"\nnum_repeat = 2'],
            "the key num_repeat is not known here; did you mean num_repeats?",
        ),
        (
            ['image_dir = "cat"\nconditioning_data_dir = "m"'],
            "conditioning_data_dir is not known here; name that folder mask, beside the images or above them",
        ),
        (['image_dir = "cat"\nzzz = 2'], "dataset.toml, subset 1: the key zzz is not known here; remove it."),
        (['image_dir = "cat"\nnum_repeats = 0'], "num_repeats = 0 is not an integer from 1 to 10,000"),
        (['image_dir = "cat"\nflip_aug = "yes"'], "subset 1: flip_aug = 'yes' should be true or false."),
        (['image_dir = "cat"\ncaption_dropout_rate = 2'], "caption_dropout_rate"),
        (['image_dir = "cat"\nclass_tokens = 3'], "class_tokens = 3 is not text; put it in quotes."),
        (['image_dir = "cat"\ncaption_extension = ".tags"'], "captions are .txt or .caption."),
        (['image_dir = "cat"\nis_reg = 1'], "is_reg = 1 is neither true nor false"),
        (
            ['image_dir = "cat"\ncustom_attributes = { rol = "style" }'],
            "the key rol is not known here; did you",
        ),
        (
            ['image_dir = "cat"\ncustom_attributes = { role = "styl" }'],
            "'styl' is not one of subject, style, reg",
        ),
        (['image_dir = "cat"\ncustom_attributes = { share = -1 }'], "share = -1 is not a number"),
        (
            ['image_dir = "cat"\ncustom_attributes = { images = ["z*"] }'],
            "has no image of its own; put some into",
        ),
        (
            ['image_dir = "cat"\ncustom_attributes = { images = ["a*", "z*"] }'],
            "no image of cat/a*, z* is named z*",
        ),
        (
            ['image_dir = "cat"\nis_reg = true\ncustom_attributes = { trigger = "x" }'],
            "regularisation is without",
        ),
        (
            ['image_dir = "cat"', 'image_dir = "./cat/"'],
            "has an image in two concepts, cat and cat (cat/a.png); give each image to one of them. Several"
            " sizes of a folder are one subset",
        ),
        (
            ['image_dir = "."', 'image_dir = "cat"', 'image_dir = "dog"'],
            "the concept . has no image of its own",
        ),
        (['image_dir = "empty"'], "the concept empty has no image of its own; put some into"),
        (
            ['image_dir = "cat"\ncustom_attributes = { share = 1 }', 'image_dir = "dog"'],
            "gives some concepts a share and others none (dog)",
        ),
        ([], "lists no folder"),
    ],
)
def test_what_cannot_be_meant_is_said_before_the_start(tmp_path: Path, subsets: list[str], says: str) -> None:
    images(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / "empty").mkdir()
    written(tmp_path, *subsets)
    found = preflight(RunConfig().changed({"dataset.path": str(tmp_path)}), tmp_path)
    assert any(says in one.sentence and one.blocking for one in found), [one.sentence for one in found]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[datasets", "dataset.toml is not valid TOML"),
        ("datasets = 3", "is not a list of tables"),
        ("[train]\nlr = 1", "dataset.toml: the key train is not known here; remove it."),
        ("general = 3", "[general]: is not a table"),
        ("\xff", "dataset.toml is not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_such_list_is_said_before_the_start(tmp_path: Path, text: str, says: str) -> None:
    images(tmp_path, "cat/a.png")
    (tmp_path / "dataset.toml").write_bytes(text.encode("latin-1"))
    assert any(says in one for one in sentences(tmp_path))
    with pytest.raises(DatasetError, match=r"dataset\.toml"):
        concepts_list(tmp_path)


def test_a_part_of_a_folder_is_named_by_patterns(tmp_path: Path) -> None:
    images(tmp_path, "a1.png", "a2.png", "B1.png")
    written(
        tmp_path,
        'image_dir = "."',
        'image_dir = "."\ncustom_attributes = { images = ["b*.png"], name = "bees" }',
    )
    found = {one.path.name: one.concept for one in scan(tmp_path).records}
    assert {name: one and one.name for name, one in found.items()} == {
        "a1.png": ".",
        "a2.png": ".",
        "B1.png": "bees",
    }


def test_masks_and_background_of_a_concept_take_the_place_of_the_settings(tmp_path: Path) -> None:
    images(tmp_path, "cat/a.png", "dog/b.png", "owl/c.png")
    for name in ("cat/a", "dog/b"):
        Image.linear_gradient("L").resize((64, 64)).save(tmp_path / f"{name}-masklabel.png")
    Image.new("RGBA", (64, 64), (255, 0, 0, 100)).save(tmp_path / "owl/c.png")
    written(
        tmp_path,
        'image_dir = "cat"\ncustom_attributes = { masks = "off" }',
        'image_dir = "dog"',
        'image_dir = "owl"\nalpha_mask = true\ncustom_attributes = { background = "black" }',
    )
    cat, dog, owl = apply_settings(scan(tmp_path).records, RunConfig())
    assert (cat.mask, dog.mask, owl.mask) == (None, tmp_path / "dog/b-masklabel.png", owl.path)
    assert (cat.background, owl.background) == ("white", "black")


def test_what_images_of_a_style_share_is_no_finding(tmp_path: Path) -> None:
    names = [f"cat/{n}.png" for n in range(6)]
    images(tmp_path, *names)
    for name in names:
        Image.new("RGB", (64, 64), "black").save(tmp_path / name)
    kinds = []
    for role in ("subject", "style"):
        written(tmp_path, f'image_dir = "cat"\ncustom_attributes = {{ role = "{role}" }}')
        found = audit(scan(tmp_path), TrainingView(64, 8))
        kinds.append({row["kind"] for row in found["learned"]})
        assert [row["role"] for row in found["concepts"]] == [role]
    assert kinds[0] - kinds[1] == {"absorbed"}


def test_an_edit_keeps_comments_and_refuses_what_cannot_be_read(tmp_path: Path) -> None:
    images(tmp_path, "cat/a.png", "dog/b.png")
    written(tmp_path, 'image_dir = "cat"  # mine', 'image_dir = "dog"\nis_reg = true')
    for number, key, value in (
        (1, "num_repeats", 4), (1, "trigger", "zwx"), (1, "role", "style"),
        (2, "role", "subject"), (2, "share", 1.5),
    ):  # fmt: skip
        (tmp_path / "dataset.toml").write_text(edit_concept(tmp_path, number, key, value))
    assert (tmp_path / "dataset.toml").read_text() == (
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cat"  # mine\nnum_repeats = 4\n'
        'custom_attributes = {trigger = "zwx", role = "style"}\n[[datasets.subsets]]\nimage_dir = "dog"\n'
        'custom_attributes = {role = "subject", share = 1.5}\n'
    )
    (tmp_path / "dataset.toml").write_text(edit_concept(tmp_path, 2, "share", ""))
    assert sentences(tmp_path) == []
    for number, key, value, says in (
        (1, "num_repeats", 0, "num_repeats = 0"), (1, "rol", "x", "rol is not known"),
        (3, "share", 1, "no concept 3"), (1, "role", "hero", "'hero' is not one of"),
        (1, "flip_aug", "yes", "true or false"),
    ):  # fmt: skip
        with pytest.raises(DatasetError, match=says):
            edit_concept(tmp_path, number, key, value)


def test_a_list_of_any_form_is_added_to_and_edited(tmp_path: Path) -> None:
    images(tmp_path, "cat/a.png", "dog/b.png")
    for text in (
        'datasets = [{subsets = [{image_dir = "cat"}]}]',
        '[[datasets]]\nsubsets = [{image_dir = "cat"}]',
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cat"\n[general]\nflip_aug = false',
    ):
        (tmp_path / "dataset.toml").write_text(text)
        for change in (
            lambda: propose_concepts(scan(tmp_path), tmp_path),
            lambda: edit_concept(tmp_path, 2, "share", 2),
            lambda: edit_concept(tmp_path, 1, "share", 1),
        ):
            (tmp_path / "dataset.toml").write_text(change())
        found = [one.concept for one in scan(tmp_path).records]
        assert [one and (one.name, one.share) for one in found] == [("cat", 1.0), ("dog", 2.0)]


def test_no_text_is_a_traceback(tmp_path: Path) -> None:
    images(tmp_path, "hoge/a.png")
    draw = random.Random(0)
    values = (
        "1",
        "-1",
        "true",
        '"x"',
        "[]",
        "{}",
        "1.5",
        '["a"]',
        "{ a = 1 }",
        "nan",
        "1979-01-01",
        '"../x"',
        "99999999999999999999",
    )
    others = ("[x]", "[[general]]", "[datasets]", "[[datasets.subsets.custom_attributes]]", "")
    for _ in range(80):
        lines = [*KOHYA.splitlines(), 'custom_attributes = { share = 1, images = ["a*"] }']
        for place in draw.choices(range(len(lines)), k=3):
            key, equals, _ = lines[place].partition("=")
            lines[place] = f"{key}= {draw.choice(values)}" if equals else draw.choice((*others, *lines))
        (tmp_path / "dataset.toml").write_text("\n".join(lines))
        assert all(one.startswith("dataset.toml") for one in sentences(tmp_path))
        with contextlib.suppress(DatasetError):
            edit_concept(tmp_path, 1, "share", 1)


def test_a_concept_goes_without_its_folder_and_one_that_teaches_stays(tmp_path: Path) -> None:
    images(tmp_path, "cat/a.png", "dog/b.png")
    written(tmp_path, 'image_dir = "cat"', 'image_dir = "dog"')
    concepts_set(tmp_path, 1, "role", "regularisation", tmp_path)
    with pytest.raises(DatasetError, match="Regularisation alone teaches nothing"):
        concepts_set(tmp_path, 2, "role", "regularisation", tmp_path)
    concepts_set(tmp_path, 1, "role", "subject", tmp_path)
    concepts_set(tmp_path, 1, "image_dir", "", tmp_path)
    assert ([one.path.name for one in scan(tmp_path).records], sentences(tmp_path)) == (["b.png"], [])
    concepts_set(tmp_path, 1, "image_dir", "", tmp_path)
    assert not (tmp_path / "dataset.toml").exists()
    assert len(scan(tmp_path).records) == 2


def test_concepts_by_commands(tmp_path: Path) -> None:
    folder = images(
        tmp_path / "set", *(f"10_cat/{n}.png" for n in range(4)), *(f"dog/{n}.png" for n in range(4, 8))
    )
    place = tmp_path / "workspace"
    before = concepts_list(folder, pictures=0.0)
    assert [(row["name"], row["number"], round(row["share"], 3)) for row in before] == [
        ("10_cat", 0, 0.909), ("dog", 0, 0.091),
    ]  # fmt: skip
    assert concepts_make(folder, place) == folder / "dataset.toml"
    with pytest.raises(DatasetError, match="Each image is in a concept"):
        concepts_make(folder, place)
    concepts_set(folder, 1, "share", "1", place)
    concepts_set(folder, 2, "share", "3", place)
    concepts_set(folder, 2, "trigger", "zwx", place)
    found = concepts_list(folder, pictures=0.0)
    assert [(row["share"], row["asked"], row["trigger"], row["repeats"]) for row in found] == [
        (0.25, 1.0, None, [1, 1]), (0.75, 3.0, "zwx", [3, 3]),
    ]  # fmt: skip


def test_a_project_writes_its_concepts_and_takes_them_back(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    images(project.image_folder, "cat/a.png", "dog/b.png")
    made = project.change_concepts(lambda folder: propose_concepts(project.dataset(), folder))
    assert [one.concept and one.concept.name for one in project.dataset().records] == ["cat", "dog"]
    assert made["before"] == ""
    project.change_concepts(lambda folder: made["before"])
    assert [one.concept for one in project.dataset().records] == [None, None]
    assert not (project.image_folder / "dataset.toml").exists()


def test_shares_are_zero_where_all_of_a_concept_is_held_out(tmp_path: Path) -> None:
    images(tmp_path, "cat/a.png", "cat/c.png", "dog/b.png")
    written(
        tmp_path, *(f'image_dir = "{name}"\ncustom_attributes = {{ share = 1 }}' for name in ("cat", "dog"))
    )
    rows = concept_rows(
        open_dataset(tmp_path, tmp_path), TrainingView(64, 8, held_out={tmp_path / "dog/b.png"})
    )
    assert [(row["images"], row["share"]) for row in rows] == [(2, 1.0), (0, 0.0)]


def test_the_list_comes_along_with_an_import_and_is_not_replaced(tmp_path: Path) -> None:
    source = written(images(tmp_path / "source", "cat/a.png"), 'image_dir = "cat"\nnum_repeats = 3')
    into = tmp_path / "into"
    assert import_folder(source, into).skipped == []
    assert [(one.path.name, one.repeats) for one in scan(into).records] == [("a.png", 3)]
    written(source, 'image_dir = "cat"')
    skipped = import_folder(source, into).skipped
    assert "dataset.toml already exists" in " ".join(one.sentence for one in skipped)
    assert "num_repeats = 3" in (into / "dataset.toml").read_text()
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in source.rglob("*.*"):
            archive.write(path, path.relative_to(source))
    assert [row["name"] for row in concepts_list(tmp_path / "set.zip", workspace=tmp_path / "home")] == [
        "cat"
    ]


def scattered(folder: Path) -> Project:
    """A project of images whose captions, masks, crops and marks are kept in several ways."""
    project = Project(folder)
    root = images(
        project.image_folder, "cat/a.png", "cat/bare/b.png", "dog/a.png", "dog/c.png", "mask/cat/a.png"
    )
    Image.linear_gradient("L").resize((64, 64)).save(root / "mask/cat/a.png")
    (root / "mask/cat/a.txt").unlink()
    project.invalidate()
    project.hold_out(["cat/a.png"], True)
    project.crop("cat/a.png", [0, 0, 0.5, 1])
    project.crop("dog/c.png", [0, 0.5, 1, 1])
    return project


def belongings(project: Project) -> dict[str, tuple[object, ...]]:
    """Caption, mask, crop and whether it is held out, by image."""
    project.invalidate()
    found, root = project.dataset(), project.image_folder
    assert found.problems == []
    return {
        one.path.relative_to(root).as_posix(): (
            one.caption, one.mask.read_bytes() if one.mask else b"", one.crop, one.held_out,
        )
        for one in found.records
    }  # fmt: skip


def test_images_move_into_a_concept_with_all_that_belongs_to_them_and_back(tmp_path: Path) -> None:
    project = scattered(tmp_path / "project")
    before = belongings(project)
    back = move_images(project, {"cat/a.png": "dog", "cat/bare/b.png": "./dog/", "dog/c.png": "dog"})
    # What is there already stays, and so does an image of the same name.
    assert back == {"dog/a-2.png": "cat", "dog/b.png": "cat/bare"}
    names = {"dog/a-2.png": "cat/a.png", "dog/b.png": "cat/bare/b.png", "cat/a-2.png": "cat/a.png"}
    assert {names.get(name, name): found for name, found in belongings(project).items()} == before
    assert move_images(project, back) == {"cat/a-2.png": "dog", "cat/bare/b.png": "dog"}
    assert {names.get(name, name): found for name, found in belongings(project).items()} == before
    for folders, says in (
        ({"dog/a.png": "gone"}, "no folder 'gone'"), ({"dog/a.png": ".."}, "no folder"),
        ({"x.png": "cat"}, r"no image named 'x\.png'"),
    ):  # fmt: skip
        with pytest.raises(DatasetError, match=says):
            move_images(project, folders)
    (project.image_folder / "metadata.jsonl").write_text('{"file_name": "cat/bare/b.png", "text": "a row"}')
    project.invalidate()
    with pytest.raises(DatasetError, match=r"b\.png is a row of a table"):
        concepts_move(project.image_folder, "dog", ["dog/a.png", "cat/bare/b.png"], tmp_path)
    assert (project.image_folder / "dog/a.png").is_file()


def test_a_kill_while_images_move_parts_nothing(tmp_path: Path) -> None:
    """A process that ends at any write or rename leaves each image where it was or moved, with its own."""
    wanted = sorted(belongings(scattered(tmp_path / "one")).values(), key=str)
    real, last = os.replace, 0
    for last in itertools.count(1):
        project, calls = scattered(tmp_path / f"killed {last}"), itertools.count(1)

        def replaced(source: Any, target: Any, last: int = last, calls: Iterator[int] = calls) -> None:
            if next(calls) >= last:
                raise KeyboardInterrupt
            real(source, target)

        try:
            with mock.patch("os.replace", replaced):
                move_images(project, {"cat/a.png": "dog", "cat/bare/b.png": "dog"})
        except KeyboardInterrupt:
            again = Project(tmp_path / f"killed {last}")
            assert sorted(belongings(again).values(), key=str) == wanted, last
        else:
            break
    assert last > 8


def test_images_move_only_where_they_are_trained_on(tmp_path: Path) -> None:
    project = scattered(tmp_path / "project")
    root = project.image_folder
    (tmp_path / "elsewhere").mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    for folder, says in (
        ("link", "no folder 'link'"),
        ("mask", "not trained on"),
        ("mask/cat", "not trained"),
    ):
        with pytest.raises(DatasetError, match=says):
            move_images(project, {"dog/c.png": folder})
    assert list((tmp_path / "elsewhere").iterdir()) == []
    # Of the images that no concept has, too; and back.
    written(root, 'image_dir = "cat"')
    project.invalidate()
    back = move_images(project, {"dog/c.png": "cat"})
    assert back == {"cat/c.png": "dog"}
    project.invalidate()
    assert move_images(project, back) == {"dog/c.png": "cat"}


def test_a_mask_of_two_images_stays_with_the_one_that_stays(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    root = images(project.image_folder, "cat/a.png", "cat/a.jpg", "dog/b.png", "mask/cat/a.png")
    (root / "mask/cat/a.txt").unlink()
    Image.linear_gradient("L").resize((64, 64)).save(root / "mask/cat/a.png")
    project.invalidate()
    assert len([one for one in project.dataset().records if one.mask]) == 2
    move_images(project, {"cat/a.png": "dog"})
    project.invalidate()
    assert len([one for one in project.dataset().records if one.mask]) == 2


@pytest.mark.parametrize(
    ("subsets", "says"),
    [
        ([f'image_dir = "{"x" * 300}"'], "does not exist"),
        (
            [f'image_dir = "{name}"\ncustom_attributes = {{ share = {share} }}' for name, share in
             (("cat", "1e-300"), ("dog", "1e300"))],
            "more than 10,000 times apart",
        ),
    ],
)  # fmt: skip
def test_values_beyond_all_measure_are_said(tmp_path: Path, subsets: list[str], says: str) -> None:
    images(tmp_path, "cat/a.png", "dog/b.png")
    assert any(says in one for one in sentences(written(tmp_path, *subsets)))


def test_an_edit_never_leaves_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    images(tmp_path, "cat/a.png")
    written(tmp_path, 'image_dir = "cat"')
    with pytest.raises(DatasetError, match="TOML"):
        edit_concept(tmp_path, 1, "num_repeats", 10**20)


def test_a_concept_keeps_something_to_train_on(tmp_path: Path) -> None:
    images(tmp_path, "dog/b.png", *(f"cat/{number}.png" for number in range(6)))
    written(tmp_path, 'image_dir = "cat"', 'image_dir = "dog"')
    records = scan(tmp_path).records
    for seed in range(20):
        train, held = split_holdout(records, 0.2, seed)
        assert len(held) == 1
        assert {one.concept.name for one in train if one.concept} == {"cat", "dog"}
    dog = [replace(one, held_out=one.path.parent.name == "dog") for one in records]
    with pytest.raises(DatasetError, match="All images of dog are held out"):
        split_holdout(dog, 0.2, 0)


def test_images_of_one_name_below_a_concept_are_each_known_on_resume(tmp_path: Path) -> None:
    images(tmp_path / "images", "cat/x/1.png", "cat/y/1.png")
    written(tmp_path / "images", 'image_dir = "cat"')
    run = RunFolder.create(tmp_path / "run", RunConfig())
    found = []
    for words in ("before", "after"):
        (tmp_path / "images/cat/x/1.txt").write_text(words)
        found.append(input_hashes(run, scan(tmp_path / "images").records))
    assert found[0] != found[1]
