"""The part of the pool that a job asks about, as a pool of its own: RUN/asked.npy.

Lives here: which samples they are, kept from the first moment of a run on and from round to round, and the question
that a span of them makes. Does not live here: how they are drawn (common/samples_asked) or chosen (server/choosing). To
all stages after asking this is the pool: sample j is the whole pool's sample ids[j], and answers, labels and features
are kept by j. Samples of one round ascend; those of a later round come after them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from consilience.common.errors import NEW_RUN, PoolError, StorageError
from consilience.common.files import storage_error, write_bytes
from consilience.common.pool import Pool
from consilience.common.preprocessing import Images
from consilience.common.protocol import MOST_SPAN
from consilience.common.samples_asked import drawn, round_ends
from consilience.common.settings import JobSettings
from consilience.common.subsets import subset_text

FILE = "asked.npy"


@dataclass(frozen=True, eq=False)
class AskedPool(Pool):
    """Samples `ids` (m,) int64 of a pool, -1 for those that are not chosen yet, at the end. Its digest, and what is
    verified, are those of the whole.

    `first`: how many of them were drawn at random; the others were chosen after some answers.
    """

    ids: NDArray[np.int64]
    first: int

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def known(self) -> int:
        """How many are chosen."""
        return int((self.ids >= 0).sum())

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
    def mask(self) -> NDArray[np.bool_]:
        """Which samples of the whole pool are chosen, (n,)."""
        mask = np.zeros(self.manifest.size, np.bool_)
        mask[self.ids[: self.known]] = True
        return mask


def asked_of(run: Path, job: JobSettings, pool: Pool) -> Pool:
    """Return what a run asks about of the pool: all of it, or the part that is chosen so far.

    The first round is drawn when the run begins. Raises `SettingsError` where the job wants more samples than there
    are, `StorageError`, also where RUN/asked.npy is damaged.
    """
    ids, ends, path = drawn(job, len(pool)), round_ends(job, len(pool)), run / FILE
    if ids is None:
        return pool
    if path.exists():
        ids = _load(path, ends, len(pool))
    else:
        _write(path, ids)
    padded = np.concatenate([ids, np.full(ends[-1] - len(ids), -1, np.int64)])
    return AskedPool(pool.folder, pool.manifest, padded, ends[0])


def with_more(run: Path, pool: AskedPool, chosen: NDArray[np.int64]) -> AskedPool:
    """Return the part of the pool with the samples `chosen`, ascending, of another round, which RUN/asked.npy keeps.

    Raises `StorageError`.
    """
    ids = np.concatenate([pool.ids[: pool.known], chosen])
    _write(run / FILE, ids)
    padded = np.concatenate([ids, np.full(len(pool) - len(ids), -1, np.int64)])
    return AskedPool(pool.folder, pool.manifest, padded, pool.first)


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
    """Return how far a question from place `low` on can go, at most to `high`.

    It is about samples of one round, over a bounded part of the pool.
    """
    if ids is None:
        return high
    wanted = ids[low:high]
    falls = np.flatnonzero(np.diff(wanted) < 1)
    wanted = wanted[: falls[0] + 1] if len(falls) else wanted
    return low + int(np.searchsorted(wanted, ids[low] + MOST_SPAN))


def _write(path: Path, ids: NDArray[np.int64]) -> None:
    held = io.BytesIO()
    np.save(held, ids)
    write_bytes(path, held.getvalue())


def _load(path: Path, ends: Sequence[int], size: int) -> NDArray[np.int64]:
    """Read the samples that a run asks about, those of its first rounds. Raises `StorageError`."""
    try:
        ids = np.load(path, allow_pickle=False)
    except OSError as error:
        raise storage_error(error, path, "read") from error
    except ValueError:
        ids = None
    if ids is not None and ids.dtype == np.int64 and ids.ndim == 1 and len(ids) in ends:
        rounds = np.split(ids, [end for end in ends if end < len(ids)])
        if all((np.diff(part, prepend=-1) > 0).all() and part[-1] < size for part in rounds) and (
            len(np.unique(ids)) == len(ids)
        ):
            return np.asarray(ids)
    raise StorageError(
        f"{path}: is not {' or '.join(f'{end:,}' for end in ends)} samples of a pool of {size:,}, each once, ascending",
        hint=f"Restore it from a copy, or start {NEW_RUN}",
    )
