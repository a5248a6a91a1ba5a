"""Sites that answer on groups of classes: their label space, what unifies their answers, and what the report says.

Lives here: what a job does otherwise where a site's class stands for several (`labels.groups`). Does not live here:
what a group is (common/groups), the mathematics (server/unify/groups), judging (server/judge).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from consilience.common.cards import SiteCard
from consilience.common.errors import UnifyError
from consilience.common.labels import LabelSpace, check_groups
from consilience.common.pages.numbers import listing
from consilience.common.settings import Labels, Unify
from consilience.server.unify import GroupUnifier, Unifier

AnyUnifier: TypeAlias = Unifier | GroupUnifier


def align(
    labels: Labels, cards: Sequence[SiteCard], order: Sequence[str] | None = None, *, multi: bool = False
) -> LabelSpace:
    """Return the label space of sites by what the job says of class names. Raises `LabelError`."""
    classes = {card.name: card.classes for card in cards}
    return LabelSpace.build(classes, labels.synonyms, order, multi=multi, groups=labels.groups)


def group_unifier(space: LabelSpace, settings: Unify, sites: Sequence[int], *, covered: bool) -> GroupUnifier:
    """Return what unifies the answers of `sites`, some of which are on groups.

    Raises `UnifyError` for settings that jobs with groups may not have.
    """
    if settings.method != "ce" or settings.temperature != 1 or settings.prior_correction:
        raise UnifyError(
            "answers on groups are unified by method 'ce', at temperature 1 and without correction for priors",
            hint="Set unify.method to ce, and leave temperature and prior_correction out",
        )
    return GroupUnifier(
        [space.entries(i) for i in sites],
        len(space),
        weights=[settings.weights.get(space.sites[i], 1.0) for i in sites],
        across=settings.across,
        strength=[settings.strength_of(space.sites[i]) for i in sites],
        other=settings.other if covered else 0.0,
    )


def group_warnings(labels: Labels, space: LabelSpace) -> list[str]:
    """Say which groups no site of `space` answers on; nothing where each has one."""
    held = {frozenset(space.names[c] for c in entry) for i in range(len(space.sites)) for entry in space.entries(i)}
    groups = check_groups(labels.groups, labels.synonyms, labels.classes)
    unused = [name for name, members in groups.items() if frozenset(members) not in held]
    if not unused:
        return []
    return [f"No site answers on {listing(unused, 8)}, which labels.groups names: nothing is done otherwise for it."]


def told_groups(space: LabelSpace, classes: Mapping[str, Sequence[str]]) -> dict[str, dict[str, list[str]]]:
    """Return site -> its own name of a group -> the classes of the group, for the sites that answer on any.

    `classes`: site -> its own class names, in the order of its answers.
    """
    found = {}
    for i, site in enumerate(space.sites):
        named = zip(classes.get(site, ()), space.entries(i), strict=False)
        groups = {own: [space.names[c] for c in entry] for own, entry in named if len(entry) > 1}
        if groups:
            found[site] = groups
    return found


def groups_summary(told: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    """Return in plain words which sites answer on groups (`told_groups`), and how they are judged; empty for none."""
    if not told:
        return ""
    sites = [
        f"{site} on " + " and ".join(f"{own} ({listing(list(classes), 8)})" for own, classes in groups.items())
        for site, groups in told.items()
    ]
    return (
        f"Some sites answer on groups of classes and do not say which of them: {listing(sites, 8)}. A group’s "
        "probability is shared out among its classes by all sites’ answers together. Baselines share it out evenly; as "
        "a single site, one that names a group is wrong. On a site’s own classes teacher and student are right where "
        "they name the true class or its group."
    )
