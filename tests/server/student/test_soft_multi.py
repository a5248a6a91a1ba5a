"""Losses of labels that do not exclude one another: closed forms, masks, and where they are least."""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import expit, log_expit

from consilience.common.nets.losses import SupervisedLabels
from consilience.server.student.soft_multi import SoftMultiLabels

CPU = torch.device("cpu")
LOGITS = torch.tensor([[0.5, -2.0, 1.0], [3.0, 0.0, -1.0]], dtype=torch.float64)


def entropy(q: float, s: float) -> float:
    return float(-(q * log_expit(s) + (1 - q) * log_expit(-s)))


def test_true_labels_sum_over_what_is_known() -> None:
    labels = np.array([[1, 0, -1], [-1, -1, 0], [1, 1, 1]], np.int8)
    loss = SupervisedLabels(labels, CPU)(LOGITS, torch.tensor([0, 1]))
    assert abs(float(loss) - (entropy(1, 0.5) + entropy(0, -2) + entropy(0, -1)) / 2) < 1e-6


def test_soft_labels_are_softened_alike_and_nan_has_no_part() -> None:
    probs = np.array([[0.5, 0.5, 0.5], [0.2, np.nan, 1.0], [np.nan, 0.7, 0.0]], np.float32)
    loss = SoftMultiLabels(probs, CPU, 2.0, samples=np.array([1, 2]))(LOGITS, torch.tensor([0, 1]))
    q = probs.astype(np.float64)
    expected = entropy(q[1, 0], 0.25) + entropy(1, 0.5) + entropy(q[2, 1], 0) + entropy(0, -0.5)
    assert abs(float(loss) - 4 * expected / 2) < 1e-6


def test_it_is_least_at_the_labels_and_pulls_nowhere_without_any() -> None:
    probs = np.array([[0.3, np.nan], [0.9, 0.1]], np.float32)
    logits = torch.zeros((2, 2), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")
    loss = SoftMultiLabels(probs, CPU)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(logits, torch.arange(2))
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    found = expit(logits.detach().numpy())
    assert np.allclose(found, [[0.3, 0.5], [0.9, 0.1]], atol=1e-4)
    assert float(logits.grad[0, 1]) == 0  # type: ignore[index]


def test_other_labels_are_another_lesson() -> None:
    labels = np.array([[1, 0], [0, 1]], np.int8)
    prints = {SupervisedLabels(held, CPU).fingerprint for held in (labels, labels[::-1], labels.reshape(1, 4))}
    assert len(prints) == 3
    soft = labels.astype(np.float32)
    assert SoftMultiLabels(soft, CPU, 1.0, "a").fingerprint != SoftMultiLabels(soft, CPU, 2.0, "a").fingerprint
