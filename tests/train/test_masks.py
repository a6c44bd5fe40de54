"""Masks: which file is whose, what each latent counts, and what a run makes of it."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from lora_core.data.dataset import apply_settings, crop_record, require_clean, scan
from lora_core.data.images import Bucket, Crop, ImageRecord
from lora_core.errors import DatasetError, InputsChanged
from lora_core.evaluate.validator import EvalImage, eval_losses, eval_noise, weigh_latents
from lora_core.model_files.families import FAMILIES
from lora_core.models.unet import NoisePredictor, NoiseSchedule, PromptEmbeds
from lora_core.models.vae import load_pixels
from lora_core.runs import events
from lora_core.runs.preflight import preflight
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import DatasetSection, LossSection
from lora_core.train.data import Batches, TrainImage
from lora_core.train.loop import NoiseSample, diffusion_loss
from tests.train.runs import RANDOM, Toy, asked_at, broken_at, result, trained
from tests.train.test_batches import Numbers

PROMPT = PromptEmbeds(torch.zeros(2, 1, 1))


def paint(path: Path, size: tuple[int, int], box: tuple[int, int, int, int], mode: str = "L") -> Path:
    """A mask that is white in a box."""
    image = Image.new(mode, size)
    ImageDraw.Draw(image).rectangle(box, fill="white")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def image_of(folder: Path, name: str, size: tuple[int, int] = (64, 64)) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 64).convert("RGB").save(path)
    return path


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("a.png", "a-masklabel.png"),
        ("a.jpg", "A-MASKLABEL.PNG"),
        ("a.png", "a_mask.png"),
        ("10_cat/a.png", "10_cat/mask/a.jpg"),
        ("10_cat/a.png", "masks/10_cat/a-masklabel.png"),
        ("10_cat/a.png", "mask/a.png"),
    ],
)
def test_a_mask_is_found_by_its_name(tmp_path: Path, image: str, mask: str) -> None:
    image_of(tmp_path, image)
    paint(tmp_path / mask, (64, 64), (0, 0, 9, 9))
    dataset = scan(tmp_path)
    require_clean(dataset)
    assert [(one.path, one.mask) for one in dataset.records] == [(tmp_path / image, tmp_path / mask)]
    assert dataset.notes == []


def test_a_mask_without_an_image_or_with_one_that_has_another_is_named(tmp_path: Path) -> None:
    for folder in ("1_x", "1_y"):
        image_of(tmp_path, f"{folder}/a.png")
    image_of(tmp_path, "b.png")
    # Either of two images could be meant by mask/a.png.
    for name in ("mask/a.png", "mask/c.png", "b_mask.png", "b-masklabel.png", "b-condlabel.png"):
        paint(tmp_path / name, (64, 64), (0, 0, 9, 9))
    dataset = scan(tmp_path)
    assert {one.path.name: one.mask and one.mask.name for one in dataset.records} == {
        "a.png": None, "b.png": "b-masklabel.png",
    }  # fmt: skip
    assert {(note.path.name, note.sentence.rpartition(", as ")[2]) for note in dataset.notes} == {
        ("a.png", "no image, or more than one, has that name."),
        ("c.png", "no image, or more than one, has that name."),
        ("b-condlabel.png", "no image, or more than one, has that name."),
        ("b_mask.png", "its image has another mask."),
    }


@pytest.mark.parametrize(
    ("size", "box", "sentence"),
    [
        ((64, 64), None, "The mask a-masklabel.png is black everywhere"),
        ((64, 48), (0, 0, 9, 9), "has 64 x 48 pixels, and its image 64 x 64; give it the shape of its image"),
        ((0, 0), None, "a-masklabel.png is empty"),
        ((32, 32), (0, 0, 9, 9), ""),
    ],
)
def test_a_mask_that_cannot_be_used_is_a_sentence_before_the_start(
    tmp_path: Path, size: tuple[int, int], box: tuple[int, int, int, int] | None, sentence: str
) -> None:
    image_of(tmp_path, "a.png")
    mask = tmp_path / "a-masklabel.png"
    if box:
        paint(mask, size, box, "RGB")
    elif size[0]:
        Image.new("P", size).save(mask)
    else:
        mask.touch()
    problems = [problem.sentence for problem in scan(tmp_path).problems]
    assert [sentence in problem for problem in problems] == ([True] if sentence else [])


@pytest.mark.parametrize("crop", [None, (0.25, 0.1, 1.0, 0.8)])
@pytest.mark.parametrize("size", [(160, 96), (96, 160), (130, 130), (40, 40)])
def test_the_mask_is_cropped_and_scaled_as_its_image(
    tmp_path: Path, size: tuple[int, int], crop: Crop | None
) -> None:
    """Of an image that is its own mask, brightness and weight agree in every latent."""
    image = Image.radial_gradient("L").resize(size)
    image.convert("RGB").save(tmp_path / "a.png")
    image.resize((size[0] * 2, size[1] * 2)).save(tmp_path / "m.png")
    record = ImageRecord(tmp_path / "a.png", *size, "", mask=tmp_path / "m.png", outside=0.0)
    record, bucket = crop_record(record, crop) if crop else record, Bucket(64, 32)
    pixels = torch.nn.functional.avg_pool2d(load_pixels(record, bucket)[:1] / 2 + 0.5, 8)
    weights = weigh_latents(record, bucket, 8)
    assert weights is not None
    assert weights.shape == (1, 4, 8)
    torch.testing.assert_close(weights, pixels / pixels.mean(), atol=0.04, rtol=0.0)


def test_weights_outside_and_inside_have_the_ratio_that_is_asked_for(tmp_path: Path) -> None:
    mask = paint(tmp_path / "m.png", (64, 64), (0, 0, 31, 63))
    record = ImageRecord(tmp_path / "a.png", 64, 64, "", mask=mask)
    for outside in (0.0, 0.1, 0.9):
        weights = weigh_latents(replace(record, outside=outside), Bucket(64, 64), 8)
        assert weights is not None
        assert float(weights.mean()) == pytest.approx(1.0)
        left, right = weights[..., :4], weights[..., 4:]
        assert torch.equal(left, left[:, :1, :1].expand_as(left))
        assert float(right.max()) == pytest.approx(outside * float(left.min()))
    assert weigh_latents(record, Bucket(64, 64), 8) is None
    assert weigh_latents(replace(record, mask=None, outside=0.0), Bucket(64, 64), 8) is None
    paint(mask, (64, 256), (0, 0, 63, 20))
    with pytest.raises(DatasetError, match=r"m\.png leaves nothing of its image as it is cropped"):
        weigh_latents(replace(record, height=256, outside=0.5), Bucket(64, 64), 8)


def test_opacity_is_the_mask_where_it_is_asked_for(tmp_path: Path) -> None:
    image = Image.new("RGBA", (64, 64), (9, 9, 9, 0))
    ImageDraw.Draw(image).rectangle((0, 0, 63, 31), fill=(9, 9, 9, 255))
    image.save(tmp_path / "a.png")

    def record(**changes: object) -> ImageRecord:
        config = RunConfig().changed({name.replace("__", "."): value for name, value in changes.items()})
        return apply_settings(scan(tmp_path).records, config)[0]

    assert weigh_latents(record(), Bucket(64, 64), 8) is None
    weights = weigh_latents(record(dataset__masks="alpha", loss__unmasked_weight=0.0), Bucket(64, 64), 8)
    assert weights is not None
    assert weights[0, :, 0].tolist() == [2.0] * 4 + [0.0] * 4
    for name, value in (("white", 1.0), ("black", -1.0)):
        assert float(load_pixels(record(dataset__background=name), Bucket(64, 64))[0, -1, 0]) == value
    other = paint(tmp_path / "a-masklabel.png", (64, 64), (0, 0, 63, 63))
    assert record(dataset__masks="alpha").mask == other


class Fixed(NoisePredictor):
    """Predicts what it is given."""

    family = FAMILIES["tiny"]
    noise = NoiseSchedule(torch.linspace(0.99, 0.01, 100), "epsilon")
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, predicted: torch.Tensor) -> None:
        self.predicted = predicted.requires_grad_()

    def predict_noise(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, prompt: PromptEmbeds, sizes: object = None
    ) -> torch.Tensor:
        return self.predicted[: len(noisy)]


def gradient(rules: LossSection, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the predictions for two images, and their losses."""
    generator = torch.Generator().manual_seed(0)
    latents, noise, predicted = torch.randn(3, 2, 4, 8, 8, generator=generator)
    base = Fixed(predicted.clone())
    draw = NoiseSample(torch.tensor([3, 70]), noise)
    losses = diffusion_loss(base, latents, PROMPT, draw, rules, None, weights)
    losses.sum().backward()
    assert base.predicted.grad is not None
    return base.predicted.grad, losses.detach()


