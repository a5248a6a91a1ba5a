"""Beginning another ledger where one is damaged or an older copy is all that there is: what was spent stays spent.

Does not live here: the ledger (client/ledger). Only a person at the site does this (`consilience site ledger restart`).
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

from consilience.client.ledger import FIRST, Ledger, locked, paths, utc_now
from consilience.client.ledger_head import former_path, read_head
from consilience.client.ledger_rows import UNKNOWN, Entry, SumState, chain_of, summed, unsummable
from consilience.client.sum_index import forget_unopened
from consilience.client.teacher import load_any
from consilience.common.errors import ConsilienceError, LedgerError, RunError
from consilience.common.files import lock, storage_error, sync_folder, write_json
from consilience.common.settings import SiteSettings

STOPPED = "restarting"
"""Stands for the chain in the head while another ledger begins."""


class Carried(NamedTuple):
    """What another ledger begins with, and the folder that the old one is in."""

    aside: Path
    samples: int
    features: int
    """Bytes of features."""
    of_no_job: tuple[int, int]
    """Samples, and bytes of features, of which no row tells the job any more: they count towards no job's limit."""
    sums_known: bool
    """Whether it is known what was summed; else the present classifier takes part in no secure sum."""


def restart(settings: SiteSettings, least: int | None = None, least_bytes: int | None = None) -> Carried:
    """Put ledger and released answers aside, and begin a ledger that carries over what was spent.

    Samples, bytes of features and samples sent to the tail are the most that the head or the rows still tell of, and
    `least` and `least_bytes` where a person knows of more. They count for this month and for the lifetime, and for the
    job that their rows name. No row's time will be before that of the last one. Sums that are not opened are given up
    (`forget_unopened`); where rows may be lost, no teacher that may have been summed is summed again. Stopped in
    between, the next call goes on. Raises `RunError` while an agent runs, `LedgerError` when no head tells how much was
    released, for rows may be those of an older copy, and `least` (with features `least_bytes`) is not given,
    `StorageError`.
    """
    path, head = paths(settings)
    with lock(settings.state / "agent"), locked(path):
        known = _known(settings)
        _check_told(known, path, head, least, least_bytes)
        spent, features = max(known.samples, least or 0), max(known.features, least_bytes or 0)
        rows, by_job, tails = known.rows, known.jobs, known.tails
        forget_unopened(settings.state / "sums")
        # from here on and until the end, whatever is stopped leaves a ledger that is refused and knows what was spent
        told = {"samples": spent, "features": features, "tail": sum(tails.values()), "jobs": by_job}
        told |= {"last": known.last, "sums": known.sums_known}
        write_json(head, {"rows": rows + 1, "chain": STOPPED, **told})
        aside = _aside(settings.state)
        fresh, fresh_head = path.with_name("ledger.fresh.db"), path.with_name("ledger.fresh.head")
        try:
            former = former_path(settings)
            databases = (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm")))
            for old in databases if former is None else (former, *databases):
                if old.exists():
                    old.rename(aside / old.name)
            released = settings.state / "released"
            if released.exists():
                released.rename(aside / released.name)
            for left in (fresh, fresh_head):
                left.unlink(missing_ok=True)
            ledger = Ledger(fresh, fresh_head)
            with closing(ledger), ledger.alone():
                ledger.last = known.last  # no row's time is before
                # behind what mechanisms it left is not certain any more: it counts as behind none
                rest = spent - sum(n for n, _ in by_job.values()), features - sum(size for _, size in by_job.values())
                parts = {job: told for job, told in {"": rest, **by_job}.items() if any(told)} or {"": rest}
                parts = dict.fromkeys(tails, (0, 0)) | parts
                about = {"aside": aside.name, "rows": rows}
                ledger.append(
                    *(
                        Entry("carried", job, "ledger", n, about | {"features": size} | _tail(tails.get(job, 0)))
                        for job, (n, size) in parts.items()
                    ),
                    *known.sums.values(),
                    *(unsummable(teacher) for teacher in _not_to_be_summed(settings, known)),
                )
            fresh.rename(path)
            sync_folder(path.parent)
            write_json(head, read_head(fresh_head))
            for left in (fresh_head, fresh.with_suffix(".lock")):
                left.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, path, "write") from error
    return Carried(aside, spent, features, rest, known.sums_known)


