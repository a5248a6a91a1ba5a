"""The one training loop, for teachers and students.

Lives here: order of samples, learning rate, steps, checkpoints. Does not live here: what is learned from (a loss,
see losses), pixels (batches), the choice of arithmetic (precision), inference (inference).

A training's result depends on its arguments alone (and on machine, threads and precision): every epoch derives its
random numbers from the seed, so an interrupted training goes on as if nothing had happened.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from consilience.common.epochs import EpochRecord
from consilience.common.errors import StudentError
from consilience.common.files import canonical_json, sha256
from consilience.common.nets import checkpoint
from consilience.common.nets.batches import Pixels, Windows, default_device
from consilience.common.nets.losses import Loss, Parted
from consilience.common.nets.optimizers import plain
from consilience.common.nets.precision import decide
from consilience.common.nets.seeding import generator, seeded
from consilience.common.preprocessing import ImageRows
from consilience.common.seeds import derive
from consilience.common.settings import Fit, Preprocessing

WARM_UP = 0.2
"""Share of all steps in which the learning rate rises."""
SECONDS_BETWEEN_CHECKPOINTS = 1.0
"""What a crash may cost, at most, beside the epoch it falls into."""
LARGE = 2**18
"""Numbers from which a matrix is updated in one pass over the memory: several would cost more than the products."""
FINGERPRINT_IMAGES = 256
"""Images, spread evenly, whose bytes tell one training's data from another's."""


def train(
    model: nn.Module,
    images: ImageRows,
    loss: Loss,
    fit: Fit,
    preprocessing: Preprocessing,
    *,
    seed: int,
    folder: Path | None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    device: torch.device | None = None,
) -> list[EpochRecord]:
    """Train `model` from the weights it has on `images` (n, H, W, C) uint8 under `loss`; return one record an epoch.

    SGD with Nesterov momentum under a one-cycle learning rate. The model, all that it holds, is trained in place and
    left on `device` in evaluation mode; it gives logits or a tuple of which they are the first. With a `folder`, a
    second call with the same arguments goes on where the first was interrupted, to the same weights bit for bit on a
    CPU, and returns at once when it was finished; what other arguments left there is overwritten. `on_epoch` gets each
    record once its epoch is done. An epoch's last, partial batch is left out. Raises `StudentError` without images, for
    a network that does not fit them, and when the loss is no longer finite; `StorageError` when the folder cannot be
    written.
    """
    if not len(images):
        raise StudentError("There are no images to train on", hint="Name data with at least one image")
    device = device or default_device()
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = sgd(model, fit)
    key = _key(model, images, loss, fit, preprocessing, seed)
    path = folder / "checkpoint.safetensors" if folder is not None else None
    records = checkpoint.records(path, key) if path is not None else []
    if path is not None and records:
        checkpoint.restore(path, model, optimizer)
    if len(records) < fit.epochs:
        run = _Run(model, Pixels(images, preprocessing, device), loss, fit, optimizer, seed)
        run.check_shapes()
        run.bf16 = decide(fit, device, fit.epochs * run.steps, run.trial(), folder, key)
        saved = time.perf_counter()
        for epoch in range(len(records), fit.epochs):
            record = run.epoch(epoch)
            records.append(record)
            now = time.perf_counter()
            if path is not None and (epoch + 1 == fit.epochs or now - saved >= SECONDS_BETWEEN_CHECKPOINTS):
                checkpoint.save(path, key, model, optimizer, records)
                saved = time.perf_counter()
            if on_epoch is not None:
                on_epoch(record)
    model.eval()
    return records


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of `step` in [0, steps): linear up to `peak`, then half a cosine down towards 0."""
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * (1 + math.cos(math.pi * (step + 1 - rising) / (steps + 1 - rising))) / 2


