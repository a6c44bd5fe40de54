"""The command line: each verb parses its options and calls one function.

Verbs that need torch import it inside, so that `runs` and `stop` answer at once.
"""

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from lora_core.cli import (
    adapters,
    analysis,
    combine,
    dataset,
    find_files,
    jobs,
    pictures,
    printable,
    projects,
    queue,
    report,
    workspace,
    write,
)
from lora_core.errors import LoraError
from lora_core.settings.config import in_short, is_unicode
from lora_core.system.cpu_threads import SLEEPS, limit_spinning
from lora_core.system.processes import INTERRUPTED
from lora_core.verbs import GROUPS, VERBS


class _Parser(argparse.ArgumentParser):
    """Quotes words of the command line without their control characters."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    top = _Parser(prog="lora-easel", description="Train and use Stable Diffusion LoRA adapters.")
    tops = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    groups: dict[str, Any] = {}
    parsers = {}
    for words, function in VERBS.items():
        first, _, second = words.partition(" ")
        if second and first not in groups:
            parts_of = "|".join(name.partition(" ")[2] for name in VERBS if name.startswith(f"{first} "))
            parts = tops.add_parser(first, help=GROUPS[first])
            groups[first] = parts.add_subparsers(dest="part", required=True, metavar=parts_of)
        inside, name = (groups[first], second) if second else (tops, first)
        help_line = (function.__doc__ or "").splitlines()[0]
        parsers[words] = inside.add_parser(name, help=help_line, description=help_line)
    for module in (jobs, queue, pictures, adapters, combine, analysis, dataset, report, workspace, projects):
        module.add_verbs(parsers)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code.

    0 done, 1 a problem that a person can fix (one sentence on stderr), 2 wrong usage, 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for word in words:
        if not is_unicode(word) and not os.path.lexists(word):
            write(sys.stderr, f"{in_short(word)} holds bytes that are not UTF-8; type it anew.\n")
            return 1
    options = parser().parse_args(words)
    _quiet_libraries()
    _set_up_cuda()
    limit_spinning(getattr(options, "processor", SLEEPS))
    _speak_any_letter()
    try:
        find_files(options)
        return int(options.run(options) or 0)
    except LoraError as error:
        write(sys.stderr, f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        name = error.filename or "A file"
        write(sys.stderr, f"{name} cannot be read or written: {error.strerror or error}.\n")
        return 1


def _quiet_libraries() -> None:
    """Their notes on deprecations and progress bars are not for the people who run this."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore")


def _set_up_cuda() -> None:
    """Number cards as nvidia-smi does, and do not fragment their memory; before torch is imported."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if sys.platform.startswith("linux"):
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _speak_any_letter() -> None:
    """A name with a letter that the terminal lacks is shown with a `?`, which is better than not at all."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def run() -> None:
    """Entry point of the `lora-easel` command."""
    sys.exit(main())


if __name__ == "__main__":
    run()