@pytest.mark.parametrize("kind", ["mse", "l1", "huber"])
def test_outside_the_mask_the_gradient_is_zero_and_at_weight_one_that_without_masks(
    tmp_path: Path, kind: str
) -> None:
    """Min-SNR is on, and the second image of the batch has no mask."""
    rules = LossSection(type=kind, min_snr=5.0)
    record = ImageRecord(tmp_path, 64, 64, "", mask=paint(tmp_path / "m.png", (64, 64), (0, 0, 31, 63)))
    every = torch.ones(1, 8, 8)
    plain, losses = gradient(rules, None)
    for outside in (0.0, 1.0 - 2**-20):
        weights = weigh_latents(replace(record, outside=outside), Bucket(64, 64), 8)
        assert weights is not None
        masked, found = gradient(rules, torch.stack([weights, every]))
        assert torch.equal(masked[1], plain[1])
        if outside:
            torch.testing.assert_close(masked, plain, rtol=1e-5, atol=0.0)
            torch.testing.assert_close(found, losses, rtol=1e-5, atol=0.0)
        else:
            assert not masked[0, :, :, 4:].any()
            # Half of the image has all of the weight.
            torch.testing.assert_close(masked[0, :, :, :4], 2 * plain[0, :, :, :4])


def test_what_is_measured_is_weighted_too() -> None:
    latents, weights = torch.zeros(4, 8, 8), torch.zeros(1, 8, 8)
    weights[..., :2] = 4.0
    predicted = torch.zeros(4, 4, 8, 8)
    predicted[..., 2:] = 100.0
    draws = eval_noise("a", latents, 4, 0, 100)
    image = EvalImage(latents, draws, "", None, weights)
    base = Fixed(predicted)
    prompt: Callable[[str], PromptEmbeds] = lambda caption: PromptEmbeds(torch.zeros(1, 1, 1))  # noqa: E731
    inside = eval_losses(base, [image], prompt)  # type: ignore[arg-type]
    assert inside[0].tolist() == pytest.approx(
        draws.noise[..., :2].double().square().mean((1, 2, 3)).tolist()
    )
    assert (eval_losses(base, [replace(image, weights=None)], prompt) > 1000).all()  # type: ignore[arg-type]


