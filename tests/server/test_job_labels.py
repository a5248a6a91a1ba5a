"""A job of multi-label sites: what it needs, what it leaves out, and what it refuses."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from scipy.special import expit, logit

from consilience.common.encoding import encode
from consilience.common.errors import AskingError, DataError, LabelError, SettingsError
from consilience.common.files import read_json
from consilience.common.progress import Reporter
from consilience.common.protocol import Answer, Question
from consilience.common.settings import LabelKind
from consilience.server.export import export_student
from consilience.server.learning import StudentModel
from helpers.jobs import JUDGED, build_home, job_settings, noise, run_job
from helpers.sites import Handler, Sites, honest, refusing, rows

SAMPLES, TEST = 40, 12
CLASSES = {"east": ("a", "b", "c"), "west": ("c", "d", "e")}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    pool, test = noise(0, SAMPLES, TEST)
    rng, names = np.random.default_rng(1), ("e", "d", "c", "b", "z")
    np.savez(tmp_path / "single.npz", x=test, y=np.arange(TEST) % 4, names=np.array(names[:4]))
    truth, labels = rng.integers(0, 2, (TEST, 5)), rng.integers(-1, 2, (SAMPLES, 5))
    return build_home(tmp_path, pool, test, truth, names, pool_labels=labels)


def do(
    home: Path,
    reporter: Reporter,
    handlers: dict[str, Handler] | None = None,
    labels: dict[str, LabelKind] | None = None,
    coverage: Any = None,
    **changes: Any,
) -> dict[str, Any]:
    kinds = dict.fromkeys(CLASSES, "multi") if labels is None else labels
    sites = Sites(handlers or dict.fromkeys(CLASSES, honest), classes=CLASSES, labels=kinds, coverage=coverage)  # type: ignore[arg-type]
    return run_job(home, sites, job_settings(home, JUDGED, changes), reporter)


def odds(start: int, stop: int) -> np.ndarray:
    """The log-odds that honest sites tell."""
    question = Question(
        job="j", pool="a" * 64, start=start, stop=stop, encoding="f32", teacher="a" * 64, policy="c" * 16
    )
    return rows(question).astype(np.float64)


def test_labels_of_a_part_of_the_pool_are_those_of_its_samples(home: Path, reporter: Reporter) -> None:
    do(home, reporter)
    whole = np.load(home / "run" / "labels" / "q.npy")
    shutil.rmtree(home / "run")
    report = do(home, reporter, ask={"samples": 15})
    ids = np.load(home / "run" / "asked.npy")
    assert np.array_equal(np.load(home / "run" / "labels" / "q.npy"), whole[ids])
    assert report["pool"]["size"] == 15
    assert report["multi_label"]["baselines"]["oracle"] is not None


def test_labels_are_unified_each_by_itself_and_judged_by_average_precision(home: Path, reporter: Reporter) -> None:
    report = do(home, reporter)
    told = odds(0, SAMPLES)
    found = np.load(home / "run" / "labels" / "q.npy")
    assert read_json(home / "run" / "contract.json")["labels"] == ["a", "b", "c", "d", "e"]
    expected = np.stack([told[:, 0], told[:, 1], (told[:, 2] + told[:, 0]) / 2, told[:, 1], told[:, 2]], axis=1)
    assert np.allclose(logit(found.astype(np.float64)), expected, atol=1e-4)
    assert report["labels"]["kind"] == "multi"
    assert report["student"]["accuracy"] is None
    judged = report["multi_label"]
    assert all(0 < value < 1 for value in [judged["mean_ap"], *judged["baselines"].values()])
    assert [score["name"] for score in judged["per_label"]] == ["a", "b", "c", "d", "e"]
    assert judged["per_label"][0]["student"] is None  # the test data know no label a
    assert any("No test image has a" in warning for warning in report["warnings"])
    assert len(report["agreement"]) == 2
    assert report["test"]["count"] == TEST
    page = (home / "run" / "report.html").read_text()
    assert "Label by label" in page
    assert "Where it goes wrong" not in page
    assert "Mean average precision" in (home / "run" / "card.md").read_text()
    student = StudentModel(home / "run" / "student")
    assert student.multi
    assert read_json(home / "run" / "student" / "labels.json")["kind"] == "multi"


def test_an_exported_student_says_what_the_student_says(home: Path, reporter: Reporter) -> None:
    do(home, reporter)
    student = StudentModel(home / "run" / "student")
    export_student(student, home / "student.pt2")
    images = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 1), np.uint8)
    program = torch.export.load(io.BytesIO((home / "student.pt2").read_bytes())).module()
    found = student.log_probs(images)
    assert np.allclose(program(torch.from_numpy(images)).detach().numpy(), found, atol=1e-5)
    assert not np.allclose(np.exp(found).sum(axis=1), 1, atol=0.05)


def test_coverage_weighs_answers(home: Path, reporter: Reporter) -> None:
    report = do(home, reporter, coverage={"east": ("f16",)}, unify={"strength": 1.0})
    weight = ((np.arange(SAMPLES) * 37 % 101 + 1) / 128)[:, None]
    told = odds(0, SAMPLES)
    found = np.load(home / "run" / "labels" / "q.npy")[:, 2]
    expected = (weight[:, 0] * told[:, 2] + told[:, 0]) / (weight[:, 0] + 1)
    assert np.allclose(found, expit(expected), atol=1e-3)
    by_name = {site["name"]: site for site in report["sites"]}
    assert by_name["east"]["coverage_auroc"] is not None
    assert by_name["west"]["coverage_auroc"] is None


def test_a_label_that_nobody_told_of_a_sample_is_left_out_and_the_sample_is_not(home: Path, reporter: Reporter) -> None:
    def half(question: Question, attempt: int) -> RecordDict:
        return honest(question, attempt) if question.start < 16 else refusing(question, attempt)

    report = do(home, reporter, {"east": half, "west": honest}, ask={"min_sites": 1})
    found = np.load(home / "run" / "labels" / "q.npy")
    assert np.isnan(found).sum(axis=0).tolist() == [SAMPLES - 16, SAMPLES - 16, 0, 0, 0]
    assert report["pool"]["left_out"] == 0
    assert any(warning.startswith("48 labels of samples") for warning in report["warnings"])
    both = odds(0, 16)  # what two sites tell of c
    spread = read_json(home / "run" / "labels" / "diagnostics.json")["spread"]
    assert spread == pytest.approx(np.abs(both[:, 2] - both[:, 0]).mean() / 2, rel=1e-4)


def test_sites_of_both_kinds_are_refused_by_name(home: Path, reporter: Reporter) -> None:
    with pytest.raises(LabelError, match=r"one label an image \(west\), others any number of them \(east\)") as error:
        do(home, reporter, labels={"east": "multi"})
    assert "sites of each kind" in error.value.hint
    with pytest.raises(LabelError, match="have no common meaning"):
        do(home, reporter, labels={"east": "multi"}, ask={"min_sites": 1})


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"unify": {"method": "sd"}}, "unify.method"),
        ({"unify": {"prior_correction": True}}, "unify.prior_correction"),
        ({"unify": {"other": 0.1}}, "unify.other"),
        ({"student": {"learning": "direct-ce"}}, "student.learning"),
        ({"student": {"classes": ["a", "b"], "other": True}}, "student.other"),
    ],
)
def test_what_takes_one_label_an_image_is_refused(
    home: Path, reporter: Reporter, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(SettingsError, match=f"field '{field}'"):
        do(home, reporter, **changes)


def test_test_images_must_be_labelled_as_the_answers_are(home: Path, reporter: Reporter) -> None:
    changes = {"test": {"kind": "npz", "path": "single.npz"}, "pool_labels": None}
    with pytest.raises(DataError, match=r"judge.test has one label an image"):
        do(home, reporter, judge=changes)
    shutil.rmtree(home / "run")
    with pytest.raises(DataError, match=r"judge.test has any number of labels an image"):
        do(home, reporter, labels={})


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda held: held[:-1], "shape"),
        (lambda held: held[:, :4], "shape"),
        (lambda held: np.where(held < 0, 7, held), "label 7 of sample"),
    ],
)
def test_true_labels_of_the_pool_that_do_not_fit_are_refused(
    home: Path, reporter: Reporter, made: Any, reason: str
) -> None:
    np.save(home / "labels.npy", made(np.load(home / "labels.npy")))
    with pytest.raises(DataError, match=f"labels.npy: .*{reason}"):
        do(home, reporter)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6, -101.0])
def test_log_odds_that_are_none_are_refused(home: Path, reporter: Reporter, value: float) -> None:
    def hostile(question: Question, attempt: int) -> RecordDict:
        data = np.full((len(question), 3), value, "<f4").tobytes()
        return Answer(question, data, 0.1).to_content()

    with pytest.raises(AskingError, match=r"east lacks .*log-odds: row 0 holds a number that is not finite or beyond"):
        do(home, reporter, {"east": hostile, "west": honest})


def test_log_probabilities_in_place_of_log_odds_are_refused_where_they_differ(home: Path, reporter: Reporter) -> None:
    def single(question: Question, attempt: int) -> RecordDict:
        plain = question.model_copy(update={"kind": "log-probs"})
        return Answer(plain, encode(rows(question), question.encoding), 0.1).to_content()

    with pytest.raises(AskingError, match="An answer's kind is not the question's"):
        do(home, reporter, {"east": single, "west": honest})
