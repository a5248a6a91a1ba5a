"""Who is admitted: one record a site, in a file of its own.

Lives here: approving a request, suspending and resuming a site, replacing a site's key. Does not live here: comparing
words (the command line asks for it), telling a running SuperLink (it reads `Register.keys`), certificates.

Every command changes the file of one site and no other, so nothing is done to a site by admitting another one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consilience.common.errors import IdentityError, StorageError
from consilience.common.files import storage_error, write_bytes
from consilience.common.identity import Kit, Line, Request, key_fingerprint, key_line, read_key_line, words
from consilience.common.settings import NAME_PATTERN
from consilience.server.settings import Home, ServerSettings

log = logging.getLogger(__name__)

Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Status = Literal["approved", "suspended"]
_OF_ONE_FILE = (PermissionError, FileNotFoundError, IsADirectoryError)


class EarlierKey(BaseModel):
    """A key that a site had before; it is never approved again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fingerprint: Fingerprint
    approved: datetime
    replaced: datetime


class Record(BaseModel):
    """One site's admission."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    contact: Line
    public_key: str
    fingerprint: Fingerprint
    status: Status
    approved: datetime
    """When the present key was approved."""
    changed: datetime
    history: tuple[EarlierKey, ...] = ()

    @property
    def words(self) -> str:
        """The present key's fingerprint as words."""
        return words(self.fingerprint)


