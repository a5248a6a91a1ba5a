"""From masked rows to sums and from sums to labels, block by block.

Lives here: `unmask_sums`, which gives seeds back from shares, takes masks off and writes W, and `unify_summed`, CE
from W. Does not live here: who sent what (server/secure_sums). Nothing of size samples x classes is held in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from consilience.common.errors import ProtocolError
from consilience.common.files import create_array, read_json, write_json
from consilience.common.sums.masks import Mask, mask_key, pair_key, pair_sign, public_hex, self_key, take_off
from consilience.common.sums.messages import Member, Roster, SeedKind, Terms, commit
from consilience.common.sums.ring import NoisyRing, Words
from consilience.common.sums.shares import combine
from consilience.server.noisy_sums import possible
from consilience.server.secure_sums import SecureSum
from consilience.server.unify import unify_sums
from consilience.server.unify.result import Across

_MEMORY = 2**22  # numbers a block
_TRIES = 256


@dataclass(frozen=True)
class Summed:
    """The sums over the survivors: exactly the sites whose rows all arrived."""

    sums: NDArray[np.float64]
    """(n, L) memory-mapped, W_l = sum of w_i p_i(l) over the surviving owners of l, and the noise that they added; 0
    where there is none."""
    survivors: tuple[Member, ...]

    @property
    def noisy(self) -> bool:
        """Whether some survivor added noise."""
        return any(member.noise is not None for member in self.survivors)

    @property
    def known(self) -> NDArray[np.bool_]:
        """(L,) which classes some survivor owns."""
        known = np.zeros(self.sums.shape[1], dtype=np.bool_)
        for member in self.survivors:
            known[list(member.classes)] = True
        return known


def unmask_sums(secure: SecureSum) -> Summed:
    """Write W to `sums.npy` in the sum's folder, once, and remove the masked rows.

    Raises `AskingError` when too few sites opened their shares; `ProtocolError` when shares do not give a seed back,
    or masks do not cancel; `StorageError`.
    """
    terms, names = secure.terms, secure.unmask().survivors
    survivors = tuple(terms.by_name[site] for site in names)
    path, notes = secure.folder / "sums.npy", secure.folder / "summed.json"
    if not (notes.exists() and read_json(notes) == {"terms": terms.digest, "survivors": list(names)}):
        masks = _masks(secure)
        sums = create_array(path, np.float64, (len(terms), len(terms.labels)))
        size = max(1, _MEMORY // len(terms.labels))
        for start in range(0, len(terms), size):
            stop = min(start + size, len(terms))
            total = np.zeros((stop - start, len(terms.labels)), dtype=np.uint32)
            for member in survivors:
                total[:, list(member.classes)] += secure.store(member.site).read(start, stop)
            take_off(masks, total, start)
            _check_cancelled(terms, survivors, total, terms.start + start)
            sums[start:stop] = terms.ring().decode(total)
        sums.flush()
        write_json(notes, {"terms": terms.digest, "survivors": list(names)})
    secure.forget_masked()
    return Summed(np.load(path, mmap_mode="r"), survivors)


def _masks(secure: SecureSum) -> list[Mask]:
    """Return what is left in the sum of the survivors' rows: own masks, and those they share with lost sites."""
    terms, roster, survivors = secure.terms, secure.roster(), secure.unmask().survivors
    shares: dict[tuple[str, SeedKind], dict[int, bytes]] = {}
    for holder, opened in secure.opened().items():
        for share in opened.shares:
            shares.setdefault((share.of, share.kind), {})[roster.places[holder]] = bytes.fromhex(share.share)
    masks = []
    for site in survivors:
        seed = _seed(terms, roster, site, "self", shares[site, "self"])
        columns = np.array(terms.by_name[site].classes, dtype=np.int64)
        masks.append(Mask(self_key(seed, terms.digest, site), columns))
    for lost in secure.sharers():
        if lost in survivors:
            continue
        key = mask_key(_seed(terms, roster, lost, "mask", shares[lost, "mask"]), terms.digest, lost)
        for site in survivors:
            both = sorted(set(terms.by_name[site].classes) & set(terms.by_name[lost].classes))
            if both:
                pair = pair_key(key, roster.by_name[site].mask_key, terms.digest, (site, lost))
                masks.append(Mask(pair, np.array(both, dtype=np.int64), pair_sign(site, lost)))
    return masks


