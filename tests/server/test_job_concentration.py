"""A job that learns by concentration: routed, learnt, told and used, and what is refused before anything is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.common import RecordDict

from consilience.common.encoding import encode, encode_coverage
from consilience.common.errors import SettingsError
from consilience.common.files import read_json
from consilience.common.progress import Reporter
from consilience.common.protocol import Answer, Question
from consilience.common.settings import CoverageEncoding, JobSettings
from consilience.server import concentration as server_concentration
from consilience.server.export import export_student
from consilience.server.job import Job
from consilience.server.learning import StudentModel
from consilience.server.student.sparse_loss import SparseSoftmax
from helpers.jobs import build_home, job_settings, run_job
from helpers.sites import Handler, Sites

pytestmark = pytest.mark.usefixtures("one_thread", "unsynced")
NAMES = ("a", "b", "c", "d", "e", "f")
APART = {"east": ("a", "b"), "north": ("c", "d"), "west": ("e", "f")}
CHAIN = {"east": ("a", "b", "c", "d"), "north": ("c", "d", "e", "f")}
TABLE = {"birds": ["a", "b"], "cars": ["d", "c"], "plants": ["e", "f"]}
SAMPLES, TEST = 60, 24
TRUTH = np.arange(SAMPLES) % 6


def pictures(labels: np.ndarray, seed: int) -> np.ndarray:
    """Images of which one sixth is bright: which one, says the class."""
    images = np.random.default_rng(seed).integers(0, 60, (len(labels), 18, 18), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, 3 * label : 3 * label + 3] += 180
    return images


@pytest.fixture
def home(tmp_path: Path) -> Path:
    labels = np.arange(TEST) % 6
    about = (pictures(TRUTH, 0), pictures(labels, 1), labels, NAMES)
    return build_home(tmp_path, *about, pool_labels=TRUTH, test_pool=False)


def site(classes: tuple[str, ...]) -> Handler:
    """A site that knows its own classes well, guesses at the rest, and knows which is which."""
    own = [NAMES.index(name) for name in classes]
    probs = np.full((SAMPLES, len(own)), 0.05)
    for at, label in enumerate(own):
        probs[label == TRUTH, at] = 0.9
    answers = np.log(probs / probs.sum(axis=1, keepdims=True)).astype(np.float32)
    covered = np.where(np.isin(TRUTH, own), 0.9, 0.1).astype(np.float32)

    def handler(question: Question, attempt: int) -> RecordDict:
        rows = slice(question.start, question.stop)
        if question.kind == "coverage":
            data = encode_coverage(covered[rows], cast(CoverageEncoding, question.encoding))
        else:
            data = encode(answers[rows], question.encoding)
        return Answer(question, data, 0.1).to_content()

    return handler


def sites_of(classes: dict[str, tuple[str, ...]], covering: tuple[str, ...]) -> Sites:
    return Sites({s: site(c) for s, c in classes.items()}, classes=classes, coverage=dict.fromkeys(covering, ("f16",)))


def settings(home: Path, concentration: dict[str, Any], **more: Any) -> JobSettings:
    head = {"first": 64, "second": 32, "scaling": "none", **concentration.pop("head", {})}
    own = {
        "architecture": "cnn3@0.5",
        "learning": "concentration",
        "concentration": {**concentration, "head": head},
        "fit": {"epochs": 12, "batch_size": 12, "precision": "f32", "learning_rate": 0.05, "augment": False},
    }
    return job_settings(home, {"student": own}, more)


def do(home: Path, sites: Sites, reporter: Reporter, concentration: dict[str, Any], **more: Any) -> dict[str, Any]:
    return run_job(home, sites, settings(home, concentration, **more), reporter)


def test_each_sample_is_taught_by_the_site_that_covers_it(home: Path, reporter: Reporter) -> None:
    report = do(home, sites_of(APART, tuple(APART)), reporter, {"head": {"scaling": "vertical"}})
    told = report["student"]["concentration"]
    assert told["routed_by"] == {"coverage": SAMPLES, "unified labels": 0}
    assert [(v["name"], v["specialists"], v["samples"], v["kept"]) for v in told["verticals"]] == [
        (name, [name], SAMPLES // 3, 2) for name in APART
    ]
    assert np.load(home / "run" / "labels" / "target-classes.npy").shape == (SAMPLES, 2)
    assert 0 < told["mpvap"]["against_all"] <= told["mpvap"]["within"] <= 1
    assert told["verticals"][0]["average_precision"].keys() == {"within", "against_all"}
    assert len(told["gammas"]) == 3
    page, card = ((home / "run" / name).read_text().replace("\xa0", " ") for name in ("report.html", "card.md"))
    for text in (page, card):
        assert "knowledge concentration (Gao et al., 2017) over 3 verticals" in text
        assert "60 samples by coverage" in text
    assert "What it learned from specialists" in page
    assert not any("odds between components" in warning for warning in report["warnings"])


def test_the_student_is_loaded_exported_and_gives_probabilities(home: Path, reporter: Reporter) -> None:
    do(home, sites_of(APART, tuple(APART)), reporter, {"head": {"kind": "sc-sc", "scaling": "class"}})
    student = StudentModel(home / "run" / "student")
    assert student.head is not None
    assert list(student.head.verticals) == list(APART)
    images = pictures(np.arange(7) % 6, 2)[..., None]
    export_student(student, home / "student.pt2")
    log_probs = student.log_probs(images)
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1, rtol=1e-5)
    exported = torch.export.load(home / "student.pt2").module()(torch.from_numpy(images))
    np.testing.assert_allclose(exported.detach().numpy(), log_probs, atol=1e-4)


def test_without_coverage_unified_labels_route(home: Path, reporter: Reporter) -> None:
    sites = sites_of(CHAIN, ())
    told = do(home, sites, reporter, {"verticals": TABLE, "keep": 2}, unify={"method": "ce"})["student"][
        "concentration"
    ]
    assert told["routed_by"] == {"coverage": 0, "unified labels": SAMPLES}
    assert [v["specialists"] for v in told["verticals"]] == [["east"], ["east", "north"], ["north"]]
    labels, values = (np.load(home / "run" / "labels" / f"target-{name}.npy") for name in ("classes", "values"))
    assert not (home / "run" / "labels" / "q.npy").exists()
    plain = settings(home, {}, student={"learning": "soft-labels", "fit": {"epochs": 1}}, unify={"method": "ce"})
    run_job(home, sites_of(CHAIN, ()), plain, reporter, run="plain")
    unified = np.load(home / "plain" / "labels" / "q.npy")
    names = read_json(home / "run" / "student" / "labels.json")["labels"]
    parts = [[names.index(c) for c in held] for held in TABLE.values()]
    for row in range(SAMPLES):
        best = max(parts, key=lambda part, row=row: unified[row, part].sum())
        assert set(labels[row]) == set(best)
        assert values[row].sum() == pytest.approx(1, abs=1e-5)


def test_routing_by_unified_labels_is_what_it_says_even_with_coverage(home: Path, reporter: Reporter) -> None:
    report = do(home, sites_of(APART, tuple(APART)), reporter, {"routing": "unified"})
    assert report["student"]["concentration"]["routed_by"] == {"coverage": 0, "unified labels": SAMPLES}


def test_unified_labels_are_learnt_by_a_softmax(home: Path, reporter: Reporter) -> None:
    report = do(home, sites_of(APART, tuple(APART)), reporter, {"target": "unified", "keep": 3})
    told = report["student"]["concentration"]
    assert told["keep"] == 3
    assert "routed_by" not in told
    unified = np.load(home / "run" / "labels" / "q.npy")
    values = np.load(home / "run" / "labels" / "target-values.npy")
    np.testing.assert_array_equal(values, -np.sort(-unified, axis=1)[:, :3])
    assert report["student"]["accuracy"] > 0.9


@pytest.mark.parametrize("drawn", [1.0, 0.5])
def test_the_student_learns_every_class(home: Path, reporter: Reporter, drawn: float) -> None:
    report = do(home, sites_of(APART, tuple(APART)), reporter, {"drawn": drawn})
    assert report["student"]["accuracy"] > 0.9
    assert report["student"]["concentration"]["mpvap"]["against_all"] > 0.9


def test_a_repeated_job_learns_nothing_anew(home: Path, reporter: Reporter) -> None:
    sites = sites_of(APART, tuple(APART))
    do(home, sites, reporter, {})
    weights = home / "run" / "student" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    do(home, sites, reporter, {})
    assert weights.stat().st_mtime_ns == before


def test_fewer_classes_come_than_are_kept(home: Path, reporter: Reporter) -> None:
    ask = {"encoding": "top-1", "question_size": 16, "retries": 0}
    report = do(home, sites_of(APART, tuple(APART)), reporter, {}, ask=ask)
    assert report["student"]["concentration"]["keep"] == 1
    assert "at most 1 probability." in (home / "run" / "card.md").read_text().replace("\xa0", " ")


def test_the_oracle_has_the_same_head(home: Path, reporter: Reporter) -> None:
    judge = {"test": {"kind": "npz", "path": "test.npz"}, "pool_labels": "labels.npy"}
    report = do(home, sites_of(APART, tuple(APART)), reporter, {}, judge=judge)
    assert report["baselines"]["oracle"]["accuracy"] > 0.9
    assert StudentModel(home / "run" / "oracle").head == StudentModel(home / "run" / "student").head


def test_a_student_of_chosen_classes_is_routed_over_all_and_has_no_block_for_the_rest(
    home: Path, reporter: Reporter
) -> None:
    more = {"verticals": {"birds": ["a", "b"], "cars": ["c", "d"], "plants": ["e", "f"]}}
    report = do(home, sites_of(APART, tuple(APART)), reporter, more, student={"classes": ["e", "a", "b"]})
    student, told = StudentModel(home / "run" / "student"), report["student"]["concentration"]
    assert student.labels == ("a", "b", "e")
    assert student.head is not None
    assert student.head.verticals == {"birds": (0, 1), "plants": (2,)}
    assert [(v["name"], v["classes"], v["samples"]) for v in told["verticals"]] == [
        ("birds", ["a", "b"], SAMPLES // 3),
        ("plants", ["e"], SAMPLES // 3),
    ]
    assert told["samples_elsewhere"] == SAMPLES // 3
    labels, values = (np.load(home / "run" / "labels" / f"target-{name}.npy") for name in ("classes", "values"))
    sure, unsure = 0.9 / 0.95, 0.05 / 0.95
    expected = np.array([[sure, unsure, 0], [unsure, sure, 0], [0] * 3, [0] * 3, [0, 0, sure], [0, 0, unsure]])
    dense = np.zeros((SAMPLES, 3))
    np.add.at(dense, (np.arange(SAMPLES)[:, None], labels), values)
    np.testing.assert_allclose(dense, expected[TRUTH], atol=1e-6)
    assert report["student"]["accuracy"] > 0.9
    assert "20 samples went to verticals without a wanted class" in (home / "run" / "card.md").read_text().replace(
        "\xa0", " "
    )


def test_unified_labels_of_chosen_classes_are_cut_as_for_any_loss(
    home: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = list[Any]()

    def noted(*args: Any) -> SparseSoftmax:
        counts.append(args[-1])
        return SparseSoftmax(*args)

    monkeypatch.setattr(server_concentration, "SparseSoftmax", noted)
    more = {"target": "unified", "verticals": TABLE}
    report = do(home, sites_of(APART, tuple(APART)), reporter, more, student={"classes": ["a", "b", "d"]})
    unified = np.load(home / "run" / "labels" / "q.npy")[:, [0, 1, 3]].astype(np.float64)
    labels, values = (np.load(home / "run" / "labels" / f"target-{name}.npy") for name in ("classes", "values"))
    assert report["student"]["concentration"]["keep"] == 3
    dense = np.zeros((SAMPLES, 3))
    np.put_along_axis(dense, labels.astype(np.int64), values, axis=1)
    mass = unified.sum(axis=1)
    np.testing.assert_allclose(dense, unified / mass[:, None], atol=1e-6)
    np.testing.assert_allclose(counts[0], mass / mass.mean(), rtol=1e-5)
    assert report["student"]["accuracy"] > 0.9


@pytest.mark.parametrize(
    ("classes", "covering", "concentration", "said"),
    [
        (CHAIN, (), {}, "overlap: both know 'c'"),
        (APART, (), {"verticals": {"birds": ["a", "b"], "cars": ["c", "d"]}}, "leaves 2 classes out: e, f"),
        (APART, (), {"keep": 3}, "vertical east has 2 classes"),
        (APART, ("east",), {"routing": "coverage"}, "do not tell theirs: north, west"),
        (APART, (), {"verticals": {"birds": ["a", "c"], "cars": ["b", "d"], "rest": ["e", "f"]}}, "none can teach it"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_asked(
    home: Path,
    reporter: Reporter,
    classes: dict[str, tuple[str, ...]],
    covering: tuple[str, ...],
    concentration: dict[str, Any],
    said: str,
) -> None:
    sites = sites_of(classes, covering)
    with pytest.raises(SettingsError, match=said) as caught:
        do(home, sites, reporter, concentration)
    assert caught.value.hint
    assert not sites.attempts


@pytest.mark.parametrize(
    ("concentration", "more", "said"),
    [
        ({"verticals": {"birds": ["a", "b"], "cars": ["b", "c"]}}, {}, "class 'b' is in verticals birds and cars"),
        ({"verticals": TABLE, "keep": 3}, {}, "keep is 3; vertical birds has 2 classes"),
        ({"verticals": {}}, {}, "names none"),
        ({"head": {"kind": "fc-fc", "shared": 3}}, {}, "has no use for"),
        ({"head": {"second": 3, "shared": 4}}, {}, "more than the 3 units"),
        ({"drawn": 0.1, "head": {"scaling": "vertical"}}, {}, "head.scaling 'vertical' cannot take"),
        ({"drawn": 0.1, "target": "unified"}, {}, "target 'unified' with"),
        ({"routing": "coverage"}, {"ask": {"coverage": False}}, "for which no site is asked"),
        ({"routing": "coverage"}, {"unify": {"method": "mf-p"}}, "for which no site is asked"),
        ({"keep": 4}, {"ask": {"encoding": "top-3"}}, "brings 3 of a sample's classes"),
        ({}, {"privacy": {"secure_sum": True}}, "student.learning is 'concentration'"),
        ({}, {"student": {"classes": ["a", "b"], "other": True}}, "whose verticals share out wanted classes alone"),
        ({}, {"unify": {"prior_correction": True}}, "prior_correction corrects soft labels"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(
    home: Path, concentration: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        settings(home, concentration, **more)


def test_an_architecture_without_a_place_is_refused_as_the_job_is_opened(home: Path, reporter: Reporter) -> None:
    chosen = settings(home, {})
    student = chosen.student.model_copy(update={"architecture": "torchvision:squeezenet1_1"})
    preprocessing = student.preprocessing.model_copy(update={"size": (64, 64)})
    student = student.model_copy(update={"preprocessing": preprocessing})
    (home / "run").mkdir()
    with pytest.raises(SettingsError, match="ends in a linear layer"):
        Job(home / "run", chosen.model_copy(update={"student": student}), reporter)


def test_sparse_answers_stay_sparse_until_the_student(home: Path, reporter: Reporter) -> None:
    """From top-K no row over all classes is written, and the student is shown the same labels by the report."""
    wanted, asked = {"target": "unified", "keep": 2, "verticals": TABLE}, {"encoding": "top-2", "question_size": 16}
    report = do(home, sites_of(CHAIN, ()), reporter, wanted, ask=asked)
    folder = home / "run" / "labels"
    assert not (folder / "q.npy").exists()
    assert not (folder / "target-classes.npy").exists()
    classes, values, rest = (np.load(folder / f"top-{name}.npy") for name in ("classes", "values", "rest"))
    assert classes.shape == values.shape == (SAMPLES, 2)
    assert np.isin(classes, range(6)).all()
    np.testing.assert_allclose(values.sum(axis=1) + rest, 1, atol=1e-6)
    assert (classes[:, 0] == TRUTH).mean() > 0.9
    assert report["student"]["accuracy"] > 0.9
    before = (folder / "top-values.npy").stat().st_mtime_ns
    again = do(home, sites_of(CHAIN, ()), reporter, wanted, ask=asked)
    assert again["timing"] == report["timing"]
    assert (folder / "top-values.npy").stat().st_mtime_ns == before
