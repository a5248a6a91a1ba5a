"""The public unlabelled pool: shards of raw pixels, a manifest, and one digest that pins every byte.

A pool is a folder: `manifest.json` names format, image shape, size and, for each shard, its file, its number of
samples and the SHA-256 of its bytes. A shard is the samples' uint8 pixels, (count, H, W, C), nothing else. The
digest is the SHA-256 of the manifest's canonical JSON without file names, so that equal pixels in equal order and
equal shards give equal digests anywhere. Labels never live here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from consilience.common.bounded import bounded
from consilience.common.data import ImageData
from consilience.common.errors import PoolError, ProtocolError
from consilience.common.files import (
    Resident,
    canonical_json,
    read_bytes,
    sha256,
    sha256_file,
    storage_error,
    write_bytes,
    write_json,
)
from consilience.common.preprocessing import Images

SHARD_BYTES = 16 * 2**20
"""Most bytes of a shard: small enough to send again, large enough that a million samples are few files."""
MOST_MANIFEST = 32 * 2**20
"""Bytes of a manifest, which may come from anybody: of 100,000 shards, as many as there are names for, it has 20 MB."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Shard(_Strict):
    """One file of the pool."""

    file: str = Field(pattern=r"^shard-\d{5}\.bin$")
    count: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(_Strict):
    """What manifest.json holds."""

    format: Literal[1]
    shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1, le=3)]]
    size: int = Field(ge=0)
    shards: Annotated[tuple[Shard, ...], FailFast()]  # a list of mistakes takes far more than the file

    @property
    def digest(self) -> str:
        """SHA-256 over shape, size and the shards' digests, in hexadecimal."""
        content = {
            "format": self.format,
            "shape": self.shape,
            "size": self.size,
            "shards": [{"count": shard.count, "sha256": shard.sha256} for shard in self.shards],
        }
        return sha256(canonical_json(content))


