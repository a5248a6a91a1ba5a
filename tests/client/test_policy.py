"""What a policy does not allow does not leave, and a stranger is told a code and a constant reason."""

from __future__ import annotations

import datetime
import json
import os
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from flwr.app import Context, Message, RecordDict

from consilience.client import app as app_module
from consilience.client import ledger as ledger_module
from consilience.client.explain import explain
from consilience.client.ledger import Ledger
from consilience.client.ledger_rows import Approval, Entry, approval
from consilience.client.policy import RefusedError, asked_by
from consilience.client.site import Site
from consilience.common.encoding import decode
from consilience.common.errors import SettingsError
from consilience.common.pool import Pool
from consilience.common.protocol import FINAL_REFUSALS, Contract, Refusal
from consilience.common.settings import JobSettings
from consilience.deploy.local_grid import LocalGrid
from helpers.commands import call, said
from helpers.small_site import CLASSES, ROW, SIZE, Familiar, Fickle, about, make_pool, make_site


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return make_pool(tmp_path)


def refused(site: Site, pool: Pool, start: int, stop: int, **changes: Any) -> str:
    with pytest.raises(RefusedError) as caught:
        site.answer(about(site, pool, start, stop, **changes))
    assert not any(character.isdigit() for character in caught.value.reason)
    return caught.value.code


def contract(pool: Pool, **changes: Any) -> Contract:
    fields = {"job": "job", "labels": CLASSES, "class_set": (0, 1, 2), "pools": (pool.digest,), "encoding": "f32"}
    return Contract(**{**fields, "teacher": Fickle.fingerprint, **changes})  # type: ignore[arg-type]


def set_clock(patch: pytest.MonkeyPatch, text: str) -> None:
    patch.setattr(ledger_module, "utc_now", lambda: datetime.datetime.fromisoformat(text))


def test_a_job_gets_as_many_samples_as_its_limit_and_those_again(tmp_path: Path, pool: Pool) -> None:
    site = make_site(tmp_path, limits={"per_job": 20})
    first = site.answer(about(site, pool, 0, 15)).data
    assert refused(site, pool, 15, 21) == "budget-exhausted"
    assert site.teacher.batches == 1  # type: ignore[attr-defined]
    assert refused(site, pool, 0, 21) == "budget-exhausted"
    site.answer(about(site, pool, 10, 20))
    assert refused(site, pool, 20, 21) == "budget-exhausted"
    assert site.answer(about(site, pool, 0, 15)).data == first
    site.answer(about(site, pool, 20, 40, job="another"))
    assert refused(site, pool, 40, 41, job="another") == "budget-exhausted"
    site.close()


