"""What a library user needs, in one place; everything else may move without notice.

Open a base, put an adapter into it, draw a picture:

    >>> base = load_base("demo", torch.device("cpu"), torch.float32)
    >>> weights = read_adapter(file, base.family)
    >>> merger = Merger(base.modules)
    >>> merger.apply([Strengthened(weights, 0.5)])
    >>> generated_from_prompt(base, Picture(seed=3), "a red cat").save(out)

A run is a folder: `RunFolder.create(path, RunConfig().changed({...}))` makes it, and `train` takes it to its
end while it is held (`with run.held():`). Every problem that a person can fix is a `LoraError`.
"""

from lora_core.adapters.inject import Merger, Strengthened, adapter_weights, inject
from lora_core.adapters.weights import AdapterWeights, LayerWeights
from lora_core.formats.file import read_adapter, write_adapter
from lora_core.formats.inspect import inspect_file
from lora_core.models.load import load_base
from lora_core.sampling.generate import Picture, generated_from_prompt
from lora_core.spec.config import RunConfig
from lora_core.spec.errors import LoraError
from lora_core.spec.run_folder import RunFolder
from lora_core.training.run import train
from lora_core.validation.validate import validation

__all__ = [
    "AdapterWeights",
    "LayerWeights",
    "LoraError",
    "Merger",
    "Picture",
    "RunConfig",
    "RunFolder",
    "Strengthened",
    "adapter_weights",
    "generated_from_prompt",
    "inject",
    "inspect_file",
    "load_base",
    "read_adapter",
    "train",
    "validation",
    "write_adapter",
]
