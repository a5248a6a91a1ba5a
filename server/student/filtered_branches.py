"""Branches of filtered amalgamation (Ye et al., IJCAI 2019; methods.md 3.2, steps 3 and 4).

Lives here: at which block each task's branch leaves the trunk, what branches begin with, and training all together.
Does not live here: how far each block is from the teachers (filtered_blocks), and the network (filtered_student).

A branch leaves where the samples held out agree best with the teacher; labels are never looked at. It begins with its
filters, the teacher's own remaining blocks, and its head: the wanted rows, then the others, which are dropped at the
end. What a branch then computes is exactly what the filtered features gave in the teacher's tail.

Where a tail stays at its site there are no weights to begin with. Such a branch has the blocks of the student's own
architecture, and a filter, all fresh, and learns from the teacher's answers alone when all is trained together; its
trunk was trained for it all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from consilience.common.epochs import EpochRecord
from consilience.common.errors import StudentError
from consilience.common.nets import Loss, Parted, train
from consilience.common.nets.blocks import Blocks
from consilience.common.preprocessing import ImageRows
from consilience.common.settings import Fit, Preprocessing
from consilience.server.student.filtered_blocks import FilteredTrunk
from consilience.server.student.filtered_student import Branch, BranchAbout, FilteredStudent, StudentAbout
from consilience.server.student.filtered_tasks import Matter, Task


def choose(agreement: NDArray[np.float64], stages: Sequence[int], matter: Matter) -> tuple[int, ...]:
    """Return the block from which each task's branch leaves: of the least `agreement` (blocks, tasks), NaN left out.

    Of blocks alike the deepest, which shares most. Raises `StudentError` for a task that was measured nowhere.
    """
    chosen = []
    for at, task in enumerate(matter.tasks):
        column = agreement[:, at]
        if np.isnan(column).all():
            raise StudentError(
                f"No sample held out was answered by site {matter.teachers[task.teacher].tail.site}, so that task "
                f"{task.name!r} has nothing to choose its branch by",
                hint="Raise student.filtered.held_out, or run the same command again to ask for the rest",
            )
        chosen.append(stages[int(np.flatnonzero(column == np.nanmin(column))[-1])])
    return tuple(chosen)


def assemble(
    trunk: FilteredTrunk,
    matter: Matter,
    blocks: Sequence[int],
    channels: int,
    *,
    branches: Literal["teacher", "random"] = "teacher",
    seed: int,
) -> FilteredStudent:
    """Return the student whose task j leaves `trunk` after `blocks[j]`, for images of `channels`, on the CPU.

    Branches have their teachers' other classes, to be dropped by `finished` once they have learnt. With `random`, a
    branch keeps its filters and has fresh blocks of the teacher's widths and a fresh head.
    """
    about = StudentAbout(
        architecture=trunk.architecture,
        channels=channels,
        classes=matter.classes,
        branches=tuple(
            _about(trunk, matter, task, at, block)
            for at, (task, block) in enumerate(zip(matter.tasks, blocks, strict=True))
        ),
    )
    student = FilteredStudent(about, seed)
    student.units.load_state_dict(nn.ModuleList(list(trunk.units)[: len(student.units)]).state_dict())
    for at, (task, block, branch) in enumerate(zip(matter.tasks, blocks, student.branches, strict=True)):
        lent = matter.teachers[task.teacher].tail.lent
        assert isinstance(branch, Branch)
        if lent is not None:
            branch.filters.load_state_dict(nn.Sequential(*trunk.at(block).chain(task.teacher, at)).state_dict())
            if branches == "teacher":
                _begin(branch.blocks, lent[0], task)
    return student.eval()


class Branching(nn.Module):
    """A student that gives its branches' outputs beside its scores, as training takes them; `student` is its own."""

    def __init__(self, student: FilteredStudent) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map normalised images (n, C, H, W)."""
        return self.student.branched(images)


class BranchLoss:
    """The sum over tasks of l of each branch's outputs, its mean over samples that the teacher answered; terms by task.

    `fingerprint` names what the answers are.
    """

    def __init__(self, matter: Matter, fingerprint: str) -> None:
        self._matter, self.fingerprint = matter, f"filtered branches {fingerprint}"

    def __call__(self, output: tuple[Tensor, tuple[Tensor, ...]], ids: Tensor) -> Parted:
        """Return the loss of what `Branching` gives for the samples `ids` (b,)."""
        numbers, terms = ids.cpu().numpy(), dict[str, Tensor]()
        total = 0 * output[0].sum()
        for task, each in zip(self._matter.tasks, output[1], strict=True):
            at = self._matter.known(task.teacher, numbers)
            own = each if len(at) == len(numbers) else each[torch.from_numpy(at).to(each.device)]
            told = self._matter.of_branch(task, own, numbers[at])
            mean = told.mean() if len(at) else torch.zeros_like(total)
            total, terms[task.name] = total + mean, mean.detach()
        return Parted(total, terms)


class ScoresLoss:
    """A loss of the scores alone, such as that of unified soft labels, of what `Branching` gives."""

    def __init__(self, scores: Loss, fingerprint: str) -> None:
        self._scores, self.fingerprint = scores, f"filtered scores {fingerprint}"

    def __call__(self, output: tuple[Tensor, tuple[Tensor, ...]], ids: Tensor) -> Tensor | Parted:
        """Return the loss for the samples `ids` (b,)."""
        return self._scores(output[0], ids)


def train_together(
    student: FilteredStudent,
    loss: BranchLoss | ScoresLoss,
    images: ImageRows,
    fit: Fit,
    preprocessing: Preprocessing,
    *,
    seed: int,
    folder: Path | None = None,
    device: torch.device | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> list[EpochRecord]:
    """Train trunk, filters and branches in place; resumes, and raises, as `nets.train`."""
    return train(
        Branching(student),
        images,
        loss,
        fit,
        preprocessing,
        seed=seed,
        folder=folder,
        on_epoch=on_epoch,
        device=device,
    )


def _about(trunk: FilteredTrunk, matter: Matter, task: Task, number: int, block: int) -> BranchAbout:
    lent = matter.teachers[task.teacher].tail.lent
    return BranchAbout(
        task=task.name,
        block=block,
        architecture=trunk.architecture if lent is None else lent[1],
        classes=task.classes,
        others=matter.others(task),
        filters=1 if lent is None else len(trunk.at(block).chain(task.teacher, number)),
    )


@torch.no_grad()
def _begin(blocks: Blocks, teacher: Blocks, task: Task) -> None:
    """Copy the teacher's weights into a branch's blocks, and the rows of its head, those that are wanted first."""
    before = blocks.first - teacher.first
    for unit, lent in zip(list(blocks.units)[:-1], list(teacher.units)[before:-1], strict=True):
        unit.load_state_dict(lent.state_dict())
    rest = [row for row in range(teacher.head.out_features) if row not in set(task.outputs)]
    rows = [*task.outputs, *rest][: blocks.head.out_features]
    blocks.head.weight.copy_(teacher.head.weight[rows])
    blocks.head.bias.copy_(teacher.head.bias[rows])
