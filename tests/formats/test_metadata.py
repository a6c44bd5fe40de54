import json
import tomllib
from types import SimpleNamespace

import pytest

from lora_core.formats.metadata import CONFIG_KEY, export_metadata, side_file
from lora_core.model_files.families import FAMILIES
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
    values = json.loads(side_file("ohwx chät", strength=0.8))
    assert values["activation text"] == "ohwx chät"
    assert values["preferred weight"] == 0.8
    assert json.loads(side_file(""))["preferred weight"] == 0
