"""Keys, fingerprints and their words, and the two files of admission: the site's request and the server's kit.

Lives here: what both sides must agree on to recognise each other. Does not live here: certificates of the server
(server/authority), who is admitted (server/admission), and connections. Private keys are made where they live and
leave no function here but to the one that opens the file.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from mnemonic import Mnemonic
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consilience.common.errors import IdentityError
from consilience.common.files import canonical_json, make_folder, storage_error, sync_folder, write_bytes
from consilience.common.settings import NAME_PATTERN

WORDS = 8
"""Words of a fingerprint that people compare: 11 bits each."""
MOST_BYTES = 65_536
"""Requests and kits come from strangers: a longer file is not read."""

Line = Annotated[str, Field(max_length=200, pattern=r"^\P{C}*$")]
"""One line of printable characters: a stranger's text is shown on terminals."""
PublicKey = ec.EllipticCurvePublicKey
PrivateKey = ec.EllipticCurvePrivateKey


def words(fingerprint: str) -> str:
    """Return a SHA-256 fingerprint (hex) as the first `WORDS` words of it, for people to compare by telephone.

    The list is BIP-39's English one, whose words differ in their first four letters.
    """
    bits = bin(int(fingerprint, 16))[2:].zfill(len(fingerprint) * 4)
    return " ".join(_word_list()[int(bits[11 * i : 11 * i + 11], 2)] for i in range(WORDS))


def unknown_words(given: Iterable[str]) -> list[str]:
    """Return those of `given` that stand in no fingerprint's words."""
    return [word for word in given if word not in _word_list()]


@cache
def _word_list() -> list[str]:
    return list(Mnemonic("english").wordlist)


def write_secret(path: Path, data: bytes) -> None:
    """Create `path` with mode 0600, durably. Raises `IdentityError` when it exists, `StorageError`."""
    try:
        make_folder(path.parent)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)
    except FileExistsError as error:
        raise IdentityError(
            f"{path} exists already", hint="Keep it: whoever knows the old key would no longer know you"
        ) from error
    except OSError as error:
        raise storage_error(error, path, "write") from error


def read_secret(path: Path) -> bytes:
    """Return the bytes of a file that only its owner may read.

    Raises `IdentityError` when it is missing or other users may read or write it, `StorageError`.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise IdentityError(
                    f"{path}: its mode is {mode:04o}, so that others on this machine may use it; allowed is 0600",
                    hint=f"Type: chmod 600 {path}",
                )
            return file.read(MOST_BYTES)
    except FileNotFoundError as error:
        raise IdentityError(f"{path} does not exist", hint="Make it with `init`, or name the right file") from error
    except OSError as error:
        raise storage_error(error, path, "read") from error


def make_key(path: Path) -> PrivateKey:
    """Make an EC key (P-384) in OpenSSH's format at `path`, mode 0600. Raises `IdentityError`, `StorageError`."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_secret(
        path,
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        ),
    )
    return key


