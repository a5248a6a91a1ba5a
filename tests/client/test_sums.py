"""A site in secure sums: what it gives, what it refuses, and that its record holds it to it."""

from __future__ import annotations

import json
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from pydantic import ValidationError

from consilience.client import sum_index
from consilience.client.sum_index import MOST_OPEN
from consilience.client.sums import SumSite
from consilience.common.errors import ProtocolError, StorageError
from consilience.common.sums.messages import (
    Advert,
    Delivered,
    Delivery,
    MaskedRows,
    Roster,
    RowsQuestion,
    Terms,
    Unmask,
    default_threshold,
)
from helpers.summing import DIGEST, POLICY, Sums, draw, identity, make_terms, names_of, new_site

SETS = {"ant": [0, 1, 2], "bee": [1, 2, 0], "cat": [2, 0, 1], "dog": [0, 2]}
SAMPLES = 12

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture
def sums(tmp_path: Path) -> Sums:
    return Sums(tmp_path, make_terms(SETS, SAMPLES), draw(SETS, SAMPLES))


def advert_of(sums: Sums, terms: Terms, site: str = "ant", **changes: Any) -> Advert:
    own = {"teacher": DIGEST, "policy": POLICY, "classes": names_of(SETS[site]), **changes}
    return sums.sites[site].advertise(terms, **own)


def no_answer(terms: Terms, start: int, stop: int) -> np.ndarray:
    raise AssertionError("the teacher was asked")


# Round 0


def test_keys_are_made_once_and_others_for_another_attempt(sums: Sums) -> None:
    advert = advert_of(sums, sums.terms)
    assert advert_of(sums, sums.terms) == advert
    other = advert_of(sums, make_terms(SETS, SAMPLES, attempt=2))
    assert len({advert.mask_key, advert.seal_key, other.mask_key, other.seal_key}) == 4


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"teacher": "b" * 64}, "another teacher"),
        ({"policy": "d" * 16}, "another teacher, policy"),
        ({"classes": names_of([0, 1, 2, 3])}, "not that of its classes"),
        ({"classes": names_of([0, 2, 1])}, "not that of its classes"),
        ({"classes": ("class-0", "class-1", "other")}, "not that of its classes"),
    ],
)
def test_terms_about_another_state_of_the_site_are_refused(sums: Sums, changes: Any, part: str) -> None:
    with pytest.raises(ProtocolError, match=part):
        advert_of(sums, sums.terms, **changes)


def test_terms_without_the_site_or_with_another_key_are_refused(sums: Sums, tmp_path: Path) -> None:
    for name, key in (("eel", "eel"), ("ant", "bee")):
        stranger = new_site(tmp_path / name, name, key)
        with pytest.raises(ProtocolError, match="do not name this site and its key"):
            stranger.advertise(sums.terms, teacher=DIGEST, policy=POLICY, classes=names_of([0, 1, 2]))


@pytest.mark.parametrize(
    "changes",
    [
        {"threshold": 2},  # half of the sites: a lying server could open both seeds
        {"threshold": 5},
        {"stop": 0},
        {"labels": names_of([0, 1])},
        {"labels": names_of([0, 1, 1])},
        {"temperature": 0.0},
        {"kind": "coverage"},
        {"protocol": 1},
        {"contract": "x"},
    ],
)
def test_terms_that_do_not_hold_together(changes: Any) -> None:
    with pytest.raises(ValidationError):
        make_terms(SETS, SAMPLES, **changes)


def test_members_must_be_sorted_once_each_and_three() -> None:
    terms = make_terms(SETS, SAMPLES)
    for members in (terms.members[::-1], (*terms.members, terms.members[-1]), terms.members[:2]):
        with pytest.raises(ValidationError):
            make_terms(SETS, SAMPLES, members=members, threshold=2)
    with pytest.raises(ValidationError, match="named twice"):
        make_terms({**SETS, "ant": [0, 0]}, SAMPLES)
    with pytest.raises(ValidationError, match="steps from 0 to 1"):
        make_terms(SETS, SAMPLES, weights={"ant": 1e-6})


