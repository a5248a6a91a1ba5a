"""A site's principal components: not on its card, but with its agreement, counted, signed and sealed as its answers."""

from __future__ import annotations

import base64
import dataclasses
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from consilience.client.features import learn_bases
from consilience.client.ledger import Ledger
from consilience.client.ledger_head import head_path
from consilience.client.ledger_restart import restart
from consilience.client.ledger_rows import Approval, approval
from consilience.client.policy import RefusedError
from consilience.client.privacy.spending import loss_of
from consilience.client.site import Site
from consilience.client.teacher import load_teacher
from consilience.common.cards import TapCard
from consilience.common.components import opened
from consilience.common.encoding import feature_bytes
from consilience.common.encoding.features import basis_bytes, unpack_basis
from consilience.common.errors import LedgerError, ProtocolError
from consilience.common.identity import make_key
from consilience.common.pool import Pool
from consilience.common.protocol import Agreement, Contract, Enclosed
from consilience.common.sealing import Secret
from consilience.common.settings import OutputNoise
from consilience.common.vouching import KnownSigner
from consilience.deploy.simulation import NOWHERE, admit
from consilience.server.authority import ensure_authority, make_job_key
from consilience.server.settings import Home
from helpers.commands import call, said
from helpers.feature_site import CLASSES, SIZE, make_pool, make_settings

TAPS: dict[str, Any] = {"layer2": {"size": 4, "channels": 8}, "layer3": {"size": 4, "channels": 4}, "penultimate": {}}
LAYER2, LAYER3 = basis_bytes(8, 64), basis_bytes(4, 128)
ROWS = SIZE * feature_bytes(8 * 16, "f16")
"""Bytes of the pool's features of layer2."""
Opening = Callable[..., Site]


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return make_pool(tmp_path / "pool")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    held = Home(tmp_path / "server")
    ensure_authority(held)
    return held


@pytest.fixture
def opening(tmp_path: Path, pool: Pool) -> Iterator[Opening]:
    """opening(...) makes a site of `make_settings`, whose components are learned."""
    sites: list[Site] = []

    def make(**changes: Any) -> Site:
        for site in sites:
            site.close()
        settings = make_settings(tmp_path, TAPS, **changes)
        learn_bases(settings, load_teacher(settings))
        sites.append(Site.load(tmp_path / "site.yaml"))
        return sites[-1]

    yield make
    for site in sites:
        site.close()


def contract(site: Site, pool: Pool, **changes: Any) -> Contract:
    fields: dict[str, Any] = {"job": "job", "labels": CLASSES, "class_set": (0, 1, 2), "pools": (pool.digest,)}
    fields |= {"encoding": "f16", "teacher": site.teacher.fingerprint}
    return Contract(**{**fields, "features": ("layer2",), "components": ("layer2",), **changes})


def cards(site: Site) -> tuple[TapCard, ...]:
    assert site.card.features is not None
    return site.card.features.taps


def sent(site: Site, asked: Contract, agreement: Agreement | None = None, **known: Any) -> dict[str, bytes]:
    """What a server finds in a site's agreement."""
    held = site.agree(asked) if agreement is None else agreement
    return opened(held.enclosed, asked, "site-1", cards(site), known.get("signer"), known.get("secret"))


def code(action: Callable[[], object]) -> str:
    with pytest.raises(RefusedError) as caught:
        action()
    return caught.value.code


def test_the_card_tells_no_components_and_an_agreement_those_that_are_asked_for(pool: Pool, opening: Opening) -> None:
    site = opening()
    own = {tap.card.name: tap.components for tap in site.taps if tap.card.components is not None}
    text = site.card.model_dump_json()
    assert len(text) < LAYER2
    assert not any(part.hex()[:40] in text for part in own.values())
    found = sent(site, contract(site, pool))
    assert found == {"layer2": own["layer2"]}
    directions, _ = unpack_basis(found["layer2"], 8, 64)
    np.testing.assert_allclose(directions @ directions.T, np.eye(8), atol=1e-5)
    both = contract(site, pool, features=("layer2", "layer3"), components=("layer3", "layer2"))
    assert sent(site, both) == own
    assert site.agree(contract(site, pool, components=())).enclosed is None
    assert site.agree(contract(site, pool, features=(), components=())).enclosed is None
    plain = contract(site, pool, features=("penultimate",), components=("penultimate",))
    with pytest.raises(RefusedError, match="components of a tap that has none") as caught:
        site.agree(plain)
    assert caught.value.code == "bad-question"
    assert (
        code(lambda: site.agree(contract(site, pool, features=("layer9",), components=("layer9",)))) == "bad-question"
    )


