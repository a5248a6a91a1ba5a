"""Whether asking the same again and again takes noise away.

Lives here: the attack, and a copy of the site that can be asked without anything leaving. Does not live here: what
keeps it from working (client/released, client/privacy/noise).

The copy is the site's own code over a ledger and a folder of released answers that are thrown away afterwards, with
the policy's limits and gates open: the attack is given every question that it could ever be allowed. What a site
remembers, it remembers by pool and encoding; so the attack asks in another pool too, whose images are scored one at a
time, as the last of a pool may be, and in every encoding that tells a number a class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.client.audit.answers import audited_teacher, single_teacher, told
from consilience.client.privacy import NoisyTeacher, PateTeacher
from consilience.client.site import Site
from consilience.client.teacher import CalibratedTeacher, Teacher
from consilience.client.teacher.protocol import SMALLEST_LOG_PROB
from consilience.common.data import from_arrays
from consilience.common.encoding import decode
from consilience.common.pool import Pool
from consilience.common.preprocessing import Images
from consilience.common.settings import DpSgd, Limits, NoPrivacy, Settings

REPETITIONS = 1000
SAMPLES = 16
"""Pool samples that are asked about again and again."""
JOBS = 7
"""Names under which they are asked about, in turn."""
RESTARTS = 4
"""How often the site is started in the course of it."""
ROUNDING = 1e-6
"""An error of no more is none."""
NOTICEABLY = 0.01
"""An error that shrinks by no more than this share of it does not shrink: encodings round in their own ways. Noise that
is drawn twice takes away more, be it for one image in ten."""
WHOLE = ("f32", "f16", "u8")
"""Encodings that tell a number a class, so that the mean of two of them is another such answer."""

Ask = Callable[[int], NDArray[np.float64]]
"""Asks for the n-th time; returns (samples, K) probabilities."""


class Averaging(Settings):
    """The error of averaged answers: mean total variation from what the teacher says without noise.

    `errors` maps a number of repetitions to the error after them.
    """

    samples: int
    errors: dict[int, float]

    @property
    def repetitions(self) -> int:
        """How often it was asked in all."""
        return max(self.errors)

    @property
    def noisy(self) -> bool:
        """Whether there is anything to average away: a single answer is off by more than rounding."""
        return self.errors[1] > ROUNDING

    @property
    def gained(self) -> float:
        """The share of the first answer's error that averaging takes away; about 0, or less, where it takes nothing."""
        first, last = self.errors[1], self.errors[self.repetitions]
        return 1 - last / first if self.noisy else 0.0

    @property
    def works(self) -> bool:
        """Whether averaging brings the attacker nearer."""
        return self.gained > NOTICEABLY


def average(ask: Ask, truth: NDArray[np.float64], repetitions: int = REPETITIONS) -> Averaging:
    """Ask so many times; compare the mean of the answers with the `truth` (samples, K) on the way and at the end."""
    told_at = {10**power for power in range(len(str(repetitions)))} | {repetitions}
    total, errors = np.zeros_like(truth), dict[int, float]()
    for number in range(1, repetitions + 1):
        total += ask(number)
        if number in told_at:
            errors[number] = float(np.abs(total / number - truth).sum(axis=1).mean() / 2)
    return Averaging(samples=len(truth), errors=errors)


def average_site(site: Site, pool: Pool, repetitions: int = REPETITIONS) -> Averaging:
    """Ask a copy of the site about the same samples of a pool that it holds: in other questions, by other jobs, in
    other encodings, anew after each restart, and after every other one in another pool.

    Raises `TeacherError`, `RefusedError`, `StorageError`.
    """
    samples = min(SAMPLES, len(pool))
    first = min(SAMPLES, len(pool) - samples)
    images = pool.read(first, first + samples)
    truth = told(_without_noise(single_teacher(site)), images, site.settings.policy)
    finest, *coarser = site.settings.policy.encodings
    encodings = [finest, *(other for other in coarser if finest in WHOLE and other in WHOLE)]
    with asked_in_vain(site, images) as start:
        copies = dict[int, tuple[Site, Pool]]()

        def ask(number: int) -> NDArray[np.float64]:
            life = (number - 1) * (RESTARTS + 1) // repetitions
            apart = life % 2 == 1
            if life not in copies:
                copies[life] = start(apart)
            (copy, aside), encoding = copies[life], encodings[(number - 1) % len(encodings)]
            within, begin = (aside, 0) if apart else (pool, first)
            about = copy.question(f"audit-{number % JOBS}", within.digest, len(within), "log-probs", encoding)
            low = begin - number % (begin + 1)
            question = about.model_copy(update={"start": low, "stop": begin + samples})
            rows = decode(copy.answer(question).data, len(question), len(copy.teacher.classes), encoding)
            return np.exp(rows[begin - low :].astype(np.float64))[:: -1 if apart else 1]

        return average(ask, np.exp(truth.astype(np.float64)), repetitions)


@contextmanager
def asked_in_vain(site: Site, images: Images) -> Iterator[Callable[[bool], tuple[Site, Pool]]]:
    """Yield what starts copies of a site, which answer as it would and share a ledger that ends with the block.

    They hold a pool of `images`, in reverse, aside; a copy that is started with True scores one image at a time. Their
    noise is the audit's own.
    """
    with TemporaryDirectory(prefix="consilience-audit-") as folder:
        gates = {"limits": Limits(per_job=None, per_month=None, lifetime=None), "approval": False, "ends": None}
        policy = site.settings.policy.model_copy(
            update={**gates, "pools": (), "sums_only": False, "sealed_only": False}
        )
        aside = Pool.build(from_arrays(images[::-1], None, (), where="audit"), Path(folder) / "pool")
        changes: dict[str, Any] = {"state": Path(folder), "ledger_head": Path(folder) / "head", "policy": policy}
        changes["pools"] = (*site.settings.pools, aside.folder)
        if isinstance(site.settings.privacy, DpSgd):  # paid by its training, which the copy does not have
            changes["privacy"] = NoPrivacy()
        settings, teacher, started = site.settings.model_copy(update=changes), audited_teacher(site), list[Site]()

        def start(apart: bool) -> tuple[Site, Pool]:
            while started:
                started.pop().close()
            started.append(Site(settings.model_copy(update={"batch_size": 1} if apart else {}), teacher))
            return started[-1], aside

        try:
            yield start
        finally:
            for copy in started:
                copy.close()


def _without_noise(teacher: Teacher) -> Teacher:
    """Return what answers before any noise."""
    if isinstance(teacher, CalibratedTeacher):
        return dataclasses.replace(teacher, teacher=_without_noise(teacher.teacher))
    if isinstance(teacher, NoisyTeacher):
        return teacher.teacher
    return _Sums(teacher) if isinstance(teacher, PateTeacher) else teacher


@dataclass(frozen=True)
class _Sums:
    """The parts' votes, as shares, without noise."""

    teacher: PateTeacher

    @property
    def classes(self) -> tuple[str, ...]:
        """See `Teacher.classes`."""
        return self.teacher.classes

    @property
    def fingerprint(self) -> str:
        """See `Teacher.fingerprint`."""
        return self.teacher.fingerprint

    def log_probs(self, images: Images) -> NDArray[np.float32]:
        """See `Teacher.log_probs`."""
        sums = self.teacher.sums(images)
        shares = np.maximum(sums / sums.sum(axis=1, keepdims=True), np.exp(SMALLEST_LOG_PROB))
        narrow: NDArray[np.float32] = np.log(shares).astype(np.float32)
        return narrow
