"""What a job of multi-label sites cannot be, found when its sites are known and nothing is asked yet.

Does not live here: the contract (server/contract), unification of labels (server/unify/multi).
"""

from __future__ import annotations

from collections.abc import Sequence

from consilience.common.cards import SiteCard
from consilience.common.data import ImageData
from consilience.common.errors import DataError, LabelError, SettingsError
from consilience.common.settings import JobSettings, LabelKind


def kind_of(cards: Sequence[SiteCard]) -> LabelKind:
    """Return what all sites are. Raises `LabelError` where some are single-label and some multi-label."""
    multi = [card.name for card in cards if card.labels == "multi"]
    single = [card.name for card in cards if card.labels == "single"]
    if multi and single:
        raise LabelError(
            f"Some sites have one label an image ({', '.join(sorted(single)[:10])}), others any number of them "
            f"({', '.join(sorted(multi)[:10])}): their answers have no common meaning",
            hint="Do one job with the sites of each kind; sites that are not admitted or not started take no part",
        )
    return "multi" if multi else "single"


def check_multi(job: JobSettings) -> None:
    """Raise `SettingsError` for the first setting that takes one label an image."""
    wanted: tuple[tuple[str, object, object, str], ...] = (
        ("labels.groups", job.labels.groups, {}, "a group of labels has no probability of its own"),
        ("unify.method", job.unify.method, "ce", "labels are unified each by itself"),
        ("unify.prior_correction", job.unify.prior_correction, False, "labels have no priors that sum to 1"),
        ("unify.other", job.unify.other, 0.0, "an image to which no label applies is no exception"),
        ("unify.robust", job.unify.robust, False, "answers about labels are not compared with one another"),
        ("ask.choose", job.ask.choose, "random", "what is uncertain, or where sites differ, is told of one label"),
        ("student.other", job.student.other, False, "an image of no wanted label has none of them"),
        ("privacy.secure_sum", job.privacy.secure_sum, False, "secure sums are of one label an image"),
    )
    for field, value, allowed, why in wanted:
        if value != allowed:
            raise SettingsError(
                f"job.yaml: field {field!r} is {value!r}; with multi-label sites {why}",
                hint=f"Set it to {allowed!r}",
            )
    if job.student.learning not in ("soft-labels", "filtered"):
        raise SettingsError(
            f"job.yaml: field 'student.learning' is {job.student.learning!r}; of multi-label sites a student learns "
            "the unified labels, or through the sites' last blocks",
            hint="Set it to soft-labels or filtered",
        )
    if job.student.learning == "filtered" and job.student.filtered.target is None and job.unify.temperature != 1:
        raise SettingsError(
            f"job.yaml: field 'unify.temperature' is {job.unify.temperature:g}; with multi-label sites branches learn "
            "their teachers' answers as they are, unless student.filtered.target says otherwise",
            hint="Set it to 1, or student.filtered.target to unified",
        )


def check_test_kind(test: ImageData | None, kind: LabelKind) -> None:
    """Raise `DataError` where the test images are labelled as the sites' answers are not."""
    if test is None or (test.many is not None) == (kind == "multi"):
        return
    held, answers = ("one label", "log-odds of any number") if kind == "multi" else ("any number of labels", "of one")
    raise DataError(
        f"judge.test has {held} an image, and the sites' answers are {answers}: the student cannot be judged by it",
        hint="Name test data labelled as the sites' teachers are (docs/multi_label.md), or leave judge.test out",
    )
