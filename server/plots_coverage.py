"""Figures of the report about coverage, drawn by matplotlib.

Lives here: the ROC curves and the histogram of one site. Does not live here: what is drawn (server/report_coverage),
the reliability diagram (server/plots), and how a figure gets into the page (common/pages/figures).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from consilience.common.pages.figures import BAR, BLUE, GREY, MUTED, inline, place, sheet
from consilience.common.pages.numbers import decimal
from consilience.server.judge_coverage import Roc

SIDE = 216
"""Pixels of a square figure's side: three stand beside one another."""
_QUARTERS = (0, 0.25, 0.5, 0.75, 1)
_NAMES = ("0", "25", "50", "75", "100")


def roc(curves: Sequence[tuple[str, Roc | None]], label: str) -> Markup:
    """Draw (name, ROC) curves, the first in blue and the others grey; None is not drawn."""
    drawn = [(name, curve) for name, curve in curves if curve is not None]
    left, top = 58, 14 + 18 * len(curves)
    with sheet(left + SIDE + 16, top + SIDE + 42, label) as figure:
        ax = place(figure, left, top, SIDE, SIDE)
        ax.plot((0, 1), (0, 1), color=MUTED, linewidth=1, linestyle=(0, (4, 4)))
        for at, (name, curve) in enumerate(drawn):
            words = f"{name}: {decimal(curve.auroc)}"
            points = np.array(curve.points)
            ax.plot(
                points[:, 0],
                points[:, 1],
                color=GREY if at else BLUE,
                linewidth=1.5 if at else 2.5,
                label=words,
                clip_on=False,
                zorder=2 if at else 3,
            )
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="of other classes, %", ylabel="of its classes, %")
        ax.set_xticks(_QUARTERS, _NAMES)
        ax.set_yticks(_QUARTERS, _NAMES)
        ax.yaxis.set_label_coords(-44 / SIDE, 0.5)
        ax.grid(axis="y")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0, borderpad=0.3)
        return inline(figure)


def histogram(counts: Sequence[int], mine: Sequence[int] | None, label: str) -> Markup:
    """Draw how many samples have how much coverage, in equal bins from 0 to 1; `mine` of them are of its classes."""
    left, top = 58, 50
    edges = np.linspace(0, 1, len(counts) + 1)
    width = edges[1] - 0.006
    own = np.zeros(len(counts)) if mine is None else np.asarray(mine)
    with sheet(left + SIDE + 16, top + SIDE + 42, label) as figure:
        ax = place(figure, left, top, SIDE, SIDE)
        rest = np.asarray(counts) - own
        if mine is None:
            ax.bar(edges[:-1], rest, width, align="edge", color=BAR)
        else:
            ax.bar(edges[:-1], own, width, align="edge", color=BLUE, label="of its classes")
            ax.bar(edges[:-1], rest, width, align="edge", color=BAR, bottom=own, label="of others")
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0, borderpad=0.3)
        most = max(*counts, 1)
        ax.set(xlim=(0, 1), ylim=(0, most), xlabel="coverage, %", ylabel="samples")
        ax.set_xticks(_QUARTERS, _NAMES)
        ax.set_yticks([most], [f"{most:,}"])
        ax.yaxis.set_label_coords(-44 / SIDE, 0.5)
        return inline(figure)
