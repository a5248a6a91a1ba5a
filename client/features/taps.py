"""The taps that a site's policy lets out: which layers, as what, and the numbers of each.

Lives here: the policy's names against the teacher's layers, the taps' cards, and their values. Does not live here: what
layers compute (layers), how they are reduced (reducing), how components are learned (bases), and questions about them
(client/encoder).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from consilience.client.features import bases
from consilience.client.features.layers import Layer, Layers, Maps, layers_of
from consilience.client.features.reducing import Basis, averaged, averaged_shape
from consilience.client.teacher import MultiTeacher, Teacher
from consilience.common.cards import (
    MOST_CHANNELS,
    MOST_COMPONENTS,
    MOST_FEATURES,
    ComponentsCard,
    FeaturesCard,
    TapCard,
)
from consilience.common.encoding.features import LARGEST, basis_bytes, pack_basis
from consilience.common.errors import SettingsError, TeacherError
from consilience.common.files import canonical_json, sha256
from consilience.common.pool import Pool
from consilience.common.preprocessing import Images
from consilience.common.settings import EVERY_LAYER, Reduction, SiteSettings

_FIELD = "policy.features.taps"


@dataclass(frozen=True)
class OpenTap:
    """A tap whose features may leave: its card, and how its values are made."""

    card: TapCard
    layers: Layers
    size: int | None
    """As `Reduction.size`."""
    basis: Basis | None
    computed: int
    """Numbers that the layer itself gives for a sample."""

    @property
    def components(self) -> bytes:
        """The principal components as they leave; of a tap that has some (`card.components`)."""
        assert self.basis is not None
        return pack_basis(self.basis.directions, self.basis.mean)

    def values(self, images: Images) -> NDArray[np.float32]:
        """Return (n, `card.values`) finite float32 for (n, H, W, C) uint8, in the order channel, row, column.

        Raises `TeacherError` when the layer gives anything else, or a value that no encoding holds.
        """
        (features,) = self.layers.features(images, [self.card.name])
        return self.rows(features)

    def rows(self, features: Maps) -> NDArray[np.float32]:
        """Return the same for the layer's features (n, C, ...), as they are computed. Raises as `values`."""
        with np.errstate(invalid="ignore", over="ignore"):
            features = averaged(features, self.size)
            if features.shape[1:] != (self.card.channels, *self.card.shape[1:]):
                raise TeacherError(
                    f"Tap {self.card.name!r} gives {features.shape[1:]} a sample; its card says "
                    f"{(self.card.channels, *self.card.shape[1:])}",
                    hint="Let the teacher give the same shape for every image, by preprocessing.size",
                )
            features = features if self.basis is None else self.basis.apply(features)
        rows = np.ascontiguousarray(features.reshape(len(features), -1), np.float32)
        wrong = ~(np.abs(rows) <= LARGEST)  # NaN fails every comparison
        if wrong.any():
            row, place = np.argwhere(wrong)[0]
            raise TeacherError(
                f"Tap {self.card.name!r} gives {rows[row, place]:g} in row {row} of the batch; allowed are finite "
                f"numbers up to {LARGEST:g}",
                hint=f"Leave the tap out of {_FIELD}, or find out what the teacher computes there",
            )
        return rows


@dataclass(frozen=True)
class Allowed:
    """What the policy says of a layer: `shape` is a sample's features as they leave; the basis may not be learned yet.

    `shape` is (C,) or (C, H, W).
    """

    layer: Layer
    reduction: Reduction
    shape: tuple[int, ...]

    @property
    def wanted(self) -> bases.Wanted | None:
        """What is to be learned before the tap can be told; None where channels leave as they are."""
        channels = self.layer.shape[0]
        if self.shape[0] == channels:
            return None
        return bases.Wanted(size=self.reduction.size, channels=channels, shape=self.shape)


@dataclass(frozen=True)
class Found:
    """What a teacher has, and what of it the policy allows, from the input to the output."""

    layers: Layers
    all: tuple[Layer, ...]
    allowed: dict[str, Allowed]
    unknown: tuple[str, ...] = ()
    """What the policy names and the teacher has not; any name there is refused where taps are opened."""


