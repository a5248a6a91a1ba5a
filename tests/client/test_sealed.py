"""A site that seals: what it keeps and counts are the plain rows, and it believes no key but its coordinator's."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from consilience.client.explain import explain, tell_policy
from consilience.client.policy import RefusedError
from consilience.client.site import Site
from consilience.common.files import sha256
from consilience.common.pool import Pool
from consilience.common.protocol import Contract
from consilience.common.sealing import Secret, unseal_answer
from consilience.common.settings import JobPrivacy, JobSettings
from consilience.common.vouching import SALT_BYTES, KnownSigner, salted
from consilience.deploy.simulation import NOWHERE, admit
from consilience.server.authority import ensure_authority, make_job_key
from consilience.server.settings import Home
from helpers.small_site import CLASSES, about, make_pool, make_site
from helpers.summing import make_terms


@pytest.fixture
def home(tmp_path: Path) -> Home:
    held = Home(tmp_path / "server")
    ensure_authority(held)
    return held


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return make_pool(tmp_path)


def admitted(folder: Path, home: Home, **policy: Any) -> Site:
    """Return a site with a key and a kit; called again, another process's of the same state."""
    site = make_site(folder, **policy)
    settings = site.settings.model_copy(update={"key": folder / "site.key", "kit": folder / "kit.json"})
    admit(home, settings, NOWHERE)
    return Site(settings, site.teacher, site.coverage)


def test_the_same_rows_leave_open_and_sealed_and_count_once(tmp_path: Path, home: Home, pool: Pool) -> None:
    site, secret = admitted(tmp_path, home), Secret()
    key = make_job_key(home, "job", secret.public)
    asked = about(site, pool, 0, 20, job_key=key)
    first, second = site.answer(asked), site.answer(asked)
    plain = site.answer(about(site, pool, 0, 20))
    assert first.data != second.data
    for sealed in (first, second):
        assert unseal_answer(sealed, "site-1", secret).data == plain.data
        assert plain.data not in sealed.data
    assert site.ledger.spent.lifetime == 20
    (row,) = [row for row in site.ledger.rows() if row.entry.kind == "answer"]
    assert row.entry.body["sha256"] == sha256(plain.data)


def test_every_answer_is_signed_sealed_or_not(tmp_path: Path, home: Home, pool: Pool) -> None:
    site, secret = admitted(tmp_path, home), Secret()
    key = make_job_key(home, "job", secret.public)
    assert site.signer is not None
    known = KnownSigner(site.signer.key.public_key(), "site-1", CLASSES)
    for asked in (about(site, pool, 5, 9), about(site, pool, 5, 9, job_key=key)):
        answer = site.answer(asked)
        answer = answer if asked.job_key is None else unseal_answer(answer, "site-1", secret)
        salt, signature = answer.vouch[:SALT_BYTES], answer.vouch[SALT_BYTES:]
        known.check(asked, salted(salt, sha256(answer.data)), signature)


def test_a_site_without_a_key_signs_nothing_and_its_card_says_so(tmp_path: Path, pool: Pool) -> None:
    settings = make_site(tmp_path).settings
    site = make_site(tmp_path)
    site.settings = settings.model_copy(update={"key": tmp_path / "none"})
    assert (site.card.identity, site.card.public_key) == (None, None)
    assert site.answer(about(site, pool, 0, 4)).vouch == b""


def contract(site: Site, pool: Pool, **changes: Any) -> Contract:
    fields = {"job": "job", "labels": CLASSES, "class_set": (0, 1, 2), "pools": (pool.digest,), "encoding": "f32"}
    return Contract(**{**fields, "teacher": site.teacher.fingerprint, **changes})  # type: ignore[arg-type]


def test_a_job_s_key_that_the_kit_does_not_vouch_for_is_refused(tmp_path: Path, home: Home, pool: Pool) -> None:
    site, public = admitted(tmp_path, home), Secret().public
    other = Home(tmp_path / "other")
    ensure_authority(other)
    good = make_job_key(home, "job", public)
    site.agree(contract(site, pool, job_key=good))
    for key in (
        make_job_key(other, "job", public),
        make_job_key(home, "shoes", public),
        good.model_copy(update={"key": Secret().public}),
        make_job_key(home, "job", public, datetime.now(UTC) - timedelta(days=3)),
    ):
        with pytest.raises(RefusedError) as agreeing:
            site.agree(contract(site, pool, job_key=key))
        with pytest.raises(RefusedError) as answering:
            site.answer(about(site, pool, 0, 4, job_key=key))
        assert {agreeing.value.code, answering.value.code} == {"job-key"}
        assert key.key not in agreeing.value.reason
    assert site.ledger.count == 0
    for damage in ("{}", None):
        (tmp_path / "kit.json").unlink()
        if damage:
            (tmp_path / "kit.json").write_text(damage)
        with pytest.raises(RefusedError, match="does not vouch"):
            site.answer(about(site, pool, 0, 4, job_key=good))
        (tmp_path / "kit.json").touch()


def test_a_site_that_seals_only_answers_in_no_other_way(tmp_path: Path, home: Home, pool: Pool) -> None:
    site = admitted(tmp_path, home, sealed_only=True)
    assert site.card.sealed_only
    key = make_job_key(home, "job", Secret().public)
    for refused in (
        lambda: site.agree(contract(site, pool)),
        lambda: site.answer(about(site, pool, 0, 4)),
    ):
        with pytest.raises(RefusedError) as caught:
            refused()
        assert (caught.value.code, caught.value.reason) == (
            "sealed-only",
            "the site answers only jobs that have answers sealed",
        )
    assert site.ledger.count == 0
    site.agree(contract(site, pool, job_key=key))
    site.answer(about(site, pool, 0, 4, job_key=key))


def test_a_site_that_seals_only_takes_part_in_no_sum(tmp_path: Path, home: Home, pool: Pool) -> None:
    terms = make_terms({"site-1": [0, 1, 2], "site-2": [0, 1, 2], "site-3": [0, 1, 2]}, 4, pool=pool.digest)
    with pytest.raises(RefusedError) as caught:
        admitted(tmp_path, home, sealed_only=True).summing.keys(terms)
    assert caught.value.code == "sealed-only"


def test_a_person_is_told_beforehand(tmp_path: Path, home: Home, pool: Pool) -> None:
    site = admitted(tmp_path, home, sealed_only=True)
    for privacy, refusal in (
        (JobPrivacy(), "the site answers only jobs that have answers sealed (policy.sealed_only is true)"),
        (
            JobPrivacy(secure_sum=True),
            "the site answers only jobs that have answers sealed (policy.sealed_only is true)",
        ),
        (JobPrivacy(sealed=True), ""),
    ):
        assert explain(JobSettings(name="job", pool=pool.folder, privacy=privacy), site).refusal == refusal
    assert "answers leave sealed for the coordinator alone" in tell_policy(site.settings.policy)
