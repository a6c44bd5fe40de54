"""The weights of a base on disk, found by the layers that adapters name, without opening the base."""

from pathlib import Path

import torch

from lora_core.errors import ModelFileError
from lora_core.lora.weights import LayerKey
from lora_core.model_files.detect import read_base_facts
from lora_core.model_files.families import Family
from lora_core.models.weight_files import (
    SafetensorsFile,
    TensorSource,
    WeightLocator,
    text_encoder_in_file,
    unet_in_file,
)


class BaseWeights:
    """Where each adapted layer of a base lies: a folder may hold it twice, in full and in half precision."""

    def __init__(self, name: str) -> None:
        """Read the headers of the base's files.

        Args:
            name: "demo", a diffusers folder, a `.safetensors` file, or a hub id that is in the local cache.

        Raises:
            ModelFileError: nothing usable is there; a `.ckpt` is not read.
        """
        facts = read_base_facts(name)
        if facts.family is None:
            raise ModelFileError(
                f"The base {name} is a .ckpt; this needs a .safetensors file or a diffusers folder, so"
                " convert it first."
            )
        self.path: Path = facts.path
        self.family: Family = facts.family
        self.single = facts.single_file
        self._finders = self._in_file() if self.single else {}
        self._files: dict[str, list[SafetensorsFile]] = {}

    def _in_file(self) -> dict[str, WeightLocator]:
        file = SafetensorsFile(self.path)
        encoders = {e.part: text_encoder_in_file(file, e) for e in self.family.text_encoders}
        return {"unet": unet_in_file(file, self.family), **encoders}

    def places(self, layer: LayerKey) -> list[TensorSource]:
        """Where a layer's weight lies; nowhere, if the base has no such layer."""
        part, path = layer
        if self.single:
            source = self._finders[part](f"{path}.weight") if part in self._finders else None
            return [source] if source else []
        if part not in self._files:
            paths = sorted((self.path / part).glob("*.safetensors"))
            self._files[part] = [SafetensorsFile(found) for found in paths]
        # Newer transformers write text encoders without this level.
        names = dict.fromkeys((f"{path}.weight", f"{path.removeprefix('text_model.')}.weight"))
        return [TensorSource(file, key) for file in self._files[part] for key in names if key in file.shapes]

    def weight(self, layer: LayerKey) -> torch.Tensor:
        """A layer's weight in fp32.

        Raises:
            ModelFileError: the base has no such layer.
        """
        places = self.places(layer)
        if not places:
            raise ModelFileError(
                f"The base {self.path} has no layer {'.'.join(layer)}; the file is for another."
            )
        return places[0].read().float()
