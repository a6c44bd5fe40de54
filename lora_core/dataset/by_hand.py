"""The pictures that a person chose to measure on: a list in the dataset folder, so that it goes where they
go.

`held_out.txt` names one picture a line, by its path below the folder, with forward slashes. It is a list
unless a picture of that name lies beside it, whose caption it then is.
"""

from collections.abc import Iterable
from pathlib import Path

from lora_core.dataset.names import folded
from lora_core.dataset.sidecars import read_text
from lora_core.spec.errors import DatasetError
from lora_core.spec.paths import write_atomically

LIST = "held_out.txt"


def listed(folder: Path) -> set[str]:
    """The names on the list, folded as file systems compare them; empty without a list.

    Raises:
        DatasetError: it cannot be read as text.
    """
    file = folder / LIST
    if not file.is_file():
        return set()
    return {folded(line.strip()) for line in read_text(file, LIST).split("\n") if line.strip()}


def write_list(folder: Path, names: Iterable[str]) -> None:
    """Write the list; none is left where no name is.

    Raises:
        DatasetError: a name has a line break, or the folder cannot be written.
    """
    wanted = sorted(set(names))
    if broken := next((name for name in wanted if "\n" in name or "\r" in name), None):
        raise DatasetError(f"{broken!r} has a line break in its name and cannot be listed; rename the file.")
    file = folder / LIST
    try:
        if wanted:
            write_atomically(file, ("\n".join(wanted) + "\n").encode("utf-8", "replace"))
        else:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise DatasetError(
            f"The list {file} cannot be written ({error.strerror}); check that the folder may be written."
        ) from error
