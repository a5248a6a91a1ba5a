"""A site's rounds of secure sums: its policy, ledger and teacher on one side, its record of sums on the other.

Lives here: what the site checks in each round before it takes part, and the rows and the noise that it adds. Does not
live here: keys, masks and the record (client/sums), messages in and out (client/app), answers that leave openly
(client/site).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from consilience.client.ledger_rows import Asked, SumState, summed, unsummable
from consilience.client.policy import RefusedError, asked_by, check_job, check_peers, check_sealed
from consilience.client.privacy.noise import Secret, load_secret
from consilience.client.privacy.sum_noise import share_of_noise
from consilience.client.sum_index import DIGEST_BYTES, image_digests
from consilience.client.sums import SumSite
from consilience.common.cards import SumNoiseCard
from consilience.common.encoding import decode
from consilience.common.identity import load_key
from consilience.common.protocol import MOST_ANSWER_BYTES
from consilience.common.settings import SiteSettings, SumNoise
from consilience.common.sums.messages import (
    Advert,
    Delivered,
    Delivery,
    MaskedRows,
    Opened,
    Roster,
    RowsQuestion,
    SealedShares,
    Terms,
    Unmask,
)
from consilience.common.sums.revealed import determined

if TYPE_CHECKING:
    from consilience.client.site import Site

log = logging.getLogger(__name__)


def noise_card(settings: SiteSettings) -> SumNoiseCard | None:
    """Return the noise that the site needs a secure sum to carry; None where it needs none."""
    private = settings.privacy
    return SumNoiseCard(sigma=private.sigma, honest=private.honest) if isinstance(private, SumNoise) else None


class Summing:
    """One site in its secure sums. Safe to call from several threads."""

    def __init__(self, site: Site) -> None:
        self.site, self.settings = site, site.settings
        self._images: dict[str, bytes] = {}

    @cached_property
    def sums(self) -> SumSite:
        """The site's part in secure sums. Raises `RefusedError` when it has no key to sign with."""
        if not self.settings.key.exists():
            raise RefusedError("sum-refused", "the site has no key to sign with in secure sums")
        return SumSite(
            self.settings.state / "sums", self.settings.name, load_key(self.settings.key), self._summed_images
        )

    def _summed_images(self, terms: Terms) -> bytes:
        """Return 8 bytes for each image that a sum is about. Raises `RefusedError`."""
        pool = self.site.pool(terms.pool)
        with self.site.lock:
            if pool.digest not in self._images:
                self._images[pool.digest] = image_digests(pool)
            return self._images[pool.digest][terms.start * DIGEST_BYTES : terms.stop * DIGEST_BYTES]

    def keys(self, terms: Terms) -> Advert:
        """Make keys for a secure sum over a pool that the site holds. Raises `RefusedError`, `ProtocolError`."""
        check_peers(self.settings, terms)
        self.site.encoder.check_kind("log-probs")
        if terms.stop > (size := len(self.site.pool(terms.pool))):
            raise RefusedError("bad-question", "the question asks about samples that are not in the pool")
        policy = self.settings.policy
        whole = self.site.question(terms.job, terms.pool, size, "log-probs", policy.encodings[0])
        self._check_job(terms.job, (asked_by(whole, self.site.summed.use),))
        own, sums = self.site.teacher, self.site.ledger.spent.sums
        self._need_known(own.fingerprint)
        self.sums.need({digest: state for digest, (state, teacher) in sums.items() if teacher == own.fingerprint})
        advert = self.sums.advertise(
            terms,
            teacher=own.fingerprint,
            policy=policy.version,
            classes=own.classes,
            noise=noise_card(self.settings),
            owners=policy.sum_owners,
        )
        told = determined({member.site: member.classes for member in terms.members})[self.settings.name]
        if told and noise_card(self.settings) is None:
            log.warning(
                "the sum of job %s tells this site's own answers for %d of its %d classes, if nobody is lost",
                terms.job,
                len(told),
                len(own.classes),
            )
        return advert

    def share(self, roster: Roster) -> SealedShares:
        """Share the site's seeds, if the policy still allows the job. Raises as `keys` does."""
        self._begun(roster.terms)
        return self.sums.share(roster)

    def deliver(self, delivery: Delivery) -> Delivered:
        """Take the others' shares, if the policy still allows the job. Raises as `keys` does."""
        self._begun(delivery.terms)
        return self.sums.deliver(delivery)

    def open(self, unmask: Unmask) -> Opened:
        """Open shares, if the policy still allows the job. Raises as `keys` does."""
        self._begun(unmask.terms)
        opened = self.sums.open(unmask)
        self._note(unmask.terms, "opened")
        return opened

    def _note(self, digest: str, state: SumState) -> None:
        """Let the ledger, and its head, tell how far a sum is, before what it is about leaves.

        So an older copy of `state`, by which the site would open the other seeds or sum the same images anew, is an
        older copy of the ledger too. The sum's own record is written first: what is interrupted then did not leave.
        """
        with self.site.lock, self.site.ledger.alone():
            if self.site.ledger.spent.sums.get(digest, ("", ""))[0] not in (state, "opened"):
                terms = self.sums.terms_of(digest)
                teacher = terms.by_name[self.settings.name].teacher
                self.site.ledger.append(summed(terms.job, digest, state, teacher))

    def _begun(self, digest: str) -> None:
        """See that the policy still allows a sum's job, and that the record of it knows all that the ledger tells.

        So an older copy of the record alone opens no other seeds. Raises as `keys` does, and `StorageError`.
        """
        self._check_job(self.sums.terms_of(digest).job)
        if (told := self.site.ledger.spent.sums.get(digest)) is not None:
            self.sums.need({digest: told[0]})

    def _need_known(self, teacher: str) -> None:
        """Refuse where it is not known what was summed with a teacher: the same images could be summed twice."""
        with self.site.lock, self.site.ledger.alone():
            unknown = self.site.ledger.spent.unsummable
            if "" in unknown:  # with whichever is asked for a sum first
                self.site.ledger.append(unsummable(teacher))
                unknown = self.site.ledger.spent.unsummable
        if teacher in unknown:
            raise RefusedError(
                "sum-refused",
                "the site's rules for secure sums do not allow it",
                "the ledger was begun anew where rows may be lost, and it is not known what was summed with this "
                "classifier: train another one, with another seed (docs/secure_sums.md)",
            )

    def _check_job(self, job: str, asked: Iterable[Asked] = ()) -> None:
        with self.site.lock:
            self.site.ledger.refresh()
            check_sealed(self.settings.policy, sealed=False)
            check_job(self.settings.policy, self.site.ledger, job, asked)

    def rows(self, question: RowsQuestion) -> MaskedRows:
        """Answer with masked rows, as precise as the policy allows answers to be. Raises as `Site.answer` does."""

        def answering(terms: Terms, start: int, stop: int) -> NDArray[np.float32]:
            check_peers(self.settings, terms)
            self.site.encoder.check_kind("log-probs")
            own, finest = terms.by_name[self.settings.name], self.settings.policy.encodings[0]
            if (own.teacher, own.policy) != (self.site.teacher.fingerprint, self.settings.policy.version):
                raise RefusedError("other-teacher", "the question is for another teacher or policy version")
            if (stop - start) * len(self.site.teacher.classes) * 8 > MOST_ANSWER_BYTES:  # as they are added up, in fp64
                raise RefusedError("bad-question", "the question asks about more samples than one answer can hold")
            pool = self.site.pool(terms.pool)
            asked = self.site.question(terms.job, terms.pool, len(pool), "log-probs", finest)
            part = asked.model_copy(update={"start": start, "stop": stop})
            with self.site.lock:
                data = self.site.given(self.site.summed, part, pool)
            return decode(data, stop - start, len(self.site.teacher.classes), asked.encoding)

        def noise(terms: Terms, start: int, stop: int, rows: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
            private = self.settings.privacy
            if not isinstance(private, SumNoise):
                raise RefusedError("other-teacher", "the question is for another teacher or policy version")
            images = self.site.pool(terms.pool).read(start, stop)
            return share_of_noise(private, self._secret, terms, self.settings.name, images, rows.astype(np.float32))

        self._begun(question.terms)
        masked = self.sums.rows(question, answering, noise)
        self._note(question.terms, "given")
        return masked

    @cached_property
    def _secret(self) -> Secret:
        """What noise in sums follows from. Raises `IdentityError`, `StorageError`."""
        return load_secret(self.settings)
