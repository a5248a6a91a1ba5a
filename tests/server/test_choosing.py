"""Samples are chosen as the papers' definitions say, whatever the pool's blocks: against slow implementations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import cdist, jensenshannon
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from consilience.common.data import from_arrays
from consilience.common.encoding import encode
from consilience.common.errors import SettingsError
from consilience.common.labels import LabelSpace
from consilience.common.pool import Pool
from consilience.common.progress import Reporter
from consilience.common.protocol import Answer, Question
from consilience.common.settings import Ask, Student
from consilience.server import choosing
from consilience.server.answers import AnswerStore
from consilience.server.answers_about import About
from consilience.server.choosing import Round, check_choice, check_pairs, disagreement, next_samples
from consilience.server.learning import ByLoss, StudentModel, learn, oracle_loss

SIZE, POOL_DIGEST, POLICY = 90, "a" * 64, "c" * 16
CLASSES = {"east": ("a", "b", "c"), "north": ("c", "d"), "west": ("b", "c", "d")}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, 16, 16), np.uint8)
    pixels[40] = pixels[30]
    return Pool.build(from_arrays(pixels, None, (), where="test"), tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def space() -> LabelSpace:
    return LabelSpace.build(CLASSES)


@pytest.fixture(scope="module")
def student(pool: Pool, space: LabelSpace, tmp_path_factory: pytest.TempPathFactory) -> StudentModel:
    folder = tmp_path_factory.mktemp("student")
    settings = Student.model_validate(
        {"architecture": "cnn3@0.25", "fit": {"epochs": 2, "precision": "f32", "augment": False}}
    )
    lesson = ByLoss(oracle_loss(np.arange(SIZE) % 4), settings, 0)
    with Reporter(quiet=True) as reporter:
        learn(folder, pool.read(0, SIZE), space, lesson, settings, 0, reporter, "student")
    return StudentModel(folder)


def told(seed: int, rows: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [log_softmax(rng.normal(0, 2, (rows, len(held))), axis=1).astype(np.float32) for held in CLASSES.values()]


ASKED = np.array([3, 9, 12, 30, 41, 60, 61, 62, 70, 88, 1, 2, 20, 77], np.int64)  # of two rounds
LATER = 4
"""Of the last of them nobody has answered yet."""


def known(folder: Path, pool: Pool, student: StudentModel, space: LabelSpace) -> Round:
    stores = []
    for (site, classes), rows in zip(CLASSES.items(), told(1, len(ASKED)), strict=True):
        about = About(
            site=site,
            pool=POOL_DIGEST,
            size=len(ASKED),
            teacher=POOL_DIGEST,
            policy=POLICY,
            encoding="f32",
            classes=len(classes),
        )
        store = AnswerStore(folder / site, about)
        stop = len(ASKED) - LATER
        question = Question(
            job="job", pool=POOL_DIGEST, start=0, stop=stop, encoding="f32", teacher=POOL_DIGEST, policy=POLICY
        )
        store.append(Answer(question, encode(rows[:stop], "f32"), 0.0))
        stores.append(store)
    return Round(folder, pool, ASKED, student, space, stores)


def penultimate(student: StudentModel, pool: Pool) -> np.ndarray:
    """What the last linear layer is fed, by a hook of its own."""
    import torch

    found: list[torch.Tensor] = []
    linear = [module for module in student.model.modules() if isinstance(module, torch.nn.Linear)][-1]
    handle = linear.register_forward_hook(lambda module, inputs, output: found.append(inputs[0]))
    student.log_probs(pool.read(0, SIZE))
    handle.remove()
    return torch.cat(found).numpy()


def choose(how: str, held: Round, count: int) -> list[int]:
    with Reporter(quiet=True) as reporter:
        return next_samples(how, held, count, reporter.start("choosing", SIZE)).tolist()


def test_the_least_certain_are_taken(tmp_path: Path, pool: Pool, student: StudentModel, space: LabelSpace) -> None:
    found = choose("uncertainty", known(tmp_path, pool, student, space), 15)
    told = np.exp(student.log_probs(pool.read(0, SIZE)).astype(np.float64))
    doubt = [float(entropy(row)) for row in told]
    free = [k for k in range(SIZE) if k not in set(ASKED.tolist())]
    assert found == sorted(sorted(free, key=lambda k: -doubt[k])[:15])


def test_the_farthest_is_taken_one_after_another(
    tmp_path: Path, pool: Pool, student: StudentModel, space: LabelSpace
) -> None:
    found = choose("k-centre", known(tmp_path, pool, student, space), 15)
    values = penultimate(student, pool).astype(np.float64)
    between = cdist(values, values)
    centres = ASKED.tolist()
    for _ in range(15):
        nearest = between[:, centres].min(axis=1)
        nearest[centres] = -1
        centres.append(int(nearest.argmax()))
    assert found == sorted(centres[len(ASKED) :])
    assert {30, 40} - set(found), "one image is never chosen beside itself"


def test_where_sites_differ_nearby_is_where_they_are_expected_to(
    tmp_path: Path, pool: Pool, student: StudentModel, space: LabelSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "NEIGHBOURS", 3)
    found = choose("disagreement", known(tmp_path, pool, student, space), 15)
    answered = ASKED[:-LATER]
    values = disagreement(space, [rows[:-LATER] for rows in told(1, len(ASKED))])
    features = penultimate(student, pool).astype(np.float64)
    nearest = np.argsort(cdist(features, features[answered]), axis=1, kind="stable")[:, :3]
    expected = values[nearest].mean(axis=1)
    free = [k for k in range(SIZE) if k not in set(ASKED.tolist())]
    least = min(expected[found])
    assert len(set(found)) == 15
    assert set(found) <= set(free)
    assert sum(expected[k] > least + 1e-9 for k in free) <= 15
    assert all(expected[k] <= least + 1e-9 for k in free if k not in found)


def test_disagreement_is_that_of_pairs_on_what_they_share(space: LabelSpace) -> None:
    rows = told(2, 6)
    shared = {(0, 2): ([1, 2], [0, 1]), (1, 2): ([0, 1], [1, 2])}  # east and north share c alone
    expected = np.zeros(6)
    for (i, j), (left, right) in shared.items():
        p, q = softmax(rows[i][:, left], axis=1), softmax(rows[j][:, right], axis=1)
        mass = np.exp(rows[i][:, left]).sum(axis=1) * np.exp(rows[j][:, right]).sum(axis=1)
        expected += np.sqrt(mass) * jensenshannon(p, q, axis=1) ** 2 / 2
    assert np.allclose(disagreement(space, rows), expected, atol=1e-6)
    alike = [None, rows[1], np.concatenate([np.full((6, 1), -30), rows[1]], axis=1)]
    assert np.allclose(disagreement(space, alike), 0, atol=1e-6)
    assert np.isnan(disagreement(space, [rows[0], None, None])).all()


def test_sites_differ_on_groups_and_on_the_classes_of_one_that_the_other_knows_whole() -> None:
    sites = {"east": ("pet", "cow", "hen"), "north": ("cat", "dog", "cow"), "west": ("hen", "pet")}
    groups = {"pet": ("cat", "dog")}
    space = LabelSpace.build(sites, groups=groups)
    rng = np.random.default_rng(0)
    answers = [log_softmax(rng.normal(0, 2, (6, len(held))), axis=1).astype(np.float32) for held in sites.values()]
    east, north, west = (np.exp(rows.astype(np.float64)) for rows in answers)  # north and west share pets alone
    pets = np.stack([north[:, 0] + north[:, 1], north[:, 2]], axis=1)
    expected = np.zeros(6)
    for p, q in ((east[:, [0, 2]], west[:, [1, 0]]), (east[:, [0, 1]], pets)):
        mass = p.sum(axis=1) * q.sum(axis=1)
        expected += np.sqrt(mass) * jensenshannon(p, q, axis=1) ** 2 / 2
    assert np.allclose(disagreement(space, answers), expected, atol=1e-6)
    answers[1][:, 2] = -800.0  # no cow at all: finite all the same
    assert np.isfinite(disagreement(space, answers)).all()


@pytest.mark.parametrize("how", ["uncertainty", "disagreement", "k-centre"])
def test_blocks_change_nothing(
    tmp_path: Path, pool: Pool, student: StudentModel, space: LabelSpace, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = choose(how, known(tmp_path / "whole", pool, student, space), 20)
    monkeypatch.setattr(choosing, "BLOCK", 7)
    assert choose(how, known(tmp_path / "cut", pool, student, space), 20) == whole
    assert len(whole) == len(set(whole)) == 20
    assert not set(whole) & set(ASKED.tolist())
    assert whole == sorted(whole)


@pytest.mark.parametrize("how", ["uncertainty", "disagreement", "k-centre"])
def test_the_last_samples_of_a_pool_can_be_chosen(
    tmp_path: Path, pool: Pool, student: StudentModel, space: LabelSpace, how: str
) -> None:
    found = choose(how, known(tmp_path, pool, student, space), SIZE - len(ASKED))
    assert sorted([*found, *ASKED.tolist()]) == list(range(SIZE))


def test_of_samples_that_are_alike_the_first_is_taken(
    tmp_path: Path, pool: Pool, student: StudentModel, space: LabelSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = known(tmp_path, pool, student, space)
    monkeypatch.setattr(held.student, "log_probs", lambda images: np.full((len(images), 4), np.log(0.25), np.float32))
    free = [k for k in range(SIZE) if k not in set(ASKED.tolist())]
    assert choose("uncertainty", held, 5) == free[:5]


def test_two_sites_that_share_a_class_cannot_differ() -> None:
    asking = Ask(choose="disagreement", samples=10)
    check_pairs(asking, LabelSpace.build(CLASSES))
    apart = LabelSpace.build({"east": ("a", "b"), "west": ("b", "c")})
    with pytest.raises(SettingsError, match="no two sites share two classes"):
        check_pairs(asking, apart)
    check_pairs(Ask(choose="k-centre", samples=10), apart)


@pytest.mark.parametrize(
    ("architecture", "how", "fits"),
    [
        ("cnn3@0.25", "k-centre", True),
        ("resnet8@0.25", "disagreement", True),
        ("python:helpers.own_networks:convolutions", "k-centre", False),
        ("python:helpers.own_networks:convolutions", "uncertainty", True),
    ],
)
def test_a_student_without_a_last_linear_layer_is_refused(architecture: str, how: Any, fits: bool) -> None:
    asking, student = Ask(choose=how, samples=10), Student(architecture=architecture)
    if fits:
        check_choice(asking, student, (16, 16, 1))
    else:
        with pytest.raises(SettingsError, match=r"last linear layer is fed; .* has none"):
            check_choice(asking, student, (16, 16, 1))


def test_a_job_that_does_not_choose_imports_nothing_to_choose_with() -> None:
    late = {"sklearn", "matplotlib", "scipy.stats"}
    code = f"import sys, consilience.server.job; assert not {late} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
