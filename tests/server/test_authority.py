"""The server's certificates. The oracle is Python's own TLS (OpenSSL), strict as RFC 5280."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from consilience.common.errors import IdentityError, RunError, ServerError, SettingsError
from consilience.common.files import lock
from consilience.common.identity import Kit
from consilience.server import settings as server_settings
from consilience.server.authority import authority_pem, certificate_names, ensure_authority, renew_if_due
from consilience.server.settings import Home, ServerSettings, split_address

SETTINGS = ServerSettings(address="Learn.Example.org:9092", names=("10.1.2.3", "learn", "2001:db8::1"))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "server")
    ensure_authority(home)
    assert renew_if_due(home, SETTINGS) == "there was none"
    return home


def handshake(home: Home, name: str, ca_pem: str) -> None:
    """Connect over loopback as a site that dials `name` would. Raises `ssl.SSLError`."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(home.server_certificate, home.server_key)
    dialling = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    dialling.load_verify_locations(cadata=ca_pem)
    dialling.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT

    def serve(listener: socket.socket) -> None:
        # a refused client hangs up: that is the client's error to tell
        with contextlib.suppress(OSError), listener.accept()[0] as accepted:
            accepted.settimeout(20)
            with serving.wrap_socket(accepted, server_side=True) as tls:
                tls.sendall(b"!")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=20) as raw,
                dialling.wrap_socket(raw, server_hostname=name) as tls,
            ):
                assert tls.recv(1) == b"!"
        finally:
            thread.join()


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.mark.parametrize(
    "name", ["learn.example.org", "learn", "10.1.2.3", "2001:db8::1", "localhost", "127.0.0.1", "::1"]
)
def test_a_site_can_connect_under_every_name(home: Home, name: str) -> None:
    handshake(home, name, authority_pem(home))


@pytest.mark.parametrize("name", ["example.org", "other.example.org", "10.1.2.4"])
def test_another_name_is_refused(home: Home, name: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"not valid for|mismatch"):
        handshake(home, name, authority_pem(home))


def test_another_authority_of_the_same_name_is_refused(home: Home, tmp_path: Path) -> None:
    other = ensure_authority(Home(tmp_path / "other"))
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        handshake(home, "localhost", other)


def test_an_expired_certificate_is_refused_and_renewed(home: Home) -> None:
    ca_pem = authority_pem(home)
    home.server_certificate.unlink()
    renew_if_due(home, SETTINGS, datetime.now(UTC) - timedelta(days=398))
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(home, "localhost", ca_pem)
    assert "ends on" in str(renew_if_due(home, SETTINGS))
    handshake(home, "localhost", ca_pem)


def test_what_the_certificates_say(home: Home) -> None:
    now = datetime.now(UTC)
    authority, server = certificate(home.ca_certificate), certificate(home.server_certificate)
    found = {extension.oid: extension for extension in authority.extensions}
    basic = found[x509.OID_BASIC_CONSTRAINTS]
    assert (basic.critical, basic.value) == (True, x509.BasicConstraints(ca=True, path_length=0))
    usage = authority.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage_of(usage.value) == {"key_cert_sign", "crl_sign"}
    assert authority.not_valid_before_utc <= now - timedelta(minutes=59)
    assert timedelta(days=3650) < authority.not_valid_after_utc - now < timedelta(days=3660)

    basic_of_server = server.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic_of_server.critical, basic_of_server.value.ca) == (True, False)
    assert usage_of(server.extensions.get_extension_for_class(x509.KeyUsage).value) == {"digital_signature"}
    extended = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(extended) == [ExtendedKeyUsageOID.SERVER_AUTH]
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"learn.example.org", "learn", "localhost"}
    assert set(names.get_values_for_type(x509.IPAddress)) == {
        ipaddress.ip_address(value) for value in ("10.1.2.3", "2001:db8::1", "127.0.0.1", "::1")
    }
    of_authority = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    issuer = server.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert issuer.key_identifier == of_authority.digest
    assert server.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest != of_authority.digest
    assert server.not_valid_before_utc <= now - timedelta(minutes=59)
    assert timedelta(days=396) < server.not_valid_after_utc - now <= timedelta(days=397)
    assert server.public_key() != authority.public_key()


