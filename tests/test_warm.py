"""The processes that tests fork: those who order one may be killed at any moment."""

import json
import os
import socket

import pytest

from tests import warm

pytestmark = pytest.mark.skipif(not warm.WARM, reason="no forks there")


def test_orders_of_the_killed_end_no_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    order = {"words": ["-c", "pass"], "folder": os.getcwd(), "environment": dict(os.environ)}
    text = json.dumps(order).encode()
    for sent in (b"", text[:9], text):
        with warm._connected("engine", {}) as connection, open(os.devnull) as nothing:
            if sent:
                socket.send_fds(connection, [len(text).to_bytes(8)], [nothing.fileno()] * 3)
                connection.sendall(sent)
    child = warm.Child("engine", ["-c", "import sys; sys.exit(7)"])
    assert child.wait() == 7
