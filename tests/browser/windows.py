"""Windows of their own process on workspaces of their own, as the browser tests drive them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import IO, Any

import pytest

from tests.waiting import PATIENCE
from tests.warm import WARM, Child, captured

ROOT = Path(__file__).resolve().parents[2]


class Window:
    """The server, which can be killed and started again on the same workspace.

    Args:
        workspace: where it keeps everything.
        home: the home folder of its person, where it looks for other tools.
        environment: what else is set for its process.
    """

    def __init__(
        self, workspace: Path, home: Path | None = None, environment: dict[str, str] | None = None
    ) -> None:
        self.workspace = workspace
        self.home = home
        self.environment = environment or {}
        self.project = workspace / "projects" / "default"
        self.process: subprocess.Popen[str] | Child | None = None
        self.output: IO[str] | None = None
        self.address = ""
        self.port = 0

    def launch(self) -> None:
        code = "import sys, launch; sys.exit(launch.open_app(sys.argv[1:]))"
        options = ["--no-browser", "--port", str(self.port), "--workspace", str(self.workspace)]
        home = {"HOME": str(self.home), "USERPROFILE": str(self.home)} if self.home else {}
        words = ["-c", code, *options]
        environment = {**os.environ, **home, **self.environment, "PYTHONUNBUFFERED": "1"}
        if WARM and not self.environment:
            self.process, self.output = captured(
                1, "window", words, environment=environment, folder=str(ROOT)
            )
            return
        # What else is set may be for libraries, which read it while they are imported.
        self.process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.output = self.process.stdout

    def wait_ready(self) -> str:
        """Its address, once it answers."""
        assert self.process is not None
        assert self.output is not None
        for line in self.output:
            if line.startswith("Ready at "):
                self.address = line.removeprefix("Ready at ").strip()
                return self.address
        raise AssertionError(f"the window ended with {self.process.wait()}")

    def start(self) -> str:
        self.launch()
        return self.wait_ready()

    def stop(self, how: signal.Signals = signal.SIGINT) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        code = self.process.wait(PATIENCE)
        self.close_output()
        return code

    def close_output(self) -> None:
        """Read no more of what it says."""
        if self.output is not None:
            self.output.close()

    def open_project(self, key: str, draft: dict[str, Any]) -> None:
        """Open a project of its own, as the picker does; nothing of another shows in it."""
        self.project = self.workspace / "projects" / key
        keep_draft(self.project, draft)
        asked = urllib.request.Request(
            f"{self.address}/easel/projects",
            json.dumps({"do": "open", "project": key}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked) as answer:
            assert "problem" not in json.load(answer)

    def runs(self) -> list[Path]:
        """The folders of the open project's runs."""
        runs = (self.workspace / "runs").glob("[!.]*")
        return [
            run
            for run in runs
            if json.loads((run / "project.json").read_text())["project"] == self.project.name
        ]


def keep_draft(project: Path, said: dict[str, Any]) -> None:
    """The unsent form as a page would have left it."""
    project.mkdir(parents=True, exist_ok=True)
    (project / "draft.json").write_text(json.dumps(said))


def close(window: Window) -> None:
    """End a window whose test is over, and its runs."""
    if window.process is not None and window.process.poll() is None:
        window.stop()
    end_runs(window.workspace)


def end_runs(workspace: Path) -> None:
    """Runs outlive the window by design; those of a test must not outlive the test."""
    from lora_core.runs.folder import all_runs

    for run in all_runs(workspace):
        process = run.live_process()
        if process is not None:
            with contextlib.suppress(Exception):
                process.kill()


class Spares:
    """Windows for tests that want one of their own; the next starts while a test runs, so that few wait."""

    def __init__(self, home: Path, folders: pytest.TempPathFactory, most: int) -> None:
        """`most` is how many will be wanted at most."""
        self.home, self.folders, self.left = home, folders, most
        self.next: Window | None = None

    def take(self) -> Window:
        window = self.next or self._launched()
        self.left -= 1
        self.next = self._launched() if self.left > 0 else None
        window.wait_ready()
        return window

    def _launched(self) -> Window:
        made = Window(self.folders.mktemp("own") / "work space é", self.home)
        made.launch()
        return made