def test_default_threshold() -> None:
    assert [default_threshold(n) for n in (3, 4, 5, 6, 10)] == [2, 3, 4, 4, 7]
    assert all(2 * default_threshold(n) > n for n in range(3, 256))


# Round 1


def test_adverts_that_the_server_changed_are_refused(sums: Sums) -> None:
    sums.advertise()
    roster = sums.server.roster()
    other = advert_of(sums, make_terms(SETS, SAMPLES, attempt=2), "bee")
    forged = Advert.make(
        identity("eel"), sums.terms, "bee", other.mask_key, other.seal_key, other.commitment
    )  # signed, but not by bee
    for wrong in (
        roster.adverts[1].model_copy(update={"mask_key": other.mask_key}),
        roster.adverts[1].model_copy(update={"seal_key": other.seal_key}),
        roster.adverts[1].model_copy(update={"commitment": other.commitment}),
        roster.adverts[1].model_copy(update={"signature": "30"}),
        roster.adverts[1].model_copy(update={"public_key": "ssh-rsa AAAA"}),
        other,  # of another sum
        forged,
    ):
        adverts = (roster.adverts[0], wrong, *roster.adverts[2:])
        with pytest.raises(ProtocolError, match="advert"):
            sums.sites["ant"].share(Roster(terms=sums.terms.digest, adverts=adverts))
        with pytest.raises(ProtocolError, match="advert"):
            sums.server.add_advert("bee", wrong)
    with pytest.raises(ProtocolError, match="bee sent the keys of another site"):
        sums.server.add_advert("bee", roster.adverts[0])


def test_rosters_that_do_not_hold_together_are_refused(sums: Sums) -> None:
    sums.advertise()
    roster = sums.server.roster()
    ant, bee, cat, dog = roster.adverts
    for adverts, part in (
        ((bee, cat, dog), "this site's own keys"),
        ((bee, ant, cat, dog), "each site once"),
        ((ant, ant, cat, dog), "each site once"),
    ):
        with pytest.raises(ProtocolError, match=part):
            sums.sites["ant"].share(Roster(terms=sums.terms.digest, adverts=adverts))
    with pytest.raises(ProtocolError, match="no keys for this secure sum"):
        sums.sites["ant"].share(Roster(terms="b" * 64, adverts=roster.adverts))
    reply = sums.sites["ant"].share(roster)
    assert sums.sites["ant"].share(roster) == reply
    with pytest.raises(ProtocolError, match="one roster, and this is another"):
        sums.sites["ant"].share(Roster(terms=sums.terms.digest, adverts=(ant, bee, cat)))


def test_too_small_a_roster_is_refused(sums: Sums) -> None:
    terms = make_terms(SETS, SAMPLES, threshold=4)
    adverts = tuple(advert_of(sums, terms, site) for site in ("ant", "bee", "cat"))
    with pytest.raises(ProtocolError, match="3 sites; needed: 4"):
        sums.sites["ant"].share(Roster(terms=terms.digest, adverts=adverts))


# Round 2


def shared(sums: Sums) -> Delivery:
    sums.advertise()
    sums.share()
    return sums.server.delivery("ant")


def test_deliveries_that_are_not_the_others_shares_are_refused(sums: Sums) -> None:
    delivery = shared(sums)
    bee, cat, dog = delivery.shares
    flipped = bee.model_copy(update={"data": f"{int(bee.data[0], 16) ^ 1:x}{bee.data[1:]}"})
    for shares, part in (
        ((flipped, cat, dog), "bee are not what it sealed for site ant"),
        ((bee.model_copy(update={"data": cat.data}), cat, dog), "bee are not what it sealed"),
        ((cat, bee, dog), "one from each"),
        ((bee, bee, dog), "one from each"),
        ((bee,), "2 sites have shared; needed: 3"),
    ):
        with pytest.raises(ProtocolError, match=part):
            sums.sites["ant"].deliver(delivery.model_copy(update={"shares": shares}))
    with pytest.raises(ProtocolError, match="not one from each"):
        sums.sites["ant"].deliver(sums.server.delivery("bee"))
    with pytest.raises(ProtocolError, match="another roster"):
        sums.sites["ant"].deliver(delivery.model_copy(update={"roster": "b" * 64}))
    sums.sites["ant"].deliver(delivery)
    sums.sites["ant"].deliver(delivery)
    with pytest.raises(ProtocolError, match="shares once"):  # other masks on the same rows: their difference tells
        sums.sites["ant"].deliver(delivery.model_copy(update={"shares": (bee, cat)}))


