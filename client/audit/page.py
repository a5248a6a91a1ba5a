"""The page audit.html: an audit for whoever answers for the data, from the verdict down to the last figure.

Lives here: the values that the template lays out. Does not live here: sentences about results (record), markup
(templates/audit.html.j2), style (common/pages).
"""

from __future__ import annotations

from typing import Any

from consilience.client.audit.canaries import CanaryAudit
from consilience.client.audit.figure import roc
from consilience.client.audit.membership import FALSE_RATES, Found, Membership
from consilience.client.audit.record import NO_PROOF, Audit
from consilience.client.audit.shares import Shares
from consilience.common.pages import page_templates
from consilience.common.pages.numbers import MISSING, percent

MOST_CLASSES = 40
"""Rows of the table of classes; all of them are in audit.json."""
ATTACKS = {"shadows": "Likelihood ratio", "loss": "Loss threshold"}
PARTS = ATTACKS | {"shares": "Shares of the classes", "averaging": "Asking again", "canaries": "Canaries"}


def render_page(audit: Audit) -> str:
    """Return audit.html: one file, no script, nothing fetched."""
    done: list[tuple[str, Membership]] = []
    for key, name in ATTACKS.items():
        if (found := getattr(audit, key)) is not None:
            done.append((name, found))
    pooled = audit.pooled
    views = {
        "roc": roc(done) if done else None,
        "attacks": [_attack(name, found, len(done) > 1) for name, found in done],
        "rates": [rate for rate in FALSE_RATES if any(found.found[rate] is not None for _, found in done)],
        "pooled": [(percent(rate), *_share(pooled.found[rate])) for rate in FALSE_RATES] if pooled is not None else [],
        "unresolved": [rate for rate in FALSE_RATES if any(found.found[rate] is None for _, found in done)],
        "classes": _classes(audit.shares) if audit.shares is not None else [],
        "more_classes": max(0, len(audit.shares.classes) - MOST_CLASSES) if audit.shares is not None else 0,
        "canaries": _canaries(audit.canaries) if audit.canaries is not None else None,
        "left_out": [(PARTS[part], why) for part, why in sorted(audit.left_out.items())],
        "no_proof": NO_PROOF,
    }
    return page_templates("consilience.client.audit").get_template("audit.html.j2").render(a=audit, **views)


def _attack(name: str, found: Membership, of_two: bool) -> dict[str, Any]:
    shown = [(share, f"{percent(share.low)} to {percent(share.high)}") for share in found.found.values() if share]
    return {
        "name": name,
        "auc": percent(found.auc),
        "interval": f"{percent(found.low)} to {percent(found.high)}",
        "found": [(percent(share.share), interval) for share, interval in shown],
        "better": (found.low_of_two if of_two else found.low) > 0.5,
    }


def _share(found: Found | None) -> tuple[str, str]:
    """Return a share and its interval."""
    return (MISSING, "") if found is None else (percent(found.share), f"{percent(found.low)} to {percent(found.high)}")


def _canaries(found: CanaryAudit) -> dict[str, Any]:
    return {
        "lower": f"{found.lower:.2f}",
        "upper": MISSING if found.upper is None else f"{found.upper:.3g}",
        "auc": percent(found.auc),
        "interval": f"{percent(found.low)} to {percent(found.high)}",
        "confidence": percent(found.confidence),
        "delta": f"{found.delta:g}",
    }


def _classes(shares: Shares) -> list[tuple[str, str, str, str]]:
    """Return name, true share, and the two guesses, the most frequent first."""
    rows = zip(shares.classes, shares.true, shares.by_mean, shares.by_scaling, strict=True)
    first = sorted(rows, key=lambda row: -row[1])[:MOST_CLASSES]
    return [(name, percent(true), percent(mean), percent(scaled)) for name, true, mean, scaled in first]


def shown_rates(found: Membership) -> list[str]:
    """Return the share of members found at each of `FALSE_RATES`, for a line of a table."""
    return [MISSING if (share := found.found[rate]) is None else percent(share.share) for rate in FALSE_RATES]
