"""Agents of registered sites whose software was changed to do harm: `python -m helpers.hostile BEHAVIOUR=SITE.YAML...`.

Key, connection and protocol are real; what they answer, or how they send it, is not as it should be. All run as
threads of one process.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
from flwr.app import Context, Error, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_object_id

from consilience.client import agent as agents
from consilience.client.agent import Agent
from consilience.client.agent_cli import LogForm, log_to_stderr, papers
from consilience.client.app import app as honest
from consilience.client.fleet import Fleet, GrpcFleet, _call
from consilience.common.cards import SiteCard
from consilience.common.identity import Kit, PrivateKey
from consilience.common.protocol import ANSWER, CARD, Answer, Question
from consilience.common.settings import SiteSettings
from consilience.common.settings_file import load_settings

VICTIM = "hospital-a"
CHUNKS = 3 * 2**30 // (5 * 2**20)
"""Pieces of 5 MB in 3 GB."""
behaviours: dict[str, str] = {}
"""Site file -> what it does."""
kept: dict[str, Message] = {}
"""Site file -> its first answer."""


def changed(answer: Answer, **fields: Any) -> RecordDict:
    """Return an answer whose question says something else."""
    question = Question.model_construct(**{**answer.question.model_dump(), **fields})
    return Answer(question, answer.data, answer.seconds).to_content()


def respond(message: Message, context: Context) -> Message:
    """Answer as the site's behaviour is."""
    site = str(context.node_config["site"])
    behaviour, kind = behaviours[site], message.metadata.message_type
    reply = honest(message, context)
    if behaviour == "impostor" and kind == CARD:
        card = SiteCard.from_content(reply.content)
        return Message(card.model_copy(update={"name": VICTIM}).to_content(), reply_to=message)
    if kind != ANSWER:
        return reply
    question = Question.from_content(message.content)
    answer = Answer.from_content(reply.content, question)
    rows = np.frombuffer(answer.data, np.float16)
    contents = {
        "nan": lambda: Answer(question, np.full_like(rows, np.nan).tobytes(), 0.1).to_content(),
        "scores": lambda: Answer(question, (rows * 3).tobytes(), 0.1).to_content(),
        "narrow": lambda: Answer(question, rows[: 2 * len(question)].tobytes(), 0.1).to_content(),
        "tenfold": lambda: Answer(question, answer.data * 10, 0.1).to_content(),
        "others": lambda: changed(answer, start=question.start + 100, stop=question.stop + 100),
        "stranger": lambda: changed(answer, teacher="b" * 64),
    }
    if behaviour in contents:
        return Message(contents[behaviour](), reply_to=message)
    if behaviour == "old":
        first = kept.setdefault(site, reply)
        return reply if first is reply else Message(first.content, reply_to=message)
    if behaviour == "raising":
        return Message(Error(2, "canary-of-a-traceback"), reply_to=message)
    return reply


class HostileFleet(GrpcFleet):
    """The site's connection, which sends answers in ways of its own."""

    behaviour = ""

    def send(self, reply: Message, seconds: float) -> None:
        """Send a reply as the behaviour is."""
        if reply.metadata.message_type == ANSWER and reply.has_content():
            if self.behaviour == "endless":
                self._announce(reply, os.urandom(32).hex(), [os.urandom(32).hex() for _ in range(CHUNKS)])
                return None
            if self.behaviour == "stalling":
                self._announce(reply, os.urandom(32).hex(), [])
                return None
            if self.behaviour == "garbage":
                return self._push(reply, b"Message  17\x00\xff" + os.urandom(16))
            if self.behaviour == "cuckoo":
                return self._push(reply, self._of_another(reply).deflate())
            if self.behaviour == "heavy":
                self._heavy(reply)
        return super().send(reply, seconds)

    def _announce(self, reply: Message, root: str, parts: list[str]) -> str:
        """Announce a reply of these objects; return the number of its upload."""
        reply.metadata.__dict__["_message_id"] = root
        request = PushMessagesRequest(
            node=self._node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[ObjectTree(object_id=root, children=[ObjectTree(object_id=each) for each in parts])],
            clientapp_runtime_list=[0.1],
        )
        return str(_call(self._stub.PushMessages, request, 30.0).session_id)

    def _push(self, reply: Message, content: bytes) -> None:
        """Send a reply that is one object of these bytes."""
        upload = self._announce(reply, get_object_id(content), [])
        request = PushObjectRequest(
            node=self._node,
            run_id=reply.metadata.run_id,
            session_id=upload,
            object_id=get_object_id(content),
            object_content=content,
        )
        print("pushed:", _call(self._stub.PushObject, request, 30.0).stored, file=sys.stderr)

    def _of_another(self, reply: Message) -> Message:
        """Return a message that says it comes from another node, in answer to another message."""
        about = reply.metadata
        metadata = Metadata(
            run_id=about.run_id,
            message_id="",
            src_node_id=about.src_node_id + 1,
            dst_node_id=about.dst_node_id,
            reply_to_message_id="c" * 64,
            group_id=about.group_id,
            created_at=about.created_at,
            ttl=about.ttl,
            message_type=about.message_type,
        )
        return make_message(metadata=metadata, error=Error(2, "x"))

    def _heavy(self, reply: Message) -> None:
        """Try to send an object that is larger than any of ours."""
        content = bytes(65 * 2**20)
        request = PushObjectRequest(
            node=self._node,
            run_id=reply.metadata.run_id,
            session_id="x",
            object_id=get_object_id(content),
            object_content=content,
        )
        try:
            self._stub.PushObject(request, timeout=60)
        except grpc.RpcError as error:
            print("heavy:", error.code().name, file=sys.stderr)


def serve(behaviour: str, path: Path) -> None:
    """Run one site's agent."""
    settings = load_settings(path, SiteSettings)
    key, kit = papers(settings)
    behaviours[str(path)] = behaviour
    Agent(path, settings.state, kit, key).run()


def main() -> None:
    """Run all of them until killed."""
    log_to_stderr(LogForm.PLAIN)
    agents.app = respond  # type: ignore[assignment]
    held = dict(word.split("=", 1) for word in sys.argv[1:])
    of_kit = {load_settings(Path(path), SiteSettings).name: name for name, path in held.items()}

    def open_hostile(kit: Kit, key: PrivateKey, node: int | None = None) -> Fleet:
        fleet = HostileFleet(kit, key, node)
        fleet.behaviour = of_kit[kit.site]
        return fleet

    agents.open_fleet = open_hostile
    for behaviour, path in held.items():
        threading.Thread(target=serve, args=(behaviour, Path(path)), daemon=True).start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
