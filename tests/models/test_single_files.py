"""Single-file checkpoints and diffusers folders of every family, opened with no network."""

import json
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from lora_core.errors import ModelFileError
from lora_core.generate.pipeline import sample_latents
from lora_core.generate.request import GenerationRequest
from lora_core.model_files.detect import read_base_facts
from lora_core.model_files.families import FAMILIES
from lora_core.models.encode import encode_prompt
from lora_core.models.load import load_base
from lora_core.models.prompts import as_negative_prompt
from tests.checkpoints import components, original_names, scheduler_config, write_folder, write_single

CPU = torch.device("cpu")
NAMES = ["sd15", "sd2", "sd2_v", "sdxl"]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A call to the network is a failure, and not only one that finds nobody there."""

    def refuse(*_args, **_more):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, single file) by family and size; large, so that they are removed at the end."""
    root = tmp_path_factory.mktemp("bases")
    pairs: dict[tuple[str, str], tuple[Path, Path]] = {}

    def pair(name: str, size: str = "narrow") -> tuple[Path, Path]:
        if (name, size) not in pairs:
            folder = write_folder(root / f"{name} é {size}", name, size=size)
            (root / f"file {name} {size}").mkdir()
            file = write_single(root / f"file {name} {size}" / "ö model.safetensors", name, size=size)
            # SD 2.x says what it predicts in a config beside it alone.
            (file.parent / "scheduler_config.json").write_text(json.dumps(scheduler_config(FAMILIES[name])))
            pairs[name, size] = (folder, file)
        return pairs[name, size]

    yield pair
    shutil.rmtree(root)


def _without(base):
    """The empty negative prompt."""
    return as_negative_prompt(base, "", encode_prompt(base, [""]))


def opened(path: Path, dtype: torch.dtype = torch.float32, **more):
    return load_base(str(path), CPU, dtype, **more)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_and_a_folder_of_the_same_weights_are_the_same_base(made, name):
    folder, file = (opened(path) for path in made(name))
    assert folder.family is file.family is FAMILIES[name]
    assert (folder.resolution, folder.size_multiple) == (file.resolution, file.size_multiple)
    assert folder.noise.objective == file.noise.objective == FAMILIES[name].prediction
    captions = ["a cat", "", "Ünusual wörds, 日本 and a (long:1.2) tail " * 12]
    for tokens in (75, 150, 225):
        mine, theirs = (encode_prompt(base, captions, 1, tokens) for base in (file, folder))
        assert torch.equal(mine.context, theirs.context)
        assert mine.context.shape == (3, tokens // 75 * 77, FAMILIES[name].context_width)
        assert (mine.pooled is None) == (theirs.pooled is None)
        assert mine.pooled is None or torch.equal(mine.pooled, theirs.pooled)
    latents, timesteps = torch.randn(3, 4, 16, 8), torch.tensor([1, 500, 999])
    condition = encode_prompt(file, captions)
    with torch.no_grad():
        assert torch.equal(
            file.predict_noise(latents, timesteps, condition),
            folder.predict_noise(latents, timesteps, condition),
        )
        pixels = torch.randn(1, 3, 32, 32)
        assert torch.equal(
            file.vae.encode(pixels).latent_dist.mean, folder.vae.encode(pixels).latent_dist.mean
        )


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_reads_the_file_as_the_folder(made, name):
    """The names in our test files are the true ones: another reader finds every weight under them."""
    folder, file = made(name, "wordless")
    kind = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
    theirs = kind.from_single_file(str(file), config=str(folder), local_files_only=True)
    ours = opened(file)
    for part, module in {**ours.modules, "vae": ours.vae}.items():
        other = getattr(theirs, part).state_dict()
        mine = module.state_dict()
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine)


