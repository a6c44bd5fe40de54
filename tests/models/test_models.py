import contextlib
import copy
import json
import os
import shutil
from collections import Counter

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from lora_core.errors import ConfigError, ModelFileError
from lora_core.models import device
from lora_core.models.device import compute_deterministically, dtype_of
from lora_core.models.encode import encode_prompt, token_chunks
from lora_core.models.load import load_base, open_base
from lora_core.models.unet import NoiseSchedule
from lora_core.models.vae import decode_latents
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
    assert base.noise.objective == "epsilon"
    assert (base.vae_scale_factor, base.size_multiple, base.resolution, base.latent_channels) == (2, 4, 16, 4)
    assert not any(p.requires_grad for m in (*base.modules.values(), base.vae) for p in m.parameters())


def test_the_embedded_base_is_v_prediction_with_zero_terminal_snr():
    base = load_base("demo", CPU, torch.float32)
    assert base.family.name == "tiny"
    assert base.noise.objective == "v_prediction"
    assert base.noise.alphas_cumprod[-1] == 0
    assert base.resolution == 128


def test_a_setting_overrules_the_prediction(folder):
    assert load_base(str(folder), CPU, torch.float32, "v_prediction").noise.objective == "v_prediction"


def test_the_base_may_be_bf16_but_the_vae_stays_fp32(folder):
    base = load_base(str(folder), CPU, torch.bfloat16)
    assert base.denoiser.dtype == torch.bfloat16
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
            "not a safetensors file|cut short",
        ),
        (lambda p: _change(p / "unet" / "config.json", cross_attention_dim=555), "555 channels"),
        (lambda p: _change(p / "unet" / "config.json", in_channels=9), "UNet is of another kind"),
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
    schedule = NoiseSchedule.from_scheduler(scheduler)
    latents, noise = torch.randn(2, 3, 4, 8, 8)
    timesteps = torch.tensor([0, 500, 999])
    torch.testing.assert_close(
        schedule.add_noise(latents, noise, timesteps), scheduler.add_noise(latents, noise, timesteps)
    )
    theirs = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(schedule.target(latents, noise, timesteps), theirs)


def test_captions_are_encoded_as_the_diffusers_pipeline_does(base, folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    for caption in ("", "owl, noto style, on a white background", "x " * 200):
        theirs = pipeline.encode_prompt(caption, CPU, 1, False)[0]
        torch.testing.assert_close(encode_prompt(base, [caption]).context, theirs)


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
        torch.testing.assert_close(encode_prompt(base, ["owl"], clip_skip=2).context, shorter)
        assert not torch.allclose(encode_prompt(base, ["owl"]).context, shorter)


def test_long_captions_go_in_chunks_with_a_begin_and_an_end_each(base):
    tokenizer = base.tokenizers["text_encoder"]
    long = "red " * 100
    chunks = token_chunks(tokenizer, long, 3)
    assert chunks.shape == (3, 77)
    assert chunks[:, 0].tolist() == [tokenizer.bos_token_id] * 3
    words = [int((row == chunks[0, 1]).sum()) for row in chunks]
    assert words == [75, 25, 0]
    assert chunks[1, 26] == tokenizer.eos_token_id
    assert encode_prompt(base, [long, "short"], tokens=225).context.shape == (2, 231, 768)


def test_pictures_come_back_through_the_vae():
    base = load_base("demo", CPU, torch.float32)
    pixels = torch.full((3, 64, 96), 0.5)
    latents = base.encode_image(pixels)
    assert latents.shape == (4, 8, 12)
    assert latents.dtype == torch.float32
    back = decode_latents(base, latents[None])
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
    assert device.bf16_is_faster() in (True, False)


def test_precision_for_pictures_is_chosen_without_measuring():
    assert dtype_of("auto", CPU) == torch.float32
    assert dtype_of("bf16", CPU) == torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "name", "dtype"),
    [
        ((6, 1), "NVIDIA GeForce GTX 1080", torch.float32),
        ((7, 0), "Tesla V100-SXM2-16GB", torch.float16),
        ((7, 5), "NVIDIA GeForce GTX 1660 Ti", torch.float32),
        ((7, 5), "NVIDIA T600", torch.float32),
        ((7, 5), "NVIDIA GeForce RTX 2060", torch.float16),
        ((7, 5), "Tesla T4", torch.float16),
        ((8, 6), "NVIDIA GeForce RTX 3060", torch.bfloat16),
    ],
)
def test_auto_takes_fp16_with_tensor_cores_alone(monkeypatch, capability, name, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capability >= (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda card: name)
    card = torch.device("cuda")
    assert dtype_of("auto", card) == dtype
    assert dtype_of("fp16", card) == torch.float16


def test_a_mac_computes_in_fp32_unless_told_otherwise_and_in_bf16_from_macos_14_on(monkeypatch):
    mac = torch.device("mps")
    for system, refused in (((13, 6), True), ((14, 0), False)):
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *asked, own=system: own >= asked)
        assert dtype_of("auto", mac) == torch.float32
        assert dtype_of("fp16", mac) == torch.float16
        with pytest.raises(ConfigError, match="macOS 14") if refused else contextlib.nullcontext():
            assert dtype_of("bf16", mac) == torch.bfloat16


