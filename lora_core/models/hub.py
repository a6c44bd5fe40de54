"""A base by its hub id: from the hub's local cache where it is whole there, else downloaded into it."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from lora_core.spec.errors import ModelFileError

_PATTERNS = [
    "*.json",
    "*.txt",
    "*/*.json",
    "*/*.txt",
    "*/model.safetensors",
    "*/model-*.safetensors",
    "*/diffusion_pytorch_model.safetensors",
    "*/diffusion_pytorch_model-*.safetensors",
]


def in_local_cache(repo: str) -> Path:
    """The diffusers folder of a hub id on this machine; no network is used where it is there already.

    Raises:
        ModelFileError: it is not in the cache and cannot be downloaded.
    """
    try:
        return Path(snapshot_download(repo, allow_patterns=_PATTERNS, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        return Path(snapshot_download(repo, allow_patterns=_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelFileError(
            f"The base {repo!r} is no folder here, not in the local hub cache, and cannot be downloaded "
            f"({type(error).__name__}); check the name and the connection, or give a folder."
        ) from error
