"""One site: its settings, its teacher, its copies of the public pools, and how it answers a question.

Lives here: everything between a validated question and the encoded rows. Does not live here: Flower (client/app)
and how a teacher comes to be (client/teacher).
"""

from __future__ import annotations

import logging
import threading
import time
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from consilience.client.coverage import Coverage, load_coverage
from consilience.client.sums import SumSite
from consilience.client.teacher import CalibratedTeacher, Teacher, describe_teacher, load_teacher
from consilience.common.data import open_data
from consilience.common.encoding import coverage_problem, decode, encode, encode_coverage
from consilience.common.errors import DataError, PoolError, ProtocolError, StorageError, TeacherError
from consilience.common.identity import key_fingerprint, load_key
from consilience.common.pool import Pool
from consilience.common.preprocessing import Images
from consilience.common.protocol import (
    Agreement,
    Answer,
    CalibrationCard,
    Contract,
    CoverageCard,
    Kind,
    Question,
    RefusalCode,
    SiteCard,
)
from consilience.common.settings import CoverageEncoding, Encoding, SiteSettings
from consilience.common.settings_file import load_settings
from consilience.common.sums.messages import Advert, MaskedRows, RowsQuestion, Terms

log = logging.getLogger(__name__)


class RefusedError(ProtocolError):
    """The site will not or cannot answer: `code` and the constant `reason` are all that a stranger is told."""

    def __init__(self, code: RefusalCode, reason: str) -> None:
        super().__init__(reason)
        self.code: RefusalCode = code
        self.reason = reason


