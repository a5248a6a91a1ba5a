"""Claim: what a site counts as spent is never less than what left, whatever kills it and however many write at once.

Crash points: a process of its own answers questions under a limit, behind a mechanism, and writes down, after each,
what left; it is killed by SIGKILL at a random moment, mostly while it answers. After every kill the ledger is opened,
and so verified, anew; each sample that left must be counted, and so must be its use of the mechanism, and it must have
left as the same bytes as before (the bytes that are scored are random: equal ones are kept ones). Where each kill
struck is read off what it left behind: one that left new bytes without a row struck before the row, one whose head
tells of fewer rows than there are before the head, one that left rows of which nothing left before the answer. Writers:
as many processes at once ask about the same samples under one limit.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.client.ledger import Ledger
from consilience.client.policy import RefusedError, check_budget
from consilience.client.privacy.events import NoisyOutputs
from consilience.client.privacy.spending import entries_of
from consilience.client.released import Released
from consilience.common.errors import LedgerError
from consilience.common.protocol import Question
from consilience.common.settings import Limits, Policy
from harness import options, show

WIDTH = 16
"""Bytes of a sample's answer."""
NOISE = NoisyOutputs(sigma=40.0, count=1)
"""The mechanism that every answer is said to be behind."""
OFTEN = 2_000
"""Samples that half of all questions are about, so that many were asked about before."""


