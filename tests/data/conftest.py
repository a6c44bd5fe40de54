"""Pictures and zips made in code: small, of known content, written anywhere."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Draw = Callable[..., Path]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Blocks of random colours, 8 x 6 of them: sharp, and unlike those of any other seed."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST)


def listed(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def packed(path: Path, *entries: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


@pytest.fixture
def draw() -> Draw:
    """Writes a picture and returns its path; makes the folders that it needs."""

    def write(
        path: Path, size: tuple[int, int] = (64, 48), seed: int = 0, caption: str | None = None
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(*size, seed).save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    return write
