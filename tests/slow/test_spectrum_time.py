"""The spectrum of a file of Stable Diffusion XL's size, on one core."""

import time
from pathlib import Path

import pytest
import torch

from lora_core.formats.io import save_adapter
from lora_core.lora.weights import AdapterWeights, LayerWeights
from lora_core.model_files.detect import family_layout
from lora_core.model_files.families import FAMILIES, named_targets
from lora_core.tools.svd import file_spectrum

SECONDS = 10.0


@pytest.mark.slow
def test_all_layers_of_a_unet_in_seconds(tmp_path: Path) -> None:
    family = FAMILIES["sdxl"]
    layout, pattern = family_layout(family), named_targets("kohya").pattern("unet")
    assert pattern is not None
    draw = torch.Generator().manual_seed(0)
    layers = {}
    for key, (out, *inner) in layout.items():
        if key[0] == "unet" and pattern.fullmatch(key[1]):
            up = torch.randn(out, 16, generator=draw).reshape(out, 16, *(1 for _ in inner[1:]))
            layers[key] = LayerWeights(torch.randn(16, *inner, generator=draw), up, 16.0)
    assert len(layers) == 722
    path = tmp_path / "xl.safetensors"
    save_adapter(AdapterWeights(layers), path, family, dtype="fp16")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Of the processor, so that what else the machine does is not counted.
        began = time.process_time()
        found = file_spectrum(path)
        took = time.process_time() - began
    finally:
        torch.set_num_threads(threads)
    assert len(found["layers"]) == 722
    assert {row["numeric_rank"] for row in found["layers"]} == {16}
    assert took < SECONDS
