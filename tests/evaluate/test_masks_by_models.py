"""Masks by a tiny CLIPSeg and a tiny background remover, which run for real, by every way to them."""

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from transformers import AutoProcessor, CLIPSegForImageSegmentation

from lora_core.__main__ import main
from lora_core.api import captions_undo
from lora_core.data.dataset import scan
from lora_core.data.images import ImageRecord
from lora_core.errors import LoraError
from lora_core.evaluate.annotation import make_masks
from lora_core.projects.caption_edits import Masker
from lora_core.verbs.datasets import masks_make
from lora_core.worker import Worker
from tests.captioners import another_kind, cut, write_blip, write_clipseg, write_remover

CPU = torch.device("cpu")
PLAIN = {"grow": 0, "blur": 0}


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clipseg(tmp_path_factory.mktemp("mask models") / "tiny-clipseg")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A wide image, a high one of which the left half alone is trained on, and one with a mask."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, (name, size) in enumerate((("a", (64, 32)), ("b", (32, 48)), ("c", (40, 40)))):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "crops.json").write_text(json.dumps({"b.png": [0, 0, 0.5, 1]}))
    Image.new("L", (40, 40), 255).save(folder / "c-masklabel.png")
    return folder


@pytest.fixture
def records(images: Path) -> dict[str, ImageRecord]:
    return {record.path.name: record for record in scan(images).records}


def opened(png: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(png))) as mask:
        assert mask.mode == "L"
        return np.asarray(mask)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*-masklabel.png"))}


@torch.no_grad()
def likely(folder: Path, record: ImageRecord, prompt: str) -> torch.Tensor:
    """By transformers itself, at the size of the image."""
    image = Image.open(record.path)
    given = AutoProcessor.from_pretrained(folder)(text=[prompt], images=[image], return_tensors="pt")
    logits = CLIPSegForImageSegmentation.from_pretrained(folder)(**given).logits.reshape(1, 1, 32, 32)
    return torch.nn.functional.interpolate(logits.sigmoid(), image.size[::-1], mode="bilinear")[0, 0]


