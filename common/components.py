"""Principal components of taps as they come with a site's agreement: signed, sealed where the job is, in base64.

Behind base64 and seal stand the length of the signature (2 bytes), the signature, and the components of each tap that
the contract names, in its order (`encoding.pack_basis`). Does not live here: whether they may leave (client/site),
where the server keeps them (server/components), what card and contract say (common/cards, common/protocol).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

from consilience.common.cards import ComponentsCard, TapCard
from consilience.common.encoding.features import unpack_basis
from consilience.common.errors import ProtocolError
from consilience.common.files import canonical_json, sha256
from consilience.common.protocol import MOST_VOUCH_BYTES, Contract, Enclosed
from consilience.common.sealing import Secret, seal
from consilience.common.vouching import KnownSigner, Signer

_LENGTH_BYTES = 2


def enclose(contract: Contract, site: str, held: Sequence[tuple[TapCard, bytes]], signer: Signer | None) -> Enclosed:
    """Return what goes with `site`'s agreement to `contract`: the components of the taps that it names, in its order.

    Raises `ProtocolError` when the contract's job key is none.
    """
    data = b"".join(part for _, part in held)
    vouch = b"" if signer is None else signer.vouch_components(contract, [_claim(tap) for tap, _ in held])
    packed = len(vouch).to_bytes(_LENGTH_BYTES, "big") + vouch + data
    if contract.job_key is not None:
        packed = seal(contract.job_key.key, components_info(contract, site), packed)
    return Enclosed(taps=contract.components, data=base64.b64encode(packed).decode("ascii"))


def opened(
    enclosed: Enclosed | None,
    contract: Contract,
    site: str,
    taps: Sequence[TapCard],
    signer: KnownSigner | None,
    secret: Secret | None,
) -> dict[str, bytes]:
    """Return tap -> its components, those that `contract` asked `site` for; none where it asked for none.

    `taps` are the site's, by its card; `signer`: who must have signed; `secret`: of the contract's job key. Raises
    `ProtocolError` for anything that was not asked for, is missing, not sealed or signed, or not what the card tells.
    """
    sent = () if enclosed is None else enclosed.taps
    if sent != contract.components:
        raise ProtocolError(
            f"It sent principal components of: {', '.join(sent) or 'none'}; asked for were: "
            f"{', '.join(contract.components) or 'none'}"
        )
    if enclosed is None:
        return {}
    wanted = _wanted(contract, taps)
    packed = _unsealed(enclosed.data, contract, site, secret)
    start = _LENGTH_BYTES + int.from_bytes(packed[:_LENGTH_BYTES], "big")
    vouch, data = packed[_LENGTH_BYTES:start], memoryview(packed)[start:]
    size = sum(told.bytes for _, told in wanted)
    if len(packed) < start or len(vouch) > MOST_VOUCH_BYTES or len(data) != size:
        raise ProtocolError(f"Its principal components are {len(data):,} bytes; its card tells of {size:,}")
    if signer is not None:
        signer.check_components(contract, [_claim(tap) for tap, _ in wanted], vouch)
    found, at = {}, 0
    for tap, told in wanted:
        part = bytes(data[at : at + told.bytes])
        at += told.bytes
        if sha256(part) != told.digest:
            raise ProtocolError(
                f"The principal components of its tap {tap.name} are not those whose digest its card tells"
            )
        unpack_basis(part, told.number, tap.channels)
        found[tap.name] = part
    return found


def _wanted(contract: Contract, taps: Sequence[TapCard]) -> list[tuple[TapCard, ComponentsCard]]:
    known = {tap.name: (tap, tap.components) for tap in taps if tap.components is not None}
    return [known[name] for name in contract.components]


def _unsealed(text: str, contract: Contract, site: str, secret: Secret | None) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ProtocolError("Its principal components are no base64") from None
    if contract.job_key is None or secret is None:
        return raw
    try:
        return secret.unseal(components_info(contract, site), raw)
    except ProtocolError:
        raise ProtocolError(
            "Its principal components are not sealed for this contract, this site and the job's key"
        ) from None


def _claim(tap: TapCard) -> tuple[str, str, str]:
    """What a site signs of a tap: its name, its fingerprint, and the digest of its components."""
    assert tap.components is not None
    return tap.name, tap.fingerprint, tap.components.digest


def components_info(contract: Contract, site: str) -> bytes:
    """What sealed components are bound to: the site, and all of the contract that they answer."""
    return b"consilience sealed components\n" + canonical_json([site, contract.model_dump(mode="json")])
