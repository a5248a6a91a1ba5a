"""What report, page, card and terminal tell of a multi-label run in place of accuracy: average precision by label.

Lives here: the fields of report.json, wording, warnings and views. Does not live here: the metrics
(server/judge_labels), markup (templates/), runs of one label an image (server/report, server/report_page). The terminal
shows a finished run without torch: what only types need is imported for them alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from consilience.common.pages.numbers import decimal, listing, number_of

if TYPE_CHECKING:
    from consilience.server.judge_labels import LabelJudgement
    from consilience.server.report_findings import Findings

CONTENDERS = (
    ("student", "Student", "the one classifier of this run"),
    ("unified_ensemble", "Unified ensemble", "all sites asked each time, answers unified"),
    ("naive", "Naive ensemble", "mean of the probabilities of the sites that know a label"),
    ("best_site", "Best single site", "the best of the sites on its own; of a label it does not know it says nothing"),
    ("oracle", "Oracle", "the student’s architecture, trained with the pool’s true labels"),
)
MOST_LABELS, LOWEST_LABELS = 40, 20
"""Rows of the table of labels; of more labels, those with the lowest average precision."""


def multi_dict(judged: LabelJudgement) -> dict[str, Any]:
    """Return `multi_label` of report.json."""
    return {
        "mean_ap": judged.student,
        "baselines": dict(judged.baselines),
        "best_site": judged.best_site,
        "calibration_error": judged.calibration_error,
        "per_label": [vars(score) for score in judged.labels],
        "reliability": [vars(b) for b in judged.reliability],
    }


def multi_headline(findings: Findings, judged: LabelJudgement | None) -> str:
    """Return the result in one sentence."""
    space, taught = findings.space, findings.student.taught
    many = number_of(len(space), "label") if taught is None else f"{len(taught):,} of {number_of(len(space), 'label')}"
    made = f"One classifier for {many} that do not exclude one another"
    made += f", from {number_of(len(space.sites), 'site')}"
    if judged is None:
        return f"{made}. No labelled test set was given: nothing is known about how good it is."
    text = f"{made}: mean average precision {decimal(judged.student)} on {number_of(judged.count, 'test image')}"
    told = (("naive", "the naive ensemble"), ("best_site", "the best single site"), ("oracle", "the oracle"))
    others = [f"{words} {decimal(value)}" for name, words in told if (value := judged.baselines[name]) is not None]
    return f"{text}; {', '.join(others)}." if others else f"{text}."


def multi_warnings(findings: Findings, judged: LabelJudgement | None) -> list[str]:
    """Return what the numbers themselves warn of, in plain words."""
    if judged is None:
        return ["There was no labelled test set: nothing is known about how good the student is."]
    found = []
    untested = [score.name for score in judged.labels if not score.support]
    if untested:
        found.append(f"No test image has {listing(untested)}: nothing is known about how well they are found.")
    names = ("naive", "best_site") if len(findings.space.sites) > 1 else ("best_site",)
    for name in names:
        other, own = judged.baselines[name], judged.student
        words = "the naive ensemble" if name == "naive" else f"the single site {judged.best_site}"
        if other is not None and own is not None and other > own:
            found.append(
                f"On these test images {words} has a higher mean average precision ({decimal(other)}) than the student "
                f"({decimal(own)})."
            )
    return found


def multi_view(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the page shows of `multi_label`: bars of the contenders and rows of labels; None without a test."""
    told = report["multi_label"]
    if told is None:
        return None
    values = {"student": told["mean_ap"], **told["baselines"]}
    bars = [
        {
            "kind": key if key in ("student", "oracle") else "other",
            "name": name,
            "about": f"{about}: {told['best_site']}" if key == "best_site" else about,
            "value": decimal(values[key]),
            "width": f"{values[key] * 100:.2f}",
        }
        for key, name, about in CONTENDERS
        if values[key] is not None
    ]
    return {"bars": bars, "calibration_error": told["calibration_error"], **label_rows(told["per_label"])}


def label_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the rows of the table of labels: all, or those that the student finds worst when there are too many."""
    if len(rows) <= MOST_LABELS:
        return {"rows": list(rows), "left_out": 0}
    tested = sorted((row for row in rows if row["support"]), key=lambda row: (row["student"], row["name"]))
    return {"rows": tested[:LOWEST_LABELS], "left_out": len(rows) - len(tested[:LOWEST_LABELS])}


def multi_lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the contenders and their scores as the terminal and the card show them."""
    told = report["multi_label"]
    values = dict.fromkeys(key for key, _, _ in CONTENDERS)
    if told is not None:
        values = {"student": told["mean_ap"], **told["baselines"]}
    return [(name, decimal(values[key])) for key, name, _ in CONTENDERS]
