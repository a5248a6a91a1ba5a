"""The student of filtered amalgamation: one network of a trunk, filters and branches, and what it is made of in words.

Lives here: the network, its description, from which it is built again without anybody's code, and how many parameters
each part has. Does not live here: where its weights come from (filtered_branches).

The trunk ends with the deepest block that a branch leaves from; what nobody wants is not there. A branch is its
filters, the blocks after the one it leaves from, in the widths of its own architecture, and a head of one output a
wanted class. While it learns, a branch has its teacher's other classes too, of which the loss takes the sum; no score
is made of them, and the finished student is without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from consilience.common.errors import StudentError
from consilience.common.nets import build
from consilience.common.nets.blocks import Blocks, skeleton
from consilience.common.nets.seeding import seeded
from consilience.common.seeds import derive
from consilience.common.settings.base import Settings
from consilience.server.student.filtered_filter import Filter

MOST_PARAMETERS = 2**30


class BranchAbout(Settings):
    """One branch: the block that it leaves from, what its own blocks are of, and the student's classes it tells."""

    task: str = Field(max_length=200)
    block: int = Field(ge=1, le=1000)
    architecture: str = Field(max_length=80)
    classes: tuple[int, ...] = Field(min_length=1)
    others: int = Field(default=0, ge=0, le=1_000_000)
    """Outputs after those of `classes`, for as long as it learns: what the teacher knows beside."""
    filters: int = Field(ge=0, le=2)
    """Filters in turn: of the teacher, and of the task. Without any, the trunk's channels are its own."""


class StudentAbout(Settings):
    """What a student of filtered amalgamation is made of. `channels` are the images', `classes` its outputs."""

    form: int = Field(default=1, ge=1, le=1)
    architecture: str = Field(max_length=80)
    channels: int = Field(ge=1, le=64)
    classes: int = Field(ge=1, le=1_000_000)
    branches: tuple[BranchAbout, ...] = Field(min_length=1, max_length=1000)

    @model_validator(mode="after")
    def _every_class_once_a_branch(self) -> StudentAbout:
        known: set[int] = set()
        for branch in self.branches:
            if len(set(branch.classes)) < len(branch.classes) or not all(0 <= c < self.classes for c in branch.classes):
                raise ValueError(f"branch {branch.task!r} names classes twice, or others than 0 to {self.classes - 1}")
            known.update(branch.classes)
        if len(known) < self.classes:
            raise ValueError(f"{self.classes - len(known)} classes have no branch")
        return self


@dataclass(frozen=True)
class Parts:
    """Parameters that are trained, by part; `branches` have no filters in them."""

    trunk: int
    filters: int
    branches: tuple[int, ...]

    @property
    def total(self) -> int:
        """Of the whole student."""
        return self.trunk + self.filters + sum(self.branches)


class Branch(nn.Module):
    """Filters, a teacher's remaining blocks and a head."""

    def __init__(self, about: BranchAbout, channels: int, seed: int) -> None:
        """Leave from a trunk of `channels`, freshly initialised."""
        super().__init__()
        outputs = len(about.classes) + about.others
        self.blocks = Blocks(build(about.architecture, classes=outputs, channels=1, seed=seed), about.block)
        width = self.blocks.taps[about.block - 1].channels
        with seeded(derive(seed, "filters")):
            made = [Filter(channels if not at else width, width) for at in range(about.filters)]
        self.filters = nn.Sequential(*made)

    def forward(self, features: Tensor) -> Tensor:
        """Map the trunk's features (n, C, H, W) to outputs (n, classes + others)."""
        outputs: Tensor = self.blocks(self.filters(features))
        return outputs


