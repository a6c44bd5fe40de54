"""Inpainting bases, whose UNet has 9 input channels: opened, sampled with a mask, trained, merged into."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from lora_core.data.dataset import scan
from lora_core.data.images import Bucket
from lora_core.errors import AdapterFileError, ConfigError, DatasetError
from lora_core.evaluate.validator import encode_eval_image, encode_view, eval_losses, inpainting_mask
from lora_core.formats.io import save_adapter
from lora_core.formats.verify import verify_adapter
from lora_core.generate.pipeline import Pipeline, generate_image, make_scheduler
from lora_core.generate.request import GenerationRequest, WeightedLora
from lora_core.lora.weights import AdapterWeights, LayerWeights, LoadedLora, Merger
from lora_core.model_files.detect import UNET, family_layout, lookup_base
from lora_core.model_files.families import FAMILIES
from lora_core.model_files.ldm_names import ldm_unet_path
from lora_core.model_files.sizes import RANDOM_MASKS
from lora_core.models.load import InpaintingModel, encode_start, load_base, unet_config
from lora_core.models.unet import PromptEmbeds
from lora_core.runs import events, preflight
from lora_core.runs.events import read_events
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import DatasetSection
from lora_core.system.files import FAMILY_CONFIGS
from lora_core.tools.merge import merge_files_into_base
from lora_core.tools.svd import truncate_adapter
from lora_core.train.data import LatentCache
from lora_core.train.objectives import InpaintingBatches
from lora_core.train.setup import assign_buckets
from tests.checkpoints import write_folder, write_single
from tests.train.runs import Toy, broken_at, result, toy, trained

CPU = torch.device("cpu")
HALF = (0, 0, 16, 32)
"""The left half of an image of 32 pixels."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A toy with an inpainting base."""
    return toy(tmp_path_factory.mktemp("inpainting"), in_channels=9)


@pytest.fixture(scope="module")
def base(place: Toy) -> InpaintingModel:
    found = load_base(str(place.base), CPU, torch.float32)
    assert isinstance(found, InpaintingModel)
    # diffusers draws from the posterior under the mask: without a spread it takes the mean as we do.
    weight, bias = found.vae.quant_conv.weight, found.vae.quant_conv.bias
    assert bias is not None
    with torch.no_grad():
        weight[4:], bias[4:] = 0.0, -30.0
    return found


def half_mask(path: Path) -> str:
    mask = Image.new("L", (32, 32))
    mask.paste("white", HALF)
    mask.save(path)
    return str(path)


