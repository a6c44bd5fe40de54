"""Verbs that look into adapters and make better ones of what they see: compare, stack, amplify, shrink,
extract, strength."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core import api
from lora_core.cli import Verbs, add_file, add_json, add_workspace, say, say_json, write
from lora_core.cli.combine import SECONDS_BETWEEN_NOTES, slow_note
from lora_core.cli.pictures import loras_of, note_extras
from lora_core.errors import ConfigError
from lora_core.settings.choices import PREDICTIONS, ZERO_TERMINAL_SNR

if TYPE_CHECKING:
    pass

FILE = "FILE[:STRENGTH[:TEXT_STRENGTH]]"
PRECISIONS = ["fp32", "fp16", "bf16"]


def add_verbs(verbs: Verbs) -> None:
    """Add this module's verbs."""
    compare = verbs["compare"]
    add_file(compare, "first", metavar="A")
    add_file(compare, "second", metavar="B")
    add_workspace(compare)
    add_json(compare)
    compare.set_defaults(run=_compare)
    stack = verbs["stack"]
    stack.add_argument("files", nargs="+", metavar=FILE)
    _add_measuring(stack, "measure the stack and each alone on these pictures")
    add_json(stack)
    stack.set_defaults(run=_stack)
    amplify = verbs["amplify"]
    add_file(amplify, "file")
    add_workspace(amplify)
    amplify.add_argument("--base", required=True, help="the base that it was made for")
    add_json(amplify)
    amplify.set_defaults(run=_amplify)
    _add_shrink(verbs)
    extract = verbs["extract"]
    extract.add_argument("tuned", metavar="TUNED", help="a diffusers folder or a .safetensors file")
    extract.add_argument("--base", required=True, help="the base that it was made from")
    extract.add_argument("--out", type=Path, required=True, help="the file to make")
    _add_size(extract)
    extract.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the file")
    extract.set_defaults(run=_extract)
    strength = verbs["strength"]
    add_file(strength, "file")
    strength.add_argument(
        "--apart", action="store_true", help="one for the UNet and one for the text encoders"
    )
    strength.add_argument("--bake", type=Path, metavar="OUT", help="a new file that has it at strength 1")
    _add_measuring(strength, "pictures that it was not trained on", required=True)
    add_json(strength)
    strength.set_defaults(run=_strength)


def _add_shrink(verbs: Verbs) -> None:
    shrink = verbs["shrink"]
    add_file(shrink, "file", help="an adapter; a LoHa, LoKr or DoRA with --rank")
    shrink.add_argument("--out", type=Path, required=True, help="the file to make")
    size = _add_size(shrink)
    size.add_argument(
        "--intrinsic", action="store_true", help="the lowest rank that keeps 99%% of the gain, measured"
    )
    shrink.add_argument("--precision", choices=PRECISIONS, default="", help="of the file, else its own")
    _add_measuring(shrink, "what --intrinsic measures on", default_base="")
    add_json(shrink)
    shrink.set_defaults(run=_shrink)


def _add_size(verb: argparse.ArgumentParser) -> Any:
    size = verb.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, help="the same for every layer")
    size.add_argument("--energy", type=float, metavar="SHARE", help="what to keep of it, such as 0.99")
    return size


def _add_measuring(
    verb: argparse.ArgumentParser, words: str, required: bool = False, default_base: str = "demo"
) -> None:
    verb.add_argument("--dataset", required=required, help=words)
    verb.add_argument("--base", default=default_base, help="that it is used with, else `demo`")
    verb.add_argument("--vae", default="", help="a VAE in place of the base's own: a folder or a file")
    verb.add_argument(
        "--prediction", default="auto", choices=list(PREDICTIONS), help="what the base predicts"
    )
    verb.add_argument(
        "--zero-terminal-snr", default="auto", choices=list(ZERO_TERMINAL_SNR), help="of the base"
    )
    verb.add_argument("--triples", type=int, default=8, help="looks a picture")
    verb.add_argument("--seed", type=int, default=0)
    add_workspace(verb)


def _measure(options: argparse.Namespace) -> api.Measure:
    """What to measure on, as the options say."""
    return api.Measure(
        options.dataset,
        options.base or "demo",
        options.vae,
        options.prediction,
        options.triples,
        options.seed,
        options.workspace,
        _slow_words(),
        options.zero_terminal_snr,
    )