def find(settings: SiteSettings, teacher: Teacher | MultiTeacher, *, lenient: bool = False) -> Found | None:
    """Look at the teacher's layers and at what the policy allows of them; None for a teacher that has none.

    Raises `SettingsError` for a tap that the teacher has not unless `lenient`, and where the settings do not say what
    size images have; `TeacherError`, `PoolError`.
    """
    layers, named = layers_of(teacher), settings.policy.features.taps
    if layers is None:
        if named:
            raise SettingsError(
                f"{settings.name}: field {_FIELD} names {', '.join(named)}; a teacher of kind {settings.teacher.kind} "
                "has no taps here",
                hint="Leave it out: the site then takes part by its labels",
            )
        return None
    every = layers.find(np.zeros((1, *_image_shape(settings, layers)), np.uint8))
    known = [layer.name for layer in every]
    unknown = [name for name in named if name not in {*known, EVERY_LAYER}]
    if EVERY_LAYER in named and not any(layer.layout for layer in every):
        unknown.append(EVERY_LAYER)
    for name in () if lenient else unknown:
        if name == EVERY_LAYER:
            raise SettingsError(
                f"{settings.name}: field {_FIELD}.{name!r} stands for the layers of one of our architectures, which "
                f"the teacher is not; it has: {', '.join(known) or 'none'}",
                hint="Name layers; `consilience site taps` lists them",
            )
        raise SettingsError(
            f"{settings.name}: field {_FIELD}.{name} is no tap of the teacher; it has: {', '.join(known) or 'none'}",
            hint="Name one of these; `consilience site taps` lists them with their shapes",
        )
    allowed = {}
    for layer in every:
        reduction = named.get(layer.name, named.get(EVERY_LAYER) if layer.layout else None)
        if reduction is not None:
            channels, *positions = averaged_shape(layer.shape, reduction.size)
            shape = (min(channels, reduction.channels or channels), *positions)
            allowed[layer.name] = Allowed(layer, reduction, shape)
    return Found(layers, every, allowed, tuple(unknown))


def learn_bases(
    settings: SiteSettings, teacher: Teacher | MultiTeacher, on_images: Callable[[int, int], None] | None = None
) -> tuple[str, ...]:
    """Learn the principal components that the policy lets out; returns the taps that have some, none where none do.

    Returns at once where that was done. Raises what `find` and `bases.learn` raise, and `SettingsError` without pools.
    """
    found = find(settings, teacher) if settings.policy.features.taps else None
    wanted = _wanted(found)
    if found is not None and wanted:
        _check_sizes(settings, found)
        bases.learn(settings, found.layers, _first_pool(settings), wanted, on_images)
    return tuple(wanted)


def open_taps(settings: SiteSettings, teacher: Teacher | MultiTeacher) -> tuple[OpenTap, ...]:
    """Return the taps that the policy lets out, from the input to the output; none where it lets out none.

    Raises what `find` raises, `SettingsError` for a tap that no card can describe, and `TeacherError` when its
    components were not learned, or are of another teacher or pool, or damaged.
    """
    found = find(settings, teacher) if settings.policy.features.taps else None
    if found is None:
        return ()
    _check_sizes(settings, found)
    wanted = _wanted(found)
    held = bases.load(settings, found.layers, _first_pool(settings), wanted) if wanted else {}
    if held is None:
        raise TeacherError(
            f"{settings.name}: the principal components of {', '.join(wanted)} over the first of pools are not learned "
            "for this teacher and this policy",
            hint=bases.AGAIN,
        )
    taps = tuple(_open(settings, found, one, held.get(name)) for name, one in found.allowed.items())
    try:
        FeaturesCard(taps=tuple(tap.card for tap in taps), encodings=settings.policy.features.encodings)
    except ValidationError:
        raise SettingsError(
            f"{settings.name}: field {_FIELD} lets out {len(taps)} taps, more than a site card holds",
            hint="Name at most 256",
        ) from None
    return taps


