"""What is told of a training's epochs: the record, and the progress bar for whoever calls `train`.

Does not live here: the training (common/nets/loop). Free of torch, for those who load a record or show a bar.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from consilience.common.progress import Reporter, Task


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: its index from 0, mean loss, the last step's learning rate, and its seconds of training.

    `terms`: the means of what the loss is made of, by name, where it tells.
    """

    epoch: int
    loss: float
    learning_rate: float
    seconds: float
    terms: Mapping[str, float] = field(default_factory=dict)


def epoch_task(reporter: Reporter, name: str, epochs: int) -> Callable[[EpochRecord], None]:
    """Return an `on_epoch` that shows the epochs; nothing is shown when none is trained."""
    tasks: list[Task] = []

    def on_epoch(record: EpochRecord) -> None:
        if not tasks:
            tasks.append(reporter.start(name, epochs, done=record.epoch))
        tasks[0].advance(1, f"loss {record.loss:.3f}")

    return on_epoch
