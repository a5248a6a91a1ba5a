"""A site with a multi-label teacher: what it tells, and questions that are for the other kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consilience.client.audit.auditing import check_audit
from consilience.client.explain import explain
from consilience.client.policy import RefusedError
from consilience.client.site import Site
from consilience.common.encoding import decode
from consilience.common.errors import SettingsError
from consilience.common.pool import Pool
from consilience.common.protocol import Contract, Question
from consilience.common.settings import CallableTeacher, JobSettings, Policy, Preprocessing, SiteSettings
from helpers.small_site import CLASSES, SIZE, make_pool, make_site

FINGERPRINT = "f" * 64


class Labels:
    """A multi-label teacher whose log-odds follow from each image alone."""

    classes, fingerprint = CLASSES, FINGERPRINT

    def log_odds(self, images: np.ndarray) -> np.ndarray:
        """Return (n, 3) float32."""
        return np.asarray((images.reshape(len(images), -1)[:, :3] - 128.0) / 8, np.float32)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return make_pool(tmp_path)


def multi(folder: Path, **policy: Any) -> Site:
    teacher = CallableTeacher(
        kind="callable", callable="a:b", labels="multi", classes=CLASSES, preprocessing=Preprocessing()
    )
    state, pools = folder / "state", (folder / "pool",)
    settings = SiteSettings(name="site-1", teacher=teacher, pools=pools, state=state, policy=Policy(**policy))
    return Site(settings, Labels())


def test_explain_refuses_a_secure_sum_as_the_site_would(tmp_path: Path, pool: Pool) -> None:
    summed = JobSettings.model_validate({"name": "job", "pool": pool.folder, "privacy": {"secure_sum": True}})
    assert "the site's teacher is multi-label" in explain(summed, multi(tmp_path)).refusal


def about(site: Site, pool: Pool, **changes: Any) -> Question:
    fields: dict[str, Any] = {"job": "job", "pool": pool.digest, "start": 0, "stop": SIZE, "kind": "log-odds"}
    fields |= {"encoding": "f16", "teacher": FINGERPRINT, "policy": site.settings.policy.version}
    return Question(**(fields | changes))


@pytest.mark.parametrize("encoding", ["f32", "f16", "u8", "top-2", "top-2-u8", "votes"])
def test_it_tells_log_odds_in_every_encoding_and_the_same_bytes_again(
    tmp_path: Path, pool: Pool, encoding: str
) -> None:
    site = multi(tmp_path, precision="f32")
    question = about(site, pool, encoding=encoding)
    answer = site.answer(question)
    found = decode(answer.data, SIZE, 3, encoding, odds=True)
    expected = Labels().log_odds(pool.read(0, SIZE))
    if encoding == "votes":
        assert np.array_equal(found > 0, expected > 0)
    elif encoding.startswith("top-2"):
        assert np.array_equal(found.argmax(axis=1), expected.argmax(axis=1))
    else:
        assert np.allclose(found, expected, atol=0.2)
    assert site.ledger.spent.lifetime == SIZE
    assert site.answer(question).data == answer.data
    assert site.ledger.spent.lifetime == SIZE
    part = site.answer(about(site, pool, encoding=encoding, start=7, stop=9)).data
    assert answer.data[7 * len(answer.data) // SIZE : 9 * len(answer.data) // SIZE] == part


def test_its_policy_shapes_what_leaves(tmp_path: Path, pool: Pool) -> None:
    site = multi(tmp_path, cap=0.9, precision="f16")
    found = decode(site.answer(about(site, pool, encoding="f16")).data, SIZE, 3, "f16", odds=True)
    assert np.abs(found).max() == pytest.approx(np.log(9), abs=2e-3)
    with pytest.raises(RefusedError, match="does not allow this encoding"):
        site.answer(about(site, pool, encoding="f32"))


def test_a_question_for_the_other_kind_is_refused(tmp_path: Path, pool: Pool) -> None:
    site = multi(tmp_path)
    with pytest.raises(RefusedError, match="is multi-label: it tells log-odds") as error:
        site.answer(about(site, pool, kind="log-probs"))
    assert error.value.code == "bad-question"
    single = make_site(tmp_path / "single")
    asked = about(single, pool, policy=single.settings.policy.version)
    with pytest.raises(RefusedError, match="has one label an image: it tells log-prob") as error:
        single.answer(asked)
    assert error.value.code == "bad-question"
    assert site.ledger.spent.lifetime == 0


def test_it_agrees_to_a_contract_but_to_no_secure_sum(tmp_path: Path, pool: Pool) -> None:
    site = multi(tmp_path)
    contract = Contract(
        job="job", labels=CLASSES, class_set=(0, 1, 2), pools=(pool.digest,), teacher=FINGERPRINT, encoding="f16"
    )
    assert site.agree(contract).samples > 0
    with pytest.raises(RefusedError, match="multi-label") as error:
        site.agree(contract.model_copy(update={"secure_sum": True}))
    assert error.value.code == "bad-question"


def test_its_answers_are_not_audited(tmp_path: Path, pool: Pool) -> None:
    with pytest.raises(SettingsError, match="attacks are on answers of one label an image"):
        check_audit(multi(tmp_path), 64)
