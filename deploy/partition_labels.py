"""Sharing one multi-label data set out among a pool and simulated sites.

Every image goes to one place, by seed alone, whatever labels it has; a site's images tell of the labels on its list
alone, so that an image may have none of them. Does not live here: data with one label an image (partition).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from consilience.common.errors import SettingsError
from consilience.common.settings import DirichletPartition, RandomClasses, Simulation
from consilience.deploy.partition import (
    Partition,
    Purpose,
    Streams,
    apportion,
    named_lists,
    number_of_sites,
    random_lists,
    site_weights,
)


def partition_labels(
    many: NDArray[np.int8], class_names: Sequence[str], simulation: Simulation, seed: int
) -> Partition:
    """Share out the images with labels (n, L): the pool takes `pool_share`, the sites the rest, by weight.

    `counts` are images that a label applies to. Raises `SettingsError` for a Dirichlet partition, when a class list
    names no label or one twice, when a site would get no image, or no image with a label of its list.
    """
    scheme = simulation.partition
    if isinstance(scheme, DirichletPartition):
        raise SettingsError(
            "simulation.partition.kind is 'dirichlet', which shares out images of one label each",
            hint="Set it to class-lists or random-classes",
        )
    streams, sites = Streams(seed), number_of_sites(scheme)
    order = streams.generator(Purpose.POOL).permutation(len(many)).astype(np.int64)
    taken = round(simulation.pool_share * len(many))
    if not 0 < taken <= len(many) - sites:
        raise SettingsError(
            f"simulation.pool_share is {simulation.pool_share}: of {len(many)} images it makes a pool of {taken}; "
            f"allowed: at least one image in the pool and one for each of {sites} sites outside it",
            hint="Change simulation.pool_share, or name more data",
        )
    if isinstance(scheme, RandomClasses):
        lists = random_lists(np.flatnonzero((many > 0).any(axis=0)), scheme, streams)
    else:
        lists = named_lists(scheme, class_names)
    weights = site_weights(sites, simulation.quantity_skew, streams)
    sizes = 1 + apportion(len(many) - taken - sites, weights)
    held = tuple(np.sort(ids) for ids in np.split(order[taken:], np.cumsum(sizes)[:-1]))
    counts = np.zeros((sites, len(class_names)), np.int64)
    for site, (ids, own) in enumerate(zip(held, lists, strict=True)):
        counts[site, own] = (many[np.ix_(ids, own)] > 0).sum(axis=0)
        if not counts[site].any():
            raise SettingsError(
                f"simulation.partition: no image of site {site + 1} of {sites} has any of its labels",
                hint="Name more data or other labels, or lower the number of sites",
            )
    return Partition(order[:taken], held, tuple(tuple(own.tolist()) for own in lists), counts)
