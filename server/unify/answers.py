"""Sites' answers as they come -> one stacked block of log-probabilities in fp64.

Lives here: checks of shape, type and values, prior correction, temperature, the floor under tiny
probabilities. Does not live here: estimation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from consilience.common.errors import UnifyError
from consilience.server.unify.plan import Plan
from consilience.server.unify.result import Answers, Prior

FLOOR = -100.0
"""A class less likely than e^-100 of the likeliest class of its row counts as e^-100 (before the row is
normalised again). With zeros taken at face value the optimum can lie at infinity; with e^-100 it is finite
and, in float32, the limit."""

_TORCH_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Reader:
    """Turns rows [start, stop) of all sites' answers into a stacked (K, b) block of log-probabilities."""

    def __init__(self, plan: Plan, temperature: float, prior: Prior | None) -> None:
        if not (np.isfinite(temperature) and temperature > 0):
            raise UnifyError(f"temperature {temperature} is not a positive finite number")
        self._plan = plan
        self._temperature = float(temperature)
        self._shift = None if prior is None else plan.tensor(_prior_shift(plan, prior))[:, None]

    def check(self, log_probs: Sequence[Answers]) -> int:
        """The number of rows n. UnifyError where number of sites, shapes or types do not fit the plan."""
        sets = self._plan.class_sets
        if len(log_probs) != len(sets):
            raise UnifyError(f"there are answers of {len(log_probs)} sites but {len(sets)} class sets")
        for site, (answers, columns) in enumerate(zip(log_probs, sets, strict=True)):
            if not isinstance(answers, np.ndarray | torch.Tensor):
                raise UnifyError(f"answers of site {site} are neither a NumPy array nor a torch tensor")
            if answers.ndim != 2 or answers.shape[1] != columns.size:
                raise UnifyError(
                    f"answers of site {site} have shape {tuple(answers.shape)} instead of (n, {columns.size})"
                )
            if answers.shape[0] != log_probs[0].shape[0]:
                raise UnifyError(
                    f"answers of site {site} have {answers.shape[0]} rows, those of site 0 {log_probs[0].shape[0]}"
                )
            if not is_floating(answers):
                raise UnifyError(
                    f"answers of site {site} are {answers.dtype} instead of floating point", hint="Use f16, f32 or f64."
                )
        return int(log_probs[0].shape[0])

    def read(self, log_probs: Sequence[Answers], start: int, stop: int, first_row: int) -> torch.Tensor:
        """(K, stop - start) log-probabilities. `first_row` is added to row numbers in messages."""
        plan = self._plan
        stacked = torch.empty((plan.columns.size, stop - start), dtype=torch.float64, device=plan.device)
        for _, part in self._parts(log_probs, start, stop, first_row, stacked, FLOOR):
            part.sub_(part.exp().sum(0).log_())
        return stacked

    def weighed(
        self,
        log_probs: Sequence[Answers],
        start: int,
        stop: int,
        first_row: int,
        stacked: torch.Tensor,
        lowest: float,
    ) -> torch.Tensor:
        """Fill `stacked` (K, stop - start), fp32 or fp64, with w_i p_i; `lowest` in the place of `FLOOR`."""
        for site, part in self._parts(log_probs, start, stop, first_row, stacked, lowest):
            part.exp_()
            part.mul_(float(self._plan.weights[site]) / part.sum(0))
        return stacked

    def _parts(
        self,
        log_probs: Sequence[Answers],
        start: int,
        stop: int,
        first_row: int,
        stacked: torch.Tensor,
        lowest: float,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield each site and its rows of `stacked`, filled with log-probabilities of which the largest is 0."""
        plan = self._plan
        for site, answers in enumerate(log_probs):
            rows = slice(int(plan.offsets[site]), int(plan.offsets[site + 1]))
            part = stacked[rows]
            # First to the type and then transposed: the other way round walks through memory that is far away.
            part.copy_(to_tensor(answers[start:stop]).to(plan.device, stacked.dtype).t())
            top = part.amax(0)
            if not bool(torch.isfinite(top).all()):
                _refuse(site, part, first_row + start)
            if self._shift is not None:
                part += self._shift[rows]
                top = part.amax(0)
            part.sub_(top)
            if self._temperature != 1.0:
                part.div_(self._temperature)
            part.clamp_(min=lowest)
            yield site, part


def is_floating(answers: Answers) -> bool:
    """Whether this is f16, bf16, f32 or f64."""
    if isinstance(answers, torch.Tensor):
        return answers.dtype in _TORCH_TYPES
    return answers.dtype.kind == "f" and answers.dtype.itemsize <= 8


def is_double(answers: Answers) -> bool:
    """Whether this is f64."""
    return answers.dtype == (torch.float64 if isinstance(answers, torch.Tensor) else np.float64)


def to_tensor(block: Answers) -> torch.Tensor:
    """The same numbers as a torch tensor, sharing memory where that is safe."""
    if isinstance(block, torch.Tensor):
        return block.detach()
    native = block.dtype.newbyteorder("=")
    # torch neither reads foreign byte orders and negative strides nor likes read-only memory maps.
    if block.dtype != native or not block.flags.writeable or min(block.strides) < 0:
        block = np.array(block, dtype=native)
    return torch.from_numpy(block)


def _refuse(site: int, part: torch.Tensor, first_row: int) -> None:
    row = int((~torch.isfinite(part.amax(0))).int().argmax())
    values = part[:, row]
    what = "NaN" if bool(values.isnan().any()) else "+inf" if bool((values == torch.inf).any()) else "nothing but -inf"
    raise UnifyError(
        f"answers of site {site} hold {what} in row {first_row + row}",
        hint="Ask the site again; its teacher gave no probabilities there.",
    )


def _prior_shift(plan: Plan, prior: Prior) -> npt.NDArray[np.float64]:
    target = _prior_array("target prior", prior.target, plan.num_classes)
    if len(prior.sites) != plan.num_sites:
        raise UnifyError(f"there are priors of {len(prior.sites)} sites but {plan.num_sites} class sets")
    parts = [
        np.log(target[columns]) - np.log(_prior_array(f"prior of site {site}", values, columns.size))
        for site, (columns, values) in enumerate(zip(plan.class_sets, prior.sites, strict=True))
    ]
    return np.concatenate(parts)


def _prior_array(name: str, values: npt.ArrayLike, size: int) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (size,):
        raise UnifyError(f"{name} has shape {array.shape} instead of ({size},)")
    bad = ~(np.isfinite(array) & (array > 0))
    if bad.any():
        raise UnifyError(f"{name} holds {array[bad][0]} at position {int(bad.argmax())}: not a positive finite number")
    return array
