"""One pipeline: the same request gives the same image, whatever came before it."""

import numpy as np
import pytest
import torch

from lora_core.errors import AdapterFileError, ConfigError
from lora_core.formats.io import save_adapter
from lora_core.generate.grid import grid_requests, parse_axis, vary
from lora_core.generate.latent_preview import latent_preview
from lora_core.generate.pipeline import Pipeline, generate_image
from lora_core.generate.request import GenerationRequest, WeightedLora
from lora_core.lora.weights import AdapterWeights, LayerWeights
from lora_core.model_files.families import FAMILIES
from lora_core.models.load import load_base
from lora_core.models.vae import decode_latents
from lora_core.tools.svd import truncate_adapter

SIZE = {"steps": 2, "cfg": 3.0, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline(load_base("demo", torch.device("cpu"), torch.float32), truncate_adapter)


def adapter(path, seed, rank=8, part="unet"):
    draw = torch.Generator().manual_seed(seed)
    names = {
        "unet": ["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"],
        "text_encoder": ["text_model.encoder.layers.0.self_attn.v_proj"],
    }[part]
    sizes = {"unet": (128, 96), "text_encoder": (128, 128)}[part]
    layer = LayerWeights(
        torch.randn(rank, sizes[0], generator=draw), torch.randn(sizes[1], rank, generator=draw), 4.0
    )
    save_adapter(AdapterWeights({(part, name): layer for name in names}), path, FAMILIES["tiny"])
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return adapter(folder / "a.safetensors", 1), adapter(folder / "b.safetensors", 2)


def drawn(pipeline, shot):
    return np.asarray(pipeline(shot))


def test_cells_of_a_grid_are_the_single_pictures_and_zero_is_the_base(pipeline, files):
    shot = GenerationRequest(prompt="owl", seed=4, loras=(WeightedLora(files[0], 0.8),), **SIZE)
    rows, columns = parse_axis("seed=4,5"), parse_axis("strength=0,0.5,1")
    cells = [[drawn(pipeline, cell) for cell in row] for row in grid_requests(shot, rows, columns)]
    for row, seed in zip(cells, (4, 5), strict=True):
        alone = drawn(pipeline, GenerationRequest(prompt="owl", seed=seed, **SIZE))
        assert (row[0] == alone).all()
        for cell, strength in zip(row, (0.0, 0.5, 1.0), strict=True):
            single = GenerationRequest(
                prompt="owl", seed=seed, loras=(WeightedLora(files[0], strength),), **SIZE
            )
            assert (cell == drawn(pipeline, single)).all()
        assert (row[1] != row[2]).any()
    pipeline.set_adapters(())
    plain = np.asarray(generate_image(pipeline.base, GenerationRequest(prompt="owl", seed=4, **SIZE)))
    assert (plain == cells[0][0]).all()


def test_several_adapters_act_together_and_a_text_encoders_strength_apart(pipeline, files, tmp_path):
    text = adapter(tmp_path / "text.safetensors", 3, part="text_encoder")
    shot = GenerationRequest(prompt="owl", seed=4, **SIZE)
    both = drawn(pipeline, GenerationRequest(**{**vars(shot), "loras": tuple(map(WeightedLora, files))}))
    first = drawn(pipeline, GenerationRequest(**{**vars(shot), "loras": (WeightedLora(files[0]),)}))
    assert (both != first).any()
    off = drawn(pipeline, GenerationRequest(**{**vars(shot), "loras": (WeightedLora(text, 1.0, 0.0),)}))
    assert (off == drawn(pipeline, shot)).all()
    on = drawn(pipeline, GenerationRequest(**{**vars(shot), "loras": (WeightedLora(text, 0.0, 1.0),)}))
    assert (on != off).any()


def test_a_rank_cuts_by_the_best_there_is(pipeline, files):
    shot = GenerationRequest(prompt="owl", seed=4, loras=(WeightedLora(files[0]),), **SIZE)
    whole = drawn(pipeline, shot)
    assert (drawn(pipeline, vary(shot, "rank", 8)) == whole).all()
    assert (drawn(pipeline, vary(shot, "rank", 2)) != whole).any()
    draw = torch.Generator().manual_seed(9)
    layer = LayerWeights(torch.randn(6, 20, generator=draw), torch.randn(15, 6, generator=draw), 3.0)
    cut = truncate_adapter(AdapterWeights({("unet", "x"): layer}), 2).layers["unet", "x"]
    u, s, vh = torch.linalg.svd(layer.delta().double())
    best = (u[:, :2] * s[:2]) @ vh[:2]
    assert cut.rank == 2
    torch.testing.assert_close(cut.delta().double(), best, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_does_not_fit_leaves_the_base_as_it_was(pipeline, files, tmp_path):
    shot = GenerationRequest(prompt="owl", seed=4, loras=(WeightedLora(files[0]),), **SIZE)
    before = drawn(pipeline, shot)
    with pytest.raises(AdapterFileError, match="does not exist"):
        pipeline(vary(shot, "checkpoint", str(tmp_path / "nowhere.safetensors")))
    assert (drawn(pipeline, shot) == before).all()


def test_the_png_says_what_was_in_the_base(pipeline, files):
    loras = (
        WeightedLora(files[0], 0.8, 0.4),
        WeightedLora(files[1], 0.5, rank=4),
        WeightedLora(files[1], 0.0),
    )
    text = pipeline.infotext(
        GenerationRequest(prompt="owl", negative="blue", seed=4, clip_skip=2, loras=loras, **SIZE)
    )
    assert (
        text == "owl <lora:a:0.4:0.8> <lora:b:0.5>\nNegative prompt: blue\n"
        "Steps: 2, Sampler: DDIM, CFG scale: 3, Seed: 4, Size: 64x64, Model: demo, Clip skip: 2,"
        " LoRA rank of b: 4"
    )


def test_a_look_has_the_colours_of_the_picture(pipeline):
    """On a prompt that the matrix was not fitted on; a constant picture would explain nothing."""
    seen = []
    shot = GenerationRequest(prompt="owl, on a red background", seed=4, steps=8, cfg=3.0)
    image = pipeline(shot, on_latents=lambda clean: seen.append(clean()))
    assert len(seen) == 8
    whole = np.asarray(image.resize((16, 16), resample=4), float)
    spread = np.square(whole - whole.mean(axis=(0, 1))).mean()
    errors = [
        np.square(np.asarray(latent_preview(z, pipeline.rgb_matrix), float) - whole).mean() for z in seen
    ]
    assert errors[-1] < 0.4 * spread
    assert errors[-1] < errors[0]
    # The latents that it is heading for are those that the last step arrives at.
    last = (decode_latents(pipeline.base, seen[-1])[0].permute(1, 2, 0).numpy() * 255).round()
    assert np.abs(last - np.asarray(image, float)).mean() < 1.0


def test_an_image_that_is_not_finite_is_said_rather_than_black(pipeline, files):
    """A strength of 1e30 overflows fp32 in the UNet; NaN pixels were black."""
    shot = GenerationRequest(prompt="owl", seed=4, loras=(WeightedLora(files[0], 1e30),), **SIZE)
    with pytest.raises(ConfigError, match="not finite"):
        pipeline(shot)
    assert drawn(pipeline, vary(shot, "strength", 0.0)).any()