def _seed(terms: Terms, roster: Roster, site: str, kind: SeedKind, shares: Mapping[int, bytes]) -> bytes:
    """Give a seed back and compare it with the site's advert; a few wrong shares among enough do no harm."""
    advert = roster.by_name[site]
    checks: dict[SeedKind, Callable[[bytes], bool]] = {
        "self": lambda seed: commit(seed, terms.digest, site) == advert.commitment,
        "mask": lambda seed: public_hex(mask_key(seed, terms.digest, site)) == advert.mask_key,
    }
    for chosen in islice(combinations(sorted(shares.items()), terms.threshold), _TRIES):
        seed = combine(dict(chosen), terms.threshold)
        if checks[kind](seed):
            return seed
    raise ProtocolError(f"The {len(shares)} shares of the {kind} seed of site {site} do not give it back")


def _check_cancelled(terms: Terms, survivors: tuple[Member, ...], total: Words, first: int) -> None:
    """Raise `ProtocolError` unless every row adds up to the survivors' weights: else some mask is still in it.

    With noise, to ten times the standard deviation of its sum; what a mask would bring is far more.
    """
    ring = terms.ring()
    due = ring.scale * sum(member.weight for member in survivors)
    allowed = float(sum(len(member.classes) for member in survivors))  # by rounding
    if isinstance(ring, NoisyRing) and terms.noise is not None:
        variance = terms.noise.variances([member.site for member in survivors]).sum()
        allowed += 10 * ring.unit * float(np.sqrt(variance))
    wrong = np.abs(ring.decode(total).sum(axis=1) * ring.scale - due) > allowed
    if wrong.any():
        raise ProtocolError(f"The masks of a secure sum do not cancel in sample {first + int(wrong.argmax())}")


@dataclass(frozen=True)
class SummedLabels:
    """CE from sums. Classes that no survivor owns have probability 0: nothing was said of them."""

    probs: NDArray[np.float32]
    """(n, number of columns) memory-mapped."""
    not_converged: int
    largest_residual: float
    mean_iterations: float


def unify_summed(
    path: Path, summed: Summed, *, across: Across = "centred", columns: Sequence[int] | None = None
) -> SummedLabels:
    """Write CE's soft labels to `path` (.npy), from the sums alone.

    `columns`: which classes are written, in which order; all of them by default, and at least those that are known.
    Raises `UnifyError`, `StorageError`.
    """
    known = summed.known
    place = np.cumsum(known) - 1
    sets = [place[list(member.classes)] for member in summed.survivors]
    weights = [member.weight for member in summed.survivors]
    samples, labels = summed.sums.shape
    width = labels + sum(map(len, sets)) if summed.noisy else labels
    chosen = np.arange(labels) if columns is None else np.asarray(columns, dtype=np.int64)
    probs = create_array(path, np.float32, (samples, len(chosen)))
    failed, largest, steps, size = 0, 0.0, 0.0, max(1, _MEMORY // width)
    for start in range(0, samples, size):
        block = summed.sums[start : start + size][:, known]
        if summed.noisy:
            block = possible(block, sets, weights)
        found = unify_sums(block, sets, int(known.sum()), weights=weights, across=across)
        probs[start : start + size, known[chosen]] = found.probs[:, place[chosen[known[chosen]]]]
        steps += float(found.iterations.sum())
        failed += int(np.sum(~found.converged))
        largest = max(largest, float(found.residual.max(initial=0.0)))
    probs.flush()
    return SummedLabels(np.load(path, mmap_mode="r"), failed, largest, steps / max(samples, 1))
