"""What other tools show of an exported file: the metadata of its header, and the files beside it, which are
`<stem>.json`, the image `<stem>.preview.png` and the card `<stem>.md`.

Users share these files, so nothing that is written may name a folder of the machine.
"""

import base64
import importlib.metadata
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import tomli_w
from PIL import Image

from lora_core.data.captions import count_tags
from lora_core.data.images import encode_file
from lora_core.formats.kinds import detect_family
from lora_core.formats.peft import HEADER_KEY
from lora_core.model_files.starting_settings import CONFIG_KEY, kohya_header
from lora_core.settings.config import RunConfig, to_toml
from lora_core.settings.schema import ADAPTER_KINDS
from lora_core.system.files import parse_object, write_atomically

if TYPE_CHECKING:
    import jinja2

    from lora_core.models.load import BaseModel


def export_metadata(
    config: RunConfig,
    base: "BaseModel",
    captions: Sequence[str],
    buckets: Mapping[tuple[int, int], int],
    steps: int,
    times: tuple[float, float],
) -> dict[str, str]:
    """The header of a run's exported file, without the hashes, which `io.save_adapter` adds.

    Args:
        captions: of the images that were trained on.
        buckets: (width, height) in pixels to number of these images.
        steps: optimizer steps done.
        times: when the run began and when this state was reached, in seconds since the epoch.
    """
    section, objective = config.adapter, base.noise.objective
    trigger = "" if config.slider.on else config.dataset.trigger
    family, name, side = base.family, _last_name(config.name), config.resolution(base.resolution)
    title = base.family.title if base.name == "demo" else Path(base.name).name
    folder = "demo" if config.dataset.path == "demo" else Path(_last_name(config.dataset.path)).stem
    finished = datetime.fromtimestamp(times[1], UTC).replace(microsecond=0)
    version = importlib.metadata.version("lora-easel")
    dirs = {folder: {"n_repeats": 1, "img_count": len(captions)}} if captions else {}
    sizes = [{"resolution": list(size), "count": count} for size, count in sorted(buckets.items())]
    texts = {
        "ss_output_name": name,
        "ss_base_model_version": family.base_version,
        "ss_v2": str(family.base_version.startswith("sd_v2")),
        "ss_sd_model_name": _last_name(title),
        "ss_clip_skip": str(max(1, config.train.clip_skip)),
        "ss_network_dim": str(section.rank),
        "ss_network_alpha": str(float(section.alpha)),
        "ss_training_started_at": str(times[0]),
        "ss_training_finished_at": str(times[1]),
        "ss_resolution": f"({side}, {side})",
        "ss_num_train_images": str(len(captions)),
        "ss_num_reg_images": "0",
        "ss_max_train_steps": str(steps),
        "ss_steps": str(steps),
        "ss_seed": str(config.seed),
        "ss_min_snr_gamma": str(config.loss.gamma(objective)),
        "ss_tag_frequency": json.dumps({one: count_tags(list(captions)) for one in dirs}),
        "ss_dataset_dirs": json.dumps(dirs),
        "ss_bucket_info": json.dumps({"buckets": {str(index): size for index, size in enumerate(sizes)}}),
        # ModelSpec 1.0.0, https://github.com/Stability-AI/ModelSpec.
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": family.modelspec,
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.date": finished.isoformat(),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if objective == "v_prediction" else objective,
        "modelspec.description": f"{_kind(config)} for {_last_name(title)}, made with LoRA Easel {version}",
        **_settings_texts(config),
    }
    if trigger:
        texts["modelspec.trigger_phrase"] = trigger
    return texts


def _kind(config: RunConfig) -> str:
    slider = config.slider
    if slider.on:
        return f"Slider from “{slider.negative}” (-1) to “{slider.positive}” (1)"
    return f"{ADAPTER_KINDS[config.adapter.kind].title} adapter"


def _settings_texts(config: RunConfig) -> dict[str, str]:
    """The settings as A1111 shows them, and all of them as TOML."""
    section, lycoris = config.adapter, ADAPTER_KINDS[config.adapter.kind].network_args
    network_args: dict[str, Any] = {"targets": section.targets, "dropout": section.dropout}
    unusual = ("rslora", "block_ranks", "block_alphas")
    network_args |= {name: value for name in unusual if (value := getattr(section, name))}
    own = {"conv_dim": section.conv_rank, "conv_alpha": section.conv_alpha}
    network_args |= {**lycoris, **{name: str(value) for name, value in own.items() if value}}
    settings = _shareable(tomllib.loads(to_toml(config)))
    texts = {
        "ss_network_module": "lycoris.kohya" if lycoris else "networks.lora",
        "ss_network_args": json.dumps(network_args),
        CONFIG_KEY: tomli_w.dumps(settings),
    }
    for key, dotted in kohya_header()["write"].items():
        table, _, name = dotted.partition(".")
        if (value := settings.get(table, {}).get(name)) is not None:
            texts[key] = str(value)
    return texts


