"""A whole site in a secure sum, with a teacher that never says the same twice: what it puts under one mask."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization

from consilience.client import ledger as module
from consilience.client.ledger import Ledger
from consilience.client.ledger_restart import restart
from consilience.client.policy import RefusedError
from consilience.client.site import Site
from consilience.common.errors import LedgerError, ProtocolError, StorageError
from consilience.common.files import read_json
from consilience.common.identity import write_secret
from consilience.common.pool import Pool
from consilience.common.settings import SiteSettings
from consilience.common.sums.messages import Delivered, Member, RowsQuestion, Terms, Unmask
from helpers.small_site import CLASSES, SIZE, Fickle, make_pool, make_site
from helpers.summing import Sums, draw, identity, make_terms

SETS = {"site-1": [0, 1, 2], "site-2": [1, 2, 0], "site-3": [2, 0, 1]}

pytestmark = pytest.mark.usefixtures("unsynced")


class World(Sums):
    """A sum of two made-up sites and a whole one, `site-1`."""

    def __init__(self, folder: Path, pool: Pool, **changes: Any) -> None:
        self.settings = _settings(folder)
        self.whole = Site(self.settings, Fickle())
        super().__init__(folder, terms_of(pool, self.settings, **changes), draw(SETS, SIZE))
        self.sites["site-1"] = self.whole.summing.sums

    def advertise_all(self) -> None:
        self.server.add_advert("site-1", self.whole.summing.keys(self.terms))
        for member in self.terms.members[1:]:
            self.server.add_advert(
                member.site,
                self.sites[member.site].advertise(
                    self.terms,
                    teacher=member.teacher,
                    policy=member.policy,
                    classes=[CLASSES[label] for label in member.classes],
                ),
            )

    def rows(self) -> np.ndarray:
        question = RowsQuestion(terms=self.terms.digest, start=0, stop=SIZE)
        return np.frombuffer(self.whole.summing.rows(question).data, "<u4")

    def up_to_rows(self) -> np.ndarray:
        self.advertise_all()
        self.share()
        self.deliver()
        return self.rows()


def _settings(folder: Path) -> SiteSettings:
    key = folder / "site.key"
    if not key.exists():
        held = identity("site-1").private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        write_secret(key, held)
    site = make_site(folder)
    return site.settings.model_copy(update={"key": key})


def terms_of(pool: Pool, settings: SiteSettings, *, teacher: str = Fickle.fingerprint, **changes: Any) -> Terms:
    made = make_terms(SETS, SIZE, pool=pool.digest, labels=CLASSES, **changes)
    own = {"teacher": teacher, "policy": settings.policy.version}
    members = tuple(Member(**{**member.model_dump(), **own}) for member in made.members)
    return Terms(**{**made.model_dump(exclude={"members"}), "members": members})


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return make_pool(tmp_path)


def test_the_same_rows_are_under_a_mask_however_often_they_are_asked(tmp_path: Path, pool: Pool) -> None:
    world = World(tmp_path, pool)
    first = world.up_to_rows()
    world.whole.close()
    world.whole = Site(world.settings, Fickle())
    assert np.array_equal(world.rows(), first)


def test_no_other_rows_are_put_under_a_mask_after_another_ledger_began(tmp_path: Path, pool: Pool) -> None:
    """Their difference would be that of two answers, without any mask."""
    world = World(tmp_path, pool)
    world.up_to_rows()
    world.whole.close()
    restart(world.settings)
    world.whole = Site(world.settings, Fickle())
    with pytest.raises(ProtocolError, match="no keys for this"):
        world.rows()
    with pytest.raises(ProtocolError, match="forgotten its keys"):
        world.whole.summing.keys(world.terms)
    again = World(tmp_path, pool, attempt=2)  # by the same sites: allowed before
    with pytest.raises(ProtocolError, match="summed before"):
        again.advertise_all()
    assert Ledger.open(world.settings).spent.jobs == {"job": SIZE}
    (tmp_path / "state" / "sums" / "index.sqlite").unlink()
    with pytest.raises(StorageError, match="is gone, and sums are there"):
        again.advertise_all()


def test_a_sum_without_rows_is_given_up_too_when_another_ledger_begins(tmp_path: Path, pool: Pool) -> None:
    """Rows may have left under its masks, of which an older copy does not tell."""
    world = World(tmp_path, pool)
    world.advertise_all()
    world.share()
    world.deliver()
    world.whole.close()
    restart(world.settings)
    world.whole = Site(world.settings, Fickle())
    with pytest.raises(ProtocolError, match="no keys for this"):
        world.rows()
    again = World(tmp_path, pool, attempt=2)
    assert len(again.up_to_rows()) == SIZE * len(CLASSES)


def test_over_an_older_copy_another_ledger_lets_the_classifier_into_no_sum(tmp_path: Path, pool: Pool) -> None:
    """A copy made between the rounds of a sum gave rows twice under the same masks, and both seeds of another site."""
    world, state = World(tmp_path, pool), tmp_path / "state"
    world.advertise_all()
    world.share()
    world.deliver()
    assert world.whole.ledger.count == 0
    world.whole.close()
    shutil.copytree(state, tmp_path / "backup")
    world.whole = Site(world.settings, Fickle())
    world.rows()
    world.whole.summing.open(unmask(world, "site-1", "site-2", "site-3"))
    world.whole.close()
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "backup", state)
    carried = restart(world.settings)
    assert (carried.samples, carried.sums_known) == (SIZE, False)
    world.whole = Site(world.settings, Fickle())
    with pytest.raises(ProtocolError, match="no keys for this"):
        world.rows()
    for _ in range(2):  # from the first time on the ledger names the classifier
        with pytest.raises(RefusedError, match="do not allow it"):
            World(tmp_path, pool, threshold=3).advertise_all()
    other, teacher = "e" * 64, Fickle()
    teacher.fingerprint = other
    assert Site(world.settings, teacher).summing.keys(terms_of(pool, world.settings, teacher=other)).site == "site-1"
    world.whole.close()
    (state / "ledger.db").rename(tmp_path / "gone.db")  # and so it is carried on
    for folder in state.glob("ledger-*T*"):
        folder.rename(folder.with_name("ledger-1"))
    restart(world.settings)
    with pytest.raises(RefusedError, match="do not allow it"):
        World(tmp_path, pool, threshold=3).advertise_all()


def test_an_older_record_of_sums_alone_opens_no_other_seed_and_gives_no_rows(tmp_path: Path, pool: Pool) -> None:
    world, sums = World(tmp_path, pool), tmp_path / "state" / "sums"
    world.up_to_rows()
    world.whole.close()
    shutil.copytree(sums, tmp_path / "backup")
    site = Site(world.settings, Fickle())
    site.summing.open(unmask(world, "site-1", "site-2", "site-3"))
    site.close()
    shutil.rmtree(sums)
    shutil.copytree(tmp_path / "backup", sums)
    world.whole = Site(world.settings, Fickle())
    with pytest.raises(StorageError, match="the ledger tells of sums that it does not know"):
        world.whole.summing.open(unmask(world, "site-1", "site-3"))
    with pytest.raises(StorageError, match="the ledger tells of sums that it does not know"):
        world.rows()


def test_no_ledger_begins_where_it_is_not_known_what_was_summed(tmp_path: Path, pool: Pool) -> None:
    world = World(tmp_path, pool)
    world.up_to_rows()
    world.whole.close()
    (tmp_path / "state" / "sums" / "index.sqlite").unlink()
    with pytest.raises(StorageError, match="is gone, and sums are there"):
        restart(world.settings)
    assert Ledger.open(world.settings).spent.lifetime == SIZE


def unmask(world: World, *names: str) -> Unmask:
    held = [world.server._load(f"delivered/{site}", Delivered) for site in names]
    signatures = tuple(delivered.signature for delivered in held if delivered is not None)
    return Unmask(terms=world.terms.digest, survivors=names, signatures=signatures)


def test_an_older_copy_of_state_opens_no_other_seed(tmp_path: Path, pool: Pool) -> None:
    """Of one site it would tell its mask key after its own mask: both together unmask that site's rows."""
    world, state = World(tmp_path, pool), tmp_path / "state"
    world.up_to_rows()
    world.whole.close()
    shutil.copytree(state, tmp_path / "backup")
    site = Site(world.settings, Fickle())
    shares = site.summing.open(unmask(world, "site-1", "site-2", "site-3")).shares
    assert {share.of: share.kind for share in shares}["site-2"] == "self"
    assert site.ledger.spent.sums == {world.terms.digest: ("opened", Fickle.fingerprint)}
    site.close()
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "backup", state)
    with pytest.raises(LedgerError, match="older copy"):
        Site(world.settings, Fickle()).summing.open(unmask(world, "site-1", "site-3"))


