"""Captions and masks by local models: any image-to-text model of transformers, and taggers, which are
`model.onnx` with `selected_tags.csv`; CLIPSeg, and background removers, which are ONNX files.

Nothing is written here: texts and masks become files by an edit (`projects/caption_edits`), previewed and
undone as others are. One image at a time: a card would do several faster, but a cancel is heard at each
token.
"""

import base64
import contextlib
import csv
import functools
import importlib
import io
import math
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors import SafetensorError
from torch.nn.functional import interpolate, max_pool2d
from transformers import StoppingCriteriaList
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    AutoModelForImageTextToText,
)
from transformers.models.auto.processing_auto import AutoProcessor
from transformers.models.clipseg.modeling_clipseg import CLIPSegForImageSegmentation
from transformers.utils.logging import disable_progress_bar

from lora_core.data.captions import TABLE_BYTES, read_text, spaced_tag
from lora_core.data.images import ImageRecord, encode_file, open_image
from lora_core.errors import ConfigError, LoraError, ModelFileError, OutOfMemory, first_line
from lora_core.model_files.hub import TAGGER, annotator_folder
from lora_core.models.device import dtype_of, out_of_memory
from lora_core.projects.caption_edits import Annotator, Captioner, Masker
from lora_core.settings.schema import require_package
from lora_core.system.files import read_json

Phase = Callable[[str, int, int], None]
"""Called with (phase, done, total); may raise to end it."""
Write = Callable[[Image.Image, Callable[[], None]], str]
"""The text or the mask of an image; the function is called regularly, and may raise to end it."""

PROMPTS = {"florence2": "<MORE_DETAILED_CAPTION>", "paligemma": "caption en"}
"""What models were trained to be asked for a caption, by the `model_type` of their config."""
CHAT_PROMPT = "Describe this image in one sentence."
"""For models with a chat template."""
GENERAL, CHARACTER = "0", "4"
"""Categories of `selected_tags.csv`; 9 are ratings."""
_TAGGER_SIDE = 448
"""Pixels, where a tagger takes any size."""
REMOVER = ("model.onnx", "onnx/model.onnx")
"""Where a background remover is in its folder."""
_REMOVER_SIDE = 1024
_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
"""Mean and deviation of red, green and blue."""
MASK_SIDE = 512
"""Pixels that the longer side of a mask has at most: latents have an eighth of the image's."""
_LIBRARY_ERRORS = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ImportError, RuntimeError,
    MemoryError, SafetensorError,
)  # fmt: skip


def write_texts(
    captioner: Captioner, images: Mapping[str, ImageRecord], device: torch.device, phase: Phase | None = None
) -> dict[str, str]:
    """What a captioner says of each image, cut to its crop, by the images' names.

    Raises:
        DatasetError: a value of the captioner is out of range, or an image cannot be read.
        ModelFileError: the captioner is missing, broken, or of another kind; or fails on an image.
        ConfigError: onnxruntime is needed and not installed.
        OutOfMemory: the captioner does not fit.
    """

    def opened(place: Path) -> Write:
        open_kind = _open_tagger if (place / TAGGER[0]).is_file() else _open_image_to_text
        return open_kind(place, captioner, device)

    return _ask(captioner, opened, images, device, phase, "Captioning")


def make_masks(
    masker: Masker, images: Mapping[str, ImageRecord], device: torch.device, phase: Phase | None = None
) -> dict[str, str]:
    """A mask of each image without its crop, by the images' names: a grey PNG in base64, or nothing where
    nothing was found.

    Raises:
        LoraError: as `write_texts`; or CLIPSeg is given no prompt.
    """

    def opened(place: Path) -> Write:
        files = [place, *(place / name for name in REMOVER)]
        found = next((file for file in files if file.suffix == ".onnx" and file.is_file()), None)
        look = _open_remover(found, device) if found else _open_clipseg(place, masker, device)

        def write(image: Image.Image, check: Callable[[], None]) -> str:
            return _mask_png(look(image), image.size, masker)

        return write

    whole = {name: replace(record, crop=None) for name, record in images.items()}
    return _ask(masker, opened, whole, device, phase, "Masking")


