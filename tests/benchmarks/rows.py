"""What a benchmark answers: rows of a table, each with what is asked for and what was found."""

import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One line: what was measured, the figure with its spread, and the bar that it has to meet."""

    what: str
    found: str
    bar: str
    met: bool

    def line(self) -> str:
        """In Markdown."""
        return f"| {self.what} | {self.found} | {self.bar} | {'yes' if self.met else '**no**'} |"


HEAD = "| what | measured | bar | met |\n|---|---|---|---|"


def ratio_row(what: str, ratios: Sequence[float], most: float, more: str = "") -> Row:
    """A row of a ratio that may be at most so much: the median, and the smallest and largest."""
    middle = statistics.median(ratios)
    found = f"{middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} pairs){more}"
    return Row(what, found, f"at most {most:g}", middle <= most)


def machine() -> str:
    """What the figures were found on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start"


def print_gains(
    what: str, base: float, steps: Sequence[int], found: Iterable[tuple[str, list[list[float]]]]
) -> None:
    """A table of held-out gains, each row as soon as it is known.

    For each step it has the mean of the seeds and half of what lies between them.

    Args:
        what: heads the names.
        base: the base's loss on the same pictures.
        steps: the columns.
        found: names with the gains of each seed.
    """
    heads = [f"step {step}" for step in steps]
    sys.stdout.write(f"{machine()}\n\nThe base's loss is {base:.4f}.\n\n")
    sys.stdout.write(f"| {what} | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}\n")
    for name, rows in found:
        cells = [
            f"{statistics.mean(gains):.4f} ± {(max(gains) - min(gains)) / 2:.4f}"
            for gains in zip(*rows, strict=True)
        ]
        sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")
        sys.stdout.flush()
