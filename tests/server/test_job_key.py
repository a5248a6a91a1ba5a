"""A job's key is believed when the authority in the site's kit signed it for this job, and never otherwise."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from consilience.common.errors import IdentityError, ProtocolError
from consilience.common.job_key import CLOCK_SKEW, LIFE
from consilience.common.sealing import Secret
from consilience.server.authority import authority_pem, ensure_authority, make_job_key
from consilience.server.settings import Home
from consilience.server.trust import Unsealing


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    held = Home(tmp_path_factory.mktemp("server"))
    ensure_authority(held)
    return held


def test_the_coordinator_s_key_is_believed(home: Home) -> None:
    key = make_job_key(home, "clothes", Secret().public)
    key.check("clothes", authority_pem(home))


def test_a_key_of_another_job_authority_or_owner_is_not(home: Home, tmp_path: Path) -> None:
    key, pem = make_job_key(home, "clothes", Secret().public), authority_pem(home)
    other = Home(tmp_path / "other")
    ensure_authority(other)
    with pytest.raises(ProtocolError, match="another job"):
        key.check("shoes", pem)
    forged = [
        make_job_key(other, "clothes", key.key),
        key.model_copy(update={"key": Secret().public}),
        key.model_copy(update={"not_after": key.not_after + 1}),
        make_job_key(home, "shoes", key.key).model_copy(update={"job": "clothes"}),
        key.model_copy(update={"signature": key.signature[:-2]}),
        key.model_copy(update={"signature": "0"}),
    ]
    for each in forged:
        with pytest.raises(ProtocolError, match="not signed by the authority in the kit"):
            each.check("clothes", pem)


def test_a_key_ends_and_clocks_may_differ_a_little(home: Home) -> None:
    made = datetime(2026, 1, 1, tzinfo=UTC)
    key, pem = make_job_key(home, "clothes", Secret().public, made), authority_pem(home)
    end = made + LIFE
    for now in (made - timedelta(days=1), made, end, end + CLOCK_SKEW):  # a site's clock may be behind, too
        key.check("clothes", pem, now)
    for now in (end + CLOCK_SKEW + timedelta(seconds=1), end + timedelta(days=365)):
        with pytest.raises(ProtocolError, match="has ended by this machine's clock"):
            key.check("clothes", pem, now)
    with pytest.raises(ProtocolError, match="has ended"):
        make_job_key(home, "clothes", Secret().public, datetime.now(UTC) - timedelta(days=3)).check("clothes", pem)


def test_a_run_gives_out_a_new_key_in_time_and_can_open_what_was_sealed_for_the_old(home: Home) -> None:
    unsealing, now = Unsealing(home, "clothes"), datetime.now(UTC)
    first = unsealing.key()
    assert unsealing.key(now + LIFE / 2 - timedelta(minutes=1)) == first
    second = unsealing.key(now + LIFE / 2 + timedelta(minutes=1))
    assert second != first
    assert second.left(now + LIFE / 2) >= LIFE
    assert unsealing.key(now + LIFE / 2 + timedelta(minutes=2)) == second
    third = unsealing.key(now - timedelta(days=30))  # the clock was put back
    assert third.left(now - timedelta(days=30)) <= LIFE
    for key in (first, second, third):
        assert unsealing.secret_of(key).public == key.key


def test_a_kit_of_another_kind_is_no_reason_to_believe(home: Home) -> None:
    key = make_job_key(home, "clothes", Secret().public)
    with pytest.raises(ProtocolError, match="not signed"):
        key.check("clothes", "no certificate")
    private, name = rsa.generate_private_key(65537, 2048), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(private.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    pem = builder.sign(private, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    with pytest.raises(ProtocolError, match="another kind"):
        key.check("clothes", pem)


def test_an_authority_whose_key_was_mixed_up_signs_nothing(home: Home, tmp_path: Path) -> None:
    mixed, other = Home(tmp_path / "mixed"), Home(tmp_path / "other")
    ensure_authority(mixed)
    ensure_authority(other)
    mixed.ca_key.write_bytes(other.ca_key.read_bytes())
    with pytest.raises(IdentityError, match="is not the key of"):
        make_job_key(mixed, "clothes", Secret().public)
