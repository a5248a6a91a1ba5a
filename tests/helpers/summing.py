"""A secure sum in one process: sites with made-up answers, and a driver for its rounds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from numpy.typing import NDArray

from consilience.client.sums import Noise, SumSite
from consilience.common.identity import PrivateKey, key_fingerprint
from consilience.common.sums.messages import Member, Terms, default_threshold
from consilience.server.secure_sums import SecureSum
from consilience.server.unmasking import Summed, unmask_sums

DIGEST, POLICY = "a" * 64, "c" * 16


@cache
def identity(name: str) -> PrivateKey:
    """A key of a site's, made once a session."""
    return ec.generate_private_key(ec.SECP384R1())


def make_terms(class_sets: Mapping[str, Sequence[int]], samples: int, **changes: Any) -> Terms:
    """Terms over these sites; `weights` and `noise` by site. Class 3 is called class-3."""
    weights, noise = changes.pop("weights", {}), changes.pop("noise", {})
    members = tuple(
        Member(
            site=site,
            classes=tuple(int(label) for label in class_sets[site]),
            weight=weights.get(site, 1.0),
            teacher=DIGEST,
            policy=POLICY,
            identity=key_fingerprint(identity(site).public_key()),
            noise=noise.get(site),
        )
        for site in sorted(class_sets)
    )
    start = changes.pop("start", 0)
    fields = {
        "job": "job",
        "contract": DIGEST,
        "pool": DIGEST,
        "start": start,
        "stop": start + samples,
        "labels": names_of(range(1 + max(max(m.classes) for m in members))),
        "threshold": default_threshold(len(members)),
        "members": members,
    }
    return Terms(**{**fields, **changes})


def digests_of(terms: Terms) -> bytes:
    """Digests of made-up images: sample i is the same one in pools `a`... and `b`..., and another in any other."""
    pool = b"same" if terms.pool in (DIGEST, "b" * 64) else terms.pool[:4].encode()
    return b"".join(pool + index.to_bytes(4, "big") for index in range(terms.start, terms.stop))


def new_site(folder: Path, name: str, key: str = "") -> SumSite:
    """A site with made-up images, and the key `key`; by default its own."""
    return SumSite(folder, name, identity(key or name), digests_of)


def names_of(classes: Iterable[int]) -> tuple[str, ...]:
    """The names of classes in made-up terms."""
    return tuple(f"class-{label}" for label in classes)


class Sums:
    """Server and sites of one secure sum. `answers`: site -> (n, k) log-probabilities of the terms' samples.

    `noise`: site -> what it adds its noise by, where the terms name some.
    """

    def __init__(
        self,
        folder: Path,
        terms: Terms,
        answers: Mapping[str, NDArray[Any]],
        *,
        piece: int = 7,
        noise: Callable[[str], Noise] | None = None,
    ) -> None:
        self.folder, self.terms, self.answers, self.piece, self.noise = folder, terms, answers, piece, noise
        self.server = SecureSum(folder / "server" / terms.digest, terms)
        self.sites = {m.site: new_site(folder / "sites" / m.site, m.site) for m in terms.members}
        self.bytes = 0

    def advertise(self, without: Collection[str] = (), owners: int = 1) -> None:
        """Round 0. `owners`: of how many sites each wants its classes to be."""
        for member in self.terms.members:
            if member.site not in without:
                own: dict[str, Any] = {"teacher": DIGEST, "policy": POLICY, "classes": names_of(member.classes)}
                advert = self.sites[member.site].advertise(self.terms, **own, noise=member.noise, owners=owners)
                self.server.add_advert(member.site, advert)

    def share(self, without: Collection[str] = ()) -> None:
        """Round 1."""
        roster = self.server.roster()
        for site in roster.places:
            if site not in without:
                self.server.add_sealed(site, self.sites[site].share(roster))

    def deliver(self, without: Collection[str] = ()) -> None:
        """Round 2, first half."""
        for site in self.server.sharers():
            if site not in without:
                self.server.check_delivered(site, self.sites[site].deliver(self.server.delivery(site)))

    def send(self, site: str, pieces: int | None = None) -> None:
        """Round 2, second half, for one site: all of its rows, or the first pieces."""
        first = self.terms.start
        for question in self.server.questions(site, self.piece)[:pieces]:
            noise = None if self.noise is None else self.noise(site)
            rows = self.sites[site].rows(
                question, lambda _, low, high: self.answers[site][low - first : high - first], noise
            )
            self.bytes += len(rows.data)
            self.server.add_rows(site, rows)

    def open(self, without: Collection[str] = ()) -> None:
        """Round 3."""
        unmask = self.server.unmask()
        for site in self.server.sharers():
            if site not in without:
                self.server.add_opened(site, self.sites[site].open(unmask))

    def run(self, lost: Collection[str] = (), owners: int = 1) -> Summed:
        """All rounds; the sites `lost` go away in the middle of sending their rows. `owners`: see `advertise`."""
        self.advertise(owners=owners)
        self.share()
        self.deliver()
        for member in self.terms.members:
            self.send(member.site, 1 if member.site in lost else None)
        self.open(without=lost)
        return unmask_sums(self.server)


def draw(class_sets: Mapping[str, Sequence[int]], samples: int, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Made-up log-probabilities of every site."""
    random = np.random.default_rng(seed)
    out = {}
    for site, classes in sorted(class_sets.items()):
        logits = random.normal(0, 2, (samples, len(classes)))
        out[site] = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
    return out


def open_sums(
    terms: Terms, answers: Mapping[str, NDArray[Any]], sites: Collection[str] | None = None
) -> NDArray[np.float64]:
    """W (n, L) as a sum of open answers."""
    out = np.zeros((len(terms), len(terms.labels)))
    for member in terms.members:
        if sites is None or member.site in sites:
            p = np.exp(answers[member.site].astype(np.float64))
            out[:, list(member.classes)] += member.weight * p / p.sum(axis=1, keepdims=True)
    return out
