"""The part of the pool that a job asks about, as a pool of its own: RUN/asked.npy.

Lives here: which samples they are, kept from the first moment of a run on, and the question that a span of them makes.
Does not live here: how they are drawn (common/samples_asked). To all stages after asking this is the pool: sample j is
the whole pool's sample ids[j], and answers, labels and features are kept by j.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from consilience.common.errors import NEW_RUN, PoolError, StorageError
from consilience.common.files import storage_error, write_bytes
from consilience.common.pool import Pool
from consilience.common.preprocessing import Images
from consilience.common.protocol import MOST_SPAN
from consilience.common.samples_asked import drawn
from consilience.common.settings import JobSettings
from consilience.common.subsets import subset_text

FILE = "asked.npy"


@dataclass(frozen=True, eq=False)
class AskedPool(Pool):
    """Samples `ids` (m,) int64, ascending, of a pool. Its digest, and what is verified, are those of the whole."""

    ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> Images:
        """Return samples start..stop-1 of these, (stop - start, H, W, C) uint8. Raises `PoolError` out of range."""
        if not 0 <= start <= stop <= len(self):
            raise PoolError(
                f"Samples {start} to {stop} are not all in the part of the pool; allowed: 0 to {len(self)}",
                hint="Ask for samples that exist",
            )
        return super().take(self.ids[start:stop])

    def take(self, ids: Sequence[int] | NDArray[np.int64]) -> Images:
        """Return these samples' images at the places `ids`, in their order. Raises `PoolError` out of range."""
        wanted = np.asarray(ids, np.int64)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise PoolError(
                f"Samples {wanted.min()} to {wanted.max()} are not all in the part of the pool; allowed: 0 to "
                f"{len(self) - 1}",
                hint="Ask for samples that exist",
            )
        return super().take(self.ids[wanted])

    @property
    def subset(self) -> str:
        """Which samples of the whole pool these are, as contracts name them."""
        mask = np.zeros(self.manifest.size, np.bool_)
        mask[self.ids] = True
        return subset_text(mask)


def asked_of(run: Path, job: JobSettings, pool: Pool) -> Pool:
    """Return what a run asks about of the pool: all of it, or the part that was drawn when the run began.

    Raises `SettingsError` where the job wants more samples than there are, `StorageError`, also where RUN/asked.npy is
    damaged.
    """
    ids, path = drawn(job, len(pool)), run / FILE
    if ids is None:
        return pool
    if path.exists():
        ids = _load(path, len(ids), len(pool))
    else:
        held = io.BytesIO()
        np.save(held, ids)
        write_bytes(path, held.getvalue())
    return AskedPool(pool.folder, pool.manifest, ids)


def check_apart(pool: Pool, test_pool: Pool | None) -> None:
    """Raise `PoolError` where the pool is asked about in part, and as the test pool as a whole."""
    if isinstance(pool, AskedPool) and test_pool is not None and test_pool.digest == pool.digest:
        raise PoolError(
            "job.yaml: judge.test_pool is the pool itself, of which ask.samples asks about a part",
            hint="Name another test pool, or leave ask.samples out",
        )


def asked_ids(pool: Pool) -> NDArray[np.int64] | None:
    """Return the whole pool's samples (m,) that a job asks about; None for all."""
    return pool.ids if isinstance(pool, AskedPool) else None


def numbers_in(pool: Pool, at: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the numbers in the whole pool of the samples at these places."""
    return at if (ids := asked_ids(pool)) is None else ids[at]


def span(ids: NDArray[np.int64] | None, low: int, high: int) -> tuple[int, int, str | None]:
    """Return range and subset of the question about the samples `ids`[low..high-1], or low..high-1 where all are asked.

    They must lie within `MOST_SPAN` (`reach`).
    """
    if ids is None:
        return low, high, None
    wanted = ids[low:high]
    start, stop = int(wanted[0]), int(wanted[-1]) + 1
    if stop - start == len(wanted):
        return start, stop, None
    mask = np.zeros(stop - start, np.bool_)
    mask[wanted - start] = True
    return start, stop, subset_text(mask)


def reach(ids: NDArray[np.int64] | None, low: int, high: int) -> int:
    """Return how far a question from place `low` on can go, at most to `high`: over a bounded part of the pool."""
    if ids is None:
        return high
    return low + int(np.searchsorted(ids[low:high], ids[low] + MOST_SPAN))


def _load(path: Path, count: int, size: int) -> NDArray[np.int64]:
    """Read the samples that a run asks about. Raises `StorageError`."""
    try:
        ids = np.load(path, allow_pickle=False)
    except OSError as error:
        raise storage_error(error, path, "read") from error
    except ValueError:
        ids = None
    if (
        ids is None
        or (ids.shape, ids.dtype) != ((count,), np.int64)
        or (np.diff(ids, prepend=-1) < 1).any()
        or ids[-1] >= size
    ):
        raise StorageError(
            f"{path}: is not {count:,} samples of a pool of {size:,}, ascending",
            hint=f"Restore it from a copy, or start {NEW_RUN}",
        )
    return np.asarray(ids)
