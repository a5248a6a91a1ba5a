"""Groups of classes: which of a site's class names stand for several classes of the label space.

Lives here: `labels.groups` checked, from a site's class names to what each of them is about, and what that leaves open.
Does not live here: the label space (labels), unification of answers on groups (server/unify/groups).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from consilience.common.errors import LabelError

Groups = Mapping[str, tuple[str, ...]]
"""Name of a group -> the canonical names of its classes."""


def read_groups(
    groups: Mapping[str, Sequence[str]],
    clean: Callable[[str], str],
    canonical: Mapping[str, str],
    classes: Sequence[str] | None = None,
) -> dict[str, tuple[str, ...]]:
    """Return the groups by cleaned name, their classes by canonical name.

    `clean` brings a name to the form in which names are compared; `canonical`: names that synonyms mention -> canonical
    name; `classes`: the label space, where the job names it. Raises `LabelError`: a group without a name, called as a
    class or as another group, with fewer than two classes, with one twice, with a group, or with one that `classes`
    lacks.
    """
    found: dict[str, tuple[str, ...]] = {}
    space = None if classes is None else {clean(name) for name in classes}
    names = {clean(name) for name in groups}
    for given, members in groups.items():
        name = clean(given)
        if not name:
            raise LabelError("labels.groups: a group has an empty name", hint="Name every group")
        if name in found:
            raise LabelError(f"labels.groups: {given!r} is named twice", hint="Name every group once")
        if canonical.get(name, name) != name:
            raise LabelError(
                f"labels.groups: {given!r} is by labels.synonyms another name of {canonical[name]!r}, a class",
                hint="Give the group another name",
            )
        if space is not None and name in space:
            raise LabelError(
                f"labels.groups: {given!r} stands in labels.classes too; a group is no class",
                hint="Remove it from one of them",
            )
        held: dict[str, str] = {}
        for member in members:
            label = canonical.get(clean(member), clean(member))
            if not label:
                raise LabelError(f"labels.groups: {given!r} holds a class without a name", hint="Name every class")
            if label in held:
                raise LabelError(f"labels.groups: {given!r} holds {label!r} twice", hint="Name every class once")
            if label in names:
                raise LabelError(
                    f"labels.groups: {given!r} holds {member!r}, which is a group; allowed: classes",
                    hint="Name the classes of that group instead",
                )
            if space is not None and label not in space:
                raise LabelError(
                    f"labels.groups: {given!r} holds {member!r}, which labels.classes lacks",
                    hint="Correct the name, or add it to labels.classes",
                )
            held[label] = member
        if len(held) < 2:
            raise LabelError(
                f"labels.groups: {given!r} holds {len(held)} class{'es' * (len(held) != 1)}; allowed: two or more",
                hint="Name all classes that the group stands for; another name of one class goes to labels.synonyms",
            )
        found[name] = tuple(held)
    return found


def entries_of(who: str, names: Mapping[str, str], groups: Groups) -> list[tuple[str, ...]]:
    """Return for each of a site's canonical `names` (-> its own) the classes that an answer on it is about.

    Raises `LabelError` where two of them are about one class, or where one group is all that the site knows.
    """
    found = [groups.get(name, (name,)) for name in names]
    if len(found) == 1 and len(found[0]) > 1:
        (own,) = names.values()
        raise LabelError(
            f"{who} knows {own!r} alone, a group by labels.groups: its answer is always 1 and says nothing",
            hint="Leave that site out of the job",
        )
    holder: dict[str, str] = {}
    for name, entry in zip(names, found, strict=True):
        for label in entry:
            if label in holder:
                raise LabelError(
                    f"{who} names {names[holder[label]]!r} and {names[name]!r}; by labels.groups both are about "
                    f"{label!r}, and an image is of one of a site's classes",
                    hint="Let groups hold only classes that such a site does not name beside, or leave the site out",
                )
            holder[label] = name
    return found


MOST_COMPARED = 1000
"""Classes, those that no site tells apart counted once, up to which open odds are looked for: a matrix of so many
squared is taken apart."""
_SAME = 1e-7


def open_odds(classes: Sequence[int], sites: Sequence[Sequence[Sequence[int]]]) -> list[tuple[int, ...]]:
    """Return the parts of `classes` between which the answers leave odds open; empty where they determine all.

    `classes` are those of one component of the overlap graph, `sites` what each site's answers are about, singly or in
    groups. A site tells the odds between the sums of its entries' probabilities. Whether these determine a label is a
    question of rank: of the directions in which a label may move so that no site's odds change. It is asked at one
    label, drawn once and for all; where it holds there it holds at nearly every label. Of more than `MOST_COMPARED`
    classes nothing is said.
    """
    place = {label: at for at, label in enumerate(classes)}
    if not 1 < len(place) <= MOST_COMPARED:
        return []
    label = np.random.default_rng(0).uniform(1, 2, len(place))
    rows = []
    for entries in sites:
        sums = []
        for entry in entries:
            held = [place[c] for c in entry if c in place]
            if held:
                row = np.zeros(len(place))
                row[held] = label[held] / label[held].sum()  # of the log of the sum, by the logs of its parts
                sums.append(row)
        rows += [row - sums[0] for row in sums[1:]]
    if not rows:
        return []
    _, sizes, directions = np.linalg.svd(np.array(rows))
    moves = directions[int((sizes > _SAME * sizes[0]).sum()) :]
    parts: dict[tuple[int, ...], list[int]] = {}
    for at, c in enumerate(classes):
        parts.setdefault(tuple(np.round(moves[:, at] / _SAME / 10).astype(np.int64)), []).append(c)
    return [tuple(held) for held in parts.values()] if len(moves) > 1 else []
