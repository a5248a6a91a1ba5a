"""Unifying what was sent gives the labels of the same answers written out in full."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax

from consilience.common.encoding import Sent, decode, encode, row_bytes, unpack_sent
from consilience.common.errors import UnifyError
from consilience.server.unify import unify
from consilience.server.unify.top import TopLabels, TopUnifier

SETS = [[0, 1, 2, 3, 4, 5], [11, 10, 9, 3, 4, 2], [5, 6, 7, 8, 9], [3, 7, 6], [1]]
CLASSES = 12


def answers(encoding: Any, samples: int = 40, scale: float = 2.0) -> tuple[list[Sent], list[NDArray[np.float32]]]:
    """What sites sent, and the same decoded in full."""
    random = np.random.default_rng(0)
    truth = random.normal(0, scale, (samples, CLASSES))
    sent, full = [], []
    for s in SETS:
        rows = log_softmax(truth[:, s] + random.normal(0, 0.5, (samples, len(s))), axis=1).astype(np.float32)
        data = encode(rows, encoding)
        assert len(data) == samples * row_bytes(len(s), encoding)
        sent.append(unpack_sent(np.frombuffer(data, np.uint8), len(s), encoding))
        full.append(decode(data, samples, len(s), encoding))
    return sent, full


def written_out(labels: TopLabels) -> NDArray[np.float64]:
    """Kept classes as they are, and the rest evenly."""
    rows = np.zeros((len(labels.rest), CLASSES))
    for row, (classes, values, rest) in enumerate(zip(labels.classes, labels.values, labels.rest, strict=True)):
        kept = classes >= 0
        left = CLASSES - kept.sum()
        rows[row] = rest / left if left else 0.0
        rows[row, classes[kept]] = values[kept]
    return rows


@pytest.mark.parametrize("encoding", ["top-1", "top-2", "top-5", "top-9", "top-2-u8"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_labels_are_those_of_answers_in_full(encoding: Any, temperature: float) -> None:
    sent, full = answers(encoding)
    weights = [1.0, 2.0, 0.5, 1.0, 3.0]
    expected = unify([a.astype(np.float64) for a in full], SETS, weights=weights, temperature=temperature)
    found = TopUnifier(SETS, weights=weights, temperature=temperature)(sent, CLASSES)
    assert found.converged.all()
    for row in range(len(found.rest)):
        kept = found.classes[row] >= 0
        named = {s[i] for s, a in zip(SETS, sent, strict=True) for i in a.ids[row]}
        assert set(found.classes[row][kept]) == named
        np.testing.assert_allclose(found.values[row][kept], expected.probs[row, found.classes[row][kept]], atol=1e-6)
        assert (np.diff(found.values[row]) <= 0).all()
    others = 1 - found.values.sum(axis=1, dtype=np.float64)
    np.testing.assert_allclose(found.rest, others, atol=1e-6)


def test_where_everything_is_sent_nothing_is_left() -> None:
    sent, full = answers("top-9")
    found = TopUnifier(SETS)(sent, CLASSES)
    np.testing.assert_allclose(written_out(found), unify(full, SETS).probs, atol=2e-6)
    assert found.rest.max() < 1e-6


def test_what_is_kept_is_the_likeliest() -> None:
    sent, _ = answers("top-3")
    whole, few = (TopUnifier(SETS)(sent, keep) for keep in (CLASSES, 3))
    np.testing.assert_array_equal(few.classes, whole.classes[:, :3])
    np.testing.assert_array_equal(few.values, whole.values[:, :3])
    np.testing.assert_allclose(few.rest, 1 - few.values.sum(axis=1), atol=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_blocks_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, _ = answers("top-2")
    whole, solve = TopUnifier(SETS)(sent, 4), TopUnifier(SETS)
    monkeypatch.setattr(solve, "_scratch_rows", 3)
    for low in range(0, 40, rows):
        cut = slice(low, low + rows)
        part = solve([Sent(a.ids[cut], a.values[cut], a.other[cut]) for a in sent], 4)
        np.testing.assert_allclose(part.values, whole.values[low : low + rows], rtol=1e-6)
        np.testing.assert_array_equal(part.classes, whole.classes[low : low + rows])


def test_sure_answers_are_solved_as_in_full() -> None:
    """Links far below what the quick dual can see."""
    sent, full = answers("top-2", scale=30.0)
    expected = unify([a.astype(np.float64) for a in full], SETS)
    found = TopUnifier(SETS)(sent, CLASSES)
    np.testing.assert_array_equal(found.converged, expected.converged)
    for row in range(len(found.rest)):
        kept = found.classes[row] >= 0
        np.testing.assert_allclose(found.values[row][kept], expected.probs[row, found.classes[row][kept]], atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    sent, _ = answers("top-2")
    for made in (lambda: TopUnifier([[0, 1], [2, 3]]), lambda: TopUnifier(SETS, temperature=0.0)):
        with pytest.raises(UnifyError):
            made()
    solve = TopUnifier(SETS)
    fewer = Sent(sent[0].ids[:3], sent[0].values[:3], sent[0].other[:3])
    for given, keep in ((sent[:2], 3), ([fewer, *sent[1:]], 3), (sent, 0), (sent, CLASSES + 1)):
        with pytest.raises(UnifyError):
            solve(given, keep)