def test_a_batch_has_the_weights_of_its_images_mirrored_as_they_are(tmp_path: Path) -> None:
    weights = torch.arange(8.0).view(1, 1, 8)
    records = [ImageRecord(tmp_path / f"{n}.png", 64 + n, 8, "") for n in range(3)]
    items = [TrainImage(record, Bucket(64, 8), weights if n else None) for n, record in enumerate(records)]

    class Wide(Numbers):
        def latents(self, record: ImageRecord, bucket: Bucket, flip: bool) -> torch.Tensor:
            return super().latents(record, bucket, flip).expand(4, 1, 8)

    rules = DatasetSection(caption_dropout=0.0, flip=True)
    batches = Batches(items, Wide(), rules, 2, 0)  # type: ignore[arg-type]
    seen = set()
    for number in range(20):
        batch = batches.batch(number)
        assert batch.weights is not None
        assert batch.weights.shape == (2, 1, 1, 8)
        for name, latents, one in zip(batch.names, batch.latents, batch.weights, strict=True):
            flip = bool((latents < 0).all())
            expected = torch.ones(1, 1, 8) if name == "0.png" else weights.flip(-1) if flip else weights
            assert torch.equal(one, expected)
            seen.add((name, flip))
    assert len(seen) == 6
    plain = Batches(items[:1], Wide(), rules, 2, 0)  # type: ignore[arg-type]
    assert plain.batch(0).weights is None


