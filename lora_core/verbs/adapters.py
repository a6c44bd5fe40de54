"""Verbs that generate with adapters, measure them and convert them."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from lora_core.backends import import_models
from lora_core.errors import AdapterFileError, ConfigError, RunError
from lora_core.generate.grid import Axis, grid_requests, grid_settings, make_axis, make_image_grid
from lora_core.generate.request import DENOISING_STRENGTH, GenerationRequest
from lora_core.model_files.detect import base_layout, read_base_facts
from lora_core.model_files.header import read_header, what_is_there
from lora_core.runs.folder import find_run, is_run_folder
from lora_core.settings.schema import FORMATS, PRECISIONS
from lora_core.system.files import expand_home, unused_path
from lora_core.system.files import workspace as workspace_folder
from lora_core.system.processes import without_collecting
from lora_core.verbs import (
    FILE_PRECISIONS,
    AdapterFile,
    File,
    Found,
    Lora,
    Measure,
    Place,
    Progress,
    check_precision,
    checked_loras,
    choose_device,
    plain_request,
    verb,
)

if TYPE_CHECKING:
    from lora_core.generate.pipeline import Pipeline

Loras = Annotated[Sequence[Lora], "FILE[:STRENGTH[:TEXT_STRENGTH]]"]
Out = Annotated[File, "--out"]


@verb
def generate(
    shot: GenerationRequest,
    out: File | None = None,
    count: int = 1,
    precision: Annotated[str, PRECISIONS] = "auto",
    workspace: Place = None,
    on_image: Callable[[Path], None] | None = None,
    device: str = "auto",
) -> list[Path]:
    """Make images as PNG files; returns their paths.

    Args:
        shot: the request of the first image.
        out: a PNG file, with -2, -3, ... appended for more; else new files in the workspace.
        count: images, each with the next seed.
        on_image: called with each path once the file is written.

    Raises:
        LoraError: a value is out of range, or the base or an adapter cannot be used.
    """
    if not 1 <= count <= 1000:
        raise ConfigError(f"--count {count} is out of range; it must be between 1 and 1,000.")
    shot = plain_request(shot)
    _check([shot])
    target = Path(out) if out else None
    if target:
        _check_png(target)
    pipeline = _open_pipeline(shot, precision, device)
    from lora_core.data.images import save_png

    made = []
    for number in range(count):
        one = replace(shot, seed=shot.seed + number)
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{one.seed}"
        if target:
            path = target.with_stem(f"{target.stem}-{number + 1}") if number else target
        else:
            path = unused_path(workspace_folder(workspace) / "generated", stem, ".png")
        save_png(pipeline(one), path, pipeline.infotext(one))
        made.append(path)
        if on_image:
            on_image(path)
    return made


@verb
def grid(
    shot: GenerationRequest,
    out: Out,
    rows: Axis | None = None,
    columns: Axis | None = None,
    precision: Annotated[str, PRECISIONS] = "auto",
    device: str = "auto",
) -> Path:
    """Make a labelled grid of images that vary in one or two parameters; returns its path.

    Args:
        shot: the common request.
        out: the PNG file.
        rows: the parameter that varies by row, such as strength=0,0.5,1; a value with a comma needs double
            quotes.
        columns: the one that varies by column.

    Raises:
        LoraError: a value is out of range, or the base or an adapter cannot be used.
    """
    shot = plain_request(shot)
    rows, columns = (axis and make_axis(axis.kind, axis.values) for axis in (rows, columns))
    if rows is None and columns is None:
        raise ConfigError("A grid needs --rows or --columns, as in --columns strength=0,0.5,1.")
    for axis in (rows, columns):
        for file in axis.values if axis and axis.kind == "checkpoint" else ():
            if not Path(str(file)).is_file():
                raise AdapterFileError(f"The adapter {file} {what_is_there(str(file))}.")
    if not shot.prompt and not any(axis and axis.kind == "prompt" for axis in (rows, columns)):
        raise ConfigError(
            "A grid needs --prompt, or prompts as rows or columns, as in --rows prompt=cat,dog."
        )
    shots, target = grid_requests(shot, rows, columns), Path(out)
    _check([one for row in shots for one in row])
    _check_png(target)
    pipeline = _open_pipeline(shot, precision, device)
    from lora_core.data.images import save_png

    made = make_image_grid(
        [[pipeline(one) for one in row] for row in shots],
        rows.labels() if rows else [],
        columns.labels() if columns else [],
    )
    save_png(made, target, pipeline.infotext(shot, grid_settings(rows, columns)))
    return target


def _open_pipeline(shot: GenerationRequest, precision: str, device: str) -> "Pipeline":
    with without_collecting(freeze=False):
        import_models()
        from lora_core.generate.pipeline import open_pipeline
        from lora_core.tools.svd import truncate_adapter

    choose_device(device)
    return open_pipeline(shot, truncate_adapter, precision)


def _check(shots: Sequence[GenerationRequest]) -> None:
    """Check `out` before the work rather than after it."""
    from lora_core.data.captions import check_prompt
    from lora_core.data.images import open_rgb

    for file in {file for shot in shots for file in (shot.image, shot.mask) if file}:
        open_rgb(Path(file))
    for shot in shots:
        if not shot.image and shot.denoising_strength != DENOISING_STRENGTH:
            raise ConfigError(f"--strength {shot.denoising_strength:g} has no effect without --image FILE.")
        shot.check()
        check_prompt(shot.prompt)
        check_prompt(shot.negative)


def _check_png(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--out {path} should end in .png.")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"--out {path} cannot be written; choose a file in a folder of yours.")


@verb
def validate(
    measure: Measure, loras: Annotated[Loras, "--lora"] = (), shuffle_captions: bool = False
) -> Found:
    """Measure an adapter on held-out images.

    Args:
        measure: the images and the base.
        loras: an adapter; several are on at once.
        shuffle_captions: give each image another's caption.
    """
    from lora_core.evaluate.validator import validation_report
    from lora_core.formats.io import load_adapter
    from lora_core.lora.weights import LoadedLora

    files = checked_loras(loras)
    base, records = measure.load()
    adapters = [
        LoadedLora(load_adapter(Path(f.file), base.family, plain=False), f.strength, f.text_strength)
        for f in files
    ]
    return validation_report(base, records, adapters, measure.triples, measure.seed, shuffle_captions)


@verb
def inspect(file: AdapterFile, spectrum: bool = False) -> Found:
    """Show kind, ranks and metadata of an adapter file from any tool.

    Args:
        spectrum: the singular values of each layer, and ranks.

    Returns:
        family, format, kind, ranks, alphas, modules, parameters, hashes, writer, triggers, metadata, problem
        (a sentence, or "") and, with `spectrum`, layers.
    """
    from lora_core.formats.verify import inspect_file

    found = inspect_file(Path(file))
    if not spectrum or found["problem"]:
        return found
    from lora_core.tools.svd import file_spectrum

    return found | file_spectrum(Path(file))


@verb
def verify(file: AdapterFile, base: str = "") -> Found:
    """Check what six tools would load from an adapter file.

    Args:
        base: its base, if the file does not name it.
    """
    from lora_core.formats.verify import verify_adapter
    from lora_core.tools.delta import BaseWeights

    facts = read_base_facts(base) if base else None
    family = facts.family if facts else None
    own = facts and (facts.inpainting or not facts.single_file)
    layout = base_layout(facts.path, family) if facts and family and own else None
    weight_of = BaseWeights(base).weight if facts and family else None
    return verify_adapter(Path(file), family, layout=layout, weight_of=weight_of)


@verb
def convert(
    source: Annotated[AdapterFile, "IN"],
    target: Annotated[File, "OUT"],
    to: Annotated[str, "--to", FORMATS],
    keep_alphas: bool = False,
) -> list[str]:
    """Translate an adapter file to another format; returns notes.

    Args:
        source: an adapter.
        target: the file to make.
        to: the format.
        keep_alphas: keep each layer's alpha.

    Raises:
        AdapterFileError: the target exists, or the source cannot be translated.
    """
    from lora_core.formats.io import convert_adapter
    from lora_core.tools.delta import check_out

    check_out(Path(target), "")
    return convert_adapter(Path(source), Path(target), to, keep_alphas)


@verb
def merge(  # noqa: PLR0913 - one option each
    loras: Loras,
    out: Out,
    rank: int | None = None,
    blocks: Annotated[str, "--blocks TABLE"] = "",
    precision: Annotated[str, FILE_PRECISIONS] = "",
    base: str = "",
    note: Progress | None = None,
    into_base: Annotated[str, "--into-base B"] = "",
) -> list[str]:
    """Merge adapters into one file, or into a base; returns a summary with the cost, in sentences.

    Args:
        loras: adapters, LoHa, LoKr, OFT and DoRA too.
        out: the file to make; for a base's folder, the folder.
        rank: the best LoRA of this rank; else ranks add and nothing is lost.
        blocks: a TOML file of pattern = weight, or 'mid_block=0.5,...'.
        precision: dtype of the merged file, else fp32.
        base: the base of a DoRA, on whose weights its update depends.
        into_base: merge into a copy of this base instead.
    """
    from lora_core.tools.merge import merge_files

    if into_base:
        given = [name for name, value in (("rank", rank), ("base", base), ("precision", precision)) if value]
        if given:
            raise ConfigError(
                f"--{given[0]} goes with a merged adapter, not with --into-base: there the base's own"
                " precision stays and nothing is approximated."
            )
        return merge_into_base(loras, into_base, out, blocks, note)
    check_precision(precision or "fp32")
    return merge_files(checked_loras(loras), Path(out), rank, blocks, precision or "fp32", base, note)


def merge_into_base(
    loras: Sequence[Lora], base: str, out: File, blocks: str = "", note: Progress | None = None
) -> list[str]:
    """Merge adapters into a copy of a base, a file or a folder; returns a summary, in sentences."""
    from lora_core.tools.merge import merge_files_into_base

    return merge_files_into_base(checked_loras(loras), base, Path(out), blocks, note)


@verb
def shrink(
    file: AdapterFile,
    out: Out,
    rank: int | None = None,
    energy: Annotated[float | None, "--energy SHARE"] = None,
    precision: Annotated[str, FILE_PRECISIONS] = "",
    base: str = "",
    note: Progress | None = None,
) -> Found:
    """Write a smaller adapter file, to a rank or an energy; returns {file, sentences}.

    Args:
        file: an adapter; a LoHa, LoKr, OFT or DoRA with a rank.
        rank: the same for every layer.
        energy: share to keep, such as 0.99.
        precision: dtype of the file, else its own, or fp32 where that is none of these.
        base: the base of a DoRA.
    """
    from lora_core.tools.delta import BaseWeights, Rewrite
    from lora_core.tools.shrink import shrink_file

    to = Rewrite(Path(file), Path(out), precision)
    known = BaseWeights(base) if base else None
    return {"file": str(out), "sentences": shrink_file(to, rank, energy, known, note)}


def shrink_intrinsic(file: File, out: File, measure: Measure, precision: str = "") -> Found:
    """Write an adapter file cut to the lowest rank that keeps 99% of the gain measured on `measure`.

    Returns:
        file, sentences, and the measurement, as `shrink --intrinsic --json`.
    """
    from lora_core.tools.delta import Rewrite, check_out
    from lora_core.tools.shrink import shrink_to_intrinsic

    check_out(Path(out))
    bench, base = measure.evaluator()
    to = Rewrite(Path(file), Path(out), precision)
    return {"file": str(out), **shrink_to_intrinsic(to, base.family, bench.gains)}


@verb
def extract(
    tuned: str,
    base: Annotated[str, "--base"],
    out: Out,
    rank: int | None = None,
    energy: Annotated[float | None, "--energy SHARE"] = None,
    precision: Annotated[str, FILE_PRECISIONS] = "fp32",
    note: Progress | None = None,
) -> list[str]:
    """Extract a LoRA from a fine-tuned model; returns a summary, in sentences.

    Args:
        tuned: a diffusers folder or a .safetensors file.
        base: the base that it was tuned from.
        rank: the same for every layer.
        energy: share to keep, such as 0.99.
        precision: dtype of the file.
    """
    from lora_core.tools.shrink import extract_file

    check_precision(precision)
    return extract_file(tuned, base, Path(out), rank, energy, precision, note)


@verb
def strength(
    file: AdapterFile,
    measure: Measure,
    apart: bool = False,
    bake: Annotated[File | None, "--bake OUT"] = None,
) -> Found:
    """Find the strength with the highest gain of an adapter.

    Args:
        file: the adapter.
        measure: the images and the base.
        apart: separate strengths for the UNet and the text encoders.
        bake: a new file with the best strength at 1.
    """
    from lora_core.formats.io import load_adapter
    from lora_core.tools.analysis import bake_strength, measure_strength
    from lora_core.tools.delta import Rewrite, check_out

    if bake:
        check_out(Path(bake))
        load_adapter(Path(file))  # alphas, which the strength goes into, are a plain LoRA's
    bench, base = measure.evaluator()
    measured = measure_strength(Path(file), base.family, bench.gains, apart)
    fits = [{key: value for key, value in fit.items() if key != "part"} for fit in measured["fits"]]
    found = dict(zip(("unet", "text_encoders"), fits, strict=True)) if apart else fits[0]
    sentences = measured["sentences"]
    if bake:
        to = Rewrite(Path(file), Path(bake))
        sentences = [*sentences, bake_strength(to, base.family, measured["strengths"])]
        found["file"] = str(bake)
    return {**found, "sentences": sentences}


@verb
def copy(file: File, folder: Annotated[str, "--to FOLDER|TOOL"], workspace: Place = None) -> Found:
    """Copy an adapter and its side files to another tool's folder; nothing is replaced.

    Args:
        file: an adapter, or a run: its export.
        folder: such as ~/loras, or the beginning of a tool's name, such as comfyui.

    Returns:
        file (where it is now), beside (side files that went with it), kept (side files that differ and
        stayed), renamed, tokens (the folder of its new tokens, which stay where they are, or "").

    Raises:
        RunError: no such folder or tool, or it cannot be written.
    """
    from lora_core.system.other_tools import copy_export

    source, target = _exported_file(file, workspace), expand_home(folder)
    if not target.is_dir():
        target = _tool_folder(folder, workspace_folder(workspace))
    done = copy_export(source, target)
    sides = {name: [str(path) for path in getattr(done, name)] for name in ("beside", "kept")}
    return {"file": str(done.file), **sides, "renamed": done.renamed, "tokens": done.tokens}


@verb
def upload(
    file: File,
    repo: Annotated[str, "OWNER/NAME"],
    license: str = "",
    public: bool = False,
    workspace: Place = None,
) -> Found:
    """Upload an adapter with its model card to the Hugging Face hub; private unless --public.

    Log in with `hf auth login` or set HF_TOKEN.

    Args:
        file: an adapter, or a run: its export.
        repo: the repository; created if missing.
        license: of the hub's list, such as openrail++, for the card.
        public: whether everyone can see it.

    Returns:
        url of the repository, files (names of those written), kept (an existing README.md; the licence is
        then not written).

    Raises:
        LoraError: no such file, not logged in, or the hub refuses.
    """
    from lora_core.formats.metadata import card_file, model_card
    from lora_core.model_files.hub import files_to_upload
    from lora_core.model_files.hub import upload as upload_files

    source = _exported_file(file, workspace)
    header, card = read_header(source), card_file(source)
    text = card.read_text("utf-8") if card.is_file() else model_card(header.metadata, source.name)
    files = files_to_upload(source, text, license)
    url, written = upload_files(repo, files, public)
    return {"url": url, "files": written, "kept": [name for name in files if name not in written]}


def _exported_file(file: File, workspace: Place) -> Path:
    """The given file, or the export of the given run.

    Raises:
        LoraError: there is none.
    """
    source = Path(file)
    if is_run_folder(source) or (not source.exists() and not source.suffix):
        run = find_run(file, workspace)
        source = run.path / (run.progress().export or "export")
        if not source.is_file():
            raise RunError(f"The run {run.name} has no exported file; make one by `export {run.name}`.")
    if not source.is_file():
        raise AdapterFileError(f"The adapter {source} {what_is_there(source)}.")
    return source


def _tool_folder(name: str, workspace: Path) -> Path:
    from lora_core.system.other_tools import RecentPaths, find_tools

    there = [
        tool
        for tool in find_tools(map(Path, RecentPaths(workspace / "places.json").read("folders")))
        if tool.loras is not None
    ]
    for tool in there:
        if tool.loras and tool.name.casefold().startswith(name.casefold()):
            return tool.loras
    names = ", ".join(f"{tool.name} ({tool.loras})" for tool in there)
    raise RunError(
        f"{name} is neither a folder nor a tool on this computer; "
        + (f"these were found: {names}." if names else "none was found, so give its LoRA folder.")
    )


@verb
def compare(
    first: Annotated[AdapterFile, "A"], second: Annotated[AdapterFile, "B"], note: Progress | None = None
) -> Found:
    """Measure the subspace similarity of two adapters."""
    from lora_core.tools.analysis import file_similarity

    return file_similarity(Path(first), Path(second), note)


@verb
def stack(loras: Loras, measure: Measure | None = None, note: Progress | None = None) -> Found:
    """Measure how adapters interfere when all are active.

    Args:
        loras: the adapters.
        measure: measure the stack and each alone on these images.
    """
    from lora_core.tools.analysis import interference_report, measure_stack

    files = checked_loras(loras)
    found = interference_report(files, note)
    if measure is not None:
        bench, base = measure.evaluator()
        found["validation"] = measure_stack(files, base.family, bench.gains)
    return found


@verb
def amplify(file: AdapterFile, base: Annotated[str, "--base"], note: Progress | None = None) -> Found:
    """Measure how much an adapter amplifies the directions of its base.

    Args:
        base: its base.
    """
    from lora_core.tools.analysis import file_amplification
    from lora_core.tools.delta import BaseWeights

    return file_amplification(Path(file), BaseWeights(base), note)
