"""Files for SD 1.x, SD 2.x and SDXL in diffusers' own loader, and diffusers' own files in ours.

The models are narrow, but have each family's block layout, names and text encoders. Expected outputs come
from weights merged by hand.
"""

import copy

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_core.formats.io import load_adapter, save_adapter
from lora_core.formats.kohya import to_tensors
from lora_core.formats.layers import with_text_model
from lora_core.formats.verify import verify_adapter
from lora_core.lora.weights import AdapterWeights, LayerWeights
from lora_core.model_files.detect import family_layout
from lora_core.model_files.families import FAMILIES
from tests.formats.test_loading_in_diffusers import Heard, heard, merged, one_thread, trained_by_peft

__all__ = ["Heard", "heard", "one_thread"]

NAMES = ("sd15", "sd2", "sdxl")
CONTEXT = 16


def unet(name):
    """Two resnets a level and attention where the family has it; three levels are enough for the first
    two."""
    levels = FAMILIES[name].attention_levels if name == "sdxl" else (True, True, False)
    down = tuple("CrossAttnDownBlock2D" if level else "DownBlock2D" for level in levels)
    up = tuple("CrossAttnUpBlock2D" if level else "UpBlock2D" for level in reversed(levels))
    more = {}
    if name == "sdxl":
        more = {
            "transformer_layers_per_block": (1, 2, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 4 * 6 + 8,
        }
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=CONTEXT,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=name != "sd15",
        **more,
    )


def text_encoder(width, projected=False):
    config = CLIPTextConfig(
        vocab_size=100,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=8,
        eos_token_id=99,
        bos_token_id=98,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


@pytest.fixture(scope="module")
def all_models():
    torch.manual_seed(0)
    models = {}
    for name in NAMES:
        models[name] = {"unet": unet(name).eval()}
        if name == "sdxl":
            models[name]["text_encoder"] = text_encoder(6).eval()
            models[name]["text_encoder_2"] = text_encoder(10, projected=True).eval()
        else:
            models[name]["text_encoder"] = text_encoder(CONTEXT).eval()
    return models


def pipeline_of(name, models):
    parts = {part: copy.deepcopy(model) for part, model in models.items()}
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, layers_per_block=1)
    parts |= {"vae": vae, "scheduler": DDIMScheduler(), "tokenizer": None}
    if name == "sdxl":
        return StableDiffusionXLPipeline(tokenizer_2=None, **parts)
    more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, **more)


@torch.no_grad()
def outputs(models):
    """The text encoders' states, and the UNet's prediction from them."""
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 98, (2, 9), generator=draw)
    states = [model(tokens).last_hidden_state for part, model in models.items() if part != "unet"]
    context, more = torch.cat(states, -1), {}
    if "text_encoder_2" in models:
        pooled = models["text_encoder_2"](tokens).text_embeds
        times = torch.tensor([[8.0, 8, 0, 0, 8, 8]] * 2)
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": times}}
        states.append(pooled)
    latents = torch.randn(2, 4, 8, 8, generator=draw)
    return [*states, models["unet"](latents, torch.tensor([3, 500]), context, **more).sample]


def layers_of(models, chosen, rank, alpha):
    draw = torch.Generator().manual_seed(1)
    layers = {}
    for part, model in models.items():
        for name, module in model.named_modules():
            path = name if part == "unet" else with_text_model(name)
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and chosen(part, path):
                r, a = rank(len(layers)), alpha(len(layers))
                out, inside, *kernel = module.weight.shape
                down = torch.randn(r, inside, *kernel, generator=draw) / inside
                up = torch.randn(out, r, *(1 for _ in kernel), generator=draw)
                layers[part, path] = LayerWeights(down, up, a)
    return AdapterWeights(layers)


def default(part, path):
    return ".attentions." in path or path.startswith("text_model.")


def locon(part, path):
    return path.startswith(("down_blocks.", "mid_block.", "up_blocks.", "text_model."))


