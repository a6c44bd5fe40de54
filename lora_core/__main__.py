"""`python -m lora_core VERB`: the command line."""

import sys

try:
    from lora_core.cli import main, run
except KeyboardInterrupt:  # Ctrl-C during the import
    sys.exit(130)

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
