"""Files into files: bit for bit there and back, in the precision that they have."""

import pytest
import torch

from lora_core.adapters.weights import AdapterWeights
from lora_core.formats.container import read_tensors, serialised
from lora_core.formats.convert import converted
from lora_core.formats.file import write_adapter
from lora_core.spec.errors import AdapterFileError
from lora_core.spec.families import FAMILIES
from tests.formats.conftest import BLOCK, CLIP, linear

TINY = FAMILIES["tiny"]


def weights(first, second):
    return AdapterWeights(
        {
            ("unet", f"{BLOCK}.attn2.to_k"): linear(4, first, inside=128, seed=1),
            ("text_encoder", f"{CLIP}.self_attn.q_proj"): linear(8, second, inside=128, seed=2),
        }
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("alphas", [(6.0, 6.0), (6.0, 0.7)])
def test_there_and_back(tmp_path, alphas, precision):
    start, middle, end = (tmp_path / f"{name}.safetensors" for name in ("start", "middle", "end"))
    write_adapter(weights(*alphas), start, "kohya", precision, TINY, {"ss_seed": "1"}, keep_alphas=True)
    assert "only diffusers" in converted(start, middle, "diffusers")[0]
    told = converted(middle, end, "kohya", keep_alphas=True)
    assert bool(told) == (alphas[0] != alphas[1])
    before, after = read_tensors(start), read_tensors(end)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    assert after[1]["ss_seed"] == "1"


def test_a_file_for_no_known_family_is_refused(tmp_path):
    source = tmp_path / "f.safetensors"
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 1536), f"{stem}.lora_up.weight": torch.ones(5, 2)}
    source.write_bytes(serialised(tensors, {}))
    with pytest.raises(AdapterFileError, match="1536 channels wide"):
        converted(source, tmp_path / "g.safetensors", "diffusers")
    assert not (tmp_path / "g.safetensors").exists()
