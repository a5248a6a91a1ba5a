"""A whole job by secure sums on one machine: the same labels as openly, no single answer at the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.client.app import forget_sites
from consilience.client.audit.answers import single_teacher
from consilience.client.policy import RefusedError
from consilience.client.site import Site
from consilience.common.errors import SettingsError
from consilience.common.files import read_json
from consilience.common.pool import Pool
from consilience.common.progress import Reporter
from consilience.common.settings import JobSettings
from consilience.common.settings_file import parse_settings
from consilience.server.job import Job
from consilience.server.unify import unify


def job(**changes: Any) -> dict[str, Any]:
    fit = {"epochs": 1, "precision": "f32", "augment": False}
    sets = [["Bag", "Coat", "Dress"], ["Dress", "Shirt", "Coat"], ["Coat", "Bag", "Shirt"]]
    raw: dict[str, Any] = {
        "name": "small",
        "simulation": {
            "data": {"kind": "embedded"},
            "test": {"kind": "embedded", "split": "test"},
            "pool_share": 0.04,
            "partition": {"kind": "class-lists", "classes": sets},
            "teachers": [{"kind": "train", "architecture": "cnn3", "fit": fit}],
            "policy": {"precision": "f32"},
        },
        "ask": {"encoding": "f32"},
        "student": {"architecture": "cnn3", "fit": fit},
    }
    return {**raw, **changes}


def simulate(folder: Path, name: str, raw: dict[str, Any], *options: str) -> Path:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    forget_sites()
    words = ["simulate", str(folder / f"{name}.yaml"), "--out", str(folder / name), *options]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return folder / name


def open_labels(run: Path) -> np.ndarray:
    """What the sites' open answers would have given."""
    pool = Pool.open(run / "simulation" / "pool")
    images = pool.read(0, len(pool))
    sets = read_json(run / "contract.json")["class_sets"]
    return unify([single_teacher(site).log_probs(images) for site in sites_of(run)], sets).probs


def sites_of(run: Path) -> list[Site]:
    """The sites of a run, as they are afterwards."""
    names = [site["name"] for site in read_json(run / "contract.json")["sites"]]
    return [Site.load(run / "simulation" / "sites" / name / "site.yaml") for name in names]


@pytest.mark.slow
def test_sums_count_towards_a_site_s_limits(tmp_path: Path, unsynced: None) -> None:
    raw = job(privacy={"secure_sum": True})
    raw["simulation"]["policy"] |= {"limits": {"per_job": 10}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(raw))
    forget_sites()
    result = CliRunner().invoke(app, ["simulate", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 9, result.output
    assert "limits do not allow" in result.output


def test_a_site_that_answers_in_sums_only_does_not_answer_openly(tmp_path: Path, unsynced: None) -> None:
    raw = job()
    raw["simulation"]["policy"] |= {"sums_only": True}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(raw))
    forget_sites()
    result = CliRunner().invoke(app, ["simulate", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 3, result.output
    assert "answers in secure sums only" in result.output
    site = Site.load(tmp_path / "run" / "simulation" / "sites" / "site-1" / "site.yaml")
    pool = Pool.open(tmp_path / "run" / "simulation" / "pool")
    question = site.question("small", pool.digest, len(pool), "log-probs", "f32")
    with pytest.raises(RefusedError, match="in secure sums only"):
        site.answer(question)
    assert site.ledger.count == 0


@pytest.mark.slow
def test_a_student_of_some_classes_by_secure_sums(tmp_path: Path, unsynced: None) -> None:
    raw = job(privacy={"secure_sum": True})
    raw["student"] |= {"classes": ["Coat", "Shirt"], "other": True}
    hidden = simulate(tmp_path, "hidden", raw)
    names, report = read_json(hidden / "contract.json")["labels"], read_json(hidden / "report.json")
    wanted = [names.index(name) for name in names if name in ("Coat", "Shirt")]
    share = 1 - open_labels(hidden)[:, wanted].sum(axis=1).mean()
    assert report["student"]["classes"] == [*(names[label] for label in wanted), "other"]
    assert report["student"]["other_share"] == pytest.approx(share, abs=1e-4)
    assert report["student"]["accuracy"] is not None


@pytest.mark.slow
def test_a_job_by_secure_sums(tmp_path: Path, unsynced: None) -> None:
    raw = job(privacy={"secure_sum": True})
    raw["simulation"]["policy"] |= {"sums_only": True}
    hidden = simulate(tmp_path, "hidden", raw)
    labels = np.load(hidden / "labels" / "q.npy")
    np.testing.assert_allclose(labels, open_labels(hidden), atol=1e-5)
    assert not list(hidden.rglob("answers.bin"))
    assert not list(hidden.rglob("rows.bin"))
    report = read_json(hidden / "report.json")
    assert report["student"]["accuracy"] is not None
    assert report["baselines"]["oracle"]["accuracy"] is not None
    assert report["baselines"]["naive"]["accuracy"] is None
    for site in report["sites"]:
        assert site["answers"] == len(labels)
        assert site["bytes"] == 4 * len(labels) * len(site["classes"])
        assert site["missed"] == 0
    for site in sites_of(hidden):
        told = {(row.entry.body.get("use"), row.entry.kind) for row in site.ledger.rows()}
        assert told == {("sums", "answer"), (None, "sum")}
        assert site.ledger.spent.jobs == {"small": len(labels)}
    assert any("sums of answers only" in warning for warning in report["warnings"])
    # Doing it again does nothing but publish.
    before = {path: path.stat().st_mtime_ns for path in (hidden / "sums").rglob("*") if path.is_file()}
    simulate(tmp_path, "hidden", raw)
    assert {path: path.stat().st_mtime_ns for path in (hidden / "sums").rglob("*") if path.is_file()} == before
    with Reporter(quiet=True) as reporter, pytest.raises(SettingsError, match="takes in no more sites"):
        Job.open(hidden, reporter).do(None, fold_in=True)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_job_by_secure_sums_with_real_processes(tmp_path: Path) -> None:
    run = simulate(tmp_path, "real", job(privacy={"secure_sum": True}), "--processes")
    labels = np.load(run / "labels" / "q.npy")
    np.testing.assert_allclose(labels, open_labels(run), atol=1e-5)
    assert not list(run.rglob("answers.bin"))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"unify": {"method": "mf-p"}}, "unify.method is 'mf-p'"),
        ({"unify": {"prior_correction": True}}, "unify.prior_correction is True"),
        ({"unify": {"other": 0.5}}, "unify.other is 0.5"),
        ({"student": {"learning": "direct-ce"}}, "student.learning is 'direct-ce'"),
        ({"unify": {"weights": {"site-1": 3}}}, "unify.weights lie between 1 and 3"),
        ({"unify": {"temperature": 0.5}}, "unify.temperature is 0.5"),
    ],
)
def test_what_needs_single_answers_is_refused(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingsError, match=field):
        parse_settings(job(privacy={"secure_sum": True}, **changes), JobSettings, source="job.yaml", folder=tmp_path)
