"""What `consilience server` shows of runs, without a server."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from consilience.common.files import write_json
from consilience.common.settings import JobSettings
from consilience.common.settings_file import dump_settings
from consilience.server.runs import Failure, submit
from consilience.server.server_cli import app
from consilience.server.service_state import ServiceState
from consilience.server.settings import ServerSettings

JOB = JobSettings(name="leaves", pool=Path("/pool"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    dump_settings(ServerSettings(address="learn.example.org:9092"), tmp_path / "server.yaml")
    return tmp_path


def typed(*arguments: str, home: Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*arguments, "--home", str(home)], env={"COLUMNS": "160"})
    return result.exit_code, result.output


def test_status_shows_sites_what_they_answered_and_what_failed(home: Path) -> None:
    run, _ = submit(home, JOB, token="one")
    run.set("running")
    site = {
        "name": "ant-hill",
        "online": True,
        "answered": 12_000,
        "asked": 50_000,
        "bytes": 1_500_000,
        "rate": 812.5,
        "failures": 2,
        "reason": "teacher-failed",
        "seconds_left": 46.8,
    }
    away = {
        **site,
        "name": "bee-hive",
        "online": False,
        "rate": 0.0,
        "seconds_left": None,
        "failures": 0,
        "reason": None,
    }
    write_json(run.folder / "progress.json", {"job": "leaves", "stage": "ask", "time": 0.0, "sites": [site, away]})
    code, text = typed("status", "--once", home=home)
    assert code == 0
    assert "The server does not run" in text
    assert "Run leaves-one: running, stage ask" in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert rows == [
        ["ant-hill", "yes", "12,000", "50,000", "1.5", "812", "47 s", "2", "teacher-failed"],
        ["bee-hive", "no", "12,000", "50,000", "1.5", "", "", "", ""],
    ]


def test_status_without_a_run_says_what_to_type(home: Path) -> None:
    code, text = typed("status", home=home)
    assert code == 0
    assert "consilience server submit JOB.yaml" in text


def test_a_failed_run_is_told_with_its_own_code_and_next_step(home: Path) -> None:
    run, _ = submit(home, JOB, token="one")
    run.set("failed", Failure(code=9, name="asking", message="2 of 3 sites answered", hint="Mend the third"))
    code, text = typed("status", "--once", home=home)
    assert (code, "Failed (asking, 9): 2 of 3 sites answered. Mend the third" in text) == (0, True)
    code, text = typed("report", "--json", home=home)
    assert code == 9
    assert json.loads(text)["error"]["hint"] == "Mend the third"


def test_there_is_no_report_before_the_end(home: Path) -> None:
    submit(home, JOB, token="one")
    code, text = typed("report", "leaves", home=home)
    assert code == 14
    assert "is queued and has no report" in text


def test_submit_without_a_server_keeps_the_job_and_says_what_to_do(home: Path, tmp_path: Path) -> None:
    dump_settings(JOB, tmp_path / "job.yaml")
    code, text = typed("submit", str(tmp_path / "job.yaml"), home=home)
    assert code == 0
    assert "New run leaves-" in text
    assert "consilience server start" in text
    code, text = typed("submit", str(tmp_path / "job.yaml"), "--wait", home=home)
    assert code == 22
    assert "No server runs" in text


def test_stop_without_a_server_says_so(home: Path) -> None:
    assert typed("stop", home=home) == (0, "The server does not run.\n")


def test_stopping_a_queued_run_without_a_server_says_when_it_will_stop(home: Path) -> None:
    run, _ = submit(home, JOB, token="one")
    assert typed("stop", "leaves", home=home) == (0, "Run leaves-one will stop once the server runs; it is queued\n")
    run.set("stopped")
    assert typed("stop", "leaves", home=home) == (0, "Run leaves-one: stopped\n")


@pytest.mark.parametrize(
    ("age", "superlink", "said"),
    [(0, 1, "1 of 1 sites online"), (0, None, "The server is starting"), (300, 1, "wrote how it stands 5 min ago")],
)
def test_status_says_how_old_it_is(home: Path, age: int, superlink: int | None, said: str) -> None:
    now, waits = time.time(), [sys.executable, "-c", "input()", "consilience"]
    with subprocess.Popen(waits, stdin=subprocess.PIPE) as server:
        state = ServiceState(
            pid=server.pid, since=now - 600, now=now - age, superlink=superlink, online={"ant-hill": True}
        )
        write_json(home / "service.json", state.model_dump(mode="json"))
        code, text = typed("status", home=home)
        server.kill()
    assert (code, said in text) == (0, True), text
    assert ("ago" in text) == bool(age)


def test_status_passes_over_a_damaged_run(home: Path) -> None:
    submit(home, JOB, token="good")
    bad, _ = submit(home, JOB, token="bad")
    (bad.folder / "submitted.json").write_text("{}")
    code, text = typed("status", "--json", home=home)
    assert code == 0
    assert json.loads(text[text.index("{") :])["data"]["runs"] == [{"name": "leaves-good", "state": "queued"}]


def test_commands_that_train_nothing_import_nothing_to_train_with(home: Path, tmp_path: Path) -> None:
    dump_settings(JOB, tmp_path / "job.yaml")
    run, _ = submit(home, JOB, token="one")
    run.set("done")
    told = {"naive": 0.5, "best_site": None, "unified_ensemble": 0.25, "oracle": None}
    report = {"job": "leaves", "sites": [], "labels": {"kind": "multi"}}
    write_json(run.folder / "report.json", report | {"multi_label": {"mean_ap": 0.75, "baselines": told}})
    folder = ["--home", str(home)]
    commands = [
        ["server", "init", str(tmp_path / "other"), "--address", "localhost:9092"],
        ["server", "submit", str(tmp_path / "job.yaml"), *folder],
        ["server", "status", *folder],
        ["server", "stop", *folder],
        ["server", "sites", *folder],
        ["server", "report", "leaves-one", *folder],
        *([name, "--help"] for name in ("student", "simulate", "pool")),
    ]
    late = {"torch", "scipy", "sklearn", "matplotlib"}
    code = f"""
import sys
from typer.testing import CliRunner
from consilience.__main__ import app
for words in {commands}:
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, (words, found.output)
    late = {late | {"flwr"}} & sys.modules.keys()
    assert not late, (words, late)
import consilience.server.service  # what `server start` needs
late = {late} & sys.modules.keys()
assert not late, ("server start", late)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
