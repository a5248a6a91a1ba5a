"""Numbers as people read them: per cent, counts, bytes, seconds. Nothing else lives here."""

from __future__ import annotations

SPACE = "\u00a0"
"""No-break space: a number and its unit stay on one line."""
MISSING = "–"


def percent(share: float | None) -> str:
    """Return a share as per cent with one decimal: 0.789 -> 78.9 %."""
    return MISSING if share is None else f"{share * 100:.1f}{SPACE}%"


def count(number: int | None) -> str:
    """Return a whole number with thousands separators."""
    return MISSING if number is None else f"{number:,}"


def number_of(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun: 1 site, 3 sites."""
    return f"{number:,}{SPACE}{one if number == 1 else many or one + 's'}"


def size(number: float | None) -> str:
    """Return bytes in the largest unit of 1,000 that keeps the number at 1 or above."""
    if number is None:
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.0f}{SPACE}{unit}" if unit == "B" or number >= 99.95 else f"{number:.1f}{SPACE}{unit}"
        number /= 1000
    return f"{number:,.1f}{SPACE}TB"


def duration(seconds: float | None) -> str:
    """Return a duration: 0.04 s, 3.2 s, 5 min 12 s, 2 h 5 min."""
    if seconds is None:
        return MISSING
    if seconds < 0.095:
        return f"{seconds:.2f}{SPACE}s"
    if seconds < 59.95:
        return f"{seconds:.1f}{SPACE}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}{SPACE}min {whole % 60}{SPACE}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,}{SPACE}h {minutes % 60}{SPACE}min"


def decimal(value: float | None, digits: int = 3) -> str:
    """Return a number with a fixed number of decimals."""
    return MISSING if value is None else f"{value:.{digits}f}"


def small(value: float | None) -> str:
    """Return a number of unknown magnitude with two significant digits: 0.012, 3.4e-07."""
    return MISSING if value is None else f"{value:.2g}"


def shorten(text: str, length: int = 28) -> str:
    """Cut a long text, with an ellipsis for what is left out."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def listing(items: list[str], most: int = 12) -> str:
    """Join items with commas; beyond `most` say how many more there are."""
    if len(items) <= most + 1:
        return ", ".join(items)
    return f"{', '.join(items[:most])} and {len(items) - most:,} more"
