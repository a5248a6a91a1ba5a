"""Layer-wise amalgamation in a job: from the sites' stored features to a student whose every layer has learnt.

Lives here: each layer's amalgamated features, computed a block at a time, and what layers learn from. Does not live
here: the autoencoder (autoencoder, amalgamate), a layer's training and folding (layer_wise, folding), the joint phase,
which is the training loop (common/nets).

Amalgamated features are in units of their own root mean square deviation: an encoder may be any invertible map of the
best one, and with all layers in one unit one learning rate does for all of them. Layers learn from the samples that
every site with taps told at every tap; sites without taps have their part in the scores, by what they answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from consilience.common.errors import StudentError
from consilience.common.files import canonical_json, sha256
from consilience.common.moments import Features, Moments
from consilience.common.nets.losses import Loss
from consilience.common.nets.seeding import generator
from consilience.common.nets.tapped import Tapped
from consilience.common.nets.taps import SCORES, taps
from consilience.common.preprocessing import ImageRows, preprocess
from consilience.common.seeds import derive
from consilience.common.settings import LayerWise, Preprocessing
from consilience.server.student.amalgamate import concatenated, direct, incremental, incremental_descent
from consilience.server.student.autoencoder import Affine, Autoencoder, descended
from consilience.server.student.folding import settle
from consilience.server.student.kept import keep, kept
from consilience.server.student.layer_wise import Schedule, kept_adapter, train_layers
from consilience.server.student.picture import picture
from consilience.server.student.scores import SCORE_LAYER_RATE
from consilience.server.student.site_taps import SiteTap, in_blocks, told_by_all

DESCENT_RATE = 0.05
"""Learning rate of `descent` where the largest variance along any direction is 1."""
DRAWN = 500
"""Samples in the picture."""


@dataclass(frozen=True)
class LayerTaps:
    """The tap of one name of every site that tells it, all of one size."""

    name: str
    taps: tuple[SiteTap, ...]

    @property
    def channels(self) -> list[int]:
        """Each site's."""
        return [tap.card.channels for tap in self.taps]

    def features(self, ids: NDArray[np.int64]) -> Features:
        """Return X of the samples `ids`, pool ids: (b, sum C_i, H, W) float32."""
        return concatenated([tap.channels(ids) for tap in self.taps])

    def block_values(self) -> int:
        """Return how many numbers a sample is."""
        return sum(self.channels) * int(np.prod(self.taps[0].card.shape[1:]))


@dataclass(frozen=True)
class Amalgamated:
    """One layer's amalgamated features: how they come from the sites', and what they keep of those."""

    layer: LayerTaps
    encoder: Affine
    explained: float
    by_site: Mapping[str, float]

    def __call__(self, ids: NDArray[np.int64]) -> Features:
        """Return F_a of the samples `ids`, pool ids: (b, w, H, W) float32."""
        return self.encoder(self.layer.features(ids))


def amalgamated(
    layer: LayerTaps,
    width: int,
    ids: NDArray[np.int64],
    settings: LayerWise,
    *,
    seed: int,
    batch: int,
    device: torch.device,
) -> Amalgamated:
    """Amalgamate a layer's features of the samples `ids` into `width` channels, in two passes at most by `principal`.

    Raises `StudentError` for a width that is not in [1, sum C_i] and for features that are not finite.
    """
    moments = Moments(sum(layer.channels))
    for part in in_blocks(ids, layer.block_values()):
        moments.update(layer.features(part))
    steps = [min(width, seen) for seen in np.cumsum(layer.channels)[1:].tolist()]
    one_by_one = settings.order == "incremental" and len(steps) > 0
    if settings.autoencoder == "principal":
        found = incremental(moments, layer.channels, steps) if one_by_one else direct(moments, width)
    else:
        # In units in which the largest variance is 1, one rate does for features of any size.
        unit = 1 / np.sqrt(max(float(np.linalg.eigvalsh(moments.covariance)[-1]), 1e-12))
        scaled = _Scaled(layer, ids, unit, batch)
        epochs, drawn = settings.epochs, derive(seed, layer.name)
        if one_by_one:
            found = incremental_descent(
                scaled, layer.channels, steps, epochs=epochs, learning_rate=DESCENT_RATE, seed=drawn, device=device
            )
        else:
            found = descended(
                scaled, len(moments.mean), width, epochs=epochs, learning_rate=DESCENT_RATE, seed=drawn, device=device
            )
        found = Autoencoder(
            Affine(found.encoder.weight * unit, found.encoder.bias),
            Affine(found.decoder.weight / unit, found.decoder.bias / unit),
            found.error / unit**2,
            found.explained,
        )
    spread = np.trace(moments.through(found.encoder.weight, found.encoder.bias).covariance) / width
    per = 1 / np.sqrt(spread) if spread > 0 else 1.0
    encoder = Affine(found.encoder.weight * per, found.encoder.bias * per)
    return Amalgamated(layer, encoder, found.explained, _by_site(layer, found, moments))


