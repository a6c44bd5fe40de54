"""What the machine has and what is taken of it: its graphics card and a trainer's memory, told without torch.

A card is asked in the background and seldom: the program that answers takes a moment each time.
"""

import contextlib
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

FRESH_SECONDS = 4.0
ASKING_TAKES = 10.0
MEGABYTE = 2**20
PROCESSOR = "processor"
CARD_FIELDS = "name,memory.used,memory.total,power.max_limit,compute_cap"


@dataclass(frozen=True)
class Card:
    """A graphics card.

    Attributes:
        name: as its driver calls it.
        used: bytes taken by everybody.
        total: bytes that it has.
        watts: the most it may draw; 0 where that is not told.
        generation: NVIDIA's compute capability; 0 elsewhere.
        by_process: process to bytes that it takes, where that is told.
    """

    name: str
    used: int
    total: int
    watts: float = 0.0
    generation: float = 0.0
    by_process: dict[int, int] = field(default_factory=dict)


class Hardware:
    """The machine's card, looked at anew at most every few seconds."""

    def __init__(self, device: Callable[[], str] = str) -> None:
        """Nothing is asked before the first look.

        Args:
            device: gives the kind of device that PyTorch computes on, "" while that is not known.
        """
        self._device = device
        self._card: Card | None = None
        self._asked = 0.0
        self.known = False
        """Whether an answer has come, so that no card means that there is none."""
        self._lock = threading.Lock()

    def card(self) -> Card | None:
        """The first card as it was a moment ago; None where there is none or no answer has come yet."""
        with self._lock:
            due = time.monotonic() - self._asked > FRESH_SECONDS or not self._asked
            # A machine without a card grows none while the window is open.
            if due and not (self.known and self._card is None):
                self._asked = time.monotonic()
                threading.Thread(target=self.look, daemon=True, name="hardware").start()
        return self._card

    def look(self) -> None:
        """Ask now."""
        self._card = nvidia_card() or amd_card()
        self.known = True

    @property
    def device(self) -> str:
        """What a run would train on, as far as it is known."""
        card = self.card()
        return card.name if card else PROCESSOR

    @property
    def has_gpu(self) -> bool:
        """Whether something faster than the processor is known to be there, and PyTorch can use it."""
        if self._device() == "cpu":
            return False
        return self._card is not None or (sys.platform == "darwin" and platform.machine() == "arm64")


def nvidia_card() -> Card | None:
    """The first card as NVIDIA's own tool tells it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    with contextlib.suppress(OSError, ValueError, IndexError, subprocess.SubprocessError):
        line = _said(tool, f"--query-gpu={CARD_FIELDS}").splitlines()[0]
        found = parsed_card(line)
        apps = _said(tool, "--query-compute-apps=pid,used_memory")
        return Card(found.name, found.used, found.total, found.watts, found.generation, parsed_apps(apps))
    return None


def _said(tool: str, query: str) -> str:
    done = subprocess.run(
        [tool, query, "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=ASKING_TAKES,
        check=True,
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
    )
    return str(done.stdout)


def parsed_card(line: str) -> Card:
    """A card from one line of comma-separated values in the order of `CARD_FIELDS`.

    Raises:
        ValueError: the line is another.
    """
    name, used, total, watts, generation = (part.strip() for part in line.rsplit(",", 4))
    return Card(name, int(used) * MEGABYTE, int(total) * MEGABYTE, _number(watts), _number(generation))


def parsed_apps(text: str) -> dict[int, int]:
    """Process to bytes; lines that hold no number, as on Windows, are left out."""
    found = {}
    for line in text.splitlines():
        pid, _, used = line.partition(",")
        if pid.strip().isdigit() and used.strip().isdigit():
            found[int(pid)] = int(used) * MEGABYTE
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def amd_card(devices: Path = Path("/sys/class/drm")) -> Card | None:
    """The largest card whose driver tells its memory in files, as AMD's does on Linux."""
    found = []
    for total in devices.glob("card*/device/mem_info_vram_total"):
        with contextlib.suppress(OSError, ValueError):
            used = int((total.parent / "mem_info_vram_used").read_text())
            found.append(Card("AMD graphics card", used, int(total.read_text())))
    return max(found, key=lambda card: card.total, default=None)


def resident_bytes(process: psutil.Process | None) -> int | None:
    """Memory that a process holds, or None where it is gone."""
    if process is None:
        return None
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return None