@dataclass(frozen=True)
class Pool:
    """A pool on this disk, read by memory map."""

    folder: Path
    manifest: Manifest

    @classmethod
    def build(cls, data: ImageData, folder: Path, *, on_progress: Callable[[int], None] | None = None) -> Pool:
        """Write the images of `data`, in order and without labels, as a pool; one shard in memory at a time.

        What is there already and intact is kept, so building again mends a damaged pool. Raises `PoolError` when the
        folder holds another pool, `DataError`, `StorageError`.
        """
        per_shard = max(1, SHARD_BYTES // int(np.prod(data.shape)))
        shards: list[Shard] = []
        earlier = _read_manifest(folder) if (folder / "manifest.json").exists() else None
        for start in range(0, len(data), per_shard):
            ids = np.arange(start, min(start + per_shard, len(data)))
            pixels = np.ascontiguousarray(data.read(ids)).tobytes()
            shard = Shard(file=f"shard-{len(shards):05d}.bin", count=len(ids), sha256=sha256(pixels))
            if earlier is not None and shard not in earlier.shards:
                raise PoolError(
                    f"{folder} already holds another pool (digest {earlier.digest[:16]})", hint="Name another folder"
                )
            shards.append(shard)
            path = folder / shard.file
            if not path.exists() or sha256_file(path) != shard.sha256:
                write_bytes(path, pixels)
            if on_progress:
                on_progress(len(ids))
        manifest = Manifest(format=1, shape=data.shape, size=len(data), shards=tuple(shards))
        if earlier is not None and earlier.digest != manifest.digest:
            raise PoolError(
                f"{folder} already holds another pool (digest {earlier.digest[:16]}, new {manifest.digest[:16]})",
                hint="Name another folder",
            )
        write_json(folder / "manifest.json", manifest.model_dump(mode="json"))
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> Pool:
        """Open a pool; checks the manifest and the shards' sizes, not yet their bytes. Raises `PoolError`."""
        path = folder / "manifest.json"
        manifest = _read_manifest(folder)
        pool = cls(folder, manifest)
        if sum(shard.count for shard in manifest.shards) != manifest.size:
            raise PoolError(f"{path}: size {manifest.size} is not the sum of the shards", hint="Build the pool anew")
        for shard in manifest.shards:
            file, expected = folder / shard.file, shard.count * pool.sample_bytes
            actual = file.stat().st_size if file.exists() else None
            if actual != expected:
                held = "is missing" if actual is None else f"has {actual:,} bytes, not {expected:,}"
                raise PoolError(f"{file} {held}", hint="Copy that shard again, or build the pool anew")
        return pool

    def __len__(self) -> int:
        return self.manifest.size

    @property
    def digest(self) -> str:
        """What questions and answers name the pool by."""
        return self.manifest.digest

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every sample."""
        return self.manifest.shape

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample."""
        return int(np.prod(self.shape))

    def verify(self, *, on_progress: Callable[[int], None] | None = None) -> None:
        """Hash every shard. Raises `PoolError` naming the first one whose bytes are not the manifest's."""
        for shard in self.manifest.shards:
            if sha256_file(self.folder / shard.file) != shard.sha256:
                raise PoolError(
                    f"{self.folder / shard.file}: bytes differ from the manifest",
                    hint="Copy that shard again, or build the pool anew",
                )
            if on_progress:
                on_progress(shard.count)

    @cached_property
    def _maps(self) -> tuple[NDArray[np.uint8], ...]:
        return tuple(
            np.memmap(self.folder / shard.file, np.uint8, "r", shape=(shard.count, *self.shape))
            for shard in self.manifest.shards
        )

    @cached_property
    def _resident(self) -> Resident:
        return Resident()

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(shard.count for shard in self.manifest.shards)])

    def read(self, start: int, stop: int) -> Images:
        """Return samples start..stop-1 as (stop - start, H, W, C) uint8. Raises `PoolError` out of range."""
        size = self.manifest.size
        if not 0 <= start <= stop <= size:
            raise PoolError(
                f"Samples {start} to {stop} are not all in the pool; allowed: 0 to {size}",
                hint="Ask for samples that exist",
            )
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts: list[Images] = []
        while start < stop:
            inside = start - int(self._starts[first])
            part = self._maps[first][inside : inside + stop - start]
            parts.append(part)
            start, first = start + len(part), first + 1
        if len(parts) == 1:
            return np.asarray(parts[0])
        return np.concatenate(parts) if parts else np.empty((0, *self.shape), np.uint8)

    def take(self, ids: Sequence[int] | NDArray[np.int64]) -> Images:
        """Return the samples with these ids, (len(ids), H, W, C) uint8, in their order. Raises `PoolError`."""
        wanted, size = np.asarray(ids, np.int64), self.manifest.size
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < size):
            raise PoolError(
                f"Samples {wanted.min()} to {wanted.max()} are not all in the pool; allowed: 0 to {size - 1}",
                hint="Ask for samples that exist",
            )
        out = np.empty((len(wanted), *self.shape), np.uint8)
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        for shard in np.unique(shard_of):
            rows = np.flatnonzero(shard_of == shard)
            out[rows] = self._maps[shard][wanted[rows] - self._starts[shard]]
        self._resident.note(len(wanted), self._maps)
        return out

    def blocks(self, size: int) -> Iterator[tuple[int, Images]]:
        """Yield (start, samples) in order, `size` samples at a time."""
        for start in range(0, len(self), size):
            yield start, self.read(start, min(start + size, len(self)))


class PoolImages:
    """Samples of a pool as training takes them: like an array (m, H, W, C) uint8, read from the disk when indexed."""

    ndim, dtype = 4, np.dtype(np.uint8)

    def __init__(self, pool: Pool, samples: NDArray[np.int64] | None = None) -> None:
        """Of all samples, or of those with the ids `samples` (m,)."""
        self._pool, self._samples = pool, samples

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(m, H, W, C)."""
        return len(self), *self._pool.shape

    def __len__(self) -> int:
        return len(self._pool) if self._samples is None else len(self._samples)

    def __getitem__(self, at: slice | NDArray[np.int64]) -> Images:
        """Return the images at these places, a copy. Raises `PoolError` out of range."""
        places = np.arange(*at.indices(len(self))) if isinstance(at, slice) else at
        return self._pool.take(places if self._samples is None else self._samples[places])


def _read_manifest(folder: Path) -> Manifest:
    path = folder / "manifest.json"
    try:
        if not path.exists():
            raise PoolError(
                f"{folder} holds no pool: manifest.json is missing", hint="Build it with `consilience pool build`"
            )
        data = read_bytes(path, MOST_MANIFEST)
        bounded(data.decode("latin-1"), {*Manifest.model_fields, *Shard.model_fields})  # as many characters as bytes
        return Manifest.model_validate_json(data)
    except ProtocolError:
        raise PoolError(f"{path} holds more values than any manifest", hint="Copy or build the pool anew") from None
    except OSError as error:
        raise storage_error(error, path, "read") from error
    except ValidationError as error:
        field = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise PoolError(
            f"{path}: {field or 'the file'} is not as a manifest must be", hint="Copy or build the pool anew"
        ) from None
