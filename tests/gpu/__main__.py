"""The main job on a card of this computer, measured: `python -m tests.gpu`, about 10 minutes.

    python -m tests.gpu [--only PART ...] [--device cuda:N] [--folder DIR] [--out NAME]
    python -m tests.gpu --toy

It downloads nothing: bases have the true architecture and random weights, written below --folder (10 GB).
NAME.json and NAME.md get a row for each finding. Exit code 0 if all bars are met, 1 if not, 2 without a card.
--toy takes the same ways on whatever is there, at toy size: to see that the command works, not how fast.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lora_core.cli import quiet_libraries, replace_unprintable, set_up_cuda
from lora_core.errors import LoraError
from lora_core.system.hardware import card_problem, find_card

if TYPE_CHECKING:
    from tests.gpu.parts import Bench, Finding

HEAD = "| part | what | found | bar | met | s |\n|---|---|---|---|---|---|"


PARTS = ("correctness", "resume", "step_time", "switches", "memory", "ladder", "preview", "bad_moments")
"""Functions of `tests.gpu.parts`; what is cheap and tells most comes first."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m tests.gpu")
    made.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    made.add_argument("--device", default="auto", help="as the setting train.device")
    made.add_argument("--folder", type=Path, help="where bases and runs are written; else a temporary folder")
    made.add_argument("--out", type=Path, default=Path("gpu"), help="of the two files, without their endings")
    made.add_argument("--toy", action="store_true", help="toy size, on the processor too")
    return made


def main(words: list[str] | None = None) -> int:
    """Measure and write the two files."""
    options = parser().parse_args(words)
    replace_unprintable()
    quiet_libraries()
    set_up_cuda()  # before torch is imported, as the program does
    from lora_core.models.device import describe_torch, devices, use_device
    from tests.gpu.parts import Bench

    try:
        device = use_device(options.device)
    except LoraError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if device.type == "cpu" and not options.toy:
        card = find_card(hidden=True)
        why = card_problem(card, describe_torch()) if card else "There is no graphics card in this computer."
        sys.stderr.write(f"{why}\n")
        return 2
    # Windows deletes no file that is still mapped.
    with tempfile.TemporaryDirectory(dir=options.folder, ignore_cleanup_errors=True) as folder:
        found = measured(Bench(device, options.toy, Path(folder)), options.only)
    machine = {
        **describe_torch(),
        "devices": devices(),
        "toy": options.toy,
        "date": time.strftime("%Y-%m-%d"),
    }
    rows = [asdict(finding) for finding in found]
    options.out.with_suffix(".json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    table = "\n".join([HEAD, *(line(finding) for finding in found)])
    title = f"{machine['date']}, {', '.join(one['name'] or one['device'] for one in devices())},"
    title += f" PyTorch {machine['torch']} ({machine['build']}){', toy size' if options.toy else ''}"
    options.out.with_suffix(".md").write_text(f"{title}\n\n{table}\n", encoding="utf-8")
    return 0 if all(finding.met for finding in found) else 1


def measured(bench: "Bench", names: Sequence[str]) -> "list[Finding]":
    """The findings of each part; a part that fails is a row too, and the next one follows."""
    from tests.gpu import parts as module

    found: list[Finding] = []
    for name in names:
        began = time.perf_counter()
        parts = getattr(module, name)(bench)
        while True:
            try:
                finding = next(parts, None)
            except Exception as error:  # noqa: BLE001 - what a card does is not known; it goes into the table
                traceback.print_exc()
                finding = module.Finding(
                    "fails", f"{type(error).__name__}: {str(error)[:200]}", "none", False
                )
                parts = iter(())
            if finding is None:
                break
            finding.part, finding.seconds = name, round(time.perf_counter() - began, 1)
            began = time.perf_counter()
            found.append(finding)
            sys.stdout.write(line(finding) + "\n")
            sys.stdout.flush()
    return found


def line(finding: "Finding") -> str:
    """A row of the table."""
    met = "yes" if finding.met else "**no**"
    value = str(finding.found).replace("|", "/").replace("\n", " ")
    return f"| {finding.part} | {finding.what} | {value} | {finding.bar} | {met} | {finding.seconds} |"


if __name__ == "__main__":
    sys.exit(main())
