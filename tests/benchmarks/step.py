"""A training step of SD 1.5's architecture beside the peers': processor seconds, kernels and kept bytes.

Two processes hold a model each and take turns, A B A B; what is compared is the processor time of one thread,
which other work on the machine disturbs least. Before that, both have to have the same gradient.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from tests.benchmarks.rows import Row, ratio_row
from tests.benchmarks.sides import FORMATS, Given, easel_parts, peft_parts, unet_of
from tests.counting import kept_bytes, launches

ROOT = Path(__file__).resolve().parents[2]
PAIRS = 15
SAME = {"fp32": 1e-4, "bf16": 2e-2}
"""How far gradients may be apart, relative to their norm; bf16 has 8 bits."""
Side = subprocess.Popen[str]


@contextlib.contextmanager
def sides(names: list[str], kind: str, gradients: Path) -> Iterator[list[Side]]:
    """The processes of `names`, ready."""
    begun: list[Side] = []
    try:
        for number, name in enumerate(names):
            file = gradients / f"{number}.pt"
            command = [sys.executable, "-m", "tests.benchmarks.sides", name, kind, str(file)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            begun.append(subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes))
            assert _answer(begun[-1]) == "ready", name
        yield begun
    finally:
        for side in begun:
            side.kill()
            side.wait()


def _answer(side: Side) -> str:
    assert side.stdout is not None
    return side.stdout.readline().strip()


def _seconds(side: Side) -> float:
    assert side.stdin is not None
    side.stdin.write("\n")
    side.stdin.flush()
    return float(_answer(side))


def compared(names: list[str], kind: str, pairs: int = PAIRS) -> list[list[float]]:
    """Seconds of each side, pair after pair, once their gradients were seen to be the same.

    Raises:
        AssertionError: they do unequal work.
    """
    with tempfile.TemporaryDirectory() as folder:
        with sides(names, kind, Path(folder)) as begun:
            rounds = [[_seconds(side) for side in begun] for _ in range(pairs)]
        found = [torch.load(Path(folder) / f"{number}.pt") for number in range(len(names))]
    whole = [gradient for gradient in found if len(gradient)]
    for other in whole[1:]:
        assert float((other - whole[0]).norm() / whole[0].norm()) <= SAME[kind], f"{names}: unequal work"
    return [list(column) for column in zip(*rounds, strict=True)]


def step_rows(kohya: bool = False) -> list[Row]:
    """Steps beside diffusers with PEFT, in both formats, and with the allocator set for the peer too."""
    rows = []
    bars = {"fp32": 0.80, "bf16": 0.72}
    for kind, bar in bars.items():
        if kind == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            continue
        names = ["easel", "peft", "peft+keep", "limit"] + (["kohya"] if kohya and kind == "fp32" else [])
        seconds = dict(zip(names, compared(names, kind), strict=True))
        mine = seconds["easel"]

        def ratios(
            other: str, mine: list[float] = mine, seconds: dict[str, list[float]] = seconds
        ) -> list[float]:
            return [a / b for a, b in zip(mine, seconds[other], strict=True)]

        what = f"Step, {kind}: of diffusers + PEFT"
        rows.append(ratio_row(what, ratios("peft"), bar, f"; {sorted(mine)[len(mine) // 2]:.2f} s"))
        rows.append(ratio_row(f"{what}, which has our allocator settings too", ratios("peft+keep"), 1.0))
        rows.append(ratio_row(f"Step, {kind}: of the frozen base alone", ratios("limit"), 1.0))
        if "kohya" in seconds:
            rows.append(ratio_row(f"Step, {kind}: of kohya's module", ratios("kohya"), 0.75))
    return rows


def count_rows() -> list[Row]:
    """What does not depend on the machine: kernels that are launched, bytes that are kept."""
    dtype = FORMATS["fp32"]
    given = Given(dtype)
    given.noisy.requires_grad_()

    def pair(unet: nn.Module) -> tuple[int, int]:
        weights = {tensor.untyped_storage().data_ptr() for tensor in unet.state_dict().values()}
        count = launches(lambda: given.loss(unet).backward())
        return count, kept_bytes(lambda: given.loss(unet), weights)

    base = pair(unet_of(dtype))
    given.noisy.requires_grad_(False)
    mine = pair(easel_parts(dtype, prepacked=False)[0])
    theirs = pair(peft_parts(dtype)[0])
    return [
        Row(
            "Kernels of a forward and backward pass, of the frozen base's",
            f"{mine[0] / base[0]:.2f} ({mine[0]} of {base[0]}; PEFT {theirs[0] / base[0]:.2f})",
            "at most 1.6",
            mine[0] <= 1.6 * base[0],
        ),
        Row(
            "Bytes kept for the backward pass, of the frozen base's",
            f"{mine[1] / base[1]:.3f} ({mine[1] / 1e6:.0f} of {base[1] / 1e6:.0f} MB; PEFT"
            f" {theirs[1] / base[1]:.3f})",
            "at most 1.1",
            mine[1] <= 1.1 * base[1],
        ),
    ]
