"""Sites' coverage as it comes -> one block of numbers strictly between 0 and 1, in fp64.

Lives here: checks of shape, type and values, the bounds. Does not live here: estimation (`covered`, `sd`), or
repairing coverage that is wrong (`recalibrate`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from consilience.common.errors import UnifyError
from consilience.server.unify.answers import is_floating, to_tensor
from consilience.server.unify.result import Answers

LEAST = 1e-6
"""Coverage counts as at least this and at most 1 minus this: nobody who calibrates on thousands of samples can know
more, and one site's 0 or 1 must not overrule all others for certain."""

STRENGTH = 0.1
"""How much coverage counts beside answers, unless something else is said (docs/unify.md gives the evidence)."""

Coverage = Sequence[Answers | None]
"""One (n,) array or tensor per site, or None for a site that gives none; a memory map will do."""


def check_coverage(coverage: Coverage | None, num_sites: int, rows: int) -> tuple[bool, ...]:
    """Which sites give coverage. UnifyError where number of sites, shapes or types do not fit."""
    if coverage is None:
        return (False,) * num_sites
    if len(coverage) != num_sites:
        raise UnifyError(f"there is coverage of {len(coverage)} sites but {num_sites} class sets")
    for site, values in enumerate(coverage):
        if values is None:
            continue
        if not isinstance(values, np.ndarray | torch.Tensor) or not is_floating(values):
            raise UnifyError(
                f"coverage of site {site} is neither a floating NumPy array nor a floating torch tensor",
                hint="Use f16, f32 or f64, or None for a site that gives none.",
            )
        if tuple(values.shape) != (rows,):
            raise UnifyError(f"coverage of site {site} has shape {tuple(values.shape)} instead of ({rows},)")
    return tuple(values is not None for values in coverage)


def read_coverage(coverage: Coverage, start: int, stop: int, first_row: int, device: torch.device) -> torch.Tensor:
    """(m, stop - start) coverage of the m sites that give it, within the bounds. UnifyError outside [0, 1]."""
    parts = []
    for site, values in enumerate(coverage):
        if values is None:
            continue
        part = to_tensor(values[start:stop]).to(device, torch.float64)
        bad = ~((part >= 0) & (part <= 1))
        if bool(bad.any()):
            row = int(bad.int().argmax())
            raise UnifyError(
                f"coverage of site {site} holds {float(part[row]):g} in row {first_row + start + row}: "
                "not a probability from 0 to 1",
                hint="Ask the site again, or unify without its coverage.",
            )
        parts.append(part.clamp(LEAST, 1.0 - LEAST))
    return torch.stack(parts)