class Register:
    """The sites that the server knows, as files HOME/sites/NAME.json."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def approve(self, request: Request, *, rotate: bool = False) -> Record:
        """Admit the site that made `request`; the same request again changes nothing.

        `rotate` replaces the key of a site that is known, and resumes it if it was suspended. Raises `IdentityError`
        when the key is another than the known one without `rotate`, is or was some site's, or the site is suspended;
        `RunError`, `StorageError`.
        """
        request.check()
        with self._home.locked():
            now = _now()
            known = {record.name: record for record in self.records()}
            old = known.get(request.name)
            _refuse_used_key(request, known)
            if old is None:
                if rotate:
                    raise IdentityError(
                        f"There is no site {request.name!r} whose key could be replaced",
                        hint="Approve it without --rotate, or correct the name in the request",
                    )
                history: tuple[EarlierKey, ...] = ()
            elif old.fingerprint == request.fingerprint:
                return self._approve_again(old, request, now)
            elif not rotate:
                raise IdentityError(
                    f"Site {request.name!r} is known with another key ({old.words})",
                    hint="If the site made a new key (`site init --rotate`), and says so by telephone, add --rotate",
                )
            else:
                replaced = EarlierKey(fingerprint=old.fingerprint, approved=old.approved, replaced=now)
                history = (*old.history, replaced)
            return self._write(
                Record(
                    name=request.name,
                    contact=request.contact,
                    public_key=key_line(request.key),  # without what a stranger may have written behind it
                    fingerprint=request.fingerprint,
                    status="approved",
                    approved=now,
                    changed=now,
                    history=history,
                )
            )

    def _approve_again(self, old: Record, request: Request, now: datetime) -> Record:
        if old.status == "suspended":
            raise IdentityError(
                f"Site {old.name!r} is suspended; its request is approved already",
                hint=f"To admit it again: consilience server resume {old.name}",
            )
        if old.contact == request.contact:
            return old
        return self._write(old.model_copy(update={"contact": request.contact, "changed": now}))

    def suspend(self, name: str) -> Record:
        """Stop admitting a site; its record stays. Raises `IdentityError` for an unknown one, `StorageError`."""
        return self._set_status(name, "suspended")

    def resume(self, name: str) -> Record:
        """Admit a suspended site again. Raises `IdentityError` for an unknown one, `StorageError`."""
        return self._set_status(name, "approved")

    def records(self) -> list[Record]:
        """Return all records, sorted by name. Raises `IdentityError` when one is damaged, `StorageError`."""
        return [self._read(path) for path in self._paths()]

    def _paths(self) -> list[Path]:
        return sorted(self._home.sites.glob("[!.]*.json"))

    def keys(self) -> dict[str, str]:
        """Return name -> public key (OpenSSH's line) of the approved sites: whom the SuperLink admits.

        A site whose record is damaged is not admitted; the others are. Raises `StorageError` when it is not the record
        but the machine that fails: then nothing should be concluded about anybody.
        """
        found = {}
        for path in self._paths():
            try:
                record = self._read(path)
            except (IdentityError, StorageError) as error:
                if isinstance(error, StorageError) and not isinstance(error.__cause__, _OF_ONE_FILE):
                    raise
                _warn(f"site {path.stem} is not admitted: {error}")
            else:
                if record.status == "approved":
                    found[record.name] = record.public_key
        return found

    def key_of(self, name: str) -> str | None:
        """Return an approved site's public key (OpenSSH's line); None for any other, or where its record is damaged.

        Raises `StorageError`.
        """
        path = self._home.sites / f"{name}.json"
        with contextlib.suppress(IdentityError):
            if path.exists() and (record := self._read(path)).status == "approved":
                return record.public_key
        return None

    def named(self, fingerprint: str) -> str:
        """Return how to speak of a key: by its site, or by its words when it is nobody's."""
        for path in self._paths():
            with contextlib.suppress(IdentityError, StorageError):
                record = self._read(path)
                if record.fingerprint == fingerprint:
                    return f"site {record.name} ({record.status})"
                if any(earlier.fingerprint == fingerprint for earlier in record.history):
                    return f"site {record.name} with a key that was replaced"
        return f"the key with the words: {words(fingerprint)}"

    def kit(self, record: Record, settings: ServerSettings, ca_pem: str) -> Kit:
        """Return what the site gets back. It holds no secret."""
        return Kit(site=record.name, site_fingerprint=record.fingerprint, address=settings.address, ca=ca_pem)

    def _set_status(self, name: str, status: Status) -> Record:
        with self._home.locked():
            known = {path.stem: path for path in self._paths()}
            if name not in known:
                raise IdentityError(
                    f"There is no site {name!r}; known: {', '.join(known) or 'none'}", hint="Correct the name"
                )
            record = self._read(known[name])
            if record.status == status:
                return record
            return self._write(record.model_copy(update={"status": status, "changed": _now()}))

    def _write(self, record: Record) -> Record:
        write_bytes(self._home.sites / f"{record.name}.json", record.model_dump_json(indent=2).encode() + b"\n")
        return record

    @staticmethod
    def _read(path: Path) -> Record:
        try:
            record = Record.model_validate_json(path.read_bytes())
            good = record.name == path.stem and key_fingerprint(read_key_line(record.public_key)) == record.fingerprint
            if good:
                return record
        except OSError as error:
            raise storage_error(error, path, "read") from error
        except (ValidationError, IdentityError):
            pass
        raise IdentityError(
            f"{path} is no admission record of ours: it was changed or damaged",
            hint="Restore it from a copy, or remove it and approve the site's request again",
        )


def _refuse_used_key(request: Request, known: dict[str, Record]) -> None:
    """Refuse a key that another site has, or that any site had before."""
    for record in known.values():
        if record.fingerprint == request.fingerprint and record.name != request.name:
            raise IdentityError(
                f"The key in {request.name!r}'s request is that of site {record.name!r}",
                hint="One key is one site: let the site make its own with `consilience site init`",
            )
        if any(earlier.fingerprint == request.fingerprint for earlier in record.history):
            raise IdentityError(
                f"The key in {request.name!r}'s request was replaced at site {record.name!r} before",
                hint="Let the site make a new one with `consilience site init --rotate`",
            )


@functools.cache
def _warn(line: str) -> None:
    """Say it once in the life of this process: the server reads the records every second."""
    log.warning("%s", line)


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
