"""One site: its settings, its teacher, its copies of the public pools, and how it answers a question.

Lives here: everything between a validated question and the encoded rows. Does not live here: Flower (client/app),
secure sums (client/summing), and how a teacher comes to be (client/teacher).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import cast

import numpy as np
from numpy.typing import NDArray

from consilience.client.card import card_of, private_figures
from consilience.client.components import not_released, release
from consilience.client.coverage import Coverage, load_coverage
from consilience.client.features import OpenTap, Together, open_taps
from consilience.client.ledger import Ledger
from consilience.client.ledger_rows import Asked, card_told
from consilience.client.policy import (
    Demand,
    RefusedError,
    Subset,
    asked_by,
    check_budget,
    check_bytes,
    check_demand,
    check_encoding,
    check_job,
    check_job_key,
    check_open,
    check_pool,
)
from consilience.client.privacy import Event, answering_costs, describe_privacy
from consilience.client.privacy.spending import Allowance, entries_of, loss_of
from consilience.client.released import Released
from consilience.client.shaping import check_floor, shape, shape_odds
from consilience.client.summing import Summing
from consilience.client.tails import OpenTail, TailDesk, open_tail
from consilience.client.teacher import CalibratedMulti, CalibratedTeacher, MultiTeacher, Teacher, load_any
from consilience.common.cards import SiteCard
from consilience.common.encoding import (
    coverage_bytes,
    coverage_problem,
    encode,
    encode_coverage,
    encode_features,
    feature_bytes,
    row_bytes,
)
from consilience.common.errors import PoolError, StorageError, TeacherError
from consilience.common.identity import load_key
from consilience.common.pool import Pool
from consilience.common.preprocessing import Images
from consilience.common.protocol import (
    LABEL_KINDS,
    MOST_ANSWER_BYTES,
    Agreement,
    Answer,
    Contract,
    Guarantee,
    Kind,
    Question,
    TailDemand,
)
from consilience.common.sealing import seal_answer
from consilience.common.settings import (
    CoverageEncoding,
    DpSgd,
    Encoding,
    FeatureEncoding,
    SiteSettings,
    largest_sent,
)
from consilience.common.settings_file import load_settings
from consilience.common.subsets import subset_mask
from consilience.common.tails import BlocksQuestion, Carried, Floats, TailQuestion, packed
from consilience.common.vouching import Signer

log = logging.getLogger(__name__)


Scores = Callable[[Images], NDArray[np.float32]]
"""(n, H, W, C) uint8 images -> (n, ...) float32. Raises `TeacherError`."""


class Site:
    """A data owner taking part. One per process and site file; safe to call from several threads."""

    def __init__(
        self,
        settings: SiteSettings,
        teacher: Teacher | MultiTeacher,
        coverage: Coverage | None = None,
        taps: tuple[OpenTap, ...] = (),
        tail: OpenTail | None = None,
    ) -> None:
        """`teacher` is what `settings.teacher.labels` says: a `MultiTeacher` where that is multi."""
        check_floor(settings.policy, len(teacher.classes))
        self.settings = settings
        self.teacher = teacher
        self.kind: Kind = LABEL_KINDS[settings.teacher.labels]
        """What the teacher's answers are."""
        self.coverage = coverage
        self.taps = taps
        self.tail = TailDesk(settings, tail)
        """What answers about the teacher's last blocks."""
        self._together = Together()
        self.lock = threading.Lock()
        """Held while an answer is made: the ledger and the teacher are for one thread at a time."""
        self._verified: dict[str, Pool] = {}
        self._allowance = Allowance(settings)
        # of the training whose teacher answers here, whatever is trained beside it meanwhile
        self._training = answering_costs(settings, 1) if isinstance(settings.privacy, DpSgd) else None

    @classmethod
    def load(cls, path: Path) -> Site:
        """Read site.yaml, load teacher and, where there are any, coverage, taps and tail that the policy lets out.

        Raises `SettingsError`, `TeacherError`, `CoverageError`, `PoolError`, `StorageError`. The ledger is opened when
        it is needed.
        """
        settings = load_settings(path, SiteSettings)
        teacher = load_any(settings)
        coverage, taps = load_coverage(settings, teacher), open_taps(settings, teacher)
        return cls(settings, teacher, coverage, taps, open_tail(settings, teacher))

    def close(self) -> None:
        """Let go of what is open; another use opens it again."""
        with self.lock:
            if (ledger := self.__dict__.pop("ledger", None)) is not None:
                ledger.close()
            self.__dict__.pop("released", None)
            self.__dict__.pop("summed", None)

    @property
    def calibration(self) -> str:
        """How the teacher is calibrated, in one line for the site's own eyes."""
        return self.teacher.told if isinstance(self.teacher, CalibratedTeacher | CalibratedMulti) else "none"

    @cached_property
    def ledger(self) -> Ledger:
        """What left so far. Raises `LedgerError`, `StorageError`; the next use tries again."""
        return Ledger.open(self.settings)

    @cached_property
    def released(self) -> Released:
        """The answers that left. Raises what `ledger` raises."""
        return Released(self.settings.state / "released", self.ledger)

    @cached_property
    def summed(self) -> Released:
        """The answers of which only sums over sites left. Raises what `ledger` raises."""
        return Released(self.settings.state / "released", self.ledger, "sums")

    @cached_property
    def card(self) -> SiteCard:
        """What the site says of itself first. Raises `DataError`, `TeacherError`, `IdentityError`, `StorageError`."""
        return card_of(self.settings, self.teacher, self.coverage, self.taps, self.tail.tail, self.signer)

    def tell_card(self, job: str) -> SiteCard:
        """Return the card for a server: what it tells of private data is in the ledger, once, before it leaves.

        Raises what `card` and `ledger` raise.
        """
        card = self.card
        if told := private_figures(card):
            entry = card_told(job, card.teacher, card.policy, told)
            with self.lock, self.ledger.alone():
                if next(self.ledger.rows(0, entry.subject), None) is None:
                    self.ledger.append(entry)
        return card

    @cached_property
    def signer(self) -> Signer | None:
        """What signs the site's answers; None without a key. Raises `IdentityError`, `StorageError`."""
        key = self.settings.key
        return Signer(load_key(key), self.settings.name, self.teacher.classes) if key.exists() else None

    def agree(self, contract: Contract) -> Agreement:
        """Check that the site can take part: same teacher, its classes in place, every pool here and intact.

        The policy must allow the job, and all of its pools within the limits. The teacher, and every tap that is to be
        told, is tried on the first batch, so that one that does not work is known before anybody counts on it. After
        all of that the principal components that the contract asks for are counted, and come with the agreement. Raises
        `RefusedError`, `LedgerError`, `StorageError`, `IdentityError`, `ProtocolError`.
        """
        if contract.teacher != self.teacher.fingerprint:
            raise RefusedError("other-teacher", "the contract names another teacher")
        check_job_key(self.settings, contract.job, contract.job_key)
        within = all(label < len(contract.labels) for label in contract.class_set)
        if len(contract.class_set) != len(self.teacher.classes) or not within:
            raise RefusedError("bad-question", "the contract's class set does not fit the site's classes")
        if contract.secure_sum:
            self.check_kind("log-probs")
        taps, reduced = self.taps_named(contract.features), self.taps_named(contract.components)
        if plain := [tap.card.name for tap in reduced if tap.card.components is None]:
            raise RefusedError(
                "bad-question", "the contract asks for components of a tap that has none", f"of {', '.join(plain)}"
            )
        pools = [self.pool(digest) for digest in dict.fromkeys(contract.pools)]
        tried = min(self.settings.batch_size, len(pools[0]))
        subsets = {} if contract.subset is None else {pools[0].digest: _subset(contract, len(pools[0]))}
        with self.lock:
            self.ledger.refresh()
            demand = self.demand(
                contract.job,
                pools[:1] if contract.secure_sum else pools,
                contract.encoding,
                coverage=contract.coverage,
                taps=taps,
                features=contract.feature_encoding,
                summed=contract.secure_sum,
                components=reduced,
                tail=contract.tail,
                subsets=subsets,
            )
            check_demand(self.settings.policy, self.ledger, demand)
            fresh = self.new_of(demand)
            new = sum(fresh)
            features = demand.feature_bytes(fresh, not_released(self.ledger, demand.components))
            self.permit(contract.job, demand.asked, new, features)
            guarantee = self._guarantee(new)
            began = time.perf_counter()
            self._try(pools[0], tried, self._told, "teacher")
            seconds = time.perf_counter() - began
            for tap in taps:
                self._try(pools[0], tried, tap.values, f"tap {tap.card.name}")
            if contract.tail is not None:
                self.tail.check(self.ledger, contract.job, contract.tail)
            self._together.expect(taps)
            enclosed = release(
                self.settings,
                self.ledger,
                contract,
                reduced,
                self.signer,
                permit=lambda count: self.permit(contract.job, demand.asked, 0, count),
                costs=lambda: entries_of(contract.job, self.costs(1)),
            )
        return Agreement(pools=contract.pools, samples=tried, seconds=seconds, guarantee=guarantee, enclosed=enclosed)

    def _guarantee(self, samples: int) -> Guarantee | None:
        """Return what everything that left comes to once so many samples more have; None where nothing can be said."""
        mechanism = describe_privacy(self.settings)
        if not mechanism:
            return None
        spent = loss_of(self.settings, self.ledger, self.costs(samples) if samples else ())
        if spent.epsilon is None or spent.unit is None:
            return None
        return Guarantee(mechanism=mechanism, unit=spent.unit, epsilon=spent.epsilon, delta=spent.delta)

    def taps_named(self, names: Sequence[str]) -> tuple[OpenTap, ...]:
        """Return the taps with these names that the site tells. Raises `RefusedError` for one that it does not."""
        known = {tap.card.name: tap for tap in self.taps}
        if unknown := [name for name in names if name not in known]:
            raise RefusedError(
                "bad-question",
                "the contract names a tap that the site does not tell",
                f"{', '.join(unknown)}; policy.features.taps lets out: {', '.join(known) or 'none'}",
            )
        return tuple(known[name] for name in dict.fromkeys(names))

    def demand(
        self,
        job: str,
        pools: Sequence[Pool],
        encoding: Encoding,
        *,
        coverage: bool,
        summed: bool,
        taps: Sequence[OpenTap] = (),
        features: FeatureEncoding = "f16",
        components: Sequence[OpenTap] = (),
        first: bool = True,
        tail: TailDemand | None = None,
        subsets: Mapping[str, Subset] = MappingProxyType({}),
    ) -> Demand:
        """Return all that a job would ask of this site about `pools`: `coverage`: that too, if the site offers it.

        `taps`: those whose features of the first pool it asks for too, as `features`; without `first`, of every pool,
        any of which may be the one. `components`: those of them whose principal components it asks for. `summed`: in
        secure sums, to which answers are added as precise as the policy allows, whatever `encoding` is. `tail`: what it
        asks of the site's tail, which the policy must open. `subsets`: pool -> which of its samples are asked about,
        where not all. Raises `RefusedError` where the policy does not open the tail.
        """
        policy = self.settings.policy
        kinds: list[tuple[Kind, Encoding]] = [(self.kind, policy.encodings[0] if summed else encoding)]
        if coverage and self.card.coverage is not None:
            kinds.append(("coverage", self.card.coverage.encodings[0]))
        questions = [self.question(job, pool.digest, len(pool), *kind) for kind in kinds for pool in pools if len(pool)]
        learned_from = [pool for pool in (pools[:1] if first else pools) if len(pool)]
        questions += [
            self.question(job, pool.digest, len(pool), "features", features, tap)
            for pool in learned_from
            for tap in taps
        ]
        widths = tuple(self._width(question) for question in questions)
        cards = tuple(tap.card for tap in components)
        use = self.summed.use if summed else ""
        opened = None if tail is None else self.tail.need(job).asked
        return Demand(job, tuple(questions), use, widths, cards, opened, subsets)

    def new_of(self, demand: Demand) -> list[int]:
        """Return how many samples of each question were not released yet. Raises what `ledger` raises."""
        released = self.summed if demand.use else self.released
        found = []
        for asked in demand.questions:
            missing = released.missing(self._kept_as(asked), len(asked))
            subset = demand.subsets.get(asked.pool)
            found.append(int(missing.sum()) if subset is None else subset.new(missing))
        return found

    def question(
        self,
        job: str,
        pool: str,
        size: int,
        kind: Kind,
        encoding: Encoding | CoverageEncoding | FeatureEncoding,
        tap: OpenTap | None = None,
    ) -> Question:
        """Return the question about all `size` samples, at least 1, of a pool that this site would answer now.

        For kind `coverage` the site must have one; for kind `features` it is about `tap`.
        """
        if tap is not None:
            fingerprint = tap.card.fingerprint
        else:
            answering = self.coverage if kind == "coverage" else self.teacher
            assert answering is not None
            fingerprint = answering.fingerprint
        return Question(
            job=job,
            pool=pool,
            start=0,
            stop=size,
            kind=kind,
            encoding=encoding,
            teacher=fingerprint,
            policy=self.settings.policy.version,
        )

    def answer(self, question: Question) -> Answer:
        """Score the samples a question asks about and encode them as it asks; what left before leaves as it did.

        It is signed, and sealed where the question names a job key; the plain rows are what is kept and counted.
        Teacher, coverage and taps always see the same aligned batches of the pool, whatever range is asked, so that a
        sample's answer is the same bytes however the server cuts its questions. Raises `RefusedError`, `LedgerError`,
        `StorageError`: nothing leaves then.
        """
        policy = self.settings.policy
        self.check_kind(question.kind)
        if question.teacher not in self._fingerprints(question.kind) or question.policy != policy.version:
            raise RefusedError("other-teacher", "the question is for another teacher or policy version")
        check_open(policy)
        check_job_key(self.settings, question.job, question.job_key)
        check_encoding(policy, question.kind, question.encoding)
        pool = self.pool(question.pool)
        if question.stop > len(pool):
            raise RefusedError("bad-question", "the question asks about samples that are not in the pool")
        if len(question) * self._width(question) > MOST_ANSWER_BYTES:
            raise RefusedError("bad-question", "the question asks about more samples than one answer can hold")
        signer, began = self.signer, time.perf_counter()
        with self.lock:
            data = self.given(self.released, question, pool)
        seconds = time.perf_counter() - began
        answer = Answer(question, data, seconds, b"" if signer is None else signer.vouch(question, data))
        return answer if question.job_key is None else seal_answer(answer, self.settings.name)

    def ask_tail(self, question: TailQuestion, given: tuple[Floats, ...]) -> Carried:
        """Answer a question about features at a block. Raises as `TailDesk.ask`: nothing leaves then."""
        with self.lock:
            self.ledger.refresh()
            return Carried(question, packed([self.tail.ask(self.ledger, question, given)]))

    def lend_blocks(self, question: BlocksQuestion) -> Carried:
        """Give a piece of the blocks that the policy lends. Raises as `TailDesk.lend`: nothing leaves then."""
        with self.lock:
            self.ledger.refresh()
            return Carried(question, self.tail.lend(self.ledger, question))

    def check_kind(self, kind: Kind) -> None:
        """Refuse to answer as the other kind of teacher would. Raises `RefusedError`."""
        if kind in LABEL_KINDS.values() and kind != self.kind:
            reasons: dict[Kind, str] = {
                "log-probs": "the site's teacher is multi-label: it tells log-odds of its labels",
                "log-odds": "the site's teacher has one label an image: it tells log-probabilities of its classes",
            }
            detail = f"asked for {kind}; teacher.labels is {self.settings.teacher.labels}"
            raise RefusedError("bad-question", reasons[kind], detail)

    def _fingerprints(self, kind: Kind) -> tuple[str, ...]:
        """Return the fingerprints of what answers questions of a kind."""
        if kind == "features":
            return tuple(tap.card.fingerprint for tap in self.taps)
        answering = self.coverage if kind == "coverage" else self.teacher
        return () if answering is None else (answering.fingerprint,)

    def _tap(self, question: Question) -> OpenTap:
        return next(tap for tap in self.taps if tap.card.fingerprint == question.teacher)

    def given(self, released: Released, question: Question, pool: Pool) -> bytes:
        """Return the encoded rows of a question, kept and counted among the answers `released`."""
        question = self._kept_as(question)
        width = self._width(question)
        a_sample = width if question.kind == "features" else 0
        asked = (asked_by(question, released.use),)
        return released.give(
            question,
            size=len(pool),
            width=width,
            score=lambda new: self._encoded(question, pool, new),
            permit=lambda samples: self.permit(question.job, asked, samples, samples * a_sample),
            costs=lambda samples: entries_of(question.job, self.costs(samples)),
        )

    def _kept_as(self, question: Question) -> Question:
        """Return the question under the one name that its answer's bytes have: `top-K` of more classes is of all.

        By another name the same would be answered, and counted, anew: by a teacher that never says the same twice,
        with other probabilities.
        """
        most = len(self.teacher.classes)
        many = (largest_sent(question.encoding) or 0) > most
        return question.model_copy(update={"encoding": f"top-{most}"}) if many else question

    def _width(self, question: Question) -> int:
        """Return the bytes of one sample's answer."""
        if question.kind == "coverage":
            return coverage_bytes(cast(CoverageEncoding, question.encoding))
        if question.kind == "features":
            return feature_bytes(self._tap(question).card.values, cast(FeatureEncoding, question.encoding))
        return row_bytes(len(self.teacher.classes), question.encoding, odds=question.kind == "log-odds")

    def costs(self, samples: int) -> tuple[Event, ...]:
        """Return the events of answering about so many samples, at least 1."""
        return answering_costs(self.settings, samples) if self._training is None else self._training

    def permit(self, job: str, asked: Iterable[Asked], samples: int, features: int) -> None:
        """Refuse what the policy does not allow now, or so many samples, or bytes of `features`, more.

        Raises `RefusedError`.
        """
        check_job(self.settings.policy, self.ledger, job, asked)
        check_budget(self.settings.policy, self.ledger, job, samples)
        check_bytes(self.settings.policy, self.ledger, job, features)
        if samples or features:
            self._allowance.check(self.ledger, job, self.costs(max(samples, 1)))

    def _encoded(self, question: Question, pool: Pool, new: NDArray[np.bool_]) -> bytes:
        """Return the encoded rows of those samples of a question's range that the mask `new` chooses.

        An encoding is made of what the finest one allowed says, and tells nothing more.
        """
        policy = self.settings.policy
        if question.kind == "coverage":
            covered = self._score(pool, question.start, new, self._coverage_of, "coverage")
            wanted, most = cast(CoverageEncoding, question.encoding), policy.coverage_encodings[0]
            return b"".join(encode_coverage(rows, wanted, within=most) for rows in covered)
        if question.kind == "features":
            tap = self._tap(question)
            told = self._score(pool, question.start, new, partial(self._together.values, tap), f"tap {tap.card.name}")
            form, finest = cast(FeatureEncoding, question.encoding), policy.features.encodings[0]
            return b"".join(encode_features(rows, form, within=finest) for rows in told)
        scored = self._score(pool, question.start, new, self._told, "teacher")
        odds = question.kind == "log-odds"
        return b"".join(encode(rows, question.encoding, odds=odds, within=policy.encodings[0]) for rows in scored)

    @cached_property
    def summing(self) -> Summing:
        """The site's part in secure sums."""
        return Summing(self)

    def _coverage_of(self, images: Images) -> NDArray[np.float32]:
        """Return (n,) coverage of one batch. Raises `TeacherError` when it is none."""
        assert self.coverage is not None  # the question names its fingerprint
        scores = np.asarray(self.coverage.scores(images))
        if scores.shape != (len(images),) or scores.dtype.kind != "f":
            raise TeacherError(f"Coverage of {len(images)} images has shape {scores.shape} and type {scores.dtype}")
        if problem := coverage_problem(scores):
            raise TeacherError(f"Coverage: {problem}")
        return scores.astype(np.float32)

    def _try(self, pool: Pool, samples: int, scores: Scores, what: str) -> None:
        """See that `scores` works on the first samples of a pool. Raises `RefusedError`."""
        for _ in self._score(pool, 0, np.ones(samples, np.bool_), scores, what):
            pass

    def _score(
        self, pool: Pool, start: int, new: NDArray[np.bool_], scores: Scores, what: str
    ) -> Iterator[NDArray[np.float32]]:
        """Yield, batch by batch, what `scores`, named `what`, gives as it may leave: (b, ...) float32.

        Of the samples from `start` on, for those that the mask `new` (n,) chooses. Raises `RefusedError`.
        """
        size, stop = self.settings.batch_size, start + len(new)
        for first in range(start - start % size, stop, size):
            last = min(first + size, len(pool))
            low, high = max(start, first), min(stop, last)
            if not new[low - start : high - start].any():
                continue
            try:
                rows = scores(pool.read(first, last))
            except TeacherError as error:
                raise RefusedError("teacher-failed", f"the site's {what} gave no usable answer") from error
            yield np.asarray(rows[low - first : high - first], np.float32)[new[low - start : high - start]]

    def _told(self, images: Images) -> NDArray[np.float32]:
        """Return the teacher's (n, classes) log-probabilities, or log-odds, as the policy lets them leave.

        Raises `TeacherError`.
        """
        if self.kind == "log-odds":
            return shape_odds(cast(MultiTeacher, self.teacher).log_odds(images), self.settings.policy)
        return shape(cast(Teacher, self.teacher).log_probs(images), self.settings.policy)

    def pool(self, digest: str) -> Pool:
        """Return the site's copy of a pool, verified once per process. Raises `RefusedError`."""
        check_pool(self.settings.policy, digest)
        with self.lock:
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


def _subset(contract: Contract, size: int) -> Subset:
    """Return the part of a pool of `size` samples that a contract is about. Raises `RefusedError`."""
    try:
        mask = subset_mask(contract.subset or "", size)
    except ValueError as error:
        raise RefusedError("bad-question", "the contract's part of the pool does not fit the pool") from error
    if not mask.any():
        raise RefusedError("bad-question", "the contract's part of the pool has no sample")
    return Subset(mask, contract.more)
