"""Filtered amalgamation in report and card: the sentences about it, and what the page shows.

Lives here: wording and views. Does not live here: the figures (server/filtered, server/student/filtered), markup
(templates/filtered.html.j2).
"""

from __future__ import annotations

from typing import Any

from consilience.common.pages.numbers import listing, number_of, size
from consilience.server.report_findings import Findings

MOST_LISTED = 40
"""Branches in the table; report.json has all."""
_BEGAN = {"teacher": "that teacher’s weights", "random": "random weights", "fresh": "fresh blocks of its own"}


def filtered_summary(findings: Findings) -> str:
    """Return in a few sentences what the student is made of; empty where it is no student of branches."""
    told = findings.filtered
    if told is None:
        return ""
    parts, branches = told["parameters"], told["branches"]
    text = (
        f"The student was made to order by filtered amalgamation (Ye et al., 2019): a trunk of {told['architecture']} "
    )
    text += f"and {number_of(len(branches), 'branch', 'branches')}. It has {number_of(parts['total'], 'parameter')} "
    text += f"({parts['trunk']:,} in the trunk, {parts['filters']:,} in filters, {parts['branches']:,} in branches); a "
    text += f"whole {told['architecture']} for all {number_of(len(findings.space), 'class', 'classes')} that the sites "
    text += f"know has {parts['whole']:,}. "
    what = {"teachers": "each branch its teacher’s answers", "unified": "from unified soft labels"}[told["target"]]
    text += f"All together learned {what}." if told["together"] else "It was not trained all together at the end."
    if told["lent"]:
        text += f" Blocks were lent by {listing(list(told['lent']))}."
    for site, asked in told["asked"].items():
        text += f" The blocks of {site} stayed there, and were asked {number_of(asked['rounds'], 'question')} about "
        text += f"{number_of(asked['samples'], 'sample')}: {size(asked['sent'])} there, {size(asked['received'])} back."
    return text


def filtered_views(findings: Findings) -> dict[str, Any] | None:
    """Return what the page shows of branches; None for a student without."""
    told = findings.filtered
    if told is None:
        return None
    stages = sorted({int(stage) for branch in told["branches"] for stage in branch["agreement"]})
    return {
        "summary": filtered_summary(findings),
        "stages": stages,
        "held_out": told["held_out"],
        "rows": [
            {
                "name": branch["task"],
                "site": branch["site"],
                "classes": listing(branch["classes"], 8),
                "block": branch["block"],
                "begins": _BEGAN[branch["begins"]],
                "parameters": branch["parameters"],
                "agreement": [_agreement(branch["agreement"].get(str(stage))) for stage in stages],
            }
            for branch in told["branches"][:MOST_LISTED]
        ],
    }


def _agreement(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
