"""Our files in diffusers' own loader: no key is lost, and the strength is that of W0 + alpha / rank * up @
down.

The models are tiny but of the true layout. The expected weights are merged here by hand from the canonical
adapter, with nothing of the format code between.
"""

import copy
import logging

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from transformers import CLIPTextConfig, CLIPTextModel

from lora_core.formats.io import load_adapter, save_adapter
from lora_core.formats.layers import with_text_model
from lora_core.formats.verify import verify_adapter
from lora_core.lora.weights import AdapterWeights, LayerWeights
from lora_core.model_files.families import FAMILIES
from lora_core.tools.delta import file_updates
from tests.formats.conftest import WIDTH


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several threads only get into each other's way on layers of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=100,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    return {"unet": unet.eval(), "text_encoder": clip.eval()}


@pytest.fixture
def pipeline(models):
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, layers_per_block=1)
    return StableDiffusionPipeline(
        **{name: copy.deepcopy(model) for name, model in models.items()},
        vae=vae,
        tokenizer=None,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def layers_of(models, chosen, rank, alpha):
    """Random factors for each chosen linear layer or convolution; rank and alpha are functions of the
    number."""
    draw = torch.Generator().manual_seed(1)
    layers = {}
    for part, model in models.items():
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d) or not chosen(part, name):
                continue
            r, a = rank(len(layers)), alpha(len(layers))
            out, inside, *kernel = module.weight.shape
            down = torch.randn(r, inside, *kernel, generator=draw) / inside
            up = torch.randn(out, r, *(1 for _ in kernel), generator=draw)
            layers[part, name if part == "unet" else with_text_model(name)] = LayerWeights(down, up, a)
    return AdapterWeights(layers)


def merged(models, weights):
    result = {name: copy.deepcopy(model) for name, model in models.items()}
    modules = {part: dict(model.named_modules()) for part, model in result.items()}
    for (part, path), layer in weights.layers.items():
        names = modules[part]
        weight = names.get(path, names.get(path.removeprefix("text_model."))).weight.data
        product = layer.up.flatten(1).double() @ layer.down.flatten(1).double()
        weight += (layer.alpha / layer.down.shape[0] * product).reshape(weight.shape).float()
    return result


@torch.no_grad()
def outputs(unet, text_encoder):
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 100, (2, 9), generator=draw)
    context = text_encoder(tokens).last_hidden_state
    latents = torch.randn(2, 4, 8, 8, generator=draw)
    return context, unet(latents, torch.tensor([3, 500]), context).sample


def attention(part, name):
    return "attn" in name and not name.endswith(("fc1", "fc2"))


def kohya(part, name):
    return part == "text_encoder" or ".attentions." in name


def first_layer_only(part, name):
    return name.startswith(
        (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
            "encoder.layers.0",
            "text_model.encoder.layers.0",
        )
    )


CASES = {
    "attention": (attention, lambda i: 4, lambda i: 4.0),
    "alpha is not the rank": (attention, lambda i: 4, lambda i: 1.0),
    "alpha is no integer": (attention, lambda i: 4, lambda i: 0.3),
    "kohya's default targets": (kohya, lambda i: 4, lambda i: 8.0),
    "convolutions too": (lambda part, name: True, lambda i: 2, lambda i: 1.0),
    "mixed ranks": (kohya, lambda i: 2 + i % 3, lambda i: 2.0),
    "mixed alphas": (kohya, lambda i: 4, lambda i: (4.0, 1.0, 0.7)[i % 3]),
    "mixed both": (kohya, lambda i: 1 + i % 4, lambda i: (4.0, 1.0, 0.7)[i % 3]),
    "some layers only": (first_layer_only, lambda i: 4, lambda i: 2.0),
    "UNet only": (lambda part, name: part == "unet" and attention(part, name), lambda i: 4, lambda i: 2.0),
    "text encoder only": (lambda part, name: part == "text_encoder", lambda i: 4, lambda i: 2.0),
}


