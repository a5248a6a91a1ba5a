"""Bad input at one of two sites, from end to end: refused, said at the site and by the server, and nothing released.

Real site.yaml files behind the real ClientApp, and the real job. A share of another job and too few sites for the
threshold are in tests/client/test_sums.py and tests/server/test_summing.py.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from consilience.client import app as app_module
from consilience.client.site import Site
from consilience.common.cards import SumNoiseCard
from consilience.common.data import from_arrays
from consilience.common.errors import ConsilienceError
from consilience.common.files import read_json
from consilience.common.pool import Pool
from consilience.common.progress import Reporter
from consilience.common.settings import JobSettings
from consilience.common.settings_file import parse_settings
from consilience.deploy.local_grid import LocalGrid
from consilience.server.job import Job

SIZE, SPENT, SITES = 40, 30, ("bad", "good")
TEACHER = """
import numpy as np


def scores(images):
    means = images.reshape(len(images), -1).mean(axis=1)
    odds = np.exp(np.stack([means, -means, 0 * means], axis=1))
    return odds / odds.sum(axis=1, keepdims=True)
"""

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two sites and a pool; each site has released `SPENT` samples to an earlier job."""
    (tmp_path / "bad_input_teacher.py").write_text(TEACHER)
    monkeypatch.syspath_prepend(str(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, 16, 16, 3), np.uint8)
    pool = Pool.build(from_arrays(pixels, None, (), where="test"), tmp_path / "pool")
    for name in SITES:
        (tmp_path / name).mkdir()
        write(tmp_path, name)
        with closing(Site.load(tmp_path / name / "site.yaml")) as site:
            site.answer(site.question("earlier", pool.digest, SPENT, "log-probs", "f16"))
    app_module.forget_sites()
    yield tmp_path
    app_module.forget_sites()


def write(home: Path, name: str, **changes: Any) -> None:
    teacher = {"kind": "callable", "callable": "bad_input_teacher:scores", "classes": ["a", "b", "c"]}
    raw = {"name": name, "teacher": {**teacher, "preprocessing": {}}, "pools": ["../pool"], **changes}
    (home / name / "site.yaml").write_text(yaml.safe_dump(raw))


def edit_ledger(home: Path) -> None:
    with closing(sqlite3.connect(home / "bad" / "state" / "ledger.db")) as database, database:
        for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            database.execute(f"DROP TRIGGER {name}")
        assert database.execute("UPDATE rows SET samples = 3").rowcount == 1


def changing(**changes: Any) -> Callable[[Path], None]:
    return lambda home: write(home, "bad", **changes)


@dataclass(frozen=True)
class Case:
    """What is done to the site `bad`, what its log and the server then say.

    `here` is empty where its card says enough, so that the site is not asked.
    """

    spoil: Callable[[Path], None]
    here: str
    there: str


CANNOT = "internal, the site cannot answer now"
LIMITS = "budget-exhausted, the site's limits do not allow so many samples more"
CASES = {
    "typo": Case(changing(policy={"precison": "f16"}), "precison", CANNOT),
    "limit-below-spent": Case(changing(policy={"limits": {"lifetime": 10}}), "lifetime: 40 more, 0 left of 10", LIMITS),
    "more-than-allowed": Case(changing(policy={"limits": {"per_job": 39}}), "job job: 40 more, 39 left of 39", LIMITS),
    "finer-than-allowed": Case(changing(policy={"precision": "u8"}), "", "'f16'; site bad allows: u8, top-K-u8, votes"),
    "not-approved": Case(changing(policy={"approval": True}), "job job", "not-approved, nobody at the site"),
    "ledger-edited": Case(edit_ledger, "ledger.db", "ledger-damaged, the site's record of its answers"),
    "pool-not-listed": Case(
        changing(policy={"pools": ["0" * 64]}), "policy.pools: 000000000000", "pool-not-allowed, the site's policy"
    ),
    "no-noise": Case(
        changing(privacy={"mechanism": "output-noise", "sigma": 0.0}),
        "privacy.sigma: it is 0, and without noise there is no guarantee",
        CANNOT,
    ),
}


def run(home: Path, **ask: Any) -> None:
    raw = {
        "name": "job",
        "pool": str(home / "pool"),
        "ask": {"encoding": "f16", "retries": 0, **ask},
        "student": {"architecture": "cnn3", "fit": {"epochs": 1, "precision": "f32", "augment": False}},
    }
    settings = parse_settings(raw, JobSettings, source="job.yaml", folder=home)
    (home / "run").mkdir()
    nodes = [{"site": str(home / name / "site.yaml")} for name in SITES]
    with Reporter(quiet=True) as reporter, LocalGrid(app_module.app, nodes, workers=2) as grid:
        Job(home / "run", settings, reporter).do(grid)


def kept(home: Path, name: str = "bad") -> dict[str, bytes | int]:
    """What a site counts as spent, and holds of what it released."""
    state = home / name / "state"
    with closing(sqlite3.connect(state / "ledger.db")) as database:
        (count,) = database.execute("SELECT count(*) FROM rows").fetchone()
    return {str(path): path.read_bytes() for path in state.glob("released/**/*") if path.is_file()} | {"rows": count}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_and_said_on_both_sides_and_nothing_leaves(
    home: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES[name]
    case.spoil(home)
    before = kept(home)
    with pytest.raises(ConsilienceError) as caught:
        run(home)
    assert case.there in caught.value.message
    assert case.here in caplog.text
    assert str(home) not in caught.value.message
    assert kept(home) == before
    assert not [*(home / "run").rglob("answers.bin")]


def test_the_report_shows_a_budget_that_is_exhausted(home: Path) -> None:
    """The other site answers, and what it releases is seen."""
    CASES["limit-below-spent"].spoil(home)
    before, other = kept(home), kept(home, "good")
    run(home, min_sites=1)
    report, page = read_json(home / "run" / "report.json"), (home / "run" / "report.html").read_text()
    assert [site["name"] for site in report["sites"]] == ["good"]
    assert "budget-exhausted" in report["left_out"]["bad"]
    assert "budget-exhausted" in page
    assert kept(home) == before
    assert kept(home, "good")["rows"] != other["rows"]
    assert len([*(home / "run").rglob("answers.bin")]) == 1


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_the_server_takes_no_card_that_claims_a_guarantee_without_noise(sigma: float) -> None:
    assert SumNoiseCard.model_validate_json('{"sigma": 0.1, "honest": 2}').sigma == 0.1
    with pytest.raises(ValidationError, match="sigma"):
        SumNoiseCard.model_validate({"sigma": sigma, "honest": 2})
