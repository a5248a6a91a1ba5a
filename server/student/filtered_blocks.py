"""Block-wise training of filtered amalgamation (Ye et al., IJCAI 2019; methods.md 3.2, step 2).

Lives here: the shared trunk with its filters, the loss of one block, training block by block, and how far the outputs
are from the teachers' on samples held out. Does not live here: tails (tails), the loss l and tasks (filtered_tasks),
what is made of the trunk (filtered_branches).

    L_u^b = sum_m l( A_m^{b+1..B}( f_m^b( F_u^b(x))), A_m(x))

F_u^b is the trunk's feature at block b, f_m^b the filter of teacher m there, A_m^{b+1..B} its frozen tail. With filters
for tasks each wanted task of a teacher has a second filter after the teacher's, and goes through the tail by itself.

Blocks are trained in their order, each on top of those before it, which stay as they are. The paper's code may train
the whole trunk up to b; then the filters of earlier blocks, which the choice of branches compares, would be of a trunk
that is no longer there. Where all are to be trained at once, blocks are `sampled`: each step trains the trunk up to a
block that is drawn for the batch, for as many epochs in all. Blocks before the first one that some tail takes are
trained with that one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from consilience.common.epochs import EpochRecord
from consilience.common.files import canonical_json, sha256
from consilience.common.nets import Parted, train
from consilience.common.nets.batches import Normalise
from consilience.common.nets.blocks import Blocks
from consilience.common.nets.seeding import seeded
from consilience.common.preprocessing import ImageRows, fit_shape
from consilience.common.seeds import derive
from consilience.common.settings import Fit, Preprocessing
from consilience.server.student.filtered_filter import Filter
from consilience.server.student.filtered_tasks import Matter
from consilience.server.student.tails import need_one_layout, through

Level = Literal["teacher", "task"]
"""Whether tasks of one teacher share its filter, or each has a second one."""


@dataclass(frozen=True)
class Stream:
    """What goes through one tail at once: a teacher's number, and the tasks that its outputs are compared for."""

    teacher: int
    tasks: tuple[int, ...]


class Filters(nn.Module):
    """The filters at one block, of every teacher whose tail takes its features."""

    def __init__(self, channels: int, block: int, matter: Matter, level: Level) -> None:
        super().__init__()
        here = [at for at, teacher in enumerate(matter.teachers) if teacher.tail.first <= block and matter.tasks_of(at)]
        widths = {at: matter.teachers[at].tail.taps[block - 1].channels for at in here}
        self.teachers = nn.ModuleDict({str(at): Filter(channels, width) for at, width in widths.items()})
        parted = {task: at for at in here for task in matter.tasks_of(at)} if level == "task" else {}
        self.tasks = nn.ModuleDict({str(task): Filter(widths[at], widths[at]) for task, at in parted.items()})
        self.streams = tuple(
            Stream(at, tasks)
            for at in here
            for tasks in ([(task,) for task in matter.tasks_of(at)] if parted else [matter.tasks_of(at)])
        )

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return each stream's features (n, C_m, H, W) of the trunk's (n, C, H, W)."""
        shared = {at: each(features) for at, each in self.teachers.items()}
        return tuple(
            self.tasks[str(stream.tasks[0])](shared[str(stream.teacher)])
            if len(self.tasks)
            else shared[str(stream.teacher)]
            for stream in self.streams
        )

    def chain(self, teacher: int, task: int) -> list[nn.Module]:
        """Return the filters that a task's features go through, in turn."""
        own = [self.tasks[str(task)]] if str(task) in self.tasks else []
        return [self.teachers[str(teacher)], *own]


