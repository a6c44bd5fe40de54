from collections.abc import Iterator

import pytest

from tests.train.conftest import one_thread


@pytest.fixture(scope="module")
def single_thread() -> Iterator[None]:
    with one_thread():
        yield
