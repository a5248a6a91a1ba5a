"""The classes that a job's student is to tell apart: `student.classes` and `student.other`.

Lives here: from names to classes of the label space, and true labels, answers and unified labels as such a student
would give them. Does not live here: what is learnt from them (server/student/wanted), unification, which always is
about the whole label space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from consilience.common.data import ImageData
from consilience.common.errors import DataError, LabelError, SettingsError
from consilience.common.labels import LabelSpace
from consilience.common.settings import JobSettings
from consilience.server.answered import block_size
from consilience.server.labelling_solved import SolvedRows
from consilience.server.student.wanted import SitePart, Wanted
from consilience.server.truth import test_truth, test_truth_labels

OTHER = "other"
"""The output for all that is no wanted class."""
DIRECT = ("direct-ce", "direct-mf-lf")
"""Ways of learning that know nothing but the odds within a site's classes."""


@dataclass(frozen=True)
class Chosen:
    """The `classes` of the label space `space`, ascending, that a student is to tell apart.

    `other`: whether it has one more output, the last, for all else.
    """

    space: LabelSpace
    classes: tuple[int, ...]
    other: bool = False

    @classmethod
    def of(cls, job: JobSettings, space: LabelSpace) -> Chosen:
        """Return what `job` wants of `space`.

        Raises `SettingsError` for a class that no site knows or that is named twice, one alone, an `other` that nothing
        falls to or that is some class's name, and where a student that learns directly would learn nothing.
        """
        student = job.student
        classes = tuple(range(len(space)))
        if student.classes is not None:
            classes = _named(student.classes, space, job.labels.synonyms)
        found = cls(space, classes, student.other)
        if student.other and OTHER in space.names:
            raise SettingsError(
                f"job.yaml: field 'student.other' is True, and a class of the sites is called {OTHER!r}",
                hint="Give that class another name by labels.synonyms, or set student.other to false",
            )
        if student.other and len(classes) == len(space) and not job.unify.other:
            raise SettingsError(
                "job.yaml: field 'student.other' is True, and nothing is other: every class is wanted, and unify.other "
                "is 0",
                hint="Name fewer classes, set unify.other above 0, or student.other to false",
            )
        if len(classes) == 1 and not student.other and not space.multi:
            raise SettingsError(
                f"job.yaml: field 'student.classes' names {space.names[classes[0]]!r} alone, so that there is nothing "
                "to tell apart",
                hint="Name another, or set student.other to true",
            )
        if student.learning in DIRECT and not found.everything:
            _check_direct(student.learning, found)
        return found

    @property
    def everything(self) -> bool:
        """Whether the student's outputs are the label space as it is."""
        return not self.other and len(self.classes) == len(self.space)

    @cached_property
    def sites(self) -> tuple[int, ...]:
        """The sites that know a wanted class."""
        wanted = set(self.classes)
        return tuple(i for i, held in enumerate(self.space.class_sets) if not wanted.isdisjoint(held))

    @cached_property
    def taught(self) -> LabelSpace:
        """The student's outputs as a label space, known to the sites that know a wanted class.

        `other` is a class of those that know a class that nobody wants.
        """
        if self.everything:
            return self.space
        names = [self.space.names[label] for label in self.classes]
        return LabelSpace(
            (*names, OTHER) if self.other else tuple(names),
            tuple(self.space.sites[i] for i in self.sites),
            tuple(tuple(self._part(i).outputs) for i in self.sites),
            self.space.multi,
        )

    def wanted(self, share: float, batch: int) -> Wanted | None:
        """Return what losses cut by; None where the student learns all. `share`: the pool's mass on wanted classes.

        Weights are brought to 1 on average; but a batch that holds less than one sample's mass on average stays below.
        """
        if self.everything:
            return None
        return Wanted(self.classes, self.other, 1.0 if self.other else 1 / max(share, 1 / batch))

    def share(
        self, labels: NDArray[np.float32] | SolvedRows, other: NDArray[np.float32] | None, ids: NDArray[np.int64] | None
    ) -> float:
        """Return the mean mass on wanted classes of unified labels (n, L), of the rows `ids` or of all, n >= 1.

        `other` (n,): how likely each sample is outside the label space. Read a block at a time.
        """
        rows, size, total = np.arange(len(labels)) if ids is None else ids, block_size(self.space), 0.0
        for start in range(0, len(rows), size):
            at = rows[start : start + size]
            mass = labels[at][:, self.classes].sum(axis=1, dtype=np.float64)
            total += float(np.sum(mass if other is None else mass * (1.0 - np.asarray(other[at], np.float64))))
        return total / len(rows)

    def truth(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return true labels (m,) in the label space, -1 for a class of no site, as the student's outputs.

        What is no wanted class is `other`, or -1 without it.
        """
        if self.everything:
            return labels
        place = np.full(len(self.space) + 1, len(self.classes) if self.other else -1, np.int64)
        place[list(self.classes)] = np.arange(len(self.classes))
        return place[labels]  # -1 is the last

    def truth_labels(self, many: NDArray[np.int8]) -> NDArray[np.int8]:
        """Return true labels (m, L) of the label space, of images that may have several, as the student's outputs."""
        return many if self.everything else many[:, list(self.classes)]

    def mine(self, labels: NDArray[np.int64]) -> list[NDArray[np.bool_]]:
        """Return, for each site of `taught`, which of the true labels (m,) in the label space are of its classes."""
        return [np.isin(labels, self.space.class_sets[i]) for i in self.sites]

    def labels(self, probs: NDArray[np.float32], other: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Return unified labels (b, L) as the student's outputs, (b, outputs) float32."""
        if self.everything:
            return probs
        if self.space.multi:
            return probs[:, list(self.classes)]
        told = torch.from_numpy(probs[:, list(self.classes)])
        outside = None if other is None else torch.from_numpy(np.asarray(other, np.float32))
        return Wanted(self.classes, self.other).labels(told, outside)[0].float().numpy()

    def answers(self, site: int, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return log-probabilities (b, k) of site `site` of the label space over what `taught` says it knows, or the
        log-odds of these labels.

        Its other classes are `other`, or left out without it.
        """
        if self.space.multi and not self.everything:
            return rows[:, self._part(site).columns]
        return rows if self.everything else self._part(site).cut(torch.from_numpy(rows))[0].numpy()

    def check_test(self, test: ImageData | None, synonyms: Mapping[str, Sequence[str]]) -> None:
        """Raise `DataError` when no test image is of a wanted class: nothing could be judged."""
        if test is None or self.everything:
            return
        if self.space.multi:
            known = self.truth_labels(test_truth_labels(test, self.space, synonyms)) >= 0
        else:
            known = self.truth(test_truth(test, self.space, synonyms)) >= 0
        if not known.any():
            names = ", ".join(self.taught.names[:20])
            raise DataError(
                f"judge.test shows no image of the classes in student.classes ({names})",
                hint="Name other test images, or leave judge.test out",
            )

    def _part(self, site: int) -> SitePart:
        return Wanted(self.classes, self.other).site(self.space.class_sets[site])


def _named(names: Sequence[str], space: LabelSpace, synonyms: Mapping[str, Sequence[str]]) -> tuple[int, ...]:
    """Return the classes of these names, ascending. Raises `SettingsError`."""
    try:
        found = space.align(names, synonyms, who="job.yaml: field 'student.classes'")
    except LabelError as error:
        raise SettingsError(error.message, hint=error.hint) from error
    if unknown := [repr(name) for name, label in zip(names, found, strict=True) if label < 0]:
        known = ", ".join(space.names[:20]) + (f" and {len(space) - 20:,} more" if len(space) > 20 else "")
        raise SettingsError(
            f"job.yaml: field 'student.classes' names {', '.join(unknown[:20])}, which no site knows; known: {known}",
            hint="Correct the name, add a synonym (labels.synonyms), or start a site that knows it",
        )
    return tuple(sorted(found))


def _check_direct(learning: str, chosen: Chosen) -> None:
    """Raise `SettingsError` where no site knows two of the student's outputs: it would learn nothing."""
    if all(len(outputs) < 2 for outputs in chosen.taught.class_sets):
        raise SettingsError(
            f"job.yaml: field 'student.learning' is {learning!r}, which learns the odds between classes of one site; "
            "no site knows two of those in student.classes",
            hint="Set it to soft-labels, or name classes that one site knows",
        )
