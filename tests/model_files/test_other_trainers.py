"""Configurations of other trainers, in the shapes that their documents and examples show."""

import json
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_core.errors import ConfigError
from lora_core.model_files import starting_settings
from lora_core.model_files.starting_settings import settings_from_lora
from lora_core.settings.config import RunConfig
from lora_core.system.files import read_table
from tests.app.bases import write_header

SDXL = """
[model_arguments]
pretrained_model_name_or_path = "D:/models/pony.safetensors"
v_parameterization = true
zero_terminal_snr = true
[additional_network_arguments]
network_module = "networks.lora"
network_dim = 32
network_alpha = 16
network_args = ["conv_dim=8", "conv_alpha=4"]
unet_lr = 2e-4
text_encoder_lr = [5e-5, 1e-5]
[optimizer_arguments]
optimizer_type = "AdamW"
optimizer_args = ["weight_decay=0.1", "betas=[0.9, 0.95]"]
lr_scheduler = "cosine_with_restarts"
lr_warmup_steps = 100
[training_arguments]
output_dir = "out"
max_train_steps = 2000
mixed_precision = "bf16"
xformers = true
min_snr_gamma = 5
weighted_captions = true
sample_every_n_steps = 250
"""
SD15 = """
pretrained_model_name_or_path = "runwayml/stable-diffusion-v1-5"
train_data_dir = "img"
resolution = "512,768"
network_dim = 8
network_train_unet_only = true
learning_rate = 1e-4
loss_type = "huber"
huber_schedule = "constant"
huber_c = 0.2
huber_scale = 1.0
flip_aug = true
seed = 7
clip_skip = 2
"""
SUBSETS = """
[general]
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 2
[[datasets]]
resolution = 1024
batch_size = 4
enable_bucket = true
  [[datasets.subsets]]
  image_dir = "a"
  num_repeats = 10
  flip_aug = true
  [[datasets.subsets]]
  image_dir = "b"
  num_repeats = 2
  caption_dropout_rate = 0.1
"""
GUI = {
    "LoRA_type": "LyCORIS/LoHa",
    "network_dim": 8,
    "network_alpha": 4,
    "conv_dim": 4,
    "conv_alpha": 1,
    "epoch": 20,
    "lr_warmup": 10,
    "optimizer": "AdamW",
    "learning_rate": 1e-4,
    "lr_scheduler": "linear",
    "max_resolution": "768,768",
    "keep_tokens": "1",
    "noise_offset": 0.05,
    "xformers": "xformers",
    "use_tucker": True,
    "seed": "",
    "v2": False,
    "train_batch_size": 2,
    "max_timestep": 1000,
    "max_train_steps": 500,
}
STANDARD = GUI | {"LoRA_type": "Standard", "lr_warmup": 0, "max_timestep": 600}
BAT = """@echo off
rem train_network.py --network_dim=99
accelerate launch --num_cpu_threads_per_process 2 train_network.py ^
  --pretrained_model_name_or_path="C:/sd/base.safetensors" --network_dim=8 --network_alpha 4 ^
  --learning_rate=1e-4 --flip_aug --masked_loss --prior_loss_weight=0.5 ^
  --network_args "conv_dim=4" "conv_alpha=1" --lowram ^
  --network_module=networks.lora --max_train_steps=300
"""
SH = """#!/bin/bash
# my settings
accelerate launch train_network.py \\
  --network_dim 4 --network_module networks.lora \\
  --train_data_dir '/data/my dog' --use_8bit_adam --persistent_data_loader_workers --ggpo_sigma 0.03
"""
ONETRAINER = {
    "training_method": "LORA",
    "model_type": "STABLE_DIFFUSION_XL_10_BASE",
    "base_model_name": "stabilityai/sdxl",
    "batch_size": 4,
    "learning_rate": 0.0003,
    "resolution": "1024",
    "unet": {"weight_dtype": "FLOAT_16"},
    "text_encoder": {"train": False},
    "text_encoder_2": {"train": False},
    "output_model_destination": "models/a",
    "layer_filter_preset": "attn-mlp",
}
ONETRAINER_FULL = {
    "training_method": "LORA",
    "lora_rank": 16,
    "lora_alpha": 1.0,
    "lora_decompose": True,
    "epochs": 100,
    "optimizer": {"optimizer": "ADAFACTOR", "weight_decay": 0.01, "scale_parameter": False},
    "learning_rate_scheduler": "COSINE_WITH_RESTARTS",
    "learning_rate_cycles": 3.0,
    "learning_rate_warmup_steps": 200,
    "train_dtype": "BFLOAT_16",
    "gradient_checkpointing": "CPU_OFFLOADED",
    "loss_weight_fn": "MIN_SNR_GAMMA",
    "loss_weight_strength": 5.0,
    "masked_training": True,
    "unmasked_weight": 0.1,
    "offset_noise_weight": 0.05,
    "ema": "GPU",
    "ema_decay": 0.999,
    "text_encoder": {"train": True, "learning_rate": 1e-5, "dropout_probability": 0.1},
    "clip_grad_norm": 1.0,
    "samples": [{"prompt": "a cat", "seed": 42, "enabled": True}, {"prompt": "a dog", "seed": 43}],
    "sample_after": 50,
    "sample_after_unit": "STEP",
    "timestep_distribution": "LOGIT_NORMAL",
    "noising_bias": 0.5,
    "max_noising_strength": 0.7,
}
AI_TOOLKIT = """
job: extension
config:
  name: my_lora
  process:
    - type: sd_trainer
      training_folder: output
      trigger_word: p3r5on
      network: {type: lora, linear: 16, linear_alpha: 8, conv: 8, conv_alpha: 4}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4}
      datasets:
        - {folder_path: /images, caption_ext: txt, caption_dropout_rate: 0.05, flip_x: true,
           resolution: [512, 768, 1024]}
      train:
        batch_size: 2
        steps: 2000
        train_text_encoder: true
        gradient_checkpointing: true
        noise_scheduler: ddpm
        optimizer: adamw
        lr: 1e-4
        min_snr_gamma: 5.0
        ema_config: {use_ema: false, ema_decay: 0.99}
        dtype: bf16
      model: {name_or_path: stabilityai/sdxl, is_xl: true, is_v_pred: true}
      sample: {sampler: ddpm, sample_every: 200, prompts: [a cat, a dog], seed: 42, walk_seed: true,
               guidance_scale: 7, sample_steps: 20}
meta: {name: "[name]"}
"""
SIMPLETUNER = {
    "--model_family": "sdxl",
    "--lora_type": "standard",
    "--lora_rank": 16,
    "--max_train_steps": 1000,
    "--learning_rate": "8e-5",
    "--mixed_precision": "bf16",
    "--optimizer": "adamw_bf16",
    "--train_batch_size": 1,
    "--gradient_checkpointing": "true",
    "--caption_dropout_probability": 0.1,
    "--num_train_epochs": 0,
    "--validation_prompt": "a cat",
    "--validation_guidance": 3.0,
    "--checkpoint_step_interval": 500,
    "--use_ema": "false",
    "--data_backend_config": "config/multidatabackend.json",
    "--report_to": "wandb",
    "--snr_gamma": 5,
    "--crop": True,
}
PLAIN = {
    "model_family": "sd1x",
    "lora_rank": 4,
    "data_backend_config": "x.json",
    "prediction_type": "v_prediction",
}

