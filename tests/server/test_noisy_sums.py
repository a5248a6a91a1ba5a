"""Sums that carry noise: as much as they must, whoever is lost, and labels from them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import LinearConstraint, minimize
from scipy.stats import chi2, kstest

from consilience.client.privacy.noise import Secret
from consilience.client.privacy.sum_noise import share_of_noise
from consilience.client.sums import Noise
from consilience.common.cards import SumNoiseCard
from consilience.common.errors import ProtocolError
from consilience.common.settings import SumNoise
from consilience.common.simplex import UNSURE
from consilience.common.sums.messages import MaskedRows, RowsQuestion
from consilience.common.sums.ring import NoisyRing
from consilience.server.noisy_sums import possible
from consilience.server.unify import unify
from consilience.server.unmasking import unify_summed, unmask_sums
from helpers.summing import Sums, draw, make_terms, open_sums

SETS = {"ant": [0, 1, 2, 3], "bee": [3, 1, 4], "cat": [5, 0, 4, 2], "dog": [1, 5, 3, 0], "elk": [2, 5, 4, 6]}
SAMPLES = 600
HONEST = 3

pytestmark = pytest.mark.usefixtures("unsynced")


def source(sigma: float, samples: int = SAMPLES) -> Callable[[str], Noise]:
    """What each site adds, from a secret of its own."""
    images = np.random.default_rng(0).integers(0, 256, (samples, 4, 4, 1), np.uint8)
    settings = SumNoise(mechanism="sum-noise", sigma=sigma, honest=HONEST)

    def of(site: str) -> Noise:
        secret = Secret(site.encode().ljust(32, b"\0"))
        return lambda terms, low, high, rows: share_of_noise(settings, secret, terms, site, images[low:high], rows)

    return of


def quiet(site: str) -> Noise:
    """Adds nothing, whatever the terms say."""
    return lambda terms, low, high, rows: np.zeros((high - low, len(terms.by_name[site].classes)), np.int64)


def noisy(folder: Path, sigma: float, noise: Callable[[str], Noise] | None = None, samples: int = SAMPLES) -> Sums:
    cards = dict.fromkeys(SETS, SumNoiseCard(sigma=sigma, honest=HONEST))
    terms = make_terms(SETS, samples, noise=cards, threshold=4)
    return Sums(folder, terms, draw(SETS, samples), piece=170, noise=noise or source(sigma, samples))


def noise_of(sums: Sums, found: NDArray[np.float64], left: Collection[str]) -> NDArray[np.float64]:
    """The noise in sums, in units of a probability: what they are beside open answers."""
    ring = sums.terms.ring()
    assert isinstance(ring, NoisyRing)
    return (found - open_sums(sums.terms, sums.answers, left)) * (ring.scale / ring.unit)


def enough(noise: NDArray[np.float64], sigma: float) -> bool:
    """Whether each column's variance could be that of `sigma` or more, at one chance in 10,000."""
    return bool((chi2.cdf((noise**2).sum(axis=0) / sigma**2, len(noise)) > 1e-4).all())


@pytest.mark.parametrize("lost", [[], ["ant"], ["elk"]])
def test_the_sum_carries_its_noise_whoever_is_lost(tmp_path: Path, lost: list[str]) -> None:
    sums = noisy(tmp_path, 2.0)
    found = sums.run(lost)
    left = [site for site in SETS if site not in lost]
    noise = noise_of(sums, found.sums, left)[:, found.known]
    assert sums.terms.noise is not None
    due = np.sqrt(sums.terms.noise.variances(left))[found.known]
    ratio = (noise**2).sum(axis=0) / due**2
    assert ((chi2.sf(ratio, SAMPLES) > 1e-4) & (chi2.cdf(ratio, SAMPLES) > 1e-4)).all()  # neither more nor less
    assert all(kstest(column / d, "norm").pvalue > 1e-4 for column, d in zip(noise.T, due, strict=True))
    assert enough(noise, 2.0 * 0.999)
    assert found.noisy


@pytest.mark.parametrize("liars", [["ant", "bee"], ["cat", "elk"], ["dog", "elk"]])
def test_the_honest_carry_it_alone_where_others_add_none(tmp_path: Path, liars: list[str]) -> None:
    sums = noisy(tmp_path, 2.0, lambda site: quiet(site) if site in liars else source(2.0)(site))
    found = sums.run()
    known = sorted({label for site in SETS if site not in liars for label in SETS[site]})
    assert enough(noise_of(sums, found.sums, list(SETS))[:, known], 2.0 * 0.999)


