from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lora_core.runs.folder import RunFolder
from tests.train.runs import SAMPLED, Toy, result, toy, trained


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared_toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def unbroken(shared_toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunFolder]:
    """Trains a run without a break, once for each kind of settings: `unbroken(tag, **changes)`."""
    place = Toy(shared_toy.base, shared_toy.pictures, tmp_path_factory.mktemp("unbroken"))
    known: dict[str, RunFolder] = {}

    def made(tag: str = "", **changes: object) -> RunFolder:
        key = f"{tag} {sorted(changes.items())}"
        if key not in known:
            known[key] = place.run(f"whole-{len(known)}", **changes)
            with one_thread():
                trained(known[key])
        return known[key]

    return made


@pytest.fixture
def wanted(unbroken: Callable[..., RunFolder]) -> dict[str, dict[str, bytes]]:
    """What the unbroken run that does everything leaves."""
    return result(unbroken(**SAMPLED))


@pytest.fixture
def own_toy(shared_toy: Toy, tmp_path: Path) -> Iterator[Toy]:
    """The same base and pictures, with a workspace of the test's own; one thread, as it computes next to
    nothing."""
    with one_thread():
        yield Toy(shared_toy.base, shared_toy.pictures, tmp_path / "home")