def kept_shares(settings: SiteSettings, found: Found) -> dict[str, float]:
    """Return tap -> the share of variance that its components hold, of those that are learned. Raises as `load`."""
    wanted = _wanted(found)
    held = bases.load(settings, found.layers, _first_pool(settings), wanted) if wanted and settings.pools else None
    return {name: basis.kept for name, basis in (held or {}).items()}


def _open(settings: SiteSettings, found: Found, allowed: Allowed, basis: Basis | None) -> OpenTap:
    layer, told = allowed.layer, None
    if basis is not None:
        packed = pack_basis(basis.directions, basis.mean)
        told = ComponentsCard(number=allowed.shape[0], kept=basis.kept, bytes=len(packed), digest=sha256(packed))
    parts = {  # the shape decides how maps are averaged
        "kind": "features",
        "teacher": found.layers.fingerprint,
        "tap": layer.name,
        "channels": layer.shape[0],
        "shape": allowed.shape,
        "components": None if told is None else told.digest,
    }
    try:
        card = TapCard(
            name=layer.name,
            layout=layer.layout,
            shape=allowed.shape,
            channels=layer.shape[0],
            components=told,
            fingerprint=sha256(canonical_json(parts)),
        )
    except ValidationError as error:
        raise SettingsError(
            f"{settings.name}: field {_FIELD}.{layer.name} is no tap that a site card describes: "
            f"{error.errors()[0]['msg']}",
            hint="Name another, or find out what the teacher computes there",
        ) from error
    return OpenTap(card, found.layers, allowed.reduction.size, basis, math.prod(layer.shape))


def _check_sizes(settings: SiteSettings, found: Found) -> None:
    """Raise `SettingsError` for taps that no card can describe, which their shapes tell before anything is learned."""
    for name, one in found.allowed.items():
        if max(*one.shape, one.layer.shape[0]) > MOST_CHANNELS or math.prod(one.shape) > MOST_FEATURES:
            raise SettingsError(
                f"{settings.name}: field {_FIELD}.{name}: features of shape {one.shape} from "
                f"{one.layer.shape[0]:,} channels are more than a site card describes: {MOST_FEATURES:,} numbers, of a "
                f"layer of {MOST_CHANNELS:,} channels",
                hint="Give the tap a smaller size or fewer channels, or name another",
            )
    sizes = {name: basis_bytes(one.shape[0], one.channels) for name, one in _wanted(found).items()}
    if sum(sizes.values()) > MOST_COMPONENTS:
        told = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        raise SettingsError(
            f"{settings.name}: field {_FIELD}: principal components are {sum(sizes.values()):,} bytes ({told}); "
            f"allowed are {MOST_COMPONENTS:,}, which one message holds",
            hint="Give these taps fewer channels, or name fewer",
        )


def _wanted(found: Found | None) -> dict[str, bases.Wanted]:
    allowed = {} if found is None else found.allowed
    return {name: one.wanted for name, one in allowed.items() if one.wanted is not None}


def _first_pool(settings: SiteSettings) -> Pool:
    if not settings.pools:
        raise SettingsError(
            f"{settings.name}: field 'pools' is not given, and {_FIELD} asks for principal components, which are of "
            "the first pool",
            hint="Name the pool, or leave channels out",
        )
    return Pool.open(settings.pools[0])


def _image_shape(settings: SiteSettings, layers: Layers) -> tuple[int, int, int]:
    """Return (H, W, C) of the images that the teacher is asked about: of the first pool, else as it takes them."""
    if settings.pools:
        return Pool.open(settings.pools[0]).shape
    used = layers.preprocessing
    if used.size is None or used.channels is None:
        raise SettingsError(
            f"{settings.name}: field 'pools' is not given, nor preprocessing.size and preprocessing.channels, and the "
            "shapes of features follow from the images'",
            hint="Name the pool",
        )
    return (*used.size, used.channels)
