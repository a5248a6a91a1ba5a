"""How many samples of the pool a job asks about, and which: one rule, for the server that asks and the site that
explains.

Does not live here: keeping them (server/asked_pool), how a question names them (common/subsets).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from consilience.common.errors import SettingsError
from consilience.common.seeds import derive
from consilience.common.settings import JobSettings


def samples_asked(job: JobSettings, size: int) -> int:
    """Return how many of a pool's `size` samples a job asks about. Raises `SettingsError` where it wants more."""
    wanted = job.ask.samples
    if wanted is not None and wanted > size:
        raise SettingsError(
            f"job.yaml: field 'ask.samples' is {wanted:,}; the pool has {size:,} samples; allowed: 1 to {size:,}",
            hint="Lower it, or leave it out to ask about the whole pool",
        )
    return size if wanted is None else wanted


def round_ends(job: JobSettings, size: int) -> tuple[int, ...]:
    """Return how many of a pool's samples have been chosen after each round, ascending. Raises as `samples_asked`."""
    count, rounds = samples_asked(job, size), job.ask.parts
    return tuple(count * (k + 1) // rounds for k in range(rounds))


def drawn(job: JobSettings, size: int) -> NDArray[np.int64] | None:
    """Return the samples (m,), ascending, that a job draws by its seed: those of its first round. None for all.

    Raises as `samples_asked`.
    """
    if samples_asked(job, size) == size:
        return None
    random = np.random.default_rng(derive(job.seed, "samples asked"))
    return np.sort(random.choice(size, round_ends(job, size)[0], replace=False)).astype(np.int64)