def test_the_fingerprint_of_a_tap_is_that_of_its_components(pool: Pool, opening: Opening, tmp_path: Path) -> None:
    before = cards(opening())
    make_pool(tmp_path / "another", seed=1)
    after = cards(opening(pools=["another", "pool"]))
    for was, now, changes in zip(before, after, (True, True, False), strict=True):
        assert (was.fingerprint != now.fingerprint) == changes == (was.components != now.components)


def test_components_are_counted_once_for_job_and_lifetime(pool: Pool, opening: Opening, tmp_path: Path) -> None:
    site = opening()
    site.agree(contract(site, pool))
    assert site.ledger.spent.features == {"job": LAYER2}
    (row,) = site.ledger.rows()
    assert (row.entry.kind, row.entry.job, row.entry.samples) == ("features", "job", 0)
    assert (row.entry.body["tap"], row.entry.body["bytes"]) == ("layer2", LAYER2)
    site.agree(contract(site, pool))
    site.agree(contract(site, pool, job="another"))  # what left before leaves again, to whoever asks
    assert site.ledger.count == 1
    both = contract(site, pool, job="another", features=("layer2", "layer3"), components=("layer2", "layer3"))
    assert len(sent(site, both)) == 2
    assert site.ledger.spent.features == {"job": LAYER2, "another": LAYER3}
    assert site.ledger.spent.lifetime == 0
    assert "something left without a mechanism" in loss_of(site.settings, site.ledger).why
    site.close()
    file = tmp_path / "site.yaml"
    assert call("ledger", "verify", file)["rows"] == 2
    told = call("ledger", "show", file)["features"]
    assert told["lifetime"] == LAYER2 + LAYER3
    assert told["components"] == [
        {"job": "another", "tap": "layer3", "bytes": LAYER3},
        {"job": "job", "tap": "layer2", "bytes": LAYER2},
    ]
    assert f"of these, components of layer2 to job job {LAYER2:,} bytes" in " ".join(
        said("ledger", "show", file).replace("│", " ").split()
    )
    carried = restart(site.settings)
    assert (carried.samples, carried.features) == (0, LAYER2 + LAYER3)
    site.agree(contract(site, pool, job="third"))  # this ledger knows nothing of what left before
    assert site.ledger.spent.features == {"job": LAYER2, "another": LAYER3, "third": LAYER2}


def test_components_behind_a_mechanism_are_an_event_of_it(pool: Pool, opening: Opening) -> None:
    """What leaves of a network that was trained with noise is paid by that, also where no answer follows."""
    held = opening()
    behind = OutputNoise(mechanism="output-noise", sigma=100.0)  # any mechanism: it is the row that is looked at
    site = Site(held.settings.model_copy(update={"privacy": behind}), held.teacher, None, held.taps)
    site.agree(contract(site, pool))
    first, second = (row.entry for row in site.ledger.rows())
    assert (first.kind, first.body["behind"], second.kind, second.subject) == (
        "features",
        ["output-noise"],
        "mechanism",
        "output-noise",
    )
    loss = loss_of(site.settings, site.ledger)
    assert loss.epsilon is not None
    assert loss.epsilon > 0
    site.close()


def test_a_ledger_without_its_head_still_tells_of_components(pool: Pool, opening: Opening) -> None:
    site = opening()
    site.agree(contract(site, pool))
    site.close()
    head_path(site.settings).unlink()
    with pytest.raises(LedgerError, match=f"bytes of features were released, and .* it tells of {LAYER2:,}"):
        restart(site.settings, 0)
    carried = restart(site.settings, 0, LAYER2 - 1)  # the rows tell of more
    assert (carried.samples, carried.features) == (0, LAYER2)