def middle(folder: Path, record: ImageRecord, prompt: str) -> float:
    """A threshold that about half of an image reaches, and no place by a hair."""
    values = likely(folder, record, prompt).flatten().sort().values
    values = values[len(values) // 3 : 2 * len(values) // 3]
    at = int(values.diff().argmax())
    return float(values[at : at + 2].mean())


def test_a_mask_is_where_transformers_itself_finds_the_prompt(
    clipseg: Path, records: dict[str, ImageRecord]
) -> None:
    for name in ("a.png", "b.png"):
        threshold = middle(clipseg, records[name], "a cat")
        one = {name: records[name]}
        made = opened(make_masks(Masker(str(clipseg), "a cat", threshold, **PLAIN), one, CPU)[name])
        found = likely(clipseg, records[name], "a cat") >= threshold
        assert np.array_equal(made, found.numpy() * np.uint8(255))
        inverse = Masker(str(clipseg), "a cat", threshold, **PLAIN, invert=True)
        assert np.array_equal(opened(make_masks(inverse, one, CPU)[name]), 255 - made)
        # Of several prompts each counts.
        both = opened(make_masks(Masker(str(clipseg), "a cat, a dog", threshold, **PLAIN), one, CPU)[name])
        other = likely(clipseg, records[name], "a dog") >= threshold
        assert np.array_equal(both, (found | other).numpy() * np.uint8(255))


def test_a_mask_grows_shrinks_and_is_blurred(clipseg: Path, records: dict[str, ImageRecord]) -> None:
    one, threshold = {"a.png": records["a.png"]}, middle(clipseg, records["a.png"], "a cat")

    def made(**how: Any) -> np.ndarray:
        return opened(
            make_masks(Masker(str(clipseg), "a cat", threshold, **(PLAIN | how)), one, CPU)["a.png"]
        )

    plain = made()
    # 2 of 64 pixels, in each direction.
    reach = Image.fromarray(plain).filter(ImageFilter.MaxFilter(5))
    assert np.array_equal(made(grow=3), np.asarray(reach))
    shrunk = Image.fromarray(plain).filter(ImageFilter.MinFilter(3))
    assert np.array_equal(made(grow=-2), np.asarray(shrunk))
    assert np.array_equal(
        made(blur=3), np.asarray(Image.fromarray(plain).filter(ImageFilter.GaussianBlur(1.92)))
    )
    # Nothing that is likely enough is no mask.
    assert make_masks(Masker(str(clipseg), "a cat", 1.0), one, CPU) == {"a.png": ""}


def test_a_large_image_gets_a_mask_of_its_shape(clipseg: Path, tmp_path: Path) -> None:
    Image.effect_noise((1500, 700), 90).convert("RGB").save(tmp_path / "large.png")
    (record,) = scan(tmp_path).records
    made = make_masks(Masker(str(clipseg), "a cat", 0.0), {"large.png": record}, CPU)["large.png"]
    assert opened(made).shape == (239, 512)


def test_the_command_shows_writes_and_takes_back(
    clipseg: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(images)
    begin = ["masks", "make", str(images), "--model", str(clipseg), "--prompt", "a cat", "--threshold", "0"]
    assert main([*begin, "--dry-run"]) == 0
    words = capsys.readouterr().out
    assert "a.png: 100% counts" in words
    assert "2 of 3 images would get a mask" in words
    assert files(images) == before
    assert main(begin) == 0
    assert "2 of 3 images got a mask; `captions undo` takes it back" in capsys.readouterr().out
    made = files(images)
    assert set(made) == {"a-masklabel.png", "b-masklabel.png", "c-masklabel.png"}
    assert made["c-masklabel.png"] == before["c-masklabel.png"]
    found = scan(images)
    assert [record.mask and record.mask.name for record in found.records] == list(made)
    assert found.problems == []
    # Those that are there only where that is asked for; each is taken back to the byte.
    assert main([*begin, "--how", "replace", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changed"] == 3
    assert files(images)["c-masklabel.png"] != before["c-masklabel.png"]
    assert captions_undo(images) == {"undone": 3, "kept": 0, "masks": True}
    assert files(images) == made
    # One that was painted since stays.
    Image.new("L", (64, 32), 99).save(images / "a-masklabel.png")
    painted = files(images)["a-masklabel.png"]
    assert main(["captions", "undo", str(images)]) == 0
    assert "1 masks are as before, 1 changed since and kept" in capsys.readouterr().out
    assert files(images) == {"a-masklabel.png": painted, **before}
    assert main([*begin[:-1], "1", "--how", "replace"]) == 0
    assert "Nothing was found in 3 of 3 images, which get no mask" in capsys.readouterr().out
    assert files(images) == {"a-masklabel.png": painted, **before}


def test_a_run_that_ends_early_changes_nothing(
    clipseg: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(images)

    def note(done: int, total: int) -> None:
        if total and done == 2:
            raise KeyboardInterrupt

    masker = Masker(str(clipseg), "a cat", 0.0)
    with pytest.raises(KeyboardInterrupt):
        masks_make(images, masker, "replace", note=note)
    assert files(images) == before
    # As if the process were killed between two masks: what was there before is kept first.
    written: list[Path] = []

    def write_one(file: Path, data: bytes, sync: bool = True) -> None:
        if file.name.endswith("-masklabel.png") and written:
            raise KeyboardInterrupt
        written.append(file)
        file.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr("lora_core.projects.caption_edits.write_atomically", write_one)
        with pytest.raises(KeyboardInterrupt):
            masks_make(images, masker, "replace")
    captions_undo(images)
    assert files(images) == before


WRONG = {
    "another kind": (another_kind, "a model of the kind 'bert', which makes no mask from a prompt"),
    "cut short": (cut, "The mask model .* cannot be opened"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no mask model: neither"),
    "no model": (
        lambda folder: (folder / "model.onnx").write_bytes(b"no model"),
        "is not a background remover",
    ),
}


@pytest.mark.parametrize("why", WRONG)
def test_a_wrong_model_is_a_sentence(
    why: str, clipseg: Path, images: Path, tmp_path: Path, request: Any
) -> None:
    spoil, sentence = WRONG[why]
    if why == "no model":
        request.getfixturevalue("onnxruntime")
    shutil.copytree(clipseg, tmp_path / "spoilt")
    spoil(tmp_path / "spoilt")
    before = files(images)
    with pytest.raises(LoraError, match=sentence):
        masks_make(images, Masker(str(tmp_path / "spoilt"), "a cat"), "replace")
    assert files(images) == before


@pytest.mark.parametrize(
    ("masker", "how", "sentence"),
    [
        (Masker("  "), "missing", "Give the folder of a mask model"),
        (
            Masker("/nowhere/at all"),
            "missing",
            "There is no folder '/nowhere/at all'; give the folder of a mask",
        ),
        (Masker("owner/not-here"), "missing", "The mask model 'owner/not-here' is not a folder"),
        (Masker("x", threshold=float("nan")), "missing", "The threshold nan is not a number from 0 to 1"),
        (Masker("x", grow=26), "missing", "The grow 26 is not a number from -25 to 25"),
        (Masker("x", blur=-1), "missing", "The blur -1 is not a number from 0 to 25"),
        (Masker("x"), "append", "'append' is not a way to mask; choose one of missing, replace"),
    ],
)
def test_a_wrong_place_or_value_is_a_sentence(masker: Masker, how: str, sentence: str, images: Path) -> None:
    with pytest.raises(LoraError, match=sentence):
        masks_make(images, masker, how)


def test_a_model_that_needs_a_prompt_or_writes_captions_is_told(
    clipseg: Path, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(LoraError, match="CLIPSeg masks what a prompt says"):
        masks_make(images, Masker(str(clipseg), " , "))
    with pytest.raises(LoraError, match="a model of the kind 'blip', which makes no mask"):
        masks_make(images, Masker(str(write_blip(tmp_path / "blip")), "a cat"))


def test_the_worker_masks_the_images_that_are_asked_for(clipseg: Path, images: Path) -> None:
    answers: list[dict[str, Any]] = []
    worker = Worker(answers.append)
    asked = {
        "dataset": str(images),
        "model": str(clipseg),
        "prompt": "a cat",
        "threshold": 0.0,
        "how": "missing",
    }
    worker.handle({"id": "1", "do": "mask", **asked, "pictures": ["b.png", "gone.png"]})
    # The mask is of the whole image, of which a crop takes its part.
    assert {name: opened(png).shape for name, png in answers[-1]["found"]["texts"].items()} == {
        "b.png": (48, 32)
    }
    assert next(one["phase"] for one in answers[:-1] if "phase" in one) == "Opening the mask model"
    worker.cancelled.add("1")
    worker.handle({"id": "1", "do": "mask", **asked, "pictures": ["b.png"]})
    assert answers[-1]["message"] == "Cancelled."
    assert set(files(images)) == {"c-masklabel.png"}


def test_a_background_remover(
    onnxruntime: Any, images: Path, tmp_path: Path, records: dict[str, ImageRecord]
) -> None:
    half = Image.new("RGB", (40, 40), (200, 180, 160))
    half.paste((40, 20, 10), (0, 0, 20, 40))
    half.save(records["c.png"].path)
    one = {"c.png": records["c.png"]}
    file = write_remover(tmp_path / "remover" / "u2net.onnx")
    made = opened(make_masks(Masker(str(file), threshold=0.5, **PLAIN), one, CPU)["c.png"])
    # White from the middle on, where the eight places of the model let it be seen.
    assert (made[:, :15] == 0).all()
    assert (made[:, 25:] == 255).all()
    # In a folder as converters write it, with the numbers that an image is normalised by.
    folder = tmp_path / "converted"
    write_remover(folder / "onnx" / "model.onnx")
    (folder / "preprocessor_config.json").write_text('{"image_mean": [9, 9, 9], "image_std": [-1, -1, -1]}')
    other = opened(make_masks(Masker(str(folder), threshold=0.5, **PLAIN), one, CPU)["c.png"])
    assert np.array_equal(other, 255 - made)


def test_a_remover_without_onnxruntime_is_a_sentence(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_core.settings.schema._find_module", lambda module: None)
    with pytest.raises(LoraError, match="A background remover needs the package onnxruntime, which is not"):
        masks_make(images, Masker(str(write_remover(tmp_path / "x.onnx"))))
