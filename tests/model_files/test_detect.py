"""What a base is, told from names and shapes alone: family, prediction, size; and what is refused by name."""

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lora_core.errors import ModelFileError
from lora_core.model_files.detect import CONV_IN, base_path, is_hub_id, lookup_base, read_base_facts
from lora_core.model_files.families import FAMILIES
from tests.app.bases import UNET, WIDTHS, checkpoint, write_header

MARKER = [0]
# Names that only files of that kind have, from the published files' own headers.
REFUSED = {
    "a Flux model": {"double_blocks.0.img_attn.norm.key_norm.scale": [128]},
    "a Stable Diffusion 3 model": {f"{UNET}joint_blocks.0.context_block.attn.qkv.weight": [8, 8]},
    "an adapter file": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": [4, 320]},
    "a ControlNet": {"control_model.input_blocks.0.0.weight": [320, 4, 3, 3]},
    "a VAE alone": {"decoder.up.0.block.0.conv1.weight": [8, 8, 3, 3]},
    "a text encoder alone": {"text_model.encoder.layers.0.self_attn.q_proj.weight": [768, 768]},
    "the refiner": {
        "conditioner.embedders.0.model.transformer.resblocks.0.ln_1.weight": [1280],
        f"{UNET}input_blocks.0.0.weight": [384, 4, 3, 3],
    },
    "no Stable Diffusion UNet": {"something.else": [3]},
}


@pytest.mark.parametrize(
    ("family", "title", "resolution", "multiple", "prediction"),
    [
        ("sd15", "Stable Diffusion 1.x", 512, 64, "epsilon"),
        ("sd2", "Stable Diffusion 2.x", 768, 64, "v_prediction"),
        ("sdxl", "Stable Diffusion XL", 1024, 32, "epsilon"),
    ],
)
def test_the_family_shows_in_the_context_width(
    tmp_path: Path, family: str, title: str, resolution: int, multiple: int, prediction: str
) -> None:
    facts = read_base_facts(str(checkpoint(tmp_path / "x.safetensors", family)))
    assert facts.single_file
    assert facts.family is not None
    assert facts.family.context_width == WIDTHS[family]
    assert (facts.family.title, facts.resolution, facts.multiple) == (title, resolution, multiple)
    assert facts.prediction == prediction
    assert facts.guessed, "nothing in the file says how it predicts"
    assert (facts.tokenizer / "merges.txt").is_file()
    assert (facts.configs / "unet" / "config.json").is_file()


