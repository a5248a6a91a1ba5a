"""What filtered amalgamation learns: tasks, and how far outputs are from the teachers' own answers.

Lives here: tasks, the sites' answers about them, and the loss l of methods.md 3.2 for outputs of a tail and of a
branch. Does not live here: where outputs come from (tails, filtered_student).

l is, for a teacher whose classes exclude one another, KL(answer || softmax(outputs)), after all classes of the teacher
that are not wanted were pooled into one outcome: of the classes that nobody wants it only counts that it is one of
them. For labels that do not exclude one another it is binary cross-entropy with logits, against sigmoid(answer), or
with `hard` against whether that is above 1/2 as in the authors' code, summed over the wanted labels, as every loss of
labels is: a label counts the same whatever else is wanted of its site, and however labels are parted among tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from consilience.common.errors import StudentError
from consilience.server.student.tails import TeacherTail


@dataclass(frozen=True)
class Task:
    """Some outputs of one teacher, wanted together: `outputs` are its own, `classes` the student's, in one order.

    `teacher` is its number. Where its classes exclude one another all that are wanted are one task; labels that do not
    may be parted among tasks as one likes.
    """

    name: str
    teacher: int
    outputs: tuple[int, ...]
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Teacher:
    """A teacher's tail and its answers to the pool.

    `answers` (n, k) floating, typically a memory map: log-probabilities, or with `multi` the labels' log-odds. Where it
    did not answer all, `answered` (n,) bool says what.
    """

    tail: TeacherTail
    answers: NDArray[np.floating]
    multi: bool = False
    answered: NDArray[np.bool_] | None = None

    @property
    def outputs(self) -> int:
        """How many classes it knows."""
        return self.tail.taps[-1].channels


class Matter:
    """Teachers, and the tasks that are wanted of them.

    `classes` is the number of the student's outputs. `samples` (m,): training's sample j is the pool's samples[j].
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        tasks: Sequence[Task],
        classes: int,
        samples: NDArray[np.int64],
        *,
        hard: bool = False,
    ) -> None:
        """Raises `StudentError` for a task that nobody teaches, twice the same, and for a class without a task."""
        self.teachers, self.tasks, self.classes, self.hard = tuple(teachers), tuple(tasks), classes, hard
        self.samples = samples
        for task in self.tasks:
            self._check(task)
        missing = sorted(set(range(classes)).difference(*(task.classes for task in self.tasks)))
        if not classes or missing:
            raise StudentError(
                f"Classes {missing[:5]} of the student's {classes} belong to no task",
                hint="Name tasks whose sites know every wanted class, or want fewer",
            )
        for site in self.teachers:
            if site.answers.shape[1:] != (site.outputs,):
                raise StudentError(
                    f"Site {site.tail.site} answered {site.answers.shape[1:]} values a sample; its tail gives "
                    f"{site.outputs} outputs",
                    hint="Ask the site again, with the teacher that its tail is of",
                )

    def with_samples(self, samples: NDArray[np.int64]) -> Matter:
        """Return the same of other samples of the pool."""
        return Matter(self.teachers, self.tasks, self.classes, samples, hard=self.hard)

    def tasks_of(self, teacher: int) -> tuple[int, ...]:
        """Return the numbers of the tasks of a teacher."""
        return tuple(at for at, task in enumerate(self.tasks) if task.teacher == teacher)

    def others(self, task: Task) -> int:
        """Return how many classes of the task's teacher are pooled: those beside the wanted; 0 for labels."""
        teacher = self.teachers[task.teacher]
        return 0 if teacher.multi else teacher.outputs - len(task.outputs)

    def known(self, teacher: int, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which of training's samples `ids` (b,) the teacher answered: places in `ids`."""
        answered = self.teachers[teacher].answered
        return np.arange(len(ids)) if answered is None else np.flatnonzero(answered[self.samples[ids]])

    def of_tail(self, task: Task, outputs: Tensor, ids: NDArray[np.int64]) -> Tensor:
        """Return l (b,) of the outputs (b, k) of the task's tail for training's samples `ids` (b,), all answered."""
        teacher = self.teachers[task.teacher]
        own = outputs[:, list(task.outputs)] if teacher.multi else pooled(outputs, task.outputs)
        return self._between(task, own, ids)

    def of_branch(self, task: Task, outputs: Tensor, ids: NDArray[np.int64]) -> Tensor:
        """Return l (b,) of outputs (b, w + others) of a branch: those that are wanted first, in the task's order."""
        multi = self.teachers[task.teacher].multi
        return self._between(task, outputs if multi else pooled(outputs, range(len(task.outputs))), ids)

    def _between(self, task: Task, own: Tensor, ids: NDArray[np.int64]) -> Tensor:
        teacher = self.teachers[task.teacher]
        rows = np.asarray(teacher.answers[self.samples[ids]], np.float32)
        told = torch.from_numpy(rows).to(own)
        if not teacher.multi:
            return divergence(pooled(told, task.outputs), own)
        wanted = told[:, list(task.outputs)]
        target = (wanted > 0).to(own.dtype) if self.hard else torch.sigmoid(wanted)
        return F.binary_cross_entropy_with_logits(own, target, reduction="none").sum(dim=1)

    def _check(self, task: Task) -> None:
        if not 0 <= task.teacher < len(self.teachers):
            raise StudentError(
                f"Task {task.name!r} is of no site: there are {len(self.teachers)}",
                hint="Name a task that a site with a tail teaches",
            )
        teacher = self.teachers[task.teacher]
        wrong = (
            not task.outputs
            or len(task.outputs) != len(task.classes)
            or len(set(task.outputs)) < len(task.outputs)
            or len(set(task.classes)) < len(task.classes)
            or not all(0 <= output < teacher.outputs for output in task.outputs)
            or not all(0 <= label < self.classes for label in task.classes)
        )
        if wrong:
            raise StudentError(
                f"Task {task.name!r} wants outputs {list(task.outputs)[:10]} of site {teacher.tail.site} as classes "
                f"{list(task.classes)[:10]}; allowed: one or more of its {teacher.outputs}, each once, as so many of "
                f"the student's {self.classes}",
                hint="Name classes that the site knows",
            )
        if not teacher.multi:
            if len(self.tasks_of(task.teacher)) > 1:
                raise StudentError(
                    f"Site {teacher.tail.site} has {len(self.tasks_of(task.teacher))} tasks, and its classes exclude "
                    "one another",
                    hint="Make one task of all that is wanted of it",
                )
            if teacher.outputs == 1 or (len(task.outputs) == 1 and not self.others(task)):
                raise StudentError(
                    f"Task {task.name!r} has one outcome, so that there is nothing to learn",
                    hint="Want more classes of the site, or leave it out",
                )


def pooled(scores: Tensor, wanted: Sequence[int]) -> Tensor:
    """Return log-probabilities of the classes `wanted`, and last of all others together if there are any.

    `scores` (b, k) are logits or log-probabilities over all classes: (b, w), or (b, w + 1), whose exponentials sum
    to 1.
    """
    log_probs = scores.log_softmax(dim=1)
    told = log_probs[:, list(wanted)]
    if len(wanted) == scores.shape[1]:
        return told
    rest = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
    rest[list(wanted)] = False
    return torch.cat([told, log_probs[:, rest].logsumexp(dim=1, keepdim=True)], dim=1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) (b,) of log-probabilities (b, w); an outcome of probability 0 in p counts nothing."""
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=1)
