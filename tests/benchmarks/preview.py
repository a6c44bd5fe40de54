"""A preview: what a strength costs once it is merged, and how soon a new one is drawn with."""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from lora_core.formats.io import save_adapter
from lora_core.generate.pipeline import Pipeline
from lora_core.generate.request import GenerationRequest, WeightedLora
from lora_core.lora.inject import adapter_weights, inject
from lora_core.lora.layer import LoraSpec
from lora_core.model_files.families import KOHYA
from lora_core.models.load import load_base
from tests.benchmarks.rows import Row
from tests.counting import Counted

STRENGTHS = (0.2, 1.0, 0.5, 0.8, 0.3, 0.9, 0.1, 0.6, 0.4, 0.7)


class _Recorded(Counted):
    """Which operations, on which shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.story: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        shapes = tuple(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))
        self.story.append((str(func), shapes))
        return super().__torch_dispatch__(func, types, args, kwargs)


def preview_rows() -> list[Row]:
    """On the embedded base."""
    base = load_base("demo", torch.device("cpu"), torch.float32)
    other = load_base("demo", torch.device("cpu"), torch.float32)
    injected = inject(other.modules, other.family.parts, KOHYA, LoraSpec(16, 16.0), 0)
    for layer in injected.layers.values():
        torch.nn.init.normal_(layer.up, std=0.01)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        save_adapter(adapter_weights(injected), file, base.family, dtype="fp16")
        pipeline = Pipeline(base, lambda weights, rank: weights)

        def shot(strength: float) -> GenerationRequest:
            return GenerationRequest(prompt="a robot", steps=1, loras=(WeightedLora(str(file), strength),))

        def forward() -> list[object]:
            with torch.no_grad(), _Recorded() as recorded:
                base.denoiser(torch.ones(2, base.latent_channels, 16, 16), torch.tensor([500, 500]),
                          torch.ones(2, 77, base.denoiser.config.cross_attention_dim))  # fmt: skip
            return recorded.story

        bare = forward()
        pipeline(shot(0.4))
        worn = forward()
        ready = []
        for strength in STRENGTHS:
            pipeline(shot(strength))
            ready.append(1e3 * pipeline.ready_in)
        began = time.perf_counter()
        pipeline.set_adapters(shot(0.55).loras)
        merged = 1e3 * (time.perf_counter() - began)
    middle = statistics.median(ready)
    found = f"{middle:.0f} ms ({min(ready):.0f} to {max(ready):.0f}, {merged:.0f} of them merging)"
    return [
        Row("Inference with a merged LoRA: operations and shapes", f"{len(worn)} of {len(bare)}, the same",
            "the base's own", worn == bare),
        Row("A new strength, to the first denoising step", found, "below 50 ms", middle < 50),
    ]  # fmt: skip
