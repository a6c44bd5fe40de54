"""A hook of mkdocs: what the site has beside the files of this folder.

These are the pages outside of it that they link to, all options of the command line and all settings, made
anew by each build, so that nothing of them goes stale.
"""

import inspect
import posixpath
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import distribution
from itertools import groupby
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from lora_core.api import VERBS
from lora_core.cli.parser import NEEDED, Parameter, parameters
from lora_core.settings import config as settings

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[([^\]]*)\]\(([^)#:]+)(#[^)]*)?\)")
TAKEN = (".md", ".png", ".webp", "LICENSE", "NOTICE")
"""Endings of what the site takes along; a link to anything else, such as code, becomes plain text."""


def in_project(file: File) -> str:
    """Where a file of the site is in the project."""
    return Path(file.abs_src_path or ROOT / "docs" / file.src_uri).relative_to(ROOT).as_posix()


def target(file: File, link: str) -> str:
    """What a link of a page means, as a path of the project."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(in_project(file)), link))


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Take along what pages link to outside of docs, and what that links to."""
    files.append(File.generated(config, "README.md", abs_src_path=str(ROOT / "README.md")))
    licence = distribution("mkdocs-material").read_text("licenses/LICENSE") or ""
    files.append(File.generated(config, "mkdocs-material.LICENSE", content=licence))
    waiting = list(files.documentation_pages())
    while waiting:
        page = waiting.pop()
        for _, link, _ in LINK.findall(Path(page.abs_src_path or "").read_text(encoding="utf-8")):
            path = target(page, link)
            known = path.startswith("docs/") or files.get_file_from_path(path)
            if path.endswith(TAKEN) and not known and (ROOT / path).is_file():
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
                if path.endswith(".md"):
                    waiting.append(files.get_file_from_path(path))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links as they are within the site, and what is made from the code."""

    def within_site(found: re.Match[str]) -> str:
        path = target(page.file, found[2])
        if not path.endswith(TAKEN):
            return found[1]
        here = posixpath.dirname(page.file.src_uri) or "."
        return f"[{found[1]}]({posixpath.relpath(path.removeprefix('docs/'), here)}{found[3] or ''})"

    more = {"commands.md": all_options, "settings.md": all_settings}.get(page.file.src_uri, list)()
    return "\n".join([LINK.sub(within_site, markdown), *more])


def all_options() -> Iterator[str]:
    """Each verb with its options."""
    yield "\n## All options\n"
    for verb, function in VERBS.items():
        given = parameters(verb)
        arguments = " ".join(
            f"{one.metavar}..." if one.many else one.metavar for one in given if not one.option
        )
        text = (inspect.getdoc(function) or "").splitlines()[0]
        yield f"\n### {verb}\n\n`lora-easel {f'{verb} {arguments}'.strip()}`\n\n{plain(text)}\n"
        yield from table(("", ""), ((option(one), plain(one.help) + default(one)) for one in given))


def option(one: Parameter) -> str:
    """How an option is written, with its values or their placeholder."""
    value = "" if one.kinds == (bool,) else "|".join(one.choices) or one.metavar or one.name.upper()
    return f"`{f'{one.option} {value}'.strip()}`"


def default(one: Parameter) -> str:
    """What an option is where it is not given, unless that is nothing."""
    shown = (
        isinstance(one.default, str | int | float)
        and one.default not in ("", NEEDED)
        and one.kinds != (bool,)
    )
    return f" (default `{one.default}`)" if shown else ""


def all_settings() -> Iterator[str]:
    """Each section with its settings."""
    yield "\n## All settings\n"
    for section, names in groupby(settings.FIELDS, key=lambda name: name.rpartition(".")[0]):
        yield f"\n### {section or 'Run'}\n"
        rows = ((f"`{name}`", f"`{shown(name)}`", described(name)) for name in names)
        yield from table(("Setting", "Default", "In the window, and what it does"), rows)


def shown(name: str) -> str:
    """The default of a setting, as TOML has it."""
    value = settings.FIELDS[name].get_default(call_default_factory=True)
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')


def values(name: str) -> str:
    """The numbers that a setting may be."""
    limits = settings.limits_of(name)
    found = [f"{limits[0]:g} to {limits[1]:g}"] if limits else []
    return ", or ".join([*found, *(["`auto`"] if settings.takes_auto(name) else [])])


def described(name: str) -> str:
    """The label of a setting, its help, and what it may be."""
    parts = [f"**{plain(settings.label_of(name))}**. {plain(settings.help_of(name))}"]
    if known := values(name):
        parts.append(f"{known}.")
    for key, row in (settings.choices_of(name) or {}).items():
        parts.append(f"`{key}`: {plain(row.help)}")
    return "<br>".join(parts)


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """A table of Markdown; nothing for no rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if lines:
        heads = list(heads)
        yield from (f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *lines, "")


def plain(text: str) -> str:
    """Text whose signs mean nothing in Markdown, but for its code."""
    parts = text.split("`")
    return "`".join(
        re.sub(r"([*_|<\[])", r"\\\1", part) if at % 2 == 0 else part for at, part in enumerate(parts)
    )
