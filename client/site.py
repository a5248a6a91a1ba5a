"""One site: its settings, its ledger, and whether and how it takes part in a job and answers a question.

Lives here: everything between a validated question and an answer that may leave. Does not live here: what the rows say
(client/encoder), Flower (client/app), secure sums (client/summing), and how a teacher comes to be (client/teacher).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from consilience.client.card import card_of, private_figures
from consilience.client.components import not_released, release
from consilience.client.coverage import Coverage, load_coverage
from consilience.client.encoder import Encoder
from consilience.client.features import OpenTap, open_taps
from consilience.client.ledger import Ledger
from consilience.client.ledger_rows import Asked, card_told
from consilience.client.policy import (
    Demand,
    RefusedError,
    Subset,
    asked_by,
    check_approved,
    check_budget,
    check_bytes,
    check_demand,
    check_encoding,
    check_job,
    check_job_key,
    check_open,
)
from consilience.client.pools import Pools
from consilience.client.privacy import Event, answering_costs, describe_privacy
from consilience.client.privacy.spending import Allowance, entries_of, loss_of
from consilience.client.released import Released
from consilience.client.summing import Summing
from consilience.client.tails import OpenTail, TailDesk, open_tail
from consilience.client.teacher import CalibratedMulti, CalibratedTeacher, MultiTeacher, Teacher, load_any
from consilience.common.cards import SiteCard
from consilience.common.identity import load_key
from consilience.common.pool import Pool
from consilience.common.protocol import (
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
)
from consilience.common.settings_file import load_settings
from consilience.common.subsets import subset_mask
from consilience.common.tails import BlocksQuestion, Carried, Floats, TailQuestion, packed
from consilience.common.vouching import Signer


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
        self.encoder = Encoder(settings, teacher, coverage, taps)
        self.settings = settings
        self.tail = TailDesk(settings, tail)
        """What answers about the teacher's last blocks."""
        self.lock = threading.Lock()
        """Held while an answer is made: the ledger and the teacher are for one thread at a time."""
        self._pools = Pools(settings)
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
    def teacher(self) -> Teacher | MultiTeacher:
        """What answers about classes."""
        return self.encoder.teacher

    @property
    def coverage(self) -> Coverage | None:
        """What answers about coverage, if anything does."""
        return self.encoder.coverage

    @property
    def taps(self) -> tuple[OpenTap, ...]:
        """What answers about features."""
        return self.encoder.taps

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

        A job that the policy does not allow, or a person has not approved, is told none of that. Raises what `card`
        and `ledger` raise.
        """
        card = self.card
        if told := private_figures(card):
            entry = card_told(job, card.teacher, card.policy, told)
            with self.lock, self.ledger.alone():
                try:
                    check_job(self.settings.policy, self.ledger, job)
                except RefusedError:
                    return card.model_copy(update=dict.fromkeys(told))
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
            self.encoder.check_kind("log-probs")
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
            check_demand(self.settings.policy, self.ledger, demand, sealed=contract.job_key is not None)
            fresh = self.new_of(demand)
            new = sum(fresh)
            features = demand.feature_bytes(fresh, not_released(self.ledger, demand.components))
            self.permit(contract.job, demand.counted(fresh), features)
            guarantee = self._guarantee(new)
            began = time.perf_counter()
            self.encoder.try_teacher(pools[0], tried)
            seconds = time.perf_counter() - began
            for tap in taps:
                self.encoder.try_tap(pools[0], tried, tap)
            if contract.tail is not None:
                self.tail.check(self.ledger, contract.job, contract.tail)
            self.encoder.together.expect(taps)
            enclosed = release(
                self.settings,
                self.ledger,
                contract,
                reduced,
                self.signer,
                permit=lambda count: self.permit(contract.job, dict.fromkeys(demand.asked, 0), count),
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
        kinds: list[tuple[Kind, Encoding]] = [(self.encoder.kind, policy.encodings[0] if summed else encoding)]
        if coverage and self.card.coverage is not None:
            kinds.append(("coverage", self.card.coverage.encodings[0]))
        questions = [self.question(job, pool.digest, len(pool), *kind) for kind in kinds for pool in pools if len(pool)]
        learned_from = [pool for pool in (pools[:1] if first else pools) if len(pool)]
        questions += [
            self.question(job, pool.digest, len(pool), "features", features, tap)
            for pool in learned_from
            for tap in taps
        ]
        widths = tuple(self.encoder.width(question) for question in questions)
        cards = tuple(tap.card for tap in components)
        use = self.summed.use if summed else ""
        opened = None if tail is None else self.tail.need(job).asked
        return Demand(job, tuple(questions), use, widths, cards, opened, subsets)

    def new_of(self, demand: Demand) -> list[int]:
        """Return how many samples of each question were not released yet. Raises what `ledger` raises."""
        released = self.summed if demand.use else self.released
        found = []
        for asked in demand.questions:
            missing = released.missing(asked, len(asked))
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

        For kind `coverage` the site must have one; for kind `features` it is about `tap`. It is under the name that its
        answer has in the ledger (`Encoder.kept_as`).
        """
        if tap is not None:
            fingerprint = tap.card.fingerprint
        else:
            answering = self.coverage if kind == "coverage" else self.teacher
            assert answering is not None
            fingerprint = answering.fingerprint
        question = Question(
            job=job,
            pool=pool,
            start=0,
            stop=size,
            kind=kind,
            encoding=encoding,
            teacher=fingerprint,
            policy=self.settings.policy.version,
        )
        return self.encoder.kept_as(question)

    def answer(self, question: Question) -> Answer:
        """Score the samples a question asks about and encode them as it asks; what left before leaves as it did.

        It is signed, and sealed where the question names a job key; the plain rows are what is kept and counted.
        Teacher, coverage and taps always see the same aligned batches of the pool, whatever range is asked, so that a
        sample's answer is the same bytes however the server cuts its questions. Raises `RefusedError`, `LedgerError`,
        `StorageError`: nothing leaves then.
        """
        policy = self.settings.policy
        self.encoder.check_kind(question.kind)
        if question.teacher not in self.encoder.fingerprints(question.kind) or question.policy != policy.version:
            raise RefusedError("other-teacher", "the question is for another teacher or policy version")
        check_open(policy)
        check_job_key(self.settings, question.job, question.job_key)
        check_encoding(policy, question.kind, question.encoding)
        pool = self.pool(question.pool)
        if question.stop > len(pool):
            raise RefusedError("bad-question", "the question asks about samples that are not in the pool")
        if len(question) * self.encoder.width(question) > MOST_ANSWER_BYTES:
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

    def given(self, released: Released, question: Question, pool: Pool) -> bytes:
        """Return the encoded rows of a question, kept and counted among the answers `released`."""
        question = self.encoder.kept_as(question)
        width = self.encoder.width(question)
        a_sample = width if question.kind == "features" else 0
        asked = asked_by(question, released.use)
        sealed = None if released.use else question.job_key is not None
        return released.give(
            question,
            size=len(pool),
            width=width,
            score=lambda new: self.encoder.encoded(question, pool, new),
            permit=lambda samples: self.permit(question.job, {asked: samples}, samples * a_sample, sealed=sealed),
            costs=lambda samples: entries_of(question.job, self.costs(samples)),
        )

    def costs(self, samples: int) -> tuple[Event, ...]:
        """Return the events of answering about so many samples, at least 1."""
        return answering_costs(self.settings, samples) if self._training is None else self._training

    def permit(self, job: str, asked: Mapping[Asked, int], features: int, *, sealed: bool | None = None) -> None:
        """Refuse what the policy does not allow now: what is `asked` for, with so many samples, or bytes of `features`,
        newly released.

        `sealed`: as in `check_job`. Raises `RefusedError`.
        """
        samples = sum(asked.values())
        check_job(self.settings.policy, self.ledger, job, asked, sealed=sealed)
        check_approved(self.settings.policy, self.ledger, job, asked)
        check_budget(self.settings.policy, self.ledger, job, samples)
        check_bytes(self.settings.policy, self.ledger, job, features)
        if samples or features:
            self._allowance.check(self.ledger, job, self.costs(max(samples, 1)))

    @cached_property
    def summing(self) -> Summing:
        """The site's part in secure sums."""
        return Summing(self)

    def pool(self, digest: str) -> Pool:
        """Return the site's copy of a pool, verified once. Raises `RefusedError`."""
        return self._pools.get(digest)


def _subset(contract: Contract, size: int) -> Subset:
    """Return the part of a pool of `size` samples that a contract is about. Raises `RefusedError`."""
    try:
        mask = subset_mask(contract.subset or "", size)
    except ValueError as error:
        raise RefusedError("bad-question", "the contract's part of the pool does not fit the pool") from error
    if not mask.any():
        raise RefusedError("bad-question", "the contract's part of the pool has no sample")
    return Subset(mask, contract.more)
