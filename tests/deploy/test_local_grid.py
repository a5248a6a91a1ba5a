"""The in-process grid: what Flower's private modules must do for us, and that messages really cross the wire format."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

from consilience.deploy.local_grid import LocalGrid, through_wire


def echo_app(seen: list[Message]) -> ClientApp:
    app = ClientApp()

    @app.query("echo")
    def echo(message: Message, context: Context) -> Message:
        seen.append(message)
        if message.content.config_records["c"].get("fail"):
            raise RuntimeError("secret")
        return Message(message.content, reply_to=message)

    return app


def content(data: np.ndarray, **config: bool) -> RecordDict:
    return RecordDict({"a": ArrayRecord({"x": Array(data)}), "c": ConfigRecord({"k": 1, **config})})


@given(st.binary(max_size=1000))
def test_a_message_arrives_equal_but_not_the_same(data: bytes) -> None:
    seen: list[Message] = []
    sent = content(np.frombuffer(data, np.uint8))
    with LocalGrid(echo_app(seen), [{}], workers=1) as grid:
        (node,) = grid.get_node_ids()
        (reply,) = grid.send_and_receive([Message(sent, dst_node_id=node, message_type="query.echo")])
    assert seen[0].content is not sent
    assert seen[0].content.array_records["a"]["x"] is not sent.array_records["a"]["x"]
    for got in (seen[0].content, reply.content):
        assert got.array_records["a"]["x"].numpy().tobytes() == data
        assert dict(got.config_records["c"]) == {"k": 1}


def test_replies_name_their_message_and_are_given_once() -> None:
    with LocalGrid(echo_app([]), [{}, {}], workers=2) as grid:
        nodes = list(grid.get_node_ids())
        messages = [
            Message(content(np.zeros(1), fail=node == nodes[1]), dst_node_id=node, message_type="query.echo")
            for node in nodes
        ]
        ids = list(grid.push_messages(messages))
        replies: list[Message] = []
        while len(replies) < 2:
            replies += grid.pull_messages(ids)
        assert list(grid.pull_messages(ids)) == []
    by_id = {reply.metadata.reply_to_message_id: reply for reply in replies}
    assert set(by_id) == set(ids)
    assert not by_id[ids[0]].has_error()
    assert by_id[ids[1]].error.reason == "LoadClientAppError" or "secret" not in str(by_id[ids[1]].error.reason)


def test_nodes_answer_side_by_side_and_a_node_one_message_at_a_time() -> None:
    running: set[int] = set()
    most, lock, together = 0, threading.Lock(), threading.Barrier(3, timeout=30)
    app = ClientApp()

    @app.query("meet")
    def meet(message: Message, context: Context) -> Message:
        nonlocal most
        with lock:
            assert context.node_id not in running
            running.add(context.node_id)
            most = max(most, len(running))
        if message.content.config_records["c"]["first"]:
            together.wait()  # passes only when all three nodes are at work at once
        with lock:
            running.discard(context.node_id)
        return Message(RecordDict(), reply_to=message)

    with LocalGrid(app, [{}, {}, {}], workers=3) as grid:
        nodes = list(grid.get_node_ids())
        messages = [
            Message(
                RecordDict({"c": ConfigRecord({"first": i == 0, "i": i})}), dst_node_id=node, message_type="query.meet"
            )
            for node in nodes  # all of the first node's messages come before the second's
            for i in range(4)
        ]
        replies = list(grid.send_and_receive(messages))
    assert not any(reply.has_error() for reply in replies)
    assert len(replies) == 12
    assert most == 3


def test_what_cannot_be_serialised_does_not_pass() -> None:
    message = Message(RecordDict(), dst_node_id=100, message_type="query.echo")
    with pytest.raises(TypeError):
        message.content["bad"] = object()  # type: ignore[assignment]
    assert through_wire(message).metadata.message_type == "query.echo"
