"""A job whose sites answer behind noise: what that comes to is on the student's card and in the sites' ledgers."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.client.app import forget_sites
from consilience.client.privacy import account
from consilience.client.privacy.events import NoisyOutputs
from consilience.client.privacy.spending import loss_of
from consilience.client.site import Site
from consilience.common.files import read_json

SIGMA = 60.0
JOB = {
    "name": "small",
    "simulation": {
        "data": {"kind": "embedded"},
        "test": {"kind": "embedded", "split": "test"},
        "pool_share": 0.04,
        "partition": {"kind": "class-lists", "classes": [["Bag", "Coat", "Dress"], ["Dress", "Shirt", "Coat"]]},
        "teachers": [{"kind": "train", "architecture": "cnn3", "fit": {"epochs": 1, "precision": "f32"}}],
        "privacy": {"mechanism": "output-noise", "sigma": SIGMA},
    },
    "student": {"architecture": "cnn3", "fit": {"epochs": 1, "precision": "f32"}},
}


def test_the_card_says_what_a_run_cost_in_privacy(tmp_path: Path, unsynced: None) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    forget_sites()
    run = tmp_path / "run"
    result = CliRunner().invoke(app, ["simulate", str(tmp_path / "job.yaml"), "--out", str(run)])
    assert result.exit_code == 0, result.output
    report = read_json(run / "report.json")
    for told in report["sites"]:
        site = Site.load(run / "simulation" / "sites" / told["name"] / "site.yaml")
        spent = loss_of(site.settings, site.ledger)
        assert spent == account([NoisyOutputs(sigma=SIGMA, count=told["answers"])], 1e-5)
        assert told["guarantee"]["epsilon"] == pytest.approx(spent.epsilon, rel=1e-9)
        assert told["guarantee"]["unit"] == "model"
        said = f"{told['name']} said when it agreed: epsilon {spent.epsilon:.3g} at delta 1e-05 for all"
        assert said in report["privacy"]
        assert said in (run / "card.md").read_text().replace("\\", "")
        assert said in (run / "report.html").read_text()
    assert "No formal guarantee" not in report["privacy"]
