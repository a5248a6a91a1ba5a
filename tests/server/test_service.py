"""`consilience server start` as a process: who is admitted and online, what survives a kill, what is refused.

One server and three sites for all tests of the file; each leaves them as it found them.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flwr.client.grpc_rere_client import node_auth_client_interceptor

from consilience.client.connection import BusyError
from consilience.client.fleet import GrpcFleet
from consilience.common.errors import AdmissionError, ClockError
from consilience.common.files import lock
from consilience.common.identity import Kit, key_fingerprint, load_key, make_key, words
from consilience.common.settings import JobSettings, SiteSettings
from consilience.common.settings_file import dump_settings, load_settings
from consilience.deploy.processes import make_server
from consilience.deploy.simulation import embedded_job
from consilience.server.authority import renew_if_due
from consilience.server.runs import submit
from consilience.server.service import MOST_CRASHES
from consilience.server.service_state import read_service
from consilience.server.settings import ServerSettings
from helpers.server import Deployment, deployment, done, processes_about, until

pytestmark = pytest.mark.slow

EVERYTHING = {name: list(range(64)) for name in ("ant-hill", "bee-hive", "cow-shed")}
"""Every sample of the pool, once from every site."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment(tmp_path_factory.mktemp("place"), "ant-hill", "bee-hive", "cow-shed") as held:
        yield held


def undisturbed(place: Deployment, *names: str) -> dict[str, tuple[int, int]]:
    """Return what changes when a site's connection is touched: its node's id, and how often its agent connected."""
    nodes = place.nodes()
    return {name: (nodes[name].identifier, place.agents[name].text().count("connected to")) for name in names}


