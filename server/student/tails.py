"""Teachers' tails: a frozen teacher's last blocks and head, which the student's features go through.

Lives here: what a tail is, one that runs here, and gradients through any. Does not live here: one that runs at its site
(remote_tail), how a tail is lent (common/nets/blocks), and what is learnt from outputs.

Filtered amalgamation (Ye et al., IJCAI 2019; methods.md 3.2) asks two things of a tail: the outputs for features at a
block, and a vector-Jacobian product: what a gradient of the outputs is as a gradient of the features. Nothing else
leaves a site, so whoever learns need not know where a tail runs: `through` is differentiable either way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from consilience.common.errors import StudentError
from consilience.common.files import sha256
from consilience.common.nets.blocks import Blocks, frozen
from consilience.common.nets.taps import Tap, one_layout

Pull = Callable[[Tensor], Tensor]
"""The outputs' gradient (n, k) -> the features' (n, C, H, W)."""
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


def through(tails: Sequence[TeacherTail], block: int, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return each tail's outputs (n_i, k_i) float32 for its features (n_i, C_i, H, W) at `block`, differentiable.

    A tail may be given several times; it is asked once, for all. Remote tails are asked at the same time, for outputs
    as for gradients. A tail without samples is not asked. Raises as the tails do.
    """
    every = list({id(tail): tail for tail in tails}.values())
    mine = [[each for each, of in zip(features, tails, strict=True) if of is tail] for tail in every]
    joined = [torch.cat(each) if len(each) > 1 else each[0] for each in mine]
    if torch.is_grad_enabled():
        outputs: Sequence[Tensor] = _Through.apply(tuple(every), block, *joined)  # type: ignore[no-untyped-call]
    else:
        outputs = _each(every, [_outputs(tail, block, each) for tail, each in zip(every, joined, strict=True)])
    parts = {
        id(tail): iter(torch.split(told, [len(part) for part in each]) if len(each) > 1 else [told])
        for tail, told, each in zip(every, outputs, mine, strict=True)
    }
    return tuple(next(parts[id(tail)]) for tail in tails)


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
