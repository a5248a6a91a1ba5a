"""A job whose pool is answered by secure sums: its terms, its one sum, and labels from it.

Lives here: what of the job goes into the terms, and what the other stages read instead of answer stores. Does not
live here: the protocol (server/secure_sums, server/summing) and the estimator (server/unify).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray
from pydantic import ValidationError

from consilience.common.errors import NEW_RUN, AskingError, ProtocolError, SettingsError
from consilience.common.files import canonical_json, read_json, sha256, write_json
from consilience.common.labels import LabelSpace
from consilience.common.pool import Pool
from consilience.common.settings import JobSettings
from consilience.common.sums.messages import LEAST_SITES, Terms, default_threshold, ring_of
from consilience.common.sums.ring import MOST_SITES
from consilience.server.contract import RunContract
from consilience.server.labelling import Diagnostics
from consilience.server.secure_sums import SecureSum
from consilience.server.summing import members_of, sum_over
from consilience.server.unmasking import unify_summed, unmask_sums


class SummedPool:
    """The secure sum over a run's pool."""

    def __init__(self, run: Path, job: JobSettings, contract: RunContract, pool: Pool) -> None:
        """Begin the sum, or go on with it.

        Raises `AskingError` when there are fewer than three sites or too many, one has no key, their weights or noise
        do not fit, or the sum may carry less noise than one needs; `RunError`, `StorageError`.
        """
        count = len(contract.sites)
        if count < LEAST_SITES:
            raise AskingError(
                f"{count} sites take part; a secure sum needs {LEAST_SITES}",
                hint=f"Wait for more sites (ask.wait_for) in {NEW_RUN}",
            )
        if count > MOST_SITES:
            raise AskingError(
                f"{count} sites take part; a secure sum has at most {MOST_SITES}",
                hint=f"Admit fewer sites, or ask openly (privacy.secure_sum: false), in {NEW_RUN}",
            )
        folder = run / "sums" / pool.digest[:12]
        # What has been summed is summed: too few sites must be noticed before, not after. The sites hold a run to the
        # number it began with.
        threshold = max(default_threshold(count), min(count, job.ask.min_sites or count))
        attempt = 1 + secrets.randbelow(2**48)  # of its own, so that sites make new keys for it: they serve once
        if (folder / "terms.json").exists():
            held = read_json(folder / "terms.json")
            threshold, attempt = int(held["threshold"]), int(held["attempt"])
        terms = _terms(job, contract, pool, threshold, attempt)
        if terms.noise is not None:
            for card in contract.sites:
                if short := terms.noise.shortage(card.name, threshold):
                    raise AskingError(
                        f"The secure sum may carry too little noise: {short}",
                        hint="Set ask.min_sites higher, so that more sites must stay, or let sites choose "
                        f"privacy.sigma and privacy.honest alike; then start {NEW_RUN}. Nothing was asked",
                    )
        self._job, self._labels = job, contract.labels
        self._secure = SecureSum(folder, terms)

    @property
    def done(self) -> bool:
        """Whether the sums are there."""
        return (self._secure.folder / "summed.json").exists()

    @property
    def survivors(self) -> tuple[str, ...]:
        """The sites in the sums; none before they are there."""
        return self._secure.unmask().survivors if self.done else ()

    def ask(self, grid: Grid, nodes: Mapping[str, int]) -> dict[str, str]:
        """Do the rounds that are not done; returns site -> why it was lost. Raises as `sum_over` does."""
        chosen = self._job.ask
        if self.done:
            return {}
        return sum_over(grid, nodes, self._secure, patience=chosen.wait, retries=chosen.retries)[1]

    def unify(self, folder: Path, space: LabelSpace) -> tuple[NDArray[np.float32], Diagnostics]:
        """Write `folder`/q.npy, (n, L) over `space`, the survivors' label space, unless it is there.

        Returns the labels, memory-mapped, and the diagnostics. Raises `UnifyError`, `StorageError`.
        """
        terms, across = self._secure.terms, self._job.unify.across
        key = sha256(canonical_json([terms.digest, self.survivors, across, space.names]))
        path, notes = folder / "q.npy", folder / "diagnostics.json"
        if notes.exists() and path.exists():
            done = Diagnostics.model_validate(read_json(notes))
            if done.key == key:
                return np.load(path, mmap_mode="r"), done
        notes.unlink(missing_ok=True)
        began = time.perf_counter()
        columns = [self._labels.index(name) for name in space.names]
        found = unify_summed(path, unmask_sums(self._secure), across=across, columns=columns)
        diagnostics = Diagnostics(
            key=key,
            samples=len(terms),
            seconds=time.perf_counter() - began,
            not_converged=found.not_converged,
            largest_residual=found.largest_residual,
            mean_iterations=found.mean_iterations,
        )
        write_json(notes, diagnostics.model_dump(mode="json"))
        return found.probs, diagnostics


def _terms(job: JobSettings, contract: RunContract, pool: Pool, threshold: int, attempt: int) -> Terms:
    """Return the terms of the sum. Raises `AskingError` for what the numbers of a sum cannot carry."""
    members = members_of(contract, job.unify.weights)
    try:
        ring_of(members, len(contract.labels))  # before all else: it can say what to do
        terms = Terms(
            job=job.name,
            contract=sha256(canonical_json(contract.model_dump(mode="json"))),
            pool=pool.digest,
            start=0,
            stop=len(pool),
            labels=contract.labels,
            synonyms=tuple((name, *others) for name, others in sorted(job.labels.synonyms.items())),
            temperature=job.unify.temperature,
            attempt=attempt,
            threshold=threshold,
            members=members,
        )
        terms.to_content()
    except ProtocolError as error:
        raise AskingError(
            f"The terms of the secure sum, {len(members)} sites with {sum(len(m.classes) for m in members):,} classes "
            "in all, fit into no message",
            hint=f"Ask openly (privacy.secure_sum: false), or admit fewer sites, in {NEW_RUN}. Nothing was asked",
        ) from error
    except SettingsError as error:
        sigmas = ", ".join(f"{member.site}: {member.noise.sigma:g}" for member in members if member.noise is not None)
        told = f"; privacy.sigma of the sites: {sigmas}" if sigmas else ""
        raise AskingError(
            f"The numbers of the secure sum do not fit: {error.message}{told}",
            hint=f"{error.hint or 'Correct job.yaml'}; then start {NEW_RUN}. Nothing was asked",
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "terms"
        raise AskingError(
            f"The terms of the secure sum are not as they must be: {field}: {first['msg']}",
            hint=f"Correct job.yaml or the sites' cards; then start {NEW_RUN}. Nothing was asked",
        ) from error
    return terms
