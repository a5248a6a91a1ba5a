"""True labels of the test images and of the pool, brought into the label space: for judging and the oracle alone.

Nothing that trains the student or chooses anything reads this module's results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.common.data import ImageData, check_many
from consilience.common.errors import DataError, PoolError
from consilience.common.labels import LabelSpace
from consilience.common.pool import Pool
from consilience.server.asked_pool import asked_ids

Synonyms = Mapping[str, Sequence[str]]


def check_test(test: ImageData | None, test_pool: Pool | None, pool: Pool) -> None:
    """Check before anything is asked that the test images can be judged with. Raises `DataError`, `PoolError`."""
    if test is None:
        return
    if test.many is None:
        test.need_labels("judge.test")
    if not len(test):
        raise DataError("judge.test holds no images", hint="Name labelled images, or leave judge.test out")
    if test.shape != pool.shape:
        raise DataError(
            f"judge.test: images have shape {test.shape}; the pool's have {pool.shape}", hint="Bring both to one shape"
        )
    if test_pool is None:
        return
    if (len(test_pool), test_pool.shape) != (len(test), test.shape):
        raise PoolError(
            f"judge.test_pool has {len(test_pool)} samples of shape {test_pool.shape}; "
            f"judge.test has {len(test)} of {test.shape}",
            hint="Build the test pool from judge.test",
        )
    for start, images in test_pool.blocks(4096):
        if not np.array_equal(images, test.read(np.arange(start, start + len(images)))):
            raise PoolError(
                f"judge.test_pool holds other images than judge.test, or another order, from sample {start} on",
                hint="Build the test pool from judge.test",
            )


def test_truth(test: ImageData, space: LabelSpace, synonyms: Synonyms) -> NDArray[np.int64]:
    """Return the test labels (m,) as indices into the label space, -1 where no site knows the class."""
    return _to_space(test.need_labels("judge.test"), test, space, synonyms)


def pool_truth(path: Path, pool: Pool, test: ImageData, space: LabelSpace, synonyms: Synonyms) -> NDArray[np.int64]:
    """Read the pool's true labels, numbered by the test data's class names, into the label space: (m,) of `pool`.

    The file is about all samples of the pool, also where the job asks about a part. Raises `DataError` for another
    length or type, or a label out of range.
    """
    raw, size = _read(path), pool.manifest.size
    if raw.shape != (size,) or not np.issubdtype(raw.dtype, np.integer):
        raise DataError(
            f"{path}: has shape {raw.shape} and type {raw.dtype}; allowed: ({size},) integers",
            hint="Give one label a pool sample",
        )
    wrong = np.flatnonzero((raw < 0) | (raw >= len(test.class_names)))
    if len(wrong):
        raise DataError(
            f"{path}: label {raw[wrong[0]]} of sample {wrong[0]} is out of range; "
            f"allowed: 0 to {len(test.class_names) - 1}",
            hint="Number the labels by the test data's class names",
        )
    ids = asked_ids(pool)
    return _to_space(raw if ids is None else raw[ids], test, space, synonyms)


def test_truth_labels(test: ImageData, space: LabelSpace, synonyms: Synonyms) -> NDArray[np.int8]:
    """Return the test labels (m, L) int8 in the label space: 1, 0, or -1 where it is not known whether one applies."""
    return _columns(test.need_many("judge.test"), test, space, synonyms)


def pool_truth_labels(
    path: Path, pool: Pool, test: ImageData, space: LabelSpace, synonyms: Synonyms
) -> NDArray[np.int8]:
    """Read the pool's true labels (n, labels of the test data) into the label space, (m, L) int8 of `pool`.

    The file is as for `pool_truth`. Raises `DataError` for another shape or type, or a value that is no label.
    """
    many, ids = check_many(_read(path), pool.manifest.size, test.class_names, str(path)), asked_ids(pool)
    many = many if ids is None else many[ids]
    return _columns(many, test, space, synonyms)


def _read(path: Path) -> NDArray[Any]:
    try:
        held: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a NumPy array", hint="Correct judge.pool_labels") from error
    return held


def _columns(many: NDArray[np.int8], test: ImageData, space: LabelSpace, synonyms: Synonyms) -> NDArray[np.int8]:
    out = np.full((len(many), len(space)), -1, np.int8)
    for column, label in enumerate(space.align(test.class_names, synonyms)):
        if label >= 0:
            out[:, label] = many[:, column]
    return out


def _to_space(labels: NDArray[np.int64], test: ImageData, space: LabelSpace, synonyms: Synonyms) -> NDArray[np.int64]:
    index = space.align(test.class_names, synonyms)
    return np.asarray(index, np.int64)[labels]
