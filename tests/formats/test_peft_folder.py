"""Folders as PEFT itself writes them, with alpha in a config beside the weights."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_core.errors import AdapterFileError
from lora_core.formats.io import load_adapter
from lora_core.formats.verify import inspect_file, verify_adapter
from lora_core.model_files.families import FAMILIES
from tests.checkpoints import components


@pytest.mark.parametrize("rslora", [False, True])
def test_a_unet_saved_by_peft_is_read_at_its_strength(tmp_path, rslora):
    unet = next(module for part, module in components(FAMILIES["sd15"]) if part == "unet")
    config = LoraConfig(
        r=4, lora_alpha=10, target_modules=["to_q", "to_k"], use_rslora=rslora, init_lora_weights=False,
        rank_pattern={"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 2},
        alpha_pattern={"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 3},
    )  # fmt: skip
    model = get_peft_model(unet, config)
    model.save_pretrained(tmp_path)
    weights = load_adapter(tmp_path / "adapter_model.safetensors")
    base = model.base_model.model
    for (part, path), layer in weights.layers.items():
        assert part == "unet"
        theirs = base.get_submodule(path).get_delta_weight("default")
        torch.testing.assert_close(layer.delta(), theirs)
    assert len(weights.layers) == 64
    report = inspect_file(tmp_path / "adapter_model.safetensors")
    assert report["ranks"] == [2, 4]
    assert set(report["alphas"]) == {3, 10}
    # Nothing else looks at the config, and so nothing else finds the strength.
    verdict = verify_adapter(tmp_path / "adapter_model.safetensors", FAMILIES["sd15"])
    assert not verdict["ok"]


def test_a_broken_config_beside_is_told(tmp_path):
    unet = next(module for part, module in components(FAMILIES["sd15"]) if part == "unet")
    get_peft_model(unet, LoraConfig(r=4, target_modules=["to_q"])).save_pretrained(tmp_path)
    for text in ("{", json.dumps([1])):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterFileError, match=r"adapter_config\.json"):
            load_adapter(tmp_path / "adapter_model.safetensors")
