"""Claim: every mechanism's epsilon is that of published formulas and of dp-accounting's own events, to 1e-6.

`ours` is what a site's ledger tells, by Rényi's divergence and by distributions of privacy loss, at delta 1e-5. The
published formulas: GNMax is (alpha, alpha / sigma^2)-RDP whatever the votes, the comparison of Confident-GNMax adds
alpha / (2 sigma^2) (Papernot et al., ICLR 2018, proposition 8 and section 4.2), and a Gaussian of sensitivity D is
(alpha, alpha D^2 / (2 sigma^2))-RDP (Mironov 2017, corollary 3), turned into epsilon as Canonne, Kamath and Steinke
(2020, proposition 12) do it. For `dp-sgd` opacus' own accountant stands in their place. It ends with 1 where a
difference is larger.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting import pld, rdp
from opacus.accountants.analysis import rdp as opacus_rdp

from consilience.client.privacy import Event, account
from consilience.client.privacy.accounting import ORDERS, WHOLE_ORDERS
from consilience.client.privacy.events import (
    DpSgdTraining,
    NoisyOutputs,
    PateAverage,
    PateThreshold,
    PateVotes,
    SumNoiseOutputs,
)
from harness import options, show

DELTA, BAR = 1e-5, 1e-6
SIGMAS, COUNTS = (20.0, 40.0, 100.0, 200.0), (1, 100, 10_000)
TRAININGS = ((1.1, 0.01, 1000), (0.8, 0.05, 100), (1.8, 0.25, 80), (4.0, 0.2, 500))
SENSITIVITY = {PateVotes: math.sqrt(2), PateAverage: math.sqrt(2), PateThreshold: 1.0, NoisyOutputs: math.sqrt(2)}


def formula(sensitivity: float, sigma: float, count: int) -> float:
    """Return epsilon of `count` Gaussians by the published formulas."""
    orders = np.array(ORDERS)
    curve = count * orders * sensitivity**2 / (2 * sigma**2)
    return max(0.0, float(np.min(curve + np.log1p(-1 / orders) - np.log(DELTA * orders) / (orders - 1))))


def by_opacus(noise: float, rate: float, steps: int) -> float:
    """Return epsilon of a training by opacus, at the orders that ours takes."""
    orders: list[float] = [*WHOLE_ORDERS]
    curve = opacus_rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=steps, orders=orders)
    return float(opacus_rdp.get_privacy_spent(orders=orders, rdp=curve, delta=DELTA)[0])


def cases(*, quick: bool) -> Iterator[tuple[str, list[Event], Any, float]]:
    """Yield a name, events, the same as dp-accounting's event, and epsilon by formula."""
    sigmas, counts = (SIGMAS[:1], COUNTS[:1]) if quick else (SIGMAS, COUNTS)
    for kind in (PateVotes, PateAverage, PateThreshold, NoisyOutputs, SumNoiseOutputs):
        sensitivity = SENSITIVITY.get(kind, math.sqrt(2))
        for sigma in sigmas:
            for count in counts:
                fields: dict[str, Any] = {"sigma": sigma, "count": count}
                if kind is SumNoiseOutputs:
                    fields["honest"] = 3
                event = kind(**fields)
                once = dp_accounting.GaussianDpEvent(sigma / sensitivity)
                theirs = dp_accounting.SelfComposedDpEvent(once, count)
                yield event.name, [event], theirs, formula(sensitivity, sigma, count)
    for noise, rate, steps in TRAININGS[:1] if quick else TRAININGS:
        training = DpSgdTraining(noise_multiplier=noise, sample_rate=rate, steps=steps, run="a" * 64)
        once = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
        theirs = dp_accounting.SelfComposedDpEvent(once, steps)
        yield "dp-sgd", [training], theirs, by_opacus(noise, rate, steps)


def apart(ours: float, theirs: float) -> float:
    """Return the relative difference; epsilons below 1e-9 are none."""
    return abs(ours - theirs) / max(abs(theirs), 1e-9)


def main() -> None:
    """Account every case in three ways."""
    arguments = options(__doc__)
    held: dict[str, list[tuple[float, float, float, float, float]]] = {}
    for name, events, theirs, expected in cases(quick=arguments.quick):
        spent = account(events, DELTA)
        assert spent.rdp is not None
        assert spent.pld is not None
        orders = WHOLE_ORDERS if name == "dp-sgd" else ORDERS
        by_rdp = rdp.RdpAccountant(orders).compose(theirs).get_epsilon(DELTA)
        step = max(1e-4, spent.rdp / 2e4)
        by_pld = pld.PLDAccountant(value_discretization_interval=step).compose(theirs).get_epsilon(DELTA)
        differences = apart(spent.rdp, expected), apart(spent.rdp, by_rdp), apart(spent.pld, by_pld)
        held.setdefault(name, []).append((spent.rdp, spent.pld, *differences))
    rows, figures = [], {}
    for name, each in held.items():
        columns = list(zip(*each, strict=True))
        largest = [max(column) for column in columns[2:]]
        figures[name] = dict(zip(("formula", "rdp", "pld"), largest, strict=True)) | {"cases": len(each)}
        spans = [f"{min(column):.3g} to {max(column):.3g}" for column in columns[:2]]
        rows.append((name, f"{len(each)}", *spans, *(f"{value:.1e}" for value in largest)))
    title = f"Epsilon at delta {DELTA:g}, and the largest relative differences"
    columns_told = ("", "cases", "by Rényi", "by PLD", "to the formula", "to dp-accounting, Rényi", "PLD")
    show(title, columns_told, rows, {"mechanisms": figures, "bar": BAR}, arguments.json)
    if wrong := [name for name, told in figures.items() if max(told[way] for way in ("formula", "rdp", "pld")) > BAR]:
        sys.exit(f"More than {BAR:g} apart: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
