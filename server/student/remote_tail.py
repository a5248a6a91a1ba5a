"""A tail that stays at its site, which is asked for outputs and for gradients.

Lives here: what is asked, what answers are taken, and what that cost. Does not live here: the transport of questions,
which brings two functions, and gradients through any tail (tails).

A step through a remote tail takes **two rounds**: features for outputs, then features and the outputs' gradient for the
features' gradient. Per sample, with f numbers a feature and k outputs, 2f + k go out and f + k come back. Considered
and not done:
* one round for a loss that the site computes: a third fewer bytes and half the waiting, but the site would have to hold
  every loss that a server may want (classes pooled or not, soft or hard, weights), and a new one would wait for new
  software at every site. As it is, one code computes the loss for both kinds of tails, and sites know no loss.
* one round with all k rows of the Jacobian: f + (f + 1)k numbers a sample, more than two rounds from k = 3 on.
* the site keeps the features of the first round for the second: f fewer numbers, but a site that remembers something
  between questions, and may be restarted in between.
What waiting costs is met otherwise: the tails of a step are asked at the same time, each once for all of its tasks, and
a batch goes in one request as long as the site takes as many samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilience.common.errors import ProtocolError, StudentError
from consilience.common.nets.taps import Tap
from consilience.server.student.tails import Pull

Floats = NDArray[np.float32]
Ask = Callable[[int, Floats], Floats]
"""Block and features (n, C, H, W) -> outputs (n, k), of a site."""
AskVjp = Callable[[int, Floats, Floats], Floats]
"""Block, features (n, C, H, W) and the outputs' gradient (n, k) -> the features' gradient (n, C, H, W), of a site."""


@dataclass
class Spent:
    """What a remote tail was asked: rounds, samples over all of them, and bytes of numbers to the site and back."""

    rounds: int = 0
    samples: int = 0
    sent: int = 0
    received: int = 0


class RemoteTail:
    """A tail that stays at its site, which is asked by two functions, each request of `most` samples at most."""

    remote, lent = True, None

    def __init__(
        self,
        site: str,
        fingerprint: str,
        taps: Sequence[Tap],
        first: int,
        ask: Ask,
        ask_vjp: AskVjp,
        *,
        most: int = 1024,
        spent: Spent | None = None,
    ) -> None:
        """`taps` are the teacher's, as its card declares them. The functions are called by one thread at a time.

        `spent`: what the tail was asked before, to be counted on.
        """
        if not 1 <= first < len(taps):
            raise ProtocolError(
                f"Site {site} offers the tail after block {first} of {len(taps) - 1}",
                hint=f"Have the site's policy name a block from 1 to {len(taps) - 1}",
            )
        self.site, self.fingerprint, self.taps, self.first = site, fingerprint, tuple(taps), first
        self._ask, self._ask_vjp, self._most = ask, ask_vjp, most
        self.spent = Spent() if spent is None else spent

    def outputs(self, block: int, features: Tensor) -> Tensor:
        """See `TeacherTail.outputs`.

        Raises `StudentError` for a block before `first` and for other channels, and `ProtocolError` when the site
        answers with another shape or type, or a value that is not finite.
        """
        return self._outputs(block, self._taken(block, features)).to(features.device)

    def vjp(self, block: int, features: Tensor) -> tuple[Tensor, Pull]:
        """See `TeacherTail.vjp`. Raises as `outputs`."""
        taken = self._taken(block, features)

        def pull(gradient: Tensor) -> Tensor:
            given = _numbers(gradient)
            found = np.empty_like(taken)
            for part in self._parts(len(taken)):
                answer = self._ask_vjp(block, taken[part], given[part])
                found[part] = self._checked(
                    answer, taken[part].shape, "gradients", taken[part].nbytes + given[part].nbytes
                )
            return torch.from_numpy(found).to(gradient.device)

        return self._outputs(block, taken).to(features.device), pull

    def _outputs(self, block: int, taken: Floats) -> Tensor:
        found = np.empty((len(taken), self.taps[-1].channels), np.float32)
        for part in self._parts(len(taken)):
            answer = self._ask(block, taken[part])
            found[part] = self._checked(answer, found[part].shape, "outputs", taken[part].nbytes)
        return torch.from_numpy(found)

    def _taken(self, block: int, features: Tensor) -> Floats:
        if not self.first <= block < len(self.taps):
            raise StudentError(
                f"Site {self.site} does not take features at block {block}; it takes those at {self.first} to "
                f"{len(self.taps) - 1}",
                hint="Name one of these blocks",
            )
        channels = self.taps[block - 1].channels
        if features.ndim != 4 or features.shape[1] != channels:
            raise StudentError(
                f"Features for site {self.site} at block {block} have shape {tuple(features.shape)}; allowed: "
                f"(n, {channels}, H, W)",
                hint="Bring them to so many channels",
            )
        return _numbers(features)

    def _parts(self, samples: int) -> list[slice]:
        return [slice(start, start + self._most) for start in range(0, samples, self._most)]

    def _checked(self, answer: Any, shape: tuple[int, ...], what: str, sent: int) -> Floats:
        """Return a site's answer, which may be anything, and count it."""
        given = answer if isinstance(answer, np.ndarray) else None
        fits = given is not None and given.shape == shape and given.dtype == np.float32
        if given is None or not fits or not np.isfinite(given).all():
            found = type(answer).__name__ if given is None else f"{given.shape} {given.dtype}"
            problem = " with a value that is not finite" if fits else ""
            raise ProtocolError(
                f"The tail of site {self.site} answered {what} {found}{problem}; expected {shape} float32, finite",
                hint="Have the site update and check its teacher, or set student.learning to soft-labels",
            )
        self.spent.rounds += 1
        self.spent.samples += shape[0]
        self.spent.sent += sent
        self.spent.received += given.nbytes
        return given


def _numbers(tensor: Tensor) -> Floats:
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy())
