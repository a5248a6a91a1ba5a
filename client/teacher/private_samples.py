"""The private images that a site's teacher learns from, and those that are held out.

Lives here: reading them, their classes or labels, what tells one state of them from another, and the division. Does not
live here: training (trained, multi_trained).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from consilience.client.teacher.kept_training import RETRAIN, trained_record, wanted
from consilience.common.data import ImageData, open_data
from consilience.common.errors import TeacherError
from consilience.common.files import canonical_json, sha256
from consilience.common.seeds import derive
from consilience.common.settings import SiteSettings

HOLDOUT = "holdout"
"""Purpose of the seed that decides which samples are held out."""
_SAMPLED = 256
"""Images, spread evenly, whose bytes tell one state of the private data from another."""

Labels = NDArray[np.int8]


def private_data(settings: SiteSettings) -> ImageData:
    """Open the site's private data. Raises `TeacherError` where the settings name none, `DataError`."""
    if settings.data is None:
        raise TeacherError("The site has no private data to train on", hint="Set data in the site's settings")
    return open_data(settings.data)


def present_classes(data: ImageData) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return (n,) int64 labels numbered by the classes that have a sample, and the names of these, in order.

    Raises `DataError` without labels, `TeacherError` without samples.
    """
    labels = data.need_labels("The site's private data")
    present = np.unique(labels)
    if not len(present):
        raise TeacherError("The site's private data holds no sample", hint="Name data with at least one image")
    return np.searchsorted(present, labels), tuple(data.class_names[k] for k in present)


def present_labels(data: ImageData) -> tuple[Labels, tuple[str, ...]]:
    """Return (n, k) int8 of the labels that apply to at least one image, and their names, in order.

    Raises `DataError` for single-label data, `TeacherError` where no label applies to any image.
    """
    many = data.need_many("The private data of a multi-label teacher")
    present = np.flatnonzero((many > 0).any(axis=0))
    if not len(present):
        raise TeacherError("No label applies to any private image", hint="Name data with labelled images")
    return np.ascontiguousarray(many[:, present]), tuple(data.class_names[k] for k in present)


def held_out(settings: SiteSettings, data: ImageData, digest: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return sorted ids (n,) of `data`, of digest `digest`, that the trained teacher has not learned from, and labels.

    Labels (n,) are numbered as the teacher's classes. Raises `TeacherError` when it was trained on other data.
    """
    _need_same(settings, digest)
    labels, _ = present_classes(data)
    _, ids = split(labels, wanted(settings).holdout, derive(settings.seed, HOLDOUT))
    return ids, labels[ids]


def held_out_multi(settings: SiteSettings, data: ImageData, digest: str) -> tuple[NDArray[np.int64], Labels]:
    """Return sorted ids (n,) of `data`, of digest `digest`, that the trained teacher has not learned from, and labels.

    Labels (n, k) are in the teacher's order. Raises `TeacherError` when it was trained on other data.
    """
    _need_same(settings, digest)
    labels, _ = present_labels(data)
    _, ids = split_images(labels, wanted(settings).holdout, derive(settings.seed, HOLDOUT))
    return ids, labels[ids]


def _need_same(settings: SiteSettings, digest: str) -> None:
    if trained_record(settings).data_digest != digest:
        raise TeacherError(
            f"{settings.name}: the private data are not those that the teacher was trained on", hint=RETRAIN
        )


def split(labels: NDArray[np.int64], share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return sorted ids to learn from and to hold out: `share` of each class, rounded, but never the whole class."""
    random = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        ids = random.permutation(np.flatnonzero(labels == label))
        held_out[ids[: min(round(share * len(ids)), len(ids) - 1)]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def split_images(labels: Labels, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return sorted ids to learn from and to hold out: `share` of the images (n, k), rounded.

    Of a label all of whose images would be held out, one is learned from.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out = np.zeros(len(labels), np.bool_)
    held_out[order[: min(round(share * len(labels)), len(labels) - 1)]] = True
    for label in range(labels.shape[1]):
        having = np.flatnonzero(labels[:, label] > 0)
        if len(having) and held_out[having].all():
            held_out[having[0]] = False
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def digest_of(data: ImageData) -> str:
    """Return what tells data from others: labels (without any, how many images) and some images. Raises `DataError`."""
    labels = data.many if data.labels is None else data.labels
    told = len(data) if labels is None else sha256(labels.tobytes())
    some = np.unique(np.linspace(0, len(data) - 1, _SAMPLED if len(data) else 0).astype(np.int64))
    images = sha256(np.ascontiguousarray(data.read(some)).tobytes())
    return sha256(canonical_json([data.shape, data.class_names, told, images]))
