from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.training.runs import Toy, toy


@pytest.fixture(scope="session")
def shared_toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def own_toy(shared_toy: Toy, tmp_path: Path) -> Iterator[Toy]:
    """The same base and pictures, with a workspace of the test's own; one thread, as it computes next to
    nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Toy(shared_toy.base, shared_toy.pictures, tmp_path / "home")
    torch.set_num_threads(threads)
