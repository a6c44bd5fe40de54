"""The command line: each verb parses its options and calls one function.

Verbs that need torch import it inside, so that `runs` and `stop` answer at once.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from lora_core.cli import adapters, jobs, pictures
from lora_core.spec.errors import LoraError

INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    top = argparse.ArgumentParser(
        prog="lora-easel", description="Train and use Stable Diffusion LoRA adapters."
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for group in (jobs, pictures, adapters):
        group.add_verbs(verbs)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code.

    0 done, 1 a problem that a person can fix (one sentence on stderr), 2 wrong usage, 130 interrupted.
    """
    options = parser().parse_args(arguments)
    _quiet_libraries()
    try:
        return int(options.run(options) or 0)
    except LoraError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output went away; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _quiet_libraries() -> None:
    """Their notes on deprecations and progress bars are not for the people who run this."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore")


def run() -> None:
    """Entry point of the `lora-easel` command."""
    sys.exit(main())


if __name__ == "__main__":
    run()
