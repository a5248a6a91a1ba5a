"""A classifier of ours cut into blocks, and the last of its blocks as bytes.

Lives here: running a network from one block to another, and lending its *tail*, the blocks after one of them and the
head, to somebody who has its architecture's name. Does not live here: where a cut may lie (taps), and what a tail is
lent for (server/student/tails).

A block is what leads from one tap to the next (`taps.units`), the head is what leads from the last of them to the
scores. Block 1 takes the images; a network of B blocks has its scores at B + 1. Features at a block are what its tap
gives, *before* the activation that comes next: what multiplies them by positive numbers, or mixes their channels,
stands where it would stand after the ReLU, or before it, and a tail always begins with that ReLU.

What is lent is tensors and a name, never code: whoever takes a tail builds the blocks from the name, and refuses
tensors that are not exactly theirs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from consilience.common.errors import ConsilienceError, ProtocolError, StudentError
from consilience.common.nets.architectures import ARCHITECTURES, build
from consilience.common.nets.taps import units

MOST_BYTES = 2**28
"""Largest tail that is taken by default."""
MOST_OUTPUTS = 1_000_000
_HEADER = 4096
"""Bytes of a safetensors file, beside 256 a tensor, that are no tensor's."""
_COUNTS = "num_batches_tracked"
"""Batch normalisation's count of batches, which a frozen network has no use for; it is not lent."""
_NEXT = (
    "Filtered amalgamation needs architectures of ours (cnn3, vgg6, resnet8, resnet20, mobilenet-small, or one of them "
    "with a width such as vgg6@1.25); for other networks set student.learning to common-feature or soft-labels"
)


class Blocks(nn.Module):
    """The blocks after `first` of a network of ours, and its head; with `first` 0, all of it. Shares its weights."""

    def __init__(self, network: nn.Module, first: int = 0) -> None:
        """Raises `StudentError` for a network that cannot be cut, and for a block that it has not."""
        super().__init__()
        try:
            parts = units(network)
        except StudentError:
            raise StudentError(
                f"A network {type(network).__name__} cannot be cut into blocks: it is not laid out as one of our "
                "architectures",
                hint=_NEXT,
            ) from None
        self.taps = tuple(unit.tap for unit in parts)
        if not 0 <= first < len(parts):
            raise StudentError(
                f"A network of {self.count} blocks has none after block {first}",
                hint=f"Name a block from 0 to {self.count}",
            )
        self.first = first
        self.units = nn.ModuleList(parts[first:])

    @property
    def count(self) -> int:
        """How many blocks the whole network has, its head left out."""
        return len(self.taps) - 1

    @property
    def head(self) -> nn.Linear:
        """The linear layer that gives the scores."""
        found = self.units[-1].learned[0]  # type: ignore[index]
        assert isinstance(found, nn.Linear)
        return found

    def run(self, features: Tensor, first: int, last: int) -> Tensor:
        """Return the features at block `last` for those at block `first`, (n, C, H, W), block 0 being the images.

        At block `count` + 1 they are the scores (n, K). Raises `StudentError` for blocks that are not held, or in
        another order, and for features of other channels.
        """
        if not self.first <= first <= last <= self.count + 1:
            raise StudentError(
                f"Blocks {first + 1} to {last} cannot be run: held are {self.first + 1} to {self.count}, and the head "
                f"as {self.count + 1}",
                hint="Name blocks that are held, in their order",
            )
        channels = self.taps[first - 1].channels if first else None
        if features.ndim != 4 or (channels is not None and features.shape[1] != channels):
            raise StudentError(
                f"Features at block {first} have shape {tuple(features.shape)}; allowed: (n, {channels or 'C'}, H, W)",
                hint="Bring them to so many channels",
            )
        for unit in list(self.units)[first - self.first : last - self.first]:
            features = unit(features)
        return features

    def forward(self, features: Tensor) -> Tensor:
        """Return the scores (n, K) for features at block `first`, or for images."""
        return self.run(features, self.first, self.count + 1)


@dataclass(frozen=True)
class LentTail:
    """The blocks after `block` of a network `architecture` with `classes` outputs: `tensors` is a safetensors file."""

    architecture: str
    block: int
    classes: int
    tensors: bytes


def skeleton(architecture: str, classes: int, first: int = 0, channels: int = 1) -> Blocks:
    """Return the blocks after `first` of `architecture`, without memory for its weights (on torch's meta device).

    Raises `StudentError` for an architecture that is none of ours, whatever else it may name, and as `Blocks`.
    """
    if not re.fullmatch(r"[a-z0-9-]{1,40}(@[0-9.]{1,10})?", architecture) or (
        architecture.partition("@")[0] not in ARCHITECTURES
    ):
        raise StudentError(
            f"Architecture {architecture[:80]!r} is none of ours ({', '.join(ARCHITECTURES)}), so it cannot be cut "
            "into blocks",
            hint=_NEXT,
        )
    with torch.device("meta"):
        return Blocks(build(architecture, classes=classes, channels=channels, seed=0), first)