def test_a_share_that_was_sealed_for_another_job_is_refused(sums: Sums) -> None:
    """Same sites, same identities, same samples: only the job is another."""
    other = Sums(sums.folder, make_terms(SETS, SAMPLES, job="other"), sums.answers)
    delivery, theirs = shared(sums), shared(other)
    from_bee, from_other_bee = delivery.shares[0], theirs.shares[0]
    assert (from_bee.sender, from_other_bee.sender) == ("bee", "bee")
    with pytest.raises(ProtocolError, match="bee are not what it sealed for site ant"):
        sums.sites["ant"].deliver(delivery.model_copy(update={"shares": (from_other_bee, *delivery.shares[1:])}))
    with pytest.raises(ProtocolError, match="another roster"):
        sums.sites["ant"].deliver(theirs.model_copy(update={"terms": sums.terms.digest}))
    question = RowsQuestion(terms=sums.terms.digest, start=0, stop=SAMPLES)
    with pytest.raises(ProtocolError, match="after shares were delivered"):
        sums.sites["ant"].rows(question, no_answer)
    sums.sites["ant"].deliver(delivery)


def test_rows_are_given_in_their_time_only(sums: Sums) -> None:
    question = RowsQuestion(terms=sums.terms.digest, start=0, stop=SAMPLES)
    delivery = shared(sums)
    with pytest.raises(ProtocolError, match="after shares were delivered"):
        sums.sites["ant"].rows(question, no_answer)
    sums.sites["ant"].deliver(delivery)
    beyond = RowsQuestion(terms=sums.terms.digest, start=0, stop=SAMPLES + 1)
    with pytest.raises(ProtocolError, match="terms do not name"):
        sums.sites["ant"].rows(beyond, no_answer)
    with pytest.raises(ProtocolError, match="one row a sample"):
        sums.sites["ant"].rows(question, lambda _, low, high: np.zeros((high - low, 2)))
    for site in ("bee", "cat", "dog"):
        sums.server.check_delivered(site, sums.sites[site].deliver(sums.server.delivery(site)))
        sums.send(site)
    sums.sites["ant"].open(sums.server.unmask())
    with pytest.raises(ProtocolError, match="not after they were opened"):
        sums.sites["ant"].rows(question, no_answer)


# Round 3


def opening(sums: Sums) -> None:
    sums.advertise()
    sums.share()
    sums.deliver()


def unmask(sums: Sums, *survivors: str) -> Unmask:
    kept = {site: sums.server._load(f"delivered/{site}", Delivered) for site in sums.sites}
    signed = {site: held.signature for site, held in kept.items() if held is not None}
    signatures = tuple(signed.get(site, "00") for site in survivors)
    return Unmask(terms=sums.terms.digest, survivors=survivors, signatures=signatures)


def test_never_both_seeds_of_a_site(sums: Sums) -> None:
    opening(sums)
    opened = sums.sites["ant"].open(unmask(sums, "ant", "bee", "cat"))
    assert [(s.of, s.kind) for s in opened.shares] == [
        ("ant", "self"),
        ("bee", "self"),
        ("cat", "self"),
        ("dog", "mask"),
    ]
    with pytest.raises(ProtocolError, match="opened once, and this names other survivors"):
        sums.sites["ant"].open(unmask(sums, "ant", "bee", "dog"))
    # Another process of the site, as after a crash, says the same of both.
    again = Sums(sums.folder, sums.terms, sums.answers)
    assert again.sites["ant"].open(unmask(sums, "ant", "bee", "cat")) == opened
    with pytest.raises(ProtocolError, match="other survivors"):
        again.sites["ant"].open(unmask(sums, "ant", "bee", "cat", "dog"))


