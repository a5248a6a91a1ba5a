"""A site's tail: the last blocks of its teacher, lent, or asked about features that the server sends.

Lives here: which blocks the policy lets be used, what is allowed and counted, and the answers. Does not live here: the
policy's fields (common/settings.Tail), messages (common/tails), how many questions a job has (common/nets/tail_plan).

What is asked and what is lent are one thing: the blocks as they would leave, calibration taken into the head. Every
question about features is a row of the ledger before its answer leaves; lent blocks are one row, and leave again as the
same bytes at no cost.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pydantic import ValidationError

from consilience.client.ledger import Ledger
from consilience.client.ledger_rows import Asked, blocks_lent, blocks_subject, tail_asked
from consilience.client.policy import Limit, RefusedError, check_job, check_tail_approved
from consilience.client.teacher import AnyTeacher, CalibratedMulti, CalibratedTeacher, MultiTeacher, Teacher
from consilience.client.teacher.protocol import Scoring
from consilience.common.cards import BlockCard, TailCard
from consilience.common.errors import SettingsError, StudentError
from consilience.common.files import canonical_json, sha256
from consilience.common.protocol import TailDemand
from consilience.common.settings import Policy, SiteSettings
from consilience.common.tails import BlocksQuestion, Floats, TailQuestion

if TYPE_CHECKING:
    from consilience.common.nets.blocks import Blocks, LentTail

_FIELD = "policy.tail"


@dataclass(frozen=True)
class OpenTail:
    """The tail that a site's policy opens: its card, and the blocks as they would leave."""

    card: TailCard
    blocks: LentTail

    @cached_property
    def network(self) -> Blocks:
        """The blocks, frozen, on the device that teachers run on."""
        from consilience.common.nets import default_device
        from consilience.common.nets.blocks import rebuild_tail

        return rebuild_tail(self.blocks, most=len(self.blocks.tensors)).to(default_device())

    @property
    def asked(self) -> Asked:
        """What an approval of a job that uses it is of."""
        return Asked("", "", "tail" if self.card.allow == "questions" else "blocks", "f32", self.card.fingerprint)

    def answer(self, question: TailQuestion, given: tuple[Floats, ...]) -> Floats:
        """Return the outputs of features, or the features' gradient for the outputs'.

        Raises `RefusedError` for features that the blocks do not take, as where a stride leaves nothing of them, and
        for results that are not finite.
        """
        import torch

        from consilience.common.nets import default_device

        network, device = self.network, default_device()
        features = torch.from_numpy(given[0]).to(device)
        try:
            if not question.gradient:
                with torch.inference_mode():
                    found = network.run(features, question.block, network.count + 1)
            else:
                features.requires_grad_()
                outputs = network.run(features, question.block, network.count + 1)
                (found,) = torch.autograd.grad(outputs, features, torch.from_numpy(given[1]).to(device))
        except (RuntimeError, StudentError) as error:
            raise RefusedError("bad-question", "the site's tail does not take these features") from error
        told: Floats = found.float().cpu().numpy()
        if not torch.from_numpy(told).isfinite().all():
            raise RefusedError("bad-question", "the site's tail gives no finite numbers for these features")
        return told


