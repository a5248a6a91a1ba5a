"""Class names to one label space: alignment by name, synonyms, owner sets, overlap graph, components.

Lives here: which classes are the same and which sites know them. Does not live here: anything about answers.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from consilience.common.errors import LabelError


@dataclass(frozen=True)
class LabelSpace:
    """The union of the sites' classes, by name.

    `names` are the L canonical class names. `sites` are the sites' names and `class_sets[i]` the indices into
    `names` of site i's classes, in the order its teacher declares them. `multi`: the classes are labels that do not
    exclude one another; else an image is of one class.
    """

    names: tuple[str, ...]
    sites: tuple[str, ...]
    class_sets: tuple[tuple[int, ...], ...]
    multi: bool = False

    @classmethod
    def build(
        cls,
        site_classes: Mapping[str, Sequence[str]],
        synonyms: Mapping[str, Sequence[str]] | None = None,
        order: Sequence[str] | None = None,
        *,
        multi: bool = False,
    ) -> LabelSpace:
        """Align the sites' class names.

        `site_classes`: site -> its class names. `synonyms`: canonical name -> other names of that class.
        `order`: canonical names in the wanted order; by default as sites, sorted by name, bring them.
        Names are compared after Unicode NFC and trimming of outer spaces; case counts.

        Raises `LabelError`: no site, a site without classes, a class named twice (also through synonyms), a
        synonym of two classes, or an `order` that lacks a class or names one that no site knows.
        """
        if not site_classes:
            raise LabelError("There are no sites, so there is no label space", hint="Add at least one site")
        canonical = _canonical_names(synonyms or {})
        known: dict[str, dict[str, str]] = {}
        for site in sorted(site_classes):
            known[site] = _site_names(f"Site {site}", site_classes[site], canonical)
        found = list(dict.fromkeys(name for names in known.values() for name in names))
        names = _ordered(found, order)
        index = {name: i for i, name in enumerate(names)}
        sets = tuple(tuple(index[name] for name in known[site]) for site in known)
        return cls(tuple(names), tuple(known), sets, multi)

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """Return the index of a canonical class name. Raises `LabelError` for one no site knows."""
        try:
            return self.names.index(name)
        except ValueError:
            raise LabelError(
                f"No site knows the class {name!r}; known: {', '.join(self.names[:20])}",
                hint="Correct the name or add a synonym",
            ) from None

    def align(
        self, names: Sequence[str], synonyms: Mapping[str, Sequence[str]] | None = None, *, who: str = "The test data"
    ) -> list[int]:
        """Return the index of each name, -1 for a class no site knows. Raises `LabelError` for one named twice.

        `who` names them, in an error.
        """
        canonical = _canonical_names(synonyms or {})
        index = {name: i for i, name in enumerate(self.names)}
        return [index.get(name, -1) for name in _site_names(who, names, canonical)]

    @cached_property
    def owners(self) -> tuple[tuple[int, ...], ...]:
        """For each class the sites (indices into `sites`) that know it: its owner set."""
        owned: list[list[int]] = [[] for _ in self.names]
        for site, classes in enumerate(self.class_sets):
            for label in classes:
                owned[label].append(site)
        return tuple(map(tuple, owned))

    @cached_property
    def owner_sets(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Owner set -> classes with exactly these owners; such classes behave alike in unification."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for label, owners in enumerate(self.owners):
            groups.setdefault(owners, []).append(label)
        return {owners: tuple(labels) for owners, labels in groups.items()}

    @cached_property
    def components(self) -> tuple[int, ...]:
        """For each class the number of its component of the class-overlap graph, from 0 in order of classes.

        One component where `multi`: of labels that do not exclude one another no odds are open.
        """
        if self.multi:
            return (0,) * len(self.names)
        parent = list(range(len(self.names)))

        def root(label: int) -> int:
            while parent[label] != label:
                parent[label] = parent[parent[label]]
                label = parent[label]
            return label

        for classes in self.class_sets:
            for label in classes[1:]:
                parent[root(label)] = root(classes[0])
        numbers: dict[int, int] = {}
        return tuple(numbers.setdefault(root(label), len(numbers)) for label in range(len(self.names)))

    def shared(self, site: int, other: int) -> tuple[int, ...]:
        """Return the classes that two sites both know, in the order of the label space."""
        return tuple(sorted(set(self.class_sets[site]) & set(self.class_sets[other])))

    def warnings(self) -> list[str]:
        """Say in plain words what the overlap leaves open; empty when the overlap graph is connected."""
        count = max(self.components) + 1
        if count == 1:
            return []
        groups = [
            "{" + ", ".join(n for n, c in zip(self.names, self.components, strict=True) if c == k) + "}"
            for k in range(count)
        ]
        return [
            f"The class sets fall apart into {count} components that share no class: {'; '.join(groups)}. "
            "Answers say nothing about the odds between components: the rule `unify.across` decides them. "
            "A site that knows a class of each would join them."
        ]


def _clean(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()


def _canonical_names(synonyms: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Map every name that a synonym table mentions to its canonical name."""
    canonical: dict[str, str] = {}
    for name, others in synonyms.items():
        for other in (name, *others):
            earlier = canonical.setdefault(_clean(other), _clean(name))
            if earlier != _clean(name):
                raise LabelError(
                    f"labels.synonyms: {other!r} belongs to {earlier!r} and to {name!r}", hint="Keep it at one of them"
                )
    return canonical


def _site_names(who: str, classes: Sequence[str], canonical: Mapping[str, str]) -> dict[str, str]:
    """Map the canonical names of a site's classes, in its order, to its own names."""
    if not classes:
        raise LabelError(f"{who} has no classes", hint="Name its classes")
    names: dict[str, str] = {}
    for own in classes:
        cleaned = _clean(own)
        if not cleaned:
            raise LabelError(f"{who}: a class has an empty name", hint="Name every class")
        name = canonical.get(cleaned, cleaned)
        if name in names:
            twice = f"{own!r} twice" if names[name] == own else f"{names[name]!r} and {own!r}, which are both {name!r}"
            raise LabelError(f"{who} names {twice}", hint="Name every class once")
        names[name] = own
    return names


def _ordered(found: list[str], order: Sequence[str] | None) -> list[str]:
    if order is None:
        return found
    wanted = [_clean(name) for name in order]
    times, known = Counter(wanted), set(found)  # a look-up each: there may be 100,000 names
    for name in wanted:
        if times[name] > 1:
            raise LabelError(f"labels.classes: {name!r} is named twice", hint="Name every class once")
        if name not in known:
            raise LabelError(
                f"labels.classes: no site knows the class {name!r}; known: {', '.join(found[:20])}",
                hint="Remove it, correct it or add a synonym",
            )
    missing = [name for name in found if name not in times]
    if missing:
        raise LabelError(
            f"labels.classes lacks {', '.join(missing[:20])}, which sites know", hint="Add them, or leave the field out"
        )
    return wanted