def _slow_words() -> Callable[[str], None]:
    """Says on stderr now and then what is being measured."""
    last = time.monotonic()

    def note(words: str) -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS_BETWEEN_NOTES:
            last = time.monotonic()
            write(sys.stderr, f"{words}\n")

    return note


def _compare(options: argparse.Namespace) -> int:
    report = api.compare(options.first, options.second)
    if options.json:
        say_json(report)
        return 0
    for row in report["layers"]:
        say(
            f"{row['part']}.{row['module']}: {row['phi']:.3f} at rank {row['rank']}, by chance"
            f" {row['baseline']:.3f}"
        )
    _say_left_out(report)
    say(
        f"Similarity {report['similarity']:.3f} of the directions read, {report['similarity_output']:.3f} of"
        f" those written, over {len(report['layers'])} layers; random ones would have"
        f" {report['baseline']:.3f} and {report['baseline_output']:.3f}."
    )
    return 0


def _say_left_out(report: dict[str, Any]) -> None:
    for row in report["left_out"]:
        say(f"{row['part']}.{row['module']} is left out: {row['reason']}")


def _stack(options: argparse.Namespace) -> int:
    loras = loras_of(options.files, options.workspace)
    report = api.stack(loras, _measure(options) if options.dataset else None)
    if options.json:
        say_json(report)
        return 0
    names = [file["name"] for file in report["files"]]
    for pair in report["pairs"]:
        if pair["layers"]:
            say(
                f"{names[pair['first']]} and {names[pair['second']]}: cosine {pair['cosine']:+.3f}; they"
                f" write {pair['column_overlap']:.3f} alike (by chance {pair['column_baseline']:.3f}) and"
                f" read {pair['row_overlap']:.3f} (by chance {pair['row_baseline']:.3f}), over"
                f" {pair['layers']} layers"
            )
        else:
            say(f"{names[pair['first']]} and {names[pair['second']]} change no layer in common")
    for file in report["files"]:
        if file["survives"] is not None:
            say(
                f"{file['name']}: {file['survives']:.1%} of it survives in the stack, {file['untouched']:.1%}"
                " is untouched by the others"
            )
    _say_left_out(report)
    if options.dataset:
        say(report["validation"]["sentence"])
    return 0


def _amplify(options: argparse.Namespace) -> int:
    report = api.amplify(options.file, options.base, slow_note())
    if options.json:
        say_json(report)
        return 0
    for row in report["blocks"]:
        factor = "beyond measure" if row["amplification"] is None else f"{row['amplification']:.2f}"
        say(
            f"{row['part']} {row['block']}: amplification {factor}, norm {row['norm']:.4g},"
            f" {row['intruders']} intruder dimensions in {row['layers']} layers"
        )
    _say_left_out(report)
    say(
        f"{report['intruders']} intruder dimensions: of the {report['leading']} leading directions of each"
        " adapted weight, those whose cosine with every direction of the base's is below"
        f" {report['threshold']}."
    )
    return 0


def _shrink(options: argparse.Namespace) -> int:
    if options.intrinsic and not options.dataset:
        raise ConfigError(
            "--intrinsic measures the gain: give --dataset, pictures that it was not trained on."
        )
    if options.intrinsic:
        note_extras([options.file])
        made = api.shrink_intrinsic(options.file, options.out, _measure(options), options.precision)
    else:
        how = (options.rank, options.energy, options.precision, options.base, slow_note())
        made = api.shrink(options.file, options.out, *how)
    if options.json:
        say_json(made)
        return 0
    for sentence in [*made["sentences"], made["file"]]:
        say(sentence)
    return 0


def _extract(options: argparse.Namespace) -> int:
    how = (options.rank, options.energy, options.precision, slow_note())
    for sentence in [*api.extract(options.tuned, options.base, options.out, *how), str(options.out)]:
        say(sentence)
    return 0


def _strength(options: argparse.Namespace) -> int:
    note_extras([options.file])
    found = api.strength(options.file, _measure(options), options.apart, options.bake)
    if options.json:
        say_json(found)
        return 0
    for fit in (found["unet"], found["text_encoders"]) if options.apart else (found,):
        for row in fit["curve"]:
            say(
                f"strength {row['strength']:5.2f}  gain {row['gain']:+.4f}  (standard error"
                f" {row['standard_error']:.4f})"
            )
    for sentence in found["sentences"] + ([found["file"]] if options.bake else []):
        say(sentence)
    return 0
