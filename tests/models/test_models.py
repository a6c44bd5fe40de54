import copy
import json
import shutil

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from lora_core.models import device
from lora_core.models.device import dtype_of
from lora_core.models.encode import decoded_latents, encoded_picture, text_condition, token_chunks
from lora_core.models.load import load_base
from lora_core.models.noise import NoiseSchedule
from lora_core.spec.errors import ModelFileError
from tests.tiny import tiny_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("base") / "sd 1é")


@pytest.fixture(scope="module")
def base(folder):
    return load_base(str(folder), CPU, torch.float32)


def test_an_sd1_folder_opens_frozen_and_says_what_it_is(base):
    assert base.family.name == "sd15"
    assert base.noise.prediction == "epsilon"
    assert (base.pixels_a_latent, base.size_multiple, base.resolution, base.latent_channels) == (2, 4, 16, 4)
    assert not any(p.requires_grad for m in (*base.modules.values(), base.vae) for p in m.parameters())


def test_the_embedded_base_is_v_prediction_with_zero_terminal_snr():
    base = load_base("demo", CPU, torch.float32)
    assert base.family.name == "tiny"
    assert base.noise.prediction == "v_prediction"
    assert base.noise.alphas_cumprod[-1] == 0
    assert base.resolution == 128


def test_a_setting_overrules_the_prediction(folder):
    assert load_base(str(folder), CPU, torch.float32, "v_prediction").noise.prediction == "v_prediction"


def test_the_base_may_be_bf16_but_the_vae_stays_fp32(folder):
    base = load_base(str(folder), CPU, torch.bfloat16)
    assert base.unet.dtype == torch.bfloat16
    assert base.vae.dtype == torch.float32


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (
            lambda p: (p / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
            "vae/diffusion_pytorch_model",
        ),
        (lambda p: shutil.rmtree(p / "tokenizer"), "tokenizer/vocab.json"),
        (lambda p: (p / "unet" / "config.json").unlink(), "unet/config.json"),
        (lambda p: (p / "unet" / "config.json").write_text("{"), "cannot be read as JSON"),
        (
            lambda p: (p / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 99),
            "no safetensors file|cut short",
        ),
        (lambda p: _change(p / "unet" / "config.json", cross_attention_dim=555), "555 channels"),
        (lambda p: _change(p / "unet" / "config.json", in_channels=9), "inpainting"),
    ],
)
def test_a_broken_folder_is_named_in_a_sentence(folder, tmp_path, break_it, words):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    break_it(broken)
    with pytest.raises(ModelFileError, match=words):
        load_base(str(broken), CPU, torch.float32)


def _change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", ["no/such/folder", "/no/folder", "model.safetensors", "nobody/nothing"])
def test_a_base_that_is_not_there_is_named(name):
    with pytest.raises(ModelFileError, match=name.split("/")[-1]):
        load_base(name, CPU, torch.float32)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_and_target_are_those_of_diffusers(prediction, zero_snr):
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        prediction_type=prediction, rescale_betas_zero_snr=zero_snr,
    )  # fmt: skip
    schedule = NoiseSchedule.of(scheduler)
    latents, noise = torch.randn(2, 3, 4, 8, 8)
    timesteps = torch.tensor([0, 500, 999])
    torch.testing.assert_close(
        schedule.noisy_latents(latents, noise, timesteps), scheduler.add_noise(latents, noise, timesteps)
    )
    theirs = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(schedule.target(latents, noise, timesteps), theirs)


def test_captions_are_encoded_as_the_diffusers_pipeline_does(base, folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    for caption in ("", "owl, noto style, on a white background", "x " * 200):
        theirs = pipeline.encode_prompt(caption, CPU, 1, False)[0]
        torch.testing.assert_close(text_condition(base, [caption]).context, theirs)


def test_clip_skip_takes_an_earlier_layer_and_norms_it(base):
    # The same from a copy of the encoder that lacks its last layer: its last hidden state is normed by CLIP
    # itself.
    ids = token_chunks(base.tokenizers["text_encoder"], "owl", 1)
    encoder = copy.deepcopy(base.text_encoders["text_encoder"])
    inner = getattr(encoder, "text_model", encoder)
    del inner.encoder.layers[-1]
    inner.encoder.config.num_hidden_layers = 1
    with torch.no_grad():
        shorter = encoder(input_ids=ids).last_hidden_state
        torch.testing.assert_close(text_condition(base, ["owl"], clip_skip=2).context, shorter)
        assert not torch.allclose(text_condition(base, ["owl"]).context, shorter)


def test_long_captions_go_in_chunks_with_a_begin_and_an_end_each(base):
    tokenizer = base.tokenizers["text_encoder"]
    long = "red " * 100
    chunks = token_chunks(tokenizer, long, 3)
    assert chunks.shape == (3, 77)
    assert chunks[:, 0].tolist() == [tokenizer.bos_token_id] * 3
    words = [int((row == chunks[0, 1]).sum()) for row in chunks]
    assert words == [75, 25, 0]
    assert chunks[1, 26] == tokenizer.eos_token_id
    assert text_condition(base, [long, "short"], tokens=225).context.shape == (2, 231, 768)


def test_pictures_come_back_through_the_vae():
    base = load_base("demo", CPU, torch.float32)
    pixels = torch.full((3, 64, 96), 0.5)
    latents = encoded_picture(base, pixels)
    assert latents.shape == (4, 8, 12)
    assert latents.dtype == torch.float32
    back = decoded_latents(base, latents[None])
    assert back.shape == (1, 3, 64, 96)
    assert 0 <= back.min() <= back.max() <= 1


@pytest.mark.parametrize(("seconds", "faster"), [((0.02, 0.008), True), ((0.02, 0.015), False)])
def test_bf16_is_taken_where_it_pays(monkeypatch, seconds, faster):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bf16")
    taken = dict(zip((torch.float32, torch.bfloat16), seconds, strict=True))
    monkeypatch.setattr(device, "_seconds", taken.get)
    assert device.bf16_is_faster() is faster
    monkeypatch.undo()
    assert device.bf16_is_faster() is device.bf16_is_faster()


def test_precision_for_pictures_is_chosen_without_measuring():
    assert dtype_of("auto", CPU) == torch.float32
    assert dtype_of("bf16", CPU) == torch.bfloat16
