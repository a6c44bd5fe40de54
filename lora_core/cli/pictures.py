"""Verbs that make or measure pictures: generate, validate."""

import argparse
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lora_core.cli import Verbs, add_json, add_workspace, say, say_json
from lora_core.spec.choices import PREDICTIONS
from lora_core.spec.errors import AdapterFileError, ConfigError
from lora_core.spec.paths import workspace

if TYPE_CHECKING:
    from lora_core.adapters.inject import Strengthened
    from lora_core.models.load import BaseModel


def add_verbs(verbs: Verbs) -> None:
    """Add this module's verbs."""
    generate = verbs.add_parser("generate", help="make pictures")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--negative", default="")
    _add_base_and_loras(generate)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--steps", type=int, default=20)
    generate.add_argument("--cfg", type=float, default=5.0)
    generate.add_argument("--sampler", default="ddim")
    generate.add_argument("--width", type=int, default=0)
    generate.add_argument("--height", type=int, default=0)
    generate.add_argument("--count", type=int, default=1, help="pictures, each with the next seed")
    generate.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    generate.add_argument("--out", type=Path, help="a PNG file; more than one get -2, -3, ...")
    add_workspace(generate)
    generate.set_defaults(run=_generate)
    validate = verbs.add_parser("validate", help="measure an adapter on pictures that it was not trained on")
    _add_base_and_loras(validate)
    validate.add_argument("--dataset", required=True)
    validate.add_argument("--triples", type=int, default=8, help="looks a picture")
    validate.add_argument("--seed", type=int, default=0)
    validate.add_argument(
        "--shuffle-captions", action="store_true", help="give each picture another's caption"
    )
    add_workspace(validate)
    add_json(validate)
    validate.set_defaults(run=_validate)


def _add_base_and_loras(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--base", default="demo", help="`demo`, a diffusers folder, a .safetensors file, or a hub id"
    )
    verb.add_argument("--vae", default="", help="a VAE in place of the base's own: a folder or a file")
    verb.add_argument(
        "--prediction",
        default="auto",
        choices=list(PREDICTIONS),
        help="what the base predicts, if it is known",
    )
    verb.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:STRENGTH[:TEXT_STRENGTH]]", help="an adapter"
    )


def file_and_strengths(text: str) -> tuple[Path, float, float | None]:
    """FILE[:STRENGTH[:TEXT_STRENGTH]] taken apart; what follows the last colons counts only if it is a
    number.

    Raises:
        AdapterFileError: no such file, or a strength that is not finite.
    """
    if Path(text).exists():
        return Path(text), 1.0, None
    numbers: list[float] = []
    rest = text
    while len(numbers) < 2 and ":" in rest:
        head, _, tail = rest.rpartition(":")
        try:
            numbers.insert(0, float(tail))
        except ValueError:
            break
        rest = head
        if Path(rest).exists():
            if not all(map(math.isfinite, numbers)):
                raise AdapterFileError(f"The strength in {text} is not a finite number.")
            return Path(rest), numbers[0], numbers[1] if len(numbers) > 1 else None
    raise AdapterFileError(f"The adapter {rest} does not exist.")


def opened(
    options: argparse.Namespace, precision: str
) -> tuple["BaseModel", list["Strengthened"], list[tuple[str, float]]]:
    """The base and the adapters that a command line names, and the adapters' names with strengths."""
    files = [file_and_strengths(text) for text in options.lora]
    from lora_core.adapters.inject import Strengthened
    from lora_core.formats.file import read_adapter
    from lora_core.models.device import best_device, dtype_of
    from lora_core.models.load import load_base

    device = best_device()
    base = load_base(options.base, device, dtype_of(precision, device), options.prediction, options.vae)
    adapters = [Strengthened(read_adapter(path, base.family), s, t) for path, s, t in files]
    return base, adapters, [(path.stem, strength) for path, strength, _ in files]


def _generate(options: argparse.Namespace) -> int:
    if not 1 <= options.count <= 1000:
        raise ConfigError(f"--count {options.count} is out of range; it goes from 1 to 1000.")
    if not 1 <= options.steps <= 1000:
        raise ConfigError(f"--steps {options.steps} is out of range; it goes from 1 to 1000.")
    if not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed {options.seed} is out of range; it is a whole number from 0 on.")
    if not math.isfinite(options.cfg):
        raise ConfigError(f"--cfg {options.cfg} is out of range; take a number such as 5.")
    if options.out:
        _check_out(options.out)
    folder = None if options.out else workspace(options.workspace) / "generated"
    base, adapters, names = opened(options, options.precision)
    from lora_core.adapters.inject import Merger
    from lora_core.sampling.generate import Picture, generated_from_prompt, infotext, save_png

    Merger(base.modules).apply(adapters)
    for number in range(options.count):
        how = Picture(
            options.seed + number, options.steps, options.cfg, options.sampler, options.width, options.height
        )
        image = generated_from_prompt(base, how, options.prompt, options.negative)
        path = _numbered(options.out, number) if options.out else _unused(folder, how.seed)
        save_png(image, path, infotext(base, how, options.prompt, options.negative, names))
        say(str(path))
    return 0


def _check_out(path: Path) -> None:
    """Refuse before the work rather than after it."""
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--out {path} should end in .png.")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"--out {path} cannot be written; choose a file in a folder of yours.")


def _numbered(path: Path, number: int) -> Path:
    return path if number == 0 else path.with_name(f"{path.stem}-{number + 1}{path.suffix}")


def _unused(folder: Path | None, seed: int) -> Path:
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{seed}"
    path, number = (folder or Path()) / f"{stem}.png", 2
    while path.exists():
        path, number = path.with_name(f"{stem}-{number}.png"), number + 1
    return path


def _validate(options: argparse.Namespace) -> int:
    if not 1 <= options.triples <= 1000:
        raise ConfigError(f"--triples {options.triples} is out of range; it goes from 1 to 1000.")
    from lora_core.dataset.folder import open_dataset, require_clean

    dataset = open_dataset(options.dataset, workspace(options.workspace) / "cache" / "datasets")
    require_clean(dataset)
    base, adapters, _ = opened(options, "fp32")
    from lora_core.validation.validate import validation

    report = validation(
        base, dataset.records, adapters, options.triples, options.seed, options.shuffle_captions
    )
    if options.json:
        say_json(report)
        return 0
    say(
        f"gain {report['gain']:+.4f} (standard error {report['standard_error']:.4f}): base loss"
        f" {report['base_loss']:.4f}, with the adapter {report['adapted_loss']:.4f}, over {report['triples']}"
        " triples"
    )
    if "captions" in report:
        words = report["captions"]
        say(
            f"with shuffled captions the base's loss is {words['worse']:+.4f} (standard error"
            f" {words['standard_error']:.4f}) against {words['right_loss']:.4f} with the right ones"
        )
    return 0
