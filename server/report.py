"""report.json and report.html: what a run found, for programs and for people.

Lives here: the fields of report.json, the sentence that says it all, and the warnings that follow from the numbers.
Does not live here: the metrics (server/judge), how the page is laid out (server/report_page and templates/).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from consilience.common.labels import LabelSpace
from consilience.common.pages.numbers import listing, number_of, percent
from consilience.server.judge import BASELINES, Judgement, Score, SiteScore
from consilience.server.judge_labels import LabelSite
from consilience.server.report_amalgamation import amalgamation_warnings
from consilience.server.report_chosen import chosen_words
from consilience.server.report_coverage import coverage_dict, coverage_summary, coverage_warnings
from consilience.server.report_findings import Findings, SiteFindings
from consilience.server.report_multi import multi_dict, multi_headline, multi_warnings
from consilience.server.report_page import render_page
from consilience.server.report_privacy import privacy_summary
from consilience.server.report_quality import quality_dict, quality_summary, quality_warnings, trust_dict

_ABSOLUTE = re.compile(r"(?:/|[A-Za-z]:[\\/]).*?([^\\/]+)[\\/]*", re.DOTALL)


def report_dict(findings: Findings) -> dict[str, Any]:
    """Return report.json: strict JSON values, null for what is not known, never NaN.

    Of a multi-label run `multi_label` tells mean average precision in place of accuracy, which is null; of another it
    is null. `student.accuracy`, `student.calibration_error` and every `baselines.*.accuracy` are numbers or null; lists
    are empty where there is nothing to list. `student.classes` are the student's outputs where it did not learn all of
    `labels.names`, else null. What may differ between two runs of one seed is named at `comparable`.
    Absolute paths in the settings keep their last part only: a report is shown to others.
    """
    judged = findings.judgement
    space = findings.space
    labelled = findings.labelled
    scores = {site.name: site for site in judged.sites} if judged else {}
    by_label = {site.name: site for site in labelled.sites} if labelled else {}
    report = {
        "job": findings.job,
        "seed": findings.seed,
        "headline": headline(findings),
        "settings": _without_folders(findings.settings),
        "pool": vars(findings.pool),
        "labels": {
            "names": space.names,
            "kind": "multi" if space.multi else "single",
            "owners": {
                name: [space.sites[i] for i in owners] for name, owners in zip(space.names, space.owners, strict=True)
            },
            "components": space.components,
            "synonyms": findings.synonyms(),
            "groups": findings.groups(),
        },
        "warnings": [*findings.warnings, *derived_warnings(findings)],
        "student": _student(findings),
        "test": _test(findings),
        "multi_label": None if labelled is None else multi_dict(labelled),
        "baselines": _baselines(judged),
        "sites": [_site(site, scores.get(site.name), by_label.get(site.name), space) for site in findings.sites],
        "left_out": findings.left_out,
        "unify": {
            "method": findings.unify.method,
            "across": findings.unify.across,
            "components": findings.unify.components,
            "seconds": findings.unify.seconds,
            "converged": findings.unify.converged,
            "residual": findings.unify.residual,
            "joined": findings.unify.joined,
            "strength": findings.unify.strength,
            "strengths": dict(findings.unify.strengths),
            "other": findings.unify.other,
            "mostly_other": findings.unify.mostly_other,
            "claimed": findings.unify.claimed,
            "exponent": findings.unify.exponent,
            "coverage": coverage_summary(findings) or None,
            "trust": trust_dict(findings),
        },
        "quality": quality_dict(findings),
        "privacy": privacy_summary(findings),
        "audits": {name: audit.model_dump(mode="json") for name, audit in findings.audits.items()},
        "agreement": findings.agreement,
        "amalgamation": findings.amalgamation,
        "partition": None
        if findings.partition is None
        else {
            "sites": findings.partition.sites,
            "classes": findings.partition.classes,
            "counts": findings.partition.counts,
        },
        "learning": dict(findings.learning),
        "timing": findings.timing,
        "versions": findings.versions,
    }
    plain: dict[str, Any] = _plain(report)
    return plain


def comparable(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of report.json without what may differ between two runs of one seed.

    Dropped: `timing`, `versions`, `unify.seconds`, `sites[].seconds`, `learning.*[].seconds`, and `sites[].key`, which
    a simulation makes anew. All else is equal when job, seed, pool, sites and software are.
    """
    kept = copy.deepcopy({name: value for name, value in report.items() if name not in ("timing", "versions")})
    curves = [epoch for curve in kept.get("learning", {}).values() for epoch in curve or ()]
    for part in (kept.get("unify", {}), *kept.get("sites", ()), *curves):
        part.pop("seconds", None)
    for site in kept.get("sites", ()):
        site.pop("key", None)
    return kept


def render_html(findings: Findings, report: Mapping[str, Any]) -> str:
    """Return report.html: one file, no script, nothing fetched. `report` is `report_dict(findings)`."""
    return render_page(findings, report)


def headline(findings: Findings) -> str:
    """Return the result in one sentence."""
    space, judged = findings.space, findings.judgement
    if space.multi:
        return multi_headline(findings, findings.labelled)
    made = f"One classifier for {chosen_words(findings)}"
    made += f", from {number_of(len(space.sites), 'site')}"
    if judged is None:
        if findings.quality is not None and findings.quality.accuracy is not None:
            return f"{made}. No labelled test set was given. {quality_summary(findings)}"
        return f"{made}. No labelled test set was given: nothing is known about its accuracy."
    text = f"{made}: {percent(judged.student.accuracy)} on {number_of(judged.count, 'test image')}"
    told = (
        ("naive", "the naive ensemble reaches {}"),
        ("best_site", "the best single site {}"),
        ("oracle", "training on the pool’s true labels {}"),
    )
    others = [words.format(percent(s.accuracy)) for name, words in told if (s := judged.baselines.get(name))]
    return f"{text}; {', '.join(others)}." if others else f"{text}."


