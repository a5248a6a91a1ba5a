"""Common-feature learning (Luo et al., IJCAI 2019; methods.md section 2): teachers of any architecture.

Lives here: the networks that bring teachers' and student's features of a tap into one space, and their loss. Does not
live here: MMD (mmd), the soft-target term (soft_labels) and where a tap lies.

    F_Ti --adaptation_i--> f_Ti --extractor--> fhat_Ti --decoder_i--> F'_Ti       L_M = sum_i MMD^2(fhat_S, fhat_Ti)
    F_S  --adaptation_S--> f_S  --extractor--> fhat_S                             L_R = sum_i MSE(F'_Ti, F_Ti)

The extractor is one for all. Gradients reach everything but the teachers' features themselves: MMD moves their
projections too, and reconstruction keeps the common space from collapsing to a point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.common.errors import StudentError
from consilience.common.nets.seeding import seeded
from consilience.common.seeds import derive
from consilience.server.student.mmd import BANDWIDTHS, mmd

WIDTH = 128
"""h, the channels of the common space."""
STILL = 1e-9
"""Least share of their mean square by which features of a batch vary: normalised by less, gradients are unbounded."""


@dataclass(frozen=True)
class Weights:
    """What each term counts in L = soft L_D + mmd L_M + reconstruction L_R. A term of weight 0 is not computed.

    The paper's code: 1, 10, 10.
    """

    soft: float = 1.0
    mmd: float = 10.0
    reconstruction: float = 10.0

    def __post_init__(self) -> None:
        """Raises `StudentError` for a weight that is negative or not finite."""
        for name, weight in vars(self).items():
            if not 0 <= weight < float("inf"):
                raise StudentError(
                    f"Weight {name} of common-feature learning is {weight}; allowed: finite numbers from 0",
                    hint="Correct the weight; 0 switches the term off",
                )


@dataclass(frozen=True)
class Terms:
    """The loss and its parts, scalars: `total` is weighted, the parts are not; a part switched off is 0."""

    total: Tensor
    soft: Tensor
    mmd: Tensor
    reconstruction: Tensor


class CommonFeature(nn.Module):
    """The common space of one tap: adaptations, the shared extractor and the teachers' decoders.

    `teachers[i]` and `student` are channels. `size` (h, w) says what maps are brought to first: averaged where they
    are larger (adaptive pooling), interpolated where they are smaller (bilinear), each direction by itself; None for
    maps that have one size already. With `vectors` features are (n, C) and convolutions are linear layers. With
    `normalise` batch normalisation comes before every activation, as in the authors' later code: the paper's networks
    have none. Weights depend on the arguments alone (`seed`); He et al. (ICCV 2015), no biases.
    """

    def __init__(
        self,
        teachers: Sequence[int],
        student: int,
        *,
        width: int = WIDTH,
        size: tuple[int, int] | None = None,
        vectors: bool = False,
        bandwidths: Sequence[float] | None = BANDWIDTHS,
        normalise: bool = False,
        seed: int,
    ) -> None:
        """Raises `StudentError` without teachers, for widths or sizes below 1 and bandwidths that are not above 0."""
        super().__init__()
        sizes = (*teachers, student, width, *(size or ()))
        if not teachers or min(sizes) < 1 or (bandwidths is not None and not all(b > 0 for b in bandwidths)):
            raise StudentError(
                f"A common space needs one teacher or more, channels and sizes of at least 1 and bandwidths above 0; "
                f"given: teachers {list(teachers)}, student {student}, width {width}, size {size}, bandwidths "
                f"{bandwidths}",
                hint="Correct these",
            )
        self.size, self.vectors, self.bandwidths, self.width = size, vectors, bandwidths, width
        self.normalise = normalise
        make = _Make(vectors, normalise)
        with seeded(derive(seed, "common feature")):
            self.adaptations = nn.ModuleList(_adaptation(channels, width, make) for channels in teachers)
            self.adaptation = _adaptation(student, width, make)
            self.extractor = _extractor(width, make)
            self.decoders = nn.ModuleList(_decoder(width, channels, make) for channels in teachers)
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(
        self,
        student: Tensor,
        teachers: Sequence[Tensor],
        weights: Weights = Weights(),
        rows: Sequence[Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return L_M and L_R of a batch, scalars in fp32 at least: unweighted sums over the teachers.

        `student` (b, C_S, H, W) and `teachers[i]` (b, C_i, H_i, W_i), of the same b >= 1 samples, or (b, C) each;
        floating. A teacher need not have told of every sample: `rows[i]` (b_i,) int64 are the samples of the batch that
        its features, (b_i, ...), are of, None where they are of all; one that told of none of them has no part. L_R
        compares with the teachers' features at `size`. A term of weight 0 is 0. With `normalise` a teacher whose
        features do not vary over the batch has no part either: they tell nothing. Raises `StudentError` for other
        shapes, and for maps of unequal size without `size`.
        """
        known = list(rows) if rows is not None else [None] * len(teachers)
        student, *brought = self._brought([student, *teachers], [len(student), *_counts(known, len(student))])
        apart = lost = torch.zeros((), device=student.device)
        if not weights.mmd and not weights.reconstruction:
            return apart, lost
        own = self.project(student) if weights.mmd else student
        for i, (each, at) in enumerate(zip(brought, known, strict=True)):
            if not len(each) or (self.normalise and not varies(each)):
                continue
            common = self.project(each, i)
            if weights.mmd:
                apart = apart + mmd(own if at is None else own[at], common, self.bandwidths)
            if weights.reconstruction:
                lost = lost + _mse(self.decoders[i](common), each)
        return apart, lost

    def project(self, features: Tensor, teacher: int | None = None) -> Tensor:
        """Map features at one size, of the student or of teacher number `teacher`, to the common space."""
        common: Tensor = self.extractor((self.adaptation if teacher is None else self.adaptations[teacher])(features))
        return common

    def unexplained(self, features: Tensor, teacher: int) -> float:
        """Return the share of a teacher's features' energy that reconstruction misses, >= 0: |F' - F|^2 / |F|^2."""
        each = self.brought(features)
        energy = float(each.double().square().mean())
        return float(_mse(self.decoders[teacher](self.project(each, teacher)), each)) / energy if energy else 0.0

    def brought(self, features: Tensor) -> Tensor:
        """Return features at this space's size."""
        return features if self.size is None else _resized(features, self.size)

    def _brought(self, features: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """Return student's and teachers' features, checked, `counts` samples of each, and at one size."""
        wanted = [self.adaptation, *self.adaptations]
        shapes = [tuple(each.shape) for each in features]
        fitting = len(features) == len(wanted) == len(counts) and all(
            each.ndim == (2 if self.vectors else 4)
            and len(each) == count
            and each.shape[1] == adapt[0].weight.shape[1]
            and (each.numel() or (at and not count))
            for at, (adapt, each, count) in enumerate(zip(wanted, features, counts, strict=True))
        )
        if not fitting:
            allowed = "(n, C)" if self.vectors else "(n, C, H, W)"
            raise StudentError(
                f"Features of student and teachers have shapes {shapes}; allowed: {allowed} with one sample or more, "
                f"as many each, and {[adapt[0].weight.shape[1] for adapt in wanted]} channels",
                hint="Take the features from the taps that were declared",
            )
        if self.vectors:
            return list(features)
        if self.size is None and len({shape[2:] for shape in shapes}) > 1:
            raise StudentError(
                f"Features of student and teachers have sizes {[shape[2:] for shape in shapes]}; without a declared "
                "size they must be equal",
                hint="Declare the size that all are brought to",
            )
        return [self.brought(each) if len(each) else each for each in features]


class CommonFeatureLearning(nn.Module):
    """The whole loss: soft targets, and common features at any number of taps by name.

    Its parameters are trained with the student's (in the paper at another rate) and thrown away with the teachers.
    """

    def __init__(self, taps: Mapping[str, CommonFeature], weights: Weights = Weights()) -> None:
        super().__init__()
        self.names, self.taps, self.weights = tuple(taps), nn.ModuleList(taps.values()), weights

    def forward(
        self,
        soft: Tensor,
        student: Mapping[str, Tensor],
        teachers: Mapping[str, Sequence[Tensor]],
        rows: Mapping[str, Sequence[Tensor | None]] | None = None,
    ) -> Terms:
        """Return the batch's loss; `soft` is L_D, a scalar, and features and rows are as in `CommonFeature`, by tap.

        L_D comes from the caller: unified soft labels, or the softmax of concatenated scores as in the paper. MMD and
        reconstruction are sums over taps. Raises `StudentError` as `CommonFeature`, and when a tap is missing.
        """
        missing = [name for name in self.names if name not in student or name not in teachers]
        if missing:
            raise StudentError(
                f"Features of tap {missing[0]} are missing", hint="Give the student's and the teachers' for every tap"
            )
        apart = lost = torch.zeros((), device=soft.device)
        for name, tap in zip(self.names, self.taps, strict=True):
            each = tap(student[name], teachers[name], self.weights, None if rows is None else rows[name])
            apart, lost = apart + each[0], lost + each[1]
        total = self.weights.mmd * apart + self.weights.reconstruction * lost
        if self.weights.soft:
            total = total + self.weights.soft * soft
        else:
            soft = torch.zeros_like(soft)
            # A batch of which no site told two samples has a gradient too, of zeros.
            total = total + 0 * sum((student[name].sum() for name in self.names), start=torch.zeros_like(soft))
        return Terms(total, soft, apart, lost)


@torch.no_grad()
def varies(features: Tensor) -> bool:
    """Whether features (n, C) or (n, C, H, W) vary over samples and positions, by more than `STILL`."""
    first = features[:1, :, :1, :1] if features.ndim == 4 else features[:1]
    few = (features[:4], features)  # of nearly all, a few tell
    return any(bool((some - first).square().mean() > STILL * some.square().mean()) for some in few)


def _counts(rows: Sequence[Tensor | None], samples: int) -> list[int]:
    return [samples if at is None else len(at) for at in rows]


@dataclass(frozen=True)
class _Make:
    """Makes layers: convolutions, or linear layers for vectors, with batch normalisation or without."""

    vectors: bool
    normalise: bool

    def layer(self, inputs: int, outputs: int, kernel: int) -> nn.Module:
        """Return one with weights, without a bias."""
        if self.vectors:
            return nn.Linear(inputs, outputs, bias=False)
        return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)

    def normed(self, inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
        """Return one that comes before an activation or a sum."""
        norm = nn.BatchNorm1d if self.vectors else nn.BatchNorm2d
        return [self.layer(inputs, outputs, kernel), *([norm(outputs)] if self.normalise else [])]


class _Block(nn.Module):
    """Two 3x3 convolutions around a shortcut; a 1x1 shortcut where the channels change."""

    def __init__(self, inputs: int, outputs: int, make: _Make) -> None:
        super().__init__()
        self.body = nn.Sequential(*make.normed(inputs, outputs, 3), nn.ReLU(), *make.normed(outputs, outputs, 3))
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else _joined(make.normed(inputs, outputs, 1))

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.body(features) + self.shortcut(features))


