"""Abuse of the one open port, by strangers and by registered sites: refused, said plainly, and the others go on."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc  # type: ignore[import-untyped]
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.node_pb2 import Node

from consilience.client.fleet import HEARTBEAT, GrpcFleet
from consilience.common.identity import Kit, key_fingerprint, load_key, make_key
from consilience.common.settings import SiteSettings
from consilience.common.settings_file import load_settings
from helpers.server import Deployment, deployment, until
from helpers.superlink import Authority

pytestmark = pytest.mark.slow

HONEST = ("hospital-a", "hospital-b")
EVERYTHING = list(range(64))
REASONS = {
    "nan": "An answer holds no log-probabilities: row 0 holds NaN or an infinite value",
    "scores": "An answer holds no log-probabilities: row 0 has probabilities that sum to",
    "narrow": "An answer has 64 bytes; allowed: 96 for 16 rows of 3 classes as f16",
    "tenfold": "An answer has 960 bytes; allowed: 96 for 16 rows of 3 classes as f16",
    "others": "An answer's start is not the question's",
    "stranger": "An answer's teacher is not the question's",
    "old": "An answer's start is not the question's",
    "raising": "The message failed with Flower's code 2",
    "endless": "The message failed with Flower's code 0",
    "garbage": "The message failed with Flower's code 0",
    "cuckoo": "The message failed with Flower's code 0",
    "crashing": "The site refused: teacher-failed, the site's teacher gave no usable answer",
}
"""What the server says of each hostile or broken site."""
MOST_MEMORY = 2**30
"""Bytes that the SuperLink may ever have held: far from the 3 GB that are announced."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment(tmp_path_factory.mktemp("place"), *HONEST) as held:
        yield held


def papers(place: Deployment, name: str) -> tuple[SiteSettings, Kit]:
    settings = load_settings(place.files[name], SiteSettings)
    return settings, Kit.read(settings.kit)


def registered(place: Deployment) -> dict[str, int]:
    return {name: node.identifier for name, node in place.nodes().items()}


def node_of(place: Deployment, name: str) -> Node:
    return Node(node_id=place.nodes()[name].identifier)


def refusal(call: object, request: object) -> tuple[grpc.StatusCode, str | None]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=10)  # type: ignore[operator]
    return caught.value.code(), caught.value.details()


def test_strangers_are_turned_away_each_with_its_own_code(place: Deployment) -> None:
    connections = {name: place.agents[name].text().count("connected to") for name in HONEST}
    for name in ("misled", "unknown", "suspended"):
        place.add(name)
    settings, kit = papers(place, "misled")
    kit.model_copy(update={"ca": Authority().pem}).write(settings.kit)
    settings, kit = papers(place, "unknown")
    settings.key.unlink()
    fingerprint = key_fingerprint(make_key(settings.key).public_key())
    kit.model_copy(update={"site_fingerprint": fingerprint}).write(settings.kit)
    place.done("suspend", "suspended")
    until(lambda: "suspended" not in place.nodes(), "the SuperLink no longer knows the suspended key")
    for name in ("misled", "unknown", "suspended"):
        place.agent(name)
    assert {name: place.agents[name].wait() for name in ("misled", "unknown", "suspended")} == {
        "misled": 17,
        "unknown": 18,
        "suspended": 18,
    }
    assert "shows a certificate that the kit does not allow" in place.agents["misled"].text()
    assert "Compare the kit's words with the coordinator" in place.agents["misled"].text()
    for name in ("unknown", "suspended"):
        assert "Send the request to the coordinator, or ask them" in place.agents[name].text()
    assert {name: place.agents[name].text().count("connected to") for name in HONEST} == connections
    place.done("suspend", "misled")
    place.done("suspend", "unknown")


def test_calls_without_tls_or_key_or_with_another_s_node_get_nothing(place: Deployment, tmp_path: Path) -> None:
    settings, kit = papers(place, "hospital-b")
    before = registered(place)
    plain = grpc.insecure_channel(kit.address)
    request = ActivateNodeRequest(public_key=b"x", heartbeat_interval=HEARTBEAT)
    assert refusal(FleetStub(plain).ActivateNode, request)[0] == grpc.StatusCode.UNAVAILABLE
    plain.close()
    with socket.create_connection((kit.host, kit.port), timeout=10) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(2**16))
        with suppress(OSError):
            assert b"HTTP/1" not in raw.recv(1000)
    nobody = grpc.secure_channel(kit.address, grpc.ssl_channel_credentials(kit.ca.encode()))
    stub = FleetStub(nobody)
    for call, held in (
        (stub.ActivateNode, request),
        (stub.RegisterNode, RegisterNodeFleetRequest(public_key=b"x")),
        (stub.PullMessages, PullMessagesRequest(node=node_of(place, "hospital-a"))),
    ):
        assert refusal(call, held)[0] == grpc.StatusCode.UNAUTHENTICATED
    nobody.close()
    stranger = make_key(tmp_path / "stranger.key")
    fleet = GrpcFleet(kit, stranger)
    public = GrpcFleet(kit, load_key(settings.key))._public
    assert refusal(fleet._stub.PullMessages, PullMessagesRequest(node=node_of(place, "hospital-a"))) == (
        grpc.StatusCode.UNAUTHENTICATED,
        "Invalid node ID",
    )
    refusal(fleet._stub.RegisterNode, RegisterNodeFleetRequest(public_key=fleet._public))
    fleet.close()
    member = GrpcFleet(kit, load_key(settings.key))
    assert member._public == public
    assert refusal(member._stub.PullMessages, PullMessagesRequest(node=node_of(place, "hospital-a"))) == (
        grpc.StatusCode.UNAUTHENTICATED,
        "Invalid node ID",
    )
    member.close()
    # Sites that another test has suspended leave the list a moment later.
    assert registered(place).items() <= before.items()
    assert registered(place).keys() >= set(HONEST)
    assert place.online() == set(HONEST)


