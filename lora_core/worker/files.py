"""The worker's verbs on adapter files: `export`, `inspect` and `verify`."""

from pathlib import Path
from typing import Any

from lora_core.errors import AdapterFileError
from lora_core.formats.compat.verify import verify_adapter
from lora_core.formats.inspect import inspect_file
from lora_core.runs.folder import RunFolder
from lora_core.train.export import export_checkpoint

Request = dict[str, Any]


def export(request: Request) -> dict[str, Any]:
    """Write a run's checkpoint as a file for other tools."""
    run = RunFolder.open(Path(str(request["run"])))
    return export_checkpoint(
        run, str(request.get("checkpoint", "last")), str(request.get("name", run.name)),
        (str(request.get("format", "kohya")), str(request.get("precision", "fp16"))),
    )  # fmt: skip


def inspect(request: Request) -> dict[str, Any]:
    """What a file is."""
    return {"report": inspect_file(Path(str(request["file"])))}


def verify(request: Request) -> dict[str, Any]:
    """What a file is, and what each tool makes of it; for a kind that cannot be verified, why not."""
    file = Path(str(request["file"]))
    report = inspect_file(file)
    try:
        return {"report": report, "verify": verify_adapter(file)}
    except AdapterFileError as error:
        return {"report": report, "problem": str(error)}