def _by_site(layer: LayerTaps, found: Autoencoder, moments: Moments) -> dict[str, float]:
    """Return the share of each site's variance that is kept: in [0, 1]; 1 where there is none."""
    both = found.decoder.after(found.encoder)
    residual = moments.through(both.weight - np.eye(len(moments.mean)), both.bias)
    lost, held = np.diag(residual.covariance) + residual.mean**2, np.diag(moments.covariance)
    cuts = np.cumsum(layer.channels)[:-1]
    kept = {}
    for tap, missed, total in zip(layer.taps, np.split(lost, cuts), np.split(held, cuts), strict=True):
        kept[tap.site] = min(1.0, max(0.0, 1 - float(missed.sum() / total.sum()))) if total.sum() else 1.0
    return kept


class _Scaled:
    """A layer's features in other units, a batch at a time, as often as wanted."""

    def __init__(self, layer: LayerTaps, ids: NDArray[np.int64], unit: float, batch: int) -> None:
        self._layer, self._ids, self._unit, self._batch = layer, ids, np.float32(unit), batch

    def __iter__(self) -> Iterator[Features]:
        for start in range(0, len(self._ids), self._batch):
            yield self._layer.features(self._ids[start : start + self._batch]) * self._unit


class _Pairs:
    """A layer's inputs and targets, a batch at a time, each time in another order, which the seed and the time say.

    `given` and `wanted` take places in the samples that are learnt from. A last, partial batch is left out, as in the
    training loop, unless it is the only one: each time of other samples.
    """

    def __init__(
        self,
        given: Callable[[NDArray[np.int64]], Features],
        wanted: Callable[[NDArray[np.int64]], NDArray[Any]],
        places: NDArray[np.int64],
        batch: int,
        seed: int,
    ) -> None:
        self._given, self._wanted, self._places, self._batch = given, wanted, places, batch
        self._seed, self._times = seed, 0

    def __iter__(self) -> Iterator[tuple[Features, NDArray[Any]]]:
        self._times += 1
        return self._read(self._times - 1)

    def _read(self, time: int) -> Iterator[tuple[Features, NDArray[Any]]]:
        mixed = self._places[torch.randperm(len(self._places), generator=generator(self._seed, "layers", time)).numpy()]
        for start in range(0, max(len(mixed) - self._batch, 0) + 1, self._batch):
            part = mixed[start : start + self._batch]
            yield self._given(part), self._wanted(part)


def need_layers(layers: Sequence[LayerTaps]) -> None:
    """Raise `StudentError` unless the same sites, one at least, tell every layer."""
    sites = [[tap.site for tap in layer.taps] for layer in layers]
    if not sites[0] or any(each != sites[0] for each in sites):
        names = ", ".join(f"{layer.name} {len(layer.taps)}" for layer in layers)
        raise StudentError(
            f"Layer-wise amalgamation takes every layer of the same sites; so many sites answered about each: {names}",
            hint="Run the same command again to ask for the rest, or set student.learning to soft-labels",
        )