def usage_of(usage: x509.KeyUsage) -> set[str]:
    names = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"]
    return {name for name in [*names, "key_cert_sign", "crl_sign"] if getattr(usage, name)}


def test_nothing_is_done_before_it_is_due(home: Home) -> None:
    before = {path: path.read_bytes() for path in home.folder.glob("*.*")}
    assert renew_if_due(home, SETTINGS) is None
    assert renew_if_due(home, SETTINGS, datetime.now(UTC) + timedelta(days=366)) is None
    assert ensure_authority(home) == authority_pem(home)
    assert {path: path.read_bytes() for path in home.folder.glob("*.*")} == before


def test_renewal_takes_a_new_key_and_keeps_the_authority(home: Home) -> None:
    authority = home.ca_key.read_bytes(), home.ca_certificate.read_bytes()
    first = certificate(home.server_certificate)
    assert renew_if_due(home, SETTINGS, datetime.now(UTC) + timedelta(days=368))
    second = certificate(home.server_certificate)
    assert second.public_key() != first.public_key()
    assert second.serial_number != first.serial_number
    assert (home.ca_key.read_bytes(), home.ca_certificate.read_bytes()) == authority
    assert renew_if_due(home, SETTINGS) is None


def test_other_names_are_a_reason_to_renew(home: Home) -> None:
    wider = SETTINGS.model_copy(update={"names": (*SETTINGS.names, "new.example.org")})
    assert renew_if_due(home, wider) == "the server's names changed"
    handshake(home, "new.example.org", authority_pem(home))
    assert renew_if_due(home, SETTINGS) == "the server's names changed"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(home, "new.example.org", authority_pem(home))


def test_a_pair_that_a_crash_mixed_is_made_anew(home: Home, tmp_path: Path) -> None:
    old = home.server_certificate.read_bytes()
    renew_if_due(home, SETTINGS, datetime.now(UTC) + timedelta(days=368))
    home.server_certificate.write_bytes(old)  # the key was replaced, the certificate not yet
    (home.folder / ".server.key.new").write_bytes(b"half")
    assert "belong together" in str(renew_if_due(home, SETTINGS))
    handshake(home, "localhost", authority_pem(home))
    assert not list(home.folder.glob(".server.key*"))
    home.server_certificate.write_bytes(b"\xff half a certificate")
    assert renew_if_due(home, SETTINGS)
    handshake(home, "localhost", authority_pem(home))
    other = Home(tmp_path / "other")
    ensure_authority(other)
    renew_if_due(other, SETTINGS)
    home.server_certificate.write_bytes(other.server_certificate.read_bytes())
    assert "authority" in str(renew_if_due(home, SETTINGS))
    handshake(home, "localhost", authority_pem(home))


def test_an_authority_that_a_crash_left_without_certificate_gets_one(home: Home) -> None:
    before = authority_pem(home)
    home.ca_certificate.unlink()
    after = ensure_authority(home)
    assert renew_if_due(home, SETTINGS) is None
    handshake(home, "localhost", after)
    handshake(home, "localhost", before)  # even kits with the lost certificate stay good: it is the same key


def test_private_keys_are_their_owners_alone(home: Home) -> None:
    for path in (home.ca_key, home.server_key):
        assert path.stat().st_mode & 0o777 == 0o600
    renew_if_due(home, SETTINGS, datetime.now(UTC) + timedelta(days=368))
    assert home.server_key.stat().st_mode & 0o777 == 0o600
    home.server_key.chmod(0o640)
    with pytest.raises(IdentityError, match=r"server\.key: its mode is 0640.*chmod 600"):
        renew_if_due(home, SETTINGS)
    home.server_key.chmod(0o600)
    home.ca_key.chmod(0o604)
    assert renew_if_due(home, SETTINGS) is None  # the authority's key is not needed
    home.server_certificate.unlink()
    with pytest.raises(IdentityError, match=r"ca\.key: its mode is 0604"):
        renew_if_due(home, SETTINGS)


