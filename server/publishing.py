"""From what a run left on disk to its findings, and from them to report.json, report.html and card.md.

Lives here: gathering. Does not live here: any metric (server/judge), any wording or picture (server/report, card).
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import consilience
from consilience.common.cards import SiteCard
from consilience.common.data import ImageData
from consilience.common.files import read_json, write_bytes, write_json
from consilience.common.labels import LabelSpace
from consilience.common.pool import Pool
from consilience.common.protocol import LABEL_KINDS, Guarantee
from consilience.common.settings import JobSettings
from consilience.common.sums.ring import WORD
from consilience.server.answered import Block, CoverageStores, Usable, block_size, blocks
from consilience.server.answers import AnswerStore
from consilience.server.asked_pool import AskedPool, numbers_in
from consilience.server.audits import read_audits
from consilience.server.card import card_markdown
from consilience.server.chosen import Chosen
from consilience.server.concentration import FILE as CONCENTRATION
from consilience.server.contract import RunContract, term_warnings
from consilience.server.coverage_check import believed
from consilience.server.feature_learning import FILE
from consilience.server.filtered import branches_told
from consilience.server.guarantees import read_guarantees
from consilience.server.judge import Judgement, agreement, auroc, judge
from consilience.server.judge_labels import LabelJudgement, label_agreement
from consilience.server.judge_verticals import judge_verticals
from consilience.server.labelling import Diagnostics, anchored, load_other, unifier, usable_coverage
from consilience.server.labelling_top import Labels
from consilience.server.learning import StudentModel
from consilience.server.publishing_coverage import coverage_findings
from consilience.server.publishing_multi import any_applies, judgement_of_labels, pool_labels
from consilience.server.publishing_quality import pool_quality
from consilience.server.quality import Quality
from consilience.server.report import render_html, report_dict
from consilience.server.report_findings import (
    CoverageFindings,
    FeatureFindings,
    Findings,
    Partition,
    PoolFindings,
    Samples,
    SiteFindings,
    StudentFindings,
    UnifyFindings,
)
from consilience.server.robust import cut, kept
from consilience.server.truth import pool_truth, test_truth, test_truth_labels

SAMPLES_SHOWN = 24


@dataclass(frozen=True)
class Outcome:
    """What the stages before judging left: paths, settings, and the sites that answered anything about the pool."""

    run: Path
    settings: JobSettings
    pool: Pool
    test: ImageData | None
    contract: RunContract
    space: LabelSpace
    cards: Sequence[SiteCard]
    stores: Sequence[AnswerStore]
    coverage: CoverageStores
    samples: Usable
    test_stores: Sequence[AnswerStore] | None
    test_coverage: CoverageStores
    labels: Labels
    diagnostics: Diagnostics
    curves: Mapping[str, Sequence[Mapping[str, Any]]]
    failures: Mapping[str, str]
    """Site -> why it left samples unanswered."""
    chosen: Chosen
    other_share: float
    """How much of the unified labels' mass is on what the student does not tell apart."""
    summed: tuple[str, ...] | None = None
    """The sites whose answers are in a secure sum; None where sites answered openly."""


