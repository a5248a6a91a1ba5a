"""A job whose student, and teachers, are networks of the user's own: from the first question to the exported file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import Result
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.client.app import forget_sites
from consilience.client.teacher import load_teacher
from consilience.common.files import read_json
from consilience.common.nets import build
from consilience.common.settings import SiteSettings
from consilience.common.settings_file import load_settings
from consilience.server.learning import StudentModel

OWN = "python:helpers.own_networks:"
FIT = {"epochs": 2, "batch_size": 16, "precision": "f32", "augment": False}


def consilience(*words: object) -> Result:
    forget_sites()
    return CliRunner().invoke(app, [str(word) for word in words])


def job(**student: Any) -> str:
    teacher = {"kind": "train", "architecture": OWN + "kept", "fit": FIT}
    return yaml.safe_dump(
        {
            "name": "own",
            "simulation": {
                "data": {"kind": "embedded"},
                "test": {"kind": "embedded", "split": "test"},
                "pool_share": 0.06,
                "partition": {"kind": "class-lists", "classes": [["Bag", "Coat", "Dress"], ["Sandal", "Shirt"]]},
                "teachers": [teacher],
                "policy": {"features": {"taps": {"penultimate": {}}}},
            },
            "student": {"architecture": OWN + "kept", "fit": FIT, **student},
        }
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("own")
    (home / "job.yaml").write_text(job(learning="common-feature"))
    result = consilience("simulate", home / "job.yaml", "--out", home / "run")
    assert result.exit_code == 0, result.output
    return home / "run"


def test_the_student_keeps_what_is_frozen_and_learns_the_rest(run: Path) -> None:
    fresh = build(OWN + "kept", classes=5, channels=1, seed=0).state_dict()
    student = StudentModel(run / "student")
    learned = student.model.state_dict()
    moved = {name for name, held in learned.items() if not torch.equal(held.cpu(), fresh[name])}
    assert moved == {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}
    report = read_json(run / "report.json")
    assert report["student"]["architecture"] == OWN + "kept"
    assert read_json(run / "student" / "amalgamation.json")["spaces"][0]["student"] == "penultimate"
    assert OWN.removeprefix("python:") in (run / "card.md").read_text().replace("\\", "")


def test_it_is_loaded_predicts_and_is_exported(run: Path, tmp_path: Path) -> None:
    student = run / "student"
    result = consilience("student", "evaluate", run / "simulation" / "test.npz", "--student", student, "--json")
    assert result.exit_code == 0, result.output
    accuracy = json.loads(result.stdout)["data"]["accuracy"]
    assert accuracy == pytest.approx(read_json(run / "report.json")["student"]["accuracy"])
    assert consilience("student", "export", tmp_path / "s.pt2", "--student", student).exit_code == 0
    with np.load(run / "simulation" / "test.npz") as file:
        images = file["x"][:5].reshape(5, 28, 28, 1)
    told = torch.export.load(tmp_path / "s.pt2").module()(torch.from_numpy(images))
    assert np.allclose(told.detach().numpy(), StudentModel(student).log_probs(images), atol=1e-4)


def test_where_the_code_is_not_installed_the_student_says_so(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "student"
    copy.mkdir()
    for path in (run / "student").iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes().replace(b"helpers.own_networks", b"helpers.gone_elsewhe"))
    result = consilience("student", "evaluate", run / "simulation" / "test.npz", "--student", copy)
    assert result.exit_code == 3, result.output
    assert "module helpers.gone_elsewhe cannot be imported" in result.stderr.replace("\n", " ")


def test_a_site_trains_such_a_teacher_and_its_code_is_in_the_fingerprint(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(run / "simulation" / "sites" / "site-1" / "site.yaml", SiteSettings)
    teacher = load_teacher(settings)
    assert sorted(teacher.classes) == ["Bag", "Coat", "Dress"]
    monkeypatch.setattr("consilience.common.nets.own_networks.version_of", lambda module: "hospital 2")
    assert load_teacher(settings).fingerprint != teacher.fingerprint


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ({"architecture": "python:no_such_package:small"}, "module no_such_package cannot be imported"),
        ({"architecture": OWN + "nothing"}, "expected a torch.nn.Module"),
        ({"architecture": OWN + "ten"}, "gives (2, 10) torch.float32 for 2 images of shape (1, 28, 28)"),
        ({"architecture": OWN + "colour"}, "does not take images of shape (1, 28, 28)"),
        ({"architecture": OWN + "kept", "learning": "layer-wise"}, "none of ours"),
    ],
)
def test_mistakes_stop_the_job_before_anything_is_asked(tmp_path: Path, student: dict[str, Any], words: str) -> None:
    (tmp_path / "job.yaml").write_text(job(**student))
    result = consilience("simulate", tmp_path / "job.yaml", "--out", tmp_path / "run")
    assert result.exit_code == 3, result.output
    assert words in " ".join(result.stderr.split())
    assert not (tmp_path / "run" / "answers").exists()