def _ask(
    annotator: Annotator,
    opened: Callable[[Path], Write],
    images: Mapping[str, ImageRecord],
    device: torch.device,
    phase: Phase | None,
    doing: str,
) -> dict[str, str]:
    """What a model that `opened` opens makes of each image."""
    annotator.check()
    called = annotator.called
    tell = phase or (lambda words, done, total: None)
    fetching = functools.partial(phase, f"Downloading the {called}") if phase else None
    place = annotator_folder(annotator.model, called, annotator.download, fetching)
    tell(f"Opening the {called}", 0, 0)
    made: dict[str, str] = {}
    with _in_a_sentence(f"The {called} {place} cannot be opened", device):
        write = opened(place)
    for done, (name, record) in enumerate(images.items()):
        check = functools.partial(tell, doing, done, len(images))
        check()
        image = open_image(record)
        with _in_a_sentence(f"The {called} {place} fails on {name}", device):
            made[name] = write(image, check)
    tell(doing, len(images), len(images))
    return made


@contextlib.contextmanager
def _in_a_sentence(failed: str, device: torch.device) -> Iterator[None]:
    """Raise what libraries raise as an error that says what `failed`."""
    try:
        yield
    except _LIBRARY_ERRORS as error:
        if out_of_memory(error):
            raise OutOfMemory(
                f"{failed}: {device.type} ran out of memory; choose a smaller one, or have the processor do"
                " it (the device cpu)."
            ) from error
        raise ModelFileError(
            f"{failed}: {first_line(error)}. Download it again or choose another."
        ) from error


@contextlib.contextmanager
def _is_none(file: Path, what: str) -> Iterator[None]:
    """Raise what onnxruntime raises, whose errors have no class in common, as a file that is not a `what`."""
    try:
        yield
    except LoraError:
        raise
    except Exception as error:
        raise ModelFileError(f"{file} is not a {what}: {first_line(error)}.") from error


def _open_onnx(file: Path, feature: str, device: torch.device) -> Any:
    """A session of onnxruntime."""
    require_package(feature, "onnxruntime", "onnxruntime")
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    providers = ["CPUExecutionProvider"] if device.type == "cpu" else runtime.get_available_providers()
    return runtime.InferenceSession(str(file), options, providers)


# Models of transformers


class _Kind(NamedTuple):
    """Models of transformers that can do something: by `model_type`, the class that opens them, and words
    for a folder that holds no model, or one of another kind."""

    types: Container[str]
    model: Any
    lacks: str
    instead: str


_IMAGE_TO_TEXT = _Kind(
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    AutoModelForImageTextToText,
    "holds no captioner: neither config.json of an image-to-text model of transformers, nor"
    f" {' and '.join(TAGGER)} of a tagger",
    "writes no text for an image; choose one that does, such as BLIP or Florence-2, or a tagger",
)
_CLIPSEG = _Kind(
    ("clipseg",),
    CLIPSegForImageSegmentation,
    f"holds no mask model: neither config.json of a CLIPSeg, nor {REMOVER[0]} of a background remover",
    "makes no mask from a prompt; choose a CLIPSeg, or a background remover",
)


def _open_transformers(
    folder: Path, kind: _Kind, device: torch.device, dtype: torch.dtype
) -> tuple[Any, ...]:
    """The processor, the model and its `model_type`."""
    called = read_json(folder / "config.json").get("model_type")
    if not isinstance(called, str):
        raise ModelFileError(f"{folder} {kind.lacks}.")
    if called not in kind.types:
        raise ModelFileError(f"{folder} holds a model of the kind {called!r}, which {kind.instead}.")
    disable_progress_bar()
    # Code that a repository brings along is never run.
    given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    processor: Any = AutoProcessor.from_pretrained(folder, **given)
    model, found = kind.model.from_pretrained(folder, dtype=dtype, output_loading_info=True, **given)
    if found["missing_keys"]:
        raise ModelFileError(
            f"{folder} lacks weights that transformers' {called} has, such as {min(found['missing_keys'])}:"
            " choose a repository that is converted for transformers."
        )
    return processor, model.to(device), called


