"""A job whose sites give good, constant or inverted coverage: who is left out, and what the report says and shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import RecordDict
from scipy.special import expit, log_softmax, logit
from sklearn.metrics import roc_auc_score

from consilience.common.encoding import encode, encode_coverage
from consilience.common.files import read_json
from consilience.common.progress import Reporter
from consilience.common.protocol import Answer, Question
from consilience.common.settings import CoverageEncoding
from consilience.server import coverage_check
from helpers.jobs import JUDGED, build_home, job_settings, noise, run_job
from helpers.sites import Handler, Sites

SAMPLES, TEST = 400, 30
NAMES = ("a", "b", "c", "d", "e", "f")
RING = {"east": ("a", "b", "c"), "north": ("c", "d", "e"), "west": ("e", "f", "a")}
APART = {"east": ("a", "b"), "north": ("c", "d"), "west": ("e", "f")}
PAIR = {"east": ("a", "b", "c"), "west": ("d", "e", "f")}
RNG = np.random.default_rng(5)
LABELS = RNG.integers(0, len(NAMES), SAMPLES)
LOGITS = RNG.normal(0, 1, (SAMPLES, len(NAMES))) + 3.0 * np.eye(len(NAMES))[LABELS]
Told = Callable[[np.ndarray], np.ndarray]
GOOD: Told = lambda c: c  # noqa: E731
CONSTANT: Told = lambda c: np.full_like(c, 0.4)  # noqa: E731
INVERTED: Told = lambda c: 1 - c  # noqa: E731
NOISE: Told = lambda c: np.random.default_rng(1).permutation(SAMPLES)[: len(c)] / SAMPLES  # noqa: E731
COARSE: Told = lambda c: np.where(c > (m := np.median(c)), c[c > m].mean(), c[c <= m].mean())  # noqa: E731
"""Calibrated, and knowing less than the truth."""


def moved(by: float) -> Told:
    """Coverage whose level is wrong by so many logits."""
    return lambda c: expit(logit(np.clip(c, 1e-4, 1 - 1e-4)) + by)


def true_coverage(classes: tuple[str, ...]) -> np.ndarray:
    known = [NAMES.index(name) for name in classes]
    return np.asarray(np.exp(log_softmax(LOGITS, axis=1))[:, known].sum(axis=1))


def site(classes: tuple[str, ...], told: Told) -> Handler:
    """A site whose answers and coverage are those of the truth but for what `told` makes of the coverage."""
    known = [NAMES.index(name) for name in classes]
    values = told(true_coverage(classes))

    def handler(question: Question, attempt: int) -> RecordDict:
        rows = slice(question.start, question.stop)
        if question.kind == "coverage":
            data = encode_coverage(values[rows].astype(np.float32), cast(CoverageEncoding, question.encoding))
        else:
            data = encode(log_softmax(LOGITS[rows][:, known], axis=1).astype(np.float32), "f32")
        return Answer(question, data, 0.1).to_content()

    return handler


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (pool,) = noise(0, SAMPLES)
    return build_home(tmp_path, pool, pool[:TEST], LABELS[:TEST], NAMES, pool_labels=LABELS)


def do(
    home: Path,
    reporter: Reporter,
    told: dict[str, Told],
    classes: dict[str, tuple[str, ...]] = RING,
    run: str = "run",
    judged: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """Do a job; a site that `told` does not name gives no coverage."""
    handlers = {name: site(known, told.get(name, GOOD)) for name, known in classes.items()}
    sites = Sites(handlers, classes=classes, coverage=dict.fromkeys(told, ("f16",)))
    judge = JUDGED if judged else {"judge": {"test_pool": "test-pool"}}
    return run_job(home, sites, job_settings(home, judge, {"ask": {"question_size": 200}}, changes), reporter, run)


def left_out(report: dict[str, Any]) -> dict[str, str]:
    told = {row["name"]: row["coverage"]["left_out"] for row in report["sites"]}
    return {name: reason for name, reason in told.items() if reason}


def events(home: Path, run: str = "run", name: str = "coverage-left-out") -> list[dict[str, Any]]:
    lines = (home / run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


@pytest.mark.parametrize(
    ("told", "out"),
    [
        ({"east": GOOD, "north": GOOD, "west": GOOD}, {}),
        ({"east": GOOD, "north": CONSTANT, "west": GOOD}, {"north": "does not tell"}),
        ({"east": GOOD, "north": NOISE, "west": GOOD}, {"north": "does not tell"}),
        ({"east": GOOD, "north": GOOD, "west": INVERTED}, {"west": "none of its classes"}),
        ({"east": CONSTANT, "north": GOOD, "west": INVERTED}, {"east": "does not tell", "west": "none of its"}),
        ({"east": INVERTED, "north": INVERTED, "west": GOOD}, {"east": "none of its", "north": "none of its"}),
    ],
)
def test_coverage_that_the_others_contradict_is_left_out_and_said(
    home: Path, reporter: Reporter, told: dict[str, Told], out: dict[str, str]
) -> None:
    report = do(home, reporter, told)
    found = left_out(report)
    assert found.keys() == out.keys()
    assert all(words in found[name] for name, words in out.items())
    diagnostics = read_json(home / "run" / "labels" / "diagnostics.json")
    assert {name for name, check in diagnostics["checks"].items() if check["reason"]} == out.keys()
    assert diagnostics["coverage"] == {name: 0 if name in out else SAMPLES for name in told}
    assert {event["site"]: event["reason"] for event in events(home)} == found
    agreement = {row["name"]: row["coverage"]["agreement"] for row in report["sites"]}
    assert all((agreement[name] < 0.55) == (name in out) for name in told)
    page = (home / "run" / "report.html").read_text()
    for name in told:
        said = [w for w in report["warnings"] if f"Site {name}: its coverage is left out of unification because" in w]
        assert len(said) == (name in out)
        assert (f"Site {name}: its coverage is left out" in page) == (name in out)
    # What is left out is as if it had not been given.
    rest = {name: values for name, values in told.items() if name not in out}
    do(home, reporter, rest, run="without")
    labels = [np.load(home / run / "labels" / "q.npy") for run in ("run", "without")]
    assert np.array_equal(*labels)
    students = [(home / run / "student" / "model.safetensors").read_bytes() for run in ("run", "without")]
    assert (students[0] == students[1]) is True


@pytest.mark.parametrize("learning", ["direct-ce", "soft-labels"])
def test_the_student_and_the_ensemble_do_not_see_it_either(home: Path, reporter: Reporter, learning: str) -> None:
    student = {"architecture": "cnn3", "learning": learning, "fit": {"epochs": 1, "precision": "f32", "augment": False}}
    report = do(home, reporter, {"east": GOOD, "north": GOOD, "west": INVERTED}, student=student)
    other = do(home, reporter, {"east": GOOD, "north": GOOD}, run="without", student=student)
    assert left_out(report).keys() == {"west"}
    assert report["student"]["accuracy"] == other["student"]["accuracy"]
    assert report["baselines"]["unified_ensemble"] == other["baselines"]["unified_ensemble"]
    assert [e["loss"] for e in report["learning"]["student"]] == [e["loss"] for e in other["learning"]["student"]]


def test_where_two_sites_contradict_each_other_and_nobody_else_can_say_both_are_left_out(
    home: Path, reporter: Reporter
) -> None:
    report = do(home, reporter, {"east": GOOD, "west": INVERTED}, PAIR)
    assert left_out(report).keys() == {"east", "west"}
    assert report["unify"]["joined"] is False
    assert any("fall apart" in warning for warning in report["warnings"])
    assert "None of it was used" in report["unify"]["coverage"]


def test_a_site_that_nobody_can_judge_is_believed(home: Path, reporter: Reporter) -> None:
    report = do(home, reporter, {"east": CONSTANT}, PAIR)
    assert left_out(report) == {}
    assert report["sites"][0]["coverage"]["agreement"] is None
    assert any("nearly the same for every sample (from 0.400 to 0.400)" in w for w in report["warnings"])


@pytest.mark.parametrize("learning", ["soft-labels", "direct-ce"])
@pytest.mark.parametrize("by", [4.0, -4.0])
def test_a_wrong_level_is_mended_where_classes_overlap_and_said(
    home: Path, reporter: Reporter, by: float, learning: str
) -> None:
    # At full strength, where a level counts.
    student = {"architecture": "cnn3", "learning": learning, "fit": {"epochs": 1, "precision": "f32", "augment": False}}
    changes: dict[str, Any] = {"unify": {"strength": 1.0}, "student": student}
    good = dict.fromkeys(RING, moved(0))
    right = do(home, reporter, good, run="right", **changes)
    wrong = do(home, reporter, {**good, "north": moved(by)}, **changes)
    offsets = {row["name"]: row["coverage"]["offset"] for row in wrong["sites"]}
    assert offsets == {"east": 0, "north": pytest.approx(-by, abs=0.4), "west": 0}
    assert [event["offset"] for event in events(home, name="coverage-mended")] == [offsets["north"]]
    said = [w for w in wrong["warnings"] if "logits were moved" in w]
    assert len(said) == 1
    assert said[0].startswith(f"Site north: its coverage is far too {'high' if by > 0 else 'low'}")
    assert said[0] in (home / "run" / "card.md").read_text()
    assert "level mended" in (home / "run" / "report.html").read_text()
    assert left_out(wrong) == {}
    labels = [np.load(home / run / "labels" / "q.npy") for run in ("run", "right")]
    assert np.abs(labels[0] - labels[1]).mean() < 0.01
    # The ensemble and who learns directly see the mended level, too: else these would be far off.
    assert wrong["baselines"]["unified_ensemble"]["accuracy"] == right["baselines"]["unified_ensemble"]["accuracy"]
    losses = [r["learning"]["student"][0]["loss"] for r in (wrong, right)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_honest_levels_are_left_alone(home: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch) -> None:
    report = do(home, reporter, {"east": GOOD, "north": moved(1.5), "west": moved(-1.5)})
    assert [row["coverage"]["offset"] for row in report["sites"]] == [0, 0, 0]
    assert not [w for w in report["warnings"] if "logits were moved" in w or "adds up" in w]
    assert report["unify"]["claimed"] is None
    monkeypatch.setattr(coverage_check, "LEVEL", float("inf"))
    do(home, reporter, {"east": GOOD, "north": moved(1.5), "west": moved(-1.5)}, run="unchecked")
    assert np.array_equal(*(np.load(home / run / "labels" / "q.npy") for run in ("run", "unchecked")))


def test_labels_are_as_sure_as_the_sites(home: Path, reporter: Reporter) -> None:
    honest = do(home, reporter, {"east": GOOD, "north": GOOD, "west": GOOD}, APART)
    assert honest["unify"]["exponent"] == pytest.approx(1, abs=0.02)  # all know the truth, and so do their labels
    timid = do(home, reporter, {"east": GOOD, "north": COARSE, "west": COARSE}, APART, run="coarse")
    assert 1.03 < timid["unify"]["exponent"] < 2
    assert f"surer (to the power of {timid['unify']['exponent']:.2f})" in timid["unify"]["coverage"]
    assert "Labels were made surer" in (home / "coarse" / "card.md").read_text()
    before = do(home, reporter, {}, run="without")
    assert before["unify"]["exponent"] == 1
    low = do(home, reporter, {"east": GOOD, "north": moved(-6), "west": GOOD}, APART, run="low")
    assert low["unify"]["claimed"] < 0.8
    assert low["unify"]["exponent"] is None
    assert "No power of the labels is as sure as the sites claim to be" in low["unify"]["coverage"]


def test_levels_are_not_mended_where_samples_may_be_of_no_class(home: Path, reporter: Reporter) -> None:
    told = {"east": GOOD, "north": moved(-4), "west": GOOD}
    report = do(home, reporter, told, unify={"other": 0.1}, judged=False)
    assert [row["coverage"]["offset"] for row in report["sites"]] == [0, 0, 0]


@pytest.mark.parametrize(
    ("told", "other", "words"),
    [
        (dict.fromkeys(APART, GOOD), 0.0, None),
        ({"east": moved(3), "north": GOOD, "west": GOOD}, 0.0, "too high, or it is inverted"),
        (dict.fromkeys(APART, INVERTED), 0.0, "adds up to 2.00"),
        (dict.fromkeys(APART, moved(4)), 0.0, "too high, or it is inverted"),
        (dict.fromkeys(APART, moved(4)), 0.1, "too high, or it is inverted"),
        (dict.fromkeys(APART, moved(-3)), 0.0, "then set unify.other above 0"),
        (dict.fromkeys(APART, moved(-3)), 0.1, None),
    ],
)
def test_levels_of_sites_that_share_no_class_are_warned_of_together(
    home: Path, reporter: Reporter, told: dict[str, Told], other: float, words: str | None
) -> None:
    report = do(home, reporter, told, APART, unify={"other": other}, judged=False)
    said = [warning for warning in report["warnings"] if "adds up to" in warning]
    assert len(said) == (words is not None)
    assert all(words in warning and "learn coverage again" in warning for warning in said if words)
    assert all(warning in (home / "run" / "card.md").read_text() for warning in said)
    means = [told[name](true_coverage(APART[name])).mean() for name in APART]
    assert report["unify"]["claimed"] == pytest.approx(sum(means), abs=1e-3)
    # Who orders samples as the others do is believed, whatever the level.
    assert left_out(report) == {}


def test_nothing_is_claimed_together_by_sites_that_do_not_share_out_all_classes(home: Path, reporter: Reporter) -> None:
    assert do(home, reporter, {"east": GOOD, "north": GOOD}, APART, judged=False)["unify"]["claimed"] is None
    inverted = do(home, reporter, {"east": GOOD, "north": INVERTED, "west": GOOD}, APART, "out", judged=False)
    assert left_out(inverted).keys() == {"north"}
    assert inverted["unify"]["claimed"] is None
    one = do(home, reporter, {"x": lambda c: c * 0.3}, {"x": NAMES}, "one", judged=False)
    assert one["unify"]["claimed"] is None


def test_nobody_is_judged_by_a_rule(home: Path, reporter: Reporter) -> None:
    """Two of four sites say what is theirs: what the first leaves, the rule shares out among the other three."""
    four = {"a": ("a", "b"), "b": ("c", "d"), "c": ("e",), "d": ("f",)}
    report = do(home, reporter, {"a": GOOD, "b": INVERTED}, four)
    assert left_out(report) == {}
    assert [row["coverage"]["agreement"] for row in report["sites"]] == [None] * 4


def test_it_is_said_whose_coverage_counts_for_nothing(home: Path, reporter: Reporter) -> None:
    every = do(home, reporter, dict.fromkeys(("x", "y"), GOOD), {"x": NAMES, "y": NAMES}, judged=False)
    told = "That of x, y counts for nothing: who knows every class has every sample. None of it was used."
    assert told in every["unify"]["coverage"]
    some = do(home, reporter, {"x": GOOD, "y": GOOD}, {"x": NAMES, "y": ("a", "b")}, "some", judged=False)
    assert "That of x counts for nothing" in some["unify"]["coverage"]
    assert "It was used with strength 0.1." in some["unify"]["coverage"]
    sd = do(home, reporter, {"east": GOOD}, run="sd", unify={"method": "sd"}, judged=False)
    assert "None of it was used, for method sd needs that of every site." in sd["unify"]["coverage"]
    whole = do(home, reporter, dict.fromkeys(RING, GOOD), run="whole", unify={"method": "sd"}, judged=False)
    assert "None of it was used" not in whole["unify"]["coverage"]


def test_other_methods_and_few_samples_leave_coverage_alone(
    home: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"east": GOOD, "north": GOOD, "west": INVERTED}
    report = do(home, reporter, told, unify={"method": "sd"})
    assert left_out(report) == {}
    assert report["unify"]["strength"] is None
    monkeypatch.setattr(coverage_check, "FEWEST", SAMPLES + 1)
    assert left_out(do(home, reporter, told, run="few")) == {}
    monkeypatch.setattr(coverage_check, "FEWEST", SAMPLES)
    assert left_out(do(home, reporter, told, run="enough")).keys() == {"west"}


def test_a_subset_is_drawn_by_the_seed_of_the_job(
    home: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage_check, "MOST", 250)
    told = {"east": GOOD, "north": GOOD, "west": INVERTED}

    def checks(run: str, seed: int) -> Any:
        do(home, reporter, told, run=run, seed=seed)
        return read_json(home / run / "labels" / "diagnostics.json")["checks"]

    first = checks("one", 3)
    assert {check["samples"] for check in first.values()} == {250}
    assert first == checks("two", 3)
    assert first != checks("three", 4)


def test_a_repeat_keeps_the_verdict(home: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"east": GOOD, "north": GOOD, "west": INVERTED}
    first = do(home, reporter, told)
    monkeypatch.setattr(coverage_check, "recalibrate", lambda *_: pytest.fail("checked again"))
    assert left_out(do(home, reporter, told)) == left_out(first)


def test_without_coverage_in_a_component_no_sample_is_outside(home: Path, reporter: Reporter) -> None:
    report = do(
        home, reporter, {"east": GOOD, "north": INVERTED, "west": GOOD}, APART, unify={"other": 0.05}, judged=False
    )
    assert left_out(report).keys() == {"north"}
    assert report["unify"]["other"] == 0.0
    chosen = {"other": 0.5, "strengths": {"north": 0.5}}
    whole = do(home, reporter, {"east": GOOD, "north": GOOD, "west": GOOD}, APART, "whole", unify=chosen)
    other = np.load(home / "whole" / "labels" / "other.npy").astype(np.float64)
    assert 0 < whole["unify"]["other"] == pytest.approx(other.mean())
    assert whole["unify"]["mostly_other"] == int((other > 0.5).sum())
    assert "samples count less than half" in whole["unify"]["coverage"].replace("\u00a0", " ")
    card = (home / "whole" / "card.md").read_text()
    assert "Coverage: 3" in card
    assert "It was used with strength 0.1 (north 0.5)." in card
    assert (whole["unify"]["strength"], whole["unify"]["strengths"]) == (0.1, {"north": 0.5})
    assert "It decided the odds between components" in card


def test_images_of_no_known_class_make_no_honest_site_look_inverted(home: Path, reporter: Reporter) -> None:
    """What the others leave over holds them too: there an honest site's coverage is as low as can be."""
    strangers: Told = lambda c: np.where(np.arange(len(c)) % 10 < 3, 0.002, np.maximum(c, 0.01))  # noqa: E731
    report = do(home, reporter, dict.fromkeys(APART, strangers), APART, unify={"other": 0.3}, judged=False)
    assert left_out(report) == {}
    assert report["unify"]["other"] > 0.2


