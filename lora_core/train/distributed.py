"""Fellows: the processes that train one run together, as `accelerate launch` started them.

All that lasts is in the main process: weights, optimizer, events, files. Each step it sends the weights to
the others, every process computes its share of the rows of each micro-batch, and the gradients are added up.
Sending the weights costs what adding up the gradients does; in return no process can come to differ from
another, whatever a run does between two steps. Everything goes through accelerate, which chooses how.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object, parse_flag_from_env, reduce

from lora_core.errors import LoraError, RunError

PATIENCE = timedelta(days=1)
"""So long the others wait for a word of the main process, which encodes, validates and draws alone. A process
that dies is noticed at once; this is for a machine that vanishes without a word."""
LOST = (
    "Another process of this run ended, so the run cannot go on; what it said stands above. The last"
    " checkpoint is whole: resume the run from there."
)
Result = TypeVar("Result")


class ProcessGroup:
    """This process among those of the run.

    Attributes:
        number: of this process, 0 for the main one.
        count: of all processes.
    """

    def __init__(self) -> None:
        """Meet the others.

        Raises:
            RunError: they cannot be reached.
        """
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        self._over = True
        with self._linked():
            state = PartialState(cpu=cpu, timeout=PATIENCE)
        self._over = False
        self.number: int = state.process_index
        self.count: int = state.num_processes
        self._device = state.device

    @property
    def main(self) -> bool:
        """Whether this process leads."""
        return self.number == 0

    def share(self, rows: int) -> slice:
        """Which of the rows of a micro-batch this process computes; none where there are too few.

        The main process never has fewer than another, so that what it measures of memory holds for all.
        """
        size = -(-rows // self.count)
        return slice(min(self.number * size, rows), min((self.number + 1) * size, rows))

    def tell(self, message: object) -> None:
        """Send a message from the main process to all others."""
        with self._linked():
            broadcast_object_list([message])

    def told(self) -> Any:
        """Wait for the next message of the main process."""
        message: list[Any] = [None]
        with self._linked():
            broadcast_object_list(message)
        return message[0]

    def spread(self, numbers: torch.Tensor) -> None:
        """Give `numbers` of the main process to all others."""
        with self._linked():
            found = broadcast(numbers if self.main else torch.empty_like(numbers))
        if not self.main:
            numbers.copy_(found)

    def add_up(self, *tensors: torch.Tensor) -> None:
        """Add each tensor up over all processes, in place."""
        with self._linked():
            for tensor, found in zip(tensors, reduce(list(tensors), "sum"), strict=True):
                tensor.copy_(found)

    def agreed(self, work: Callable[[], Result]) -> Result:
        """Work that every process does its part of; none goes on where it failed in one.

        Raises:
            RunError: it failed in another process, with the sentence for it.
            RuntimeError: it failed in another process, by a defect or for want of memory, and this one leads.
            Exception: what `work` raised here.
        """
        try:
            result = work()
        except BaseException as error:
            self._compare(error)
            raise
        self._compare(None)
        return result

    def _compare(self, error: BaseException | None) -> None:
        """Tell the others of an error here, and hear of theirs; after one, all leave without another word."""
        failed = torch.tensor([float(error is not None)], device=self._device)
        self.add_up(failed)
        if not failed:
            return
        plain = isinstance(error, LoraError)
        why = "out of memory" if isinstance(error, MemoryError) else error
        said = str(error) if plain else f"{type(error).__name__}: {why}"
        word = [] if error is None else [(plain, f"Process {self.number}: {said}")]
        with self._linked():
            told: list[tuple[bool, str]] = gather_object(word)
        self._over = True
        if error is None:
            plain, sentence = told[0]
            raise RunError(sentence) if plain or not self.main else RuntimeError(sentence)

    def dismiss(self) -> None:
        """Let the other processes go, and leave them; nothing where they left already."""
        if self._over:
            return
        if self.main:
            self.tell(None)
        with self._linked():
            PartialState().destroy_process_group()

    @contextmanager
    def _linked(self) -> Iterator[None]:
        """All processes have to come through here together; where one did not, there is no link any more."""
        try:
            yield
        except BaseException as error:
            self._over = True
            if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
                raise RunError(LOST) from error
            raise


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """The processes of this run, which the main one lets go however its part ends."""
    group = ProcessGroup()
    try:
        yield group
    finally:
        group.dismiss()
