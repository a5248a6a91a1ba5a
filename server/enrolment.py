"""Who takes part: waiting for sites, their cards, and their agreement to the contract.

Lives here: who is waited for, who is left out and why, which sites a resumed run or one that folds in a new site
needs. Does not live here: what a contract says (server/contract), what comes with agreements (server/components),
questions about the pool (server/asking).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

from consilience.common.cards import SiteCard
from consilience.common.errors import AskingError, ProtocolError
from consilience.common.progress import Reporter
from consilience.common.protocol import (
    CARD,
    CONTRACT,
    Agreement,
    CardRequest,
    Contract,
    Guarantee,
    TailDemand,
    read_reply,
)
from consilience.common.settings import Ask, JobSettings
from consilience.server.asked_pool import AskedPool
from consilience.server.components import Taking, lacking_components
from consilience.server.contract import RunContract, objection
from consilience.server.events import Events
from consilience.server.messages import Backoff, compose, content_of, is_absence, online_nodes, pull, push
from consilience.server.settings import Home
from consilience.server.trust import Unsealing, need_admitted

LOOK_EVERY = 1.0
"""Seconds between two looks at who is back."""
ASK_AGAIN_AFTER = 5.0
"""Seconds after which a site that could not present itself is asked for its card again, while too few are there."""
PATIENCE = 60.0
"""Seconds that a site which is there has for its card and for its agreement, however short `ask.wait` is."""
HINT = "See that site's log, mend it, run the same command again"

Lacking = Callable[[Collection[str]], str]
"""Says what is still lacking when the sites of these names are there; empty when that is enough."""


@dataclass
class Enrolment:
    """The run's contract, and which of its sites can be asked now."""

    contract: RunContract
    nodes: dict[str, int] = field(default_factory=dict)
    """Site -> node, for the sites of the contract that are there."""
    away: dict[str, str] = field(default_factory=dict)
    """Site -> reason, for the sites of the contract that cannot be asked now."""
    tried: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Site -> the samples that its teacher was tried on, and the seconds that took."""
    guarantees: dict[str, Guarantee | None] = field(default_factory=dict)
    """Site -> what its answers come to, of the sites that agreed; None where it does not say."""


def is_strict(settings: Ask) -> bool:
    """Whether every connected site must do: nothing says how many are enough."""
    return settings.min_sites is None and settings.wait_for is None


class StudentNeeds(Protocol):
    """What a job's student needs of the sites' networks."""

    def check_all(self, cards: Sequence[SiteCard]) -> None:
        """Raise `SettingsError` where the sites, each or together, do not do."""

    def objection(self, card: SiteCard) -> str:
        """Say why one does not do; empty where it does."""

    def announced(self, cards: Sequence[SiteCard]) -> str:
        """Say what is about to be asked of them; empty where nothing is."""

    def tail(self, card: SiteCard) -> TailDemand | None:
        """Return what will be asked of a site's last blocks; None for nothing."""


def at_least(needed: int) -> Lacking:
    """Return the rule that `needed` sites must be there."""

    def lacking(names: Collection[str]) -> str:
        if len(names) >= needed:
            return ""
        return f"{len(names)} of {needed} sites are connected" if names or needed > 1 else "no site is connected"

    return lacking


