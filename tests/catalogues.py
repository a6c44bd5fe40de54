"""The catalogues of the window's words (`assets/locale`).

`python -m tests.catalogues` collects the English texts of templates, scripts, code and tables, brings each
language's `easel.po` up to date, compiles it, and says what is left to translate. A new language:
`python -m tests.catalogues pt_BR`.
"""

import ast
import datetime
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jinja2
from babel.messages import Catalog
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po
from jinja2 import nodes

from app import page, state, worker_client
from app.dataset.view import FILTERS
from app.export import view as export_view
from app.preview import request_form
from app.templates import FOLDER, LOCALE, STATES
from app.toolbox import view as toolbox_view
from app.train import form, run_cards, start, train_form
from app.train import view as train_view
from lora_core.model_files.families import FAMILIES
from lora_core.model_files.starting_settings import GOALS, LEVELS
from lora_core.projects.caption_edits import HOWS
from lora_core.projects.project import OTHER_PROJECT
from lora_core.report import doctor
from lora_core.runs.events import HELD_OUT, WANTED_CHANGE
from lora_core.settings import schema
from lora_core.settings.config import FIELDS, help_of, label_of
from lora_core.system.files import ASSETS
from lora_core.system.hardware import REINSTALL

ROOT = FOLDER.parent
Text = str | tuple[str, str]
"""A text, or those of one and of several."""
CALLS = {
    "_": (0,),
    "gettext": (0,),
    "Button": (0,),
    "Accordion": (0,),
    "text_field": (0, 2),
    "_verdict": (0, 2),
    "_text": (2,),
    "Check": (0,),
    "_folder": (0,),
}
"""Functions and the arguments of theirs that are texts."""
KEYWORDS = ("label", "info", "placeholder")
SCRIPT_TEXT = re.compile(r'\bt\((?:[\w.]+ \? )?("(?:[^"\\]|\\.)+")(?: : ("(?:[^"\\]|\\.)+"))?')
SCRIPT_COUNT = re.compile(r'\bplural\((?:[^()]|\([^()]*\))*, "(\w+)"\)')
NO_TIME = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
"""Of each catalogue, so that only texts make it differ."""
PLACES = re.compile(r"\{[^{}]*\}|%\(\w+\)s")
"""Places in a text that values fill."""


def counted(one: str, more: str = "") -> Text:
    """What `pluralize` looks up."""
    return f"{{count}} {one}", f"{{count}} {more or one + 's'}"


def texts_of_code(source: str) -> Iterator[Text]:
    """The texts in Python code."""
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        literal = [arg.value if isinstance(arg, ast.Constant) else None for arg in call.args]
        if name == "pluralize" and literal[1:] and literal[1]:
            yield counted(*(text for text in literal[1:] if text))
        keywords = {each.arg: each.value for each in call.keywords}
        found = [literal[at] for at in CALLS.get(name, ()) if at < len(literal)]
        found += [value.value for key in KEYWORDS if isinstance(value := keywords.get(key), ast.Constant)]
        yield from (text for text in found if isinstance(text, str) and text)


def texts_of_template(source: str) -> Iterator[Text]:
    """The texts in a template."""
    parsed = jinja2.Environment(extensions=["jinja2.ext.i18n"], trim_blocks=True, lstrip_blocks=True).parse(
        source
    )
    for node in parsed.find_all((nodes.Call, nodes.Filter)):
        literal = [arg.value if isinstance(arg, nodes.Const) else None for arg in node.args]
        if isinstance(node, nodes.Filter):
            if node.name == "count" and literal and literal[0]:
                yield counted(*literal)
        elif getattr(node.node, "name", "") in ("_", "gettext"):
            conditional = [
                n for arg in node.args for n in arg.find_all(nodes.Const) if isinstance(n.value, str)
            ]
            yield from [literal[0]] if literal and literal[0] else [n.value for n in conditional[:1]]


def texts_of_script(source: str) -> Iterator[Text]:
    """The texts in a script."""
    for found in SCRIPT_TEXT.findall(source):
        yield from (ast.literal_eval(text) for text in found if text)
    yield from (counted(word) for word in SCRIPT_COUNT.findall(source))


