"""What a page of the Preview tab shows at a moment: the shot looked at, its strip, and a grid."""

from dataclasses import dataclass, field
from pathlib import Path

from lora_core.generate.request import Axis, GenerationRequest, Infotext, grid_requests, grid_settings
from lora_core.model_files.detect import chosen_base
from lora_core.settings.choices import SAMPLERS

STRIP = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class GridState:
    """A sheet that is wanted: its axes, its pictures, and the PNG once it is whole."""

    shot: GenerationRequest
    rows: Axis | None
    columns: Axis | None
    cells: list[list[GenerationRequest]]
    sheet: Path | None = None
    problem: str = ""

    @classmethod
    def of(cls, shot: GenerationRequest, rows: Axis | None, columns: Axis | None) -> "GridState":
        """The grid of a shot over two axes.

        Raises:
            ConfigError: the axes do not fit.
        """
        cells = [[cell.acting() for cell in row] for row in grid_requests(shot, rows, columns)]
        return cls(shot, rows, columns, cells)

    @property
    def shots(self) -> list[GenerationRequest]:
        """All pictures in reading order."""
        return [shot for row in self.cells for shot in row]


@dataclass(frozen=True)
class PreviewState:
    """What a page shows at a moment.

    Attributes:
        state: of the picture looked at, idle, working or error; strip and grid say for themselves.
        message: why it waits or what went wrong.
        done, total: steps of the picture in hand.
        shot: what is looked at, None before the first.
        strip: the strengths of the strip, none where it is not wanted.
        grid: the grid, or None.
        pictures: those that are there, of what is looked at, the strip and the grid.
        wanted_at: when it was wanted, which tells one look from the next.
        drawing: the shot in hand.
        looks: how many looks there were at it.
        note: what to know of how the base of the last picture was kept.
    """

    state: str
    message: str
    done: int
    total: int
    shot: GenerationRequest | None
    strip: tuple[float, ...]
    grid: GridState | None
    pictures: dict[GenerationRequest, Path] = field(default_factory=dict)
    wanted_at: float = 0.0
    drawing: GenerationRequest | None = None
    looks: int = 0
    note: str = ""

    def picture(self, shot: GenerationRequest) -> Path | None:
        """The picture of a shot, if it is there."""
        return self.pictures.get(shot.acting())

    def strip_shots(self) -> list[GenerationRequest]:
        """The pictures of the strip."""
        if self.shot is None or not self.shot.loras:
            return []
        return [self.shot.at("strength", value).acting() for value in self.strip]

    @property
    def working(self) -> bool:
        """Whether anything is still to be drawn, strip and grid included."""
        return self.state == "working" or self.strip_waits or self.grid_waits

    @property
    def strip_waits(self) -> bool:
        """Whether cells of the strip are empty and will be drawn."""
        return self.state != "error" and any(shot not in self.pictures for shot in self.strip_shots())

    @property
    def grid_waits(self) -> bool:
        """Whether the grid is still in the making."""
        return self.grid is not None and not self.grid.problem and self.grid.sheet is None


def sheet_info(grid: GridState) -> str:
    """What a sheet's PNG says: the settings that its pictures share, and its axes."""
    shot = grid.shot
    return Infotext(
        prompt=shot.prompt, negative=shot.negative, steps=shot.steps, sampler=sampler_title(shot.sampler),
        cfg=shot.cfg, cfg_rescale=_rescale(shot), seed=shot.seed, width=shot.width, height=shot.height,
        model=Path(shot.base).stem, clip_skip=shot.clip_skip,
        loras=tuple(one for one in shot.loras if one.acts),
        extra=grid_settings(grid.rows, grid.columns),
    ).text()  # fmt: skip


def _rescale(shot: GenerationRequest) -> float:
    """CFG rescale as it was drawn with."""
    facts = chosen_base(shot.base, shot.prediction, shot.zero_terminal_snr).facts
    return facts.cfg_rescale(shot.cfg_rescale) if facts is not None and shot.cfg > 1 else 0.0


def sampler_title(key: str) -> str:
    """A sampler as A1111 names it."""
    return SAMPLERS[key].title if key in SAMPLERS else key
