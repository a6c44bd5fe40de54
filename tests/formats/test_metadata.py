"""The page and the picture beside an adapter file."""

import base64
import io
import json
import tomllib
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from lora_core.formats.metadata import (
    card_file,
    export_metadata,
    model_card,
    preview_file,
    side_file,
    thumbnail,
    thumbnail_uri,
    write_beside,
)
from lora_core.model_files.families import FAMILIES
from lora_core.model_files.starting_settings import CONFIG_KEY
from lora_core.settings.config import RunConfig

CONFIG = RunConfig().changed(
    {
        "name": "cats-v2",
        "seed": 42,
        "dataset.path": "/home/someone/secret project/cats",
        "dataset.trigger": "ohwx cat",
        "model.base": "C:\\Users\\someone\\models\\base.safetensors",
        "model.vae": "~/models/vae",
        "adapter.rank": 16,
        "adapter.alpha": 8.0,
        "train.clip_skip": 2,
        "sample.prompts": ["a cat, at night", "and/or a dog"],
        "optimizer.lr": 0.0003,
    }
)


def exported(config=CONFIG, family="sd15", name="/home/someone/models/photo base.safetensors"):
    base = SimpleNamespace(
        name=name, family=FAMILIES[family], resolution=512, noise=SimpleNamespace(objective="v_prediction")
    )
    captions = [*["cat"] * 19, 'cat, say "hi"']
    buckets = {(512, 768): 12, (640, 640): 8}
    return export_metadata(config, base, captions, buckets, 1200, (1_700_000_000.5, 1_700_003_600.0))


@pytest.fixture
def texts():
    return exported()


# The table and the minimum of formats.md; the two hashes are the writer's.
NEEDED = [
    "ss_output_name",
    "ss_base_model_version",
    "ss_v2",
    "modelspec.architecture",
    "ss_tag_frequency",
    "ss_sd_model_name",
    "ss_clip_skip",
    "ss_network_module",
    "ss_training_started_at",
    "ss_bucket_info",
    "ss_dataset_dirs",
    "ss_resolution",
    "ss_num_train_images",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "modelspec.sai_model_spec",
    "modelspec.implementation",
    "modelspec.title",
    "modelspec.date",
    "modelspec.resolution",
]


def test_each_key_is_there_and_a_text(texts):
    assert set(NEEDED) <= texts.keys()
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in texts.items())


def test_values(texts):
    assert texts["ss_output_name"] == texts["modelspec.title"] == "cats-v2"
    assert texts["ss_base_model_version"] == "sd_v1"
    assert texts["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert texts["ss_sd_model_name"] == "photo base.safetensors"
    assert texts["ss_network_dim"] == "16"
    assert texts["ss_network_alpha"] == "8.0"
    assert texts["ss_clip_skip"] == "2"
    assert texts["ss_resolution"] == "(512, 512)"
    assert texts["ss_num_train_images"] == "20"
    assert texts["ss_learning_rate"] == "0.0003"
    assert texts["modelspec.date"] == "2023-11-14T23:13:20+00:00"
    assert texts["modelspec.resolution"] == "512x512"
    assert texts["modelspec.prediction_type"] == "v"
    assert texts["modelspec.trigger_phrase"] == "ohwx cat"


def test_what_a1111_parses_is_json(texts):
    """As A1111's metadata dialog reads them: modules/ui_extra_networks_user_metadata and
    extensions-builtin/Lora."""
    for key in ("ss_tag_frequency", "ss_bucket_info", "ss_dataset_dirs", "ss_network_args"):
        assert isinstance(json.loads(texts[key]), dict)
    assert json.loads(texts["ss_tag_frequency"]) == {"cats": {"cat": 20, 'say "hi"': 1}}
    assert json.loads(texts["ss_dataset_dirs"]) == {"cats": {"n_repeats": 1, "img_count": 20}}
    buckets = json.loads(texts["ss_bucket_info"])["buckets"]
    assert buckets == {
        "0": {"resolution": [512, 768], "count": 12},
        "1": {"resolution": [640, 640], "count": 8},
    }


def test_no_folder_of_the_machine_is_told(texts):
    whole = json.dumps(texts)
    for secret in ("someone", "secret", "Users", "pictures\\\\"):
        assert secret not in whole


def test_the_settings_come_back(texts):
    settings = tomllib.loads(texts[CONFIG_KEY])
    config = RunConfig.from_dict(settings)
    assert config.optimizer.lr == 0.0003
    assert config.dataset.path == "cats"
    assert config.model.base == "base.safetensors"
    assert config.model.vae == "vae"
    assert config.sample.prompts == ["a cat, at night", "and/or a dog"]


def test_little_known_is_enough():
    texts = exported(RunConfig(), "tiny", "demo")
    assert set(NEEDED) <= texts.keys()
    assert texts["ss_clip_skip"] == "1"
    assert texts["ss_base_model_version"] == "easel_tiny"
    assert texts["ss_sd_model_name"] == FAMILIES["tiny"].title
    assert "modelspec.trigger_phrase" not in texts


def test_side_file():
    values = json.loads(side_file("ohwx chät"))
    assert values["activation text"] == "ohwx chät"
    assert values["preferred weight"] == 0


HEADER = {
    "ss_output_name": "my owl",
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_sd_model_name": "sd_xl_base_1.0",
    "ss_network_dim": "16",
    "ss_network_alpha": "8.0",
    "ss_steps": "1200",
    "ss_clip_skip": "2",
    "ss_dataset_dirs": (
        '{"owls": {"n_repeats": 10, "img_count": 20}, "more": {"n_repeats": 1, "img_count": 4}}'
    ),
    "modelspec.resolution": "1024x1024",
    "modelspec.trigger_phrase": 'ohwx "grey" owl',
    "modelspec.prediction_type": "epsilon",
    "modelspec.date": "2026-11-24T10:00:00+00:00",
}


def test_the_page_says_what_a_person_needs():
    card = model_card(HEADER, "my owl.safetensors", ["my owl.preview.png"])
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "tags": ["stable-diffusion", "lora", "text-to-image"],
        "instance_prompt": 'ohwx "grey" owl',
    }
    for words in (
        "# my owl\n",
        "![my owl.preview.png](<my owl.preview.png>)",
        "| Base | Stable Diffusion XL (sd_xl_base_1.0) |",
        '| Trigger | ohwx "grey" owl |',
        "| Rank, alpha | 16, 8.0 |",
        "| Trained | 1200 steps on 24 images at 1024x1024 px |",
        "| Clip skip | 2 |",
        "| Date | 2026-11-24 |",
        '`<lora:my owl:1> ohwx "grey" owl`',
        "models/loras",
        'weight_name="my owl.safetensors"',
    ):
        assert words in body, words


