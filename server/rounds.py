"""From one round of asking to the samples of the next: a student that learns from what was answered so far.

Lives here: that student, which is thrown away, and keeping what is chosen. Does not live here: the choice
(server/choosing), asking (server/asking).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from consilience.common.cards import SiteCard
from consilience.common.labels import LabelSpace
from consilience.common.pool import Pool, PoolImages
from consilience.common.progress import Reporter
from consilience.common.samples_asked import round_ends
from consilience.common.settings import JobSettings
from consilience.server.answered import CoverageStores, need_usable, usable
from consilience.server.answers import AnswerStore
from consilience.server.asked_pool import AskedPool, with_more
from consilience.server.choosing import Round, next_samples
from consilience.server.chosen import Chosen
from consilience.server.labelling import load_other, unify_pool
from consilience.server.learning import ByLoss, StudentModel, learn, soft_label_loss
from consilience.server.robust import labelled

FOLDER = "rounds"
"""Of a run: what is made between rounds, until their samples are kept."""


def choose_more(
    run: Path,
    job: JobSettings,
    pool: AskedPool,
    space: LabelSpace,
    cards: Sequence[SiteCard],
    stores: Sequence[AnswerStore],
    coverage: CoverageStores,
    reporter: Reporter,
) -> AskedPool:
    """Return the part of the pool with the samples of the next round, which RUN/asked.npy then keeps.

    `cards`, `stores` and `coverage` are those of the sites of `space`. Interrupted, it goes on where it was, or begins
    the round anew with the same settings. Raises `AskingError` where no sample can be learnt from, `StorageError`,
    `StudentError`.
    """
    ends = round_ends(job, pool.manifest.size)
    number = ends.index(pool.known) + 1
    name, folder = f"round {number + 1} of {len(ends)}", run / FOLDER / str(number)
    samples = need_usable(usable(stores, space))
    labels, diagnostics = unify_pool(
        folder / "labels", space, stores, cards, job.unify, reporter, samples, coverage, job.seed
    )
    samples = labelled(space, stores, samples, diagnostics.trust)
    chosen, other = Chosen.of(job, space), load_other(folder / "labels")
    share = 1.0 if chosen.everything else chosen.share(labels, other, samples.ids)
    wanted = chosen.wanted(share, job.student.fit.batch_size)
    loss = soft_label_loss(labels, job.unify.temperature, diagnostics.key, samples.ids, other, wanted)
    learn(
        folder / "student",
        PoolImages(pool, samples.ids),
        chosen.taught,
        ByLoss(loss, job.student, job.seed),
        job.student,
        job.seed,
        reporter,
        f"a student that chooses {name}",
        None if chosen.everything else chosen.other,
    )
    count = ends[number] - pool.known
    task = reporter.start(f"choosing {name}", pool.manifest.size + (count if job.ask.choose == "k-centre" else 0))
    whole = Pool(pool.folder, pool.manifest)
    known = Round(folder, whole, pool.ids[: pool.known], StudentModel(folder / "student"), space, stores)
    found = with_more(run, pool, next_samples(job.ask.choose, known, count, task))
    shutil.rmtree(run / FOLDER, ignore_errors=True)
    return found
