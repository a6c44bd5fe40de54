"""App state over a workspace of its own, and pictures to put on it."""

from pathlib import Path

import pytest
from PIL import Image

from app.state import AppState


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
