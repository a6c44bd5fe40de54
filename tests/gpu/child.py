"""Trains one run in a process of its own, within a part of the card's memory, or until it kills itself.

python -m tests.gpu.child RUN [GB of the card | 0] [optimizer step to be killed at | 0]
"""

import contextlib
import sys
from pathlib import Path

import torch

from lora_core.runs.folder import RunFolder
from tests.faults import Fault, armed
from tests.train.runs import trained


def limit_card(gigabytes: float) -> None:
    """Have the card look as if it had so much memory, of which the trainer then takes what is free."""
    ask = torch.cuda.mem_get_info

    def mem_get_info(device: object = None) -> tuple[int, int]:
        free, total = ask(device)
        mine = torch.cuda.memory_reserved(device)
        # A card of this size has less than that to give: the context and a desktop are on it too.
        return max(0, min(free, int((gigabytes - 0.8) * 2**30) - mine)), total

    torch.cuda.mem_get_info = mem_get_info


def main() -> None:
    """Train the run that the command line names."""
    path, gigabytes, step = sys.argv[1:4]
    if float(gigabytes) and torch.cuda.is_available():
        limit_card(float(gigabytes))
    with armed(Fault("apply", nth=int(step), do="kill")) if int(step) else contextlib.nullcontext():
        trained(RunFolder(Path(path)))


if __name__ == "__main__":
    main()
