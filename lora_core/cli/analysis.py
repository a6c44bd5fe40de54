"""Verbs that look into adapters and make better ones of what they see: compare, stack, amplify, shrink,
extract, strength."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.cli import Verbs, add_json, add_workspace, say, say_json, write
from lora_core.cli.combine import SECONDS_BETWEEN_NOTES, slow_note
from lora_core.cli.pictures import file_and_strengths
from lora_core.spec.choices import PREDICTIONS
from lora_core.spec.errors import ConfigError
from lora_core.spec.paths import workspace

if TYPE_CHECKING:
    from lora_core.analysis.bench import Bench
    from lora_core.analysis.strength import Fit
    from lora_core.models.load import BaseModel

FILE = "FILE[:STRENGTH[:TEXT_STRENGTH]]"
PRECISIONS = ["fp32", "fp16", "bf16"]


def add_verbs(verbs: Verbs) -> None:
    """Add this module's verbs."""
    compare = verbs.add_parser("compare", help="how alike the directions of two adapters are")
    compare.add_argument("first", metavar="A", type=Path)
    compare.add_argument("second", metavar="B", type=Path)
    add_json(compare)
    compare.set_defaults(run=_compare)
    stack = verbs.add_parser("stack", help="how adapters disturb each other when all are on")
    stack.add_argument("files", nargs="+", metavar=FILE)
    _add_measuring(stack, "measure the stack and each alone on these pictures")
    add_json(stack)
    stack.set_defaults(run=_stack)
    amplify = verbs.add_parser("amplify", help="how much stronger an adapter is than its base where it acts")
    amplify.add_argument("file", type=Path)
    amplify.add_argument("--base", required=True, help="the base that it was made for")
    add_json(amplify)
    amplify.set_defaults(run=_amplify)
    _add_shrink(verbs)
    extract = verbs.add_parser("extract", help="a LoRA out of a fine-tuned model")
    extract.add_argument("tuned", metavar="TUNED", help="a diffusers folder or a .safetensors file")
    extract.add_argument("--base", required=True, help="the base that it was made from")
    extract.add_argument("--out", type=Path, required=True, help="the file to make")
    _add_size(extract)
    extract.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the file")
    extract.set_defaults(run=_extract)
    strength = verbs.add_parser("strength", help="the strength at which an adapter gains most")
    strength.add_argument("file", type=Path)
    strength.add_argument(
        "--apart", action="store_true", help="one for the UNet and one for the text encoders"
    )
    strength.add_argument("--bake", type=Path, metavar="OUT", help="a new file that has it at strength 1")
    _add_measuring(strength, "pictures that it was not trained on", required=True)
    add_json(strength)
    strength.set_defaults(run=_strength)


def _add_shrink(verbs: Verbs) -> None:
    shrink = verbs.add_parser("shrink", help="a smaller adapter file")
    shrink.add_argument("file", type=Path, help="an adapter; a LoHa, LoKr or DoRA with --rank")
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
    verb.add_argument("--triples", type=int, default=8, help="looks a picture")
    verb.add_argument("--seed", type=int, default=0)
    add_workspace(verb)