def test_a_page_for_a_file_that_says_nothing():
    card = model_card({}, "x.safetensors")
    assert "# x\n" in card
    assert "| |" not in card
    assert "`<lora:x:1> your prompt`" in card


def test_a_diffusers_file_is_not_offered_to_tools_that_lose_half_of_it():
    card = model_card(HEADER | {"lora_adapter_metadata": "{}"}, "x.safetensors")
    assert "A1111" not in card
    assert "load_lora_weights" in card


def test_a_file_for_the_embedded_base_says_so():
    assert "Of use only with the embedded tiny base" in model_card(
        {"ss_base_model_version": "easel_tiny"}, "x.safetensors"
    )


@pytest.mark.parametrize("text", ["a | b\n# c", "<script>x</script>", "`rm`", "[x](http://y)", "é☃日本"])
def test_texts_of_somebody_stay_texts(text):
    card = model_card({"modelspec.trigger_phrase": text, "modelspec.title": text}, "x.safetensors")
    front = yaml.safe_load(card.split("---\n", 2)[1])
    assert set(front) == {"tags", "instance_prompt"}
    assert "<script" not in card
    assert len([line for line in card.splitlines() if line.startswith("# ")]) == 1
    (row,) = [line for line in card.splitlines() if line.startswith("| Trigger")]
    assert row.count("|") == 3


@pytest.mark.parametrize("broken", ["[1]", "{", '{"a": 3}', '{"a": {"img_count": "7"}}'])
def test_broken_texts_in_a_header(broken):
    card = model_card(HEADER | {"ss_dataset_dirs": broken}, "x.safetensors")
    assert "| Trained | 1200 steps at 1024x1024 px |" in card


def noise(path, width, height):
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return path


@pytest.mark.parametrize(
    ("size", "small"), [((1024, 768), (256, 192)), ((512, 1024), (128, 256)), ((90, 60),) * 2]
)
def test_a_thumbnail_keeps_the_proportions_and_stays_small(tmp_path, size, small):
    data = thumbnail(noise(tmp_path / "a.png", *size))
    assert len(data) < 50_000
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == ("JPEG", small)
    text = thumbnail_uri(data)
    assert base64.b64decode(text.removeprefix("data:image/jpeg;base64,")) == data


def test_pictures_with_transparency_and_palettes(tmp_path):
    for mode in ("RGBA", "P", "L", "I;16"):
        Image.new(mode, (300, 300)).save(tmp_path / "a.png")
        assert thumbnail(tmp_path / "a.png")[:2] == b"\xff\xd8"


def test_beside_a_file(tmp_path):
    """The names are those that A1111's and ComfyUI's own code looks for: <stem>.preview.png."""
    file, picture = tmp_path / "my.v1.safetensors", noise(tmp_path / "sample.png", 64, 64)
    write_beside(file, HEADER, picture)
    assert preview_file(file).name == "my.v1.preview.png"
    assert preview_file(file).read_bytes() == picture.read_bytes()
    assert "my.v1.preview.png" in card_file(file).read_text(encoding="utf-8")
    write_beside(tmp_path / "other.safetensors", HEADER)
    assert "![" not in (tmp_path / "other.md").read_text(encoding="utf-8")
    assert not (tmp_path / "other.preview.png").exists()
