"""Images of which a part is trained on: the same as if the file had been cut."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_core.data.audit import TrainingView, audit
from lora_core.data.dataset import open_dataset, read_crops, scan, write_crops
from lora_core.data.images import Bucket, choose_bucket
from lora_core.errors import DatasetError
from lora_core.models.load import load_base
from lora_core.models.vae import load_pixels
from lora_core.projects.project import Project, leave_out, take_back
from lora_core.runs.folder import RunFolder
from lora_core.train.data import LatentCache
from lora_core.train.setup import input_hashes
from tests.data.conftest import noise

CROP = (0.25, 0.5, 0.75, 1.0)


def test_the_same_as_a_file_that_was_cut(tmp_path: Path) -> None:
    """An upright and a turned image: edges are those of the image as it is seen."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    image = noise(200, 120)
    turn = Image.Exif()
    turn[0x0112] = 6  # to be turned by 90 degrees
    image.save(whole / "a.png")
    image.save(whole / "b.png", exif=turn)
    image.crop((50, 60, 150, 120)).save(cut / "a.png")
    image.transpose(Image.Transpose.ROTATE_270).crop((30, 100, 90, 200)).save(cut / "b.png")
    write_crops(whole, {"a.png": CROP, "b.png": CROP})
    pairs = list(zip(scan(whole).records, scan(cut).records, strict=True))
    assert [(one.width, one.height) for one, _ in pairs] == [(100, 60), (60, 100)]
    for one, other in pairs:
        assert (one.width, one.height) == (other.width, other.height)
        bucket = choose_bucket(one.width, one.height, 64, 8)
        assert torch.equal(load_pixels(one, bucket), load_pixels(other, bucket))


def test_crops_come_with_a_zip(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    noise(200, 120).save(folder / "a.png")
    write_crops(folder, {"a.png": CROP})
    dataset = open_dataset(shutil.make_archive(str(tmp_path / "set"), "zip", folder), tmp_path / "unpacked")
    assert [(one.crop, one.width, one.height) for one in dataset.records] == [(CROP, 100, 60)]
    assert dataset.notes == []


def test_reading_what_was_written(tmp_path: Path) -> None:
    write_crops(tmp_path, {"ü/a.png": CROP, "b.png": (0, 0, 0.5, 1)})
    assert read_crops(tmp_path) == {"ü/a.png": CROP, "b.png": (0, 0, 0.5, 1)}
    write_crops(tmp_path, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "crops.json is not a table of crops"),
        ("[1]", "crops.json is not a table of crops"),
        ('{"a.png": [0, 0, 1]}', "The crop of a.png is not left, top, right and bottom"),
        ('{"a.png": [0.5, 0, 0.5, 1]}', "The crop of a.png is not left"),
        ('{"a.png": [0, 0, true, 1]}', "The crop of a.png is not left"),
        ('{"a.png": [0, 0, 1e999, 1]}', "The crop of a.png is not left"),
        ('{"a.png": [0, 0, 1%s, 1]}' % (400 * "0"), "The crop of a.png is not left"),
        ('{"a.png": [0, 0, 0.1, 1]}', "The crop of a.png is only 6 x 64 pixels"),
    ],
)
def test_a_list_that_cannot_be_used_is_a_problem(tmp_path: Path, text: str, sentence: str) -> None:
    noise(64, 64).save(tmp_path / "a.png")
    (tmp_path / "crops.json").write_text(text)
    (problem,) = scan(tmp_path).problems
    assert problem.blocking
    assert problem.sentence.startswith(sentence)


def test_an_image_that_is_not_there_is_a_note(tmp_path: Path) -> None:
    noise(64, 64).save(tmp_path / "a.png")
    write_crops(tmp_path, {"b.png": CROP})
    assert [note.sentence for note in scan(tmp_path).notes] == [
        "crops.json names images that are not there (b.png); they are not cropped."
    ]


def test_a_project_crops_and_takes_it_back(tmp_path: Path) -> None:
    project = Project(tmp_path)
    noise(200, 120).save(project.image_folder / "a.png")
    noise(200, 120).save(project.image_folder / "b.png")
    before = project.images()
    assert project.crop("a.png", CROP) is None
    record = project.images()["a.png"]
    assert (record.width, record.height, record.crop) == (100, 60, CROP)
    assert scan(project.image_folder).records[0] == record
    for edges, sentence in (((0, 0, 2, 1), "is not left, top"), ((0, 0, 0.01, 1), "only 2 x 120 pixels")):
        with pytest.raises(DatasetError, match=sentence):
            project.crop("a.png", edges)
    leave_out(project, ["a.png"])
    project.crop("b.png", CROP)
    take_back(project, ["a.png"])
    assert [one.crop for one in project.images().values()] == [CROP, CROP]
    assert project.crop("a.png", (0, 0, 1, 1)) == CROP
    project.crop("b.png", None)
    assert project.images() == before
    assert not (project.image_folder / "crops.json").exists()


def test_what_is_looked_at_is_the_crop(tmp_path: Path) -> None:
    """The part that is left is blurred; the whole image is not."""
    image = Image.linear_gradient("L").resize((256, 128)).convert("RGB")
    image.paste(noise(128, 128), (0, 0))
    image.save(tmp_path / "a.png")
    looks = {}
    for crop, kinds in ({}, []), ({"a.png": (0.6, 0, 1, 1)}, ["blurred"]):
        write_crops(tmp_path, crop)
        found = audit(scan(tmp_path), TrainingView(64, 8), None, looks)
        assert [row["kind"] for row in found["problems"] if row["kind"] == "blurred"] == kinds


def test_latents_and_inputs_know_the_crop(tmp_path: Path) -> None:
    base = load_base("demo", torch.device("cpu"), torch.float32)
    noise(128, 64).save(tmp_path / "a.png")
    cache = LatentCache(base, tmp_path / "latents")
    bucket, found, inputs = Bucket(32, 32), [], []
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.config_file.write_text("")
    for crop in (None, (0.0, 0.0, 0.5, 1.0)):
        write_crops(tmp_path, {"a.png": crop} if crop else {})
        (record,) = scan(tmp_path).records
        found.append(cache.latents(record, bucket, False))
        inputs.append(input_hashes(run, [record])["the picture a.png"])
    assert not torch.equal(*found)
    assert inputs[0] != inputs[1]