def running(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_status_before_any_run(place: Deployment) -> None:
    data = place.done("status")
    assert data["runs"] == []
    assert data["sites"] == {"ant-hill": True, "bee-hive": True, "cow-shed": True}
    assert data["server"]["pid"] == place.service().pid
    envelope = place.type_in("report")
    assert envelope["code"] == envelope["error"]["code"] == 14


def test_an_approved_site_is_registered_at_once_and_no_other_notices(place: Deployment) -> None:
    before = undisturbed(place, "ant-hill", "bee-hive", "cow-shed")
    folder = place.folder / "late"
    words = done("site", "init", folder, "--name", "late", "--contact", "Ada")["words"]
    assert "late" not in place.nodes()
    place.done("approve", folder / "request.json", "--words", words, "--out", folder / "kit.json")
    until(lambda: place.service().online.get("late") is False, "the server knows the site, which is not connected")
    assert "late" in place.nodes()
    place.done("suspend", "late")
    until(lambda: "late" not in place.service().online, "the server no longer knows the site")
    place.done("resume", "late")
    until(lambda: "late" in place.nodes(), "the same key is admitted again")
    place.done("suspend", "late")
    assert undisturbed(place, "ant-hill", "bee-hive", "cow-shed") == before


def test_a_suspended_site_s_agent_ends_and_comes_back_only_when_it_is_resumed_or_has_a_new_key(
    place: Deployment,
) -> None:
    before = undisturbed(place, "ant-hill", "bee-hive")
    place.done("suspend", "cow-shed")
    assert place.agents["cow-shed"].wait() == 18
    assert "Error (admission, 18)" in place.agents["cow-shed"].text()
    assert "Ask the coordinator" in place.agents["cow-shed"].text()
    assert place.agent("cow-shed").wait() == 18
    place.done("resume", "cow-shed")
    place.agent("cow-shed")
    place.wait_online("ant-hill", "bee-hive", "cow-shed")

    folder = place.files["cow-shed"].parent
    old = place.nodes()["cow-shed"]
    rotated = done("site", "init", folder, "--contact", "Bob", "--rotate")
    place.done(
        "approve", folder / "request.json", "--words", rotated["words"], "--rotate", "--out", folder / "kit.json"
    )
    assert place.agents["cow-shed"].wait() == 18
    place.agent("cow-shed")
    place.wait_online("ant-hill", "bee-hive", "cow-shed")
    assert place.nodes()["cow-shed"].key != old.key
    assert undisturbed(place, "ant-hill", "bee-hive") == before


def test_a_second_server_on_the_folder_is_refused_and_changes_nothing(place: Deployment) -> None:
    assert place.server is not None
    before = place.service()
    second = place.process("second.log", ["server", "start", "--home", place.home.folder])
    assert second.wait() == 14
    assert "Error (run, 14)" in second.text()
    now = place.service()
    assert (now.pid, now.superlink) == (before.pid, before.superlink)
    assert place.online() == {"ant-hill", "bee-hive", "cow-shed"}


@pytest.mark.parametrize("field", ["listen", "control_port"])
def test_a_port_in_use_is_named_and_nothing_is_left_behind(place: Deployment, tmp_path: Path, field: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        home = make_server(tmp_path / "server")  # its ports are free, so they are others
        port = taken.getsockname()[1]
        value = f"127.0.0.1:{port}" if field == "listen" else port
        settings = home.settings().model_dump(mode="json")
        dump_settings(ServerSettings.model_validate({**settings, field: value}), home.settings_file)
        server = place.process(f"{field}.log", ["server", "start", "--home", home.folder])
        assert server.wait() == 22
    assert f"Port {port} on 127.0.0.1 cannot be used" in server.text()
    assert "server.yaml" in server.text()
    assert not processes_about(tmp_path)
    assert not (home.folder / "service.json").exists()


def test_a_job_that_makes_its_own_sites_is_refused(place: Deployment) -> None:
    path = place.folder / "simulated.yaml"
    dump_settings(embedded_job(), path)
    envelope = place.type_in("submit", path)
    assert envelope["code"] == 14
    assert "simulation" in envelope["error"]["message"]
    assert "consilience simulate" in envelope["error"]["hint"]
    assert place.done("status")["runs"] == []


def test_a_submitted_job_is_done_once_however_often_it_is_submitted(place: Deployment) -> None:
    job = place.job()
    submitted = place.done("submit", job, "--wait")
    run = Path(submitted["run"]).name
    assert submitted["report"] == place.done("report")["report"]
    again = place.done("submit", job)
    assert (again["run"]["name"], again["run"]["state"]) == (run, "done")
    data = place.done("status")
    assert data["runs"] == [{"name": run, "state": "done"}]
    assert data["run"]["failure"] is None
    assert place.samples(run, "asked") == place.samples(run, "answered") == EVERYTHING
    assert {site["name"] for site in submitted["report"]["sites"]} == {"ant-hill", "bee-hive", "cow-shed"}


def test_a_run_is_stopped_and_goes_on_when_it_is_submitted_again(place: Deployment) -> None:
    job = place.job("stopped")
    place.hold.touch()
    run = place.submit(job)
    until(lambda: place.events(run, "asked"), "questions are on their way")
    stopped = place.done("stop", run)
    assert stopped["run"]["state"] == "stopped"
    with lock(place.home.runs / run / "answers"):  # no process works in it any more
        pass
    assert place.type_in("report", run)["code"] == 14
    place.hold.unlink()
    assert place.submit(job) == run
    assert place.ended(run) == "done"


def test_a_fold_in_during_the_run_is_done_after_it_and_a_queued_run_is_stopped_meanwhile(place: Deployment) -> None:
    assert place.server is not None
    job = place.job("folded", ask={"wait": 15})
    place.hold.touch()
    run, waiting = place.submit(job), place.submit(place.job("waiting"))
    until(lambda: place.state(run) == "running", "the run is at work")
    assert place.done("submit", job, "--fold-in")["run"]["state"] == "running"
    assert place.done("stop", waiting)["run"]["state"] == "stopped"
    assert place.state(run) == "running"
    place.hold.unlink()
    place.server.says(f"run {run} is done")
    place.server.says(f"run {run} is failed: No new site is connected")
    assert place.server.text().count(f"run {run} begins") == 2
    assert f"run {waiting} begins" not in place.server.text()


def test_damaged_files_of_a_run_and_of_a_site_touch_no_other(place: Deployment) -> None:
    run, record = place.home.runs / "damaged", place.home.sites / "damaged.json"
    run.mkdir()
    (run / "submitted.json").write_text("{}")
    record.write_text("{}")
    place.done("suspend", "cow-shed")
    assert place.agents["cow-shed"].wait() == 18
    place.done("resume", "cow-shed")
    place.agent("cow-shed")
    place.wait_online("ant-hill", "bee-hive", "cow-shed")
    assert place.ended(place.submit(place.job("sound"))) == "done"
    assert place.server is not None
    text = place.server.text()
    assert text.count(f"{run} is left out") == text.count("site damaged is not admitted") == 1
    record.unlink()
    shutil.rmtree(run)


def test_who_is_turned_away_is_named(place: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.server is not None
    before = place.server.text().count("turned away")
    kit = Kit.read(place.files["ant-hill"].parent / "kit.json")
    new, late = make_key(tmp_path / "new.key"), make_key(tmp_path / "late.key")
    place.add("old-oak")
    until(lambda: "old-oak" in place.nodes(), "the site is registered")
    place.done("suspend", "old-oak")
    until(lambda: "old-oak" not in place.nodes(), "the site is no longer registered")
    connected, suspended = (
        load_key(load_settings(place.files[name], SiteSettings).key) for name in ("bee-hive", "old-oak")
    )
    assert GrpcFleet(kit, connected).admitted(), "asking is no offence"
    for key in (new, suspended, connected, new):
        with closing(GrpcFleet(kit, key)) as fleet, pytest.raises((AdmissionError, BusyError)):
            fleet.activate()
    monkeypatch.setattr(node_auth_client_interceptor, "now", lambda: datetime.now(UTC) - timedelta(hours=1))
    with closing(GrpcFleet(kit, late)) as fleet, pytest.raises(ClockError):
        fleet.activate()
    said = [
        f"the key with the words: {words(key_fingerprint(late.public_key()))}: its clock differs from the server's",
        f"the key with the words: {words(key_fingerprint(new.public_key()))}: its key is not admitted",
        "site bee-hive (approved): an agent with its key is connected already, or was until just now",
        "site old-oak (suspended): its key is not admitted",
    ]
    for line in said:
        place.server.says(f"turned away {line}")
    assert place.server.text().count("turned away") == before + len(said)
    assert set(place.done("status")["turned_away"]) >= set(said)


def test_what_cannot_be_written_ends_no_server_and_is_said_once(place: Deployment) -> None:
    state = place.home.folder / "service.json"
    assert place.server is not None
    state.unlink()
    (state / "in the way").mkdir(parents=True)
    try:
        place.server.says(f"Cannot write {state}")
        run, _ = submit(place.home.folder, load_settings(place.job("unseen"), JobSettings))
        until(lambda: run.state.state == "done", "the run ends")
        assert place.server.text().count(f"Cannot write {state}") == 1
    finally:
        shutil.rmtree(state)
    place.wait_online("ant-hill", "bee-hive", "cow-shed")


def test_a_certificate_that_ends_soon_is_renewed_once_no_run_is_at_work(place: Deployment) -> None:
    assert place.server is not None
    before, now = place.service(), datetime.now(UTC)
    place.home.server_certificate.unlink()
    renew_if_due(place.home, place.home.settings(), now - timedelta(days=380))
    assert datetime.fromisoformat(place.done("status")["certificate_ends"]) < now + timedelta(days=18)
    assert place.ended(place.submit(place.job("dated"))) == "done"
    place.server.says("made the server's certificate anew: the old one ends on")
    until(lambda: place.service().superlink not in (None, before.superlink), "another SuperLink runs")
    place.wait_online("ant-hill", "bee-hive", "cow-shed")
    assert datetime.fromisoformat(place.done("status")["certificate_ends"]) > now + timedelta(days=390)


def test_a_waiting_process_that_ends_by_itself_is_replaced_more_and_more_rarely(place: Deployment) -> None:
    assert place.server is not None
    for seconds in (1, 2):
        (pid,) = until(lambda: processes_about(place.home.folder, "consilience.server.runner"), "a process waits")
        os.kill(pid, signal.SIGKILL)
        place.server.says(f"ended with code -9; next try in {seconds} s")


def test_a_server_can_be_asked_and_stopped_while_it_starts(place: Deployment, tmp_path: Path) -> None:
    home = make_server(tmp_path / "server")
    server = place.process("starting.log", ["server", "start", "--home", home.folder])
    first = until(lambda: read_service(home.folder), "the server says how it stands")
    assert first is not None
    assert (first.superlink, first.online) == (None, {})
    assert done("server", "stop", "--home", home.folder) == {"running": False}
    assert server.wait() == 0
    assert not processes_about(tmp_path)


def test_a_run_whose_process_dies_again_and_again_is_called_failed(place: Deployment) -> None:
    place.hold.touch()
    run = place.submit(place.job("cursed"))
    seen: set[int] = set()
    while place.at_work(run):
        for pid in set(processes_about(place.home.folder, "consilience.server.runner")) - seen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                seen.add(pid)
        time.sleep(0.02)
    place.hold.unlink()
    assert place.state(run) == "failed"
    assert len(seen) > MOST_CRASHES
    envelope = place.type_in("report", run)
    assert envelope["code"] == envelope["error"]["code"] == 1
    assert f"process ended {MOST_CRASHES + 1} times, last with code -9" in envelope["error"]["message"]
    assert "the same submit goes on" in envelope["error"]["hint"]


def test_a_killed_superlink_is_started_again_and_the_agents_come_back_by_themselves(place: Deployment) -> None:
    before = place.service()
    agents = {name: (agent.process.pid, agent.text().count("connected to")) for name, agent in place.agents.items()}
    assert before.superlink is not None
    os.kill(before.superlink, signal.SIGKILL)
    until(lambda: place.service().superlink != before.superlink, "another SuperLink runs")
    for name, agent in place.agents.items():
        agent.says("connected to", agents[name][1] + 1)
        assert agent.process.pid == agents[name][0]
    place.wait_online("ant-hill", "bee-hive", "cow-shed")
    assert place.service().pid == before.pid
    assert place.server is not None
    assert "the SuperLink ended; starting it again" in place.server.text()


def test_a_killed_server_leaves_no_process_and_goes_on_with_its_runs_when_it_is_started(place: Deployment) -> None:
    assert place.server is not None
    place.hold.touch()
    first, second = place.submit(place.job("first")), place.submit(place.job("second"))
    until(lambda: place.events(first, "asked"), "questions are on their way")
    assert (place.state(first), place.state(second)) == ("running", "queued")
    assert len(processes_about(place.home.folder)) >= 3, "server, SuperLink and the run's process"
    place.server.end(signal.SIGKILL)
    until(lambda: not processes_about(place.home.folder), "every process of the server is gone")
    assert place.done("status")["server"] is None
    assert place.type_in("submit", place.job("first"), "--wait")["error"]["code"] == 22
    place.hold.unlink()
    place.start()
    assert place.ended(first) == place.ended(second) == "done"
    assert place.samples(first, "answered") == EVERYTHING


@pytest.mark.parametrize("way", ["SIGTERM", "stop"])
def test_the_server_stops_with_everything_it_started(place: Deployment, way: str) -> None:
    assert place.server is not None
    superlink = place.service().superlink
    assert superlink is not None
    if way == "SIGTERM":
        assert place.server.end() == 0
    else:
        assert place.done("stop") == {"running": False}
        assert place.server.wait() == 0
    assert not running(superlink)
    assert place.done("status")["server"] is None
    assert not (place.home.folder / "service.json").exists()
    place.start()
    place.wait_online("ant-hill", "bee-hive", "cow-shed")
