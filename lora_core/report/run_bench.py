"""What a run's adapter can be measured on once the run is over: its base, and the pictures that it held
out."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from lora_core.analysis.bench import Bench
from lora_core.dataset.captions import CaptionRules, drawn_caption
from lora_core.dataset.folder import ImageRecord, open_dataset, require_clean
from lora_core.dataset.split import held_out
from lora_core.models.device import best_device
from lora_core.models.encode import TextCondition, text_condition
from lora_core.models.load import BaseModel, load_base
from lora_core.models.weight_files import PRECISIONS
from lora_core.spec.config import RunConfig
from lora_core.spec.errors import DatasetError
from lora_core.spec.run_folder import RunFolder
from lora_core.training.inputs import inputs_of

FEWEST_LOOKS = 8
CHANGED = (
    "The pictures have changed since the run began, so that some of those that are measured may have been"
    " trained on."
)


@dataclass(frozen=True)
class RunBench:
    """A bench, what it stands on, and what a person should know of it.

    Attributes:
        bench: measures adapters.
        base: the run's base.
        pictures: how many are measured.
        note: a sentence, "" for none.
    """

    bench: Bench
    base: BaseModel
    pictures: int
    note: str = ""


def held_out_records(run: RunFolder, config: RunConfig) -> tuple[list[ImageRecord], str]:
    """The pictures that a run held out, captions as they were measured, and a note if they have changed.

    Raises:
        DatasetError: the pictures are gone, or none was held out.
    """
    dataset = open_dataset(config.dataset.path, run.path.parent.parent / "cache" / "datasets")
    require_clean(dataset)
    _, held = held_out(dataset.records, config.validation.pictures, config.seed)
    if not held:
        raise DatasetError(f"{run.name} held no picture out, so there is nothing to measure it on.")
    known, now = _known_inputs(run), inputs_of(run, dataset.records)
    pictures = {name for name in (*known, *now) if name.startswith("the picture ")}
    changed = bool(known) and any(known.get(name) != now.get(name) for name in pictures)
    rules = CaptionRules(config.dataset.trigger, 0.0, 0.0, False, 0)
    records = [
        replace(record, caption=drawn_caption(record.caption, rules, random.Random(0))) for record in held
    ]
    return records, CHANGED if changed else ""


def _known_inputs(run: RunFolder) -> dict[str, str]:
    """What the run wrote down of its pictures when it began; {} of a run that did not."""
    try:
        found = json.loads(run.inputs_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def run_bench(
    run: RunFolder,
    config: RunConfig,
    note: Callable[[str], None] | None = None,
    on_picture: Callable[[int, int], None] | None = None,
) -> RunBench:
    """Open a run's base in full precision and encode its held-out pictures.

    Args:
        run: the run.
        config: its settings.
        note: told in a few words what is being measured.
        on_picture: called with (done, all) within a measurement; what it raises ends it.

    Raises:
        DatasetError: the pictures are gone, or none was held out.
        ModelFileError: the base is gone.
    """
    records, said = held_out_records(run, config)
    model = config.model
    base = load_base(
        model.base, best_device(), PRECISIONS["fp32"], model.prediction, model.vae,
        zero_snr=model.zero_terminal_snr,
    )  # fmt: skip
    if config.train.resolution:
        base = replace(base, facts=replace(base.facts, resolution=config.train.resolution))

    def condition(caption: str) -> TextCondition:
        return text_condition(base, [caption], config.train.clip_skip, config.train.tokens)

    looks = max(FEWEST_LOOKS, config.validation.triples)
    bench = Bench(base, records, looks, config.seed, note, on_picture, condition)
    return RunBench(bench, base, len(records), said)
