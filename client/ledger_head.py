"""The ledger's head: its length and last hash, kept where an older copy of `state` that is put back does not bring it.

Lives here: where it lies, reading it, and what tells that there was a ledger once. Does not live here: comparing it
with the rows and writing it (client/ledger).
"""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path
from typing import Any

from consilience.common.errors import LedgerError, StorageError
from consilience.common.files import read_json
from consilience.common.settings import SiteSettings

RESTORE = "Put the newest copy back, or begin another with `consilience site ledger restart` (docs/privacy.md)"


def head_path(settings: SiteSettings) -> Path:
    """Return where the head of a site's ledger lies: by default beside the folder `state`, as STATE-ledger.head.

    Never two sites' heads at one place, for each has a folder of its own.
    """
    return settings.ledger_head or _beside(settings.state)


def missing_head(state: Path) -> str:
    """Return what to do where there is no head at its place: it may lie where it does by default."""
    default = _beside(state)
    if not default.exists():
        return RESTORE
    return f"If `ledger_head` was named anew in site.yaml, move {default} there while the agent is stopped"


def _beside(state: Path) -> Path:
    plain = _plain(state)
    return plain.parent / f"{plain.name}-ledger.head"


def former_path(settings: SiteSettings) -> Path | None:
    """Return where the head lay by default once, and is moved from; None where that is its place."""
    former = settings.state / "ledger.head"
    return None if _plain(former) == _plain(head_path(settings)) else former


def _plain(path: Path) -> Path:
    """Return the path without `..`, links as they are named."""
    return Path(os.path.normpath(path.absolute()))


def comes_back_with_state(settings: SiteSettings) -> bool:
    """Whether the head lies within the folder `state`, so that an older copy of that brings it back, too."""
    return head_path(settings).resolve().is_relative_to(settings.state.resolve())


def read_head(path: Path) -> dict[str, Any] | None:
    """Return rows, chain, the last row's time, samples, bytes of features and samples sent to the tail as the head
    tells them; None where there is none. `jobs` and `sums` are in one that a stopped restart left.

    Raises `LedgerError`.
    """
    if not path.exists():
        return None
    try:
        held = read_json(path)
        told = {name: int(held[name]) for name in ("rows", "samples")}
        features, tail = int(held.get("features", 0)), int(held.get("tail", 0))  # once it told none
        jobs = {str(job): (int(samples), int(size)) for job, (samples, size) in held.get("jobs", {}).items()}
        more = {"chain": str(held["chain"]), "last": str(held.get("last", "")), "sums": bool(held.get("sums", False))}
        return {**told, **more, "features": features, "tail": tail, "jobs": jobs}
    except (StorageError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise LedgerError(f"{path} is damaged", hint=RESTORE) from error


def trace_of(state: Path) -> Path | None:
    """Return something that only a site with a ledger has in its folder; None where there is nothing of the kind."""
    answers = (path for path in (state / "released").rglob("*") if path.is_file())
    aside = (path for path in state.glob("ledger-*") if path.is_dir())
    return next(chain(answers, aside, (state / "sums").glob("index.sqlite")), None)
