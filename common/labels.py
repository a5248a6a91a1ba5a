"""Class names to one label space: alignment by name, synonyms, owner sets, overlap graph, components.

Lives here: which classes are the same and which sites know them. Does not live here: what a group is (groups), anything
about answers.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from consilience.common.errors import LabelError
from consilience.common.groups import Groups, entries_of, open_odds, read_groups

Entries = tuple[tuple[int, ...], ...]
"""What each of a site's answers is about: one class, or the classes of a group."""


@dataclass(frozen=True)
class LabelSpace:
    """The union of the sites' classes, by name.

    `names` are the L canonical class names. `sites` are the sites' names and `class_sets[i]` the indices into
    `names` of site i's classes, in the order its teacher declares them. `multi`: the classes are labels that do not
    exclude one another; else an image is of one class. `grouped`, where a site answers on groups: for each such site
    what its answers are about, one after another its `class_sets[i]`; None for the others.
    """

    names: tuple[str, ...]
    sites: tuple[str, ...]
    class_sets: tuple[tuple[int, ...], ...]
    multi: bool = False
    grouped: tuple[Entries | None, ...] = ()

    @classmethod
    def build(
        cls,
        site_classes: Mapping[str, Sequence[str]],
        synonyms: Mapping[str, Sequence[str]] | None = None,
        order: Sequence[str] | None = None,
        *,
        multi: bool = False,
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> LabelSpace:
        """Align the sites' class names.

        `site_classes`: site -> its class names. `synonyms`: canonical name -> other names of that class.
        `order`: canonical names in the wanted order; by default as sites, sorted by name, bring them.
        `groups`: name -> classes; a site's class of that name stands for all of these, which count as known to it.
        Names are compared after Unicode NFC and trimming of outer spaces; case counts.

        Raises `LabelError`: no site, a site without classes, a class named twice (also through synonyms), a
        synonym of two classes, or an `order` that lacks a class or names one that no site knows; what is wrong about
        `groups`, and a site that names a class beside a group that holds it, or knows one group alone.
        """
        if not site_classes:
            raise LabelError("There are no sites, so there is no label space", hint="Add at least one site")
        canonical = _canonical_names(synonyms or {})
        known: dict[str, dict[str, str]] = {}
        for site in sorted(site_classes):
            known[site] = _site_names(f"Site {site}", site_classes[site], canonical)
        named = read_groups(groups or {}, _clean, canonical)
        entries = {site: entries_of(f"Site {site}", names, named) for site, names in known.items()} if named else {}
        flat = {
            site: [name for entry in entries[site] for name in entry] if named else list(known[site]) for site in known
        }
        found = list(dict.fromkeys(name for names in flat.values() for name in names))
        names = _ordered(found, order)
        index = {name: i for i, name in enumerate(names)}
        sets = tuple(tuple(index[name] for name in flat[site]) for site in known)
        grouped = tuple(_numbered(entries[site], index) for site in known) if named else ()
        return cls(tuple(names), tuple(known), sets, multi, grouped if any(grouped) else ())

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

    def entries(self, site: int) -> Entries:
        """Return what each answer of a site is about."""
        held = self.grouped[site] if self.grouped else None
        return tuple((label,) for label in self.class_sets[site]) if held is None else held

    def tells(self, site: int) -> frozenset[int]:
        """Return the classes of a site, without those that another tells alone and this one in a group only."""
        held = self.grouped[site] if self.grouped else None
        if held is None:
            return frozenset(self.class_sets[site])
        return frozenset(c for entry in held for c in entry if len(entry) == 1 or not self.tellers[c])

    @cached_property
    def tellers(self) -> tuple[tuple[int, ...], ...]:
        """For each class the sites that answer on it alone, and not on a group that holds it."""
        if not self.grouped:
            return self.owners
        told: list[list[int]] = [[] for _ in self.names]
        for site in range(len(self.sites)):
            for entry in self.entries(site):
                if len(entry) == 1:
                    told[entry[0]].append(site)
        return tuple(map(tuple, told))

    @cached_property
    def lumped(self) -> tuple[tuple[int, ...], ...]:
        """The sets of classes that no site tells apart: all that know one know all, each in one group."""
        if not self.grouped:
            return ()
        places: list[list[tuple[int, int]]] = [[] for _ in self.names]
        for site in range(len(self.sites)):
            for place, entry in enumerate(self.entries(site)):
                for label in entry:
                    places[label].append((site, place))
        alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for label, held in enumerate(places):
            alike.setdefault(tuple(held), []).append(label)
        return tuple(tuple(labels) for labels in alike.values() if len(labels) > 1)

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

    @property
    def _open(self) -> list[list[tuple[int, ...]]]:
        """Of each component of which groups leave odds open: the sets of classes between which they are."""
        if not self.grouped:
            return []
        twins = {label for labels in self.lumped for label in labels[1:]}
        entries = [self.entries(site) for site in range(len(self.sites))]
        members = [
            [label for label, c in enumerate(self.components) if c == k and label not in twins]
            for k in range(max(self.components) + 1)
        ]
        return [parts for held in members if (parts := open_odds(held, entries))]

    def _braced(self, labels: Sequence[int]) -> str:
        return "{" + ", ".join(self.names[label] for label in labels) + "}"

    def warnings(self) -> list[str]:
        """Say in plain words what overlap and groups leave open; empty where nothing is."""
        found = [
            f"No site tells {', '.join(self.names[c] for c in labels[:20])} apart: they are known as a group alone, "
            "and get equal shares of it. A site that answers on each of them would tell."
            for labels in self.lumped
        ]
        found += [
            f"Answers do not determine all odds between {'; '.join(self._braced(part) for part in parts[:10])}: groups "
            "tell what some of these come to together. What is open is as an even start leaves it. A site that knows "
            "classes of two of these sets would settle it."
            for parts in self._open
        ]
        apart = {label for labels in self.lumped for label in labels}
        unsaid = [self.names[c] for c, sites in enumerate(self.tellers) if not sites and c not in apart]
        if unsaid:
            found.append(
                f"No site answers on {', '.join(unsaid[:20])} alone: all that is known comes from groups, by what they "
                "leave for it. If that is a slip in labels.groups, correct the name."
            )
        count = max(self.components) + 1
        if count == 1:
            return found
        groups = [self._braced([label for label, c in enumerate(self.components) if c == k]) for k in range(count)]
        return [
            *found,
            f"The class sets fall apart into {count} components that share no class: {'; '.join(groups)}. "
            "Answers say nothing about the odds between components: the rule `unify.across` decides them. "
            "A site that knows a class of each would join them.",
        ]


def check_groups(
    groups: Mapping[str, Sequence[str]], synonyms: Mapping[str, Sequence[str]], order: Sequence[str] | None
) -> Groups:
    """Return groups by name, their classes by canonical name, checked against what the job says of class names.

    Raises `LabelError`.
    """
    return read_groups(groups, _clean, _canonical_names(synonyms), order)


def _numbered(entries: Sequence[Sequence[str]], index: Mapping[str, int]) -> Entries | None:
    """Return entries as indices; None where all are single classes."""
    if all(len(entry) == 1 for entry in entries):
        return None
    return tuple(tuple(index[name] for name in entry) for entry in entries)


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