def load_key(path: Path) -> PrivateKey:
    """Read a key that `make_key` made. Raises `IdentityError`, `StorageError`."""
    data = read_secret(path)
    try:
        key = serialization.load_ssh_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityError(
            f"{path} holds no private key without password in OpenSSH's format", hint="Make one with `site init`"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{path} holds a key of another kind than EC", hint="Make one with `site init`")
    return key


def key_line(key: PublicKey) -> str:
    """Return a public key as OpenSSH writes it: one line."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def read_key_line(line: str) -> PublicKey:
    """Read `key_line`'s line back. Raises `IdentityError`."""
    try:
        key = serialization.load_ssh_public_key(line.encode())
    # Not implemented is a point in compressed form, and an empty one is looked into.
    except (ValueError, UnsupportedAlgorithm, NotImplementedError, IndexError) as error:
        raise IdentityError("A public key cannot be read", hint="Let the site make its request anew") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise IdentityError("A public key is of another kind than EC P-384", hint="Let the site make its request anew")
    return key


def key_fingerprint(key: PublicKey) -> str:
    """Return SHA-256 (hex) of the key's SubjectPublicKeyInfo."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def sign(key: PrivateKey, data: bytes) -> bytes:
    """Return the signature (ECDSA with SHA-384, DER) over `data`, which begins with what it is for."""
    return key.sign(data, ec.ECDSA(hashes.SHA384()))


def verify(key: PublicKey, signature: bytes, data: bytes) -> bool:
    """Whether the owner of `key` signed `data`."""
    try:
        key.verify(signature, data, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def certificate_fingerprint(pem: str) -> str:
    """Return SHA-256 (hex) of a certificate's DER form. Raises `IdentityError`."""
    return read_certificate(pem).fingerprint(hashes.SHA256()).hex()


def read_certificate(pem: str) -> x509.Certificate:
    """Read one PEM certificate, whose key can be read too. Raises `IdentityError`."""
    try:
        found = x509.load_pem_x509_certificate(pem.encode())
        found.public_key()
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise IdentityError("A certificate cannot be read", hint="Ask the coordinator for a new kit") from error
    return found


class _Paper(BaseModel):
    """A small JSON file that one side sends to the other by whatever way they have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file. Raises `IdentityError`, `StorageError`."""
        try:
            with path.open("rb") as file:
                data = file.read(MOST_BYTES)
        except FileNotFoundError as error:
            raise IdentityError(f"{path} does not exist", hint="Name the file that the other side sent") from error
        except OSError as error:
            raise storage_error(error, path, "read") from error
        try:
            paper = cls.model_validate_json(data)
            paper.check()
        except ValidationError as error:
            field = ".".join(str(part) for part in error.errors()[0]["loc"])[:80] or "the file"
            shown = "".join(letter if letter.isprintable() else "?" for letter in field)  # a stranger may have named it
            raise IdentityError(
                f"{path} is no {cls.__name__.lower()}: {shown} is not as it must be", hint="Ask for it anew"
            ) from None
        except IdentityError as error:
            raise IdentityError(f"{path}: {error.message}", hint=error.hint) from error
        return paper

    def write(self, path: Path) -> None:
        """Write the file atomically. Raises `StorageError`."""
        write_bytes(path, self.model_dump_json(indent=2).encode() + b"\n")

    def check(self) -> None:
        """Raise `IdentityError` when the parts do not belong together."""


class Request(_Paper):
    """What a site sends to be admitted: who it is and its public key, signed with the private one."""

    consilience_request: Literal[1] = 1
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    contact: Line
    """Whom to call to compare the words."""
    public_key: Annotated[str, Field(max_length=1000)]
    made: datetime
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{2,400}$")]

    @classmethod
    def make(cls, key: PrivateKey, name: str, contact: str) -> Request:
        """Fill in and sign a request."""
        draft = cls(
            name=name,
            contact=contact,
            public_key=key_line(key.public_key()),
            made=datetime.now(UTC).replace(microsecond=0),
            signature="00",
        )
        return draft.model_copy(update={"signature": sign(key, draft._signed()).hex()})

    def _signed(self) -> bytes:
        return b"consilience request\n" + canonical_json(self.model_dump(mode="json", exclude={"signature"}))

    def check(self) -> None:
        """Raise `IdentityError` when the signature is not the key's."""
        try:
            signed = verify(self.key, bytes.fromhex(self.signature), self._signed())
        except ValueError:
            signed = False
        if not signed:
            raise IdentityError(
                "the request's signature is not that of its key", hint="Let the site make its request anew"
            )

    @property
    def key(self) -> PublicKey:
        """The site's public key."""
        return read_key_line(self.public_key)

    @property
    def fingerprint(self) -> str:
        """The key's fingerprint."""
        return key_fingerprint(self.key)

    @property
    def words(self) -> str:
        """What both sides compare before the request is approved."""
        return words(self.fingerprint)


class Kit(_Paper):
    """What an admitted site gets back. It holds no secret: what matters is that it is the right one, so compare."""

    consilience_kit: Literal[1] = 1
    site: Annotated[str, Field(pattern=NAME_PATTERN)]
    site_fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Fingerprint of the site's key that was approved."""
    address: Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$", max_length=260)]
    """host:port that the site connects to."""
    ca: Annotated[str, Field(max_length=10_000)]
    """The certificate authority's certificate, PEM."""

    def check(self) -> None:
        """Raise `IdentityError` when the certificate cannot be read."""
        read_certificate(self.ca)

    @property
    def host(self) -> str:
        """The server's name or IP address, without brackets."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The server's TCP port."""
        return int(self.address.rpartition(":")[2])

    @property
    def words(self) -> str:
        """What both sides compare before the first connection: the authority's fingerprint."""
        return words(certificate_fingerprint(self.ca))
