"""Random numbers that depend on a seed and a purpose alone.

Lives here: deriving seeds, and lending the global generator to code that takes no other. Does not live here: what
the numbers are for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from consilience.common.files import canonical_json, sha256

_GLOBAL_GENERATOR = threading.RLock()
"""torch's layers draw from one generator of the whole process: whoever seeds it must be alone."""


def derive(seed: int, purpose: str, number: int = 0) -> int:
    """Return the 63-bit seed that belongs to `seed`, `purpose` and `number`: no state to keep, none to restore."""
    return int(sha256(canonical_json([seed, purpose, number]))[:16], 16) >> 1


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
