"""From what a run left on disk to its findings, and from them to report.json, report.html and card.md.

Lives here: gathering. Does not live here: any metric (server/judge), any wording or picture (server/report, card).
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import consilience
from consilience.common.files import read_json, write_bytes, write_json
from consilience.server.answered import block_size, blocks
from consilience.server.answers import AnswerStore
from consilience.server.asked_pool import AskedPool, numbers_in
from consilience.server.audits import read_audits
from consilience.server.card import card_markdown
from consilience.server.concentration import FILE as CONCENTRATION
from consilience.server.feature_learning import FILE
from consilience.server.filtered import branches_told
from consilience.server.guarantees import read_guarantees
from consilience.server.judge import Judgement, agreement
from consilience.server.judge_labels import LabelJudgement, label_agreement
from consilience.server.judge_verticals import judge_verticals
from consilience.server.labelling import load_other
from consilience.server.learning import StudentModel
from consilience.server.outcome import Outcome
from consilience.server.publishing_classes import judgement_of_classes, pool_classes, predictions
from consilience.server.publishing_coverage import coverage_findings
from consilience.server.publishing_multi import judgement_of_labels, pool_labels
from consilience.server.publishing_quality import pool_quality
from consilience.server.publishing_sites import coverage_aurocs, site_findings
from consilience.server.publishing_warnings import coverage_joins, learning_warnings
from consilience.server.quality import Quality
from consilience.server.report import render_html, report_dict
from consilience.server.report_findings import (
    CoverageFindings,
    Findings,
    Partition,
    PoolFindings,
    Samples,
    StudentFindings,
    UnifyFindings,
)
from consilience.server.truth import test_truth

SAMPLES_SHOWN = 24


def gather(outcome: Outcome, answers: Mapping[str, Sequence[AnswerStore]]) -> Findings:
    """Judge the student and collect what the report tells. `answers` are all stores of all sites by name."""
    settings, space, diagnostics = outcome.settings, outcome.space, outcome.diagnostics
    student = StudentModel(outcome.run / "student")
    guarantees = read_guarantees(outcome.run)
    converged = None if space.multi else 1 - diagnostics.not_converged / max(diagnostics.samples, 1)
    joined, chosen = coverage_joins(outcome), outcome.chosen
    judgement: Judgement | None = None
    labelled: LabelJudgement | None = None
    if space.multi:
        labelled, about_test = judgement_of_labels(outcome, student)
    else:
        judgement, about_test = judgement_of_classes(outcome, student)
    if outcome.summed is not None:
        about_test = ["The server knows sums of answers only: what needs single answers, as baselines do, is left out."]
    many = pool_labels(outcome) if space.multi else None
    truth = None if space.multi else pool_classes(outcome)
    told = coverage_findings(outcome.pool, space, outcome.stores, outcome.coverage, diagnostics, truth)
    aurocs = coverage_aurocs(outcome, truth, many)
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
            site_findings(
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
            diagnostics.exponent,
        ),
        student=StudentFindings(
            settings.student.architecture,
            settings.student.learning,
            sum(parameter.numel() for parameter in student.model.parameters()),
            taught=None if chosen.everything else chosen.taught,
            other=chosen.other,
            other_share=None if chosen.everything or space.multi else outcome.other_share,
        ),
        warnings=[*learning_warnings(outcome, joined=joined), *about_test],
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


def _outside(outcome: Outcome) -> tuple[float | None, int | None]:
    """Return how likely a labelled sample is outside the label space on average, and how many count less than half."""
    other = load_other(outcome.run / "labels")
    if other is None:
        return None, None
    values = np.asarray(other if outcome.samples.ids is None else other[outcome.samples.ids], np.float64)
    return float(values.mean()), int((values > 0.5).sum())


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
    judged = judge_verticals(truth, predictions(student, outcome.test, every), list(student.head.verticals.values()))
    for held, within, against in zip(told["verticals"], judged.within, judged.against_all, strict=True):
        held["average_precision"] = {"within": within, "against_all": against}
    return {**told, "mpvap": {"within": judged.mean_within, "against_all": judged.mean_against_all}}


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