def _joined(layers: Sequence[nn.Module]) -> nn.Module:
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def _adaptation(channels: int, width: int, make: _Make) -> nn.Sequential:
    return nn.Sequential(*make.normed(channels, 2 * width, 1), nn.ReLU())


def _extractor(width: int, make: _Make) -> nn.Sequential:
    if make.vectors:
        return nn.Sequential(*make.normed(2 * width, width, 1), nn.ReLU(), make.layer(width, width, 1))
    return nn.Sequential(_Block(2 * width, width, make), _Block(width, width, make), _Block(width, width, make))


def _decoder(width: int, channels: int, make: _Make) -> nn.Sequential:
    return nn.Sequential(*make.normed(width, channels, 3), nn.ReLU(), make.layer(channels, channels, 1))


def _resized(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring (n, C, H, W) to (n, C, *size)."""
    smaller = min(features.shape[2], size[0]), min(features.shape[3], size[1])
    features = F.adaptive_avg_pool2d(features, smaller)
    return features if smaller == size else F.interpolate(features, size, mode="bilinear", align_corners=False)


def _mse(decoded: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean over all elements, in fp32 at least, whatever the arithmetic of the networks."""
    kind = torch.promote_types(torch.promote_types(decoded.dtype, wanted.dtype), torch.float32)
    with torch.autocast(decoded.device.type, enabled=False):
        return F.mse_loss(decoded.to(kind), wanted.to(kind))
