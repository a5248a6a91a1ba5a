"""report.json has every promised field, the page is one safe file, and large or missing pieces are handled."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from consilience.common.labels import LabelSpace
from consilience.common.pages import numbers
from consilience.common.pages.figures import BAR, BLUE, INK, RUST, site_colour
from consilience.server import plots, plots_amalgamation
from consilience.server.card import card_markdown
from consilience.server.judge import BASELINES, Bin, Judgement, agreement, judge
from consilience.server.judge_coverage import coverage_figures
from consilience.server.quality import ClassQuality, Estimate, Quality, SiteQuality
from consilience.server.report import comparable, headline, render_html, report_dict
from consilience.server.report_amalgamation import amalgamation_views
from consilience.server.report_findings import (
    CoverageExamples,
    CoverageFindings,
    FeatureFindings,
    Findings,
    Partition,
    PoolFindings,
    Samples,
    SiteFindings,
    StudentFindings,
    UnifyFindings,
)
from consilience.server.report_page import bars, classes, confusion, contenders, overlap
from consilience.server.report_samples import LARGEST_SIDE, png_data_uri, sample_views
from consilience.server.robust import SiteTrust, Trust

CLASSES = ("coat", "bag", "boot", "dress")
SETS = ((0, 1, 2), (2, 1, 3), (3, 2))


def make(
    classes: tuple[str, ...] = CLASSES,
    sets: tuple[tuple[int, ...], ...] = SETS,
    *,
    seed: int = 0,
    m: int = 200,
    pictures: int = 4,
    shape: tuple[int, int, int] = (8, 8, 1),
    **changes: Any,
) -> Findings:
    """Return complete findings of sites s00, s01, ... with the given class sets; `changes` replace fields."""
    rng = np.random.default_rng(seed)
    space = LabelSpace(classes, tuple(f"s{i:02}" for i in range(len(sets))), sets)

    def logs(rows: int, width: int) -> np.ndarray:
        return np.log(rng.dirichlet(np.ones(width), rows)).astype(np.float32)

    answers = [logs(m, len(known)) for known in sets]
    pool_answers = [logs(pictures, len(known)) for known in sets]
    counts = np.zeros((len(sets), len(classes)), np.int64)
    for site, known in enumerate(sets):
        counts[site, list(known)] = rng.integers(1, 90, len(known))
    curve = [{"epoch": e, "loss": 2.0 / e, "learning_rate": 0.1, "seconds": float(rng.uniform())} for e in (1, 2, 3)]
    found = Findings(
        job="three-sites",
        seed=7,
        settings={"name": "three-sites", "simulation": {"data": {"path": "/home/someone/private/pool.npz"}}},
        pool=PoolFindings("ab" * 32, 1234, shape),
        space=space,
        sites=[
            SiteFindings(
                name=name,
                classes=tuple(classes[c] for c in known),
                teacher="train: resnet8",
                fingerprint="cd" * 32,
                answers=1434,
                asked=1434,
                bytes=1434 * 2 * len(known),
                seconds=float(rng.uniform(1, 9)),
                precision="f16",
            )
            for name, known in zip(space.sites, sets, strict=True)
        ],
        unify=UnifyFindings("ce", "centred", max(space.components) + 1, float(rng.uniform()), 1.0, 1e-7),
        student=StudentFindings("resnet8", "soft-labels", 77_850),
        warnings=tuple(space.warnings()),
        judgement=judge(
            rng.integers(0, len(classes), m),
            space,
            answers,
            rng.dirichlet(np.ones(len(classes)), m),
            logs(m, len(classes)),
            logs(m, len(classes)),
        ),
        learning={"student": curve, "oracle": curve},
        agreement=agreement([answers], space),
        partition=Partition(space.sites, classes, counts),
        samples=Samples(
            np.arange(pictures) * 10,
            rng.integers(0, 256, (pictures, *shape)).astype(np.uint8),
            rng.dirichlet(np.ones(len(classes)), pictures).astype(np.float32),
            pool_answers,
            logs(pictures, len(classes)),
            rng.integers(0, len(classes), pictures),
        ),
        timing={"ask": 1.5, "learn": 75.0},
        versions={"consilience": "0.1.0", "python": "3.11"},
    )
    return replace(found, **changes)


def bare() -> Findings:
    """Return the least that a run can have found."""
    return make(judgement=None, learning={}, agreement=None, partition=None, samples=None, timing={}, versions={})


def wide(sites: int, classes: int, **changes: Any) -> Findings:
    """Return findings of many sites and classes, each site with ten classes that overlap the next site's."""
    sets = tuple(tuple((i * classes // sites + k) % classes for k in range(10)) for i in range(sites))
    covered = {c for known in sets for c in known}
    sets = ((*sets[0], *(c for c in range(classes) if c not in covered)), *sets[1:])
    return make(tuple(f"class {c}" for c in range(classes)), sets, m=1000, **changes)


def amalgamated() -> Findings:
    """Return findings of a student that learned by layers from two of three sites."""
    layer = {
        "tap": "layer1",
        "channels": {"s00": 32, "s02": 48},
        "components": {"s02": 0.875},
        "width": 40,
        "explained": 0.42,
        "by_site": {"s00": 0.5, "s02": 0.375},
        "losses": [21.5, 3.25],
    }
    told = {
        "learning": "layer-wise",
        "target": "unified",
        "without": ["s01"],
        "samples": 77,
        "layers": [layer, {"tap": "scores", "losses": [1.0, 0.5]}],
        "picture": {"points": {"amalgamated": [[0, 1], [1, 0]], "student": [[0, 0], [2, 2]]}, "shown": [0.6, 0.3]},
    }
    made = make(amalgamation=told)
    features = FeatureFindings(("layer1",), "u8", 5_000_000, 70, 7)
    sites = [replace(site, features=None if site.name == "s01" else features) for site in made.sites]
    return replace(made, sites=sites)


EVIL = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Collects tags, attributes and text; remembers whether every element was closed in order."""

    VOID = frozenset({"meta", "img", "br", "hr", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(str(html))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def page(findings: Findings) -> Page:
    found = Page(render_html(findings, report_dict(findings)))
    assert "script" not in found.tags
    assert found.tags.count("style") == 1
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for name, value in found.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert value.startswith("data:image/png;base64,") or value.removeprefix("#") in ids
        for target in re.findall(r"url\(([^)]*)", value):
            assert target.removeprefix("#") in ids
    return found


def words(findings: Findings) -> str:
    return " ".join(page(findings).text.split())


def strict(report: dict[str, Any]) -> dict[str, Any]:
    """Through JSON and back: refuses NaN and anything JSON cannot say, and changes nothing."""
    back: dict[str, Any] = json.loads(json.dumps(report, allow_nan=False))
    assert back == report
    return back


class TestReportDict:
    def test_every_promised_field_is_there(self) -> None:
        findings = make()
        judged = findings.judgement
        assert judged is not None
        report = strict(report_dict(findings))
        assert report["student"]["accuracy"] == judged.student.accuracy
        assert report["student"]["calibration_error"] == judged.calibration_error
        assert [row["name"] for row in report["student"]["per_class"]] == list(findings.space.names)
        assert [row["recall"] for row in report["student"]["per_class"]] == [c.recall for c in judged.classes]
        for name in BASELINES:
            score = judged.baselines[name]
            assert score is not None
            assert report["baselines"][name]["accuracy"] == score.accuracy
            assert report["baselines"][name]["interval"] == [score.low, score.high]
        assert report["baselines"]["best_site"]["site"] == judged.best_site
        for row, site, score in zip(report["sites"], findings.sites, judged.sites, strict=True):
            assert (row["name"], row["classes"]) == (site.name, list(site.classes))
            assert (row["answers"], row["bytes"]) == (site.answers, site.bytes)
            assert row["teacher_accuracy"] == score.teacher_accuracy
            assert row["confidence_auroc"] == score.confidence_auroc
            assert row["took_part"] is True
            assert row["calibration"] is None
        assert report["unify"]["method"] == "ce"
        assert report["unify"]["components"] == 1
        assert report["unify"]["seconds"] == findings.unify.seconds
        assert report["timing"] == {"ask": 1.5, "learn": 75.0}
        everything = {"left_out": 0, "unknown": {}, "whole": None, "choice": None}
        assert report["pool"] == {"digest": "ab" * 32, "size": 1234, "shape": [8, 8, 1], **everything}
        assert report["seed"] == 7
        assert report["versions"] == {"consilience": "0.1.0", "python": "3.11"}
        assert report["labels"]["owners"]["boot"] == ["s00", "s01", "s02"]
        assert report["test"] == {"count": 200, "outside": 0, "unwanted": 0}

    def test_what_a_site_tells_of_its_calibration_is_there(self) -> None:
        findings = make()
        told = {"method": "temperature", "samples": 1200, "ece_before": 0.1234, "ece_after": 0.0456}
        told |= {"nll_before": 0.9, "nll_after": 0.7}
        first = replace(findings.sites[0], calibration=told)
        findings = replace(findings, sites=[first, *findings.sites[1:]])
        report = strict(report_dict(findings))
        assert [site["calibration"] for site in report["sites"]] == [told, None, None]
        text = words(findings)
        assert "calibration error 0.123 → 0.046 (temperature) on 1,200 private images, by its own account" in text
        assert text.count("by its own account") == 1

    def test_what_is_not_known_is_null(self) -> None:
        report = strict(report_dict(bare()))
        assert report["student"]["accuracy"] is None
        assert report["student"]["calibration_error"] is None
        assert report["student"]["per_class"] == []
        assert set(report["baselines"]) == set(BASELINES)
        assert all(score["accuracy"] is None for score in report["baselines"].values())
        assert report["agreement"] is None
        assert report["test"] is None
        assert report["sites"][0]["teacher_accuracy"] is None

    def test_fields_are_the_same_with_and_without_a_test_set(self) -> None:
        full, empty = report_dict(make()), report_dict(bare())
        assert full.keys() == empty.keys()
        for part in ("student", "baselines", "unify", "labels"):
            assert full[part].keys() == empty[part].keys()
        assert full["sites"][0].keys() == empty["sites"][0].keys()

    def test_nan_becomes_null(self) -> None:
        findings = make(learning={"student": [{"epoch": 1, "loss": np.float32("nan"), "seconds": np.inf}]})
        report = strict(report_dict(findings))
        assert report["learning"]["student"] == [{"epoch": 1, "loss": None, "seconds": None}]
        assert report["agreement"][0][0] is None
        assert isinstance(report["agreement"][0][1], float)

    def test_settings_show_no_folders(self) -> None:
        found = report_dict(
            make(settings={"a": ["/x/y/z.npz", "plain", "1/2", "./here"], "b": {"c": "C:\\Users\\me\\d", "d": "/x/y/"}})
        )
        assert found["settings"] == {"a": ["z.npz", "plain", "1/2", "./here"], "b": {"c": "d", "d": "y"}}
        findings = make()
        assert "someone" not in json.dumps(report_dict(findings)) + render_html(findings, report_dict(findings))

    def test_the_confusion_matrix_of_many_classes_is_left_out(self) -> None:
        assert report_dict(wide(25, 200))["student"]["confusion"] is not None
        assert report_dict(wide(25, 201))["student"]["confusion"] is None


class TestComparable:
    def test_two_runs_of_one_seed(self) -> None:
        first = make()
        slower = replace(
            first,
            timing={"ask": 99.0, "oracle": 1.0},
            versions={"consilience": "0.2.0"},
            unify=replace(first.unify, seconds=77.0),
            sites=[replace(site, seconds=88.0, key="a" * 64) for site in first.sites],
            learning={k: [{**epoch, "seconds": 5.0} for epoch in curve] for k, curve in first.learning.items()},
        )
        assert report_dict(first) != report_dict(slower)
        assert comparable(report_dict(first)) == comparable(report_dict(slower))

    @pytest.mark.parametrize(
        "change",
        [
            {"seed": 8},
            {"warnings": ("other",)},
            {"student": replace(make().student, architecture="other")},
            {"unify": replace(make().unify, residual=0.5)},
            {"sites": [replace(site, bytes=1) for site in make().sites]},
            {"learning": {"student": [{"epoch": 1, "loss": 9.0, "learning_rate": 0.1, "seconds": 1.0}]}},
            {"judgement": None},
            {"settings": {"seconds": 3}},
        ],
    )
    def test_any_other_difference_shows(self, change: dict[str, Any]) -> None:
        assert comparable(report_dict(make())) != comparable(report_dict(make(**change)))

    def test_only_the_named_fields_go_and_the_report_keeps_them(self) -> None:
        report = report_dict(make())
        before = json.dumps(report)
        kept = comparable(report)
        assert json.dumps(report) == before
        assert report.keys() - kept.keys() == {"timing", "versions"}
        assert report["unify"].keys() - kept["unify"].keys() == {"seconds"}
        assert report["sites"][1].keys() - kept["sites"][1].keys() == {"seconds", "key"}
        assert report["learning"]["oracle"][2].keys() - kept["learning"]["oracle"][2].keys() == {"seconds"}
        assert strict(report) == report

    def test_a_report_read_back_and_an_oracle_of_null(self) -> None:
        report = strict(report_dict(make()))
        report["learning"]["oracle"] = None
        assert comparable(report)["learning"]["oracle"] is None


class TestWords:
    def test_headline(self) -> None:
        findings = make()
        assert findings.judgement is not None
        judged = findings.judgement
        student = replace(judged.student, accuracy=0.789)
        scores = {n: None if s is None else replace(s, accuracy=0.5) for n, s in judged.baselines.items()}
        judged = replace(judged, student=student, baselines={**scores, "oracle": None}, count=1000)
        text = headline(replace(findings, judgement=judged)).replace("\u00a0", " ")
        assert text == (
            "One classifier for 4 classes, from 3 sites: 78.9 % on 1,000 test images; "
            "the naive ensemble reaches 50.0 %, the best single site 50.0 %."
        )
        alone = replace(judged, baselines=dict.fromkeys(BASELINES))
        assert headline(replace(findings, judgement=alone)).endswith("test images.")
        assert "nothing is known about its accuracy" in headline(bare())

    def test_warnings_follow_from_the_numbers(self) -> None:
        findings = make()
        judged = findings.judgement
        assert judged is not None
        assert report_dict(self._with(findings, correct=200))["warnings"] == []
        low = " ".join(report_dict(self._with(findings, correct=0))["warnings"])
        assert "the naive ensemble is right more often" in low
        assert f"the single site {judged.best_site} is right more often" in low
        outside = self._with(replace(findings, judgement=replace(judged, outside=3)), correct=200)
        assert "classes that no site knows" in report_dict(outside)["warnings"][0]
        untested = replace(judged, classes=(replace(judged.classes[0], support=0), *judged.classes[1:]))
        told = report_dict(self._with(replace(findings, judgement=untested), correct=200))["warnings"]
        assert told == ["The test set shows no image of coat: nothing is known about them."]

    def test_a_site_left_out_and_one_with_gaps(self) -> None:
        gone = SiteFindings("south", ("boot",), "vit", "ef", 10, 30, 5, 1.0, 20, "teacher-failed")
        findings = make()
        some = replace(findings.sites[0], missed=1, asked=1435)
        findings = replace(findings, sites=[some, *findings.sites[1:], gone], warnings=("first",))
        report = report_dict(findings)
        told = [warning.replace("\u00a0", " ") for warning in report["warnings"][:3]]
        assert told == [
            "first",
            "Site s00: 1 sample of 1,435 went unanswered.",
            "Site south is left out: 20 samples of 30 went unanswered (teacher-failed).",
        ]
        assert report["sites"][3]["took_part"] is False
        assert "left out" in words(findings)

    @staticmethod
    def _with(findings: Findings, correct: int) -> Findings:
        judged = findings.judgement
        assert isinstance(judged, Judgement)
        return replace(findings, judgement=replace(judged, student=replace(judged.student, correct=correct)))

    def test_synonyms(self) -> None:
        findings = make()
        other = replace(findings.sites[1], classes=("boot", "sack", "dress"))
        findings = replace(findings, sites=[findings.sites[0], other, findings.sites[2]])
        assert report_dict(findings)["labels"]["synonyms"] == {"bag": {"s01": "sack"}}
        assert "bag is “sack” at s01" in words(findings)


class TestPage:
    def test_it_tells_what_the_report_says(self) -> None:
        findings = make()
        text = words(findings)
        report = report_dict(findings)
        assert report["headline"].replace("\u00a0", " ") in text
        for name, _, _ in contenders_names():
            assert name in text
        for part in ("Class by class", "Where it goes wrong", "Calibration", "Learning curves", "Do the sites agree?"):
            assert part in text
        for part in ("A look into the pool", "Where time and bytes went", "Provenance", "ab" * 32, "cd" * 32):
            assert part in text

    def test_it_is_small_and_needs_nothing_else(self) -> None:
        findings = make()
        html = render_html(findings, report_dict(findings))
        assert len(html) < 100_000
        assert re.findall(r"https?://[^\"' ]+", html.replace("http://www.w3.org/2000/svg", "")) == []
        assert "@import" not in html

    def test_names_are_escaped_everywhere(self) -> None:
        findings = make((EVIL, "b&b", 'c" onload="x', "d'`e`"), job=EVIL)
        gone = SiteFindings(EVIL, (EVIL,), EVIL, EVIL, 1, 2, 1, 1.0, 1, EVIL)
        space = replace(findings.space, sites=(EVIL, *findings.space.sites[1:]))
        part = findings.partition
        assert part is not None
        findings = replace(
            findings,
            space=space,
            sites=[replace(gone, missed=0), *findings.sites[1:], replace(gone, name="x" + EVIL)],
            partition=replace(part, sites=space.sites),
            settings={EVIL: EVIL},
            warnings=(f"`{EVIL}` {EVIL}",),
            timing={EVIL: 1.0},
            versions={EVIL: EVIL},
        )
        assert findings.judgement is not None
        findings = replace(findings, judgement=replace(findings.judgement, best_site=EVIL))
        found = page(findings)
        assert found.text.count(EVIL) > 10
        assert "<script" not in render_html(findings, report_dict(findings))

    def test_names_are_escaped_where_coverage_is_shown(self) -> None:
        findings = make((EVIL, "b&b", "c", "d"))
        rng = np.random.default_rng(0)
        told, ids = rng.uniform(size=50), np.arange(2)
        part = CoverageExamples(ids, told[:2], rng.integers(0, 256, (2, 8, 8, 1)).astype(np.uint8), np.array([0, -1]))
        covered = CoverageFindings(
            asked=True,
            figures=coverage_figures(told, told > 0.4, told),
            largest=part,
            smallest=replace(part, truth=None),
            agreement=0.5,
            left_out="it does not tell",
        )
        space = replace(findings.space, sites=(EVIL, *findings.space.sites[1:]))
        site = replace(findings.sites[0], name=EVIL, coverage=covered)
        findings = replace(findings, space=space, sites=[site, *findings.sites[1:]])
        text = words(findings)
        assert f"ROC of the coverage of {EVIL}" in [v for n, v in page(findings).attributes if n == "aria-label"]
        for said in ("a class of no site", f"Site {EVIL}: its coverage is left out", "None of it was used"):
            assert said in text
        assert "<script" not in render_html(findings, report_dict(findings))
        strict(report_dict(findings))

    @pytest.mark.parametrize("matrix", [None, np.full((3, 3), np.nan)])
    def test_sites_that_cannot_be_compared_get_no_section(self, matrix: Any) -> None:
        assert "Do the sites agree?" in page(make()).text
        assert "Do the sites agree?" not in page(make(agreement=matrix)).text

    def test_bare_findings(self) -> None:
        text = words(bare())
        assert "nothing is known about" in text
        assert "Without labelled test images nothing can be said" in text
        for part in ("Class by class", "Calibration", "Learning curves", "A look into the pool", "Coverage AUROC"):
            assert part not in text

    def test_one_site_one_class(self) -> None:
        text = words(make(("only",), ((0,),)))
        assert "Do the sites agree?" not in text
        assert "1 class" in text
        assert "1 site" in text

    def test_sites_that_did_not_answer_the_test_images(self) -> None:
        findings = make()
        judged = findings.judgement
        assert judged is not None
        findings = replace(findings, judgement=replace(judged, baselines=dict.fromkeys(BASELINES), best_site=None))
        text = words(findings)
        assert "there is nothing to compare with" in text
        assert "Naive ensemble" not in text

    @pytest.mark.parametrize(("sites", "classes", "most"), [(40, 100, 600_000), (60, 600, 600_000)])
    def test_many_sites_and_classes(self, sites: int, classes: int, most: int) -> None:
        findings = wide(sites, classes, pictures=24)
        text = words(findings)
        assert len(render_html(findings, report_dict(findings))) < most
        assert f"The 20 classes with the lowest recall; the other {classes - 20} are in report.json." in text
        assert ("20 more sites in report.json" in text) == (sites == 60)
        assert ("450 classes left out of the drawing" in text) == (classes == 600)
        assert ("The confusion matrix of 600 classes is too large to draw" in text) == (classes == 600)
        assert "With this many sites the dots share one colour" in text

    def test_parts_in_disjoint_components(self) -> None:
        text = words(make(sets=((0, 1), (2, 3))))
        assert "2 components" in text
        assert "No class is known by more than one site. Across components the rule centred decides" in text


def contenders_names() -> list[tuple[str, str, str]]:
    return [(c["name"], c["value"], c["interval"]) for c in contenders(report_dict(make()))]


class TestViews:
    def test_contenders(self) -> None:
        report = report_dict(make())
        report["student"].update(accuracy=0.789, interval=[0.7626, 0.8132])
        report["baselines"]["oracle"]["accuracy"] = None
        found = contenders(report)
        assert [c["kind"] for c in found] == ["student", *["other"] * 6]
        assert found[0]["value"].replace("\u00a0", " ") == "78.9 %"
        assert found[0]["interval"].replace("\u00a0", " ") == "76.3–81.3 %"
        assert (found[0]["width"], found[0]["low"], found[0]["span"]) == ("78.90", "76.26", "5.06")
        assert found[6]["about"].endswith(report["baselines"]["best_site"]["site"])

    def test_overlap(self) -> None:
        few, many = overlap(make()), overlap(wide(40, 100))
        assert (few["ring"], few["count"], few["single"], few["sets"]) == (False, 4, 1, [])
        assert many["ring"]
        assert len(many["sets"]) == 10
        assert many["more_sets"] == many["count"] - 10
        assert overlap(make(sets=((0, 1, 2, 3),)))["figure"] is None
        assert overlap(wide(60, 100))["left_out"] == 20

    def test_classes_are_the_least_recalled(self) -> None:
        rows = [{"name": f"{i:02}", "support": i % 3, "recall": i / 60} for i in range(60)]
        found = classes({"student": {"per_class": rows}})
        assert [row["name"] for row in found["rows"][:4]] == ["01", "02", "04", "05"]
        assert (len(found["rows"]), found["left_out"]) == (20, 40)
        assert classes({"student": {"per_class": rows[:40]}}) == {"rows": rows[:40], "left_out": 0}

    def test_confusions_are_the_most_common_first(self) -> None:
        judged = make(("a", "b", "c"), ((0, 1, 2),)).judgement
        assert judged is not None
        scores = [replace(held, support=support) for held, support in zip(judged.classes, (10, 8, 2), strict=True)]
        told = replace(judged, classes=tuple(scores), mistakes=((1, 0, 4), (2, 1, 2), (0, 1, 1)))
        found = confusion(told, ("a", "b", "c"))
        assert found is not None
        pairs = [(pair["true"], pair["taken"], pair["count"], pair["share"]) for pair in found["pairs"]]
        assert pairs == [("b", "a", 4, 0.5), ("c", "b", 2, 1.0), ("a", "b", 1, 0.1)]

    def test_bars_add_up_the_rest(self) -> None:
        found = bars([("a", 1), ("b", 4), ("c", 2), ("d", 1)], most=3)
        assert [(bar["name"], bar["value"], bar["width"]) for bar in found] == [
            ("b", 4, "100.00"),
            ("c", 2, "50.00"),
            ("2 others", 2, "50.00"),
        ]
        assert [bar["width"] for bar in bars([("a", 0)])] == ["0.00"]

    def test_samples(self) -> None:
        findings = make(("a", "b", "c", "d", "e", "f", "g"), ((0, 1, 2), (3, 4, 5, 6)), pictures=1)
        assert findings.samples is not None
        log = np.log(np.array([[0.001, 0.002, 0.003, 0.004, 0.005, 0.005, 0.98]]))
        samples = replace(
            findings.samples,
            soft_labels=np.array([[0.4, 0.2, 0.15, 0.1, 0.08, 0.05, 0.02]]),
            answers=[np.log(np.array([[0.5, 0.25, 0.25]])), None],
            student=log,
            truth=np.array([5]),
        )
        (view,) = sample_views(replace(findings, samples=samples))
        assert [bar["name"] for bar in view["bars"]] == ["a", "b", "c", "f", "g"]
        assert (view["predicted"], view["truth"], view["right"]) == ("g", "f", False)
        assert [[dot["at"] for dot in bar["dots"]] for bar in view["bars"]] == [["50.0"], ["25.0"], ["25.0"], [], []]
        assert view["bars"][0]["dots"][0]["title"].startswith("s00: 50.0")
        (view,) = sample_views(replace(findings, samples=replace(samples, truth=np.array([-1]))))
        assert view["truth"] is None
        assert view["right"] is None
        assert sample_views(bare()) == []

    @pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
    def test_images_survive(self, shape: tuple[int, ...]) -> None:
        image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        kind, data = png_data_uri(image).split(",")
        assert kind == "data:image/png;base64"
        back = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        np.testing.assert_array_equal(back.reshape(shape), image)

    def test_large_images_are_scaled_down(self) -> None:
        data = png_data_uri(np.zeros((400, 800, 3), np.uint8)).split(",")[1]
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (LARGEST_SIDE, LARGEST_SIDE // 2)


ODD = ("a$b$", "$\\frac{a$", "<script>", "_x_", "a^b & c", "\u6f22\u5b57", "two\nlines", 'style="x"')
"""Names with letters that matplotlib, SVG or a font may take for something else."""


def pixels(svg: str) -> list[np.ndarray]:
    """Return the images (H, W, 4) within a figure."""
    found = re.findall(r'xlink:href="data:image/png;base64,\s*([^"]*)"', svg)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def paths(found: Page, colour: str) -> int:
    """Count the lines and areas of a colour."""
    return sum(name == "style" and f": {colour}" in value for name, value in found.attributes)


class TestFigures:
    def test_matrix_cells_carry_their_numbers(self) -> None:
        svg = plots.matrix(
            np.array([[1.0, 0.0], [np.nan, 0.25]]),
            ["r<1>", "r2"],
            ["c1", "c2"],
            "a & b",
            shown=np.array([[7, 0], [0, 3]]),
            text=lambda v: f"no. {v:.0f}",
            axes=("down", "across"),
        )
        found = Page(svg)
        assert found.text.split() == ["c1", "c2", "r<1>", "r2", "no.", "7", "no.", "3", "down", "across"]
        assert ("aria-label", "a & b") in found.attributes
        (image,) = pixels(svg)
        assert image.shape[:2] == (2, 2)
        assert len(np.unique(image.reshape(4, -1), axis=0)) == 4

    def test_a_large_matrix_is_one_small_image(self) -> None:
        values = np.eye(100)
        values[3, 4] = 0.5
        svg = plots.matrix(values, ["r"] * 100, ["c"] * 100, "m", text=str, diagonal=True)
        (image,) = pixels(svg)
        assert image.shape[:2] == (100, 100)
        tints, counts = np.unique(image[..., :3].reshape(-1, 3), axis=0, return_counts=True)
        assert sorted(counts) == [1, 100, 9899]
        blue, rust = tints[counts == 100][0].astype(int), tints[counts == 1][0].astype(int)
        assert blue[2] > blue[0]
        assert rust[0] > rust[2]
        assert len(svg) < 5_000
        assert Page(svg).text.split() == []

    @pytest.mark.parametrize("count", [1, 10, 14, 20, 40])
    def test_matrices_up_to_40_name_their_rows_and_columns(self, count: int) -> None:
        rows, columns = [f"r{i}" for i in range(count)], [f"c{i}" for i in range(count)]
        found = Page(plots.matrix(np.zeros((count, count)), rows, columns, "m", text=str)).text.split()
        assert found == [*columns, *rows]
        wide = Page(plots.matrix(np.zeros((count, 41)), rows, ["c"] * 41, "m", text=str)).text.split()
        assert wide == rows

    def test_names_stay_what_they_are(self) -> None:
        space = LabelSpace(ODD, ODD, tuple((i, (i + 1) % len(ODD)) for i in range(len(ODD))))
        figures = (
            plots.matrix(np.eye(len(ODD)), ODD, ODD, EVIL, text=str),
            plots.overlap(space),
            plots.overlap_ring(space),
        )
        for figure in figures:
            found = Page(figure)
            assert "script" not in found.tags
            assert all(name.replace("\n", " ") in found.text for name in ODD)
        assert ("aria-label", EVIL) in Page(figures[0]).attributes

    def test_figures_neither_follow_nor_change_what_others_set(self) -> None:
        findings = make()
        with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "svg.hashsalt": None}):
            before = dict(matplotlib.rcParams)
            first = render_html(findings, report_dict(findings))
            assert dict(matplotlib.rcParams) == before
        assert render_html(findings, report_dict(findings)) == first

    def test_reliability_bars_stand_for_full_bins(self) -> None:
        full, empty = Bin(0.5, 1.0, 1234, 0.9, 0.75), Bin(0.0, 0.5, 0, None, None)
        found = Page(plots.reliability([empty, full]))
        assert [paths(found, colour) for colour in (RUST, BAR)] == [1, 1]
        assert "1,234" in found.text
        assert "right, %" in found.text
        assert paths(Page(plots.reliability([empty])), BAR) == 0

    @pytest.mark.parametrize("epochs", [1, 2, 5000])
    def test_curves_of_any_length(self, epochs: int) -> None:
        curve = [(e + 1.0, 2.0 - e % 2) for e in range(epochs)]
        svg = plots.learning_curves([("student", "#123456", curve)])
        loss = "2.000" if epochs == 1 else "1.000"
        assert f"student: {loss} at the end" in Page(svg).text
        assert "nan" not in svg
        assert len(svg) < 16_000

    def test_overlap_names_what_it_joins(self) -> None:
        space = LabelSpace(("a<b", "c", "d"), ("one", "two"), ((0, 1), (1, 2)))
        found = Page(plots.overlap(space))
        curves = [value for name, value in found.attributes if name == "d" and value.count("C") == 1]
        assert len(curves) == 4
        assert all(name in found.text for name in ("a<b", "one", "2\u00a0owners, 1\u00a0class"))
        ring = Page(plots.overlap_ring(space))
        assert [value.count("Q") for name, value in ring.attributes if name == "d"].count(1) == 1
        assert ring.text.split() == ["one", "two"]
        apart = Page(plots.overlap_ring(LabelSpace(("a", "b"), ("one", "two"), ((0,), (1,)))))
        assert not any("Q" in value for name, value in apart.attributes if name == "d")

    def test_long_lists_of_names_are_cut(self) -> None:
        space = LabelSpace(tuple(f"a rather long name {i}" for i in range(50)), ("one",), (tuple(range(50)),))
        assert "more" in Page(plots.overlap(space)).text


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        ("percent", 0.789, "78.9 %"),
        ("percent", None, "–"),
        ("count", 1234567, "1,234,567"),
        ("size", 0, "0 B"),
        ("size", 999, "999 B"),
        ("size", 1000, "1.0 kB"),
        ("size", 252_000, "252 kB"),
        ("size", 999_600, "1.0 MB"),
        ("size", 5_250_000_000, "5.2 GB"),
        ("size", 3e15, "3,000.0 TB"),
        ("duration", 0.04, "0.04 s"),
        ("duration", 3.21, "3.2 s"),
        ("duration", 59.99, "1 min 0 s"),
        ("duration", 312, "5 min 12 s"),
        ("duration", 7500, "2 h 5 min"),
        ("duration", None, "–"),
        ("small", 3.14e-7, "3.1e-07"),
        ("decimal", 0.05678, "0.057"),
    ],
)
def test_numbers_as_people_read_them(function: str, value: float | None, text: str) -> None:
    assert getattr(numbers, function)(value).replace("\u00a0", " ") == text


def test_lists_and_nouns() -> None:
    assert numbers.number_of(1, "site") == "1\u00a0site"
    assert numbers.number_of(1200, "class", "classes") == "1,200\u00a0classes"
    assert numbers.listing(["a", "b", "c"], 2) == "a, b, c"
    assert numbers.listing(["a", "b", "c", "d"], 2) == "a, b and 2 more"
    assert numbers.shorten("a" * 30, 10) == "a" * 9 + "…"


class TestAmalgamation:
    def test_the_page_tells_layers_sites_and_bytes(self) -> None:
        text = words(amalgamated())
        for part in (
            "layer-wise amalgamation (Shen et al., AAAI 2019) from features of s00, s02, its scores from unified soft",
            "Without features, by their labels alone: s01.",
            "32 + 48",
            "42.0 %",
            "37.5 % of 87.5 % sent",
            "by its own account; the share above is of what they hold",
            "over 77 samples",
            "layer1: 0.151 at the end",
            "scores: 0.500 at the end",
            "No private sample or gradient left a site. Features of the teacher’s layers for that pool did, from s00,",
            "features: 5.0 MB u8",
            "Site s00: features of 7 samples of 77 went unanswered.",
            "At layer1 the amalgamated features keep 42.0 % of the variance",
        ):
            assert part in text, part
        plain = words(make())
        assert "What it learned from features" not in plain
        assert "No private sample, weight or gradient left a site." in plain
        made = dict(amalgamated().amalgamation or {})
        made["layers"] = [{**layer, "components": {}} for layer in made["layers"]]
        assert "the share above" not in words(replace(amalgamated(), amalgamation=made))

    def test_the_report_has_it_whole_and_the_card_says_so(self) -> None:
        findings = amalgamated()
        report = strict(report_dict(findings))
        assert report["amalgamation"] == findings.amalgamation
        assert report["sites"][0]["features"]["bytes"] == 5_000_000
        assert report["sites"][1]["features"] is None
        assert strict(report_dict(make()))["amalgamation"] is None
        card = card_markdown(findings, report)
        assert "* Features: The student learned by layer-wise amalgamation" in card
        assert "| s00 (features of layer1) | 70 | – | 8-bit (u8) | 5,000,000 (5.0" in card
        assert "Features" not in card_markdown(make(), report_dict(make()))

    def test_teachers_and_student_are_told_apart_by_colour_and_the_student_lies_on_top(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn: list[Any] = []
        real = plots_amalgamation.scatter

        def scatter(owners: Any, shown: Any, label: str) -> Any:
            drawn.append((owners, shown))
            return real(owners, shown, label)

        monkeypatch.setattr(plots_amalgamation, "scatter", scatter)
        findings = amalgamated()
        points = {
            "student": [[0.0, 0.0]],
            "site s02": [[1.0, 1.0]],
            "site s00": [[2.0, 0.0]],
            "amalgamated": [[1.0, 0.0]],
        }
        told = {**(findings.amalgamation or {}), "picture": {"points": points, "shown": [0.6, 0.3]}}
        views = amalgamation_views(replace(findings, amalgamation=told))
        assert views is not None
        ((owners, shown),) = drawn
        colours = {name: colour for name, colour, _ in owners}
        assert colours == {"student": INK, "s00": site_colour(0), "s02": site_colour(2), "amalgamated": BLUE}
        assert len({INK, site_colour(0), site_colour(2)}) == 3
        assert [name for name, _, _ in owners][-1] == "student"
        assert {name: held for name, _, held in owners} == {who.removeprefix("site "): at for who, at in points.items()}
        assert shown == [0.6, 0.3]
        picture = Page(views["picture"])
        assert all(name in picture.text for name in colours)
        assert "60% of the variance" in picture.text
        assert str(views["picture"]) in render_html(
            replace(findings, amalgamation=told), report_dict(replace(findings, amalgamation=told))
        )

    def test_spaces_and_terms_are_drawn_with_names_escaped(self) -> None:
        space = {
            "student": "layer3",
            "sites": {"s00": "layer2", "s02": "penultimate"},
            "width": 16,
            "size": [4, 4],
            "averaged": True,
            "missed": {"s00": 0.125, "s02": 0.25},
            "measured": {"s00": 9, "s02": 4},
            "picture": {"points": {"student": [[0, 1]], f"site {EVIL}": [[1, 1]]}, "shown": [1, 0]},
        }
        told = {"learning": "common-feature", "target": "concatenated", "without": [EVIL], "spaces": [space]}
        terms = {"soft": 1.0, "mmd": 0.5, "reconstruction": 2.0}
        curve = [{"epoch": e, "loss": 1.0, "learning_rate": 0.1, "seconds": 0.1, "terms": terms} for e in (0, 1)]
        findings = replace(amalgamated(), amalgamation=told, learning={"student": curve})
        text = words(findings)
        for part in (
            "In common at the student’s layer3: maps of 4×4 with 16 channels",
            "12.5 %",
            "of 9 samples",
            "side by side",
        ):
            assert part in text, part
        assert "distance in common: 0.500 at the end" in text
        warned = "averaged down to 4×4, the smallest; student.common_feature.spaces.0.size asks for another."
        assert warned in text
        earlier = {name: held for name, held in space.items() if name != "measured"}
        assert "12.5 %" in words(replace(findings, amalgamation={**told, "spaces": [earlier]}))
        same = "in common at the student's layer3 its features are the same for every sample: they had no part."
        assert same not in text
        still = {**space, "missed": {"s00": 0.125}, "still": ["s02"]}
        assert f"Site s02: {same}" in words(replace(findings, amalgamation={**told, "spaces": [still]}))
        asked = {**told, "spaces": [{**space, "averaged": False}]}
        assert warned not in words(replace(findings, amalgamation=asked))
        page(findings)
        assert EVIL not in render_html(findings, report_dict(findings))


def estimated(**changes: Any) -> Findings:
    """Return findings with trust and an estimate: site s01 is left out about one class, s02 as a whole."""
    share = Estimate(value=0.75, low=0.7, high=0.8)
    told = {
        name: ClassQuality(recall=share, labels=0.8, owners=3, samples=40, advice="more owners") for name in CLASSES[:3]
    }
    told[CLASSES[3]] = ClassQuality(recall=None, labels=None, owners=1, samples=2, advice="more pool")
    own = SiteQuality(student=share, known=0.9, by="held-out", labels=0.6)
    trust = {
        "s00": SiteTrust(agreement=0.9, sites=2, samples=90.5, trust=0.42),
        "s01": SiteTrust(agreement=0.8, sites=2, samples=90.5, left_out=("<b>bag",)),
        "s02": SiteTrust(agreement=-0.2, sites=2, samples=80, trust=0.0, left_out=("boot", "dress")),
    }
    sites = {"s00": own.model_copy(update={"advice": "recalibrate"}), "s01": own}
    return make(
        quality=Quality(accuracy=share, unsharpened=0.7, sharpening=1.2, samples=900, classes=told, sites=sites),
        trust=Trust(sites=trust, unjudged=("dress",), divided=True, lost=("boot",)),
        **changes,
    )


def test_trust_and_the_estimate_without_labels_are_told() -> None:
    findings = estimated()
    report = strict(report_dict(findings))
    assert report["quality"]["accuracy"] == {"value": 0.75, "low": 0.7, "high": 0.8}
    assert report["unify"]["trust"]["sites"]["s02"]["trust"] == 0.0
    warnings = "\n".join(report["warnings"]).replace("\u00a0", " ")
    for words in (
        "Site s01: what it says of <b>bag is left out",
        "Site s02: its answers are left out",
        "Site s00: the others confirm less of its answers than of one another's, so that they count 0.42 times as much",
        "No label has boot: none but sites that are left out know such a class",
        "contradict one another without a majority",
        "honesty of sites on dress",
        "Site s00: by the unified labels it is right on 60.0",
    ):
        assert words in warnings
    page = render_html(findings, report)
    assert "What can be known without labels" in page
    assert '<td class="n">0.42</td>' in page
    assert "<b>bag" not in page
    assert "75.0" in card_markdown(findings, report)


def test_without_a_test_set_the_headline_has_the_estimate() -> None:
    assert "is estimated to be right on 75.0" in headline(estimated(judgement=None))
    blind = make(judgement=None, quality=Quality(reason="nobody can tell"))
    report = strict(report_dict(blind))
    assert "nothing is known about its accuracy" in report["headline"]
    assert "nobody can tell" in render_html(blind, report)
