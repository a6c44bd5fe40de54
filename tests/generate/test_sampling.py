from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from PIL import Image

from lora_core.data.images import save_png
from lora_core.errors import ConfigError, DatasetError
from lora_core.generate.pipeline import (
    Pipeline,
    generate_image,
    infotext,
    make_scheduler,
    rescale_guidance,
)
from lora_core.generate.request import GenerationRequest, WeightedLora
from lora_core.models.load import encode_start, load_base
from lora_core.settings.schema import SAMPLERS
from lora_core.system.files import DEMO_BASE, DEMO_TRAIN
from lora_core.tools.svd import truncate_adapter

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base():
    return load_base("demo", CPU, torch.float32)


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO_BASE, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_each_sampler_makes_the_picture_that_diffusers_makes(base, pipeline, sampler):
    request = GenerationRequest(
        prompt="owl, on a red background", negative="blurry", seed=5, steps=4, cfg=3.0, sampler=sampler,
        cfg_rescale=0.0,
    )  # fmt: skip
    ours = generate_image(base, request)
    pipeline.scheduler = make_scheduler(base, sampler)
    theirs = pipeline(
        "owl, on a red background", negative_prompt="blurry", num_inference_steps=4, guidance_scale=3.0,
        height=128, width=128, generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    difference = np.abs(np.asarray(ours, float) - np.asarray(theirs, float)).mean()
    assert difference < 1.0, f"{difference} of 255"
    assert ours.size == (128, 128)


@pytest.fixture(scope="module")
def image():
    return str(min(path for path in DEMO_TRAIN.iterdir() if path.suffix != ".txt"))


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_each_sampler_starts_from_an_image_as_in_diffusers(base, pipeline, image, sampler):
    request = GenerationRequest(
        prompt="owl", seed=5, steps=8, cfg=1.0, sampler=sampler, image=image, denoising_strength=0.4,
        width=64, height=64,
    )  # fmt: skip
    ours = generate_image(base, request)
    theirs = StableDiffusionImg2ImgPipeline.from_pipe(pipeline, torch_dtype=torch.float32)
    theirs.scheduler = make_scheduler(base, sampler)
    theirs.set_progress_bar_config(disable=True)
    drawn = theirs(
        "owl", image=encode_start(base, image, (64, 64)), strength=0.4, num_inference_steps=8,
        guidance_scale=1.0, generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    assert np.abs(np.asarray(ours, float) - np.asarray(drawn, float)).mean() < 1.0


def test_the_strength_says_how_much_of_an_image_is_made_anew(base, image):
    how = GenerationRequest(prompt="an owl", seed=5, steps=10, cfg=1.0, image=image, width=64, height=64)
    with Image.open(image) as opened:
        source = np.asarray(opened.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS), float)
    away, steps = [], []
    for strength in (0.01, 0.3, 0.6, 1.0):
        done = []
        made = generate_image(
            base, replace(how, denoising_strength=strength), lambda *at, to=done: to.append(at)
        )
        away.append(np.abs(np.asarray(made, float) - source).mean())
        steps.append(len(done))
    assert away == sorted(away)
    assert away[0] < 0.5 * away[-1]
    assert steps == [1, 3, 6, 10]


def test_an_open_pipeline_starts_from_the_image_as_it_is_now(base, image, tmp_path):
    file = tmp_path / "start.png"
    how = GenerationRequest(prompt="owl", steps=2, cfg=1.0, image=str(file), width=64, height=64)
    opened = Pipeline(base, truncate_adapter)
    Image.new("RGB", (80, 64), "red").save(file)
    first = np.asarray(opened(how))
    assert (first == np.asarray(generate_image(base, how))).all()
    assert (first == np.asarray(opened(how))).all()
    Image.new("RGB", (96, 64), "blue").save(file)
    assert (first != np.asarray(opened(how))).any()
    assert "Size: 64x64, Denoising strength: 0.6, " in opened.infotext(how)
    assert "Denoising" not in opened.infotext(replace(how, image=""))
    with pytest.raises(DatasetError, match="gone"):
        opened(replace(how, image=str(tmp_path / "gone.png")))
    with pytest.raises(ConfigError, match="denoising_strength = 2 is out of range"):
        replace(how, denoising_strength=2).check()


def test_guidance_is_rescaled_as_in_diffusers(base, pipeline):
    how = GenerationRequest(prompt="owl, on a red background", seed=5, steps=4, cfg=7.0, cfg_rescale=0.7)
    ours = generate_image(base, how)
    pipeline.scheduler = make_scheduler(base, "ddim")
    theirs = pipeline(
        "owl, on a red background", num_inference_steps=4, guidance_scale=7.0, guidance_rescale=0.7,
        height=128, width=128, generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    plain = generate_image(base, replace(how, cfg_rescale=0.0))
    pixels = [np.asarray(image, float) for image in (ours, theirs, plain)]
    assert np.abs(pixels[0] - pixels[1]).mean() < 1.0
    assert np.abs(pixels[0] - pixels[2]).mean() > 3.0
    assert pixels[0].std() < pixels[2].std(), "rescaled guidance has less contrast"
    assert "CFG scale: 7, CFG Rescale: 0.7, Seed: 5" in infotext(base, how)
    assert "Rescale" not in infotext(base, replace(how, cfg_rescale=0.0))
    assert "Rescale" not in infotext(base, replace(how, cfg=1.0))


def test_the_formula_is_that_of_diffusers():
    guided, with_text = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 3
    for phi in (0.0, 0.7, 1.0):
        torch.testing.assert_close(
            rescale_guidance(guided, with_text, phi), rescale_noise_cfg(guided, with_text, phi)
        )


@pytest.mark.parametrize("phi", [-0.1, 1.5, float("nan")])
def test_a_rescale_out_of_range_is_refused(base, phi):
    with pytest.raises(ConfigError, match="cfg_rescale"):
        generate_image(base, GenerationRequest(cfg_rescale=phi))


def test_a_seed_means_a_picture(base):
    first, again, other = (
        np.asarray(generate_image(base, GenerationRequest(prompt="owl", seed=s, steps=2))) for s in (1, 1, 2)
    )
    assert (first == again).all()
    assert (first != other).any()


def test_without_guidance_the_negative_prompt_plays_no_part(base):
    how = GenerationRequest(prompt="owl", negative="red", steps=2, cfg=1.0)
    first = np.asarray(generate_image(base, how))
    assert (first == np.asarray(generate_image(base, replace(how, negative="blue")))).all()


@pytest.mark.parametrize("size", [(100, 128), (128, 8), (8192, 128), (-32, 128)])
def test_a_size_that_the_base_cannot_make_is_refused(base, size):
    with pytest.raises(ConfigError, match="multiple of 32"):
        generate_image(base, GenerationRequest(prompt="owl", steps=1, width=size[0], height=size[1]))


def test_sizes_other_than_square_come_out(base):
    assert generate_image(base, GenerationRequest(prompt="owl", steps=1, width=96, height=160)).size == (
        96,
        160,
    )


def test_an_unknown_sampler_lists_the_known_ones(base):
    with pytest.raises(ConfigError, match="dpmpp_2m"):
        make_scheduler(base, "magic")
    assert type(make_scheduler(base, "DPM++ 2M Karras")).__name__ == "DPMSolverMultistepScheduler"


@pytest.mark.parametrize("sampler", ["dpmpp_2m_karras", "dpmpp_2m_sde_karras"])
def test_karras_sigmas_that_share_a_timestep_are_done_in_order(base, sampler):
    scheduler = make_scheduler(base, sampler)
    scheduler.set_timesteps(40)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    steps = []
    how = GenerationRequest(prompt="owl", steps=40, cfg=1.0, sampler=sampler, width=32, height=32)
    generate_image(base, how, lambda done, total: steps.append(done))
    assert steps == list(range(1, 41))


def test_few_steps_of_lcm_and_too_many(base):
    few = GenerationRequest(prompt="owl", steps=4, cfg=1.0, sampler="lcm")
    first, again = (np.asarray(generate_image(base, few)) for _ in range(2))
    assert (first == again).all(), "the noise of each step is drawn from the seed"
    assert (first != np.asarray(generate_image(base, replace(few, prompt="a red fox")))).any()
    with pytest.raises(ConfigError, match="lcm cannot take 51 steps"):
        generate_image(base, GenerationRequest(prompt="owl", steps=51, sampler="lcm"))


def test_the_settings_are_in_the_png(base, tmp_path):
    request = GenerationRequest(
        prompt="owl", negative="red", seed=9, steps=12, cfg=3.5, sampler="euler_a", cfg_rescale=0.0,
        loras=(WeightedLora("demo", 0.8),),
    )  # fmt: skip
    text = infotext(base, request)
    path = tmp_path / "new folder" / "é.png"
    save_png(Image.new("RGB", (4, 4)), path, text)
    assert (
        Image.open(path).text["parameters"] == "owl <lora:demo:0.8>\nNegative prompt: red\n"
        "Steps: 12, Sampler: Euler a, CFG scale: 3.5, Seed: 9, Size: 128x128, Model: demo"
    )
    assert not list(path.parent.glob(".*"))


def test_a_picture_that_cannot_be_written_is_named(base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        save_png(Image.new("RGB", (4, 4)), tmp_path / "file" / "x.png", "")
