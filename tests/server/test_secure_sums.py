"""A secure sum from end to end: exactly the sum of those who answered, whoever is lost, killed or asked twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consilience.common.errors import AskingError, ProtocolError, RunError, StorageError
from consilience.common.sums.messages import MaskedRows, Opened, OpenedShare, RowsQuestion
from consilience.server.masked import MaskedStore
from consilience.server.secure_sums import SecureSum
from consilience.server.unify import unify
from consilience.server.unmasking import unify_summed, unmask_sums
from helpers.summing import Sums, draw, make_terms, open_sums

SETS = {
    "ant": [0, 1, 2, 3],
    "bee": [3, 1, 4],
    "cat": [5, 0, 4, 2],
    "dog": [1, 5, 3, 0],
    "elk": [2, 5, 4, 6],
}
SAMPLES = 40
RESOLUTION = 5 / 2**32


pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture
def sums(tmp_path: Path) -> Sums:
    return Sums(tmp_path, make_terms(SETS, SAMPLES), draw(SETS, SAMPLES))


def test_the_sum_is_that_of_open_answers(sums: Sums) -> None:
    summed = sums.run()
    np.testing.assert_allclose(summed.sums, open_sums(sums.terms, sums.answers), atol=3 * RESOLUTION)
    assert summed.known.all()
    assert not (sums.server.folder / "masked").exists()


def test_weights_temperature_and_a_part_of_the_pool(tmp_path: Path) -> None:
    weights = {"ant": 1.5, "elk": 0.75}
    terms = make_terms(SETS, SAMPLES, start=13, weights=weights, temperature=3.0)
    answers = draw(SETS, SAMPLES)
    summed = Sums(tmp_path, terms, answers).run()
    soft = {site: rows / 3.0 for site, rows in answers.items()}
    np.testing.assert_allclose(summed.sums, open_sums(terms, soft), atol=5 * RESOLUTION)


@pytest.mark.parametrize("lost", [["bee"], ["ant"]])
def test_lost_in_the_middle(sums: Sums, lost: list[str]) -> None:
    summed = sums.run(lost)
    left = sorted(set(SETS) - set(lost))
    assert [member.site for member in summed.survivors] == left
    np.testing.assert_allclose(summed.sums, open_sums(sums.terms, sums.answers, left), atol=3 * RESOLUTION)


def test_lost_in_every_round(tmp_path: Path) -> None:
    sets = {**SETS, "fox": [0, 6, 2], "gnu": [4, 6], "hen": [1, 6, 0]}
    sums = Sums(tmp_path, make_terms(sets, SAMPLES, threshold=5), draw(sets, SAMPLES))
    sums.advertise(without=["ant"])
    sums.share(without=["ant", "bee"])
    sums.deliver(without=["cat"])  # has shared, so that the others wear masks for it
    for site in ("dog", "elk", "fox", "gnu", "hen"):
        sums.send(site)
    sums.open(without=["cat"])
    summed = unmask_sums(sums.server)
    left = ["dog", "elk", "fox", "gnu", "hen"]
    np.testing.assert_allclose(summed.sums, open_sums(sums.terms, sums.answers, left), atol=3 * RESOLUTION)
    assert summed.known.all()


def test_opening_needs_the_threshold_only(sums: Sums) -> None:
    sums.advertise()
    sums.share()
    sums.deliver()
    for site in sums.sites:
        sums.send(site)
    sums.open(without=["ant"])  # its rows count all the same
    np.testing.assert_allclose(unmask_sums(sums.server).sums, open_sums(sums.terms, sums.answers), atol=3 * RESOLUTION)


def test_every_party_may_be_killed_between_any_two_steps(tmp_path: Path) -> None:
    terms, answers = make_terms(SETS, SAMPLES), draw(SETS, SAMPLES)

    def anew() -> Sums:
        return Sums(tmp_path, terms, answers)

    # Every round runs twice, each time with server and sites that know only what is on disk.
    for _ in range(2):
        anew().advertise()
    for _ in range(2):
        anew().share()
    for _ in range(2):
        anew().deliver()
    for site in SETS:
        while anew().server.questions(site, 7):
            anew().send(site, 3)
    for _ in range(2):
        anew().open()
    expected = open_sums(terms, answers)
    for _ in range(2):
        np.testing.assert_allclose(unmask_sums(anew().server).sums, expected, atol=3 * RESOLUTION)


def test_how_questions_are_cut_changes_no_byte(tmp_path: Path) -> None:
    terms, answers = make_terms(SETS, SAMPLES), draw(SETS, SAMPLES)
    sums = Sums(tmp_path, terms, answers)
    sums.advertise()
    sums.share()
    sums.deliver()

    def masked(low: int, high: int) -> bytes:
        question = RowsQuestion(terms=terms.digest, start=low, stop=high)
        return sums.sites["ant"].rows(question, lambda _, low, high: answers["ant"][low:high]).data

    assert masked(0, 40) == masked(0, 1) + masked(1, 18) + masked(18, 40)
    assert masked(0, 40) == masked(0, 40)


def test_labels_are_those_of_open_answers(tmp_path: Path) -> None:
    for lost in ([], ["elk"]):
        folder = tmp_path / str(len(lost))
        sums = Sums(folder, make_terms(SETS, 400), draw(SETS, 400), piece=150)
        summed = sums.run(lost)
        found = unify_summed(folder / "q.npy", summed)
        left = [site for site in SETS if site not in lost]
        expected = unify([sums.answers[site] for site in left], [SETS[site] for site in left])
        assert found.not_converged == 0
        assert found.largest_residual < 1e-7
        np.testing.assert_array_equal(summed.known, np.arange(7) < expected.probs.shape[1])
        known = found.probs[:, summed.known]
        np.testing.assert_allclose(known, expected.probs, atol=1e-5)
        assert (known.argmax(axis=1) == expected.probs.argmax(axis=1)).all()
        assert not found.probs[:, ~summed.known].any()
        turned = unify_summed(folder / "turned.npy", summed, columns=np.arange(7)[summed.known][::-1].tolist())
        np.testing.assert_array_equal(turned.probs, known[:, ::-1])


# Refusals


@pytest.mark.parametrize("round_", ["advertise", "share", "rows", "open"])
def test_too_few_sites_are_refused_at_once(sums: Sums, round_: str) -> None:
    away = ["cat", "dog"]
    sums.advertise(away if round_ == "advertise" else ())
    if round_ == "advertise":
        refused: Any = sums.server.roster
    else:
        sums.share(away if round_ == "share" else ())
        if round_ == "share":
            refused = sums.server.sharers
        else:
            sums.deliver()
            for site in SETS:
                sums.send(site, 1 if round_ == "rows" and site in away else None)
            refused = sums.server.unmask
            if round_ == "open":
                sums.open(without=away)
                refused = lambda: unmask_sums(sums.server)  # noqa: E731
    with pytest.raises(AskingError, match=r"3 of 5 sites .* 4 are needed; not: cat, dog"):
        refused()
    assert not (sums.server.folder / "summed.json").exists()
    if round_ == "rows":
        assert not (sums.server.folder / "unmask.json").exists()
        for site in away:
            sums.send(site)
        refused()  # nothing was closed: what was missing can still come


def test_a_site_that_contradicts_itself_is_refused(sums: Sums) -> None:
    sums.advertise()
    sums.share()
    sums.deliver()
    sums.send("ant")
    question = RowsQuestion(terms=sums.terms.digest, start=3, stop=5)
    with pytest.raises(ProtocolError, match="other masked rows"):
        sums.server.add_rows("ant", MaskedRows(question, bytes(2 * 4 * 4)))
    for data in (b"", bytes(2 * 4 * 4 - 1), bytes(2 * 4 * 4 + 4)):
        with pytest.raises(ProtocolError, match="allowed: 32 for 2 rows of 4 classes"):
            sums.server.add_rows("ant", MaskedRows(question, data))
    for other in (
        RowsQuestion(terms="b" * 64, start=3, stop=5),
        RowsQuestion(terms=sums.terms.digest, start=39, stop=41),
    ):
        with pytest.raises(ProtocolError, match="another secure sum"):
            sums.server.add_rows("ant", MaskedRows(other, bytes(32)))


def test_rows_that_come_too_late_are_refused(sums: Sums) -> None:
    sums.advertise()
    sums.share()
    sums.deliver()
    for site in SETS:
        sums.send(site, 1 if site == "cat" else None)
    sums.server.unmask()
    with pytest.raises(ProtocolError, match="cat came too late"):
        sums.send("cat")


def test_masks_that_do_not_cancel_are_noticed(sums: Sums) -> None:
    sums.advertise()
    sums.share()
    sums.deliver()
    for site in SETS:
        if site != "ant":
            sums.send(site)
    # A site that leaves its masks off, or puts on others.
    question = RowsQuestion(terms=sums.terms.digest, start=0, stop=SAMPLES)
    sums.server.add_rows("ant", MaskedRows(question, bytes(SAMPLES * 4 * 4)))
    sums.open()
    with pytest.raises(ProtocolError, match="do not cancel in sample 0"):
        unmask_sums(sums.server)


def forged(opened: Opened, of: str) -> Opened:
    shares = [
        OpenedShare(of=share.of, kind=share.kind, share="00" * 16 if share.of == of else share.share)
        for share in opened.shares
    ]
    return Opened(terms=opened.terms, site=opened.site, shares=tuple(shares))


@pytest.mark.parametrize("liars", [["bee"], ["bee", "dog"]])
@pytest.mark.parametrize("of", ["ant", "elk"])  # a survivor's own mask, a lost site's key
def test_wrong_shares(sums: Sums, liars: list[str], of: str) -> None:
    sums.advertise()
    sums.share()
    sums.deliver()
    for site in SETS:
        sums.send(site, 1 if site == "elk" else None)
    unmask = sums.server.unmask()
    for site in SETS:
        opened = sums.sites[site].open(unmask)
        sums.server.add_opened(site, forged(opened, of) if site in liars else opened)
    if len(liars) == 1:  # four of five suffice
        expected = open_sums(sums.terms, sums.answers, [site for site in SETS if site != "elk"])
        np.testing.assert_allclose(unmask_sums(sums.server).sums, expected, atol=3 * RESOLUTION)
    else:
        with pytest.raises(ProtocolError, match=f"seed of site {of} do not give it back"):
            unmask_sums(sums.server)


def test_shares_that_were_not_asked_for_are_refused(sums: Sums) -> None:
    sums.advertise()
    sums.share()
    sums.deliver()
    for site in SETS:
        sums.send(site)
    opened = sums.sites["ant"].open(sums.server.unmask())
    swapped = [OpenedShare(of=s.of, kind="mask", share=s.share) for s in opened.shares]
    for wrong in (
        opened.model_copy(update={"shares": opened.shares[1:]}),
        opened.model_copy(update={"shares": tuple(swapped)}),
        opened.model_copy(update={"terms": "b" * 64}),
        opened.model_copy(update={"site": "bee"}),
    ):
        with pytest.raises(ProtocolError, match="not opened the shares that were asked for"):
            sums.server.add_opened("ant", wrong)


def test_shares_that_were_opened_for_another_job_are_refused(sums: Sums, tmp_path: Path) -> None:
    """Same sites, same identities, same samples: only the job is another."""
    other = Sums(tmp_path / "other", make_terms(SETS, SAMPLES, job="other"), sums.answers)
    for each in (sums, other):
        each.advertise()
        each.share()
        each.deliver()
        for site in SETS:
            each.send(site)
    theirs = {site: other.sites[site].open(other.server.unmask()) for site in ("ant", "bee")}
    sums.open(without=["ant", "bee"])
    for site, opened in theirs.items():
        with pytest.raises(ProtocolError, match="not opened the shares that were asked for"):
            sums.server.add_opened(site, opened)
    with pytest.raises(AskingError, match="3 of 5 sites have opened their shares, 4 are needed"):
        unmask_sums(sums.server)
    for site, opened in theirs.items():  # as a site sends them that lies about the job
        sums.server.add_opened(site, opened.model_copy(update={"terms": sums.terms.digest}))
    with pytest.raises(ProtocolError, match="do not give it back"):
        unmask_sums(sums.server)


def test_a_folder_holds_one_sum(sums: Sums) -> None:
    with pytest.raises(RunError, match="other terms"):
        SecureSum(sums.server.folder, make_terms(SETS, SAMPLES, attempt=2))
    (sums.server.folder / "terms.json").write_text("{")
    with pytest.raises(StorageError, match=r"terms\.json is damaged"):
        SecureSum(sums.server.folder, sums.terms)


# Masked rows on disk


def test_masked_rows_survive_a_torn_line(tmp_path: Path) -> None:
    rows = np.arange(30, dtype=np.uint32).reshape(10, 3)
    store = MaskedStore(tmp_path, 10, 3)
    assert store.missing() == [(0, 10)]
    store.put(6, rows[6:8])
    store.put(2, rows[2:4])
    store.put(2, rows[2:4])
    with (tmp_path / "index.jsonl").open("ab") as file:
        file.write(b'{"start": 4, "st')
    again = MaskedStore(tmp_path, 10, 3)
    assert again.missing() == [(0, 2), (4, 6), (8, 10)]
    assert not again.complete
    again.put(0, rows)
    assert MaskedStore(tmp_path, 10, 3).complete
    np.testing.assert_array_equal(MaskedStore(tmp_path, 10, 3).read(0, 10), rows)


def test_changed_rows_are_noticed(tmp_path: Path) -> None:
    store = MaskedStore(tmp_path, 4, 2)
    store.put(0, np.ones((4, 2), np.uint32))
    with (tmp_path / "rows.bin").open("rb+") as file:
        file.write(b"\x07")
    with pytest.raises(StorageError, match="line 1 does not fit the rows"):
        MaskedStore(tmp_path, 4, 2)
