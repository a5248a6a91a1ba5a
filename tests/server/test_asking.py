"""The send loop over the in-process grid, with sites that misbehave in every way we thought of."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from consilience.common.cards import SiteCard
from consilience.common.encoding import encode
from consilience.common.errors import AskingError, StorageError
from consilience.common.progress import Reporter
from consilience.common.protocol import CONTRACT, FINAL_REFUSALS, Agreement, Answer, Contract, Question, Refusal
from consilience.common.settings import Ask
from consilience.deploy.local_grid import LocalGrid
from consilience.server import asking, enrolment, question_size
from consilience.server.answers import AnswerStore
from consilience.server.answers_about import About
from consilience.server.asking import ask
from consilience.server.enrolment import agree, at_least, collect_cards
from consilience.server.events import Events
from consilience.server.messages import UNAVAILABLE
from consilience.server.progress import Progress
from consilience.server.question_size import QuestionSize
from helpers.sites import (
    CLASSES,
    COVERAGE,
    DIGEST,
    POLICY,
    Handler,
    ScriptedGrid,
    Sites,
    covered,
    grid_of,
    honest,
    refusing,
    rows,
)

SIZE = 100
TERMS: dict[str, Any] = {"job": "job", "labels": ("a", "b", "c"), "class_set": (0, 1, 2), "pools": (DIGEST,)}
TERMS |= {"teacher": DIGEST, "encoding": "f16"}


def nothing_enclosed(node: int, agreement: Agreement) -> None:
    assert agreement.enclosed is None


def about(site: str) -> About:
    return About(site=site, pool=DIGEST, size=SIZE, teacher=DIGEST, policy=POLICY, encoding="f32", classes=CLASSES)


def run(tmp_path: Path, sites: Sites, reporter: Reporter, **settings: Any) -> tuple[dict[str, AnswerStore], Any]:
    with grid_of(sites) as grid:
        return run_on(grid, tmp_path, reporter, **settings)


def cards_of(grid: Grid) -> dict[int, SiteCard]:
    return collect_cards(grid, "job", lacking=at_least(1), wait=30, strict=True)[0]


def run_on(
    grid: Grid, tmp_path: Path, reporter: Reporter, cards: dict[int, SiteCard] | None = None, **settings: Any
) -> tuple[dict[str, AnswerStore], Any]:
    chosen = Ask(**{"encoding": "f32", "question_size": 16, **settings})
    cards = cards or cards_of(grid)
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


def test_a_site_whose_limit_is_reached_is_asked_no_more_and_says_why(tmp_path: Path, reporter: Reporter) -> None:
    def limited(question: Question, attempt: int) -> RecordDict:
        if question.stop > 48:
            return Refusal(code="budget-exhausted", reason="the site's limits do not allow more").to_content()
        return honest(question, attempt)

    sites = Sites({"one": limited, "two": honest})
    stores, states = run(tmp_path, sites, reporter, retries=5, in_flight=2)
    assert stores["two"].complete
    assert len(stores["one"]) == 48
    assert states["one"].lost == SIZE - 48
    assert "budget-exhausted, the site's limits do not allow more" in states["one"].failures[-1]
    asked = {start: tries for (name, start), tries in sites.attempts.items() if name == "one"}
    assert set(asked.values()) == {1}
    assert len(asked) <= 3 + 2  # what was on its way already
    (gone,) = (
        e for e in map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines()) if e["event"] == "given-up"
    )
    assert (gone["site"], "budget-exhausted" in gone["reason"]) == ("one", True)


@pytest.mark.parametrize("code", sorted(FINAL_REFUSALS))
def test_a_refusal_that_a_person_must_lift_is_not_asked_again(tmp_path: Path, reporter: Reporter, code: Any) -> None:
    def refuses(question: Question, attempt: int) -> RecordDict:
        return Refusal(code=code, reason="no").to_content()

    sites = Sites({"one": refuses})
    _, states = run(tmp_path, sites, reporter, retries=3, in_flight=1)
    assert sites.attempts == {("one", 0): 1}
    assert states["one"].lost == SIZE


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
        contract = Contract(**TERMS)
        _, reasons = agree(grid, dict.fromkeys(cards_of(grid), contract), wait=30, take=nothing_enclosed)
    assert list(reasons) == [100]
    assert "unknown-pool" in reasons[100]


class Leaves(ScriptedGrid):
    """Its second node goes away after `after` of its questions and comes back once the first has answered all."""

    def __init__(self, sites: Sites, after: int = 2) -> None:
        super().__init__(sites)
        self.sites, self.after, self.left, self.missed = sites, after, False, False

    def pull_messages(self, message_ids: Any) -> Any:
        if not self.left and sum(name == "two" for name, _ in self.sites.attempts) >= self.after:
            self.left = True
            self.leave(101)
        return super().pull_messages(message_ids)

    def looked(self) -> None:
        if self.missed and sum(name == "one" for name, _ in self.sites.attempts) == 7:
            self.away.clear()
        self.missed = self.left


@pytest.mark.parametrize("silent", [False, True])
def test_a_site_that_goes_away_and_returns_is_asked_the_rest(tmp_path: Path, reporter: Reporter, silent: bool) -> None:
    sites = Sites({"one": honest, "two": honest})
    with Leaves(sites) as grid:
        grid.silent = silent
        stores, states = run_on(grid, tmp_path, reporter, retries=0)
    for name in ("one", "two"):
        assert np.array_equal(stores[name].read(0, SIZE), everything())
        assert (states[name].lost, states[name].failures) == (0, [])
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert not [e for e in events if e["event"] == "failed"]
    if silent:  # nothing but the list of nodes told that the site was away
        assert [e["event"] for e in events if e["event"] in ("away", "back")] == ["away", "back"]


def test_a_site_that_stays_away_is_given_up_and_what_it_answered_stays(tmp_path: Path, reporter: Reporter) -> None:
    class Gone(Leaves):
        def looked(self) -> None:
            pass

    def slow(question: Question, attempt: int) -> RecordDict:
        if question.start >= 32:
            released.wait(30)
        return honest(question, attempt)

    released = threading.Event()
    sites = Sites({"one": honest, "two": slow})
    with Gone(sites, after=3) as grid:
        stores, states = run_on(grid, tmp_path, reporter, retries=0, wait=0.3)
        released.set()
    assert stores["one"].complete
    lost = SIZE - len(stores["two"])
    assert lost >= SIZE - 32
    assert states["two"].lost == lost
    assert "it was away for more than 0.3 s" in states["two"].failures[-1]


def test_a_frozen_site_does_not_hold_up_the_end_past_the_deadline(tmp_path: Path, reporter: Reporter) -> None:
    released = threading.Event()

    def freezes(question: Question, attempt: int) -> RecordDict:
        if question.start >= 32:
            released.wait(30)
        return honest(question, attempt)

    with grid_of(Sites({"frozen": freezes, "good": honest})) as grid:
        stores, states = run_on(grid, tmp_path, reporter, deadline=1.0)
        released.set()
    assert np.array_equal(stores["good"].read(0, SIZE), everything())
    assert np.array_equal(stores["frozen"].read(0, 32), everything()[:32])
    assert (len(stores["frozen"]), states["frozen"].lost) == (32, SIZE - 32)
    assert "the deadline of 1 s passed" in states["frozen"].failures[-1]
    assert (states["good"].lost, states["good"].failures) == (0, [])


def test_a_site_that_never_says_anything_is_given_up_without_a_deadline(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "TTL_SECONDS", 0.2)
    with ScriptedGrid(Sites({"deaf": honest, "good": honest})) as grid:
        cards = cards_of(grid)
        grid.swallow[100] = 1000
        stores, states = run_on(grid, tmp_path, reporter, cards, wait=0.2)
    assert (states["deaf"].lost, len(stores["deaf"])) == (SIZE, 0)
    assert "it said nothing" in states["deaf"].failures[-1]
    assert stores["good"].complete


def test_a_question_lost_on_the_way_is_sent_again_at_no_cost(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "TTL_SECONDS", 0.1)
    monkeypatch.setattr(asking, "LOOK_EVERY", 0.1)
    sites = Sites({"one": honest})
    with ScriptedGrid(sites) as grid:
        cards = cards_of(grid)
        grid.swallow[100] = 2  # an agent that was restarted took them along
        stores, states = run_on(grid, tmp_path, reporter, cards, retries=0)
    assert np.array_equal(stores["one"].read(0, SIZE), everything())
    assert (states["one"].lost, states["one"].failures) == (0, [])


def test_a_message_that_the_grid_does_not_take_waits(tmp_path: Path, reporter: Reporter) -> None:
    class Refuses(ScriptedGrid):
        def looked(self) -> None:
            self.refuses.clear()

    with Refuses(Sites({"one": honest})) as grid:
        cards = cards_of(grid)
        looks = grid.looks
        grid.looked = lambda: grid.refuses.clear() if grid.looks > looks + 1 else None  # type: ignore[method-assign]
        grid.refuses.add(100)
        store = AnswerStore(tmp_path / "one", about("one"))
        events, progress = Events(tmp_path / "e.jsonl"), Progress(tmp_path / "progress.json", "job")
        pairs = [(node, store) for node in cards]
        (state,) = ask(grid, "job", pairs, Ask(retries=0), events=events, reporter=reporter, progress=progress)
    assert store.complete
    assert (state.lost, state.failures) == (0, [])


def test_the_job_waits_for_the_sites_it_is_told_to_wait_for() -> None:
    class Late(ScriptedGrid):
        def looked(self) -> None:
            if self.looks == 10:
                self.away.clear()

    with Late(Sites({"one": honest, "two": honest})) as grid:
        grid.away.add(101)
        cards, reasons = collect_cards(grid, "job", lacking=at_least(2), wait=30, strict=True)
    assert sorted(card.name for card in cards.values()) == ["one", "two"]
    assert reasons == {}
    with ScriptedGrid(Sites({"one": honest, "two": honest})) as grid:
        grid.away.add(101)
        with pytest.raises(AskingError, match="1 of 2 sites are connected; there: one"):
            collect_cards(grid, "job", lacking=at_least(2), wait=0.1, strict=True)


def test_a_node_without_a_card_is_left_out_where_enough_others_are_there() -> None:
    with grid_of(Sites({"one": honest, "two": honest}, cards={"two": "../two"})) as grid:
        cards, reasons = collect_cards(grid, "job", lacking=at_least(1), wait=30, strict=False)
        assert [card.name for card in cards.values()] == ["one"]
        assert "Flower's code 2" in reasons["node 101"]
        with pytest.raises(AskingError, match=r"1 of 2 sites are connected; there: one; node 101: .*code 2"):
            collect_cards(grid, "job", lacking=at_least(2), wait=0.1, strict=False)


class AdmittingGrid(ScriptedGrid):
    """A grid that knows the names its nodes were admitted under; `unknown` nodes are listed and have signed off."""

    def __init__(self, sites: Sites, names: dict[int, str]) -> None:
        super().__init__(sites)
        self.names, self.unknown = names, set[int]()

    def admitted(self) -> dict[int, str]:
        return {node: self.names[node] for node in super().get_node_ids() if node not in self.unknown}


def test_a_site_that_signs_off_after_its_card_is_not_taken_under_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class SignsOff(AdmittingGrid):
        """Its second node has signed off whenever its card is looked at, and shows itself when nobody waits for it."""

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            wanted = list(message_ids)
            nodes = {self.sent[identifier].metadata.dst_node_id for identifier in wanted}
            if 101 in nodes and 101 not in self.unknown:
                self.unknown.add(101)
                return []
            return super().pull_messages(wanted)

    monkeypatch.setattr(enrolment, "LOOK_EVERY", 0.0)
    sites = Sites({"one": honest, "two": honest}, cards={"two": "three"})
    with SignsOff(sites, {100: "one", 101: "two"}) as grid:
        cards, reasons = collect_cards(grid, "job", lacking=at_least(1), wait=30, strict=True)
        assert 101 in grid.unknown
        assert ([card.name for card in cards.values()], reasons) == (["one"], {})
        sites.cards.clear()
        grid.unknown.clear()
        grid.pull_messages = super(SignsOff, grid).pull_messages  # type: ignore[method-assign]  # it stays
        cards, _ = collect_cards(grid, "job", lacking=at_least(2), wait=30, strict=True)
    assert sorted(card.name for card in cards.values()) == ["one", "two"]


def test_sites_that_were_admitted_are_called_by_their_names() -> None:
    with AdmittingGrid(Sites({"a": honest, "b": honest}, cards={"b": "../b"}), {100: "a", 101: "berlin"}) as grid:
        _, reasons = collect_cards(grid, "job", lacking=at_least(1), wait=30, strict=False)
        assert "Flower's code 2" in reasons["berlin"]
        with pytest.raises(AskingError, match="Site berlin cannot take part"):
            collect_cards(grid, "job", lacking=at_least(1), wait=30, strict=True)
    with (
        AdmittingGrid(Sites({"a": honest}), {100: "berlin"}) as grid,
        pytest.raises(AskingError, match="Site berlin cannot take part: its card names the site a; its key"),
    ):
        collect_cards(grid, "job", lacking=at_least(1), wait=30, strict=True)


def test_a_site_that_comes_back_as_another_node_is_asked_the_rest(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Moves(AdmittingGrid):
        """Node 100 goes away after two answers; node 101 then is the site under its new key."""

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            if 100 not in self.unknown and len(sites.attempts) > 2:
                self.leave(100)
                self.unknown = {100}
            return super().pull_messages(message_ids)

    monkeypatch.setattr(asking, "LOOK_EVERY", 0.05)
    sites = Sites({"one": honest, "again": honest})
    with Moves(sites, {100: "one", 101: "one"}) as grid:
        grid.silent, grid.unknown = True, {101}
        cards = cards_of(grid)
        stores, states = run_on(grid, tmp_path, reporter, cards, retries=0, in_flight=1, wait=5)
    assert np.array_equal(stores["one"].read(0, SIZE), everything())
    assert (states["one"].node, states["one"].lost, states["one"].failures) == (101, 0, [])
    events = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert events.count("moved") == 1


def test_a_site_that_goes_away_before_it_agreed_may_return(monkeypatch: pytest.MonkeyPatch) -> None:
    contract = Contract(**TERMS)

    class Short(ScriptedGrid):
        """Its node is listed, but gone at the first contract, and back at the second."""

        contracts = 0

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            held = list(messages)
            if held and held[0].metadata.message_type == CONTRACT:
                self.contracts += 1
                self.away = {100} if self.contracts == 1 else set()
            identifiers = super().push_messages(held)
            self.away.clear()
            return identifiers

    with Short(Sites({"one": honest})) as grid:
        contracts = dict.fromkeys(cards_of(grid), contract)
        agreements, reasons = agree(grid, contracts, wait=30, take=nothing_enclosed)
        assert (agreements.keys(), reasons) == (contracts.keys(), {})
        assert grid.contracts == 2
    with ScriptedGrid(Sites({"one": honest, "two": honest})) as grid:
        contracts = dict.fromkeys(cards_of(grid), contract)
        grid.leave(101)
        monkeypatch.setattr(enrolment, "PATIENCE", 0.2)
        _, reasons = agree(grid, contracts, wait=30, take=nothing_enclosed)
    assert reasons == {101: "it went away before it agreed to the contract"}


def test_absence_is_what_flower_calls_it() -> None:
    codes = {ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE}
    assert codes == UNAVAILABLE


def test_questions_grow_to_two_seconds_of_the_teachers_work(tmp_path: Path, reporter: Reporter) -> None:
    size = 8192
    asked: list[tuple[int, int]] = []

    def timed(question: Question, attempt: int) -> RecordDict:
        asked.append((question.start, question.stop))
        return Answer(question, encode(rows(question), "f32"), len(question) / 1100).to_content()

    store = AnswerStore(tmp_path / "one", about("one").model_copy(update={"size": size}))
    with grid_of(Sites({"one": timed})) as grid:
        pairs = [(node, store) for node in cards_of(grid)]
        events, progress = Events(tmp_path / "e.jsonl"), Progress(tmp_path / "progress.json", "job")
        ask(grid, "job", pairs, Ask(in_flight=1), events=events, reporter=reporter, progress=progress)
    # 2,200 samples in two seconds: from 256 at once to 2,048, every cut at a multiple of the size.
    assert asked == [(0, 256), (256, 2048), *((s, s + 2048) for s in range(2048, size, 2048))]
    assert store.complete


def test_the_first_question_is_alone_until_it_says_how_fast_the_site_is(tmp_path: Path, reporter: Reporter) -> None:
    sites, asked, first = Sites({"one": honest}), [], threading.Event()

    def slow(question: Question, attempt: int) -> RecordDict:
        asked.append(question.start)
        if question.start == 0:
            first.wait(0.3)
            assert asked == [0]
        return Answer(question, encode(rows(question), "f32"), 1e-3).to_content()

    sites.handlers["one"] = slow
    store = AnswerStore(tmp_path / "one", about("one").model_copy(update={"size": 200_000}))
    with grid_of(sites) as grid:
        pairs = [(node, store) for node in cards_of(grid)]
        events, progress = Events(tmp_path / "e.jsonl"), Progress(tmp_path / "progress.json", "job")
        ask(grid, "job", pairs, Ask(), events=events, reporter=reporter, progress=progress)
    assert asked == [0, 256, 65_536, 131_072, 196_608]
    assert store.complete


def test_a_site_whose_speed_is_known_is_asked_at_once(tmp_path: Path, reporter: Reporter) -> None:
    asked: list[int] = []

    def fast(question: Question, attempt: int) -> RecordDict:
        asked.append(question.start)
        return Answer(question, encode(rows(question), "f32"), 1e-3).to_content()

    store = AnswerStore(tmp_path / "one", about("one").model_copy(update={"size": 100_000}))
    with grid_of(Sites({"one": fast})) as grid:
        pairs = [(node, store) for node in cards_of(grid)]
        events, progress = Events(tmp_path / "e.jsonl"), Progress(tmp_path / "progress.json", "job")
        tried = {"one": (256, 256 / 20_000)}
        ask(grid, "job", pairs, Ask(), events=events, reporter=reporter, progress=progress, tried=tried)
    assert asked[0] == 0
    assert asked[1:] == [32_768, 65_536, 98_304]


@pytest.mark.parametrize(
    ("row", "rate", "size"),
    [
        (20, 1e9, 65_536),  # no more than this, however fast
        (2_000, 1e9, 4_096),  # 16 MB of answers at most: 8,000 rows
        (200_000, 1e9, 64),
        (20, 1, 256),  # nor less than a batch, however slow
        (20, 1_000, 1_024),
        (20, None, 256),
    ],
)
def test_tuned_question_sizes_have_limits(row: int, rate: float | None, size: int) -> None:
    tuned = QuestionSize(None, row)
    for _ in range(20 if rate else 0):
        tuned.learn(tuned.size, tuned.size / (rate or 1))
    assert tuned.size == size


def test_a_site_that_slows_down_is_asked_less_at_once() -> None:
    tuned = QuestionSize(None, 20)
    tuned.learn(256, 0.01)
    sizes = [tuned.size]
    for _ in range(3):
        tuned.learn(tuned.size, tuned.size / 1000)
        sizes.append(tuned.size)
    assert sizes == [32_768, 16_384, 8_192, 4_096]


@pytest.mark.parametrize(
    ("size", "rate", "many"), [(None, 2, 1), (None, 5, 2), (None, 1e6, 4), (100, 2, 3), (100, 0.1, 1), (100, 1e6, 4)]
)
def test_a_slow_site_has_fewer_questions_on_their_way(size: int | None, rate: float, many: int) -> None:
    asked = QuestionSize(size, 20)
    asked.learn(100, 100 / rate)
    assert asked.at_once(4, seconds=150) == many


def test_a_size_that_is_given_stays() -> None:
    fixed = QuestionSize(100, 20)
    fixed.learn(100, 1e-6)
    assert fixed.known
    assert [fixed.end(0, 1000), fixed.end(130, 1000), fixed.end(130, 150)] == [100, 200, 150]


def test_progress_can_be_read_while_asking(tmp_path: Path, reporter: Reporter) -> None:
    seen: list[dict[str, Any]] = []

    def looks(question: Question, attempt: int) -> RecordDict:
        if question.start == 96:
            seen.append(json.loads((tmp_path / "progress.json").read_text()))
        return refusing(question, attempt) if question.start == 0 else honest(question, attempt)

    run(tmp_path, Sites({"one": looks}), reporter, retries=0)
    final = json.loads((tmp_path / "progress.json").read_text())
    (during,), (after,) = seen[0]["sites"], final["sites"]
    assert (during["name"], during["online"], during["asked"]) == ("one", True, SIZE)
    assert (after["answered"], after["asked"], after["failures"]) == (84, SIZE, 1)
    assert after["bytes"] == 84 * CLASSES * 4
    assert after["rate"] > 0
    assert "teacher-failed" in after["reason"]


def test_events_survive_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    Events(path).add("one")
    path.write_text(path.read_text() + '{"event": "tor')
    Events(path).add("two", site="a")
    lines = path.read_text().splitlines()
    assert [json.loads(lines[i])["event"] for i in (0, 2)] == ["one", "two"]


@pytest.mark.parametrize("first", ["coverage", "log-probs"])
def test_a_node_is_asked_for_both_kinds_in_questions_that_the_wider_one_allows(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    monkeypatch.setattr(question_size, "MOST_BYTES", 12 * 32)  # 32 samples of three classes, 192 of coverage
    asked: list[Question] = []

    def noted(question: Question, attempt: int) -> RecordDict:
        asked.append(question)
        return honest(question, attempt)

    coverage = About(
        site="one", pool=DIGEST, size=SIZE, teacher=COVERAGE, policy=POLICY, kind="coverage", encoding="f16", classes=1
    )
    log_probs = AnswerStore(tmp_path / "one", about("one"))
    covers = AnswerStore(tmp_path / "one-coverage", coverage)
    progress = Progress(tmp_path / "progress.json", "job")
    with grid_of(Sites({"one": noted})) as grid:
        (node,) = grid.get_node_ids()
        pairs = [(node, covers), (node, log_probs)]
        (state,) = ask(
            grid,
            "job",
            pairs if first == "coverage" else pairs[::-1],
            Ask(encoding="f32"),
            events=Events(tmp_path / "events.jsonl"),
            reporter=reporter,
            progress=progress,
        )
    assert (state.asked, state.lost, state.failures) == (2 * SIZE, 0, [])
    assert np.array_equal(log_probs.read(0, SIZE), everything())
    whole = asked[0].model_copy(update={"start": 0, "stop": SIZE})
    assert np.array_equal(covers.read(0, SIZE)[:, 0], covered(whole))
    assert max(len(question) for question in asked) <= 32
    assert asked[0].kind == first
    view = progress.sites["one"].view()
    assert (view["asked"], view["answered"], view["bytes"]) == (2 * SIZE, 2 * SIZE, SIZE * (4 * CLASSES + 2))
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert {(e["kind"], e["start"]) for e in events if e["event"] == "answered"} == {(q.kind, q.start) for q in asked}
