"""Bases of the hub that are not on this computer: how large they are, and the download that is under way.

Both run in threads of the window; nothing that they import loads torch. What has arrived stays in the cache,
so a download that was cancelled, or ended with the window, is continued.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from lora_core.errors import LoraError, RunError
from lora_core.model_files.detect import clear_base_cache
from lora_core.model_files.hub import Download, DownloadCancelled, download, find_download


@dataclass
class DownloadOffer:
    """A base of the hub.

    Attributes:
        repo: the hub id.
        state: "asking" for its size, "offered", "downloading", "done" or "failed".
        found: its files, once the hub has named them.
        here: bytes that are on this computer.
        problem: why the last attempt failed, or "".
    """

    repo: str
    state: str = "asking"
    found: Download | None = None
    here: int = 0
    problem: str = ""


class Downloads:
    """What is known of each base that was asked about."""

    def __init__(self) -> None:
        """The hub is asked nothing before a base of it is chosen."""
        self.finished: Callable[[str], None] = lambda repo: None
        """Told of each base that has arrived."""
        self.arrived = 0
        """How many have, each counted once `finished` was told of it."""
        self._offers: dict[str, DownloadOffer] = {}
        self._lock = threading.Lock()
        self._cancelled = threading.Event()

    @property
    def active(self) -> bool:
        """Whether a question or a download is under way."""
        return any(offer.state in ("asking", "downloading") for offer in list(self._offers.values()))

    def offer(self, repo: str) -> DownloadOffer:
        """What is known of a base; the hub is asked where that is nothing yet."""
        with self._lock:
            known = self._offers.get(repo)
            if known is not None and known.state != "done":
                return known
            made = self._offers[repo] = DownloadOffer(repo)
        self._begin(made, self._ask)
        return made

    def ask_again(self, repo: str) -> None:
        """Ask the hub again, where it did not answer."""
        with self._lock:
            known = self._offers.get(repo)
            if known is not None and known.state == "failed":
                del self._offers[repo]
        self.offer(repo)

    def start(self, repo: str) -> None:
        """Begin or continue a download.

        Raises:
            RunError: another one is under way, or the hub has not said yet how large it is.
        """
        with self._lock:
            busy = next((one.repo for one in self._offers.values() if one.state == "downloading"), "")
            if busy:
                raise RunError(f"{busy} is being downloaded; wait for it, or cancel it.")
            offer = self._offers.get(repo)
            if offer is None or offer.found is None:
                raise RunError(f"The hub has not said yet how large {repo} is.")
            offer.state, offer.problem = "downloading", ""
            self._cancelled.clear()
        self._begin(offer, self._download)

    def cancel(self) -> None:
        """End the download that is under way; what has arrived stays."""
        self._cancelled.set()

    def _begin(self, offer: DownloadOffer, work: Callable[[DownloadOffer], None]) -> None:
        threading.Thread(target=work, args=(offer,), daemon=True, name="hub").start()

    def _ask(self, offer: DownloadOffer) -> None:
        try:
            found = find_download(offer.repo)
        except LoraError as error:
            offer.problem, offer.state = str(error), "failed"
            return
        offer.found, offer.here, offer.state = found, found.here, "offered"

    def _download(self, offer: DownloadOffer) -> None:
        assert offer.found is not None

        def progress(here: int, size: int) -> None:
            offer.here = here

        try:
            download(offer.found, progress, self._cancelled.is_set)
        except DownloadCancelled:
            offer.state = "offered"
        except LoraError as error:
            offer.problem, offer.state = str(error), "offered"
        else:
            clear_base_cache()
            self.finished(offer.repo)
            self.arrived += 1
            offer.state = "done"
