"""The layout worked out from configs, against the real classes of diffusers and transformers on no device."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_core.formats.layers import family_layout
from lora_core.model_files.families import ATTENTION, FAMILIES, KOHYA, canonical_path
from lora_core.system.files import DEMO_BASE, FAMILY_CONFIGS


def real_layers(part, folder):
    with torch.device("meta"):
        if part == "unet":
            config = json.loads((folder / part / "config.json").read_text())
            model = UNet2DConditionModel.from_config(config)
        else:
            config = CLIPTextConfig.from_pretrained(folder / part)
            projected = "CLIPTextModelWithProjection" in (config.architectures or ())
            model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {
        name if name == "text_projection" else canonical_path(part, name): tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layout_is_that_of_the_real_models(name):
    family = FAMILIES[name]
    layout = family_layout(family)
    for part in family.parts:
        folder = FAMILY_CONFIGS / family.configs if family.configs else DEMO_BASE
        ours = {path: shape for (p, path), shape in layout.items() if p == part}
        assert ours == real_layers(part, folder)


# formats.md, the table of kohya keys.
COUNTS = {"sd15": 192 + 72, "sd2": 192 + 138, "sd2_v": 192 + 138, "sdxl": 722 + 72 + 192}


@pytest.mark.parametrize("name", COUNTS)
def test_kohyas_default_targets_are_as_many_as_the_specification_says(name):
    layout = family_layout(FAMILIES[name])
    assert sum(KOHYA.pattern(part).fullmatch(path) is not None for part, path in layout) == COUNTS[name]
    assert any(ATTENTION.pattern(part).fullmatch(path) for part, path in layout)
