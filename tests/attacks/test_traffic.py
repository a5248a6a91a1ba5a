"""What leaves a site during a whole job, recorded by a peer of the test's own and decoded to the last byte.

The site's private data, weights, numbers of images, folders and files carry values that occur nowhere else. None of
them may leave, in any of the forms that a program would write them in.
"""

from __future__ import annotations

import base64
import gzip
import re
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from safetensors.torch import save_file

from consilience.client.teacher import load_teacher
from consilience.common.cards import SiteCard
from consilience.common.identity import Kit, key_line, load_key
from consilience.common.nets import build
from consilience.common.protocol import ANSWER, CARD, CONTRACT, Agreement, Answer, Question, read_reply
from consilience.common.settings import NpzData, Policy, Preprocessing, SiteSettings, StateDictTeacher
from consilience.common.settings_file import dump_settings, load_settings
from consilience.deploy.processes import join
from consilience.server.superlink import key_pem
from helpers.recorder import Call, Recorder
from helpers.server import CLASSES, Deployment

pytestmark = pytest.mark.slow

REQUESTS: dict[str, Any] = {
    "ActivateNode": fleet_pb2.ActivateNodeRequest,
    "DeactivateNode": fleet_pb2.DeactivateNodeRequest,
    "SendNodeHeartbeat": heartbeat_pb2.SendNodeHeartbeatRequest,
    "PullMessages": fleet_pb2.PullMessagesRequest,
    "PushMessages": fleet_pb2.PushMessagesRequest,
    "PullObject": message_pb2.PullObjectRequest,
    "PushObject": message_pb2.PushObjectRequest,
    "ConfirmMessageReceived": message_pb2.ConfirmMessageReceivedRequest,
    "GetRun": run_pb2.GetRunRequest,
    "GetFab": fab_pb2.GetFabRequest,
}
HEADERS = {
    "flwr-package-name": b"flwr",
    "flwr-package-version": metadata.version("flwr").encode(),
    "flwr-component-name": b"SuperNode",
    "flwr-public-key-bin": b"",
}
PLACE = "patients-canary-5d1c"
"""Part of the names of the site's folders and files."""
COUNTS = (1137, 2411, 389)
"""Private images of each class."""
WEIGHT = 0.0073591824
"""A value of the teacher's weights."""
MOST_OVERHEAD = 2000
"""Bytes of one call's headers, framing and encryption, on average."""


@dataclass(frozen=True)
class Recording:
    """One job of one site, seen from outside."""

    calls: list[Call]
    sent: int
    pixels: np.ndarray
    settings: SiteSettings
    report: dict[str, Any]
    log: str

    def requests(self, method: str) -> list[Any]:
        """Return the decoded requests of one method."""
        return [REQUESTS[method].FromString(call.request) for call in self.calls if call.method == method]