def open_tail(settings: SiteSettings, teacher: Teacher | MultiTeacher) -> OpenTail | None:
    """Return the tail that the policy opens; None where it opens none.

    Raises `SettingsError` for a teacher that cannot be cut into blocks, and for a `first` that leaves none.
    """
    wanted = settings.policy.tail
    if not wanted.open:
        return None
    from consilience.client.teacher.torch_modules import NetworkScores  # it and the next bring torch
    from consilience.common.nets.blocks import Blocks, export_tail

    behind = teacher.teacher if isinstance(teacher, CalibratedTeacher | CalibratedMulti) else teacher
    scores = behind.scores if isinstance(behind, Scoring) else None
    if not isinstance(scores, NetworkScores) or settings.teacher.kind not in ("train", "state_dict"):
        raise SettingsError(
            f"{settings.name}: field '{_FIELD}.allow' is {wanted.allow!r}, and the teacher's network is not in hand",
            hint=f"Set {_FIELD}.allow to off, or give the teacher as kind train or state_dict",
        )
    architecture = settings.teacher.architecture
    try:
        lent = export_tail(scores.network, architecture, wanted.first, temperature=_temperature(teacher))
        taps = Blocks(scores.network).taps
        parts = {"kind": "tail", "teacher": teacher.fingerprint, "first": wanted.first, "allow": wanted.allow}
        card = TailCard(
            allow=wanted.allow if wanted.allow == "blocks" else "questions",
            architecture=architecture,
            first=wanted.first,
            blocks=tuple(BlockCard(name=tap.name, layout=tap.unit, channels=tap.channels) for tap in taps),
            fingerprint=sha256(canonical_json(parts)),
            bytes=len(lent.tensors),
            digest=sha256(lent.tensors),
        )
    except StudentError as error:
        raise SettingsError(
            f"{settings.name}: field '{_FIELD}.allow' is {wanted.allow!r}: {error.message}",
            hint=f"Set {_FIELD}.allow to off, or {_FIELD}.first to a block before the head; "
            f"the teacher must be one of our architectures",
        ) from error
    except ValidationError as error:
        raise SettingsError(
            f"{settings.name}: field '{_FIELD}': the teacher's blocks are none that a site card describes: "
            f"{error.errors()[0]['msg']}",
            hint=f"Set {_FIELD}.allow to off",
        ) from error
    return OpenTail(card, lent)


def tell_tail(settings: SiteSettings, teacher: AnyTeacher) -> str:
    """Return in one line what the policy opens; empty where it opens none. Raises as `open_tail`."""
    held = open_tail(settings, teacher)
    if held is None:
        return ""
    card = held.card
    what = f"{card.architecture}, the blocks after {card.first} of {len(card.blocks) - 1} and the head"
    if card.allow == "blocks":
        return f"{what}: lent, {card.bytes:,} bytes"
    return f"{what}: stay here, and answer questions about features"


def tail_limits(policy: Policy, ledger: Ledger, job: str) -> tuple[Limit, ...]:
    """Return the limits on questions about the tail as they stand for a job; none where none are answered."""
    held, spent = policy.tail, ledger.spent.tails
    if held.allow != "questions":
        return ()
    lifetime = sum(count for (_, name), count in spent.items() if name == "samples")
    return (
        Limit(f"tail questions of job {job}", held.rounds, spent[job, "rounds"]),
        Limit(f"tail samples of job {job}", held.samples, spent[job, "samples"]),
        Limit(f"tail bytes of job {job}", held.bytes, spent[job, "bytes"]),
        Limit("tail samples, lifetime", held.samples_lifetime, lifetime),
    )


def still(ledger: Ledger, job: str, demand: TailDemand) -> TailDemand:
    """Return what of a job's demand was not asked yet."""
    asked = ledger.spent.tails
    return TailDemand(
        rounds=max(0, demand.rounds - asked[job, "rounds"]),
        samples=max(0, demand.samples - asked[job, "samples"]),
        bytes=max(0, demand.bytes - asked[job, "bytes"]),
    )


def check_tail_limits(policy: Policy, ledger: Ledger, job: str, more: TailDemand) -> None:
    """Refuse to let the tail be asked so much more, where an approval or a limit does not allow it.

    Raises `RefusedError`.
    """
    if policy.tail.allow == "questions":
        check_tail_approved(policy, ledger, job, (more.rounds, more.samples, more.bytes))
    wanted = (more.rounds, more.samples, more.bytes, more.samples)
    for limit, count in zip(tail_limits(policy, ledger, job), wanted, strict=False):
        if limit.left is not None and count > limit.left:
            detail = f"{limit.name}: {count:,} more, {limit.left:,} left of {limit.most:,}; {_FIELD} says how many"
            raise RefusedError("tail-limits", _TOO_MUCH, detail)


