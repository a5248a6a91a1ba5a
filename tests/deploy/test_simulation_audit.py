"""`consilience simulate --audit`: sites attack their own answers first, and the report says what came of it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.client.app import forget_sites
from consilience.client.audit.record import Audit
from consilience.client.ledger import Ledger
from consilience.client.site import Site
from consilience.common.errors import TeacherError
from consilience.common.files import read_json
from consilience.common.settings import SiteSettings
from consilience.common.settings_file import load_settings
from consilience.deploy import audits

FIT = {"epochs": 1, "precision": "f32", "augment": False}
JOB: dict[str, Any] = {
    "name": "small",
    "simulation": {
        "data": {"kind": "embedded"},
        "test": {"kind": "embedded", "split": "test"},
        "pool_share": 0.04,
        # the second site has too few images of its one class to hold 20 out
        "partition": {"kind": "class-lists", "classes": [["Bag", "Coat"], ["Coat"]]},
        "teachers": [
            {"kind": "train", "architecture": "cnn3", "fit": FIT, "holdout": 0.2},
            {"kind": "train", "architecture": "cnn3", "fit": FIT, "holdout": 0.01},
        ],
    },
    "student": {"architecture": "cnn3", "fit": FIT},
}


def simulate(folder: Path, *words: str) -> Result:
    (folder / "job.yaml").write_text(yaml.safe_dump(JOB))
    forget_sites()
    runner = CliRunner(env={"COLUMNS": "200"})
    return runner.invoke(app, ["simulate", str(folder / "job.yaml"), "--out", str(folder / "run"), *words])


@pytest.mark.slow
def test_sites_are_audited_once_and_the_report_and_the_card_tell_it(
    tmp_path: Path, unsynced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = simulate(tmp_path, "--audit")
    assert result.exit_code == 0, result.output
    run = tmp_path / "run"
    found = Audit.model_validate(read_json(run / "audit" / "site-1" / "audit.json"))
    assert found.shadow_count == 8
    assert found.strongest is not None
    assert "Likelihood ratio" in result.stdout
    assert str(run / "audit" / "site-1" / "audit.html") in result.stdout
    assert "site-2 is not audited" in result.stderr

    report = read_json(run / "report.json")
    assert report["audits"]["site-1"]["auc"] == found.strongest.auc
    assert report["audits"]["site-2"]["auc"] is None
    sentence = f"Audit by site-1: {found.verdict} ({found.strongest.auc:.1%} of pairs told apart"
    for text in (report["privacy"], (run / "report.html").read_text(), (run / "card.md").read_text()):
        assert "No formal guarantee" in text
        assert sentence in text.replace("\\", "")
        assert "An attack that fails is no guarantee" in text
    assert "audit/site-1/audit.html" in (run / "report.html").read_text()

    # nothing but the run itself is in the ledger
    settings = load_settings(run / "simulation" / "sites" / "site-1" / "site.yaml", SiteSettings)
    with closing(Ledger.open(settings)) as ledger:
        assert set(ledger.spent.jobs) == {"small"}
        assert ledger.spent.lifetime == sum(site["answers"] for site in report["sites"] if site["name"] == "site-1")

    # again: the first site's audit is there, the second's is tried anew
    tried = list[str]()

    def refuse(site: Site, *_: object) -> Audit:
        tried.append(site.settings.name)
        raise TeacherError("not today")

    monkeypatch.setattr(audits, "audit_to", refuse)
    assert simulate(tmp_path, "--audit").exit_code == 0
    assert tried == ["site-2"]
    told = read_json(run / "report.json")["audits"]
    assert told["site-1"] == report["audits"]["site-1"]
    assert told["site-2"]["verdict"] == "not audited: not today"


def test_without_it_there_is_no_audit_to_tell_of(tmp_path: Path, unsynced: None) -> None:
    result = simulate(tmp_path)
    assert result.exit_code == 0, result.output
    report = read_json(tmp_path / "run" / "report.json")
    assert report["audits"] == {}
    assert "Audit" not in report["privacy"] + (tmp_path / "run" / "report.html").read_text()
    assert not (tmp_path / "run" / "audit").exists()
