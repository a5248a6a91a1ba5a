"""Losses of a student that learns some classes alone: closed forms, and what the chain rule leaves of the whole."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp, softmax

from consilience.server.student.direct import DirectCE, DirectMFLF
from consilience.server.student.scores import ConcatenatedScores, ConcatenatedSoftmax
from consilience.server.student.soft_labels import SoftLabels
from consilience.server.student.wanted import Wanted
from consilience.server.unify import unify

CPU = torch.device("cpu")
ROWS, CLASSES = 6, 6
WANTED = (1, 2, 4)
SETS = [[0, 1, 2, 3], [4, 2, 5], [3, 5], [1, 4]]
WEIGHTS = [1.0, 2.0, 3.0, 0.5]
IDS = torch.arange(ROWS)
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def value(loss: Loss, logits: np.ndarray) -> float:
    return float(loss(torch.from_numpy(logits), torch.arange(len(logits))))


def draw(seed: int, columns: int = CLASSES) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1.5, (ROWS, columns))


def told(sets: list[list[int]], seed: int = 0) -> list[np.ndarray]:
    return [log_softmax(draw(seed + i, len(held)), axis=1).astype(np.float32) for i, held in enumerate(sets)]


def cross_entropy(target: np.ndarray, logits: np.ndarray) -> np.ndarray:
    return np.asarray(-(target * log_softmax(logits, axis=1)).sum(axis=1))


def kl(target: np.ndarray, logits: np.ndarray) -> np.ndarray:
    return np.asarray((target * (np.log(target) - log_softmax(logits, axis=1))).sum(axis=1))


def minimise(loss: Loss, columns: int) -> np.ndarray:
    logits = torch.zeros((ROWS, columns), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-15)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        found = loss(logits, IDS)
        found.backward()
        return found

    optimizer.step(closure)  # type: ignore[arg-type]
    return torch.softmax(logits.detach(), dim=1).numpy()


LABELS = softmax(draw(7), axis=1).astype(np.float32)
OUTSIDE = np.linspace(0, 0.9, ROWS).astype(np.float32)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("outside", [None, OUTSIDE])
def test_a_sample_counts_by_its_wanted_mass(temperature: float, outside: np.ndarray | None) -> None:
    logits, mass = draw(1, 3), LABELS[:, WANTED].sum(axis=1)
    weights = mass if outside is None else mass * (1 - outside)
    expected = (weights * cross_entropy(LABELS[:, WANTED] / mass[:, None], logits / temperature)).mean()
    loss = SoftLabels(LABELS, CPU, temperature, other=outside, wanted=Wanted(WANTED, scale=2.5))
    assert value(loss, logits) == pytest.approx(2.5 * expected * temperature**2, rel=1e-5)


@pytest.mark.parametrize("outside", [None, OUTSIDE])
def test_with_other_the_rest_is_one_more_class(outside: np.ndarray | None) -> None:
    logits = draw(2, 4)
    told = LABELS[:, WANTED] * (1 if outside is None else (1 - outside)[:, None])
    target = np.concatenate([told, 1 - told.sum(axis=1, keepdims=True)], axis=1)
    loss = SoftLabels(LABELS, CPU, other=outside, wanted=Wanted(WANTED, other=True))
    assert value(loss, logits) == pytest.approx(cross_entropy(target, logits).mean(), rel=1e-5)
    assert np.allclose(minimise(loss, 4), target, atol=1e-4)


def test_with_and_without_other_are_what_the_chain_rule_says() -> None:
    logits = draw(3, 4)
    mass, own = LABELS[:, WANTED].sum(axis=1), softmax(logits, axis=1)[:, 3]
    whole = value(SoftLabels(LABELS, CPU, wanted=Wanted(WANTED, other=True)), logits)
    part = value(SoftLabels(LABELS, CPU, wanted=Wanted(WANTED)), logits[:, :3])
    between = -(mass * np.log(1 - own) + (1 - mass) * np.log(own)).mean()
    assert whole == pytest.approx(part + between, rel=1e-5)


def test_a_label_without_wanted_mass_teaches_nothing() -> None:
    labels = np.zeros((ROWS, CLASSES), np.float32)
    labels[:, 0] = 1
    logits = torch.from_numpy(draw(4, 3)).requires_grad_()
    loss = SoftLabels(labels, CPU, wanted=Wanted(WANTED))(logits, IDS)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [SoftLabels, ConcatenatedSoftmax, DirectCE, DirectMFLF, ConcatenatedScores])
def test_all_classes_named_are_all_classes(kind: type) -> None:
    logits, every = draw(5), Wanted(tuple(range(CLASSES)))
    apart = [[5, 0, 1], [2, 4, 3]]
    if kind is SoftLabels:
        losses = [SoftLabels(LABELS, CPU, 2.0, wanted=wanted) for wanted in (None, every)]
    elif kind in (DirectCE, DirectMFLF):
        losses = [kind(told(SETS), SETS, WEIGHTS, CPU, 2.0, wanted=wanted) for wanted in (None, every)]
    else:
        losses = [kind(told(apart), apart, CPU, wanted=wanted) for wanted in (None, every)]
    assert value(losses[0], logits) == pytest.approx(value(losses[1], logits), rel=1e-5)
    assert losses[0].fingerprint != losses[1].fingerprint


def direct_parts(answers: list[np.ndarray], temperature: float = 1.0) -> list[tuple[int, list[int], list[int]]]:
    """Return (site, columns of wanted classes, the student's outputs for these) of the sites that know any."""
    found = []
    for i, held in enumerate(SETS):
        columns = [k for k, label in enumerate(held) if label in WANTED]
        if columns:
            found.append((i, columns, [WANTED.index(held[k]) for k in columns]))
    return found


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_direct_ce_learns_the_odds_between_a_site_s_wanted_classes(temperature: float) -> None:
    answers, logits, expected = told(SETS), draw(6, 3), np.zeros(ROWS)
    for i, columns, outputs in direct_parts(answers):
        p = softmax(answers[i].astype(np.float64) / temperature, axis=1)[:, columns]
        mass = p.sum(axis=1)
        expected += WEIGHTS[i] * mass * kl(p / mass[:, None], logits[:, outputs] / temperature)
    loss = DirectCE(answers, SETS, WEIGHTS, CPU, temperature, wanted=Wanted(WANTED, scale=3.0))
    assert value(loss, logits) == pytest.approx(3 * temperature**2 * expected.mean() / sum(WEIGHTS), rel=1e-4)


def test_direct_ce_is_what_the_chain_rule_leaves_of_the_whole() -> None:
    (answers,), logits = told([list(range(CLASSES))]), draw(8)
    rest = [0, 3, 5]
    p, q = np.exp(answers.astype(np.float64)), softmax(logits, axis=1)
    mass, own = p[:, WANTED].sum(axis=1), q[:, WANTED].sum(axis=1)
    between = mass * np.log(mass / own) + (1 - mass) * np.log((1 - mass) / (1 - own))
    within = (1 - mass) * kl(p[:, rest] / (1 - mass)[:, None], logits[:, rest])
    whole = value(DirectCE([answers], [list(range(CLASSES))], [1.0], CPU), logits)
    part = DirectCE([answers], [list(range(CLASSES))], [1.0], CPU, wanted=Wanted(WANTED))
    assert value(part, logits[:, WANTED]) == pytest.approx(whole - (between + within).mean(), rel=1e-4)


def test_pooled_rests_are_exact_where_sites_know_all_that_is_unwanted() -> None:
    """The same odds between unwanted classes everywhere: then nothing but the pooled outcomes is left to learn."""
    rest, sets = [0, 3, 5], [[0, 1, 3, 5], [5, 4, 2, 3, 0]]
    odds = {0: 0.2, 3: 0.5, 5: 0.3}
    answers = []
    for i, held in enumerate(sets):
        p = softmax(draw(20 + i, len(held)), axis=1)
        mass = p[:, [held.index(u) for u in rest]].sum(axis=1)
        for u in rest:
            p[:, held.index(u)] = mass * odds[u]
        answers.append(np.log(p).astype(np.float32))
    logits = draw(9, 4)
    full = np.zeros((ROWS, CLASSES))
    full[:, WANTED] = logits[:, :3]
    for u in rest:
        full[:, u] = logits[:, 3] + np.log(odds[u])
    weights = [1.0, 2.0]
    pooled = DirectCE(answers, sets, weights, CPU, wanted=Wanted(WANTED, other=True))
    assert value(pooled, logits) == pytest.approx(value(DirectCE(answers, sets, weights, CPU), full), rel=1e-4)
    labels = unify(answers, sets, method="ce", weights=weights).probs
    target = np.concatenate([labels[:, WANTED], labels[:, rest].sum(axis=1, keepdims=True)], axis=1)
    assert np.allclose(minimise(pooled, 4), target, atol=1e-4)


COVERAGE = np.random.default_rng(11).uniform(0.05, 0.95, (ROWS, len(SETS))).astype(np.float32)
COVERAGE[:2, 0] = np.nan


def test_coverage_weighs_what_is_left_without_other() -> None:
    answers, logits, expected = told(SETS), draw(12, 3), np.zeros(ROWS)
    for i, columns, outputs in direct_parts(answers):
        p = np.exp(answers[i].astype(np.float64))[:, columns]
        mass, c = p.sum(axis=1), np.where(np.isnan(COVERAGE[:, i]), 1, COVERAGE[:, i])
        expected += WEIGHTS[i] * (0.7 + 0.3 * c) * mass * kl(p / mass[:, None], logits[:, outputs])
    loss = DirectCE(answers, SETS, WEIGHTS, CPU, wanted=Wanted(WANTED), coverage=COVERAGE, strength=0.3)
    assert value(loss, logits) == pytest.approx(expected.mean() / sum(WEIGHTS), rel=1e-4)


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_with_other_coverage_says_what_is_outside_a_site_s_wanted_classes(strength: float) -> None:
    answers, logits, expected = told(SETS), draw(13, 4), np.zeros(ROWS)
    own = log_softmax(logits, axis=1)
    for i, columns, outputs in direct_parts(answers):
        p = np.exp(answers[i].astype(np.float64))
        inside, mass = p[:, columns], p[:, columns].sum(axis=1)
        if len(columns) < p.shape[1]:
            target, to = np.concatenate([inside, 1 - mass[:, None]], axis=1), [*outputs, 3]
        else:
            target, to = inside, outputs
        plain = kl(target, logits[:, to])
        c = COVERAGE[:, i].astype(np.float64)
        outside = [k for k in range(4) if k not in outputs]
        told_in, told_out = logsumexp(own[:, outputs], axis=1), logsumexp(own[:, outside], axis=1)
        covered = c * mass * kl(inside / mass[:, None], logits[:, outputs])
        covered -= c * mass * told_in + (1 - c * mass) * told_out
        expected += WEIGHTS[i] * np.where(np.isnan(c), plain, (1 - strength) * plain + strength * covered)
    loss = DirectCE(
        answers, SETS, WEIGHTS, CPU, wanted=Wanted(WANTED, other=True), coverage=COVERAGE, strength=strength
    )
    assert value(loss, logits) == pytest.approx(expected.mean() / sum(WEIGHTS), rel=1e-4)


def test_direct_mf_lf_keeps_pairs_of_wanted_classes() -> None:
    answers, logits, expected = told(SETS), draw(14, 3), np.zeros(ROWS)
    for i, columns, outputs in direct_parts(answers):
        z, s, k = answers[i][:, columns].astype(np.float64), logits[:, outputs], len(columns)
        pairs = sum(((z[:, a] - z[:, b]) - (s[:, a] - s[:, b])) ** 2 for a in range(k) for b in range(a))
        expected += WEIGHTS[i] * np.exp(z).sum(axis=1) * pairs / k**2
    loss = DirectMFLF(answers, SETS, WEIGHTS, CPU, wanted=Wanted(WANTED))
    assert value(loss, logits) == pytest.approx(expected.mean() / sum(WEIGHTS), rel=1e-4)


@pytest.mark.parametrize("kind", [DirectCE, DirectMFLF])
def test_sites_that_did_not_answer_have_no_part(kind: type[DirectCE] | type[DirectMFLF]) -> None:
    answers, logits, wanted = told(SETS), draw(15, 3), Wanted(WANTED)
    answered = np.ones((ROWS, len(SETS)), bool)
    answered[:, 1] = False
    some = [0, 2, 3]
    few = kind([answers[i] for i in some], [SETS[i] for i in some], [WEIGHTS[i] for i in some], CPU, wanted=wanted)
    masked = kind(answers, SETS, WEIGHTS, CPU, answered=answered, wanted=wanted)
    assert value(masked, logits) == pytest.approx(value(few, logits), rel=1e-5)


def test_scores_side_by_side_lose_the_unwanted_terms() -> None:
    sets = [[5, 0, 1], [2, 4, 3]]
    answers, logits = told(sets), draw(16, 3)
    full = np.zeros((ROWS, CLASSES), np.float32)
    for rows, held in zip(answers, sets, strict=True):
        full[:, held] = rows - rows.mean(axis=1, keepdims=True)
    expected = 0.5 * ((logits - full[:, WANTED]) ** 2).sum(axis=1).mean()
    assert value(ConcatenatedScores(answers, sets, CPU, wanted=Wanted(WANTED)), logits) == pytest.approx(expected)
    for other in (False, True):
        wanted = Wanted(WANTED, other)
        labels = SoftLabels(softmax(full / 2, axis=1), CPU, 2.0, wanted=wanted)
        mine, logits = ConcatenatedSoftmax(answers, sets, CPU, wanted=wanted, temperature=2.0), draw(17, 3 + other)
        assert value(mine, logits) == pytest.approx(value(labels, logits), rel=1e-5)


@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.booleans())
def test_cut_rows_are_distributions_and_mass_is_kept(seed: int, classes: int, other: bool) -> None:
    rng = np.random.default_rng(seed)
    wanted = Wanted(tuple(np.flatnonzero(rng.random(classes) < 0.5).tolist()) or (0,), other)
    probs = rng.dirichlet(np.full(classes, 0.05), 8).astype(np.float32)
    held = torch.from_numpy(probs[:, wanted.classes])
    rows, weights = wanted.labels(held)
    assert torch.allclose(rows.sum(dim=1), torch.ones(8, dtype=torch.float64), atol=1e-5)
    assert rows.min() >= 0
    inside = rows[:, :-1].sum(dim=1) if weights is None else weights
    assert torch.allclose(inside, held.double().sum(dim=1), atol=1e-6)
    part = wanted.site(range(classes))
    cut, mass = part.cut(torch.from_numpy(np.log(np.maximum(probs, 1e-30))))
    assert torch.allclose(mass.double(), held.double().sum(dim=1), atol=1e-4)
    assert torch.allclose(cut.exp().sum(dim=1), torch.ones(8), atol=1e-4)
