"""The unify stage: streamed labels are those of one call, are kept, and are made anew when anything changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from consilience.common.encoding import encode
from consilience.common.labels import LabelSpace
from consilience.common.progress import Reporter
from consilience.common.protocol import Answer, Question, SiteCard
from consilience.common.settings import Unify
from consilience.server import answered, labelling
from consilience.server.answers import About, AnswerStore
from consilience.server.labelling import unify_pool
from consilience.server.unify import Prior, unify

DIGEST, POLICY, SIZE = "a" * 64, "c" * 16, 50
CLASSES = {"one": ["a", "b", "c"], "two": ["c", "d"]}
PRIORS = {"one": (0.6, 0.3, 0.1), "two": None}


@pytest.fixture
def space() -> LabelSpace:
    return LabelSpace.build(CLASSES)


@pytest.fixture
def cards() -> list[SiteCard]:
    return [
        SiteCard(
            name=name,
            classes=tuple(classes),
            encodings=("f32",),
            teacher=DIGEST,
            description="",
            policy=POLICY,
            class_priors=PRIORS[name],
        )
        for name, classes in CLASSES.items()
    ]


def answers() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [log_softmax(rng.normal(0, 2, (SIZE, len(c))), axis=1).astype(np.float32) for c in CLASSES.values()]


@pytest.fixture
def stores(tmp_path: Path) -> list[AnswerStore]:
    made = []
    for (name, classes), rows in zip(CLASSES.items(), answers(), strict=True):
        about = About(
            site=name, pool=DIGEST, size=SIZE, teacher=DIGEST, policy=POLICY, encoding="f32", classes=len(classes)
        )
        store = AnswerStore(tmp_path / "answers" / name, about)
        question = Question(job="job", pool=DIGEST, start=0, stop=SIZE, encoding="f32", teacher=DIGEST, policy=POLICY)
        store.append(Answer(question, encode(rows, "f32"), 0.0))
        made.append(store)
    return made


def run(
    folder: Path, space: LabelSpace, stores: list[AnswerStore], cards: list[SiteCard], settings: Unify
) -> np.ndarray:
    with Reporter(quiet=True) as reporter:
        labels, diagnostics = unify_pool(folder, space, stores, cards, settings, reporter)
    assert diagnostics.samples == SIZE
    assert diagnostics.not_converged == 0
    return np.array(labels)  # a copy: the file is written anew by the next run


@pytest.mark.parametrize("values", [4, 28, 10**6])
def test_labels_do_not_depend_on_the_block(
    tmp_path: Path,
    space: LabelSpace,
    stores: list[AnswerStore],
    cards: list[SiteCard],
    monkeypatch: pytest.MonkeyPatch,
    values: int,
) -> None:
    monkeypatch.setattr(answered, "BLOCK_VALUES", values)
    labels = run(tmp_path / "labels", space, stores, cards, Unify())
    assert np.allclose(labels, unify(answers(), space.class_sets).probs, atol=1e-7)


def test_weights_temperature_and_priors_arrive(
    tmp_path: Path, space: LabelSpace, stores: list[AnswerStore], cards: list[SiteCard]
) -> None:
    settings = Unify(method="mf-lf", weights={"two": 3.0}, temperature=2.0, prior_correction=True)
    labels = run(tmp_path / "labels", space, stores, cards, settings)
    flat = [1 / 4] * 4
    prior = Prior(flat, [[0.6, 0.3, 0.1], flat[:2]])
    expected = unify(
        answers(), space.class_sets, method="mf-lf", weights=[1.0, 3.0], temperature=2.0, prior=prior
    ).probs
    assert np.allclose(labels, expected, atol=1e-6)
    assert not np.allclose(labels, unify(answers(), space.class_sets, method="mf-lf").probs, atol=1e-3)


def test_labels_are_kept_until_the_settings_change(
    tmp_path: Path, space: LabelSpace, stores: list[AnswerStore], cards: list[SiteCard], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path / "labels", space, stores, cards, Unify())
    with monkeypatch.context() as patched:
        patched.setattr(labelling, "unifier", lambda *arguments: pytest.fail("unified again"))
        assert np.array_equal(run(tmp_path / "labels", space, stores, cards, Unify()), first)
    other = run(tmp_path / "labels", space, stores, cards, Unify(method="sd"))
    assert not np.allclose(other, first, atol=1e-3)
    (tmp_path / "labels" / "diagnostics.json").unlink()
    assert np.array_equal(run(tmp_path / "labels", space, stores, cards, Unify()), first)