@pytest.mark.parametrize("name", NAMES)
def test_captions_and_pictures_are_those_of_the_diffusers_pipeline(made, name):
    folder, file = made(name)
    base = opened(file)
    kind = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
    pipeline = kind.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    for caption in ("", "an owl on a white background", "x " * 200):
        if name == "sdxl":
            context, _, pooled, _ = pipeline.encode_prompt(
                caption, device=CPU, do_classifier_free_guidance=False
            )
            torch.testing.assert_close(encode_prompt(base, [caption]).pooled, pooled)
        else:
            context = pipeline.encode_prompt(caption, CPU, 1, False)[0]
        torch.testing.assert_close(encode_prompt(base, [caption]).context, context)
    how = GenerationRequest(seed=5, steps=2, cfg=4.0, width=128, height=64)
    with torch.no_grad():
        mine = sample_latents(base, how, encode_prompt(base, ["an owl"]), _without(base))
    noise = torch.randn(mine.shape, generator=torch.Generator().manual_seed(5))
    theirs = pipeline(
        "an owl",
        width=128,
        height=64,
        num_inference_steps=2,
        guidance_scale=4.0,
        latents=noise,
        output_type="latent",
    ).images
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_open_in_any_precision(tmp_path, made, dtype):
    file = write_single(tmp_path / "half.safetensors", "sd15", dtype, "wordless")
    exact, half = opened(made("sd15", "wordless")[1]), opened(file)
    assert half.denoiser.dtype == half.vae.dtype == torch.float32
    assert opened(file, torch.bfloat16).denoiser.dtype == torch.bfloat16
    for mine, theirs in zip(half.denoiser.parameters(), exact.denoiser.parameters(), strict=True):
        assert torch.equal(mine, theirs.to(dtype).float())


class TestPrediction:
    """Marker tensors, else a config beside the file, else its header, else the width."""

    @pytest.fixture(scope="class")
    def sd2(self, tmp_path_factory):
        path = write_single(
            tmp_path_factory.mktemp("sd2") / "x.safetensors", "sd2", torch.float16, "wordless"
        )
        yield path
        shutil.rmtree(path.parent)

    def told(self, path: Path) -> tuple[str, int, str]:
        facts = read_base_facts(str(path))
        return facts.prediction, facts.resolution, facts.family.name

    def test_the_width_alone_means_velocity_and_is_said_to_be_a_guess(self, sd2):
        assert self.told(sd2) == ("v_prediction", 768, "sd2_v")
        assert "a guess" in read_base_facts(str(sd2)).sentence

    def test_a_setting_wins(self, sd2):
        facts = read_base_facts(str(sd2), "epsilon")
        assert (facts.prediction, facts.resolution, facts.family.name) == ("epsilon", 512, "sd2")
        assert opened(sd2, prediction="epsilon").noise.objective == "epsilon"

    @pytest.mark.parametrize("place", ["scheduler_config.json", "scheduler/scheduler_config.json"])
    def test_a_config_beside_the_file_counts(self, sd2, tmp_path, place):
        file = tmp_path / sd2.name
        file.symlink_to(sd2)
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(json.dumps({"prediction_type": "epsilon", "beta_end": 0.02}))
        assert self.told(file) == ("epsilon", 512, "sd2")
        assert read_base_facts(str(file)).scheduler["beta_end"] == 0.02

    @pytest.mark.parametrize(
        ("text", "expected"),
        [('    parameterization: "v"\n', "v_prediction"), ("model:\n  x: 1\n", "epsilon")],
    )
    def test_a_yaml_of_a1111_beside_the_file_counts(self, sd2, tmp_path, text, expected):
        file = tmp_path / sd2.name
        file.symlink_to(sd2)
        file.with_suffix(".yaml").write_text(text)
        assert self.told(file)[0] == expected

    def test_the_header_counts_before_the_width(self, tmp_path):
        file = tmp_path / "x.safetensors"
        shape = {
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(
                4, 1024
            )
        }
        save_file(shape, file, {"modelspec.prediction_type": "epsilon"})
        assert self.told(file) == ("epsilon", 512, "sd2")

    @pytest.mark.parametrize(("markers", "snr"), [(("v_pred",), False), (("v_pred", "ztsnr"), True)])
    def test_markers_in_the_file_count_most(self, tmp_path, markers, snr):
        file = tmp_path / "x.safetensors"
        key = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
        save_file({key: torch.zeros(4, 2048)} | {m: torch.tensor([]) for m in markers}, file)
        (tmp_path / "scheduler_config.json").write_text(json.dumps({"prediction_type": "epsilon"}))
        facts = read_base_facts(str(file))
        assert (facts.prediction, facts.family.name) == ("v_prediction", "sdxl")
        assert bool(facts.scheduler.get("rescale_betas_zero_snr")) is snr
        assert markers[0] in facts.sentence

    def test_zero_terminal_snr_reaches_the_noise(self, tmp_path):
        file = write_single(
            tmp_path / "x.safetensors", "sdxl", torch.float16, "wordless", markers=("v_pred", "ztsnr")
        )
        base = opened(file)
        file.unlink()
        assert base.noise.objective == "v_prediction"
        assert base.noise.alphas_cumprod[-1] == 0
        assert base.facts.scheduler["timestep_spacing"] == "trailing"