CASES = {
    "alpha is not the rank": (default, lambda i: 4, lambda i: 1.0),
    "mixed ranks": (default, lambda i: 1 + i % 3, lambda i: 2.0),
    "mixed alphas": (default, lambda i: 2, lambda i: (4.0, 1.0, 0.7)[i % 3]),
    "convolutions": (locon, lambda i: 2, lambda i: 1.0),
    "text encoders only": (lambda p, n: p != "unet" and default(p, n), lambda i: 2, lambda i: 1.0),
    "UNet only": (lambda p, n: p == "unet" and default(p, n), lambda i: 2, lambda i: 1.0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_our_kohya_file_is_loaded_whole_and_at_its_strength(all_models, tmp_path, heard, name, case):
    models, family = all_models[name], FAMILIES[name]
    weights = layers_of(models, *CASES[case])
    path = tmp_path / "f.safetensors"
    save_adapter(weights, path, family)
    pipeline = pipeline_of(name, models)
    pipeline.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="ours")
    loaded = {part: getattr(pipeline, part) for part in models}

    count = sum(n.endswith("lora_A.ours") for model in loaded.values() for n, _ in model.named_modules())
    assert count == len(weights.layers)
    # transformers reports the frozen weights of a projected text encoder as missing; those are compared
    # below.
    complaints = [m for m in heard if "No LoRA keys" not in m and "LOAD REPORT" not in m]
    assert not complaints
    found, right, plain = outputs(loaded), outputs(merged(models, weights)), outputs(models)
    for ours, expected in zip(found, right, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert (right[-1] - plain[-1]).abs().max() > 1e-3
    assert verify_adapter(path, family, weights, shapes_of(models))["tools"][-1]["ok"]


def shapes_of(models):
    return {
        (part, name if part == "unet" or name == "text_projection" else with_text_model(name)): tuple(
            module.weight.shape
        )
        for part, model in models.items()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


SETTINGS = {
    "plain": {"r": 4, "lora_alpha": 4},
    "rslora": {"r": 4, "lora_alpha": 2, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 2,
        "rank_pattern": {"to_q": 2, "fc1": 3},
        "alpha_pattern": {"to_v": 7},
    },
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_diffusers_own_files_are_read_at_their_strength(all_models, tmp_path, name, settings):
    torch.manual_seed(3)
    models = all_models[name]
    pipeline = pipeline_of(name, models)
    trained = {part: getattr(pipeline, part) for part in models}
    saved, count = {}, 0
    for part, model in trained.items():
        targets = ["to_q", "to_v", "to_out.0", "proj_in"] if part == "unet" else ["q_proj", "out_proj", "fc1"]
        layers, config = trained_by_peft(model, targets, SETTINGS[settings])
        saved |= {f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": config}
        count += len(layers) // 2
    type(pipeline).save_lora_weights(tmp_path, **saved)
    weights = load_adapter(tmp_path / "pytorch_lora_weights.safetensors")

    assert len(weights.layers) == count
    for ours, right in zip(outputs(merged(models, weights)), outputs(trained), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_module_counts_of_the_specification(name):
    """264, 330 and 986 modules with kohya's default targets (formats.md); three tensors each."""
    family = FAMILIES[name]
    layers = {
        key: LayerWeights(torch.ones(1, *shape[1:]), torch.ones(shape[0], 1, *(1 for _ in shape[2:])), 1.0)
        for key, shape in family_layout(family).items()
        if default(*key)
    }
    tensors = to_tensors(AdapterWeights(layers), family)
    assert len(tensors) == 3 * {"sd15": 264, "sd2": 330, "sdxl": 986}[name]
    start = "lora_unet_input_blocks_4_1_" if name == "sdxl" else "lora_unet_down_blocks_0_attentions_0_"
    assert f"{start}transformer_blocks_0_attn1_to_q.lora_up.weight" in tensors
