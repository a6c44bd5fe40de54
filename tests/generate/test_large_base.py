"""Pictures and losses of a base with two text encoders and size conditioning, against diffusers' own
pipeline."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from lora_core.data.dataset import scan
from lora_core.evaluate.validator import encode_eval_images, eval_losses, validation_report
from lora_core.generate.pipeline import generate_image, make_scheduler
from lora_core.generate.request import GenerationRequest
from lora_core.models.encode import encode_prompt
from lora_core.models.load import load_base
from tests.checkpoints import write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("base") / "large", "sdxl", torch.bfloat16)


@pytest.fixture(scope="module")
def base(folder):
    return load_base(str(folder), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def pipeline(folder):
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, add_watermarker=False, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("negative", ["", "blurry"])
@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_the_picture_is_the_one_that_diffusers_makes(base, pipeline, negative, size):
    request = GenerationRequest(
        prompt="an owl on a branch", negative=negative, seed=5, steps=2, cfg=3.0, width=size[0],
        height=size[1],
    )  # fmt: skip
    ours = generate_image(base, request)
    pipeline.scheduler = make_scheduler(base, "ddim")
    # An empty negative prompt is none at all there, which is zeros for this family.
    theirs = pipeline(
        "an owl on a branch", negative_prompt=negative or None, num_inference_steps=2, guidance_scale=3.0,
        width=size[0], height=size[1], generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    difference = np.abs(np.asarray(ours, float) - np.asarray(theirs, float)).mean()
    assert ours.size == size
    assert difference < 1.0, f"{difference} of 255"


def test_losses_are_those_of_the_unet_told_the_true_size(base, tmp_path):
    Image.effect_noise((1300, 500), 60).convert("RGB").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("an owl")
    records = scan(tmp_path).records
    base.facts = replace(base.facts, resolution=128)
    (picture,) = encode_eval_images(base, records, 2, 0)
    # 1300 x 500 at 128 px is a bucket of 160 x 64: scaled by 64 / 500 it is 166.4 px wide, 6.4 too many.
    told = torch.tensor([500.0, 1300.0, 0.0, 3.0, 64.0, 160.0])
    assert torch.equal(picture.sizes, told)

    with torch.no_grad():
        text = encode_prompt(base, ["an owl"])
        losses = eval_losses(base, [picture], lambda caption: text)
        for k, found in enumerate(losses[0]):
            share = base.noise.alphas_cumprod[picture.draws.timesteps[k]]
            noise = picture.draws.noise[k]
            noisy = share.sqrt() * picture.latents + (1 - share).sqrt() * noise
            said = base.denoiser(
                noisy[None], picture.draws.timesteps[k], text.context,
                added_cond_kwargs={"text_embeds": text.pooled, "time_ids": told[None]},
            ).sample[0]  # fmt: skip
            assert float(found) == pytest.approx(float((said - noise).square().mean()), rel=1e-4)
    report = validation_report(base, records, [], 2, 0)
    assert report["base_loss"] == pytest.approx(float(losses.mean()))
