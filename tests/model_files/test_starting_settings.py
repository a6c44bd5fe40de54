"""The shipped presets: each goal with each level, legal, and nothing but settings that a preset may hold; and
the settings that a LoRA was trained with: from our own header, kohya's, or nothing but layers."""

import json
import time
from pathlib import Path

import pytest

from lora_core.errors import AdapterFileError, ConfigError
from lora_core.model_files.families import FAMILIES
from lora_core.model_files.starting_settings import (
    GOALS,
    LEVELS,
    is_slider,
    preset,
    preset_names,
    settings_from_lora,
    starting_settings,
)
from lora_core.runs.preflight import check_kind
from lora_core.settings.config import RunConfig
from lora_core.system.files import PRESETS
from tests.app.bases import write_header

PERSONAL = ("name", "dataset.path", "dataset.trigger", "model.base", "model.vae")


def test_there_is_a_file_for_each_name_and_no_other() -> None:
    assert sorted(path.stem for path in PRESETS.glob("*.toml")) == sorted(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_the_preset_is_legal(name: str) -> None:
    values = preset(name)
    assert values
    config = RunConfig().changed(values)
    for key, value in values.items():
        assert config.get(key) == value, f"{key} is not written as the config keeps it"


@pytest.mark.parametrize("name", [f"{goal}-{level}" for goal in GOALS for level in LEVELS])
def test_a_goal_leaves_a_persons_own_settings_alone(name: str) -> None:
    assert set(preset(name)).isdisjoint(PERSONAL)


def test_more_quality_takes_more_steps() -> None:
    for goal in GOALS:
        steps = [RunConfig().changed(preset(f"{goal}-{level}")).train.steps for level in LEVELS]
        assert steps == sorted(steps)


def test_a_level_alone_means_a_character() -> None:
    assert preset("quick") == preset("character-quick")


@pytest.mark.parametrize("family", [None, *FAMILIES.values()])
def test_what_a_family_needs_counts_more_than_the_preset(family) -> None:
    """Text encoders of the largest family are not trained unless a person asks for it."""
    for name in ("", *preset_names()):
        start = starting_settings(name, family)
        config = RunConfig().changed(start)
        own = dict(family.settings) if family else {}
        for key, value in ({**preset(name), **own} if name else own).items():
            assert config.get(key) == value
    assert starting_settings("character-high", FAMILIES["sdxl"])["optimizer.text_encoder_lr"] == 0.0
    assert starting_settings("character-high", FAMILIES["sd15"])["optimizer.text_encoder_lr"] == 5e-5


def test_an_unknown_preset_is_answered_with_all_names() -> None:
    with pytest.raises(ConfigError, match="demo, character-quick"):
        preset("best")


DOWN = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"
LAYERS = {DOWN: [8, 320], DOWN.replace("down.weight", "up.weight"): [320, 8]}
# As kohya-ss/sd-scripts writes them (library/train_util.py, train_network.py), for a LoCon run on SD 1.5.
KOHYA = {
    "ss_network_module": "networks.lora",
    "ss_network_dim": "32",
    "ss_network_alpha": "16.0",
    "ss_network_args": json.dumps(
        {"conv_dim": "8", "conv_alpha": "4", "block_dims": "1,2", "rank_dropout": "0.1"}
    ),
    "ss_learning_rate": "0.0001",
    "ss_unet_lr": "0.0002",
    "ss_text_encoder_lr": "5e-05",
    "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1)",
    "ss_lr_scheduler": "cosine_with_restarts",
    "ss_lr_warmup_steps": "100",
    "ss_max_train_steps": "2000",
    "ss_resolution": "(512, 768)",
    "ss_clip_skip": "2",
    "ss_batch_size_per_device": "2",
    "ss_min_snr_gamma": "5.0",
    "ss_noise_offset": "None",
    "ss_gradient_checkpointing": "True",
    "ss_keep_tokens": "1",
    "ss_shuffle_caption": "True",
    "ss_sd_model_name": "some base.safetensors",
    "ss_multires_noise_iterations": "6",
    "ss_debiased_estimation": "True",
    "ss_scale_weight_norms": "1.0",
    "ss_ip_noise_gamma_random_strength": "True",
    "ss_seed": "42",
    "ss_loss_type": "huber",
    "ss_huber_schedule": "exponential",
    "ss_huber_c": "0.2",
    "ss_zero_terminal_snr": "True",
}


def lora(
    path: Path, metadata: dict[str, str] | None = None, layers: dict[str, list[int]] | None = None
) -> Path:
    return write_header(path / "a lora.safetensors", layers or LAYERS, metadata)


def test_arguments_of_an_optimizer_are_taken_where_it_has_them_here(tmp_path: Path) -> None:
    text = (
        "transformers.optimization.Adafactor(scale_parameter=False,relative_step=False,beta2_decay=-0.7,x=1)"
    )
    like = settings_from_lora(lora(tmp_path, KOHYA | {"ss_optimizer": text}))
    assert like.values["optimizer.name"] == "adafactor"
    assert like.values["optimizer.args"] == {"beta2_decay": -0.7}
    assert [one for one in like.left if "argument" in one and "network" not in one] == [
        "The optimizer's argument x = 1 is not used here."
    ]
    text = "torch.optim.adamw.AdamW(betas=0.9,0.99,amsgrad=yes)"
    like = settings_from_lora(lora(tmp_path, KOHYA | {"ss_optimizer": text}))
    assert like.values["optimizer.args"] == {"betas": [0.9, 0.99]}
    assert "The optimizer's argument amsgrad = yes is not used here." in like.left


def test_kohya_s_header(tmp_path: Path) -> None:
    texts = {"lora_te_a_q_proj.lora_down.weight": [8, 768]}
    like = settings_from_lora(lora(tmp_path, KOHYA, LAYERS | texts))
    # "None", and what older versions do not write, is off there.
    off = {"loss.noise_offset": 0, "dataset.flip": False, "dataset.caption_dropout": 0}
    assert off.items() <= like.defaults.items()
    assert {name: value for name, value in like.values.items() if name not in like.defaults} == {
        "adapter.rank": 32,
        "adapter.alpha": 16.0,
        "adapter.targets": "locon",
        "adapter.conv_rank": 8,
        "adapter.conv_alpha": 4.0,
        "adapter.rank_dropout": 0.1,
        "optimizer.lr": 2e-4,
        "optimizer.text_encoder_lr": 5e-5,
        "optimizer.name": "adamw",
        "optimizer.args": {"weight_decay": 0.1},
        "optimizer.schedule": "cosine_restarts",
        "optimizer.warmup": 0.05,
        "train.steps": 2000,
        # The square of the same area: sqrt(512 x 768) = 627, on the grid of 64.
        "train.resolution": 640,
        "train.clip_skip": 2,
        "train.batch_size": 2,
        "train.gradient_checkpointing": True,
        "loss.min_snr": 5.0,
        "loss.type": "huber",
        "loss.huber_schedule": "exponential",
        "loss.huber_delta": 0.2,
        "loss.multires_noise": 6,
        "loss.debias": True,
        "adapter.max_norm": 1.0,
        "dataset.keep_tags": 1,
        "dataset.shuffle_tags": True,
        "seed": 42,
    }
    assert like.base == "some base.safetensors"
    said = " ".join(like.left)
    assert "The optimizer adamw8bit has no package here; AdamW is used instead." in said
    assert "block_dims = 1,2" in said
    assert "zero terminal SNR; set that by hand" in said
    assert "Input perturbation of random strength (True) is not known here" in said
    # What those say is legal together.
    RunConfig().changed(like.values)
    # The header names a rate for text encoders that were not trained too.
    assert settings_from_lora(lora(tmp_path, KOHYA)).values["optimizer.text_encoder_lr"] == 0
    no_snr = settings_from_lora(lora(tmp_path, KOHYA | {"ss_min_snr_gamma": "None"}))
    assert no_snr.values["loss.min_snr"] == no_snr.defaults["loss.min_snr"] == 0


@pytest.mark.parametrize(
    ("texts", "values", "said"),
    [
        # kohya writes all three into each header, whatever the loss.
        ({"ss_loss_type": "l2", "ss_huber_schedule": "snr", "ss_huber_c": "0.1"}, ("mse", None, None), ""),
        ({"ss_loss_type": "huber"}, ("huber", "snr", 0.1), ""),
        ({"ss_loss_type": "smooth_l1", "ss_huber_c": "0.5"}, ("huber", "snr", 0.5), "smooth_l1"),
        (
            {"ss_loss_type": "huber", "ss_huber_schedule": "constant", "ss_huber_scale": "2.0"},
            ("huber", "constant", 0.2),
            "",
        ),
        (
            {"ss_loss_type": "huber", "ss_huber_schedule": "exponential", "ss_huber_scale": "2.0"},
            ("huber", "exponential", 0.1),
            "Huber's scale (2.0)",
        ),
        ({"ss_loss_type": "huber", "ss_huber_c": "-4"}, ("huber", "snr", None), "Huber delta is -4"),
        ({"ss_loss_type": "huber", "ss_huber_c": "nan"}, ("huber", "snr", None), ""),
    ],
)
def test_kohya_s_huber(tmp_path: Path, texts: dict[str, str], values: tuple[object, ...], said: str) -> None:
    like = settings_from_lora(lora(tmp_path, {"ss_network_dim": "4", "ss_network_alpha": "4", **texts}))
    names = ("loss.type", "loss.huber_schedule", "loss.huber_delta")
    assert tuple(like.values.get(name) for name in names) == values
    assert said in " ".join(like.left)


def test_lycoris_diag_oft_is_our_oft(tmp_path: Path) -> None:
    arguments = {"algo": "diag-oft", "conv_dim": "8", "constraint": "0.1"}
    header = {"ss_network_module": "lycoris.kohya", "ss_network_dim": "8", "ss_network_alpha": "1"}
    like = settings_from_lora(lora(tmp_path, {**header, "ss_network_args": json.dumps(arguments)}))
    assert like.values["adapter.kind"] == "oft"
    assert like.left == ["The network argument constraint = 0.1 is not known here."]
    check_kind(RunConfig().changed(like.values))


def test_an_older_header_of_ours_with_retired_settings(tmp_path: Path) -> None:
    text = "[adapter]\nkind = 'lora'\nrank = 4\n[dataset]\nrepeats = 10\n"
    like = settings_from_lora(lora(tmp_path, {"lora_easel.config": text}))
    assert like.values == {"adapter.kind": "lora", "adapter.rank": 4}
    assert len(like.left) == 1
    assert "dataset.repeats = 10 cannot be used" in like.left[0]


def test_newer_headers_keep_it_by_dataset(tmp_path: Path) -> None:
    datasets = [
        {
            "batch_size_per_device": 4,
            "resolution": [768, 768],
            "subsets": [{"flip_aug": True, "keep_tokens": 2}],
        }
    ]
    texts = {"ss_network_dim": "4", "ss_network_alpha": "1", "ss_datasets": json.dumps(datasets)}
    values = settings_from_lora(lora(tmp_path, texts)).values
    assert values["dataset.flip"] is True
    assert values["dataset.keep_tags"] == 2


def test_our_own_header_comes_back_whole(tmp_path: Path) -> None:
    import tomli_w

    config = RunConfig().changed({
        "optimizer.lr": 3e-4, "adapter.block_ranks": {"mid_block": 4}, "sample.prompts": ["a cat", "it's"],
        "dataset.trigger": "zwx", "model.base": "my base.safetensors", "dataset.path": "dog",
    })  # fmt: skip
    path = lora(tmp_path, {"lora_easel.config": tomli_w.dumps(config.to_dict() | {"later": 1})})
    like = settings_from_lora(path)
    back = RunConfig().changed(like.values)
    assert back == config.changed({"model.base": "demo", "dataset.path": "demo"})
    assert like.base == "my base.safetensors"
    assert "later is a setting that this version does not know." in like.left


def test_a_file_without_a_header_tells_rank_and_layers(tmp_path: Path) -> None:
    like = settings_from_lora(lora(tmp_path))
    assert like.values["adapter.rank"] == 8
    assert like.values["adapter.targets"] == "attention"
    # No layer of a text encoder is in it.
    assert like.values["optimizer.text_encoder_lr"] == 0.0
    assert "alpha is not written" in like.left[0]
    wider = {
        **LAYERS,
        "lora_unet_a_resnets_0_conv1.lora_down.weight": [8, 320, 3, 3],
        "lora_te_b.lora_down.weight": [8, 9],
    }
    values = settings_from_lora(lora(tmp_path, layers=wider)).values
    assert values["adapter.targets"] == "locon"
    assert "optimizer.text_encoder_lr" not in values


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"lora_easel.config": "a." * 100_000 + "b = 1"}, "more than 20 levels deep"),
        ({"lora_easel.config": "#" * 1_000_001}, "larger than 1,000,000 characters"),
        ({"ot_config": json.dumps({f"k{n}": n for n in range(300_000)})}, "more than 20,000 values"),
    ],
)
def test_a_header_of_any_length_is_refused_at_once(
    tmp_path: Path, metadata: dict[str, str], words: str
) -> None:
    file = lora(tmp_path, metadata)
    begun = time.process_time()
    assert not is_slider(file)
    with pytest.raises(ConfigError, match=words):
        settings_from_lora(file)
    assert time.process_time() - begun < 3.0