CASES: dict[str, tuple[str, Any, str, dict[str, Any], list[str]]] = {
    "kohya SDXL": (
        "a.toml",
        SDXL,
        "D:/models/pony.safetensors",
        {
            "adapter.rank": 32,
            "adapter.alpha": 16,
            "adapter.targets": "locon",
            "optimizer.name": "adamw",
            "optimizer.args": {"weight_decay": 0.1, "betas": [0.9, 0.95]},
            "optimizer.text_encoder_lr": 5e-5,
            "optimizer.text_encoder_2_lr": 1e-5,
            "optimizer.warmup": 0.05,
            # One fall, the default of lr_scheduler_num_cycles, is a cosine.
            "optimizer.schedule": "cosine",
            "train.precision": "bf16",
            "model.prediction": "v_prediction",
            "model.zero_terminal_snr": "on",
            "sample.every": 250,
            "loss.min_snr": 5,
        },
        [
            "weighted_captions = True is not known here",
            "places of that machine: output_dir",
            "here: xformers",
        ],
    ),
    "kohya SD 1.5": (
        "a.toml",
        SD15,
        "runwayml/stable-diffusion-v1-5",
        {
            "adapter.rank": 8,
            "train.resolution": 640,
            "optimizer.text_encoder_lr": 0,
            "loss.type": "huber",
            "loss.huber_delta": 0.2,
            "loss.huber_schedule": "constant",
            "dataset.flip": True,
            "seed": 7,
            "train.clip_skip": 2,
        },
        ["places of that machine: train_data_dir"],
    ),
    "kohya subsets": (
        "dataset.toml",
        SUBSETS,
        "",
        {
            "train.resolution": 1024,
            "train.batch_size": 4,
            "dataset.shuffle_tags": True,
            "dataset.keep_tags": 2,
            "dataset.caption_dropout": 0.1,
        },
        ["num_repeats has several values; 10 is used", "image_dir has several values"],
    ),
    "kohya_ss": (
        "gui.json",
        GUI,
        "",
        {
            "adapter.rank": 8,
            "optimizer.warmup": 0.1,
            "optimizer.schedule": "linear",
            "loss.noise_offset": 0.05,
            "train.resolution": 768,
            "adapter.targets": "locon",
            "train.batch_size": 2,
            "dataset.keep_tags": 1,
        },
        ["use_tucker = True is not known here"],
    ),
    "kohya_ss LoRA": (
        "gui.json",
        STANDARD,
        "",
        {
            "adapter.rank": 8,
            "optimizer.warmup": 0.0,
            "adapter.targets": "kohya",
            "loss.max_timestep": 600,
        },
        [],
    ),
    "bat": (
        "train.bat",
        BAT,
        "C:/sd/base.safetensors",
        {
            "adapter.rank": 8,
            "adapter.alpha": 4,
            "optimizer.lr": 1e-4,
            "dataset.flip": True,
            "adapter.targets": "locon",
            "train.steps": 300,
            "loss.unmasked_weight": 0,
            "dataset.reg_weight": 0.5,
        },
        ["here: num_cpu_threads_per_process, lowram"],
    ),
    "sh": (
        "train.sh",
        SH,
        "",
        {"adapter.rank": 4, "adapter.targets": "kohya"},
        [
            "places of that machine: train_data_dir",
            "ggpo_sigma = 0.03 is not known here",
        ],
    ),
    "OneTrainer preset": (
        "a.json",
        ONETRAINER,
        "stabilityai/sdxl",
        {
            "optimizer.lr": 3e-4,
            "optimizer.text_encoder_lr": 0,
            "optimizer.text_encoder_2_lr": 0,
            "train.batch_size": 4,
            "train.resolution": 1024,
            "adapter.targets": "kohya",
        },
        [
            "places of that machine: output_model_destination",
        ],
    ),
    "OneTrainer": (
        "a.json",
        ONETRAINER_FULL,
        "",
        {
            "adapter.rank": 16,
            "adapter.alpha": 1,
            "adapter.kind": "dora",
            "adapter.targets": "locon",
            "optimizer.name": "adafactor",
            "optimizer.args": {"weight_decay": 0.01},
            "loss.timesteps": "logit_normal",
            "loss.timestep_mean": 0.5,
            "loss.max_timestep": 700,
            "train.precision": "bf16",
            "train.gradient_checkpointing": True,
            "loss.min_snr": 5,
            "loss.noise_offset": 0.05,
            "save.ema": 0.999,
            "optimizer.text_encoder_lr": 1e-5,
            "dataset.caption_dropout": 0.1,
            "sample.prompts": ["a cat", "a dog"],
            "sample.every": 50,
            "optimizer.schedule": "cosine_restarts",
            "dataset.masks": "on",
            "loss.unmasked_weight": 0.1,
        },
        ["Warm-up is 200 steps there"],
    ),
    "ai-toolkit": (
        "a.yaml",
        AI_TOOLKIT,
        "stabilityai/sdxl",
        {
            "adapter.rank": 16,
            "adapter.alpha": 8,
            "adapter.targets": "locon",
            "dataset.trigger": "p3r5on",
            "dataset.resolutions": [512, 768, 1024],
            "dataset.flip": True,
            "train.steps": 2000,
            "save.keep_last": 4,
            "save.ema": 0,
            "sample.prompts": ["a cat", "a dog"],
            "sample.cfg": 7,
            "sample.sampler": "euler_a",
            "loss.min_snr": 5,
            "optimizer.lr": 1e-4,
            "optimizer.text_encoder_lr": 1e-4,
            "model.prediction": "v_prediction",
        },
        [],
    ),
    "SimpleTuner": (
        "config.json",
        SIMPLETUNER,
        "",
        {
            "adapter.rank": 16,
            "optimizer.lr": 8e-5,
            "optimizer.name": "adamw",
            "optimizer.text_encoder_lr": 0,
            "train.steps": 1000,
            "dataset.caption_dropout": 0.1,
            "sample.prompts": ["a cat"],
            "save.every": 500,
            "save.ema": 0,
        },
        ["crop = True is not known here", "places of that machine: data_backend_config"],
    ),
    "SimpleTuner without dashes": (
        "config.json",
        PLAIN,
        "",
        {
            "adapter.rank": 4,
            "model.prediction": "v_prediction",
        },
        [],
    ),
    "LoRA Easel": (
        "config.toml",
        "[adapter]\nrank = 4\n[optim]\nlr = 2e-4\n",
        "",
        {
            "adapter.rank": 4,
            "optimizer.lr": 2e-4,
        },
        [],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_configuration(case: str, tmp_path: Path) -> None:
    """Values are taken, and each key of the file has an effect or is named."""
    name, given, base, values, sentences = CASES[case]
    file = tmp_path / name
    file.write_text(given if isinstance(given, str) else json.dumps(given))
    found = settings_from_lora(file)
    assert {key: found.values.get(key) for key in values} == values
    assert found.base == base
    said = " ".join([*found.left, *found.keys, *found.off])
    for sentence in sentences:
        assert sentence in said
    RunConfig().changed(found.values)
    if case == "LoRA Easel":
        return
    title = found.source.removeprefix("a configuration of ")
    (trainer,) = (row for row in read_table("other_trainers.toml").values() if row["title"] == title)
    parsed = (
        tomllib.loads(given)
        if name.endswith("toml")
        else yaml.safe_load(given)
        if name.endswith("yaml")
        else given
    )
    if isinstance(parsed, dict):
        for key in starting_settings._by_key(parsed, trainer):
            assert key in said, key


def laughs(table: str) -> str:
    """Thirty tables, each with two of the one before: a billion values."""
    rows = [f"a{n}: &a{n} " + "{" + table.format(*[f"*a{n - 1}" if n else "1"] * 2) + "}" for n in range(30)]
    return "\n".join(["network: {linear: 4}", *rows])


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.json", "{", "is not valid JSON"),
        ("a.yaml", "a: [", "is not valid YAML"),
        ("a.yaml", "- 1", "holds no table"),
        ("a.toml", "a = ", "is not valid TOML"),
        ("a.json", '{"a": 1}', "is not a configuration of"),
        ("a.txt", "hello --world", "is not a configuration of"),
        ("a.json", "[" * 100_000, "is not valid JSON"),
        ("a.yaml", "&a [*a]", "aliases stand for too many values"),
        ("a.yaml", "network: &n {linear: 4, again: *n}", "aliases stand for too many values"),
        ("a.yaml", laughs("k: {}, m: {}"), "aliases stand for too many values"),
        ("a.yaml", laughs("k: [{}, {}]"), "aliases stand for too many values"),
        (
            "a.json",
            json.dumps({"network_dim": 4} | {f"k{n}": n for n in range(20_000)}),
            "more than 20,000 values",
        ),
        ("a.yaml", "network: {linear: 4}\n" + "#" * 100_000, "larger than 0.1 MB"),
        ("a.toml", "a." * 100_000 + "b = 1", "more than 20 levels"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    (tmp_path / name).write_text(text)
    begun = time.process_time()
    with pytest.raises(ConfigError, match=sentence):
        settings_from_lora(tmp_path / name)
    assert time.process_time() - begun < 2.0


@pytest.mark.parametrize("line", ["seed: 0x" + "f" * 20_000, "seed: 1" + ":1" * 4000, "? 0x" + "f" * 20_000])
def test_a_number_of_any_length_is_read(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.yaml").write_text(f"network: {{linear: 4, linear_alpha: 2}}\n{line}\n")
    assert settings_from_lora(tmp_path / "a.yaml").values["adapter.alpha"] == 2.0


def test_a_hundred_concepts_of_onetrainer_are_read(tmp_path: Path) -> None:
    concept = {"path": "/a", "concept_stats": dict.fromkeys(map(str, range(80)), 0)}
    file = tmp_path / "a.json"
    file.write_text(
        json.dumps({"__version": 10, "lora_rank": 8, "training_method": "LORA", "concepts": [concept] * 100})
    )
    assert settings_from_lora(file).values["adapter.rank"] == 8


def test_a_file_of_another_encoding_is_refused(tmp_path: Path) -> None:
    """As PowerShell writes it."""
    for name in ("a.json", "a.sh"):
        (tmp_path / name).write_bytes('{"lora_rank": 8}'.encode("utf-16"))
        with pytest.raises(ConfigError, match="is not valid text"):
            settings_from_lora(tmp_path / name)


def test_keys_that_are_ours_too_make_no_configuration_of_ours(tmp_path: Path) -> None:
    """`train.steps` of ai-toolkit, in the tables of a process alone."""
    file = tmp_path / "a.yaml"
    file.write_text("network:\n  linear: 8\ntrain:\n  steps: 500\n  batch_size: 2\n")
    found = settings_from_lora(file)
    assert found.source == "a configuration of ai-toolkit"
    assert (found.values["adapter.rank"], found.values["train.steps"]) == (8, 500)


def test_nothing_is_dropped_in_silence(tmp_path: Path) -> None:
    """Arguments of an optimizer that is not named, and what several datasets differ in."""
    file = tmp_path / "a.toml"
    file.write_text('network_dim = 8\noptimizer_args = ["weight_decay=0.2"]\n')
    values = settings_from_lora(file).values
    assert (values["optimizer.name"], values["optimizer.args"]) == ("adamw", {"weight_decay": 0.2})
    file.write_text('network_dim = 8\nnetwork_args = ["dropout=0.3"]\n')
    assert settings_from_lora(file).values["adapter.dropout"] == 0.3
    file = tmp_path / "a.json"
    file.write_text('{"lora_rank": 8, "resolution": "512,768"}')
    found = settings_from_lora(file)
    assert found.values["dataset.resolutions"] == [512, 768]
    assert "train.resolution" not in found.values
    file.write_text('{"lora_rank": 8, "resolution": "512,768,1e9"}')
    assert settings_from_lora(file).left[0].startswith("Several resolutions is")
    sets = [{"folder_path": str(n), "caption_dropout_rate": n / 10} for n in (1, 2)]
    process = {"type": "sd_trainer", "network": {"linear": 8}, "datasets": sets}
    file.write_text(json.dumps({"config": {"process": [process]}}))
    found = settings_from_lora(file)
    assert found.values["dataset.caption_dropout"] == 0.1
    assert "datasets.N.caption_dropout_rate has several values; 0.1 is used." in found.left


@pytest.mark.parametrize(
    ("name", "text", "alpha"),
    [
        ("a.sh", "train_network.py --network_dim 8", 1),
        ("a.json", '{"lora_rank": 8, "training_method": "LORA"}', 1),
        ("a.yaml", "network: {linear: 8}", 1),
        ("a.json", '{"lora_rank": 8, "lora_type": "standard", "model_family": "sdxl"}', 8),
    ],
)
def test_a_rank_alone_brings_the_trainer_s_own_alpha(
    tmp_path: Path, name: str, text: str, alpha: float
) -> None:
    """Defaults of `network_alpha` (sd-scripts), `lora_alpha` (OneTrainer), `alpha` (ai-toolkit); SimpleTuner
    takes the rank. Ours, 16, would be up to 16 times the learning rate."""
    (tmp_path / name).write_text(text)
    values = settings_from_lora(tmp_path / name).values
    assert (values["adapter.rank"], values["adapter.alpha"]) == (8, alpha)


FOREIGN = (
    "this cannot be trained here. LoRA Easel trains Stable Diffusion 1.x, 2.x and XL; for these the other"
    " settings are taken."
)
METHOD = "here an adapter is trained, with these settings."


@pytest.mark.parametrize(
    ("text", "values", "sentences"),
    [
        ('{"lora_rank": 8, "unet": {"train": false}, "training_method": "LORA",'
         ' "learning_rate_warmup_steps": 0}', {"optimizer.lr": 0.0}, []),
        ('{"config": {"process": [{"network": {"linear": 8}, "train": {"train_unet": false}}]}}',
         {"optimizer.lr": 0.0}, []),
        ('{"lora_rank": 8, "training_method": "FINE_TUNE", "model_type": "FLUX_DEV_1",'
         ' "optimizer": {"beta1": 0.5}, "learning_rate_warmup_steps": 0}',
         {"optimizer.args": {"betas": [0.5, 0.999]}},
         [f"model_type = FLUX_DEV_1: {FOREIGN}", f"training_method = FINE_TUNE: {METHOD}"]),
        ('{"lora_rank": 8, "model_family": "flux", "model_type": "full", "lora_type": "lycoris"}',
         {}, [f"model_family = flux: {FOREIGN}", f"model_type = full: {METHOD}",
              "lora_type = lycoris is not known here; import the file that lycoris_config names for its"
              " rank."]),
        ('{"config": {"process": [{"network": {"linear": 8}, "model": {"arch": "flux"}}]}}',
         {}, [f"model.arch = flux: {FOREIGN}"]),
        ('{"network_dim": 8, "LoRA_type": "Standard", "max_train_steps": "0", "max_train_epochs": 4}',
         {"train.epochs": 4}, []),
        ('{"network_dim": 8, "LoRA_type": "Kohya LoCon", "conv_dim": 4}',
         {"adapter.conv_rank": 4, "adapter.conv_alpha": 1}, []),
        ('{"network_dim": 8, "network_alpha": 0, "network_args": ["algo=loha", "conv_dim=4"]}',
         {"adapter.alpha": 8, "adapter.conv_rank": 4, "adapter.conv_alpha": 0}, []),
        ('{"config": {"process": [{"network": {"linear": 8, "conv": 4}}]}}',
         {"adapter.alpha": 1, "adapter.conv_rank": 4, "adapter.conv_alpha": 4}, []),
        ('{"network_dim": 8, "LoRA_type": "LyCORIS/LoKr", "network_dropout": 0.1, "scale_weight_norms": 0}',
         {"adapter.kind": "lokr", "adapter.dropout": 0},
         ["Dropout is 0.1 there, which means nothing to LoKr."]),
        ('{"lora_rank": 8, "model_family": "sdxl", "max_train_steps": 0, "num_train_epochs": 10}',
         {"train.epochs": 10}, []),
    ],
)  # fmt: skip
def test_what_a_configuration_trains_is_taken_or_named(
    tmp_path: Path, text: str, values: dict[str, Any], sentences: list[str]
) -> None:
    """A UNet that is not trained, another family or method; no remark where there is nothing to remark."""
    (tmp_path / "a.json").write_text(text)
    found = settings_from_lora(tmp_path / "a.json")
    assert values.items() <= found.values.items()
    assert [one for one in found.left if not one.startswith("Without a meaning here")] == sentences
    assert found.values.get("adapter.dropout", 0) == found.defaults.get("adapter.dropout", 0)


def test_a_line_that_a_batch_file_comments_out_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.bat"
    lines = ["train_network.py --network_dim 8", "REM train_network.py --network_dim 99", ":: --flip_aug"]
    file.write_text("\r\n".join(lines))
    values = settings_from_lora(file).values
    assert values["adapter.rank"] == 8
    assert not values["dataset.flip"]


def test_options_of_the_launcher_end_at_the_script(tmp_path: Path) -> None:
    file = tmp_path / "a.sh"
    file.write_text("accelerate launch --mixed_precision bf16 train_network.py --network_dim 8")
    assert settings_from_lora(file).values["train.precision"] == "bf16"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.sh", "accelerate launch train_network.py --network_dim 8" + "\n" * 90_000),
        ("a.sh", "accelerate launch train_network.py --network_dim 8 " + "a.py" * 20_000),
        ("a.toml", f'network_module = "networks.lora"\nnetwork_dim = 8\nnetwork_args = ["a{" " * 50_000}b"]'),
        (
            "a.toml",
            f'network_dim = 8\nnetwork_module = "networks.lora"\noptimizer_args = ["a{" " * 50_000}b"]',
        ),
    ],
)
def test_blank_lines_and_blanks_take_no_time(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    begun = time.process_time()
    assert settings_from_lora(tmp_path / name).values["adapter.rank"] == 8
    assert time.process_time() - begun < 2.0


def test_a_missing_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"The config .*a\.json cannot be read: No such file"):
        settings_from_lora(tmp_path / "a.json")


def test_many_unknown_keys_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"network_dim": 4} | {f"new_{n}": n + 1 for n in range(100)}))
    left = settings_from_lora(file).left
    assert len(left) == 31
    assert left[-1] == f"And 70 more are not known here: {', '.join(f'new_{n}' for n in range(30, 100))}."