def side_file(trigger: str) -> bytes:
    """The file `<stem>.json` beside an adapter, from which A1111, Forge and InvokeAI read the trigger words;
    a strength of 0 leaves it to the tool."""
    values = {
        "description": "", "activation text": trigger, "preferred weight": 0.0, "negative text": "",
        "notes": "",
    }  # fmt: skip
    return (json.dumps(values, ensure_ascii=False, indent=4) + "\n").encode("utf-8", "replace")


def _shareable(value: Any) -> Any:
    """Settings with each path reduced to its last name."""
    if isinstance(value, dict):
        return {key: _shareable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shareable(item) for item in value]
    return _last_name(value) if isinstance(value, str) else value


def _last_name(text: str) -> str:
    """The last name of an absolute or relative path; any other text, such as a hub id, unchanged."""
    if PureWindowsPath(text).drive or text.startswith("\\"):
        return PureWindowsPath(text).name
    if text.startswith(("/", "~", "./", "../")):
        return PurePosixPath(text).name
    return text


# A1111, Forge and ComfyUI show the image; it goes into the header as well, which SwarmUI and others show. The
# card is made from the header alone, so it can be made for a file of any tool.

THUMBNAIL_KEY = "modelspec.thumbnail"
THUMBNAIL_SIDE = 256
"""Pixels; the most that ModelSpec 1.0.0 suggests."""
_QUALITIES = (90, 80, 65, 50)
_MOST_BYTES = 24_000
"""Of the JPEG: the header that holds it is read by every tool that lists files."""


def thumbnail(image_path: Path) -> bytes:
    """A JPEG of at most 256 pixels a side.

    Raises:
        OSError: the image cannot be read.
    """
    with Image.open(image_path) as image:
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    data = b""
    for quality in _QUALITIES:
        data = encode_file(small, "JPEG", quality=quality, optimize=True)
        if len(data) <= _MOST_BYTES:
            break
    return data


def thumbnail_uri(jpeg: bytes) -> str:
    """A JPEG as the text of a header: a data URI."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


def preview_file(path: Path) -> Path:
    """The path of an adapter file's preview image."""
    return path.with_name(f"{path.stem}.preview.png")


def card_file(path: Path) -> Path:
    """The path of an adapter file's model card."""
    return path.with_suffix(".md")


def write_beside(path: Path, metadata: Mapping[str, str], image: Path | None = None) -> None:
    """Write the preview image, a PNG that was generated with it if there is one, and the model card beside an
    adapter file.

    Raises:
        OSError: they cannot be written.
    """
    images = []
    if image is not None:
        write_atomically(preview_file(path), image.read_bytes())
        images.append(preview_file(path).name)
    card = model_card(metadata, path.name, images)
    write_atomically(card_file(path), card.encode("utf-8", "replace"))


def model_card(metadata: Mapping[str, str], file_name: str, images: Sequence[str] = ()) -> str:
    """A Markdown page on an adapter file (`model_card.md.j2`), with the front matter that model sites read.

    Args:
        metadata: of the file's header, by any tool.
        file_name: of the adapter file.
        images: names of files beside it.
    """
    entries = parse_object(metadata.get("ss_dataset_dirs", "")).values()
    counts = [entry.get("img_count") for entry in entries if isinstance(entry, dict)]
    return _template().render(
        header=metadata,
        family=detect_family({}, metadata),
        stem=Path(file_name).stem,
        file_name=file_name,
        images=images,
        images_trained=sum(count for count in counts if isinstance(count, int)),
        diffusers_only=HEADER_KEY in metadata,
    )


@lru_cache(maxsize=1)
def _template() -> "jinja2.Template":
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    # Markdown: nothing is escaped as HTML; `one_line` takes out what either would read as a command.
    environment = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    environment.filters |= {"one_line": _one_line, "quoted": lambda t: json.dumps(t, ensure_ascii=False)}
    return environment.get_template("model_card.md.j2")


def _one_line(text: str) -> str:
    """A text on one line, without what Markdown or HTML would take for a command."""
    return re.sub(r"[\s`<>|\[\]]+", " ", text).strip()
