"""Captions by a tiny BLIP and a tiny tagger, which run for real, by every way that leads to them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, BlipForConditionalGeneration

from lora_core.__main__ import main
from lora_core.api import (
    captions_prefix,
    captions_set,
    captions_undo,
    crop,
    hold_out,
    leave_out,
    left_out,
    take_back,
)
from lora_core.data.captions import write_caption
from lora_core.data.dataset import scan
from lora_core.data.images import ImageRecord
from lora_core.errors import ConfigError, DatasetError, LoraError, ModelFileError
from lora_core.evaluate.annotation import write_texts
from lora_core.model_files.hub import annotator_folder
from lora_core.projects.caption_edits import Captioner, add_text
from lora_core.system.files import DEMO_BASE
from lora_core.verbs.datasets import caption
from lora_core.worker import Worker
from tests.captioners import TAGS, another_kind, cut, write_blip, write_florence, write_llava, write_tagger
from tests.hub import hub_of, use_hub

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blip(tmp_path_factory.mktemp("captioners") / "tiny-blip")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images, of which the first has a caption that begins with a trigger word."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in (("a", (255, 0, 0)), ("b", (0, 0, 255)), ("c", (255, 255, 255))):
        Image.new("RGB", (40, 40), colour).save(folder / f"{name}.png")
    (folder / "a.txt").write_text("sks, by hand")
    return folder


@pytest.fixture
def records(images: Path) -> dict[str, ImageRecord]:
    return {record.path.name: record for record in scan(images).records}


@pytest.fixture
def tagger(tmp_path: Path) -> Path:
    """With logits red / 32 for the first tag and the last, blue / 32 for the second, 0 for the others."""
    weight = torch.zeros(3, len(TAGS))
    weight[2, 0] = weight[2, 5] = weight[0, 1] = 1 / 32
    return write_tagger(tmp_path / "tiny-tagger", weight)


def captions(folder: Path) -> dict[str, str]:
    return {file.stem: file.read_text() for file in sorted(folder.glob("*.txt"))}


@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_a_model_says_what_transformers_itself_has_it_say(
    blip: Path, records: dict[str, ImageRecord], prompt: str
) -> None:
    made = write_texts(Captioner(str(blip), prompt, max_tokens=8), records, CPU)
    model = BlipForConditionalGeneration.from_pretrained(blip)
    processor = AutoProcessor.from_pretrained(blip)
    for name, record in records.items():
        given = {"text": prompt} if prompt else {}
        inputs = processor(images=Image.open(record.path), return_tensors="pt", **given)
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        text = processor.decode(ids[0], skip_special_tokens=True)
        assert made[name] == text.removeprefix(prompt).strip()
    assert all(made.values())
    assert made["a.png"] != made["b.png"]


def test_florence_and_a_chat_model_are_asked_in_their_own_ways(
    records: dict[str, ImageRecord], tmp_path: Path
) -> None:
    one = {"a.png": records["a.png"]}
    florence, llava = write_florence(tmp_path / "florence"), write_llava(tmp_path / "llava")
    for folder, words in (
        (florence, "Describe with a paragraph what is shown in the image."),
        (llava, "a <image> Describe this image in one sentence. of"),
    ):
        model = AutoModelForImageTextToText.from_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)
        images = Image.open(records["a.png"].path)
        asked = {"text": "<MORE_DETAILED_CAPTION>" if folder == florence else words}
        inputs = processor(images=images, return_tensors="pt", **asked)
        assert words.split()[-1] in processor.decode(inputs["input_ids"][0])
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
        # A model that goes on from its prompt repeats it.
        new = ids if folder == florence else ids[inputs["input_ids"].shape[1] :]
        text = processor.decode(new, skip_special_tokens=True).strip()
        assert text
        assert write_texts(Captioner(str(folder), max_tokens=6), one, CPU) == {"a.png": text}


def test_tags_by_probability_with_thresholds_and_a_black_list(
    onnxruntime: Any, tagger: Path, records: dict[str, ImageRecord]
) -> None:
    made = write_texts(Captioner(str(tagger), threshold=0.6), records, CPU)
    # The character first; ratings never. A probability of 1/2 is below the threshold.
    assert made == {
        "a.png": "rem (re:zero), 1girl",
        "b.png": "long hair",
        "c.png": "rem (re:zero), 1girl, long hair",
    }
    # The model file itself may be named. At 1/2 both kinds of tags are there, after the more likely ones.
    loose = Captioner(str(tagger / "model.onnx"), threshold=0.5, character_threshold=0.5)
    assert write_texts(loose, records, CPU)["b.png"] == ("hatsune miku, rem (re:zero), long hair, 1girl, u_u")
    other = Captioner(str(tagger), threshold=0.5, exclude="1Girl, long hair,rem_(re:zero)", underscores=True)
    assert write_texts(other, records, CPU)["c.png"] == "u_u"


def test_a_tagger_without_onnxruntime_is_a_sentence(
    tagger: Path, records: dict[str, ImageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_core.settings.schema._find_module", lambda module: None)
    with pytest.raises(ConfigError, match="A tagger needs the package onnxruntime, which is not"):
        write_texts(Captioner(str(tagger)), records, CPU)


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["text_decoder.bert.embeddings.word_embeddings.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


WRONG = {
    "no processor": (lambda folder: (folder / "processor_config.json").unlink(), "cannot be opened"),
    "a weight less": (without_a_weight, "lacks weights that transformers' blip has, such as text_decoder"),
    "another kind": (another_kind, "a model of the kind 'bert', which writes no text for an image"),
    "cut short": (cut, "cannot be opened"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "holds no captioner"),
}


@pytest.mark.parametrize("why", WRONG)
def test_a_wrong_model_is_a_sentence(why: str, blip: Path, images: Path, tmp_path: Path) -> None:
    spoil, sentence = WRONG[why]
    shutil.copytree(blip, tmp_path / "spoilt")
    spoil(tmp_path / "spoilt")
    with pytest.raises(ModelFileError, match=sentence):
        caption(images, Captioner(str(tmp_path / "spoilt")))
    assert captions(images) == {"a": "sks, by hand"}


@pytest.mark.parametrize(
    ("captioner", "sentence"),
    [
        (Captioner("  "), "Give the folder of a captioner"),
        (Captioner("/nowhere/at all"), "There is no folder '/nowhere/at all'"),
        (Captioner("owner/not-here"), "'owner/not-here' is not a folder and has not been downloaded"),
        (Captioner(str(DEMO_BASE)), "holds no captioner"),
        (Captioner("x", threshold=float("nan")), "The threshold nan is not a number from 0 to 1"),
        (Captioner("x", character_threshold=2), "The character threshold 2 is not a number"),
        (Captioner("x", max_tokens=0), "The max tokens 0 is not an integer from 1 to 1000"),
    ],
)
def test_a_wrong_place_or_value_is_a_sentence(captioner: Captioner, sentence: str, images: Path) -> None:
    with pytest.raises(LoraError, match=sentence):
        caption(images, captioner, "replace")
    assert captions(images) == {"a": "sks, by hand"}


def test_a_wrong_tagger_is_a_sentence(onnxruntime: Any, images: Path, tmp_path: Path, tagger: Path) -> None:
    def refused(folder: Path, sentence: str) -> None:
        with pytest.raises(LoraError, match=sentence):
            caption(images, Captioner(str(folder)))
        assert captions(images) == {"a": "sks, by hand"}

    weight = torch.ones(3, len(TAGS))
    refused(write_tagger(tmp_path / "logits", weight, "Softplus"), "is not a tagger: its selected_tags.csv")
    refused(write_tagger(tmp_path / "few", weight[:, :4]), r"names 6 tags.*shape \[1, 4\]")
    (tagger / "model.onnx").write_bytes(b"no model")
    refused(tagger, "is not a tagger that takes an image")
    (tagger / "selected_tags.csv").write_text("a,b\n1,2\n")
    refused(tagger, "is not a table of tags with the columns name and category")
    (tagger / "selected_tags.csv").unlink()
    refused(tagger, "holds model.onnx but no selected_tags.csv")


def test_the_command_shows_writes_and_takes_back(
    blip: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = ["caption", str(images), "--model", str(blip), "--max-tokens", "4"]
    assert main([*begin, "--dry-run"]) == 0
    assert "2 of 3 captions would change" in capsys.readouterr().out
    assert captions(images) == {"a": "sks, by hand"}
    assert main(begin) == 0
    assert "2 of 3 captions changed; `captions undo` takes it back" in capsys.readouterr().out
    made = captions(images)
    assert made["a"] == "sks, by hand"
    assert made["b"]
    assert main([*begin, "--how", "replace", "--trigger", "sks", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changed"] == 1
    replaced = captions(images)
    assert replaced["a"].startswith("sks, ")
    assert "by hand" not in replaced["a"]
    assert (replaced["b"], replaced["c"]) == (made["b"], made["c"])
    assert captions_undo(images) == {"undone": 1, "kept": 0}
    assert captions_undo(images) == {"undone": 2, "kept": 0}
    assert captions(images) == {"a": "sks, by hand"}
    with pytest.raises(SystemExit):
        main([*begin, "--how", "over"])


def test_the_trigger_word_of_a_concept_stays(blip: Path, images: Path) -> None:
    (images / "dataset.toml").write_text(
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "."\ncustom_attributes = { trigger = "zwx" }\n'
    )
    (images / "b.txt").write_text("zwx, by hand")
    assert caption(images, Captioner(str(blip), max_tokens=4), "replace", "sks")["changed"] == 3
    made = captions(images)
    assert made["b"].startswith("zwx, ")
    assert "by hand" not in made["b"]
    assert "sks" not in made["a"]


def test_class_images_are_captioned_without_the_trigger_and_edited_alone(blip: Path, images: Path) -> None:
    (images / "reg").mkdir()
    for name in ("d", "e"):
        shutil.copy(images / "b.png", images / "reg" / f"{name}.png")
    (images / "reg" / "e.txt").write_text("a thing")
    assert [one.sentence for one in scan(images).notes if one.kind == "bare class"] == [
        "reg/d.png is for regularisation without a caption; write one, or name its folder as 1_cat."
    ]
    found = caption(images, Captioner(str(blip), max_tokens=4), trigger="sks")
    assert (found["changed"], found["asked"]) == (3, 5)
    made = captions(images / "reg")
    assert made["d"] == captions(images)["b"]
    assert captions_undo(images)["undone"] == 3
    # What gives others the trigger word leaves them as they are.
    assert captions_prefix(images, "sks, ")["asked"] == 3
    captions_set(images, "reg/d.png", "another thing")
    captions_set(images, "a.png", "")
    assert captions(images / "reg") == {"d": "another thing", "e": "a thing"}
    assert (captions_undo(images), captions(images)["a"]) == ({"undone": 1, "kept": 0}, "sks, by hand")
    assert (captions_undo(images), captions(images / "reg")) == ({"undone": 1, "kept": 0}, {"e": "a thing"})
    crop(images, "reg/d.png", "0,0,0.5,1")
    assert scan(images).reg[0].crop == (0, 0, 0.5, 1)
    with pytest.raises(DatasetError, match=r"reg/d.png is for regularisation, and nothing is measured on it"):
        hold_out(images, ["reg/d.png"])
    assert leave_out(images, ["reg/d.png"]) == 1
    assert [one.path.name for one in scan(images).reg] == ["e.png"]
    assert left_out(images) == ["reg/d.png"]
    assert take_back(images, ["reg/d.png"]) == 1


def test_a_run_that_ends_early_changes_nothing(blip: Path, images: Path) -> None:
    def note(done: int, total: int) -> None:
        if total and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caption(images, Captioner(str(blip), max_tokens=4), "replace", note=note)
    assert captions(images) == {"a": "sks, by hand"}


def test_what_was_written_before_an_end_is_taken_back(
    blip: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the process were killed between two captions: the texts from before are kept first."""
    written: list[Path] = []

    def write_one(picture: Path, text: str, wait: bool, file: Path) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(picture)
        write_caption(picture, text, wait, file)

    monkeypatch.setattr("lora_core.projects.project.write_caption", write_one)
    with pytest.raises(KeyboardInterrupt):
        caption(images, Captioner(str(blip), max_tokens=4), "replace")
    assert "by hand" not in captions(images)["a"]
    assert captions_undo(images) == {"undone": 1, "kept": 2}
    assert captions(images) == {"a": "sks, by hand"}