def texts_of_tables() -> Iterator[Text]:
    """The texts of settings, choices and other tables, which are translated where they are shown."""
    for name in FIELDS:
        yield from (label_of(name), help_of(name))
    for table in (table for name, table in schema.rows().items() if name != "patterns"):
        for row in table.values():
            yield from [row] if isinstance(row, str) else (row.get("title", ""), row.get("help", ""))
    for stage, phases in run_cards.STAGES:
        yield from (stage, *phases)
    for tool in toolbox_view.TOOLS.values():
        yield from (tool.title, tool.line, tool.go)
    for verb, (line, _tools) in toolbox_view.VERBS.items():
        yield from (verb, line)
    yield from form.GROUPS
    for table in (GOALS, LEVELS, HOWS, start.SOURCES, export_view.PRECISIONS, request_form.GRID_KINDS):
        yield from table.values()
    yield from (title for title, _tone in STATES.values())
    yield from (title for _key, title in FILTERS)
    yield from (tab.title for tab in page.TABS)
    yield from (title for title, *_range in request_form.NUMBERS.values())
    yield from (
        train_form.INFO,
        start.NO_IMAGES,
        start.NO_PROMPTS,
        train_view.ONLY_HERE,
        train_view.ENVIRONMENT,
    )
    yield from (worker_client.CANCELLED, worker_client.GAVE_WAY, worker_client.STARTING_TAKES)
    # Verdicts without a figure, and what a gain was measured on.
    yield "Memorization: its gain on training images does not carry over to others at all."
    yield "Forgetting: it gets worse on the base's own images."
    yield "Forgetting: it gets slightly worse on the base's own images."
    yield "Forgetting: it loses more on the base's own images than it gains on new ones."
    yield from (HELD_OUT, WANTED_CHANGE)
    yield "This failed because of a bug in LoRA Easel; its log has the details."
    yield from (family.title for family in FAMILIES.values())
    yield "A .ckpt file; what kind of base it is shows when the run starts."
    yield from (toolbox_view.UNSHOWN, toolbox_view.BUSY, state.SHARED, REINSTALL, OTHER_PROJECT)
    # Words that are counted, kinds of what is in the trash, states in the queue, curves, phases of an import.
    yield from (
        counted("image"),
        counted("caption"),
        "image",
        "project",
        "run",
        "Waiting",
        "Basic",
        "Demo",
        "Report",
        "English",
    )
    yield from (
        "Low",
        "Medium",
        "High",
        "Normal",
        "Some",
        "Try it",
        "Stop",
        "Try lower strengths",
        "See the curves",
    )
    yield from ("Loss", "Improvement", "Held out", "Training", "Held out, raw", "Base's own", "Step")
    yield from ("Looking", "Checking", "Importing", "Reading captions")


def collect() -> Catalog:
    """All texts, each with the files that have it."""
    found = Catalog(project="LoRA Easel", charset="utf-8", fuzzy=False, creation_date=NO_TIME)
    readers = {".py": texts_of_code, ".html": texts_of_template, ".js": texts_of_script}
    for file in sorted([*(ROOT / "app").rglob("*.*"), *ASSETS.glob("*.js"), Path(doctor.__file__)]):
        if reader := readers.get(file.suffix):
            for text in reader(file.read_text("utf-8")):
                found.add(text, locations=[(file.relative_to(ROOT).as_posix(), 0)])
    for text in texts_of_tables():
        # A text without letters, as "fp32" and "8" have them, says the same in each language.
        if text:
            found.add(text, locations=[("tables", 0)])
    return found


def read(language: str) -> Catalog:
    """The catalogue of a language; empty for a new one."""
    file = LOCALE / language / "LC_MESSAGES" / "easel.po"
    return read_po(io.BytesIO(file.read_bytes() if file.exists() else b""), locale=language)


def update(language: str, template: Catalog) -> Catalog:
    """Bring a language's catalogue up to date and compile it."""
    catalog = read(language)
    catalog.update(template, no_fuzzy_matching=True)
    catalog.obsolete.clear()
    catalog.fuzzy = False
    folder = LOCALE / language / "LC_MESSAGES"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "easel.po", "wb") as file:
        write_po(file, catalog, no_location=True, width=110, sort_output=True)
    with open(folder / "easel.mo", "wb") as file:
        write_mo(file, catalog)
    return catalog


def missing(catalog: Catalog) -> list[Text]:
    """What is not translated, or not for sure."""
    found = [
        (each, each.string if isinstance(each.string, tuple) else (each.string,))
        for each in catalog
        if each.id
    ]
    return [each.id for each, said in found if each.fuzzy or not said or not all(said)]


def languages() -> list[str]:
    """The languages that there are."""
    return sorted(file.parents[1].name for file in LOCALE.glob("*/LC_MESSAGES/easel.po"))


if __name__ == "__main__":
    template = collect()
    with open(LOCALE / "easel.pot", "wb") as file:
        write_po(file, template, width=110, sort_output=True, include_lineno=False)
    for language in {*languages(), *sys.argv[1:]}:
        left = missing(update(language, template))
        sys.stdout.write(f"{language}: {len(left)} to translate\n" + "".join(f"  {text}\n" for text in left))
