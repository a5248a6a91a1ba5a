"""Sharing one labelled data set out among a pool and simulated sites.

Lives here: which image goes where, by seed alone. Does not live here: reading images or making sites' folders
(deploy/simulation).

Flower Datasets shares out by Dirichlet for us; its other partitioners do not fit. The pathological one fixes the
number of classes a site has but neither takes a list nor promises that every class has an owner or how many, and the
size-based ones share out images without regard to class, so a site's class list would not be honoured. None sets a
pool aside.

Quantity skew: every site draws a weight, exp(sigma * z) with z standard normal, and the owners of a class share its
images in proportion to their weights (under Dirichlet, in expectation). Each owner gets at least one image of each
of its classes, so a skew changes sizes but never class lists. A class with one owner goes to it whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.common.errors import MissingExtraError, SettingsError
from consilience.common.settings import (
    ClassLists,
    DirichletPartition,
    PartitionSettings,
    RandomClasses,
    Simulation,
)

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Partition:
    """Who gets which image. All id arrays are int64, index the data set, and share no id.

    `pool` is in random order, because an order by class would tell the labels; each of `sites` ascends.
    `classes[i]` are the indices of the classes that site i has images of, ascending. `counts` (sites, classes)
    int64 counts site i's images of each class. Images of classes that no site owns are in the pool or unused.
    """

    pool: Ids
    sites: tuple[Ids, ...]
    classes: tuple[tuple[int, ...], ...]
    counts: Ids


class Purpose(IntEnum):
    """One random stream each, so that a change in one choice leaves the others as they were."""

    POOL = 0
    POOL_ORDER = 1
    CLASSES = 2
    SIZES = 3
    IMAGES = 4
    DIRICHLET = 5


def partition(
    labels: NDArray[np.integer[Any]], class_names: Sequence[str], simulation: Simulation, seed: int
) -> Partition:
    """Share out the images with `labels` (n,), numbers into `class_names`, as `simulation` says.

    The pool takes `pool_share` of the images, and of each class to within one image. The result depends on the
    arguments alone. Raises `SettingsError` when a class list names no class or one twice, or when a site would get
    no image; `MissingExtraError` when flwr-datasets is needed but not installed.
    """
    truth = labels.astype(np.int64)
    streams = Streams(seed)
    pool, private = _draw_pool(truth, len(class_names), simulation.pool_share, streams)
    scheme = simulation.partition
    sites, images = number_of_sites(scheme), sum(map(len, private))
    if sites > images:
        raise SettingsError(
            f"simulation.partition makes {sites} sites; there are {images} private images, so a site would get none",
            hint="Lower the number of sites or simulation.pool_share, or name more data",
        )
    weights = site_weights(sites, simulation.quantity_skew, streams)
    if isinstance(scheme, DirichletPartition):
        owners = _dirichlet(truth, private, class_names, scheme, weights, streams)
    else:
        if isinstance(scheme, RandomClasses):
            lists = random_lists(np.flatnonzero([len(ids) for ids in private]), scheme, streams)
        else:
            lists = named_lists(scheme, class_names)
        owners = _share_classes(private, lists, weights, class_names)
    held = tuple(np.sort(np.concatenate(parts)) for parts in zip(*owners, strict=True))
    counts = np.array([np.bincount(truth[ids], minlength=len(class_names)) for ids in held], np.int64)
    classes = tuple(tuple(np.flatnonzero(row).tolist()) for row in counts)
    return Partition(pool, held, classes, counts)


def number_of_sites(scheme: PartitionSettings) -> int:
    """Return how many sites a partition makes."""
    return len(scheme.classes) if isinstance(scheme, ClassLists) else scheme.sites


class Streams:
    """Independent random generators from one seed, one for each purpose."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def generator(self, purpose: Purpose) -> np.random.Generator:
        """Return the generator of one purpose, from its beginning."""
        return np.random.default_rng(self._sequence(purpose))

    def number(self, purpose: Purpose) -> int:
        """A seed for a library that takes a number."""
        return int(self._sequence(purpose).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _sequence(self, purpose: Purpose) -> np.random.SeedSequence:
        return np.random.SeedSequence(self._seed, spawn_key=(int(purpose),))


def _draw_pool(labels: Ids, n_classes: int, share: float, streams: Streams) -> tuple[Ids, list[Ids]]:
    """Return the pool's ids in random order, and each class's other ids in random order."""
    members = [np.flatnonzero(labels == k) for k in range(n_classes)]
    total = round(share * len(labels))
    if not 0 < total < len(labels):
        raise SettingsError(
            f"simulation.pool_share is {share}: of {len(labels)} images it makes a pool of {total}; "
            "allowed: at least one image in the pool and one outside it",
            hint="Change simulation.pool_share, or name more data",
        )
    taken = apportion(total, np.array([len(ids) for ids in members], np.float64))
    chooser, dealer = streams.generator(Purpose.POOL), streams.generator(Purpose.IMAGES)
    mixed = [chooser.permutation(ids) for ids in members]
    pool = np.concatenate([ids[:n] for ids, n in zip(mixed, taken, strict=True)])
    private = [dealer.permutation(np.sort(ids[n:])) for ids, n in zip(mixed, taken, strict=True)]
    return streams.generator(Purpose.POOL_ORDER).permutation(pool), private


def apportion(total: int, weights: NDArray[np.float64]) -> Ids:
    """Split `total` into whole numbers in proportion to `weights`, each within one of its share (largest remainder)."""
    exact = total * (weights / weights.sum())
    whole: Ids = np.floor(exact).astype(np.int64)
    # Stable: of equal remainders the first wins, on every machine.
    largest = np.argsort(whole - exact, kind="stable")
    whole[largest[: total - int(whole.sum())]] += 1
    return whole


def site_weights(sites: int, sigma: float, streams: Streams) -> NDArray[np.float64]:
    """Return each site's share of what it shares with others, (sites,), summing to 1."""
    weights = np.exp(sigma * streams.generator(Purpose.SIZES).standard_normal(sites))
    return np.asarray(weights / weights.sum(), np.float64)


def named_lists(scheme: ClassLists, class_names: Sequence[str]) -> list[Ids]:
    """Return each site's classes as indices, in the order of the label numbers."""
    number = {name: k for k, name in enumerate(class_names)}
    lists = []
    for site, named in enumerate(scheme.classes):
        field = f"simulation.partition.classes.{site}"
        if not named:
            raise SettingsError(f"{field} is empty", hint="Give the site a class, or remove the list")
        found = []
        for name in named:
            k = number.get(name, -1) if isinstance(name, str) else name
            if not 0 <= k < len(class_names):
                raise SettingsError(
                    f"{field} holds {name!r}; allowed: {_some(class_names)}, or 0 to {len(class_names) - 1}",
                    hint="Correct the class",
                )
            if k in found:
                raise SettingsError(f"{field} holds class {class_names[k]!r} twice", hint="Name it once")
            found.append(k)
        lists.append(np.sort(np.array(found, np.int64)))
    return lists


def random_lists(present: Ids, scheme: RandomClasses, streams: Streams) -> list[Ids]:
    """Return random lists of as many classes each, every class in at least one of them.

    The number of classes a site is what brings the mean number of owners nearest to `overlap`, among those that let
    every class have an owner.
    """
    if scheme.overlap > scheme.sites:
        raise SettingsError(
            f"simulation.partition.overlap is {scheme.overlap}: a class cannot have more owners than there are sites; "
            f"allowed: 1 to {scheme.sites}",
            hint="Lower overlap or raise sites",
        )
    n = len(present)
    least = -(-n // scheme.sites)
    each = min(max(int(np.floor(scheme.overlap * n / scheme.sites + 0.5)), least), n)
    generator = streams.generator(Purpose.CLASSES)
    # Deal all classes like cards, so that none is left without an owner; then fill every hand.
    mixed = generator.permutation(present)
    lists = []
    for site in range(scheme.sites):
        dealt = mixed[site :: scheme.sites]
        others = np.setdiff1d(present, dealt)
        filled = np.concatenate([dealt, generator.choice(others, each - len(dealt), replace=False)])
        lists.append(np.sort(filled))
    return lists


def _share_classes(
    private: list[Ids], lists: list[Ids], weights: NDArray[np.float64], class_names: Sequence[str]
) -> list[list[Ids]]:
    """Return owners[class][site], the ids of a class that a site gets: one to each owner, the rest by weight."""
    shared = []
    for k, ids in enumerate(private):
        owns = np.array([k in classes for classes in lists])
        sizes = np.zeros(len(lists), np.int64)
        if owns.any():
            spare = len(ids) - int(owns.sum())
            if spare < 0:
                raise SettingsError(
                    f"simulation.partition: class {class_names[k]!r} has {len(ids)} private images "
                    f"for {owns.sum()} sites that know it, so a site would get none",
                    hint="Lower simulation.pool_share, let fewer sites know the class, or name more data",
                )
            sizes[owns] = 1 + apportion(spare, weights[owns])
        shared.append(np.split(ids, np.cumsum(sizes))[: len(lists)])
    return shared


def _dirichlet(
    labels: Ids,
    private: list[Ids],
    class_names: Sequence[str],
    scheme: DirichletPartition,
    weights: NDArray[np.float64],
    streams: Streams,
) -> list[list[Ids]]:
    """Return owners[class][site], drawn by Flower Datasets' DirichletPartitioner.

    A class with fewer than `min_images` at a site is dropped there; its images go to the site that has most of the
    class, so that none is lost and every class keeps an owner.
    """
    try:
        # Here and not above: it takes seconds to import, and is optional. Neither import opens a connection; Flower
        # Datasets' telemetry is in FederatedDataset, which downloads and which we do not use.
        from datasets import Dataset
        from flwr_datasets.partitioner import DirichletPartitioner
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"simulation.partition.kind is dirichlet, which needs the module {error.name}",
            hint="pip install 'consilience[partition]'",
        ) from error
    for name, held in zip(class_names, private, strict=True):
        if 0 < len(held) < scheme.min_images:
            raise SettingsError(
                f"simulation.partition.min_images is {scheme.min_images}; class {name!r} has only {len(held)} private "
                f"images; allowed: 1 to {min(len(ids) for ids in private if len(ids))}",
                hint="Lower min_images or simulation.pool_share",
            )
    mixed = np.concatenate(private)
    # Bounds far outside what makes a difference: they keep every alpha a finite, positive number.
    alphas = np.maximum(min(max(scheme.alpha, 1e-100), 1e100) * weights * scheme.sites, 1e-200)
    partitioner = DirichletPartitioner(
        num_partitions=scheme.sites,
        partition_by="label",
        alpha=alphas,
        # Its own way to a minimum is to draw again, with a warning, ten times; ours is above.
        min_partition_size=0,
        shuffle=False,
        seed=streams.number(Purpose.DIRICHLET),
    )
    partitioner.dataset = Dataset.from_dict({"id": mixed, "label": labels[mixed]})
    drawn = [np.array(partitioner.load_partition(site)["id"], np.int64) for site in range(scheme.sites)]
    owners = [_drop_few([ids[labels[ids] == k] for ids in drawn], scheme.min_images) for k in range(len(private))]
    for site in range(scheme.sites):
        if not any(len(held[site]) for held in owners):
            raise SettingsError(
                f"simulation.partition: site {site + 1} of {scheme.sites} would get no image: "
                f"no class has min_images ({scheme.min_images}) images there",
                hint="Raise alpha, lower sites, min_images or simulation.quantity_skew, or use another seed",
            )
    return owners


def _drop_few(held: list[Ids], least: int) -> list[Ids]:
    """Move the images of sites that have fewer than `least` of a class to the site that has most of it."""
    sizes = np.array([len(ids) for ids in held])
    few, most = sizes < least, int(sizes.argmax())
    few[most] = False
    given = np.concatenate([held[most], *(ids for ids, drop in zip(held, few, strict=True) if drop)])
    nothing = np.empty(0, np.int64)
    return [given if i == most else nothing if drop else held[i] for i, drop in enumerate(few)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:20])} ... ({len(names)} names)"