def private_site(place: Deployment) -> tuple[Path, np.ndarray]:
    """Make a site whose private data, weights and paths are easily recognised; return its settings and its images."""
    folder = place.folder / PLACE
    folder.mkdir()
    rng = np.random.default_rng(7)
    pixels = rng.integers(0, 256, (sum(COUNTS), 8, 8, 1), np.uint8)
    labels = np.repeat(np.arange(3), COUNTS)
    np.savez(folder / f"{PLACE}.npz", x=pixels, y=labels, names=np.array(CLASSES))
    network = build("cnn3", classes=3, channels=1, seed=7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.view(-1)[:4] = WEIGHT
    save_file(network.state_dict(), folder / f"{PLACE}.safetensors")
    settings = SiteSettings(
        name="hospital-a",
        data=NpzData(kind="npz", path=folder / f"{PLACE}.npz"),
        teacher=StateDictTeacher(
            kind="state_dict",
            architecture="cnn3",
            path=folder / f"{PLACE}.safetensors",
            classes=CLASSES,
            preprocessing=Preprocessing(),
        ),
        pools=(place.pool.folder,),
    )
    dump_settings(settings, folder / "site.yaml")
    return join(place.home, folder / "site.yaml", folder / "sites"), pixels


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    place = Deployment(tmp_path_factory.mktemp("place"))
    place.start()
    path, pixels = private_site(place)
    settings = load_settings(path, SiteSettings)
    kit = Kit.read(settings.kit)
    peer = Recorder(place.folder / "peer", kit)
    kit.model_copy(update={"ca": peer.authority.pem, "address": peer.address}).write(settings.kit)
    place.files["hospital-a"] = path
    try:
        agent = place.agent("hospital-a")
        place.wait_online("hospital-a")
        run = place.submit(place.job())
        assert place.ended(run) == "done", place.done("status", run)
        assert agent.end() == 0
        report = place.done("report", run)["report"]
        yield Recording(list(peer.calls), peer.sent, pixels, settings, report, agent.text())
    finally:
        place.stop()
        peer.close()


def sent_messages(recording: Recording) -> list[tuple[Any, Message]]:
    """Put together what was pushed: the announced metadata, and the message that its objects are."""
    contents = {held.object_id: held.object_content for held in recording.requests("PushObject")}
    found = []
    for request in recording.requests("PushMessages"):
        (about,), (tree,) = request.messages_list, request.message_object_trees
        parts = {each.object_id: contents[each.object_id] for each in iterate_object_tree(tree)}
        message = inflate_object_from_contents(tree.object_id, parts)
        assert isinstance(message, Message)
        found.append((about, message))
    return found


def test_only_these_calls_are_made_and_they_are_all_that_is_sent(
    recording: Recording, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = Counter(call.method for call in recording.calls)
    with capsys.disabled():
        print(f"\n{'call':24}{'times':>7}{'bytes':>10}")
        for method, times in sorted(counts.items()):
            size = sum(len(call.request) for call in recording.calls if call.method == method)
            print(f"{method:24}{times:7,}{size:10,}")
        print(f"{'the TCP stream':24}{'':7}{recording.sent:10,}")
    assert set(counts) == set(REQUESTS)
    for call in recording.calls:
        request = REQUESTS[call.method].FromString(call.request)
        request.DiscardUnknownFields()
        assert request.ByteSize() == len(call.request), f"{call.method} holds nothing that is not one of its fields"
    told = sum(len(call.request) for call in recording.calls)
    assert told < recording.sent < told + MOST_OVERHEAD * len(recording.calls)


def test_headers_say_who_and_which_version_and_no_more(recording: Recording) -> None:
    public = key_pem(key_line(load_key(recording.settings.key).public_key()))
    for call in recording.calls:
        held = dict(call.headers)
        assert held.keys() == HEADERS.keys() | {"flwr-timestamp", "flwr-signature-bin"}
        assert {name: held[name] for name in HEADERS} == HEADERS | {"flwr-public-key-bin": public}
        assert len(held["flwr-timestamp"] + held["flwr-signature-bin"]) < 140


def test_what_is_sent_is_a_card_an_agreement_and_answers(recording: Recording) -> None:
    kinds: Counter[str] = Counter()
    samples: list[int] = []
    size = 0
    pushed = {held.object_id for held in recording.requests("PushObject")}
    announced: set[str] = set()
    for request in recording.requests("PushMessages"):
        announced |= {each.object_id for each in iterate_object_tree(request.message_object_trees[0])}
    for about, message in sent_messages(recording):
        kind, content = about.metadata.message_type, message.content
        kinds[kind] += 1
        assert about.content.ByteSize() == 0, "what is announced has no content of its own"
        if kind == CARD:
            card = read_reply(content, SiteCard)
            assert (card.name, card.classes) == ("hospital-a", CLASSES)
            assert card.teacher == load_teacher(recording.settings).fingerprint
            assert (card.holdout_accuracy, card.class_priors) == (None, None)
            assert list(content) == ["record"]
        elif kind == CONTRACT:
            assert read_reply(content, Agreement).enclosed is None
            assert list(content) == ["record"]
        else:
            question = Question.from_content(content)
            answer = Answer.from_content(content, question)
            samples += range(question.start, question.stop)
            size += len(answer.data)
            assert list(content) == ["record"]
    assert pushed == announced, "no object travels that is no part of these messages"
    assert kinds == {CARD: 1, CONTRACT: 1, ANSWER: 4}
    assert sorted(samples) == list(range(64))
    (site,) = recording.report["sites"]
    assert size == site["bytes"] == 64 * 3 * 2
    bodies = sum(len(held.object_content) for held in recording.requests("PushObject"))
    assert bodies < size + 2000 * sum(kinds.values())


def canaries(recording: Recording) -> dict[str, bytes]:
    """Return what may not leave, in the forms that a program would write it in."""
    found: dict[str, bytes] = {}
    for index in (0, 1, 700, len(recording.pixels) - 1):
        row = recording.pixels[index].reshape(-1)[:12]
        scaled = row.astype(np.float32) / 255
        for name, values in {
            "bytes": row,
            "int64": row.astype(np.int64),
            "f32": row.astype(np.float32),
            "f16 scaled": scaled.astype(np.float16),
            "f32 scaled": scaled,
            "f32 normal": (scaled - np.float32(0.5)) / np.float32(0.5),
            "f16 normal": ((scaled - 0.5) / 0.5).astype(np.float16),
        }.items():
            found[f"image {index} as {name}"] = values.tobytes()
        found[f"image {index} as text"] = ", ".join(map(str, row)).encode()
    for count in COUNTS:
        found[f"count {count} as int64"] = struct.pack("<q", count)
        found[f"share {count} as f64"] = struct.pack("<d", count / sum(COUNTS))
        found[f"share {count} as f32"] = struct.pack("<f", count / sum(COUNTS))
        found[f"share {count} as text"] = str(count / sum(COUNTS))[:8].encode()
    found["weight as f32"] = struct.pack("<f", WEIGHT)
    found["weights as f16"] = np.full(4, WEIGHT, np.float16).tobytes()
    found["weight as text"] = str(WEIGHT)[:8].encode()
    found["folder"] = PLACE.encode()
    found["folder, wide"] = PLACE.encode("utf-16-le")
    found["key"] = recording.settings.key.read_bytes().splitlines()[3]
    encoded = {}
    for name, value in found.items():
        for shift in range(3):  # base64 of a longer run that holds the value, wherever it begins
            text = base64.b64encode(bytes(shift) + value)
            encoded[f"{name}, base64 {shift}"] = text[4 * bool(shift) : -4]
        encoded[f"{name}, hex"] = value.hex().encode()
    return found | {name: value for name, value in encoded.items() if len(value) >= 8}


def unpacked(content: bytes) -> bytes:
    """Return what is compressed inside of `content`, wherever it begins."""
    found = b""
    for match in re.finditer(rb"\x1f\x8b\x08|\x78[\x01\x5e\x9c\xda]", content):
        for unpack in (gzip.decompress, zlib.decompress, lambda data: zlib.decompressobj().decompress(data)):
            with suppress(OSError, EOFError, zlib.error):
                found += unpack(content[match.start() :])
    return found


def everything(recording: Recording) -> bytes:
    parts = [call.request for call in recording.calls]
    parts += [name.encode() + b": " + value for call in recording.calls for name, value in call.headers]
    joined = b"\n".join(parts)
    return joined + b"\n" + unpacked(joined)


def test_no_private_value_leaves_in_any_form(recording: Recording) -> None:
    sent = everything(recording)
    assert not [name for name, value in canaries(recording).items() if value in sent]
    for count in COUNTS:
        assert not re.search(rb"(?<![0-9a-zA-Z.])%d(?![0-9a-zA-Z.])" % count, sent), count


def test_the_search_would_find_them(recording: Recording) -> None:
    """The canaries are what the site holds, and the search finds them where they are."""
    folder = recording.settings.data.path.parent if isinstance(recording.settings.data, NpzData) else Path()
    held = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    wanted = canaries(recording)
    for name in ("image 0 as bytes", "image 700 as bytes", "weight as f32", "folder", "key"):
        assert wanted[name] in held, name
    leak = zlib.compress(b"something " + wanted["image 1 as f32"])
    assert wanted["image 1 as f32"] in unpacked(b"\x78 before " + leak)
    assert wanted["image 0 as bytes, base64 1"] in base64.b64encode(b"x" + wanted["image 0 as bytes"] + b"after")


def test_the_card_s_name_does_travel_so_the_recording_is_whole(recording: Recording) -> None:
    assert b"hospital-a" in everything(recording)
    assert "connected to" in recording.log


@pytest.mark.parametrize("sealed", [False, True])
def test_sealed_answers_are_nowhere_on_the_wire_or_in_the_superlink_s_database(tmp_path: Path, sealed: bool) -> None:
    place = Deployment(tmp_path)
    place.start()
    place.add("hospital-a", policy=Policy(sealed_only=sealed))
    settings = load_settings(place.files["hospital-a"], SiteSettings)
    kit = Kit.read(settings.kit)
    peer = Recorder(place.folder / "peer", kit, (place.home.server_certificate, place.home.server_key))
    kit.model_copy(update={"address": peer.address}).write(settings.kit)
    pages, done = set[bytes](), threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for path in place.home.folder.glob("superlink.db*"):
                with suppress(FileNotFoundError):
                    held = path.read_bytes()
                    pages.update(held[at : at + 4096] for at in range(0, len(held), 4096))

    watcher = threading.Thread(target=watch)
    try:
        place.agent("hospital-a")
        place.wait_online("hospital-a")
        watcher.start()
        run = place.submit(place.job(privacy={"sealed": sealed}))
        assert place.ended(run) == "done", place.done("status", run)
    finally:
        done.set()
        watcher.join()
        place.stop()
        peer.close()
    wire = b"".join(call.request for call in peer.calls)
    (store,) = (place.home.runs / run / "answers").glob("*/*/answers.bin")
    rows = store.read_bytes()
    parts = [rows[at : at + 96] for at in range(0, len(rows), 96)]
    assert len(parts) == 4
    for part in parts:
        assert (part in wire) is not sealed
    assert any(part in page for part in parts for page in pages) is not sealed
