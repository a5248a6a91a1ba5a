"""Direct and incremental amalgamation of several teachers, and concatenated scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

from consilience.common.errors import StudentError
from consilience.common.moments import Moments
from consilience.server.student.amalgamate import concatenated, direct, incremental, incremental_descent
from consilience.server.student.autoencoder import principal
from consilience.server.student.scores import ConcatenatedScores, ConcatenatedSoftmax
from consilience.server.unify import unify

Floats = NDArray[np.float64]
CPU = torch.device("cpu")


def teachers(channels: list[int], seed: int, n: int = 60) -> list[Floats]:
    """Features that share a few causes, as those of teachers that see the same images."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(n, 4)) * [3, 2, 1, 0.5]
    return [causes @ rng.normal(size=(4, c)) + 0.3 * rng.normal(size=(n, c)) + rng.normal(size=c) for c in channels]


def moments_of(rows: Floats) -> Moments:
    moments = Moments(rows.shape[1])
    moments.update(rows)
    return moments


@settings(max_examples=60)
@given(
    channels=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    data=st.data(),
    seed=st.integers(0, 100),
)
def test_incremental_is_never_better_than_direct(channels: list[int], data: st.DataObject, seed: int) -> None:
    widths, have = [], channels[0]
    for added in channels[1:]:
        widths.append(data.draw(st.integers(1, have + added)))
        have = widths[-1]
    rows = np.concatenate(teachers(channels, seed), axis=1)
    moments = moments_of(rows)
    step, whole = incremental(moments, channels, widths), direct(moments, widths[-1])
    assert step.error >= whole.error - 1e-9
    assert step.explained <= whole.explained + 1e-9
    for fitted in (step, whole):
        assert fitted.encoder(rows).shape == (60, widths[-1])
        error = np.square(fitted.decoder(fitted.encoder(rows)) - rows).sum(axis=1).mean()
        assert fitted.error == pytest.approx(error, rel=1e-9, abs=1e-9)


def test_incremental_by_hand() -> None:
    first, second, third = teachers([3, 2, 4], seed=1)
    pair = np.hstack([first, second])
    one = principal(moments_of(pair), 2)
    triple = np.hstack([np.asarray(one.encoder(pair), np.float64), third])
    two = principal(moments_of(triple), 3)
    found = incremental(moments_of(np.hstack([pair, third])), [3, 2, 4], [2, 3])
    assert np.allclose(found.encoder(np.hstack([pair, third])), two.encoder(triple), atol=1e-9)
    again = np.asarray(two.decoder(two.encoder(triple)), np.float64)
    assert np.allclose(
        found.decoder(two.encoder(triple)), np.hstack([one.decoder(again[:, :2]), again[:, 2:]]), atol=1e-9
    )


def test_incremental_loses_what_a_later_teacher_would_have_saved() -> None:
    rng = np.random.default_rng(0)
    strong, weak, noise = rng.normal(size=(3, 500))
    # teacher 0 shows a strong cause and a weak one, width 1 keeps the strong; then teacher 2 shows the weak one again
    rows = np.stack([2 * strong, weak, 2 * strong + 0.1 * noise, *[weak] * 10], axis=1)
    moments = moments_of(rows)
    assert direct(moments, 2).error < 0.01
    assert incremental(moments, [2, 1, 10], [1, 2]).error > 0.99 * weak.var()
    assert incremental(moments, [2, 1, 10], [2, 2]).error == pytest.approx(direct(moments, 2).error, rel=0.1)


def test_two_teachers_are_direct() -> None:
    moments = moments_of(np.hstack(teachers([3, 4], seed=2)))
    one, other = incremental(moments, [3, 4], [3]), direct(moments, 3)
    assert np.allclose(one.encoder.weight, other.encoder.weight)
    assert one.error == pytest.approx(other.error)


@pytest.mark.parametrize(("channels", "widths"), [([3, 4], [2, 2]), ([3, 5], [2]), ([3, 2, 2], [2])])
def test_incremental_numbers_that_do_not_fit(channels: list[int], widths: list[int]) -> None:
    with pytest.raises(StudentError, match=r"does not fit features of 7 channels.*one width for each"):
        incremental(moments_of(np.ones((2, 7))), channels, widths)


def test_incremental_width_beyond_what_is_left() -> None:
    with pytest.raises(StudentError, match="3 channels cannot be amalgamated into 4"):
        incremental(moments_of(np.ones((2, 7))), [3, 2, 2], [1, 4])


def test_concatenated() -> None:
    maps = [np.full((2, c, 3, 3), float(c), np.float32) for c in (1, 2)]
    assert concatenated(maps).shape == (2, 3, 3, 3)
    assert concatenated(maps)[0, :, 0, 0].tolist() == [1, 2, 2]
    with pytest.raises(StudentError, match=r"\(2, 1, 3, 3\), \(2, 2, 4, 3\).*common-feature learning"):
        concatenated([maps[0], np.zeros((2, 2, 4, 3))])
    with pytest.raises(StudentError, match="of no teacher"):
        concatenated([])


