"""App state over a workspace of its own, and pictures to put on it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from app.page import TABS
from app.routes import add_routes
from app.state import AppState
from app.top_bar import add_project_routes

Say = Callable[..., dict[str, Any]]


@pytest.fixture
def app_state(tmp_path: Path) -> AppState:
    workspace = tmp_path / "work space é"
    workspace.mkdir()
    return AppState(workspace, worker_command=["no-such-program"])


@pytest.fixture
def pictures(app_state: AppState) -> list[Path]:
    """Three pictures in the project, the last without a caption."""
    made = []
    for index, size in enumerate([(160, 160), (300, 200), (90, 210)]):
        path = app_state.project.image_folder / f"picture-{index}.png"
        Image.new("RGB", size, (40 * index, 90, 160)).save(path)
        if index < 2:
            path.with_suffix(".txt").write_text(f"a plain field, number {index}")
        made.append(path)
    return made


@pytest.fixture
def client(app_state: AppState) -> Iterator[TestClient]:
    """The routes of all tabs, without the page, the guard and the login."""
    app = FastAPI()
    # What the live stream tells of work under way.
    app.state.feeds = app_state.live.feeds
    add_routes(app, app_state)
    add_project_routes(app, app_state)
    for tab in TABS:
        tab.add_routes(app, app_state)
    with TestClient(app) as made:
        yield made


@pytest.fixture
def say(client: TestClient) -> Say:
    """Posts the given fields to a route below /easel and returns its answer."""

    def posted(path: str, **body: Any) -> dict[str, Any]:
        answer = client.post(f"/easel/{path}", json=body)
        assert answer.status_code == 200
        return dict(answer.json())

    return posted
