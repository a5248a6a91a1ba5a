"""Coverage in report and card: the sentences about it, its fields in report.json, and what the page shows.

Lives here: wording, warnings and views. Does not live here: the figures (server/judge_coverage), pictures
(server/plots_coverage), markup (templates/coverage.html.j2), gathering (server/publishing_coverage).
"""

from __future__ import annotations

from typing import Any

from consilience.common.labels import LabelSpace
from consilience.common.pages.numbers import decimal, listing, number_of, percent
from consilience.server import plots, plots_coverage
from consilience.server.coverage_check import wrong_claims
from consilience.server.judge_coverage import CoverageFigures
from consilience.server.report_findings import CoverageExamples, CoverageFindings, Findings, SiteFindings
from consilience.server.report_samples import png_data_uri

LEAST_SPREAD = 0.01
"""Coverage that differs by less between any two samples is as good as constant."""
MOST_DRAWN, MOST_LISTED = 12, 40
"""Sites whose coverage is drawn, and those in the table; report.json has all."""
SIDE = 96
"""Pixels of an example's longer side: shown smaller, so that it is sharp on a fine screen."""


def coverage_dict(told: CoverageFindings, space: LabelSpace) -> dict[str, Any]:
    """Return `sites[].coverage` of report.json: all but the images, which are told by their numbers in the pool."""
    figures = told.figures
    drawn: dict[str, Any] | None = None
    if figures is not None:
        drawn = vars(figures) | {
            "roc": None if figures.roc is None else vars(figures.roc),
            "confidence": None if figures.confidence is None else vars(figures.confidence),
            "reliability": [vars(b) for b in figures.reliability],
        }
    ends = {"largest": _examples(told.largest, space), "smallest": _examples(told.smallest, space)}
    return vars(told) | {"figures": drawn} | ends


def coverage_summary(findings: Findings) -> str:
    """Return in a sentence or two who gave coverage and what it was used for; empty where nobody did."""
    gave = _gave(findings)
    if not gave:
        return ""
    unify = findings.unify
    idle = _idle(findings)
    used = [site.name for site in gave if site.coverage.used and site.name not in idle]
    text = f"{number_of(len(gave), 'site')} gave coverage: {listing([site.name for site in gave])}."
    if unify.strength is not None and idle:
        text += f" That of {listing(idle)} counts for nothing: who knows every class has every sample."
    if not used:
        text += " None of it was used" + (", for method sd needs that of every site." if unify.method == "sd" else ".")
    elif unify.strength is not None:
        out = [site.name for site in gave if site.coverage.left_out is not None]
        text += f" It was used with strength {unify.strength:g}"
        others = [f"{site} {value:g}" for site, value in sorted(unify.strengths.items()) if site in used]
        text += f" ({listing(others)})" if others else ""
        text += f", but for that of {listing(out)}." if out else "."
    if unify.components > 1:
        decided = "It decided the odds between components."
        ruled = f"It did not decide the odds between components: the rule {unify.across} did."
        text += f" {decided if unify.joined else ruled}"
    if unify.exponent is None:
        text += (
            " No power of the labels is as sure as the sites claim to be, for what these claim does not agree: labels "
            "were left as they came."
        )
    elif unify.exponent != 1:
        text += (
            f" Labels were made {'surer' if unify.exponent > 1 else 'less sure'} (to the power of "
            f"{decimal(unify.exponent, 2)}), so that they are as sure as the sites' own answers and coverage."
        )
    if unify.other is not None:
        text += (
            f" On average a sample is outside the label space with probability {percent(unify.other)}; "
            f"{number_of(unify.mostly_other or 0, 'sample counts', 'samples count')} less than half for that."
        )
    return text


def coverage_warnings(findings: Findings) -> list[str]:
    """Return what is suspicious about sites' coverage, in plain words."""
    found = []
    for site in _gave(findings):
        told = site.coverage
        if told.figures is not None and told.figures.high - told.figures.low < LEAST_SPREAD:
            found.append(
                f"Site {site.name}: its coverage is nearly the same for every sample (from "
                f"{decimal(told.figures.low)} to {decimal(told.figures.high)}): it tells nothing about them."
            )
        if told.left_out is not None:
            found.append(
                f"Site {site.name}: its coverage is left out of unification because {told.left_out} "
                f"(agreement with the other sites {decimal(told.agreement, 2)}; 0.5 is chance)."
            )
        if told.offset:
            strangers = "" if told.offset < 0 else ", or say by unify.other that the pool has images of no known class"
            found.append(
                f"Site {site.name}: its coverage is far too {'high' if told.offset < 0 else 'low'} by what the other "
                f"sites say of the same samples; its logits were moved by {told.offset:+.1f}. "
                f"Have it learn coverage again{strangers}."
            )
    unify = findings.unify
    if told_of_all := wrong_claims(unify.claimed, closed=unify.other is None):
        found.append(told_of_all)
    return found