@pytest.fixture
def usual_kernels(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    sdp, fill = torch.backends.cuda.cudnn_sdp_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(sdp)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.backends.cudnn.benchmark = benchmark


@pytest.mark.usefixtures("usual_kernels")
def test_a_card_computes_deterministically_where_asked():
    compute_deterministically(CPU)
    assert not torch.are_deterministic_algorithms_enabled()
    torch.backends.cudnn.benchmark = True
    compute_deterministically(torch.device("cuda"))
    # With warnings alone, the backward passes of attention stay nondeterministic.
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.backends.cudnn.benchmark
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_images_are_encoded_without_tf32(base):
    seen = []
    with base.vae.encoder.conv_in.register_forward_hook(
        lambda *_: seen.append(torch.backends.cudnn.allow_tf32)
    ):
        before = torch.backends.cudnn.allow_tf32
        base.encode_image(torch.zeros(3, 16, 16))
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_attention_in_fp16_does_not_overflow(backend):
    """SD 2.1 asks for `upcast_attention`, as its scores exceed fp16; torch's kernels keep them in fp32."""
    q = torch.full((1, 1, 4, 64), 100.0, dtype=torch.float16)
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q, scale=1.0)
    assert float(q[0, 0, 0].double() @ q[0, 0, 0].double()) > torch.finfo(torch.float16).max
    assert out.tolist() == q.tolist()


def test_attention_is_that_of_torch(base):
    assert {type(found).__name__ for found in base.denoiser.attn_processors.values()} == {"AttnProcessor2_0"}


def test_work_that_changes_nothing_is_left_out(folder, base):
    """Divisions by 1 and the time embedding's activation in each block; the output keeps its bits."""
    plain = type(base.denoiser).from_pretrained(folder / "unet")
    for parameter in plain.parameters():  # mapped from the file they are not aligned, and round differently
        parameter.data = parameter.data.clone()
    given = (
        torch.randn(1, 4, 8, 8),
        torch.tensor([500]),
        torch.randn(1, 77, base.denoiser.config.cross_attention_dim),
    )
    with torch.no_grad():
        both = (launches_of(lambda unet=unet: unet(*given)[0]) for unet in (plain, base.denoiser))
        outputs, launched = zip(*both, strict=True)
    assert torch.equal(*outputs)
    before, now = launched
    assert before["div"] > 0
    assert now["div"] == 1, "of the timestep embedding"
    blocks = sum(isinstance(module, ResnetBlock2D) for module in base.denoiser.modules())
    assert before["silu"] - now["silu"] == blocks - 1


def launches_of(act):
    """What a function returns, and how often it called each operation."""
    seen = Counter()

    class Looking(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    with Looking():
        return act(), seen


def test_a_component_is_told_from_another_by_its_files(folder, tmp_path):
    opened = open_base(str(folder), CPU, torch.float32)
    assert opened.digest("vae") == load_base(str(folder), CPU, torch.bfloat16).digest("vae")
    assert opened.digest("vae") != opened.digest("text_encoder")
    assert set(opened.waiting) == {"vae", "text_encoder", "unet"}, "nothing was read for it"
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (weights,) = (other / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + 1}, weights)
    changed = open_base(str(other), CPU, torch.float32)
    assert changed.digest("vae") != opened.digest("vae")
    assert changed.digest("text_encoder") == opened.digest("text_encoder")
