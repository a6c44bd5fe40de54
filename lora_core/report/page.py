"""The report of a run: one HTML file that holds its pictures and plots, runs nothing and asks for nothing."""

import importlib.metadata
from datetime import UTC, datetime
from pathlib import Path

from lora_core.report.curves import bands_html, gain_html, loss_html, pictures_html
from lora_core.report.samples import samples_html
from lora_core.report.settings import base_name, settings_html
from lora_core.report.story import Story, Tell, story_of
from lora_core.report.verdict import verdict
from lora_core.spec.errors import RunError
from lora_core.spec.paths import ASSETS, write_atomically
from lora_core.spec.plot import safe
from lora_core.spec.rank_plots import intrinsic_html, paragraph, spectrum_html, strength_html
from lora_core.spec.rate_plot import rate_html
from lora_core.spec.run_folder import RunFolder
from lora_core.spec.verdict import best_of

FILE_NAME = "report.html"
STYLE = ASSETS / "report.css"
# The page holds no script; this keeps one out that came in with a name.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(run: RunFolder, out: Path, measure: bool, tell: Tell, now: float) -> int:
    """Write the report of a run.

    Args:
        run: the run.
        out: the file to write; an older one is replaced.
        measure: whether to open the base and measure intrinsic rank and strength on the held-out pictures.
        tell: told how far it is; what it raises ends the work and leaves no file.
        now: the time, in seconds since the epoch.

    Returns:
        How many bytes it has.

    Raises:
        LoraError: the run's settings are broken, or the file cannot be written.
    """
    check_report_out(out)
    page = report_html(story_of(run, measure, tell), now).encode()
    try:
        write_atomically(out, page)
    except OSError as error:
        raise RunError(f"The report {out} cannot be written: {error.strerror or error}.") from error
    return len(page)


def check_report_out(out: Path) -> None:
    """Refuse a place for a report before the work rather than after it.

    Raises:
        RunError: its folder does not exist, or it has another ending.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise RunError(f"--out {out} should end in .html.")
    if not out.absolute().parent.is_dir():
        raise RunError(f"--out {out} cannot be written: its folder does not exist; make it first.")


def report_html(story: Story, now: float) -> str:
    """The whole page."""
    name = safe(story.run.name)
    made = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d")
    sentences = verdict(story)
    first = f'<p class="verdict">{safe(sentences[0])}</p>' if sentences else ""
    rest = "".join(paragraph(sentence) for sentence in sentences[1:])
    parts = [
        _section("Samples", samples_html(story)),
        _section("What it learned", f'<div class="figures">{_learned(story)}</div>'),
        _section("Rank", _rank(story)),
        _section("Strength", _strength(story)),
        _section("Settings", settings_html(story)),
    ]
    version = importlib.metadata.version("lora-easel")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport"'
        ' content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{name}</title><style>'
        f'{STYLE.read_text(encoding="utf-8")}</style></head><body><main><header><p class="small">Report'
        " of a"
        f" LoRA</p><h1>{name}</h1>{first}{rest}{_tiles(story)}</header>{''.join(parts)}</main><footer"
        f' class="small">Made with LoRA Easel {safe(version)} on {made}. Nothing in this page runs or'
        " asks for"
        " anything.</footer></body></html>\n"
    )


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{safe(title)}</h2>{inside}</section>"


def _tiles(story: Story) -> str:
    best = best_of(story.progress.validations)
    done, planned = story.progress.step, story.progress.steps
    tiles = [
        (f"{done:,}" + (f" of {planned:,}" if planned > done else ""), "steps"),
        (base_name(story.config.model.base), "base model"),
        (f"{story.config.adapter.rank}, alpha {story.config.adapter.alpha:g}", "rank"),
    ]
    if story.config.dataset.trigger:
        tiles.append((story.config.dataset.trigger, "trigger word"))
    if best is not None:
        tiles.append((f"{best.gain:+.4f}", f"best gain, \N{PLUS-MINUS SIGN} {2 * best.standard_error:.4f}"))
    if story.size:
        tiles.append((f"{story.size / 1e6:.1f} MB", "file"))
    rows = "".join(f"<div><dt>{safe(words)}</dt><dd>{safe(value)}</dd></div>" for value, words in tiles)
    return f'<dl class="tiles">{rows}</dl>'


def _learned(story: Story) -> str:
    return "".join(
        f'<div class="part">{part}</div>'
        for part in (
            gain_html(story),
            loss_html(story),
            rate_html(story.progress.rate) if story.progress.rate else "",
            bands_html(story),
            pictures_html(story),
        )
        if part
    )


def _looked_at(story: Story) -> str:
    which = "the best" if story.best else "the last"
    return paragraph(f"Of the adapter of step {story.step:,}, {which} that was kept.") if story.step else ""


def _rank(story: Story) -> str:
    if story.spectrum is None:
        return paragraph(story.problems.get("spectrum", ""))
    if story.rank is None:
        needed = paragraph(f"Intrinsic rank: {story.problems.get('rank', '')}")
    else:
        needed = f"{intrinsic_html(story.rank)}{_on(story)}"
    return (
        f"{_looked_at(story)}<h3>Which rank it needs</h3>{needed}<h3>Spectrum</h3>"
        f"{spectrum_html(story.spectrum)}"
    )


def _strength(story: Story) -> str:
    if story.strength is None:
        return paragraph(story.problems.get("strength", ""))
    said = "".join(paragraph(sentence) for sentence in story.strength["sentences"])
    return said + "".join(strength_html(fit, fit["part"]) for fit in story.strength["fits"]) + _on(story)


def _on(story: Story) -> str:
    count = story.measured_on
    pictures = "the one picture that was" if count == 1 else f"the {count} pictures that were"
    words = f"Measured on {pictures} held out. {story.note}".strip()
    return f'<p class="small">{safe(words)}</p>'
