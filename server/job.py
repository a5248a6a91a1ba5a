"""The stages of a job, each resumable: contract, ask, unify, learn, judge, publish.

Lives here: their order and what one reads of the others' files. Does not live here: any of their work. Whatever
stage a crash interrupts, doing the same job in the same folder goes on from what is on disk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray

from consilience.common.cards import SiteCard
from consilience.common.data import open_data
from consilience.common.errors import NEW_RUN, AskingError, PoolError, SettingsError
from consilience.common.files import read_json, write_json
from consilience.common.labels import LabelSpace
from consilience.common.pages.numbers import listing
from consilience.common.pool import Pool, PoolImages
from consilience.common.progress import Reporter
from consilience.common.settings import JobSettings
from consilience.common.settings_file import load_settings
from consilience.server.answered import CoverageStores, Usable, need_usable, usable
from consilience.server.answers import AnswerStore
from consilience.server.asked_pool import AskedPool, asked_of, check_apart
from consilience.server.asking import ask
from consilience.server.asking_record import AskingRecord
from consilience.server.choosing import check_choice, check_pairs
from consilience.server.chosen import Chosen
from consilience.server.components import lacking_components
from consilience.server.concentration import check_concentration, head_plan
from consilience.server.contract import RunContract
from consilience.server.coverage_check import believed, wrong_claims
from consilience.server.enrolment import Enrolment, enrol
from consilience.server.events import Events
from consilience.server.filtered import owners
from consilience.server.grouped import align
from consilience.server.guarantees import note_guarantees
from consilience.server.labelling import Diagnostics, labels_key, load_other, solved_pool, unify_pool
from consilience.server.labelling_multi import unify_pool_labels
from consilience.server.labelling_top import Labels, TopRows, classes_kept, top_key, unify_pool_top
from consilience.server.learning import (
    ByLoss,
    check_student,
    learn,
    oracle_labels_loss,
    oracle_loss,
)
from consilience.server.lessons import Learnt, lesson_of, student_needs
from consilience.server.multi_label import check_test_kind
from consilience.server.outcome import Outcome
from consilience.server.progress import Progress
from consilience.server.robust import labelled
from consilience.server.rounds import choose_more
from consilience.server.settings import Home
from consilience.server.signatures import Signatures
from consilience.server.stores import all_stores, lacked, stores_about
from consilience.server.summed_pool import SummedPool
from consilience.server.tails import Exchange, Tails
from consilience.server.trust import Unsealing
from consilience.server.truth import check_test, pool_truth, pool_truth_labels


class Job:
    """One job in one run folder."""

    def __init__(self, run: Path, settings: JobSettings, reporter: Reporter, home: Home | None = None) -> None:
        """`home`: the server's folder, which says whom it admitted; None: nobody's key is known, nothing is sealed."""
        if settings.pool is None:
            raise SettingsError("job.yaml: field 'pool' is missing", hint="Name the folder of the public pool")
        if settings.privacy.sealed and home is None:
            raise SettingsError(
                "job.yaml: field 'privacy.sealed' is True, and there is no authority to sign the job's key",
                hint="Submit the job to a server, or simulate it in a new folder",
            )
        self.run, self.settings, self.reporter, self.home = run, settings, reporter, home
        self.events = Events(run / "events.jsonl")
        self.pool = asked_of(run, settings, Pool.open(settings.pool))
        self.test = open_data(settings.judge.test) if settings.judge.test else None
        self.test_pool = Pool.open(settings.judge.test_pool) if settings.judge.test_pool else None
        check_apart(self.pool, self.test_pool)
        check_test(self.test, self.test_pool, self.pool)
        check_student(settings.student, self.pool.shape)
        check_choice(settings.ask, settings.student, self.pool.shape)
        self.needs = student_needs(settings, self.pool)
        timing = run / "timing.json"
        self.timing: dict[str, float] = dict(read_json(timing)) if timing.exists() else {}
        self.progress = Progress(run / "progress.json", settings.name)

    @classmethod
    def open(cls, run: Path, reporter: Reporter, home: Home | None = None) -> Job:
        """Open the job of a run folder. Raises `SettingsError`, `PoolError`, `DataError`."""
        return cls(run, load_settings(run / "job.yaml", JobSettings), reporter, home)

    @cached_property
    def unsealing(self) -> Unsealing | None:
        """What sites seal answers for; None where they do not. Raises `IdentityError`, `StorageError`."""
        if not self.settings.privacy.sealed or self.home is None:
            return None
        return Unsealing(self.home, self.settings.name)

    def do(self, grid: Grid, *, fold_in: bool = False, submission: float = 0.0) -> None:
        """Do every stage that is not done. Raises any `ConsilienceError`; what had arrived stays.

        `fold_in`: sites that were not there when the run began join its contract; they are asked, and what follows
        from the answers is done anew. Without it a run keeps the sites it began with. `submission`: when the run was
        submitted; asking that began or ended for the same one goes on from there, instead of a new one's beginning.
        """
        if fold_in and self.settings.privacy.secure_sum:
            raise SettingsError(
                "A run with privacy.secure_sum takes in no more sites: two sums of the same samples would tell one "
                "site's answer",
                hint="Start a run over another pool",
            )
        self.events.add("begin", job=self.settings.name)
        for pool in self._pools():  # the sites verify their copies; a changed copy here would be learnt from
            pool.verify()
        with self._stage("ask"):
            contract, reasons = self.answers(grid, fold_in, submission)
            space, cards = self.participants(contract, reasons)
            stores, coverage = stores_about(self.run, self.settings, cards, self.pool)
            summed = self._summed(contract)
            samples = self._usable(stores, space) if summed is None else Usable(len(self.pool), None, {})
            chosen = Chosen.of(self.settings, space)
            if self.settings.student.learning == "filtered":
                self._tails(grid, contract).fetch(owners(self.settings, cards), self.reporter)
        if summed is None:
            self._forget_timing(space, stores, coverage)
        with self._stage("unify"):
            labels: Labels
            unify, rest = self.settings.unify, (self.reporter, samples, coverage, self.settings.seed)
            if summed is not None:
                labels, diagnostics = summed.unify(self.run / "labels", space)
            elif space.multi:
                labels, diagnostics = unify_pool_labels(self.run / "labels", space, stores, unify, *rest)
            elif chosen.everything and (keep := classes_kept(self.settings, space, coverage)) is not None:
                labels, diagnostics = unify_pool_top(self.run / "labels", space, stores, unify, keep, *rest[:2])
            else:
                # specialists teach what they answered themselves: labels of all classes, if any, are looked at once
                teach = self.settings.student.learning == "concentration" and not self.settings.student.learns_labels
                make = solved_pool if teach else unify_pool
                labels, diagnostics = make(self.run / "labels", space, stores, cards, unify, *rest)
            self._tell_checks(diagnostics)
            samples = labelled(space, stores, samples, diagnostics.trust)
        with self._stage("learn"):
            used = believed(space, coverage, diagnostics.checks)
            share = 1.0
            if not chosen.everything and not space.multi and not isinstance(labels, TopRows):
                share = chosen.share(labels, load_other(self.run / "labels"), samples.ids)
            about_student = (chosen, share, cards, stores, used, labels, diagnostics.key, samples.ids, grid, contract)
            curves = {"student": self.learn(*about_student)}
        with self._stage("oracle"):
            oracle = self.learn_oracle(chosen)
            if oracle is not None:
                curves["oracle"] = oracle
        # matplotlib comes with it: a process that waits for a run, or whose run ends early, does without
        from consilience.server.publishing import gather, publish

        with self._stage("judge"):
            tested = stores_about(self.run, self.settings, cards, self.test_pool) if self.test_pool else None
            outcome = Outcome(
                run=self.run,
                settings=self.settings,
                pool=self.pool,
                test=self.test,
                contract=contract,
                space=space,
                cards=cards,
                stores=stores,
                coverage=coverage,
                samples=samples,
                test_stores=tested[0] if tested else None,
                test_coverage=tested[1] if tested else [None] * len(cards),
                labels=labels,
                diagnostics=diagnostics,
                curves=curves,
                failures=reasons,
                chosen=chosen,
                other_share=1 - share,
                summed=None if summed is None else summed.survivors,
            )
            answers = self._all_answers(contract)
            findings = gather(outcome, answers)
        Signatures.collect(self.settings.name, contract.sites, answers, self._pools()).write(self.run / "student")
        publish(self.run, findings, self.timing)
        self.progress.stage("done")
        self.events.add("end", job=self.settings.name)

    def _summed(self, contract: RunContract) -> SummedPool | None:
        """Return the secure sum over the pool; None where sites answer openly."""
        secure = self.settings.privacy.secure_sum
        return SummedPool(self.run, self.settings, contract, self.pool) if secure else None

    def _all_answers(self, contract: RunContract) -> dict[str, list[AnswerStore]]:
        return all_stores(self.run, self.settings, contract.sites, self._pools())

    def answers(self, grid: Grid, fold_in: bool, submission: float) -> tuple[RunContract, dict[str, str]]:
        """Find the sites and ask them; returns the contract, and site -> why it left samples unanswered."""
        path = self.run / "asking.json"
        held = AskingRecord.load(path, submission)
        if held is not None and held.reasons is not None:  # nobody is looked for, so nobody is asked
            enrolment = Enrolment(self._contract(), away=held.reasons)
        else:
            enrolment = self.enrol(grid, fold_in)
            check_concentration(self.settings, enrolment.contract.space, enrolment.contract.sites)
            check_pairs(self.settings.ask, enrolment.contract.space)
            note_guarantees(self.run, enrolment.guarantees)
        check_test_kind(self.test, enrolment.contract.kind)
        Chosen.of(self.settings, enrolment.contract.space).check_test(self.test, self.settings.labels.synonyms)
        record = AskingRecord.begin(path, submission)
        reasons = enrolment.away | self.ask(grid, enrolment, record.passed)
        while isinstance(self.pool, AskedPool) and self._next_round_is_due(self.pool, enrolment.contract):
            space, cards = self.participants(enrolment.contract, reasons)
            stores, coverage = stores_about(self.run, self.settings, cards, self.pool)
            about = (self.pool, space, cards, stores, coverage, self.reporter)
            self.pool = choose_more(self.run, self.settings, *about)
            self.events.add("chosen", samples=self.pool.known, of=len(self.pool))
            reasons = enrolment.away | self.ask(grid, enrolment, record.passed)
        record.end(path, reasons)
        return enrolment.contract, reasons

    def _next_round_is_due(self, pool: AskedPool, contract: RunContract) -> bool:
        """Whether samples are still to be chosen, and enough sites answered about all that are chosen."""
        needed = self.settings.ask.min_sites or len(contract.sites)
        return pool.known < len(pool) and len(self._complete(contract, so_far=True)) >= needed

    def _contract(self) -> RunContract:
        """Return the contract of a run that has one. Raises `PoolError` when it is about other pools."""
        contract = RunContract.load(self.run / "contract.json")
        if contract.pools != self._digests():
            raise PoolError(
                f"{self.run}: a pool has changed since this run began",
                hint=f"Restore it, or start {NEW_RUN}",
            )
        return contract

    def enrol(self, grid: Grid, fold_in: bool = False) -> Enrolment:
        """Find the sites and agree with them; on a resumed run only if there is still to ask, or to fold in."""
        path = self.run / "contract.json"
        finished = reported = False
        if path.exists():
            contract = self._contract()
            finished = self._complete(contract) == {card.name for card in contract.sites}
            if finished and not fold_in:
                return Enrolment(contract)
            reported = self._reported(contract)
        return enrol(
            grid,
            self.settings,
            path,
            self._digests(),
            complete=self._complete,
            fold_in=fold_in,
            wait_for_new=finished and reported,
            events=self.events,
            reporter=self.reporter,
            home=self.home,
            unsealing=self.unsealing,
            needs=self.needs,
            part=self.pool if isinstance(self.pool, AskedPool) else None,
        )

    def _complete(self, contract: RunContract, *, so_far: bool = False) -> set[str]:
        """Return the sites that answered everything, and whose principal components are here if the job needs them.

        `so_far`: everything that is chosen, and coverage or not: what a site lacks of that the others make up for.
        """
        if (summed := self._summed(contract)) is not None:
            return set(summed.survivors)
        lacking = {card.name for card in contract.sites if lacking_components(self.run, self.settings, card)}
        held = self._all_answers(contract)
        told = {
            name
            for name, stores in held.items()
            if all(s.complete or (so_far and (s.done or s.about.kind == "coverage")) for s in stores)
        }
        return told - lacking

    def _reported(self, contract: RunContract) -> bool:
        """Whether the report speaks of just these sites: a run that was folding in others may have been stopped."""
        path = self.run / "report.json"
        return path.exists() and {site["name"] for site in read_json(path)["sites"]} == {c.name for c in contract.sites}

    def ask(self, grid: Grid, enrolment: Enrolment, passed: float = 0.0) -> dict[str, str]:
        """Ask every site that is there about what its stores lack; returns site -> why it left samples unanswered.

        `passed`: seconds of the deadline that went by before.
        """
        if (summed := self._summed(enrolment.contract)) is not None:
            return summed.ask(grid, enrolment.nodes)
        held = self._all_answers(enrolment.contract)
        self.progress.watch(held)
        for name, site in self.progress.sites.items():
            site.online, site.reason = name in enrolment.nodes, enrolment.away.get(name)
        to_ask = [
            (enrolment.nodes[name], store)
            for name, stores in held.items()
            for store in stores
            if name in enrolment.nodes and not store.done
        ]
        if not to_ask:
            return {}
        states = ask(
            grid,
            self.settings.name,
            to_ask,
            self.settings.ask,
            events=self.events,
            reporter=self.reporter,
            progress=self.progress,
            tried=enrolment.tried,
            passed=passed,
            unsealing=self.unsealing,
        )
        return {state.name: state.failures[-1] for state in states if state.lost}

    def participants(self, contract: RunContract, reasons: Mapping[str, str]) -> tuple[LabelSpace, list[SiteCard]]:
        """Return the label space and the cards of the sites that answered anything about the pool.

        Raises `AskingError` when fewer than `ask.min_sites` (by default all) answered everything.
        """
        complete = self._complete(contract, so_far=True)
        needed = self.settings.ask.min_sites or len(contract.sites)
        if len(complete) < needed:
            lacking = [
                f"{name} lacks {lacked(stores) or 'its principal components'} ({reasons.get(name, 'unknown')})"
                for name, stores in self._all_answers(contract).items()
                if name not in complete
            ]
            lacking += [f"{who} was left out ({reason})" for who, reason in sorted(contract.left_out.items())]
            raise AskingError(
                f"{len(complete)} of {len(contract.sites)} sites answered every question, {needed} are needed: "
                + "; ".join(lacking),
                hint="Mend those sites and run the same command again, or lower ask.min_sites",
            )
        stores, _ = stores_about(self.run, self.settings, contract.sites, self.pool)
        cards = [c for c, store in zip(contract.sites, stores, strict=True) if c.name in complete or len(store)]
        if len(cards) == len(contract.sites):
            return contract.space, cards
        labels, multi = self.settings.labels, contract.kind == "multi"
        space = align(labels, cards, multi=multi)
        if labels.classes is not None:
            order = [name for name in contract.labels if name in space.names]
            space = align(labels, cards, order, multi=multi)
        return space, cards

    def _usable(self, stores: list[AnswerStore], space: LabelSpace) -> Usable:
        """Return the samples that can be learnt from. Raises `AskingError` when there is none."""
        samples = need_usable(usable(stores, space))
        if samples.mask is not None:
            left_out = samples.size - samples.count
            self.reporter.say(f"Warning: {left_out:,} of {samples.size:,} samples are left out of learning")
        return samples

    def _tell_checks(self, diagnostics: Diagnostics) -> None:
        """Say whose coverage and whose answers are left out of unification, and what is wrong with levels."""
        for site, verdict in diagnostics.checks.items():
            if verdict.reason:
                self.events.add("coverage-left-out", site=site, reason=verdict.reason, agreement=verdict.agreement)
                self.reporter.say(f"Warning: the coverage of site {site} is left out: {verdict.reason}")
            elif verdict.offset:
                self.events.add("coverage-mended", site=site, offset=verdict.offset)
                self.reporter.say(f"Warning: the level of the coverage of site {site} is wrong, and mended")
        if wrong := wrong_claims(diagnostics.claimed, closed=not self.settings.unify.other):
            self.reporter.say(f"Warning: {wrong}")
        for name, told in () if diagnostics.trust is None else diagnostics.trust.sites.items():
            if 0 < told.trust < 1:
                self.events.add("answers-weighed", site=name, trust=told.trust, agreement=told.agreement)
                self.reporter.say(
                    f"Warning: others confirm less of what site {name} answers; it counts {told.trust:.2f} times"
                )
            if told.left_out:
                self.events.add("answers-left-out", site=name, classes=told.left_out, agreement=told.agreement)
                what = "all its answers" if not told.trust else f"what it says of {listing(list(told.left_out), 8)}"
                self.reporter.say(f"Warning: most others contradict site {name}; left out: {what}")

    def _forget_timing(self, space: LabelSpace, stores: list[AnswerStore], coverage: CoverageStores) -> None:
        """Drop what earlier stages took if their work is done anew because answers have come in since."""
        notes = self.run / "labels" / "diagnostics.json"
        keys = [labels_key(space, stores, self.settings.unify, coverage, self.settings.seed)]
        if (keep := classes_kept(self.settings, space, coverage)) is not None:
            keys.append(top_key(space, stores, self.settings.unify, keep))
        if notes.exists() and read_json(notes).get("key") not in keys:
            for name in ("unify", "learn", "oracle", "judge"):
                self.timing.pop(name, None)

    def learn(
        self,
        chosen: Chosen,
        share: float,
        cards: list[SiteCard],
        stores: list[AnswerStore],
        coverage: CoverageStores,
        labels: Labels,
        key: str,
        samples: NDArray[np.int64] | None,
        grid: Grid,
        contract: RunContract,
    ) -> list[dict[str, Any]]:
        """Train the student in RUN/student, on the whole pool or on `samples` of it.

        `share` of their mass is on the student's classes. `grid` reaches the sites of `contract`, where some are asked
        while it learns.
        """
        settings = self.settings.student
        lesson = lesson_of(
            Learnt(self.run, self.settings, self.pool, chosen, share, cards, stores, coverage, labels, key, samples),
            lambda: self._tails(grid, contract),
        )
        rest = None if chosen.everything else chosen.other
        about = (lesson, settings, self.settings.seed, self.reporter, "student", rest, head_plan(self.settings, chosen))
        return learn(self.run / "student", PoolImages(self.pool, samples), chosen.taught, *about)

    def _tails(self, grid: Grid, contract: RunContract) -> Tails:
        """Return what asks the sites' last blocks, or holds those that they lent."""
        exchange = Exchange(
            grid,
            self.settings,
            contract,
            self.run / "contract.json",
            reporter=self.reporter,
            events=self.events,
            home=self.home,
        )
        return Tails(self.run / "tails", self.settings, exchange)

    def learn_oracle(self, chosen: Chosen) -> list[dict[str, Any]] | None:
        """Train the student's architecture by the pool's true labels in RUN/oracle; None where none are its classes."""
        judge = self.settings.judge
        if judge.pool_labels is None or self.test is None:
            return None
        about = (judge.pool_labels, self.pool, self.test, chosen.space, self.settings.labels.synonyms)
        if chosen.space.multi:
            many = chosen.truth_labels(pool_truth_labels(*about))
            known = np.flatnonzero((many >= 0).any(axis=1))
            loss = oracle_labels_loss(many[known])
        else:
            truth = chosen.truth(pool_truth(*about))
            known = np.flatnonzero(truth >= 0)
            loss = oracle_loss(truth[known])
        if not chosen.everything and not len(known):
            return None
        return learn(
            self.run / "oracle",
            PoolImages(self.pool, known),
            chosen.taught,
            ByLoss(loss, self.settings.student, self.settings.seed),
            self.settings.student,
            self.settings.seed,
            self.reporter,
            "oracle (true labels)",
            None if chosen.everything else chosen.other,
            head_plan(self.settings, chosen),
        )

    def _pools(self) -> list[Pool]:
        return [self.pool] if self.test_pool is None else [self.pool, self.test_pool]

    def _digests(self) -> tuple[str, ...]:
        return tuple(pool.digest for pool in self._pools())

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Count the seconds of a stage once: a repeat that finds the work done adds nothing."""
        began = time.perf_counter()
        self.events.add("stage", name=name)
        self.progress.stage(name)
        yield
        if name not in self.timing:
            self.timing[name] = time.perf_counter() - began
            write_json(self.run / "timing.json", self.timing)
