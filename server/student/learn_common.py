"""Common-feature learning in a job: the student, its common spaces and the sites' stored features as one training.

Lives here: which features meet in a space and in which form, the module that the training loop trains, its loss, and
what is told of it afterwards. Does not live here: the networks of a space (common_feature), the loop (common/nets), the
soft-target term (soft_labels, scores).

Features of a site count in units of a median sample's root mean square, so that a term weighs the same however large a
teacher's features are. A sample that a site told nothing of has no part in that site's terms; it has one in the
others'. The networks of a space are normalised by batch, as in the authors' later code: the paper trains them without,
by Adam, and the loop trains by gradient descent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from consilience.common.errors import StudentError
from consilience.common.files import canonical_json, sha256
from consilience.common.nets.batches import Normalise
from consilience.common.nets.losses import Loss, Parted
from consilience.common.nets.tapped import Tapped
from consilience.common.preprocessing import ImageRows, fit_shape
from consilience.common.seeds import derive
from consilience.common.settings import Preprocessing
from consilience.server.student.common_feature import (
    WIDTH,
    CommonFeature,
    CommonFeatureLearning,
    Weights,
    varies,
)
from consilience.server.student.picture import picture
from consilience.server.student.site_taps import SiteTap

SHOWN = 500
"""Samples that reconstruction is measured on, at most, of each site."""
DRAWN = 1500
"""Points of a picture, of all sites and the student together."""
MOST_VALUES = 4096
"""Numbers that a point of a picture is made of, at most: maps are averaged down to as many."""


@dataclass(frozen=True)
class Space:
    """One common space: the student's tap and the sites', and the form in which they meet.

    `student_shape` is (C,) or (C, H, W). Where any of them is a vector, maps are averaged to one. Maps meet at `size`
    by `size`, by default at the least height and width that any has.
    """

    student: str
    student_shape: tuple[int, ...]
    taps: tuple[SiteTap, ...]
    width: int | None = None
    size: int | None = None

    @property
    def vectors(self) -> bool:
        """Whether vectors meet here."""
        return any(len(shape) == 1 for shape in self._shapes)

    @property
    def meeting(self) -> tuple[int, int] | None:
        """Height and width that maps are brought to; None where they are vectors."""
        if self.vectors:
            return None
        if self.size is not None:
            return self.size, self.size
        return min(shape[1] for shape in self._shapes), min(shape[2] for shape in self._shapes)

    @property
    def averaged(self) -> bool:
        """Whether maps larger than another's are averaged down though no size was asked for."""
        return self.size is None and not self.vectors and len({shape[1:] for shape in self._shapes}) > 1

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        return [self.student_shape, *(tap.card.shape for tap in self.taps)]

    def build(self, seed: int) -> CommonFeature:
        """Return the space's networks, freshly initialised. Raises `StudentError`."""
        return CommonFeature(
            [tap.card.shape[0] for tap in self.taps],
            self.student_shape[0],
            # a quarter: the networks of a space of maps would cost many times what a small student does
            width=self.width or min(WIDTH, -(-self.student_shape[0] // (1 if self.vectors else 4))),
            size=self.meeting,
            vectors=self.vectors,
            normalise=True,
            seed=seed,
        )

    def formed(self, features: Tensor) -> Tensor:
        """Return features (b, ...) as they meet here, but for their size: maps averaged where vectors meet."""
        return features.mean(dim=(2, 3)) if self.vectors and features.ndim == 4 else features

    def given(self, tap: SiteTap, ids: NDArray[np.int64], device: torch.device) -> Tensor:
        """Return a site's features of the samples `ids`, pool ids, in units of their scale, none too large."""
        return self.formed(torch.from_numpy(tap.bounded(ids) / np.float32(tap.scale)).to(device, non_blocking=True))


class CommonStudent(nn.Module):
    """A student and the networks of its common spaces: (scores, features of its taps, one a space).

    It holds nothing of the sites: the training loop copies it.
    """

    def __init__(self, network: nn.Module, spaces: Sequence[Space], weights: Weights, seed: int) -> None:
        """Raises `StudentError` for a tap that the student has not, and for spaces without sites."""
        super().__init__()
        self.tapped = Tapped(network, [space.student for space in spaces])
        built = {str(at): space.build(derive(seed, "common space", at)) for at, space in enumerate(spaces)}
        self.common = CommonFeatureLearning(built, weights)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map normalised images (n, C, H, W)."""
        found: tuple[Tensor, tuple[Tensor, ...]] = self.tapped(images)
        return found


class CommonLoss:
    """soft L_D + mmd L_M + reconstruction L_R of a batch, and the three by name.

    `spaces` are those that `model` was made for. `soft` is L_D, a loss of scores. `samples` (m,): training's sample j
    is the pool's samples[j].
    """

    def __init__(
        self,
        model: CommonStudent,
        spaces: Sequence[Space],
        soft: Loss,
        fingerprint: str,
        samples: NDArray[np.int64],
    ) -> None:
        self._common, self._spaces, self._soft, self._samples = model.common, spaces, soft, samples
        self.fingerprint = f"{common_fingerprint(spaces, model.common.weights)} {fingerprint}"

    def __call__(self, output: tuple[Tensor, tuple[Tensor, ...]], ids: Tensor) -> Parted:
        """Return the loss of what `CommonStudent` gives for the samples `ids` (b,)."""
        scores, features = output
        at = self._samples[ids.cpu().numpy()]
        soft = self._soft(scores, ids)
        assert isinstance(soft, Tensor)
        student: dict[str, Tensor] = {}
        teachers: dict[str, list[Tensor]] = {}
        rows: dict[str, list[Tensor | None]] = {}
        for name, space, own in zip(self._common.names, self._spaces, features, strict=True):
            student[name] = space.formed(own)
            told = [_told(tap, at) for tap in space.taps]
            pairs = zip(space.taps, told, strict=True)
            teachers[name] = [space.given(tap, at if t is None else at[t], own.device) for tap, t in pairs]
            rows[name] = [None if t is None else torch.from_numpy(t).to(own.device) for t in told]
        terms = self._common(soft, student, teachers, rows)
        named = {"soft": terms.soft, "mmd": terms.mmd, "reconstruction": terms.reconstruction}
        return Parted(terms.total, {name: term.detach() for name, term in named.items()})


def common_fingerprint(spaces: Sequence[Space], weights: Weights) -> str:
    """Return what tells the features of these spaces, and what they count, from others."""
    found = [[s.student, s.width, s.size, *(tap.fingerprint for tap in s.taps)] for s in spaces]
    return f"common-feature {sha256(canonical_json([found, vars(weights)]))}"


def _told(tap: SiteTap, ids: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Return which of the samples `ids` a site told; None for all. One alone cannot be normalised by, nor compared."""
    known = tap.known[ids]
    if known.all():
        return None
    found = np.flatnonzero(known)
    return found if len(found) > 1 else found[:0]


@torch.no_grad()
def told_of(
    model: CommonStudent,
    spaces: Sequence[Space],
    images: ImageRows,
    samples: NDArray[np.int64],
    preprocessing: Preprocessing,
    device: torch.device,
    batch: int,
) -> list[dict[str, Any]]:
    """Return what the report tells of each trained space: who meets, what reconstruction misses, and a picture.

    `spaces` are those that `model` was made for, `images` those learnt from, `samples` (m,) their pool ids. Each site
    is measured on samples that it told itself, spread evenly, in `batch` of them at least. The networks of a space
    normalise by batch, as they were trained: their running statistics are of student and sites together. Sites whose
    features do not vary, and so had no part, are `still`, and nothing else is told of them. Random
    numbers are not drawn, and the model is left as it was, in evaluation mode.
    """
    model.eval()
    normalise = Normalise(preprocessing, device)
    found = []
    for at, space in enumerate(spaces):
        common = model.common.taps[at]
        assert isinstance(common, CommonFeature)
        drawn, least = max(2, DRAWN // (len(space.taps) + 1)), max(batch, 2)
        vectors: dict[str, list[NDArray[np.float32]]] = {"student": []}
        measured: dict[str, int] = {}
        missed: dict[str, float] = {}
        still: list[str] = []
        places = _spread(np.arange(len(samples)))
        for part, some in _parts(places, least, drawn):
            shaped = normalise(torch.from_numpy(fit_shape(np.array(images[part]), preprocessing)).to(device))
            own = common.brought(space.formed(model(shaped)[1][at].float()))
            with _by_batch(common):
                vectors["student"].append(_unit(common.project(own))[some])
        for number, tap in enumerate(space.taps):
            places = _spread(np.flatnonzero(tap.known[samples]))
            measured[tap.site] = len(places)
            parts = _parts(places, least, drawn)
            if len(places) and not any(varies(common.brought(space.given(tap, samples[p], device))) for p, _ in parts):
                still.append(tap.site)
                continue
            for part, some in _parts(places, least, drawn):
                given = common.brought(space.given(tap, samples[part], device))
                with _by_batch(common):
                    share = common.unexplained(given, number) * len(part) / len(places)
                    vectors.setdefault(f"site {tap.site}", []).append(_unit(common.project(given, number))[some])
                missed[tap.site] = missed.get(tap.site, 0.0) + share
        joined = {who: np.concatenate(held) for who, held in vectors.items() if held}
        found.append(
            {
                "student": space.student,
                "sites": {tap.site: tap.card.name for tap in space.taps},
                "width": common.width,
                "size": space.meeting,
                "averaged": space.averaged,
                "missed": missed,
                "measured": measured,
                "still": still,
                "picture": picture(joined),
            }
        )
    return found


def _spread(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return at most `SHOWN` of `places`, spread evenly; none of one, which cannot be normalised by."""
    some = np.unique(np.linspace(0, len(places) - 1, SHOWN).astype(np.int64))
    return places[some] if len(places) > 1 else places[:0]


def _parts(places: NDArray[np.int64], batch: int, drawn: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Yield `places` by `batch`, and which of them are drawn, `drawn` of all at most.

    The last part takes the rest, so that none is too small to normalise by.
    """
    samples = len(places)
    chosen = np.arange(samples) % max(1, -(-samples // drawn)) == 0
    for start in range(0, max(samples - batch, 0) + 1, batch) if samples else ():
        part = slice(start, start + batch if start + 2 * batch <= samples else samples)
        yield places[part], chosen[part]


@contextmanager
def _by_batch(common: CommonFeature) -> Iterator[None]:
    """Let the networks of a space normalise by batch for a while, without a trace."""
    norms = [module for module in common.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    held = [(norm.training, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (training, norm.momentum, norm.num_batches_tracked) in zip(norms, held, strict=True):
            norm.train(training)


def _unit(common: Tensor) -> NDArray[np.float32]:
    """Return common features as MMD compares them, a sample's as one vector of length 1; large maps averaged first."""
    if common.ndim == 4 and common[0].numel() > MOST_VALUES:
        side = max(1, math.isqrt(MOST_VALUES // common.shape[1]))
        common = nn.functional.adaptive_avg_pool2d(
            common.float(), (min(side, common.shape[2]), min(side, common.shape[3]))
        )
    held: NDArray[np.float32] = nn.functional.normalize(common.float().flatten(1), dim=1).cpu().numpy()
    return held


def need_spaces(spaces: Sequence[Space]) -> None:
    """Raise `StudentError` unless every space has a site."""
    for space in spaces:
        if not space.taps:
            raise StudentError(
                f"No site that answered tells features for the common space at the student's {space.student}",
                hint="Have sites set policy.features, or set student.learning to soft-labels",
            )