def test_a_row_of_components_that_was_changed_is_found(pool: Pool, opening: Opening, tmp_path: Path) -> None:
    site = opening()
    site.agree(contract(site, pool))
    site.close()
    with closing(sqlite3.connect(site.settings.state / "ledger.db")) as database, database:
        database.execute("DROP TRIGGER rows_stay_so")
        database.execute(f"UPDATE rows SET body = replace(body, '{LAYER2}', '1')")
    assert "row 1 is not as it was written" in call("ledger", "verify", tmp_path / "site.yaml", code=24)["message"]


def test_components_beyond_a_limit_do_not_leave(pool: Pool, opening: Opening) -> None:
    site = opening(features={"bytes": ROWS + LAYER2 - 1})
    assert code(lambda: site.agree(contract(site, pool))) == "too-many-bytes"
    assert site.agree(contract(site, pool, components=()))
    site = opening(features={"bytes": ROWS + LAYER2, "bytes_lifetime": ROWS + LAYER2 - 1})
    with pytest.raises(RefusedError) as caught:
        site.agree(contract(site, pool))
    assert caught.value.code == "too-many-bytes"
    assert f"features, lifetime: {ROWS + LAYER2:,} bytes more" in caught.value.told_here
    assert site.ledger.count == 0
    site = opening(features={"bytes": ROWS + LAYER2, "bytes_lifetime": ROWS + LAYER2})
    assert sent(site, contract(site, pool))
    question = site.question("job", pool.digest, SIZE, "features", "f16", site.taps[0])
    assert len(site.answer(question).data) == ROWS
    assert site.ledger.spent.features.total() == ROWS + LAYER2
    assert sent(site, contract(site, pool))  # all is spent, and all of it left before


def test_components_leave_after_approval_and_of_what_was_approved(pool: Pool, opening: Opening) -> None:
    site = opening(policy={"approval": True})
    asked = contract(site, pool)
    assert code(lambda: site.agree(asked)) == "not-approved"
    without = site.demand("job", [pool], "f16", coverage=False, summed=False, taps=site.taps[:1])
    whole = site.demand(
        "job", [pool], "f16", coverage=False, summed=False, taps=site.taps[:1], components=site.taps[:1]
    )

    def approve(what: Any) -> None:
        with closing(Ledger.open(site.settings)) as person, person.alone():
            given = None if what is None else Approval(dict.fromkeys(what.asked, SIZE))
            person.append(approval("job", site.settings.policy.version, given))

    approve(without)
    assert site.agree(contract(site, pool, components=())).enclosed is None
    with pytest.raises(RefusedError, match="something else than was approved") as caught:
        site.agree(asked)
    assert "components as f32" in caught.value.told_here
    approve(whole)
    assert sent(site, asked)
    assert site.ledger.spent.features == {"job": LAYER2}
    approve(None)
    assert code(lambda: site.agree(asked)) == "not-approved"


def test_nothing_leaves_after_the_policy_s_end(pool: Pool, opening: Opening) -> None:
    site = opening(policy={"ends": "2020-01-01"})
    assert code(lambda: site.agree(contract(site, pool))) == "policy-ended"
    assert site.ledger.count == 0
    site = opening(policy={"ends": "2900-01-01"})
    assert sent(site, contract(site, pool))


