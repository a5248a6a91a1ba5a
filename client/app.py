"""The site's Flower ClientApp: one handler per question.

Lives here: messages in, messages out, and what a stranger is told when something fails. Does not live here: the
answering itself (client/site). The site's file is named by the node's configuration (`site`), never by a message.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from consilience.client.policy import RefusedError
from consilience.client.site import Site
from consilience.common.errors import ConsilienceError, LedgerError, ProtocolError, SettingsError
from consilience.common.protocol import CardRequest, Contract, Question, Refusal
from consilience.common.records import Record
from consilience.common.settings import SiteSettings
from consilience.common.settings_file import load_settings
from consilience.common.sums.messages import Delivery, MaskedRows, Roster, RowsQuestion, Terms, Unmask
from consilience.common.tails import BlocksQuestion, asked

log = logging.getLogger(__name__)

app = ClientApp()

Stamp = tuple[int, int, int] | None
"""By which a file that has changed is known: inode, size, when it was written to."""
STARTED_WITH = ("name", "state", "ledger_head", "key", "kit", "health_port")
"""Settings that an agent takes up when it starts alone."""
SETTLED = 0.5
"""Seconds."""

_sites: dict[Path, tuple[Stamp, Site]] = {}
_loading = threading.Lock()


def site_of(context: Context) -> Site:
    """Return the node's site, loaded once per process and again when its file has changed.

    So what a person takes back in `site.yaml` counts from the next message on. Raises what `Site.load` raises, and
    `SettingsError` where what changed is what the process was started with: nothing is answered then.
    """
    path = Path(str(context.node_config["site"]))
    with _loading:
        stamp = _stamp(path)
        if path in _sites and _sites[path][0] != stamp:
            stamp = _settled(path)
            _need_the_same(load_settings(path, SiteSettings), _sites[path][1].settings, path)
            _sites.pop(path)[1].close()
            gc.collect()  # before another teacher is loaded beside the old one
            log.info("%s has changed and is read again", path)
        if path not in _sites:
            _sites[path] = stamp, Site.load(path)
            site = _sites[path][1]
            log.info("%s: calibration of the teacher: %s", site.settings.name, site.calibration)
        return _sites[path][1]


def _need_the_same(now: SiteSettings, before: SiteSettings, path: Path) -> None:
    """Raise `SettingsError` for a change of what the process holds: folders that are locked, keys, ports."""
    if changed := [name for name in STARTED_WITH if getattr(now, name) != getattr(before, name)]:
        raise SettingsError(
            f"{path}: changed while the agent runs: {', '.join(changed)}", hint="Stop the agent, and start it again"
        )


def _settled(path: Path) -> Stamp:
    """Wait until the file was not written to for a moment, and return its stamp: half of a policy is another policy."""
    while (stamp := _stamp(path)) is not None:
        time.sleep(SETTLED)
        if stamp == _stamp(path):
            break
    return stamp


def _stamp(path: Path) -> Stamp:
    try:
        about = path.stat()
    except OSError:
        return None  # `Site.load` says what is wrong
    return about.st_ino, about.st_size, about.st_mtime_ns


def forget_sites() -> None:
    """Drop every loaded site, so that the next question loads it anew."""
    with _loading:
        for _, site in _sites.values():
            site.close()
        _sites.clear()


@app.query("card")
def card(message: Message, context: Context) -> Message:
    """Answer with the site card."""

    def handle() -> RecordDict:
        request = CardRequest.from_content(message.content)
        return site_of(context).tell_card(request.job).to_content()

    return _reply(message, handle)


@app.query("contract")
def contract(message: Message, context: Context) -> Message:
    """Check the contract and agree to it, or refuse."""
    return _reply(message, lambda: site_of(context).agree(Contract.from_content(message.content)).to_content())


@app.query("answer")
def answer(message: Message, context: Context) -> Message:
    """Answer a question about pool samples."""
    return _reply(message, lambda: site_of(context).answer(Question.from_content(message.content)).to_content())


@app.query("tail")
def tail(message: Message, context: Context) -> Message:
    """Answer a question about features at a block of the teacher."""
    return _reply(message, lambda: site_of(context).ask_tail(*asked(message.content)).to_content())


@app.query("blocks")
def blocks(message: Message, context: Context) -> Message:
    """Give a piece of the teacher's blocks."""
    return _reply(
        message, lambda: site_of(context).lend_blocks(BlocksQuestion.from_content(message.content)).to_content()
    )


@app.query("sum_terms")
def sum_terms(message: Message, context: Context) -> Message:
    """Make keys for a secure sum."""
    return _sum(message, context, lambda site: site.summing.keys(Terms.from_content(message.content)))


@app.query("sum_roster")
def sum_roster(message: Message, context: Context) -> Message:
    """Share the seeds of a secure sum."""
    return _sum(message, context, lambda site: site.summing.share(Roster.from_content(message.content)))


@app.query("sum_delivery")
def sum_delivery(message: Message, context: Context) -> Message:
    """Take the shares of the other sites of a secure sum."""
    return _sum(message, context, lambda site: site.summing.deliver(Delivery.from_content(message.content)))


@app.query("sum_rows")
def sum_rows(message: Message, context: Context) -> Message:
    """Answer with masked rows."""
    return _sum(message, context, lambda site: site.summing.rows(RowsQuestion.from_content(message.content)))


@app.query("sum_unmask")
def sum_unmask(message: Message, context: Context) -> Message:
    """Open the shares that unmask a sum."""
    return _sum(message, context, lambda site: site.summing.open(Unmask.from_content(message.content)))


def _sum(message: Message, context: Context, round_: Callable[[Site], Record | MaskedRows]) -> Message:
    """Take part in one round of a secure sum; what the site's record does not allow is refused as just that."""

    def handle() -> RecordDict:
        site = site_of(context)
        try:
            return round_(site).to_content()
        except RefusedError:
            raise
        except ProtocolError as error:
            raise RefusedError("sum-refused", "the site's rules for secure sums do not allow it") from error

    return _reply(message, handle)


def _reply(message: Message, handle: Callable[[], RecordDict]) -> Message:
    """Run a handler; whatever goes wrong, the stranger gets a code and a constant reason, the site's log the rest."""
    try:
        content = handle()
    except RefusedError as error:
        log.warning("refused: %s", error.told_here)
        content = Refusal(code=error.code, reason=error.reason).to_content()
    except ProtocolError as error:
        log.warning("refused a malformed question: %s", error)
        content = Refusal(code="bad-question", reason="the question is malformed").to_content()
    except LedgerError as error:
        log.error("answers nothing: %s", error)
        content = Refusal(code="ledger-damaged", reason="the site's record of its answers is not in order").to_content()
    except ConsilienceError as error:
        log.error("cannot answer: %s", error)
        content = Refusal(code="internal", reason="the site cannot answer now").to_content()
    except Exception:
        log.exception("an unforeseen failure while answering")
        content = Refusal(code="internal", reason="the site cannot answer now").to_content()
    return Message(content, reply_to=message)
