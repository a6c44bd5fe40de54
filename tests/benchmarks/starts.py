"""What an adapter starts from: held-out gain over steps for initialisations beside each other.

    python -m tests.benchmarks.starts [demo|second] > table.md

All else is the demo's preset. Each start leaves the base as it is at step 0, so that the file is a plain LoRA
of the same rank, but for PiSSA: that takes its start out of the frozen weight, and its file has twice the
rank. Judged by `tests/evaluator.py`. See docs/sweep.md.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_core.backends.onednn import PLAIN
from lora_core.formats.io import save_adapter
from lora_core.lora.inject import adapter_weights
from lora_core.lora.layer import LoraLayer
from lora_core.lora.weights import AdapterWeights, LayerKey, LayerWeights
from lora_core.model_files.starting_settings import starting_settings
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.train.loop import StepSettings, backward_micro_batch, training_steps
from lora_core.train.setup import RuntimePlan, TrainSession, prepare
from tests.benchmarks.sweep import print_table
from tests.evaluator import Evaluator

COLUMNS = (10, 20, 40, 80, 120)
BATCHES = 8
"""So many are looked at for the gradient."""
LENGTH = 3**-0.5
"""Of a row of the down factor as it starts by default, whatever its width."""


@dataclass
class Training:
    """A run before its first step, and what PiSSA took out of the frozen weights."""

    session: TrainSession
    plan: StepSettings
    taken: dict[LayerKey, LayerWeights] = field(default_factory=dict)

    @property
    def layers(self) -> dict[LayerKey, LoraLayer]:
        """The adapted layers."""
        return self.session.state.injected.layers


def default(training: Training) -> None:
    """Random down factors, up factors of zero, as they are made."""


def by_directions(which: Callable[[torch.Tensor, int], torch.Tensor]) -> Callable[[Training], None]:
    """Down factors along some of the frozen weight's right singular vectors."""

    def start(training: Training) -> None:
        for layer in training.layers.values():
            _, _, vectors = torch.linalg.svd(layer.base.weight.flatten(1), full_matrices=False)
            rank = len(layer.down)
            layer.down.copy_((LENGTH * which(vectors, rank)).view_as(layer.down))

    return start


def orthogonal(training: Training) -> None:
    """Random down factors whose rows are orthogonal."""
    generator = torch.Generator().manual_seed(training.plan.config.seed)
    for layer in training.layers.values():
        drawn = torch.randn(layer.down.flatten(1).shape, generator=generator)
        layer.down.copy_((LENGTH * torch.linalg.qr(drawn.T).Q.T).view_as(layer.down))


def gradient(training: Training) -> None:
    """Down factors along the rows of the frozen weight's gradient, found by a random sketch of it: with up
    factors at random and down factors of zero, the latter's gradient is that sketch (Wang et al. 2024,
    "LoRA-GA", takes the singular vectors themselves)."""
    state = training.session.state
    generator = torch.Generator().manual_seed(training.plan.config.seed)
    for layer in training.layers.values():
        layer.down.zero_()
        layer.up.copy_(torch.randn(layer.up.shape, generator=generator))
    state.flat_params.zero_grad()
    with torch.enable_grad():
        for number in range(BATCHES):
            backward_micro_batch(
                state, training.session.batches, training.session.text, training.plan, number
            )
    for layer in training.layers.values():
        assert layer.down.grad is not None
        rows = torch.linalg.qr(layer.down.grad.flatten(1).T).Q.T
        layer.down.copy_((LENGTH * rows).view_as(layer.down))
        layer.up.zero_()


def pissa(training: Training) -> None:
    """The frozen weight's largest part as the start, taken out of it (Meng et al. 2024, "PiSSA")."""
    for key, layer in training.layers.items():
        left, sizes, right = torch.linalg.svd(layer.base.weight.flatten(1), full_matrices=False)
        rank = len(layer.down)
        roots = sizes[:rank].sqrt()
        layer.up.copy_((left[:, :rank] * roots).view_as(layer.up))
        layer.down.copy_((roots[:, None] * right[:rank]).view_as(layer.down))
        training.taken[key] = layer.layer_weights()
        part = layer.up.flatten(1) @ layer.down.flatten(1)
        layer.base.weight.sub_(part.view_as(layer.base.weight))


STARTS: dict[str, Callable[[Training], None]] = {
    "as it is: random, zero": default,
    "random, orthogonal": orthogonal,
    "the weight's first directions, zero": by_directions(lambda vectors, rank: vectors[:rank]),
    "the weight's last directions, zero": by_directions(lambda vectors, rank: vectors[-rank:]),
    "the gradient's directions, zero": gradient,
    "PiSSA": pissa,
}


def gains_of(
    pictures: Path, start: Callable[[Training], None], seed: int, judge: Evaluator, base: float
) -> list[float]:
    """The gain at each of `COLUMNS`."""
    with tempfile.TemporaryDirectory() as home:
        changes = {"dataset.path": str(pictures / "train"), "name": "run", "seed": seed,
                   "adapter.alpha": 8.0, "validation.pictures": 0.0, "validation.every": 0}  # fmt: skip
        config = RunConfig().changed(starting_settings("demo", None) | changes)
        run = RunFolder.create(Path(home) / "runs" / "run", config)
        plan = RuntimePlan("fp32", "cpu", torch.get_num_threads(), layout=PLAIN)
        session = prepare(run, config, plan, lambda *told: None)
        training = Training(session, StepSettings(config, config.train.steps))
        with torch.no_grad():
            start(training)
        found = []
        for step in training_steps(session.state, session.batches, session.text, training.plan, 0):
            if step.number in COLUMNS:
                file = Path(home) / f"{step.number}.safetensors"
                family = session.state.base.family
                save_adapter(_weights(training), file, family)
                found.append(base - float(judge.losses(file).mean()))
        return found


def _weights(training: Training) -> AdapterWeights:
    """What was learned, as plain factors: with PiSSA those of now beside those of the start, subtracted."""
    weights = adapter_weights(training.session.state.injected)
    for key, began in training.taken.items():
        now = weights.layers[key]
        weights.layers[key] = LayerWeights(
            torch.cat([now.down, began.down]), torch.cat([now.up, -began.up], dim=1), 2 * now.alpha
        )
    return weights


def main() -> None:
    """Print the table of a set."""
    print_table("start", COLUMNS, STARTS, gains_of)


if __name__ == "__main__":
    main()
