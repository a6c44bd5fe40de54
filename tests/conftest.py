"""What all tests share: a workspace of their own, no network, and a way for CI to insist on the browser
tests."""

import os
from pathlib import Path

import pytest

from lora_core.spec.processor import AWHILE, VARIABLE

REQUIRE_BROWSER = "LORA_EASEL_REQUIRE_BROWSER"

# Before anything imports gradio or huggingface_hub, which read these once.
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
# Before torch is imported: on a machine that has other work too, these threads wait like the trainer's.
os.environ.setdefault(VARIABLE, AWHILE)


@pytest.fixture(scope="session", autouse=True)
def own_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps the person's own workspace out of reach, of child processes too."""
    folder = tmp_path_factory.mktemp("workspace")
    os.environ["LORA_EASEL_HOME"] = str(folder)
    os.environ.pop("LORA_EASEL_PASSWORD", None)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All that stands in tests/browser drives a browser."""
    for item in items:
        if Path(__file__).parent / "browser" in item.path.parents:
            item.add_marker("browser")


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
    if not any(item.get_closest_marker("browser") for item in session.items):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
