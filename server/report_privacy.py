"""What the report and the card say of differential privacy, and of who could read answers on their way.

Does not live here: what sites said (server/guarantees), how much of what left them (server/card).
"""

from __future__ import annotations

from collections.abc import Mapping

from consilience.common.pages.numbers import listing
from consilience.server.report_findings import Findings


def privacy_summary(findings: Findings) -> str:
    """Say which sites answered by differential privacy, in their own words, and which without; then what audits say.

    Where answers have no guarantee and there is no audit to show, that is said too.
    """
    lines = audit_lines(findings)
    if not lines and any(site.guarantee is None for site in findings.sites):
        lines = ["No audit is told of: over a network a site sees its own alone, by `consilience site audit`."]
    return " ".join([_guarantees(findings), *lines])


def audit_lines(findings: Findings) -> list[str]:
    """Return what each site's audit of its own answers says, a sentence each, and that it proves nothing."""
    lines = [f"Audit by {name}: {audit.sentence}" for name, audit in findings.audits.items()]
    return [*lines, "An attack that fails is no guarantee."] if lines else []


def what_left(findings: Findings) -> str:
    """Say what of private samples, weights and gradients left the sites, and what did not."""
    told = findings.filtered or {}
    lent, asked = list(told.get("lent", {})), list(told.get("asked", {}))
    telling = [site.name for site in findings.sites if site.features is not None]
    never = ["private sample", *([] if lent or telling else ["weight"]), *([] if asked else ["gradient"])]
    text = f"No {' or '.join(filter(None, [', '.join(never[:-1]), never[-1]]))} left a site."
    if telling:
        text += (
            f" Features of the teacher’s layers for that pool did, from {listing(telling)}: maps of early layers at "
            "full size give away those layers’ weights (docs/amalgamation.md)."
        )
    if lent:
        text += f" The weights of the teacher’s last blocks did, from {listing(lent)}: they were lent."
    if asked:
        text += (
            f" What last blocks give for features that the server sent, and the gradients of these features, did from "
            f"{listing(asked)}."
        )
    return text


def sealing_line(findings: Findings) -> str:
    """Say whether the job's answers left the sites sealed: what a run asks does not change while it lasts."""
    privacy = findings.settings.get("privacy")
    chosen = privacy if isinstance(privacy, Mapping) else {}
    if chosen.get("secure_sum") is True:
        return "Answers left the sites masked, in secure sums, which are not sealed."
    if chosen.get("sealed") is True:
        return "Answers left the sites sealed: encrypted for the coordinator alone."
    return "Answers left the sites unsealed: a SuperLink that carried them could read them."


def _guarantees(findings: Findings) -> str:
    told = [
        f"{site.name} said when it agreed: epsilon {site.guarantee['epsilon']:.3g} at delta "
        f"{site.guarantee['delta']:g} for all that had left it and this run, by {site.guarantee['mechanism']}."
        for site in findings.sites
        if site.guarantee is not None
    ]
    bare = [site.name for site in findings.sites if site.guarantee is None]
    if not told:
        return "No formal guarantee."
    return " ".join([*told, *([f"No formal guarantee from {listing(bare)}."] if bare else [])])
