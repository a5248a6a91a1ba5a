"""A site's part in secure sums: its keys, its masked rows, and the record that keeps it from opening too much.

Lives here: what a site does in each round, and what it refuses. Does not live here: what it wants of the terms
(client/sum_terms), which images were summed (client/sum_index), the teacher, messages in and out (client/app). What the
record, one file a sum and an index, is there for:

* a round done stays done: asked the same again, the site replies the same; asked otherwise, it refuses
* of each other site, one share of one seed is opened, never of both
* of each image, in whatever pool, one sum is opened: the difference of two sums over different sites is one site's
  answer

It is written before the reply goes out, and survives a crash at any moment.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from consilience.client.ledger_rows import SumState
from consilience.client.sum_index import SumIndex
from consilience.client.sum_terms import Own, check_terms
from consilience.common.cards import SumNoiseCard
from consilience.common.errors import ProtocolError, StorageError
from consilience.common.files import lock, make_private, storage_error, write_bytes
from consilience.common.identity import PrivateKey, key_fingerprint
from consilience.common.sums.masks import (
    SEED_BYTES,
    Mask,
    mask_key,
    pair_key,
    pair_sign,
    public_hex,
    put_on,
    self_key,
)
from consilience.common.sums.messages import (
    LEAST_SITES,
    Advert,
    Delivered,
    Delivery,
    MaskedRows,
    Opened,
    OpenedShare,
    Roster,
    RowsQuestion,
    Sealed,
    SealedShares,
    Terms,
    Unmask,
    commit,
)
from consilience.common.sums.shares import seal, split, unseal

Answering = Callable[[Terms, int, int], NDArray[np.floating[Any]]]
"""Terms, start, stop -> (stop - start, k) log-probabilities of the pool's samples over the site's classes."""
Digests = Callable[[Terms], bytes]
"""Terms -> 8 bytes for each of their samples, the same for the same image in any pool (client/sum_index)."""
Noise = Callable[[Terms, int, int, NDArray[np.floating[Any]]], NDArray[np.int64]]
"""Terms, start, stop, log-probabilities -> (stop - start, k) what is added to them, in steps of the terms' ring."""


class _Held(BaseModel):
    """The record of one sum. Secrets are in hexadecimal, and gone once they have served."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    terms: Terms
    advert: Advert
    mask_seed: str
    self_seed: str
    seal_key: str
    roster: Roster | None = None
    sealed: SealedShares | None = None
    own: tuple[str, str] | None = None
    """The site's own shares of its own two seeds: mask, self."""
    delivery: Delivery | None = None
    holds: dict[str, tuple[str, str]] = {}
    """Site -> shares of its two seeds."""
    unmask: Unmask | None = None
    opened: Opened | None = None