def test_what_is_missing_or_foreign_is_named(home: Home, tmp_path: Path) -> None:
    other = Home(tmp_path / "other")
    ensure_authority(other)
    ca_key, ca_pem = home.ca_key.read_bytes(), home.ca_certificate.read_bytes()
    home.server_certificate.unlink()
    home.ca_key.write_bytes(other.ca_key.read_bytes())
    with pytest.raises(IdentityError, match=r"ca\.key is not the key of .*ca\.crt"):
        renew_if_due(home, SETTINGS)
    home.ca_key.write_bytes(b"rubbish")
    with pytest.raises(IdentityError, match=r"ca\.key holds no private key"):
        renew_if_due(home, SETTINGS)
    home.ca_key.unlink()
    with pytest.raises(IdentityError, match=r"ca\.key does not exist"):
        renew_if_due(home, SETTINGS)
    home.ca_key.write_bytes(ca_key)
    home.ca_key.chmod(0o600)
    with pytest.raises(IdentityError, match=r"ca\.crt ended on"):
        renew_if_due(home, SETTINGS, datetime.now(UTC) + timedelta(days=3653))
    home.ca_certificate.write_bytes(ca_pem[:200])
    with pytest.raises(IdentityError, match=r"ca\.crt is no certificate"):
        authority_pem(home)
    home.ca_certificate.unlink()
    with pytest.raises(IdentityError, match=r"ca\.crt does not exist"):
        renew_if_due(home, SETTINGS)


def test_a_command_waits_for_another_one(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()

    def other_command() -> None:
        with lock(home.sites):
            held.set()
            threading.Event().wait(0.3)

    thread = threading.Thread(target=other_command)
    thread.start()
    held.wait()
    assert renew_if_due(home, SETTINGS) is None
    thread.join()
    monkeypatch.setattr(server_settings, "LOCK_SECONDS", 0.1)
    with lock(home.sites), pytest.raises(RunError, match="Another process"):
        renew_if_due(home, SETTINGS)


@pytest.mark.parametrize(
    "address",
    ["example.org", "example.org:", "example.org:0", "example.org:65536", "example.org:９", ":9092", "a b:9092",
     "-a.org:9092", "2001:db8::1:9092", "[2001:db8::1]", "[example.org]:1", "0.0.0.0:9092", "[::]:9092", "1.2.3:90",
     "a..b:9092", "http://a:9092", "a:9092\n", "../a:9092", "a_b:9092", "é.org:9092", "[]:1", "a" * 64 + ":1"],
)  # fmt: skip
def test_an_address_that_sites_cannot_dial_is_refused(address: str) -> None:
    with pytest.raises(ValidationError, match="address"):
        ServerSettings(address=address)


def test_settings_are_read_and_refused(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.settings_file.write_text("address: EXAMPLE.org:09092\n")
    assert home.settings() == ServerSettings(address="example.org:9092", listen="0.0.0.0:9092", control_port=9093)
    home.settings_file.write_text("address: example.org:9092\nlisten: 127.0.0.1:9093\n")
    with pytest.raises(SettingsError, match=r"server\.yaml: listen and control_port both name port 9093"):
        home.settings()


def test_the_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONSILIENCE_SERVER_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ServerError, match=r"server is no server's folder.*server init"):
        Home.find(None)
    for name in ("server", "from-variable", "from-option", "here"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "server.yaml").write_text("address: example.org:9092\n")
    assert Home.find(None).folder == Path("server")
    monkeypatch.chdir(tmp_path / "here")
    assert Home.find(None).settings_file.resolve() == tmp_path / "here" / "server.yaml"
    monkeypatch.setenv("CONSILIENCE_SERVER_HOME", str(tmp_path / "from-variable"))
    assert Home.find(None).folder == tmp_path / "from-variable"
    assert Home.find(tmp_path / "from-option").folder == tmp_path / "from-option"
    with pytest.raises(ServerError):
        Home.find(tmp_path)


HOSTS = st.text("aZ09.-[]:é", max_size=12) | st.ip_addresses().map(str) | st.ip_addresses(v=6).map("[{}]".format)


@given(HOSTS, st.integers(-1, 70_000))
def test_any_address_is_refused_or_good_for_a_certificate_and_a_kit(host: str, port: int) -> None:
    try:
        settings = ServerSettings(address=f"{host}:{port}")
    except ValidationError:
        return
    assert ServerSettings(address=settings.address) == settings
    assert certificate_names(settings)[0] == split_address(settings.address)[0]
    kit = Kit(site="a", site_fingerprint="0" * 64, address=settings.address, ca="")
    assert (kit.host, kit.port) == split_address(settings.address)
