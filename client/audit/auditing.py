"""An audit of one site, from its settings to the record of what was found.

Lives here: which part is done with what, and why a part is left out. Does not live here: the attacks, the sentences
(record), the page (page), the command (cli).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import consilience
from consilience.client.audit.answers import audited_teacher, in_batches, single_teacher, told
from consilience.client.audit.averaging import average_site
from consilience.client.audit.lira import LEAST_SHADOWS, likelihood_ratio
from consilience.client.audit.losses import confidence, likelihood
from consilience.client.audit.members import Known, known
from consilience.client.audit.membership import Membership, membership
from consilience.client.audit.pooled import Pooled, pool_shadows
from consilience.client.audit.record import Audit, Part
from consilience.client.audit.shadows import train_shadows
from consilience.client.audit.shares import Shares, guess_shares
from consilience.client.privacy import describe_privacy
from consilience.client.site import Site
from consilience.client.teacher import CalibratedTeacher, describe_teacher
from consilience.common.data import open_data
from consilience.common.epochs import EpochRecord
from consilience.common.errors import MissingExtraError, SettingsError, TeacherError
from consilience.common.pool import Pool
from consilience.common.settings import SiteSettings

SHADOWS = 8
MOST_CELLS = 2_000_000
"""Pool samples times classes whose answers are looked at; of a larger pool, samples that are evenly spread."""


def audit_site(
    site: Site, folder: Path, shadows: int = SHADOWS, on_epoch: Callable[[EpochRecord], None] | None = None
) -> Audit:
    """Attack the answers of a site, with so many shadow teachers, which are trained in `folder`.

    Nothing is released, counted in the ledger or left in the site's state, but for `folder`: shadows that are trained
    stay there, so that an audit that was interrupted goes on, until the caller removes them. Raises what `check_audit`
    raises, and what loading the pool and the secret raises.
    """
    check_shadows(shadows)
    settings, left_out = site.settings, dict[Part, str]()
    members = _known(settings, left_out)
    pool = _pool(settings)
    loss = ratio = pooled = None
    if members is not None:
        loss, own = _by_loss(site, members)
        ratio, pooled = _by_shadows(site, members, own, shadows, folder, on_epoch, left_out)
    if pool is None:
        left_out["shares"] = left_out["averaging"] = "The settings name no pool, so that there is nothing to ask about."
    return Audit(
        site=settings.name,
        made=f"{datetime.now(UTC):%Y-%m-%d}",
        version=consilience.__version__,
        seed=settings.seed,
        teacher=describe_teacher(settings)[0],
        fingerprint=site.teacher.fingerprint,
        policy=settings.policy.version,
        mechanism=describe_privacy(settings),
        encoding=settings.policy.encodings[0],
        shadow_count=shadows if ratio is not None else 0,
        loss=loss,
        shadows=ratio,
        pooled=pooled,
        shares=_shares(site, pool, members, left_out) if pool is not None else None,
        averaging=average_site(site, pool) if pool is not None else None,
        left_out=left_out,
        notes=_notes(site, ratio is not None),
    )


def check_audit(site: Site, shadows: int) -> None:
    """See, before anything is trained, that the site can be audited with so many shadow teachers.

    Raises `SettingsError` for fewer than `LEAST_SHADOWS` and for a multi-label teacher; `TeacherError` where the
    teacher was trained from other settings or data, or hardly anything was held out; what loading private data raises.
    """
    check_shadows(shadows)
    single_teacher(site)
    _known(site.settings, {})


def check_shadows(count: int) -> None:
    """Raise `SettingsError` for fewer shadows than `LEAST_SHADOWS`."""
    if count < LEAST_SHADOWS:
        raise SettingsError(
            f"--shadows is {count}; allowed: {LEAST_SHADOWS} or more", hint="Leave it out for the default"
        )


def _known(settings: SiteSettings, left_out: dict[Part, str]) -> Known | None:
    """Return members and others; None for a teacher that was not trained here. Raises what `known` raises."""
    if settings.teacher.kind == "train":
        return known(settings)
    why = (
        f"The teacher (kind {settings.teacher.kind}) was not trained here: which images it learned from is not known, "
        "and so not whether answers give them away. Whoever trained it can audit it."
    )
    left_out["loss"] = left_out["shadows"] = why
    return None


def _by_loss(site: Site, members: Known) -> tuple[Membership, NDArray[np.float64]]:
    """Return what the loss tells, and (n,) the teacher's confidence in each of `members.ids`."""
    ids = members.ids
    scores, own = np.empty(len(ids)), np.empty(len(ids))
    for part, rows in in_batches(audited_teacher(site), members.data, ids, site.settings):
        labels = members.labels[ids[part]]
        scores[part], own[part] = likelihood(rows, labels), confidence(rows, labels)
    first = len(members.members)
    return membership(scores[:first], scores[first:]), own


