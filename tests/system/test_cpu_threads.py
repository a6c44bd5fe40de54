"""Who may spin on the processor, with real processes that are really killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_core.cli import processor_use
from lora_core.cli.parser import parse
from lora_core.system.processes import AWHILE, COMPUTES, GIVES_WAY, SLEEPS, SOON, VARIABLE

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libgomp is what Linux has")
SAY = f"""
import os, sys
from lora_core.system.processes import others_spin, limit_spinning
limit_spinning(sys.argv[1])
others = ", others compute" if others_spin() else ""
print(os.environ.get({VARIABLE!r}, "its own") + others, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path: Path):
    """Starts a process that stays, and returns it with what it has for its threads."""
    started: list[subprocess.Popen[str]] = []

    def start(kind: str, set_by_hand: str = "") -> tuple["subprocess.Popen[str]", str]:
        env = {k: v for k, v in os.environ.items() if k != VARIABLE} | {"TMPDIR": str(tmp_path)}
        env |= {VARIABLE: set_by_hand} if set_by_hand else {}
        child = subprocess.Popen(
            [sys.executable, "-c", SAY, kind],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True,
        )  # fmt: skip
        started.append(child)
        assert child.stdout is not None
        return child, child.stdout.readline().strip()

    yield start
    for child in started:
        child.kill()
        child.communicate()


def test_one_at_a_time_may_spin(start) -> None:
    assert start(SLEEPS)[1] == SOON
    assert start(GIVES_WAY)[1] == AWHILE
    first, how = start(COMPUTES)
    assert how == AWHILE
    assert start(COMPUTES)[1] == f"{SOON}, others compute"
    assert start(GIVES_WAY)[1] == f"{AWHILE}, others compute"
    first.kill()
    first.wait()
    assert start(GIVES_WAY)[1] == AWHILE
    for parents in (SOON, AWHILE):
        other, how = start(COMPUTES, parents)
        assert how == AWHILE, "what a parent of ours has set is no wish of a person"
        other.kill()
        other.wait()


def test_what_a_person_has_set_stays(start) -> None:
    assert start(SLEEPS, "77")[1] == "77"
    assert start(COMPUTES, "77")[1] == "77"


@pytest.mark.parametrize(
    ("words", "kind"),
    [(["train", "demo"], COMPUTES), (["resume", "a"], COMPUTES), (["serve"], GIVES_WAY), (["runs"], SLEEPS)],
)
def test_what_a_person_waits_for_computes(words: list[str], kind: str) -> None:
    assert processor_use(parse(words).verb) == kind
