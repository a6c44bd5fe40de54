"""README, ARCHITECTURE, CONTRIBUTING, CHANGELOG and docs: links and commands work, and the site builds."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import webbrowser
from pathlib import Path

import pytest
from babel.messages.pofile import read_po

from app.main import build_parser as window_parser
from lora_core.api import VERBS, docs
from lora_core.cli import main
from lora_core.cli.parser import parameters, parse
from lora_core.errors import LoraError
from lora_core.settings.config import FIELDS, load_toml
from lora_core.verbs import GROUPS, datasets

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


PROGRAM = (
    r"(?:lora-easel |lora-easel-window|LORA_EASEL_PASSWORD=|python launch\.py|python assets|"
    r"\S*python -m (?:tests|hatchling)[ .]|mkdocs |pip install |docker |accelerate |ssh |hf auth )"
)
"""How a command in the text, and not a mere name, begins."""


def lines_of_commands() -> list[str]:
    """All commands of blocks for a shell, and of other blocks and of the text.

    A line may end with what it does, two spaces or more behind it.
    """
    found: dict[str, None] = {}
    for text in map(page, PAGES):
        for kind, block in re.findall(r"^ *```(\w+)\n(.*?)^ *```", text, re.M | re.S):
            lines = [re.sub(r"  +.*", "", line.strip()) for line in block.splitlines()]
            begins = re.compile("" if kind == "sh" else PROGRAM if kind == "text" else "$.")
            found |= dict.fromkeys(one for line in lines if begins.match(line) for one in line.split(" && "))
        inline = re.findall(rf"`({PROGRAM}[^`]*)`", text)
        found |= dict.fromkeys(" ".join(one.split()) for one in inline)
    return [one for one in found if one.removeprefix("lora-easel ") not in VERBS]


def check_command(words: list[str]) -> None:
    """Check that a command of a page is one: its program, and the words behind it.

    Raises:
        AssertionError, SystemExit: it is not.
    """
    program, *rest = [word for word in words if not word.startswith("LORA_EASEL_PASSWORD=")]
    if program == "lora-easel":
        parse(rest)
    elif program == "lora-easel-window" or words == ["python", "launch.py"]:
        window_parser().parse_args(rest[1:])
    elif program == "python" and rest[0] == "launch.py":
        assert f"launch.py {rest[1]} " in page("launch.py")
    elif program.endswith("python") and rest[0] == "-m":
        installed = rest[1] in page("pyproject.toml")
        assert installed or importlib.util.find_spec(rest[1]) is not None
    elif program == "docker":
        given = [word for word in rest if word.startswith("TORCH=")]
        assert len(given) == rest.count("--build-arg")
        assert rest[0] in ("build", "compose", "run", "exec")
    elif program in ("accelerate", "ssh", "hf", "pip"):
        pass  # not ours
    elif program == "python":
        script = page(rest[0])
        assert [word for word in rest if word.startswith("--") and f'"{word}"' not in script] == []
    elif program == "source":
        assert rest == [".venv/bin/activate"]
    else:
        tools = tomllib.loads(page("pyproject.toml"))["project"]["optional-dependencies"]["test"]
        assert any(re.match(rf"{program}\b", tool) for tool in tools), program


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page(name))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not ((ROOT / name).parent / target).exists()] == []


def test_the_commands_are_those_that_there_are() -> None:
    given = [command.split() for command in commands()]
    named = {" ".join(words[: 2 if words[0] in GROUPS else 1]) for words in given}
    assert named == set(VERBS)


@pytest.mark.parametrize(
    "command", sorted({*(f"lora-easel {one}" for one in commands()), *lines_of_commands()})
)
def test_the_command_is_understood(command: str) -> None:
    check_command(shlex.split(command))


@pytest.mark.parametrize(
    "command",
    ["lora-easel trian demo", "lora-easel train --nme a demo", "python launch.py tset", "python -m tests.no"],
)
def test_a_wrong_command_would_be_found(command: str) -> None:
    with pytest.raises((SystemExit, AssertionError)):
        check_command(shlex.split(command))


def test_options_that_are_spoken_of_exist() -> None:
    known = {"--help", *window_parser()._option_string_actions}
    known |= {one.option for verb in VERBS for one in parameters(verb)}
    assert set(re.findall(r"`(--[a-z-]+)`", page("README.md") + page("docs/commands.md"))) <= known


def test_buttons_and_tabs_are_named_as_in_the_window() -> None:
    with (ROOT / "assets/locale/ja/LC_MESSAGES/easel.po").open(encoding="utf-8") as file:
        known = {message.id if isinstance(message.id, str) else message.id[0] for message in read_po(file)}
    for name in PAGES:
        text = re.sub(r"```.*?```|`[^`]*`|\*\*", "", page(name), flags=re.S)
        labels = re.findall(r"(?<![\w*])\*([A-Z][^*]*?)\*(?![\w*])", text)
        assert [label for label in labels if " ".join(label.split()) not in known] == [], name


def test_the_two_commands_stand_at_the_start() -> None:
    assert re.findall(r"```sh\n(.*?)\n```", page("README.md")) == [
        "python launch.py",
        "python launch.py test",
    ]


def test_the_first_lora_is_made_as_its_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All commands of the page, of which three do less here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_EASEL_HOME", str(tmp_path / "workspace"))
    short = (
        "train.steps=2",
        "train.batch_size=1",
        "train.resolution=64",
        "validation.every=0",
        "sample.every=0",
    )
    less = {
        "train": [word for one in short for word in ("--set", one)],
        "generate": ["--steps", "2"],
        "report": ["--no-measure"],
    }
    (block,) = re.findall(r"```sh\n(.*?)```", page("docs/first.md"), re.S)
    for line in block.splitlines():
        words = shlex.split(line)[1:]
        assert main([*words, *less.get(words[0], [])]) == 0, (line, capsys.readouterr().err)
    made = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert {".png", ".html", ".safetensors"} <= made


def test_the_file_of_settings_is_read(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", page("docs/settings.md"), re.S)
    (tmp_path / "settings.toml").write_text(block, encoding="utf-8")
    assert load_toml(tmp_path / "settings.toml")["adapter"]["rank"] == 8


def test_the_navigation_has_each_page_once() -> None:
    pages = re.findall(r"^ +- .*?([\w/]+\.md)$", page("mkdocs.yml").partition("\nnav:")[2], re.M)
    assert len(pages) > 20
    assert sorted(set(pages)) == sorted(pages)


def test_the_site_has_every_page_verb_and_setting(tmp_path: Path) -> None:
    """Built with warnings as errors: of links, anchors, and pages that the navigation lacks."""
    pytest.importorskip("material", reason="the extra `docs` brings mkdocs-material: python launch.py test")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    around = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=around, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    titles = {(one["location"].partition("#")[0], one["title"]) for one in index}
    assert {("commands.html", verb) for verb in VERBS} <= titles
    settings = (tmp_path / "settings.html").read_text(encoding="utf-8")
    assert [name for name in FIELDS if f"<code>{name}</code>" not in settings] == []
    # It is read without a network: nothing is fetched from elsewhere.
    for made in tmp_path.rglob("*.html"):
        text = made.read_text(encoding="utf-8")
        assert re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"?https?:", text) == [], made


def test_docs_opens_the_site_else_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(datasets, "SITE", tmp_path / "index.html")
    assert docs() == ROOT / "README.md"
    (tmp_path / "index.html").touch()
    assert docs() == docs(no_browser=True) == tmp_path / "index.html"
    assert opened == [(ROOT / "README.md").as_uri(), (tmp_path / "index.html").as_uri()]
    (tmp_path / "index.html").unlink()
    monkeypatch.setattr(datasets, "IS_CHECKOUT", False)
    with pytest.raises(LoraError, match="without its documents"):
        docs()