class TailDesk:
    """Answers about one site's tail. Not for two threads at once."""

    def __init__(self, settings: SiteSettings, tail: OpenTail | None) -> None:
        self.settings, self.tail = settings, tail

    def check(self, ledger: Ledger, job: str, demand: TailDemand) -> OpenTail:
        """Return the tail, if a job may ask for so much of it; what was asked before is not counted twice.

        Raises `RefusedError`.
        """
        tail = self.need(job)
        check_tail_limits(self.settings.policy, ledger, job, still(ledger, job, demand))
        return tail

    def ask(self, ledger: Ledger, question: TailQuestion, given: tuple[Floats, ...]) -> Floats:
        """Answer a question about features; it is counted before. Raises `RefusedError`, `LedgerError`."""
        tail = self._named(question)
        card = tail.card
        if card.allow != "questions":
            raise RefusedError("tail-not-allowed", "the site lends its blocks and answers no questions about them")
        known = card.first <= question.block < len(card.blocks)
        if not known or card.blocks[question.block - 1].channels != question.shape[0]:
            raise RefusedError("bad-question", "the question is about another block or other channels than the tail's")
        if question.outputs != card.blocks[-1].channels:
            raise RefusedError("bad-question", "the question is about other outputs than the tail's")
        found = tail.answer(question, given)
        with ledger.alone():
            self._permit(ledger, question.job, tail)
            more = TailDemand(rounds=1, samples=question.samples, bytes=question.bytes)
            check_tail_limits(self.settings.policy, ledger, question.job, more)
            ledger.append(tail_asked(question))
        return found

    def lend(self, ledger: Ledger, question: BlocksQuestion) -> bytes:
        """Return a piece of the blocks; they are counted before the first. Raises as `ask`."""
        tail = self._named(question)
        if tail.card.allow != "blocks":
            raise RefusedError("tail-not-allowed", "the site does not lend its blocks")
        if question.stop > tail.card.bytes:
            raise RefusedError("bad-question", "the question asks for bytes that the blocks have not")
        with ledger.alone():
            self._permit(ledger, question.job, tail)
            if next(ledger.rows(subject=blocks_subject(tail.card.digest)), None) is None:
                ledger.append(blocks_lent(question.job, self.settings.policy.version, tail.card))
        return tail.blocks.tensors[question.start : question.stop]

    def _named(self, question: TailQuestion | BlocksQuestion) -> OpenTail:
        tail = self.need(question.job)
        if question.tail != tail.card.fingerprint or question.policy != self.settings.policy.version:
            raise RefusedError("other-teacher", "the question is for another teacher or policy version")
        return tail

    def need(self, job: str) -> OpenTail:
        """Return the tail. Raises `RefusedError` where the policy opens none."""
        if self.tail is None:
            detail = f"job {job}; {_FIELD}.allow is {self.settings.policy.tail.allow}"
            raise RefusedError("tail-not-allowed", "the site's policy does not open the teacher's last blocks", detail)
        return self.tail

    def _permit(self, ledger: Ledger, job: str, tail: OpenTail) -> None:
        asked: Iterable[Asked] = (tail.asked,)
        check_job(self.settings.policy, ledger, job, asked)


def _temperature(teacher: Teacher | MultiTeacher) -> float | tuple[float, ...]:
    """Return what calibration divides the scores by."""
    if isinstance(teacher, CalibratedMulti):
        return (None if teacher.record is None else teacher.record.temperatures) or 1.0
    held = teacher.record.map if isinstance(teacher, CalibratedTeacher) and teacher.record is not None else None
    if held is None:
        return 1.0
    if held.temperature is None:
        raise StudentError("Its calibration is no temperature, which a head could take in", hint="Calibrate it anew")
    return held.temperature


_TOO_MUCH = (
    "the job would ask more of the teacher's last blocks than the site's policy allows: take fewer epochs, a smaller "
    "pool or smaller images, or have that site raise the limits in policy.tail, or lend its blocks"
)
"""What a stranger is told of limits."""
