"""What all tests share: a workspace of their own, no network, how several processes divide them, and a way
for CI to insist on the browser tests."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_core.system.processes import AWHILE, VARIABLE, without_collecting
from tests import warm
from tests.faults import Nursery

TESTS = Path(__file__).parent
OWN_PACKAGES = "LORA_EASEL_OWN_PACKAGES"
"""A folder with packages that a part of the tests needs."""
REQUIRE_BROWSER = "LORA_EASEL_REQUIRE_BROWSER"
# Folders whose tests share set-ups that take long: one process runs all of such a folder.
TOGETHER = ("tests/browser/",)

# Before anything imports gradio or huggingface_hub, which read these once.
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
# What a run does on a full device hangs on this package; tests of it take it back.
sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
# Before torch is imported: on a machine that has other work too, these threads wait like the trainer's.
os.environ.setdefault(VARIABLE, AWHILE)
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several, each with a core for itself and its child processes
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# The processes that divide the tests inherit it, and share the servers.
warm.set_up()


@pytest.fixture(scope="session", autouse=True)
def own_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps the person's own workspace out of reach, of child processes too."""
    folder = tmp_path_factory.mktemp("workspace")
    os.environ["LORA_EASEL_HOME"] = str(folder)
    os.environ.pop("LORA_EASEL_PASSWORD", None)
    return folder


@pytest.fixture(scope="session")
def nursery() -> Nursery:
    """Children with the engine imported."""
    return Nursery()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """All that is collected stays, with what the test modules import: torch, diffusers, gradio."""
    with without_collecting():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All that stands in tests/browser drives a browser. What takes long comes first, so that processes which
    divide the tests end together: the folders of TOGETHER, then the files beside this one."""
    for item in items:
        if TESTS / "browser" in item.path.parents:
            item.add_marker("browser")
    items.sort(key=lambda item: (not item.nodeid.startswith(TOGETHER), item.path.parent != TESTS))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Distribute the tests by file, and the folders of TOGETHER as one piece each."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return next((folder for folder in TOGETHER if file.startswith(folder)), file)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> object:
    """Where a browser is required, a skipped browser test has failed."""
    report = yield
    if report.skipped and os.environ.get(REQUIRE_BROWSER) and item.get_closest_marker("browser"):
        report.outcome = "failed"
        report.longrepr = f"skipped, though {REQUIRE_BROWSER} is set: {report.longrepr}"
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Where a browser is required, a whole session without a browser test has failed."""
    if (
        not os.environ.get(REQUIRE_BROWSER)
        or exitstatus != pytest.ExitCode.OK
        or session.config.args_source.name != "TESTPATHS"
    ):
        return
    # Not `session.items`: where others run the tests, this process has none.
    passed = session.config.pluginmanager.get_plugin("terminalreporter").stats.get("passed", [])
    if not any("browser" in report.keywords for report in passed):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def package() -> Any:
    """The real bitsandbytes, which is hidden above; it may be in a folder of its own."""
    hidden, own = sys.modules.pop("bitsandbytes"), os.environ.get(OWN_PACKAGES)
    with pytest.MonkeyPatch.context() as patch:
        if own:
            patch.syspath_prepend(own)
        try:
            # Since 0.50 it takes its steps on a processor too.
            return pytest.importorskip("bitsandbytes", "0.50")
        finally:
            sys.modules["bitsandbytes"] = hidden


@pytest.fixture(scope="session")
def onnxruntime() -> Any:
    """What runs taggers; it may be in the same folder."""
    with pytest.MonkeyPatch.context() as patch:
        if own := os.environ.get(OWN_PACKAGES):
            patch.syspath_prepend(own)
        return pytest.importorskip("onnxruntime", "1.20")


@pytest.fixture
def bitsandbytes(package: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    return package
