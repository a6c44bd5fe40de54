"""Which bases there are to choose from."""

from pathlib import Path
from typing import TYPE_CHECKING

from lora_core.spec.bases import EMBEDDED

if TYPE_CHECKING:
    # The desk holds the check of the pictures, which has to know the base.
    from app.desk import Desk


def base_choices(desk: "Desk") -> list[tuple[str, str]]:
    """What the picker offers, as (words, value): the embedded base, those used before, then the other
    tools'."""
    titles: dict[str, tuple[str, str]] = {}
    for tool, files in desk.tools.shelves():
        for file in files:
            top = next((folder for folder in tool.models if file.is_relative_to(folder)), file.parent)
            words = file.relative_to(top).as_posix() if file != top else file.name
            titles.setdefault(_key(str(file)), (f"{tool.name}: {words}", str(file)))
    seen = {_key(name): name for name in desk.places.bases() if _there(name)}
    before = [(titles[key][0] if key in titles else Path(name).name, name) for key, name in seen.items()]
    return [
        ("Embedded base (tiny)", EMBEDDED),
        *before,
        *(choice for key, choice in titles.items() if key not in seen),
    ]


def _key(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _there(name: str) -> bool:
    """Whether a base that was used before can be offered: a hub id always, a file or folder where it still
    is."""
    return Path(name).expanduser().exists() or not Path(name).is_absolute()