def test_months_and_the_lifetime_count_over_all_jobs(
    tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(tmp_path, limits={"per_job": None, "per_month": 20, "lifetime": 30})
    set_clock(monkeypatch, "2030-01-31T23:00:00+00:00")
    site.answer(about(site, pool, 0, 12, job="one"))
    site.answer(about(site, pool, 12, 20, job="two"))
    assert refused(site, pool, 20, 21, job="three") == "budget-exhausted"
    set_clock(monkeypatch, "2029-12-01T00:00:00+00:00")  # a clock that is set back gives no other month
    assert refused(site, pool, 20, 21, job="three") == "budget-exhausted"
    set_clock(monkeypatch, "2030-02-01T00:00:00+00:00")
    assert refused(site, pool, 20, 31, job="three") == "budget-exhausted"
    site.answer(about(site, pool, 20, 30, job="three"))
    set_clock(monkeypatch, "2031-02-01T00:00:00+00:00")
    assert refused(site, pool, 30, 31, job="four") == "budget-exhausted"
    site.close()


def test_a_limit_below_what_was_spent_refuses_all_that_is_new(tmp_path: Path, pool: Pool) -> None:
    site = make_site(tmp_path)
    site.answer(about(site, pool, 0, 30))
    site.close()
    strict = make_site(tmp_path, limits={"lifetime": 10})
    assert refused(strict, pool, 40, 41) == "budget-exhausted"
    strict.close()


def test_a_job_that_would_take_more_than_is_left_is_refused_before_it_begins(tmp_path: Path, pool: Pool) -> None:
    site = make_site(tmp_path, limits={"per_job": SIZE - 1})
    with pytest.raises(RefusedError) as caught:
        site.agree(contract(pool))
    assert caught.value.code == "budget-exhausted"
    assert site.teacher.batches == 0  # type: ignore[attr-defined]
    site.answer(about(site, pool, 0, 1, job="earlier", encoding="f16"))
    with pytest.raises(RefusedError):  # in another encoding it counts by itself
        site.agree(contract(pool))
    assert site.agree(contract(pool, encoding="f16")).pools == (pool.digest,)
    assert site.ledger.spent.lifetime == 1
    site.close()


def approve(site: Site, **given: Any) -> None:
    with site.ledger.alone():
        site.ledger.append(approval("job", site.settings.policy.version, Approval(**given)))


def test_an_approval_is_of_so_many_samples(tmp_path: Path, pool: Pool) -> None:
    site = make_site(tmp_path, approval=True)
    asked = asked_by(about(site, pool, 0, 1))
    approve(site, asked={asked: 10, asked._replace(encoding="f16"): SIZE})
    assert site.answer(about(site, pool, 0, 10)).data
    assert refused(site, pool, 10, 11) == "not-approved"
    with pytest.raises(RefusedError, match="something else than was approved"):
        site.agree(contract(pool))
    assert site.answer(about(site, pool, 3, 7)).data  # what left before costs nothing
    approve(site, asked={asked: SIZE})
    assert site.agree(contract(pool))
    assert site.answer(about(site, pool, 10, SIZE)).data
    site.close()


def test_an_approval_of_sealed_answers_is_of_no_others(tmp_path: Path, pool: Pool) -> None:
    site = make_site(tmp_path, approval=True)
    approve(site, asked={asked_by(about(site, pool, 0, 1)): SIZE}, sealed=True)
    assert refused(site, pool, 0, 1) == "not-approved"
    with pytest.raises(RefusedError, match="something else than was approved") as caught:
        site.agree(contract(pool))
    assert "unsealed answers" in caught.value.told_here
    assert site.ledger.spent.lifetime == 0
    site.close()


def test_what_is_approved_by_one_name_is_answered_by_it(tmp_path: Path, pool: Pool) -> None:
    """`top-K` of more classes than there are is one with `top-K` of all, whichever the job says."""
    site = make_site(tmp_path, approval=True)
    demand = site.demand("job", [pool], "top-5", coverage=False, summed=False)
    approve(site, asked=dict.fromkeys(demand.asked, SIZE))
    assert site.agree(contract(pool, encoding="top-5"))
    assert site.answer(about(site, pool, 0, SIZE, encoding="top-5")).data
    site.close()


def test_only_listed_pools_are_answered_about(tmp_path: Path, pool: Pool) -> None:
    site = make_site(tmp_path, pools=["0" * 64])
    assert refused(site, pool, 0, 1) == "pool-not-allowed"
    with pytest.raises(RefusedError) as caught:
        site.agree(contract(pool))
    assert caught.value.code == "pool-not-allowed"
    listed = make_site(tmp_path, pools=["0" * 64, pool.digest])
    listed.agree(contract(pool))
    assert listed.answer(about(listed, pool, 0, 1)).data
    listed.close()


def test_a_policy_ends_with_its_last_day(tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_site(tmp_path, ends="2030-06-30")
    set_clock(monkeypatch, "2030-06-30T23:59:59+00:00")
    site.answer(about(site, pool, 0, 1))
    set_clock(monkeypatch, "2030-07-01T00:00:00+00:00")
    assert refused(site, pool, 1, 2) == "policy-ended"
    assert refused(site, pool, 0, 1) == "policy-ended"
    with pytest.raises(RefusedError):
        site.agree(contract(pool))
    site.close()


def test_a_job_is_answered_once_a_person_approved_it_under_this_policy(tmp_path: Path, pool: Pool) -> None:
    site = make_site(tmp_path, approval=True)
    assert refused(site, pool, 0, 1) == "not-approved"
    with pytest.raises(RefusedError):
        site.agree(contract(pool))
    person = Ledger.open(site.settings)  # another process: `site approve`
    asked = Approval({asked_by(about(site, pool, 0, 1)): SIZE})
    with person.alone():
        person.append(approval("other", site.settings.policy.version, asked))
        person.append(approval("job", "0" * 16, asked))
        person.append(Entry("approval", "job", site.settings.policy.version, body={"given": True}))  # of a name alone
    assert refused(site, pool, 0, 1) == "not-approved"
    with person.alone():
        person.append(approval("job", site.settings.policy.version, asked))
    site.agree(contract(pool))
    assert site.answer(about(site, pool, 0, 1)).data
    with person.alone():
        person.append(approval("job", site.settings.policy.version, None))
    assert refused(site, pool, 0, 1) == "not-approved"
    person.close()
    site.close()


def test_an_approved_job_gets_what_was_approved_and_nothing_else(tmp_path: Path, pool: Pool) -> None:
    larger = make_pool(tmp_path / "larger", SIZE + 1)
    site = make_site(tmp_path, more=(larger.folder,), approval=True, coverage="f16")
    with site.ledger.alone():
        given = Approval({asked_by(about(site, pool, 0, 1)): SIZE})
        site.ledger.append(approval("job", site.settings.policy.version, given))
    site.agree(contract(pool))
    site.answer(about(site, pool, 0, SIZE))
    others: list[dict[str, Any]] = [
        {"encoding": "f16"},
        {"encoding": "votes"},
        {"kind": "coverage", "encoding": "f16", "teacher": Familiar.fingerprint},
        {"job": "another"},
    ]
    for changes in others:
        assert refused(site, pool, 0, 1, **changes) == "not-approved"
    assert refused(site, larger, 0, 1) == "not-approved"
    more: list[dict[str, Any]] = [
        {"encoding": "f16"},
        {"pools": (pool.digest, larger.digest)},
        {"coverage": True},
        {"secure_sum": True},
        {"job": "another"},
    ]
    for changes in more:
        with pytest.raises(RefusedError) as caught:
            site.agree(contract(pool, **changes))
        assert caught.value.code == "not-approved"
    assert site.ledger.spent.lifetime == SIZE
    another = Fickle()
    another.fingerprint = "d" * 64  # type: ignore[misc]
    site.close()
    site = make_site(tmp_path, another, approval=True, coverage="f16")
    assert refused(site, pool, 0, 1, teacher=another.fingerprint) == "not-approved"
    site.close()


def test_answers_leave_shaped(tmp_path: Path, pool: Pool) -> None:
    site = make_site(tmp_path, cap=0.6, floor=0.05)
    probs = np.exp(decode(site.answer(about(site, pool, 0, SIZE)).data, SIZE, 3, "f32"))
    assert probs.max() <= 0.6 + 1e-6
    assert probs.min() >= 0.05 - 1e-6
    with pytest.raises(SettingsError, match=r"policy\.floor"):
        make_site(tmp_path, floor=0.4)
    site.close()


def test_a_damaged_ledger_is_a_code_for_the_server_and_nothing_leaves(
    tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site(tmp_path)
    site.answer(about(site, pool, 0, 5))
    site.close()
    site.ledger.head.unlink()
    site.close()
    monkeypatch.setattr(app_module.Site, "load", classmethod(lambda cls, path: site))
    app_module.forget_sites()
    question = about(site, pool, 0, 5)
    with LocalGrid(app_module.app, [{"site": "site.yaml"}], workers=1) as grid:
        (node,) = grid.get_node_ids()
        for kind, content in (("answer", question.to_content()), ("contract", contract(pool).to_content())):
            (reply,) = grid.send_and_receive([Message(content, dst_node_id=node, message_type=f"query.{kind}")])
            refusal = Refusal.find(reply.content)
            assert refusal is not None
            assert refusal.code == "ledger-damaged"
            assert refusal.code in FINAL_REFUSALS
            assert str(tmp_path) not in refusal.model_dump_json()
    app_module.forget_sites()
    assert "ledger.head is missing" in caplog.text


def test_the_site_s_log_says_which_limit_it_was_and_the_server_is_told_no_number(
    tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site(tmp_path, limits={"per_job": 40, "lifetime": 10})
    site.answer(about(site, pool, 0, 7, job="earlier"))
    monkeypatch.setattr(app_module.Site, "load", classmethod(lambda cls, path: site))
    app_module.forget_sites()
    with LocalGrid(app_module.app, [{"site": "site.yaml"}], workers=1) as grid:
        (node,) = grid.get_node_ids()
        content = about(site, pool, 7, 11).to_content()
        (reply,) = grid.send_and_receive([Message(content, dst_node_id=node, message_type="query.answer")])
    refusal = Refusal.find(reply.content)
    assert refusal == Refusal(code="budget-exhausted", reason="the site's limits do not allow so many samples more")
    assert "so many samples more (lifetime: 4 more, 3 left of 10)" in caplog.text
    assert site.ledger.spent.lifetime == 7
    app_module.forget_sites()


# the command line


@pytest.fixture
def file(tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A site's site.yaml, with a teacher that a module of the site's gives."""
    (tmp_path / "policy_teacher.py").write_text(
        "import numpy as np\n\n\ndef scores(images):\n    return np.full((len(images), 3), 1 / 3)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "site.yaml"
    app_module.forget_sites()


def write(file: Path, **policy: Any) -> None:
    teacher = {"kind": "callable", "callable": "policy_teacher:scores", "classes": list(CLASSES), "preprocessing": {}}
    raw = {"name": "site-1", "teacher": teacher, "pools": ["pool"], "policy": {"precision": "f32", **policy}}
    file.write_text(yaml.safe_dump(raw))


def release(file: Path, pool: Pool, start: int, stop: int, job: str = "job", **changes: Any) -> None:
    with closing(Site.load(file)) as site:
        site.answer(about(site, pool, start, stop, job=job, teacher=site.teacher.fingerprint, **changes))


def test_a_contract_that_says_so_counts_coverage_too(tmp_path: Path, pool: Pool) -> None:
    site = make_site(tmp_path, limits={"per_job": 2 * SIZE - 1}, coverage="f16")
    site.agree(contract(pool))
    with pytest.raises(RefusedError, match="limits do not allow"):
        site.agree(contract(pool, coverage=True))
    make_site(tmp_path, limits={"per_job": 2 * SIZE}, coverage="f16").agree(contract(pool, coverage=True))


def test_a_contract_of_secure_sums_counts_what_sums_released(tmp_path: Path, pool: Pool) -> None:
    larger = make_pool(tmp_path / "larger", SIZE + 1)
    site = make_site(tmp_path, more=(larger.folder,), limits={"per_job": SIZE})
    site.answer(about(site, pool, 0, SIZE))
    site.agree(contract(pool))
    with pytest.raises(RefusedError, match="limits do not allow"):
        site.agree(contract(pool, secure_sum=True))
    sums = contract(pool, job="sums", pools=(pool.digest, larger.digest))
    assert site.agree(sums.model_copy(update={"secure_sum": True}))  # of the first pool alone
    with pytest.raises(RefusedError):
        site.agree(sums)
    site.close()


def test_explain_says_what_a_job_would_take_and_what_is_left(file: Path, pool: Pool) -> None:
    write(file, limits={"per_job": 60, "per_month": None, "lifetime": 100}, decimals=2)
    job = file.with_name("job.yaml")
    job.write_text(yaml.safe_dump({"name": "clothes", "pool": "pool", "ask": {"encoding": "f32"}}))
    release(file, pool, 0, 8, job="earlier")
    found = call("explain", job, file)
    part = {"pool": pool.digest, "kind": "log-probs", "encoding": "f32", "samples": SIZE, "new": SIZE - 8}
    assert found["parts"] == [
        part | {"of": SIZE, "tap": "", "bytes_a_sample": ROW, "shape": [], "summed": False, "owners": 1}
    ]
    assert (found["new"], found["refusal"], found["pools_are_the_job_s"]) == (42, None, True)
    (month,) = (name for name in found["left"] if name.startswith("month"))
    assert found["left"] == {
        "job clothes": {"before": 60, "after": 18},
        month: {"before": None, "after": None},
        "lifetime": {"before": 92, "after": 50},
    }
    text = said("explain", job, file)
    for words in ("8 of them released before", "92 -> 50", "rounded to 2 decimals", "It would be answered."):
        assert words in text
    assert "the site card tells the names of the classes, the teacher's kind and architecture\n" in text
    assert "no mechanism: there is no formal guarantee" in text
    job.write_text(yaml.safe_dump({"name": "clothes", "pool": "pool", "privacy": {"secure_sum": True}}))
    assert call("explain", job, file)["new"] == SIZE, "sums are released by themselves"
    text = said("explain", job, file)
    assert "sums over sites of log-probabilities of every class, no single answer but on classes that no other" in text
    assert "the site has no key to sign with in secure sums" in text
    job.write_text(yaml.safe_dump({"name": "clothes", "pool": "elsewhere", "ask": {"encoding": "f32"}}))
    assert call("explain", job, file)["pools_are_the_job_s"] is False
    assert "these are the pools of site.yaml" in said("explain", job, file)


@pytest.mark.parametrize(
    ("privacy", "words"),
    [
        ({}, "They would leave unsealed: a SuperLink that carries them could read them."),
        ({"sealed": True}, "They would leave sealed: encrypted for the coordinator alone."),
        ({"secure_sum": True}, "They would leave masked, in secure sums, which are not sealed."),
    ],
)
def test_explain_says_whether_the_job_s_answers_would_be_sealed(
    file: Path, privacy: dict[str, bool], words: str
) -> None:
    write(file)
    job = file.with_name("job.yaml")
    job.write_text(yaml.safe_dump({"name": "clothes", "pool": "pool", "privacy": privacy}))
    assert words in said("explain", job, file)
    assert call("explain", job, file)["sealed"] is privacy.get("sealed", False)


@pytest.mark.parametrize(
    ("groups", "told", "words"),
    [
        ({}, {}, ""),
        ({"cow": ["calf", "bull"]}, {"cow": ["calf", "bull"]}, "the class cow for the group of calf, bull"),
        ({"cow": ["cat", "bull"]}, {}, "leave the site out: Site site-1 names 'cat' and 'cow'"),
    ],
)
def test_explain_says_which_classes_a_job_takes_for_groups(
    file: Path, groups: dict[str, list[str]], told: dict[str, list[str]], words: str
) -> None:
    write(file)
    job = file.with_name("job.yaml")
    raw = {"name": "clothes", "pool": "pool", "ask": {"encoding": "f32"}, "labels": {"groups": groups}}
    job.write_text(yaml.safe_dump(raw))
    found, text = call("explain", job, file), said("explain", job, file)
    assert found["groups"] == told
    assert bool(found["misfit"]) == ("leave the site out" in words)
    assert words in text
    assert ("group" in text) == bool(groups)


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, ["log-probs", "coverage"]),
        ({"privacy": {"secure_sum": True}}, ["log-probs"]),
        ({"ask": {"coverage": False}}, ["log-probs"]),
        ({"unify": {"method": "mf-p"}}, ["log-probs"]),
    ],
)
def test_explain_counts_coverage_where_the_server_would_ask_for_it(
    tmp_path: Path, pool: Pool, changes: dict[str, Any], kinds: list[str]
) -> None:
    site = make_site(tmp_path, coverage="f16")
    job = JobSettings.model_validate({"name": "clothes", "pool": pool.folder, **changes})
    found = explain(job, site)
    assert [part.kind for part in found.parts] == kinds
    assert found.new == SIZE * len(kinds)
    site.close()


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"limits": {"per_job": 49}}, "limits do not allow so many samples more (job clothes: 50 more, 49 left of 49)"),
        ({"approval": True}, "nobody at the site has approved this job yet (job clothes)"),
        ({"sums_only": True}, "in secure sums only (policy.sums_only is true)"),
        ({"ends": "2020-01-01"}, "policy has ended (policy.ends is 2020-01-01)"),
        ({"precision": "f16"}, "does not allow this encoding (log-probs as f32; policy.precision is f16)"),
        ({"pools": ["0" * 64]}, "policy.pools: 000000000000)"),
    ],
)
def test_explain_says_why_a_job_would_be_refused(file: Path, policy: dict[str, Any], words: str) -> None:
    write(file, **policy)
    job = file.with_name("job.yaml")
    job.write_text(yaml.safe_dump({"name": "clothes", "pool": "pool", "ask": {"encoding": "f32"}}))
    assert words in call("explain", job, file)["refusal"]
    text = said("explain", job, file)
    assert "It would be refused" in text
    assert ("- job clothes: 49, which are 1 too few" in text) == ("limits" in policy)


@pytest.mark.parametrize("words", [("train",), ("ledger", "show")])
def test_state_is_its_owner_s_alone_whatever_makes_it(file: Path, pool: Pool, words: tuple[str, ...]) -> None:
    data = file.parent / "private.npz"
    np.savez(data, x=np.zeros((30, 2, 2, 3), np.uint8), y=np.arange(30) % 3, names=np.array(CLASSES))
    write(file)
    file.write_text(file.read_text() + "data: {kind: npz, path: private.npz}\n")
    before = os.umask(0o022)
    try:
        call(*words, file)
    finally:
        os.umask(before)
    assert stat.S_IMODE((file.parent / "state").stat().st_mode) == 0o700


def with_encoding(job: Path, encoding: str) -> Path:
    job.write_text(yaml.safe_dump({"name": "job", "pool": "pool", "ask": {"encoding": encoding}}))
    return job


def test_approve_and_withdraw_are_kept_in_the_ledger(file: Path, pool: Pool) -> None:
    write(file, approval=True)
    job = file.with_name("job.yaml")
    with_encoding(job, "f32")
    with pytest.raises(RefusedError):
        release(file, pool, 0, 1)
    told = call("approve", job, file)
    assert (told["approved"], told["refusal"]) == (True, None)
    assert [(part["pool"], part["encoding"], part["samples"]) for part in told["parts"]] == [(pool.digest, "f32", SIZE)]
    assert call("approve", job, file)["approved"] is True
    assert call("ledger", "show", file)["rows"] == 1
    assert "It would be answered." in said("explain", job, file)
    release(file, pool, 0, 1)
    with pytest.raises(RefusedError, match="something else than was approved"):
        release(file, pool, 0, 1, encoding="f16")
    with_encoding(job, "f16")
    assert "something else than was approved" in call("explain", job, file)["refusal"]
    assert "as f16, of 50 samples" in said("approve", job, file)
    release(file, pool, 0, 1, encoding="f16")
    assert "(job job: log-probs as f32 of pool" in call("explain", with_encoding(job, "f32"), file)["refusal"]
    assert "no longer approved" in said("approve", "job", file, "--withdraw")
    with pytest.raises(RefusedError, match="nobody at the site"):
        release(file, pool, 0, 1, encoding="f16")
    call("approve", job, file, "--withdraw")
    assert call("ledger", "show", file)["rows"] == 5
    write(file)
    assert "asks for no approval" in said("approve", job, file)


def test_an_approval_is_withdrawn_whatever_the_policy_is_now(file: Path, pool: Pool) -> None:
    write(file, approval=True)
    before = file.read_text()
    job = with_encoding(file.with_name("job.yaml"), "f32")
    assert "50 samples newly released, and no more" in said("approve", job, file)
    write(file, approval=True, ends=datetime.date(2900, 1, 1))
    assert "no longer approved" in said("approve", "job", file, "--withdraw")
    assert "was not approved" in said("approve", "job", file, "--withdraw")
    file.write_text(before)
    with pytest.raises(RefusedError, match="nobody at the site"):
        release(file, pool, 0, 1)


def test_what_is_approved_of_a_job_is_all_that_it_asks_for(file: Path, pool: Pool, tmp_path: Path) -> None:
    test_pool = make_pool(tmp_path / "test", SIZE // 2)
    write(file, approval=True)
    file.write_text(file.read_text().replace("pools:\n- pool\n", "pools:\n- pool\n- test/pool\n"))
    job = file.with_name("job.yaml")
    np.savez(
        tmp_path / "test.npz", x=np.zeros((SIZE // 2, 2, 2, 3), np.uint8), y=np.zeros(SIZE // 2, int), names=CLASSES
    )
    judge = {"test": {"kind": "npz", "path": "test.npz"}, "test_pool": "test/pool"}
    job.write_text(yaml.safe_dump({"name": "job", "pool": "pool", "ask": {"encoding": "top-5"}, "judge": judge}))
    call("approve", job, file)
    with closing(Site.load(file)) as site:
        own = {"teacher": site.teacher.fingerprint, "encoding": "top-5"}
        assert site.agree(contract(pool, pools=(pool.digest, test_pool.digest), **own))
        for each in (pool, test_pool):
            assert site.answer(about(site, each, 0, len(each), **own)).data
        assert site.ledger.spent.jobs["job"] == SIZE + SIZE // 2
        rows = site.ledger.count
    call("approve", job, file)
    assert call("ledger", "show", file)["rows"] == rows


def test_a_policy_that_changes_while_the_agent_runs_counts_from_the_next_message_on(file: Path, pool: Pool) -> None:
    write(file)
    app_module.forget_sites()
    context = Context(run_id=1, node_id=1, node_config={"site": str(file)}, state=RecordDict(), run_config={})
    first = app_module.site_of(context)
    assert app_module.site_of(context) is first
    write(file, ends=datetime.date(2020, 1, 1))
    second = app_module.site_of(context)
    assert second.settings.policy.ends == datetime.date(2020, 1, 1)
    assert app_module.site_of(context) is second
    assert refused(second, pool, 0, 1, teacher=second.teacher.fingerprint) == "policy-ended"
    whole = file.read_text()
    file.write_text(whole + "state: elsewhere\n")
    with pytest.raises(SettingsError, match="changed while the agent runs: state"):
        app_module.site_of(context)
    assert not (file.parent / "elsewhere").exists()
    file.write_text("policy: {ends: never}")
    with pytest.raises(SettingsError):
        app_module.site_of(context)
    file.write_text(whole)
    assert app_module.site_of(context).settings == second.settings


def test_a_name_is_no_approval_and_a_job_that_cannot_be_is_not_approved(file: Path, pool: Pool) -> None:
    write(file, approval=True, precision="f16")
    error = call("approve", "clothes", file, code=3)
    assert error["message"] == "JOB is 'clothes', a job's name, and a name does not say what would be asked for"
    assert "job.yaml" in error["hint"]
    job = file.with_name("job.yaml")
    assert "job.yaml" in call("approve", job, file, code=3)["message"]
    job.write_text(yaml.safe_dump({"name": "clothes", "pool": "pool", "ask": {"encoding": "f32"}}))
    assert "Yet it would be refused: the site's policy does not allow this encoding (" in said("approve", job, file)
    file.write_text(file.read_text().replace("pools:\n- pool\n", "pools: []\n"))
    job.write_text(yaml.safe_dump({"name": "clothes", "pool": "elsewhere"}))
    assert "no pool here" in call("approve", job, file, code=5)["message"]


def test_the_ledger_is_shown_verified_and_exported(file: Path, pool: Pool, tmp_path: Path) -> None:
    write(file)
    release(file, pool, 0, 10)
    noted = call("ledger", "verify", file)["chain"]
    release(file, pool, 10, 30, job="another")
    shown = call("ledger", "show", file)
    assert shown["spent"]["jobs"] == {"job": 10, "another": 20}
    assert shown["spent"]["lifetime"] == 30
    text = said("ledger", "show", file)
    assert "job another" in text
    assert "1,000,000" in text
    assert call("ledger", "verify", file, "--noted", noted)["noted_row"] == 1
    assert f"{call('ledger', 'show', file)['chain']}\n" in text, "the hash is on one line, to be copied"
    assert "no row has the hash" in call("ledger", "verify", file, "--noted", "f" * 64, code=24)["message"]
    assert "allowed: 64 digits" in call("ledger", "verify", file, "--noted", noted[:48], code=3)["message"]
    lines = tmp_path / "out.jsonl"
    call("ledger", "export", file, lines)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["samples"] for row in rows] == [10, 20]
    assert rows[0]["chain"] == noted
    table = tmp_path / "out.csv"
    call("ledger", "export", file, table)
    assert [line.split(",")[3] for line in table.read_text().splitlines()] == ["job", "job", "another"]
    assert call("ledger", "export", file, tmp_path / "out.txt", code=3)["name"] == "settings"
    card = call("show", file)
    assert "limits" not in card
    text = said("show", file)
    assert "at most 1,000,000 samples; 30 released" in text


def test_a_restart_asks_for_a_word_and_says_what_it_carried_over(file: Path, pool: Pool) -> None:
    write(file)
    release(file, pool, 0, 10)
    (file.parent / "state-ledger.head").unlink()
    error = call("ledger", "verify", file, code=24)
    assert "ledger.head is missing" in error["message"]
    assert "--yes is missing" in call("ledger", "restart", file, code=3)["message"]
    told = call("ledger", "restart", file, "--yes", "--spent", 12)
    assert (told["carried"], told["of_no_job"]) == (12, 2)
    spent = call("ledger", "show", file)["spent"]
    assert (spent["jobs"], spent["lifetime"]) == ({"": 2, "job": 10}, 12)
    release(file, pool, 0, 10)
    assert call("ledger", "show", file)["spent"]["lifetime"] == 22
    (file.parent / "state" / "ledger.db").write_bytes(b"damaged" * 1000)
    for folder in (file.parent / "state").glob("ledger-*"):
        folder.rename(folder.with_name("ledger-first"))  # a second has room for one
    words = said("ledger", "restart", file, "--yes")
    assert (
        "begins with 22 samples spent. Of 22 samples no row tells the job any more: they count for the month" in words
    )
    assert "the site takes part in no secure sum until it has another one" in words
