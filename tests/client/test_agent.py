"""The agent as a process against a real SuperLink over TLS: it answers, refuses, comes back, and ends as it should."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from consilience.client.agent import Agent
from consilience.client.agent_cli import serve
from consilience.common.cards import SiteCard
from consilience.common.encoding import decode
from consilience.common.errors import AdmissionError, CertificateError, DuplicateError, IdentityError
from consilience.common.identity import Kit
from consilience.common.protocol import Agreement, Answer, CardRequest, Contract, Question, read_reply
from consilience.deploy.processes import free_ports
from helpers.site_folder import AgentProcess, Proxy, SiteFolder, ask, health, stock_supernode
from helpers.superlink import Authority, SuperLink, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    held = SuperLink(tmp_path_factory.mktemp("superlink"))
    held.start()
    yield held
    held.end()


@pytest.fixture(scope="module")
def site(superlink: SuperLink, tmp_path_factory: pytest.TempPathFactory) -> SiteFolder:
    return SiteFolder(tmp_path_factory.mktemp("site") / "a", superlink, "site-a")


@pytest.fixture(scope="module")
def node(site: SiteFolder) -> int:
    site.write_settings(health_port=free_ports(1)[0], policy={"features": {"taps": {"means": {}}}})
    return site.register()


@pytest.fixture(scope="module")
def agent(site: SiteFolder, node: int) -> Iterator[AgentProcess]:
    with site.start("--log", "json") as running:
        running.says("connected to")
        yield running


def question_of(site: SiteFolder, card: SiteCard, start: int = 0) -> RecordDict:
    question = Question(
        job="job",
        pool=site.pool.digest,
        start=start,
        stop=start + 5,
        encoding="f16",
        teacher=card.teacher,
        policy=card.policy,
    )
    return question.to_content()


def card_of(grid: object, node: int) -> SiteCard:
    (reply,) = ask(grid, node, "query.card", CardRequest(job="job").to_content())  # type: ignore[arg-type]
    return read_reply(reply.content, SiteCard)


def test_it_answers_card_contract_and_questions(
    superlink: SuperLink, site: SiteFolder, node: int, agent: AgentProcess
) -> None:
    with superlink.run() as grid:
        card = card_of(grid, node)
        assert card.name == "site-a"
        contract = Contract(
            job="job",
            labels=card.classes,
            class_set=(0, 1, 2),
            pools=(site.pool.digest,),
            teacher=card.teacher,
            encoding="f16",
            features=("means",),
        )
        (reply,) = ask(grid, node, "query.contract", contract.to_content())
        assert read_reply(reply.content, Agreement).pools == (site.pool.digest,)
        questions = [
            Question(
                job="job",
                pool=site.pool.digest,
                start=start,
                stop=start + 5,
                encoding="f16",
                teacher=card.teacher,
                policy=card.policy,
            )
            for start in range(0, 40, 5)
        ]
        replies = ask(grid, node, "query.answer", *(question.to_content() for question in questions))
        for question, answer in zip(questions, replies, strict=True):
            rows = decode(Answer.from_content(answer.content, question).data, 5, 3, "f16")
            pixels = site.pool.read(question.start, question.stop)
            assert rows.argmax(axis=1).tolist() == pixels.reshape(5, -1, 3).mean(axis=1).argmax(axis=1).tolist()
        assert card.features is not None
        told = questions[0].model_copy(
            update={"kind": "features", "encoding": "f16", "teacher": card.features.taps[0].fingerprint}
        )
        (reply,) = ask(grid, node, "query.answer", told.to_content())
        means = np.frombuffer(Answer.from_content(reply.content, told).data, "<f2").reshape(5, 3)
        expected = site.pool.read(0, 5).reshape(5, -1, 3).mean(axis=1) / 127.5 - 1  # as it is fed
        np.testing.assert_allclose(means, expected, atol=1e-3)
    assert superlink.authority.pem not in agent.text()
    status, held = health(site.raw["health_port"])
    assert status == 200
    assert (held["status"], held["site"], held["server"]) == ("connected", "site-a", superlink.address)
    assert held["answered"] >= 10


def test_what_is_none_of_our_questions_is_refused_and_the_agent_goes_on(
    superlink: SuperLink, node: int, agent: AgentProcess
) -> None:
    with superlink.run() as grid:
        for kind in ("train", "evaluate.all", "query.secrets"):
            (reply,) = ask(grid, node, kind, RecordDict({"record": ConfigRecord({"json": "canary"})}))
            assert reply.has_error()
            assert reply.error.reason == "the message is none of the questions that a site answers"
        assert card_of(grid, node).name == "site-a"
    assert "canary" not in agent.text()


def test_oversized_messages_are_refused_and_the_agent_goes_on(
    superlink: SuperLink, node: int, agent: AgentProcess
) -> None:
    many = RecordDict({f"r{i}": ConfigRecord({"json": str(i)}) for i in range(70)})
    large = RecordDict({"record": ConfigRecord({"json": "x" * (66 * 2**20)})})
    parts = RecordDict({f"r{i}": ConfigRecord({"json": str(i) * (22 * 2**20)}) for i in range(3)})
    with superlink.run() as grid:
        for content in (many, large, parts):
            (reply,) = ask(grid, node, "query.card", content)
            assert reply.has_error()
            assert reply.error.reason == "the message is too large"
        assert card_of(grid, node).name == "site-a"


def test_a_run_whose_bundle_carries_code_is_refused_and_recorded(
    superlink: SuperLink, site: SiteFolder, node: int, agent: AgentProcess, tmp_path: Path
) -> None:
    proof = tmp_path / "executed"
    with superlink.run({"evil.py": f"open({str(proof)!r}, 'w')".encode()}) as grid:
        reply: Message
        for reply in ask(grid, node, "query.card", *[CardRequest(job="job").to_content()] * 2):
            assert reply.has_error()
            assert "installed code only" in str(reply.error.reason)
        run = str(grid.run.run_id)
    records = [json.loads(line) for line in (site.folder / "state" / "refusals.jsonl").read_text().splitlines()]
    assert [record["run"] for record in records] == [run]
    assert "more than its description" in records[0]["reason"]
    assert not proof.exists()


def test_a_second_agent_on_the_same_folder_ends_at_once(site: SiteFolder, agent: AgentProcess) -> None:
    with site.start("--log", "json") as second:
        assert second.wait() == 19
        lines = [json.loads(line) for line in second.text().splitlines()]
    assert lines[-1]["level"] == "error"
    assert lines[-1]["code"] == 19
    assert "running already" in lines[-1]["message"]


def test_another_agent_of_the_key_is_waited_for_and_then_an_error(
    site: SiteFolder, agent: AgentProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(site.folder))
    kit = Kit.read(site.folder / "kit.json")
    with pytest.raises(DuplicateError, match="Another agent is connected"):
        Agent(site.file, tmp_path / "elsewhere", kit, site.key, patience=0.5).run()
    assert health(site.raw["health_port"])[0] == 200


def test_it_goes_on_by_itself_after_the_server_was_killed_and_restarted(
    superlink: SuperLink, site: SiteFolder, node: int, agent: AgentProcess
) -> None:
    superlink.end(signal.SIGKILL)
    until(lambda: health(site.raw["health_port"])[0] == 503, "the agent knows that it is not connected")
    agent.says("trying again")
    superlink.start()
    agent.says("connected to", times=2)
    with superlink.run() as grid:
        assert card_of(grid, node).name == "site-a"


def test_sigterm_ends_it_well_and_the_next_one_connects_at_once(
    superlink: SuperLink, site: SiteFolder, node: int, agent: AgentProcess
) -> None:
    assert agent.end() == 0
    assert "disconnected" in agent.text()
    for line in agent.text().splitlines():  # nothing but the agent's own lines, whatever happened to it
        assert set(json.loads(line)) == {"time", "level", "message"}, line
    with site.start() as again:
        again.says("connected to")
        assert "another agent" not in again.text()
        with superlink.run() as grid:
            assert card_of(grid, node).name == "site-a"
        assert again.end(signal.SIGINT) == 0


def test_an_agent_that_was_killed_is_followed_by_the_next_one(superlink: SuperLink, tmp_path: Path) -> None:
    site = SiteFolder(tmp_path / "g", superlink, "site-g")
    site.register()
    with site.start() as first:
        first.says("connected to")
        first.end(signal.SIGKILL)
    with site.start() as second:
        second.says("takes another agent of this key to be connected")
        second.says("connected to")


def test_the_same_app_answers_under_a_stock_supernode(superlink: SuperLink, tmp_path: Path) -> None:
    site = SiteFolder(tmp_path / "j", superlink, "site-j")
    node = site.register()
    with stock_supernode(site), superlink.run() as grid:
        until(lambda: node in list(grid.get_node_ids()), "the node is online")
        assert card_of(grid, node).name == "site-j"


def test_a_key_that_is_unknown_or_suspended_ends_it(
    superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = SiteFolder(tmp_path / "b", superlink, "site-b")
    monkeypatch.syspath_prepend(str(site.folder))
    with site.start() as unknown:
        assert unknown.wait() == 18
        assert "does not know this site's key" in unknown.text()
    node = site.register()
    admitted = Agent(site.file, site.folder / "state", Kit.read(site.folder / "kit.json"), site.key)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(admitted.run)
        until(lambda: admitted.status()["status"] == "connected", "the agent is connected")
        superlink.unregister(node)
        with pytest.raises(AdmissionError):
            ended.result()


def test_another_authority_s_server_is_not_spoken_to(
    superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = SiteFolder(tmp_path / "c", superlink, "site-c")
    site.register()
    monkeypatch.syspath_prepend(str(site.folder))
    with pytest.raises(CertificateError, match="shows a certificate that the kit does not allow"):
        Agent(site.file, site.folder / "state", site.write_kit(ca=Authority().pem), site.key).run()


def test_an_answer_outlives_a_cut_and_sigterm_in_the_middle_of_one_goes_offline(
    superlink: SuperLink, tmp_path: Path
) -> None:
    site = SiteFolder(tmp_path / "d", superlink, "site-d", teacher="paced")
    node = site.register()
    proxy = Proxy(superlink.fleet_port)
    site.write_kit(address=f"127.0.0.1:{proxy.port}")
    begun, go = site.folder / "begun", site.folder / "go"
    with site.start() as running, superlink.run() as grid:
        running.says("connected to")
        content = question_of(site, card_of(grid, node))
        (sent,) = grid.push_messages([Message(content, node, "query.answer")])
        until(begun.exists, "the teacher works")
        proxy.cut()
        running.says("connection lost")
        go.touch()
        running.says("trying again")
        proxy.mend()
        (reply,) = until(lambda: list(grid.pull_messages([sent])), "the answer")
        assert not reply.has_error()
        go.unlink()
        begun.unlink()
        others = question_of(site, card_of(grid, node), 5)  # what was answered is given again without the teacher
        (sent,) = grid.push_messages([Message(others, node, "query.answer")])
        until(begun.exists, "the teacher works again")
        assert running.end() == 0
        (reply,) = until(lambda: list(grid.pull_messages([sent])), "word that the site is gone")
        assert reply.has_error()
        assert node not in list(grid.get_node_ids())


def test_a_server_that_is_not_there_yet_is_waited_for(
    superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = SiteFolder(tmp_path / "h", superlink, "site-h")
    site.register()
    monkeypatch.syspath_prepend(str(site.folder))
    proxy = Proxy(superlink.fleet_port)
    proxy.cut()
    kit = site.write_kit(address=f"127.0.0.1:{proxy.port}")
    patient = Agent(site.file, site.folder / "state", kit, site.key)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(patient.run)
        until(lambda: patient.status()["status"] == "connecting", "the agent tries")
        proxy.mend()
        until(lambda: patient.status()["status"] == "connected", "the agent is connected")
        patient.stop()
        ended.result()


def test_without_papers_it_does_not_start(superlink: SuperLink, tmp_path: Path) -> None:
    site = SiteFolder(tmp_path / "i", superlink, "site-i")
    (site.folder / "kit.json").unlink()
    with pytest.raises(IdentityError, match=r"kit\.json does not exist"):
        serve(site.file)
