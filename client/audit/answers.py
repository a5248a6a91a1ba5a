"""The answers that an audit attacks: as they would leave, and yet none that leaves.

Lives here: the way of an image through teacher, mechanism, policy and encoding, under a secret of the audit's own.
Does not live here: pools, the ledger, what was released (client/site, client/released); the attacks.

Noise is a function of the site's secret and of an image. An audit that drew it from this secret would write down, in
figures that people pass on, something of the very noise that hides released answers. So it draws under another secret,
which follows from the site's by a keyed hash: a repeated audit says the same, nobody without the site's secret knows
either of the two, and neither tells anything of the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import cast

import numpy as np
from numpy.typing import NDArray

from consilience.client.privacy import NoisyTeacher, PateTeacher
from consilience.client.privacy.noise import Secret, load_secret
from consilience.client.shaping import shape
from consilience.client.site import Site
from consilience.client.teacher import CalibratedTeacher, Teacher
from consilience.common.data import ImageData
from consilience.common.encoding import decode, encode
from consilience.common.errors import SettingsError
from consilience.common.preprocessing import Images
from consilience.common.settings import Encoding, Policy, SiteSettings


def answers_as_released(site: Site, images: Images, encoding: Encoding | None = None) -> NDArray[np.float32]:
    """Return (n, K) log-probabilities of (n, H, W, C) images as a server would read them in `encoding`.

    By default in the finest that the policy allows. Noise is the audit's own. Nothing is counted, kept or released.
    Raises `TeacherError`, and `IdentityError` when others on the machine may read the site's secret.
    """
    return told(audited_teacher(site), images, site.settings.policy, encoding)


def audited_teacher(site: Site) -> Teacher:
    """Return the site's teacher with all that its answers go through, its noise drawn under the audit's secret."""
    teacher = single_teacher(site)
    return under(teacher, audit_secret(site.settings)) if _draws(teacher) else teacher


def single_teacher(site: Site) -> Teacher:
    """Return the site's teacher. Raises `SettingsError` for a multi-label one, which no attack here is made for."""
    if site.encoder.kind != "log-probs":
        raise SettingsError(
            f"{site.settings.name}: field 'teacher.labels' is 'multi', and the audit's attacks are on answers of one "
            "label an image",
            hint="Audit a site with a single-label teacher",
        )
    return cast(Teacher, site.teacher)


def audit_secret(settings: SiteSettings, purpose: str = "answers") -> Secret:
    """Return the secret that stands, in an audit, for the site's own. Raises `IdentityError`, `StorageError`."""
    return Secret(bytes.fromhex(load_secret(settings).digest(["audit", purpose])))


def told(teacher: Teacher, images: Images, policy: Policy, encoding: Encoding | None = None) -> NDArray[np.float32]:
    """Return (n, K) log-probabilities of images as `policy` lets a teacher's leave, by default as finely as it does."""
    rows = shape(teacher.log_probs(images), policy)
    finest = policy.encodings[0]
    chosen = finest if encoding is None else encoding
    return decode(encode(rows, chosen, within=finest), len(rows), rows.shape[1], chosen)


def in_batches(
    teacher: Teacher, data: ImageData, ids: NDArray[np.int64], settings: SiteSettings
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Yield, for the images `ids` of the data batch by batch, their places in `ids` and (b, K) what is told of them."""
    for first in range(0, len(ids), settings.batch_size):
        part = slice(first, min(first + settings.batch_size, len(ids)))
        yield part, told(teacher, data.read(ids[part]), settings.policy)


def under(teacher: Teacher, secret: Secret) -> Teacher:
    """Return the teacher with its noise drawn under another secret; the same where it draws none."""
    if isinstance(teacher, CalibratedTeacher):
        return dataclasses.replace(teacher, teacher=under(teacher.teacher, secret))
    if isinstance(teacher, NoisyTeacher | PateTeacher):
        return dataclasses.replace(teacher, secret=secret)
    return teacher


def _draws(teacher: Teacher) -> bool:
    if isinstance(teacher, CalibratedTeacher):
        return _draws(teacher.teacher)
    return isinstance(teacher, NoisyTeacher | PateTeacher)
