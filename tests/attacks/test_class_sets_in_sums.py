"""A server that lies about class sets, to see one site's answer alone in a sum, gets no key from that site.

Each attack is also done with the site's check switched off, where it must succeed: an attack that cannot succeed shows
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from consilience.client import sum_terms
from consilience.common.errors import ProtocolError
from consilience.common.sums.messages import Advert, Member, Roster, Terms
from consilience.server.unmasking import Summed
from helpers.summing import DIGEST, POLICY, Sums, draw, make_terms, new_site

NAMES = {"ant": ("cat", "dog"), "bee": ("dog", "cat"), "elk": ("cat", "dog")}
"""Three sites that all know the same two classes: each is hidden by the others."""
SAMPLES = 20

pytestmark = pytest.mark.usefixtures("unsynced")


def terms_of(sets: Mapping[str, list[int]], labels: tuple[str, ...], **changes: Any) -> Terms:
    return make_terms(sets, SAMPLES, labels=labels, threshold=3, **changes)


def run(folder: Path, terms: Terms, names: Mapping[str, tuple[str, ...]] = NAMES) -> tuple[Sums, Summed]:
    """A whole sum on these terms among sites that know their own classes by name."""
    sums = Sums(folder, terms, draw({site: range(len(own)) for site, own in names.items()}, SAMPLES))
    for site, classes in names.items():
        advert = sums.sites[site].advertise(terms, teacher=DIGEST, policy=POLICY, classes=classes)
        sums.server.add_advert(site, advert)
    return sums, sums.run()


def told(sums: Sums, summed: Summed, site: str) -> bool:
    """Whether the sums hold a site's answers as they are."""
    own = np.exp(sums.answers[site])
    seen: NDArray[np.float64] = np.asarray(summed.sums[:, list(sums.terms.by_name[site].classes)])
    return bool(np.abs(seen - own / own.sum(axis=1, keepdims=True)).max() < 1e-6)


def test_the_truth_is_taken_and_hides_every_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = terms_of({"ant": [0, 1], "bee": [1, 0], "elk": [0, 1]}, ("cat", "dog"))
    monkeypatch.setattr(Sums, "advertise", lambda self, owners: None)  # `run` does it by name
    sums, summed = run(tmp_path, truth)
    assert not any(told(sums, summed, site) for site in NAMES)


APART = {
    "a label space with each class once a site": (
        {"ant": [0, 1], "bee": [2, 3], "elk": [4, 5]},
        ("cat", "dog", "hen", "cow", "owl", "pig"),
    ),
    "names that only look alike": (
        {"ant": [0, 1], "bee": [3, 2], "elk": [4, 5]},
        ("cat", "dog", "cat ", "dog ", "\u0441at", "d\u043eg"),
    ),
    "classes exchanged within a site": ({"ant": [1, 0], "bee": [1, 0], "elk": [0, 1]}, ("cat", "dog")),
}