def test_markers_say_v_and_zero_snr(tmp_path: Path) -> None:
    """Tensors that model makers put in for this: `v_pred` and `ztsnr`, as ComfyUI reads them."""
    plain = checkpoint(tmp_path / "v.safetensors", "sdxl", v_pred=MARKER)
    facts = read_base_facts(str(plain))
    assert (facts.prediction, facts.scheduler.get("rescale_betas_zero_snr")) == ("v_prediction", None)
    both = read_base_facts(str(checkpoint(tmp_path / "z.safetensors", "sdxl", v_pred=MARKER, ztsnr=MARKER)))
    assert (both.prediction, both.scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert "zero terminal SNR" in both.sentence
    assert "marker v_pred" in both.sentence


@pytest.mark.parametrize(
    ("beside", "text", "prediction"),
    [
        ("scheduler_config.json", '{"prediction_type": "epsilon"}', "epsilon"),
        ("scheduler/scheduler_config.json", '{"prediction_type": "epsilon"}', "epsilon"),
        ("x.yaml", "model:\n  params:\n    parameterization: 'v'\n", "v_prediction"),
        ("x.yaml", "model:\n  params:\n    linear_start: 1\n", "epsilon"),
    ],
)
def test_a_config_beside_the_file_counts(tmp_path: Path, beside: str, text: str, prediction: str) -> None:
    file = checkpoint(tmp_path / "x.safetensors", "sd2")
    (tmp_path / beside).parent.mkdir(exist_ok=True)
    (tmp_path / beside).write_text(text)
    facts = read_base_facts(str(file))
    assert facts.prediction == prediction
    assert facts.resolution == (768 if prediction == "v_prediction" else 512)
    assert not facts.guessed
    assert beside in facts.sentence


def test_a_config_beside_the_file_of_any_length(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "x.safetensors", "sd2")
    beside = file.with_suffix(".yaml")
    beside.write_text("\n" * 100_000 + "parameterization: v")
    assert read_base_facts(str(file)).prediction == "v_prediction"
    os.truncate(beside, 10**10)
    with pytest.raises(ModelFileError, match=r"x\.yaml cannot be read: larger than 50 MB"):
        read_base_facts(str(file))


def test_zero_terminal_snr_by_hand(tmp_path: Path) -> None:
    plain = checkpoint(tmp_path / "y.safetensors", "sdxl")
    facts = read_base_facts(str(plain), "v_prediction", "on")
    assert facts.zero_terminal_snr
    assert facts.scheduler["timestep_spacing"] == "trailing"
    assert "predicts velocity (as set), zero terminal SNR" in facts.sentence
    assert not read_base_facts(str(plain), "v_prediction").zero_terminal_snr
    marked = str(checkpoint(tmp_path / "z.safetensors", "sdxl", v_pred=MARKER, ztsnr=MARKER))
    assert read_base_facts(marked).zero_terminal_snr
    assert not read_base_facts(marked, zero_snr="off").zero_terminal_snr
    own = folder(tmp_path / "folder")
    assert read_base_facts(str(own), "v_prediction", "on").zero_terminal_snr
    for file in (plain, own):
        with pytest.raises(ModelFileError, match=r"predicts noise, and zero terminal SNR .* v_prediction"):
            read_base_facts(str(file), "auto", "on")


def test_cfg_rescale_by_default_is_for_velocity_with_zero_terminal_snr(tmp_path: Path) -> None:
    file = str(checkpoint(tmp_path / "y.safetensors", "sdxl"))
    v_zero, v_plain = read_base_facts(file, "v_prediction", "on"), read_base_facts(file, "v_prediction")
    assert [facts.cfg_rescale("auto") for facts in (v_zero, v_plain, read_base_facts(file))] == [
        0.7,
        0.0,
        0.0,
    ]
    assert [facts.cfg_rescale(0.0) for facts in (v_zero, v_plain)] == [0.0, 0.0]
    assert read_base_facts(file).cfg_rescale(0.3) == 0.3


def test_a_folder_without_a_prediction_is_a_guess_where_it_may_be_either(tmp_path: Path) -> None:
    for name, width, guessed in (("a", 1024, True), ("b", 768, False)):
        found = folder(tmp_path / name, cross_attention_dim=width)
        (found / "scheduler" / "scheduler_config.json").write_text("{}")
        assert read_base_facts(str(found)).guessed == guessed
        assert not read_base_facts(str(found), "epsilon").guessed


def test_the_header_counts_before_a_guess_and_a_setting_before_all(tmp_path: Path) -> None:
    shapes = {f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [320, 1024]}
    file = write_header(tmp_path / "x.safetensors", shapes, {"modelspec.prediction_type": "epsilon"})
    assert (read_base_facts(str(file)).prediction, read_base_facts(str(file)).guessed) == ("epsilon", False)
    assert read_base_facts(str(file), "v_prediction").prediction == "v_prediction"
    assert "as set" in read_base_facts(str(file), "v_prediction").sentence


@pytest.mark.parametrize("what", REFUSED)
def test_other_models_are_refused_by_their_name(tmp_path: Path, what: str) -> None:
    file = write_header(tmp_path / "x.safetensors", REFUSED[what])
    with pytest.raises(ModelFileError, match=what) as caught:
        read_base_facts(str(file))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("channels", [5, 7, 8, 12])
def test_other_inputs_are_refused(tmp_path: Path, channels: int) -> None:
    entry = {f"{UNET}input_blocks.0.0.weight": [320, channels, 3, 3]}
    with pytest.raises(ModelFileError, match=f"{channels} input channels"):
        read_base_facts(str(checkpoint(tmp_path / "x.safetensors", "sd15", **entry)))


@pytest.mark.parametrize(
    ("name", "row", "resolution"), [("sd15", "sd15", 512), ("sd2", "sd2", 512), ("sdxl", "sdxl", 1024)]
)
def test_an_inpainting_checkpoint_is_recognized(tmp_path: Path, name: str, row: str, resolution: int) -> None:
    """That of SD 2.x predicts noise at 512 px, unlike the usual one."""
    entry = {CONV_IN: [320, 9, 3, 3]}
    facts = read_base_facts(str(checkpoint(tmp_path / "x.safetensors", name, **entry)))
    assert facts.family is FAMILIES[row]
    assert (facts.inpainting, facts.prediction, facts.resolution) == (True, "epsilon", resolution)
    assert f"{FAMILIES[row].title}, for inpainting, trained at {resolution} px" in facts.sentence
    assert read_base_facts(str(folder(tmp_path / "folder", in_channels=9))).inpainting
    assert not read_base_facts(str(folder(tmp_path / "plain", in_channels=4))).inpainting


def test_an_unknown_width_lists_those_that_are_known(tmp_path: Path) -> None:
    shapes = {f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [320, 999]}
    with pytest.raises(ModelFileError, match=r"999 channels .*768 .*1024 .*2048"):
        read_base_facts(str(write_header(tmp_path / "x.safetensors", shapes)))


def test_a_pickle_under_the_wrong_name_is_never_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    plain, packed = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    plain.write_bytes(pickle.dumps(Trap()))
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Trap()))
    for file in (plain, packed):
        with pytest.raises(ModelFileError, match="pickled"):
            read_base_facts(str(file))
    ckpt = tmp_path / "c.ckpt"
    ckpt.write_bytes(plain.read_bytes())
    assert read_base_facts(str(ckpt)).family is None
    assert "shows when the run starts" in read_base_facts(str(ckpt)).sentence
    assert not (tmp_path / "sprung").exists()


