"""A base that a user named: what its files say, or the sentence why it cannot be used."""

import functools
import time
from dataclasses import dataclass
from pathlib import Path

from lora_core.spec.base_facts import BaseFacts, base_facts, is_remote
from lora_core.spec.errors import ModelFileError
from lora_core.spec.families import Family
from lora_core.spec.paths import CLIP_TOKENIZER

EMBEDDED = "demo"
# What pictures are shown at while a base cannot be read.
USUAL_RESOLUTION, USUAL_MULTIPLE = 512, 64
# Pages ask each second; files beside a base, such as a config, are looked at again after so long.
FRESH_SECONDS = 20


@dataclass(frozen=True)
class Base:
    """A base that a person named.

    Attributes:
        name: as it was typed.
        facts: what its files say, or None where it cannot be used.
        problem: why not, in a sentence.
        remote: whether it is one of the hub's that is not on this computer.
    """

    name: str
    facts: BaseFacts | None
    problem: str = ""
    remote: bool = False

    @property
    def family(self) -> Family | None:
        """Its row, where that is known before it is loaded."""
        return self.facts.family if self.facts else None

    @property
    def embedded(self) -> bool:
        """Whether it is the one that comes with the program."""
        return self.name in (EMBEDDED, "")

    @property
    def resolution(self) -> int:
        """The side in pixels that it was trained at."""
        return self.facts.resolution if self.facts else USUAL_RESOLUTION

    @property
    def multiple(self) -> int:
        """What sides of pictures must be divisible by, in pixels."""
        return self.facts.multiple if self.facts else USUAL_MULTIPLE

    @property
    def tokenizer(self) -> Path:
        """The folder of its (first) tokenizer."""
        return self.facts.tokenizer if self.facts else CLIP_TOKENIZER

    @property
    def guessed(self) -> bool:
        """Whether how it predicts is a guess."""
        return self.facts is not None and self.facts.guessed

    @property
    def sentence(self) -> str:
        """What a person should know of it, in one line."""
        return self.facts.sentence if self.facts else self.problem


def chosen_base(name: str, prediction: str = "auto", zero_snr: str = "auto") -> Base:
    """What is known of the base that a person named.

    Args:
        name: `demo`, a diffusers folder, a single file, or a hub id in the local cache.
        prediction: what was set, or "auto".
        zero_snr: likewise.
    """
    name = name.strip().strip('"')
    return _base(name, prediction, zero_snr, _changed_at(name), int(time.monotonic() / FRESH_SECONDS))


def _changed_at(name: str) -> tuple[int, int]:
    try:
        found = Path(name).expanduser().stat()
    except (OSError, ValueError):
        return 0, 0
    return found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=16)
def _base(name: str, prediction: str, zero_snr: str, changed_at: tuple[int, int], period: int) -> Base:
    try:
        return Base(name, base_facts(name, prediction, zero_snr))
    except ModelFileError as error:
        return Base(name, None, str(error), is_remote(name))


def forget_bases() -> None:
    """Look at the files of every base again."""
    _base.cache_clear()
