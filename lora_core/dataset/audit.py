"""What is wrong with a dataset, and what will be learned from it."""

from pathlib import Path
from typing import Any

from lora_core.dataset.folder import Dataset


def audit(dataset: Dataset, resolution: int, multiple: int, tokenizer_folder: Path | None) -> dict[str, Any]:
    """The findings, as plain values for JSON."""
    raise NotImplementedError
