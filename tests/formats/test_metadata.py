import json
import tomllib

import pytest

from lora_core.formats.metadata import CONFIG_KEY, ExportFacts, export_metadata, side_file
from lora_core.model_files.families import FAMILIES
from lora_core.settings.config import RunConfig, to_toml

SETTINGS = to_toml(
    RunConfig().changed(
        {
            "dataset.path": "/home/someone/secret project/cats",
            "model.base": "C:\\Users\\someone\\models\\base.safetensors",
            "model.vae": "~/models/vae",
            "sample.prompts": ["a cat, at night", "and/or a dog"],
            "optimizer.lr": 0.0003,
        }
    )
)


@pytest.fixture
def facts():
    return ExportFacts(
        name="cats-v2",
        family=FAMILIES["sd15"],
        base_title="/home/someone/models/photo base.safetensors",
        rank=16,
        alpha=8,
        steps=1200,
        resolution=(512, 768),
        num_images=20,
        started_at=1_700_000_000.5,
        finished_at=1_700_003_600.0,
        version="0.1.0",
        clip_skip=2,
        seed=42,
        trigger="ohwx cat",
        tag_frequency={"/home/someone/secret project/cats": {"cat": 20, 'say "hi"': 1}},
        datasets={"D:\\pictures\\cats": (10, 20)},
        buckets={(512, 768): 12, (640, 640): 8},
        prediction="v_prediction",
        settings=SETTINGS,
    )


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


def test_each_key_is_there_and_a_text(facts):
    texts = export_metadata(facts)
    assert set(NEEDED) <= texts.keys()
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in texts.items())


def test_values(facts):
    texts = export_metadata(facts)
    assert texts["ss_output_name"] == texts["modelspec.title"] == "cats-v2"
    assert texts["ss_base_model_version"] == "sd_v1"
    assert texts["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert texts["ss_sd_model_name"] == "photo base.safetensors"
    assert texts["ss_network_dim"] == "16"
    assert texts["ss_network_alpha"] == "8.0"
    assert texts["ss_clip_skip"] == "2"
    assert texts["ss_resolution"] == "(512, 768)"
    assert texts["ss_num_train_images"] == "200"
    assert texts["ss_learning_rate"] == "0.0003"
    assert texts["modelspec.date"] == "2023-11-14T23:13:20+00:00"
    assert texts["modelspec.resolution"] == "512x768"
    assert texts["modelspec.prediction_type"] == "v"
    assert texts["modelspec.trigger_phrase"] == "ohwx cat"


def test_what_a1111_parses_is_json(facts):
    """As A1111's metadata dialog reads them: modules/ui_extra_networks_user_metadata and
    extensions-builtin/Lora."""
    texts = export_metadata(facts)
    for key in ("ss_tag_frequency", "ss_bucket_info", "ss_dataset_dirs", "ss_network_args"):
        assert isinstance(json.loads(texts[key]), dict)
    assert json.loads(texts["ss_tag_frequency"]) == {"cats": {"cat": 20, 'say "hi"': 1}}
    assert json.loads(texts["ss_dataset_dirs"]) == {"cats": {"n_repeats": 10, "img_count": 20}}
    buckets = json.loads(texts["ss_bucket_info"])["buckets"]
    assert buckets == {
        "0": {"resolution": [512, 768], "count": 12},
        "1": {"resolution": [640, 640], "count": 8},
    }


def test_no_folder_of_the_machine_is_told(facts):
    whole = json.dumps(export_metadata(facts))
    for secret in ("someone", "secret", "Users", "pictures\\\\"):
        assert secret not in whole


def test_the_settings_come_back(facts):
    settings = tomllib.loads(export_metadata(facts)[CONFIG_KEY])
    config = RunConfig.from_dict(settings)
    assert config.optimizer.lr == 0.0003
    assert config.dataset.path == "cats"
    assert config.model.base == "base.safetensors"
    assert config.model.vae == "vae"
    assert config.sample.prompts == ["a cat, at night", "and/or a dog"]


def test_little_known_is_enough():
    facts = ExportFacts(
        name="x", family=FAMILIES["tiny"], base_title="demo", rank=4, alpha=4.0, steps=1, resolution=(128,
        128), num_images=3, started_at=0.0, finished_at=0.0, version="0", network_args={"dropout":
        float("nan")},
    )  # fmt: skip
    texts = export_metadata(facts)
    assert set(NEEDED) <= texts.keys()
    assert texts["ss_num_train_images"] == "3"
    assert texts["ss_clip_skip"] == "1"
    assert texts["ss_base_model_version"] == "easel_tiny"
    assert json.loads(texts["ss_network_args"]) == {"dropout": None}
    assert CONFIG_KEY not in texts


def test_side_file():
    values = json.loads(side_file("ohwx chät", strength=0.8))
    assert values["activation text"] == "ohwx chät"
    assert values["preferred weight"] == 0.8
    assert json.loads(side_file(""))["preferred weight"] == 0
