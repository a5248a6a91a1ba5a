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
from consilience.common.sums.masks import Mask, mask_key, pair_key, pair_sign, public_hex, self_key, take_off
from consilience.common.sums.messages import RowsQuestion, Terms
from consilience.common.sums.shares import combine
from helpers.summing import Sums, draw, make_terms

SETS = {"ant": [0, 1, 2, 3], "bee": [3, 2, 1, 0], "cat": [0, 1, 2, 3], "dog": [0, 2, 1]}
HONEST, COLLUDING = ("ant", "bee"), ("cat", "dog")  # threshold - 1 collude
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


def sent(sums: Sums, site: str = "ant") -> NDArray[np.uint32]:
    """What a site of four classes sends."""
    question = RowsQuestion(terms=sums.terms.digest, start=0, stop=SAMPLES)
    return sums.sites[site].rows(question, lambda _, low, high: sums.answers[site][low:high]).rows(4).copy()


def without_known_masks(sums: Sums) -> dict[str, NDArray[np.uint32]]:
    """The rows of `ant` and `bee` as server and colluding sites see them at the end: what both share is still on."""
    rows = {site: sent(sums, site) for site in HONEST}
    for site in ("bee", "cat", "dog"):
        sums.send(site)
    sums.send("ant")
    unmask, roster, terms = sums.server.unmask(), sums.server.roster(), sums.terms
    opened = {site: sums.sites[site].open(unmask) for site in SETS}
    for site in HONEST:
        shares = {
            roster.places[holder]: bytes.fromhex(share.share)
            for holder, message in opened.items()
            for share in message.shares
            if share.of == site
        }
        own = Mask(self_key(combine(shares, terms.threshold), terms.digest, site), np.arange(4))
        take_off([own, *known_pairs(sums, terms, site)], rows[site], 0)
    return rows


def known_pairs(sums: Sums, terms: Terms, site: str) -> list[Mask]:
    out = []
    for other in COLLUDING:
        labels = sorted(set(SETS[site]) & set(SETS[other]))
        columns = np.array([SETS[site].index(label) for label in labels])
        seed = SEEDS[sums.folder, other]
        theirs = sums.server.roster().by_name[site].mask_key
        key = pair_key(mask_key(seed, terms.digest, other), theirs, terms.digest, (site, other))
        out.append(Mask(key, columns, pair_sign(site, other)))
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
                rows.append(without_known_masks(sums)["ant"])
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
    monkeypatch.setattr(masks.Stream, "read", lambda stream, count, memory: np.zeros(count, np.uint32))
    found = p_values(*collect(tmp_path, view, 1))
    assert found["one against two"] < 1e-100
    assert found["uniform"] < 1e-100
    assert found["top bits of one"] < 1e-100


def least_p_of_a_stream(folder: Path) -> float:
    """Server and two colluding sites of a threshold of three: did `ant` and `bee` answer one way, or the other?

    What they know of the two honest sites is the sum of both. Give `ant` some other answer and `bee` the rest: the
    common mask that `ant` then wears must take what `bee` sent to that rest, word for word. Return how likely the least
    likely of these masks is, if a mask is a stream of uniform words.
    """
    sums = ready(folder, 2.0, 1)
    tell_seeds(sums)
    seen, ring = without_known_masks(sums), sums.terms.ring()
    order = [SETS["bee"].index(label) for label in SETS["ant"]]
    truth = ring.encode(sums.answers["ant"], 1.0)
    both = truth + ring.encode(sums.answers["bee"], 1.0)[:, order]
    found = []
    for ant in (truth, *((both * share).astype(np.uint32) for share in (0.0, 0.25, 1.0))):
        stream = seen["ant"] - ant  # the common mask with its sign at ant, which is the other one at bee
        np.testing.assert_array_equal(seen["bee"][:, order] + stream, both - ant)
        for bits in (stream >> 28, stream >> 4 & 15, stream & 15):
            found.append(float(chisquare(np.bincount(bits.reshape(-1), minlength=16)).pvalue))
    return min(found)


def test_the_transcript_and_all_but_one_of_the_needed_shares_fit_other_answers(tmp_path: Path) -> None:
    assert least_p_of_a_stream(tmp_path) > 1e-7  # of twelve


def test_with_the_mask_off_the_transcript_tells_which_answer_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks.Stream, "read", lambda stream, count, memory: np.zeros(count, np.uint32))
    assert least_p_of_a_stream(tmp_path) < 1e-100


def test_fewer_shares_than_the_threshold_give_no_seed(tmp_path: Path) -> None:
    sums = ready(tmp_path, 0.0, 1)
    roster = sums.server.roster()
    shares = {}
    for site in COLLUDING:
        (path,) = (sums.folder / "sites" / site).glob("*.json")
        shares[roster.places[site]] = bytes.fromhex(sums.sites[site]._load(path).holds["ant"][0])
    with pytest.raises(ProtocolError, match="2 shares"):
        combine(shares, sums.terms.threshold)
    made = {public_hex(mask_key(combine(shares, 2), sums.terms.digest, "ant"))}
    third = {**shares, 0: bytes(16)}
    made.add(public_hex(mask_key(combine(third, 3), sums.terms.digest, "ant")))
    assert roster.by_name["ant"].mask_key not in made
    (path,) = (sums.folder / "sites" / "bee").glob("*.json")
    shares[roster.places["bee"]] = bytes.fromhex(sums.sites["bee"]._load(path).holds["ant"][0])
    seed = combine(shares, 3)  # and one more gives it
    assert roster.by_name["ant"].mask_key == public_hex(mask_key(seed, sums.terms.digest, "ant"))


@pytest.mark.parametrize(("honest", "owners"), [(("ant", "bee"), 1), (("ant", "bee", "eel"), 4)])
def test_what_is_left_of_a_sum_is_over_the_honest_that_stay_and_a_policy_says_how_many_these_are(
    tmp_path: Path, honest: tuple[str, ...], owners: int
) -> None:
    """Two of the sites tell all they know, and `bee` is lost by itself: of four sites only `ant` is left."""
    sets = {site: [0, 1, 2, 3] for site in (*honest, *COLLUDING)}
    terms, answers = make_terms(sets, SAMPLES), draw(sets, SAMPLES)
    found = Sums(tmp_path, terms, answers, piece=SAMPLES // 2).run(lost=["bee"], owners=owners)
    probs = {site: np.exp(answers[site].astype(np.float64)) for site in sets}
    left = found.sums - sum(probs[site] / probs[site].sum(axis=1, keepdims=True) for site in COLLUDING)
    alone = np.abs(left - probs["ant"]).max(axis=1)
    assert (alone < 1e-6).all() if owners == 1 else (alone > 1e-3).all()
    if owners == 1:
        with pytest.raises(ProtocolError, match="sure to be summed over 3 sites; the policy wants 4"):
            Sums(tmp_path / "other", make_terms(sets, SAMPLES, job="other"), answers).advertise(owners=4)


def late_rows(tmp_path: Path) -> list[NDArray[np.uint32]]:
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
                take_off([Mask(pair, columns, pair_sign("ant", other))], late, 0)
            rows.append(late)
        found.append(np.concatenate(rows))
    return found


def test_late_rows_of_a_lost_site_stay_masked(tmp_path: Path) -> None:
    assert min(p_values(*late_rows(tmp_path)).values()) > 1e-6


def test_with_the_mask_off_late_rows_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks.Stream, "read", lambda stream, count, memory: np.zeros(count, np.uint32))
    assert p_values(*late_rows(tmp_path))["one against two"] < 1e-100