def test_the_control_api_is_on_loopback_alone_and_speaks_tls(place: Deployment) -> None:
    port = place.home.settings().control_port
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert {held[1] for held in listening if held[3] == "0A" and held[1].endswith(f":{port:04X}")} == {
        f"0100007F:{port:04X}"
    }
    assert not [line for line in Path("/proc/net/tcp6").read_text().splitlines() if f":{port:04X} " in line]
    context = ssl.create_default_context(cadata=Authority().pem)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw, pytest.raises(ssl.SSLError):
        context.wrap_socket(raw, server_hostname="127.0.0.1")


def test_registered_sites_that_lie_are_refused_and_the_others_finish(place: Deployment) -> None:
    hostile = [name for name in (*REASONS, "heavy") if name != "crashing"]
    for name in hostile:
        place.add(name)
    place.add("crashing", teacher="crashing")
    agent = place.agent("crashing")
    liars = place.process("liars.log", [f"{name}={place.files[name]}" for name in hostile], module="helpers.hostile")
    place.wait_online(*HONEST, *hostile, "crashing")
    asked = {"min_sites": 3, "wait_for": len(REASONS) + 3, "retries": 1, "deadline": 200}
    run = place.submit(place.job("besieged", ask=asked))
    assert place.ended(run) == "done", place.done("status", run)

    answered = place.samples(run, "answered")
    assert {name: answered[name] for name in (*HONEST, "heavy")} == dict.fromkeys((*HONEST, "heavy"), EVERYTHING)
    assert set(answered) - {*HONEST, "heavy"} <= {"old"}, "an old answer is right once, for its own question"
    said: dict[str, set[str]] = {}
    for event in place.events(run, "failed"):
        said.setdefault(event["site"], set()).add(event["reason"])
    report = place.done("report", run)["report"]
    said["crashing"] = {report["left_out"]["crashing"]}  # its teacher was tried before it was asked anything
    assert said.keys() == REASONS.keys()
    for name, reason in REASONS.items():
        assert all(each.startswith(reason) for each in said[name]), (name, said[name])
    assert {site["name"] for site in report["sites"]} >= {*HONEST, "heavy"}

    server, site = place.server, agent.text()
    assert server is not None
    for name, reason in (
        ("endless", "objects; allowed: 128"),
        ("garbage", "it cannot be read"),
        ("cuckoo", "it is not the one that was announced"),
    ):
        assert any(f"no reply of site {name}: " in line and reason in line for line in server.text().splitlines())
    assert "heavy: RESOURCE_EXHAUSTED" in liars.text()
    assert "canary-of-an-exception" in site, "the site's own log tells what its teacher raised"
    superlink = place.service().superlink
    held = Path(f"/proc/{superlink}/status").read_text()
    assert int(held.partition("VmHWM:")[2].split()[0]) * 1024 < MOST_MEMORY
    assert place.online() >= set(HONEST)


def test_no_exception_text_and_no_path_of_a_site_is_at_the_server(place: Deployment) -> None:
    """After the job above: a teacher raised, and a changed agent sent a traceback of its own accord."""
    assert place.server is not None
    searched = 0
    for path in [place.server.log, *place.home.folder.rglob("*")]:
        with suppress(FileNotFoundError, IsADirectoryError):  # service.json is replaced every second
            content = path.read_bytes()
            searched += len(content)
            assert b"canary-of-an-exception" not in content, path
            assert str(place.folder / "sites").encode() not in content, path
            if not path.name.startswith("superlink.db"):  # what was sent passes through it; nothing else repeats it
                assert b"canary-of-a-traceback" not in content, path
    assert searched > 100_000


def test_a_site_with_another_s_name_on_its_card_is_refused(place: Deployment) -> None:
    for name in [name for name in place.files if name not in HONEST]:
        place.done("suspend", name)
    place.wait_online(*HONEST)
    place.add("impostor")
    liar = place.process("impostor.log", [f"impostor={place.files['impostor']}"], module="helpers.hostile")
    place.wait_online(*HONEST, "impostor")
    reason = "its card names the site hospital-a; its key was admitted as impostor"

    strict = place.submit(place.job("strict"))
    assert place.ended(strict) == "failed"
    envelope = place.type_in("report", strict)
    assert envelope["code"] == envelope["error"]["code"] == 9
    assert reason in envelope["error"]["message"]

    patient = place.submit(place.job("patient", ask={"min_sites": 2}))
    assert place.ended(patient) == "done"
    (left_out,) = place.events(patient, "left-out")
    assert left_out["reason"] == reason
    assert place.samples(patient, "answered") == dict.fromkeys(HONEST, EVERYTHING)
    liar.process.kill()


def test_a_site_that_announces_and_never_sends_holds_up_nobody(place: Deployment) -> None:
    place.add("stalling")
    place.process("stalling.log", [f"stalling={place.files['stalling']}"], module="helpers.hostile")
    place.done("suspend", "impostor")
    place.wait_online(*HONEST, "stalling")
    run = place.submit(place.job("held-up", ask={"min_sites": 2, "deadline": 20}))
    until(lambda: place.samples(run, "answered") == dict.fromkeys(HONEST, EVERYTHING), "the others' answers are here")
    assert place.ended(run) == "done"
    (given_up,) = place.events(run, "given-up")
    assert given_up["site"] == "stalling"
    assert place.done("report", run)["report"]["sites"]
