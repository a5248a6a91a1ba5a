"""The loop over blocks of samples: it bounds memory, whatever n is, and keeps the processor's cores busy.

Lives here: the size of a block, threads, the assembly of `UnifiedLabels`. Does not live here: what a block
computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from consilience.common.errors import UnifyError
from consilience.server.unify.across import Combine
from consilience.server.unify.estimate import Estimate
from consilience.server.unify.plan import Plan
from consilience.server.unify.result import UnifiedLabels

MEMORY = 32 * 2**20
"""Bytes of intermediate results per block and thread: near the last-level cache works best."""
_MOST_ROWS = 4096
_WORTH_A_THREAD = 64

Given = TypeVar("Given")
Made = TypeVar("Made")


def block_rows(block: int | None, row_doubles: int, memory: int = MEMORY) -> int:
    """Rows per block: as asked, or as many as fit. UnifyError if less than 1."""
    if block is None:
        return max(1, min(_MOST_ROWS, memory // (8 * row_doubles)))
    if block < 1:
        raise UnifyError(f"block {block} is less than 1")
    return int(block)


def run_blocks(
    plan: Plan,
    n: int,
    block: int,
    estimate: Callable[[int, int], Estimate],
    combine: Combine,
    *,
    alone: bool = False,
) -> UnifiedLabels:
    """Estimate rows [start, stop) block by block, and combine components.

    On the CPU there is one thread per block at work, as many as torch uses, each of them single-threaded: the
    operations on a block are too small to be divided among cores, and on a busy machine waiting for one
    another at every one of them costs ten times the work itself. `alone`: the caller's thread does all of it, since
    the caller has a thread per core at this already.
    """
    out = UnifiedLabels(
        probs=np.empty((n, plan.num_classes), dtype=np.float32),
        components=plan.components.copy(),
        iterations=np.empty(n, dtype=np.int32),
        converged=np.empty(n, dtype=np.bool_),
        residual=np.empty(n, dtype=np.float64),
        other=np.zeros(n, dtype=np.float32),
    )

    def work(start: int, stop: int) -> None:
        found = estimate(start, stop)
        labels = combine(found.scores) if found.labels is None else found.labels
        torch.from_numpy(out.probs[start:stop]).copy_(labels.t())
        out.iterations[start:stop] = found.iterations.cpu().numpy()
        out.converged[start:stop] = found.converged.cpu().numpy()
        out.residual[start:stop] = found.residual.cpu().numpy()
        if found.other is not None:
            out.other[start:stop] = found.other.cpu().numpy()

    if alone or plan.device.type != "cpu":
        for start in range(0, n, block):
            work(start, min(start + block, n))
        return out
    block = min(block, max(_WORTH_A_THREAD, -(-n // torch.get_num_threads())))
    for _ in in_threads(lambda start: work(start, min(start + block, n)), range(0, n, block)):
        pass
    return out


def in_threads(work: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
    """Yield `work` of each of `items`, in their order, done in as many threads as torch uses, each single-threaded.

    Items are taken no further ahead than there are threads. What `work` raises is raised here.
    """
    threads, waiting = torch.get_num_threads(), deque[Future[Made]]()
    with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            # Threads that torch meets later start with the number that was set last.
            torch.set_num_threads(threads)
