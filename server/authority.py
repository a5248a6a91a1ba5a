"""The server's certificate authority, the one certificate that it signs, and the keys of jobs.

Lives here: making them, and renewing the server's under the same authority, so that sites' kits stay good. Does not
live here: sites' keys (admission) and TLS connections. Private keys stay in the server's folder, mode 0600.

The server's key and certificate are two files, and a crash can come between them. So a pair is checked before it is
used, and one that does not belong together is made anew, which costs nothing: sites know the authority alone.
"""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from consilience.common.errors import ConsilienceError, IdentityError
from consilience.common.files import storage_error, sync_folder, write_bytes
from consilience.common.identity import PrivateKey, read_certificate, read_secret, write_secret
from consilience.common.job_key import CLOCK_SKEW, LIFE, JobKey
from consilience.server.settings import Home, ServerSettings, split_address

CA_LIFE = timedelta(days=3652)
SERVER_LIFE = timedelta(days=397)
RENEW_BEFORE = timedelta(days=30)


def ensure_authority(home: Home) -> str:
    """Return the authority's certificate (PEM), making key and certificate where there are none.

    A key without certificate (a crash came between) gets one. Raises `IdentityError`, `StorageError`.
    """
    with home.locked():
        if not home.ca_certificate.exists():
            key = _load_key(home.ca_key) if home.ca_key.exists() else _make_key(home.ca_key)
            write_bytes(home.ca_certificate, _authority_certificate(key))
    return authority_pem(home)


def authority_pem(home: Home) -> str:
    """Return the authority's certificate (PEM): what a site's kit holds. Raises `IdentityError`, `StorageError`."""
    pem = _read(home.ca_certificate)
    _certificate(pem, home.ca_certificate, "Restore it from a copy; without it every site needs a new kit")
    return pem


def certificate_names(settings: ServerSettings) -> tuple[str, ...]:
    """Return the DNS names and IP addresses that the server's certificate must be for, each once."""
    host = split_address(settings.address)[0]
    return tuple(dict.fromkeys([host, *settings.names, "localhost", "127.0.0.1", "::1"]))


def renewal_reason(home: Home, settings: ServerSettings, now: datetime | None = None) -> str | None:
    """Return why the server's certificate must be made (anew), or None while it is good.

    Raises `IdentityError` when a private key is open to other users, `StorageError`.
    """
    if not (home.server_key.exists() and home.server_certificate.exists()):
        return "there was none"
    secret = read_secret(home.server_key)
    try:
        held = read_certificate(_read(home.server_certificate))
        key = _parse_key(secret, home.server_key)
        held.verify_directly_issued_by(read_certificate(authority_pem(home)))
        names = held.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (InvalidSignature, ValueError, TypeError, x509.ExtensionNotFound):
        return "the old one was not the authority's"
    except IdentityError:
        if not home.ca_certificate.exists():
            raise
        return "the old one could not be read"
    if held.public_key() != key.public_key():
        return "key and certificate did not belong together"
    if set(names) != set(_general_names(settings)):
        return "the server's names changed"
    if held.not_valid_after_utc - (now or datetime.now(UTC)) < RENEW_BEFORE:
        return f"the old one ends on {held.not_valid_after_utc:%Y-%m-%d}"
    return None


def certificate_end(home: Home) -> datetime | None:
    """Return when the server's certificate ends, None when there is none that can be read."""
    try:
        return read_certificate(_read(home.server_certificate)).not_valid_after_utc
    except ConsilienceError:
        return None


def renew_if_due(home: Home, settings: ServerSettings, now: datetime | None = None) -> str | None:
    """Make the server's key and certificate (anew) when they are missing, end within 30 days, or the names changed.

    Returns the reason, or None when nothing was done. The authority, and so every kit, stays as it is. A running
    SuperLink shows the new certificate after its next start. Raises `IdentityError`, `StorageError`, `RunError`.
    """
    with home.locked():
        reason = renewal_reason(home, settings, now)
        if reason is not None:
            _issue(home, settings, now or datetime.now(UTC))
    return reason


def make_job_key(home: Home, job: str, public: str, now: datetime | None = None) -> JobKey:
    """Sign a job's public key (hex), so that sites know it by their kits. Raises `IdentityError`, `StorageError`."""
    _, key = _authority(home)
    not_after = int(((now or datetime.now(UTC)) + LIFE).timestamp())
    signature = key.sign(JobKey.signed(job, public, not_after), ec.ECDSA(hashes.SHA256())).hex()
    return JobKey(job=job, key=public, not_after=not_after, signature=signature)


def _authority(home: Home) -> tuple[x509.Certificate, PrivateKey]:
    """Return certificate and key of the authority. Raises `IdentityError` when they do not belong together."""
    authority = _certificate(authority_pem(home), home.ca_certificate, "")
    ca_key = _load_key(home.ca_key)
    if ca_key.public_key() != authority.public_key():
        raise IdentityError(
            f"{home.ca_key} is not the key of {home.ca_certificate}", hint="Restore both from the same copy"
        )
    return authority, ca_key


def _issue(home: Home, settings: ServerSettings, now: datetime) -> None:
    authority, ca_key = _authority(home)
    end = min(now + SERVER_LIFE, authority.not_valid_after_utc)
    if end <= now:
        raise IdentityError(
            f"{home.ca_certificate} ended on {end:%Y-%m-%d}",
            hint="Make a new folder with `consilience server init`; every site needs a new kit",
        )
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(_subject("Consilience server"), authority.subject, key, now, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(_general_names(settings)), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            ),
            critical=False,
        )
        .sign(ca_key, hashes.SHA256())
    )
    new_key = home.server_key.with_name(".server.key.new")
    try:
        new_key.unlink(missing_ok=True)  # a crash left it; nobody else is at work here
        write_secret(new_key, _key_pem(key))
        new_key.replace(home.server_key)
        sync_folder(home.folder)
    except OSError as error:
        raise storage_error(error, home.server_key, "write") from error
    write_bytes(home.server_certificate, certificate.public_bytes(serialization.Encoding.PEM))


def _authority_certificate(key: PrivateKey) -> bytes:
    now = datetime.now(UTC)
    name = _subject("Consilience certificate authority")
    certificate = (
        _builder(name, name, key, now, now + CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: PrivateKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)  # for sites whose clocks are behind
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _subject(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Consilience"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_names(settings: ServerSettings) -> list[x509.GeneralName]:
    return [_general_name(name) for name in certificate_names(settings)]


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _make_key(path: Path) -> PrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    write_secret(path, _key_pem(key))
    return key


def _key_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _load_key(path: Path) -> PrivateKey:
    return _parse_key(read_secret(path), path)


def _parse_key(data: bytes, path: Path) -> PrivateKey:
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"{path} holds no private key without password", hint="Restore it from a copy") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{path} holds a key of another kind than EC", hint="Restore it from a copy")
    return key


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except FileNotFoundError as error:
        raise IdentityError(
            f"{path} does not exist", hint="Restore it from a copy, or make the folder with `consilience server init`"
        ) from error
    except UnicodeDecodeError as error:
        raise IdentityError(f"{path} is no certificate", hint="Restore it from a copy") from error
    except OSError as error:
        raise storage_error(error, path, "read") from error


def _certificate(pem: str, path: Path, hint: str) -> x509.Certificate:
    try:
        return read_certificate(pem)
    except IdentityError as error:
        raise IdentityError(f"{path} is no certificate", hint=hint) from error
