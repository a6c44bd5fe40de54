"""Captions by local models: any image-to-text model of transformers, and taggers, which are `model.onnx` with
`selected_tags.csv`.

Nothing is written here: the texts become captions by an edit (`projects/caption_edits`), previewed and undone
as others are. One image at a time: a card would do several faster, but a cancel is heard at each token.
"""

import contextlib
import csv
import functools
import importlib
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import StoppingCriteriaList
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    AutoModelForImageTextToText,
)
from transformers.models.auto.processing_auto import AutoProcessor
from transformers.utils.logging import disable_progress_bar

from lora_core.data.captions import TABLE_BYTES, read_text
from lora_core.data.images import ImageRecord, open_image
from lora_core.errors import ModelFileError, OutOfMemory
from lora_core.model_files.hub import TAGGER, captioner_folder
from lora_core.models.device import dtype_of, out_of_memory
from lora_core.projects.caption_edits import Captioner
from lora_core.settings.schema import require_package
from lora_core.system.files import read_json

Phase = Callable[[str, int, int], None]
"""Called with what is being done, done and total; may raise to end it."""
Write = Callable[[Image.Image, Callable[[], None]], str]
"""The text of an image; the function is called now and then, and may raise to end it."""

PROMPTS = {"florence2": "<MORE_DETAILED_CAPTION>", "paligemma": "caption en"}
"""What models were trained to be asked for a caption, by the `model_type` of their config."""
CHAT_PROMPT = "Describe this image in one sentence."
"""For models with a chat template."""
GENERAL, CHARACTER = "0", "4"
"""Categories of `selected_tags.csv`; 9 are ratings."""
_TAGGER_SIDE = 448
"""Pixels, where a tagger takes any size."""
_EXCERPT = 300
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
        ModelFileError: the captioner is not there, broken, or of another kind; or fails on an image.
        ConfigError: onnxruntime is needed and not installed.
        OutOfMemory: the captioner does not fit.
    """
    captioner.check()
    tell = phase or (lambda words, done, total: None)
    fetching = functools.partial(phase, "Downloading the captioner") if phase else None
    folder = captioner_folder(captioner.model, captioner.download, fetching)
    tell("Opening the captioner", 0, 0)
    texts: dict[str, str] = {}
    opened = _open_tagger if (folder / TAGGER[0]).is_file() else _open_image_to_text
    with _in_a_sentence(f"The captioner {folder} cannot be opened", device):
        write = opened(folder, captioner, device)
    for done, (name, record) in enumerate(images.items()):
        check = functools.partial(tell, "Captioning", done, len(images))
        check()
        image = open_image(record)
        with _in_a_sentence(f"The captioner {folder} fails on {name}", device):
            texts[name] = write(image, check)
    tell("Captioning", len(images), len(images))
    return texts


@contextlib.contextmanager
def _in_a_sentence(failed: str, device: torch.device) -> Iterator[None]:
    """Raise what libraries raise as an error that says what `failed`."""
    try:
        yield
    except _LIBRARY_ERRORS as error:
        if out_of_memory(error):
            raise OutOfMemory(
                f"{failed}: {device.type} ran out of memory; choose a smaller captioner, or caption on the"
                " processor (the device cpu)."
            ) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelFileError(
            f"{failed}: {first[:_EXCERPT].rstrip('.')}. Download it again or choose another."
        ) from error


# Models of transformers


def _open_image_to_text(folder: Path, captioner: Captioner, device: torch.device) -> Write:
    kind = read_json(folder / "config.json").get("model_type")
    if not isinstance(kind, str):
        raise ModelFileError(
            f"{folder} holds no captioner: neither config.json of an image-to-text model of transformers, nor"
            f" {' and '.join(TAGGER)} of a tagger."
        )
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ModelFileError(
            f"{folder} holds a model of the kind {kind!r}, which writes no text for an image; choose one that"
            " does, such as BLIP or Florence-2, or a tagger."
        )
    disable_progress_bar()
    dtype = dtype_of("auto", device)
    # Code that a repository brings along is never run.
    given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    processor: Any = AutoProcessor.from_pretrained(folder, **given)
    model, found = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, **given
    )
    if found["missing_keys"]:
        raise ModelFileError(
            f"{folder} lacks weights that transformers' {kind} has, such as {min(found['missing_keys'])}:"
            " choose a repository that is converted for transformers."
        )
    model.to(device)
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
    tags = _read_tags(folder)
    require_package("A tagger", "onnxruntime", "onnxruntime")
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    providers = ["CPUExecutionProvider"] if device.type == "cpu" else runtime.get_available_providers()
    try:
        session = runtime.InferenceSession(str(folder / TAGGER[0]), options, providers)
        (entry,) = session.get_inputs()
        side = entry.shape[1] if isinstance(entry.shape[1], int) else _TAGGER_SIDE
        likely = session.run(None, {entry.name: np.full((1, side, side, 3), 255, np.float32)})[0]
    except Exception as error:  # the library's errors have no class in common
        first = (str(error).strip().splitlines() or ["it failed"])[0]
        raise ModelFileError(
            f"{folder / TAGGER[0]} is no tagger that takes an image of the shape (1, side, side, 3):"
            f" {first[:_EXCERPT].rstrip('.')}."
        ) from error
    if likely.shape != (1, len(tags)) or not ((likely >= 0) & (likely <= 1)).all():
        raise ModelFileError(
            f"{folder} is no tagger: its {TAGGER[1]} names {len(tags)} tags, and the model does not give a"
            f" probability for each (but values of the shape {list(likely.shape)})."
        )
    least = {GENERAL: captioner.threshold, CHARACTER: captioner.character_threshold}
    excluded = {_spaced(tag.strip()).casefold() for tag in captioner.exclude.split(",")}

    def write(image: Image.Image, check: Callable[[], None]) -> str:
        found = session.run(None, {entry.name: _square(image, side)})[0][0]
        taken = [
            (category != CHARACTER, -float(found[n]), name if captioner.underscores else _spaced(name))
            for n, (name, category) in enumerate(tags)
            if found[n] >= least.get(category, math.inf) and _spaced(name).casefold() not in excluded
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
        raise ModelFileError(f"{file} is no table of tags with the columns name and category.")
    return tags


def _spaced(tag: str) -> str:
    """A tag with spaces for underscores, which emoticons such as `>_<` and `u_u` keep."""
    return tag.replace("_", " ") if re.search(r"[^\W_]{2}", tag) else tag


def _square(image: Image.Image, side: int) -> np.ndarray:
    """An image as a tagger takes it, (1, side, side, 3) in fp32."""
    longest = max(image.size)
    canvas = Image.new("RGB", (longest, longest), "white")
    canvas.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    pixels = np.asarray(canvas.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    return np.ascontiguousarray(pixels[None, :, :, ::-1])