def test_survivors_are_enough_of_those_that_shared(sums: Sums) -> None:
    opening(sums)
    for names, part in (
        (("ant", "bee"), "2 sites survived; needed: 3"),
        (("ant", "bee", "eel"), "not some of the sites that shared"),
        (("bee", "ant", "cat"), "not some of the sites"),
        (("ant", "ant", "bee"), "not some of the sites"),
    ):
        with pytest.raises(ProtocolError, match=part):
            sums.sites["ant"].open(unmask(sums, *names))


def test_nobody_opens_for_survivors_that_wear_other_masks(sums: Sums) -> None:
    """A server that gives one site the shares of few others would see its rows under few masks, and have those off."""
    sums.advertise()
    sums.share()
    full = sums.server.delivery("ant")
    few = sums.sites["ant"].deliver(full.model_copy(update={"shares": full.shares[:2]}))
    sums.deliver(without=["ant"])
    asked = unmask(sums, "ant", "bee", "cat")
    for signatures, part in (
        ((few.signature, *asked.signatures[1:]), "ant has not signed"),
        (("00", *asked.signatures[1:]), "ant has not signed"),
        ((asked.signatures[1], *asked.signatures[1:]), "ant has not signed"),
    ):
        with pytest.raises(ProtocolError, match=part):
            sums.sites["bee"].open(asked.model_copy(update={"signatures": signatures}))
    sums.sites["bee"].open(unmask(sums, "bee", "cat", "dog"))


def test_secrets_are_gone_once_they_have_served(sums: Sums) -> None:
    opening(sums)
    (path,) = (sums.folder / "sites" / "ant").glob("*.json")
    held = sums.sites["ant"]._load(path)
    secrets = [held.mask_seed, held.self_seed, held.seal_key, *held.holds["bee"]]
    assert all(secret and secret in path.read_text() for secret in secrets)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    opened = sums.sites["ant"].open(unmask(sums, "ant", "bee", "cat"))
    left = path.read_text()
    assert [secret for secret in secrets if secret in left] == [opened.shares[1].share]


def test_samples_are_summed_once(sums: Sums) -> None:
    """Two sums of the same samples over different sites would differ by one site's answer."""
    later = make_terms(SETS, SAMPLES, start=SAMPLES - 1)
    advert_of(sums, later)  # keys were made before the first sum was opened
    second = Sums(sums.folder, later, sums.answers)
    opening(second)
    opening(sums)
    names = ("ant", "bee", "cat")
    sums.sites["ant"].open(unmask(sums, *names))
    with pytest.raises(ProtocolError, match="summed before"):
        sums.sites["ant"].open(unmask(second, *names))
    for terms in (make_terms(SETS, 1), make_terms(SETS, SAMPLES, attempt=2), make_terms(SETS, SAMPLES, job="other")):
        with pytest.raises(ProtocolError, match="summed before"):
            advert_of(sums, terms)
    advert_of(sums, make_terms(SETS, SAMPLES, start=SAMPLES))
    advert_of(sums, make_terms(SETS, SAMPLES, pool="d" * 64))


@pytest.mark.parametrize("lost", [[], ["dog"]])
def test_images_are_summed_once_whatever_pool_they_lie_in(sums: Sums, lost: list[str]) -> None:
    """The difference of sums over these four sites and over three of them would be the answer of the fourth."""
    few = {site: classes for site, classes in SETS.items() if site != "dog"}
    pool = "b" * 64  # the same images
    early = Sums(sums.folder, make_terms(few, SAMPLES, pool=pool), sums.answers)
    early.advertise()
    early.share()
    early.deliver()
    sums.run(lost)
    with pytest.raises(ProtocolError, match="summed before"):
        early.send("ant")
    for changes in ({"pool": pool, "start": SAMPLES - 1}, {"pool": pool, "job": "other"}):
        with pytest.raises(ProtocolError, match="summed before"):
            advert_of(sums, make_terms(few, SAMPLES, **changes))
    advert_of(sums, make_terms(few, SAMPLES, pool=pool, start=SAMPLES))