def _open_image_to_text(folder: Path, captioner: Captioner, device: torch.device) -> Write:
    dtype = dtype_of("auto", device)
    processor, model, kind = _open_transformers(folder, _IMAGE_TO_TEXT, device, dtype)
    prompt = captioner.prompt.strip() or PROMPTS.get(kind, "")

    @torch.no_grad()
    def write(image: Image.Image, check: Callable[[], None]) -> str:
        def go_on(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            check()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        inputs = _inputs(processor, image, prompt).to(device, dtype)
        stops, most = StoppingCriteriaList([go_on]), captioner.max_tokens
        made = model.generate(**inputs, max_new_tokens=most, do_sample=False, stopping_criteria=stops)
        return _said(processor, made, inputs.get("input_ids"))

    return write


def _inputs(processor: Any, image: Image.Image, prompt: str) -> Any:
    """What a model takes for one image."""
    if getattr(processor, "chat_template", None):
        parts = [{"type": "image", "image": image}, {"type": "text", "text": prompt or CHAT_PROMPT}]
        talk = [{"role": "user", "content": parts}]
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return processor.apply_chat_template(talk, **how)
    return processor(images=image, return_tensors="pt", **({"text": prompt} if prompt else {}))


def _said(processor: Any, made: torch.Tensor, asked: torch.Tensor | None) -> str:
    """The text of tokens (1, n) that were made, without the prompt, which some models repeat."""
    begin = 0
    if asked is not None and torch.equal(made[:, : asked.shape[1]], asked):
        begin = asked.shape[1]
    text, prompt = (
        "" if ids is None else processor.decode(ids, skip_special_tokens=True).strip()
        for ids in (made[0, begin:], None if asked is None else asked[0])
    )
    return " ".join(text.removeprefix(prompt).split())


# Taggers. As SmilingWolf's: the image on a white square, channels blue, green, red, from 0 to 255; one
# probability a tag. Source: SmilingWolf/wd-tagger, app.py.


def _open_tagger(folder: Path, captioner: Captioner, device: torch.device) -> Write:
    tags, file = _read_tags(folder), folder / TAGGER[0]
    with _is_none(file, "tagger that takes an image of the shape (1, side, side, 3)"):
        session = _open_onnx(file, "A tagger", device)
        (entry,) = session.get_inputs()
        side = entry.shape[1] if isinstance(entry.shape[1], int) else _TAGGER_SIDE
        likely = session.run(None, {entry.name: np.full((1, side, side, 3), 255, np.float32)})[0]
    if likely.shape != (1, len(tags)) or not ((likely >= 0) & (likely <= 1)).all():
        raise ModelFileError(
            f"{folder} is not a tagger: its {TAGGER[1]} names {len(tags)} tags, and the model does not give a"
            f" probability for each (but values of the shape {list(likely.shape)})."
        )
    least = {GENERAL: captioner.threshold, CHARACTER: captioner.character_threshold}
    excluded = {spaced_tag(tag.strip()).casefold() for tag in captioner.exclude.split(",")}

    def write(image: Image.Image, check: Callable[[], None]) -> str:
        found = session.run(None, {entry.name: _square(image, side)})[0][0]
        taken = [
            (category != CHARACTER, -float(found[n]), name if captioner.underscores else spaced_tag(name))
            for n, (name, category) in enumerate(tags)
            if found[n] >= least.get(category, math.inf) and spaced_tag(name).casefold() not in excluded
        ]
        return ", ".join(name for _, _, name in sorted(taken))

    return write


def _read_tags(folder: Path) -> list[tuple[str, str]]:
    """Name and category of each tag, in the order of the model's values."""
    file = folder / TAGGER[1]
    if not file.is_file():
        raise ModelFileError(f"{folder} holds {TAGGER[0]} but no {TAGGER[1]}, which names its tags.")
    rows = list(csv.DictReader(io.StringIO(read_text(file, str(file), TABLE_BYTES))))
    tags = [(str(row.get("name") or ""), str(row.get("category") or "")) for row in rows]
    if not tags or not all(name and category for name, category in tags):
        raise ModelFileError(f"{file} is not a table of tags with the columns name and category.")
    return tags


def _square(image: Image.Image, side: int) -> np.ndarray:
    """An image as a tagger takes it, (1, side, side, 3) in fp32."""
    longest = max(image.size)
    canvas = Image.new("RGB", (longest, longest), "white")
    canvas.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    pixels = np.asarray(canvas.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    return np.ascontiguousarray(pixels[None, :, :, ::-1])


# Masks


def _open_clipseg(
    folder: Path, masker: Masker, device: torch.device
) -> Callable[[Image.Image], torch.Tensor]:
    """How likely each place of an image shows one of the prompts, by CLIPSeg, which sees a square."""
    processor, model, _ = _open_transformers(folder, _CLIPSEG, device, torch.float32)
    prompts = [prompt.strip() for prompt in masker.prompt.split(",") if prompt.strip()]
    if not prompts:
        raise ConfigError("CLIPSeg masks what a prompt says: give one, such as `a face`.")

    @torch.no_grad()
    def look(image: Image.Image) -> torch.Tensor:
        given = {"text": prompts, "images": [image] * len(prompts), "padding": True, "return_tensors": "pt"}
        logits = model(**processor(**given).to(device)).logits
        return logits.reshape(-1, *logits.shape[-2:]).sigmoid().cpu()

    return look


def _open_remover(file: Path, device: torch.device) -> Callable[[Image.Image], torch.Tensor]:
    """How likely each place of an image is in front, by a background remover: U²-Net, IS-Net, BiRefNet.

    They take (1, 3, side, side), normalised as `preprocessor_config.json` beside the model or in the folder
    above says, else as U²-Net does, and give (1, 1, side, side), whose least and largest value become 0 and
    1. Source: xuebinqin/U-2-Net, u2net_test.py.
    """
    rules = next(
        (found for up in file.parents[:2] if (found := read_json(up / "preprocessor_config.json"))), {}
    )
    mean, std = (
        np.asarray(rules.get(key, usual), np.float32)
        for key, usual in zip(("image_mean", "image_std"), _IMAGENET, strict=True)
    )

    def look(image: Image.Image) -> torch.Tensor:
        pixels = np.asarray(image.resize((wide, high), Image.Resampling.BILINEAR), np.float32) / 255
        given = np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)[None])
        made = torch.from_numpy(session.run(None, {entry.name: given})[0]).float()
        made = made.reshape(1, *made.shape[-2:])
        least, most = made.aminmax()
        return (made - least) / (most - least) if most > least else made.clamp(0, 1)

    with _is_none(file, "background remover that makes a mask of an image of the shape (1, 3, side, side)"):
        session = _open_onnx(file, "A background remover", device)
        (entry,) = session.get_inputs()
        high, wide = (side if isinstance(side, int) else _REMOVER_SIDE for side in entry.shape[2:])
        look(Image.new("RGB", (8, 8)))
    return look


def _mask_png(likely: torch.Tensor, size: tuple[int, int], masker: Masker) -> str:
    """The mask of an image of a size in pixels, from the likelihoods (n, high, wide) of each place."""
    shrunk = min(1.0, MASK_SIDE / max(size))
    wide, high = (max(1, round(side * shrunk)) for side in size)
    large = interpolate(likely[None], (high, wide), mode="bilinear", align_corners=False)
    there = (large >= masker.threshold).any(1, keepdim=True)
    if not there.any():
        return ""
    # Shrinking is growing the outside.
    outside = masker.grow < 0
    mask = (there ^ masker.invert ^ outside).float()
    reach = round(abs(masker.grow) / 100 * max(wide, high))
    for kernel, edge in (((2 * reach + 1, 1), (reach, 0)), ((1, 2 * reach + 1), (0, reach))):
        mask = max_pool2d(mask, kernel, 1, edge)
    image = Image.fromarray(np.uint8(255) * (mask[0, 0].bool() ^ outside).numpy())
    image = image.filter(ImageFilter.GaussianBlur(masker.blur / 100 * max(wide, high)))
    if image.getbbox() is None:
        return ""
    return base64.b64encode(encode_file(image, "PNG", optimize=True)).decode()
