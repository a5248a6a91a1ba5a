"""Of which images a site knows whether its teacher learned from them.

Lives here: the members, the others, and their classes. Does not live here: what is scored (answers) and how well the
two are told apart (membership).

The others are the images that `teacher.holdout` kept out of training: drawn from the same data, so that what tells the
two apart is the training and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from consilience.client.privacy import learned_from
from consilience.client.teacher.private_samples import present_classes, private_data
from consilience.common.data import ImageData
from consilience.common.errors import TeacherError
from consilience.common.settings import SiteSettings

LEAST = 20
"""Members and others, each: with fewer no attack could be told from chance."""


@dataclass(frozen=True)
class Known:
    """Private `data` with the class of each image, (n,) int64 in the teacher's order.

    `members` are the sorted ids of those that the teacher learned from, `others` of those that were held out.
    """

    data: ImageData
    labels: NDArray[np.int64]
    members: NDArray[np.int64]
    others: NDArray[np.int64]

    @property
    def ids(self) -> NDArray[np.int64]:
        """The members' ids and then the others'."""
        return np.concatenate([self.members, self.others])


def known(settings: SiteSettings) -> Known:
    """Return members and others of a site whose teacher was trained here.

    Raises `TeacherError` when it was not, when it was trained from other settings or data, and when there are fewer
    than `LEAST` of either; `DataError`.
    """
    data = private_data(settings)
    members, others = learned_from(settings, data)
    if min(len(members), len(others)) < LEAST:
        raise TeacherError(
            f"{settings.name}: the teacher learned from {len(members)} images and {len(others)} were held out; an "
            f"audit needs at least {LEAST} of each",
            hint="Raise teacher.holdout, for example to 0.2, then: consilience site train",
        )
    labels, _ = present_classes(data)
    return Known(data, labels, members, others)