@pytest.mark.parametrize(
    ("before", "how", "after"),
    [
        ("", "missing", "a cat, red"),
        ("by hand", "missing", "by hand"),
        ("sks, by hand", "replace", "sks, a cat, red"),
        ("by hand", "replace", "a cat, red"),
        ("", "append", "a cat, red"),
        ("sks, Red", "append", "sks, Red, a cat"),
        ("a cat, red", "append", "a cat, red"),
        ("sks\nred, sks", "append", "sks, a cat, red\nred, sks, a cat"),
        ("sks, one\n\nsks, two", "replace", "sks, a cat, red"),
    ],
)
def test_what_becomes_of_a_caption(before: str, how: str, after: str) -> None:
    made = add_text(before, " a cat,\nred ", how, "sks")
    assert made == after
    assert add_text(made, "a cat, red", how, "sks") == made
    assert add_text(before, "", how, "sks") == before


def answered(worker: Worker, answers: list[dict[str, Any]], **request: Any) -> dict[str, Any]:
    answers.clear()
    worker.handle({"id": "1", "do": "caption", **request})
    return answers[-1]


def test_the_worker_captions_the_images_that_are_asked_for(blip: Path, images: Path) -> None:
    answers: list[dict[str, Any]] = []
    worker = Worker(answers.append)
    request = {"dataset": str(images), "model": str(blip), "max_tokens": 4, "how": "missing"}
    last = answered(worker, answers, **request, pictures=["b.png", "c.png", "gone.png"])
    assert set(last["found"]["texts"]) == {"b.png", "c.png"}
    assert list(dict.fromkeys(one["phase"] for one in answers[:-1])) == [
        "Opening the captioner",
        "Captioning",
    ]
    worker.cancelled.add("1")
    assert answered(worker, answers, **request, pictures=["b.png"])["message"] == "Cancelled."
    assert (
        "holds no captioner"
        in answered(worker, answers, **request | {"model": str(images)}, pictures=[])["message"]
    )
    assert captions(images) == {"a": "sks, by hand"}


