"""Templates of the window: Python prepares plain values, a template decides the markup and escapes them.

`render("train/run.html", ...)` reads `app/train/templates/run.html`; names without a folder are in
`app/templates`. In every template `ui` holds the macros of `parts.html`, `plots` the figures of reports, and
the functions of `formatting` are filters named by what they return: `{{ size|bytes }}`.
"""

import functools
from pathlib import Path
from typing import Any

import jinja2

from app import formatting
from lora_core.report import plots

FOLDER = Path(__file__).parent
FILTERS = {
    "clock": formatting.format_clock,
    "duration": formatting.format_duration,
    "bytes": formatting.format_bytes,
    "speed": formatting.format_speed,
    "scientific": formatting.format_scientific,
    "count": formatting.pluralize,
    "thousands": "{:,}".format,
}


@functools.cache
def _environment() -> jinja2.Environment:
    folders = {folder.parent.name: folder for folder in sorted(FOLDER.glob("*/templates"))}
    folders["report"] = plots.TEMPLATES
    tabs = {name: jinja2.FileSystemLoader(folder) for name, folder in folders.items()}
    made = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.FileSystemLoader(FOLDER / "templates"), jinja2.PrefixLoader(tabs)]
        ),
        autoescape=True,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters |= FILTERS
    made.globals |= {"STATES": formatting.STATES, "UNKNOWN": formatting.UNKNOWN, "plots": plots}
    made.globals["ui"] = made.get_template("parts.html").module
    return made


def render(template: str, **values: Any) -> str:
    """Render a template with `values`; all text is escaped."""
    return _environment().get_template(template).render(values).strip()


def part(name: str, *values: Any, **options: Any) -> str:
    """Render one macro of `parts.html`."""
    return str(getattr(_environment().globals["ui"], name)(*values, **options))


def problem_html(sentence: object) -> str:
    """An error message."""
    return part("problem", sentence)


def note_html(sentence: object) -> str:
    """A message that something was done."""
    return part("note", sentence)
