"""The send loop: questions over a Flower Grid, answers into the stores, whatever the sites do meanwhile.

Lives here: who is asked what and when, how failures, absence and silence are counted. Does not live here: which
samples a job wants (server/job), who takes part (server/enrolment), how messages travel (the Grid is whatever the
caller has: in-process or Flower's own).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from flwr.app import Message
from flwr.serverapp import Grid

from consilience.common.errors import ProtocolError
from consilience.common.job_key import JobKey
from consilience.common.progress import Reporter, Task
from consilience.common.protocol import ANSWER, Answer, Question, RefusedReplyError
from consilience.common.sealing import unseal_answer
from consilience.common.settings import Ask
from consilience.server.answers import AnswerStore
from consilience.server.events import Events
from consilience.server.messages import Backoff, compose, content_of, is_absence, online_nodes, pull, push
from consilience.server.progress import Progress, SiteProgress
from consilience.server.question_size import QuestionSize
from consilience.server.trust import Unsealing

TTL_SECONDS = 300.0
"""How long a question waits for its answer before it counts as lost on the way (its site was restarted, or the grid
forgot it) and is sent again, with twice the time."""
LOOK_EVERY = 1.0
"""Seconds between two looks at who is online."""


@dataclass
class SiteState:
    """How asking one site went."""

    name: str
    node: int
    """Where it was seen last: a site whose key was renewed, or that was suspended for a while, is another node."""
    asked: int = 0
    """Samples that were not answered before."""
    failures: list[str] = field(default_factory=list)
    """Reasons of failed questions, oldest first, and why the site was given up, if it was."""
    lost: int = 0
    """Samples given up."""


def ask(
    grid: Grid,
    job: str,
    stores: Sequence[tuple[int, AnswerStore]],
    settings: Ask,
    *,
    events: Events,
    reporter: Reporter,
    progress: Progress,
    tried: Mapping[str, tuple[int, float]] = MappingProxyType({}),
    passed: float = 0.0,
    unsealing: Unsealing | None = None,
) -> list[SiteState]:
    """Ask until every store has all that is chosen, its site is given up, or `settings.deadline` has passed.

    `stores` pairs a node id with a store; a node may stand in several pairs (pools, kinds). Questions to one node
    keep at most `settings.in_flight` on their way; answers are stored as they arrive. A question that fails is sent
    again `settings.retries` times. A node that is away keeps its questions waiting, at no cost of retries, until it
    is back, as another node if need be; without a deadline it is given up after `settings.wait` seconds, as is one
    that is there and says nothing (but not before `TTL_SECONDS`). `tried` says for some sites how many samples took
    their teacher how many seconds: questions are sized by it. `passed` seconds of the deadline went by before, as when
    the server was killed while it asked. `unsealing`: what answers are to be sealed for. Raises `StorageError` when an
    answer cannot be stored, and `IdentityError` when the authority's key is gone when another job key is due: what had
    arrived before is safe, and nothing more is asked.
    """
    asking = _Asking(grid, job, settings, events, reporter, progress, time.monotonic() - passed, unsealing)
    held: dict[int, list[AnswerStore]] = {}
    for node, store in stores:
        held.setdefault(node, []).append(store)
    for node, own in held.items():
        asking.add(node, own)
    for site in asking.sites.values():
        if (samples_seconds := tried.get(site.state.name, (0, 0.0)))[0]:
            site.size.learn(*samples_seconds)
    asking.run()
    return [site.state for site in asking.sites.values()]


@dataclass
class _Pending:
    question: Question
    store: AnswerStore
    tries: int = 0
    sent: float = 0.0
    ttl: float = 0.0


@dataclass
class _Span:
    """Samples low..high-1 of a store, not yet cut into questions."""

    store: AnswerStore
    low: int
    high: int


class _Site:
    """What is still to ask one site, and how it behaves."""

    def __init__(self, state: SiteState, progress: SiteProgress, size: QuestionSize, now: float) -> None:
        self.state, self.progress, self.size = state, progress, size
        self.first: deque[_Pending] = deque()  # questions that found nobody there, to be sent before all else
        self.spans: deque[_Span] = deque()
        self.last: deque[_Pending] = deque()  # questions that failed, to be sent after all else
        self.flying: dict[str, _Pending] = {}
        self.listed = True  # the grid says that the node is online
        self.paused = False  # the grid refused or returned a question since the last look
        self.heard = self.seen = now
        self.ttl = TTL_SECONDS
        self.task: Task | None = None

    def take(self, job: str, job_key: JobKey | None) -> _Pending | None:
        """Return the next question to send."""
        if self.first:
            return self.first.popleft()
        if not self.spans:
            return self.last.popleft() if self.last else None
        span = self._next()
        about = span.store.about
        stop = span.store.reach(span.low, self.size.end(span.low, span.high))
        asked = span.store.range(span.low, stop)
        question = Question(
            job=job,
            pool=about.pool,
            start=asked.start,
            stop=asked.stop,
            subset=asked.subset,
            kind=about.kind,
            encoding=about.encoding,
            teacher=about.teacher,
            policy=about.policy,
            job_key=job_key,
        )
        span.low = stop
        if span.low == span.high:
            self.spans.remove(span)
        return _Pending(question, span.store)

    def _next(self) -> _Span:
        """Return what to ask about next: of features the first samples of every tap, so that a site that knows which
        taps a job asks for computes them in one pass."""
        first = self.spans[0]
        if first.store.about.kind != "features":
            return first
        return min((span for span in self.spans if span.store.about.kind == "features"), key=lambda span: span.low)

    @property
    def open(self) -> bool:
        return bool(self.first or self.spans or self.last or self.flying)

    def drop(self, *, flying: bool = True) -> int:
        """Forget every question, or those alone that are not on their way; returns how many samples they were about."""
        questions = [*self.first, *self.last, *(self.flying.values() if flying else ())]
        dropped = sum(len(p.question) for p in questions) + sum(span.high - span.low for span in self.spans)
        for held in (self.first, self.last, self.spans):
            held.clear()
        if flying:
            self.flying.clear()
        return dropped


class _Asking:
    """Bookkeeping of one call of `ask`."""

    def __init__(
        self,
        grid: Grid,
        job: str,
        settings: Ask,
        events: Events,
        reporter: Reporter,
        progress: Progress,
        began: float,
        unsealing: Unsealing | None,
    ) -> None:
        self._grid, self._job, self._settings = grid, job, settings
        self._events, self._reporter, self._progress = events, reporter, progress
        self._looked = float("-inf")
        self._began, self._unsealing = began, unsealing
        self.sites: dict[int, _Site] = {}

    def add(self, node: int, stores: Sequence[AnswerStore]) -> None:
        name = stores[0].about.site
        progress = self._progress.sites.setdefault(name, SiteProgress(name, stores))
        widest = max(store.about.row_bytes for store in stores)
        size = QuestionSize(self._settings.question_size, widest)
        site = self.sites[node] = _Site(SiteState(name, node), progress, size, time.monotonic())
        for store in stores:
            for low, high in store.missing():
                high = min(high, store.known)
                if low >= high:
                    continue
                site.spans.append(_Span(store, low, high))
                site.state.asked += high - low

    def run(self) -> None:
        for site in self.sites.values():
            if site.open:
                site.task = self._reporter.start(f"asking {site.state.name}", site.state.asked)
        backoff = Backoff()
        while any(site.open for site in self.sites.values()):
            now = time.monotonic()
            self._look(now)
            for site in self.sites.values():
                self._send(site, now)
            owners = {identifier: site for site in self.sites.values() for identifier in site.flying}
            replies = list(pull(self._grid, owners))
            for identifier, message in replies:
                if identifier in owners:  # else a late or strange reply: nobody waits for it
                    self._receive(owners[identifier], identifier, message)
            if replies:
                backoff.reset()
            for site in self.sites.values():
                self._check_time(site, time.monotonic())
            self._progress.tick()
            if not replies:
                backoff.pause()
        self._progress.write()

    def _look(self, now: float) -> None:
        """See who is online, from time to time; questions to a site that went away wait for it."""
        if now - self._looked < LOOK_EVERY:
            return
        self._looked, online = now, online_nodes(self._grid)
        nodes = {name: node for node, name in online.items()}
        for site in self.sites.values():
            if site.state.node not in online and site.state.name in nodes:  # it came back with another key
                self._take_back(site)
                site.state.node = nodes[site.state.name]
                self._events.add("moved", site=site.state.name)
            listed = site.state.node in online
            if listed and not site.listed:
                site.heard = now
            if listed != site.listed and site.open:
                self._events.add("back" if listed else "away", site=site.state.name)
            if not listed:
                self._take_back(site)
            site.listed, site.paused = listed, False
            site.seen = now if listed else site.seen
            site.progress.online = listed

    def _take_back(self, site: _Site) -> None:
        """Put what is on its way to a node that has gone back to the front."""
        for identifier in reversed(list(site.flying)):
            site.first.appendleft(site.flying.pop(identifier))

    def _send(self, site: _Site, now: float) -> None:
        left = float("inf") if self._settings.deadline is None else self._began + self._settings.deadline - now
        if not site.listed or site.paused or left <= 0:
            return
        batch: list[_Pending] = []
        most = site.size.at_once(self._settings.in_flight, TTL_SECONDS / 2)
        job_key = None if self._unsealing is None else self._unsealing.key()
        while len(site.flying) + len(batch) < most and (pending := site.take(self._job, job_key)):
            if pending.question.job_key != job_key:  # it was asked before, for a key that is no longer given out
                pending.question = pending.question.model_copy(update={"job_key": job_key})
            batch.append(pending)
        for pending in batch:
            pending.sent, pending.ttl = now, max(min(site.ttl, left), 1.0)
        messages = [compose(p.question.to_content(), ANSWER, site.state.node, p.ttl) for p in batch]
        refused = []
        for pending, identifier in zip(batch, push(self._grid, messages), strict=True):
            if identifier is None:
                refused.append(pending)
                continue
            site.flying[identifier] = pending
            self._note("asked", site, pending)
        if refused:
            site.paused = True
            site.first.extendleft(reversed(refused))

    def _receive(self, site: _Site, identifier: str, message: Message) -> None:
        pending = site.flying.pop(identifier)
        if is_absence(message):
            site.paused = True
            self._return(site, pending, time.monotonic())
            return
        site.heard = time.monotonic()
        try:
            answer = Answer.from_content(content_of(message), pending.question)
            if self._unsealing is not None and (job_key := pending.question.job_key) is not None:
                answer = unseal_answer(answer, site.state.name, self._unsealing.secret_of(job_key))
            pending.store.append(answer)
        except ProtocolError as error:
            final = isinstance(error, RefusedReplyError) and error.final
            self._failed(site, pending, error.message, final=final)
            return
        self._note("answered", site, pending)
        site.size.learn(len(pending.question), answer.seconds)
        site.progress.add(len(pending.question), len(answer.data))
        if site.task is not None:
            site.task.advance(len(pending.question))

    def _return(self, site: _Site, pending: _Pending, now: float) -> None:
        """Put a question that nobody answered back to the front; if its time had run out, allow more from now on."""
        if now - pending.sent >= pending.ttl:
            site.ttl = max(site.ttl, 2 * pending.ttl)
        self._note("unanswered", site, pending)
        site.first.append(pending)

    def _failed(self, site: _Site, pending: _Pending, reason: str, *, final: bool) -> None:
        """Count a failed question; after a `final` refusal the site is asked nothing more in this run."""
        site.state.failures.append(reason)
        site.progress.fail(reason)
        self._note("failed", site, pending, reason=reason)
        if final:
            site.state.lost += len(pending.question)
            lost = site.drop(flying=False)  # what is on its way may have been answered before
            site.state.lost += lost
            if lost:
                self._events.add("given-up", site=site.state.name, samples=lost, reason=reason)
        elif pending.tries < self._settings.retries:
            pending.tries += 1
            site.last.append(pending)
        else:
            site.state.lost += len(pending.question)

    def _check_time(self, site: _Site, now: float) -> None:
        """Send again what was lost on the way; give a site up that is away or silent for too long, or at the end."""
        if not site.open:
            return
        for identifier, pending in list(site.flying.items()):
            if now - pending.sent > pending.ttl + LOOK_EVERY:  # Flower itself gives it up a moment earlier
                del site.flying[identifier]
                self._return(site, pending, now)
        chosen = self._settings
        if chosen.deadline is not None:
            if now - self._began >= chosen.deadline:
                self._give_up(site, f"it had not answered when the deadline of {chosen.deadline:,g} s passed")
        elif not site.listed and now - site.seen > chosen.wait:
            self._give_up(site, f"it was away for more than {chosen.wait:,g} s")
        elif now - site.heard > (limit := max(chosen.wait, TTL_SECONDS)):
            self._give_up(site, f"it said nothing for more than {limit:,g} s")

    def _give_up(self, site: _Site, reason: str) -> None:
        site.state.failures.append(reason)
        site.progress.fail(reason)
        lost = site.drop()
        site.state.lost += lost
        self._events.add("given-up", site=site.state.name, samples=lost, reason=reason)

    def _note(self, event: str, site: _Site, pending: _Pending, **more: str) -> None:
        question = pending.question
        self._events.add(
            event,
            site=site.state.name,
            pool=question.pool[:12],
            kind=question.kind,
            start=question.start,
            stop=question.stop,
            **more,
        )
