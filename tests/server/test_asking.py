"""The send loop over the in-process grid, with sites that misbehave in every way we thought of."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from consilience.common.encoding import encode
from consilience.common.errors import AskingError, StorageError
from consilience.common.progress import Reporter
from consilience.common.protocol import Answer, Contract, Question, SiteCard
from consilience.common.settings import Ask
from consilience.deploy.local_grid import LocalGrid
from consilience.server.answers import About, AnswerStore
from consilience.server.asking import ask
from consilience.server.enrolment import agree, at_least, collect_cards
from consilience.server.events import Events
from consilience.server.progress import Progress
from helpers.sites import CLASSES, DIGEST, POLICY, Handler, Sites, grid_of, honest, refusing, rows

SIZE = 100


def about(site: str) -> About:
    return About(site=site, pool=DIGEST, size=SIZE, teacher=DIGEST, policy=POLICY, encoding="f32", classes=CLASSES)


@pytest.fixture
def reporter() -> Iterator[Reporter]:
    with Reporter(quiet=True) as quiet:
        yield quiet


def run(tmp_path: Path, sites: Sites, reporter: Reporter, **settings: Any) -> tuple[dict[str, AnswerStore], Any]:
    with grid_of(sites) as grid:
        return run_on(grid, tmp_path, reporter, **settings)


def cards_of(grid: Grid) -> dict[int, SiteCard]:
    return collect_cards(grid, "job", lacking=at_least(1), wait=30, strict=True)[0]


def run_on(grid: Grid, tmp_path: Path, reporter: Reporter, **settings: Any) -> tuple[dict[str, AnswerStore], Any]:
    chosen = Ask(**{"encoding": "f32", "question_size": 16, **settings})
    cards = cards_of(grid)
    stores = {card.name: AnswerStore(tmp_path / card.name, about(card.name)) for card in cards.values()}
    pairs = [(node, stores[card.name]) for node, card in cards.items()]
    events, progress = Events(tmp_path / "events.jsonl"), Progress(tmp_path / "progress.json", "job")
    states = ask(grid, "job", pairs, chosen, events=events, reporter=reporter, progress=progress)
    return stores, {state.name: state for state in states}


def everything() -> np.ndarray:
    return rows(Question(job="job", pool=DIGEST, start=0, stop=SIZE, encoding="f32", teacher=DIGEST, policy=POLICY))


def test_honest_sites_are_asked_once_about_every_sample(tmp_path: Path, reporter: Reporter) -> None:
    sites = Sites({"one": honest, "two": honest})
    stores, states = run(tmp_path, sites, reporter)
    for name, store in stores.items():
        assert np.array_equal(store.read(0, SIZE), everything())
        assert (states[name].asked, states[name].lost, states[name].failures) == (SIZE, 0, [])
    assert sites.attempts == {(name, start): 1 for name in ("one", "two") for start in range(0, SIZE, 16)}
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert sum(e["stop"] - e["start"] for e in events if e["event"] == "answered") == 2 * SIZE


def test_only_what_is_missing_is_asked(tmp_path: Path, reporter: Reporter) -> None:
    store = AnswerStore(tmp_path / "one", about("one"))
    for start, stop in [(0, 20), (50, 60)]:
        question = Question(
            job="job", pool=DIGEST, start=start, stop=stop, encoding="f32", teacher=DIGEST, policy=POLICY
        )
        store.append(Answer(question, encode(rows(question), "f32"), 0.0))
    sites = Sites({"one": honest})
    stores, states = run(tmp_path, sites, reporter)
    assert states["one"].asked == 70
    assert {start for _, start in sites.attempts} == {20, 32, 48, 60, 64, 80, 96}
    assert np.array_equal(stores["one"].read(0, SIZE), everything())


def test_a_question_that_fails_is_asked_again(tmp_path: Path, reporter: Reporter) -> None:
    def shaky(question: Question, attempt: int) -> RecordDict:
        if attempt <= 2:
            raise OSError("a secret path: /data/patients")
        return honest(question, attempt)

    stores, states = run(tmp_path, Sites({"one": shaky, "two": honest}), reporter, retries=2)
    assert stores["one"].complete
    assert stores["two"].complete
    assert states["one"].lost == 0
    assert len(states["one"].failures) == 14
    assert "secret" not in (tmp_path / "events.jsonl").read_text()


def wrong_ids(question: Question, attempt: int) -> RecordDict:
    return honest(question.model_copy(update={"start": question.start + 1, "stop": question.stop + 1}), attempt)


def too_many(question: Question, attempt: int) -> RecordDict:
    return Answer(question, encode(np.repeat(rows(question), 10, axis=0), "f32"), 0.0).to_content()


def not_a_number(question: Question, attempt: int) -> RecordDict:
    return Answer(question, encode(np.full_like(rows(question), np.nan), "f32"), 0.0).to_content()


def nothing(question: Question, attempt: int) -> RecordDict:
    return RecordDict()


def rubbish(question: Question, attempt: int) -> RecordDict:
    return RecordDict({"record": ConfigRecord({"json": "[]"})})


@pytest.mark.parametrize("bad", [wrong_ids, too_many, not_a_number, nothing, rubbish, refusing])
def test_a_bad_site_is_given_up_and_the_others_go_on(tmp_path: Path, reporter: Reporter, bad: Handler) -> None:
    sites = Sites({"bad": bad, "good": honest})
    stores, states = run(tmp_path, sites, reporter, retries=1)
    assert np.array_equal(stores["good"].read(0, SIZE), everything())
    assert len(stores["bad"]) == 0
    assert states["bad"].lost == SIZE
    assert {n for (name, _), n in sites.attempts.items() if name == "bad"} == {2}


def test_no_more_questions_fly_than_allowed(tmp_path: Path, reporter: Reporter) -> None:
    flying, most, lock = 0, 0, threading.Lock()

    class Counting(LocalGrid):
        def push_messages(self, messages: Any) -> Any:
            nonlocal flying, most
            messages = list(messages)
            if messages[0].metadata.message_type == "query.answer":
                with lock:
                    flying += len(messages)
                    most = max(most, flying)
            return super().push_messages(messages)

        def pull_messages(self, message_ids: Any) -> Any:
            nonlocal flying
            replies = list(super().pull_messages(message_ids))
            flying -= len([r for r in replies if r.metadata.message_type == "query.answer"])
            return replies

    sites = Sites({"one": honest})
    with Counting(sites.app, [{"name": "one"}], workers=2) as grid:
        (node,) = cards_of(grid)
        store = AnswerStore(tmp_path / "one", about("one"))
        settings = Ask(question_size=4, in_flight=3)
        events, progress = Events(tmp_path / "e.jsonl"), Progress(tmp_path / "progress.json", "job")
        ask(grid, "job", [(node, store)], settings, events=events, reporter=reporter, progress=progress)
    assert store.complete
    assert most == 3


def test_a_full_disk_stops_the_asking_and_keeps_what_arrived(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, stored = AnswerStore.append, 0

    def append(self: AnswerStore, answer: Answer) -> None:
        nonlocal stored
        if stored == 3:
            raise StorageError("Cannot write answers.bin: No space left on device")
        real(self, answer)
        stored += 1

    monkeypatch.setattr(AnswerStore, "append", append)
    with pytest.raises(StorageError):
        run(tmp_path, Sites({"one": honest}), reporter)
    monkeypatch.undo()
    kept = AnswerStore(tmp_path / "one", about("one"))
    assert len(kept) in (48, 36)
    stores, _ = run(tmp_path, Sites({"one": honest}), reporter)
    assert np.array_equal(stores["one"].read(0, SIZE), everything())


def test_sites_that_cannot_take_part_are_named() -> None:
    def collect(sites: Sites) -> None:
        with grid_of(sites) as grid:
            collect_cards(grid, "job", lacking=at_least(1), wait=0.1, strict=True)

    with pytest.raises(AskingError, match="No site is connected"):
        collect(Sites({}))
    with (
        grid_of(Sites({"one": honest, "two": honest}, cards={"two": "one"})) as grid,
        pytest.raises(AskingError, match="called one"),
    ):
        cards_of(grid)
    with (
        grid_of(Sites({"one": honest}, cards={"one": "../one"})) as grid,
        pytest.raises(AskingError, match="Node 100 cannot"),
    ):
        cards_of(grid)
    with grid_of(Sites({"stubborn": honest})) as grid:
        contract = Contract(job="job", labels=("a", "b", "c"), class_set=(0, 1, 2), pools=(DIGEST,), teacher=DIGEST)
        reasons = agree(grid, dict.fromkeys(cards_of(grid), contract), wait=30)
    assert list(reasons) == [100]
    assert "unknown-pool" in reasons[100]


def test_events_survive_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    Events(path).add("one")
    path.write_text(path.read_text() + '{"event": "tor')
    Events(path).add("two", site="a")
    lines = path.read_text().splitlines()
    assert [json.loads(lines[i])["event"] for i in (0, 2)] == ["one", "two"]