class Heard(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def heard():
    """All that diffusers, transformers and PEFT complain of: they only log the keys that they lose."""
    handler = Heard()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler.messages
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("case", CASES)
def test_same_outputs_as_merged_by_hand(models, pipeline, family, tmp_path, heard, case, format):
    weights = layers_of(models, *CASES[case])
    path = tmp_path / "f.safetensors"
    save_adapter(weights, path, family, format=format, metadata={"ss_output_name": "f"})

    pipeline.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="ours")

    absent = [part for part in models if part not in weights.parts()]
    complaints = [message for message in heard if not ("No LoRA keys" in message and absent)]
    assert not complaints
    loaded = sum(
        name.endswith("lora_A.ours")
        for model in (pipeline.unet, pipeline.text_encoder)
        for name, _ in model.named_modules()
    )
    assert loaded == len(weights.layers)
    expected = outputs(**merged(models, weights))
    plain = outputs(**models)
    found = outputs(pipeline.unet, pipeline.text_encoder)
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)
    assert (expected[1] - plain[1]).abs().max() > 1e-3, (
        "the adapter must matter, or the comparison proves nothing"
    )


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_the_loaders_own_state_dict_names_each_layer(models, family, tmp_path, format):
    weights = layers_of(models, *CASES["kohya's default targets"])
    path = tmp_path / "f.safetensors"
    save_adapter(weights, path, family, format=format, dtype="fp16")
    state, alphas, metadata = diffusers.StableDiffusionPipeline.lora_state_dict(
        tmp_path, weight_name=path.name, return_lora_metadata=True
    )
    assert len(state) == 2 * len(weights.layers)
    assert (metadata is None) == (format == "kohya")
    assert set((alphas or {}).values()) == ({8.0} if format == "kohya" else set())


def trained_by_peft(model, targets, settings):
    """A PEFT adapter on `model` with factors that matter, and what diffusers' saver wants of it."""
    patterns = {
        key: {end: value for end, value in settings.get(key, {}).items() if end in targets}
        for key in ("rank_pattern", "alpha_pattern")
    }
    config = LoraConfig(init_lora_weights=False, target_modules=targets, **settings | patterns)
    inject_adapter_in_model(config, model)
    return get_peft_model_state_dict(model), config.to_dict()


UNET_TARGETS = ["to_q", "to_v", "to_out.0", "proj_in", "ff.net.0.proj"]
CLIP_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 4},
        {"r": 4, "lora_alpha": 1},
        {"r": 4, "lora_alpha": 2, "use_rslora": True},
        {
            "r": 4,
            "lora_alpha": 2,
            "rank_pattern": {"to_q": 2, "fc1": 3},
            "alpha_pattern": {"to_v": 7, "k_proj": 9},
        },
    ],
    ids=["plain", "alpha", "rslora", "patterns"],
)
def test_files_that_diffusers_wrote_are_read_at_their_strength(models, pipeline, family, tmp_path, settings):
    torch.manual_seed(3)
    unet, unet_config = trained_by_peft(pipeline.unet, UNET_TARGETS, settings)
    text, text_config = trained_by_peft(pipeline.text_encoder, CLIP_TARGETS, settings)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=unet,
        text_encoder_lora_layers=text,
        unet_lora_adapter_metadata=unet_config,
        text_encoder_lora_adapter_metadata=text_config,
    )
    weights = load_adapter(tmp_path / "pytorch_lora_weights.safetensors", family)

    assert len(weights.layers) == (len(unet) + len(text)) // 2
    expected = outputs(pipeline.unet, pipeline.text_encoder)
    for ours, right in zip(outputs(**merged(models, weights)), expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


def test_a_dora_of_peft_is_read_as_diffusers_reads_it(models, pipeline, tmp_path):
    """Magnitudes of rows, which alone of the six tools diffusers applies as they are meant."""
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 2, "use_dora": True}
    adapted = copy.deepcopy(pipeline.unet)
    state, config = trained_by_peft(adapted, ["to_q", "to_out.0"], settings)
    state = {key: value * 1.3 if "magnitude" in key else value for key, value in state.items()}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=config
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    pipeline.load_lora_weights(tmp_path, weight_name=path.name)

    updates, _, _ = file_updates(path, FAMILIES["sd15"])
    by_hand = copy.deepcopy(models["unet"])
    for (_, name), update in updates.items():
        weight = by_hand.get_submodule(name).weight.data
        weight += update.delta(weight.clone())
    expected = outputs(by_hand, models["text_encoder"])[1]
    found = outputs(pipeline.unet, pipeline.text_encoder)[1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - outputs(**models)[1]).abs().max() > 1e-3
    rows = {row["tool"]: row for row in verify_adapter(path, FAMILIES["sd15"])["tools"]}
    assert (rows["diffusers"]["ok"], rows["diffusers"]["dropped"]) == (True, 0)
    assert rows["diffusers"]["max_delta_error"] == 0
    assert not any(rows[name]["ok"] for name in rows if name != "diffusers")
