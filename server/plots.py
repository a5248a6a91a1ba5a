"""Figures of the report as inline SVG, drawn by hand: no script, no fonts, no files.

Lives here: matrices, the overlap graph, the reliability diagram and learning curves. Does not live here: what is
drawn (server/report_page) and everything that HTML draws better, such as bars.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup

from consilience.common.labels import LabelSpace
from consilience.server.judge import Bin
from consilience.server.report_format import decimal, number_of, percent, shorten
from consilience.server.report_svg import BLUE, INK, LINE, MUTED, PAPER, RUST, Canvas, shade, site_colour

LABELLED = 40
"""Rows and columns that are still named at a matrix."""


def matrix(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    *,
    text: Callable[[float], str],
    colour: Callable[[int, int], str] = lambda row, column: BLUE,
    shown: np.ndarray | None = None,
    axes: tuple[str, str] = ("", ""),
) -> Markup:
    """Draw a matrix of shares in [0, 1] as shaded cells; NaN cells are hatched grey.

    `values` (R, C); `shown` (R, C) the numbers written in cells and tooltips by `text` (default `values`). Names
    stand at the edges up to 40 rows and columns, numbers in the cells up to 14 columns.
    """
    shown = values if shown is None else shown
    n_rows, n_columns = values.shape
    cell = next((size for most, size in ((10, 42), (14, 36), (20, 26), (40, 17)) if max(n_columns, n_rows) <= most), 7)
    if n_rows <= LABELLED < n_columns:
        cell = 9
    named_rows, named_columns = n_rows <= LABELLED and cell >= 9, n_columns <= LABELLED
    row_names, column_names = [shorten(n, 22) for n in rows], [shorten(n, 18) for n in columns]
    size = 12 if cell >= 17 else 9
    left = 20 + (max((len(n) for n in row_names), default=0) * size * 0.56 if named_rows else 0)
    top = 22 + (max((len(n) for n in column_names), default=0) * 12 * 0.56 * 0.72 if named_columns else 0)
    right = 34 if named_columns else 8
    canvas = Canvas()
    width, height = left + n_columns * cell + right, top + n_rows * cell + 6
    many = n_rows * n_columns > 1800
    paths: dict[str, list[str]] = {}
    gap = 1.5 if cell >= 17 else 0
    for r in range(n_rows):
        for c in range(n_columns):
            value = float(values[r, c])
            x, y = left + c * cell, top + r * cell
            hidden = math.isnan(value)
            fill = "#eef1f4" if hidden else shade(0.06 + 0.94 * value if value else 0.03, colour(r, c))
            if many:
                if value or hidden:
                    # Few shades and one path each: a large matrix stays small on disk.
                    level = "#eef1f4" if hidden else shade(math.ceil(value * 8) / 8, colour(r, c))
                    paths.setdefault(level, []).append(f"M{x:.0f} {y:.0f}h{cell}v{cell}h-{cell}z")
                continue
            words = "not comparable" if hidden else text(float(shown[r, c]))
            canvas.rect(x, y, cell - gap, cell - gap, fill, f"{rows[r]} / {columns[c]}: {words}")
            if cell >= 36 and not hidden and value:
                ink = PAPER if value > 0.52 else INK
                canvas.text(x + (cell - gap) / 2, y + cell / 2 + 3.5, words, 11, ink, text_anchor="middle")
    if many:
        canvas.rect(left, top, n_columns * cell, n_rows * cell, "none", stroke=LINE)
        for fill, cells in sorted(paths.items()):
            canvas.path("".join(cells), fill=fill)
    if named_rows:
        for r, name in enumerate(row_names):
            canvas.text(left - 6, top + r * cell + cell / 2 + size / 3, name, size, INK, text_anchor="end")
    if named_columns:
        for c, name in enumerate(column_names):
            x, y = left + c * cell + cell / 2 - 2, top - 6
            canvas.text(x, y, name, min(12, cell), INK, transform=f"rotate(-45 {x:.1f} {y:.1f})")
    if axes[0]:
        middle = top + n_rows * cell / 2
        canvas.text(10, middle, axes[0], 11, text_anchor="middle", transform=f"rotate(-90 10 {middle:.0f})")
    if axes[1]:
        canvas.text(left + n_columns * cell, 12, axes[1], 11, text_anchor="end")
    return canvas.svg(width, height, label)


def reliability(bins: Sequence[Bin]) -> Markup:
    """Draw how often the student is right against how sure it is, with the share of images in each bin below."""
    side, left, top, strip = 300, 46, 12, 44
    canvas = Canvas()

    def x(share: float) -> float:
        return left + share * side

    def y(share: float) -> float:
        return top + (1 - share) * side

    for tick in (0, 0.25, 0.5, 0.75, 1):
        canvas.line(left, y(tick), left + side, y(tick))
        canvas.text(left - 7, y(tick) + 4, f"{tick * 100:.0f}", text_anchor="end")
        canvas.text(x(tick), top + side + strip + 34, f"{tick * 100:.0f}", text_anchor="middle")
    total = max(1, sum(b.count for b in bins))
    tallest = max(1, max(b.count for b in bins))
    base = top + side + strip + 16
    for b in bins:
        if b.confidence is None or b.accuracy is None:
            continue
        words = (
            f"{number_of(b.count, 'image')} ({percent(b.count / total)}): sure {percent(b.confidence)}, "
            f"right {percent(b.accuracy)}"
        )
        w = x(b.high) - x(b.low) - 1.5
        canvas.rect(x(b.low), y(b.accuracy), w, y(0) - y(b.accuracy), shade(0.55, BLUE), words)
        canvas.line(x(b.low), y(b.confidence), x(b.low) + w, y(b.confidence), RUST, 2)
        h = max(1.0, strip * b.count / tallest)
        canvas.rect(x(b.low), base - h, w, h, "#c3ccd6", words)
    canvas.line(x(0), y(0), x(1), y(1), MUTED, 1, stroke_dasharray="4 4")
    canvas.line(left, base, left + side, base)
    canvas.text(14, top + side / 2, "right, %", 12, text_anchor="middle", transform=f"rotate(-90 14 {top + side / 2})")
    canvas.text(left + side / 2, base + 38, "top probability, %, and number of images", 12, text_anchor="middle")
    return canvas.svg(left + side + 16, base + 48, "Reliability diagram of the student")


def learning_curves(curves: Sequence[tuple[str, str, Sequence[tuple[float, float]]]]) -> Markup:
    """Draw loss by epoch; `curves` are (name, colour, (epoch, loss) points), each with at least one point."""
    width, height, left, top = 300, 300, 54, 28
    canvas = Canvas()
    points = [point for _, _, curve in curves for point in curve]
    last, first = max(e for e, _ in points), min(e for e, _ in points)
    highest = max(max(v for _, v in points), 1e-9)

    def x(epoch: float) -> float:
        return left + (epoch - first) / max(last - first, 1) * width

    def y(loss: float) -> float:
        return top + (1 - max(loss, 0) / highest) * height

    for part in (0, 0.25, 0.5, 0.75, 1):
        canvas.line(left, y(part * highest), left + width, y(part * highest))
        canvas.text(left - 7, y(part * highest) + 4, decimal(part * highest, 2), text_anchor="end")
    for epoch in sorted({first, round((first + last) / 2), last}):
        canvas.text(x(epoch), top + height + 18, f"{epoch:,.0f}", text_anchor="middle")
    at = float(left)
    for name, colour, curve in curves:
        thin = list(curve)[:: max(1, len(curve) // 300)]
        canvas.path(
            "M" + "L".join(f"{x(e):.1f} {y(v):.1f}" for e, v in thin),
            fill="none",
            stroke=colour,
            stroke_width="2",
            stroke_linejoin="round",
        )
        for epoch, loss in thin if len(thin) == 1 else thin[-1:]:
            canvas.circle(x(epoch), y(loss), 3, colour, f"{name}: {decimal(loss)} after epoch {epoch:,.0f}")
        canvas.rect(at, 6, 14, 4, colour)
        canvas.text(at + 20, 12, name, 12, INK)
        at += 44 + len(name) * 6.6
    canvas.text(14, top + height / 2, "loss", text_anchor="middle", transform=f"rotate(-90 14 {top + height / 2})")
    canvas.text(left + width / 2, top + height + 38, "epoch", text_anchor="middle")
    return canvas.svg(left + width + 16, top + height + 48, "Learning curves")


def overlap(space: LabelSpace) -> Markup:
    """Draw who knows what: sites on the left, joined to the owner sets on the right."""
    sets = list(space.owner_sets.items())
    lines = [_wrap([space.names[c] for c in classes]) for _, classes in sets]
    heights = [26 + 17 * len(text) for text in lines]
    total = sum(heights) + 10 * (len(sets) - 1)
    pills = 34 * len(space.sites)
    height = max(total, pills) + 16
    canvas = Canvas()
    top, start = (height - total) / 2, (height - pills) / 2
    pill_width = 40 + 7.2 * max(len(shorten(site, 20)) for site in space.sites)
    right = pill_width + 130
    middles = [start + 34 * i + 17 for i in range(len(space.sites))]
    tops = [top + sum(heights[:k]) + 10 * k for k in range(len(sets))]
    for (owners, _), y, h in zip(sets, tops, heights, strict=True):
        for place, site in enumerate(owners):
            end = y + h * (place + 1) / (len(owners) + 1)
            curve = f"M{pill_width:.0f} {middles[site]:.1f}C{pill_width + 65:.0f} {middles[site]:.1f} "
            curve += f"{right - 65:.0f} {end:.1f} {right:.0f} {end:.1f}"
            canvas.path(curve, fill="none", stroke=site_colour(site), stroke_width="2", stroke_opacity="0.75")
    for site, y in enumerate(middles):
        canvas.rect(2, y - 13, pill_width - 2, 26, PAPER, space.sites[site], stroke=site_colour(site), rx="13")
        canvas.circle(17, y, 5, site_colour(site))
        canvas.text(29, y + 4.5, shorten(space.sites[site], 20), 13, INK)
    for (owners, classes), text, y, h in zip(sets, lines, tops, heights, strict=True):
        canvas.rect(right, y, 372, h, "#f5f7f9", ", ".join(space.names[c] for c in classes), stroke=LINE, rx="6")
        who = f"{number_of(len(owners), 'owner')}, {number_of(len(classes), 'class', 'classes')}"
        canvas.text(right + 12, y + 17, who, 11)
        for row, words in enumerate(text):
            canvas.text(right + 12, y + 34 + 17 * row, words, 13, INK)
    return canvas.svg(right + 376, height, "Overlap: which sites know which classes")


def overlap_ring(space: LabelSpace, most: int = 40) -> Markup:
    """Draw the first `most` sites on a ring; the more classes two share, the stronger the line between them."""
    n = min(most, len(space.sites))
    canvas = Canvas()
    radius, side = 180, 560
    centre = side / 2
    angles = [2 * math.pi * i / n - math.pi / 2 for i in range(n)]
    spots = [(centre + radius * math.cos(a), centre + radius * math.sin(a)) for a in angles]
    shared = {(i, j): len(space.shared(i, j)) for i in range(n) for j in range(i + 1, n)}
    largest = max(shared.values(), default=0)
    for (i, j), number in sorted(shared.items(), key=lambda item: item[1]):
        if number:
            (x1, y1), (x2, y2) = spots[i], spots[j]
            part = number / largest
            canvas.path(
                f"M{x1:.1f} {y1:.1f}Q{centre:.0f} {centre:.0f} {x2:.1f} {y2:.1f}",
                f"{space.sites[i]} and {space.sites[j]} share {number_of(number, 'class', 'classes')}",
                fill="none",
                stroke=BLUE,
                stroke_width=f"{0.6 + 1.9 * part:.2f}",
                stroke_opacity=f"{0.1 + 0.6 * part:.2f}",
            )
    for site, (angle, (x, y)) in enumerate(zip(angles, spots, strict=True)):
        component = space.components[space.class_sets[site][0]]
        words = f"{space.sites[site]}: {number_of(len(space.class_sets[site]), 'class', 'classes')}"
        canvas.circle(x, y, 5, site_colour(component), words)
        out = (centre + (radius + 12) * math.cos(angle), centre + (radius + 12) * math.sin(angle))
        back = math.cos(angle) < -1e-9
        turn = math.degrees(angle) + (180 if back else 0)
        canvas.text(
            out[0],
            out[1] + 4,
            shorten(space.sites[site], 16),
            11,
            INK,
            text_anchor="end" if back else "start",
            transform=f"rotate({turn:.1f} {out[0]:.1f} {out[1]:.1f})",
        )
    return canvas.svg(side, side, "Overlap: which sites share classes")


def _wrap(names: list[str], width: int = 50, rows: int = 3) -> list[str]:
    """Break a list of names into at most `rows` lines; the last says how many are left out."""
    lines, current = [], ""
    for at, name in enumerate(shorten(name, 40) for name in names):
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
