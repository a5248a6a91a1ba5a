"""The audit's figure: ROC curves of attacks on membership, both rates on logarithmic scales.

Does not live here: the curves (membership), how a figure gets into the page (common/pages/figures).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import FixedLocator, NullLocator

from consilience.client.audit.membership import Membership
from consilience.common.pages.figures import BLUE, MUTED, RUST, inline, place, sheet

SIDE = 300
COLOURS = (BLUE, RUST)


def roc(attacks: Sequence[tuple[str, Membership]]) -> Markup:
    """Draw the share of members found against the share of others taken for members, of up to two named attacks."""
    left, top = 72, 14 + 18 * (len(attacks) + 1)
    others = max(found.others for _, found in attacks)
    decades = max(1, math.ceil(math.log10(others)))
    ends = (10.0**-decades, 1.0)
    with sheet(left + SIDE + 24, top + SIDE + 46, "ROC curves of the attacks on membership") as figure:
        ax = place(figure, left, top, SIDE, SIDE)
        for (name, found), colour in zip(attacks, COLOURS, strict=False):
            points = np.clip(np.array(found.roc), ends[0], 1)  # a rate of 0 stands at the edge
            ax.plot(points[:, 0], points[:, 1], color=colour, linewidth=2, label=name, drawstyle="steps-post", zorder=3)
        ax.plot(ends, ends, color=MUTED, linewidth=1, linestyle=(0, (4, 4)), label="guessing")
        ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        ax.set(xlabel="others taken for members, %", ylabel="members found, %")
        ticks = [10.0**-power for power in range(decades, -1, -1)]
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(FixedLocator(ticks))
            axis.set_minor_locator(NullLocator())
        names = [f"{tick * 100:g}" for tick in ticks]
        ax.set_xticks(ticks, names)
        ax.set_yticks(ticks, names)
        ax.yaxis.set_label_coords(-56 / SIDE, 0.5)
        ax.grid()
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0, borderpad=0.3)
        return inline(figure)