class TestPickled:
    """A `.ckpt` is read for its tensors alone."""

    def test_one_with_plain_weights_opens_as_the_safetensors_file(self, tmp_path, made):
        file = write_single(tmp_path / "old.ckpt", "sd15", size="wordless")
        assert read_base_facts(str(file)).family is None
        mine, theirs = opened(file), opened(made("sd15", "wordless")[1])
        assert all(
            torch.equal(a, b)
            for a, b in zip(mine.denoiser.parameters(), theirs.denoiser.parameters(), strict=True)
        )

    @pytest.mark.parametrize("zipped", [True, False])
    def test_one_with_code_is_refused_and_none_of_it_runs(self, tmp_path, zipped):
        witness = tmp_path / "ran"

        class Evil:
            def __reduce__(self):
                return (open, (str(witness), "w"))

        file = tmp_path / "evil.ckpt"
        torch.save({"state_dict": {"x": Evil()}}, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ModelFileError, match=r"evil\.ckpt holds more than weights.*convert it"):
            opened(file)
        renamed = file.rename(tmp_path / "evil.safetensors")
        with pytest.raises(ModelFileError, match="pickled torch file"):
            opened(renamed)
        assert not witness.exists()

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.zeros(1).as_strided((200_000, 200_000), (0, 0)),
            torch.zeros(8).as_strided((4, 4), (1, 1)),
            torch.zeros(2, 2).to_sparse(),
            torch.empty(4, device="meta"),
        ],
        ids=["stride 0", "overlapping", "sparse", "meta"],
    )
    def test_a_tensor_that_is_larger_than_its_bytes_is_refused(self, tmp_path, tensor):
        """`clone` of the first would ask for 160 GB; the file has 1 kB."""
        file = tmp_path / "bomb.ckpt"
        torch.save({"state_dict": {"x": tensor}}, file)
        with pytest.raises(ModelFileError, match=r"bomb\.ckpt.*'x' is not a plain one"):
            opened(file)

    @pytest.mark.parametrize("content", [b"", b"\x80\x02", b"PK\x03\x04 no zip", pickle.dumps([1, 2])])
    def test_a_broken_one_gets_a_sentence(self, tmp_path, content):
        (tmp_path / "bad.ckpt").write_bytes(content)
        with pytest.raises(ModelFileError, match=r"bad\.ckpt"):
            opened(tmp_path / "bad.ckpt")


