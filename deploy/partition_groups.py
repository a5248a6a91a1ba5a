"""Simulated sites that label their images by groups of classes.

Lives here: a class list that names groups of the job's `labels.groups`, and such a site's labels. Does not live here:
who gets which image (partition).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from consilience.common.data import ImageData
from consilience.common.errors import SettingsError
from consilience.common.labels import LabelSpace, check_groups
from consilience.common.settings import ClassLists, Labels, Simulation

Coarse = Mapping[str, tuple[int, ...]]
"""Group that a site knows -> the numbers of its classes in the data."""


def without_groups(
    simulation: Simulation, labels: Labels, class_names: Sequence[str]
) -> tuple[Simulation, list[Coarse]]:
    """Return the simulation with classes in the place of groups, and for each listed site the groups that it named.

    Raises `SettingsError` for a group with a class that the data lacks.
    """
    scheme = simulation.partition
    if not labels.groups or not isinstance(scheme, ClassLists):
        return simulation, []
    # In the order of the data's classes, each by its canonical name.
    names = LabelSpace.build({"simulation.data": class_names}, labels.synonyms).names
    groups = check_groups(labels.groups, labels.synonyms, labels.classes)
    lists: list[tuple[str | int, ...]] = []
    coarse: list[Coarse] = []
    for site, listed in enumerate(scheme.classes):
        own: dict[str, tuple[int, ...]] = {}
        for name in listed:
            if not isinstance(name, str) or name in class_names or name not in groups:
                continue
            if lacking := [member for member in groups[name] if member not in names]:
                raise SettingsError(
                    f"simulation.partition.classes.{site} holds the group {name!r}, of whose classes simulation.data "
                    f"lacks {', '.join(map(repr, lacking))}",
                    hint="Correct labels.groups, or name classes",
                )
            own[name] = tuple(names.index(member) for member in groups[name])
        lists.append(tuple(k for name in listed for k in own.get(str(name), (name,))))
        coarse.append(own)
    return simulation.model_copy(update={"partition": scheme.model_copy(update={"classes": tuple(lists)})}), coarse


def coarsened(data: ImageData, groups: Coarse) -> ImageData:
    """Return images with groups in the place of their classes, the groups' names after those of the other classes."""
    if not groups:
        return data
    within = {k for numbers in groups.values() for k in numbers}
    left = [k for k in range(len(data.class_names)) if k not in within]
    number = np.empty(len(data.class_names), np.int64)
    number[left] = np.arange(len(left))
    for place, numbers in enumerate(groups.values(), len(left)):
        number[list(numbers)] = place
    names = (*(data.class_names[k] for k in left), *groups)
    return replace(data, labels=number[data.need_labels("simulation.data")], class_names=names)