@pytest.fixture
def masked_toy(own_toy: Toy, tmp_path: Path) -> Toy:
    """The toy with masks for half of its pictures."""
    pictures = shutil.copytree(own_toy.pictures, tmp_path / "pictures")
    for number in range(2):
        paint(pictures / f"{number}-masklabel.png", (32, 32), (0, 0, 14, 31))
    return replace(own_toy, pictures=pictures)


def test_a_masked_run_that_was_broken_off_ends_with_the_same_bits(masked_toy: Toy) -> None:
    changes = {name.replace(".", "__"): value for name, value in RANDOM.items()}
    more = {"train__steps": 4, "save__every": 2, "validation__pictures": 1.0, "validation__every": 2}
    whole, broken = (masked_toy.run(name, **changes, **more) for name in ("whole", "broken"))
    trained(whole)
    broken_at(broken, events.StepDone, 3)
    trained(broken)
    assert result(broken) == result(whole)


def test_a_changed_mask_is_seen_and_counts(masked_toy: Toy) -> None:
    short = {"train__steps": 2, "save__every": 1}
    first, other, paused, off, before = (
        masked_toy.run(name, **short, dataset__masks="off" if name == "off" else "on")
        for name in ("first", "other", "paused", "off", "before")
    )
    # A run that began before there were masks goes on without them.
    text = before.config_file.read_text()
    before.config_file.write_text(text.replace('masks = "on"\n', ""))
    asked_at(paused, "pause", 1)
    asked_at(off, "pause", 1)
    for run in (first, before):
        trained(run)
    paint(masked_toy.pictures / "0-masklabel.png", (32, 32), (15, 0, 31, 31))
    trained(other)
    assert result(other)["export"] != result(first)["export"]
    with pytest.raises(InputsChanged, match=r"the image 0\.png"):
        trained(paused)
    trained(off)
    assert result(before)["export"] == result(off)["export"] != result(first)["export"]


def test_what_masks_do_is_said_before_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for number in range(3):
        image_of(folder, f"{number}.png")
    config = RunConfig().changed({"dataset.path": str(folder), "model.base": "demo"})

    def said(**changes: object) -> list[str]:
        found = config.changed({name.replace("__", "."): value for name, value in changes.items()})
        return [one.sentence for one in preflight(found, tmp_path, card=lambda: None) if one.kind == "masks"]

    assert said() == []
    assert said(loss__unmasked_weight=0.5) == ["loss.unmasked_weight has no effect: no image has a mask."]
    assert said(dataset__masks="alpha") == ["dataset.masks = alpha has no effect: no image has a mask."]
    paint(folder / "mask" / "0.png", (64, 64), (0, 0, 9, 9))
    assert said(loss__unmasked_weight=0.25) == [
        "1 of 3 images has a mask: the area outside counts 0.25 (loss.unmasked_weight) beside 1 inside, in"
        " validation too."
    ]
    assert said(dataset__masks="off") == ["1 mask is not used, as dataset.masks is off."]
