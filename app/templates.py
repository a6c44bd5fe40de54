"""Templates of the window: Python passes data, a template formats and escapes it.

`render("train/run.html", ...)` reads `app/train/templates/run.html`; names without a folder are in
`app/templates`. In every template `ui` holds the macros of `parts.html`, `plots` the figures of reports, and
the functions that format are filters named by their result: `{{ size|bytes }}`.

Words are English in the code and translated where they are shown, by gettext: `_("Step {step}", step=7)`. All
pages of a window show one project, in one language: rendered HTML is shared by them, as is all state.
"""

import functools
import gettext
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import jinja2

from lora_core.report import plots
from lora_core.runs.events import Validated, best_of, known_error
from lora_core.settings import config
from lora_core.settings.config import FIELDS, OLD_NAMES
from lora_core.system.files import ASSETS, format_bytes

FOLDER = Path(__file__).parent
LOCALE = ASSETS / "locale"
LANGUAGES = {"en": "English"} | {
    file.parents[1].name: gettext.GNUTranslations(io.BytesIO(file.read_bytes())).gettext("English")
    for file in sorted(LOCALE.glob("*/LC_MESSAGES/easel.mo"))
}
"""What each language calls itself: its catalogue's translation of "English". No catalogue is kept for it."""
_NAMES = re.compile(
    "|".join(sorted((re.escape(n) for n in (*FIELDS, *OLD_NAMES) if "." in n), key=len, reverse=True))
)
RESUMABLE = ("queued", "paused", "stopped", "interrupted", "failed")
UNKNOWN = "\N{EN DASH}"
CHANGED_SHOWN = 5
STATES = {
    "none": ("No run yet", ""),
    "queued": ("Not started", ""),
    "preparing": ("Preparing", "accent"),
    "running": ("Running", "accent"),
    "pausing": ("Pausing", "warn"),
    "stopping": ("Stopping", "warn"),
    "paused": ("Paused", "warn"),
    "stopped": ("Stopped", ""),
    "interrupted": ("Interrupted", "warn"),
    "done": ("Done", "good"),
    "failed": ("Failed", "bad"),
}


class Words:
    """The texts of the window in its language; `served` is the language of its page, which follows."""

    def __init__(self) -> None:
        self.speak("en")
        self.served = self.language

    def speak(self, language: str) -> None:
        """Speak one of `LANGUAGES`."""
        self.language = language
        self.catalogue = gettext.translation("easel", LOCALE, [language], fallback=True)


WORDS = Words()


def _(text: str, *values: object, **named: object) -> str:
    """A text in the window's language; the values fill its {} and {placeholders}."""
    translated = WORDS.catalogue.gettext(text) if text else ""
    return translated.format(*values, **named) if values or named else translated


def pluralize(count: int, one: str, more: str | None = None) -> str:
    """ "1 image", "24 images"."""
    translated = WORDS.catalogue.ngettext(f"{{count}} {one}", f"{{count}} {more or one + 's'}", count)
    return translated.format(count=f"{count:,}")


def label_of(name: str) -> str:
    """What the form calls a setting."""
    return _(config.label_of(name))


def help_of(name: str) -> str:
    """What the form says about a setting."""
    return _(config.help_of(name))


def language_tag() -> str:
    """The language as HTML writes it: zh-CN."""
    return WORDS.language.replace("_", "-")


def preferred_language(header: str) -> str:
    """The first language of an Accept-Language header that there is a catalogue for, else English."""
    for wanted in header.lower().replace("-", "_").split(","):
        tag = wanted.partition(";")[0].strip()
        for known in LANGUAGES:
            if tag.partition("_")[0] == known.partition("_")[0]:
                return known
    return "en"


@functools.lru_cache(maxsize=1)
def script_words(language: str, scripts: bytes) -> str:
    """JSON of what the catalogue has of the literals in the page's scripts; "" in English."""
    found = {}
    for literal in re.findall(r'"(?:[^"\\\n]|\\["\\n])*"', scripts.decode()):
        text = json.loads(literal)
        found[text] = _(text)
        # What `easel.plural` counts.
        one, more = f"{{count}} {text}", f"{{count}} {text}s"
        found = {msgid: WORDS.catalogue.ngettext(one, more, n) for n, msgid in ((1, one), (2, more))} | found
    changed = {text: translated for text, translated in found.items() if translated != text}
    return json.dumps(changed, ensure_ascii=False).replace("<", "\\u003c") if changed else ""


