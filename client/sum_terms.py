"""What a site wants of the terms of a secure sum before it makes keys for it.

Lives here: the terms against what the site knows of itself. Does not live here: which other sites it knows
(client/policy), what was summed before (client/sum_index), the rounds (client/sums).

Every site of the sum signs the digest of the terms, so all that are honest see the same, and each of them has seen for
itself that what they say of it is true. What they say of a site that was invented nobody has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from consilience.common.cards import SumNoiseCard
from consilience.common.errors import LabelError, ProtocolError
from consilience.common.labels import LabelSpace
from consilience.common.sums.messages import Member, Terms

MOST_UNEVEN = 2.0
"""How often the smallest weight a site's weight may be."""


@dataclass(frozen=True)
class Own:
    """What a site is now, and what it needs. `classes` are by its own names, in the order of its answers."""

    name: str
    identity: str
    teacher: str
    policy: str
    classes: Sequence[str]
    noise: SumNoiseCard | None = None
    owners: int = 1
    """How many sites must know each of its classes, itself among them, whoever is lost."""


def check_terms(terms: Terms, own: Own) -> None:
    """Raise `ProtocolError` when the terms say otherwise of the site, or would tell more of it than it lets them."""
    member = terms.by_name.get(own.name)
    if member is None or member.identity != own.identity:
        raise ProtocolError("The terms of a secure sum do not name this site and its key")
    if (member.teacher, member.policy, member.noise) != (own.teacher, own.policy, own.noise):
        raise ProtocolError("The terms of a secure sum name another teacher, policy version or noise")
    _check_classes(terms, member, own.classes)
    weights = [member.weight for member in terms.members]
    if max(weights) > MOST_UNEVEN * min(weights) or terms.temperature < 1:
        # a sum in which one site outweighs the others, or each is sharpened to its arg-max, tells single answers
        raise ProtocolError("The terms of a secure sum weigh sites too unevenly, or sharpen their answers")
    known = terms.owners()[list(member.classes)] - (len(terms.members) - terms.threshold)
    if np.maximum(1, known).min() < own.owners:
        label = terms.labels[member.classes[int(known.argmin())]]
        raise ProtocolError(
            f"Class {label!r} is sure to be summed over {max(1, int(known.min()))} sites; the policy wants {own.owners}"
        )
    if terms.noise is not None and (short := terms.noise.shortage(own.name, terms.threshold)):
        raise ProtocolError(f"The terms of a secure sum let it carry too little noise: {short}")


def _check_classes(terms: Terms, member: Member, classes: Sequence[str]) -> None:
    """Raise `ProtocolError` unless the member's class set is that of these class names in the terms' label space.

    Sites that know a class by one name, or by names that the terms hold for one class, thus have it in common there,
    and share masks for it: a server cannot call class sets disjoint that are not.
    """
    try:
        synonyms = {names[0]: names[1:] for names in terms.synonyms}
        names = LabelSpace.build({member.site: classes}, synonyms).names
    except LabelError as error:
        raise ProtocolError(f"The terms of a secure sum join classes that this site tells apart: {error}") from None
    if tuple(terms.labels[label] for label in member.classes) != names:
        raise ProtocolError("The terms of a secure sum give this site a class set that is not that of its classes")
