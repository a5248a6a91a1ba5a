"""Noise that is the same whenever the same image is asked about, and unknown to everybody but the site.

Lives here: the site's secret, and what is drawn from it. Does not live here: what noise is added to (votes, outputs).

Noise is a function of the secret, of a purpose and of an image's bytes. The purpose names the mechanism with its
parameters and the teacher's fingerprint: were two of them to share noise, the difference of their answers would be
free of it. The image stands for itself: asked again, in another question, another pool or after a restart, it gets the
same noise, so that averaging repeated answers gains nothing, and equal images of one pool have equal answers, as if
the first had been remembered. No place in the pool enters, since the same image at two places would then be answered
twice with independent noise.

What a training draws follows from the secret and a purpose alone, in a row (`Stream`).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from scipy.special import ndtri

from consilience.common.errors import IdentityError
from consilience.common.files import canonical_json, make_private, storage_error, sync_folder
from consilience.common.identity import read_secret, write_secret
from consilience.common.preprocessing import Images
from consilience.common.settings import SiteSettings

BYTES = 32
GRID = 2.0**-24
"""What noisy values are rounded to: the last bits of a float would tell noise from what it was added to (Mironov,
CCS 2012)."""
_ZEROS = bytes(2**20)
"""What a stream encrypts at a time."""


class Stream:
    """Uniform words, one after the other, that nobody can tell from random ones without the `key` of 32 bytes.

    AES-256 in counter mode. A generator of torch or NumPy would not do: torch's keeps 32 bits of a seed on a CPU, so
    that all that it can ever draw could be tried out.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return the next (count,) words of 64 bits."""
        whole, rest = divmod(8 * count, len(_ZEROS))
        drawn = [self._cipher.update(_ZEROS) for _ in range(whole)] + [self._cipher.update(_ZEROS[:rest])]
        return np.frombuffer(b"".join(drawn), "<u8").astype(np.uint64, copy=False)


@dataclass(frozen=True)
class Secret:
    """A site's secret for noise; `key` is `BYTES` random bytes."""

    key: bytes = field(repr=False)

    def digest(self, purpose: Any) -> str:
        """Return 64 hexadecimal digits that stand for `purpose` (JSON values), and tell nobody else of it."""
        return hmac.digest(self.key, b"digest\0" + canonical_json(purpose), "sha256").hex()

    def stream(self, purpose: Any) -> Stream:
        """Return the stream of words for `purpose` (JSON values), from its beginning; its key has 256 bits."""
        return Stream(hmac.digest(self.key, b"stream\0" + canonical_json(purpose), "sha256"))

    def normal(self, purpose: Any, images: Images, count: int) -> NDArray[np.float64]:
        """Return (n, count) float64 standard normal numbers for `purpose` (JSON values) and n images of any shape.

        A row depends on the bytes and the shape of its image alone.
        """
        words = self._words(b"normal\0", purpose, images, count)
        # 53 bits, and half a step away from 0 and 1, where the quantile is infinite.
        uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        normal: NDArray[np.float64] = ndtri(uniform)
        return normal

    def words(self, purpose: Any, images: Images, count: int) -> NDArray[np.uint64]:
        """Return (n, count) uniform words of 64 bits for `purpose` and n images, as `normal` does numbers."""
        return self._words(b"words\0", purpose, images, count)

    def _words(self, kind: bytes, purpose: Any, images: Images, count: int) -> NDArray[np.uint64]:
        drawn = hmac.digest(self.key, kind + canonical_json([purpose, list(images.shape[1:])]), "sha256")
        stream = bytearray()
        for image in images:
            content = hashlib.sha256(np.ascontiguousarray(image).data).digest()
            stream += hashlib.shake_256(drawn + content).digest(8 * count)
        return np.frombuffer(stream, "<u8").astype(np.uint64, copy=False).reshape(len(images), count)


def on_grid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return noisy `values` rounded to `GRID`."""
    rounded: NDArray[np.float64] = np.round(values / GRID) * GRID
    return rounded


def load_secret(settings: SiteSettings) -> Secret:
    """Return the secret in state/privacy/noise.key, which is made where there is none.

    Raises `IdentityError` when others on the machine may read it or it is damaged, `StorageError`.
    """
    path = settings.state / "privacy" / "noise.key"
    if not path.exists():
        make_private(settings.state)
        _make(path)
    key = read_secret(path)
    if len(key) != BYTES:
        raise IdentityError(
            f"{path} holds {len(key)} bytes; a secret for noise has {BYTES}",
            hint="Restore it from a copy. With a new one every answer is paid for again: remove the file to make one",
        )
    return Secret(key)


def _make(path: Path) -> None:
    """Put a new secret at `path`, whole, unless somebody else was first."""
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        write_secret(part, os.urandom(BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path, "write") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