def test_the_tables_name_keys_of_the_header() -> None:
    """What a trainer's key means as a key of kohya's header is read by someone."""
    source = Path(starting_settings.__file__).read_text()
    header = read_table("kohya_header.toml")
    known = {key for _, keys, _ in header["read"] for key in keys.split()} | header["unused"].keys()
    for trainer in read_table("other_trainers.toml").values():
        for name in [*trainer["names"].values(), *(row[2] for row in trainer["when"])]:
            if name.startswith("ss_") and "." not in name:
                assert name in known or f'"{name}"' in source, name


@pytest.mark.parametrize(
    ("name", "text", "defaults", "taken"),
    [
        (
            "a.sh",
            "python sdxl_train_network.py --network_dim 8 --unet_lr 1e-4 --max_train_epoch 4",
            {"adapter.alpha": 1, "loss.min_snr": 0, "optimizer.schedule": "constant", "optimizer.warmup": 0,
             "dataset.caption_dropout": 0, "dataset.masks": "off", "train.batch_size": 1,
             "optimizer.text_encoder_lr": 2e-6, "optimizer.text_encoder_2_lr": 2e-6},
            {"train.epochs": 4, "optimizer.lr": 1e-4},
        ),
        (
            "a.json",
            '{"training_method": "LORA", "learning_rate": 1e-4, "learning_rate_warmup_steps": 0.1}',
            {"adapter.rank": 16, "adapter.alpha": 1, "adapter.targets": "locon", "train.epochs": 100,
             "train.resolution": 512, "loss.min_snr": 0, "optimizer.schedule": "constant", "save.ema": 0},
            {"optimizer.warmup": 0.1},
        ),
        (
            "a.yaml",
            "{network: {type: lora, linear: 8}, train: {steps: 300}}",
            {"adapter.alpha": 1, "optimizer.lr": 1e-6, "optimizer.schedule": "constant", "loss.min_snr": 0,
             "train.resolution": 512, "dataset.caption_dropout": 0, "optimizer.text_encoder_lr": 0},
            {"train.steps": 300},
        ),
        (
            "a.json",
            '{"model_family": "sdxl", "lora_rank": 4, "max_train_steps": 50, "resolution": 1.0}',
            {"adapter.dropout": 0.1, "adapter.targets": "attention", "train.batch_size": 4,
             "optimizer.max_grad_norm": 2, "dataset.caption_dropout": 0.1, "loss.min_snr": 0},
            # A megapixel.
            {"train.resolution": 1024, "train.steps": 50},
        ),
        # A quarter: 1,000 steps.
        ("a.yaml", "{network: {linear: 8}, train: {steps: 4000, lr_scheduler: constant_with_warmup}}",
         {"optimizer.warmup": 0.25}, {"train.steps": 4000}),
        ("a.yaml", "{network: {linear: 8}, train: {steps: 4000, lr_scheduler: constant_with_warmup,"
         " lr_scheduler_params: {num_warmup_steps: 400}}}", {}, {"optimizer.warmup": 0.1}),
        ("a.json", '{"training_method": "LORA", "ema": "GPU"}', {"save.ema": 0.999}, {}),
        ("a.yaml", "{network: {linear: 8}, train: {ema_config: {use_ema: true}}}", {"save.ema": 0.999}, {}),
        ("a.json", '{"model_family": "sdxl", "lora_rank": 4, "use_ema": true}', {"save.ema": 0.995}, {}),
    ],
)  # fmt: skip
def test_what_a_configuration_leaves_out_is_the_trainer_s_default(
    tmp_path: Path, name: str, text: str, defaults: dict[str, Any], taken: dict[str, Any]
) -> None:
    """Values of argparse in sd-scripts, and of the others' classes of configurations."""
    (tmp_path / name).write_text(text)
    found = settings_from_lora(tmp_path / name)
    assert defaults.items() <= found.defaults.items() <= found.values.items()
    assert taken.items() <= found.values.items()
    assert not taken.keys() & found.defaults.keys()
    assert "train.steps" not in found.values or "train.epochs" not in found.values
    RunConfig().changed(found.values)