def gather(outcome: Outcome, answers: Mapping[str, Sequence[AnswerStore]]) -> Findings:
    """Judge the student and collect what the report tells. `answers` are all stores of all sites by name."""
    settings, space, diagnostics = outcome.settings, outcome.space, outcome.diagnostics
    student = StudentModel(outcome.run / "student")
    guarantees = read_guarantees(outcome.run)
    converged = None if space.multi else 1 - diagnostics.not_converged / max(diagnostics.samples, 1)
    joined = _joined(outcome)
    warnings = [] if joined else list(space.warnings())
    if diagnostics.not_converged:
        warnings.append(
            f"Unification did not converge for {diagnostics.not_converged:,} of {diagnostics.samples:,} samples."
        )
    warnings += term_warnings(settings.student)
    learning, chosen = settings.student.learning, outcome.chosen
    settled = joined and learning == "direct-ce" and (chosen.everything or chosen.other)
    silent = learning not in ("concentration", "filtered") and not settings.student.learns_labels
    if max(chosen.taught.components) > 0 and silent and not settled:
        warnings.append(
            f"The student learnt by {learning}, which says nothing about the odds between components; "
            "student.learning: soft-labels would follow the rule unify.across."
        )
    if learning == "filtered" and not settings.student.learns_labels and not space.multi and len(chosen.sites) > 1:
        filtered = settings.student.filtered
        fields = [*(["joint: true"] * (not filtered.joint)), *(["target: unified"] * (filtered.target == "teachers"))]
        warnings.append(
            f"Nothing taught the student the odds between its branches, one for each of {len(chosen.sites):,} sites; "
            f"student.filtered: {{{', '.join(fields)}}} would learn them from unified labels."
        )
    if diagnostics.lacking:
        warnings.append(
            f"{diagnostics.lacking:,} labels of samples are left out of learning: no site that knows them answered "
            "about those samples."
        )
    if diagnostics.apart:
        warnings.append(
            f"For {diagnostics.apart:,} samples the sites that answered, and whose answers count, fall apart into more "
            "components than all sites do: about the odds between those the rule unify.across decides."
        )
    judgement: Judgement | None = None
    labelled: LabelJudgement | None = None
    if space.multi:
        labelled, about_test = judgement_of_labels(outcome, student)
    else:
        judgement, about_test = _judgement(outcome, student)
    if outcome.summed is not None:
        about_test = ["The server knows sums of answers only: what needs single answers, as baselines do, is left out."]
    many = pool_labels(outcome) if space.multi else None
    truth = None if space.multi else _pool_truth(outcome)
    told = coverage_findings(outcome.pool, space, outcome.stores, outcome.coverage, diagnostics, truth)
    aurocs = _coverage_aurocs(outcome, truth, many)
    return Findings(
        job=settings.name,
        seed=settings.seed,
        settings=settings.model_dump(mode="json", exclude={"pool": True, "judge": True}),
        pool=PoolFindings(
            outcome.pool.digest,
            len(outcome.pool),
            outcome.pool.shape,
            len(outcome.pool) - outcome.samples.count,
            outcome.samples.unknown,
            *_chosen_from(outcome),
        ),
        space=space,
        sites=[
            _site(
                card,
                answers[card.name],
                outcome,
                told.get(card.name, CoverageFindings()),
                aurocs.get(card.name),
                guarantees.get(card.name),
            )
            for card in outcome.contract.sites
        ],
        unify=UnifyFindings(
            settings.unify.method,
            settings.unify.across,
            max(space.components) + 1,
            diagnostics.seconds,
            converged,
            None if space.multi else diagnostics.largest_residual,
            joined,
            settings.unify.strength if settings.unify.method == "ce" else None,
            settings.unify.strengths,
            *_outside(outcome),
            diagnostics.claimed,
        ),
        student=StudentFindings(
            settings.student.architecture,
            settings.student.learning,
            sum(parameter.numel() for parameter in student.model.parameters()),
            taught=None if chosen.everything else chosen.taught,
            other=chosen.other,
            other_share=None if chosen.everything or space.multi else outcome.other_share,
        ),
        warnings=[*warnings, *about_test],
        left_out=outcome.contract.left_out,
        judgement=judgement,
        labelled=labelled,
        learning=outcome.curves,
        agreement=(label_agreement if space.multi else agreement)(
            (block.answers for block in blocks(outcome.stores, block_size(space))), space
        ),
        partition=_partition(outcome.run),
        samples=_samples(outcome, student, truth, many),
        versions=versions(),
        audits=read_audits(outcome.run),
        amalgamation=_amalgamation(outcome),
        concentration=_concentration(outcome, student),
        filtered=branches_told(outcome.run, outcome.cards) if student.filtered else None,
        trust=diagnostics.trust,
        quality=_quality(outcome, student, joined=joined),
    )


