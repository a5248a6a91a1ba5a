"""The ledger tells by what mechanisms answers left, and limits of epsilon hold over all of them together."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.client import ledger as clock
from consilience.client.ledger_restart import restart
from consilience.client.policy import RefusedError
from consilience.client.privacy import account
from consilience.client.privacy.events import NoisyOutputs, event_from
from consilience.client.privacy.spending import loss_of
from consilience.client.site import Site
from consilience.common.errors import SettingsError
from consilience.common.pool import Pool
from consilience.common.settings import Limits, OutputNoise, Policy, SiteSettings
from consilience.common.settings_file import parse_settings
from helpers.small_site import CLASSES, SIZE, Fickle, about, make_pool, make_site

SIGMA = 40.0


def noisy(folder: Path, **limits: Any) -> Site:
    """A site that says its answers are behind noise; what they are does not matter here."""
    changes = {
        "privacy": OutputNoise(mechanism="output-noise", sigma=SIGMA),
        "policy": Policy(precision="f32", limits=Limits(**limits)),
    }
    return Site(make_site(folder).settings.model_copy(update=changes), Fickle())


def epsilon(answers: int) -> float:
    """What so many answers come to."""
    found = account([NoisyOutputs(sigma=SIGMA, count=answers)], 1e-5).epsilon
    assert found is not None
    return found


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return make_pool(tmp_path)


def test_every_answer_brings_its_events_in_rows_of_their_own(tmp_path: Path, pool: Pool) -> None:
    site = noisy(tmp_path)
    for start, stop in ((0, 10), (5, 20), (0, 20)):
        site.answer(about(site, pool, start, stop))
    rows = [row.entry for row in site.ledger.rows()]
    assert [(entry.kind, entry.samples) for entry in rows] == [
        ("answer", 10),
        ("mechanism", 0),
        ("answer", 10),
        ("mechanism", 0),
    ]
    assert [event_from(e.subject, e.body["parameters"], e.body["count"]) for e in rows if e.kind == "mechanism"] == [
        NoisyOutputs(sigma=SIGMA, count=10)
    ] * 2
    spent = loss_of(site.settings, site.ledger)
    assert (spent.unit, spent.epsilon) == ("model", epsilon(20))


@pytest.mark.parametrize("scope", ["epsilon_per_job", "epsilon_per_month", "epsilon_lifetime"])
def test_a_limit_of_epsilon_is_kept_to_the_sample(tmp_path: Path, pool: Pool, scope: str) -> None:
    site = noisy(tmp_path, **{scope: (epsilon(30) + epsilon(31)) / 2})
    first = site.answer(about(site, pool, 0, 25)).data
    with pytest.raises(RefusedError) as caught:
        site.answer(about(site, pool, 20, 31))
    assert caught.value.code == "budget-exhausted"
    site.answer(about(site, pool, 25, 30))
    with pytest.raises(RefusedError):
        site.answer(about(site, pool, 30, 31))
    assert site.answer(about(site, pool, 0, 25)).data == first
    other = about(site, pool, 30, 31, job="other")
    if scope == "epsilon_per_job":
        site.answer(other)
    else:
        with pytest.raises(RefusedError):
            site.answer(other)
    again = noisy(tmp_path, **{scope: (epsilon(30) + epsilon(31)) / 2})
    with pytest.raises(RefusedError):
        again.answer(about(again, pool, 31, 32))


@pytest.mark.parametrize(
    ("scope", "most", "job"), [("per_job", 12, "first"), ("per_month", 12, "third"), ("lifetime", 32, "third")]
)
def test_a_limit_of_epsilon_counts_all_that_is_its_own(
    tmp_path: Path, pool: Pool, scope: str, most: int, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three months of two jobs of 5 answers each leave 2 more: of one job 10, in one month 10, and 30 in all."""
    site = noisy(tmp_path, **{f"epsilon_{scope}": (epsilon(most) + epsilon(most + 1)) / 2})
    start = 0
    for month in (1, 2, 3):
        monkeypatch.setattr(clock, "utc_now", lambda month=month: datetime(2130, month, 2, tzinfo=UTC))
        for earlier in ("first", "second"):
            if (scope, month) != ("per_job", 3):
                site.answer(about(site, pool, start, start + 5, job=earlier))
                start += 5
    with pytest.raises(RefusedError):
        site.answer(about(site, pool, start, start + 3, job=job))
    site.answer(about(site, pool, start, start + 2, job=job))


def test_what_left_behind_no_mechanism_leaves_no_guarantee(tmp_path: Path, pool: Pool) -> None:
    bare = make_site(tmp_path)
    bare.answer(about(bare, pool, 0, 5))
    bare.close()
    site = noisy(tmp_path, epsilon_lifetime=1e3)
    spent = loss_of(site.settings, site.ledger)
    assert (spent.epsilon, spent.unit) == (None, None)
    with pytest.raises(RefusedError) as caught:
        site.answer(about(site, pool, 5, 6))
    assert "something left without a mechanism: no formal guarantee, so that it cannot" in caught.value.told_here


def test_what_a_damaged_ledger_told_is_not_forgotten(tmp_path: Path, pool: Pool) -> None:
    site = noisy(tmp_path)
    site.answer(about(site, pool, 0, 5))
    site.close()
    restart(site.settings)
    assert loss_of(site.settings, site.ledger).epsilon is None


def test_limits_of_epsilon_need_a_mechanism(tmp_path: Path) -> None:
    teacher = {"kind": "callable", "callable": "a:b", "classes": list(CLASSES), "preprocessing": {}}
    raw = {"name": "a", "teacher": teacher, "policy": {"limits": {"epsilon_lifetime": 3}}}
    with pytest.raises(SettingsError, match="epsilon_lifetime is 3, and without a privacy"):
        parse_settings(raw, SiteSettings, source="site.yaml", folder=tmp_path)


def test_show_and_explain_tell_what_it_came_to(tmp_path: Path, pool: Pool) -> None:
    (tmp_path / "site.yaml").write_text(
        "name: a\nteacher: {kind: callable, callable: 'helpers.teachers:fixed', classes: [ant, bee, cow], "
        "preprocessing: {}}\npools: [pool]\nprivacy: {mechanism: output-noise, sigma: 40}\n"
        "policy: {precision: f32, limits: {epsilon_lifetime: 9}}\n"
    )
    (tmp_path / "job.yaml").write_text("name: leaves\npool: pool\nask: {encoding: f32}\n")
    site = Site.load(tmp_path / "site.yaml")
    site.answer(about(site, pool, 0, 20, teacher=site.teacher.fingerprint))
    site.close()

    def said(*words: str | Path) -> str:
        result = CliRunner().invoke(app, ["site", *map(str, words)], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        return result.output

    shown = said("ledger", "show", tmp_path / "site.yaml")
    assert "lifetime: model" in shown
    assert f"epsilon {epsilon(20):.3g}, delta 1e-05" in shown
    explained = said("explain", tmp_path / "job.yaml", tmp_path / "site.yaml")
    assert f"epsilon {epsilon(20):.3g} at delta 1e-05, of a model" in explained
    assert f"-> epsilon {epsilon(SIZE):.3g}" in explained
    assert f"- lifetime: epsilon {epsilon(20):.3g} of 9 is spent" in explained
