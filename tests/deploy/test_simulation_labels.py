"""Three multi-label sites with overlapping labels on one machine, small: from composed images to the student's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.client.app import forget_sites
from consilience.common.files import read_json
from helpers.composing import compose

NAMES = ("bar", "dot", "row", "spot")


def objects() -> tuple[np.ndarray, np.ndarray]:
    """Four kinds of objects of 8 x 8 pixels."""
    images = np.zeros((4, 8, 8, 1), np.uint8)
    images[0, :, 3:5], images[1, 2:4, 2:4], images[2, 3:5], images[3, 1:7, 1:7] = 250, 250, 250, 120
    return images, np.arange(4)


def job(folder: Path, **simulation: Any) -> Path:
    fit = {"epochs": 4, "precision": "f32", "augment": False, "batch_size": 16}
    teachers = [{"kind": "train", "architecture": "cnn3", "labels": "multi", "fit": fit}]
    raw: dict[str, Any] = {
        "name": "labels",
        "simulation": {
            "data": {"kind": "npz", "path": "train.npz"},
            "test": {"kind": "npz", "path": "test.npz"},
            "pool_share": 0.4,
            "partition": {"kind": "class-lists", "classes": [["bar", "dot"], ["dot", "row"], ["spot", "bar"]]},
            "teachers": teachers,
            "policy": {"holdout_accuracy": True},
        }
        | simulation,
        "ask": {"encoding": "u8"},
        "student": {"architecture": "cnn3", "fit": fit},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(raw))
    return folder / "job.yaml"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    for name, count, seed in (("train", 500, 0), ("test", 60, 1)):
        x, y, names = compose(*objects(), NAMES, count, seed, shift=1)
        np.savez(folder / f"{name}.npz", x=x, y=y, names=np.array(names))
    return folder


def consilience(*words: object) -> Result:
    forget_sites()
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    result = consilience("simulate", job(home), "--out", home / "run")
    assert result.exit_code == 0, result.output
    assert "mean average precision" in result.output
    return home / "run"


def test_the_student_finds_what_its_teachers_find(run: Path) -> None:
    report = read_json(run / "report.json")
    judged = report["multi_label"]
    chance = np.mean([score["support"] / score["known"] for score in judged["per_label"]])
    assert judged["mean_ap"] > chance + 0.25
    assert judged["baselines"]["unified_ensemble"] > chance + 0.25
    assert judged["baselines"]["oracle"] > chance + 0.25
    for site in report["sites"]:
        assert site["holdout_ap"] > 0.5
        assert site["teacher_ap"] > 0.5
        assert site["holdout_accuracy"] is None
    contract = read_json(run / "contract.json")
    assert contract["owners"]["dot"] == ["site-1", "site-2"]
    with np.load(run / "simulation" / "sites" / "site-3" / "private.npz") as held:
        assert held["names"].tolist() == ["bar", "spot"]
        assert held["y"].shape == (100, 2)
    labels = np.load(run / "labels" / "q.npy")
    assert labels.shape == (200, 4)
    assert not np.allclose(labels.sum(axis=1), 1, atol=0.1)


def test_the_same_job_once_more_changes_nothing(run: Path, home: Path) -> None:
    before = read_json(run / "report.json")
    result = consilience("simulate", home / "job.yaml", "--out", run)
    assert result.exit_code == 0, result.output
    after = read_json(run / "report.json")
    assert after["multi_label"] == before["multi_label"]
    assert after["learning"] == before["learning"]


def test_the_commands_of_a_student_take_it(run: Path, home: Path, tmp_path: Path) -> None:
    student = ("--student", run / "student", "--json")
    data = json.loads(consilience("student", "evaluate", home / "test.npz", *student).stdout)["data"]
    assert data["mean_ap"] == pytest.approx(read_json(run / "report.json")["multi_label"]["mean_ap"], abs=1e-6)
    with np.load(home / "test.npz") as held:
        Image.fromarray(held["x"][0, :, :, 0]).save(tmp_path / "one.png")
        np.savez(tmp_path / "other.npz", x=held["x"], y=held["y"], names=np.array(["q", "r", "s", "t"]))
        np.savez(tmp_path / "single.npz", x=held["x"], y=held["y"][:, 0], names=np.array(["bar", "dot"]))
    told = json.loads(consilience("student", "predict", tmp_path / "one.png", "--top", 4, *student).stdout)["data"]
    probs = [entry["prob"] for entry in told["predictions"][0]["top"]]
    assert probs == sorted(probs, reverse=True)
    assert all(0 < prob < 1 for prob in probs)
    assert json.loads(consilience("student", "export", tmp_path / "student.pt2", *student).stdout)["ok"]
    for name, reason in (("other", "None of the data's classes"), ("single", "one label an image")):
        refused = json.loads(consilience("student", "evaluate", tmp_path / f"{name}.npz", *student).stdout)
        assert not refused["ok"]
        assert reason in refused["error"]["message"]


@pytest.mark.parametrize(
    ("teachers", "reason"),
    [
        ([{"kind": "train", "architecture": "cnn3"}], "one label an image is needed"),
        (
            [{"kind": "train", "architecture": "cnn3", "labels": kind} for kind in ("multi", "single")],
            "simulation.teachers.1.labels is 'single'",
        ),
    ],
)
def test_teachers_of_another_kind_than_the_data_are_refused(
    home: Path, tmp_path: Path, teachers: list[dict[str, Any]], reason: str
) -> None:
    data = {name: {"kind": "npz", "path": str(home / f"{name}.npz")} for name in ("train", "test")}
    path = job(tmp_path, teachers=teachers, data=data["train"], test=data["test"])
    result = consilience("simulate", path, "--out", tmp_path / "run", "--json")
    assert result.exit_code != 0
    assert reason in json.loads(result.stdout)["error"]["message"]
