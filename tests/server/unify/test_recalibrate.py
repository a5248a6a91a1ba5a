"""Coverage that is good, constant, inverted, or of a wrong level, against a truth that is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from consilience.common.errors import UnifyError
from consilience.server.unify import Recalibration, recalibrate, unify

FloatArray = NDArray[np.float64]
SETS = [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 0, 1]]
ROWS = 3000


def softmax(logits: FloatArray) -> FloatArray:
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def logit(c: FloatArray) -> FloatArray:
    return np.asarray(np.log(c) - np.log1p(-c))


def sigmoid(z: FloatArray) -> FloatArray:
    return np.asarray(1 / (1 + np.exp(-z)))


def pool(spoil: Any) -> tuple[FloatArray, list[FloatArray], list[FloatArray]]:
    """Truth, answers, and coverage of which that of site 1 is spoilt."""
    random = np.random.default_rng(0)
    truth = softmax(random.normal(0, 2.5, (ROWS, 8)))
    answers = [np.log(truth[:, s]) + 0.2 * random.normal(size=(ROWS, 4)) for s in SETS]
    coverage = [sigmoid(logit(truth[:, s].sum(axis=1)) + 0.2 * random.normal(size=ROWS)) for s in SETS]
    coverage[1] = spoil(coverage[1], random)
    return truth, answers, coverage


def fit(answers: list[FloatArray], coverage: list[Any]) -> list[Recalibration | None]:
    def masses(site: int) -> FloatArray:
        without = [None if i == site else c for i, c in enumerate(coverage)]
        return unify(answers, SETS, coverage=without).probs[:, SETS[site]].sum(axis=1, dtype=np.float64)

    return recalibrate(coverage, masses)


def test_good_coverage_is_left_alone() -> None:
    _, answers, coverage = pool(lambda c, _: c)
    for found in fit(answers, coverage):
        assert found is not None
        assert found.reason == ""
        assert found.agreement > 0.85
        assert found.offset == pytest.approx(0.0, abs=0.15)
        assert found.error < 0.1


@pytest.mark.parametrize("shift", [-4.0, -1.0, 1.0, 4.0])
def test_a_wrong_level_is_brought_back(shift: float) -> None:
    truth, answers, coverage = pool(lambda c, _: sigmoid(logit(c) + shift))
    found = fit(answers, coverage)[1]
    assert found is not None
    assert found.reason == ""
    assert found.offset == pytest.approx(-shift, abs=0.15)
    repaired = [c if i != 1 else found(c) for i, c in enumerate(coverage)]
    before = np.abs(unify(answers, SETS, coverage=coverage, strength=1.0).probs - truth).sum(axis=1).mean()
    after = np.abs(unify(answers, SETS, coverage=repaired, strength=1.0).probs - truth).sum(axis=1).mean()
    assert after < (0.98 if abs(shift) == 1 else 0.7) * before


@pytest.mark.parametrize(
    ("spoil", "agreement", "words"),
    [
        (lambda c, _: np.full_like(c, 0.4), (0.5, 0.5), "does not tell"),
        (lambda c, random: sigmoid(random.normal(size=c.size)), (0.46, 0.54), "does not tell"),
        (lambda c, _: 1 - c, (0.0, 0.3), "none of its classes"),
    ],
    ids=["constant", "noise", "inverted"],
)
def test_coverage_that_misleads_is_ignored(spoil: Any, agreement: tuple[float, float], words: str) -> None:
    _, answers, coverage = pool(spoil)
    found = fit(answers, coverage)[1]
    assert found is not None
    assert words in found.reason
    assert agreement[0] <= found.agreement <= agreement[1]


def test_disjoint_sites_are_tied_by_a_closed_world() -> None:
    # Nobody shares a class, but what the others leave over is the site's.
    random = np.random.default_rng(1)
    truth = softmax(random.normal(0, 2.5, (500, 6)))
    sets = [[0, 1], [2, 3], [4, 5]]
    coverage: list[Any] = [truth[:, s].sum(axis=1) for s in sets]
    bent = [coverage[0], sigmoid(logit(coverage[1]) + 2), coverage[2]]
    answers = [np.log(truth[:, s]) for s in sets]
    labels = unify(answers, sets, coverage=[bent[0], None, bent[2]])
    found = recalibrate(bent, lambda site: labels.probs[:, sets[site]].sum(axis=1))[1]
    assert found is not None
    assert found.offset == pytest.approx(-2, abs=0.05)


def test_sites_without_coverage_and_empty_pools() -> None:
    assert recalibrate([None, None], lambda site: np.zeros(0)) == [None, None]
    found = recalibrate([np.zeros(0), None], lambda site: np.zeros(0))
    assert found[0] is not None
    assert (found[0].offset, found[0].error) == (0.0, np.inf)
    assert found[1] is None


def test_who_orders_samples_well_is_never_ignored_however_little_the_others_leave_it() -> None:
    # All sites claim far too much, so the others leave about one sample to this one: its level is what is wrong.
    random = np.random.default_rng(3)
    z = random.normal(0, 3, 400)
    masses = sigmoid(z - 10)
    assert 0.1 < masses.sum() < 2
    found = recalibrate([sigmoid(z + 4)], lambda site: masses)[0]
    assert found is not None
    assert found.agreement > 0.9
    assert found.reason == ""
    np.testing.assert_allclose(found(sigmoid(z + 4)).sum(), masses.sum(), rtol=1e-6)
    assert 0.7 < found.error * np.sqrt(masses.sum()) < 1.5  # as little as the others leave, so little is known


def test_the_error_of_an_offset_is_what_it_varies_by() -> None:
    random = np.random.default_rng(0)
    z = random.normal(0, 2, 500)
    found = [recalibrate([sigmoid(z)], lambda site: (random.random(500) < sigmoid(z)) * 1.0)[0] for _ in range(200)]
    offsets = [one.offset for one in found if one is not None]
    assert np.std(offsets) == pytest.approx(np.mean([one.error for one in found if one is not None]), rel=0.15)


def test_zeros_and_ones_are_bounded() -> None:
    c = np.array([0.0, 1.0] * 50)
    found = recalibrate([c], lambda site: c)[0]
    assert found is not None
    np.testing.assert_allclose(found(c), c, atol=1e-3)
    for masses in (np.zeros(100), np.ones(100)):
        found = recalibrate([c], lambda site, masses=masses: masses)[0]
        assert found is not None
        assert np.isfinite(found.offset)
        np.testing.assert_allclose(found(c), masses, atol=1e-5)


@pytest.mark.parametrize(
    ("coverage", "masses", "parts"),
    [
        ([np.array([0.5, 2.0])], np.zeros(2), ["coverage of site 0", "2", "row 1"]),
        ([None, np.array([0.5, np.nan])], np.zeros(2), ["coverage of site 1", "nan", "row 1"]),
        ([np.array([0.5, 0.5]), np.array([0.5])], np.zeros(2), ["site 1", "(1,)", "(2,)"]),
        ([np.array([0.5, 0.5])], np.zeros(3), ["masses for site 0", "(3,)", "(2,)"]),
        ([np.array([0.5, 0.5])], np.array([0.0, 1.1]), ["masses of site 0", "1.1", "row 1"]),
    ],
)
def test_refusals(coverage: Any, masses: Any, parts: list[str]) -> None:
    with pytest.raises(UnifyError) as caught:
        recalibrate(coverage, lambda site: masses)
    for part in parts:
        assert part in str(caught.value)
