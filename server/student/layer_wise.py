"""Layer-wise parameter learning (Shen et al., AAAI 2019; methods.md 1.3): the student's layers, each by itself.

Lives here: one layer's problem, its training, and making one network of the layers. Does not live here: amalgamated
features (amalgamate), folding (folding) and the joint phase after it, which is the training loop (common/nets/loop)
under a loss of soft_labels or scores. That loop does not train a layer: it takes images of one size in bytes and a
network that gives scores, a layer takes stored features, amalgamated a block at a time. Checkpoints are the loop's.

    Fhat_a^l = layer_l(pool(activation(FAM^{l-1}(F_a^{l-1}))))      L = 1/2 |Fhat_a^l - F_a^l|^2

F_a^{l-1} is the *amalgamated* feature, not what the student's own layers give, so no layer waits for another. The
first layer takes the images and has no FAM. FAM, an affine map of channels, stands before the activation: an encoder's
output has no reason to survive a ReLU as it is. Afterwards it is folded into the layer before, and the student is a
plain network of its layout.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from consilience.common.epochs import EpochRecord
from consilience.common.errors import StudentError
from consilience.common.moments import Features
from consilience.common.nets import checkpoint
from consilience.common.nets.optimizers import plain
from consilience.common.nets.taps import Unit, units
from consilience.server.student.autoencoder import MOMENTUM, Affine, check_again
from consilience.server.student.folding import count, fold
from consilience.server.student.kept import keep, kept

SECONDS_BETWEEN_CHECKPOINTS = 30.0
"""What a crash may cost a layer, at most, beside the epoch it falls into."""

Blocks = Iterable[tuple[Features, Features | NDArray[np.int64]]]
"""Re-iterable pairs of a layer's input (b, C, H, W) and target (b, C', H', W') or, for the scores, (b, L); floating.

Each call of `iter` counts as a reading, whether it is read on or not. Where a schedule brings a loss, what it takes
stands in place of the target, such as the samples' ids (b,)."""


@dataclass(frozen=True)
class Schedule:
    """How one layer is trained: epochs and the constant learning rate of SGD with momentum 0.9.

    `loss`, a scalar of the layer's estimate and what its blocks bring as target: by default the squared error.
    """

    epochs: int
    learning_rate: float
    loss: Callable[[Any, Tensor], Any] | None = None


class Adapter(nn.Module):
    """FAM: an affine map of channels of (n, C, H, W), the identity to begin with."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, C, H, W) to the same shape."""
        return nn.functional.conv2d(features, self.weight[:, :, None, None], self.bias)

    def affine(self) -> Affine:
        """Return the map as it is now."""
        return Affine(*(held.detach().double().cpu().numpy() for held in (self.weight, self.bias)))


class Layer(nn.Module):
    """One layer's problem: FAM, None for the first layer, and the unit of the student that it belongs to."""

    def __init__(self, adapter: Adapter | None, unit: Unit) -> None:
        super().__init__()
        self.adapter, self.unit = adapter, unit

    def forward(self, features: Tensor) -> Tensor:
        """Map the amalgamated feature before, or images, (n, C, H, W) to this one's estimate."""
        estimate: Tensor = self.unit(features if self.adapter is None else self.adapter(features))
        return estimate


def layers(student: nn.Module) -> list[Layer]:
    """Return the problems of `student`, one of ours (NAME@TIMES): one a tap, in order.

    They share the student's weights. Raises `StudentError` for a network that is none of ours.
    """
    found = units(student)
    adapters = [None, *(Adapter(unit.tap.channels) for unit in found[:-1])]
    return [Layer(adapter, unit) for adapter, unit in zip(adapters, found, strict=True)]


def train_layer(
    layer: Layer,
    blocks: Blocks,
    schedule: Schedule,
    *,
    device: torch.device | None = None,
    stop: threading.Event | None = None,
    path: Path | None = None,
    key: str = "",
) -> list[float]:
    """Train `layer` on `blocks`, read once an epoch; return each epoch's mean loss, in the blocks' order.

    They are read once more for the statistics of batch normalisation, which in training are moving averages. Each
    block is one step on 1/2 |estimate - target|^2, summed over channels, mean over samples and positions. The layer is
    left on `device` (the CPU when None) in evaluation mode. Raises `StudentError` for blocks that can be read only once
    or hold no sample, for a target that the layer does not fit, and when the loss or a weight is no longer finite; each
    names the layer. Raises `CancelledError` at the next epoch once `stop` is set. With a `path`, a second call goes on
    from what the first, of the same `key`, left there.
    """
    check_again(blocks)
    layer.to(device or torch.device("cpu")).train()
    optimizer = plain(torch.optim.SGD)(layer.parameters(), lr=schedule.learning_rate, momentum=MOMENTUM)
    records = [] if path is None else checkpoint.records(path, key)
    if path is not None and records:
        checkpoint.restore(path, layer, optimizer)
        for _ in records:
            iter(blocks)  # each reading has an order of its own
    saved = time.perf_counter()
    for epoch in range(len(records), schedule.epochs):
        if stop is not None and stop.is_set():
            raise CancelledError
        began, total, steps = time.perf_counter(), torch.zeros((), device=device), 0
        for given, wanted in blocks:
            if not len(given):
                continue
            value = _loss(layer, given, wanted, schedule, device)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(value)
            optimizer.step()
            total, steps = total + value.detach(), steps + 1
        loss = _epoch_loss(layer, total, steps, f"epoch {epoch + 1} of {schedule.epochs}", schedule)
        now = time.perf_counter()
        records.append(EpochRecord(epoch, loss, schedule.learning_rate, now - began))
        if path is not None and now - saved >= SECONDS_BETWEEN_CHECKPOINTS:
            checkpoint.save(path, key, layer, optimizer, records)
            saved = time.perf_counter()
    count(layer, (given for given, _ in blocks))
    return [record.loss for record in records]


