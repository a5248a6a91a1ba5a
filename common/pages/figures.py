"""What the figures of all pages share: colours, style, and the way from a matplotlib figure into the page.

Lives here: everything that keeps an SVG from matplotlib harmless, equal from run to run and at home in a page with
other SVGs. Does not live here: any figure (server/plots).
"""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.style
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from consilience.common.pages.numbers import shorten

INK, MUTED, LINE, PAPER, PANEL = "#1d2733", "#66727f", "#dfe4ea", "#ffffff", "#f5f7f9"
BLUE, RUST, GREY, BAR, VOID = "#245f94", "#b4552d", "#8b96a3", "#c3ccd6", "#eef1f4"
SITE_COLOURS = (
    *("#245f94", "#c0792a", "#3d8168", "#9a4a6b", "#6d6aa8"),
    *("#7a8b2f", "#b4552d", "#3b94a6", "#8a6a4f", "#555f6b"),
)
"""Colours of the sites, in the order of the label space; with more sites than colours they repeat."""

STYLE = {
    "figure.dpi": 72,
    # The font that matplotlib brings along: what it measures by is the same everywhere. The page draws in its own.
    "font.family": "DejaVu Sans",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 12,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": LINE,
    "text.color": INK,
    # Names come from sites and are untrusted: `$` and `_` are letters like others.
    "text.parse_math": False,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.major.pad": 6,
    "legend.frameon": False,
    "legend.fontsize": 12,
    "svg.fonttype": "none",
    "svg.image_inline": True,
}
"""What differs from matplotlib's defaults. At 72 dots an inch a point of matplotlib is a pixel of the page."""


def site_colour(site: int) -> str:
    """Return the colour of a site."""
    return SITE_COLOURS[site % len(SITE_COLOURS)]


@contextmanager
def sheet(width: float, height: float, label: str) -> Iterator[Figure]:
    """Yield an empty figure of that many pixels, and the pages' style until it is drawn.

    `label` says in words what is shown; no other figure of the page may have the same, for ids are made from it.
    """
    style: dict[Any, Any] = {**STYLE, "svg.hashsalt": f"consilience {label}"}
    with matplotlib.style.context("default"), matplotlib.rc_context(style):
        yield Figure(figsize=(width / 72, height / 72), label=label)


def inline(figure: Figure) -> Markup:
    """Return a figure of `sheet` as SVG to stand in the page; matplotlib has escaped every text in it."""
    file = io.StringIO()
    with warnings.catch_warnings():
        # The page's fonts draw the texts, and they may well have what matplotlib's own font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = file.getvalue()
    # What stands before the first element, and a style that would hold for the whole page. No text comes before them.
    svg = re.sub(r"^.*?<svg [^>]*>\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    # "<" stands for itself only where an element begins. Ids of groups repeat from figure to figure; nothing uses them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<text style="font-size: [\d.]+px); font-family: [^";]*', r"\1", svg)
    width, height = figure.get_size_inches() * 72
    head = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{}" viewBox="0 0 {} {}" width="{}" height="{}" '
        'stroke-linejoin="round">'
    ).format(figure.get_label(), *(f"{length:.6g}" for length in (width, height, width, height)))
    return head + Markup(svg.rstrip())


def place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes that cover these pixels, counted from the figure's upper left corner."""
    w, h = figure.get_size_inches() * 72
    return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))


def one_line(name: str, length: int) -> str:
    """Return a name as a figure shows it: without line breaks, and not longer than `length`."""
    return shorten(" ".join(name.split()), length)


def text_width(text: str, size: float) -> float:
    """Return about how wide a text is: the page's fonts are not known, East Asian letters are as wide as high."""
    return size * sum(1.0 if unicodedata.east_asian_width(letter) in "FW" else 0.57 for letter in text)


def legend(names: Sequence[str]) -> Markup:
    """Return the sites' colours as HTML, for as many sites as there are colours."""
    items = (
        Markup('<span class="key"><i style="background:{}"></i>{}</span>').format(site_colour(i), name)
        for i, name in enumerate(names[: len(SITE_COLOURS)])
    )
    return Markup("").join(items)
