"""Sites' principal components in the run's folder, RUN/components/SITE/TAP.bin: kept as they came with an agreement.

Lives here: which of them a run lacks, taking those that come, and reading them back. Does not live here: how they
travel (common/components), what they are for (server/student/site_taps).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from consilience.common.cards import SiteCard, TapCard
from consilience.common.components import opened
from consilience.common.encoding.features import unpack_basis
from consilience.common.errors import ProtocolError, StorageError
from consilience.common.files import sha256, storage_error, write_bytes
from consilience.common.protocol import Agreement, Contract
from consilience.common.records import FINGERPRINT_SHOWN
from consilience.common.settings import JobSettings
from consilience.common.taps_asked import components_asked
from consilience.server.trust import Unsealing, signer_of


def components_path(run: Path, site: str, tap: TapCard) -> Path:
    """Return where a tap's components lie, or will."""
    return run / "components" / site / f"{tap.fingerprint[:FINGERPRINT_SHOWN]}.bin"


@dataclass(frozen=True)
class Taking:
    """Takes what comes with agreements to `contracts`, of the sites of `cards`, both by node, into the folder `run`."""

    run: Path
    contracts: Mapping[int, Contract]
    cards: Mapping[int, SiteCard]
    unsealing: Unsealing | None

    def __call__(self, node: int, agreement: Agreement) -> None:
        """Keep the principal components that a node sent. Raises `ProtocolError` where they are not what it was asked
        for, `StorageError`."""
        contract, card = self.contracts[node], self.cards[node]
        taps = () if card.features is None else card.features.taps
        key = contract.job_key
        secret = None if self.unsealing is None or key is None else self.unsealing.secret_of(key)
        found = opened(agreement.enclosed, contract, card.name, taps, signer_of(card), secret)
        for tap in taps:
            if tap.name in found:
                write_bytes(components_path(self.run, card.name, tap), found[tap.name])


def read_components(path: Path, tap: TapCard) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a tap's (k, C) directions and (C,) means, float32.

    Raises `StorageError` where they are lost or damaged.
    """
    assert tap.components is not None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise storage_error(error, path, "read") from error
    try:
        if sha256(data) == tap.components.digest:
            return unpack_basis(data, tap.components.number, tap.channels)
    except ProtocolError:  # a contract.json that somebody changed
        pass
    raise StorageError(f"{path} is damaged", hint="Delete it and run the same command again: the site is asked anew")


def lacking_components(run: Path, job: JobSettings, card: SiteCard) -> tuple[str, ...]:
    """Return the taps of a site whose components the job needs and the run's folder does not hold, or holds damaged.

    Raises as `components_asked`.
    """
    return tuple(tap.name for tap in components_asked(job, card) if not _held(run, card.name, tap))


def _held(run: Path, site: str, tap: TapCard) -> bool:
    try:
        read_components(components_path(run, site, tap), tap)
    except StorageError:
        return False
    return True
