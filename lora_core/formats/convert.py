"""Translating an adapter file from one format to another."""

from pathlib import Path

from lora_core.formats.file import DTYPES, read_adapter, write_adapter
from lora_core.formats.inspect import inspect_file
from lora_core.spec.errors import AdapterFileError
from lora_core.spec.families import FAMILIES
from lora_core.spec.tensor_file import read_header


def converted(source: Path, target: Path, format: str, keep_alphas: bool = False) -> list[str]:
    """Write `source` in another format to `target`; factors keep their number format, bit for bit.

    Args:
        source: a LoRA file of any known format.
        target: the file to write.
        format: a row of `FORMATS`.
        keep_alphas: keep an alpha of its own for each layer of a kohya file.

    Returns:
        What the person should know about the new file, in sentences.

    Raises:
        AdapterFileError: the source cannot be read, is for a family that has no names here, or the target
            cannot be written.
    """
    report = inspect_file(source)
    family = FAMILIES.get(str(report["family"]))
    if family is None:
        # What is no LoRA at all gets the sentence that says so.
        read_adapter(source)
        raise AdapterFileError(f"{source} is for {report['family']}, whose layers have no names here yet.")
    weights = read_adapter(source, family)
    dtype = next(iter(weights.layers.values())).down.dtype
    precision = next((name for name, known in DTYPES.items() if known == dtype), "fp32")
    header = dict(read_header(source).metadata)
    write_adapter(weights, target, format, precision, family, header, keep_alphas)
    if format == "diffusers":
        return ["only diffusers reads this format whole; the other tools need the kohya format."]
    if len({layer.alpha for layer in weights.layers.values()}) > 1:
        if keep_alphas:
            return ["the layers have different alphas, which diffusers reads at the wrong strength."]
        return ["the layers had different alphas; the file has one, and the factors were scaled to match."]
    return []
