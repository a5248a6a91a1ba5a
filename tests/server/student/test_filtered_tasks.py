"""Filters and losses of filtered amalgamation against closed forms and finite differences; tasks that are none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, log_softmax, logsumexp, rel_entr
from torch import Tensor

from consilience.common.errors import StudentError
from consilience.server.student.filtered_filter import Filter
from consilience.server.student.filtered_tasks import Matter, Task, Teacher, divergence, pooled
from consilience.server.student.soft_multi import SoftMultiLabels
from helpers.feature_answers import images
from helpers.filtered import teaching

pytestmark = pytest.mark.usefixtures("one_thread")

PIXELS = images(12)
IDS = np.array([3, 0, 11, 7])
ONE = teaching("one", PIXELS, classes=5)
MANY = teaching("many", PIXELS, classes=5, multi=True, seed=2)


def matter(task: Task, teacher: Teacher, **options: Any) -> Matter:
    return Matter([teacher], [task], len(task.classes), np.arange(12), **options)


def outputs(width: int = 5) -> Tensor:
    return torch.randn(4, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("inputs", "width"), [(6, 6), (6, 10), (40, 7), (1, 1)])
@torch.no_grad()
def test_a_filter_is_its_formula(inputs: int, width: int) -> None:
    made, features = Filter(inputs, width), torch.randn(3, inputs, 4, 5)
    found = made(features).numpy()
    assert found.shape == (3, width, 4, 5)
    fitted = features.numpy()
    if inputs != width:
        weight, bias = (each.numpy() for each in made.fit.parameters())
        fitted = np.einsum("oi,nihw->nohw", weight[:, :, 0, 0], fitted) + bias[:, None, None]
    mean = np.maximum(fitted, 0).mean(axis=(2, 3))
    hidden = np.maximum(mean @ made.squeeze.weight.numpy().T + made.squeeze.bias.numpy(), 0)
    factors = 1 / (1 + np.exp(-(hidden @ made.excite.weight.numpy().T + made.excite.bias.numpy())))
    assert np.allclose(found, fitted * factors[:, :, None, None], atol=1e-5)
    assert made.squeeze.out_features == max(4, width // 4)


@torch.no_grad()
def test_a_filter_begins_near_to_letting_everything_through_and_commutes_with_relu() -> None:
    made, features = Filter(16, 16), torch.randn(4, 16, 3, 3)
    assert torch.allclose(made(features), features * torch.sigmoid(torch.tensor(2.0)), atol=0.15)
    assert torch.allclose(made(features).relu(), made(features.relu()), atol=1e-6)


@pytest.mark.parametrize("wanted", [(0, 1, 2, 3, 4), (4, 1), (2,), (3, 0, 1)])
def test_classes_that_nobody_wants_are_one_outcome(wanted: tuple[int, ...]) -> None:
    task = Task("t", 0, wanted, tuple(range(len(wanted))))
    given = outputs()
    found = matter(task, ONE).of_tail(task, given.float(), IDS).numpy()
    p, q = log_softmax(ONE.answers[IDS].astype(np.float64), axis=1), log_softmax(given.numpy(), axis=1)
    rest = [each for each in range(5) if each not in wanted]
    both = [
        np.concatenate([x[:, list(wanted)], logsumexp(x[:, rest], axis=1, keepdims=True)], 1) if rest else x[:, wanted]
        for x in (p, q)
    ]
    assert np.allclose(found, rel_entr(np.exp(both[0]), np.exp(both[1])).sum(axis=1), atol=1e-5)
    assert matter(task, ONE).others(task) == len(rest)


@pytest.mark.parametrize("hard", [False, True])
def test_labels_are_learnt_by_binary_cross_entropy(hard: bool) -> None:
    task = Task("t", 0, (3, 1), (0, 1))
    made, given = matter(task, MANY, hard=hard), outputs()
    found = made.of_tail(task, given, IDS).numpy()
    told, own = MANY.answers[IDS][:, [3, 1]].astype(np.float64), given.numpy()[:, [3, 1]]
    target = (told > 0).astype(float) if hard else 1 / (1 + np.exp(-told))
    own = 1 / (1 + np.exp(-own))
    expected = -(target * np.log(own) + (1 - target) * np.log(1 - own)).sum(axis=1)
    assert np.allclose(found, expected, atol=1e-5)
    assert made.others(task) == 0
    assert np.allclose(made.of_branch(task, given[:, [3, 1]], IDS), found)


def test_a_label_counts_the_same_alone_and_among_others() -> None:
    """However labels are parted among tasks, and as much as in the loss of unified labels."""
    given = outputs()
    whole = matter(Task("t", 0, (3, 1, 4), (0, 1, 2)), MANY)
    parts = Matter([MANY], [Task(f"{out}", 0, (out,), (at,)) for at, out in enumerate((3, 1, 4))], 3, np.arange(12))
    alone = sum((parts.of_tail(task, given, IDS) for task in parts.tasks), torch.zeros(4, dtype=torch.float64))
    assert torch.allclose(whole.of_tail(whole.tasks[0], given, IDS), alone)
    unified = SoftMultiLabels(expit(MANY.answers[:, [3, 1, 4]].astype(np.float64)), torch.device("cpu"), samples=IDS)
    assert float(unified(given[:, [3, 1, 4]], torch.arange(4))) == pytest.approx(float(alone.mean()), rel=1e-5)


def test_a_branch_is_compared_as_a_tail() -> None:
    task = Task("t", 0, (4, 1), (0, 1))
    made, given = matter(task, ONE), outputs()
    branch = given[:, [4, 1, 0, 2, 3]]  # the wanted first
    for offset in (0.0, 7.0):
        assert torch.allclose(made.of_branch(task, branch + offset, IDS), made.of_tail(task, given, IDS), atol=1e-9)
    assert not torch.allclose(made.of_branch(task, given, IDS), made.of_tail(task, given, IDS), atol=0.01)


@pytest.mark.parametrize("teacher", [ONE, MANY])
@pytest.mark.parametrize("wanted", [(0, 1, 2, 3, 4), (4, 1)])
def test_the_loss_is_least_at_the_teachers_own_answer(teacher: Teacher, wanted: tuple[int, ...]) -> None:
    task = Task("t", 0, wanted, tuple(range(len(wanted))))
    made = matter(task, teacher)
    own = torch.from_numpy(teacher.answers[IDS].astype(np.float64)).requires_grad_()
    least = made.of_tail(task, own, IDS)
    torch.autograd.backward(least.sum())
    assert own.grad is not None
    assert own.grad.abs().max() < 1e-6
    if not teacher.multi:
        assert least.abs().max() < 1e-6
    assert (made.of_tail(task, own.detach() + outputs(), IDS) > least.detach()).all()


@pytest.mark.parametrize("teacher", [ONE, MANY])
def test_gradients_are_those_of_finite_differences(teacher: Teacher) -> None:
    task = Task("t", 0, (4, 1), (0, 1))
    made = matter(task, teacher)
    assert torch.autograd.gradcheck(lambda x: made.of_tail(task, x, IDS), outputs().requires_grad_())
    width = 2 + made.others(task)
    assert torch.autograd.gradcheck(lambda x: made.of_branch(task, x, IDS), outputs(width).requires_grad_())


@given(st.lists(st.floats(-400, 400), min_size=6, max_size=6), st.lists(st.floats(-400, 400), min_size=6, max_size=6))
def test_divergence_is_not_negative_and_finite(one: list[float], other: list[float]) -> None:
    p, q = (pooled(torch.tensor([each], dtype=torch.float64), (0, 3)) for each in (one, other))
    assert torch.allclose(p.exp().sum(dim=1), torch.ones(1, dtype=torch.float64))
    found = float(divergence(p, q))
    assert math.isfinite(found)
    assert found > -1e-9


def test_an_outcome_of_no_probability_counts_nothing() -> None:
    p = torch.tensor([[0.0, -math.inf]])
    q = torch.tensor([[-1.0, -0.5]], requires_grad=True)
    found = divergence(p, q)
    torch.autograd.backward(found.sum())
    assert float(found.detach()) == pytest.approx(1.0)
    assert q.grad is not None
    assert q.grad.tolist() == [[-1.0, 0.0]]


def test_samples_and_who_answered() -> None:
    answered = np.arange(12) < 6
    teacher = Teacher(ONE.tail, ONE.answers, answered=answered)
    task = Task("t", 0, (0, 1), (0, 1))
    made = Matter([teacher], [task], 2, np.arange(12)[::-1].copy())
    assert made.known(0, np.array([0, 6, 11, 5])).tolist() == [1, 2]  # the pool's 11, 5, 0, 6
    assert Matter([ONE], [task], 2, np.arange(12)).known(0, IDS).tolist() == [0, 1, 2, 3]
    plain = Matter([ONE], [task], 2, np.arange(12))
    given = outputs()
    assert torch.equal(made.of_tail(task, given, IDS), plain.of_tail(task, given, 11 - IDS))
    assert torch.equal(made.with_samples(np.arange(12)).of_tail(task, given, IDS), plain.of_tail(task, given, IDS))


@pytest.mark.parametrize(
    ("tasks", "classes", "message"),
    [
        ([], 0, r"Classes \[\] of the student's 0 belong to no task"),
        ([Task("a", 0, (0, 1), (0, 1))], 3, r"Classes \[2\] of the student's 3 belong to no task"),
        ([Task("a", 2, (0, 1), (0, 1))], 2, "Task 'a' is of no site: there are 2"),
        ([Task("a", -1, (0, 1), (0, 1))], 2, "Task 'a' is of no site"),
        ([Task("a", 0, (0, 5), (0, 1))], 2, r"wants outputs \[0, 5\] of site one as classes \[0, 1\]; .*of its 5"),
        ([Task("a", 0, (0, 0), (0, 1))], 2, "each once"),
        ([Task("a", 0, (0, 1), (0, 0))], 1, "each once"),
        ([Task("a", 0, (0, 1), (0, 2))], 2, "as so many of the student's 2"),
        ([Task("a", 0, (0,), (0, 1))], 2, "each once, as so many"),
        ([Task("a", 0, (), ())], 1, "one or more"),
        ([Task("a", 0, (0,), (0,)), Task("b", 0, (1,), (1,))], 2, "Site one has 2 tasks, and its classes exclude"),
    ],
)
def test_tasks_that_are_none(tasks: list[Task], classes: int, message: str) -> None:
    with pytest.raises(StudentError, match=message):
        Matter([ONE, MANY], tasks, classes, np.arange(12))


def test_labels_may_be_several_tasks_and_one_class_of_many_sites() -> None:
    made = Matter(
        [ONE, MANY],
        [Task("a", 1, (0,), (0,)), Task("b", 1, (3, 1), (1, 2)), Task("c", 0, (2,), (2,))],
        3,
        np.arange(12),
    )
    assert made.tasks_of(1) == (0, 1)
    assert made.tasks_of(0) == (2,)


def test_one_outcome_is_nothing_to_learn() -> None:
    alone = teaching("alone", PIXELS, classes=1)
    with pytest.raises(StudentError, match="has one outcome"):
        matter(Task("t", 0, (0,), (0,)), alone)


def test_answers_of_another_teacher() -> None:
    task = Task("t", 0, (0, 1), (0, 1))
    with pytest.raises(StudentError, match=r"Site one answered \(4,\) values a sample; its tail gives 5 outputs"):
        matter(task, Teacher(ONE.tail, ONE.answers[:, :4]))
