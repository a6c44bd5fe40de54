"""README, ARCHITECTURE, CONTRIBUTING, CHANGELOG and docs: their links and commands work."""

import re
import shlex
from pathlib import Path

import pytest

from app.main import build_parser as window_parser
from lora_core.api import VERBS
from lora_core.cli.parser import parameters, parse
from lora_core.verbs import GROUPS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "assets/base/README.md",
    *(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md")),
]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands() -> list[str]:
    """All `lora-easel ...` of the page of commands."""
    return re.findall(r"`lora-easel ([^`]+)`", page("docs/commands.md"))


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page(name))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not ((ROOT / name).parent / target).exists()] == []


def test_the_commands_are_those_that_there_are() -> None:
    given = [command.split() for command in commands()]
    named = {" ".join(words[: 2 if words[0] in GROUPS else 1]) for words in given}
    assert named == set(VERBS)


def lines_of_commands() -> list[str]:
    """Those of blocks, each with what it does two spaces or more behind it."""
    blocks = page("README.md") + page("docs/install.md")
    return re.findall(r"^lora-easel (.+?)(?: {2,}.*)?$", blocks, re.M)


@pytest.mark.parametrize("command", [*commands(), *lines_of_commands()])
def test_the_command_is_understood(command: str) -> None:
    parse(shlex.split(command))


def test_options_that_are_spoken_of_exist() -> None:
    known = {"--help", *window_parser()._option_string_actions}
    known |= {one.option for verb in VERBS for one in parameters(verb)}
    assert set(re.findall(r"`(--[a-z-]+)`", page("README.md") + page("docs/commands.md"))) <= known


def test_the_two_commands_stand_at_the_start() -> None:
    assert re.findall(r"```sh\n(.*?)\n```", page("README.md")) == [
        "python launch.py",
        "python launch.py test",
    ]
