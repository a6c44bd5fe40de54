"""Reads the graphics card and a process's memory, without torch.

Cards are asked in the background and rarely, because the program that answers takes a moment.
"""

import contextlib
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from lora_core.system.files import IS_CHECKOUT

FRESH_SECONDS = 4.0
ASKING_TAKES = 10.0
MEGABYTE = 2**20
PROCESSOR = "processor"
CARD_FIELDS = "name,memory.used,memory.total,driver_version,compute_cap"
OLD_FIELDS = CARD_FIELDS.removesuffix(",compute_cap")
"""Fields that drivers before 510 support."""
DRIVERS = {13: 580, 12: 525, 11: 450}
"""The oldest driver of NVIDIA's for each CUDA (RELEASE.md of github.com/pytorch/pytorch)."""
OLDEST_CAPABILITY, VOLTA, TURING = 5.0, 7.0, 7.5
REINSTALL = (
    "Run `python launch.py repair`; it installs the build that fits."
    if IS_CHECKOUT
    else "Install into this environment the build of PyTorch that pytorch.org names for this computer."
)


@dataclass(frozen=True)
class Card:
    """A graphics card.

    Attributes:
        name: as its driver calls it.
        used: bytes taken by everybody.
        total: bytes that it has.
        generation: NVIDIA's compute capability; 0 elsewhere.
        by_process: process to bytes, where known.
        maker: "NVIDIA" or "AMD".
        driver: driver version, "" if unknown.
        device: as `train.device` names it, such as "cuda:0".
        hidden: whether CUDA_VISIBLE_DEVICES keeps PyTorch from seeing it.
    """

    name: str
    used: int
    total: int
    generation: float = 0.0
    by_process: dict[int, int] = field(default_factory=dict)
    maker: str = "NVIDIA"
    driver: str = ""
    device: str = ""
    hidden: bool = False

    def free(self, *mine: int | None) -> int:
        """Bytes that are free once the processes `mine` have ended."""
        return self.total - self.used + sum(self.by_process.get(pid or 0, 0) for pid in mine)


@dataclass(frozen=True)
class Gpu:
    """The GPU's side of a forecast: bytes that no other process holds, None where that is not known, and
    whether `train.precision` = auto means fp32 on it, as `models.device.dtype_of` says."""

    free: int | None = None
    auto_is_fp32: bool = False


class Hardware:
    """The machine's cards, queried at most every few seconds."""

    def __init__(self, device: Callable[[], str] = str, wanted: Callable[[], str] = lambda: "auto") -> None:
        """The driver is queried on first use.

        Args:
            device: gives the kind of device that PyTorch computes on, "" while that is not known.
            wanted: gives the value of `train.device`.
        """
        self._device = device
        self._wanted = wanted
        self._cards: list[Card] = []
        self._asked = 0.0
        self.known = False
        """Whether an answer has come, so that no card means that there is none."""
        self._lock = threading.Lock()

    def card(self, device: str | None = None, hidden: bool = False) -> Card | None:
        """The card that a run takes, by default with the wanted `train.device`, as it was a moment ago; None
        where there is none or no answer has come yet. `hidden`: also one that is."""
        with self._lock:
            due = time.monotonic() - self._asked > FRESH_SECONDS or not self._asked
            # A machine without a card grows none while the window is open.
            if due and not (self.known and not self._cards):
                self._asked = time.monotonic()
                threading.Thread(target=self.look, daemon=True, name="hardware").start()
        return choose_card(self._cards, self._wanted() if device is None else device, hidden)

    def look(self) -> None:
        """Ask now."""
        self._cards = find_cards()
        self.known = True

    @property
    def device(self) -> str:
        """The device that a run would train on, if known."""
        card = self.card()
        return card.name if card else PROCESSOR

    @property
    def has_gpu(self) -> bool:
        """Whether something faster than the processor is known to be there, and PyTorch can use it."""
        if self._device() == "cpu":
            return False
        return self.card() is not None or (sys.platform == "darwin" and platform.machine() == "arm64")

    def gpu(self, free: int | None) -> Gpu | None:
        """The device of a run with `free` bytes free, if known; None for the CPU."""
        card = self.card()
        if not self.has_gpu:
            return None
        old = card is not None and card.generation and not has_tensor_cores(card.name, card.generation)
        return Gpu(free, card is None or bool(old))


def has_tensor_cores(name: str, capability: float) -> bool:
    """Whether an NVIDIA card multiplies fp16 in tensor cores: Volta and later, except GTX 16xx and its
    siblings (MX450, T500 to T2000), which report Turing's 7.5 and whose fp16 convolutions may return NaN."""
    if capability == TURING:
        return re.search(r"\bRTX\b|\bT4G?\b", name) is not None
    return capability >= VOLTA


def find_card(device: str = "auto", hidden: bool = False) -> Card | None:
    """The card that a run with this `train.device` takes, asked of its driver now; `hidden`: also one that
    is."""
    return choose_card(find_cards(), device, hidden)


def choose_card(cards: Sequence[Card], device: str, hidden: bool = False) -> Card | None:
    """The card that a run with this `train.device` takes: the named one, else the newest; of equal ones, the
    largest. None where it takes none of them, or they are hidden and `hidden` is not set."""
    cards = [card for card in cards if hidden or not card.hidden]
    if device in ("auto", "cuda"):
        return max(cards, key=lambda card: (card.generation, card.total), default=None)
    return next((card for card in cards if card.device == device), None)