class Bench:
    """A site's ledger and released answers in a folder, and the transcript of what left."""

    def __init__(self, folder: Path, size: int, lifetime: int) -> None:
        self.folder, self.size = folder, size
        self.policy = Policy(limits=Limits(per_job=None, per_month=None, lifetime=lifetime))
        folder.mkdir(exist_ok=True)

    def open(self) -> Ledger:
        """Open the ledger, which verifies it."""
        return Ledger(self.folder / "ledger.db", self.folder / "ledger.head")

    def answer(self, seed: int, questions: int | None, ready: int | None = None) -> None:
        """Answer random questions, and write down what left: range and bytes, a line each.

        `ready`: where to write when it begins.
        """
        chance = random.Random(seed)
        ledger = self.open()
        released = Released(self.folder / "released", ledger)
        transcript = os.open(self.folder / f"left-{seed}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        asked = 0
        if ready is not None:
            os.write(ready, b".")
        while questions is None or asked < questions:
            asked += 1
            start = chance.randrange(chance.choice((min(OFTEN, self.size), self.size)))
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
                    costs=lambda samples: entries_of("bench", (NOISE.model_copy(update={"count": samples}),)),
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

    def head_rows(self) -> int:
        """Return the rows that the head tells of; 0 where there is none."""
        path = self.folder / "ledger.head"
        return int(json.loads(path.read_text())["rows"]) if path.exists() else 0

    def unowned(self, ledger: Ledger) -> dict[int, bytes]:
        """Return the bytes of samples that are kept and of which no row tells."""
        files = list((self.folder / "released").rglob("*.bin"))
        if not files:
            return {}
        data = np.fromfile(files[0], np.uint8)
        kept = np.pad(data, (0, -len(data) % WIDTH)).reshape(-1, WIDTH)
        written: NDArray[np.bool_] = np.asarray(kept.any(axis=1), np.bool_)
        for row in ledger.rows():
            for start, stop in row.entry.body.get("ranges", ()):
                written[start:stop] = False
        return {int(i): kept[i].tobytes() for i in np.flatnonzero(written)}


def uses(ledger: Ledger) -> int:
    """Return how often the ledger says that the mechanism was used; -1 where samples left behind none."""
    found = ledger.spent.mechanisms
    return -1 if any(key[2] == "none" for key in found) else found.total()


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


def kill(bench: Bench, seed: int, chance: random.Random) -> None:
    """Let a process answer, and kill it: mostly while it answers, sometimes as it starts."""
    told, ready = os.pipe()
    child = fork(partial(bench.answer, seed, None, ready))
    os.close(ready)
    if chance.random() < 0.9:
        os.read(told, 1)
    os.close(told)
    time.sleep(chance.uniform(0.0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def crashes(home: Path, kills: int) -> dict[str, Any]:
    """Kill a process again and again; a folder is used for some kills, then another one."""
    chance, found = random.Random(0), Counter[str]()
    while found["kills"] < kills:
        bench = Bench(home / f"crash-{found['folders']}", size=100_000, lifetime=90_000)
        found["folders"] += 1
        spent, rows, left, unowned = 0, 0, dict[int, str](), dict[int, bytes]()
        for seed in range(min(25, kills - found["kills"])):
            kill(bench, seed, chance)
            found["kills"] += 1
            head = bench.head_rows()
            try:
                ledger = bench.open()
            except LedgerError as error:
                found["unverified"] += 1
                print(error, file=sys.stderr)
                break
            before, had = unowned, spent - len(left)
            spent, rows, unowned = ledger.spent.lifetime, ledger.count, bench.unowned(ledger)
            left, other = bench.left()
            found["before_row"] += any(before.get(sample) != data for sample, data in unowned.items())
            found["before_head"] += head < rows
            found["before_answer"] += head == rows and spent - len(left) > had
            found["uncounted"] += spent < len(left)
            found["uncounted_uses"] += uses(ledger) < len(left)
            found["other_bytes"] += other
            ledger.close()
        found["rows"] += rows
        found["spent"] += spent
        found["left"] += len(left)
    return {name: found[name] for name in FOUND}


FOUND = ("kills", "folders", "before_row", "before_head", "before_answer", "unverified", "uncounted", "uncounted_uses")
FOUND += ("other_bytes", "rows", "spent", "left")


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
        "uses": uses(ledger),
        "limit": 4_000,
        "other_bytes": other,
        "head_rows": bench.head_rows(),
    }


def main() -> None:
    arguments = options(__doc__)
    kills, count = (20, 5) if arguments.quick else (1_000, 50)
    with tempfile.TemporaryDirectory() as name:
        crash, write = crashes(Path(name), kills), writers(Path(name), count)
    inside = crash["before_row"] + crash["before_head"]
    rows = [
        ("kill -9", str(crash["kills"]), f"{crash['rows']:,} rows, {crash['spent']:,} samples spent"),
        ("between bytes and row", str(crash["before_row"]), "kept bytes without a row"),
        ("between row and head", str(crash["before_head"]), "a row of which the head does not tell"),
        ("between head and answer", str(crash["before_answer"]), "counted, and did not leave"),
        ("ledgers that did not verify", str(crash["unverified"]), "bar: 0"),
        ("times less was spent than left", str(crash["uncounted"]), f"bar: 0; {crash['left']:,} samples left"),
        ("times fewer uses were told than left", str(crash["uncounted_uses"]), "bar: 0; of the mechanism"),
        ("samples that left as other bytes", str(crash["other_bytes"]), "bar: 0"),
        ("writers at once", str(write["writers"]), f"{write['questions']:,} questions in {write['seconds']:.1f} s"),
        ("writers that failed", str(write["failed"]), "bar: 0"),
        ("samples spent by them", f"{write['spent']:,}", f"limit {write['limit']:,}; {write['left']:,} left"),
        ("uses of the mechanism by them", f"{write['uses']:,}", "bar: as many as samples spent"),
        ("samples that left as other bytes", str(write["other_bytes"]), "bar: 0"),
    ]
    figures = {"crashes": crash, "writers": write}
    show("The ledger under crashes and concurrent writers", ("", "count", ""), rows, figures, arguments.json)
    bad = sum(crash[name] for name in ("unverified", "uncounted", "uncounted_uses", "other_bytes"))
    bad += write["failed"] + write["other_bytes"] + (write["spent"] != write["uses"])
    bad += 0 if inside or arguments.quick else 1  # kills that strike nowhere show nothing
    if bad or write["spent"] < write["left"] or write["spent"] > write["limit"] or write["rows"] != write["head_rows"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
