"""A training step of SD 1.5's architecture beside the peers': processor seconds, kernels and kept bytes.

Two processes hold a model each and take turns, A B A B; what is compared is the processor time of one thread,
which other work on the machine disturbs least. Before that, both have to have the same gradient.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from tests.benchmarks.rows import Row, ratio_row
from tests.benchmarks.sides import (
    FORMATS,
    Given,
    easel_parts,
    easel_step,
    limit,
    peft_parts,
    plain_step,
    unet_of,
)
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


def step_rows() -> Iterator[Row]:
    """Steps beside diffusers with PEFT, in both formats, with the allocator set for the peer too, beside the
    frozen base alone, and beside kohya's module where SD_SCRIPTS names a checkout."""
    for kind, bar in {"fp32": 0.80, "bf16": 0.72}.items():
        if kind == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            continue
        what = f"Step, {kind}: of diffusers + PEFT"
        # Two at a time: a model takes gigabytes.
        mine, peft = compared(["easel", "peft"], kind)
        seconds = f"; {statistics.median(mine):.2f} of {statistics.median(peft):.2f} s"
        yield ratio_row(what, _ratios(mine, peft), bar, seconds)
        mine, peft = compared(["easel", "peft+keep"], kind)
        yield ratio_row(f"{what} with our allocator settings", _ratios(mine, peft), 1.0)
        mine, bare = compared(["easel", "limit"], kind)
        yield ratio_row(f"Step, {kind}: of the frozen base alone, in plain torch", _ratios(mine, bare), 1.0)
        if "SD_SCRIPTS" in os.environ and kind == "fp32":
            mine, theirs = compared(["easel", "kohya"], kind)
            yield ratio_row(f"Step, {kind}: of kohya's module", _ratios(mine, theirs), 0.75)


def _ratios(mine: list[float], theirs: list[float]) -> list[float]:
    return [a / b for a, b in zip(mine, theirs, strict=True)]


def count_rows() -> list[Row]:
    """What does not depend on the machine: kernels that a step launches, bytes that are kept."""
    dtype = FORMATS["fp32"]
    given = Given(dtype)

    def kept(unet: nn.Module) -> int:
        weights = {tensor.untyped_storage().data_ptr() for tensor in unet.state_dict().values()}
        return kept_bytes(lambda: given.loss(unet), weights)

    base = launches(limit(dtype)[0])
    given.noisy.requires_grad_()
    base_kept = kept(unet_of(dtype))
    given.noisy.requires_grad_(False)
    unet, storage = easel_parts(dtype, prepacked=False)
    mine, mine_kept = launches(easel_step(unet, storage, given)[0]), kept(unet)
    theirs, factors = peft_parts(dtype)
    peft, peft_kept = launches(plain_step(theirs, given, factors)[0]), kept(theirs)
    return [
        Row(
            "Kernels that a step launches, of the frozen base's",
            f"{mine / base:.2f} ({mine:,} of {base:,}; PEFT {peft / base:.2f})",
            "at most 1.6",
            mine <= 1.6 * base,
        ),
        Row(
            "Bytes kept for the backward pass, of the frozen base's",
            f"{mine_kept / base_kept:.3f} ({mine_kept / 1e6:.0f} of {base_kept / 1e6:.0f} MB;"
            f" PEFT {peft_kept / base_kept:.3f})",
            "at most 1.1",
            mine_kept <= 1.1 * base_kept,
        ),
    ]
