"""Sites that answer one kind of question with the other, or with numbers that are no coverage: none of it is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict

from consilience.common.encoding import encode, encode_coverage
from consilience.common.progress import Reporter
from consilience.common.protocol import Answer, Question
from consilience.common.settings import Ask
from consilience.server.answers import AnswerStore
from consilience.server.answers_about import About
from consilience.server.asking import ask
from consilience.server.events import Events
from consilience.server.progress import Progress
from helpers.sites import CLASSES, COVERAGE, DIGEST, POLICY, Handler, Sites, covered, grid_of, honest, rows

SIZE = 40


def gives(change: Callable[[np.ndarray], np.ndarray]) -> Handler:
    """Answer questions about coverage with changed numbers, others honestly."""

    def handler(question: Question, attempt: int) -> RecordDict:
        if question.kind == "log-probs":
            return honest(question, attempt)
        return Answer(question, change(covered(question)).astype("<f2").tobytes(), 0.1).to_content()

    return handler


def last(value: float) -> Handler:
    """Make the last number of each answer another one: all that came with it is refused."""
    return gives(lambda told: np.append(told[:-1], value))


def says_log_probs(question: Question, attempt: int) -> RecordDict:
    """Answer a question about coverage as if it had been about log-probabilities."""
    if question.kind == "log-probs":
        return honest(question, attempt)
    return honest(question.model_copy(update={"kind": "log-probs"}), attempt)


def sends_log_probs(question: Question, attempt: int) -> RecordDict:
    """Repeat a question about coverage, and send log-probabilities."""
    if question.kind == "log-probs":
        return honest(question, attempt)
    return Answer(question, encode(rows(question), "f16"), 0.1).to_content()


def says_coverage(question: Question, attempt: int) -> RecordDict:
    """Answer a question about log-probabilities as if it had been about coverage."""
    if question.kind == "coverage":
        return honest(question, attempt)
    return honest(question.model_copy(update={"kind": "coverage", "teacher": COVERAGE}), attempt)


def sends_coverage(question: Question, attempt: int) -> RecordDict:
    """Repeat a question about log-probabilities, and send coverage."""
    if question.kind == "coverage":
        return honest(question, attempt)
    return Answer(question, encode_coverage(covered(question), "f16"), 0.1).to_content()


def of_another(question: Question, attempt: int) -> RecordDict:
    """Answer about coverage in the name of the teacher."""
    told = honest(question, attempt)
    if question.kind == "log-probs":
        return told
    answer = Answer.from_content(told, question)
    return Answer(question.model_copy(update={"teacher": DIGEST}), answer.data, 0.1).to_content()


@pytest.mark.parametrize(
    ("handler", "spoilt", "words"),
    [
        (last(np.nan), "coverage", "row 15 is nan, not a number from 0 to 1"),
        (last(2.0), "coverage", "row 15 is 2, not"),
        (last(-0.25), "coverage", "row 15 is -0.25, not"),
        (last(np.inf), "coverage", "row 15 is inf, not"),
        (gives(lambda told: told[:-1]), "coverage", "30 bytes; allowed: 32"),
        (gives(lambda told: np.repeat(told, 10)), "coverage", "320 bytes; allowed: 32"),
        (gives(lambda told: told[:0]), "coverage", "0 bytes; allowed: 32"),
        (says_log_probs, "coverage", "answer's kind is not the question's"),
        (sends_log_probs, "coverage", "96 bytes; allowed: 32"),
        (of_another, "coverage", "answer's teacher is not the question's"),
        (says_coverage, "log-probs", "answer's kind is not the question's"),
        (sends_coverage, "log-probs", "32 bytes; allowed: 96"),
    ],
)
def test_what_is_not_the_kind_of_answer_that_was_asked_for_is_not_kept(
    tmp_path: Path, handler: Handler, spoilt: str, words: str
) -> None:
    abouts = {
        "log-probs": About(
            site="bad", pool=DIGEST, size=SIZE, teacher=DIGEST, policy=POLICY, encoding="f16", classes=CLASSES
        ),
        "coverage": About(
            site="bad",
            pool=DIGEST,
            size=SIZE,
            teacher=COVERAGE,
            policy=POLICY,
            kind="coverage",
            encoding="f16",
            classes=1,
        ),
    }
    names: tuple[str, ...] = ("bad", "good")
    sites = Sites({"bad": handler, "good": honest})
    with Reporter(quiet=True) as reporter, grid_of(sites) as grid:
        nodes: dict[str, int] = dict(zip(names, sorted(grid.get_node_ids()), strict=True))
        stores = {
            (name, kind): AnswerStore(tmp_path / f"{name}-{kind}", about.model_copy(update={"site": name}))
            for name in nodes
            for kind, about in abouts.items()
        }
        states = ask(
            grid,
            "job",
            [(nodes[name], store) for (name, _), store in stores.items()],
            Ask(encoding="f16", question_size=16, retries=1),
            events=Events(tmp_path / "events.jsonl"),
            reporter=reporter,
            progress=Progress(tmp_path / "progress.json", "job"),
        )
    lengths = {key: len(store) for key, store in stores.items()}
    assert lengths == {key: 0 if key == ("bad", spoilt) else SIZE for key in lengths}
    bad = next(state for state in states if state.name == "bad")
    assert bad.lost == SIZE
    assert len(bad.failures) == 6  # three questions, each sent again once
    assert any(words in reason for reason in bad.failures)
    assert not (tmp_path / f"bad-{spoilt}" / "answers.bin").exists()
