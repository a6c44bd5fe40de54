"""The README tells the truth: its file tree, its links, its commands."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from app.main import parser as window_parser
from lora_core.__main__ import parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "assets/base/README.md"]
NOT_LISTED = {"__init__.py", ".gitignore"}


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def listed() -> dict[str, str]:
    """The README's tree: path -> half a line."""
    block = re.search(r"```text\n(launch\.py .*?)```", page("README.md"), re.DOTALL)
    assert block is not None
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in block[1].splitlines():
        name, _, words = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        found["".join(folders)] = words.strip()
    return found


def verbs() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def commands() -> list[str]:
    """All `lora-easel ...` of the README."""
    return re.findall(r"`lora-easel ([^`]+)`", page("README.md"))


def test_what_the_tree_lists_is_there() -> None:
    missing = [name for name in listed() if not (ROOT / name).exists()]
    assert missing == []


def test_every_file_has_its_half_line() -> None:
    tree = listed()
    assert [name for name, words in tree.items() if not words and not name.endswith("/")] == []
    sources = [path for top in ("lora_core", "app") for path in (ROOT / top).rglob("*.py")]
    here = {path.relative_to(ROOT).as_posix() for path in sources if path.name not in NOT_LISTED}
    assert here - set(tree) == set()


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page(name))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not ((ROOT / name).parent / target).exists()] == []


def test_the_commands_are_those_that_there_are() -> None:
    assert {command.split()[0] for command in commands() if command != "VERB"} == set(verbs())


@pytest.mark.parametrize("command", commands())
def test_the_command_is_understood(command: str) -> None:
    parser().parse_args(shlex.split(command))


def test_options_that_are_spoken_of_exist() -> None:
    known = {"--help", *window_parser()._option_string_actions}
    for verb in verbs().values():
        known |= set(verb._option_string_actions)
    assert set(re.findall(r"`(--[a-z-]+)`", page("README.md"))) <= known


def test_the_two_commands_stand_at_the_start() -> None:
    assert re.findall(r"```sh\n(.*?)\n```", page("README.md")) == [
        "python launch.py",
        "python launch.py test",
    ]
