"""All benchmarks, as the table of docs/benchmarks.md.

    python -m tests.benchmarks [SECTION ...]

Sections: counts, step, preview, growth, window, page, peer. Without any, all but `peer` are run, which needs
diffusers' text-to-image LoRA script and an hour (see `tests/benchmarks/peer.py`). A quiet machine gives the
truest figures; sides that are compared take turns in one run, whatever it is.
"""

import importlib
import subprocess
import sys

from tests.benchmarks.rows import HEAD, machine

SECTIONS = {
    "counts": "tests.benchmarks.step:count_rows",
    "step": "tests.benchmarks.step:step_rows",
    "preview": "tests.benchmarks.preview:preview_rows",
    "growth": "tests.benchmarks.growth:growth_rows",
    "window": "tests.benchmarks.window:window_rows",
    "page": "tests.benchmarks.page:page_rows",
    "peer": "tests.benchmarks.peer:peer_rows",
}


def main() -> int:
    """Run the sections that are named and print their rows; 1 where a bar is missed."""
    names = sys.argv[1:] or [name for name in SECTIONS if name != "peer"]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        sys.stderr.write(f"There is no section {unknown[0]}; there are {', '.join(SECTIONS)}.\n")
        return 2
    if names[1:]:
        # What one section leaves in memory does not burden the next in a process of its own.
        command = [sys.executable, "-m", "tests.benchmarks"]
        return max(subprocess.run([*command, name], check=False).returncode for name in names)
    sys.stdout.write(f"{machine()}\n\n{HEAD}\n")
    module, _, function = SECTIONS[names[0]].partition(":")
    missed = 0
    for row in getattr(importlib.import_module(module), function)():
        sys.stdout.write(row.line() + "\n")
        sys.stdout.flush()
        missed += not row.met
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
