"""A server may say anything: the agent runs none of its code, tells it nothing, and goes on answering."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.error import ApiErrorCode
from hypothesis import given
from hypothesis import strategies as st

from consilience.client.agent import Agent
from consilience.client.app import forget_sites
from consilience.client.bundle import bundle_problem
from consilience.common.cards import SiteCard
from consilience.common.errors import AdmissionError, ClockError, ConsilienceError, VersionError
from consilience.common.protocol import CardRequest, read_reply
from helpers.fake_fleet import NODE, FakeFleet
from helpers.site_folder import SiteFolder
from helpers.superlink import PYPROJECT, SuperLink, until

QUESTION = CardRequest(job="job").to_content()


def bundle(files: dict[str, bytes]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return held.getvalue()


GOOD = bundle({"pyproject.toml": PYPROJECT, ".info/CONTENT": b""})


class Running:
    """An agent in a thread, behind a fake server."""

    def __init__(self, fake: FakeFleet, site: SiteFolder) -> None:
        self.fake, self.site, self.errors = fake, site, list[BaseException]()
        self.agent = Agent(site.file, site.folder / "state", fake.kit(site.key), site.key)
        (site.folder / "state").mkdir(exist_ok=True)
        self.thread = threading.Thread(target=self._body, daemon=True)
        self.thread.start()

    def _body(self) -> None:
        try:
            self.agent.run()
        except BaseException as error:
            self.errors.append(error)

    def still_answers(self) -> None:
        self.fake.bundles[1] = GOOD
        self.fake.put(self.fake.announce(self.fake.message("query.card", QUESTION)))
        reply = self.fake.reply()
        assert read_reply(reply.content, SiteCard).name == "site-a"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SiteFolder]:
    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        held = SiteFolder(folder / "site", SuperLink(folder), "site-a")
        patch.syspath_prepend(str(held.folder))
        forget_sites()
        yield held


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeFleet]:
    held = FakeFleet(tmp_path)
    yield held
    held.close()


@pytest.fixture
def running(fake: FakeFleet, site: SiteFolder) -> Iterator[Running]:
    held = Running(fake, site)
    yield held
    held.agent.stop()
    held.thread.join()


def strange_source(fake: FakeFleet) -> None:
    fake.put(fake.announce(fake.message("query.card", QUESTION, source=77)))


def other_node(fake: FakeFleet) -> None:
    fake.put(fake.announce(fake.message("query.card", QUESTION, node=NODE + 1)))


def endless_tree(fake: FakeFleet) -> None:
    proto, tree = fake.announce(fake.message("query.card", QUESTION))
    tree.children.extend([ObjectTree(object_id="a" * 64)] * 100_000)
    fake.put((proto, tree))


def deep_tree(fake: FakeFleet) -> None:
    proto, tree = fake.announce(fake.message("query.card", QUESTION))
    for _ in range(90):
        tree = ObjectTree(object_id=tree.object_id, children=[tree])
    fake.put((proto, tree))


def forged_object(fake: FakeFleet) -> None:
    proto, tree = fake.announce(fake.message("query.card", QUESTION))
    fake.objects[tree.children[0].object_id] = b"forged"
    fake.put((proto, tree))


def nonsense_object(fake: FakeFleet) -> None:
    proto, _ = fake.announce(fake.message("query.card", QUESTION))
    identifier = hashlib.sha256(b"nonsense").hexdigest()
    fake.objects[identifier] = b"nonsense"
    fake.put((proto, ObjectTree(object_id=identifier)))


def other_content(fake: FakeFleet) -> None:
    proto, _ = fake.announce(fake.message("query.card", QUESTION))
    _, tree = fake.announce(fake.message("train", QUESTION))
    fake.put((proto, tree))


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (strange_source, "the message does not come from the server's job"),
        (other_node, "the message does not come from the server's job"),
        (endless_tree, "the message is too large"),
        (deep_tree, "the message is too large"),
        (forged_object, "the message cannot be read"),
        (nonsense_object, "the message cannot be read"),
        (other_content, "the message cannot be read"),
    ],
)
def test_a_message_that_is_no_question_gets_a_constant_reply(
    running: Running, fake: FakeFleet, attack: Callable[[FakeFleet], None], reason: str
) -> None:
    fake.bundles[1] = GOOD
    attack(fake)
    reply = fake.reply()
    assert reply.has_error()
    assert reply.error.reason == reason
    running.still_answers()


def no_tree(fake: FakeFleet) -> None:
    proto, _ = fake.announce(fake.message("query.card", QUESTION))
    fake.put_response(PullMessagesResponse(messages_list=[proto]))


def lost_object(fake: FakeFleet) -> None:
    proto, tree = fake.announce(fake.message("query.card", QUESTION))
    fake.objects.clear()
    fake.put((proto, tree))


def impossible_times(fake: FakeFleet) -> None:
    for ttl, created in ((float("nan"), 1.0), (-1e300, float("inf")), (float("inf"), float("nan"))):
        proto, tree = fake.announce(fake.message("query.card", QUESTION))
        proto.metadata.ttl, proto.metadata.created_at = ttl, created
        fake.put((proto, tree))


def oversized_announcement(fake: FakeFleet) -> None:
    proto, tree = fake.announce(fake.message("query.card", QUESTION))
    proto.metadata.group_id = "x" * (70 * 2**20)
    fake.put((proto, tree))


@pytest.mark.parametrize("attack", [no_tree, lost_object, impossible_times, oversized_announcement])
def test_a_message_that_cannot_be_replied_to_does_not_end_the_agent(
    running: Running, fake: FakeFleet, attack: Callable[[FakeFleet], None]
) -> None:
    fake.bundles[1] = GOOD
    attack(fake)
    fake.put(fake.announce(fake.message("query.card", RecordDict({"mark": ConfigRecord({"json": "last"})}))))
    until(lambda: fake.replies.qsize(), "a reply to what came after")
    while fake.replies.qsize():
        fake.reply()
    running.still_answers()


BUNDLES = {
    "code": bundle({"pyproject.toml": PYPROJECT, "app.py": b"1"}),
    "code of that name": bundle({"pyproject.toml": PYPROJECT, "consilience/client/app.py": b"1"}),
    "a path outside": bundle({"pyproject.toml": PYPROJECT, "../pyproject.toml": b""}),
    "a bomb": bundle({"pyproject.toml": PYPROJECT + b"#" * 50_000_000}),
    "another app": bundle({"pyproject.toml": PYPROJECT.replace(b"consilience.client.app:app", b"os:system")}),
    "no names": bundle({"pyproject.toml": b"tool = 3"}),
    "no description": bundle({".info/CONTENT": b""}),
    "no archive": b"PK\x03\x04nonsense",
    "nothing": b"",
}


def test_bundles_with_anything_but_names_are_refused_and_recorded_once(running: Running, fake: FakeFleet) -> None:
    record = running.site.folder / "state" / "refusals.jsonl"
    record.unlink(missing_ok=True)
    for run, content in enumerate(BUNDLES.values(), start=100):
        fake.bundles[run] = content
        for _ in range(2):
            fake.put(fake.announce(fake.message("query.card", QUESTION, run=run)))
            reply = fake.reply()
            assert reply.has_error()
            assert str(reply.error.reason).startswith("the run's bundle")
    fake.bundles[99], fake.hashes[99] = GOOD, "0" * 64
    fake.put(fake.announce(fake.message("query.card", QUESTION, run=99)))
    assert fake.reply().error.reason == "the run's bundle cannot be read"
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["run"] for line in lines] == [*map(str, range(100, 100 + len(BUNDLES))), "99"]
    running.still_answers()


@given(st.binary(max_size=300), st.integers(0, len(GOOD)))
def test_damaged_bundles_are_good_or_refused_never_a_crash(damage: bytes, at: int) -> None:
    problem = bundle_problem(GOOD[:at] + damage + GOOD[at + len(damage) :])
    assert problem is None or problem.startswith("the run's bundle")


INCOMPATIBLE = json.dumps({"code": int(ApiErrorCode.RUNTIME_VERSION_INCOMPATIBLE), "public_message": "canary"})


@pytest.mark.parametrize(
    ("status", "details", "error"),
    [
        (grpc.StatusCode.FAILED_PRECONDITION, INCOMPATIBLE, VersionError),
        (grpc.StatusCode.UNIMPLEMENTED, "canary", VersionError),
        (grpc.StatusCode.UNAUTHENTICATED, "Invalid timestamp", ClockError),
        (grpc.StatusCode.UNAUTHENTICATED, "Invalid signature", AdmissionError),
    ],
)
@pytest.mark.parametrize("method", ["ActivateNode", "PullMessages"])
def test_what_trying_again_cannot_mend_ends_the_agent_with_its_error(
    fake: FakeFleet, site: SiteFolder, method: str, status: Any, details: str, error: type[ConsilienceError]
) -> None:
    fake.refuse[method] = (status, details)
    held = Running(fake, site)
    held.thread.join()
    assert [type(caught) for caught in held.errors] == [error]
    assert "canary" not in str(held.errors[0])


def test_failures_of_the_server_are_outlived(running: Running, fake: FakeFleet) -> None:
    fake.bundles[5] = fake.bundles[6] = GOOD
    for method in ("PullMessages", "PushMessages", "GetRun"):
        for status in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DATA_LOSS):
            fake.refuse[method] = (status, "canary")
            fake.put(fake.announce(fake.message("query.card", QUESTION, run=5)))
            running.thread.join(0.3)
            fake.refuse.clear()
    fake.put(fake.announce(fake.message("query.card", QUESTION, run=6)))
    while fake.reply().metadata.run_id != 6:  # replies to the questions before
        pass
    assert running.errors == []
