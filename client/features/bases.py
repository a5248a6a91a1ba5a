"""Principal components of a teacher's layers over the site's first pool: learned once, kept, and refused when stale.

state/features/ holds features.json (a `BasesRecord`) and bases.safetensors. Nothing private goes into them: a teacher
and public images. Memory: a batch of features, and C x C numbers for each layer of C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import safetensors.numpy
from pydantic import Field
from safetensors import SafetensorError

from consilience.client.features.layers import Layers
from consilience.client.features.reducing import Basis, averaged, principal
from consilience.client.kept import read_kept
from consilience.common.errors import StudentError, TeacherError
from consilience.common.files import lock, make_private, sha256, write_bytes, write_json
from consilience.common.moments import Moments
from consilience.common.pool import Pool
from consilience.common.settings import Settings, SiteSettings

FOLDER, RECORD, MODEL = "features", "features.json", "bases.safetensors"
AGAIN = "Run `consilience site train`"


class Wanted(Settings):
    """A layer of which principal components are to leave."""

    size: int | None
    """As `Reduction.size`."""
    channels: int = Field(ge=1)
    """The layer's own."""
    shape: tuple[int, ...]
    """Of a sample's features as they leave."""


class BasesRecord(Settings):
    """features.json: of which layers components were learned, of which teacher and over which pool."""

    teacher: str
    """Fingerprint of the teacher without calibration."""
    pool: str
    """Digest of the pool."""
    model: str
    """SHA-256 of bases.safetensors."""
    layers: dict[str, Wanted]
    kept: dict[str, float]
    """Layer -> share of the channels' variance."""


def learn(
    settings: SiteSettings,
    layers: Layers,
    pool: Pool,
    wanted: Mapping[str, Wanted],
    on_images: Callable[[int, int], None] | None = None,
) -> None:
    """Learn the components of `wanted` layers over all of `pool` in one pass; returns at once when that was done.

    `on_images` is told how many images of how many the teacher has seen just now. Raises `TeacherError` when a layer
    gives what is not finite or not of its shape, and for an empty pool; `PoolError`, `StorageError`, and `RunError`
    when another process is at it.
    """
    folder = settings.state / FOLDER
    make_private(settings.state)
    with lock(folder):
        if _fits(_read(settings), layers, pool, wanted) and _held(settings, wanted) is not None:
            return
        pool.verify()
        moments = {name: Moments(layer.channels) for name, layer in wanted.items()}
        for first in range(0, len(pool), settings.batch_size):
            last = min(first + settings.batch_size, len(pool))
            found = layers.features(pool.read(first, last), list(wanted))
            for (name, layer), features in zip(wanted.items(), found, strict=True):
                try:
                    moments[name].update(averaged(features, layer.size))
                except StudentError as error:  # the word for any features; here they are the site's own teacher's
                    raise TeacherError(
                        f"{settings.name}: tap {name!r}, pool samples {first} to {last - 1}: {error.message}",
                        hint="Leave the tap out of policy.features.taps, or find out what the teacher computes there",
                    ) from error
            if on_images is not None:
                on_images(last - first, len(pool))
        try:
            bases = {name: principal(moments[name], layer.shape[0]) for name, layer in wanted.items()}
        except StudentError as error:
            raise TeacherError(f"{settings.name}: {pool.folder} holds no image", hint="Name another pool") from error
        tensors = {f"{name}:directions": basis.directions for name, basis in bases.items()}
        tensors |= {f"{name}:mean": basis.mean for name, basis in bases.items()}
        data = safetensors.numpy.save(tensors)
        write_bytes(folder / MODEL, data)
        record = BasesRecord(
            teacher=layers.fingerprint,
            pool=pool.digest,
            model=sha256(data),
            layers=dict(wanted),
            kept={name: basis.kept for name, basis in bases.items()},
        )
        write_json(folder / RECORD, record.model_dump(mode="json"))  # last: it speaks of the bases


def load(settings: SiteSettings, layers: Layers, pool: Pool, wanted: Mapping[str, Wanted]) -> dict[str, Basis] | None:
    """Return the components of `wanted` layers that `learn` kept; None when they were not learned, or of other things.

    Raises `TeacherError` when what is kept is damaged, `StorageError`.
    """
    record = _read(settings)
    if record is None or not _fits(record, layers, pool, wanted):
        return None
    bases = _held(settings, wanted)
    if bases is None:
        raise TeacherError(f"{settings.state / FOLDER / MODEL}: is not what features.json speaks of", hint=AGAIN)
    return bases


def _read(settings: SiteSettings) -> BasesRecord | None:
    return read_kept(settings.state / FOLDER / RECORD, BasesRecord, TeacherError, AGAIN)


def _fits(record: BasesRecord | None, layers: Layers, pool: Pool, wanted: Mapping[str, Wanted]) -> bool:
    if record is None or (record.teacher, record.pool) != (layers.fingerprint, pool.digest):
        return False
    return all(record.layers.get(name) == layer for name, layer in wanted.items())


def _held(settings: SiteSettings, wanted: Mapping[str, Wanted]) -> dict[str, Basis] | None:
    """Return the components that bases.safetensors holds; None where they are not those of the record."""
    record = _read(settings)
    try:
        data = (settings.state / FOLDER / MODEL).read_bytes()
        if record is None or sha256(data) != record.model:
            return None
        tensors = safetensors.numpy.load(data)
        return {
            name: Basis(tensors[f"{name}:directions"], tensors[f"{name}:mean"], record.kept[name]) for name in wanted
        }
    except (OSError, SafetensorError, KeyError):
        return None
