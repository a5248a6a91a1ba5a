"""Beginning another ledger where one is damaged or an older copy is all that there is: what was spent stays spent.

Does not live here: the ledger (client/ledger). Only a person at the site does this (`consilience site ledger restart`).
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from consilience.client.ledger import Ledger, locked, paths, utc_now
from consilience.client.ledger_head import former_path, read_head, trace_of
from consilience.client.ledger_rows import Entry, summed
from consilience.client.sum_index import forget_given
from consilience.common.errors import LedgerError, RunError
from consilience.common.files import lock, storage_error, sync_folder, write_json
from consilience.common.settings import SiteSettings


class Carried(NamedTuple):
    """What another ledger begins with, and the folder that the old one is in."""

    aside: Path
    samples: int
    features: int
    """Bytes of features."""
    of_no_job: tuple[int, int]
    """Samples, and bytes of features, of which no row tells the job any more: they count towards no job's limit."""


def restart(settings: SiteSettings, least: int | None = None, least_bytes: int | None = None) -> Carried:
    """Put ledger and released answers aside, and begin a ledger that carries over what was spent.

    Samples, bytes of features and samples sent to the tail are the most that the head or the rows still tell of, and
    `least` and `least_bytes` where a person knows of more. They count for this month and for the lifetime, and for the
    job that their rows name. Sums that are not opened are given up (`forget_given`). Stopped in between, the next call
    goes on. Raises
    `RunError` while an agent runs, `LedgerError` when neither head nor rows tell anything and `least` is not given,
    `StorageError`.
    """
    path, head = paths(settings)
    with lock(settings.state / "agent"), locked(path):
        known = _known(settings)
        if least is None and not known.told:
            raise LedgerError(
                f"Neither {path} nor {head} tells how many samples were released",
                hint="Say how many there were at most with --spent, for example by the coordinator's reports",
            )
        spent, features = max(known.samples, least or 0), max(known.features, least_bytes or 0)
        rows, by_job, tails = known.rows, known.jobs, known.tails
        forget_given(settings.state / "sums")
        # from here on and until the end, whatever is stopped leaves a ledger that is refused and knows what was spent
        told = {"samples": spent, "features": features, "tail": sum(tails.values()), "jobs": by_job}
        write_json(head, {"rows": rows + 1, "chain": "restarting", **told})
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
                )
            fresh.rename(path)
            sync_folder(path.parent)
            write_json(head, read_head(fresh_head))
            for left in (fresh_head, fresh.with_suffix(".lock")):
                left.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, path, "write") from error
    return Carried(aside, spent, features, rest)


@dataclass
class _Known:
    """What heads and database tell of, whichever tells of more."""

    samples: int = 0
    features: int = 0
    rows: int = 0
    jobs: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Samples and bytes of features by job, as far as they are known."""
    tails: dict[str, int] = field(default_factory=dict)
    """Samples of features that were sent to the tail, by job; those of no known job under ""."""
    sums: dict[str, Entry] = field(default_factory=dict)
    """The last row's entry of each secure sum, by its terms' digest."""
    told: bool = False
    """Whether one of them tells."""


def _known(settings: SiteSettings) -> _Known:
    path, head = paths(settings)
    known = _Known()
    jobs, head_tail = _by_job(path, known), 0
    for place in (head, former_path(settings)):
        held = None
        with suppress(LedgerError):  # a damaged head tells nothing
            held = None if place is None else read_head(place)
        if held is not None:
            known.told, known.rows = True, max(known.rows, held["rows"])
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


def _by_job(path: Path, known: _Known) -> dict[str, tuple[int, int]]:
    """Return samples and bytes of features by job, as the rows tell of them up to where they cannot be read."""
    samples, features = Counter[str](), Counter[str]()
    if path.exists():
        with suppress(sqlite3.Error), closing(sqlite3.connect(path)) as database:
            database.text_factory = lambda raw: raw.decode(errors="replace")
            kinds = "('carried', 'features', 'tail')"
            query = f"SELECT job, samples, kind, body FROM rows WHERE samples > 0 OR kind IN {kinds}"
            for job, count, kind, body in database.execute(query):
                if asked := _tail_samples(kind, body):
                    known.tails[job] = known.tails.get(job, 0) + asked
                samples[job] += max(0, count)
                features[job] += _feature_bytes(count, kind, body)
                known.rows += count > 0
            query = "SELECT job, subject, body FROM rows WHERE kind = 'sum' ORDER BY seq"
            for job, terms, body in database.execute(query):
                with suppress(ValueError, TypeError, KeyError):
                    held = json.loads(body)
                    known.sums[terms] = summed(job, terms, held["state"], held["teacher"])
            # one without rows tells that nothing was released only where nothing else says that something was
            known.told = database.execute("SELECT 1 FROM rows").fetchone() is not None or trace_of(path.parent) is None
    return {job: (samples[job], features[job]) for job in sorted(samples)}


def _feature_bytes(samples: int, kind: str, body: str) -> int:
    """Return the bytes of features that a row tells of; none of one that is not as ours are."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        held = json.loads(body)
        if kind == "features":
            return max(0, int(held["bytes"]))
        return max(0, samples * int(held["width"]) if held.get("kind") == "features" else int(held.get("features", 0)))
    return 0


def _tail_samples(kind: str, body: str) -> int:
    """Return the samples sent to the tail that a row tells of; none of one that is not as ours are."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        held = json.loads(body)
        if kind in ("tail", "carried"):
            return max(0, int(held.get("samples" if kind == "tail" else "tail", 0)))
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
