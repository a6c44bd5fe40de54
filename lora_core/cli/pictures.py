"""Verbs that make or measure pictures: generate, grid, validate."""

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
from lora_core.spec.processor import COMPUTES
from lora_core.spec.shots import KINDS, LARGEST_SEED, LoraAt, Shot, axis_of, grid_settings, grid_shots

if TYPE_CHECKING:
    from lora_core.adapters.inject import Strengthened
    from lora_core.models.load import BaseModel
    from lora_core.sampling.artist import Artist


def add_verbs(verbs: Verbs) -> None:
    """Add this module's verbs."""
    generate = verbs.add_parser("generate", help="make pictures")
    _add_picture(generate)
    generate.add_argument("--count", type=int, default=1, help="pictures, each with the next seed")
    generate.add_argument("--out", type=Path, help="a PNG file; more than one get -2, -3, ...")
    generate.set_defaults(run=_generate, processor=COMPUTES)
    grid = verbs.add_parser("grid", help="make a labelled sheet of pictures that differ in one or two things")
    for name in ("--rows", "--columns"):
        grid.add_argument(
            name,
            metavar="KIND=V,V,...",
            help=f"what they vary, {', '.join(KINDS)}; a value with a comma stands in double quotes",
        )
    _add_picture(grid, prompt=False)
    grid.add_argument("--out", type=Path, required=True, help="the PNG file")
    grid.set_defaults(run=_grid, processor=COMPUTES)
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
    validate.set_defaults(run=_validate, processor=COMPUTES)


def _add_picture(verb: argparse.ArgumentParser, prompt: bool = True) -> None:
    verb.add_argument("--prompt", required=prompt, default="", help="what the picture shows")
    verb.add_argument("--negative", default="")
    _add_base_and_loras(verb)
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--steps", type=int, default=20)
    verb.add_argument("--cfg", type=float, default=5.0)
    verb.add_argument("--sampler", default="ddim")
    verb.add_argument("--width", type=int, default=0)
    verb.add_argument("--height", type=int, default=0)
    verb.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    add_workspace(verb)


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

    base = _base(options, precision)
    adapters = [Strengthened(read_adapter(path, base.family), s, t) for path, s, t in files]
    return base, adapters, [(path.stem, strength) for path, strength, _ in files]


def _base(options: argparse.Namespace, precision: str) -> "BaseModel":
    from lora_core.models.device import best_device, dtype_of
    from lora_core.models.load import load_base

    device = best_device()
    return load_base(options.base, device, dtype_of(precision, device), options.prediction, options.vae)


def _artist(options: argparse.Namespace) -> "Artist":
    from lora_core.analysis.at_rank import at_rank
    from lora_core.sampling.artist import Artist

    return Artist(_base(options, options.precision), at_rank)


def _shot(options: argparse.Namespace) -> Shot:
    """The picture that a command line asks for.

    Raises:
        LoraError: an option is out of range, or an adapter is not there.
    """
    for name, legal, range_words in (
        ("steps", 1 <= options.steps <= 1000, "it goes from 1 to 1000"),
        ("seed", 0 <= options.seed <= LARGEST_SEED, "it is a whole number from 0 on"),
        ("cfg", math.isfinite(options.cfg), "take a number such as 5"),
    ):
        if not legal:
            raise ConfigError(f"--{name} {getattr(options, name)} is out of range; {range_words}.")
    return Shot(
        base=options.base, prediction=options.prediction, vae=options.vae, prompt=options.prompt,
        negative=options.negative, seed=options.seed, steps=options.steps, cfg=options.cfg,
        sampler=options.sampler, width=options.width, height=options.height,
        loras=tuple(LoraAt(str(path), s, t) for path, s, t in map(file_and_strengths, options.lora)),
    )  # fmt: skip


def _generate(options: argparse.Namespace) -> int:
    if not 1 <= options.count <= 1000:
        raise ConfigError(f"--count {options.count} is out of range; it goes from 1 to 1000.")
    shot = _shot(options)
    if options.out:
        _check_out(options.out)
    folder = None if options.out else workspace(options.workspace) / "generated"
    artist = _artist(options)
    from lora_core.sampling.generate import save_png

    for number in range(options.count):
        one = shot.at("seed", shot.seed + number)
        path = _numbered(options.out, number) if options.out else _unused(folder, one.seed)
        save_png(artist.drawn(one), path, artist.infotext(one))
        say(str(path))
    return 0


def _grid(options: argparse.Namespace) -> int:
    rows, columns = (axis_of(text) if text else None for text in (options.rows, options.columns))
    if rows is None and columns is None:
        raise ConfigError("A grid needs --rows or --columns, as in --columns strength=0,0.5,1.")
    for axis in (rows, columns):
        for file in axis.values if axis and axis.kind == "checkpoint" else ():
            if not Path(str(file)).is_file():
                raise AdapterFileError(f"The adapter {file} does not exist.")
    if not options.prompt and not any(axis and axis.kind == "prompt" for axis in (rows, columns)):
        raise ConfigError(
            "A grid needs --prompt, or prompts as rows or columns, as in --rows prompt=cat,dog."
        )
    shots = grid_shots(_shot(options), rows, columns)
    _check_out(options.out)
    artist = _artist(options)
    from lora_core.sampling.generate import save_png
    from lora_core.sampling.grid import sheet

    made = sheet(
        [[artist.drawn(shot) for shot in row] for row in shots],
        rows.labels() if rows else [],
        columns.labels() if columns else [],
    )
    save_png(made, options.out, artist.infotext(_shot(options), grid_settings(rows, columns)))
    say(str(options.out))
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