def collect_cards(
    grid: Grid,
    job: str,
    *,
    lacking: Lacking,
    wait: float,
    strict: bool,
    reporter: Reporter | None = None,
    home: Home | None = None,
) -> tuple[dict[int, SiteCard], dict[str, str]]:
    """Ask every node that is there for its card until nothing is lacking and every node there has spoken.

    Returns the cards by node, and the reasons why others could not present themselves by the name they were admitted
    under (by "node N" where nobody is admitted). `home`: the server's folder, which says with which key each site was
    admitted. Raises `AskingError`: something is still lacking after `wait`
    seconds; two sites have one name; `strict`, and a node fails.
    """
    cards: dict[int, SiteCard] = {}
    failed: dict[int, tuple[str, float]] = {}
    sent: dict[str, int] = {}
    patience = max(wait, PATIENCE)
    began, backoff, said = time.monotonic(), Backoff(), ""
    looked, names_of = float("-inf"), dict[int, str | None]()
    while True:
        now = time.monotonic()
        if now - looked >= LOOK_EVERY:
            looked, names_of = now, online_nodes(grid)
        online = names_of.keys()
        cards = {node: card for node, card in cards.items() if node in online}
        failed = {node: held for node, held in failed.items() if node in online}
        sent = {identifier: node for identifier, node in sent.items() if node in online}
        again = {node for node, (_, when) in failed.items() if now - when >= ASK_AGAIN_AFTER}
        new = sorted((online - cards.keys() - failed.keys() | again) - set(sent.values()))
        messages = [compose(CardRequest(job=job).to_content(), CARD, node, patience) for node in new]
        for node, identifier in zip(new, push(grid, messages), strict=True):
            if identifier is None:
                failed[node] = ("the server could not reach it", now)
            else:
                sent[identifier] = node
        for identifier, message in list(pull(grid, sent)):
            if (spoke := sent.pop(identifier, None)) is None:
                continue
            backoff.reset()
            try:
                card = read_reply(content_of(message), SiteCard)
                _need_own_name(card, names_of[spoke])
                need_admitted(card, home)
                cards[spoke] = card
                failed.pop(spoke, None)
            except ProtocolError as error:
                if is_absence(message):
                    failed[spoke] = ("it went away", now)
                    continue
                failed[spoke] = (error.message, now)
                if strict:
                    raise _cannot(_who(spoke, names_of), error.message) from error
        names = [card.name for card in cards.values()]
        if len(set(names)) < len(names):
            name = next(name for name in names if names.count(name) > 1)
            raise AskingError(f"Two connected sites are called {name}", hint="Rename one of them in its site.yaml")
        still = lacking(names)
        passed = time.monotonic() - began
        if passed >= (patience if sent else wait) or not (still or sent):
            break
        if still and reporter is not None and still != said and passed > 1:
            reporter.say(f"Waiting for sites: {still}")
            said = still
        backoff.pause()
    reasons = {_who(node, names_of): reason for node, (reason, _) in failed.items()}
    silent = [_who(node, names_of) for node in sorted(set(sent.values()) - cards.keys())]
    reasons |= dict.fromkeys(silent, f"it sent no card within {patience:,g} s")
    if still:
        others = "".join(f"; {who}: {reason}" for who, reason in sorted(reasons.items()))
        there = f"; there: {', '.join(sorted(names))}" if names else ""
        raise AskingError(
            f"{still[0].upper()}{still[1:]}{there}{others}", hint="Start the sites, then run the same command again"
        )
    if strict and silent:
        raise _cannot(silent[0], reasons[silent[0]])
    return cards, reasons


def _who(node: int, names_of: Mapping[int, str | None]) -> str:
    return names_of[node] or f"node {node}"


def _cannot(who: str, reason: str) -> AskingError:
    """Return the error for a site that stops the job; `who` is its name, or "node N" where it has none yet."""
    what = who.capitalize() if who.startswith("node ") else f"Site {who}"
    return AskingError(f"{what} cannot take part: {reason}", hint=HINT)


def _need_own_name(card: SiteCard, name: str | None) -> None:
    """Raise `ProtocolError` when a site presents itself by another name than its key was admitted under."""
    if name is not None and card.name != name:
        raise ProtocolError(f"its card names the site {card.name}; its key was admitted as {name}")


