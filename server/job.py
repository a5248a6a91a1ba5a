"""The stages of a job, each resumable: contract, ask, unify, learn, judge, publish.

Lives here: their order and what one reads of the others' files. Does not live here: any of their work. Whatever
stage a crash interrupts, doing the same job in the same folder goes on from what is on disk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray

from consilience.common.data import open_data
from consilience.common.errors import AskingError, DataError, PoolError, SettingsError
from consilience.common.files import read_json, write_json
from consilience.common.labels import LabelSpace
from consilience.common.pool import Pool
from consilience.common.progress import Reporter
from consilience.common.protocol import SiteCard
from consilience.common.settings import JobSettings
from consilience.common.settings_file import load_settings
from consilience.server.answers import About, AnswerStore
from consilience.server.asking import SiteState, agree, ask, collect_cards
from consilience.server.contract import RunContract
from consilience.server.events import Events
from consilience.server.labelling import unify_pool
from consilience.server.learning import check_student, direct_loss, learn, oracle_loss, soft_label_loss
from consilience.server.publishing import Outcome, gather, publish
from consilience.server.truth import pool_truth


class Job:
    """One job in one run folder."""

    def __init__(self, run: Path, settings: JobSettings, reporter: Reporter) -> None:
        if settings.pool is None:
            raise SettingsError("job.yaml: field 'pool' is missing", hint="Name the folder of the public pool")
        self.run, self.settings, self.reporter = run, settings, reporter
        self.events = Events(run / "events.jsonl")
        self.pool = Pool.open(settings.pool)
        self.test = open_data(settings.judge.test) if settings.judge.test else None
        self.test_pool = Pool.open(settings.judge.test_pool) if settings.judge.test_pool else None
        self._check_test()
        check_student(settings.student, self.pool.shape)
        timing = run / "timing.json"
        self.timing: dict[str, float] = dict(read_json(timing)) if timing.exists() else {}
        self._nodes: dict[str, int] = {}

    @classmethod
    def open(cls, run: Path, reporter: Reporter) -> Job:
        """Open the job of a run folder. Raises `SettingsError`, `PoolError`, `DataError`."""
        return cls(run, load_settings(run / "job.yaml", JobSettings), reporter)

    def _check_test(self) -> None:
        if self.test is None:
            return
        self.test.need_labels("judge.test")
        if not len(self.test):
            raise DataError("judge.test holds no images", hint="Name labelled images, or leave judge.test out")
        if self.test.shape != self.pool.shape:
            raise DataError(
                f"judge.test: images have shape {self.test.shape}; the pool's have {self.pool.shape}",
                hint="Bring both to one shape",
            )
        if self.test_pool is not None and (len(self.test_pool), self.test_pool.shape) != (
            len(self.test),
            self.test.shape,
        ):
            raise PoolError(
                f"judge.test_pool has {len(self.test_pool)} samples of shape {self.test_pool.shape}; "
                f"judge.test has {len(self.test)} of {self.test.shape}",
                hint="Build the test pool from judge.test",
            )
        if self.test_pool is not None:
            for start, images in self.test_pool.blocks(4096):
                if not np.array_equal(images, self.test.read(np.arange(start, start + len(images)))):
                    raise PoolError(
                        f"judge.test_pool holds other images than judge.test, or another order, from sample {start} on",
                        hint="Build the test pool from judge.test",
                    )

    def do(self, grid: Grid) -> None:
        """Do every stage that is not done. Raises any `ConsilienceError`; what had arrived stays."""
        self.events.add("begin", job=self.settings.name)
        for pool in self._pools():  # the sites verify their copies; a changed copy here would be learnt from
            pool.verify()
        with self._stage("ask"):
            contract = self.contract(grid)
            states = self.ask(grid, contract)
            space, cards = self.participants(contract, states)
        stores = [self.store(card, self.pool) for card in cards]
        with self._stage("unify"):
            labels, diagnostics = unify_pool(
                self.run / "labels", space, stores, cards, self.settings.unify, self.reporter
            )
        with self._stage("learn"):
            curves = {"student": self.learn(space, stores, labels, diagnostics.key)}
        with self._stage("oracle"):
            oracle = self.learn_oracle(space)
            if oracle is not None:
                curves["oracle"] = oracle
        with self._stage("judge"):
            outcome = Outcome(
                run=self.run,
                settings=self.settings,
                pool=self.pool,
                test=self.test,
                contract=contract,
                space=space,
                cards=cards,
                stores=stores,
                test_stores=[self.store(card, self.test_pool) for card in cards] if self.test_pool else None,
                labels=labels,
                diagnostics=diagnostics,
                curves=curves,
                failures={state.name: state.failures[-1] for state in states if state.lost},
            )
            findings = gather(outcome, self._all_answers(contract))
        publish(self.run, findings, self.timing)
        self.events.add("end", job=self.settings.name)

    def _all_answers(self, contract: RunContract) -> dict[str, list[AnswerStore]]:
        return {card.name: [self.store(card, pool) for pool in self._pools()] for card in contract.sites}

    def contract(self, grid: Grid) -> RunContract:
        """Collect the site cards and agree with every site; on a resumed run only if there is still to ask."""
        path = self.run / "contract.json"
        pools = tuple(pool.digest for pool in self._pools())
        if path.exists():
            contract = RunContract.load(path)
            if contract.pools != pools:
                raise PoolError(
                    f"{self.run}: a pool has changed since this run began",
                    hint="Restore it, or start a new run in another folder with --out",
                )
            if all(store.complete for store in self._stores(contract)):
                return contract
        cards = collect_cards(grid, self.settings.name)
        contract = RunContract.build(self.settings, cards, pools)
        contract.keep(path)
        for warning in contract.warnings:
            self.reporter.say(f"Warning: {warning}")
        agree(grid, {node: contract.for_site(card.name) for node, card in cards.items()}, cards)
        self._nodes = {card.name: node for node, card in cards.items()}
        return contract

    def ask(self, grid: Grid, contract: RunContract) -> list[SiteState]:
        """Ask every site about what its stores lack."""
        open_stores = [store for store in self._stores(contract) if not store.complete]
        if not open_stores:
            return []
        return ask(
            grid,
            self.settings.name,
            [(self._nodes[store.about.site], store) for store in open_stores],
            self.settings.ask,
            events=self.events,
            reporter=self.reporter,
        )

    def participants(self, contract: RunContract, states: list[SiteState]) -> tuple[LabelSpace, list[SiteCard]]:
        """Return the label space and the cards of the sites that answered everything.

        Raises `AskingError` when they are fewer than `ask.min_sites`.
        """
        complete = [card for card in contract.sites if all(self.store(card, pool).complete for pool in self._pools())]
        needed = self.settings.ask.min_sites or len(contract.sites)
        if len(complete) < needed:
            reasons = [f"{s.name} lacks {s.lost:,} samples ({s.failures[-1]})" for s in states if s.lost]
            raise AskingError(
                f"{len(complete)} of {len(contract.sites)} sites answered every question, {needed} are needed: "
                + "; ".join(reasons),
                hint="Mend those sites and run the same command again, or lower ask.min_sites",
            )
        labels = self.settings.labels
        if len(complete) == len(contract.sites):
            space = contract.space
        else:
            space = LabelSpace.build({card.name: card.classes for card in complete}, labels.synonyms)
        return space, complete

    def learn(
        self, space: LabelSpace, stores: list[AnswerStore], labels: NDArray[np.float32], key: str
    ) -> list[dict[str, Any]]:
        """Train the student in RUN/student."""
        settings, unify = self.settings.student, self.settings.unify
        folder = self.run / "student"
        if settings.learning == "soft-labels":
            loss = soft_label_loss(labels, unify.temperature, key)
        else:
            weights = [unify.weights.get(site, 1.0) for site in space.sites]
            loss = direct_loss(self.run / "labels", settings.learning, space, stores, weights, unify.temperature, key)
        images = self.pool.read(0, len(self.pool))
        return learn(folder, images, space, loss, settings, self.settings.seed, self.reporter, "student")

    def learn_oracle(self, space: LabelSpace) -> list[dict[str, Any]] | None:
        """Train the same student with the pool's true labels in RUN/oracle; None where there are none."""
        judge = self.settings.judge
        if judge.pool_labels is None or self.test is None:
            return None
        truth = pool_truth(judge.pool_labels, len(self.pool), self.test, space, self.settings.labels.synonyms)
        known = np.flatnonzero(truth >= 0)
        return learn(
            self.run / "oracle",
            self.pool.take(known),
            space,
            oracle_loss(truth[known]),
            self.settings.student,
            self.settings.seed,
            self.reporter,
            "oracle (true labels)",
        )

    def store(self, card: SiteCard, pool: Pool) -> AnswerStore:
        """Return the store of a site's answers about a pool."""
        about = About(
            site=card.name,
            pool=pool.digest,
            size=len(pool),
            teacher=card.teacher,
            policy=card.policy,
            encoding=self.settings.ask.encoding,
            classes=len(card.classes),
        )
        return AnswerStore(self.run / "answers" / card.name / pool.digest[:12], about)

    def _pools(self) -> list[Pool]:
        return [self.pool] if self.test_pool is None else [self.pool, self.test_pool]

    def _stores(self, contract: RunContract) -> list[AnswerStore]:
        return [self.store(card, pool) for card in contract.sites for pool in self._pools()]

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Count the seconds of a stage once: a repeat that finds the work done adds nothing."""
        began = time.perf_counter()
        self.events.add("stage", name=name)
        yield
        if name not in self.timing:
            self.timing[name] = time.perf_counter() - began
            write_json(self.run / "timing.json", self.timing)
