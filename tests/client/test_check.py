"""`consilience site check` against a real SuperLink: each row, and what is skipped after a problem."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.client import ledger as ledger_module
from consilience.client.check import Preflight
from consilience.client.ledger import Ledger
from consilience.client.ledger_rows import Entry
from consilience.common.settings import SiteSettings
from consilience.common.settings_file import dump_settings, load_settings
from consilience.deploy.processes import free_ports
from helpers.private_site import bars, settings_of, write_data
from helpers.site_folder import SiteFolder
from helpers.superlink import Authority, SuperLink


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    held = SuperLink(tmp_path_factory.mktemp("superlink"))
    held.start()
    yield held
    held.end()


@pytest.fixture
def site(superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteFolder:
    folder = SiteFolder(tmp_path / "site", superlink, "site-a")
    monkeypatch.syspath_prepend(str(folder.folder))
    return folder


def check(site: SiteFolder) -> tuple[int, dict[str, dict[str, str]], Any]:
    result = CliRunner().invoke(app, ["site", "check", str(site.file), "--json"])
    held = json.loads(result.stdout)
    assert held["ok"] == (result.exit_code == 0)
    return result.exit_code, {row["check"]: row for row in held["data"]["rows"]}, held["error"]


def results(rows: dict[str, dict[str, str]]) -> dict[str, str]:
    return {name: row["result"] for name, row in rows.items()}


def test_an_admitted_site_passes_and_the_server_does_not_take_it_to_be_online(
    superlink: SuperLink, site: SiteFolder
) -> None:
    site.register()
    code, rows, error = check(site)
    assert (code, error) == (0, None)
    assert {name for name, row in rows.items() if row["result"] != "ok"} == {
        "private data",
        "coverage",
        "features",
        "blocks",
        "agent",
    }
    assert "log-probabilities as f16 or u8 or top-K" in rows["policy"]["found"]
    assert "f32" not in rows["policy"]["found"]
    assert "coverage" not in rows["policy"]["found"]
    assert site.pool.digest[:12] in rows["pools"]["found"]
    with superlink.run() as grid:
        assert list(grid.get_node_ids()) == []


def test_people_get_a_table_with_the_fix(site: SiteFolder) -> None:
    (site.folder / "site.key").chmod(0o644)
    result = CliRunner().invoke(app, ["site", "check", str(site.file)], env={"COLUMNS": "200"})
    assert result.exit_code == 15
    assert "chmod 600" in result.stdout
    assert "skipped" in result.stdout


def test_a_key_that_the_server_does_not_know_is_the_only_problem(site: SiteFolder) -> None:
    code, rows, error = check(site)
    assert code == error["code"] == 18
    assert [name for name, row in rows.items() if row["result"] == "problem"] == ["admission"]


def test_a_state_folder_that_is_open_to_others_is_a_warning_and_hinders_nothing(site: SiteFolder) -> None:
    state = site.folder / "state"
    state.mkdir(mode=0o755)
    site.register()
    code, rows, _ = check(site)
    assert code == 0
    assert rows["state folder"]["result"] == "warning"
    assert "0755" in rows["state folder"]["found"]
    assert rows["state folder"]["fix"] == f"Type `chmod 700 {state}`"
    assert rows["ledger"]["result"] == "ok"
    state.chmod(0o700)
    assert check(site)[1]["state folder"]["result"] == "ok"


def test_a_limit_that_is_reached_is_a_warning(site: SiteFolder) -> None:
    site.write_settings(policy={"limits": {"lifetime": 5}})
    site.register()
    with closing(Ledger.open(load_settings(site.file, SiteSettings))) as ledger, ledger.alone():
        ledger.append(Entry("carried", "", "ledger", 6, {"aside": "", "rows": 0}))
    code, rows, _ = check(site)
    assert code == 0
    assert rows["ledger"]["result"] == "warning"
    assert (
        "lifetime: 6 samples are released, and the policy allows 5: nothing new is answered" in rows["ledger"]["found"]
    )
    assert "policy.limits" in rows["ledger"]["fix"]


def test_a_head_that_comes_back_with_the_state_is_a_warning(site: SiteFolder) -> None:
    site.register()
    assert check(site)[1]["ledger"]["result"] == "ok"
    assert (site.folder / "state-ledger.head").exists()
    site.write_settings(ledger_head="state/ledger.head")
    (site.folder / "state-ledger.head").rename(site.folder / "state" / "ledger.head")
    code, rows, _ = check(site)
    assert (code, rows["ledger"]["result"]) == (0, "warning")
    assert "state/ledger.head lies in the folder `state`" in rows["ledger"]["found"]
    assert "`ledger_head`" in rows["ledger"]["fix"]


def test_a_clock_that_was_ahead_is_told(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = datetime.datetime(2099, 1, 1, tzinfo=datetime.UTC)
    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "utc_now", lambda: ahead)
        with closing(Ledger.open(load_settings(site.file, SiteSettings))) as ledger, ledger.alone():
            ledger.append(Entry("carried", "", "ledger", 1, {"aside": "", "rows": 0}))
    rows = check(site)[1]
    assert rows["ledger"]["result"] == "warning"
    assert "the last row is of 2099-01-01T00:00:00+00:00, after now" in rows["ledger"]["found"]


def damaged_ledger(site: SiteFolder) -> None:
    (site.folder / "state-ledger.head").write_text("x")


@pytest.mark.parametrize(
    ("break_it", "problem", "code"),
    [
        (lambda site: site.file.write_text("name: 3\n"), "settings", 3),
        (lambda site: site.write_settings(data={"kind": "npz", "path": "none.npz"}), "private data", 4),
        (lambda site: next((site.folder / "pool").glob("*.bin")).write_bytes(b"\1" * 40 * 48), "pools", 5),
        (lambda site: site.write_settings(teacher={**site.raw["teacher"], "callable": "no:such"}), "teacher", 7),
        (lambda site: (site.folder / "state").write_text(""), "state folder", 10),
        (damaged_ledger, "ledger", 24),
        (lambda site: (site.folder / "site.key").unlink(), "key", 15),
        (lambda site: site.write_kit(site="another"), "kit", 15),
        (lambda site: site.write_kit(site_fingerprint="0" * 64), "kit", 15),
        (lambda site: site.write_kit(address="no-such-name.invalid:9"), "name", 16),
        (lambda site: site.write_kit(address=f"127.0.0.1:{free_ports(1)[0]}"), "port", 16),
        (lambda site: site.write_kit(ca=Authority().pem), "certificate", 17),
    ],
)
def test_each_problem_has_its_row_its_fix_and_its_code(
    site: SiteFolder, break_it: Any, problem: str, code: int
) -> None:
    break_it(site)
    exit_code, rows, error = check(site)
    assert exit_code == code
    assert rows[problem]["result"] == "problem"
    assert rows[problem]["fix"] == error["hint"] != ""
    assert rows["admission"]["result"] == ("skipped" if code in (3, 15, 16, 17) else "problem")


def test_a_machine_with_another_time_is_told_so(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime

    from flwr.client.grpc_rere_client import node_auth_client_interceptor as authentication

    late = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    monkeypatch.setattr(authentication, "now", lambda: late)
    code, rows, _ = check(site)
    assert code == 21
    assert rows["clock"]["result"] == "problem"
    assert rows["admission"]["result"] == "skipped"


@pytest.mark.parametrize(("delta", "result"), [(0.01, "warning"), (0.001, "ok")])
def test_a_delta_of_one_in_the_records_or_more_is_warned_of(tmp_path: Path, delta: float, result: str) -> None:
    settings = settings_of(tmp_path, {"mechanism": "pate", "parts": 4, "sigma": 9.0, "delta": delta})
    write_data(tmp_path, *bars(100))
    dump_settings(settings, tmp_path / "site.yaml")
    preflight = Preflight(tmp_path / "site.yaml")
    preflight.run()
    row = next(row for row in preflight.rows if row.check == "private data")
    assert row.result == result
    if result == "warning":
        assert "privacy.delta is 0.01" in row.found
        assert "well below 0.01" in row.fix