class _Run:
    """One training's parts, and one epoch of it."""

    def __init__(
        self, model: nn.Module, pixels: Pixels, loss: Loss, fit: Fit, optimizer: torch.optim.Optimizer, seed: int
    ) -> None:
        self.model, self.pixels, self.loss, self.fit, self.optimizer = model, pixels, loss, fit, optimizer
        self.seed, self.device = seed, pixels.device
        self.bf16 = False
        # Batch normalisation cannot learn from one value a channel: two images at least, if need be the same one.
        self.batch = min(max(fit.batch_size, 2), max(len(pixels), 2))
        self.steps = max(len(pixels) // self.batch, 1)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(model) if fit.compile else model
        self.draws = any(_draws(module) for module in model.modules())

    def epoch(self, epoch: int) -> EpochRecord:
        """Train one epoch. Raises `StudentError` when its loss or the weights are not finite."""
        began = time.perf_counter()
        self.model.train()
        total, terms = torch.zeros((), device=self.device), dict[str, Tensor]()
        first, steps = epoch * self.steps, self.fit.epochs * self.steps
        rates = [one_cycle(first + step, steps, self.fit.learning_rate) for step in range(self.steps)]
        order, windows = self._plan(epoch)
        with self._alone(epoch):
            for step, rate in enumerate(rates):
                part = slice(step * self.batch, (step + 1) * self.batch)
                ids, cut = order[part].to(self.device, non_blocking=True), windows and windows[part]
                value, parts = self._step(self.forward, self.optimizer, ids, cut, rate, self.bf16)
                total += value
                for name, term in parts.items():
                    terms[name] = terms.get(name, 0) + term.detach()
        mean = total.item() / self.steps
        # One look an epoch: looking at every step would make a GPU wait for each.
        finite = math.isfinite(mean) and all(bool(p.isfinite().all()) for p in self.model.parameters())
        if not finite:
            raise StudentError(
                f"Training failed in epoch {epoch + 1} of {self.fit.epochs}: the loss is {mean:.4g} at learning rate "
                f"{rates[-1]:.4g} (peak {self.fit.learning_rate:.4g}), and it or the weights are not finite",
                hint=f"Lower fit.learning_rate, for example to {self.fit.learning_rate / 4:.2g}",
            )
        means = {name: held.item() / self.steps for name, held in terms.items()}
        return EpochRecord(epoch, mean, rates[-1], time.perf_counter() - began, means)

    def _plan(self, epoch: int) -> tuple[Tensor, Windows | None]:
        """Return the epoch's order of sample ids and the windows for it."""
        n = len(self.pixels)
        order = torch.randperm(n, generator=generator(self.seed, "order", epoch))
        if n < self.batch:
            order = order.repeat(self.batch)
        if not self.fit.augment:
            return order, None
        drawn = Windows.draw(
            len(order), self.pixels.shape[:2], generator(self.seed, "windows", epoch), flip=self.fit.mirror
        )
        return order, drawn

    def _step(
        self,
        forward: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        ids: Tensor,
        windows: Windows | None,
        rate: float,
        bf16: bool,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """One step of the optimizer; return the detached loss and its terms. Only the network runs in bf16, no loss."""
        inputs = self.pixels.batch(ids, windows)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            output = forward(inputs)
        told = self.loss(_single(output), ids)
        value, terms = (told.total, told.terms) if isinstance(told, Parted) else (told, {})
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(value)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        return value.detach(), terms

    def trial(self) -> Callable[[bool], None]:
        """Return a function that does one step in f32 or bf16 on a copy of the model, made at the first call."""
        made: list[tuple[nn.Module, torch.optim.Optimizer, Tensor, Windows | None]] = []

        def step(bf16: bool) -> None:
            if not made:
                model = copy.deepcopy(self.model).train()
                order, windows = self._plan(0)
                first = slice(self.batch)
                made.append((model, sgd(model, self.fit), order[first].to(self.device), windows and windows[first]))
            with self._alone(0):
                self._step(*made[0], rate=0.0, bf16=bf16)

        return step

    def check_shapes(self) -> None:
        """Raise `StudentError` when the network does not give one row of scores an image."""
        height, width, channels = self.pixels.shape
        what = f"images of {height}x{width} pixels and {channels} channels"
        inputs = self.pixels.batch(torch.zeros(2, dtype=torch.int64, device=self.device), None)
        try:
            with torch.inference_mode():
                output = self.model.eval()(inputs)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise StudentError(
                f"The network does not take {what}: {str(error).splitlines()[0]}",
                hint="Set preprocessing.size or channels, or choose another architecture",
            ) from error
        logits = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 2:
            raise StudentError(
                f"The network does not give one row of scores for {what}", hint="Choose another architecture"
            )

    def _alone(self, epoch: int) -> AbstractContextManager[None]:
        """Own the global generator for an epoch, if the network draws from it; trainings of such take turns."""
        return seeded(derive(self.seed, "layers", epoch), self.device) if self.draws else nullcontext()


def _single(output: Any) -> Any:
    """Return what a network gives in float32: a tensor, or tensors in tuples."""
    return tuple(_single(part) for part in output) if isinstance(output, tuple) else output.float()


def _draws(module: nn.Module) -> bool:
    """Whether a layer draws random numbers in training: torch's dropouts and torchvision's stochastic depth."""
    return "Dropout" in type(module).__name__ or type(module).__name__ == "StochasticDepth"


def sgd(model: nn.Module, fit: Fit) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum; weight decay for weights alone, not for biases and normalisation."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    large = [p for p in parameters if p.ndim == 2 and p.numel() >= LARGE]
    known = {id(p) for p in large}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2 and id(p) not in known], "weight_decay": fit.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if large:
        groups.append({"params": large, "weight_decay": fit.weight_decay, "fused": True})
    return plain(torch.optim.SGD)(groups, lr=fit.learning_rate, momentum=0.9, nesterov=True)


def _digest(tensor: Tensor) -> str:
    return sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _key(model: nn.Module, images: ImageRows, loss: Loss, fit: Fit, preprocessing: Preprocessing, seed: int) -> str:
    """Return what tells one training from another: settings, the network and its weights, data and seed."""
    tensors = [[name, list(held.shape), str(held.dtype), _digest(held)] for name, held in model.state_dict().items()]
    some = np.unique(np.linspace(0, len(images) - 1, FINGERPRINT_IMAGES).astype(np.int64))
    return sha256(
        canonical_json(
            {
                "fit": fit.model_dump(mode="json"),
                "preprocessing": preprocessing.model_dump(mode="json"),
                "model": [type(model).__name__, tensors],
                "images": [list(images.shape), sha256(np.ascontiguousarray(images[some]).data)],
                "loss": [type(loss).__name__, getattr(loss, "fingerprint", "")],
                "seed": seed,
            }
        )
    )
