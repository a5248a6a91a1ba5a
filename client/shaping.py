"""What the policy takes away from log-probabilities before they are encoded: softening, rounding, cap and floor.

Lives here: the numbers. Does not live here: the fields (common/settings.Policy). What leaves depends on a sample's own
row alone, and is a distribution again; of a multi-label teacher each label is one by itself, over "applies" and "does
not".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_softmax, logsumexp

from consilience.common.encoding.odds import log_odds_of
from consilience.common.errors import SettingsError
from consilience.common.settings import Policy


def check_floor(policy: Policy, classes: int) -> None:
    """Raise `SettingsError` when the floor leaves nothing to tell of so many classes."""
    if policy.floor * classes >= 1:
        raise SettingsError(
            f"site.yaml: field 'policy.floor' is {policy.floor:g}; allowed with the teacher's {classes} classes: "
            f"less than {1 / classes:g}",
            hint="Lower it",
        )


def shape(log_probs: NDArray[np.float32], policy: Policy) -> NDArray[np.float32]:
    """Return (n, k) log-probabilities as the policy lets them leave; the same array where it takes nothing away.

    In this order: temperature, decimals, cap, floor. No probability is then above `cap`, where there are two classes
    or more, or below `floor`.
    """
    rows: NDArray[np.floating[Any]] = log_probs
    if policy.temperature != 1:
        rows = log_softmax(rows.astype(np.float64) / policy.temperature, axis=1)
    if policy.decimals is not None:
        rows = _rounded(rows.astype(np.float64), policy.decimals)
    if policy.cap < 1 and rows.shape[1] > 1:
        rows = _capped(rows.astype(np.float64), policy.cap)
    if policy.floor > 0:
        left = np.log1p(-policy.floor * rows.shape[1])
        rows = np.logaddexp(np.log(policy.floor), left + rows.astype(np.float64))
    return np.asarray(rows, np.float32)


def shape_odds(log_odds: NDArray[np.float32], policy: Policy) -> NDArray[np.float32]:
    """Return (n, k) log-odds as the policy lets them leave; the same array where it takes nothing away.

    As `shape`, for each label by itself: neither its probability nor that of its absence is above `cap` or below
    `floor`, and where a rounded one is 0 it becomes half a unit of the last decimal.
    """
    rows: NDArray[np.floating[Any]] = log_odds
    if policy.temperature != 1:
        rows = rows.astype(np.float64) / policy.temperature
    if policy.decimals is not None:
        least = 10.0**-policy.decimals / 2
        rows = log_odds_of(np.clip(np.round(expit(rows.astype(np.float64)), policy.decimals), least, 1 - least))
    if policy.cap < 1:
        most = np.log(policy.cap) - np.log1p(-policy.cap)
        rows = np.clip(rows.astype(np.float64), -most, most)
    if policy.floor > 0:
        rows = log_odds_of(policy.floor + (1 - 2 * policy.floor) * expit(rows.astype(np.float64)))
    return np.asarray(rows, np.float32)


def _rounded(rows: NDArray[np.float64], decimals: int) -> NDArray[np.float64]:
    probs = np.round(np.exp(rows), decimals)
    probs[probs == 0] = 10.0**-decimals / (2 * rows.shape[1])
    return np.asarray(np.log(probs / probs.sum(axis=1, keepdims=True)))


def _capped(rows: NDArray[np.float64], cap: float) -> NDArray[np.float64]:
    """Bring the one probability of a row that is above `cap` (at least 0.5) down to it."""
    out, above = rows.copy(), np.flatnonzero(rows.max(axis=1) > np.log(cap))
    largest = rows[above].argmax(axis=1)
    others = rows[above].copy()
    others[np.arange(len(above)), largest] = -np.inf
    others += np.log1p(-cap) - logsumexp(others, axis=1, keepdims=True)
    others[np.arange(len(above)), largest] = np.log(cap)
    out[above] = others
    return out