@pytest.mark.parametrize("judged", [True, False])
def test_the_report_shows_every_site_s_coverage(home: Path, reporter: Reporter, judged: bool) -> None:
    report = do(home, reporter, {"east": GOOD, "north": GOOD}, judged=judged)
    page = (home / "run" / "report.html").read_text()
    told = "2\u00a0sites gave coverage: east, north. It was used with strength 0.1."
    assert told in page
    assert told.replace("\u00a0", " ") in (home / "run" / "card.md").read_text()
    assert "What the sites say is theirs" in page
    rows = {row["name"]: row for row in report["sites"]}
    assert rows["west"]["coverage"]["figures"] is None
    assert rows["west"]["coverage"]["largest"] == []
    for name in ("east", "north"):
        values = true_coverage(RING[name]).astype(np.float16).astype(np.float64)
        found = rows[name]["coverage"]
        figures = found["figures"]
        assert figures["samples"] == sum(figures["counts"]) == SAMPLES
        assert figures["mean"] == pytest.approx(values.mean(), abs=1e-3)
        assert (f"ROC of the coverage of {name}" in page) is judged
        assert (f"Reliability diagram of the coverage of {name}" in page) is judged
        assert f"Distribution of the coverage of {name}" in page
        order = np.argsort(-values, kind="stable")
        for end, ids in (("largest", order[:8]), ("smallest", np.argsort(values, kind="stable")[:8])):
            assert [e["id"] for e in found[end]] == ids.tolist()
            assert [e["coverage"] for e in found[end]] == pytest.approx(values[ids], abs=1e-3)
            assert [e["class"] for e in found[end]] == [NAMES[i] if judged else None for i in LABELS[ids]]
        mine = np.isin(LABELS, [NAMES.index(c) for c in RING[name]])
        known = [NAMES.index(c) for c in RING[name]]
        sure = np.exp(log_softmax(LOGITS[:, known].astype(np.float32), axis=1)).max(axis=1)
        if judged:
            assert figures["share"] == mine.mean()
            assert figures["roc"]["auroc"] == pytest.approx(roc_auc_score(mine, values))
            assert figures["confidence"]["auroc"] == pytest.approx(roc_auc_score(mine, sure), abs=1e-4)
            assert rows[name]["coverage_auroc"] == pytest.approx(figures["roc"]["auroc"])
        else:
            assert (figures["roc"], figures["share"], figures["mine"], figures["reliability"]) == (None, None, None, [])
