"""What a job whose sites answer on groups of classes cannot be, found when its settings are read.

Does not live here: what a group is (common/groups), unification of answers on groups (server/unify/groups).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from consilience.common.errors import LabelError
from consilience.common.labels import check_groups

if TYPE_CHECKING:
    from consilience.common.settings.job import JobSettings

LEARNING = ("soft-labels", "layer-wise", "common-feature")
"""Ways of learning by unified labels; the others learn from a site's answers as they are, class by class."""


def refuse_for_groups(job: JobSettings) -> None:
    """Raise `ValueError` for groups that are none, and for the first setting that takes answers on single classes."""
    try:
        check_groups(job.labels.groups, job.labels.synonyms, job.labels.classes)
    except LabelError as error:
        raise ValueError(
            f"{error.message}; {error.hint[0].lower()}{error.hint[1:]}" if error.hint else error.message
        ) from None
    unify, student = job.unify, job.student
    single: tuple[tuple[str, object, object, str], ...] = (
        ("unify.method", unify.method, "ce", "the other methods know no probability of several classes together"),
        ("unify.temperature", unify.temperature, 1.0, "a group softened is not the sum of its classes softened"),
        ("unify.prior_correction", unify.prior_correction, False, "a group's prior says nothing of its classes'"),
        ("unify.robust", unify.robust, False, "answers are compared class by class"),
        ("privacy.secure_sum", job.privacy.secure_sum, False, "sums are added up class by class"),
        ("student.classes", student.classes, None, "a site's answer on a group cannot be cut to some of its classes"),
        ("student.other", student.other, False, "a site's answer on a group cannot be cut to some of its classes"),
    )
    for field, value, allowed, why in single:
        if value != allowed:
            told = list(value) if isinstance(value, tuple) else value
            instead = "left out" if allowed is None else repr(allowed)
            raise ValueError(f"{field} is {told!r}; with labels.groups it must be {instead}, for {why}")
    if student.learning not in LEARNING:
        raise ValueError(
            f"student.learning is {student.learning!r}, which learns from sites' answers class by class; with "
            f"labels.groups it must be one of {', '.join(LEARNING)}"
        )
    if student.target == "concatenated":
        field = f"student.{student.learning.replace('-', '_')}.target"
        raise ValueError(
            f"{field} is 'concatenated', which learns each class's score of the one site that knows it; with "
            "labels.groups it must be 'unified'"
        )