@pytest.fixture
def hub(blip: Path, tagger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "README.md").write_text("no model")
    with hub_of(blip=blip, tagger=tagger, nothing=tmp_path / "nothing") as made:
        use_hub(monkeypatch, made, tmp_path / "cache")
        yield made


def test_a_hub_id_is_downloaded_only_where_that_is_asked_for(
    hub: Any, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelFileError, match="allow the download"):
        caption(images, Captioner("owner/blip"))
    assert hub.asked == []
    assert caption(images, Captioner("owner/blip", max_tokens=4, download=True))["changed"] == 2
    assert "Downloading owner/blip" in capsys.readouterr().err
    hub.asked.clear()
    assert caption(images, Captioner("owner/blip", max_tokens=5), "append", dry_run=True)["asked"] == 3
    assert hub.asked == []
    with pytest.raises(ModelFileError, match="'owner/nothing' is not a captioner"):
        caption(images, Captioner("owner/nothing", download=True), "append")


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("blip", ["config.json"]),
        ("tagger", ["selected_tags.csv"]),
        ("sharded", ["*.json", "model-00001-of-00002.safetensors"]),
    ],
)
def test_a_captioner_that_is_in_the_cache_in_part_is_downloaded(
    name: str, there: list[str], hub: Any, tmp_path: Path
) -> None:
    hub.repos["owner/sharded"] = sharded = tmp_path / "sharded"
    sharded.mkdir()
    for file in ("config.json", "model.safetensors.index.json"):
        (sharded / file).write_text("{}")
    for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (sharded / file).write_text(file)
    snapshot_download(f"owner/{name}", allow_patterns=there)
    with pytest.raises(ModelFileError, match="allow the download"):
        annotator_folder(f"owner/{name}", "captioner", fetch=False)
    folder = annotator_folder(f"owner/{name}", "captioner", fetch=True)
    assert {file.name for file in folder.iterdir()} == {
        file.name for file in hub.repos[f"owner/{name}"].iterdir()
    }
    hub.asked.clear()
    assert annotator_folder(f"owner/{name}", "captioner", fetch=True) == folder
    assert hub.asked == []


def test_a_tagger_of_the_hub(onnxruntime: Any, hub: Any, records: dict[str, ImageRecord]) -> None:
    told = []
    asked = Captioner("owner/tagger", download=True)
    made = write_texts(asked, records, CPU, lambda words, done, total: told.append(words))
    assert made["b.png"] == "long hair, 1girl, u_u"
    assert list(dict.fromkeys(told)) == ["Downloading the captioner", "Opening the captioner", "Captioning"]
