"""Claim: what a site counts as spent is never less than what left, whatever kills it and however many write at once.

Crash points: a process of its own answers questions under a limit and writes down, after each, what left; it is killed
by SIGKILL at a random moment. After every kill the ledger is opened, and so verified, anew; each sample that left must
be counted, and must have left as the same bytes as before (the bytes that are scored are random: equal ones are kept
ones). Writers: as many processes at once ask about the same samples under one limit.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from consilience.client.ledger import Ledger
from consilience.client.policy import RefusedError, check_budget
from consilience.client.released import Released
from consilience.common.errors import LedgerError
from consilience.common.protocol import Question
from consilience.common.settings import Limits, Policy
from harness import options, show

WIDTH = 16
"""Bytes of a sample's answer."""


class Bench:
    """A site's ledger and released answers in a folder, and the transcript of what left."""

    def __init__(self, folder: Path, size: int, lifetime: int) -> None:
        self.folder, self.size = folder, size
        self.policy = Policy(limits=Limits(per_job=None, per_month=None, lifetime=lifetime))
        folder.mkdir(exist_ok=True)

    def open(self) -> Ledger:
        """Open the ledger, which verifies it."""
        return Ledger(self.folder / "ledger.db", self.folder / "ledger.head")

    def answer(self, seed: int, questions: int | None) -> None:
        """Answer random questions, and write down what left: range and bytes, a line each."""
        chance = random.Random(seed)
        ledger = self.open()
        released = Released(self.folder / "released", ledger)
        transcript = os.open(self.folder / f"left-{seed}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        asked = 0
        while questions is None or asked < questions:
            asked += 1
            start = chance.randrange(self.size)
            stop = min(self.size, start + chance.randint(1, 64))
            question = Question(
                job="bench",
                pool="a" * 64,
                start=start,
                stop=stop,
                encoding="f32",
                teacher="b" * 64,
                policy=self.policy.version,
            )
            try:
                data = released.give(
                    question,
                    size=self.size,
                    width=WIDTH,
                    score=lambda new: os.urandom(int(new.sum()) * WIDTH),
                    permit=lambda samples: check_budget(self.policy, ledger, "bench", samples),
                    costs=lambda _: (),
                )
            except RefusedError:
                continue
            os.write(transcript, f"{start} {data.hex()}\n".encode())

    def left(self) -> tuple[dict[int, str], int]:
        """Return the bytes of every sample that left, and how often one left as other bytes than before."""
        held: dict[int, str] = {}
        other = 0
        for path in sorted(self.folder.glob("left-*")):
            for line in path.read_text().splitlines():
                start, _, data = line.partition(" ")
                for i in range(0, len(data) - 2 * WIDTH + 1, 2 * WIDTH):  # a line that a kill tore has fewer
                    sample, row = int(start) + i // (2 * WIDTH), data[i : i + 2 * WIDTH]
                    other += held.setdefault(sample, row) != row
        return held, other


def fork(work: Callable[[], None]) -> int:
    """Do `work` in a process of its own; return its id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{error!r}\n".encode())
        os._exit(1)


def crashes(home: Path, kills: int) -> dict[str, Any]:
    """Kill a process again and again; a folder is used for some kills, then another one."""
    chance = random.Random(0)
    found = {"kills": 0, "unverified": 0, "uncounted": 0, "other_bytes": 0, "rows": 0, "spent": 0, "left": 0}
    folder = 0
    while found["kills"] < kills:
        bench = Bench(home / f"crash-{folder}", size=4_000, lifetime=3_500)
        folder += 1
        spent, rows, left = 0, 0, dict[int, str]()
        for seed in range(min(25, kills - found["kills"])):
            child = fork(partial(bench.answer, seed, None))
            time.sleep(chance.uniform(0.0, 0.25))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found["kills"] += 1
            try:
                ledger = bench.open()
            except LedgerError as error:
                found["unverified"] += 1
                print(error, file=sys.stderr)
                break
            spent, rows = ledger.spent.lifetime, ledger.count
            ledger.close()
            left, other = bench.left()
            found["uncounted"] += spent < len(left)
            found["other_bytes"] += other
        found["rows"] += rows
        found["spent"] += spent
        found["left"] += len(left)
    return found


def writers(home: Path, count: int) -> dict[str, Any]:
    """Let processes answer at once; their limit is less than what they are asked about."""
    bench = Bench(home / "writers", size=6_000, lifetime=4_000)
    questions = 20
    began = time.perf_counter()
    children = [fork(partial(bench.answer, seed, questions)) for seed in range(count)]
    failed = sum(os.waitpid(child, 0)[1] != 0 for child in children)
    seconds = time.perf_counter() - began
    ledger = bench.open()
    left, other = bench.left()
    return {
        "writers": count,
        "failed": failed,
        "questions": count * questions,
        "seconds": seconds,
        "rows": ledger.count,
        "spent": ledger.spent.lifetime,
        "left": len(left),
        "limit": 4_000,
        "other_bytes": other,
        "head_rows": json.loads((bench.folder / "ledger.head").read_text())["rows"],
    }


def main() -> None:
    arguments = options(__doc__)
    kills, count = (20, 5) if arguments.quick else (1_000, 50)
    with tempfile.TemporaryDirectory() as name:
        crash, write = crashes(Path(name), kills), writers(Path(name), count)
    rows = [
        ("kill -9", str(crash["kills"]), f"{crash['rows']:,} rows, {crash['spent']:,} samples spent"),
        ("ledgers that did not verify", str(crash["unverified"]), "bar: 0"),
        ("times less was spent than left", str(crash["uncounted"]), f"bar: 0; {crash['left']:,} samples left"),
        ("samples that left as other bytes", str(crash["other_bytes"]), "bar: 0"),
        ("writers at once", str(write["writers"]), f"{write['questions']:,} questions in {write['seconds']:.1f} s"),
        ("writers that failed", str(write["failed"]), "bar: 0"),
        ("samples spent by them", f"{write['spent']:,}", f"limit {write['limit']:,}; {write['left']:,} left"),
        ("samples that left as other bytes", str(write["other_bytes"]), "bar: 0"),
    ]
    figures = {"crashes": crash, "writers": write}
    show("The ledger under crashes and concurrent writers", ("", "count", ""), rows, figures, arguments.json)
    bad = crash["unverified"] + crash["uncounted"] + crash["other_bytes"] + write["failed"] + write["other_bytes"]
    if bad or write["spent"] < write["left"] or write["spent"] > write["limit"] or write["rows"] != write["head_rows"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