def folder(path: Path, **changes: Any) -> Path:
    unet = {"cross_attention_dim": 768, "block_out_channels": [320, 640, 1280, 1280], "sample_size": 64}
    for name, config in {
        "unet/config.json": unet | changes,
        "vae/config.json": {"block_out_channels": [128, 256, 512, 512]},
        "scheduler/scheduler_config.json": {"prediction_type": "epsilon"},
    }.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps(config))
    return path


def test_a_folder_says_it_in_its_configs(tmp_path: Path) -> None:
    facts = read_base_facts(str(folder(tmp_path / "ä folder", sample_size=96)))
    assert (facts.resolution, facts.multiple, facts.prediction) == (768, 64, "epsilon")
    assert not facts.single_file
    assert not facts.guessed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 7}, "7 input channels"),
        ({"cross_attention_dim": [768, 768]}, "cross_attention_dim"),
        ({"cross_attention_dim": 4096}, "4096 channels"),
        ({"block_out_channels": None}, "block_out_channels"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelFileError, match=words):
        read_base_facts(str(folder(tmp_path, **changes)))


def test_an_incomplete_folder_names_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"lacks unet/config.json"):
        read_base_facts(str(tmp_path))
    (folder(tmp_path) / "vae" / "config.json").write_text("[")
    with pytest.raises(ModelFileError, match="cannot be read as JSON"):
        read_base_facts(str(tmp_path))


def test_names_that_are_no_paths() -> None:
    assert is_hub_id("owner/name-1.5")
    assert not is_hub_id("owner/name.safetensors")
    assert not is_hub_id("a/b/c")
    with pytest.raises(ModelFileError, match="hub cache"):
        base_path("nobody/nothing-here")
    with pytest.raises(ModelFileError, match="does not exist"):
        base_path("nothing here")


@pytest.mark.parametrize("name", ["a" * 300, f"a/{'b' * 300}", "a" * 100_000])
def test_a_name_that_is_too_long_for_a_file(name: str) -> None:
    assert len(lookup_base(name).problem) < 500
    assert "does not exist" in lookup_base(name).problem
