"""Knowledge concentration in report and card: the sentences about it, and what the page shows.

Lives here: wording and views. Does not live here: the figures (server/concentration, server/judge_verticals), markup
(templates/concentration.html.j2).
"""

from __future__ import annotations

from typing import Any

from consilience.common.pages.numbers import listing, number_of, percent
from consilience.server.report_findings import Findings

MOST_LISTED = 40
"""Verticals in the table; report.json has all."""
_HEADS = {
    "fc-fc": "both shared",
    "fc-sc": "the second one a block for each vertical",
    "sc-sc": "a block for each vertical",
}


def concentration_summary(findings: Findings) -> str:
    """Return in a few sentences what was learnt from which specialists; empty where nothing was."""
    told = findings.concentration
    if told is None:
        return ""
    verticals = number_of(len(told["verticals"]), "vertical")
    text = f"The student learned by knowledge concentration (Gao et al., 2017) over {verticals}, "
    if told["target"] == "specialist":
        by = [f"{number_of(count, 'sample')} by {what}" for what, count in told["routed_by"].items() if count]
        text += f"each sample from one specialist: {listing(by)}. "
        if elsewhere := told.get("samples_elsewhere"):
            text += f"{number_of(elsewhere, 'sample')} went to verticals without a wanted class. "
    else:
        text += "from unified soft labels. "
    text += f"Kept of each sample: at most {number_of(told['keep'], 'probability', 'probabilities')}"
    verticals = told["verticals"] if told["target"] == "specialist" else []
    short = [held["name"] for held in verticals if held["kept"] < told["keep"]]
    text += f"; all classes of {listing(short)}, which has no more. " if len(short) == 1 else ""
    text += f"; all classes of {listing(short)}, which have no more. " if len(short) > 1 else ". " if not short else ""
    head, weights = told["head"], number_of(told["weights"], "weight")
    text += f"Its head has layers of {head['first']:,} and {head['second']:,} units, {_HEADS[head['kind']]}"
    text += f", {head['shared']:,} of the second one shared" * bool(head["shared"]) + f": {weights}."
    if head["scaling"] != "none":
        text += f" A vertical’s scores are brought to length 1 and scaled by {head['scaling']}."
    if (mean := told.get("mpvap")) and mean["within"] is not None:
        text += f" Mean average precision over verticals: {percent(mean['within'])} within a vertical, "
        text += f"{percent(mean['against_all'])} against all classes."
    return text


def concentration_views(findings: Findings) -> dict[str, Any] | None:
    """Return what the page shows of verticals; None for a student without."""
    told = findings.concentration
    if told is None:
        return None
    return {
        "summary": concentration_summary(findings),
        "judged": "mpvap" in told,
        "rows": [
            {
                "name": held["name"],
                "classes": len(held["classes"]),
                "specialists": listing(held["specialists"]) or "–",
                "samples": held.get("samples"),
                "kept": held["kept"],
                "precision": held.get("average_precision", {"within": None, "against_all": None}),
            }
            for held in told["verticals"][:MOST_LISTED]
        ],
    }