def test_images_are_bound_in_every_pool_from_the_first_masked_row(sums: Sums) -> None:
    opening(sums)
    second = Sums(sums.folder, make_terms(SETS, SAMPLES, pool="b" * 64), sums.answers)
    opening(second)
    sums.send("ant", 1)
    with pytest.raises(ProtocolError, match="summed before"):
        second.send("ant", 1)
    with pytest.raises(ProtocolError, match="summed before"):
        second.sites["ant"].open(unmask(second, "ant", "bee", "cat"))
    sums.sites["bee"].open(unmask(sums, "ant", "bee", "cat"))  # who gave no rows opens one sum of them, too
    with pytest.raises(ProtocolError, match="summed before"):
        second.sites["bee"].open(unmask(second, "ant", "bee", "cat"))


def test_no_image_is_bound_by_an_answer_that_was_refused(sums: Sums) -> None:
    """A refusal for want of budget, or of noise, is no sum: nothing left."""
    question = RowsQuestion(terms=sums.terms.digest, start=0, stop=SAMPLES)
    opening(sums)
    with pytest.raises(AssertionError, match="the teacher was asked"):
        sums.sites["ant"].rows(question, no_answer)
    advert_of(sums, make_terms(SETS, SAMPLES, job="other", threshold=4))


def test_what_happened_while_a_site_answered_counts(sums: Sums) -> None:
    """Another sum of the same images, or the opening of this one, may come first: then no rows are given."""
    second = Sums(sums.folder, make_terms(SETS, SAMPLES, job="other", threshold=4), sums.answers)
    opening(sums)
    opening(second)

    def meanwhile(action: Callable[[], Any]) -> Any:
        return lambda _, low, high: (action(), sums.answers["ant"][low:high])[1]

    question = RowsQuestion(terms=sums.terms.digest, start=0, stop=SAMPLES)
    with pytest.raises(ProtocolError, match="summed before"):
        sums.sites["ant"].rows(question, meanwhile(lambda: second.send("ant", 1)))
    opened = meanwhile(lambda: second.sites["ant"].open(unmask(second, *SETS)))
    with pytest.raises(ProtocolError, match="not after they were opened"):
        second.sites["ant"].rows(question.model_copy(update={"terms": second.terms.digest}), opened)


def test_keys_of_sums_that_never_opened_are_kept_for_the_last_alone(sums: Sums) -> None:
    """Else a server could fill the disk with terms."""
    folder = sums.folder / "sites" / "ant"
    opening(sums)
    sums.send("ant", 1)  # rows left: however many others follow without any, it can go on
    adverts = [advert_of(sums, make_terms(SETS, SAMPLES, attempt=number)) for number in range(2, MOST_OPEN + 12)]
    assert len(list(folder.glob("*.json"))) == MOST_OPEN + 1
    sums.send("ant")
    last = make_terms(SETS, SAMPLES, attempt=MOST_OPEN + 11)
    assert advert_of(sums, last) == adverts[-1]
    again = advert_of(sums, make_terms(SETS, SAMPLES, attempt=2))  # was forgotten: other keys, as nothing left for it
    assert again.mask_key != adverts[0].mask_key


def test_images_stay_bound_when_the_keys_of_their_sum_are_forgotten(
    sums: Sums, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sum_index, "MOST_OPEN", 1)
    opening(sums)
    sums.send("ant")
    second = Sums(sums.folder, make_terms(SETS, SAMPLES, attempt=2), sums.answers)
    opening(second)
    second.send("ant")
    advert_of(sums, make_terms(SETS, SAMPLES, attempt=3))
    for act in (lambda: advert_of(sums, sums.terms), lambda: sums.sites["ant"].open(unmask(sums, "ant", "bee", "cat"))):
        with pytest.raises(ProtocolError, match=r"forgotten its keys|no keys for this"):
            act()
    with pytest.raises(ProtocolError, match="summed before"):
        advert_of(sums, make_terms(SETS, SAMPLES, job="other", threshold=4))