@pytest.mark.parametrize(
    "metadata",
    [
        {"ss_network_dim": "9" * 400, "ss_network_alpha": "nan", "ss_network_args": "[" * 5000},
        {"ss_network_dim": "-1", "ss_optimizer": "<img src=x>" * 999, "ss_datasets": '[{"subsets": 3}]'},
        {"lora_easel.config": "adapter = 3\n[optim]\nlr = 'much'"},
        {"lora_easel.config": f"seed = 0x{'f' * 9000}\nmodel.base = 0x{'f' * 9000}"},
        {
            "ss_network_module": "x",
            "ss_lr_warmup_steps": "5",
            "ss_max_train_steps": "0",
            "ss_resolution": "(1, 99999)",
        },
    ],
)
def test_nonsense_is_left_out_and_said(tmp_path: Path, metadata: dict[str, str]) -> None:
    like = settings_from_lora(lora(tmp_path, metadata))
    RunConfig().changed(like.values)
    assert like.left
    assert all(len(text) < 300 for text in like.left)


def test_what_is_no_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="has no record of its training"):
        settings_from_lora(lora(tmp_path, layers={"a.weight": [4, 4]}))
    with pytest.raises(AdapterFileError, match="cannot be read"):
        settings_from_lora(lora(tmp_path, {"lora_easel.config": "= ="}))
    with pytest.raises(AdapterFileError, match="does not exist"):
        settings_from_lora(tmp_path / "none.safetensors")


def test_a_pattern_that_cannot_be_used_is_left_out_and_said(tmp_path: Path) -> None:
    hostile = {"lora_easel.config": "[adapter]\nrank = 4\n[adapter.block_ranks]\n'(?=(a+))+b' = 4"}
    like = settings_from_lora(lora(tmp_path, hostile))
    assert "adapter.block_ranks" not in like.values
    assert like.left[0].startswith("Ranks by block is {'(?=(a+))+b': 4}")
