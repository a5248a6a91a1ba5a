"""The same code on a flwr whose sites speak HTTP, where that release can be installed (docs/agent.md)."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from consilience.common.files import read_json
from consilience.server.report import comparable

JOB = {
    "name": "newest",
    "simulation": {
        "data": {"kind": "embedded"},
        "test": {"kind": "embedded", "split": "test"},
        "pool_share": 0.1,
        "partition": {"kind": "class-lists", "classes": [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 0]]},
        "teachers": [{"kind": "train", "architecture": "cnn3", "fit": {"epochs": 1, "precision": "f32"}}],
    },
    "student": {"architecture": "cnn3", "fit": {"epochs": 1, "precision": "f32"}},
}


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("CONSILIENCE_TEST_NEWEST_FLWR") != "1", reason="installs another flwr")
def test_a_job_over_http_gives_the_report_of_one_over_grpc(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    newer = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    (packages / "zz.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([newer, "-m", "pip", "install", "-q", "--no-deps", "flwr==1.42.0"], check=True)
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(JOB))
    reports = {}
    for name, python in (("http", newer), ("grpc", Path(sys.executable))):
        out = tmp_path / name
        subprocess.run(
            [python, "-m", "consilience", "simulate", job, "--out", out, "--processes"], check=True, timeout=300
        )
        reports[name] = read_json(out / "report.json")
    assert reports["http"]["versions"]["flwr"] == "1.42.0"
    assert reports["grpc"]["versions"]["flwr"].startswith("1.39.")
    assert comparable(reports["http"]) == comparable(reports["grpc"])