@pytest.mark.parametrize("restarted", [False, True])
def test_a_lost_record_of_sums_is_no_fresh_start(tmp_path: Path, pool: Pool, restarted: bool) -> None:
    """The same images would be summed over other sites, and noise would be drawn anew and not be paid."""
    world = World(tmp_path, pool)
    world.up_to_rows()
    world.whole.close()
    shutil.rmtree(tmp_path / "state" / "sums")
    if restarted:
        assert restart(world.settings).sums_known  # by the ledger, which is whole
    other = World(tmp_path, pool, threshold=3)
    with pytest.raises(StorageError, match="the ledger tells of sums that it does not know"):
        other.advertise_all()
    assert other.whole.ledger.spent.sums == {world.terms.digest: ("given", Fickle.fingerprint)}
    teacher = Fickle()
    teacher.fingerprint = "e" * 64
    another = Site(world.settings, teacher)
    assert another.summing.keys(terms_of(pool, world.settings, teacher="e" * 64)).site == "site-1"


def test_nothing_leaves_of_a_sum_until_the_head_tells_of_it(
    tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an older `state` would pass for the newest one."""
    world = World(tmp_path, pool)
    world.up_to_rows()
    asked, ledger = unmask(world, "site-1", "site-2", "site-3"), world.whole.ledger

    def full(path: Path, value: Any) -> None:
        raise StorageError("Cannot write: No space left on device")

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(module, "write_json", full)
            with pytest.raises(StorageError):
                world.whole.summing.open(asked)
    assert world.whole.summing.open(asked).shares
    assert read_json(ledger.head)["rows"] == ledger.count
