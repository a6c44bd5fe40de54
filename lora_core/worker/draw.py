"""The worker's verbs that make pictures: `generate`, `sheet` and `release`.

One base is kept between requests, with the adapters that were used last; another base is opened only after
the first was let go.
"""

import base64
import gc
import io
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from lora_core.errors import ConfigError
from lora_core.generate.grid import make_image_grid
from lora_core.generate.pipeline import OnLatents, OnStep, Pipeline, latent_preview, open_pipeline, save_png
from lora_core.generate.request import GenerationRequest, WeightedLora, parse_cfg_rescale
from lora_core.models.load import BaseModel
from lora_core.settings.schema import ModelSection
from lora_core.tools.combine import truncate_adapter

Request = dict[str, Any]
LOOK_EVERY = 0.25
"""Seconds between two looks at a picture under way."""
LARGEST_LOOK = 128


class Cancelled(Exception):
    """The request was cancelled by its sender."""


class Drawing:
    """The verbs, and what is kept between them."""

    def __init__(self, answer: Callable[[dict[str, Any]], None], cancelled: set[str]) -> None:
        """Send answers through `answer`; `cancelled` holds the ids of requests to be dropped."""
        self._answer = answer
        self._cancelled = cancelled
        self._pipeline: Pipeline | None = None
        self._opened_as: tuple[str, ...] | None = None

    def generate(self, request: Request) -> dict[str, Any]:
        """One picture for each of `strengths`, which multiply the strengths of all adapters; all from one
        noise."""
        strengths = [float(s) for s in request.get("strengths", [1.0])]
        if not all(map(math.isfinite, strengths)):
            raise ConfigError(f"The strengths {strengths} should be finite numbers.")
        shot, folder = shot_of(request), Path(str(request["out"]))
        pipeline = self._opened(shot)
        files: list[str] = []
        watcher = self._watcher(str(request["id"]), pipeline.rgb_matrix) if request.get("look") else None
        for index, factor in enumerate(strengths):
            scaled = GenerationRequest(
                **{**vars(shot), "loras": tuple(lora.times(factor) for lora in shot.loras)}
            )
            image = pipeline(scaled, self._teller(request, index, len(strengths)), watcher)
            path = _free_name(folder, f"{time.strftime('%Y%m%d-%H%M%S')}-{shot.seed}-{factor:g}")
            save_png(image, path, pipeline.infotext(scaled))
            files.append(str(path))
            said = {"index": index, "strength": factor, "file": str(path), "ready_in": pipeline.ready_in}
            size = {"width": image.width, "height": image.height, "note": pipeline.note}
            self._answer({"id": request["id"], "event": "picture", **said, **size})
        return {"files": files}

    def _teller(self, request: Request, index: int, pictures: int) -> OnStep:
        """Says how far a request is, and ends it if it is cancelled."""
        name = str(request["id"])

        def on_step(done: int, total: int) -> None:
            if name in self._cancelled:
                raise Cancelled
            count = {"done": index * total + done, "total": total * pictures}
            self._answer({"id": name, "event": "progress", **count})

        return on_step

    def _watcher(self, name: str, matrix: torch.Tensor) -> OnLatents:
        """Shows the picture under way, now and then."""
        shown_at = time.monotonic()

        def on_latents(clean: Callable[[], torch.Tensor]) -> None:
            nonlocal shown_at
            if time.monotonic() - shown_at >= LOOK_EVERY:
                shown_at = time.monotonic()
                image = base64.b64encode(_small(latent_preview(clean(), matrix))).decode()
                self._answer({"id": name, "event": "look", "image": image})

        return on_latents

    def _opened(self, shot: GenerationRequest) -> Pipeline:
        """The pipeline of a request's base, opened with the prediction, the noise schedule and the VAE that
        it
        asks for."""
        wanted = (shot.base, shot.prediction, shot.vae, shot.zero_terminal_snr)
        if self._pipeline is None or self._opened_as != wanted:
            # Never two bases at once: there may be memory for one.
            self._let_go()
            self._pipeline, self._opened_as = open_pipeline(shot, truncate_adapter), wanted
        return self._pipeline

    def bare_base(self, model: ModelSection) -> BaseModel:
        """The base that is kept, or this one in its place, with no adapter in it."""
        pipeline = self._opened(GenerationRequest(**vars(model)))
        pipeline.set_adapters(())
        return pipeline.base

    def sheet(self, request: Request) -> dict[str, Any]:
        """Pictures that are there already as one labelled PNG.

        `cells` holds rows of paths, or null for a picture that is missing.
        """
        cells = [[_opened_picture(path) for path in row] for row in _rows(request["cells"])]
        made = make_image_grid(cells, _texts(request.get("rows", [])), _texts(request.get("columns", [])))
        path = Path(str(request["out"]))
        save_png(made, path, str(request.get("parameters", "")))
        return {"files": [str(path)], "width": made.width, "height": made.height}

    def release(self, request: Request) -> dict[str, Any]:
        """Give the memory of base and adapters back."""
        self._let_go()
        return {}

    def _let_go(self) -> None:
        self._pipeline, self._opened_as = None, None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        elif torch.backends.mps.is_available():
            torch.mps.empty_cache()


def shot_of(request: Request) -> GenerationRequest:
    """The picture that a request asks for; what it leaves out is as in `GenerationRequest`."""
    usual = GenerationRequest()
    values: dict[str, Any] = {
        key: type(value)(request.get(key, value))
        for key, value in vars(usual).items()
        if key not in ("loras", "cfg_rescale")
    }
    rescale = parse_cfg_rescale(request.get("cfg_rescale", usual.cfg_rescale))
    return GenerationRequest(
        **values, cfg_rescale=rescale, loras=tuple(_lora(row) for row in request.get("loras", []))
    )


def _lora(row: Any) -> WeightedLora:
    text = row.get("text_strength") if isinstance(row, dict) else None
    lora = WeightedLora(
        str(row["file"]), float(row.get("strength", 1.0)), None if text is None else float(text),
        int(row.get("rank", 0)),
    )  # fmt: skip
    if not all(map(math.isfinite, (lora.strength, lora.text_strength or 0.0))):
        raise ConfigError(f"The strength of {lora.file} is not a finite number.")
    return lora


def _rows(cells: Any) -> Iterable[list[Any]]:
    if not isinstance(cells, list) or not all(isinstance(row, list) for row in cells):
        raise TypeError("cells should be a list of lists")
    return cells


def _texts(labels: Any) -> list[str]:
    return [str(label) for label in labels]


def _opened_picture(path: Any) -> Image.Image | None:
    if path is None:
        return None
    try:
        with Image.open(Path(str(path))) as opened:
            return opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"The picture {path} cannot be read; draw it again.") from error


def _small(image: Image.Image) -> bytes:
    image.thumbnail((LARGEST_LOOK, LARGEST_LOOK))
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=85)
    return data.getvalue()


def _free_name(folder: Path, stem: str) -> Path:
    path, number = folder / f"{stem}.png", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.png", number + 1
    return path
