"""Canaries: wrong records planted in the training of a copy, which show how much epsilon is at least.

Lives here: choosing and planting them, training the copy, asking it about them. Does not live here: what guesses come
to (one_run), mechanisms and their accounting (client/privacy), the form in which answers leave (answers).

An accountant's epsilon is an upper bound and holds if the code does what it accounts for; this is a lower bound that
holds whatever the code does. If it is above the other, the mechanism does not do what it says. A lower bound near 0 is
no guarantee: another attack may find more.

The copy is trained on the site's own private data with the site's own settings, in a folder of the audit's that is
removed at the end, and after an audit that was killed by the next one. No image is written anywhere. Neither the site's
teacher nor its secret, its ledger or anything else in its state is touched, and nothing leaves.
"""

from __future__ import annotations

import dataclasses
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from consilience.client.audit.answers import told
from consilience.client.audit.membership import membership
from consilience.client.audit.one_run import bound_by_guesses
from consilience.client.privacy import Spent, Unit, account, answering_costs, behind_noise, load_private, train_private
from consilience.client.privacy.spending import delta_of
from consilience.client.shaping import check_floor
from consilience.client.teacher import CalibratedTeacher, CalibrationRecord, Teacher
from consilience.client.teacher.calibrated import fit_on
from consilience.client.teacher.kept_training import wanted
from consilience.client.teacher.private_samples import digest_of, present_classes, private_data, split
from consilience.common.data import ImageData
from consilience.common.epochs import EpochRecord
from consilience.common.errors import SettingsError
from consilience.common.files import lock, make_private
from consilience.common.seeds import derive
from consilience.common.settings import Encoding, Settings, SiteSettings, SumNoise

CONFIDENCE = 0.95
FEWEST = 10
"""Canaries with which anything can be said: fewer all guessed rightly refute next to nothing."""
ASKED_OPENLY = (
    "the noise of sum-noise is in sums over sites alone, and the copy was asked by itself, without any: what the "
    "accountant says of sums does not bound these answers"
)


class CanaryAudit(Settings):
    """What the canaries showed."""

    mechanism: str
    canaries: int
    planted: int
    """How many of them the copy learned from."""
    encoding: Encoding
    auc: float
    """How well answers tell planted canaries from the others; 0.5 for not at all."""
    low: float
    """Low end of the interval of `auc`, 95 %, by DeLong; 0 where all coins fell alike."""
    high: float
    """High end of it; 1 where all coins fell alike."""
    guesses: int
    correct: int
    lower: float
    """Epsilon is at least this, at `delta` and with `confidence`."""
    confidence: float
    delta: float
    upper: float | None
    """The accountant's epsilon of one answer a canary, or of the training; None without a guarantee."""
    unit: Unit | None
    """What `upper` speaks of. What bounds the whole model's answers bounds what they say of a record too."""
    why: str
    """Why there is no `upper`."""

    @property
    def holds(self) -> bool:
        """Whether nothing speaks against the accountant's epsilon."""
        return self.upper is None or self.lower <= self.upper


@dataclass(frozen=True)
class Canaries:
    """Private images `ids` (m,) that are taken out, their `true` classes (m,) and the `wrong` ones they are given (m,).

    `planted` (m,): whether the copy gets them, each by a fair coin.
    """

    ids: NDArray[np.int64]
    true: NDArray[np.int64]
    wrong: NDArray[np.int64]
    planted: NDArray[np.bool_]