def publish(run: Path, findings: Findings, timing: Mapping[str, float]) -> None:
    """Write report.json, report.html and card.md into the run folder, report.json last: it says that a run is done."""
    findings = replace(findings, timing=timing)
    report = report_dict(findings)
    write_bytes(run / "report.html", render_html(findings, report).encode())
    write_bytes(run / "card.md", card_markdown(findings, report).encode())
    write_json(run / "report.json", report)


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    return {
        "consilience": consilience.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flwr": version("flwr"),
        "numpy": np.__version__,
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _chosen_from(outcome: Outcome) -> tuple[int | None, str | None]:
    """Return how many samples the whole pool has, where a part was asked about, and how that was chosen."""
    asking = outcome.settings.ask
    if not isinstance(outcome.pool, AskedPool):
        return None, None
    later = f"chosen by {asking.choose} in {asking.parts} rounds, the first drawn at random"
    return outcome.pool.manifest.size, "drawn at random" if asking.choose == "random" else later


def _joined(outcome: Outcome) -> bool:
    """Whether coverage decides the odds between components: at most one has no site that gave all of it."""
    space = outcome.space
    keep = kept(space, outcome.diagnostics.trust, range(len(space.sites)))
    components, used = keep.components(space), believed(space, outcome.coverage, outcome.diagnostics.checks)
    told = [(classes, used[i]) for i, classes in zip(keep.sites, keep.class_sets(space), strict=True)]
    if outcome.settings.unify.method == "sd" and any(store is None or not store.complete for _, store in told):
        return False
    covered = {components[classes[0]] for classes, store in told if store is not None and store.complete}
    return bool(covered) and len(covered) >= max(components)


def _outside(outcome: Outcome) -> tuple[float | None, int | None]:
    """Return how likely a labelled sample is outside the label space on average, and how many count less than half."""
    other = load_other(outcome.run / "labels")
    if other is None:
        return None, None
    values = np.asarray(other if outcome.samples.ids is None else other[outcome.samples.ids], np.float64)
    return float(values.mean()), int((values > 0.5).sum())


def _site(
    card: SiteCard,
    held: Sequence[AnswerStore],
    outcome: Outcome,
    coverage: CoverageFindings,
    coverage_auroc: float | None,
    guarantee: Guarantee | None,
) -> SiteFindings:
    stores = [store for store in held if store.about.kind in LABEL_KINDS.values()]
    covers = [store for store in held if store.about.kind == "coverage"]
    asked = sum(store.about.size for store in stores)
    answered = sum(len(store) for store in stores)
    size = sum(store.bytes for store in stores)
    if outcome.summed is not None:
        asked = len(outcome.pool)
        answered = asked if card.name in outcome.summed else 0
        size = answered * len(card.classes) * WORD.itemsize
    return SiteFindings(
        name=card.name,
        classes=card.classes,
        teacher=card.description,
        fingerprint=card.teacher,
        answers=answered,
        asked=asked,
        bytes=size,
        seconds=sum(store.seconds for store in stores),
        missed=asked - answered,
        reason=outcome.failures.get(card.name),
        precision=outcome.settings.ask.encoding if outcome.summed is None else "masked",
        holdout_accuracy=card.holdout_accuracy,
        holdout_ap=card.holdout_ap,
        calibration=None if card.calibration is None else card.calibration.model_dump(),
        coverage=replace(
            coverage,
            asked=bool(covers),
            encoding=covers[0].about.encoding if covers else None,
            bytes=sum(store.bytes for store in covers),
            answers=sum(len(store) for store in covers),
            missed=sum(store.about.size - len(store) for store in covers),
        ),
        coverage_auroc=coverage_auroc,
        features=_features([store for store in held if store.about.kind == "features"], card),
        guarantee=None if guarantee is None else guarantee.model_dump(),
        signed=sum(shard.samples for store in held for shard in store.shards()),
        key=None if card.public_key is None else card.identity,
    )


def _features(stores: Sequence[AnswerStore], card: SiteCard) -> FeatureFindings | None:
    """Return what a site told of features; None where it was asked for none."""
    if not stores or card.features is None:
        return None
    named = {tap.fingerprint: tap.name for tap in card.features.taps}
    return FeatureFindings(
        taps=tuple(named[store.about.teacher] for store in stores),
        encoding=stores[0].about.encoding,
        bytes=sum(store.bytes for store in stores),
        answers=sum(len(store) for store in stores),
        missed=sum(store.about.size - len(store) for store in stores),
    )


def _quality(outcome: Outcome, student: StudentModel, *, joined: bool) -> Quality | None:
    """Return what is estimated without labels; None where single answers or whole classes are not to be had."""
    if outcome.space.multi or outcome.summed is not None or not outcome.chosen.everything:
        return None
    samples = outcome.samples
    if isinstance(outcome.pool, AskedPool) and outcome.pool.first < len(outcome.pool):
        # samples that were chosen are not like the pool's: they are the hard ones, or the rare ones
        drawn = np.arange(samples.size) < outcome.pool.first
        samples = replace(samples, mask=drawn if samples.mask is None else drawn & samples.mask)
    about = (outcome.pool, outcome.space, outcome.stores, outcome.cards, outcome.labels, student, samples)
    found = outcome.diagnostics
    return pool_quality(*about, outcome.settings.seed, found.trust, apart=found.apart, joined=joined)


def _amalgamation(outcome: Outcome) -> dict[str, Any] | None:
    path = outcome.run / "student" / FILE
    told: dict[str, Any] | None = read_json(path) if outcome.settings.asks_features else None
    return told


def _concentration(outcome: Outcome, student: StudentModel) -> dict[str, Any] | None:
    """Return what is told of verticals, judged where there is a test set; None for a student without."""
    if student.head is None:
        return None
    told: dict[str, Any] = read_json(outcome.run / "student" / CONCENTRATION)
    if outcome.test is None:
        return told
    truth = outcome.chosen.truth(test_truth(outcome.test, outcome.space, outcome.settings.labels.synonyms))
    every = np.arange(len(outcome.test))
    judged = judge_verticals(truth, _predictions(student, outcome.test, every), list(student.head.verticals.values()))
    for held, within, against in zip(told["verticals"], judged.within, judged.against_all, strict=True):
        held["average_precision"] = {"within": within, "against_all": against}
    return {**told, "mpvap": {"within": judged.mean_within, "against_all": judged.mean_against_all}}


def _pool_truth(outcome: Outcome) -> NDArray[np.int64] | None:
    """Return the pool's true labels in the label space, for judging; None where there are none."""
    path, synonyms = outcome.settings.judge.pool_labels, outcome.settings.labels.synonyms
    if path is None or outcome.test is None:
        return None
    return pool_truth(path, outcome.pool, outcome.test, outcome.space, synonyms)


def _coverage_aurocs(
    outcome: Outcome, pooled: NDArray[np.int64] | None, many: NDArray[np.int8] | None
) -> dict[str, float | None]:
    """Return site -> AUROC of its coverage: on the pool where its true labels are known, else on the test pool.

    `pooled` (n,) true classes of the pool, or `many` (n, L) its true labels where an image may have several.
    """
    test, space = outcome.test, outcome.space
    truth: NDArray[np.int64] | None
    if many is not None or (space.multi and test is not None):
        stores = outcome.test_coverage if many is None else outcome.coverage
        if many is None and test is not None:
            many = test_truth_labels(test, space, outcome.settings.labels.synonyms)
        truth = None
    elif pooled is not None:
        truth, stores = pooled, outcome.coverage
    elif test is not None:
        truth, stores = test_truth(test, space, outcome.settings.labels.synonyms), outcome.test_coverage
    else:
        return {}
    found: dict[str, float | None] = {}
    for site, classes, store in zip(space.sites, space.class_sets, stores, strict=True):
        if store is not None:
            own = truth if many is None else any_applies(many, classes)
            assert own is not None
            told = store.answered(0, len(own))
            found[site] = auroc(store.read_answered(0, len(own))[told, 0], own[told], classes)
    return found


def _judgement(outcome: Outcome, student: StudentModel) -> tuple[Judgement | None, list[str]]:
    """Judge; returns with it what is to say about sites that did not answer the whole test pool."""
    test = outcome.test
    if test is None:
        return None, []
    space, settings, chosen = outcome.space, outcome.settings, outcome.chosen
    answers: list[NDArray[np.float32] | None] = [None] * len(space.sites)
    unified, warnings = None, []
    if outcome.test_stores is not None:
        whole = [i for i, store in enumerate(outcome.test_stores) if store.complete]
        given = {i: outcome.test_stores[i].read(0, len(test)) for i in whole}
        answers = [given.get(i) for i in range(len(space.sites))]
        if len(whole) < len(answers):
            absent = ", ".join(site for site, rows in zip(space.sites, answers, strict=True) if rows is None)
            warnings.append(f"The baselines are judged without {absent}: the test pool was not answered whole.")
        keep = kept(space, outcome.diagnostics.trust, whole)
        everyone = kept(space, outcome.diagnostics.trust, range(len(space.sites)))
        told_there = frozenset[int]().union(*(space.tells(i) for i in whole))
        if len(told_there) == len(space) and keep.classes == everyone.classes:
            used = believed(space, outcome.test_coverage, outcome.diagnostics.checks)
            covers = [used[i] for i in whole]
            told = {c.about.site: c.read(0, len(test))[:, 0] for c in covers if c is not None and c.complete}
            block = Block(np.arange(len(test)), answers, [told.get(site) for site in space.sites])
            rows, values = cut(block, keep)
            coverage = usable_coverage(settings.unify, values)
            solve = unifier(space, settings.unify, outcome.cards, covered=False, keep=keep)
            if settings.unify.other and anchored(solve, keep.class_sets(space), coverage):
                solve = unifier(space, settings.unify, outcome.cards, keep=keep)
            found = solve(rows, coverage=coverage)
            unified = chosen.labels(keep.spread(found.probs, space), found.other)
            partly = [c.about.site for c in covers if c is not None and not c.complete]
            if partly:
                warnings.append(
                    f"The unified ensemble is judged without the coverage of {', '.join(partly)}: it was not given "
                    "for the whole test pool."
                )
        else:
            warnings.append(
                "There is no unified ensemble: the sites that answered the whole test pool do not tell every class."
            )
    oracle = StudentModel(outcome.run / "oracle") if "oracle" in outcome.curves else None
    whole_truth = test_truth(test, space, settings.labels.synonyms)
    truth = chosen.truth(whole_truth)
    ids = np.arange(len(test)) if chosen.everything else np.flatnonzero(truth >= 0)
    judgement = judge(
        truth[ids],
        chosen.taught,
        [None if (held := answers[i]) is None else chosen.answers(i, held[ids]) for i in chosen.sites],
        None if unified is None else unified[ids],
        _predictions(student, test, ids),
        None if oracle is None else _predictions(oracle, test, ids),
        chosen.mine(whole_truth[ids]),
    )
    return replace(judgement, unwanted=len(test) - len(ids)), warnings


def _predictions(model: StudentModel, test: ImageData, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return (m, L) log-probabilities of the test images `ids` (m,), read and scored a block at a time."""
    parts = [model.log_probs(test.read(part)) for part in _chunks(ids, 1024)]
    return np.concatenate(parts) if parts else np.empty((0, len(model.labels)), np.float32)


def _chunks(ids: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _samples(
    outcome: Outcome, student: StudentModel, truth: NDArray[np.int64] | None, many: NDArray[np.int8] | None
) -> Samples:
    """Return a few samples spread evenly over those learnt from: no choice, so nothing is picked to look good."""
    usable = outcome.samples.ids
    total = outcome.samples.count
    ids = np.linspace(0, total - 1, min(SAMPLES_SHOWN, total)).astype(np.int64)
    ids = ids if usable is None else usable[ids]
    images, chosen = outcome.pool.take(ids), outcome.chosen
    other = load_other(outcome.run / "labels")
    return Samples(
        ids=numbers_in(outcome.pool, ids),
        images=images,
        soft_labels=chosen.labels(np.asarray(outcome.labels[ids]), None if other is None else other[ids]),
        answers=[chosen.answers(i, _rows(outcome.stores[i], ids)) for i in chosen.sites],
        student=student.log_probs(images),
        truth=None if truth is None else chosen.truth(truth[ids]),
        many=None if many is None else chosen.truth_labels(many[ids]),
    )


def _rows(store: AnswerStore, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the answers about a few samples, NaN where there is none."""
    rows = [store.read_answered(int(i), int(i) + 1) for i in ids]
    known = [store.answered(int(i), int(i) + 1) for i in ids]
    return np.where(np.concatenate(known)[:, None], np.concatenate(rows), np.float32(np.nan))


def _partition(run: Path) -> Partition | None:
    """Return how a simulation shared out its data; None for a real job."""
    path = run / "simulation" / "prepared.json"
    if not path.exists():
        return None
    held = read_json(path)
    return Partition(tuple(held["sites"]), tuple(held["classes"]), np.asarray(held["counts"], np.int64))