def derived_warnings(findings: Findings) -> list[str]:
    """Return what the numbers themselves warn of, in plain words."""
    found = []
    for site in findings.sites:
        lacking = f"{number_of(site.missed, 'sample')} of {site.asked:,} went unanswered" if site.missed else ""
        why = f" ({site.reason})" if site.reason else ""
        if site.name not in findings.space.sites:
            found.append(f"Site {site.name} is left out{': ' + lacking if lacking else ''}{why}.")
        elif site.missed:
            found.append(f"Site {site.name}: {lacking}{why}.")
        if (told := site.coverage).missed and site.name in findings.space.sites:
            total = told.answers + told.missed
            found.append(f"Site {site.name}: no coverage for {number_of(told.missed, 'sample')} of {total:,}{why}.")
    found += [f"{who[0].upper()}{who[1:]} does not take part: {why}." for who, why in findings.left_out.items()]
    found += coverage_warnings(findings)
    found += quality_warnings(findings)
    found += amalgamation_warnings(findings)
    pool = findings.pool
    if pool.left_out:
        worst = sorted(pool.unknown, key=lambda name: -pool.unknown[name])
        found.append(
            f"{number_of(pool.left_out, 'sample')} of {pool.size:,} in the pool are left out of learning: no site that "
            f"answered them knows {listing(worst)}."
        )
    judged = findings.judgement
    if findings.space.multi:
        return [*found, *multi_warnings(findings, findings.labelled)]
    if judged is None:
        if findings.quality is not None and findings.quality.accuracy is not None:
            return [*found, "There was no labelled test set: the student’s accuracy is an estimate."]
        return [*found, "There was no labelled test set: nothing is known about the student’s accuracy."]
    if judged.outside:
        found.append(
            f"{number_of(judged.outside, 'test image')} of {judged.count:,} show classes that no site knows: "
            "no contender can get them right, and they count as wrong."
        )
    untested = [c.name for c in judged.classes if not c.support]
    if untested:
        found.append(f"The test set shows no image of {listing(untested)}: nothing is known about them.")
    # With one site the two are the same thing, said once.
    names = ("naive", "best_site") if len(findings.space.sites) > 1 else ("best_site",)
    for name in names:
        other = judged.baselines.get(name)
        words = "the naive ensemble" if name == "naive" else f"the single site {judged.best_site}"
        if other is not None and other.correct > judged.student.correct:
            found.append(
                f"On these test images {words} is right more often ({percent(other.accuracy)}) than the student "
                f"({percent(judged.student.accuracy)})."
            )
    return found


def _test(findings: Findings) -> dict[str, int] | None:
    if findings.labelled is not None:
        return {"count": findings.labelled.count, "outside": 0, "unwanted": 0}
    judged = findings.judgement
    if judged is None:
        return None
    return {"count": judged.count, "outside": judged.outside, "unwanted": judged.unwanted}


def _student(findings: Findings) -> dict[str, Any]:
    judged, student = findings.judgement, findings.student
    about = {
        "architecture": student.architecture,
        "learning": student.learning,
        "parameters": student.parameters,
        "classes": None if student.taught is None else student.taught.names,
        "other": student.other,
        "other_share": student.other_share,
        "concentration": findings.concentration,
        "filtered": findings.filtered,
    }
    if judged is None:
        empty = {"correct": None, "calibration_error": None, "confusion": None, "confusion_outside": None}
        return about | _score(None) | empty | {"per_class": [], "reliability": []}
    return (
        about
        | _score(judged.student)
        | {
            "correct": judged.student.correct,
            "calibration_error": judged.calibration_error,
            "per_class": [vars(c) for c in judged.classes],
            "reliability": [vars(b) for b in judged.reliability],
            "confusion": judged.confusion,
            "confusion_outside": judged.confusion_outside,
        }
    )


def _baselines(judged: Judgement | None) -> dict[str, dict[str, Any]]:
    found = {name: _score(judged.baselines.get(name) if judged else None) for name in BASELINES}
    found["best_site"]["site"] = judged.best_site if judged else None
    return found


def _score(score: Score | None) -> dict[str, Any]:
    if score is None:
        return {"accuracy": None, "interval": None}
    return {"accuracy": score.accuracy, "interval": (score.low, score.high)}


def _site(site: SiteFindings, score: SiteScore | None, by_label: LabelSite | None, space: LabelSpace) -> dict[str, Any]:
    names = ("accuracy", "teacher_accuracy", "student_accuracy", "student_accuracy_restricted", "confidence_auroc")
    return {
        **vars(site),
        "coverage": coverage_dict(site.coverage, space),
        "features": None if site.features is None else vars(site.features),
        "took_part": site.name in space.sites,
        "test_images": score.count if score else None,
        **{name: getattr(score, name) if score else None for name in names},
        "teacher_ap": by_label.teacher if by_label else None,
        "student_ap": by_label.student if by_label else None,
    }


def _without_folders(value: Any) -> Any:
    """Shorten every absolute path in a settings tree to its last part."""
    if isinstance(value, Mapping):
        return {name: _without_folders(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(part) for part in value]
    if isinstance(value, str) and (match := _ABSOLUTE.fullmatch(value)):
        return match[1]
    return value


def _plain(value: Any) -> Any:
    """Turn arrays, NumPy numbers and tuples into JSON's own values, and what is not finite into None."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