UNET = "model.diffusion_model."
OTHERS = {
    "Flux": ({"double_blocks.0.img_attn.norm.key_norm.scale": (8,)}, "Flux"),
    "Flux in a checkpoint": ({UNET + "double_blocks.0.img_attn.norm.key_norm.scale": (8,)}, "Flux"),
    "SD3": ({UNET + "joint_blocks.0.context_block.attn.qkv.weight": (8, 8)}, "Stable Diffusion 3"),
    "refiner": ({"conditioner.embedders.0.model.transformer.resblocks.0.ln_1.bias": (8,)}, "refiner"),
    "cascade": ({"clip_txt_mapper.weight": (8, 8)}, "Cascade"),
    "upscaling": ({UNET + "input_blocks.0.0.weight": (320, 7, 3, 3)}, "upscaling"),
    "depth": ({UNET + "input_blocks.0.0.weight": (320, 5, 3, 3)}, "depth"),
    "editing": ({UNET + "input_blocks.0.0.weight": (320, 8, 3, 3)}, "editing"),
    "ControlNet": ({"control_model.input_hint_block.0.weight": (16, 3, 3, 3)}, "ControlNet"),
    "LoRA": ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8)}, "LoRA"),
    "VAE": ({"first_stage_model.encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3)}, "VAE alone"),
    "text encoder": ({"text_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8)}, "text encoder alone"),
    "UNet": ({"down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)}, "UNet alone"),
    "unknown width": (
        {UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (8, 1280)},
        "1280 channels",
    ),
    "nothing known": ({"some.weight": (2, 2)}, "holds no Stable Diffusion UNet"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_base_is_refused_by_name(tmp_path, case):
    shapes, words = OTHERS[case]
    file = tmp_path / "file.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, file)
    for open_it in (read_base_facts, lambda name: load_base(name, CPU, torch.float32)):
        with pytest.raises(ModelFileError, match=words) as caught:
            open_it(str(file))
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def sd1_tensors(made):
    return load_file(made("sd15", "wordless")[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: [t.pop(k) for k in list(t) if k.startswith("first_stage_model.")],
            "lacks VAE. Set model.vae",
        ),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("cond_stage")], "lacks text encoder"),
        (
            lambda t: t.pop(UNET + "middle_block.0.in_layers.2.weight"),
            "mid_block.resnets.0.conv1.weight of the UNet",
        ),
        (lambda t: t[UNET + "out.2.bias"].fill_(float("nan")), "out.2.bias holds NaN"),
        (lambda t: t[UNET + "out.2.bias"].fill_(float("inf")), "out.2.bias holds NaN or inf"),
        (
            lambda t: t.update({UNET + "out.2.bias": torch.zeros(5)}),
            r"out.2.bias in the shape \[5\], not \[4\]",
        ),
        (lambda t: t.update({UNET + "out.2.bias": torch.zeros(4, dtype=torch.int32)}), "as integers"),
    ],
)
def test_weights_that_cannot_be_right_are_named(tmp_path, sd1_tensors, change, words):
    tensors = {key: tensor.clone() for key, tensor in sd1_tensors.items()}
    change(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ModelFileError, match=words):
        opened(tmp_path / "bad.safetensors")
    (tmp_path / "bad.safetensors").unlink()


def test_what_half_precision_cannot_hold_is_told(tmp_path, sd1_tensors):
    tensors = dict(sd1_tensors) | {UNET + "out.2.bias": torch.full((4,), 1e6)}
    save_file(tensors, tmp_path / "large.safetensors")
    opened(tmp_path / "large.safetensors", torch.bfloat16)
    with pytest.raises(ModelFileError, match=r"more than float16 can; set train\.precision"):
        opened(tmp_path / "large.safetensors", torch.float16)
    (tmp_path / "large.safetensors").unlink()


@pytest.fixture(scope="module")
def other_vae() -> AutoencoderKL:
    return next(module for part, module in components(FAMILIES["sd15"], seed=9) if part == "vae")


@pytest.mark.parametrize("form", ["folder", "diffusers file", "original file", "original file, bare"])
def test_a_vae_of_its_own_takes_the_place_of_the_bases(tmp_path, made, other_vae, form):
    state = other_vae.state_dict()
    original = original_names("vae", state, FAMILIES["sd15"])
    place = tmp_path / "vae.safetensors"
    match form:
        case "folder":
            place = tmp_path / "vae"
            other_vae.save_pretrained(place)
        case "diffusers file":
            save_file(state, place)
        case "original file":
            save_file({k: v.contiguous() for k, v in original.items()}, place)
        case _:
            save_file({k.partition(".")[2]: v.contiguous() for k, v in original.items()}, place)
    for path in made("sd15", "wordless"):
        found = opened(path, vae=str(place)).vae.state_dict()
        assert all(torch.equal(found[key], state[key]) for key in state)
    with pytest.raises(ModelFileError, match=r"nowhere.*does not exist"):
        opened(made("sd15", "wordless")[0], vae=str(tmp_path / "nowhere"))


def test_folders_of_older_and_of_sharded_kinds_open(tmp_path, made):
    folder = tmp_path / "old"
    shutil.copytree(made("sd15")[0], folder)
    reference = opened(folder)
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    # Before diffusers 0.16 attention in VAEs was named so.
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(vae)
    for new, old in names.items():
        tensors = {key.replace(new, old): tensor for key, tensor in tensors.items()}
    save_file(tensors, vae)
    reference.denoiser.save_pretrained(folder / "unet", max_shard_size="4MB")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    encoder = folder / "text_encoder" / "model.safetensors"
    state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(encoder).items()}
    save_file(state, encoder)
    again = opened(folder)
    for part in ("unet", "vae"):
        mine, theirs = (base.component(part).state_dict() for base in (again, reference))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert torch.equal(encode_prompt(again, ["x"]).context, encode_prompt(reference, ["x"]).context)
    shutil.rmtree(folder)