class SumSite:
    """One site in its secure sums. One per folder, in one process; safe to use from several threads."""

    def __init__(self, folder: Path, name: str, identity: PrivateKey, digests: Digests) -> None:
        """Keep the records in `folder`, which only its owner may read. Raises `StorageError`."""
        self._folder, self._name, self._identity, self._digests = folder, name, identity, digests
        self._thread = threading.Lock()
        # The record read last and its masks: questions about one sum follow one another by the hundred.
        self._read_last: tuple[bytes, _Held] | None = None
        self._worn: tuple[_Held, tuple[Mask, ...]] | None = None
        self._clear: tuple[str, int] | None = None
        make_private(folder)
        try:
            folder.chmod(0o700)
        except OSError as error:
            raise storage_error(error, folder, "write") from error

    def advertise(
        self,
        terms: Terms,
        *,
        teacher: str,
        policy: str,
        classes: Sequence[str],
        noise: SumNoiseCard | None = None,
        owners: int = 1,
    ) -> Advert:
        """Round 0: make keys for these terms, or give the same again.

        `teacher`, `policy`, `classes` (their names), `noise` and `owners` (how many sites must know each class) are the
        site's own now. Raises `ProtocolError` when the terms say otherwise of this site or do not give it what it needs
        (`check_terms`), or speak of samples that were summed before.
        """
        identity = key_fingerprint(self._identity.public_key())
        own = Own(self._name, identity, teacher, policy, classes, noise, owners)
        check_terms(terms, own)
        images = self._digests(terms)
        with self._turn() as index:
            held = self._read(terms.digest)
            if held is None:
                if index.state(terms.digest) not in (None, "keys"):
                    raise ProtocolError("The site has forgotten its keys for this secure sum")
                self._refuse_second(index, terms, teacher, images)
                index.begin(terms.digest)
                mask_seed, self_seed = secrets.token_bytes(SEED_BYTES), secrets.token_bytes(SEED_BYTES)
                sealing = X25519PrivateKey.generate()
                advert = Advert.make(
                    self._identity,
                    terms,
                    self._name,
                    public_hex(mask_key(mask_seed, terms.digest, self._name)),
                    public_hex(sealing),
                    commit(self_seed, terms.digest, self._name),
                )
                held = _Held(
                    terms=terms,
                    advert=advert,
                    mask_seed=mask_seed.hex(),
                    self_seed=self_seed.hex(),
                    seal_key=sealing.private_bytes_raw().hex(),
                )
                self._write(held)
                for old in index.superfluous():
                    self._remove(old)
                    index.drop(old)
            return held.advert

    def _refuse_second(self, index: SumIndex, terms: Terms, teacher: str, images: bytes) -> None:
        """As `SumIndex.refuse_second`; looks again only where something was bound since it looked last."""
        if self._clear != (looked := (terms.digest, index.version)):
            index.refuse_second(terms, teacher, images)
            self._clear = looked

    def terms_of(self, terms: str) -> Terms:
        """Return the terms of the sum with this digest. Raises `ProtocolError` when there is none."""
        with self._turn():
            return self._need(terms).terms

    def need(self, told: Mapping[str, SumState]) -> None:
        """Raise `StorageError` unless every sum that the ledger tells of, by its terms' digest, is known here too."""
        with self._turn() as index:
            index.need(told)

    def share(self, roster: Roster) -> SealedShares:
        """Round 1: share out both seeds among the sites of the roster. Raises `ProtocolError`."""
        with self._turn():
            held = self._need(roster.terms)
            if held.sealed is not None and held.roster == roster:
                return held.sealed
            if held.roster is not None:
                raise ProtocolError("A secure sum has one roster, and this is another")
            roster.check(held.terms)
            if roster.by_name.get(self._name) != held.advert:
                raise ProtocolError("The roster of a secure sum does not hold this site's own keys")
            key, count = X25519PrivateKey.from_private_bytes(bytes.fromhex(held.seal_key)), len(roster.adverts)
            parts = [
                split(bytes.fromhex(seed), held.terms.threshold, count) for seed in (held.mask_seed, held.self_seed)
            ]
            sealed, place = [], roster.places[self._name]
            for other, there in roster.places.items():
                if other != self._name:
                    theirs, pair = roster.by_name[other].seal_key, (parts[0][there], parts[1][there])
                    data = seal(key, theirs, roster.digest, self._name, other, pair)
                    sealed.append(Sealed(sender=self._name, holder=other, data=data))
            reply = SealedShares(roster=roster.digest, site=self._name, shares=tuple(sealed))
            own = (parts[0][place].hex(), parts[1][place].hex())
            self._write(held.model_copy(update={"roster": roster, "sealed": reply, "own": own}))
            return reply

    def deliver(self, delivery: Delivery) -> Delivered:
        """Round 2, first half: take the shares of the others. Raises `ProtocolError`."""
        with self._turn():
            held = self._need(delivery.terms)
            if held.delivery is None:
                if held.roster is None or delivery.roster != held.roster.digest:
                    raise ProtocolError("Shares were delivered for another roster than the site has shared with")
                holds = self._unsealed(held, held.roster, delivery)
                _need_sites(len(holds), held.terms, "have shared")
                self._write(held.model_copy(update={"delivery": delivery, "holds": holds}))
            elif held.delivery != delivery:
                raise ProtocolError("A secure sum delivers shares once, and these are others")
            names = sorted([self._name, *(sealed.sender for sealed in delivery.shares)])
            assert held.roster is not None
            return Delivered.make(self._identity, held.roster, self._name, tuple(names))

    def _unsealed(self, held: _Held, roster: Roster, delivery: Delivery) -> dict[str, tuple[str, str]]:
        senders = [sealed.sender for sealed in delivery.shares]
        others = all(sender in roster.places and sender != self._name for sender in senders)
        if delivery.site != self._name or senders != sorted(set(senders)) or not others:
            raise ProtocolError("A delivery of shares is not one from each of some other sites")
        key = X25519PrivateKey.from_private_bytes(bytes.fromhex(held.seal_key))
        assert held.own is not None
        holds = {self._name: held.own}
        for sealed in delivery.shares:
            theirs = roster.by_name[sealed.sender].seal_key
            mask, own = unseal(key, theirs, roster.digest, sealed.sender, self._name, sealed.data)
            holds[sealed.sender] = mask.hex(), own.hex()
        return holds

    def rows(self, question: RowsQuestion, answering: Answering, noise: Noise | None = None) -> MaskedRows:
        """Round 2, second half: answer, add the noise that the terms name, and all masks.

        Raises `ProtocolError`, also when there is no such noise, and what `answering` and `noise` raise.
        """
        with self._turn() as index:
            held, given = self._need_row_keys(index, question)
        terms, own = held.terms, held.terms.by_name[self._name]
        images = b""
        if not given:
            images = self._digests(terms)
            with self._turn() as index:
                self._refuse_second(index, terms, own.teacher, images)  # before the work
        log_probs = answering(terms, question.start, question.stop)
        rows = terms.ring().encode(log_probs / terms.temperature, own.weight)
        if rows.shape != (len(question), len(own.classes)):
            raise ProtocolError("The site's answer has not one row a sample and one column a class")
        if own.noise is not None:
            if noise is None:
                raise ProtocolError("The terms of a secure sum name noise of this site, which adds none now")
            rows += noise(terms, question.start, question.stop, log_probs).astype(np.uint32)
        with self._turn() as index:  # what happened meanwhile counts; an answer that was refused binds nothing
            held, given = self._need_row_keys(index, question)
            if not given:
                index.bind(terms, own.teacher, images, "given")
            masks = self._masks(held)
        put_on(masks, rows, question.start - terms.start)
        return MaskedRows(question, rows.astype("<u4", copy=False).tobytes())

    def _need_row_keys(self, index: SumIndex, question: RowsQuestion) -> tuple[_Held, bool]:
        """Return the record of a sum, and whether it gave rows before. Raises `ProtocolError` when it may not now."""
        held, state = self._need(question.terms), index.state(question.terms)
        if held.delivery is None or held.unmask is not None or state == "opened":
            raise ProtocolError("Masked rows are given after shares were delivered, and not after they were opened")
        if question.start < held.terms.start or question.stop > held.terms.stop:
            raise ProtocolError("Masked rows were asked for of samples that the terms do not name")
        return held, state == "given"

    def _masks(self, held: _Held) -> tuple[Mask, ...]:
        """Return the masks of the site's rows, derived once for as many questions as follow one another."""
        if self._worn is None or self._worn[0] is not held:
            self._worn = held, tuple(self._derived(held))
        return self._worn[1]

    def _derived(self, held: _Held) -> Iterator[Mask]:
        assert held.roster is not None
        terms, own = held.terms, held.terms.by_name[self._name]
        seed = bytes.fromhex(held.self_seed)
        yield Mask(self_key(seed, terms.digest, self._name), np.arange(len(own.classes)))
        key = mask_key(bytes.fromhex(held.mask_seed), terms.digest, self._name)
        for other in sorted(held.holds):
            columns = shared_columns(own.classes, terms.by_name[other].classes)
            if other != self._name and len(columns):
                theirs = held.roster.by_name[other].mask_key
                pair = pair_key(key, theirs, terms.digest, (self._name, other))
                yield Mask(pair, columns, pair_sign(self._name, other))

    def open(self, unmask: Unmask) -> Opened:
        """Round 3: give one share of each site: of a survivor's own mask, or of a lost site's mask key.

        Raises `ProtocolError` when too few survived, when another set of survivors was named before, when one of them
        has not signed that it holds the shares of just the sites that this one does, or when some of the samples were
        summed in another sum since.
        """
        with self._turn():
            terms = self._need(unmask.terms).terms
        images = self._digests(terms)
        with self._turn() as index:
            held = self._need(unmask.terms)
            if held.opened is not None and held.unmask == unmask:
                return held.opened
            if held.unmask is not None:
                raise ProtocolError("A secure sum is opened once, and this names other survivors")
            names = list(unmask.survivors)
            if held.delivery is None or names != sorted(set(names)) or not set(names) <= set(held.holds):
                raise ProtocolError("The survivors of a secure sum are not some of the sites that shared")
            _need_sites(len(names), held.terms, "survived")
            self._need_the_same_masks(held, unmask)
            index.bind(terms, terms.by_name[self._name].teacher, images, "opened")
            shares = [
                OpenedShare(of=site, kind="self", share=pair[1])
                if site in names
                else OpenedShare(of=site, kind="mask", share=pair[0])
                for site, pair in sorted(held.holds.items())
            ]
            reply = Opened(terms=unmask.terms, site=self._name, shares=tuple(shares))
            gone: dict[str, Any] = {"mask_seed": "", "self_seed": "", "seal_key": "", "own": None, "holds": {}}
            self._write(held.model_copy(update={"unmask": unmask, "opened": reply, **gone}))
            return reply

    def _need_the_same_masks(self, held: _Held, unmask: Unmask) -> None:
        """Raise `ProtocolError` unless every survivor says that it wears the masks of the sites that this one does.

        Else the server could give one site the shares of few others, whose masks then come off while its rows stay.
        """
        assert held.roster is not None
        for site, signature in zip(unmask.survivors, unmask.signatures, strict=True):
            told = Delivered(
                terms=held.roster.terms,
                roster=held.roster.digest,
                site=site,
                holds=tuple(sorted(held.holds)),
                signature=signature,
            )
            told.check(held.roster)

    @contextmanager
    def _turn(self) -> Iterator[SumIndex]:
        with self._thread, lock(self._folder), SumIndex.open(self._folder) as index:
            yield index

    def _path(self, terms: str) -> Path:
        return self._folder / f"{terms}.json"

    def _need(self, terms: str) -> _Held:
        held = self._read(terms)
        if held is None:
            raise ProtocolError("The site has made no keys for this secure sum")
        return held

    def _read(self, terms: str) -> _Held | None:
        path = self._path(terms)
        return self._load(path) if path.exists() else None

    def _load(self, path: Path) -> _Held:
        try:
            data = path.read_bytes()
            if self._read_last is None or self._read_last[0] != data:
                self._read_last = data, _Held.model_validate_json(data)
            return self._read_last[1]
        except OSError as error:
            raise storage_error(error, path, "read") from error
        except ValidationError as error:
            raise StorageError(
                f"{path} is not the record of a secure sum",
                hint="Restore it; without it this site may open more than one sum of the same samples",
            ) from error

    def _remove(self, terms: str) -> None:
        path = self._path(terms)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, path, "remove") from error

    def _write(self, held: _Held) -> None:
        self._read_last = self._worn = None  # what they hold may have served
        write_bytes(self._path(held.terms.digest), held.model_dump_json().encode())


def _need_sites(count: int, terms: Terms, what: str) -> None:
    """Raise `ProtocolError` for too few sites: of two, one that helps the server tells it the other's answer."""
    if count < (needed := max(terms.threshold, LEAST_SITES)):
        raise ProtocolError(f"{count} sites {what}; needed: {needed}")


def shared_columns(own: tuple[int, ...], other: tuple[int, ...]) -> NDArray[np.int64]:
    """Return at which columns of `own` the classes are that `other` has too, in ascending order of the classes."""
    place = {label: column for column, label in enumerate(own)}
    return np.array([place[label] for label in sorted(place.keys() & set(other))], dtype=np.int64)
