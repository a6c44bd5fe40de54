"""Imports without the garbage collector: it is on again afterwards, whatever happened, and has less to do."""

import subprocess
import sys

CODE = """
import gc
from lora_core.system.processes import without_collecting

with without_collecting():
    assert not gc.isenabled()
    import email.mime.text
assert gc.isenabled()
frozen = gc.get_freeze_count()
assert frozen > 1000, frozen
try:
    with without_collecting():
        raise KeyboardInterrupt
except KeyboardInterrupt:
    pass
assert gc.isenabled()
assert gc.get_freeze_count() <= frozen
gc.disable()
with without_collecting():
    pass
assert not gc.isenabled()
"""


def test_the_collector_is_as_it_was_before() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True)