class FilteredStudent(nn.Module):
    """A student for images (n, C, H, W), freshly initialised; its weights depend on `about` and `seed` alone."""

    def __init__(self, about: StudentAbout, seed: int) -> None:
        """Raises `StudentError` for what cannot be built from `about`."""
        super().__init__()
        self.about = about
        trunk = Blocks(build(about.architecture, classes=1, channels=about.channels, seed=seed))
        self.taps = trunk.taps
        self.units = nn.ModuleList(list(trunk.units)[: max(branch.block for branch in about.branches)])
        self.branches = nn.ModuleList(
            Branch(branch, self.taps[branch.block - 1].channels, derive(seed, "branch", at))
            for at, branch in enumerate(about.branches)
        )
        owners = torch.zeros(about.classes)
        for at, branch in enumerate(about.branches):
            owners[list(branch.classes)] += 1
            self.register_buffer(f"classes{at}", torch.tensor(branch.classes), persistent=False)
        self.register_buffer("owners", owners, persistent=False)

    def branched(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return scores (n, classes) and each branch's outputs.

        A class's score is the mean of the outputs of the branches that know it.
        """
        features, outputs = images, dict[int, Tensor]()
        for block, unit in enumerate(self.units, 1):
            features = unit(features)
            for at, (about, branch) in enumerate(zip(self.about.branches, self.branches, strict=True)):
                if about.block == block:
                    outputs[at] = branch(features)
        found = tuple(outputs[at] for at in range(len(self.branches)))
        scores = found[0].new_zeros(images.shape[0], self.about.classes)  # len() would fix the number for export
        for at, (about, each) in enumerate(zip(self.about.branches, found, strict=True)):
            scores = scores.index_add(
                1, self.get_buffer(f"classes{at}"), each[:, : len(about.classes)].to(scores.dtype)
            )
        assert isinstance(self.owners, Tensor)
        return scores / self.owners.to(scores.dtype), found

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores (n, classes) of normalised images (n, C, H, W)."""
        return self.branched(images)[0]


def trimmed(about: StudentAbout) -> StudentAbout:
    """Return the description of the finished student: without outputs that no score is made of."""
    return about.model_copy(
        update={"branches": tuple(branch.model_copy(update={"others": 0}) for branch in about.branches)}
    )


def finished(student: FilteredStudent) -> FilteredStudent:
    """Return the student without outputs that no score is made of, a copy with the same scores, in evaluation mode."""
    made = FilteredStudent(trimmed(student.about), 0)
    wanted = {name: held.shape for name, held in made.state_dict().items()}
    # only heads are smaller, and their wanted rows come first
    made.load_state_dict(
        {name: held[: wanted[name][0]] if held.ndim else held for name, held in student.state_dict().items()}
    )
    return made.eval()


def read_about(told: Any) -> StudentAbout:
    """Return the description that JSON values tell, which may be a stranger's. Raises `StudentError`."""
    try:
        return StudentAbout.model_validate(told)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StudentError(
            f"A student's description is not one: {where or 'it'}: {first['msg']}",
            hint="Restore the student's files, or train again",
        ) from None


def rebuild(about: StudentAbout) -> FilteredStudent:
    """Return the untrained network of a description, which may be a stranger's; weights come by `load_model`.

    Raises `StudentError` for architectures that are none of ours, blocks that these have not, branches without filters
    whose channels are not the trunk's, and more than `MOST_PARAMETERS`.
    """
    trunk = skeleton(about.architecture, 1, channels=about.channels)
    for branch in about.branches:
        own = skeleton(branch.architecture, 1)
        if branch.block > min(trunk.count, own.count):
            raise StudentError(
                f"Branch {branch.task!r} leaves from block {branch.block}; {about.architecture} has {trunk.count} and "
                f"{branch.architecture} {own.count}",
                hint="Restore the student's files, or train again",
            )
        if not branch.filters and own.taps[branch.block - 1].channels != trunk.taps[branch.block - 1].channels:
            raise StudentError(
                f"Branch {branch.task!r} has no filter that would bring the trunk's channels to its own",
                hint="Restore the student's files, or train again",
            )
    if (size := parameters(about).total) > MOST_PARAMETERS:
        raise StudentError(
            f"The student has {size:,} parameters; allowed are {MOST_PARAMETERS:,}",
            hint="Restore the student's files, or choose narrower architectures",
        )
    return FilteredStudent(about, 0)


def parameters(about: StudentAbout) -> Parts:
    """Return how many parameters a student of this description has, without building it."""
    with torch.device("meta"):
        student = FilteredStudent(about, 0)
    branches = [branch for branch in student.branches if isinstance(branch, Branch)]
    return Parts(
        _count(student.units),
        sum(_count(branch.filters) for branch in branches),
        tuple(_count(branch.blocks) for branch in branches),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