def test_concatenated_scores() -> None:
    scores = [np.array([[-1.0, 1], [-3, 3], [0, 0]]), np.array([[-5.0, 5], [6, -6], [7, -7]])]
    loss = ConcatenatedScores(scores, [[2, 0], [1, 3]], CPU)
    assert loss.target(np.array([1, 0])).tolist() == [[3, 6, -3, -6], [1, -5, -1, 5]]
    logits = torch.tensor([[3.0, 6, -3, -6], [0, -5, 1, 5]], requires_grad=True)
    assert loss(logits, torch.tensor([1, 0])).item() == pytest.approx((0 + (1 + 0 + 4 + 0) / 2) / 2)
    assert loss.fingerprint != ConcatenatedScores(scores, [[0, 2], [1, 3]], CPU).fingerprint


@given(st.integers(0, 2**32 - 1))
def test_log_probabilities_give_back_logits_whose_mean_is_0(seed: int) -> None:
    """Sites send log-probabilities; what the papers join are logits."""
    rng = np.random.default_rng(seed)
    logits = [5 * rng.normal(size=(4, classes)) for classes in (3, 2)]
    logits = [each - each.mean(axis=1, keepdims=True) for each in logits]
    loss = ConcatenatedScores([log_softmax(each, axis=1) for each in logits], [[0, 3, 1], [4, 2]], CPU)
    joined = np.concatenate(logits, axis=1)[:, [0, 2, 4, 1, 3]]
    assert loss.target(np.arange(4)) == pytest.approx(joined, abs=1e-5)
    softly = ConcatenatedSoftmax([log_softmax(each, axis=1) for each in logits], [[0, 3, 1], [4, 2]], CPU)
    drawn = rng.normal(size=(4, 5))
    told = unify([log_softmax(each, axis=1) for each in logits], [[0, 3, 1], [4, 2]]).probs
    for target in (softmax(joined, axis=1), told):
        expected = -(target * log_softmax(drawn, axis=1)).sum(axis=1).mean()
        assert softly(torch.from_numpy(drawn), torch.arange(4)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("class_sets", "message"), [([[0, 1], [1]], "Class 1 is known to 2"), ([[0, 3], [1]], "Class 2 is known to 0")]
)
def test_scores_of_shared_or_unknown_classes(class_sets: list[list[int]], message: str) -> None:
    with pytest.raises(StudentError, match=message + r" sites.*unified soft labels"):
        ConcatenatedScores([np.ones((1, len(c))) for c in class_sets], class_sets, CPU)


def test_the_softmax_over_concatenated_scores_against_a_direct_computation() -> None:
    rng = np.random.default_rng(0)
    scores = [rng.normal(size=(6, 2)), rng.normal(size=(6, 1))]
    samples = np.array([5, 3, 0, 1])
    loss = ConcatenatedSoftmax(scores, [[2, 0], [1]], CPU, "x", samples, temperature=2.0)
    logits, ids = rng.normal(size=(2, 3)), np.array([1, 3])
    apart = (scores[0][:, 1] - scores[0][:, 0]) / 2  # two logits of mean 0, and one
    target = np.column_stack([apart, 0 * apart, -apart])[samples[ids]] / 2
    expected = -4 * (softmax(target, axis=1) * log_softmax(logits / 2, axis=1)).sum(axis=1).mean()
    assert loss(torch.from_numpy(logits), torch.from_numpy(ids)).item() == pytest.approx(expected, rel=1e-6)
    plain = ConcatenatedScores(scores, [[2, 0], [1]], CPU, "x", samples)
    assert plain.target(ids) == pytest.approx(2 * target, rel=1e-6)
    other = ConcatenatedSoftmax(scores, [[2, 0], [1]], CPU, "x")
    assert len({loss.fingerprint, plain.fingerprint, other.fingerprint}) == 3


def test_incremental_descent_takes_a_teacher_at_a_time() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(400, 3)) @ rng.normal(size=(3, 6))).astype(np.float32) / 3
    blocks = [rows[:200], rows[200:]]
    found = incremental_descent(blocks, [2, 2, 2], [3, 3], epochs=300, learning_rate=0.05, seed=0)
    moments = Moments(6)
    moments.update(rows)
    assert found.encoder.weight.shape == (3, 6)
    assert found.explained == pytest.approx(1, abs=0.02)  # three directions are all there are
    back = found.decoder(found.encoder(rows))
    assert np.square(back - rows).sum(axis=1).mean() == pytest.approx(found.error, rel=1e-3)
    with pytest.raises(StudentError, match="one width fewer"):
        incremental_descent(blocks, [2, 2, 2], [3], epochs=1, learning_rate=0.05, seed=0)
    with pytest.raises(StudentError, match="read only once"):
        incremental_descent(iter(blocks), [2, 2, 2], [3, 3], epochs=1, learning_rate=0.05, seed=0)