def _by_shadows(
    site: Site,
    members: Known,
    own: NDArray[np.float64],
    count: int,
    folder: Path,
    on_epoch: Callable[[EpochRecord], None] | None,
    left_out: dict[Part, str],
) -> tuple[Membership | None, Pooled | None]:
    """Return what the likelihood ratio tells of the teacher, and of the shadows; None where these cannot be trained."""
    try:
        shadows = train_shadows(site, members, count, folder, on_epoch)
    except (TeacherError, MissingExtraError) as error:
        left_out["shadows"] = f"No shadow teacher could be trained on half of the private data: {error}."
        return None, None
    scores = likelihood_ratio(own, shadows.scores, shadows.inside)
    first = len(members.members)
    pooled = pool_shadows(shadows.scores, shadows.inside, site.settings.seed)
    return membership(scores[:first], scores[first:]), pooled


def _shares(site: Site, pool: Pool, members: Known | None, left_out: dict[Part, str]) -> Shares | None:
    true = _true_shares(site) if members is None else _counted(members.labels[members.members], site)
    if true is None:
        left_out["shares"] = "Without labelled private data of the teacher's classes their true shares are not known."
        return None
    teacher, settings = audited_teacher(site), site.settings
    ids = np.unique(np.linspace(0, len(pool) - 1, min(len(pool), max(1, MOST_CELLS // len(true)))).astype(np.int64))
    rows = [
        told(teacher, pool.take(ids[first : first + settings.batch_size]), settings.policy)
        for first in range(0, len(ids), settings.batch_size)
    ]
    return guess_shares(np.concatenate(rows), site.teacher.classes, true)


def _true_shares(site: Site) -> NDArray[np.float64] | None:
    """Return (K,) the shares of the teacher's classes in the site's private data; None where they are not known."""
    if site.settings.data is None or (data := open_data(site.settings.data)).labels is None:
        return None
    number = {name: k for k, name in enumerate(site.teacher.classes)}
    labels = np.array([number.get(name, -1) for name in data.class_names], np.int64)[data.labels]
    return _counted(labels[labels >= 0], site)


def _counted(labels: NDArray[np.int64], site: Site) -> NDArray[np.float64] | None:
    counts = np.bincount(labels, minlength=len(site.teacher.classes))
    return counts / counts.sum() if counts.any() else None


def _pool(settings: SiteSettings) -> Pool | None:
    """Return the first pool that the settings name. Raises `PoolError`, `StorageError`."""
    pool = Pool.open(settings.pools[0]) if settings.pools else None
    return pool if pool is not None and len(pool) else None


def _notes(site: Site, shadows: bool) -> tuple[str, ...]:
    """Return what makes the figures say more or less than they seem to."""
    settings, notes = site.settings, list[str]()
    if shadows:
        notes.append("A shadow teacher learns from half of the private data, the teacher from nearly all.")
    record = site.teacher.record if isinstance(site.teacher, CalibratedTeacher) else None
    if record is not None and record.map is not None and settings.teacher.kind == "train":
        notes.append(
            "The teacher's calibration was fitted on the held-out images, which stand here for images that are not "
            "known: attacks look a little weaker than they are."
        )
    if settings.policy.sums_only:
        notes.append("The policy lets answers out in sums over sites alone; single answers were attacked here.")
    if shadows and settings.privacy.mechanism in ("output-noise", "pate"):
        notes.append(
            "Behind noise on answers the likelihood ratio is a weak attack, since what it fits is mostly noise: that "
            "it finds little says less than it does elsewhere."
        )
    if settings.privacy.mechanism == "sum-noise":
        notes.append("The noise of sums is in none of these figures: answers were attacked as they are before a sum.")
    if settings.policy.coverage != "off":
        notes.append("The policy lets coverage out, which learned from private data too and was not attacked.")
    if settings.policy.features.taps:
        notes.append("The policy lets features out, which tell more than answers do and were not attacked.")
    if settings.policy.class_priors:
        notes.append("The policy tells the shares of the classes anyway.")
    if settings.privacy.mechanism == "output-noise":
        notes.append("The mechanism protects a whole answer of the model, and not a single record.")
    return tuple(notes)
