"""Translating an adapter file from one format to another, or from one spelling of a format to the usual
one."""

from pathlib import Path

from lora_core.errors import AdapterFileError
from lora_core.formats.detect import extras_sentence, family_name, file_family
from lora_core.formats.io import AS_IT_IS, in_own_form, read_adapter, write_adapter
from lora_core.model_files.header import read_header


def converted(source: Path, target: Path, format: str, keep_alphas: bool = False) -> list[str]:
    """Write `source` in another format to `target`; factors keep their number format, bit for bit.

    Args:
        source: a LoRA file of any known format.
        target: the file to write.
        format: a row of `FORMATS`.
        keep_alphas: keep an alpha of its own for each layer of a kohya file.

    Returns:
        What to know about the new file, in sentences.

    Raises:
        AdapterFileError: the source cannot be read, is for a family that has no names here, or the target
            cannot be written.
    """
    header = read_header(source)
    weights = read_adapter(source)
    family = file_family(header.shapes, header.metadata)
    if family is None:
        name = family_name(header.shapes, header.metadata)
        what = "does not say which family of base it is for" if name == "unknown" else f"is for {name}"
        raise AdapterFileError(f"{source} {what}, so its layers have no names in another format.")
    formed = in_own_form(weights, family)
    out = extras_sentence(header.shapes)
    notes = [out] if out else []
    if any(formed.layers[key].down.shape != layer.down.shape for key, layer in weights.layers.items()):
        notes.append("1 x 1 convolutions and linear layers now have the shapes that the base's layers have.")
    if any(key.endswith("lora_mid.weight") for key in header.tensors):
        notes.append("layers of three factors (Tucker) now have two, with the same product.")
    # A1111 shows two files of one alias as one.
    texts = header.metadata | {"ss_output_name": target.stem, "modelspec.title": target.stem}
    write_adapter(formed, target, format, AS_IT_IS, family, texts, keep_alphas)
    alphas = {layer.alpha for layer in weights.layers.values()}
    if 0.0 in alphas and keep_alphas and format == "kohya":
        notes.append("some layers have an alpha of 0, which kohya's own loader reads as the rank.")
    return notes + _alpha_notes(format, len(alphas), keep_alphas)


def _alpha_notes(format: str, alphas: int, keep_alphas: bool) -> list[str]:
    if format == "diffusers":
        return ["only diffusers reads this format whole; the other tools need the kohya format."]
    if alphas == 1:
        return []
    if keep_alphas:
        return [
            "the layers have different alphas, which diffusers reads at the wrong strength; A1111, Forge,"
            " ComfyUI, InvokeAI and kohya read it right."
        ]
    return [
        "the layers had different alphas; the file has one, and the factors were scaled to match. To keep"
        " every bit, give --keep-alphas."
    ]