def format_clock(seconds: float | None) -> str:
    """Format seconds as 4:12 or 1:04:12; a dash if unknown."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_duration(seconds: float) -> str:
    """Format seconds roughly: 40 s, 14 min, 2.5 h."""
    if seconds < 90:
        return f"{max(5, 5 * round(seconds / 5))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_speed(seconds_a_step: float | None) -> str:
    """Format as it/s, or s/it when slower than one step per second; never wrapped."""
    if not seconds_a_step:
        return ""
    number, unit = (1 / seconds_a_step, "it/s") if seconds_a_step <= 1 else (seconds_a_step, "s/it")
    return f"{number:.1f}\N{NO-BREAK SPACE}{unit}"


def format_scientific(value: float) -> str:
    """Format a learning rate as 1.0e-4."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def format_share(value: float, of: Validated) -> str:
    """Format a difference of losses as a share of the base's loss."""
    share = f"{value / of.base_loss:.0%}" if of.base_loss > 0 else f"{value:+.4f}"
    return share.replace("-", "\N{MINUS SIGN}")


def format_gain(value: float, error: float) -> str:
    """Format a difference of losses with its standard error."""
    return f"{value:+.4f} ± {known_error(error):.4f}".replace("-", "\N{MINUS SIGN}")


def with_labels(sentence: str, title: Callable[[str], str] = label_of) -> str:
    """A sentence with the settings called as the form calls them."""
    return _NAMES.sub(lambda found: title(OLD_NAMES.get(found[0], found[0])), sentence)


def describe_changes(names: list[str]) -> str:
    """A sentence that lists the inputs that changed since the run began.

    Args:
        names: as the trainer calls them; an image includes its caption.
    """
    images = [
        _("the image {} or its caption", name[12:]) if name.startswith("the picture ") else name
        for name in names
    ]
    shown = [
        _("its settings (config.toml)") if name == "config.toml" else name for name in images[:CHANGED_SHOWN]
    ]
    more = _(" and {:,} more", len(names) - CHANGED_SHOWN) if len(names) > CHANGED_SHOWN else ""
    return _("Since this run began, this has changed: {}{}.", ", ".join(shown), more)


FILTERS = {
    "clock": format_clock,
    "duration": format_duration,
    "bytes": format_bytes,
    "speed": format_speed,
    "scientific": format_scientific,
    "share": format_share,
    "gain": format_gain,
    "count": pluralize,
    "labels": with_labels,
    "changes": describe_changes,
    "thousands": "{:,}".format,
    "shortest": "{:g}".format,
    "translate": _,
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
        extensions=["jinja2.ext.i18n"],
    )
    made.filters |= FILTERS
    made.globals |= {
        "_": _,
        "gettext": _,
        "language": language_tag,
        "STATES": STATES,
        "UNKNOWN": UNKNOWN,
        "RESUMABLE": RESUMABLE,
        "plots": plots,
        "best_of": best_of,
    }
    made.globals["ui"] = made.get_template("parts.html").module
    return made


def render(template: str, **values: Any) -> str:
    """Render a template with `values`; all text is escaped."""
    return _environment().get_template(template).render(values).strip()


def card(template: str, **values: Any) -> Callable[[Any], str]:
    """What shows a snapshot of the state: the template with it as `snap`, and with `values`; functions among
    them are called with it."""

    def shows(snapshot: Any) -> str:
        found = {name: value(snapshot) if callable(value) else value for name, value in values.items()}
        return render(template, snap=snapshot, **found)

    return shows


def part(name: str, *values: Any, **options: Any) -> str:
    """Render one macro of `parts.html`."""
    return str(getattr(_environment().globals["ui"], name)(*values, **options))


def problem_html(sentence: object) -> str:
    """An error message."""
    return part("problem", sentence)


def note_html(sentence: object) -> str:
    """A message that something was done."""
    return part("note", sentence)


# Components of Gradio that show them.

# Options of every event: a plain function that completes even if the page is closed.
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# For typing, sliding and choosing: while one event runs, only the latest one waits.
TYPING: dict[str, Any] = {**QUIET, "trigger_mode": "always_last"}
MOUNTED = "(window.easelMounted ??= []).push({{ name: {name!r}, element, trigger }}); window.easel?.mount();"
"""Tells the page's script of an element of ours that Gradio has made, now or later."""


def html_block(shows: Callable[[], str] = str, **options: Any) -> Any:
    """An HTML component without Gradio's frame; it shows what `shows` gives in the page's language."""
    made: Any = gr.HTML(shows(), padding=False, apply_default_css=False, js_on_load=None, **options)
    made.shows = shows
    return made


def text_field(label: str, name: str, placeholder: str, **options: Any) -> Any:
    """A text box of one line."""
    return gr.Textbox(label=label, elem_id=name, placeholder=placeholder, lines=1, max_lines=1, **options)


def edit_events(component: Any) -> list[Any]:
    """The events that mean the user edited a field.

    A text box swallows the first input event after its value was set, so leaving it counts too. Its change
    event does not help: it fires with empty fields before the draft is loaded.
    """
    return [component.input, component.blur] if isinstance(component, gr.Textbox) else [component.input]