def coverage_views(findings: Findings) -> dict[str, Any] | None:
    """Return what the page shows of coverage; None where no site gave any about the pool."""
    gave = _gave(findings)
    if not gave:
        return None
    known = any(site.coverage.figures is not None and site.coverage.figures.mine is not None for site in gave)
    return {
        "summary": coverage_summary(findings),
        "known": known,
        "rows": [_row(site) for site in gave[:MOST_LISTED]],
        "not_listed": max(0, len(gave) - MOST_LISTED),
        "sites": [_view(site, findings.space) for site in gave[:MOST_DRAWN]],
        "not_drawn": max(0, len(gave) - MOST_DRAWN),
    }


def _idle(findings: Findings) -> list[str]:
    """Return the sites whose coverage says nothing, as they know every class and no sample is of another."""
    space, unify = findings.space, findings.unify
    if space.multi or unify.method != "ce" or unify.other is not None:
        return []
    return [site.name for site in _gave(findings) if len(space.class_sets[space.sites.index(site.name)]) == len(space)]


def _gave(findings: Findings) -> list[SiteFindings]:
    return [site for site in findings.sites if site.coverage.figures is not None]


def _row(site: SiteFindings) -> dict[str, Any]:
    figures = site.coverage.figures
    assert figures is not None
    return {
        "name": site.name,
        "samples": figures.samples,
        "mean": figures.mean,
        "share": figures.share,
        "auroc": None if figures.roc is None else figures.roc.auroc,
        "confidence": None if figures.confidence is None else figures.confidence.auroc,
        "error": figures.calibration_error,
        "agreement": site.coverage.agreement,
        "left_out": site.coverage.left_out is not None,
        "mended": bool(site.coverage.offset),
    }


def _view(site: SiteFindings, space: LabelSpace) -> dict[str, Any]:
    told, name = site.coverage, site.name
    figures = told.figures
    assert figures is not None
    return {
        "name": name,
        "classes": listing(list(site.classes), 8),
        "figures": _figures(name, figures),
        "error": figures.calibration_error,
        "ends": [
            (title, _pictures(part, space))
            for title, part in (("Largest coverage", told.largest), ("Smallest coverage", told.smallest))
            if part is not None and len(part.ids)
        ],
    }


def _figures(name: str, figures: CoverageFigures) -> list[Any]:
    """Return the figures that can be drawn: ROC and reliability with true labels only."""
    drawn = []
    if figures.roc is not None:
        curves = (("coverage", figures.roc), ("largest probability", figures.confidence))
        drawn.append(plots_coverage.roc(curves, f"ROC of the coverage of {name}"))
    if figures.reliability:
        axes = ("of its classes, %", "coverage, %, and number of samples")
        label = f"Reliability diagram of the coverage of {name}"
        drawn.append(plots.reliability(figures.reliability, label, axes, plots_coverage.SIDE))
    drawn.append(plots_coverage.histogram(figures.counts, figures.mine, f"Distribution of the coverage of {name}"))
    return drawn


def _examples(part: CoverageExamples | None, space: LabelSpace) -> list[dict[str, Any]]:
    if part is None:
        return []
    names = _names(part, space)
    return [
        {"id": int(at), "coverage": float(value), "class": name}
        for at, value, name in zip(part.ids, part.coverage, names, strict=True)
    ]


def _names(part: CoverageExamples, space: LabelSpace) -> list[str | None]:
    """Return the true classes' names, None where they are not known."""
    if part.truth is None:
        return [None] * len(part.ids)
    return [space.names[label] if label >= 0 else "a class of no site" for label in part.truth]


def _pictures(part: CoverageExamples, space: LabelSpace) -> list[dict[str, Any]]:
    return [
        {**example, "image": png_data_uri(image, SIDE), "percent": percent(example["coverage"])}
        for example, image in zip(_examples(part, space), part.images, strict=True)
    ]