def test_with_noise_off_it_is_noticed(tmp_path: Path) -> None:
    """The test above can fail: with no noise, and with noise of too few."""
    for number, silent in enumerate((list(SETS), ["ant", "bee", "cat", "dog"])):
        sums = noisy(
            tmp_path / str(number),
            2.0,
            lambda site, silent=silent: quiet(site) if site in silent else source(2.0)(site),
        )  # type: ignore[misc]
        found = sums.run()
        assert not enough(noise_of(sums, found.sums, list(SETS)), 2.0 * 0.999)


def test_a_number_depends_on_no_question_and_no_repetition(tmp_path: Path) -> None:
    sums = noisy(tmp_path, 1.0, samples=40)
    sums.advertise()
    sums.share()
    sums.deliver()

    def sent(low: int, high: int) -> bytes:
        question = RowsQuestion(terms=sums.terms.digest, start=low, stop=high)
        return sums.sites["ant"].rows(question, lambda _, a, b: sums.answers["ant"][a:b], sums.noise("ant")).data  # type: ignore[misc]

    assert sent(0, 40) == sent(0, 7) + sent(7, 40) == sent(0, 40)
    question = RowsQuestion(terms=sums.terms.digest, start=0, stop=4)
    with pytest.raises(ProtocolError, match="which adds none now"):
        sums.sites["ant"].rows(question, lambda _, a, b: sums.answers["ant"][a:b])


def test_masks_that_do_not_cancel_are_noticed_behind_noise(tmp_path: Path) -> None:
    sums = noisy(tmp_path, 100.0, samples=40)
    sums.advertise()
    sums.share()
    sums.deliver()
    for site in SETS:
        if site != "ant":
            sums.send(site)
    question = RowsQuestion(terms=sums.terms.digest, start=0, stop=40)
    sums.server.add_rows("ant", MaskedRows(question, bytes(40 * 4 * 4)))
    sums.open()
    with pytest.raises(ProtocolError, match="do not cancel in sample 0"):
        unmask_sums(sums.server)


def test_small_noise_leaves_labels_nearly_as_they_are(tmp_path: Path) -> None:
    sums = noisy(tmp_path, 0.01)
    found = unify_summed(tmp_path / "q.npy", sums.run())
    expected = unify([sums.answers[site] for site in SETS], list(SETS.values()))
    assert found.not_converged == 0
    np.testing.assert_allclose(found.probs.sum(axis=1), 1, atol=1e-5)
    assert np.abs(found.probs - expected.probs).mean() < 0.02
    assert (found.probs.argmax(axis=1) == expected.probs.argmax(axis=1)).mean() > 0.95


@pytest.mark.parametrize("sigma", [1.0, 200.0])
def test_large_noise_gives_labels_all_the_same(tmp_path: Path, sigma: float) -> None:
    found = unify_summed(tmp_path / "q.npy", noisy(tmp_path, sigma).run())
    assert np.isfinite(found.probs).all()
    np.testing.assert_allclose(found.probs.sum(axis=1), 1, atol=1e-5)
    assert (found.probs > 0).all()
    assert found.not_converged == 0


def test_uneven_noise_and_sites_without_any(tmp_path: Path) -> None:
    """`elk` adds none; `ant` trusts nobody and adds all that it needs; the others share theirs out."""
    cards = {
        **dict.fromkeys(("bee", "cat", "dog"), SumNoiseCard(sigma=1.0, honest=2)),
        "ant": SumNoiseCard(sigma=3.0, honest=1),
    }
    terms = make_terms(SETS, SAMPLES, noise=cards, threshold=5)
    images = np.random.default_rng(0).integers(0, 256, (SAMPLES, 4, 4, 1), np.uint8)

    def of(site: str) -> Noise:
        card = terms.by_name[site].noise
        assert card is not None
        settings = SumNoise(mechanism="sum-noise", sigma=card.sigma, honest=card.honest)
        secret = Secret(site.encode().ljust(32, b"\0"))
        return lambda terms, low, high, rows: share_of_noise(settings, secret, terms, site, images[low:high], rows)

    sums = Sums(
        tmp_path, terms, draw(SETS, SAMPLES), piece=170, noise=lambda site: of(site) if site != "elk" else quiet(site)
    )
    noise = noise_of(sums, sums.run().sums, list(SETS))
    assert enough(noise[:, SETS["ant"]], 3.0 * 0.999)
    assert enough(noise[:, sorted({*SETS["bee"], *SETS["cat"], *SETS["dog"]})], 0.999)
    assert not noise[:, 6].any() or np.abs(noise[:, 6]).max() < 1e-2  # only elk knows it
    for site, short in (("bee", ""), ("ant", "")):
        assert sums.terms.noise is not None
        assert sums.terms.noise.shortage(site, terms.threshold) == short


