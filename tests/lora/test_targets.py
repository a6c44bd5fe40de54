"""Sets of layers on the true layouts, against the numbers that kohya's own trainer reports and against its
rule."""

import functools
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from lora_core.errors import ConfigError
from lora_core.lora.inject import target_modules
from lora_core.model_files.families import FAMILIES, Family, Targets, named_targets
from lora_core.settings.schema import TARGETS
from lora_core.system.files import FAMILY_CONFIGS


@functools.cache
def modules(name: str) -> dict[str, nn.Module]:
    """UNet and text encoders of true size, without memory for weights."""
    family = FAMILIES[name]
    configs = FAMILY_CONFIGS / family.configs
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((configs / "unet" / "config.json").read_text()))
        encoders = {
            encoder.part: CLIPTextModel(
                CLIPTextConfig(**json.loads((configs / encoder.part / "config.json").read_text()))
            )
            for encoder in family.text_encoders
        }
    return {"unet": unet, **encoders}


def count(name: str, targets: str) -> list[int]:
    chosen = named_targets(targets, FAMILIES[name])
    return [len(target_modules(part, module, chosen)) for part, module in modules(name).items()]


# Number of layers that kohya sd-scripts reports with its default targets: UNet, then the text encoders.
@pytest.mark.parametrize(
    ("name", "counts", "total"),
    [("sd15", [192, 72], 264), ("sd2", [192, 138], 330), ("sdxl", [722, 72, 192], 986)],
)
def test_kohyas_default_set(name: str, counts: list[int], total: int) -> None:
    assert count(name, "kohya") == counts
    assert sum(counts) == total


def by_class_names(root: nn.Module, classes: set[str], convolutions: bool) -> set[str]:
    """kohya's rule: everything linear, and on request each convolution, below modules of these classes."""
    found = set()
    for path, module in root.named_modules():
        if type(module).__name__ in classes:
            for below, layer in module.named_modules():
                small = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)
                if isinstance(layer, nn.Linear) or small or (convolutions and isinstance(layer, nn.Conv2d)):
                    found.add(f"{path}.{below}")
    return found


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
@pytest.mark.parametrize("targets", ["kohya", "locon"])
def test_the_same_layers_as_by_kohyas_rule(name: str, targets: str) -> None:
    chosen = named_targets(targets)
    for part, module in modules(name).items():
        found = {path for path, _ in target_modules(part, module, chosen).values()}
        if part != "unet":
            assert found == by_class_names(module, {"CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"}, False)
            continue
        classes = {"Transformer2DModel"}
        if targets == "locon":
            classes |= {"ResnetBlock2D", "Downsample2D", "Upsample2D"}
        assert found == by_class_names(module, classes, targets == "locon")


def test_locon_has_convolutions_of_all_kinds() -> None:
    names = target_modules("unet", modules("sd15")["unet"], named_targets("locon"))
    for name in (
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.1.resnets.0.conv_shortcut",
        "mid_block.resnets.1.time_emb_proj",
        "down_blocks.0.downsamplers.0.conv",
        "up_blocks.0.upsamplers.0.conv",
    ):
        assert name in names
    for name in ("conv_in", "conv_out", "time_embedding.linear_1"):
        assert name not in names


def test_attention_is_the_part_of_kohyas_set_that_its_name_says() -> None:
    # 16 transformers of one block, each with two attentions of four layers; twelve text layers of four.
    assert count("sd15", "attention") == [128, 48]


def test_style_and_subject_share_the_unet_between_them() -> None:
    unet = modules("sd15")["unet"]
    sets = [
        set(target_modules("unet", unet, named_targets(t, FAMILIES["sd15"]))) for t in ("style", "subject")
    ]
    assert not sets[0] & sets[1]
    assert sets[0] | sets[1] == set(target_modules("unet", unet, named_targets("kohya")))
    # Coarse: two transformers on the way down, one in the middle, three on the way up, twelve layers each.
    assert len(sets[1]) == 6 * 12


def test_style_and_subject_of_the_large_base_are_one_block_each() -> None:
    for targets, block in (("subject", "up_blocks.0.attentions.0."), ("style", "up_blocks.0.attentions.1.")):
        found = target_modules("unet", modules("sdxl")["unet"], named_targets(targets, FAMILIES["sdxl"]))
        # Ten transformer blocks with two attentions of four layers and two of feed-forward, and two
        # projections.
        assert len(found) == 10 * (4 + 4 + 2) + 2
        assert all(name.startswith(block) for name in found)
        assert count("sdxl", targets)[1:] == [0, 0]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("targets", TARGETS)
def test_every_set_is_there_for_every_family(family: Family, targets: str) -> None:
    assert named_targets(targets, family).pattern("unet") is not None


def test_blocks_that_are_not_known_are_a_sentence() -> None:
    family = Family(**{**vars(FAMILIES["tiny"]), "style_blocks": ""})
    with pytest.raises(ConfigError, match=r"Embedded tiny base.*choose attention, kohya or locon"):
        Targets("a", "", "style_blocks").within(family)
