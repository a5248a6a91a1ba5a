"""A training's progress bar, for whoever calls `train`."""

from __future__ import annotations

from collections.abc import Callable

from consilience.common.nets.checkpoint import EpochRecord
from consilience.common.progress import Reporter, Task


def epoch_task(reporter: Reporter, name: str, epochs: int) -> Callable[[EpochRecord], None]:
    """Return an `on_epoch` that shows the epochs; nothing is shown when none is trained."""
    tasks: list[Task] = []

    def on_epoch(record: EpochRecord) -> None:
        if not tasks:
            tasks.append(reporter.start(name, epochs, done=record.epoch))
        tasks[0].advance(1, f"loss {record.loss:.3f}")

    return on_epoch
