"""The student's losses: closed forms, and the same optimum as the estimators they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from consilience.server.student.direct import DirectCE, DirectMFLF
from consilience.server.student.soft_labels import SoftLabels
from consilience.server.unify import unify

CLASS_SETS = [[0, 1, 2], [2, 3, 4], [1, 3]]
WEIGHTS = [1.0, 2.0, 0.5]
CPU = torch.device("cpu")


@pytest.fixture
def answers() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [log_softmax(rng.normal(0, 1.5, (6, len(c))), axis=1).astype(np.float32) for c in CLASS_SETS]


def minimise(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], rows: int, classes: int) -> np.ndarray:
    """Return softmax of the logits that minimise the loss, found by L-BFGS in fp64."""
    logits = torch.zeros((rows, classes), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-15)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(logits, torch.arange(rows))
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    return torch.softmax(logits.detach(), dim=1).numpy()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_labels_are_cross_entropy(tmp_path: Path, temperature: float) -> None:
    rng = np.random.default_rng(1)
    probs = rng.dirichlet(np.ones(4), 9).astype(np.float32)
    np.save(tmp_path / "q.npy", probs)
    loss = SoftLabels(np.load(tmp_path / "q.npy", mmap_mode="r"), CPU, temperature)
    ids = np.array([8, 0, 3])
    logits = rng.normal(0, 2, (3, 4)).astype(np.float32)
    expected = -(probs[ids] * log_softmax(logits / temperature, axis=1)).sum(axis=1).mean() * temperature**2
    assert loss(torch.from_numpy(logits), torch.from_numpy(ids)).item() == pytest.approx(expected, rel=1e-5)


def test_soft_labels_are_learnt_exactly_when_the_student_can() -> None:
    probs = np.random.default_rng(2).dirichlet(np.ones(5), 6).astype(np.float32)
    assert np.allclose(minimise(SoftLabels(probs, CPU), 6, 5), probs, atol=1e-4)


def test_direct_ce_has_ce_s_optimum(answers: list[np.ndarray]) -> None:
    loss = DirectCE(answers, CLASS_SETS, WEIGHTS, CPU)
    expected = unify(answers, CLASS_SETS, method="ce", weights=WEIGHTS).probs
    assert np.allclose(minimise(loss, 6, 5), expected, atol=1e-4)


def test_direct_mf_lf_has_mf_lf_s_optimum(answers: list[np.ndarray]) -> None:
    loss = DirectMFLF(answers, CLASS_SETS, WEIGHTS, CPU)
    weights = [w / len(c) for w, c in zip(WEIGHTS, CLASS_SETS, strict=True)]  # the loss means over a site's classes
    expected = unify(answers, CLASS_SETS, method="mf-lf", weights=weights).probs
    assert np.allclose(minimise(loss, 6, 5), expected, atol=1e-4)


def test_direct_ce_at_a_temperature_learns_the_softened_truth() -> None:
    truth = np.random.default_rng(3).normal(0, 2, (4, 5))
    answers = [log_softmax(truth[:, c], axis=1).astype(np.float32) for c in CLASS_SETS]
    loss = DirectCE(answers, CLASS_SETS, WEIGHTS, CPU, temperature=4.0)
    assert np.allclose(minimise(loss, 4, 5), softmax(truth, axis=1), atol=1e-3)


def test_direct_ce_is_zero_for_a_student_that_agrees(answers: list[np.ndarray]) -> None:
    truth = np.random.default_rng(4).normal(0, 2, (4, 5))
    given = [log_softmax(truth[:, c], axis=1).astype(np.float32) for c in CLASS_SETS]
    loss = DirectCE(given, CLASS_SETS, WEIGHTS, CPU)
    assert loss(torch.from_numpy(truth + 7), torch.arange(4)).item() == pytest.approx(0, abs=1e-6)
    assert loss(torch.from_numpy(-truth), torch.arange(4)).item() > 0.1


ANSWERED = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 1], [1, 1, 0]], bool)


def test_direct_ce_learns_a_sample_from_the_sites_that_answered_it(answers: list[np.ndarray]) -> None:
    given = [np.where(ANSWERED[:, i : i + 1], rows, 0) for i, rows in enumerate(answers)]
    learnt = [0, 1, 3, 5]
    loss = DirectCE(given, CLASS_SETS, WEIGHTS, CPU, answered=ANSWERED, samples=np.array(learnt))
    found = minimise(loss, 4, 5)
    all_three = unify([rows[[0, 3]] for rows in answers], CLASS_SETS, weights=WEIGHTS).probs
    first_two = unify([rows[[1, 5]] for rows in answers[:2]], CLASS_SETS[:2], weights=WEIGHTS[:2]).probs
    assert np.allclose(found[[0, 2]], all_three, atol=1e-4)
    assert np.allclose(found[[1, 3]], first_two, atol=1e-4)


@pytest.mark.parametrize("kind", [DirectCE, DirectMFLF])
def test_a_direct_loss_masks_as_if_the_absent_site_did_not_exist(
    answers: list[np.ndarray], kind: type[DirectCE] | type[DirectMFLF]
) -> None:
    logits = torch.from_numpy(np.random.default_rng(5).normal(0, 2, (6, 5)))
    ids = torch.arange(6)
    everybody = np.ones((6, 3), bool)
    whole = kind(answers, CLASS_SETS, WEIGHTS, CPU, 2.0)(logits, ids).item()
    assert kind(answers, CLASS_SETS, WEIGHTS, CPU, 2.0, answered=everybody)(logits, ids).item() == pytest.approx(whole)
    without = everybody.copy()
    without[:, 1] = False
    two = kind([answers[0], answers[2]], [CLASS_SETS[0], CLASS_SETS[2]], [WEIGHTS[0], WEIGHTS[2]], CPU, 2.0)
    masked = kind(answers, CLASS_SETS, WEIGHTS, CPU, 2.0, answered=without)
    assert masked(logits, ids).item() == pytest.approx(two(logits, ids).item())


def test_soft_labels_are_taken_from_the_samples_that_are_learnt() -> None:
    probs = np.random.default_rng(6).dirichlet(np.ones(4), 9).astype(np.float32)
    logits = torch.from_numpy(np.random.default_rng(7).normal(0, 2, (2, 4)).astype(np.float32))
    some = SoftLabels(probs, CPU, samples=np.array([2, 5, 8]))
    assert some(logits, torch.tensor([2, 0])).item() == SoftLabels(probs, CPU)(logits, torch.tensor([8, 2])).item()


def test_fingerprints_tell_what_is_learnt_from(answers: list[np.ndarray]) -> None:
    probs = np.ones((1, 1), np.float32)
    prints = {
        SoftLabels(probs, CPU, fingerprint="a").fingerprint,
        SoftLabels(probs, CPU, fingerprint="b").fingerprint,
        SoftLabels(probs, CPU, 2.0, fingerprint="a").fingerprint,
        DirectCE(answers, CLASS_SETS, WEIGHTS, CPU, fingerprint="a").fingerprint,
        DirectMFLF(answers, CLASS_SETS, WEIGHTS, CPU, fingerprint="a").fingerprint,
        DirectCE(answers, CLASS_SETS, [1, 1, 1], CPU, fingerprint="a").fingerprint,
    }
    assert len(prints) == 6
