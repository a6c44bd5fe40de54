"""The live stream: a page gets each change once and in order, whatever it missed, and nothing while nothing
changes."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app import live as module
from app import main
from app.live import LiveStream
from app.state import AppState
from tests.waiting import PATIENCE, run_async

NEVER = 0.3
"""Seconds in which what must not come would have come."""


@pytest.fixture
def state() -> dict[str, str]:
    return {"run-bar": "ready", "card": "<p>one</p>"}


@pytest.fixture
def live(state: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> LiveStream:
    # Only what is woken is looked at, so that nothing depends on the time a test takes.
    for name in ("IDLE_EVERY", "LIVE_EVERY"):
        monkeypatch.setattr(module, name, 1000.0)
    made = LiveStream()
    made.look = lambda: (dict(state), False)
    return made


class OpenPage:
    """A page that follows the stream."""

    def __init__(self, events: AsyncIterator[str]) -> None:
        self.events, self.seen = events, ""

    async def next(self) -> dict[str, Any]:
        """The parts that the next event brings."""
        async for text in self.events:
            lines = dict(line.split(": ", 1) for line in text.strip().splitlines())
            self.seen = lines.get("id", self.seen)
            if "data" in lines:
                return dict(json.loads(lines["data"]))
        raise AssertionError("the stream has ended")

    async def stays_quiet(self) -> asyncio.Task[dict[str, Any]]:
        """Asserts that nothing comes; returns the task that still waits for it."""
        waiting = asyncio.ensure_future(self.next())
        await asyncio.wait([waiting], timeout=NEVER)
        assert not waiting.done()
        return waiting


def run(steps: Callable[[], Any]) -> None:
    run_async(steps())


def test_a_page_gets_all_parts_once_and_then_what_changes(live: LiveStream, state: dict[str, str]) -> None:
    async def steps() -> None:
        page, other = OpenPage(live.events("")), OpenPage(live.events(""))
        assert await page.next() == state
        assert await other.next() == state
        waiting = [await page.stays_quiet(), await other.stays_quiet()]
        state["card"] = "<p>two</p>"
        live.wake()
        assert await asyncio.gather(*waiting) == 2 * [{"card": "<p>two</p>"}]

    run(steps)


def test_a_page_that_comes_back_gets_what_it_missed(live: LiveStream, state: dict[str, str]) -> None:
    async def steps() -> None:
        page = OpenPage(live.events(""))
        await page.next()
        state["card"] = "<p>two</p>"
        again = OpenPage(live.events(page.seen))
        assert await again.next() == {"card": "<p>two</p>"}
        # The server was started anew, or what the page says is nothing that it was told.
        for seen in ("0000-1", "nonsense", "-", f"{page.seen}x"):
            assert await OpenPage(live.events(seen)).next() == state

    run(steps)


def test_a_hidden_page_gets_the_header_alone_and_catches_up_later(
    live: LiveStream, state: dict[str, str]
) -> None:
    async def steps() -> None:
        page = OpenPage(live.events(""))
        await page.next()
        state.update({"run-bar": "34%", "card": "<p>two</p>"})
        hidden = OpenPage(live.events(page.seen, hidden=True))
        assert await hidden.next() == {"run-bar": "34%"}
        assert hidden.seen == ""
        with pytest.raises(AssertionError, match="ended"):
            await hidden.next()
        assert await OpenPage(live.events(page.seen)).next() == state

    run(steps)


def test_work_under_way_is_followed_closely_and_its_end_shows_everywhere(
    live: LiveStream, state: dict[str, str]
) -> None:
    work = {"state": "idle", "done": 0}
    live.feeds["tool"] = lambda: dict(work)

    async def steps() -> None:
        page = OpenPage(live.events(""))
        assert (await page.next())["tool"] == work
        waiting = await page.stays_quiet()
        work.update(state="working")
        live.wake()
        assert await waiting == {"tool": work}
        # Nobody wakes it: it looks by itself, and only at the work.
        state["card"] = "<p>result</p>"
        work.update(done=1)
        assert await page.next() == {"tool": work}
        work.update(state="done")
        assert await page.next() == {"tool": work, "card": "<p>result</p>"}

    run(steps)


def test_looks_never_overtake_each_other(live: LiveStream, state: dict[str, str]) -> None:
    """A look that takes long, and one that is wished for meanwhile: the later one is what stays."""
    slow, begun = threading.Event(), threading.Event()

    def look() -> tuple[dict[str, str], bool]:
        found = dict(state)
        begun.set()
        assert slow.wait(PATIENCE)
        return found, False

    live.look = look

    async def steps() -> None:
        page, other = OpenPage(live.events("")), OpenPage(live.events(""))
        first, second = asyncio.ensure_future(page.next()), asyncio.ensure_future(other.next())
        await asyncio.to_thread(begun.wait)
        state["card"] = "<p>two</p>"
        live.wake()
        slow.set()
        seen = [await first, await second]
        for each, got in ((page, seen[0]), (other, seen[1])):
            card = got["card"]
            while card != "<p>two</p>":
                card = (await each.next())["card"]
            await each.stays_quiet()

    run(steps)


def test_a_look_that_fails_ends_no_page(live: LiveStream, state: dict[str, str], caplog: Any) -> None:
    failed = threading.Event()

    def fails() -> tuple[dict[str, str], bool]:
        failed.set()
        raise ValueError("a fault")

    async def steps() -> None:
        page = OpenPage(live.events(""))
        assert await page.next() == state
        look, live.look = live.look, fails
        state["card"] = "<p>two</p>"
        live.wake()
        waiting = await page.stays_quiet()
        assert await asyncio.to_thread(failed.wait, PATIENCE)
        live.look = look
        live.wake()
        assert await waiting == {"card": "<p>two</p>"}

    run(steps)
    assert "ValueError: a fault" in caplog.text


def test_every_change_by_a_request_wakes_the_pages(app_state: AppState) -> None:
    client = TestClient(main.build_app(app_state, ["testserver"]))
    woken: list[bool] = []
    app_state.live.wake = lambda: woken.append(True)  # type: ignore[method-assign]
    client.get("/easel/dataset")
    assert woken == []
    client.post("/easel/tokens", json={"text": "a"})
    assert woken == [True]
    answer = client.get("/easel/live?hidden=1")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert json.loads(answer.text.split("data: ")[1])["run-bar"].startswith("<div")
    app_state.close()