@pytest.mark.parametrize("argument", ["", "optimizer_args = ['relative_step=False']"])
def test_an_optimizer_that_chooses_its_rate_there_is_named(tmp_path: Path, argument: str) -> None:
    """sd-scripts sets Adafactor's relative_step where no argument does."""
    text = f"network_dim = 8\nlearning_rate = 1e-4\noptimizer_type = 'AdaFactor'\n{argument}"
    (tmp_path / "a.toml").write_text(text)
    found = settings_from_lora(tmp_path / "a.toml")
    assert any("chooses its own rate" in sentence for sentence in found.left) == (not argument)
    assert found.values["optimizer.lr"] == 1e-4


@pytest.mark.parametrize(
    ("name", "text", "given", "not_given"),
    [
        ("dataset.toml", SUBSETS, ["dataset.flip"], ["loss.min_snr", "optimizer.lr", "train.steps"]),
        ("a.sh", "train_network.py --network_dim 8 --dataset_config d.toml", ["loss.min_snr"],
         ["train.batch_size", "dataset.flip", "dataset.masks"]),
        ("a.sh", "train_network.py --network_dim 8 --config_file c.toml", ["adapter.rank"], ["loss.min_snr"]),
    ],
)  # fmt: skip
def test_what_another_file_may_say_is_no_default(
    tmp_path: Path, name: str, text: str, given: list[str], not_given: list[str]
) -> None:
    (tmp_path / name).write_text(text)
    values = settings_from_lora(tmp_path / name).values
    assert set(given) <= values.keys()
    assert not set(not_given) & values.keys()
    (tmp_path / "a.sh").write_text(
        "accelerate launch --config_file x.yaml train_network.py --config_file=c.toml"
    )
    with pytest.raises(ConfigError, match=r"a\.sh takes its settings from c\.toml; import that file"):
        settings_from_lora(tmp_path / "a.sh")


