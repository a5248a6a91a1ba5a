"""Trust and the estimate without labels, in report and card: their fields, warnings, and what the page shows.

Lives here: wording and views. Does not live here: trust (server/robust), the estimate (server/quality), markup
(templates/quality.html.j2).
"""

from __future__ import annotations

from typing import Any

from consilience.common.pages.numbers import listing, number_of, percent
from consilience.server.quality import Estimate
from consilience.server.report_findings import Findings

MOST_LISTED = 40
"""Rows of the tables of sites and of classes; report.json has all."""
_ADVICE = {
    "": "",
    "more pool": "more pool samples, or longer training",
    "more owners": "more sites that know it",
    "recalibrate": "sites that recalibrate",
}


def trust_dict(findings: Findings) -> dict[str, Any] | None:
    """Return `unify.trust` of report.json; None without `unify.robust`."""
    return None if findings.trust is None else findings.trust.model_dump(mode="json")


def quality_dict(findings: Findings) -> dict[str, Any] | None:
    """Return `quality` of report.json; None where the student was not estimated at all."""
    return None if findings.quality is None else findings.quality.model_dump(mode="json")


def quality_summary(findings: Findings) -> str:
    """Return in a sentence or two what is estimated without labels, or why nothing is; empty without an estimate."""
    quality = findings.quality
    if quality is None:
        return ""
    if quality.accuracy is None:
        return f"Without labels nothing can be said of the student’s accuracy: {quality.reason}."
    told = {site.by for site in quality.sites.values()}
    by = "what sites’ answers claim" if told == {"claimed"} else "what sites tell of their held-out images"
    if len(told) > 1:
        by += ", or where they do not, what their answers claim"
    return (
        f"Without labels, by the sites’ answers about {number_of(quality.samples, 'pool sample')} and {by}, the "
        f"student is estimated to be right on {_words(quality.accuracy)} of images like the pool’s."
    )


def quality_warnings(findings: Findings) -> list[str]:
    """Return which sites are contradicted, of which classes nothing can be known, and who should recalibrate."""
    found = []
    if (trust := findings.trust) is not None:
        for name, site in trust.sites.items():
            if 0 < site.trust < 1:
                found.append(
                    f"Site {name}: the others confirm less of its answers than of one another's, so that they count "
                    f"{site.trust:.2f} times as much. It may lie now and then, or be surer than it should be."
                )
            if not site.left_out:
                continue
            what = "its answers are" if not site.trust else f"what it says of {listing(list(site.left_out), 8)} is"
            found.append(
                f"Site {name}: {what} left out of unification, for most of the sites that know the same classes "
                "contradict it. It may lie, hardly know them, or mean something else by their names."
            )
        if trust.lost:
            found.append(
                f"No label has {listing(list(trust.lost), 8)}: none but sites that are left out know such a class. Ask "
                "more sites that know it."
            )
        if trust.divided:
            found.append(
                "The sites contradict one another without a majority: nobody’s answers are left out, and which are "
                "right cannot be known."
            )
        if trust.unjudged:
            found.append(
                f"Nothing can be known about the honesty of sites on {listing(list(trust.unjudged), 8)}: fewer than "
                "three sites could be compared there, or they are divided."
            )
    for name, told in () if findings.quality is None else findings.quality.sites.items():
        if told.advice:
            by = "the site tells" if told.by == "held-out" else "its answers claim"
            found.append(
                f"Site {name}: by the unified labels it is right on {percent(told.labels)} of its classes’ samples, "
                f"and {by} {percent(told.known)}: its calibration is off, or its images are unlike the pool’s."
            )
    return found


def quality_views(findings: Findings) -> dict[str, Any] | None:
    """Return what the page shows; None where there is neither an estimate nor trust."""
    quality, trust = findings.quality, findings.trust
    if quality is None and trust is None:
        return None
    judged = findings.judgement
    truth = {} if judged is None else {c.name: c.recall for c in judged.classes}
    classes = [] if quality is None else list(quality.classes.items())
    if len(classes) > MOST_LISTED:
        classes.sort(key=lambda item: 1.0 if item[1].recall is None else item[1].recall.value)
    names = list(trust.sites if trust is not None else (quality.sites if quality is not None else ()))
    return {
        "summary": quality_summary(findings),
        "classes": [
            {
                "name": name,
                "recall": "–" if told.recall is None else _words(told.recall),
                "truth": truth.get(name),
                "labels": told.labels,
                "owners": told.owners,
                "advice": _ADVICE[told.advice],
            }
            for name, told in classes[:MOST_LISTED]
        ],
        "judged": judged is not None,
        "trusted": trust is not None,
        "sites": [_site(findings, name) for name in names[:MOST_LISTED]],
        "not_listed": max(0, len(names) - MOST_LISTED) + max(0, len(classes) - MOST_LISTED),
    }


def _site(findings: Findings, name: str) -> dict[str, Any]:
    trust = None if findings.trust is None else findings.trust.sites.get(name)
    quality = None if findings.quality is None else findings.quality.sites.get(name)
    return {
        "name": name,
        "student": "–" if quality is None or quality.student is None else _words(quality.student),
        "known": None if quality is None else quality.known,
        "agreement": None if trust is None else trust.agreement,
        "compared": 0 if trust is None else trust.sites,
        "samples": 0 if trust is None else round(trust.samples),
        "weight": None if trust is None else trust.trust,
        "left_out": "" if trust is None else "all" if not trust.trust else listing(list(trust.left_out), 8),
    }


def _words(told: Estimate) -> str:
    return f"{percent(told.value)} ({percent(told.low)} to {percent(told.high)})"
