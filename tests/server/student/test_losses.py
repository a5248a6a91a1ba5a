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


COVERAGE = np.random.default_rng(8).uniform(0.05, 0.95, (6, 3)).astype(np.float32)


def part(site: int, row: int, answers: list[np.ndarray], logits: np.ndarray, temperature: float = 1.0) -> float:
    """T^2 KL(p || softmax(s restricted to L_i)) of one sample, both at temperature T, as its formula stands."""
    p = log_softmax(answers[site][row].astype(np.float64) / temperature)
    q = log_softmax(logits[row, CLASS_SETS[site]] / temperature)
    return float((np.exp(p) * (p - q)).sum()) * temperature**2


def bce(site: int, row: int, c: float, logits: np.ndarray) -> float:
    q = softmax(logits[row])[CLASS_SETS[site]].sum()
    return float(-(c * np.log(q) + (1 - c) * np.log(1 - q)))


@pytest.mark.parametrize(("temperature", "strength"), [(1.0, 1.0), (3.0, 0.25), (1.0, (0.25, 1.0, 0.5))])
def test_direct_ce_with_coverage_is_its_formula(
    answers: list[np.ndarray], temperature: float, strength: float | tuple[float, ...]
) -> None:
    told = COVERAGE.copy()
    told[:, 1] = np.nan
    told[2, 0] = np.nan
    logits = np.random.default_rng(9).normal(0, 2, (6, 5))
    loss = DirectCE(answers, CLASS_SETS, WEIGHTS, CPU, temperature, coverage=told, strength=strength)
    found = loss(torch.from_numpy(logits), torch.arange(6))
    expected = 0.0
    for site, weight in enumerate(WEIGHTS):
        by = strength[site] if isinstance(strength, tuple) else strength
        for row in range(6):
            c = float(told[row, site])
            kl = part(site, row, answers, logits, temperature)
            covered = (1 - by + by * c) * kl + by * bce(site, row, c, logits)
            expected += weight * (kl if np.isnan(c) else covered)
    assert found.item() == pytest.approx(expected / 6 / sum(WEIGHTS), rel=1e-6)


def test_direct_ce_with_coverage_takes_the_sites_that_answered(answers: list[np.ndarray]) -> None:
    logits = torch.from_numpy(np.random.default_rng(10).normal(0, 2, (4, 5)))
    learnt = np.array([0, 1, 3, 5])
    found = DirectCE(answers, CLASS_SETS, WEIGHTS, CPU, answered=ANSWERED, samples=learnt, coverage=COVERAGE)(
        logits, torch.arange(4)
    ).item()
    expected = 0.0
    for at, row in enumerate(learnt):
        there = [site for site in range(3) if ANSWERED[row, site]]
        rows, s = [a[[row]] for a in answers], logits.numpy()[[at]]
        for site in there:
            c = float(COVERAGE[row, site])
            value = c * part(site, 0, rows, s) + bce(site, 0, c, s)
            expected += WEIGHTS[site] * value / sum(WEIGHTS[i] for i in there)
    assert found == pytest.approx(expected / 4, rel=1e-6)


def test_a_site_that_knows_every_class_has_no_choice_of_none(answers: list[np.ndarray]) -> None:
    given = [log_softmax(np.random.default_rng(11).normal(0, 1, (6, 5)), axis=1).astype(np.float32)]
    logits = torch.from_numpy(np.random.default_rng(12).normal(0, 2, (6, 5)))
    half = np.full((6, 1), 0.5, np.float32)
    plain = DirectCE(given, [[0, 1, 2, 3, 4]], [1.0], CPU)(logits, torch.arange(6)).item()
    found = DirectCE(given, [[0, 1, 2, 3, 4]], [1.0], CPU, coverage=half)(logits, torch.arange(6)).item()
    assert found == plain


def test_coverage_settles_what_overlap_leaves_open(tmp_path: Path) -> None:
    """Two sites that share no class: the student learns the truth, read from a memory map, where both give coverage."""
    truth = softmax(np.random.default_rng(13).normal(0, 1, (6, 5)), axis=1)
    sets = [[0, 1], [4, 2, 3]]
    given = [np.log(truth[:, c] / truth[:, c].sum(axis=1, keepdims=True)).astype(np.float32) for c in sets]
    np.save(tmp_path / "c.npy", np.stack([truth[:, c].sum(axis=1) for c in sets], axis=1).astype(np.float32))
    loss = DirectCE(given, sets, [1.0, 2.0], CPU, coverage=np.load(tmp_path / "c.npy", mmap_mode="r"))
    assert np.allclose(minimise(loss, 6, 5), truth, atol=1e-4)
    assert not np.allclose(minimise(DirectCE(given, sets, [1.0, 2.0], CPU), 6, 5), truth, atol=1e-2)


def test_coverage_is_learnt_at_temperature_1() -> None:
    """Softened answers and unsoftened coverage of one truth: s / T fits the answers, s the coverage."""
    truth = np.random.default_rng(14).normal(0, 2, (4, 5))
    given = [log_softmax(truth[:, c], axis=1).astype(np.float32) for c in CLASS_SETS]
    told = np.stack([softmax(truth, axis=1)[:, c].sum(axis=1) for c in CLASS_SETS], axis=1).astype(np.float32)
    loss = DirectCE(given, CLASS_SETS, WEIGHTS, CPU, temperature=4.0, coverage=told)
    assert np.allclose(minimise(loss, 4, 5), softmax(truth, axis=1), atol=1e-3)


@pytest.mark.parametrize("far", [60.0, 1e4])
def test_coverage_of_a_student_that_is_sure_stays_finite(far: float) -> None:
    logits = torch.tensor([[far, 0.0, 0.0], [0.0, far, 0.0]], dtype=torch.float32, requires_grad=True)
    given = [np.zeros((2, 1), np.float32)]
    for c in (0.0, 0.5, 1.0):
        value = DirectCE(given, [[0]], [1.0], CPU, coverage=np.full((2, 1), c, np.float32))(logits, torch.arange(2))
        (gradient,) = torch.autograd.grad(value, logits)
        # sure and wrong by c in the one row, by 1 - c in the other
        assert value.item() == pytest.approx(far / 2, abs=1)
        assert torch.isfinite(gradient).all()


def test_samples_outside_the_label_space_leave_training_in_proportion(tmp_path: Path) -> None:
    rng = np.random.default_rng(15)
    probs, logits = rng.dirichlet(np.ones(4), 9).astype(np.float32), rng.normal(0, 2, (3, 4)).astype(np.float32)
    np.save(tmp_path / "other.npy", rng.uniform(0, 1, 9).astype(np.float32))
    other = np.load(tmp_path / "other.npy", mmap_mode="r")
    loss = SoftLabels(probs, CPU, 2.0, samples=np.array([8, 0, 3, 5]), other=other)
    at = [3, 8, 5]
    found = loss(torch.from_numpy(logits), torch.tensor([2, 0, 3])).item()
    each = -(probs[at] * log_softmax(logits / 2, axis=1)).sum(axis=1)
    assert found == pytest.approx(((1 - other[at]) * each).mean() * 4, rel=1e-5)
    gone = SoftLabels(probs, CPU, other=np.ones(9, np.float32))
    assert gone(torch.from_numpy(logits), torch.arange(3)).item() == 0