EASY = """
[[subsets]]
image_dir = "a"
num_repeats = 3
[train_mode]
train_mode = "lora"
[general_args.args]
pretrained_model_name_or_path = "/models/illustriousXL.safetensors"
max_train_steps = 500
[network_args.args]
network_dim = 8
[network_args.args.network_args]
algo = "lokr"
preset = "attn-mlp"
full_matrix = true
[optimizer_args.args]
optimizer_type = "Prodigy"
learning_rate = 1.0
warmup_ratio = 0.1
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 2
[optimizer_args.args.optimizer_args]
weight_decay = "0.1"
betas = "0.9,0.99"
"""
POWERSHELL = """
$rank = 12  # of all layers
$rate = "2e-4"
if ($flip) { $more.Add("--flip_aug") }
accelerate launch "./sd-scripts/train_network.py" `
  --network_dim=$rank --network_alpha=${rank} `
  --unet_lr $rate --optimizer_args "weight_decay=0.2" "betas=0.8,0.9" --max_train_steps=$unknown
"""
BATCH = """
set BASE="C:\\my models\\base.safetensors"
set "RATE=3e-4"
set MORE="--flip_aug --seed=5"
accelerate launch train_network.py --pretrained_model_name_or_path=%BASE% ^
  --network_dim=8 --unet_lr=%RATE% %MORE% --vae D:\\models\\new.vae.pt --shuffle_caption && pause
"""
GUI_MORE = {
    "LoRA_type": "LyCORIS/LoCon",
    "LyCORIS_preset": "full",
    "network_dim": 100000,
    "optimizer": "AdamW",
    "optimizer_args": '"weight_decay=0.2" "betas=0.8,0.9"',
    "additional_parameters": "--lr_scheduler_power 1.5 --network_train_unet_only",
    "stop_text_encoder_training_pct": 40,
    "sample_prompts": "a cat --w 512\n# none\na dog",
    "max_train_epochs": "",
    "max_train_steps": 70,
    "epoch": 9,
    "loraplus_lr_ratio": 0,
    "sdxl": True,
}
CONCEPTS = [
    {
        "name": "cats",
        "path": "/cats",
        "balancing": 1.0,
        "image": {"enable_crop_jitter": True, "enable_random_flip": True, "enable_random_hue": True},
        "text": {"enable_tag_shuffling": False, "keep_tags_count": 1, "tag_delimiter": ","},
    }
]
BACKENDS = [
    {"id": "dogs", "instance_data_dir": "/dogs", "resolution": 1.0, "probability": 0.5, "disabled": True},
    {"id": "cats", "instance_data_dir": "/cats", "resolution": 0.25, "repeats": 3, "crop": True,
     "caption_strategy": "filename"},
    {"id": "texts", "dataset_type": "text_embeds", "cache_dir": "/cache", "disabled": False},
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "given", "values", "sentences"),
    [
        ("a.toml", EASY,
         {"adapter.kind": "lokr", "adapter.targets": "kohya", "adapter.rank": 1024, "adapter.alpha": 1024,
          "optimizer.warmup": 0.1, "optimizer.schedule": "cosine_restarts", "optimizer.text_encoder_2_lr": 1,
          "optimizer.args": {"weight_decay": 0.1, "betas": [0.9, 0.99], "safeguard_warmup": False,
                             "use_bias_correction": False}},
         ["num_repeats = 3 is not known here; name the folder", "The schedule has 2 falls there"]),
        ("a.ps1", POWERSHELL,
         {"adapter.rank": 12, "adapter.alpha": 12, "optimizer.lr": 2e-4,
          "optimizer.args": {"weight_decay": 0.2, "betas": [0.8, 0.9]}},
         ["Steps is $unknown there, which is not a number"]),
        ("a.bat", BATCH,
         {"optimizer.lr": 3e-4, "dataset.flip": True, "seed": 5, "dataset.shuffle_tags": True},
         ["name places of that machine: vae"]),
        ("a.json", GUI_MORE,
         {"adapter.rank": 1024, "adapter.targets": "locon", "optimizer.stop_text_encoder_at": 0.4,
          "optimizer.args": {"weight_decay": 0.2, "betas": [0.8, 0.9]}, "train.steps": 70,
          "sample.prompts": ["a cat --w 512", "a dog"], "optimizer.text_encoder_lr": 0},
         ["Rank (size) is 100000 there; the highest here, 1024", "lr_scheduler_power = 1.5"]),
        ("a.json", CONCEPTS, {"dataset.flip": True},
         ["concepts.N.image.enable_random_hue = True", "concepts.N.text.keep_tags_count",
          "name places of that machine: concepts.N.path"]),
        # 500 pixels wide, on the grid of 64.
        ("a.json", BACKENDS, {"train.resolution": 512},
         ["backends.N.repeats = 3 is not known here; name the folder", "backends.N.crop = True",
          "caption_strategy = filename is not known here; write each caption into a text file"]),
        ("a.json", {"training_method": "LORA", "lora_rank": 4,
                    "samples": [{"prompt": "off", "seed": 1, "enabled": False}, {"prompt": "on", "seed": 2}]},
         {"sample.prompts": ["on"], "sample.seed": 2}, []),
        ("a.json", {"algo": "lokr", "linear_dim": 16, "linear_alpha": 4, "factor": 8},
         {"adapter.kind": "lokr", "adapter.rank": 16, "adapter.alpha": 4}, ["factor = 8 is not known here"]),
        ("a.json", {"network_dim": 4, "max_train_epochs": 3, "lr_scheduler": "cosine", "lr_warmup_steps": 50},
         {"train.epochs": 3}, ["Warm-up is 50 steps there"]),
        ("a.sh", "train_network.py --network_dim 4\ntrain_network.py --network_dim 8", {"adapter.rank": 8},
         ["commands = 2 is not known here; the options of the last one count"]),
        ("a.json", {"lora_rank": 4, "training_method": "LORA", "optimizer": {"optimizer": "ADAMW_8BIT"}},
         {"optimizer.name": "adamw"}, ["adamw_8bit has no package here; AdamW is used instead"]),
        ("a.sh", "train_network.py --network_dim 4 --optimizer_type PagedAdamW32bit --unet_lr 1e-4",
         {"optimizer.name": "adamw"}, ["pagedadamw32bit is not known here; AdamW is used instead"]),
        ("a.sh", "flux_train_network.py --network_dim 4", {"adapter.rank": 4},
         ["script = flux_train_network.py: this cannot be trained here"]),
        ("a.yaml", "{network: {type: lokr, linear: 8}, train: {steps: 9, lr_scheduler: linear}}",
         {"adapter.kind": "lokr", "adapter.rank": 1024, "optimizer.schedule": "constant"},
         ["linear (rising from a third) is not known here"]),
    ],
)  # fmt: skip
def test_other_shapes_of_configurations(
    tmp_path: Path, name: str, given: Any, values: dict[str, Any], sentences: list[str]
) -> None:
    (tmp_path / name).write_text(given if isinstance(given, str) else json.dumps(given))
    found = settings_from_lora(tmp_path / name)
    assert {key: found.values.get(key) for key in values} == values
    said = " ".join(found.left)
    for sentence in sentences:
        assert sentence in said
    assert "several values" not in said
    assert "optimizer.warmup" not in found.values or "Warm-up" not in said
    RunConfig().changed(found.values)