@pytest.mark.parametrize("lie", APART)
def test_class_sets_that_are_not_those_of_the_sites_classes(
    tmp_path: Path, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = terms_of(*APART[lie])
    monkeypatch.setattr(Sums, "advertise", lambda self, owners: None)
    with pytest.raises(ProtocolError, match="class set that is not that of its classes"):
        run(tmp_path / "on", terms)
    monkeypatch.setattr(sum_terms, "_check_classes", lambda terms, member, classes: None)
    sums, summed = run(tmp_path / "off", terms)
    assert all(told(sums, summed, site) for site in NAMES) == (lie != "classes exchanged within a site")


def test_synonyms_are_the_same_for_all_and_join_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {**NAMES, "bee": ("dog", "feline")}
    sets = {"ant": [0, 1], "bee": [1, 0], "elk": [0, 1]}
    monkeypatch.setattr(Sums, "advertise", lambda self, owners: None)
    with pytest.raises(ProtocolError, match="not that of its classes"):
        run(tmp_path / "without", terms_of(sets, ("cat", "dog")), names)
    sums, summed = run(tmp_path / "with", terms_of(sets, ("cat", "dog"), synonyms=(("cat", "feline"),)), names)
    assert not any(told(sums, summed, site) for site in names)
    # One that names a class of `ant` anew does so for all who know it by that name.
    renamed = terms_of({"ant": [0, 1], "bee": [1, 2], "elk": [2, 1]}, ("tom", "dog", "cat"), synonyms=(("tom", "cat"),))
    with pytest.raises(ProtocolError, match="not that of its classes"):
        run(tmp_path / "renamed", renamed)
    joined = terms_of(sets, ("cat", "dog"), synonyms=(("cat", "dog"),))
    with pytest.raises(ProtocolError, match="join classes that this site tells apart"):
        run(tmp_path / "joined", joined)


def test_terms_that_differ_from_site_to_site(tmp_path: Path) -> None:
    """To `ant` the server tells the truth of all, to `bee` that `elk` knows other classes: neither shares a seed."""
    truth = terms_of({"ant": [0, 1], "bee": [1, 0], "elk": [0, 1]}, ("cat", "dog", "hen", "cow"))
    other = terms_of({"ant": [0, 1], "bee": [1, 0], "elk": [2, 3]}, ("cat", "dog", "hen", "cow"))
    sites = {site: new_site(tmp_path / site, site) for site in NAMES}

    def advert(site: str, terms: Terms) -> Advert:
        return sites[site].advertise(terms, teacher=DIGEST, policy=POLICY, classes=NAMES[site])

    mixed = (advert("ant", truth), advert("bee", other), advert("elk", truth))
    for terms, site in ((truth, "ant"), (other, "bee")):
        with pytest.raises(ProtocolError, match="for another sum"):
            sites[site].share(Roster(terms=terms.digest, adverts=mixed))
        # Nor does it help to write the digest of one's terms over another's: it is signed.
        forged = tuple(a.model_copy(update={"terms": terms.digest}) for a in mixed)
        with pytest.raises(ProtocolError, match="does not carry its signature"):
            sites[site].share(Roster(terms=terms.digest, adverts=forged))
    with pytest.raises(ProtocolError, match="not that of its classes"):
        advert("elk", other)  # who is lied about sees it


def with_owners(terms: Terms, owners: int, folder: Path) -> Advert:
    site = new_site(folder, "ant")
    return site.advertise(terms, teacher=DIGEST, policy=POLICY, classes=("cat", "dog", "hen"), owners=owners)


def test_a_class_that_too_few_know_is_not_summed_where_the_policy_wants_more(tmp_path: Path) -> None:
    sets = {"ant": [0, 1, 2], "bee": [1, 0], "cow": [1, 0], "elk": [0, 1]}
    labels = ("cat", "dog", "hen")
    alone = make_terms(sets, SAMPLES, labels=labels, threshold=4)
    with_owners(alone, 1, tmp_path / "1")
    with pytest.raises(ProtocolError, match="Class 'hen' is sure to be summed over 1 sites; the policy wants 2"):
        with_owners(alone, 2, tmp_path / "2")
    shared = {**sets, "elk": [0, 1, 2]}
    with_owners(make_terms(shared, SAMPLES, labels=labels, threshold=4), 2, tmp_path / "3")
    with pytest.raises(ProtocolError, match="Class 'hen' is sure to be summed over 1 sites"):
        with_owners(make_terms(shared, SAMPLES, labels=labels, threshold=3), 2, tmp_path / "4")  # elk may be lost


def test_a_member_that_was_invented_is_what_no_site_can_see(tmp_path: Path) -> None:
    """What is left, and in docs/secure_sums.md: keys that are told otherwise show it (`peers`)."""
    truth = terms_of({"ant": [0, 1], "bee": [1, 0], "elk": [0, 1]}, ("cat", "dog"))
    invented = Member(**{**truth.members[2].model_dump(), "identity": "b" * 64})
    terms = Terms(**{**truth.model_dump(), "members": (*truth.members[:2], invented)})
    new_site(tmp_path, "ant").advertise(terms, teacher=DIGEST, policy=POLICY, classes=NAMES["ant"])
