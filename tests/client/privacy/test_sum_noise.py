"""A site's share of noise: as large as it must be, the same when asked again, and another for anything else."""

from __future__ import annotations

import math
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp
from scipy.stats import kstest

from consilience.client.privacy import account, answering_costs, behind_noise, describe_privacy, events_of
from consilience.client.privacy.accounting import ORDERS
from consilience.client.privacy.events import SumNoiseOutputs, event_from, parameters_of
from consilience.client.privacy.noise import Secret
from consilience.client.privacy.plan import alternatives
from consilience.client.privacy.sum_noise import share_of_noise
from consilience.common.cards import SumNoiseCard
from consilience.common.errors import SettingsError
from consilience.common.settings import OutputNoise, SumNoise
from consilience.common.sums.messages import Terms
from consilience.common.sums.ring import NoisyRing
from helpers.private_site import Make
from helpers.summing import make_terms

SETS = {"ant": [0, 1, 2], "bee": [1, 2], "cow": [2, 0], "dog": [1, 2]}
CARD = SumNoiseCard(sigma=3.0, honest=3)
OWN = SumNoise(mechanism="sum-noise", sigma=3.0, honest=3)
SECRET = Secret(b"k" * 32)


def terms(**changes: Any) -> Terms:
    return make_terms(SETS, 2000, noise=dict.fromkeys(SETS, CARD), threshold=4, **changes)


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 4, 4, 1), np.uint8)


def draw(
    count: int = 2000, of: Terms | None = None, site: str = "ant", secret: Secret = SECRET, shift: float = 0
) -> np.ndarray:
    rows = np.zeros((count, len(SETS[site])), np.float32) + shift
    return share_of_noise(OWN, secret, of or terms(), site, pictures(count), rows)


def test_each_class_gets_the_share_that_its_owners_leave() -> None:
    """Of four sites one may fail: class 0 has two owners, class 1 three, class 2 four."""
    ring = terms().ring()
    assert isinstance(ring, NoisyRing)
    found = draw() / ring.unit
    for column, sharing in enumerate([1, 2, 3]):
        assert kstest(found[:, column] / (3 / np.sqrt(sharing)), "norm").pvalue > 1e-3
        assert kstest(found[:, column] / (4 / np.sqrt(sharing)), "norm").pvalue < 1e-3
    assert np.abs(np.corrcoef(found.T) - np.eye(3)).max() < 0.1


def test_asked_again_it_is_the_same_also_in_another_attempt_and_piece() -> None:
    first = draw()
    np.testing.assert_array_equal(draw(), first)
    np.testing.assert_array_equal(draw(50), first[:50])
    for changes in ({"attempt": 2}, {"job": "other"}, {"start": 100}, {"contract": "b" * 64}):
        np.testing.assert_array_equal(draw(of=terms(**changes)), first)


def test_for_anything_else_it_is_other_noise() -> None:
    first, zeros = draw(), np.zeros((2000, 3), np.float32)
    others = [
        draw(shift=1e-6),  # the model has changed behind its fingerprint
        draw(of=terms(temperature=2.0)),
        draw(of=terms(weights={"bee": 1.5})),
        draw(of=terms(pool="b" * 64)),
        draw(of=make_terms({**SETS, "elk": [0]}, 9, noise=dict.fromkeys(SETS, CARD), threshold=5)),
        draw(secret=Secret(b"x" * 32)),
        share_of_noise(OWN.model_copy(update={"sigma": 3.1}), SECRET, terms(), "ant", pictures(2000), zeros),
    ]
    for other in others:
        assert abs(np.corrcoef(first[:, 2], other[:, 2])[0, 1]) < 0.1


