"""A site's tail: what of it leaves, as what, behind which limits, and what the ledger tells of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.client.app import app as client_app
from consilience.client.app import forget_sites
from consilience.client.ledger import Ledger
from consilience.client.ledger_rows import Approval, approval
from consilience.client.policy import RefusedError
from consilience.client.site import Site
from consilience.common.errors import SettingsError
from consilience.common.nets.blocks import Blocks, LentTail, rebuild_tail
from consilience.common.protocol import Refusal, TailDemand
from consilience.common.tails import BlocksQuestion, Carried, TailQuestion, answered, numbers, packed
from consilience.deploy.local_grid import FIRST_NODE, LocalGrid
from helpers.feature_site import hosted, make_pool, make_settings, network

pytestmark = pytest.mark.usefixtures("one_thread", "unsynced")
CHANNELS = {1: 32, 2: 64, 3: 128}
RNG = np.random.default_rng(0)


def folder_of(folder: Path, **tail: Any) -> Path:
    changes: dict[str, Any] = tail.pop("site", {})
    policy = {"tail": {"allow": "questions", **tail}, **changes.pop("policy", {})}
    make_pool(folder / "pool")
    make_settings(folder, policy=policy, **changes)
    return folder / "site.yaml"


def site_of(folder: Path, **tail: Any) -> Site:
    return Site.load(folder_of(folder, **tail))


def question(site: Site, *, block: int = 2, gradient: bool = False, samples: int = 3, **changes: Any) -> TailQuestion:
    assert site.card.tail is not None
    fields: dict[str, Any] = {
        "job": "job",
        "tail": site.card.tail.fingerprint,
        "policy": site.settings.policy.version,
        "block": block,
        "samples": samples,
        "shape": (CHANNELS.get(block, 1), 4, 4),
        "outputs": 3,
        "gradient": gradient,
        **changes,
    }
    return TailQuestion(**fields)


def given(asked: TailQuestion) -> tuple[np.ndarray, ...]:
    return tuple(RNG.normal(size=shape).astype(np.float32) for shape in asked.sent)


def ask(site: Site, asked: TailQuestion, sent: tuple[np.ndarray, ...]) -> np.ndarray:
    (found,) = numbers(site.ask_tail(asked, sent).data, [asked.answered])
    return found


def pieces(site: Site, size: int = 50_000) -> bytes:
    card = site.card.tail
    assert card is not None
    about: dict[str, Any] = {"job": "job", "tail": card.fingerprint, "policy": site.settings.policy.version}
    starts = range(0, card.bytes, size)
    asked = [BlocksQuestion(**about, start=start, stop=min(start + size, card.bytes)) for start in starts]
    return b"".join(site.lend_blocks(each).data for each in asked)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_questions_are_answered_as_the_network_itself_would(tmp_path: Path, block: int) -> None:
    site, whole = site_of(tmp_path), Blocks(network())
    features, gradient = given(asked := question(site, block=block, gradient=True))
    leaf = torch.from_numpy(features).requires_grad_()
    expected = whole.run(leaf, block, 4)
    outputs = ask(site, question(site, block=block), (features,))
    np.testing.assert_allclose(outputs, expected.detach().numpy(), atol=1e-5)
    (pulled,) = torch.autograd.grad(expected, leaf, torch.from_numpy(gradient))
    np.testing.assert_allclose(ask(site, asked, (features, gradient)), pulled.numpy(), atol=1e-5)


def test_lent_blocks_are_those_that_are_asked(tmp_path: Path) -> None:
    asking, lending = site_of(tmp_path / "a"), site_of(tmp_path / "b", allow="blocks", first=2)
    card = lending.card.tail
    assert card is not None
    tail = rebuild_tail(LentTail(card.architecture, card.first, 3, pieces(lending)))
    asked = question(asking)
    sent = given(asked)
    np.testing.assert_allclose(ask(asking, asked, sent), tail(torch.from_numpy(sent[0])).numpy(), atol=1e-6)
    assert [block.channels for block in card.blocks] == [32, 64, 128, 3]


def test_what_leaves_is_calibrated_as_answers_are(tmp_path: Path) -> None:
    x = RNG.integers(0, 256, (60, 16, 16, 1), np.uint8)
    np.savez(tmp_path / "own.npz", x=x, y=np.arange(60) % 3, names=np.array(["cat", "dog", "cow"]))
    data = {"kind": "npz", "path": "own.npz"}
    path = folder_of(tmp_path, first=1, site={"data": data, "calibration": "temperature"})
    assert CliRunner().invoke(app, ["site", "train", str(path)]).exit_code == 0
    site = Site.load(path)
    record = site.teacher.record  # type: ignore[union-attr]
    assert record is not None
    assert record.map is not None
    assert record.map.temperature > 1.01  # type: ignore[union-attr]
    images = x[:3]
    features = Blocks(network()).run((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25, 0, 1)
    asked = question(site, block=1, shape=(32, 16, 16))
    outputs = torch.from_numpy(ask(site, asked, (features.detach().numpy(),)))
    np.testing.assert_allclose(outputs.log_softmax(1).numpy(), site.teacher.log_probs(images), atol=1e-5)  # type: ignore[union-attr]


def test_every_question_is_a_row_of_the_ledger_and_lent_blocks_are_one(tmp_path: Path) -> None:
    site = site_of(tmp_path)
    asked = [question(site), question(site, gradient=True), question(site, block=3, samples=5, job="other")]
    for each in asked:
        ask(site, each, given(each))
    rows = [row.entry for row in site.ledger.rows()]
    assert [(row.kind, row.job, row.samples, row.body["what"]) for row in rows] == [
        ("tail", "job", 0, "outputs"),
        ("tail", "job", 0, "gradient"),
        ("tail", "other", 0, "outputs"),
    ]
    features, outputs = 4 * 3 * 64 * 16, 4 * 3 * 3
    assert [row.body["bytes"] for row in rows[:2]] == [features + outputs, 2 * features + outputs]
    assert site.ledger.spent.tails["job", "samples"] == 6
    assert site.ledger.spent.lifetime == 0, "they are no samples of a pool"
    lending = site_of(tmp_path / "lending", allow="blocks")
    assert pieces(lending) == pieces(lending)
    (row,) = lending.ledger.rows()
    assert lending.card.tail is not None
    assert (row.entry.body["what"], row.entry.body["bytes"]) == ("blocks", lending.card.tail.bytes)
    shown = CliRunner().invoke(app, ["site", "ledger", "show", str(tmp_path / "site.yaml")], env={"COLUMNS": "200"})
    assert "questions about the last blocks, job other" in shown.stdout


def test_a_tail_is_off_by_default(tmp_path: Path) -> None:
    path = folder_of(tmp_path, allow=False)
    site = Site.load(path)
    assert site.card.tail is None
    assert site.settings.policy.tail.allow == "off"
    asked = TailQuestion(
        job="job",
        tail="a" * 64,
        policy=site.settings.policy.version,
        block=1,
        samples=1,
        shape=(32, 4, 4),
        outputs=3,
    )
    with pytest.raises(RefusedError) as refused:
        site.ask_tail(asked, given(asked))
    assert refused.value.code == "tail-not-allowed"
    piece = BlocksQuestion(job="job", tail="a" * 64, policy=site.settings.policy.version, start=0, stop=9)
    with pytest.raises(RefusedError, match="does not open"):
        site.lend_blocks(piece)
    assert not list(site.ledger.rows())


def test_a_site_that_lends_is_not_asked_and_one_that_is_asked_does_not_lend(tmp_path: Path) -> None:
    asking, lending = site_of(tmp_path / "a"), site_of(tmp_path / "b", allow="blocks")
    with pytest.raises(RefusedError, match="does not lend"):
        pieces(asking)
    asked = question(lending)
    with pytest.raises(RefusedError, match="answers no questions"):
        lending.ask_tail(asked, given(asked))
    assert not list(asking.ledger.rows())
    assert not list(lending.ledger.rows())


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"tail": "b" * 64}, "other-teacher"),
        ({"policy": "d" * 16}, "other-teacher"),
        ({"block": 1}, "bad-question"),  # before the first
        ({"block": 4, "shape": (3, 1, 1)}, "bad-question"),  # the head
        ({"shape": (65, 4, 4)}, "bad-question"),
        ({"outputs": 4}, "bad-question"),
        ({"shape": (64, 1, 1), "samples": 1}, "bad-question"),  # pooling leaves nothing
    ],
)
def test_questions_that_do_not_fit_are_refused_and_counted_nowhere(
    tmp_path: Path, changes: dict[str, Any], code: str
) -> None:
    site = site_of(tmp_path, first=2)
    asked = question(site, **changes)
    with pytest.raises(RefusedError) as refused:
        site.ask_tail(asked, given(asked))
    assert refused.value.code == code
    assert not list(site.ledger.rows())


@pytest.mark.parametrize(
    ("limit", "most", "questions"),
    [("rounds", 2, 2), ("samples", 8, 2), ("bytes", 2 * 4 * 3 * (64 * 16 + 3), 2), ("samples_lifetime", 3, 1)],
)
def test_no_more_is_answered_than_the_policy_says(tmp_path: Path, limit: str, most: int, questions: int) -> None:
    site = site_of(tmp_path, **{limit: most})
    asked = question(site)
    for _ in range(questions):
        ask(site, asked, given(asked))
    with pytest.raises(RefusedError) as refused:
        ask(site, asked, given(asked))
    assert (refused.value.code, site.ledger.spent.tails["job", "rounds"]) == ("tail-limits", questions)
    other = question(site, job="other")
    if limit == "samples_lifetime":
        with pytest.raises(RefusedError):
            ask(site, other, given(other))
    else:
        ask(site, other, given(other))


def test_a_contract_that_would_ask_too_much_is_refused(tmp_path: Path) -> None:
    site = site_of(tmp_path, rounds=10)
    within, beyond = (TailDemand(rounds=rounds, samples=9, bytes=9) for rounds in (10, 11))
    site.tail.check(site.ledger, "job", within)
    with pytest.raises(RefusedError, match="the site's policy allows"):
        site.tail.check(site.ledger, "job", beyond)
    asked = question(site)
    ask(site, asked, given(asked))
    site.tail.check(site.ledger, "job", within)  # what was asked is part of it


def test_a_job_must_be_approved_where_the_policy_says_so(tmp_path: Path) -> None:
    site = site_of(tmp_path, site={"policy": {"approval": True}})
    asked = question(site)
    with pytest.raises(RefusedError) as refused:
        site.ask_tail(asked, given(asked))
    assert refused.value.code == "not-approved"
    assert site.tail.tail is not None
    most = (2, 2 * asked.samples, 2 * asked.bytes)
    with site.ledger.alone():
        given_to = Approval({site.tail.tail.asked: 0}, tail=most)
        site.ledger.append(approval("job", site.settings.policy.version, given_to))
    site.tail.check(site.ledger, "job", TailDemand(rounds=2, samples=most[1], bytes=most[2]))
    with pytest.raises(RefusedError, match="something else than was approved"):
        site.tail.check(site.ledger, "job", TailDemand(rounds=3, samples=most[1], bytes=most[2]))
    for _ in range(2):
        ask(site, asked, given(asked))
    with pytest.raises(RefusedError, match="something else than was approved"):
        site.ask_tail(asked, given(asked))
    with site.ledger.alone():  # as `site approve` does for a run that was interrupted
        again = Approval({site.tail.tail.asked: 0}, tail=(4, 4 * asked.samples, 4 * asked.bytes))
        site.ledger.append(approval("job", site.settings.policy.version, again))
    ask(site, asked, given(asked))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": {"cap": 0.9}}, "keeps back from answers"),
        ({"policy": {"precision": "votes"}}, "keeps back from answers"),
        ({"policy": {"sealed_only": True}}, "keeps back from answers"),
        ({"privacy": {"mechanism": "output-noise", "sigma": 1.0}}, "past privacy.mechanism output-noise"),
        ({"calibration": "dirichlet"}, "calibration is 'dirichlet'"),
        ({"teacher": hosted("plain")}, "no blocks are in hand"),
        ({"architecture": "resnet18"}, "cannot be cut into blocks"),
    ],
)
def test_what_a_tail_would_pass_by_or_cannot_be_cut_is_refused_early(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        site_of(tmp_path, site=changes)


def test_a_first_block_that_leaves_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"policy.tail.allow.*none after block 9"):
        site_of(tmp_path, first=9)


def test_over_messages_a_stranger_gets_constant_refusals(tmp_path: Path) -> None:
    path = folder_of(tmp_path, first=2)
    forget_sites()
    site = Site.load(path)
    asked = question(site)
    good, short = Carried(asked, packed(given(asked))), Carried(asked, b"1234")
    odd = Carried(asked, packed((np.full((3, 64, 4, 4), np.nan, np.float32),)))
    piece = Carried(BlocksQuestion(job="job", tail=asked.tail, policy=asked.policy, start=0, stop=9))
    contents = [(c.to_content(), "query.tail") for c in (good, short, odd)]
    contents += [(piece.to_content(), "query.blocks"), (RecordDict({}), "query.tail")]
    with LocalGrid(client_app, [{"site": str(path)}], workers=1) as grid:
        messages = [Message(content, dst_node_id=FIRST_NODE, message_type=kind) for content, kind in contents]
        replies = [next(iter(grid.send_and_receive([message]))).content for message in messages]
    assert len(answered(replies[0], asked)) == 4 * 9
    refusals = [Refusal.find(reply) for reply in replies[1:]]
    assert [refusal and refusal.code for refusal in refusals] == [
        "bad-question",
        "bad-question",
        "tail-not-allowed",
        "bad-question",
    ]
    assert {refusal.reason for refusal in refusals[:2] if refusal} == {"the question is malformed"}
    forget_sites()
    ledger = Ledger.open(site.settings)
    assert ledger.count == 1
    ledger.close()