def test_onetrainer_s_lora_has_its_configuration_in_its_header(tmp_path: Path) -> None:
    text = json.dumps({"training_method": "LORA", "lora_rank": 4, "lora_alpha": 2.0, "batch_size": 3})
    path = write_header(
        tmp_path / "a.safetensors", {"lora_unet_a.lora_down.weight": [4, 8]}, {"ot_config": text}
    )
    found = settings_from_lora(path)
    assert found.source == "a configuration of OneTrainer"
    taken = {"adapter.rank": 4, "adapter.alpha": 2, "train.batch_size": 3, "loss.min_snr": 0}
    assert taken.items() <= found.values.items()


def test_a_base_s_path_and_comments_of_windows_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.bat").write_bytes("rem 训练\r\n".encode("gbk") + BATCH.encode())
    assert settings_from_lora(tmp_path / "a.bat").base == r"C:\my models\base.safetensors"


def test_a_header_copied_into_a_file(tmp_path: Path) -> None:
    """Values as texts, as the file has them, or parsed, as A1111 shows them; every key is in the report."""
    texts = {
        "ss_network_dim": "8", "ss_network_alpha": "4.0", "ss_network_module": "networks.lora",
        "ss_learning_rate": "0.0001", "ss_unet_lr": "None", "ss_text_encoder_lr": "5e-05",
        "ss_base_model_version": "sdxl_base_v1-0", "ss_min_snr_gamma": "None", "ss_tag_frequency": "{}",
    }  # fmt: skip
    for given in (texts, {"__metadata__": texts}, texts | {"ss_network_dim": 8, "ss_network_args": {"a": 1}}):
        (tmp_path / "a.json").write_text(json.dumps(given))
        found = settings_from_lora(tmp_path / "a.json")
        # The one rate of text encoders is that of both.
        rates = {"optimizer.lr": 1e-4, "optimizer.text_encoder_lr": 5e-5, "optimizer.text_encoder_2_lr": 5e-5}
        assert {
            "adapter.rank": 8,
            "adapter.alpha": 4,
            "loss.min_snr": 0,
            **rates,
        }.items() <= found.values.items()
        assert "loss.min_snr" in found.defaults
        said = " ".join([*found.keys, *found.left])
        assert all(key in said for key in texts)


def test_options_of_sample_prompts_that_are_not_known_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        '{network: {linear: 4}, sample: {prompts: ["a cat --m 3", "a dog --s 9"]}}'
    )
    found = settings_from_lora(tmp_path / "a.yaml")
    assert found.values["sample.prompts"] == ["a cat", "a dog --s 9"]
    assert "--m in the sample prompt" in found.left[0]


def test_another_model_is_told_in_one_sentence(tmp_path: Path) -> None:
    given = {"LoRA_type": "Flux1", "flux1_checkbox": True, "network_dim": 4}
    (tmp_path / "a.json").write_text(json.dumps(given))
    found = settings_from_lora(tmp_path / "a.json")
    assert found.left[0] == f"LoRA_type = Flux1, flux1_checkbox = True: {FOREIGN}"