class Site:
    """A data owner taking part. One per process and site file; safe to call from several threads."""

    def __init__(self, settings: SiteSettings, teacher: Teacher, coverage: Coverage | None = None) -> None:
        self.settings = settings
        self.teacher = teacher
        self.coverage = coverage
        self._lock = threading.Lock()
        self._verified: dict[str, Pool] = {}

    @classmethod
    def load(cls, path: Path) -> Site:
        """Read site.yaml, load teacher and, where there is one, coverage.

        Raises `SettingsError`, `TeacherError`, `CoverageError`, `StorageError`.
        """
        settings = load_settings(path, SiteSettings)
        return cls(settings, load_teacher(settings), load_coverage(settings))

    @property
    def calibration(self) -> str:
        """How the teacher is calibrated, in one line for the site's own eyes."""
        return self.teacher.told if isinstance(self.teacher, CalibratedTeacher) else "none"

    @cached_property
    def card(self) -> SiteCard:
        """What the site says of itself first."""
        description, accuracy = describe_teacher(self.settings)
        return SiteCard(
            name=self.settings.name,
            classes=self.teacher.classes,
            encodings=self.settings.policy.encodings,
            teacher=self.teacher.fingerprint,
            description=description,
            policy=self.settings.policy.version,
            holdout_accuracy=accuracy if self.settings.policy.holdout_accuracy else None,
            calibration=self._calibration() if self.settings.policy.holdout_accuracy else None,
            class_priors=self._class_priors() if self.settings.policy.class_priors else None,
            coverage=self._coverage_card(),
            identity=self._identity(),
        )

    def _identity(self) -> str | None:
        key = self.settings.key
        return key_fingerprint(load_key(key).public_key()) if key.exists() else None

    def _coverage_card(self) -> CoverageCard | None:
        allowed = self.settings.policy.coverage_encodings
        if self.coverage is None or not allowed:
            return None
        return CoverageCard(
            fingerprint=self.coverage.fingerprint, encodings=allowed, description=self.coverage.description
        )

    def agree(self, contract: Contract) -> Agreement:
        """Check that the site can take part: same teacher, its classes in place, every pool here and intact.

        The teacher is tried on the first batch, so that one that does not work is known before anybody counts on it.
        Raises `RefusedError`.
        """
        if contract.teacher != self.teacher.fingerprint:
            raise RefusedError("other-teacher", "the contract names another teacher")
        within = all(label < len(contract.labels) for label in contract.class_set)
        if len(contract.class_set) != len(self.teacher.classes) or not within:
            raise RefusedError("bad-question", "the contract's class set does not fit the site's classes")
        pools = [self._pool(digest) for digest in contract.pools]
        tried = min(self.settings.batch_size, len(pools[0]))
        began = time.perf_counter()
        with self._lock:
            self._score(pools[0], 0, tried, "log-probs")
        return Agreement(pools=contract.pools, samples=tried, seconds=time.perf_counter() - began)

    def answer(self, question: Question) -> Answer:
        """Score the samples a question asks about and encode them as it asks.

        Teacher and coverage always see the same aligned batches of the pool, whatever range is asked, so that a
        sample's answer is the same bytes however the server cuts its questions. Raises `RefusedError`.
        """
        policy, answering = self.settings.policy, self.teacher if question.kind == "log-probs" else self.coverage
        fingerprint = None if answering is None else answering.fingerprint
        if question.teacher != fingerprint or question.policy != policy.version:
            raise RefusedError("other-teacher", "the question is for another teacher or policy version")
        encodings = policy.encodings if question.kind == "log-probs" else policy.coverage_encodings
        if question.encoding not in encodings:
            raise RefusedError("encoding-not-allowed", "the site's policy does not allow this encoding")
        pool = self._pool(question.pool)
        if question.stop > len(pool):
            raise RefusedError("bad-question", "the question asks about samples that are not in the pool")
        began = time.perf_counter()
        with self._lock:
            rows = self._score(pool, question.start, question.stop, question.kind)
        if question.kind == "log-probs":
            data = encode(rows, cast(Encoding, question.encoding))
        else:
            data = encode_coverage(rows, cast(CoverageEncoding, question.encoding))
        return Answer(question, data, time.perf_counter() - began)

    @cached_property
    def sums(self) -> SumSite:
        """The site's part in secure sums. Raises `RefusedError` when it has no key to sign with."""
        if not self.settings.key.exists():
            raise RefusedError("sum-refused", "the site has no key to sign with in secure sums")
        return SumSite(self.settings.state / "sums", self.settings.name, load_key(self.settings.key))

    def sum_keys(self, terms: Terms) -> Advert:
        """Make keys for a secure sum over a pool that the site holds. Raises `RefusedError`, `ProtocolError`."""
        if terms.stop > len(self._pool(terms.pool)):
            raise RefusedError("bad-question", "the question asks about samples that are not in the pool")
        own = self.teacher
        return self.sums.advertise(
            terms, teacher=own.fingerprint, policy=self.settings.policy.version, classes=len(own.classes)
        )

    def masked_rows(self, question: RowsQuestion) -> MaskedRows:
        """Answer with masked rows, as precise as the policy allows answers to be. Raises as `sum_keys` does."""

        def answering(terms: Terms, start: int, stop: int) -> NDArray[np.float32]:
            own = terms.by_name[self.settings.name]
            if (own.teacher, own.policy) != (self.teacher.fingerprint, self.settings.policy.version):
                raise RefusedError("other-teacher", "the question is for another teacher or policy version")
            pool, finest = self._pool(terms.pool), self.settings.policy.encodings[0]
            with self._lock:
                rows = self._score(pool, start, stop, "log-probs")
            return decode(encode(rows, finest), len(rows), rows.shape[1], finest)

        return self.sums.rows(question, answering)

    def _coverage_of(self, images: Images) -> NDArray[np.float32]:
        """Return (n,) coverage of one batch. Raises `TeacherError` when it is none."""
        assert self.coverage is not None  # the question names its fingerprint
        scores = np.asarray(self.coverage.scores(images))
        if scores.shape != (len(images),) or scores.dtype.kind != "f":
            raise TeacherError(f"Coverage of {len(images)} images has shape {scores.shape} and type {scores.dtype}")
        if problem := coverage_problem(scores):
            raise TeacherError(f"Coverage: {problem}")
        return scores.astype(np.float32)

    def _score(self, pool: Pool, start: int, stop: int, kind: Kind) -> NDArray[np.float32]:
        """Return (stop - start, classes) log-probabilities or (stop - start,) coverage. Raises `RefusedError`."""
        teaches, rows_asked = kind == "log-probs", stop - start
        size, scores = self.settings.batch_size, self.teacher.log_probs if teaches else self._coverage_of
        out = np.empty((rows_asked, len(self.teacher.classes)) if teaches else rows_asked, np.float32)
        for first in range(start - start % size, stop, size):
            last = min(first + size, len(pool))
            try:
                rows = scores(pool.read(first, last))
            except TeacherError as error:
                what = "teacher" if teaches else "coverage"
                raise RefusedError("teacher-failed", f"the site's {what} gave no usable answer") from error
            low, high = max(start, first), min(stop, last)
            out[low - start : high - start] = rows[low - first : high - first]
        return out

    def _pool(self, digest: str) -> Pool:
        """Return the site's copy of a pool, verified once per process."""
        with self._lock:
            if digest not in self._verified:
                self._verified[digest] = self._find(digest)
            return self._verified[digest]

    def _find(self, digest: str) -> Pool:
        damaged: PoolError | StorageError | None = None
        for folder in self.settings.pools:
            try:
                pool = Pool.open(folder)
                if pool.digest == digest:
                    pool.verify()
                    return pool
            except (PoolError, StorageError) as error:
                log.warning("a pool cannot be used: %s", error)
                damaged = error if folder.exists() else damaged
        if damaged is not None:
            raise RefusedError("pool-damaged", "the site's copy of a pool is damaged") from damaged
        raise RefusedError("unknown-pool", "the site has no copy of this pool")

    def _calibration(self) -> CalibrationCard | None:
        record = self.teacher.record if isinstance(self.teacher, CalibratedTeacher) else None
        if record is None or record.before is None or record.after is None:
            return None
        return CalibrationCard(
            method=record.method,
            samples=record.samples,
            ece_before=record.before.ece,
            ece_after=record.after.ece,
            nll_before=record.before.nll,
            nll_after=record.after.nll,
        )

    def _class_priors(self) -> tuple[float, ...] | None:
        if self.settings.data is None:
            return None
        data = open_data(self.settings.data)
        labels = data.need_labels("The site's private data")
        missing = [name for name in self.teacher.classes if name not in data.class_names]
        if missing:
            raise DataError(
                f"The private data have no class {missing[0]!r}; they have: {', '.join(data.class_names[:20])}",
                hint="Name the teacher's classes as the data do, or set policy.class_priors: false",
            )
        counts = np.array([np.sum(labels == data.class_names.index(name)) for name in self.teacher.classes])
        return tuple(float(share) for share in counts / counts.sum()) if counts.all() else None
