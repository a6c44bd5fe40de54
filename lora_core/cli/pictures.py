"""Verbs that make or measure pictures: generate, grid, validate."""

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path

from lora_core import api
from lora_core.cli import Verbs, adapter_file, add_json, add_workspace, say, say_json, write
from lora_core.errors import AdapterFileError
from lora_core.generate.request import (
    KINDS,
    Axis,
    GenerationRequest,
    WeightedLora,
    parse_axis,
    parse_cfg_rescale,
)
from lora_core.model_files.header import read_header
from lora_core.settings.choices import PREDICTIONS, ZERO_TERMINAL_SNR
from lora_core.settings.schema import AUTO
from lora_core.system.cpu_threads import COMPUTES


def add_verbs(verbs: Verbs) -> None:
    """Add this module's verbs."""
    generate = verbs["generate"]
    _add_picture(generate)
    generate.add_argument("--count", type=int, default=1, help="pictures, each with the next seed")
    generate.add_argument("--out", type=Path, help="a PNG file; more than one get -2, -3, ...")
    generate.set_defaults(run=_generate, processor=COMPUTES)
    grid = verbs["grid"]
    for name in ("--rows", "--columns"):
        grid.add_argument(
            name,
            metavar="KIND=V,V,...",
            help=f"what they vary, {', '.join(KINDS)}; a value with a comma stands in double quotes",
        )
    _add_picture(grid, prompt=False)
    grid.add_argument("--out", type=Path, required=True, help="the PNG file")
    grid.set_defaults(run=_grid, processor=COMPUTES)
    validate = verbs["validate"]
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
    verb.add_argument(
        "--cfg-rescale",
        metavar="PHI",
        default=AUTO,
        help="0 to 1, off at 0; auto: 0.7 for a velocity base with zero terminal SNR, 0 for others and demo",
    )
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
        "--zero-terminal-snr",
        default="auto",
        choices=list(ZERO_TERMINAL_SNR),
        help="whether the base's last timestep is pure noise, if it is known",
    )
    verb.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:STRENGTH[:TEXT_STRENGTH]]", help="an adapter"
    )


def loras_of(texts: Iterable[str], place: Path | None) -> list[WeightedLora]:
    """The adapters of FILE[:STRENGTH[:TEXT_STRENGTH]]s.

    Raises:
        LoraError: as `file_and_strengths`.
    """
    return [
        WeightedLora(str(path), s, t) for path, s, t in (file_and_strengths(text, place) for text in texts)
    ]


def note_extras(files: Iterable[str | Path]) -> None:
    """Say on stderr what adapter files hold that is not used."""
    from lora_core.formats.detect import extras_sentence

    for file in dict.fromkeys(map(Path, files)):
        sentence = extras_sentence(read_header(file).shapes)
        if sentence:
            write(sys.stderr, f"Note: {file.name}: {sentence}\n")


def file_and_strengths(text: str, place: Path | None = None) -> tuple[Path, float, float | None]:
    """FILE[:STRENGTH[:TEXT_STRENGTH]] taken apart; what follows the last colons counts only if it is a
    number. FILE may be a run in the workspace `place`, as in `adapter_file`.

    Raises:
        AdapterFileError: no such file, or a strength that is not finite.
        RunError: the run has no such checkpoint.
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
            break
    path = adapter_file(rest, place)
    if not all(map(math.isfinite, numbers)):
        raise AdapterFileError(f"The strength in {text} is not a finite number.")
    first, second = [*numbers, 1.0][0], numbers[1] if len(numbers) > 1 else None
    return path, first, second


def _shot(options: argparse.Namespace) -> GenerationRequest:
    """The picture that a command line asks for.

    Raises:
        LoraError: an option is out of range, or an adapter is not there.
    """
    return GenerationRequest(
        base=options.base, prediction=options.prediction, vae=options.vae,
        zero_terminal_snr=options.zero_terminal_snr, cfg_rescale=parse_cfg_rescale(options.cfg_rescale),
        prompt=options.prompt, negative=options.negative, seed=options.seed, steps=options.steps,
        cfg=options.cfg, sampler=options.sampler, width=options.width, height=options.height,
        loras=tuple(loras_of(options.lora, options.workspace)),
    )  # fmt: skip


def _generate(options: argparse.Namespace) -> int:
    how = (options.out, options.count, options.precision, options.workspace)
    shot = _shot(options)
    note_extras(lora.file for lora in shot.loras)
    api.generate(shot, *how, drawn=lambda path: say(str(path)))
    return 0


def _grid(options: argparse.Namespace) -> int:
    rows, columns = (
        _axis(text, options.workspace) if text else None for text in (options.rows, options.columns)
    )
    shot = _shot(options)
    note_extras(lora.file for lora in shot.loras)
    say(str(api.grid(shot, options.out, rows, columns, options.precision)))
    return 0


def _axis(text: str, place: Path | None) -> Axis:
    """An axis, its checkpoints as files."""
    axis = parse_axis(text)
    if axis.kind != "checkpoint":
        return axis
    return Axis(axis.kind, tuple(str(adapter_file(str(value), place)) for value in axis.values))


def _validate(options: argparse.Namespace) -> int:
    measure = api.Measure(
        options.dataset,
        options.base,
        options.vae,
        options.prediction,
        options.triples,
        options.seed,
        options.workspace,
        zero_terminal_snr=options.zero_terminal_snr,
    )
    loras = loras_of(options.lora, options.workspace)
    note_extras(lora.file for lora in loras)
    report = api.validate(measure, loras, options.shuffle_captions)
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
