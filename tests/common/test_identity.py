"""Keys, fingerprints and their words, requests and kits."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from consilience.common.errors import IdentityError
from consilience.common.identity import (
    Request,
    key_fingerprint,
    key_line,
    load_key,
    make_key,
    read_certificate,
    read_key_line,
    words,
    write_secret,
)
from helpers.superlink import Authority


def test_a_key_comes_back_and_nobody_else_may_read_it(tmp_path: Path) -> None:
    made = make_key(tmp_path / "site.key")
    assert (tmp_path / "site.key").stat().st_mode & 0o777 == 0o600
    assert load_key(tmp_path / "site.key").private_numbers() == made.private_numbers()
    with pytest.raises(IdentityError, match="exists already"):
        make_key(tmp_path / "site.key")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o777])
def test_a_key_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    make_key(tmp_path / "site.key")
    (tmp_path / "site.key").chmod(mode)
    with pytest.raises(IdentityError, match=f"mode is 0{mode:o}.*chmod 600"):
        load_key(tmp_path / "site.key")


def test_what_is_no_key_of_ours_is_refused(tmp_path: Path) -> None:
    write_secret(tmp_path / "rubbish", b"rubbish")
    other = ed25519.Ed25519PrivateKey.generate()
    formats = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    write_secret(tmp_path / "other", other.private_bytes(*formats))
    with pytest.raises(IdentityError, match="no private key"):
        load_key(tmp_path / "rubbish")
    with pytest.raises(IdentityError, match="another kind"):
        load_key(tmp_path / "other")
    with pytest.raises(IdentityError, match="does not exist"):
        load_key(tmp_path / "nowhere")


def test_a_public_key_comes_back_and_points_in_other_forms_are_refused(tmp_path: Path) -> None:
    key = make_key(tmp_path / "site.key").public_key()
    line = key_line(key)
    assert read_key_line(line) == key
    kind, text = line.split()
    whole = base64.b64decode(text)
    at = whole.index(b"\x04", -97)  # SEC 1, 2.3.3: 04 before an uncompressed point
    compressed, empty = whole[:at] + b"\2" + whole[at + 1 :], whole[: at - 4] + bytes(4)
    for raw in (compressed, empty):
        with pytest.raises(IdentityError, match="cannot be read"):
            read_key_line(f"{kind} {base64.b64encode(raw).decode()}")


def test_a_certificate_of_an_unknown_version_is_refused() -> None:
    lines = Authority().pem.splitlines()
    raw = bytearray(base64.b64decode("".join(lines[1:-1])))
    at = raw.index(bytes((0xA0, 3, 2, 1, 2)))  # [0] EXPLICIT INTEGER 2: version 3
    raw[at + 4] = 55
    with pytest.raises(IdentityError, match="cannot be read"):
        read_certificate("\n".join((lines[0], base64.b64encode(raw).decode(), lines[-1])))


def test_words_are_the_first_88_bits_of_the_fingerprint() -> None:
    # BIP-39: index 0 is "abandon", 2047 is "zoo", 1 is "ability".
    assert words("00" * 32) == " ".join(["abandon"] * 8)
    assert words("ff" * 32) == " ".join(["zoo"] * 8)
    assert words("0020" + "00" * 30).split()[0:2] == ["ability", "abandon"]
    assert words("ff" * 11 + "00" * 21) == words("ff" * 32)
    assert words("ff" * 10 + "fe" + "00" * 21) != words("ff" * 32)


def test_a_request_comes_back_and_any_change_is_noticed(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    path = tmp_path / "request.json"
    Request.make(key, "hospital-a", "Ada, +41 44 000 00 00").write(path)
    request = Request.read(path)
    assert (request.name, request.fingerprint) == ("hospital-a", key_fingerprint(key.public_key()))
    assert request.words == words(request.fingerprint)
    other = Request.make(ec.generate_private_key(ec.SECP384R1()), "hospital-a", "Eve")
    held = json.loads(path.read_text())
    for field, value in {
        "name": "hospital-b",
        "contact": "Eve",
        "public_key": other.public_key,
        "made": "2020-01-01T00:00:00Z",
        "signature": other.signature,
    }.items():
        path.write_text(json.dumps({**held, field: value}))
        with pytest.raises(IdentityError, match="signature"):
            Request.read(path)
    for field, value in {"name": "../../etc", "contact": "two\nlines", "signature": "x", "more": "1"}.items():
        path.write_text(json.dumps({**held, field: value}))
        with pytest.raises(IdentityError, match=f"is no request: {field}"):
            Request.read(path)
    path.write_text(json.dumps({**held, "public_key": "ssh-ed25519 AAAA"}))
    with pytest.raises(IdentityError, match="public key"):
        Request.read(path)