class FilteredTrunk(nn.Module):
    """The student's blocks without a head, and filters at every block that some tail takes: `stages`.

    `network` is one of ours, freshly built; the trunk shares its weights.
    """

    def __init__(self, network: nn.Module, architecture: str, matter: Matter, level: Level, seed: int) -> None:
        """Raises `StudentError` for a network that cannot be cut, and for teachers of another layout."""
        super().__init__()
        blocks = Blocks(network)
        asked = [teacher.tail for at, teacher in enumerate(matter.teachers) if matter.tasks_of(at)]
        need_one_layout(blocks.taps, architecture, asked)
        self.architecture, self.taps = architecture, blocks.taps
        self.units = nn.ModuleList(list(blocks.units)[:-1])
        self.stages = tuple(range(min(tail.first for tail in asked), len(self.units) + 1))
        with seeded(derive(seed, "filters")):
            made = [Filters(self.taps[block - 1].channels, block, matter, level) for block in self.stages]
        self.filters = nn.ModuleList(made)

    def at(self, block: int) -> Filters:
        """Return the filters at a block of `stages`."""
        found = self.filters[self.stages.index(block)]
        assert isinstance(found, Filters)
        return found


class Stage(nn.Module):
    """What one training sees of `trunk`: the blocks up to the last of `blocks`, and the filters at these.

    The first `done` blocks stay as they are, batch normalisation included. Gives a row of numbers a sample, which no
    loss uses, and each block's streams.
    """

    def __init__(self, trunk: FilteredTrunk, blocks: Sequence[int], done: int = 0) -> None:
        super().__init__()
        self.blocks, self.done = tuple(blocks), done
        self.units = nn.ModuleList(list(trunk.units)[: max(blocks)])
        self.filters = nn.ModuleList(trunk.at(block) for block in blocks)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[tuple[Tensor, ...], ...]]:
        """Map normalised images (n, C, H, W)."""
        features, found = images, []
        filters = dict(zip(self.blocks, self.filters, strict=True))
        for block, unit in enumerate(self.units, 1):
            features = unit(features)
            if block in filters:
                found.append(filters[block](features))
        return features.mean(dim=(2, 3)), tuple(found)

    def train(self, mode: bool = True) -> Stage:
        """Set the mode of what is trained; the rest is in evaluation mode."""
        super().train(mode)
        for unit in list(self.units)[: self.done]:
            unit.eval()
        return self

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Let the first `done` blocks' weights be for a while."""
        held = [parameter for unit in list(self.units)[: self.done] for parameter in unit.parameters()]
        for parameter in held:
            parameter.requires_grad = False
        try:
            yield
        finally:
            for parameter in held:
                parameter.requires_grad = True


class BlockLoss:
    """L_u^b of what a `Stage` gives; with several blocks, of one that the batch's samples and `seed` decide.

    A teacher's part is its mean over the samples of the batch that it answered; terms are by site. `fingerprint` names
    what the answers are.
    """

    def __init__(self, stage: Stage, matter: Matter, fingerprint: str, seed: int) -> None:
        self._blocks, self._matter, self._seed = stage.blocks, matter, seed
        self._streams = [filters.streams for filters in stage.filters if isinstance(filters, Filters)]
        about = [stage.blocks, stage.done, seed]
        self.fingerprint = f"filtered blocks {sha256(canonical_json(about))} {fingerprint}"

    def __call__(self, output: tuple[Tensor, tuple[tuple[Tensor, ...], ...]], ids: Tensor) -> Parted:
        """Return the loss of the samples `ids` (b,)."""
        numbers = ids.cpu().numpy()
        at = self._drawn(numbers)
        total = 0 * output[0].sum()  # a gradient, if only of zeros, where nobody answered
        terms = {self._site(stream): torch.zeros_like(total) for streams in self._streams for stream in streams}
        for stream, _, each in losses(self._matter, self._blocks[at], self._streams[at], output[1][at], numbers):
            if len(each):
                total = total + each.mean()
                terms[self._site(stream)] = terms[self._site(stream)] + each.mean().detach()
        return Parted(total, terms)

    def _site(self, stream: Stream) -> str:
        return self._matter.teachers[stream.teacher].tail.site

    def _drawn(self, ids: NDArray[np.int64]) -> int:
        if len(self._blocks) == 1:
            return 0
        return derive(self._seed, f"block {sha256(np.ascontiguousarray(ids).data)}") % len(self._blocks)


