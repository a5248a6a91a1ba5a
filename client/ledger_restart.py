"""Beginning another ledger where one is damaged or an older copy is all that there is: what was spent stays spent.

Does not live here: the ledger (client/ledger). Only a person at the site does this (`consilience site ledger restart`).
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from consilience.client.ledger import Ledger, locked, paths, read_head, utc_now
from consilience.client.ledger_rows import Entry
from consilience.common.errors import LedgerError, RunError
from consilience.common.files import lock, storage_error, sync_folder, write_json
from consilience.common.settings import SiteSettings


def restart(settings: SiteSettings, least: int | None = None, least_bytes: int | None = None) -> tuple[Path, int, int]:
    """Put ledger and released answers aside, and begin a ledger that carries over what was spent.

    Returns the folder they are in now, and the samples and bytes of features carried over: the most that the head or
    the rows still tell of, and `least` and `least_bytes` where a person knows of more. They count for this month and
    for the lifetime. Stopped in between, the next call goes on. Raises `RunError` while an agent runs, `LedgerError`
    when neither head nor rows tell anything and `least` is not given, `StorageError`.
    """
    path, head = paths(settings)
    with lock(settings.state / "agent"), locked(path):
        spent, features, rows, told = _spent(path, head)
        if least is None and not told:
            raise LedgerError(
                f"Neither {path} nor {head} tells how many samples were released",
                hint="Say how many there were at most with --spent, for example by the coordinator's reports",
            )
        spent, features = max(spent, least or 0), max(features, least_bytes or 0)
        # from here on and until the end, whatever is stopped leaves a ledger that is refused and knows what was spent
        write_json(head, {"rows": rows + 1, "chain": "restarting", "samples": spent, "features": features})
        aside = _aside(settings.state)
        fresh, fresh_head = path.with_name("ledger.fresh.db"), path.with_name("ledger.fresh.head")
        try:
            for old in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
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
                body = {"aside": aside.name, "rows": rows, "features": features}
                ledger.append(Entry("carried", "", "ledger", spent, body))
            fresh.rename(path)
            sync_folder(path.parent)
            write_json(head, read_head(fresh_head))
            for left in (fresh_head, fresh.with_suffix(".lock")):
                left.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, path, "write") from error
    return aside, spent, features


def _spent(path: Path, head: Path) -> tuple[int, int, int, bool]:
    """Return samples, bytes of features and rows that head and database tell of, whichever tells of more, and whether
    one tells."""
    told, total, features, count, readable = None, 0, 0, 0, False
    with suppress(LedgerError):  # a damaged head tells nothing
        told = read_head(head)
    if path.exists():
        with suppress(sqlite3.Error), closing(sqlite3.connect(path)) as database:  # nor does a damaged database
            query = "SELECT coalesce(sum(samples), 0), count(*) FROM rows WHERE samples > 0"
            total, count = database.execute(query).fetchone()
            readable = True
            for samples, kind, body in database.execute(
                "SELECT samples, kind, body FROM rows WHERE samples > 0 OR kind IN ('carried', 'features')"
            ):
                features += _feature_bytes(samples, kind, body)
    known = told or {"samples": 0, "rows": 0, "features": 0}
    samples, features = max(int(total), known["samples"]), max(features, known["features"])
    return samples, features, max(int(count), known["rows"]), readable or told is not None


def _feature_bytes(samples: int, kind: str, body: str) -> int:
    """Return the bytes of features that a row tells of; none of one that is not as ours are."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        held = json.loads(body)
        if kind == "features":
            return max(0, int(held["bytes"]))
        return max(0, samples * int(held["width"]) if held.get("kind") == "features" else int(held.get("features", 0)))
    return 0


def _aside(state: Path) -> Path:
    folder = state / f"ledger-{utc_now():%Y%m%dT%H%M%SZ}"
    try:
        folder.mkdir()
    except FileExistsError:
        raise RunError(f"{folder} exists already", hint="Wait a second and run the same command again") from None
    except OSError as error:
        raise storage_error(error, folder, "write") from error
    return folder