def agree(
    grid: Grid, contracts: Mapping[int, Contract], wait: float, take: Callable[[int, Agreement], None]
) -> tuple[dict[int, Agreement], dict[int, str]]:
    """Send each node its contract; returns, by node, the agreements, and why the others do not agree in `wait` seconds.

    A node that goes away meanwhile is asked again when it is back within `PATIENCE` seconds. `take` is given each
    agreement, and keeps what comes with it; it raises `ProtocolError` where that is not what the contract asks for.
    """
    wait, began, looked, backoff = max(wait, PATIENCE), time.monotonic(), float("-inf"), Backoff()
    unsent, waiting = set(contracts), dict[str, int]()
    agreements: dict[int, Agreement] = {}
    reasons: dict[int, str] = {}
    while True:
        passed = time.monotonic() - began
        if (not waiting and (not unsent or passed > PATIENCE)) or passed > wait:
            break
        if unsent and passed - looked >= LOOK_EVERY:
            looked, nodes = passed, sorted(unsent & set(grid.get_node_ids()))
            messages = [compose(contracts[node].to_content(), CONTRACT, node, wait) for node in nodes]
            given = zip(push(grid, messages), nodes, strict=True)
            waiting |= {identifier: node for identifier, node in given if identifier is not None}
            unsent -= set(waiting.values())
        for identifier, message in list(pull(grid, waiting)):
            if (spoke := waiting.pop(identifier, None)) is None:
                continue
            backoff.reset()
            if is_absence(message):
                unsent.add(spoke)
                continue
            try:
                agreement = _agreement(message, contracts[spoke])
                take(spoke, agreement)
                agreements[spoke] = agreement
            except ProtocolError as error:
                reasons[spoke] = error.message
        if waiting or unsent:
            backoff.pause()
    reasons |= dict.fromkeys(unsent, "it went away before it agreed to the contract")
    reasons |= dict.fromkeys(waiting.values(), f"it did not agree to the contract within {wait:,g} s")
    return agreements, reasons


def enrol(
    grid: Grid,
    settings: JobSettings,
    path: Path,
    pools: tuple[str, ...],
    *,
    complete: Callable[[RunContract], set[str]],
    fold_in: bool,
    wait_for_new: bool,
    events: Events,
    reporter: Reporter,
    home: Home | None = None,
    unsealing: Unsealing | None = None,
    needs: StudentNeeds | None = None,
    part: AskedPool | None = None,
) -> Enrolment:
    """Make, resume or (with `fold_in`) grow the contract in the file `path`.

    `complete` names the sites of a contract whose stores are complete: they need not be there. A resumed run needs
    as many of its sites, complete or there, as `min_sites` says, by default all. `wait_for_new`: a run that folds in
    has nothing else to do, so it waits for a new site. `home`: as for `collect_cards`; `unsealing`: what sites are to
    seal their answers for; `needs`: what the student needs of them beside answers; `part`: what of the pool they will
    be asked about, where not all. Raises `AskingError`,
    `RunError`, `LabelError`, `SettingsError`.
    """
    asking = settings.ask
    strict = is_strict(asking)
    earlier = RunContract.load(path) if path.exists() else None
    done: set[str] = set()
    if earlier is None:
        lacking = at_least(max(asking.wait_for or 1, asking.min_sites or 1))
        enough = at_least(asking.min_sites or asking.wait_for or 1)
    else:
        earlier.check_same(RunContract.build(settings, earlier.sites, pools), path)
        done = complete(earlier)
        lacking = _resumed(earlier, done, asking.min_sites or len(earlier.sites), fold_in and wait_for_new)
        enough = lacking
    cards, reasons = collect_cards(
        grid, settings.name, lacking=lacking, wait=asking.wait, strict=strict, reporter=reporter, home=home
    )
    left_out = dict(reasons)
    known: set[str] = set()
    if earlier is not None:
        known = {card.name for card in earlier.sites}
        if strict:
            earlier.check_unchanged(cards.values(), path)
        new = sorted(card.name for card in cards.values() if card.name not in known)
        if new and not fold_in:
            reporter.say(
                f"Warning: {', '.join(new)} joined after this run began and {_are(new)} not asked; run the same "
                "command with --fold-in to ask there too"
            )
            cards = {node: card for node, card in cards.items() if card.name in known}
    if not strict:
        differing = _differing(settings, earlier, cards, needs)
        cards = {node: card for node, card in cards.items() if card.name not in differing}
        left_out |= {name: reason for name, reason in differing.items() if name not in done}
        _need_enough(enough, cards, left_out)
    while True:
        sites = [*(earlier.sites if earlier else ()), *(c for c in cards.values() if c.name not in known)]
        contract = RunContract.build(settings, sites, pools)
        if needs is not None:
            needs.check_all(contract.sites)
            if announced := needs.announced(contract.sites):
                reporter.say(announced)
        asked = {node: card for node, card in cards.items() if card.name not in done}
        job_key = None if unsealing is None else unsealing.key()  # now: sites may have been long in coming
        contracts = {
            node: contract.for_site(
                card.name,
                settings,
                job_key,
                lacking_components(path.parent, settings, card),
                None if needs is None else needs.tail(card),
                part,
            )
            for node, card in asked.items()
        }
        taking = Taking(path.parent, contracts, asked, unsealing)
        agreements, refusals = agree(grid, contracts, asking.wait, taking)
        if not refusals:
            break
        for node, reason in refusals.items():
            name = cards.pop(node).name
            if strict:
                raise _cannot(name, reason)
            left_out[name] = reason
        _need_enough(enough, cards, left_out)
    for who, reason in sorted(left_out.items()):
        events.add("left-out", who=who, reason=reason)
        reporter.say(f"Warning: {who} is left out: {reason}")
    enrolment = _enrolled(contract, earlier, cards, left_out, done, path, events, reporter)
    enrolment.tried = {cards[node].name: (held.samples, held.seconds) for node, held in agreements.items()}
    enrolment.guarantees = {cards[node].name: held.guarantee for node, held in agreements.items()}
    return enrolment


