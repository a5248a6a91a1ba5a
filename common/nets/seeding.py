"""Torch's random numbers, from seeds alone.

Lives here: generators, and lending the global one to code that takes no other. Does not live here: deriving seeds
(common/seeds), what the numbers are for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from consilience.common.seeds import derive

_GLOBAL_GENERATOR = threading.RLock()
"""torch's layers draw from one generator of the whole process: whoever seeds it must be alone."""


def generator(seed: int, purpose: str, number: int = 0) -> torch.Generator:
    """Return a CPU generator seeded by `derive`."""
    return torch.Generator().manual_seed(derive(seed, purpose, number))


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generator (and a CUDA `device`'s) inside the block; outside, it is as if nothing was drawn.

    Threads that use this take turns.
    """
    cuda = device if device is not None and device.type == "cuda" else None
    with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[] if cuda is None else [cuda]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every device there is
        if cuda is not None:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(seed)
        yield
