"""Where in a run's folder the answers of its sites lie, by site, pool and kind.

Lives here: which stores a job has, and what each is about. Does not live here: a store itself (server/answers).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from consilience.common.cards import SiteCard
from consilience.common.pool import Pool
from consilience.common.protocol import LABEL_KINDS, Kind
from consilience.common.records import FINGERPRINT_SHOWN
from consilience.common.settings import JobSettings
from consilience.common.taps_asked import taps_asked
from consilience.server.answers import AnswerStore
from consilience.server.answers_about import About, coverage_encoding
from consilience.server.asked_pool import asked_ids
from consilience.server.trust import signer_of


def stores_about(
    run: Path, job: JobSettings, cards: Sequence[SiteCard], pool: Pool
) -> tuple[list[AnswerStore], list[AnswerStore | None]]:
    """Return each site's stores about a pool: of its teacher's answers, and of coverage (None where it is not asked).

    Raises `RunError` when a folder holds answers about something else, `StorageError`.
    """
    return [_answers(run, job, card, pool) for card in cards], [_coverage(run, job, card, pool) for card in cards]


def all_stores(
    run: Path, job: JobSettings, cards: Sequence[SiteCard], pools: Sequence[Pool]
) -> dict[str, list[AnswerStore]]:
    """Return every store of every site by name, in the order in which they are asked: coverage and features come last.

    Features are asked of the first of the pools alone, which is what the student learns from.

    Raises `RunError`, `StorageError`.
    """
    held: dict[str, list[AnswerStore]] = {}
    for card in cards:
        covers = [_coverage(run, job, card, pool) for pool in pools]
        held[card.name] = [_answers(run, job, card, pool) for pool in pools]
        held[card.name] += [store for store in covers if store is not None]
        held[card.name] += feature_stores(run, job, card, pools[0]).values()
    return held


def feature_stores(run: Path, job: JobSettings, card: SiteCard, pool: Pool) -> dict[str, AnswerStore]:
    """Return a site's stores of features of a pool by tap, those that the job asks for. Raises as `stores_about`."""
    stores = {}
    for tap in taps_asked(job, card):
        about = About(
            site=card.name,
            pool=pool.digest,
            size=len(pool),
            teacher=tap.fingerprint,
            policy=card.policy,
            kind="features",
            encoding=job.ask.features,
            classes=tap.values,
        )
        stores[tap.name] = _store(run, card, about, pool)
    return stores


def store_folder(answers: Path, site: str, pool: str, kind: Kind, teacher: str) -> Path:
    """Return where, in the folder RUN/answers, a site's answers of one kind about a pool lie.

    `teacher` is the fingerprint of what answered: a site has one teacher, one estimate of coverage, and as many
    as it has taps for features.
    """
    parts = [pool[:12]] if kind in LABEL_KINDS.values() else [pool[:12], kind]
    return answers / site / "-".join([*parts, teacher[:FINGERPRINT_SHOWN]] if kind == "features" else parts)


def lacked(stores: Sequence[AnswerStore]) -> str:
    """Say how much is missing from a site's stores."""
    words: dict[Kind, str] = {"log-probs": "", "log-odds": "", "coverage": "coverage of ", "features": "features of "}
    parts = []
    for kind, what in words.items():
        missing = sum(store.known - len(store) for store in stores if store.about.kind == kind)
        parts += [f"{what}{missing:,} samples"] if missing else []
    return " and ".join(parts)


def _answers(run: Path, job: JobSettings, card: SiteCard, pool: Pool) -> AnswerStore:
    about = About(
        site=card.name,
        pool=pool.digest,
        size=len(pool),
        teacher=card.teacher,
        policy=card.policy,
        kind=LABEL_KINDS[card.labels],
        encoding=job.ask.encoding,
        classes=len(card.classes),
    )
    return _store(run, card, about, pool)


def _coverage(run: Path, job: JobSettings, card: SiteCard, pool: Pool) -> AnswerStore | None:
    encoding = coverage_encoding(job, card)
    if card.coverage is None or encoding is None:
        return None
    about = About(
        site=card.name,
        pool=pool.digest,
        size=len(pool),
        teacher=card.coverage.fingerprint,
        policy=card.policy,
        kind="coverage",
        encoding=encoding,
        classes=1,
    )
    return _store(run, card, about, pool)


def _store(run: Path, card: SiteCard, about: About, pool: Pool) -> AnswerStore:
    folder = store_folder(run / "answers", card.name, about.pool, about.kind, about.teacher)
    return AnswerStore(folder, about, signer_of(card), asked_ids(pool))
