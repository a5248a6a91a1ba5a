"""A job that chooses in rounds what to ask about: within its number, durably, and nothing twice."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import RecordDict

from consilience.common.encoding import encode
from consilience.common.errors import AskingError, SettingsError, StorageError
from consilience.common.pool import Pool
from consilience.common.progress import Reporter
from consilience.common.protocol import Answer, Question
from consilience.common.samples_asked import drawn
from consilience.common.settings import JobSettings
from consilience.server import job as job_module
from consilience.server.signatures import Signatures, check_signatures, complaint
from consilience.server.unify import unify
from helpers.jobs import JUDGED, build_home, job_settings, noise, run_job
from helpers.sites import DIGEST, POLICY, Handler, Sites, honest, refusing, rows

SAMPLES, TEST, ASKED = 60, 12, 25
ENDS = (8, 16, 25)
KEYS = {name: ec.derive_private_key(k + 2, ec.SECP384R1()) for k, name in enumerate(("one", "two"))}
CHOICES = ("uncertainty", "disagreement", "k-centre")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    pool, test = noise(0, SAMPLES, TEST)
    labels = np.random.default_rng(1).integers(0, 3, SAMPLES)
    return build_home(tmp_path, pool, test, np.arange(TEST) % 3, ("c", "b", "a"), pool_labels=labels)


def settings(home: Path, **changes: Any) -> JobSettings:
    own = {
        "ask": {"question_size": 8, "samples": ASKED, "choose": "k-centre", "rounds": len(ENDS)},
        "student": {"architecture": "cnn3@0.25"},
    }
    return job_settings(home, JUDGED, own, changes)


def turned(question: Question, attempt: int) -> RecordDict:
    """A site that differs from the honest one, more on some samples than on others."""
    told = np.where(question.ids[:, None] % 5 < 2, rows(question)[:, [1, 0, 2]], rows(question))
    return Answer(question, encode(told, question.encoding), 0.1).to_content()


def do(home: Path, sites: Sites, reporter: Reporter, *, run: str = "run", **changes: Any) -> dict[str, Any]:
    return run_job(home, sites, settings(home, **changes), reporter, run)


def noting(asked: dict[str, list[int]], name: str, handler: Handler, pool: str) -> Handler:
    """The handler, which notes the samples of the pool that it was asked about, in turn."""

    def noted(question: Question, attempt: int) -> RecordDict:
        if question.pool == pool:
            asked.setdefault(name, []).extend(question.ids.tolist())
        return handler(question, attempt)

    return noted


def sites_of(home: Path, asked: dict[str, list[int]] | None = None, **handlers: Handler) -> Sites:
    pool = Pool.open(home / "pool").digest
    chosen = {"one": honest, "two": turned, **handlers}
    held = {} if asked is None else asked
    return Sites({name: noting(held, name, handler, pool) for name, handler in chosen.items()}, keys=KEYS)


@pytest.mark.parametrize("choose", CHOICES)
def test_every_round_is_asked_once_within_the_number(home: Path, reporter: Reporter, choose: str) -> None:
    asked: dict[str, list[int]] = {}
    sites = sites_of(home, asked)
    report = do(home, sites, reporter, ask={"choose": choose})
    ids = np.load(home / "run" / "asked.npy")
    first = drawn(settings(home), SAMPLES)
    assert first is not None
    assert np.array_equal(ids[: ENDS[0]], first)
    assert len(set(ids.tolist())) == ASKED
    for low, high in zip((0, *ENDS), ENDS, strict=False):
        for name in ("one", "two"):
            assert sorted(asked[name][low:high]) == ids[low:high].tolist()
    whole = Question(job="j", pool=DIGEST, start=0, stop=SAMPLES, encoding="f32", teacher=DIGEST, policy=POLICY)
    swapped = np.where(whole.ids[:, None] % 5 < 2, rows(whole)[:, [1, 0, 2]], rows(whole))
    labels = np.load(home / "run" / "labels" / "q.npy")
    assert np.allclose(labels, unify([rows(whole)[ids], swapped[ids]], [(0, 1, 2)] * 2).probs, atol=1e-6)
    assert (report["pool"]["size"], report["pool"]["whole"]) == (ASKED, SAMPLES)
    words = f"25 unlabelled images of the pool’s 60, chosen by {choose} in 3 rounds, the first drawn at random"
    assert words in (home / "run" / "card.md").read_text().replace("\\", "")
    (contract, _) = (held for _, held in sites.contracts)
    assert contract.more == ASKED - ENDS[0]
    assert not (home / "run" / "rounds").exists()
    found = check_signatures(Signatures.read(home / "run" / "student"), home / "run" / "answers")
    assert complaint(found) is None
    assert [(site.vouched, site.compared, site.unsigned) for site in found] == [(ASKED + TEST, ASKED + TEST, 0)] * 2


def test_an_answer_of_one_round_does_not_count_in_another(home: Path, reporter: Reporter) -> None:
    """Rounds interleave, so that ranges do; a sample that is signed twice is found all the same."""
    do(home, sites_of(home), reporter)
    path = home / "run" / "student" / "signatures.json"
    told = json.loads(path.read_text())
    held = told["sites"][0]["answers"][0]["signed"]
    assert any(one["stop"] > two["start"] for one, two in pairwise(held))
    held.append(held[0])
    path.write_text(json.dumps(told))
    assert "signed twice" in check_signatures(Signatures.read(home / "run" / "student"))[0].problems[0]


def killing(monkeypatch: pytest.MonkeyPatch, name: str, when: int) -> None:
    """Kill the server when it calls a function of the job for the `when`-th time."""
    real, calls = getattr(job_module, name), 0

    def killed(*about: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == when:
            raise KeyboardInterrupt
        return real(*about, **more)

    monkeypatch.setattr(job_module, name, killed)


@pytest.mark.parametrize(("name", "when"), [("ask", 1), ("ask", 2), ("choose_more", 1), ("choose_more", 2), ("ask", 3)])
def test_a_killed_server_goes_on_with_the_same_samples(
    home: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch, name: str, when: int
) -> None:
    do(home, sites_of(home), reporter, run="whole")
    asked: dict[str, list[int]] = {}
    with monkeypatch.context() as patched:
        killing(patched, name, when)
        with pytest.raises(KeyboardInterrupt):
            do(home, sites_of(home, asked), reporter)
    before = np.load(home / "run" / "asked.npy")
    do(home, sites_of(home, asked), reporter)
    ids = np.load(home / "run" / "asked.npy")
    assert np.array_equal(ids[: len(before)], before)
    assert np.array_equal(ids, np.load(home / "whole" / "asked.npy"))
    assert sorted(asked["one"]) == sorted(ids.tolist()), "nothing is asked twice"
    assert np.array_equal(np.load(home / "run" / "labels" / "q.npy"), np.load(home / "whole" / "labels" / "q.npy"))


def test_what_was_chosen_is_kept_though_it_would_be_chosen_otherwise_now(
    home: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        killing(patched, "ask", 2)
        with pytest.raises(KeyboardInterrupt):
            do(home, sites_of(home), reporter)
    held = np.load(home / "run" / "asked.npy")
    other = np.setdiff1d(np.arange(SAMPLES), held)[: ENDS[1] - ENDS[0]]  # as another machine's student would choose
    np.save(home / "run" / "asked.npy", np.concatenate([held[: ENDS[0]], other]))
    do(home, sites_of(home), reporter)
    assert np.array_equal(np.load(home / "run" / "asked.npy")[ENDS[0] : ENDS[1]], other)


def test_a_site_that_does_not_answer_a_round_stops_the_job_before_the_next(home: Path, reporter: Reporter) -> None:
    asked: dict[str, list[int]] = {}
    with pytest.raises(AskingError, match=r"1 of 2 sites answered every question, 2 are needed: two lacks 20 samples"):
        do(home, sites_of(home, asked, two=refusing), reporter)
    assert len(np.load(home / "run" / "asked.npy")) == ENDS[0]
    assert len(asked["one"]) == ENDS[0]
    do(home, sites_of(home, asked), reporter)
    assert len(asked["one"]) == ASKED


def test_with_fewer_sites_needed_the_others_choose_on(home: Path, reporter: Reporter) -> None:
    report = do(home, sites_of(home, two=refusing), reporter, ask={"min_sites": 1})
    assert [site["answers"] for site in report["sites"]] == [ASKED + TEST, 0]
    assert len(np.load(home / "run" / "asked.npy")) == ASKED


@pytest.mark.parametrize("cut", [1, 7, 9, 24])
def test_a_record_that_ends_within_a_round_is_refused(home: Path, reporter: Reporter, cut: int) -> None:
    do(home, sites_of(home), reporter)
    held = np.load(home / "run" / "asked.npy")
    np.save(home / "run" / "asked.npy", held[:cut])
    with pytest.raises(StorageError, match=r"is not 8 or 16 or 25 samples of a pool of 60, each once"):
        do(home, sites_of(home), reporter)


def test_a_sample_that_stands_in_two_rounds_is_refused(home: Path, reporter: Reporter) -> None:
    do(home, sites_of(home), reporter)
    held = np.load(home / "run" / "asked.npy")
    held[ENDS[0] : ENDS[1]] = held[: ENDS[0]]
    np.save(home / "run" / "asked.npy", held)
    with pytest.raises(StorageError, match="each once"):
        do(home, sites_of(home), reporter)


def test_a_round_that_was_lost_is_noticed_by_the_answers(home: Path, reporter: Reporter) -> None:
    do(home, sites_of(home), reporter)
    held = np.load(home / "run" / "asked.npy")
    np.save(home / "run" / "asked.npy", held[: ENDS[1]])
    with pytest.raises(StorageError, match="answers about other samples of the pool"):
        do(home, sites_of(home), reporter)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ask": {"samples": None}}, r"choose is 'k-centre', and samples is not given"),
        ({"ask": {"rounds": 1}}, r"rounds is 1, and choose is 'k-centre'"),
        ({"ask": {"choose": "random"}}, r"rounds is 3, and choose is 'random'"),
        ({"ask": {"samples": 2}}, r"samples is 2, fewer than rounds, 3"),
        ({"ask": {"rounds": 21}}, r"rounds"),
        ({"ask": {"choose": "best"}}, r"choose"),
        ({"student": {"learning": "direct-ce"}}, r"ask\.choose is 'k-centre'.*student\.learning is 'direct-ce'"),
        ({"student": {"learning": "layer-wise"}}, r"set ask\.choose to random, or student\.learning to soft-labels"),
        ({"student": {"learning": "filtered"}}, r"set ask\.choose to random"),
        ({"student": {"learning": "concentration"}}, r"set ask\.choose to random"),
        ({"privacy": {"secure_sum": True}}, r"ask\.samples is 25, and privacy\.secure_sum is true"),
    ],
)
def test_what_does_not_fit_is_refused_early(home: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        settings(home, **changes)


def test_multi_label_sites_and_sites_that_share_nothing_are_refused(home: Path, reporter: Reporter) -> None:
    multi = Sites({"one": honest}, labels={"one": "multi"})
    with pytest.raises(SettingsError, match=r"'ask\.choose' is 'k-centre'; with multi-label sites"):
        do(home, multi, reporter)
    apart = Sites({"one": honest, "two": honest}, classes={"two": ("c", "d", "e")})
    with pytest.raises(SettingsError, match="no two sites share two classes"):
        do(home, apart, reporter, run="apart", ask={"choose": "disagreement"})
    assert apart.attempts == {}


def test_quality_is_estimated_from_samples_that_were_drawn(home: Path, reporter: Reporter) -> None:
    report = do(home, sites_of(home), reporter)
    assert "the pool has 8 samples with labels" in json.dumps(report["quality"])
