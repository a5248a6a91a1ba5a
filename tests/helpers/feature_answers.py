"""Networks whose scores and features stand in stores, as sites would have sent them, for tests of the server's side."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from flwr.app import RecordDict
from numpy.typing import NDArray
from torch import nn

from consilience.common.cards import ComponentsCard, FeaturesCard, TapCard
from consilience.common.encoding import encode, encode_features
from consilience.common.encoding.features import pack_basis
from consilience.common.files import sha256
from consilience.common.nets import build
from consilience.common.nets.tapped import Tapped, tap_layouts, tap_shapes
from consilience.common.preprocessing import preprocess
from consilience.common.protocol import Answer, Question
from consilience.common.settings import FeatureEncoding, Preprocessing
from consilience.server.answers import AnswerStore
from consilience.server.answers_about import About
from consilience.server.student.site_taps import SiteTap
from helpers.sites import Handler, honest

PLAIN = Preprocessing()
Basis = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Directions and means of principal components."""
POOL, POLICY = "a" * 64, "c" * 16


def images(count: int, seed: int = 0, side: int = 16) -> NDArray[np.uint8]:
    """Smooth noise, (count, side, side, 1)."""
    drawn = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 1), np.uint8)
    return drawn.repeat(side // 4, axis=1).repeat(side // 4, axis=2)


def teacher(architecture: str, seed: int, classes: int = 3) -> nn.Module:
    """A network whose batch normalisation has seen images, in evaluation mode."""
    return copy.deepcopy(_teacher(architecture, seed, classes))


@functools.cache
def _teacher(architecture: str, seed: int, classes: int) -> nn.Module:
    made = build(architecture, classes=classes, channels=1, seed=seed)
    with torch.no_grad():
        for _ in range(20):
            made(torch.from_numpy(preprocess(images(32, 9), PLAIN)))
    return made.eval()


def features(network: nn.Module, pixels: NDArray[np.uint8], names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Every tap's features of the images."""
    with torch.no_grad():
        found = Tapped(network, names)(torch.from_numpy(preprocess(pixels, PLAIN)))[1]
    return {name: each.numpy() for name, each in zip(names, found, strict=True)}


def log_probs(network: nn.Module, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The network's answers."""
    with torch.no_grad():
        return torch.log_softmax(network(torch.from_numpy(preprocess(pixels, PLAIN))), dim=1).numpy()


def tap_cards(network: nn.Module, site: str, names: Sequence[str] | None = None, side: int = 16) -> tuple[TapCard, ...]:
    """What a site's card says of its taps, by default of its layers."""
    shapes, layouts = tap_shapes(network, torch.zeros(2, 1, side, side)), tap_layouts(network)
    return tuple(
        TapCard(
            name=name,
            layout=layouts[name].unit if name in layouts else "",
            shape=shapes[name],
            channels=shapes[name][0],
            fingerprint=sha256(f"{site} {name}".encode()),
        )
        for name in names or layouts
    )


def stored(
    folder: Path,
    site: str,
    card: TapCard,
    values: NDArray[np.float32],
    encoding: FeatureEncoding = "f16",
    upto: int = -1,
) -> SiteTap:
    """A site's features in a store, (n, *card.shape); with `upto`, of the first samples alone."""
    about = About(
        site=site,
        pool=POOL,
        size=len(values),
        teacher=card.fingerprint,
        policy=POLICY,
        kind="features",
        encoding=encoding,
        classes=card.values,
    )
    store = AnswerStore(folder / f"{site}-{card.name}", about)
    told = len(values) if upto < 0 else upto
    for start in range(0, told, 16):
        stop = min(start + 16, told)
        question = Question(
            job="job",
            pool=POOL,
            start=start,
            stop=stop,
            kind="features",
            encoding=encoding,
            teacher=card.fingerprint,
            policy=POLICY,
        )
        store.append(Answer(question, encode_features(values[start:stop].reshape(stop - start, -1), encoding), 0.1))
    return SiteTap(site, card, store)


def in_components(
    network: nn.Module, pixels: NDArray[np.uint8], cards: Sequence[TapCard], number: int
) -> tuple[tuple[TapCard, ...], dict[str, Basis]]:
    """The same taps as `number` principal components of the images' features, and tap -> these components."""
    changed, bases = [], {}
    for card, values in zip(cards, features(network, pixels, [card.name for card in cards]).values(), strict=True):
        rows = np.moveaxis(values, 1, -1).reshape(-1, card.channels)
        mean = rows.mean(axis=0)
        directions = np.linalg.svd(rows - mean, full_matrices=False)[2][:number]
        bases[card.name] = directions, mean
        data = pack_basis(directions, mean)
        told = ComponentsCard(number=number, kept=0.9, bytes=len(data), digest=sha256(data))
        changed.append(card.model_copy(update={"shape": (number, *card.shape[1:]), "components": told}))
    return tuple(changed), bases


def telling(
    network: nn.Module, pixels: NDArray[np.uint8], cards: Sequence[TapCard], bases: Mapping[str, Basis] | None = None
) -> Handler:
    """A site that answers about the images by a network, and tells the features of `cards`; of `bases`, components."""
    answers = log_probs(network, pixels)
    told = features(network, pixels, [card.name for card in cards]) if cards else {}
    for name, (directions, mean) in (bases or {}).items():
        centred = np.moveaxis(told[name], 1, -1) - mean
        told[name] = np.ascontiguousarray(np.moveaxis(centred @ directions.T, -1, 1), np.float32)

    def handler(question: Question, attempt: int) -> RecordDict:
        rows = question.ids
        if question.kind == "features":
            card = next(card for card in cards if card.fingerprint == question.teacher)
            values = told[card.name][rows].reshape(len(question), -1)
            data = encode_features(values, cast(FeatureEncoding, question.encoding))
        elif question.kind == "log-probs":
            data = encode(answers[rows], question.encoding)
        else:
            return honest(question, attempt)
        return Answer(question, data, 0.1).to_content()

    return handler


def features_card(cards: Sequence[TapCard]) -> FeaturesCard:
    """What a site's card says of its features."""
    return FeaturesCard(taps=tuple(cards), encodings=("f16", "u8"))