class LayerLesson:
    """All that the layers of one student learn from.

    `layers` are the sites' taps in the student's order, the scores left out; `scores` is the loss that the score layer
    learns by, `fingerprint` what it stands for. `samples` (m,): training's sample j is the pool's samples[j].
    `architecture` names the student, whose widths features are amalgamated to.
    """

    def __init__(
        self,
        layers: Sequence[LayerTaps],
        scores: Loss,
        fingerprint: str,
        samples: NDArray[np.int64],
        settings: LayerWise,
        preprocessing: Preprocessing,
        *,
        architecture: str,
        batch: int,
        seed: int,
    ) -> None:
        """Raises `StudentError` when fewer than two samples were told by every site at every tap."""
        self._layers, self._scores, self._samples, self._settings = layers, scores, samples, settings
        self._preprocessing, self._seed = preprocessing, seed
        self.places = told_by_all([tap for layer in layers for tap in layer.taps], samples)
        if len(self.places) < 2:
            raise StudentError(
                f"Features of every layer were told for {len(self.places)} samples that can be learnt from; layer-wise "
                "amalgamation needs two at least",
                hint="Run the same command again to ask for the rest",
            )
        self._batch = min(batch, len(self.places))
        told = [[layer.name, *(tap.fingerprint for tap in layer.taps)] for layer in layers]
        about = settings.model_dump(mode="json", exclude={"joint"})
        rest = [preprocessing.model_dump(mode="json"), architecture, batch, seed]
        self.fingerprint = f"layer-wise {sha256(canonical_json([told, about, *rest]))} {fingerprint}"

    def teach(
        self,
        student: nn.Module,
        images: ImageRows,
        folder: Path,
        device: torch.device,
        *,
        workers: int = 1,
        on_layer: Callable[[], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Train every layer of `student`, join them and settle its batch normalisation; return what the report tells.

        `images` (m, H, W, C) are those learnt from. Finished layers are kept in `folder`, so that a second call goes
        on. The student is left on `device` in evaluation mode. Raises `StudentError`, `StorageError`.
        """
        wanted = [
            self._amalgamated(layer, tap.channels, folder, device)
            for layer, tap in zip(self._layers, taps(student), strict=False)
        ]
        joined = folder / "joined.safetensors"
        if (found := kept(joined, self.fingerprint)) is not None:
            # Not folded again: on a GPU another fold need not be the same to the last bit.
            student.load_state_dict(found[0])
            student.to(device).eval()
            told: list[dict[str, Any]] = found[1]
            return told
        rate, epochs = self._settings.learning_rate, self._settings.epochs
        inputs: list[Callable[[NDArray[np.int64]], Features]] = [
            lambda part: preprocess(np.array(images[part]), self._preprocessing)
        ]
        inputs += [self._of(each) for each in wanted]
        targets: list[Callable[[NDArray[np.int64]], NDArray[Any]]] = [*inputs[1:], lambda part: part]
        pairs = [
            _Pairs(each, to, self.places, self._batch, self._seed) for each, to in zip(inputs, targets, strict=True)
        ]
        times = SCORE_LAYER_RATE if self._settings.target == "concatenated" else 1.0
        schedules = [Schedule(epochs, rate)] * len(wanted) + [Schedule(epochs, rate * times, self._scores)]
        losses = train_layers(
            student,
            pairs,
            schedules,
            device=device,
            workers=workers,
            folder=folder,
            key=self.fingerprint,
            on_layer=on_layer,
        )
        settle(student, (inputs[0](part) for part in in_blocks(self.places, 1, self._batch)))
        told = [
            {
                "tap": each.layer.name,
                "channels": {tap.site: tap.card.channels for tap in each.layer.taps},
                "components": {tap.site: held.kept for tap in each.layer.taps if (held := tap.card.components)},
                "width": len(each.encoder.bias),
                "explained": each.explained,
                "by_site": dict(each.by_site),
                "losses": lost,
            }
            for each, lost in zip(wanted, losses, strict=False)
        ]
        told.append({"tap": SCORES, "losses": losses[-1]})
        keep(joined, self.fingerprint, student.state_dict(), told)
        return told

    def _of(self, made: Amalgamated) -> Callable[[NDArray[np.int64]], Features]:
        return lambda part: made(self._samples[part])

    def _amalgamated(self, layer: LayerTaps, width: int, folder: Path, device: torch.device) -> Amalgamated:
        """Amalgamate a layer, unless it lies in `folder`."""
        path, ids = folder / f"{layer.name}-encoder.safetensors", self._samples[self.places]
        if (found := kept(path, self.fingerprint)) is not None:
            encoder = Affine(found[0]["weight"].numpy(), found[0]["bias"].numpy())
            return Amalgamated(layer, encoder, found[1]["explained"], found[1]["by_site"])
        made = amalgamated(layer, width, ids, self._settings, seed=self._seed, batch=self._batch, device=device)
        tensors = {"weight": torch.from_numpy(made.encoder.weight), "bias": torch.from_numpy(made.encoder.bias)}
        keep(path, self.fingerprint, tensors, {"explained": made.explained, "by_site": dict(made.by_site)})
        return made

    @torch.no_grad()
    def picture(
        self, student: nn.Module, images: ImageRows, folder: Path, device: torch.device
    ) -> dict[str, Any] | None:
        """Return a picture of the last layer before the scores: the amalgamated features and the student's own.

        The score layer's FAM was folded into the student's layer, so the amalgamated features go through it too: both
        are then the same thing, or would be. None where that FAM is no longer in `folder`.
        """
        layer, adapter = self._layers[-1], kept_adapter(folder, SCORES, self.fingerprint)
        if adapter is None:
            return None
        best = self._amalgamated(layer, taps(student)[-2].channels, folder, device)
        some = self.places[np.unique(np.linspace(0, len(self.places) - 1, DRAWN).astype(np.int64))]
        tapped = Tapped(student.eval(), [layer.name])
        vectors: dict[str, list[NDArray[np.floating]]] = {"amalgamated": [], "student": []}
        for part in in_blocks(some, 1, 64):
            shaped = torch.from_numpy(preprocess(np.array(images[part]), self._preprocessing)).to(device)
            vectors["student"].append(tapped(shaped)[1][0].float().mean(dim=(2, 3)).cpu().numpy())
            vectors["amalgamated"].append(adapter(best(self._samples[part])).mean(axis=(2, 3)))
        return picture({who: np.concatenate(held) for who, held in vectors.items()})
