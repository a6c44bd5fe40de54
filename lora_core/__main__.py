"""`python -m lora_core VERB`: the command line."""

from lora_core.cli import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
