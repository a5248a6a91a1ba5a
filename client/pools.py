"""A site's copies of public pools.

Lives here: finding the one with a digest, and seeing once that it is whole. Does not live here: what a pool is
(common/pool).
"""

from __future__ import annotations

import logging
import threading

from consilience.client.policy import RefusedError, check_pool
from consilience.common.errors import PoolError, StorageError
from consilience.common.pool import Pool
from consilience.common.settings import SiteSettings

log = logging.getLogger(__name__)


class Pools:
    """The pools that `site.yaml` names. Safe to use from several threads."""

    def __init__(self, settings: SiteSettings) -> None:
        self._settings, self._lock = settings, threading.Lock()
        self._verified: dict[str, Pool] = {}

    def get(self, digest: str) -> Pool:
        """Return the site's copy of a pool, verified once. Raises `RefusedError`."""
        check_pool(self._settings.policy, digest)
        with self._lock:
            if digest not in self._verified:
                self._verified[digest] = self._find(digest)
            return self._verified[digest]

    def _find(self, digest: str) -> Pool:
        damaged: PoolError | StorageError | None = None
        for folder in self._settings.pools:
            try:
                pool = Pool.open(folder)
                if pool.digest == digest:
                    pool.verify()
                    return pool
            except (PoolError, StorageError) as error:
                log.warning("a pool cannot be used: %s", error)
                damaged = error if folder.exists() else damaged
        if damaged is not None:
            raise RefusedError("pool-damaged", "the site's copy of a pool is damaged") from damaged
        raise RefusedError("unknown-pool", "the site has no copy of this pool")
