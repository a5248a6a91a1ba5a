"""The risk is the formula's, is never below its private part, and is least at the true posterior."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from consilience.client.coverage.risk import OwnClasses, PositiveUnlabelled

LABELS = [0, 1, 1, 0, 2]


def risk(prior: float = 0.4, classes: int = 3, labels: list[int] = LABELS) -> PositiveUnlabelled:
    return PositiveUnlabelled(torch.tensor(labels), classes, prior, "about")


def parts(logits: np.ndarray, ids: list[int], prior: float) -> tuple[float, float]:
    """The private part and what is left of the others', each sample by itself."""
    rows = log_softmax(logits, axis=1)
    own, as_other, pool = [], [], []
    for row, i in zip(rows, ids, strict=True):
        if i < len(LABELS):
            own.append(-row[LABELS[i]])
            as_other.append(-row[3])
        else:
            pool.append(-row[3])
    mean = [sum(held) / len(held) if held else 0.0 for held in (own, as_other, pool)]
    return prior * mean[0], mean[2] - prior * mean[1]


IDS = st.lists(st.integers(0, 12), min_size=1, max_size=12)


@given(IDS, st.floats(0.01, 1), st.integers(0, 999), st.floats(0.1, 30))
def test_the_formula_by_hand_for_any_batch(ids: list[int], prior: float, seed: int, spread: float) -> None:
    logits = np.random.default_rng(seed).normal(0, spread, (len(ids), 4))
    own, others = parts(logits, ids, prior)
    found = risk(prior)(torch.from_numpy(logits), torch.tensor(ids)).item()
    assert found == pytest.approx(own + max(others, 0), rel=1e-9, abs=1e-12)


def test_the_others_part_is_left_out_once_it_is_negative() -> None:
    """The pool's sample is surely of none, and the private one is surely mine: 0 - prior * 50 is below 0."""
    logits = torch.tensor([[50.0, 0, 0, 0], [0, 0, 0, 50.0]], dtype=torch.float64, requires_grad=True)
    found = risk(0.5)(logits, torch.tensor([0, 9]))
    assert found.item() == pytest.approx(0, abs=1e-12)
    torch.autograd.backward(found)
    assert logits.grad is not None
    assert logits.grad[1].abs().max() == 0


@pytest.mark.parametrize("ids", [[0, 1, 2], [7, 8, 9], [4], [5]])
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_batches_of_one_kind_alone_have_a_finite_gradient(ids: list[int], spread: float) -> None:
    start = np.random.default_rng(3).normal(0, spread, (len(ids), 4))
    logits = torch.from_numpy(start).float().requires_grad_()
    found = risk()(logits, torch.tensor(ids))
    assert math.isfinite(found.item())
    torch.autograd.backward(found)
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_the_true_posterior_has_the_least_risk() -> None:
    """A world of four images and three classes, two of them mine: the posterior of each image is found from the risk.

    Each of 1,000 samples of p(x) is in the pool, each of those of my classes in the private data.
    """
    joint = np.array([[120, 20, 60], [10, 150, 40], [30, 70, 100], [40, 60, 300]])  # image x class; class 2 is none
    image_of_pool = np.repeat(np.arange(4), joint.sum(axis=1))
    cells = [(x, y, int(joint[x, y])) for x in range(4) for y in range(2)]
    image_of_private = np.repeat([x for x, _, _ in cells], [n for _, _, n in cells])
    labels = np.repeat([y for _, y, _ in cells], [n for _, _, n in cells])
    prior = joint[:, :2].sum() / joint.sum()
    loss = PositiveUnlabelled(torch.from_numpy(labels), 2, float(prior), "toy")
    images = torch.from_numpy(np.concatenate([image_of_private, image_of_pool]))
    ids = torch.arange(len(images))
    table = torch.zeros((4, 3), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], max_iter=300, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        value = loss(table[images], ids)
        torch.autograd.backward(value)
        return float(value.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    posterior = joint / joint.sum(axis=1, keepdims=True)
    assert np.allclose(torch.softmax(table.detach(), dim=1).numpy(), posterior, atol=1e-4)
    entropy = -(joint / joint.sum() * np.log(posterior)).sum()
    assert loss(table[images], ids).item() == pytest.approx(entropy, rel=1e-6)


def test_another_prior_sample_or_number_of_classes_is_another_training() -> None:
    labels = torch.tensor(LABELS)
    made = [("a", 3, 0.4), ("b", 3, 0.4), ("a", 4, 0.4), ("a", 3, 0.5)]
    found = {PositiveUnlabelled(labels, classes, prior, about).fingerprint for about, classes, prior in made}
    assert len(found) == 4
    assert PositiveUnlabelled(labels, 3, 0.4, "a").fingerprint in found


def test_a_weight_is_a_sample_given_so_often() -> None:
    """Classes of 2, 2 and 1 samples; weights 1 on average, against each class repeated to the same number."""
    logits = torch.from_numpy(np.random.default_rng(5).normal(0, 2, (8, 4)))
    ids = torch.tensor([0, 1, 2, 3, 4, 9, 10, 11])
    weights = torch.tensor([5 / 6, 5 / 6, 5 / 3], dtype=torch.float64)
    weighed = PositiveUnlabelled(torch.tensor(LABELS), 3, 0.4, "about", weights)
    every = torch.tensor([0, 1, 2, 3, 4, 4, 5, 6, 7])  # rows of the scores; the last private one twice
    repeated = PositiveUnlabelled(torch.tensor([*LABELS, LABELS[-1]]), 3, 0.4, "about")
    at = torch.tensor([0, 1, 2, 3, 4, 5, 9, 10, 11])
    assert weighed(logits, ids).item() == pytest.approx(repeated(logits[every], at).item(), rel=1e-12)
    assert weighed.fingerprint != PositiveUnlabelled(torch.tensor(LABELS), 3, 0.4, "about").fingerprint


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.integers(0, 999), st.floats(0.1, 30))
def test_own_classes_are_told_apart_whatever_none_of_mine_gets(ids: list[int], seed: int, spread: float) -> None:
    logits = np.random.default_rng(seed).normal(0, spread, (len(ids), 4))
    rows = log_softmax(logits[:, :3], axis=1)
    expected = -np.mean([row[LABELS[i]] for row, i in zip(rows, ids, strict=True)])
    given_logits = torch.from_numpy(logits).requires_grad_()
    found = OwnClasses(torch.tensor(LABELS), 3, "about")(given_logits, torch.tensor(ids))
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    torch.autograd.backward(found)
    assert given_logits.grad is not None
    assert given_logits.grad[:, 3].abs().max() == 0


def test_own_classes_of_other_samples_are_another_loss() -> None:
    losses = [OwnClasses(torch.tensor(LABELS), classes, about) for classes, about in ((3, "a"), (3, "b"), (4, "a"))]
    assert len({loss.fingerprint for loss in losses}) == 3