@pytest.mark.parametrize(("sigma", "count"), [(30.0, 10), (200.0, 10_000)])
def test_epsilon_is_dp_accounting_s_for_the_noise_of_the_whole_sum(sigma: float, count: int) -> None:
    (event,) = events_of(SumNoise(mechanism="sum-noise", sigma=sigma, honest=3), count)
    assert event == SumNoiseOutputs(sigma=sigma, honest=3, count=count)
    assert event_from(event.name, parameters_of(event), count) == event
    spent = account([event], 1e-5)
    gaussian = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(sigma / math.sqrt(2)), count)
    assert spent.unit == "model"
    assert spent.rdp == pytest.approx(rdp.RdpAccountant(ORDERS).compose(gaussian).get_epsilon(1e-5), rel=1e-6)
    step = max(1e-4, (spent.rdp or 0) / 2e4)
    assert spent.pld == pytest.approx(
        pld.PLDAccountant(value_discretization_interval=step).compose(gaussian).get_epsilon(1e-5), rel=1e-6
    )
    # a site that trusts fewer others pays no less: it is the noise of the sum that counts
    (alone,) = events_of(SumNoise(mechanism="sum-noise", sigma=sigma, honest=1), count)
    assert account([alone], 1e-5) == spent


def test_a_site_says_what_it_adds(make: Make) -> None:
    raw = {"mechanism": "sum-noise", "sigma": 0.5, "honest": 2}
    with pytest.raises(SettingsError, match=r"policy\.sums_only is false"):
        make(raw)
    only = {"policy": {"sums_only": True}}
    settings = make(raw, **only)
    told = "sum-noise: protects the whole model's answer, not a record; noise 0.5 in sums, "
    assert describe_privacy(settings) == told + "if 2 of the sites are honest"
    assert describe_privacy(make({**raw, "honest": 1}, **only)) == told + "all of it this site's"
    assert answering_costs(settings, 9) == (SumNoiseOutputs(sigma=0.5, honest=2, count=9),)
    for wrong in ({"sigma": 0}, {"honest": 0}, {"honest": 256}):
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            make({**raw, **wrong}, **only)


class Fixed:
    """Answers the same row for every image."""

    classes = ("a", "b")
    fingerprint = "f" * 64

    def log_probs(self, images: np.ndarray) -> np.ndarray:
        return np.tile(np.log([0.7, 0.3]).astype(np.float32), (len(images), 1))


def test_the_teacher_answers_as_it_is_under_another_fingerprint(make: Make) -> None:
    settings = make({"mechanism": "sum-noise", "sigma": 0.5, "honest": 2}, policy={"sums_only": True})
    hidden = behind_noise(settings, Fixed())
    np.testing.assert_array_equal(hidden.log_probs(pictures(3)), Fixed().log_probs(pictures(3)))
    assert hidden.fingerprint != Fixed.fingerprint
    assert hidden.classes == Fixed.classes
    louder = make({"mechanism": "sum-noise", "sigma": 0.6, "honest": 2}, policy={"sums_only": True})
    assert behind_noise(louder, Fixed()).fingerprint != hidden.fingerprint
    quieter = settings.model_copy(update={"privacy": settings.privacy.model_copy(update={"delta": 1e-7})})
    assert behind_noise(quieter, Fixed()).fingerprint == hidden.fingerprint


def test_a_plan_names_the_noise_of_the_sum(make: Make) -> None:
    settings = make({"mechanism": "sum-noise", "sigma": 50, "honest": 4}, policy={"sums_only": True})
    needed, own = [one for one in alternatives(settings, 3.0, 1000) if isinstance(one.settings, SumNoise)]
    assert isinstance(needed.settings, SumNoise)
    assert (needed.configured, own.configured, needed.settings.honest) == (False, True, 4)
    (outputs,) = [one for one in alternatives(settings, 3.0, 1000) if isinstance(one.settings, OutputNoise)]
    assert isinstance(outputs.settings, OutputNoise)
    assert needed.settings.sigma == outputs.settings.sigma
    assert own.spent == account(events_of(settings.privacy, 1000), 1e-5)  # type: ignore[arg-type]
    assert own.value.accuracy is None