def test_a_site_that_fails_to_tell_a_tap_releases_no_components(
    pool: Pool, opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = opening()
    broken = dataclasses.replace(site.taps[0], size=2)  # gives another shape than its card says
    monkeypatch.setattr(site.encoder, "taps", (broken, *site.taps[1:]))
    assert code(lambda: site.agree(contract(site, pool))) == "teacher-failed"
    assert site.ledger.count == 0


def test_what_was_withdrawn_while_the_teacher_was_tried_does_not_leave(
    pool: Pool, opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = opening(policy={"approval": True})
    version = site.settings.policy.version
    demand = site.demand(
        "job", [pool], "f16", coverage=False, summed=False, taps=site.taps[:1], components=site.taps[:1]
    )

    def person(what: Any) -> None:
        with closing(Ledger.open(site.settings)) as ledger, ledger.alone():
            given = None if what is None else Approval(dict.fromkeys(what.asked, SIZE))
            ledger.append(approval("job", version, given))

    person(demand)
    real = type(site.taps[0]).values

    def slow(self: Any, images: Any) -> Any:
        person(None)
        return real(self, images)

    monkeypatch.setattr(type(site.taps[0]), "values", slow)
    assert code(lambda: site.agree(contract(site, pool))) == "not-approved"
    assert site.ledger.spent.features.total() == 0


def test_components_are_signed_and_sealed(pool: Pool, opening: Opening, home: Home, tmp_path: Path) -> None:
    site = opening(policy={"sealed_only": True}, key="site.key", kit="kit.json")
    admit(home, site.settings, NOWHERE)
    secret = Secret()
    key = make_job_key(home, "job", secret.public)
    assert code(lambda: site.agree(contract(site, pool))) == "sealed-only"
    assert site.ledger.count == 0
    asked = contract(site, pool, job_key=key)
    agreement = site.agree(asked)
    own = site.taps[0].components
    assert agreement.enclosed is not None
    assert own[:40] not in base64.b64decode(agreement.enclosed.data)
    assert site.signer is not None
    signer = KnownSigner(site.signer.key.public_key(), "site-1", CLASSES)
    assert sent(site, asked, agreement, signer=signer, secret=secret) == {"layer2": own}
    stranger = KnownSigner(make_key(tmp_path / "other.key").public_key(), "site-1", CLASSES)
    with pytest.raises(ProtocolError, match="do not carry its signature"):
        sent(site, asked, agreement, signer=stranger, secret=secret)
    for other in ({"job": "other"}, {"encoding": "f32"}, {"features": ("layer2", "layer3")}):
        with pytest.raises(ProtocolError, match="not sealed for this contract"):
            sent(site, asked.model_copy(update=other), agreement, signer=signer, secret=secret)
    with pytest.raises(ProtocolError, match="not sealed for this contract"):
        opened(agreement.enclosed, asked, "site-2", cards(site), signer, secret)
    with pytest.raises(ProtocolError, match="not sealed for this contract"):
        sent(site, asked, agreement, signer=signer, secret=Secret())
    with pytest.raises(ProtocolError, match="not sealed for this contract"):
        opened(Enclosed(taps=("layer2",), data=""), asked, "site-1", cards(site), signer, secret)
    assert site.ledger.spent.features == {"job": LAYER2}


def test_a_signature_is_of_the_job_and_the_tap(pool: Pool, opening: Opening, tmp_path: Path) -> None:
    site = opening(key="site.key")
    make_key(tmp_path / "site.key")
    assert site.signer is not None
    signer = KnownSigner(site.signer.key.public_key(), "site-1", CLASSES)
    asked = contract(site, pool)
    agreement = site.agree(asked)
    assert sent(site, asked, agreement, signer=signer)
    with pytest.raises(ProtocolError, match="do not carry its signature"):
        sent(site, contract(site, pool, job="other"), agreement, signer=signer)
    moved = cards(site)[0].model_copy(update={"fingerprint": "0" * 64})
    with pytest.raises(ProtocolError, match="do not carry its signature"):
        opened(agreement.enclosed, asked, "site-1", (moved,), signer, None)


def test_explain_and_approve_tell_components(pool: Pool, opening: Opening, tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    site = opening(policy={"approval": True})
    site.close()
    student = {"architecture": "cnn3", "learning": "layer-wise"}
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump({"name": "job", "pool": "pool", "student": student}))
    assert "nobody at the site has approved" in call("explain", job, file)["refusal"]
    text = said("approve", job, file)
    assert f"principal components of tap layer2 themselves: 8 of 64 channels, {LAYER2:,} bytes" in text
    found = call("explain", job, file)
    assert found["refusal"] is None
    assert found["feature_bytes"]["components"] == LAYER2 + LAYER3
    before = found["feature_bytes"]["new"]
    names = ("layer2", "layer3")
    with closing(Site.load(file)) as again:
        assert len(sent(again, contract(again, pool, features=names, components=names))) == 2
    after = call("explain", job, file)["feature_bytes"]
    assert (after["new"], after["asked"]) == (before - LAYER2 - LAYER3, found["feature_bytes"]["asked"])
    assert f"{LAYER2:,} bytes, released before" in said("explain", job, file)
    job.write_text(
        yaml.safe_dump({"name": "job", "pool": "pool", "student": {**student, "learning": "common-feature"}})
    )
    assert call("explain", job, file)["feature_bytes"]["components"] == 0