@pytest.fixture
def masked(place: Toy, tmp_path: Path) -> GenerationRequest:
    """An image of the toy's with its left half to be painted."""
    return GenerationRequest(
        prompt="a dot", negative="blurry", seed=5, steps=3, cfg=3.0, width=32, height=32,
        image=str(place.pictures / "0.png"), denoising_strength=1.0, mask=half_mask(tmp_path / "mask.png"),
    )  # fmt: skip


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_a_masked_image_is_the_one_of_diffusers(
    place: Toy, base: InpaintingModel, masked: GenerationRequest, sampler: str
) -> None:
    """From the same noise; `num_inference_steps` steps over the whole range."""
    whole = StableDiffusionPipeline.from_pretrained(place.base, torch_dtype=torch.float32)
    theirs = StableDiffusionInpaintPipeline.from_pipe(whole, torch_dtype=torch.float32)
    theirs.vae.load_state_dict(base.vae.state_dict())
    theirs.scheduler = make_scheduler(base, sampler)
    theirs.set_progress_bar_config(disable=True)
    drawn = theirs(
        "a dot", negative_prompt="blurry", image=Image.open(masked.image).convert("RGB"),
        mask_image=Image.open(masked.mask), strength=1.0, num_inference_steps=3, guidance_scale=3.0,
        height=32, width=32, generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    ours = generate_image(base, replace(masked, sampler=sampler))
    assert np.abs(np.asarray(ours, float) - np.asarray(drawn, float)).max() <= 1.0
    without = generate_image(base, replace(masked, sampler=sampler, mask="", image=""))
    assert np.asarray(without).tobytes() != np.asarray(ours).tobytes()


def test_the_mask_of_a_request_is_read_as_it_is_now(
    base: InpaintingModel, masked: GenerationRequest, tmp_path: Path
) -> None:
    opened = Pipeline(base, truncate_adapter)
    first = np.asarray(opened(masked))
    assert (first == np.asarray(generate_image(base, masked))).all()
    Image.new("L", (32, 32), "white").save(masked.mask)
    whole = np.asarray(opened(masked))
    assert (first != whole).any()
    # All of it is masked where no mask is given, and from noise alone the image then has no effect.
    assert (whole == np.asarray(opened(replace(masked, mask="", image="")))).all()
    weaker = replace(masked, denoising_strength=0.4)
    assert (np.asarray(opened(weaker)) != whole).any()
    Image.new("L", (32, 16)).save(masked.mask)
    with pytest.raises(DatasetError, match=r"mask .* 32 x 16 pixels, .* 32 x 32; give it the shape"):
        opened(masked)


def test_a_mask_for_an_ordinary_base_is_refused(shared_toy: Toy, masked: GenerationRequest) -> None:
    plain = load_base(str(shared_toy.base), CPU, torch.float32)
    with pytest.raises(ConfigError, match=r"takes no mask, .* choose an inpainting checkpoint"):
        generate_image(plain, masked)
    with pytest.raises(ConfigError, match="is for an image; give that one, too"):
        replace(masked, image="").check()


def test_what_the_unet_sees_is_the_mask_and_the_rest(
    base: InpaintingModel, masked: GenerationRequest, place: Toy
) -> None:
    start = encode_start(base, masked.image, (32, 32), masked.mask)
    assert start is not None
    assert start.shape == (1, 9, 16, 16)
    left, right = start[0, 4].chunk(2, dim=1)
    assert (left == 1.0).all()
    assert (right == 0.0).all()
    seen = Image.open(masked.image).convert("RGB")
    seen.paste((127, 127, 127), HALF)
    pixels = torch.from_numpy(np.asarray(seen, np.float32) / 127.5 - 1).permute(2, 0, 1)
    torch.testing.assert_close(start[0, 5:], base.encode_image(pixels), atol=0.02, rtol=0.0)
    assert torch.equal(start[0, :4], encode_start(base, masked.image, (32, 32))[0])


def batches_of(base: InpaintingModel, pictures: Path, cache: Path) -> InpaintingBatches:
    images = assign_buckets(scan(pictures).records, 32, base.size_multiple, 2)
    return InpaintingBatches(base, images, LatentCache(base, cache), DatasetSection(flip=True), 2, 7)


def test_masks_follow_from_the_seed_and_the_step(base: InpaintingModel, place: Toy, tmp_path: Path) -> None:
    """Of 60 rows about a quarter is masked as a whole; the rest has one of a few rectangles, mirrored as the
    image is."""
    batches, again = (batches_of(base, place.pictures, tmp_path / "cache") for _ in range(2))
    rows = [row for number in range(30) for row in batches.batch(number).conditions]
    assert torch.equal(again.batch(17).conditions, torch.stack(rows[34:36]))
    assert torch.equal(again.batch(17).latents, batches.batch(17).latents)
    whole = [bool(row[0].all()) for row in rows]
    assert 8 <= sum(whole) <= 24
    assert torch.equal(rows[whole.index(True)], base.blank_condition(16, 16))
    kinds = {row.numpy().tobytes() for row, covered in zip(rows, whole, strict=True) if not covered}
    assert 8 < len(kinds) <= 4 * 2 * RANDOM_MASKS
    for row in rows:
        white = row[0].nonzero()
        box = white.amax(0) - white.amin(0) + 1
        assert int(row[0].sum()) == int(box.prod()), "a rectangle"


def test_an_image_is_trained_and_measured_with_its_own_mask(
    base: InpaintingModel, place: Toy, tmp_path: Path
) -> None:
    for number in range(2):
        Image.open(place.pictures / "0.png").save(tmp_path / f"{number}.png")
        half_mask(tmp_path / f"{number}-masklabel.png")
    batches = batches_of(base, tmp_path, tmp_path / "cache")
    halves = {row[0].mean().item() for number in range(8) for row in batches.batch(number).conditions}
    assert halves == {0.5}
    sides = {row[0, 0, 0].item() for number in range(8) for row in batches.batch(number).conditions}
    assert sides == {0.0, 1.0}, "a mirrored image has a mirrored mask"
    (record, _) = scan(tmp_path).records
    measured = encode_eval_image(base, record, "a dot", 2, 0, 32)
    own = inpainting_mask(record, Bucket(32, 32), 1)
    assert measured.condition is not None
    assert torch.equal(measured.condition[0], own[0, ::2, ::2])
    assert torch.equal(measured.condition, encode_view(base, record, Bucket(32, 32), mask=1))

    def embed(caption: str) -> PromptEmbeds:
        return PromptEmbeds(torch.ones(1, 7, 768))

    losses = [eval_losses(base, [image], embed) for image in (measured, replace(measured, condition=None))]
    assert not torch.equal(*losses)


def test_the_room_of_images_is_forecast_with_the_masks_that_they_are_trained_with(
    place: Toy, tmp_path: Path
) -> None:
    Image.open(place.pictures / "0.png").save(tmp_path / "0.png")
    half_mask(tmp_path / "0-masklabel.png")
    facts, (masked,) = lookup_base(str(place.base)), scan(tmp_path).records
    assert facts.inpainting
    off, on = (RunConfig().changed({"dataset.masks": rule}) for rule in ("off", "on"))
    own, drawn = (preflight._latent_bytes([masked], rule, facts) for rule in (on, off))
    assert own < drawn == preflight._latent_bytes([replace(masked, mask=None)], on, facts)


def test_a_run_is_resumed_bit_for_bit_and_measured_with_fixed_masks(place: Toy) -> None:
    every = {"save__every": 2, "validation__every": 2, "sample__every": 4}
    how = {"train__steps": 4, "dataset__flip": True, "validation__pictures": 1, **every}
    unbroken, broken = place.run("unbroken", **how), place.run("broken", **how)
    trained(unbroken)
    broken_at(broken, events.StepDone, 3)
    trained(broken)
    assert result(broken) == result(unbroken)
    gains = [
        [event.gain for event in read_events(run.events_file)[0] if isinstance(event, events.Validated)]
        for run in (unbroken, broken)
    ]
    assert len(gains[0]) >= 2
    assert gains[0] == gains[1]
    assert list(unbroken.previews.glob("step-*.png"))


def test_a_single_file_is_opened_as_its_folder_is(tmp_path: Path) -> None:
    """A checkpoint of true block layout in the original names."""
    folder = write_folder(tmp_path / "folder", "sd15", size="wordless", inputs=9)
    file = write_single(tmp_path / "file.safetensors", "sd15", size="wordless", inputs=9)
    latents, timesteps = torch.randn(1, 4, 8, 8), torch.tensor([500])
    prompt = PromptEmbeds(torch.randn(1, 77, 768))
    found = []
    for place in (folder, file):
        base = load_base(str(place), CPU, torch.float32)
        assert isinstance(base, InpaintingModel)
        assert (base.latent_channels, base.denoiser.conv_in.weight.shape[1]) == (4, 9)
        with torch.no_grad():
            found.append(base.predict_noise(latents, timesteps, prompt))
            given = torch.cat([latents, base.blank_condition(8, 8)[None]], 1)
            assert torch.equal(base.predict_noise(given, timesteps, prompt), found[-1])
    torch.testing.assert_close(*found)
    assert found[0].shape == latents.shape


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
def test_the_unet_of_a_full_checkpoint_takes_9_channels(name: str) -> None:
    """At true size, without memory for the weights."""
    family = FAMILIES[name]
    config = UNet2DConditionModel.load_config(FAMILY_CONFIGS / family.configs / "unet")
    with torch.device("meta"):
        given = UNet2DConditionModel.from_config({**config, "in_channels": 9}).state_dict()
        named = {UNET + str(ldm_unet_path(key, family.attention_levels)): key for key in given}
        shapes = {ldm: list(given[key].shape) for ldm, key in named.items()}
        made = UNet2DConditionModel.from_config(unet_config(config, shapes, family)).state_dict()
    assert {key: value.shape for key, value in made.items()} == {
        key: value.shape for key, value in given.items()
    }
    assert made["conv_in.weight"].shape[1] == 9


def first_convolution(inputs: int, out: int, kernel: int = 3) -> AdapterWeights:
    down, up = torch.randn(2, inputs, kernel, kernel), torch.randn(out, 2, 1, 1)
    return AdapterWeights({("unet", "conv_in"): LayerWeights(down, up, 2.0)})


def test_an_adapter_of_the_first_convolution_is_for_inpainting_bases(
    place: Toy, shared_toy: Toy, base: InpaintingModel, tmp_path: Path
) -> None:
    """verify says so; such a base takes it, also on disk, and an ordinary one refuses it."""
    family = FAMILIES["sd15"]
    file = tmp_path / "full.safetensors"
    save_adapter(first_convolution(9, family_layout(family)["unet", "conv_in"][0]), file, family)
    tools = {row["tool"]: row for row in verify_adapter(file, family)["tools"]}
    assert tools["ComfyUI"]["ok"]
    assert tools["ComfyUI"]["note"].endswith("with an inpainting checkpoint of Stable Diffusion 1.x alone")
    save_adapter(first_convolution(4, family_layout(family)["unet", "conv_in"][0]), file, family)
    assert "inpainting" not in str(verify_adapter(file, family))

    own = first_convolution(9, 16)
    before = base.denoiser.conv_in.weight.clone()
    merger = Merger(base.modules)
    merger.apply([LoadedLora(own)])
    changed = base.denoiser.conv_in.weight.clone()
    merger.apply([])
    assert torch.equal(base.denoiser.conv_in.weight, before)
    torch.testing.assert_close(changed - before, own.layers["unet", "conv_in"].delta(), atol=1e-5, rtol=1e-4)
    plain = load_base(str(shared_toy.base), CPU, torch.float32)
    with pytest.raises(AdapterFileError, match="conv_in is 9 to 16 wide, the base's 4 to 16"):
        Merger(plain.modules).apply([LoadedLora(own)])

    small, merged = tmp_path / "own.safetensors", tmp_path / "merged"
    save_adapter(own, small, family)
    merge_files_into_base([WeightedLora(str(small))], str(place.base), merged)
    again = load_base(str(merged), CPU, torch.float32)
    assert isinstance(again, InpaintingModel)
    torch.testing.assert_close(again.denoiser.conv_in.weight, changed, atol=2e-3, rtol=2e-3)