def _differing(
    settings: JobSettings, earlier: RunContract | None, cards: Mapping[int, SiteCard], needs: StudentNeeds | None
) -> dict[str, str]:
    """Return the sites whose cards the run cannot go on with, and why: changed ones, new ones that do not fit."""
    known = {card.name for card in earlier.sites} if earlier else set()
    reasons: dict[str, str] = {}
    for card in cards.values():
        if earlier is not None and card.name in known:
            if earlier.differs(card):
                reasons[card.name] = "its card is not the one this run began with: another teacher, classes or policy"
        elif reason := objection(settings, card) or (needs.objection(card) if needs is not None else ""):
            reasons[card.name] = reason
    return reasons


def _need_enough(lacking: Lacking, cards: Mapping[int, SiteCard], left_out: Mapping[str, str]) -> None:
    """Raise `AskingError` when too few sites remain."""
    lacked = lacking([card.name for card in cards.values()])
    if lacked:
        others = "; ".join(f"{who}: {reason}" for who, reason in sorted(left_out.items())) or "none"
        raise AskingError(f"{lacked[0].upper()}{lacked[1:]}; left out: {others}", hint=HINT)


def _enrolled(
    contract: RunContract,
    earlier: RunContract | None,
    cards: Mapping[int, SiteCard],
    left_out: Mapping[str, str],
    done: Collection[str],
    path: Path,
    events: Events,
    reporter: Reporter,
) -> Enrolment:
    """Write the contract where it is new or has grown, and say who is there and who is not."""
    known = {card.name for card in earlier.sites} if earlier else set()
    joined = [card.name for card in contract.sites if card.name not in known]
    if joined:
        names = {card.name for card in contract.sites}
        held = {**(earlier.left_out if earlier else {}), **left_out}
        kept = {who: reason for who, reason in held.items() if who not in names}
        contract = contract.model_copy(update={"left_out": kept})
        contract.write(path)
        events.add("contract", sites=joined)
        for warning in contract.warnings:
            reporter.say(f"Warning: {warning}")
    elif earlier is not None:
        contract = earlier
    nodes = {card.name: node for node, card in cards.items()}
    away = {
        card.name: left_out.get(card.name, "it was not connected")
        for card in contract.sites
        if card.name not in nodes and card.name not in done
    }
    return Enrolment(contract, nodes, away)


def _resumed(earlier: RunContract, done: set[str], needed: int, new: bool) -> Lacking:
    known = {card.name for card in earlier.sites}

    def lacking(names: Collection[str]) -> str:
        there = known & (set(names) | done)
        if len(there) < needed:
            missing = ", ".join(sorted(known - there))
            return f"{len(there)} of the {needed} sites this run needs are connected or done; not there: {missing}"
        return "no new site is connected" if new and not set(names) - known else ""

    return lacking


def _agreement(message: Message, contract: Contract) -> Agreement:
    """Read a reply to a contract. Raises `ProtocolError`."""
    agreement = read_reply(content_of(message), Agreement)
    if agreement.pools != contract.pools:
        raise ProtocolError("it agreed to other pools")
    return agreement


def _are(names: Collection[str]) -> str:
    return "is" if len(names) == 1 else "are"