def test_a_call_reads_no_record_of_another_sum(sums: Sums, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2, 6):
        advert_of(sums, make_terms(SETS, SAMPLES, attempt=number))
    read = list[Path]()
    load = SumSite._load
    monkeypatch.setattr(SumSite, "_load", lambda self, path: (read.append(path), load(self, path))[1])
    sums.run()
    assert {path.stem for path in read} == {sums.terms.digest}


def test_a_lost_index_is_no_fresh_start(sums: Sums) -> None:
    advert_of(sums, sums.terms)
    path = sums.folder / "sites" / "ant" / "index.sqlite"
    for damage in (lambda: path.write_bytes(b"not an index" * 100), lambda: path.write_bytes(b""), path.unlink):
        damage()
        with pytest.raises(StorageError, match=r"index\.sqlite .*Restore it"):
            advert_of(sums, make_terms(SETS, SAMPLES, attempt=2))
    other = sums.folder / "sites" / "bee" / "index.sqlite"
    other.write_bytes(b"")  # as a crash leaves it while it is made
    advert_of(sums, sums.terms, "bee")


def test_samples_are_bound_to_the_sum_that_masked_rows_were_given_for(sums: Sums) -> None:
    """The others may open it without this site: what it then gives for another sum would be told apart."""
    rows = RowsQuestion(terms=sums.terms.digest, start=0, stop=SAMPLES)
    later = make_terms(SETS, SAMPLES, job="other", threshold=4)
    advert_of(sums, later)
    opening(sums)
    sums.sites["ant"].rows(rows, lambda _, low, high: np.zeros((high - low, 3)))
    second = Sums(sums.folder, later, sums.answers)
    opening(second)
    with pytest.raises(ProtocolError, match="summed before"):
        second.sites["ant"].rows(rows.model_copy(update={"terms": later.digest}), no_answer)
    with pytest.raises(ProtocolError, match="summed before"):
        advert_of(sums, make_terms(SETS, SAMPLES, job="third", threshold=4))
    for other in ({"temperature": 2.0}, {"weights": {"bee": 1.5}}):  # the same answers added up otherwise
        with pytest.raises(ProtocolError, match="summed before"):
            advert_of(sums, make_terms(SETS, SAMPLES, attempt=2, **other))
    advert_of(sums, make_terms(SETS, SAMPLES, attempt=2))


def test_sums_that_would_tell_single_answers_are_refused(sums: Sums) -> None:
    heavy = sums.terms.members[0].model_copy(update={"weight": 2.5})
    for changes in ({"members": (heavy, *sums.terms.members[1:])}, {"temperature": 0.5}):
        with pytest.raises(ProtocolError, match="too unevenly, or sharpen"):
            advert_of(sums, sums.terms.model_copy(update=changes))


def test_a_damaged_record_is_no_fresh_start(sums: Sums) -> None:
    advert_of(sums, sums.terms)
    (path,) = (sums.folder / "sites" / "ant").glob("*.json")
    path.write_text(path.read_text()[:-40])
    with pytest.raises(StorageError, match="not the record of a secure sum"):
        advert_of(sums, sums.terms)


# Messages


def test_records_come_back_as_they_were(sums: Sums) -> None:
    opening(sums)
    roster = sums.server.roster()
    delivery = sums.server.delivery("ant")
    question = RowsQuestion(terms=sums.terms.digest, start=0, stop=2)
    rows = MaskedRows(question, bytes(24))
    opened = sums.sites["ant"].open(unmask(sums, "ant", "bee", "cat"))
    for record in (sums.terms, roster, roster.adverts[0], delivery, question, opened):
        assert type(record).from_content(record.to_content()) == record
    assert MaskedRows.from_content(rows.to_content(), question) == rows
    assert Terms.from_content(sums.terms.to_content()).digest == sums.terms.digest
    other = RowsQuestion(terms=sums.terms.digest, start=0, stop=3)
    with pytest.raises(ProtocolError, match="not those that were asked for"):
        MaskedRows.from_content(rows.to_content(), other)
    with pytest.raises(ProtocolError, match="no masked rows"):
        MaskedRows.from_content(question.to_content(), question)


