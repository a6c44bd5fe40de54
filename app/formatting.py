"""Numbers and states as text."""

import math

UNKNOWN, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"

CHANGED_SHOWN = 5

STATES = {
    "none": ("No run yet", ""),
    "queued": ("Not started", ""),
    "preparing": ("Preparing", "accent"),
    "running": ("Running", "accent"),
    "pausing": ("Pausing", "warn"),
    "stopping": ("Stopping", "warn"),
    "paused": ("Paused", "warn"),
    "stopped": ("Stopped", ""),
    "interrupted": ("Interrupted", "warn"),
    "done": ("Done", "good"),
    "failed": ("Failed", "bad"),
}


def format_clock(seconds: float | None) -> str:
    """Format seconds as 4:12 or 1:04:12; a dash if unknown."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_duration(seconds: float) -> str:
    """Format seconds roughly: 40 s, 14 min, 2.5 h."""
    if seconds < 90:
        return f"{max(5, 5 * round(seconds / 5))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_bytes(size: float) -> str:
    """Format bytes as kB, MB or GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


def format_speed(seconds_a_step: float | None) -> str:
    """Format as it/s, or s/it when slower than one step per second; never wrapped."""
    if not seconds_a_step:
        return ""
    number, unit = (1 / seconds_a_step, "it/s") if seconds_a_step <= 1 else (seconds_a_step, "s/it")
    return f"{number:.1f}\N{NO-BREAK SPACE}{unit}"


def format_scientific(value: float) -> str:
    """Format a learning rate as 1.0e-4."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def pluralize(count: int, one: str, more: str | None = None) -> str:
    """ "1 image", "24 images"."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def describe_changes(names: list[str]) -> str:
    """A sentence that lists the inputs that changed since the run began.

    Args:
        names: as the trainer calls them; an image stands for its caption too.
    """
    shown = [
        (
            "its settings (config.toml)"
            if name == "config.toml"
            else f"{name.replace('picture', 'image', 1)} or its caption"
            if name.startswith("the picture ")
            else name
        )
        for name in names[:CHANGED_SHOWN]
    ]
    more = f" and {len(names) - CHANGED_SHOWN:,} more" if len(names) > CHANGED_SHOWN else ""
    return f"Since this run began, this has changed: {', '.join(shown)}{more}."
