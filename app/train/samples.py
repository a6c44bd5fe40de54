"""The samples of a run: a row a prompt, the base first and beside it what was learned, the newest first."""

from app.formatting import safe
from app.jobs import RunView
from app.routes import image_url
from app.snapshot import Snapshot
from lora_core.runs.costs import how_often
from lora_core.runs.events import PreviewDone
from lora_core.runs.folder import runs_folder

RAW = ", raw adapter (above: its average)"
MOST_ROWS, FEWEST_COLUMNS, MOST_COLUMNS = 4, 3, 6


def samples_card(snapshot: Snapshot) -> str:
    """All rows; a click on one opens it large."""
    run_view = snapshot.run_view
    if run_view is None:
        return ""
    rounds = select_rounds(snapshot.progress.previews)
    head = (
        '<div class="row apart"><h2>Samples</h2><span class="small">each row one prompt, same noise; first'
        " the base, then the newest</span></div>"
    )
    if not rounds:
        return (
            f'<div class="panel">{head}<p class="small">The first ones show the base, before it learns'
            " anything.</p></div>"
        )
    columns = _columns(run_view, len(rounds))
    kinds = (False, True) if any(one.raw_files for one in rounds) else (False,)
    strips = [
        _strip(snapshot, run_view, rounds, (row, raw), columns)
        for row in range(min(MOST_ROWS, max(len(r.files) for r in rounds)))
        for raw in kinds
    ]
    return f'<div class="panel">{head}{"".join(strips)}</div>'


def _strip(
    snapshot: Snapshot, run_view: RunView, rounds: list[PreviewDone], which: tuple[int, bool], columns: int
) -> str:
    """The pictures of one prompt over the rounds; `which`: its number, and whether of the raw adapter."""
    row, raw = which
    root = runs_folder(snapshot.app_state.workspace)
    prompt = rounds[0].prompts[row] if row < len(rounds[0].prompts) else ""
    words = safe(f"{prompt}{RAW if raw else ''}")
    cells = []
    for one in rounds:
        files = one.raw_files if raw else one.files
        if row < len(files):
            link = safe(image_url("run", root, run_view.run.path / files[row]))
            shown = safe(one.prompts[row] if row < len(one.prompts) else "")
            step = f"step {one.step:,}" + (", the base" if one.step == 0 else "")
            cells.append(
                f'<figure><a href="{link}" target="_blank" data-large="{row}{"-raw" if raw else ""}"'
                f' data-words="{step}: {shown}"><img src="{link}" alt="{shown}, {step}"></a><figcaption'
                f' class="small num">{step}</figcaption></figure>'
            )
    return (
        f'<p class="small prompt" title="{words}">{words}</p><div'
        f' class="strip" style="--count:{columns}">{"".join(cells)}</div>'
    )


def _columns(run_view: RunView, there: int) -> int:
    """As many as the run will fill, so that pictures keep their size while more of them come."""
    config = run_view.config()
    planned = how_often(config.train.steps, config.preview.every) if config else 0
    return min(MOST_COLUMNS, max(FEWEST_COLUMNS, planned, there))


def select_rounds(rounds: list[PreviewDone]) -> list[PreviewDone]:
    """The first, then the newest, and as many between as fit, evenly spread, backwards in time."""
    if len(rounds) > MOST_COLUMNS:
        last = len(rounds) - 1
        rounds = [rounds[round(i * last / (MOST_COLUMNS - 1))] for i in range(MOST_COLUMNS)]
    return [*rounds[:1], *reversed(rounds[1:])]