HOSTILE: list[Any] = [None, True, -1, 2**70, 1e308, "", "x" * 2000, "\x00", "../ant", [], [[]], {}, [{}], [None] * 300]


def test_hostile_records_raise_our_errors_only(sums: Sums) -> None:
    opening(sums)
    roster = sums.server.roster()
    records = [
        sums.terms,
        roster,
        roster.adverts[0],
        sums.sites["ant"].share(roster),
        sums.server.delivery("ant"),
        sums.sites["ant"].deliver(sums.server.delivery("ant")),
        RowsQuestion(terms=sums.terms.digest, start=0, stop=2),
        unmask(sums, "ant", "bee", "cat"),
        sums.sites["ant"].open(unmask(sums, "ant", "bee", "cat")),
    ]
    allowed = {("Terms", "attempt"), ("Terms", "temperature"), ("RowsQuestion", "stop")}
    for record in records:
        name, fields = type(record).__name__, json.loads(record.model_dump_json())
        for field in [*fields, "another"]:
            for value in HOSTILE:
                text = json.dumps({**fields, field: value})
                content = RecordDict({"record": ConfigRecord({"json": text})})
                fits = field in ("shares", "synonyms") and value == []
                if (name, field) in allowed or fits:
                    continue
                with pytest.raises(ProtocolError):
                    type(record).from_content(content)
    for content in (RecordDict(), RecordDict({"record": ConfigRecord({"json": "{"})})):
        for record in records:
            with pytest.raises(ProtocolError):
                type(record).from_content(content)


@pytest.mark.parametrize("item", ["{}", "[]", "0", '""', '{"site": 1}'])
@pytest.mark.parametrize("field", ["members", "labels", "synonyms", "job", "another"])
def test_a_flood_of_mistakes_takes_no_flood_of_memory(sums: Sums, field: str, item: str) -> None:
    """Each mistake used to be kept with what it is about: a megabyte of empty members took gigabytes.

    30 times so small a text is far less than the 32 MiB that any JSON may take (common/bounded).
    """
    fields = json.loads(sums.terms.model_dump_json())
    fields[field] = "HERE"
    text = json.dumps(fields).replace('"HERE"', f"[{','.join([item] * 20_000)}]")
    content = RecordDict({"record": ConfigRecord({"json": text})})
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            Terms.from_content(content)
        assert tracemalloc.get_traced_memory()[1] < 30 * len(text) + 2**20
    finally:
        tracemalloc.stop()


def test_fields_that_a_record_has_not_are_not_listed_by_the_thousand(sums: Sums) -> None:
    fields = "".join(f',"x{number}":0' for number in range(1001))
    content = RecordDict({"record": ConfigRecord({"json": sums.terms.model_dump_json()[:-1] + fields + "}"})})
    with pytest.raises(ProtocolError, match="many fields"):
        Terms.from_content(content)


def test_two_sites_make_no_sum_whatever_the_server_says(tmp_path: Path) -> None:
    """One of them could tell the server the other's answer: it leaves out a third, and threshold 2 allows it."""
    sets = {name: [0, 1, 2] for name in ("ant", "bee", "cat")}
    sums = Sums(tmp_path, make_terms(sets, SAMPLES), draw(sets, SAMPLES))
    assert sums.terms.threshold == 2
    sums.advertise()
    sums.share()
    whole = sums.server.delivery("ant")
    with pytest.raises(ProtocolError, match="2 sites have shared; needed: 3"):
        sums.sites["ant"].deliver(whole.model_copy(update={"shares": whole.shares[:1]}))
    sums.deliver()
    for site in sets:
        sums.send(site)
    unmask = sums.server.unmask()
    fewer = {"survivors": unmask.survivors[:2], "signatures": unmask.signatures[:2]}
    with pytest.raises(ProtocolError, match="2 sites survived; needed: 3"):
        sums.sites["ant"].open(unmask.model_copy(update=fewer))