def audit_canaries(
    settings: SiteSettings,
    *,
    canaries: int = 200,
    encoding: Encoding | None = None,
    confidence: float = CONFIDENCE,
    seed: int | None = None,
    folder: Path | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> CanaryAudit:
    """Train a copy with planted canaries, ask it about each once, and return what that says of epsilon.

    A canary is a private image with a wrong label, and is in the copy's data by a fair coin or not at all; as many of
    the private images are missing in these. Of the other images as large a share is held out as of the site's own
    teacher, to calibrate the copy on, and of the canaries none. `encoding` is by default the finest that the policy
    allows. Coins and choices are new each time, or follow from `seed`. The copy lies in `folder`, by default
    state/audit/canaries, until it has answered. Raises `SettingsError` for a number of canaries that is below 10 or
    more than half of the private images, `TeacherError` for a hosted teacher or data of a single class, `RunError` when
    another process has a copy in `folder`, and what training raises.
    """
    wanted(settings)
    data = private_data(settings)
    labels, classes = present_classes(data)
    random = np.random.default_rng(secrets.randbits(128) if seed is None else seed)
    chosen = choose(labels, canaries, random)
    others = np.delete(np.arange(len(labels)), chosen.ids)
    kept, held = split(labels[others], wanted(settings).holdout, derive(settings.seed, "canary holdout"))
    with _scratch(settings, folder) as state:
        copy = _settings(settings, state)
        train_private(copy, on_epoch, _with_canaries(data, labels, classes, others[kept], chosen))
        asked = _as_it_answers(copy, data, others[held], labels[others[held]])
        check_floor(copy.policy, len(asked.classes))
        used = copy.policy.encodings[0] if encoding is None else encoding
        parts = [
            told(asked, data.read(chosen.ids[first : first + copy.batch_size]), copy.policy, used)
            for first in range(0, canaries, copy.batch_size)
        ]
        spent = account(answering_costs(copy, canaries), delta_of(copy))
        if isinstance(copy.privacy, SumNoise):
            spent = Spent(unit=None, delta=spent.delta, epsilon=None, rdp=None, pld=None, why=ASKED_OPENLY)
    scores = suspicion(np.concatenate(parts), chosen)
    bound = bound_by_guesses(scores, chosen.planted, random, delta=spent.delta, confidence=confidence)
    auc, low, high = 0.5, 0.0, 1.0
    if chosen.planted.any() and not chosen.planted.all():
        told_apart = membership(scores[chosen.planted], scores[~chosen.planted])
        auc, low, high = told_apart.auc, told_apart.low, told_apart.high
    return CanaryAudit(
        mechanism=settings.privacy.mechanism,
        canaries=canaries,
        planted=int(chosen.planted.sum()),
        encoding=used,
        auc=auc,
        low=low,
        high=high,
        guesses=bound.guesses,
        correct=bound.correct,
        lower=bound.epsilon,
        confidence=confidence,
        delta=spent.delta,
        upper=spent.epsilon,
        unit=spent.unit,
        why=spent.why,
    )


def check_canaries(settings: SiteSettings, canaries: int) -> None:
    """See, before anything is trained, that so many canaries can be planted. Raises as `audit_canaries`."""
    wanted(settings)
    labels, _ = present_classes(private_data(settings))
    choose(labels, canaries, np.random.default_rng(0))


def choose(labels: NDArray[np.int64], canaries: int, random: np.random.Generator) -> Canaries:
    """Choose canaries among images labelled (n,) and toss their coins. Raises `SettingsError`, as `audit_canaries`.

    An image of every class stays out of them, so that the copy knows the classes that the site's teacher does.
    """
    classes = int(labels.max()) + 1
    order = random.permutation(len(labels))
    kept = order[np.unique(labels[order], return_index=True)[1]]
    free = order[~np.isin(order, kept)]
    most = min(len(labels) // 2, len(free))
    if not FEWEST <= canaries <= most or classes < 2:
        raise SettingsError(
            f"canaries is {canaries}; allowed with {len(labels)} private images of {classes} classes: "
            + (f"{FEWEST} to {most}" if most >= FEWEST and classes > 1 else "none"),
            hint="Ask for as many as a tenth of the private images, if that is allowed",
        )
    ids = np.sort(free[:canaries])
    true = labels[ids]
    wrong = (true + random.integers(1, classes, canaries)) % classes
    return Canaries(ids, true, wrong, random.random(canaries) < 0.5)


def suspicion(log_probs: NDArray[np.float32], canaries: Canaries) -> NDArray[np.float64]:
    """Return (m,) how much likelier answers (m, K) take each canary's wrong class for than its true one.

    Whoever learned it says the wrong one, and who did not says the true one.
    """
    rows, at = log_probs.astype(np.float64), np.arange(len(log_probs))
    odds: NDArray[np.float64] = rows[at, canaries.wrong] - rows[at, canaries.true]
    return odds


@contextmanager
def _scratch(settings: SiteSettings, folder: Path | None) -> Iterator[Path]:
    """Yield an empty folder that is this process's alone; what was left there by a killed one is removed first."""
    home = settings.state / "audit" / "canaries" if folder is None else folder
    make_private(settings.state)
    make_private(home)
    with lock(home):
        copy = home / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        make_private(copy)
        try:
            yield copy
        finally:
            shutil.rmtree(copy, ignore_errors=True)


def _settings(settings: SiteSettings, state: Path) -> SiteSettings:
    """Return the copy's settings: the site's, in another folder, and without a holdout, which is made here."""
    teacher = wanted(settings).model_copy(update={"holdout": 0.0})
    return settings.model_copy(update={"state": state, "ledger_head": state / "head", "teacher": teacher})


def _with_canaries(
    data: ImageData,
    labels: NDArray[np.int64],
    classes: tuple[str, ...],
    others: NDArray[np.int64],
    canaries: Canaries,
) -> ImageData:
    """Return the copy's private data: the images `others` as they are, and the planted canaries."""
    ids = np.concatenate([others, canaries.ids[canaries.planted]])
    told = np.concatenate([labels[others], canaries.wrong[canaries.planted]])
    return dataclasses.replace(data.subset(ids), labels=told, class_names=classes)


def _as_it_answers(copy: SiteSettings, data: ImageData, held: NDArray[np.int64], labels: NDArray[np.int64]) -> Teacher:
    """Return the copy behind a map of its own, fitted on the images `held` as the site's is, and behind its noise."""
    core, record = load_private(copy), None
    if copy.calibration != "off":
        fitted = fit_on(copy, core, copy.calibration, data, held, labels)
        record = CalibrationRecord(
            asked=copy.calibration, teacher=core.fingerprint, data_digest=digest_of(data), **vars(fitted)
        )
    return behind_noise(copy, CalibratedTeacher(core, record, "" if record is None else record.told))