def train_layers(
    student: nn.Module,
    blocks: Sequence[Blocks],
    schedules: Sequence[Schedule],
    *,
    device: torch.device | None = None,
    workers: int = 1,
    folder: Path | None = None,
    key: str = "",
    on_layer: Callable[[], None] | None = None,
) -> list[list[float]]:
    """Train every layer of `student`, `workers` at a time, and join them; return each layer's losses by epoch.

    With a `folder`, each layer is kept there under the training's `key`, and a second call with the same goes
    on. Where one fails, or the caller is interrupted, the others end with their epoch. `on_layer` is called, by any
    thread, when one is done.

    `blocks[l]` and `schedules[l]` belong to tap l of `taps.taps(student)`; widths and sizes of the targets are the
    student's. The result does not depend on `workers`. The student is left on `device` in evaluation mode, every FAM
    folded: before a joint phase, call `folding.settle`. Raises `StudentError` as `train_layer`, for a student that is
    none of ours, and unless there is one of each a layer.
    """
    problems = layers(student)
    if not len(blocks) == len(schedules) == len(problems):
        raise StudentError(
            f"The student has {len(problems)} layers; given: blocks for {len(blocks)} and schedules for "
            f"{len(schedules)}",
            hint="Give one of each for every tap, the scores among them",
        )
    stop, pool = threading.Event(), ThreadPoolExecutor(max_workers=workers)
    try:
        started = [
            pool.submit(_once, layer, pairs, schedule, device, folder, key, on_layer, stop)
            for layer, pairs, schedule in zip(problems, blocks, schedules, strict=True)
        ]
        for done in as_completed(started):
            done.result()  # the first that fails ends the others, whichever layer it is
        losses = [each.result() for each in started]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    student.eval()
    join(problems)
    return losses


def kept_adapter(folder: Path, tap: str, key: str) -> Affine | None:
    """Return the FAM before the student's `tap` that `train_layers` kept in `folder` under `key`; None without it."""
    found = kept(folder / f"{tap}.safetensors", key)
    if found is None or "adapter.weight" not in found[0]:
        return None
    return Affine(*(found[0][f"adapter.{name}"].double().numpy() for name in ("weight", "bias")))


def join(problems: Sequence[Layer]) -> None:
    """Fold every FAM into the layer before it: the student that `problems` were made of then computes what they do.

    To be called once, with the layers in evaluation mode.
    """
    for before, layer in itertools.pairwise(problems):
        if layer.adapter is not None:
            fold(layer.adapter.affine(), before.unit)


def _once(
    layer: Layer,
    blocks: Blocks,
    schedule: Schedule,
    device: torch.device | None,
    folder: Path | None,
    key: str,
    on_layer: Callable[[], None] | None,
    stop: threading.Event,
) -> list[float]:
    """Train a layer, unless it lies in `folder`; return its losses. Raises `CancelledError` once `stop` is set."""
    path = None if folder is None else folder / f"{layer.unit.tap.name}.safetensors"
    found = None if path is None else kept(path, key)
    if found is None:
        under_way = None if path is None else path.with_suffix(".under-way.safetensors")
        losses = train_layer(layer, blocks, schedule, device=device, stop=stop, path=under_way, key=key)
        if path is not None and under_way is not None:
            keep(path, key, layer.state_dict(), losses)
            under_way.unlink(missing_ok=True)
    else:
        tensors, losses = found
        layer.to(device or torch.device("cpu")).load_state_dict(tensors)
        layer.eval()
    if on_layer is not None:
        on_layer()
    return losses


def _loss(
    layer: Layer, given: Features, wanted: NDArray[Any], schedule: Schedule, device: torch.device | None
) -> Tensor:
    inputs = _tensor(given, device)
    try:
        estimate = layer(inputs)
    except (RuntimeError, ValueError) as error:
        raise StudentError(
            f"The student's {layer.unit.tap.name} does not take features {tuple(inputs.shape)}: "
            f"{str(error).splitlines()[0]}",
            hint="Amalgamate the layer before into as many channels as the student has there, in blocks of two or more",
        ) from error
    if schedule.loss is not None:
        told: Tensor = schedule.loss(estimate, torch.tensor(wanted, device=device))
        return told
    target = _tensor(wanted, device)
    if estimate.shape != target.shape:
        raise StudentError(
            f"The student's {layer.unit.tap.name} gives features {tuple(estimate.shape)}; the amalgamated ones are "
            f"{tuple(target.shape)}",
            hint="Amalgamate into as many channels as the student has there, from images of the student's size",
        )
    loss: Tensor = (estimate - target).square().sum(dim=1).mean() / 2
    return loss


def _epoch_loss(layer: Layer, total: Tensor, steps: int, when: str, schedule: Schedule) -> float:
    """Return the mean loss of an epoch, after a look at it and at the weights."""
    name = layer.unit.tap.name
    if not steps:
        raise StudentError(f"There are no features to train the student's {name} on", hint="Give at least one block")
    mean = total.item() / steps
    if not math.isfinite(mean) or not all(bool(p.isfinite().all()) for p in layer.parameters()):
        rate = schedule.learning_rate
        raise StudentError(
            f"Training of the student's {name} failed in {when}: the loss is {mean:.4g} at learning rate {rate:.4g}, "
            "and it or the weights are not finite",
            hint="Lower student.layer_wise.learning_rate, for example to a quarter of what it is",
        )
    return mean


def _tensor(features: Features, device: torch.device | None) -> Tensor:
    return torch.tensor(features, dtype=torch.float32, device=device)  # a copy: a memory map may be read-only
