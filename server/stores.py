"""Where in a run's folder the answers of its sites lie, by site, pool and kind.

Lives here: which stores a job has, and what each is about. Does not live here: a store itself (server/answers).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from consilience.common.pool import Pool
from consilience.common.protocol import Kind, SiteCard
from consilience.common.settings import JobSettings
from consilience.server.answers import About, AnswerStore
from consilience.server.contract import coverage_encoding
from consilience.server.trust import signer_of


def stores_about(
    run: Path, job: JobSettings, cards: Sequence[SiteCard], pool: Pool
) -> tuple[list[AnswerStore], list[AnswerStore | None]]:
    """Return each site's stores about a pool: of log-probabilities, and of coverage (None where it is not asked).

    Raises `RunError` when a folder holds answers about something else, `StorageError`.
    """
    return [_log_probs(run, job, card, pool) for card in cards], [_coverage(run, job, card, pool) for card in cards]


def all_stores(
    run: Path, job: JobSettings, cards: Sequence[SiteCard], pools: Sequence[Pool]
) -> dict[str, list[AnswerStore]]:
    """Return every store of every site by name, in the order in which they are asked: coverage comes last.

    Raises `RunError`, `StorageError`.
    """
    held: dict[str, list[AnswerStore]] = {}
    for card in cards:
        covers = [_coverage(run, job, card, pool) for pool in pools]
        held[card.name] = [_log_probs(run, job, card, pool) for pool in pools]
        held[card.name] += [store for store in covers if store is not None]
    return held


def store_folder(answers: Path, site: str, pool: str, kind: Kind) -> Path:
    """Return where, in the folder RUN/answers, a site's answers of one kind about a pool lie."""
    return answers / site / (pool[:12] if kind == "log-probs" else f"{pool[:12]}-{kind}")


def lacked(stores: Sequence[AnswerStore]) -> str:
    """Say how much is missing from a site's stores."""
    samples, covered = (
        sum(store.about.size - len(store) for store in stores if store.about.kind == kind)
        for kind in ("log-probs", "coverage")
    )
    parts = [f"{samples:,} samples"] if samples else []
    parts += [f"coverage of {covered:,} samples"] if covered else []
    return " and ".join(parts)


def _log_probs(run: Path, job: JobSettings, card: SiteCard, pool: Pool) -> AnswerStore:
    about = About(
        site=card.name,
        pool=pool.digest,
        size=len(pool),
        teacher=card.teacher,
        policy=card.policy,
        encoding=job.ask.encoding,
        classes=len(card.classes),
    )
    return _store(run, card, about)


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
    return _store(run, card, about)


def _store(run: Path, card: SiteCard, about: About) -> AnswerStore:
    return AnswerStore(store_folder(run / "answers", card.name, about.pool, about.kind), about, signer_of(card))