def losses(
    matter: Matter, block: int, streams: Sequence[Stream], features: Sequence[Tensor], ids: NDArray[np.int64]
) -> Iterator[tuple[Stream, int, Tensor]]:
    """Yield the stream, the number and l (b_i,) of each task at `block`, of the samples `ids` that were answered."""
    known = [matter.known(stream.teacher, ids) for stream in streams]
    pairs = zip(features, known, strict=True)
    given = [each if len(at) == len(ids) else each[torch.from_numpy(at).to(each.device)] for each, at in pairs]
    outputs = through([matter.teachers[stream.teacher].tail for stream in streams], block, given)
    for stream, told, at in zip(streams, outputs, known, strict=True):
        for task in stream.tasks:
            yield stream, task, matter.of_tail(matter.tasks[task], told, ids[at])


def train_blocks(
    trunk: FilteredTrunk,
    matter: Matter,
    images: ImageRows,
    fit: Fit,
    preprocessing: Preprocessing,
    *,
    seed: int,
    fingerprint: str,
    folder: Path | None = None,
    sampled: bool = False,
    device: torch.device | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> dict[str, list[EpochRecord]]:
    """Train trunk and filters on `images` (m, H, W, C), `fit.epochs` a block; return the epochs by block.

    Sampled, blocks are trained together, under the name `sampled`, for as many epochs as all have. Goes on where it was
    interrupted, as `nets.train`; each block has a folder in `folder`. The trunk is left on `device` in evaluation mode.
    Raises as `nets.train`.
    """
    blocks = trunk.stages
    if any(teacher.tail.remote for teacher in matter.teachers):
        fit = fit.model_copy(update={"precision": "f32"})  # measuring another would cost rounds
    if sampled:
        fit = fit.model_copy(update={"epochs": fit.epochs * len(blocks)})
    jobs = [("sampled", blocks, 0)] if sampled else []
    befores = [0, *blocks[:-1]]
    jobs += [] if sampled else [(f"block{b}", (b,), before) for b, before in zip(blocks, befores, strict=True)]
    found = {}
    for name, some, done in jobs:
        stage = Stage(trunk, some, done)
        loss = BlockLoss(stage, matter, fingerprint, derive(seed, "blocks"))
        with stage.holding():
            found[name] = train(
                stage,
                images,
                loss,
                fit,
                preprocessing,
                seed=derive(seed, name),
                folder=None if folder is None else folder / name,
                on_epoch=on_epoch,
                device=device,
            )
    trunk.eval()
    return found


@torch.no_grad()
def agreement(
    trunk: FilteredTrunk,
    matter: Matter,
    images: ImageRows,
    preprocessing: Preprocessing,
    device: torch.device,
    batch: int,
) -> NDArray[np.float64]:
    """Return (blocks, tasks): the mean l of each task at each of `trunk.stages`; NaN where no tail takes it.

    `images` (m, H, W, C) are those of `matter.samples`, held out of training; a task's mean is over those that its
    teacher answered, NaN where there are none. The trunk is left on `device` in evaluation mode.
    """
    stage = Stage(trunk, trunk.stages).to(device).eval()
    normalise = Normalise(preprocessing, device)
    sums, counts = np.zeros((2, len(trunk.stages), len(matter.tasks)))
    for start in range(0, len(images), batch):
        ids = np.arange(start, min(start + batch, len(images)))
        shaped = torch.from_numpy(fit_shape(np.array(images[ids]), preprocessing)).to(device)
        for at, features in enumerate(stage(normalise(shaped))[1]):
            streams = trunk.at(trunk.stages[at]).streams
            for _, task, each in losses(matter, trunk.stages[at], streams, features, ids):
                sums[at, task] += float(each.double().sum())
                counts[at, task] += len(each)
    with np.errstate(invalid="ignore"):
        return np.asarray(sums / counts)
