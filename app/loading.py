"""Loads the window's code, for `launch.py`, which knows the standard library and this package alone."""

from collections.abc import Callable

from lora_core.system.cpu_threads import without_collecting


def loaded_main() -> Callable[[list[str]], int]:
    """`app.main.main`, with all that it imports.

    Raises:
        ImportError: the project or one of its packages cannot be imported.
    """
    with without_collecting():
        from app.main import main
    return main
