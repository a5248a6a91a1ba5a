"""Teachers' tails: a frozen teacher's last blocks and head, which the student's features go through.

Lives here: what a tail is, one that runs here and one that runs at its site, and gradients through either. Does not
live here: how a tail is lent (common/nets/blocks), the transport of questions, and what is learnt from outputs.

Filtered amalgamation (Ye et al., IJCAI 2019; methods.md 3.2) asks two things of a tail: the outputs for features at a
block, and a vector-Jacobian product: what a gradient of the outputs is as a gradient of the features. Nothing else
leaves a site, so whoever learns need not know where a tail runs: `through` is differentiable either way.

A step through a remote tail takes **two rounds**: features for outputs, then features and the outputs' gradient for the
features' gradient. Per sample, with f numbers a feature and k outputs, 2f + k go out and f + k come back. Considered
and not done:
* one round for a loss that the site computes: a third fewer bytes and half the waiting, but the site would have to hold
  every loss that a server may want (classes pooled or not, soft or hard, weights), and a new one would wait for new
  software at every site. As it is, one code computes the loss for both kinds of tails, and sites know no loss.
* one round with all k rows of the Jacobian: f + (f + 1)k numbers a sample, more than two rounds from k = 3 on.
* the site keeps the features of the first round for the second: f fewer numbers, but a site that remembers something
  between questions, and may be restarted in between.
What waiting costs is met otherwise: the tails of a step are asked at the same time, and a batch goes in one request as
long as the site takes as many samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilience.common.errors import ProtocolError, StudentError
from consilience.common.files import sha256
from consilience.common.nets.blocks import Blocks, frozen
from consilience.common.nets.taps import Tap, one_layout

Floats = NDArray[np.float32]
Pull = Callable[[Tensor], Tensor]
"""The outputs' gradient (n, k) -> the features' (n, C, H, W)."""
Ask = Callable[[int, Floats], Floats]
"""Block and features (n, C, H, W) -> outputs (n, k), of a site."""
AskVjp = Callable[[int, Floats, Floats], Floats]
"""Block, features (n, C, H, W) and the outputs' gradient (n, k) -> the features' gradient (n, C, H, W), of a site."""
_T = TypeVar("_T")


class TeacherTail(Protocol):
    """One teacher's blocks after some block, and its head, frozen and in evaluation mode.

    A sample's outputs depend on its own features alone. Outputs are logits, or log-probabilities: a number added to a
    sample's row changes nothing where classes exclude one another.
    """

    @property
    def site(self) -> str:
        """Whose it is."""

    @property
    def fingerprint(self) -> str:
        """What tells it from every other."""

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The taps of the whole teacher; the channels of the last are k."""

    @property
    def first(self) -> int:
        """The first block whose features it takes."""

    @property
    def remote(self) -> bool:
        """Whether asking it means waiting for somebody."""

    @property
    def lent(self) -> tuple[Blocks, str] | None:
        """The blocks after `first` and the name of their architecture, where they are here."""

    def outputs(self, block: int, features: Tensor) -> Tensor:
        """Return (n, k) float32 for features (n, C, H, W) at `block`, without a gradient. n may be 0."""

    def vjp(self, block: int, features: Tensor) -> tuple[Tensor, Pull]:
        """Return `outputs` and what pulls a gradient of them back, to be called once at most."""


