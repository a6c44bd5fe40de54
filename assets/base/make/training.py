"""What both training scripts share: Muon, a schedule by the clock, workers, checkpoints that survive a kill.

The schedule runs over minutes instead of steps because what one has is an evening on a laptop, not a step
count; time already spent is part of the checkpoint, so a run that was stopped goes on where it was.

Workers are processes of one thread each that average their gradients once a step. Threads inside one process
would wait for each other at every operation, which is slow as soon as anything else runs on the machine.
"""

import logging
import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, distributed, multiprocessing, nn

CHECKPOINT_SECONDS = 90


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made orthogonal before it is applied (Jordan et al. 2024).

    Convolutions count as matrices of out x (in * height * width). The step is scaled by 0.2 sqrt(max(rows,
    columns)), which gives the update the root mean square size of an Adam step (Liu et al. 2025, arXiv
    2502.16982), so that one learning rate does for all shapes.
    """

    def __init__(self, weights: Iterable[Tensor], lr: float, weight_decay: float = 0, momentum: float = 0.95):
        """Takes weights of two or more dimensions."""
        super().__init__(list(weights), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates all weights, orthogonalising those of one shape together."""
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    same_shape[weight.flatten(1).shape].append(weight)
            for shape, weights in same_shape.items():
                update = orthogonal(torch.stack([self._nesterov(w, group["momentum"]) for w in weights]))
                size = group["lr"] * 0.2 * math.sqrt(max(shape))
                for weight, direction in zip(weights, update, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(direction.view_as(weight), alpha=-size)

    def _nesterov(self, weight: Tensor, momentum: float) -> Tensor:
        """Returns the look-ahead momentum of one weight as a matrix."""
        state = self.state[weight]
        if not state:
            state["mean"] = torch.zeros_like(weight)
        mean = state["mean"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(mean, momentum).flatten(1)


def orthogonal(batch: Tensor, iterations: int = 5) -> Tensor:
    """Returns (n, rows, columns) with all singular values brought near 1, by Newton-Schulz in bf16."""
    tall = batch.shape[1] > batch.shape[2]
    x = batch.transpose(1, 2) if tall else batch
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    x = x.to(batch.dtype)
    return x.transpose(1, 2) if tall else x


def optimizers(model: nn.Module, muon: dict, adam: dict) -> list[torch.optim.Optimizer]:
    """Returns Muon for the weights of two or more dimensions, Adam for embeddings and vectors."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in tables]
    rest = [p for p in model.parameters() if p.ndim < 2 or id(p) in tables]
    built = [Muon(matrices, **muon), torch.optim.Adam(rest, betas=(0.9, 0.99), **adam)]
    for group in (group for optimizer in built for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return built


class Clock:
    """Time spent training in all sessions together, and the learning-rate factor that follows from it."""

    def __init__(self, minutes: float, spent: float = 0.0, step: int = 0):
        """Goes on from `spent` seconds and `step` steps."""
        self.total, self.spent, self.step = 60 * minutes, spent, step
        self._last = self._saved = time.monotonic()

    def tick(self) -> None:
        """Counts one step."""
        now = time.monotonic()
        self.spent, self._last, self.step = self.spent + now - self._last, now, self.step + 1

    @property
    def done(self) -> bool:
        """Whether the budget is used up."""
        return self.spent >= self.total

    def factor(self, warm_up: int) -> float:
        """Returns the cosine over the budget, with a linear start over `warm_up` steps."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, self.spent / self.total)))
        return min(1.0, (self.step + 1) / warm_up) * cosine

    def checkpoint_due(self) -> bool:
        """Whether it is time to save; true once every CHECKPOINT_SECONDS, and at the end."""
        due = self.done or time.monotonic() - self._saved > CHECKPOINT_SECONDS
        if due:
            self._saved = time.monotonic()
        return due


def share(model: nn.Module, clock: Clock) -> None:
    """Averages the gradients and the time spent over all workers, so that they stay equal.

    Raises:
        SystemExit: the process that started the workers is gone, so this one ends too.
    """
    if not multiprocessing.parent_process().is_alive():
        raise SystemExit
    gradients = [weight.grad for weight in model.parameters()]
    everything = torch.cat([torch.tensor([clock.spent]), *(gradient.flatten() for gradient in gradients)])
    distributed.all_reduce(everything)
    everything /= distributed.get_world_size()
    clock.spent = float(everything[0])
    for gradient, mean in zip(gradients, everything[1:].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def start_workers(work: Callable[..., None], count: int, *arguments: object) -> None:
    """Runs `work(rank, *arguments)` in `count` processes that can `share`."""
    with tempfile.TemporaryDirectory() as meeting:
        multiprocessing.spawn(_join, (count, f"file://{meeting}/place", work, arguments), nprocs=count)


def _join(rank: int, count: int, place: str, work: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=count)
    work(rank, *arguments)
    distributed.destroy_process_group()


def update(built: list[torch.optim.Optimizer], model: nn.Module, factor: float) -> None:
    """Clips the gradients to length 1, steps every optimizer at `factor` of its peak rate and clears them."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in built:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
        optimizer.zero_grad()


def save(path: Path, state: dict) -> None:
    """Writes a checkpoint so that a kill at any moment leaves either the old one or the new one."""
    half = path.with_suffix(".half")
    with half.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


def log_to(path: Path) -> logging.Logger:
    """Returns a logger that writes lines with the time to `path` and to the terminal."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=[logging.FileHandler(path), logging.StreamHandler()],
    )
    return logging.getLogger(path.stem)
