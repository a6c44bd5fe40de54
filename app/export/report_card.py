"""The part of the Export tab that makes a run's report: one page to pass on."""

from typing import Any
from urllib.parse import quote

from app.formatting import format_bytes, safe
from app.jobs import RunView

REPORT = "report.html"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""A report is made of what people and files say; whatever got into it, nothing of it may run in this
window."""

FRAME = "<h2>Report</h2>"
STATE = (
    '<div class="making small num" id="report-state" data-state="idle"><span id="report-words"'
    ' role="status"></span><button type="button" class="own quiet" id="report-cancel"'
    " hidden>Cancel</button></div>"
)


def report_card(run_view: RunView | None) -> str:
    """The button, and the report that is there."""
    if run_view is None:
        return (
            '<div class="row"><button type="button" class="own" id="report-make" disabled title="There is no'
            ' checkpoint yet; train something first.">Make the report</button><span class="small">There is no'
            " run to tell of yet.</span></div>"
        )
    name = safe(run_view.run.name)
    file = run_view.run.path / REPORT
    try:
        size = f", {format_bytes(file.stat().st_size)}"
        there = report_links(run_view.run.name, size)
    except OSError:
        there = ""
    return (
        '<div class="made"><p class="small">The whole run as one page, to send to a friend: samples, curves,'
        " rank, settings and what came of it. It opens anywhere and holds no paths and no pictures that the"
        ' run was trained on.</p><div class="row'
        f' report-row"><button type="button" class="own" id="report-make" data-report-run="{name}">Make the'
        ' report</button><label class="tick"><input type="checkbox" id="report-measure" checked>measure rank'
        f" and strength, some minutes</label></div>{there}"
    )


def report_entry(run_view: RunView, learned: bool) -> str:
    """What the list of runs has of it: the way to the report, or a button that makes a quick one.

    Args:
        watch: the run.
        learned: whether it has a checkpoint, without which there is nothing to tell.
    """
    name = run_view.run.name
    if (run_view.run.path / REPORT).is_file():
        return (
            f'<a class="own quiet" href="{safe(_address(name))}" target="_blank"'
            f' data-report-of="{safe(name)}" aria-label="Open the report of {safe(name)}">Report</a>'
        )
    if not learned:
        return ""
    return (
        f'<button type="button" class="own quiet" data-report-run="{safe(name)}" data-report-quick'
        ' title="The run as one page, in some seconds. On the Export tab it can measure rank and strength'
        f' too." aria-label="Make the report of {safe(name)}">Make report</button>'
    )


def _address(name: str) -> str:
    return f"/easel/report/of/{quote(name)}"


def report_links(name: str, words: str) -> str:
    """To a report."""
    address = _address(name)
    return (
        f'<p class="small" id="report-links"><a href="{safe(address)}" target="_blank" id="report-open">Open'
        f' the report</a>{safe(words)} &middot; <a href="{safe(address)}?download=1" download'
        ' id="report-download">Download it</a></p>'
    )


def report_done(name: str, result: dict[str, Any]) -> str:
    """Said once it is made."""
    return f'<p class="small" role="status">The report of {safe(name)} is made.</p>'
