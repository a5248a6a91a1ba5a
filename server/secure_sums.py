"""The server's part in one secure sum: what came in, round by round, on disk, and what goes out next.

Lives here: rounds, thresholds, which sites are in. Does not live here: taking masks off (server/unmasking), asking
(server/asking), masked rows (server/masked). Everything that arrived is kept at once, so that `kill -9` loses
nothing; a round that was closed stays closed, since the sites hold the server to it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from consilience.common.errors import NEW_RUN, AskingError, ProtocolError, RunError, StorageError
from consilience.common.files import read_json, storage_error, write_bytes, write_json
from consilience.common.records import Record
from consilience.common.sums.messages import (
    LEAST_SITES,
    Advert,
    Delivered,
    Delivery,
    MaskedRows,
    Opened,
    Roster,
    RowsQuestion,
    Sealed,
    SealedShares,
    Terms,
    Unmask,
)
from consilience.server.masked import MaskedStore

Kept = TypeVar("Kept", bound=Record)


class SecureSum:
    """One sum. Used by one thread of one process (the run's lock sees to it)."""

    def __init__(self, folder: Path, terms: Terms) -> None:
        """Begin the sum in `folder`, or go on with it. Raises `RunError` when it is another one's, `StorageError`."""
        self.folder, self.terms = folder, terms
        held = self._load("terms", Terms)
        if held is not None and held != terms:
            raise RunError(
                f"{folder} holds a secure sum on other terms: sites, job or settings were others",
                hint=f"Undo what was changed, or start {NEW_RUN}",
            )
        if held is None:
            self._keep("terms", terms)
        self._stores: dict[str, MaskedStore] = {}

    def closed(self, name: Literal["roster", "sharers", "unmask"]) -> bool:
        """Whether the round that ends with this was closed."""
        return self._path(name).exists()

    # Round 0

    def add_advert(self, site: str, advert: Advert) -> None:
        """Take a site's keys. Raises `ProtocolError` when they are not for this sum, or others than before."""
        advert.check(self.terms)
        if advert.site != site:
            raise ProtocolError(f"Site {site} sent the keys of another site")
        self._keep_once(f"adverts/{advert.site}", advert)

    def roster(self) -> Roster:
        """Close round 0: from now on only sites whose adverts are there take part. Raises `AskingError` if too few."""
        held = self._load("roster", Roster)
        if held is not None:
            return held
        adverts = [a for m in self.terms.members if (a := self._load(f"adverts/{m.site}", Advert)) is not None]
        self._need([advert.site for advert in adverts], "have sent keys")
        roster = Roster(terms=self.terms.digest, adverts=tuple(adverts))
        roster.check(self.terms)
        self._keep("roster", roster)
        return roster

    # Round 1

    def add_sealed(self, site: str, sealed: SealedShares) -> None:
        """Take what a site sealed for the others. Raises `ProtocolError`."""
        roster = self.roster()
        if site not in roster.places:
            raise ProtocolError(f"Site {site} is not in the roster of this secure sum")
        sealed.check(roster, site)
        self._keep_once(f"sealed/{site}", sealed)

    def sharers(self) -> tuple[str, ...]:
        """Close round 1: from now on only sites that shared take part. Raises `AskingError` if too few."""
        if not self._path("sharers").exists():
            there = [site for site in self.roster().places if self._path(f"sealed/{site}").exists()]
            self._need(there, "have shared their seeds")
            write_json(self._path("sharers"), there)
        return tuple(read_json(self._path("sharers")))

    def delivery(self, site: str) -> Delivery:
        """Return what the others sealed for a site. Raises `AskingError`."""
        roster, shares = self.roster(), list[Sealed]()
        for other in self.sharers():
            sealed = self._load(f"sealed/{other}", SealedShares)
            if sealed is None:
                raise StorageError(f"{self._path(f'sealed/{other}')} is gone", hint=self._again())
            shares += [share for share in sealed.shares if share.holder == site]
        return Delivery(terms=self.terms.digest, roster=roster.digest, site=site, shares=tuple(shares))

    # Round 2

    def check_delivered(self, site: str, delivered: Delivered) -> None:
        """Keep a site's word that it holds the shares of all sharers. Raises `ProtocolError` for any other."""
        due = (self.terms.digest, self.roster().digest, site, self.sharers())
        if (delivered.terms, delivered.roster, delivered.site, delivered.holds) != due:
            raise ProtocolError(f"Site {site} does not hold the shares that were delivered to it")
        delivered.check(self.roster())
        self._keep(f"delivered/{site}", delivered)

    def store(self, site: str) -> MaskedStore:
        """Return what a site sent so far, rows counted from the first sample of the terms."""
        if site not in self._stores:
            if site not in self.sharers():
                raise ProtocolError(f"Site {site} has shared no seeds in this secure sum")
            width = len(self.terms.by_name[site].classes)
            self._stores[site] = MaskedStore(self.folder / "masked" / site, len(self.terms), width)
        return self._stores[site]

    def questions(self, site: str, size: int) -> list[RowsQuestion]:
        """Return what is still to ask a site, in pieces of at most `size` samples."""
        first = self.terms.start
        return [
            RowsQuestion(terms=self.terms.digest, start=first + start, stop=first + min(start + size, high))
            for low, high in self.store(site).missing()
            for start in range(low, high, size)
        ]

    def add_rows(self, site: str, rows: MaskedRows) -> None:
        """Take a site's masked rows. Raises `ProtocolError`; also when they come after the survivors were named."""
        question = rows.question
        within = self.terms.start <= question.start and question.stop <= self.terms.stop
        if question.terms != self.terms.digest or not within:
            raise ProtocolError("Masked rows are for another secure sum, or for samples that its terms do not name")
        if self._path("unmask").exists():
            raise ProtocolError(f"Masked rows of site {site} came too late")
        store = self.store(site)
        store.put(question.start - self.terms.start, rows.rows(len(self.terms.by_name[site].classes)))

    # Round 3

    def unmask(self) -> Unmask:
        """Close round 2: sites whose rows are all there survive, the others are lost. Raises `AskingError`."""
        held = self._load("unmask", Unmask)
        if held is not None:
            return held
        told = {site: self._load(f"delivered/{site}", Delivered) for site in self.sharers()}
        signed = {site: word.signature for site, word in told.items() if word is not None and self.store(site).complete}
        self._need(list(signed), "have sent all their masked answers")
        unmask = Unmask(terms=self.terms.digest, survivors=tuple(signed), signatures=tuple(signed.values()))
        self._keep("unmask", unmask)
        return unmask

    def add_opened(self, site: str, opened: Opened) -> None:
        """Take the shares that a site opened. Raises `ProtocolError` when they are not just those asked for."""
        unmask = self.unmask()
        due = [(other, "self" if other in unmask.survivors else "mask") for other in self.sharers()]
        given = [(share.of, share.kind) for share in opened.shares]
        if (opened.terms, opened.site, given) != (self.terms.digest, site, due) or site not in self.sharers():
            raise ProtocolError(f"Site {site} has not opened the shares that were asked for")
        self._keep_once(f"opened/{site}", opened)

    def opened(self) -> dict[str, Opened]:
        """Return what was opened so far, by site. Raises `AskingError` when it is not enough."""
        kept = {site: self._load(f"opened/{site}", Opened) for site in self.sharers()}
        there = {site: opened for site, opened in kept.items() if opened is not None}
        self._need(list(there), "have opened their shares")
        return there

    def forget_masked(self) -> None:
        """Remove the masked rows, which have served."""
        self._stores.clear()
        try:
            shutil.rmtree(self.folder / "masked", ignore_errors=False)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise storage_error(error, self.folder / "masked", "remove") from error

    def _need(self, sites: Sequence[str], what: str) -> None:
        needed = max(self.terms.threshold, LEAST_SITES)
        if len(sites) < needed:
            away = [member.site for member in self.terms.members if member.site not in sites]
            raise AskingError(
                f"{len(sites)} of {len(self.terms.members)} sites {what}, {needed} are needed; not: {', '.join(away)}",
                hint="Nothing was unmasked. Mend those sites and run the same command again. If that is not enough: "
                + self._again(),
            )

    def _again(self) -> str:
        """How the same sum is begun anew, for hints."""
        if self.closed("unmask"):
            return f"Start {NEW_RUN} over other images: sites may have opened shares, and sum an image once"
        return f"Remove {self.folder} and run the same command again: another attempt, with all sites that are there"

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _keep(self, name: str, record: Record) -> None:
        write_bytes(self._path(name), record.model_dump_json().encode())

    def _keep_once(self, name: str, record: Record) -> None:
        held = self._load(name, type(record))
        if held is None:
            self._keep(name, record)
        elif held != record:
            raise ProtocolError("A site answered a round of a secure sum a second time, and otherwise")

    def _load(self, name: str, record: type[Kept]) -> Kept | None:
        path = self._path(name)
        try:
            return record.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise storage_error(error, path, "read") from error
        except ValidationError as error:
            raise StorageError(f"{path} is damaged", hint=self._again()) from error
