"""Epsilon against closed forms, against dp-accounting's own events, and against opacus."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from consilience.client.privacy import Event, Spent, account
from consilience.client.privacy.accounting import ORDERS, WHOLE_ORDERS, noise_for
from consilience.client.privacy.events import (
    BareOutputs,
    DpSgdTraining,
    NoisyOutputs,
    PateAverage,
    PateThreshold,
    PateVotes,
)
from consilience.common.errors import MissingExtraError, SettingsError

DELTA = 1e-5
GRID = [(sigma, count) for sigma in (20.0, 40.0, 100.0, 200.0) for count in (1, 100, 10_000)]


def converted(curve: np.ndarray, delta: float) -> float:
    """Rényi differential privacy to epsilon as Canonne, Kamath and Steinke (2020, proposition 12) do it."""
    orders = np.array(ORDERS)
    return float(np.min(curve + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)))


def exact(multiplier: float, delta: float) -> float:
    """The Gaussian mechanism's own epsilon (Balle and Wang, 2018, theorem 8)."""

    def over(epsilon: float) -> float:
        a, b = 1 / (2 * multiplier), epsilon * multiplier
        return float(norm.cdf(a - b) - np.exp(epsilon + norm.logcdf(-a - b)) - delta)

    return float(brentq(over, 0, 1e4, xtol=1e-12, rtol=1e-13)) if over(0) > 0 else 0.0


def bounded(spent: Spent) -> float:
    assert spent.epsilon is not None
    assert spent.rdp is not None
    assert spent.epsilon == min(spent.rdp, spent.pld if spent.pld is not None else math.inf)
    return spent.epsilon


@pytest.mark.parametrize(("sigma", "count"), GRID)
def test_noisy_votes_are_as_published(sigma: float, count: int) -> None:
    """GNMax is (alpha, alpha / sigma^2)-RDP whatever the votes (Papernot et al. 2018, proposition 8)."""
    curve = count * np.array(ORDERS) / sigma**2
    spent = account([PateVotes(sigma=sigma, count=count)], DELTA)
    assert spent.unit == "record"
    assert spent.rdp == pytest.approx(max(0, converted(curve, DELTA)), rel=1e-6)
    # The paper's own conversion (Mironov 2017, proposition 3) is looser, never tighter.
    assert bounded(spent) <= np.min(curve - np.log(DELTA) / (np.array(ORDERS) - 1))
    truth = exact(sigma / math.sqrt(2 * count), DELTA)
    assert spent.pld is not None
    assert truth * (1 - 1e-6) - 1e-9 <= spent.pld <= truth * 1.001 + 2e-4


def test_confident_votes_are_as_published() -> None:
    """The comparison adds alpha / (2 sigma^2) to each vote's alpha / sigma^2 (Papernot et al. 2018, section 4.2)."""
    orders = np.array(ORDERS)
    curve = 300 * (orders / (2 * 150**2) + orders / 40**2)
    spent = account([PateThreshold(sigma=150, count=300), PateVotes(sigma=40, count=300)], DELTA)
    assert spent.rdp == pytest.approx(converted(curve, DELTA), rel=1e-6)


@pytest.mark.parametrize(("sigma", "count"), GRID)
@pytest.mark.parametrize("kind", [PateVotes, PateAverage, PateThreshold, NoisyOutputs])
def test_gaussians_are_as_dp_accounting_has_them(kind: type, sigma: float, count: int) -> None:
    sensitivity = 1 if kind is PateThreshold else math.sqrt(2)
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(sigma / sensitivity), count)
    spent = account([kind(sigma=sigma, count=count)], DELTA)
    assert spent.rdp == pytest.approx(rdp.RdpAccountant(ORDERS).compose(event).get_epsilon(DELTA), rel=1e-6, abs=1e-12)
    if spent.rdp is not None and spent.rdp < 2:  # where the step of the distribution is dp-accounting's own
        assert spent.pld == pytest.approx(pld.PLDAccountant().compose(event).get_epsilon(DELTA), rel=1e-6, abs=1e-12)


def by_opacus(noise: float, rate: float, steps: int, orders: Sequence[float]) -> float:
    from opacus.accountants.analysis import rdp as opacus_rdp  # it takes seconds, of every worker that collects

    curve = opacus_rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=steps, orders=list(orders))
    found, _ = opacus_rdp.get_privacy_spent(orders=list(orders), rdp=curve, delta=DELTA)
    return float(found)


