"""Figures of the report, drawn by matplotlib.

Lives here: matrices, the overlap of sites, the reliability diagram and learning curves. Does not live here: what is
drawn (server/report_page), how a figure gets into the page (common/pages/figures) and what HTML draws better, such as
bars.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from consilience.common.labels import LabelSpace
from consilience.common.pages.figures import (
    BAR,
    BLUE,
    INK,
    LINE,
    MUTED,
    PANEL,
    PAPER,
    RUST,
    VOID,
    inline,
    one_line,
    place,
    sheet,
    site_colour,
    text_width,
)
from consilience.common.pages.numbers import decimal, number_of
from consilience.server.judge import Bin

LABELLED = 40
"""Rows and columns that are still named at a matrix."""
BLUES, RUSTS = (
    LinearSegmentedColormap.from_list("", [PAPER, colour]).with_extremes(bad=VOID) for colour in (BLUE, RUST)
)


def matrix(
    values: NDArray[np.generic],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    *,
    text: Callable[[float], str],
    shown: NDArray[np.generic] | None = None,
    diagonal: bool = False,
    axes: tuple[str, str] = ("", ""),
) -> Markup:
    """Draw a matrix of shares in [0, 1] as a heat map; NaN cells are grey.

    `values` (R, C); `shown` (R, C) the numbers that `text` writes into the cells (default `values`). Names stand at
    the edges up to 40 rows and columns, numbers in the cells up to 14. With `diagonal` all other cells are rust.
    """
    shares = np.ma.masked_invalid(np.asarray(values, np.float64))
    n_rows, n_columns = shares.shape
    cell = next((size for most, size in ((10, 42), (14, 36), (20, 26), (40, 17)) if max(n_columns, n_rows) <= most), 7)
    if n_rows <= LABELLED < n_columns:
        cell = 9
    row_names = [one_line(n, 22) for n in rows] if n_rows <= LABELLED else []
    column_names = [one_line(n, 18) for n in columns] if n_columns <= LABELLED else []
    size = 12 if cell >= 17 else 9
    slant = [text_width(name, 12) * math.sqrt(0.5) for name in column_names]
    left = (28 if axes[0] else 16) + max((text_width(name, size) for name in row_names), default=0)
    top = (28 if axes[1] else 16) + max(slant, default=0)
    # Slanted names may reach beyond the last column.
    right = max((cell * (c + 0.5 - n_columns) + reach + 12 for c, reach in enumerate(slant)), default=8)
    size_of_cells = n_columns * cell, n_rows * cell
    with sheet(left + size_of_cells[0] + max(right, 8), top + size_of_cells[1] + 6, label) as figure:
        ax = place(figure, left, top, *size_of_cells)
        tints = 0.06 + 0.94 * shares
        tints[shares == 0] = 0.03
        image = BLUES(tints)
        if diagonal:
            image = np.where(np.eye(n_rows, n_columns, dtype=bool)[..., None], image, RUSTS(tints))
        # One pixel a cell: the browser makes them larger, so the page stays small.
        ax.imshow(image, interpolation="none", aspect="auto")
        ax.xaxis.tick_top()
        ax.set_yticks(range(len(row_names)), row_names, fontsize=size, color=INK)
        ax.set_xticks(range(len(column_names)), column_names, fontsize=12, color=INK)
        for name in ax.get_xticklabels():
            name.set(rotation=45, rotation_mode="anchor", ha="left", va="baseline")
        ax.spines[:].set_visible(cell < 17)
        if cell >= 17:
            ax.set_xticks(np.arange(n_columns + 1) - 0.5, minor=True)
            ax.set_yticks(np.arange(n_rows + 1) - 0.5, minor=True)
            ax.tick_params(which="minor", length=0)
            ax.grid(which="minor", color=PAPER, linewidth=1.5)
        if cell >= 36:
            written = shares if shown is None else shown
            for r, c in zip(*np.nonzero(shares.filled(0)), strict=True):
                ink = PAPER if shares[r, c] > 0.52 else INK
                ax.text(c, r, text(float(written[r, c])), fontsize=11, color=ink, ha="center", va="center_baseline")
        edge = figure.get_size_inches() * 72
        if axes[0]:
            middle = 1 - (top + size_of_cells[1] / 2) / edge[1]
            figure.text(12 / edge[0], middle, axes[0], rotation=90, ha="center", va="center", fontsize=11, color=MUTED)
        if axes[1]:
            end = (left + size_of_cells[0]) / edge[0]
            figure.text(end, 1 - 12 / edge[1], axes[1], ha="right", fontsize=11, color=MUTED)
        return inline(figure)


def reliability(
    bins: Sequence[Bin],
    label: str = "Reliability diagram of the student",
    axes: tuple[str, str] = ("right, %", "top probability, %, and number of images"),
    side: int = 300,
) -> Markup:
    """Draw how often something is so against how likely it was said to be, with the number of each bin below.

    By default that the student is right; `axes` says what stands upright and below.
    """
    left, top, strip = 58, 12, 44
    full = [(b.low, b.high, b.count, b.confidence, b.accuracy) for b in bins if b.count]
    with sheet(left + side + 16, top + side + strip + 54, label) as figure:
        upper, lower = place(figure, left, top, side, side), place(figure, left, top + side + 16, side, strip)
        for low, high, count, confidence, accuracy in full:
            if confidence is None or accuracy is None:
                continue
            width = high - low - 0.005
            upper.bar(low, accuracy, width, align="edge", color=BLUES(0.55))
            upper.hlines(confidence, low, low + width, RUST, linewidth=2)
            lower.bar(low, count, width, align="edge", color=BAR)
        upper.plot((0, 1), (0, 1), color=MUTED, linewidth=1, linestyle=(0, (4, 4)))
        quarters = (0, 0.25, 0.5, 0.75, 1)
        names = [f"{quarter * 100:.0f}" for quarter in quarters]
        upper.set(xlim=(0, 1), ylim=(0, 1), xticks=[])
        upper.set_yticks(quarters, names)
        upper.grid(axis="y")
        upper.set_ylabel(axes[0])
        upper.yaxis.set_label_coords(-44 / side, 0.5)
        most = max((count for _, _, count, _, _ in full), default=1)
        lower.set(xlim=(0, 1), ylim=(0, most))
        lower.set_yticks([most], [f"{most:,}"])
        lower.set_xticks(quarters, names)
        lower.set_xlabel(axes[1])
        return inline(figure)


def learning_curves(
    curves: Sequence[tuple[str, str, Sequence[tuple[float, float]]]], label: str = "Learning curves"
) -> Markup:
    """Draw loss by epoch; `curves` are (name, colour, (epoch, loss) points), each with at least one point."""
    side, left = 300, 58
    top = 14 + 18 * len(curves)
    points = np.array([point for _, _, curve in curves for point in curve], np.float64)
    first, last, highest = points[:, 0].min(), points[:, 0].max(), max(points[:, 1].max(), 1e-9)
    with sheet(left + side + 16, top + side + 42, label) as figure:
        ax = place(figure, left, top, side, side)
        for name, colour, curve in curves:
            # More points than pixels would only make the page larger.
            drawn = [*curve[: -1 : max(1, len(curve) // 300)], curve[-1]]
            words = f"{name}: {decimal(drawn[-1][1])} at the end"
            ax.plot(
                *zip(*drawn, strict=True),
                color=colour,
                linewidth=2,
                label=words,
                marker="o",
                markevery=[-1],
                clip_on=False,
            )
        ax.set(xlim=(first, max(last, first + 1)), ylim=(0, highest * 1.04), xlabel="epoch", ylabel="loss")
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda epoch, _: f"{epoch:,.0f}"))
        ax.yaxis.set_label_coords(-44 / side, 0.5)
        ax.grid(axis="y")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0, borderpad=0.3)
        return inline(figure)


def overlap(space: LabelSpace) -> Markup:
    """Draw who knows what: sites on the left, joined to the owner sets on the right."""
    sets = list(space.owner_sets.items())
    lines = [_wrap([space.names[c] for c in classes]) for _, classes in sets]
    heights = [26 + 17 * len(text) for text in lines]
    total = sum(heights) + 10 * (len(sets) - 1)
    pills = 34 * len(space.sites)
    height = max(total, pills) + 16
    top, start = (height - total) / 2, (height - pills) / 2
    sites = [one_line(site, 20) for site in space.sites]
    pill = 42 + max(text_width(site, 13) for site in sites)
    right = pill + 130
    middles = [start + 34 * i + 17 for i in range(len(sites))]
    tops = [top + sum(heights[:k]) + 10 * k for k in range(len(sets))]
    with sheet(right + 376, height, "Overlap: which sites know which classes") as figure:
        ax = _board(figure)
        for (owners, _), y, h in zip(sets, tops, heights, strict=True):
            for place, site in enumerate(owners):
                end = y + h * (place + 1) / (len(owners) + 1)
                curve = [(pill, middles[site]), (pill + 65, middles[site]), (right - 65, end), (right, end)]
                _curve(ax, curve, site_colour(site), 2, 0.75)
        for site, (name, y) in enumerate(zip(sites, middles, strict=True)):
            _box(ax, 2, y - 13, pill - 2, 26, 13, PAPER, site_colour(site))
            ax.plot(17, y, "o", markersize=10, markeredgewidth=0, color=site_colour(site))
            ax.text(29, y, name, fontsize=13, va="center_baseline")
        for (owners, classes), text, y, h in zip(sets, lines, tops, heights, strict=True):
            _box(ax, right, y, 372, h, 6, PANEL, LINE)
            who = f"{number_of(len(owners), 'owner')}, {number_of(len(classes), 'class', 'classes')}"
            ax.text(right + 12, y + 17, who, fontsize=11, color=MUTED)
            for row, words in enumerate(text):
                ax.text(right + 12, y + 34 + 17 * row, words, fontsize=13)
        return inline(figure)


def overlap_ring(space: LabelSpace, most: int = 40) -> Markup:
    """Draw the first `most` sites on a ring; the more classes two share, the stronger the line between them."""
    n = min(most, len(space.sites))
    names = [one_line(site, 16) for site in space.sites[:n]]
    radius = 180
    side = 2 * (radius + 20 + max(text_width(name, 11) for name in names))
    centre = side / 2
    angles = [2 * math.pi * i / n - math.pi / 2 for i in range(n)]
    spots = [(centre + radius * math.cos(a), centre + radius * math.sin(a)) for a in angles]
    shared = {(i, j): len(space.shared(i, j)) for i in range(n) for j in range(i + 1, n)}
    largest = max(shared.values(), default=0)
    with sheet(side, side, "Overlap: which sites share classes") as figure:
        ax = _board(figure)
        for (i, j), number in sorted(shared.items(), key=lambda item: item[1]):
            if number:
                part = number / largest
                _curve(ax, [spots[i], (centre, centre), spots[j]], BLUE, 0.6 + 1.9 * part, 0.1 + 0.6 * part)
        for site, (angle, (x, y)) in enumerate(zip(angles, spots, strict=True)):
            component = space.components[space.class_sets[site][0]]
            ax.plot(x, y, "o", markersize=10, markeredgewidth=0, color=site_colour(component))
            back = math.cos(angle) < -1e-9
            ax.text(
                centre + (radius + 12) * math.cos(angle),
                centre + (radius + 12) * math.sin(angle),
                names[site],
                fontsize=11,
                ha="right" if back else "left",
                va="center_baseline",
                rotation=-math.degrees(angle) - (180 if back else 0),
                rotation_mode="anchor",
            )
        return inline(figure)


def _board(figure: Figure) -> Axes:
    """Add axes over the whole figure whose coordinates are pixels from the upper left corner."""
    width, height = figure.get_size_inches() * 72
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    return ax


def _curve(ax: Axes, points: list[tuple[float, float]], colour: str, width: float, alpha: float) -> None:
    """Draw a Bézier curve of three or four points."""
    codes = [Path.MOVETO, *[Path.CURVE3 if len(points) == 3 else Path.CURVE4] * (len(points) - 1)]
    ax.add_patch(PathPatch(Path(points, codes), facecolor="none", edgecolor=colour, linewidth=width, alpha=alpha))


def _box(ax: Axes, x: float, y: float, w: float, h: float, round_: float, face: str, edge: str) -> None:
    """Draw a rectangle with round corners."""
    shape = f"round,pad=0,rounding_size={round_}"
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=shape, facecolor=face, edgecolor=edge, linewidth=1))


def _wrap(names: list[str], width: int = 50, rows: int = 3) -> list[str]:
    """Break a list of names into at most `rows` lines; the last says how many are left out."""
    lines, current = [], ""
    for at, name in enumerate(one_line(name, 40) for name in names):
        piece = name + ("," if at < len(names) - 1 else "")
        if current and len(current) + 1 + len(piece) > width:
            lines.append(current)
            current = piece
            if len(lines) == rows:
                lines[-1] += f" … {len(names) - at:,} more"
                return lines
        else:
            current = f"{current} {piece}".strip()
    return [*lines, current]