def find_cards() -> list[Card]:
    """The cards of one maker in the order of their numbers: those that CUDA_VISIBLE_DEVICES names by number,
    up to the first without a card; all, hidden, where that leaves none; all, where it names them by id."""
    cards: list[Card] = []
    if tool := shutil.which("nvidia-smi"):
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            apps = parse_apps(_run_command(tool, "--query-compute-apps=pid,used_memory"))
            cards = [replace(card, by_process=apps) for card in list_nvidia_cards(tool)]
    cards = cards or list_amd_cards()
    names = [one.strip() for one in os.environ.get("CUDA_VISIBLE_DEVICES", "GPU-").split(",")]
    known = itertools.takewhile(lambda one: one.isdecimal() and int(one) < len(cards), names)
    named = [cards[int(one)] for one in known]
    hidden = not named and not names[0].startswith(("GPU-", "MIG-"))
    shown = enumerate(named or cards)
    return [replace(card, device=f"cuda:{number}", hidden=hidden) for number, card in shown]


def list_nvidia_cards(tool: str) -> list[Card]:
    """All cards of NVIDIA's, in the order of its tool.

    Raises:
        OSError, ValueError, subprocess.SubprocessError: the tool does not answer, or in another way.
    """
    try:
        lines = _run_command(tool, f"--query-gpu={CARD_FIELDS}").splitlines()
    except subprocess.CalledProcessError:
        lines = [f"{line}, " for line in _run_command(tool, f"--query-gpu={OLD_FIELDS}").splitlines()]
    return [parse_card(line) for line in lines]


def _run_command(tool: str, query: str) -> str:
    hidden = getattr(subprocess, "CREATE_NO_WINDOW", 0)
    return subprocess.run(
        [tool, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=ASKING_TAKES,
        check=True, creationflags=hidden,
    ).stdout  # fmt: skip


def parse_card(line: str) -> Card:
    """A card from one line of comma-separated values in the order of `CARD_FIELDS`.

    Raises:
        ValueError: the line is another.
    """
    name, used, total, driver, generation = (part.strip() for part in line.rsplit(",", 4))
    return Card(name, int(used) * MEGABYTE, int(total) * MEGABYTE, _number(generation), driver=driver)


def parse_apps(text: str) -> dict[int, int]:
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


def list_amd_cards(devices: Path = Path("/sys/class/drm")) -> list[Card]:
    """The cards whose driver reports memory in sysfs, as AMD's does on Linux."""
    found = []
    for total in sorted(devices.glob("card*/device/mem_info_vram_total")):
        with contextlib.suppress(OSError, ValueError):
            used = int((total.parent / "mem_info_vram_used").read_text())
            found.append(Card("AMD graphics card", used, int(total.read_text()), maker="AMD"))
    return found


def card_problem(card: Card, found: Mapping[str, str], system: str = platform.system()) -> str:
    """Why PyTorch does not use an installed card, and the fix, in two sentences.

    Args:
        card: from its driver.
        found: `torch`, `build` and `lacks_code`, from `describe_torch`.
        system: as `platform.system()`.
    """
    build = found.get("build", "")
    kind, _, version = build.partition(" ")
    why, repair = _why_unused(card, kind, version, found.get("lacks_code", ""), system)
    article = "an" if card.name.startswith(("NVIDIA", "AMD", "RTX")) else "a"
    torch = f"{found.get('torch', '')}, built for {build or 'another device'}"
    return f"There is {article} {card.name}, but this PyTorch ({torch}) cannot use it: {why}. {repair}"


def _why_unused(card: Card, kind: str, version: str, lacks_code: str, system: str) -> tuple[str, str]:
    driver = int(_number(card.driver.partition(".")[0]))
    needed = DRIVERS.get(int(_number(version.partition(".")[0])), 0)
    capability = _number(lacks_code) or card.generation
    if 0 < capability < OLDEST_CAPABILITY:
        return (
            f"its compute capability {capability} is below {OLDEST_CAPABILITY}, which no build supports",
            "The processor trains; a newer card is needed to change that.",
        )
    if card.maker == "AMD" and system == "Windows":
        return "PyTorch's index has no build for AMD cards on Windows", "Train on Linux to use the card."
    if kind != {"NVIDIA": "CUDA", "AMD": "ROCm"}[card.maker]:
        return "it is the build for other devices", REINSTALL
    if card.hidden:
        return "the environment variable CUDA_VISIBLE_DEVICES hides it", "Unset it and start again."
    if 0 < driver < needed:
        return (
            f"it needs driver {needed} or newer, and this is {card.driver}",
            f"Update the driver from nvidia.com, or: {REINSTALL}",
        )
    if lacks_code:
        return f"it has no code for compute capability {lacks_code}", REINSTALL
    if kind == "ROCm":
        return (
            "this user may not open /dev/kfd, or ROCm does not know the card",
            "Add the user to the groups render and video (`sudo usermod -aG render,video $USER`), log in"
            " again, and see whether AMD's list of supported cards names it.",
        )
    return "its driver does not answer", "Restart the computer; if that does not help, reinstall the driver."


def resident_bytes(process: psutil.Process | None) -> int | None:
    """Memory of a process, or None if it has ended."""
    if process is None:
        return None
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return None