@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.1, 0.01, 1000), (0.8, 0.05, 100), (4.0, 0.2, 500)])
def test_dp_sgd_is_as_opacus_and_dp_accounting_have_it(noise: float, rate: float, steps: int) -> None:
    training = DpSgdTraining(noise_multiplier=noise, sample_rate=rate, steps=steps, run="a" * 64)
    spent = account([training], DELTA)
    theirs = by_opacus(noise, rate, steps, WHOLE_ORDERS)
    assert spent.rdp == pytest.approx(theirs, rel=1e-6)
    assert bounded(spent) <= by_opacus(noise, rate, steps, ORDERS)
    once = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    step = max(1e-4, (spent.rdp or 0) / 2e4)
    accountant = pld.PLDAccountant(value_discretization_interval=step)
    found = accountant.compose(dp_accounting.SelfComposedDpEvent(once, steps)).get_epsilon(DELTA)
    assert spent.pld == pytest.approx(found, rel=1e-6)


@settings(max_examples=10)
@given(st.floats(30, 300), st.integers(1, 500), st.floats(1.05, 3), st.floats(1e-9, 1e-3), st.sampled_from([1.5, 10.0]))
def test_epsilon_is_monotone(sigma: float, count: int, more: float, delta: float, wider: float) -> None:
    base = bounded(account([PateVotes(sigma=sigma, count=count)], delta))
    assert bounded(account([PateVotes(sigma=sigma, count=math.ceil(count * more))], delta)) >= base
    assert bounded(account([PateVotes(sigma=sigma * more, count=count)], delta)) <= base
    assert bounded(account([PateVotes(sigma=sigma, count=count)], min(0.5, delta * wider))) <= base
    other = PateThreshold(sigma=100, count=1)
    assert bounded(account([PateVotes(sigma=sigma, count=count), other], delta)) >= base * (1 - 1e-9)


def test_a_ledger_may_cut_its_rows_as_it_likes() -> None:
    rows: list[Event] = [PateVotes(sigma=40, count=10), PateThreshold(sigma=80, count=4)] * 25
    assert account(rows, DELTA) == account(
        [PateThreshold(sigma=80, count=100), PateVotes(sigma=40, count=100), PateVotes(sigma=40, count=150)], DELTA
    )


def test_a_training_is_paid_once() -> None:
    training = DpSgdTraining(noise_multiplier=1.1, sample_rate=0.05, steps=100, run="a" * 64)
    once = account([training], DELTA)
    assert account([training] * 50, DELTA) == once
    assert bounded(account([training, training.model_copy(update={"run": "b" * 64})], DELTA)) > bounded(once) * 1.2


def test_guarantees_of_two_units_are_none() -> None:
    record, model = PateVotes(sigma=40, count=1), NoisyOutputs(sigma=40, count=1)
    assert account([record], DELTA).unit == "record"
    assert account([model], DELTA).unit == "model"
    for mixed in ([record, model], [record, BareOutputs(count=1)], [BareOutputs(count=1)]):
        spent = account(mixed, DELTA)
        assert (spent.unit, spent.epsilon, spent.rdp, spent.pld) == (None, None, None, None)
        assert "no formal guarantee" in spent.why
    assert account([], DELTA).epsilon == 0


def test_hopeless_noise_still_gives_a_number() -> None:
    spent = account([NoisyOutputs(sigma=0.01, count=10**6)], DELTA)
    assert spent.pld is None
    assert bounded(spent) > 1e9


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_that_is_none_is_refused(delta: float) -> None:
    with pytest.raises(SettingsError, match="delta is"):
        account([PateVotes(sigma=40, count=1)], delta)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(MissingExtraError, match=r"consilience\[privacy\]"):
        account([PateVotes(sigma=40, count=1)], DELTA)


@pytest.mark.parametrize(("epsilon", "guess"), [(0.5, 80.0), (3.0, 1e3), (20.0, 5.0)])
def test_the_noise_that_is_needed_is_enough_and_hardly_more(epsilon: float, guess: float) -> None:
    sigma = noise_for(lambda noise: [PateVotes(sigma=noise, count=100)], epsilon, DELTA, guess)
    assert epsilon * 0.99 < bounded(account([PateVotes(sigma=sigma, count=100)], DELTA)) <= epsilon
    assert sigma == pytest.approx(
        brentq(lambda s: exact(s / math.sqrt(200), DELTA) - epsilon, sigma / 2, sigma * 2), rel=5e-3
    )