class LocalTail:
    """A tail whose blocks are here: lent by the site, or of a teacher of this machine."""

    remote = False

    def __init__(self, site: str, blocks: Blocks, architecture: str) -> None:
        """Hold a copy of `blocks`, frozen. Raises `StudentError` where they begin with the images."""
        if blocks.first < 1:
            raise StudentError(
                f"The tail of site {site} begins at block 0, which is the images", hint="Take the blocks after block 1"
            )
        self.site, self.first, self.taps = site, blocks.first, blocks.taps
        self._blocks, self._architecture = frozen(copy.deepcopy(blocks)), architecture
        held = {name: tensor.cpu().contiguous().numpy() for name, tensor in self._blocks.state_dict().items()}
        digests = "".join(name + sha256(tensor.tobytes()) for name, tensor in sorted(held.items()))
        self.fingerprint = sha256(f"{architecture} {blocks.first} {digests}".encode())

    @property
    def lent(self) -> tuple[Blocks, str] | None:
        """The blocks, which are not to be changed, and their architecture."""
        return self._blocks, self._architecture

    @torch.no_grad()
    def outputs(self, block: int, features: Tensor) -> Tensor:
        """See `TeacherTail.outputs`. Raises `StudentError` for a block that is not held, and for other channels."""
        return self._run(block, features)

    def vjp(self, block: int, features: Tensor) -> tuple[Tensor, Pull]:
        """See `TeacherTail.vjp`. Raises as `outputs`."""
        leaf = features.detach().float().requires_grad_()
        with torch.enable_grad():
            outputs = self._run(block, leaf)

        def pull(gradient: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(outputs, leaf, gradient)
            return found

        return outputs.detach(), pull

    def _run(self, block: int, features: Tensor) -> Tensor:
        self._blocks.to(features.device)
        with torch.autocast(features.device.type, enabled=False):
            return self._blocks.run(features.float(), block, self._blocks.count + 1)


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
    ) -> None:
        """`taps` are the teacher's, as its card declares them. The functions are called by one thread at a time."""
        if not 1 <= first < len(taps):
            raise ProtocolError(
                f"Site {site} offers the tail after block {first} of {len(taps) - 1}",
                hint=f"Have the site's policy name a block from 1 to {len(taps) - 1}",
            )
        self.site, self.fingerprint, self.taps, self.first = site, fingerprint, tuple(taps), first
        self._ask, self._ask_vjp, self._most = ask, ask_vjp, most
        self.spent = Spent()

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


def through(tails: Sequence[TeacherTail], block: int, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return each tail's outputs (n_i, k_i) float32 for its features (n_i, C_i, H, W) at `block`, differentiable.

    Remote tails are asked at the same time, for outputs as for gradients. A tail without samples is not asked. Raises
    as the tails do.
    """
    if not torch.is_grad_enabled():
        return tuple(_each(tails, [_outputs(t, block, f) for t, f in zip(tails, features, strict=True)]))
    found: tuple[Tensor, ...] = _Through.apply(tuple(tails), block, *features)  # type: ignore[no-untyped-call]
    return found


class _Through(torch.autograd.Function):
    """Tails as one operation of autograd, so that their rounds overlap."""

    @staticmethod
    def forward(ctx: Any, tails: tuple[TeacherTail, ...], block: int, *features: Tensor) -> tuple[Tensor, ...]:
        calls = [_vjp(tail, block, each) for tail, each in zip(tails, features, strict=True)]
        told = _each(tails, calls)
        ctx.tails, ctx.pulls = tails, [pull for _, pull in told]
        ctx.set_materialize_grads(False)  # nobody is asked about outputs that a loss leaves out
        return tuple(outputs for outputs, _ in told)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        calls = [_pulled(pull, each) for pull, each in zip(ctx.pulls, gradients, strict=True)]
        return (None, None, *_each(ctx.tails, calls))


def _outputs(tail: TeacherTail, block: int, features: Tensor) -> Callable[[], Tensor]:
    return lambda: tail.outputs(block, features)


def _vjp(tail: TeacherTail, block: int, features: Tensor) -> Callable[[], tuple[Tensor, Pull]]:
    return lambda: tail.vjp(block, features)


def _pulled(pull: Pull, gradient: Tensor | None) -> Callable[[], Tensor | None]:
    return lambda: None if gradient is None or not len(gradient) else pull(gradient)


def _each(tails: Sequence[TeacherTail], calls: Sequence[Callable[[], _T]]) -> list[_T]:
    """Return what the calls give: those of remote tails in threads, all at once, the others here meanwhile."""
    waiting = sum(tail.remote for tail in tails)
    if waiting < 1 or len(calls) < 2:
        return [call() for call in calls]
    with ThreadPoolExecutor(max_workers=waiting) as pool:
        started = [pool.submit(call) if tail.remote else None for tail, call in zip(tails, calls, strict=True)]
        own = [None if future is not None else call() for future, call in zip(started, calls, strict=True)]
        return [
            mine if future is None else future.result()  # type: ignore[misc]
            for future, mine in zip(started, own, strict=True)
        ]


def need_one_layout(student: Sequence[Tap], architecture: str, tails: Sequence[TeacherTail]) -> None:
    """Raise `StudentError` unless every teacher's blocks are laid out as the student's, in whatever widths."""
    for tail in tails:
        try:
            one_layout({f"the student ({architecture})": student, f"site {tail.site}": tail.taps})
        except StudentError as error:
            raise StudentError(
                error.message,
                hint="Filtered amalgamation runs the student's features through the teachers' blocks: choose the "
                "teachers' architecture for the student, in any width (NAME@TIMES), leave that site out, or set "
                "student.learning to common-feature",
            ) from error


def _numbers(tensor: Tensor) -> Floats:
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy())
