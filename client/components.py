"""A site's principal components on their way out: counted in the ledger once, then given with an agreement.

Does not live here: whether a job may have them (client/policy), how they come to be (features/bases), their bytes on
the way (common/components).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from consilience.client.features import OpenTap
from consilience.client.ledger import Ledger
from consilience.client.ledger_rows import Entry, components, components_subject
from consilience.client.policy import component_bytes
from consilience.common.cards import TapCard
from consilience.common.components import enclose
from consilience.common.protocol import Contract, Enclosed
from consilience.common.settings import SiteSettings
from consilience.common.vouching import Signer


def not_released(ledger: Ledger, taps: Sequence[TapCard]) -> tuple[TapCard, ...]:
    """Return those of `taps`, which have components, whose very components did not leave yet. Raises `StorageError`."""
    return tuple(
        tap
        for tap in taps
        if tap.components is not None
        and next(ledger.rows(subject=components_subject(tap.components.digest)), None) is None
    )


def release(
    settings: SiteSettings,
    ledger: Ledger,
    contract: Contract,
    taps: Sequence[OpenTap],
    signer: Signer | None,
    permit: Callable[[int], None],
    costs: Callable[[], Sequence[Entry]],
) -> Enclosed | None:
    """Return what goes with the agreement to `contract`, None where it asks for none; it is counted before.

    `taps` are those that `contract.components` names. `permit` is told how many bytes more would leave, and raises
    `RefusedError` where they may not: nothing leaves then. `costs` returns what the ledger is to tell of the mechanisms
    behind which they leave. Raises `LedgerError`, `StorageError`, `ProtocolError` too.
    """
    if not taps:
        return None
    enclosed = enclose(contract, settings.name, [(tap.card, tap.components) for tap in taps], signer)
    with ledger.alone():
        new = not_released(ledger, [tap.card for tap in taps])
        permit(component_bytes(new))
        if new:
            version, paid = settings.policy.version, costs()
            ledger.append(*(components(contract.job, version, tap, paid) for tap in new), *paid)
    return enclosed
