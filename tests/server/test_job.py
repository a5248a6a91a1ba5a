"""A job with sites that fail, and with true labels that do not fit: what is used, what is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consilience.common.data import from_arrays
from consilience.common.errors import AskingError, DataError, PoolError, RunError, SettingsError
from consilience.common.files import read_json
from consilience.common.pool import Pool
from consilience.common.progress import Reporter
from consilience.common.settings import JobSettings
from consilience.common.settings_file import dump_settings, parse_settings
from consilience.server.job import Job
from helpers.sites import Handler, Sites, grid_of, honest, refusing

SAMPLES, TEST = 40, 12


@pytest.fixture
def home(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (SAMPLES, 16, 16), np.uint8)
    Pool.build(from_arrays(pixels, None, (), where="test"), tmp_path / "pool")
    test = rng.integers(0, 256, (TEST, 16, 16), np.uint8)
    Pool.build(from_arrays(test, None, (), where="test"), tmp_path / "test-pool")
    np.savez(tmp_path / "test.npz", x=test, y=np.arange(TEST) % 4, names=np.array(["c", "b", "a", "z"]))
    np.save(tmp_path / "labels.npy", np.arange(SAMPLES) % 4)
    return tmp_path


@pytest.fixture
def reporter() -> Iterator[Reporter]:
    with Reporter(quiet=True) as quiet:
        yield quiet


def settings(home: Path, **changes: Any) -> JobSettings:
    fit = {"epochs": 1, "precision": "f32", "augment": False}
    raw: dict[str, Any] = {
        "name": "job",
        "pool": "pool",
        "ask": {"encoding": "f32", "question_size": 16, "retries": 0},
        "student": {"architecture": "cnn3", "fit": fit},
        "judge": {
            "test": {"kind": "npz", "path": "test.npz"},
            "test_pool": "test-pool",
            "pool_labels": "labels.npy",
        },
    }
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    return parse_settings(raw, JobSettings, source="job.yaml", folder=home)


def do(home: Path, handlers: dict[str, Handler], reporter: Reporter, **changes: Any) -> dict[str, Any]:
    run = home / "run"
    run.mkdir(exist_ok=True)
    dump_settings(settings(home, **changes), run / "job.yaml")
    with grid_of(Sites(handlers)) as grid:
        Job.open(run, reporter).do(grid)
    report: dict[str, Any] = read_json(run / "report.json")
    return report


def test_a_site_that_fails_stops_the_job_by_default_and_names_itself(home: Path, reporter: Reporter) -> None:
    with pytest.raises(AskingError, match=r"1 of 2 sites.*2 are needed: bad lacks 52 samples.*teacher-failed"):
        do(home, {"bad": refusing, "good": honest}, reporter)
    assert len(list((home / "run" / "answers" / "good").glob("*/answers.bin"))) == 2
    report = do(home, {"bad": honest, "good": honest}, reporter)
    assert [site["answers"] for site in report["sites"]] == [52, 52]
    events = [json.loads(line) for line in (home / "run" / "events.jsonl").read_text().splitlines()]
    good = [(e["pool"], e["start"]) for e in events if e["event"] == "asked" and e["site"] == "good"]
    assert len(good) == len(set(good)) == 4


def test_with_fewer_sites_allowed_the_rest_is_used_and_the_report_says_so(home: Path, reporter: Reporter) -> None:
    report = do(home, {"bad": refusing, "good": honest}, reporter, ask={"min_sites": 1})
    by_name = {site["name"]: site for site in report["sites"]}
    assert by_name["good"]["answers"] == 52
    assert by_name["bad"]["answers"] == 0
    assert "teacher-failed" in json.dumps(by_name["bad"])
    assert report["student"]["accuracy"] is not None


def test_a_class_no_site_knows_counts_as_wrong_for_all(home: Path, reporter: Reporter) -> None:
    report = do(home, {"one": honest}, reporter)
    assert report["student"]["accuracy"] <= 0.75  # every fourth test image is a "z"
    assert report["baselines"]["oracle"]["accuracy"] <= 0.75


def test_without_true_labels_there_is_no_oracle_and_without_a_test_set_no_score(home: Path, reporter: Reporter) -> None:
    report = do(home, {"one": honest}, reporter, judge={"pool_labels": None})
    assert report["baselines"]["oracle"] is None or report["baselines"]["oracle"]["accuracy"] is None
    for path in (home / "run").rglob("*.safetensors"):
        assert "oracle" not in str(path)
    bare = settings(home).model_copy(update={"judge": type(settings(home).judge)()})
    run = home / "bare"
    run.mkdir()
    dump_settings(bare, run / "job.yaml")
    with grid_of(Sites({"one": honest})) as grid:
        Job.open(run, reporter).do(grid)
    assert read_json(run / "report.json")["student"]["accuracy"] is None
    assert (run / "report.html").exists()


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.arange(SAMPLES - 1), "has shape"),
        (np.full(SAMPLES, 0.5), "float64"),
        (np.full(SAMPLES, 4), "label 4 of sample 0 is out of range; allowed: 0 to 3"),
        (np.full(SAMPLES, -1), "label -1 of sample 0"),
    ],
)
def test_true_labels_that_do_not_fit(home: Path, reporter: Reporter, labels: np.ndarray, words: str) -> None:
    np.save(home / "labels.npy", labels)
    with pytest.raises(DataError, match=words):
        do(home, {"one": honest}, reporter)


def test_true_labels_that_are_no_array(home: Path, reporter: Reporter) -> None:
    (home / "labels.npy").write_bytes(b"junk")
    with pytest.raises(DataError, match="cannot be read as a NumPy array"):
        do(home, {"one": honest}, reporter)


def test_test_images_of_another_shape_or_number_are_refused_before_asking(home: Path, reporter: Reporter) -> None:
    np.savez(home / "test.npz", x=np.zeros((TEST, 8, 8), np.uint8), y=np.zeros(TEST, int), names=np.array(["a"]))
    with pytest.raises(DataError, match=r"\(8, 8, 1\); the pool's have \(16, 16, 1\)"):
        do(home, {"one": honest}, reporter)
    np.savez(home / "test.npz", x=np.zeros((5, 16, 16), np.uint8), y=np.zeros(5, int), names=np.array(["a"]))
    with pytest.raises(PoolError, match="has 12 samples"):
        do(home, {"one": honest}, reporter)
    np.savez(home / "test.npz", x=np.zeros((0, 16, 16), np.uint8), y=np.zeros(0, int), names=np.array(["a"]))
    with pytest.raises(DataError, match="holds no images"):
        do(home, {"one": honest}, reporter)
    np.savez(home / "test.npz", x=np.zeros((TEST, 16, 16), np.uint8))
    with pytest.raises(DataError, match="no labels"):
        do(home, {"one": honest}, reporter)


def test_a_job_without_a_pool_and_an_encoding_no_site_allows(home: Path, reporter: Reporter) -> None:
    with pytest.raises(SettingsError, match="'pool' is missing"):
        do(home, {"one": honest}, reporter, pool=None)


def test_a_site_that_changed_since_the_run_began_is_named(home: Path, reporter: Reporter) -> None:
    do(home, {"one": honest, "two": honest}, reporter)
    contract = home / "run" / "contract.json"
    held = read_json(contract)
    held["sites"][1]["teacher"] = "b" * 64
    contract.write_text(json.dumps(held))
    for index in (home / "run" / "answers" / "one").glob("*/index.jsonl"):
        index.unlink()
    with pytest.raises(RunError, match="another"):
        do(home, {"one": honest, "two": honest}, reporter)


def test_a_pool_that_changed_since_the_run_began_is_refused(home: Path, reporter: Reporter) -> None:
    do(home, {"one": honest}, reporter)
    for path in (home / "pool").iterdir():
        path.unlink()
    other = np.zeros((SAMPLES, 16, 16), np.uint8)
    Pool.build(from_arrays(other, None, (), where="test"), home / "pool")
    with pytest.raises(PoolError, match="a pool has changed"):
        do(home, {"one": honest}, reporter)


def test_a_test_pool_with_other_images_is_refused(home: Path, reporter: Reporter) -> None:
    with np.load(home / "test.npz") as file:
        held = dict(file)
    np.savez(home / "test.npz", x=held["x"][::-1], y=held["y"], names=held["names"])
    with pytest.raises(PoolError, match=r"other images than judge\.test, or another order"):
        do(home, {"one": honest}, reporter)


def test_a_pool_whose_bytes_changed_at_the_server_is_not_learnt_from(home: Path, reporter: Reporter) -> None:
    do(home, {"one": honest}, reporter)
    shard = home / "pool" / "shard-00000.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(PoolError, match="bytes differ from the manifest"):
        do(home, {"one": honest}, reporter)


@pytest.mark.parametrize("method", ["sd", "mf-p", "mf-lv", "mf-lf"])
def test_every_method_of_unification_makes_labels(home: Path, reporter: Reporter, method: str) -> None:
    report = do(home, {"one": honest, "two": honest}, reporter, unify={"method": method}, judge={"pool_labels": None})
    assert report["unify"]["method"] == method
    labels = np.load(home / "run" / "labels" / "q.npy")
    assert labels.shape == (SAMPLES, 3)
    assert np.allclose(labels.sum(axis=1), 1, atol=1e-5)