@dataclass
class _Known:
    """What heads and database tell of, whichever tells of more."""

    samples: int = 0
    features: int = 0
    rows: int = 0
    last: str = ""
    """The time of the last row, as far as rows verify and heads tell."""
    jobs: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Samples and bytes of features by job, as far as they are known."""
    tails: dict[str, int] = field(default_factory=dict)
    """Samples of features that were sent to the tail, by job; those of no known job under ""."""
    sums: dict[str, Entry] = field(default_factory=dict)
    """The last row's entry of each secure sum, by its terms' digest."""
    teachers: set[str] = field(default_factory=set)
    """Fingerprints that rows name."""
    unsummable: set[str] = field(default_factory=set)
    """Of teachers of which it was not known before what was summed with them."""
    sums_known: bool = False
    """Whether every row that a head tells of is there and as it was written, so that the rows tell of all sums."""
    told: bool = False
    """Whether a head tells how much was released."""


def _check_told(known: _Known, path: Path, head: Path, least: int | None, least_bytes: int | None) -> None:
    """Raise `LedgerError` where a person has to say what was spent, and has not."""
    if known.told:
        return
    if least is None and not known.rows:
        raise LedgerError(
            f"Neither {path} nor {head} tells how many samples were released",
            hint="Say how many there were at most with --spent, for example by the coordinator's reports",
        )
    missing = [("samples", "--spent", known.samples)] if least is None else []
    if known.features and least_bytes is None:
        missing.append(("bytes of features", "--spent-bytes", known.features))
    if missing:
        what, option, count = missing[0]
        raise LedgerError(
            f"{head} does not tell how many {what} were released, and {path} may be an older copy: it tells of "
            f"{count:,}",
            hint=f"Say how many there were at most with {option}, for example by the coordinator's reports",
        )


def _not_to_be_summed(settings: SiteSettings, known: _Known) -> list[str]:
    """Return the fingerprints of teachers of which it is not known what was summed with them.

    "" stands for the one that is asked for a sum next, where the present one cannot be loaded.
    """
    if known.sums_known:
        return sorted(known.unsummable)
    try:
        present = load_any(settings).fingerprint
    except ConsilienceError:
        present = ""
    return sorted({*known.unsummable, *known.teachers, present}, reverse=True)  # "" last: a later row takes it away


def _known(settings: SiteSettings) -> _Known:
    path, head = paths(settings)
    known = _Known()
    chains = _rows(path, known)
    jobs, head_tail = known.jobs, 0
    for place in (head, former_path(settings)):
        held = None
        with suppress(LedgerError):  # a damaged head tells nothing
            held = None if place is None else read_head(place)
        if held is None:
            continue
        # a stopped restart's head is one row ahead, and knows itself
        known.sums_known = held["sums"] if held["chain"] == STOPPED else chains.get(held["rows"]) == held["chain"]
        known.told, known.rows = True, max(known.rows, held["rows"])
        with suppress(ValueError):  # of a head that was written by hand
            known.last = max(known.last, datetime.fromisoformat(held["last"]).isoformat(timespec="seconds"))
        head_tail = max(head_tail, held["tail"])
        known.samples, known.features = max(known.samples, held["samples"]), max(known.features, held["features"])
        for job, (samples, size) in held["jobs"].items():  # as a restart that was stopped leaves them
            before = jobs.get(job, (0, 0))
            jobs[job] = max(before[0], samples), max(before[1], size)
    known.samples = max(known.samples, sum(samples for samples, _ in jobs.values()))
    known.features = max(known.features, sum(size for _, size in jobs.values()))
    if (rest := head_tail - sum(known.tails.values())) > 0:
        known.tails[""] = known.tails.get("", 0) + rest
    known.jobs = {job: told for job, told in jobs.items() if job}
    return known


def _rows(path: Path, known: _Known) -> dict[int, str]:
    """Take in what the rows tell of, up to where they cannot be read; return the chains of those that verify."""
    samples, features, chains, before = Counter[str](), Counter[str](), {0: FIRST}, FIRST
    if path.exists():
        with suppress(sqlite3.Error), closing(sqlite3.connect(path)) as database:
            database.text_factory = lambda raw: raw.decode(errors="replace")
            query = "SELECT seq, time, kind, job, samples, subject, body, chain FROM rows ORDER BY seq"
            for seq, when, kind, job, count, subject, text, chain in database.execute(query):
                body, known.rows = _body(text), known.rows + 1
                samples[job] += max(0, count)
                features[job] += _feature_bytes(count, kind, body)
                if asked := _tail_samples(kind, body):
                    known.tails[job] = known.tails.get(job, 0) + asked
                _sums(kind, job, subject, body, known)
                before = chain_of(before, seq, when, Entry(kind, job, subject, count), text)
                if before == chain and seq - 1 in chains:
                    chains[seq], known.last = chain, max(known.last, when)
    known.jobs = {job: (samples[job], features[job]) for job in sorted(samples)}
    return chains


def _body(text: str) -> Mapping[str, Any]:
    """Return a row's body; an empty one where it is not as ours are."""
    with suppress(ValueError):
        held = json.loads(text)
        return held if isinstance(held, dict) else {}
    return {}


def _sums(kind: str, job: str, subject: str, body: Mapping[str, Any], known: _Known) -> None:
    """Take in how far a sum is, and with which teacher something left."""
    teacher, state = str(body.get("teacher", "")), str(body.get("state", ""))
    if kind == "sum" and state in get_args(SumState):
        known.sums[subject] = summed(job, subject, cast(SumState, state), teacher)
    if kind == "sum" and state == UNKNOWN:
        known.unsummable = (known.unsummable - {""}) | {teacher}
    if teacher and state != UNKNOWN:
        known.teachers.add(teacher)


def _feature_bytes(samples: int, kind: str, body: Mapping[str, Any]) -> int:
    """Return the bytes of features that a row tells of; none of one that is not as ours are."""
    with suppress(ValueError, TypeError, KeyError):
        if kind == "features":
            return max(0, int(body["bytes"]))
        return max(0, samples * int(body["width"]) if body.get("kind") == "features" else int(body.get("features", 0)))
    return 0


def _tail_samples(kind: str, body: Mapping[str, Any]) -> int:
    """Return the samples sent to the tail that a row tells of; none of one that is not as ours are."""
    with suppress(ValueError, TypeError):
        if kind in ("tail", "carried"):
            return max(0, int(body.get("samples" if kind == "tail" else "tail", 0)))
    return 0


def _tail(samples: int) -> dict[str, int]:
    return {"tail": samples} if samples else {}


def _aside(state: Path) -> Path:
    folder = state / f"ledger-{utc_now():%Y%m%dT%H%M%SZ}"
    try:
        folder.mkdir()
    except FileExistsError:
        raise RunError(f"{folder} exists already", hint="Wait a second and run the same command again") from None
    except OSError as error:
        raise storage_error(error, folder, "write") from error
    return folder
