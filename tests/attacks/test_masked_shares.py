"""Masked rows tell nothing of one site's answer, the other sites fixed; and with the mask off, they do.

What the server sees of a site `ant` is collected over many sums with keys of their own, for two answers of `ant` that
lie as far apart as can be. Each test looks at the same figures with masks on, where it must find nothing, and with
masks off, where it must find out: a test that cannot find anything proves nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chisquare, ks_2samp, kstest

from consilience.common.errors import ProtocolError
from consilience.common.sums import masks
from consilience.common.sums.masks import Mask, mask_key, pair_key, pair_sign, self_key
from consilience.common.sums.messages import RowsQuestion, Terms
from consilience.common.sums.shares import combine
from helpers.summing import Sums, make_terms

SETS = {"ant": [0, 1, 2, 3], "bee": [3, 2, 1, 0], "cat": [0, 1, 2, 3], "dog": [0, 2, 1]}
COLLUDING = ("cat", "dog")  # threshold - 1
SAMPLES, SUMS = 250, 3
LEAST = 1e-3
"""p-values below count as found out. Seeds are fresh each time: eight tests give one false alarm in a hundred runs,
so each is tried once more, which leaves one in a million."""

pytestmark = pytest.mark.usefixtures("unsynced")


def answers_of(low: float) -> dict[str, NDArray[np.float64]]:
    """`ant` gives its first class the log-odds `low`; the others always answer alike."""
    fixed = np.random.default_rng(0)
    out = {site: fixed.normal(0, 1, (SAMPLES, len(classes))) for site, classes in SETS.items()}
    out["ant"] = np.zeros((SAMPLES, 4))
    out["ant"][:, 0] = low
    return out


def ready(folder: Path, low: float, attempt: int) -> Sums:
    """A sum whose sites are ready to send rows."""
    terms = make_terms(SETS, SAMPLES, attempt=attempt, threshold=3)
    sums = Sums(folder / f"{low}-{attempt}", terms, answers_of(low), piece=SAMPLES)
    sums.advertise()
    sums.share()
    sums.deliver()
    return sums


def sent(sums: Sums) -> NDArray[np.uint32]:
    """What `ant` sends."""
    question = RowsQuestion(terms=sums.terms.digest, start=0, stop=SAMPLES)
    return sums.sites["ant"].rows(question, lambda _, low, high: sums.answers["ant"][low:high]).rows(4).copy()


def without_known_masks(sums: Sums) -> NDArray[np.uint32]:
    """The rows of `ant` as server and colluding sites see them at the end: only what `bee` shares is still on."""
    rows = sent(sums)
    for site in ("bee", "cat", "dog"):
        sums.send(site)
    sums.send("ant")
    unmask, roster, terms = sums.server.unmask(), sums.server.roster(), sums.terms
    opened = {site: sums.sites[site].open(unmask) for site in SETS}
    shares = {
        roster.places[holder]: bytes.fromhex(share.share)
        for holder, message in opened.items()
        for share in message.shares
        if share.of == "ant"
    }
    own = Mask(self_key(combine(shares, terms.threshold), terms.digest, "ant"), np.arange(4))
    own.take_off(rows, 0)
    for mask in known_pairs(sums, terms):
        mask.take_off(rows, 0)
    return rows


def known_pairs(sums: Sums, terms: Terms) -> list[Mask]:
    out = []
    for site in COLLUDING:
        labels = sorted(set(SETS["ant"]) & set(SETS[site]))
        columns = np.array([SETS["ant"].index(label) for label in labels])
        seed = SEEDS[sums.folder, site]
        theirs = sums.server.roster().by_name["ant"].mask_key
        key = pair_key(mask_key(seed, terms.digest, site), theirs, terms.digest, ("ant", site))
        out.append(Mask(key, columns, pair_sign("ant", site)))
    return out


SEEDS: dict[tuple[Path, str], bytes] = {}


def tell_seeds(sums: Sums) -> None:
    """The colluding sites tell their secrets."""
    for site in COLLUDING:
        (path,) = (sums.folder / "sites" / site).glob("*.json")
        SEEDS[sums.folder, site] = bytes.fromhex(sums.sites[site]._load(path).mask_seed)


def collect(folder: Path, view: str, try_: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """(SUMS * SAMPLES, 4) words for either answer of `ant`."""
    found = []
    for low in (-6.0, 6.0):
        rows = []
        for attempt in range(1, SUMS + 1):
            sums = ready(folder / str(try_), low, attempt)
            if view == "alone":
                rows.append(sent(sums))
            else:
                tell_seeds(sums)
                rows.append(without_known_masks(sums))
        found.append(np.concatenate(rows))
    return found[0], found[1]


def p_values(one: NDArray[np.uint32], two: NDArray[np.uint32]) -> dict[str, float]:
    """How likely such figures are if words are uniform, and the same for either answer."""
    nibbles = [np.bincount(words.reshape(-1) >> 28, minlength=16) for words in (one, two)]
    found = {
        "top bits of one": chisquare(nibbles[0]).pvalue,
        "low bits of two": chisquare(np.bincount(two.reshape(-1) & 15, minlength=16)).pvalue,
        "uniform": kstest(two[:, 0] / 2**32, "uniform").pvalue,
        "one against two": ks_2samp(one[:, 0], two[:, 0]).pvalue,
    }
    return {name: float(np.asarray(p)) for name, p in found.items()}


@pytest.mark.parametrize("view", ["alone", "with colluders"])
def test_masked_rows_tell_nothing(tmp_path: Path, view: str) -> None:
    first = p_values(*collect(tmp_path, view, 1))
    if min(first.values()) < LEAST:
        again = p_values(*collect(tmp_path, view, 2))
        assert all(max(first[name], again[name]) >= LEAST for name in first), (first, again)


@pytest.mark.parametrize("view", ["alone", "with colluders"])
def test_with_the_mask_off_they_tell(tmp_path: Path, view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "words", lambda key, first, count: np.zeros(count, np.uint32))
    found = p_values(*collect(tmp_path, view, 1))
    assert found["one against two"] < 1e-100
    assert found["uniform"] < 1e-100
    assert found["top bits of one"] < 1e-100


def test_the_transcript_and_all_but_one_of_the_needed_shares_fit_other_answers(tmp_path: Path) -> None:
    """Server and two colluding sites of a threshold of three: `ant` and `bee` may have answered one way or the other.

    What they know of the two honest sites is the sum of both. Give `ant` some other answer and `bee` the rest: there
    is a stream of their common mask with which both sent just what they sent.
    """
    sums = ready(tmp_path, 2.0, 1)
    tell_seeds(sums)
    terms, seen = sums.terms, without_known_masks(sums)
    ring = terms.ring()
    truth = {site: ring.encode(sums.answers[site], 1.0) for site in ("ant", "bee")}
    order = [SETS["bee"].index(label) for label in SETS["ant"]]
    both = truth["ant"] + truth["bee"][:, order]
    for share_of_ant in (0.0, 0.25, 1.0):
        ant = (both * share_of_ant).astype(np.uint32)
        bee = both - ant
        stream = seen - ant  # what the common mask would have to be
        np.testing.assert_array_equal(ant + stream, seen)
        np.testing.assert_array_equal(ant + bee, both)  # and the sum is as it was
        assert chisquare(np.bincount(stream.reshape(-1) >> 28, minlength=16)).pvalue > 1e-9  # as likely as the true one


def test_fewer_shares_than_the_threshold_give_no_seed(tmp_path: Path) -> None:
    sums = ready(tmp_path, 0.0, 1)
    roster = sums.server.roster()
    shares = {}
    for site in COLLUDING:
        (path,) = (sums.folder / "sites" / site).glob("*.json")
        shares[roster.places[site]] = bytes.fromhex(sums.sites[site]._load(path).holds["ant"][0])
    with pytest.raises(ProtocolError, match="2 shares"):
        combine(shares, sums.terms.threshold)
    made = {mask_key(combine(shares, 2), sums.terms.digest, "ant").public_key().public_bytes_raw().hex()}
    third = {**shares, 0: bytes(16)}
    made.add(mask_key(combine(third, 3), sums.terms.digest, "ant").public_key().public_bytes_raw().hex())
    assert roster.by_name["ant"].mask_key not in made


def test_late_rows_of_a_lost_site_stay_masked(tmp_path: Path) -> None:
    """`ant` counts as lost, its mask key is opened, and then its rows arrive: its own mask is still on."""
    found = []
    for low in (-6.0, 6.0):
        rows = []
        for attempt in range(1, SUMS + 1):
            sums = ready(tmp_path, low, attempt)
            for site in ("bee", "cat", "dog"):
                sums.send(site)
            late = sent(sums)
            unmask, roster, terms = sums.server.unmask(), sums.server.roster(), sums.terms
            shares = {}
            for holder in ("bee", "cat", "dog"):
                (share,) = (s for s in sums.sites[holder].open(unmask).shares if s.of == "ant")
                assert share.kind == "mask"
                shares[roster.places[holder]] = bytes.fromhex(share.share)
            key = mask_key(combine(shares, 3), terms.digest, "ant")
            for other in ("bee", "cat", "dog"):
                labels = sorted(set(SETS["ant"]) & set(SETS[other]))
                pair = pair_key(key, roster.by_name[other].mask_key, terms.digest, ("ant", other))
                columns = np.array([SETS["ant"].index(label) for label in labels])
                Mask(pair, columns, pair_sign("ant", other)).take_off(late, 0)
            rows.append(late)
        found.append(np.concatenate(rows))
    assert min(p_values(*found).values()) > 1e-6