def _bench(options: argparse.Namespace) -> tuple["Bench", "BaseModel"]:
    """The base and the pictures to measure on.

    Raises:
        LoraError: a number out of range, or the base or the dataset cannot be used.
    """
    if not 1 <= options.triples <= 1000:
        raise ConfigError(f"--triples {options.triples} is out of range; it goes from 1 to 1000.")
    from lora_core.analysis.bench import Bench
    from lora_core.dataset.folder import open_dataset, require_clean
    from lora_core.models.device import best_device, dtype_of
    from lora_core.models.load import load_base

    dataset = open_dataset(options.dataset, workspace(options.workspace) / "cache" / "datasets")
    require_clean(dataset)
    device = best_device()
    base = load_base(
        options.base or "demo", device, dtype_of("fp32", device), options.prediction, options.vae
    )
    return Bench(base, dataset.records, options.triples, options.seed, _slow_words()), base


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
    from lora_core.analysis.similarity import file_similarity

    report = file_similarity(options.first, options.second)
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
    from lora_core.analysis.stack import Stacked, measured_stack, stack_report

    files = [Stacked(*file_and_strengths(text)) for text in options.files]
    report = stack_report(files)
    if options.dataset:
        bench, base = _bench(options)
        report["validation"] = measured_stack(files, base.family, bench.gains)
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
    from lora_core.analysis.amplify import file_amplification
    from lora_core.analysis.base_weights import BaseWeights

    report = file_amplification(options.file, BaseWeights(options.base), slow_note())
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
    from lora_core.analysis.base_weights import BaseWeights
    from lora_core.analysis.rewrite import Rewriting, check_out
    from lora_core.analysis.shrink import SHRUNK_KEY, Wish, opened_plain, shrink_file

    to = Rewriting(options.file, options.out, options.precision, time.time())
    document: dict[str, Any] = {}
    if options.intrinsic:
        from lora_core.analysis.intrinsic import intrinsic_rank

        check_out(options.out)
        bench, base = _bench(options)
        weights, family = opened_plain(options.file, base.family)
        smaller, found = intrinsic_rank(weights, bench.gains)
        record = {
            "intrinsic": found.rank,
            "kept": found.best.kept,
            "standard_error": found.best.standard_error,
        }
        to.write(smaller, family, SHRUNK_KEY, record)
        said, document = [found.sentence(to.times_smaller)], found.document(to.times_smaller)
    else:
        known = BaseWeights(options.base) if options.base else None
        said = shrink_file(to, Wish(options.rank, options.energy), known, slow_note())
    if options.json:
        say_json({"file": str(options.out), "sentences": said, **document})
        return 0
    for sentence in [*said, str(options.out)]:
        say(sentence)
    return 0


def _extract(options: argparse.Namespace) -> int:
    from lora_core.analysis.extract import extract_file
    from lora_core.analysis.shrink import Wish

    wish = Wish(options.rank, options.energy)
    said = extract_file(
        options.tuned, options.base, options.out, wish, options.precision, time.time(), slow_note()
    )
    for sentence in [*said, str(options.out)]:
        say(sentence)
    return 0


def _strength(options: argparse.Namespace) -> int:
    from lora_core.analysis.rewrite import AS_IT_IS, Rewriting, check_out
    from lora_core.analysis.shrink import opened_plain
    from lora_core.analysis.strength import bake, fitted, fitted_apart

    if options.bake:
        check_out(options.bake)
    bench, base = _bench(options)
    weights = opened_plain(options.file, base.family)[0]
    if options.apart:
        unet, text = fitted_apart(weights, bench.gains)
        fits: list[tuple[str, Fit]] = [("unet", unet), ("text_encoders", text)]
        document: dict[str, Any] = {name: fit.document() for name, fit in fits}
    else:
        fits = [("adapter", fitted(weights, bench.gains))]
        document = fits[0][1].document()
    words = {"unet": "On the UNet the adapter", "text_encoders": "On the text encoders the adapter"}
    said = [fit.sentence(words.get(name, "The adapter")) for name, fit in fits]
    if options.bake:
        to = Rewriting(options.file, options.bake, AS_IT_IS, time.time())
        said.append(bake(to, base.family, [fit.strength for _, fit in fits]))
    if options.json:
        say_json({**document, "sentences": said, **({"file": str(options.bake)} if options.bake else {})})
        return 0
    for _, fit in fits:
        for strength, gain, error in fit.curve:
            say(f"strength {strength:5.2f}  gain {gain:+.4f}  (standard error {error:.4f})")
    for sentence in said + ([str(options.bake)] if options.bake else []):
        say(sentence)
    return 0
