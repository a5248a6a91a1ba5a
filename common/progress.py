"""Progress on stderr: bars with time left on a terminal, plain lines elsewhere.

Lives here: how progress looks. Does not live here: results, which go to stdout (the command line prints them).
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_EVERY = 2.0
"""Seconds between two plain lines about one task."""


class Task:
    """One thing that advances from 0 to `total`."""

    def __init__(self, owner: Reporter, name: str, total: int, done: int) -> None:
        self._owner, self.name, self.total, self.done = owner, name, total, done
        self._began = self._said = time.monotonic()
        self._first = done
        self._bar: TaskID | None = None
        if owner.bars is not None:
            self._bar = owner.bars.add_task(name, total=total, completed=done)

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Say that `amount` more is done; `note` is shown beside the name."""
        self.done += amount
        label = f"{self.name}  {note}" if note else self.name
        if self._owner.bars is not None and self._bar is not None:
            self._owner.bars.update(self._bar, advance=amount, description=label)
            return
        now = time.monotonic()
        ends = self.done >= self.total and now - self._began >= LINE_EVERY
        if ends or now - self._said >= LINE_EVERY:
            self._said = now
            rate = (self.done - self._first) / max(now - self._began, 1e-9)
            left = f", {(self.total - self.done) / rate:.0f} s left" if rate > 0 and self.done < self.total else ""
            self._owner.say(f"{label}: {self.done}/{self.total}{left}")


class Reporter:
    """Shows tasks and lines on stderr. Use it as a context manager; `quiet` shows nothing."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._quiet = quiet
        self.bars: Progress | None = None
        if self._console.is_terminal and not quiet:
            self.bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )

    def __enter__(self) -> Self:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()

    def say(self, line: str) -> None:
        """Print one line."""
        if not self._quiet:
            self._console.print(line, markup=False, soft_wrap=True)

    def start(self, name: str, total: int, done: int = 0) -> Task:
        """Show a task that goes from `done` to `total`; its bar stays when it is complete."""
        return Task(self, name, total, done)