def test_sites_without_enough_noise_make_no_keys(tmp_path: Path) -> None:
    cards = dict.fromkeys(SETS, SumNoiseCard(sigma=1.0, honest=4))
    for threshold, part in ((3, "3 of these need to stay"), (4, "")):
        terms = make_terms(SETS, 9, noise=cards, threshold=threshold)
        sums = Sums(tmp_path / str(threshold), terms, draw(SETS, 9))
        if part:
            with pytest.raises(ProtocolError, match=part):
                sums.advertise()
        else:
            sums.advertise()
    less = {**cards, "ant": SumNoiseCard(sigma=2.0, honest=4)}
    sums = Sums(tmp_path / "less", make_terms(SETS, 9, noise=less, threshold=5), draw(SETS, 9))
    with pytest.raises(ProtocolError, match="site ant needs noise 2; class 0 is sure to carry"):
        sums.advertise()
    other = make_terms(SETS, 9, noise={**cards, "bee": SumNoiseCard(sigma=1.0, honest=3)}, threshold=5)
    with pytest.raises(ProtocolError, match="another teacher, policy version or noise"):
        sums.sites["bee"].advertise(
            other, teacher="a" * 64, policy="c" * 16, classes=["class-3", "class-1", "class-4"], noise=cards["bee"]
        )


# From noisy sums to sums that answers can have


def test_possible_sums_are_the_nearest(tmp_path: Path) -> None:
    sets = [np.array([0, 1]), np.array([1, 2]), np.array([2, 0, 3])]
    weights = [1.0, 2.0, 1.5]
    random = np.random.default_rng(0)
    given = random.normal(0.8, 1.0, (12, 4))
    found = possible(given, sets, weights)
    uniform = np.zeros(4)
    for classes, weight in zip(sets, weights, strict=True):
        uniform[classes] += weight / len(classes)
    bare = (found - UNSURE * uniform) / (1 - UNSURE)
    places = np.concatenate(sets)
    owner = np.repeat(np.arange(3), [2, 2, 3])
    for row, near in zip(given, bare, strict=True):

        def distance(p: NDArray[np.float64], row: NDArray[np.float64] = row) -> float:
            total = np.zeros(4)
            np.add.at(total, places, np.array(weights)[owner] * p)
            return float(((total - row) ** 2).sum())

        sums_to_1 = LinearConstraint(np.equal.outer(np.arange(3), owner).astype(np.float64), 1, 1)
        best = minimize(
            distance,
            np.array([1 / 2, 1 / 2, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3]),
            bounds=[(0, 1)] * 7,
            constraints=sums_to_1,
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-14},
        )
        assert ((near - row) ** 2).sum() == pytest.approx(best.fun, rel=1e-5, abs=1e-8)


def test_possible_sums_stay_what_they_are() -> None:
    sets = [np.array([0, 1, 2]), np.array([2, 1])]
    parts = [np.random.default_rng(i).dirichlet(np.ones(len(s)), 50) for i, s in enumerate(sets)]
    true = np.zeros((50, 3))
    for classes, part in zip(sets, parts, strict=True):
        true[:, classes] += part
    uniform = np.array([1 / 3, 1 / 3 + 1 / 2, 1 / 3 + 1 / 2])
    np.testing.assert_allclose(possible(true, sets, [1.0, 1.0]), (1 - UNSURE) * true + UNSURE * uniform, atol=1e-5)
    assert possible(true[:0], sets, [1.0, 1.0]).shape == (0, 3)
