"""card.md says what was published and let out, and no name can break out of its place in it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from consilience.common.labels import LabelSpace
from consilience.common.pages.numbers import MISSING, percent
from consilience.server.audits import SiteAudit
from consilience.server.card import card_markdown, code, escape
from consilience.server.judge import BASELINES, MOST_CONFUSION, ClassScore, Judgement, Score, SiteScore
from consilience.server.report import render_html, report_dict
from consilience.server.report_findings import (
    CardTexts,
    Findings,
    PoolFindings,
    SiteFindings,
    StudentFindings,
    UnifyFindings,
)
from consilience.server.report_privacy import privacy_summary

CLASSES = ("coat", "bag", "boot", "dress")
SETS = ((0, 1, 2), (2, 1, 3), (3, 2))


def make(classes: tuple[str, ...] = CLASSES, sets: tuple[tuple[int, ...], ...] = SETS, **changes: Any) -> Findings:
    """Return findings with a different score for every contender; `changes` replace fields."""
    space = LabelSpace(classes, tuple(f"s{i:02}" for i in range(len(sets))), sets)
    scores = [Score(k / 10, 20 * k, 200, k / 10 - 0.05, k / 10 + 0.05) for k in range(1, 8)]
    judged = Judgement(
        count=200,
        outside=0,
        student=scores[6],
        baselines=dict(zip(BASELINES, scores, strict=False)),
        best_site="s01",
        classes=tuple(ClassScore(name, 50, 0.5, None, 0.25) for name in classes),
        calibration_error=0.0625,
        reliability=(),
        confusion=None if len(classes) > MOST_CONFUSION else ((0,),),
        confusion_outside=None if len(classes) > MOST_CONFUSION else (0,),
        mistakes=(),
        sites=tuple(SiteScore(name, 9, 0.9, 0.8, 0.85, 0.4, None) for name in space.sites),
    )
    sites = [
        SiteFindings(
            name, tuple(classes[c] for c in known), "train: resnet8", "cd" * 32, 1434, 1434, 2868 * len(known), 3.0
        )
        for name, known in zip(space.sites, sets, strict=True)
    ]
    found = Findings(
        job="three-sites",
        seed=7,
        settings={},
        pool=PoolFindings("ab" * 32, 1234, (8, 8, 1)),
        space=space,
        sites=[replace(site, precision="f16") for site in sites],
        unify=UnifyFindings("ce", "centred", max(space.components) + 1, 0.5),
        student=StudentFindings("resnet8", "soft-labels", 77_850),
        judgement=judged,
        timing={"ask": 1.5},
        versions={"consilience": "0.1.0"},
    )
    return replace(found, **changes)


def card(findings: Findings) -> str:
    return card_markdown(findings, report_dict(findings)).replace("\u00a0", " ")


def section(text: str, name: str) -> str:
    return text.split(f"## {name}\n")[1].split("\n## ")[0]


def test_it_has_every_part() -> None:
    findings = make()
    text = card(findings)
    for part in ("Labels", "Intended use and limits", "What it was made of", "Scores", "Privacy", "How to use it"):
        assert f"\n## {part}\n" in text
    assert text.startswith("# three-sites\n")
    assert "ab" * 32 in section(text, "What it was made of")
    assert "Architecture: resnet8, 77,850 parameters" in text
    assert "8 × 8 × 1" in text
    assert "consilience student predict IMAGE..." in section(text, "How to use it")
    assert "consilience 0.1.0" in section(text, "How to use it")


def test_labels_with_other_names_and_owners() -> None:
    findings = make()
    other = replace(findings.sites[1], classes=("boot", "sack", "dress"))
    rows = section(card(replace(findings, sites=[findings.sites[0], other, findings.sites[2]])), "Labels")
    assert "| 1 | bag | sack | s00, s01 |" in rows
    assert "| 2 | boot |  | s00, s01, s02 |" in rows
    assert "components" not in rows
    assert "fall apart into 2 components" in section(card(make(sets=((0, 1), (2, 3)))), "Labels")


def test_scores_are_the_judgements() -> None:
    findings = make()
    judged = findings.judgement
    assert judged is not None
    scores = section(card(findings), "Scores")
    for score in (judged.student, *judged.baselines.values()):
        assert score is not None
        row = f"| {percent(score.accuracy)} | {percent(score.low)} to {percent(score.high)} |"
        assert row.replace("\u00a0", " ") in scores
    assert f"Expected calibration error: {judged.calibration_error:.3f}." in scores
    assert "nothing is known about the accuracy" in section(card(make(judgement=None)), "Scores")
    outside = card(replace(findings, judgement=replace(judged, outside=2)))
    assert "2 images of classes that no site knows count as wrong" in outside


def test_the_calibration_error_is_told_where_the_site_tells_it() -> None:
    findings = make()
    told = {"method": "dirichlet", "samples": 90, "ece_before": 0.1234, "ece_after": 0.0456}
    first = replace(findings.sites[0], calibration=told | {"nll_before": 0.9, "nll_after": 0.7})
    made_of = section(card(replace(findings, sites=[first, *findings.sites[1:]])), "What it was made of")
    rows = [line.strip("| ").split(" | ") for line in made_of.splitlines() if line.startswith("| s0")]
    assert [row[-1] for row in rows] == ["0.123 → 0.046", MISSING, MISSING]
    assert "| Calibration error |" in made_of


def test_privacy_has_the_exact_numbers_of_every_site() -> None:
    findings = make()
    gone = SiteFindings("south", ("boot",), "vit", "ef", 1001, 3000, 4004, 1.0, 1999, "failed", "f32")
    privacy = section(card(replace(findings, sites=[*findings.sites, gone])), "Privacy")
    assert "No formal guarantee. No audit is told of: over a network a site sees its own alone" in privacy
    assert "Soft labels over the pool left the sites." in privacy
    assert "| s00 | 1,434 | 3 | 16-bit (f16) | 8,604 (8.6 kB) |" in privacy
    assert "| s02 | 1,434 | 2 | 16-bit (f16) | 5,736 (5.7 kB) |" in privacy
    assert "| south | 1,001 | 1 | 32-bit (f32) | 4,004 (4.0 kB) |" in privacy
    assert "south (left out)" in card(replace(findings, sites=[*findings.sites, gone]))


@pytest.mark.parametrize(
    ("privacy", "words"),
    [
        (None, "Answers left the sites unsealed: a SuperLink that carried them could read them."),
        ({"sealed": False, "secure_sum": False}, "Answers left the sites unsealed"),
        ({"sealed": True, "secure_sum": False}, "Answers left the sites sealed: encrypted for the coordinator alone."),
        ({"sealed": False, "secure_sum": True}, "Answers left the sites masked, in secure sums, which are not sealed."),
    ],
)
def test_card_and_report_say_whether_answers_were_sealed(privacy: dict[str, bool] | None, words: str) -> None:
    findings = replace(make(), settings={} if privacy is None else {"privacy": privacy})
    assert words in section(card(findings), "Privacy")
    assert words in render_html(findings, report_dict(findings))


def test_report_and_card_say_that_there_is_no_audit_to_show() -> None:
    findings = make()
    assert "No audit is told of" in render_html(findings, report_dict(findings))
    told = SiteAudit(verdict="Found out", auc=0.9, low=0.8, high=0.95, page=None)
    assert "No audit is told of" not in privacy_summary(replace(findings, audits={"s00": told}))


def test_texts_of_people_take_the_place_of_ours() -> None:
    texts = CardTexts("About *it*.", "For that.", "Not for this.", "CC-BY-4.0")
    text = card(make(card=texts))
    assert "About *it*." in text
    assert "For that.\n\nNot for this." in section(text, "Intended use and limits")
    assert "* Licence: CC-BY-4.0" in text
    assert "Licence" not in card(make())


def test_no_time_stands_in_it() -> None:
    first = make()
    slower = replace(first, timing={"ask": 1e6}, sites=[replace(site, seconds=1e6) for site in first.sites])
    assert card(first) == card(slower)


EVIL = "x | y\n## Scores\n<script>alert(1)</script> [l](javascript:x) `a` *b* ![i](http://e.x)"


def test_names_cannot_break_out() -> None:
    plain = make()
    findings = make((EVIL, "_b_", "c", "d"), job=EVIL)
    space = replace(findings.space, sites=(EVIL, *findings.space.sites[1:]))
    sites = [replace(findings.sites[0], name=EVIL, teacher=EVIL, precision=EVIL), *findings.sites[1:]]
    findings = replace(findings, space=space, sites=sites, warnings=(EVIL,), versions={EVIL: EVIL})
    text = card(findings)
    assert text.count("\n## ") == card(plain).count("\n## ")
    for bad in ("<script", "](javascript", "`a`", "*b*", "(http://", "![i]"):
        at = [match.start() for match in re.finditer(re.escape(bad), text)]
        assert all(text[i - 1] == "\\" for i in at), bad
    table = [line for line in section(text, "Labels").splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {5}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("T-shirt", "T-shirt"),
        ("dollar_bill", "dollar_bill"),
        ("_x_", "\\_x\\_"),
        ("a|b\nc\td", "a\\|b c d"),
        ("# no", "\\# no"),
        ("- no", "\\- no"),
        ("12. no", "12\\. no"),
        ("v1.2", "v1.2"),
        ("http://a.b", "http\\://a.b"),
        ("www.a.b", "www\\.a.b"),
        ("a\\*b", "a\\\\\\*b"),
        ("<b>&amp;", "\\<b\\>\\&amp;"),
        ("naïve 猫", "naïve 猫"),
    ],
)
def test_escape(text: str, expected: str) -> None:
    assert escape(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("ce", "`ce`"), ("a`b", "``a`b``"), ("`a``", "``` `a`` ```"), ("", "`  `")]
)
def test_code(text: str, expected: str) -> None:
    assert code(text) == expected
