"""Verticals: a named partition of the label space, and which sites are specialists of each (methods.md 4.1).

Does not live here: which vertical a sample belongs to (routing), and the student's head (concentrated_head).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from consilience.common.errors import SettingsError
from consilience.common.labels import LabelSpace
from consilience.common.settings import Concentration
from consilience.common.settings.concentration import KEEP

_FIELD = "job.yaml: field 'student.concentration.verticals'"
_MOST_NAMED = 10


@dataclass(frozen=True)
class Verticals:
    """`names[v]` and `classes[v]`, indices into the label space, ascending; every class is in exactly one vertical.

    `specialists[v]` are the sites, as indices, that know every class of vertical v.
    """

    names: tuple[str, ...]
    classes: tuple[tuple[int, ...], ...]
    specialists: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Classes of each vertical."""
        return tuple(map(len, self.classes))

    @property
    def of_class(self) -> NDArray[np.int64]:
        """(L,) the vertical of each class."""
        found = np.empty(sum(self.sizes), np.int64)
        for v, classes in enumerate(self.classes):
            found[list(classes)] = v
        return found

    @property
    def table(self) -> dict[str, tuple[int, ...]]:
        """Vertical -> its classes."""
        return dict(zip(self.names, self.classes, strict=True))

    def among(self, classes: Sequence[int]) -> Verticals:
        """Return the verticals of a student of these `classes` alone, numbered as its outputs.

        A vertical without any is left out; its specialists stay those of the whole vertical.
        """
        place = {label: at for at, label in enumerate(classes)}
        cut = [tuple(place[label] for label in held if label in place) for held in self.classes]
        left = [v for v, held in enumerate(cut) if held]
        return Verticals(
            tuple(self.names[v] for v in left),
            tuple(cut[v] for v in left),
            tuple(self.specialists[v] for v in left),
        )


def verticals_of(
    space: LabelSpace, settings: Concentration, synonyms: Mapping[str, Sequence[str]] | None = None
) -> Verticals:
    """Return the verticals that the job names, or one for each class set of a site.

    Raises `SettingsError`: classes that are in no vertical or unknown, class sets that overlap without being the same,
    a `keep` above what a vertical has, and, where specialists teach, a vertical that no site knows whole.
    """
    table = _by_sites(space) if settings.verticals is None else _named(space, settings.verticals, synonyms)
    known = [set(classes) for classes in space.class_sets]
    specialists = tuple(tuple(i for i, own in enumerate(known) if own >= set(held)) for held in table.values())
    found = Verticals(tuple(table), tuple(table.values()), specialists)
    _check_keep(found, settings)
    if settings.target == "specialist":
        for name, sites in zip(found.names, specialists, strict=True):
            if not sites:
                raise SettingsError(
                    f"{_FIELD}: no site knows every class of {name}, so none can teach it",
                    hint="Name verticals that a site each knows whole, or set student.concentration.target to unified",
                )
    return found


def kept(verticals: Verticals, settings: Concentration) -> int:
    """Return how many probabilities of a sample are kept at most; a smaller vertical has all of its own kept."""
    most = max(verticals.sizes) if settings.target == "specialist" else sum(verticals.sizes)
    return min(KEEP, most) if settings.keep is None else settings.keep


def _named(
    space: LabelSpace, table: Mapping[str, Sequence[str]], synonyms: Mapping[str, Sequence[str]] | None
) -> dict[str, tuple[int, ...]]:
    found, owner = dict[str, tuple[int, ...]](), dict[int, str]()
    for name, classes in table.items():
        labels = space.align(classes, synonyms)
        if unknown := [label for label, at in zip(classes, labels, strict=True) if at < 0]:
            raise SettingsError(
                f"{_FIELD}.{name} names classes that no site knows: {_listed(unknown)}",
                hint="Correct them, remove them, or add labels.synonyms",
            )
        if twice := [at for at in labels if at in owner]:  # under two names of one class
            raise SettingsError(
                f"{_FIELD}: class {space.names[twice[0]]!r} is in {owner[twice[0]]} and {name}",
                hint="Keep every class in one vertical",
            )
        owner |= dict.fromkeys(labels, name)
        found[name] = tuple(sorted(labels))
    if missing := [label for at, label in enumerate(space.names) if at not in owner]:
        raise SettingsError(
            f"{_FIELD} leaves {len(missing)} classes out: {_listed(missing)}",
            hint="Add them to a vertical, or make one of them",
        )
    return found


def _by_sites(space: LabelSpace) -> dict[str, tuple[int, ...]]:
    sites: dict[tuple[int, ...], list[str]] = {}
    for site, classes in zip(space.sites, space.class_sets, strict=True):
        sites.setdefault(tuple(sorted(classes)), []).append(site)
    owner: dict[int, str] = {}
    for classes, names in sites.items():
        for label in classes:
            if label in owner:
                raise SettingsError(
                    f"{_FIELD} is not given, and the class sets of {owner[label]} and {names[0]} overlap: both know "
                    f"{space.names[label]!r}",
                    hint="Name the verticals: every class in exactly one",
                )
            owner[label] = names[0]
    return {"-".join(names): classes for classes, names in sites.items()}


def _check_keep(verticals: Verticals, settings: Concentration) -> None:
    if settings.keep is None:
        return
    least = min(range(len(verticals)), key=lambda v: verticals.sizes[v])
    most, what = verticals.sizes[least], f"vertical {verticals.names[least]}"
    if settings.target == "unified":
        most, what = sum(verticals.sizes), "the label space"
    if settings.keep > most:
        raise SettingsError(
            f"job.yaml: field 'student.concentration.keep' is {settings.keep}; {what} has {most} classes",
            hint=f"Set it to at most {most}, or leave it out",
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
