"""What the report tells of each site: its answers, coverage, features and guarantee.

Does not live here: what coverage looks like over the pool (server/publishing_coverage), any metric (server/judge).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from consilience.common.cards import SiteCard
from consilience.common.protocol import LABEL_KINDS, Guarantee
from consilience.common.sums.ring import WORD
from consilience.server.answers import AnswerStore
from consilience.server.judge import auroc
from consilience.server.outcome import Outcome
from consilience.server.publishing_multi import any_applies
from consilience.server.report_findings import CoverageFindings, FeatureFindings, SiteFindings
from consilience.server.truth import test_truth, test_truth_labels


def site_findings(
    card: SiteCard,
    held: Sequence[AnswerStore],
    outcome: Outcome,
    coverage: CoverageFindings,
    coverage_auroc: float | None,
    guarantee: Guarantee | None,
) -> SiteFindings:
    """Return what is told of the site of `card`, whose stores are `held`."""
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


def coverage_aurocs(
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