def export_tail(
    network: nn.Module, architecture: str, block: int, *, temperature: float | Sequence[float] = 1.0
) -> LentTail:
    """Return the blocks after `block` of `network`, which is `architecture`, and its head, to be lent.

    `temperature`, one for all or one a score, divides the scores, as calibration does that answers go through: the lent
    tail then gives what is answered, up to a number a sample. It is taken into the head. Raises `StudentError` for a
    network that cannot be cut or is not `architecture`, for block 0, which is the whole network, and for weights that
    are not finite.
    """
    held = Blocks(network, block)
    if not block:
        raise StudentError(
            "Block 0 is the images: a tail that begins there is the whole network", hint="Lend from block 1 or later"
        )
    wanted = _shapes(skeleton(architecture, held.head.out_features, block))
    tensors = {name: tensor.detach().cpu().float().contiguous() for name, tensor in _lent(held).items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(given.keys() | wanted.keys()):
        if given.get(name) != wanted.get(name):
            raise StudentError(
                f"The network is not {architecture}: {name} is {given.get(name, 'missing')}, and {architecture} has "
                f"{wanted.get(name, 'no such tensor')}",
                hint="Name the architecture that the network was built with",
            )
    odd = next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)
    if odd is not None:
        raise StudentError(f"The network's {odd} is not finite, so it cannot be lent", hint="Train it again")
    head = f"units.{len(held.units) - 1}.learned.0."
    divided = torch.as_tensor(temperature, dtype=torch.float32)
    tensors[f"{head}weight"] = tensors[f"{head}weight"] / divided.reshape(-1, 1)
    tensors[f"{head}bias"] = tensors[f"{head}bias"] / divided
    return LentTail(architecture, block, held.head.out_features, safetensors.torch.save(tensors))


def rebuild_tail(lent: LentTail, *, most: int = MOST_BYTES) -> Blocks:
    """Return the blocks that were lent, frozen, on the CPU and in evaluation mode. `lent` may be a stranger's.

    Nothing is held for more than `most` bytes of tensors. Raises `ProtocolError` for an architecture, a block or a
    number of classes that cannot be, for a tail that is too large, and for bytes that are not exactly the tensors of
    these blocks: another name, shape or type, one too many or too few, values that are not finite, a negative variance.
    """
    if not 1 <= lent.classes <= MOST_OUTPUTS or lent.block < 1:
        raise _refused(f"{lent.classes:,} outputs after block {lent.block}; allowed: 1 to {MOST_OUTPUTS:,}, block >= 1")
    try:
        blocks = skeleton(lent.architecture, lent.classes, lent.block)
    except ConsilienceError as error:
        raise _refused(error.message) from None
    wanted = _shapes(blocks)
    size = 4 * sum(_numel(shape) for shape in wanted.values())
    if size > most:
        raise _refused(f"{size:,} bytes of tensors; allowed are {most:,}")
    if not size <= len(lent.tensors) <= size + _HEADER + 256 * len(wanted):
        raise _refused(
            f"{len(lent.tensors):,} bytes; the blocks after {lent.block} of {lent.architecture} have {size:,}"
        )
    try:
        held = safetensors.torch.load(lent.tensors)
    except (SafetensorError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise _refused("bytes that are no safetensors file") from error
    for name in sorted(held.keys() | wanted.keys()):
        _check(name, held.get(name), wanted.get(name))
    counts = [name for name in blocks.state_dict() if name.endswith(_COUNTS)]
    blocks.load_state_dict(held | {name: torch.zeros((), dtype=torch.int64) for name in counts}, assign=True)
    return frozen(blocks)


def frozen(blocks: Blocks) -> Blocks:
    """Return `blocks` in evaluation mode, its weights no longer to be trained."""
    for parameter in blocks.parameters():
        parameter.requires_grad = False
    return blocks.eval()


def _lent(blocks: Blocks) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in blocks.state_dict().items() if not name.endswith(_COUNTS)}


def _shapes(blocks: Blocks) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _lent(blocks).items()}


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...] | None) -> None:
    """Raise `ProtocolError` unless `tensor` is what a block has under this name."""
    shown = name[:100]
    if shape is None:
        raise _refused(f"a tensor {shown!r} that its blocks have not")
    if tensor is None:
        raise _refused(f"no tensor {shown!r}")
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
        raise _refused(f"a tensor {shown!r} of {tuple(tensor.shape)} {tensor.dtype}; its blocks have {shape} float32")
    if not bool(tensor.isfinite().all()):
        raise _refused(f"a tensor {shown!r} with a value that is not finite")
    if name.endswith("running_var") and bool((tensor < 0).any()):
        raise _refused(f"a variance {shown!r} below 0")


def _refused(what: str) -> ProtocolError:
    return ProtocolError(
        f"A lent tail has {what}",
        hint="Have the site lend the blocks of the architecture that its card names, or set student.learning to "
        "soft-labels",
    )
