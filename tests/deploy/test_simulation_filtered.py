"""The job that docs/filtered.md shows, made small: both ways in which sites open blocks, and what commands tell."""

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
from helpers.pages import ROOT, blocks, typed

PAGE = ROOT / "docs" / "filtered.md"
FIT = {"epochs": 1, "precision": "f32", "augment": False}


def consilience(*words: object) -> Result:
    forget_sites()
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def shown(**policy: Any) -> dict[str, Any]:
    """The page's job, with little to train."""
    raw: dict[str, Any] = yaml.safe_load(blocks(PAGE, "yaml")[0])
    raw["simulation"] |= {"pool_share": 0.02, **({"policy": policy} if policy else {})}
    raw["simulation"]["teachers"] = [{"kind": "train", "architecture": "cnn3@0.25", "fit": FIT}]
    raw["student"] |= {"architecture": "cnn3@0.25", "filtered": {"epochs": 1}, "fit": {**FIT, "batch_size": 32}}
    return raw


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_s_commands_give_what_it_says(folder: Path) -> None:
    (folder / "my-job.yaml").write_text(yaml.safe_dump(shown()))
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(folder / "photo.png")
    lines = typed(PAGE, "What to type")
    assert len(lines) == 3
    for line in lines:
        result = consilience(*line.split()[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
    student = folder / "runs" / "shoes" / "student"
    assert {"model.safetensors", "filtered.json", "branches.json"} <= {path.name for path in student.iterdir()}
    told = read_json(folder / "runs" / "shoes" / "report.json")["student"]["filtered"]
    assert sorted(told["lent"]) == ["site-1", "site-2"]
    assert [sorted(branch["classes"]) for branch in told["branches"]] == [
        ["Sandal", "Sneaker"],
        ["Ankle boot", "Sandal", "Sneaker"],
    ]
    assert read_json(student / "labels.json")["labels"] == ["Sandal", "Sneaker", "Ankle boot"]
    site = folder / "runs" / "shoes" / "simulation" / "sites" / "site-1" / "site.yaml"
    assert "the last blocks themselves, to job shoes" in consilience("site", "ledger", "show", site).stdout


def test_questions_are_told_before_and_counted_after(folder: Path) -> None:
    (folder / "job.yaml").write_text(yaml.safe_dump(shown(tail={"allow": "questions", "rounds": 40}, approval=False)))
    result = consilience("simulate", "job.yaml", "--out", "run")
    assert result.exit_code == 0, result.output
    site, job = folder / "run" / "simulation" / "sites" / "site-1" / "site.yaml", folder / "run" / "job.yaml"
    told = json.loads(consilience("site", "explain", job, site, "--json").stdout)["data"]
    spent = read_json(folder / "run" / "report.json")["student"]["filtered"]["asked"]["site-1"]
    assert told["tail"] == {
        "rounds": spent["rounds"],
        "samples": spent["samples"],
        "bytes": spent["sent"] + spent["received"],
    }
    left = told["tail_left"]["tail questions of job shoes"]
    assert left == {"before": 40 - spent["rounds"], "after": 40 - spent["rounds"]}, "all of it was asked"
    words = consilience("site", "explain", job, site).stdout
    assert f"at most {spent['rounds']:,} questions about {spent['samples']:,} samples" in words
    assert "answer questions about features: of a job at most 40 questions" in words
    ledger = json.loads(consilience("site", "ledger", "show", site, "--json").stdout)["data"]
    assert {"job": "shoes", "what": "rounds", "count": spent["rounds"]} in ledger["tail"]
    assert "stay here, and answer questions" in consilience("site", "check", site).stdout.replace("\n", " ")
    raw = yaml.safe_load(job.read_text())
    raw["name"], raw["student"]["filtered"]["epochs"] = "more", 5
    job.write_text(yaml.safe_dump(raw))
    refused = json.loads(consilience("site", "explain", job, site, "--json").stdout)["data"]
    assert "tail questions of job more" in refused["refusal"]
    approved = consilience("site", "approve", job, site)
    assert approved.exit_code == 0
    assert "answers of the teacher's last blocks about features" in approved.stdout


def test_a_site_that_opens_nothing_says_so(folder: Path) -> None:
    (folder / "job.yaml").write_text(yaml.safe_dump(shown(tail={"allow": "off"})))
    result = consilience("simulate", "job.yaml", "--out", "run")
    assert result.exit_code == 3
    assert "simulation.policy.tail.allow is 'off'" in result.output
    assert not (folder / "run" / "simulation").exists()


def test_more_than_the_policy_allows_is_refused_before_anything_is_asked(folder: Path) -> None:
    (folder / "job.yaml").write_text(yaml.safe_dump(shown(tail={"allow": "questions", "rounds": 3})))
    result = consilience("simulate", "job.yaml", "--out", "run")
    assert result.exit_code == 9
    assert "the job would ask more of the teacher's last blocks than the site's policy allows" in result.output
    assert not (folder / "run" / "answers").exists()
