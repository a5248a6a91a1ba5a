"""Teachers of filtered amalgamation for tests: networks that answer, and sites that hold a tail behind bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence

import numpy as np
import torch
from flwr.app import RecordDict
from numpy.typing import NDArray
from torch import nn

from consilience.common.cards import BlockCard, TailCard
from consilience.common.files import sha256
from consilience.common.nets.blocks import Blocks, export_tail, rebuild_tail
from consilience.common.preprocessing import preprocess
from consilience.common.tails import BlocksQuestion, Carried, asked, packed
from consilience.server.student.filtered_tasks import Matter, Task, Teacher
from consilience.server.student.remote_tail import RemoteTail
from consilience.server.student.tails import LocalTail
from helpers.feature_answers import PLAIN, log_probs, teacher

Floats = NDArray[np.float32]


class StandIn:
    """A site in this process: what it is asked and what it answers are bytes, and it knows no loss."""

    def __init__(self, network: nn.Module) -> None:
        self.blocks = Blocks(copy.deepcopy(network).eval())
        self.asked: list[tuple[str, int, int]] = []

    def remote(self, name: str, first: int = 1, most: int = 1024) -> RemoteTail:
        """Its tail, as the server has it."""
        return RemoteTail(name, f"teacher of {name}", self.blocks.taps, first, self.ask, self.ask_vjp, most=most)

    def ask(self, block: int, features: Floats) -> Floats:
        """Outputs for features."""
        return _arrays(self.answer(_bytes(block, [features])))[1][0]

    def ask_vjp(self, block: int, features: Floats, gradient: Floats) -> Floats:
        """The gradient of features for one of outputs."""
        return _arrays(self.answer(_bytes(block, [features, gradient])))[1][0]

    def answer(self, question: bytes) -> bytes:
        """The site's side."""
        block, arrays = _arrays(question)
        leaf = torch.from_numpy(arrays[0]).requires_grad_()
        with torch.enable_grad():
            outputs = self.blocks.run(leaf, block, self.blocks.count + 1)
        kind = "outputs" if len(arrays) == 1 else "vjp"
        self.asked.append((kind, block, len(leaf)))
        if kind == "outputs":
            return _bytes(block, [outputs.detach().numpy()])
        (found,) = torch.autograd.grad(outputs, leaf, torch.from_numpy(arrays[1]))
        return _bytes(block, [found.numpy()])


class TailSite:
    """A site's tail behind messages, as the client's would be; `spoil` changes the n-th answer."""

    def __init__(self, network: nn.Module, architecture: str, *, first: int = 1, allow: str = "questions") -> None:
        self.lent = export_tail(network, architecture, first)
        self.blocks = rebuild_tail(self.lent)
        self.taps, self.allow = Blocks(network).taps, allow
        self.asked = 0
        self.spoil: Callable[[RecordDict, int], RecordDict] = lambda content, at: content

    @property
    def card(self) -> TailCard:
        """What the site tells of it."""
        blocks = tuple(BlockCard(name=tap.name, layout=tap.unit, channels=tap.channels) for tap in self.taps)
        return TailCard(
            allow="blocks" if self.allow == "blocks" else "questions",
            architecture=self.lent.architecture,
            first=self.lent.block,
            blocks=blocks,
            fingerprint=sha256(self.lent.tensors + bytes([self.lent.block])),
            bytes=len(self.lent.tensors),
            digest=sha256(self.lent.tensors),
        )

    def answer(self, content: RecordDict) -> RecordDict:
        """Answer a question about features, or for a piece of the blocks."""
        self.asked += 1
        return self.spoil(self._answer(content), self.asked)

    def _answer(self, content: RecordDict) -> RecordDict:
        if self.allow == "blocks":
            piece = BlocksQuestion.from_content(content)
            return Carried(piece, self.lent.tensors[piece.start : piece.stop]).to_content()
        question, given = asked(content)
        leaf = torch.from_numpy(given[0]).requires_grad_()
        with torch.enable_grad():
            outputs = self.blocks.run(leaf, question.block, self.blocks.count + 1)
        found = outputs
        if question.gradient:
            (found,) = torch.autograd.grad(outputs, leaf, torch.from_numpy(given[1]))
        return Carried(question, packed([found.detach().numpy()])).to_content()


def _bytes(block: int, arrays: Sequence[Floats]) -> bytes:
    head = json.dumps([block, [each.shape for each in arrays]]).encode()
    return b"\n".join([head, b"".join(np.ascontiguousarray(each, "<f4").tobytes() for each in arrays)])


def _arrays(data: bytes) -> tuple[int, list[Floats]]:
    head, body = data.split(b"\n", 1)
    block, shapes = json.loads(head)
    found, start = [], 0
    for shape in shapes:
        count = int(np.prod(shape))
        found.append(np.frombuffer(body, "<f4", count, start).reshape(shape).astype(np.float32))
        start += 4 * count
    assert start == len(body)
    return int(block), found


def logits(network: nn.Module, pixels: NDArray[np.uint8]) -> Floats:
    """The network's scores: log-odds of labels that do not exclude one another."""
    with torch.no_grad():
        found: Floats = network(torch.from_numpy(preprocess(pixels, PLAIN))).numpy()
    return found


def local(site: str, architecture: str, network: nn.Module, first: int = 1) -> LocalTail:
    """The site's tail, lent."""
    return LocalTail(site, Blocks(network, first), architecture)


def teaching(
    site: str,
    pixels: NDArray[np.uint8],
    *,
    architecture: str = "cnn3@0.2",
    seed: int = 1,
    classes: int = 3,
    first: int = 1,
    multi: bool = False,
    remote: bool = False,
) -> Teacher:
    """A site with a tail and answers to the images."""
    network = teacher(architecture, seed, classes)
    tail = StandIn(network).remote(site, first) if remote else local(site, architecture, network, first)
    return Teacher(tail, logits(network, pixels) if multi else log_probs(network, pixels), multi)


def everything(teachers: Sequence[Teacher]) -> Matter:
    """All that the teachers know, each class another of the student's, one task a teacher."""
    tasks, classes = [], 0
    for at, each in enumerate(teachers):
        tasks.append(
            Task(
                f"all of {each.tail.site}",
                at,
                tuple(range(each.outputs)),
                tuple(range(classes, classes + each.outputs)),
            )
        )
        classes += each.outputs
    return Matter(teachers, tasks, classes, np.arange(len(teachers[0].answers)))
