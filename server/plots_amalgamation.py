"""The figure of the report about features, drawn by matplotlib: teachers and student in two dimensions.

Does not live here: the projection (server/student/picture), and what is drawn (server/report_amalgamation).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from consilience.common.pages.figures import inline, one_line, place, sheet

SIDE = 340
"""Pixels of the square's side."""


def scatter(owners: Sequence[tuple[str, str, Sequence[Sequence[float]]]], shown: Sequence[float], label: str) -> Markup:
    """Draw (name, colour, [[x, y], ...]) as discs, the last on top and as crosses.

    `shown`: the shares of variance of x and y.
    """
    left, top = 36, 14 + 18 * len(owners)
    with sheet(left + SIDE + 16, top + SIDE + 42, label) as figure:
        ax = place(figure, left, top, SIDE, SIDE)
        for at, (name, colour, points) in enumerate(owners):
            cross = at == len(owners) - 1
            rows = np.asarray(points, np.float64).reshape(-1, 2)
            # As pixels: thousands of points of their own would make the page large.
            ax.scatter(
                rows[:, 0],
                rows[:, 1],
                s=26 if cross else 20,
                color=colour,
                alpha=0.8 if cross else 0.6,
                marker="x" if cross else "o",
                linewidth=1.1 if cross else 0,
                label=one_line(name, 40),
                rasterized=True,
            )
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_aspect("equal", adjustable="datalim")
        ax.set_xlabel(f"first principal component, {shown[0] * 100:.0f}% of the variance")
        ax.set_ylabel(f"second, {shown[1] * 100:.0f}%")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0, borderpad=0.3, markerscale=1.8)
        return inline(figure)
