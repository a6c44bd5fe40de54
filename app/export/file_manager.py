"""Shows a file in the file manager of this computer.

Only for files that the window named to a page, and only if the page is on this computer too. No shell is
involved. Where it cannot work, the path can be copied and the reason is given.
"""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from app.templates import _, render
from lora_core.errors import RunError
from lora_core.system.processes import detached

SHARED = "This window is open to other computers, so it starts no file manager; copy the path."
SECONDS = 5.0


class FileManager:
    """Shows files that the window has named."""

    def __init__(self) -> None:
        """Start without any named file."""
        self.shared = False
        """Whether the window listens to other computers."""
        self._named: set[str] = set()

    @property
    def problem(self) -> str:
        """Why no file can be shown, in a sentence; "" where one can."""
        return SHARED if self.shared else lacking(sys.platform, os.environ)

    def place(self, file: object, words: str) -> str:
        """A file's location, with buttons to show it and to copy the path."""
        self._named.add(str(file))
        return render("export/place.html", file=file, words=words, problem=self.problem)

    def show(self, name: str) -> None:
        """Open the folder of a file with the file selected, where the system can select one.

        Raises:
            RunError: the window has not named it, it is gone, or no file manager can be started.
        """
        file = Path(name)
        if name not in self._named:
            raise RunError(_("This file was not written by the window, so it is not shown."))
        if self.problem:
            raise RunError(self.problem)
        if not file.exists():
            raise RunError(_("{file} no longer exists.", file=file))
        threading.Thread(target=_run, args=(commands(file, sys.platform),), daemon=True).start()


def lacking(platform: str, environment: Mapping[str, str]) -> str:
    """Why no file manager can be started, in a sentence; "" where one can."""
    if platform in ("darwin", "win32"):
        return ""
    if not environment.get("DISPLAY") and not environment.get("WAYLAND_DISPLAY"):
        return _("No desktop session is running; copy the path.")
    if not shutil.which("dbus-send") and not shutil.which("xdg-open"):
        return _("No file manager was found (dbus-send or xdg-open); copy the path.")
    return ""


def commands(file: Path, platform: str) -> list[list[str]]:
    """What to run until one succeeds."""
    if platform == "darwin":
        return [["open", "-R", str(file)]]
    if platform == "win32":
        # Explorer returns 1 even on success.
        return [["explorer", "/select,", str(file)]]
    # Percent-encoded: dbus-send splits at commas.
    ask = ["dbus-send", "--session", "--print-reply", "--dest=org.freedesktop.FileManager1"]
    ask += ["/org/freedesktop/FileManager1", "org.freedesktop.FileManager1.ShowItems"]
    ask += [f"array:string:{file.as_uri()}", "string:"]
    return [ask, ["xdg-open", str(file.parent)]]


def _run(tries: list[list[str]]) -> None:
    for command in tries:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                **detached(),
            )
            if process.wait(SECONDS) == 0:
                return
        except subprocess.TimeoutExpired:
            # Some file managers stay in the foreground.
            return
        except OSError:
            continue
