"""A job that asks about a part of the pool: to all that follows the part is the pool, and nothing else is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import RecordDict

from consilience.common.data import from_arrays
from consilience.common.encoding import encode
from consilience.common.errors import ConsilienceError, PoolError, SettingsError, StorageError
from consilience.common.pool import Pool
from consilience.common.progress import Reporter
from consilience.common.protocol import MOST_SPAN, Answer, Question
from consilience.common.samples_asked import drawn
from consilience.common.settings import JobSettings
from consilience.server.answers import AnswerStore
from consilience.server.answers_about import About
from consilience.server.asked_pool import AskedPool, reach, span
from consilience.server.learning import StudentModel
from consilience.server.signatures import Signatures, check_signatures, complaint
from consilience.server.unify import unify
from helpers.jobs import JUDGED, build_home, job_settings, noise, run_job
from helpers.sites import DIGEST, POLICY, Handler, Sites, covered, honest, refusing, rows

SAMPLES, TEST, ASKED = 60, 12, 25
KEYS = {name: ec.derive_private_key(k + 2, ec.SECP384R1()) for k, name in enumerate(("one", "two"))}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    pool, test = noise(0, SAMPLES, TEST)
    labels = np.random.default_rng(1).integers(0, 3, SAMPLES)
    return build_home(tmp_path, pool, test, np.arange(TEST) % 3, ("c", "b", "a"), pool_labels=labels)


def settings(home: Path, **changes: Any) -> JobSettings:
    own = {"ask": {"question_size": 8, "samples": ASKED}}
    return job_settings(home, JUDGED, own, changes)


class Noting(Sites):
    """Sites that note which samples of which pool they were asked about."""

    def __init__(self, handlers: dict[str, Handler], **more: Any) -> None:
        super().__init__({name: self._noted(name, handler) for name, handler in handlers.items()}, **more)
        self.asked: dict[tuple[str, str, str], list[int]] = {}

    def _noted(self, name: str, handler: Handler) -> Handler:
        def noted(question: Question, attempt: int) -> RecordDict:
            with self.lock:
                self.asked.setdefault((name, question.pool, question.kind), []).extend(question.ids.tolist())
            return handler(question, attempt)

        return noted


def do(home: Path, sites: Sites, reporter: Reporter, *, run: str = "run", **changes: Any) -> dict[str, Any]:
    return run_job(home, sites, settings(home, **changes), reporter, run)


def whole() -> np.ndarray:
    """What honest sites answer about the whole pool."""
    return rows(Question(job="job", pool=DIGEST, start=0, stop=SAMPLES, encoding="f32", teacher=DIGEST, policy=POLICY))


def test_the_samples_that_were_drawn_are_asked_once_and_are_the_pool_of_all_that_follows(
    home: Path, reporter: Reporter
) -> None:
    offered = dict.fromkeys(KEYS, ("f16",))
    sites = Noting(dict.fromkeys(KEYS, honest), keys=KEYS, coverage=offered)
    report = do(home, sites, reporter)
    ids = np.load(home / "run" / "asked.npy")
    pool, test = Pool.open(home / "pool"), Pool.open(home / "test-pool")
    assert len(set(ids.tolist())) == ASKED
    expected = drawn(settings(home), SAMPLES)
    assert expected is not None
    assert np.array_equal(ids, expected)
    for name in KEYS:
        for kind in ("log-probs", "coverage"):
            assert sorted(sites.asked[name, pool.digest, kind]) == ids.tolist()
            assert sorted(sites.asked[name, test.digest, kind]) == list(range(TEST))
    assert all(contract.subset is not None for _, contract in sites.contracts)
    labels = np.load(home / "run" / "labels" / "q.npy")
    assert np.allclose(labels, unify([whole()[ids]] * 2, [(0, 1, 2)] * 2).probs, atol=1e-6)
    assert (report["pool"]["size"], report["pool"]["whole"]) == (ASKED, SAMPLES)
    assert [(site["answers"], site["asked"], site["missed"]) for site in report["sites"]] == [
        (ASKED + TEST, ASKED + TEST, 0)
    ] * 2
    page = (home / "run" / "report.html").read_text()
    words = "25 unlabelled images of the pool’s 60, drawn at random"
    assert words in (home / "run" / "card.md").read_text()
    assert "25 samples of its 60, drawn at random, of 16 × 16" in page.replace("\xa0", " ")
    # coverage and true labels are those of the samples that were asked about
    asked = Question(job="j", pool=DIGEST, start=0, stop=SAMPLES, encoding="f32", teacher=DIGEST, policy=POLICY)
    mean = float(np.asarray(covered(asked), np.float16)[ids].astype(np.float64).mean())
    assert report["sites"][0]["coverage"]["figures"]["mean"] == pytest.approx(mean, abs=1e-3)


def test_the_student_of_a_part_is_that_of_a_pool_of_these_samples_alone(home: Path, reporter: Reporter) -> None:
    ids = drawn(settings(home), SAMPLES)
    assert ids is not None
    pixels = Pool.open(home / "pool").take(ids)
    Pool.build(from_arrays(pixels[..., 0], None, (), where="test"), home / "small")
    np.save(home / "small.npy", np.load(home / "labels.npy")[ids])
    small = Pool.open(home / "small").digest

    def renumbered(question: Question, attempt: int) -> RecordDict:
        if question.pool != small:
            return honest(question, attempt)
        return Answer(question, encode(whole()[ids[question.ids]], "f32"), 0.1).to_content()

    part = do(home, Sites({"one": honest}), reporter)
    alone = do(
        home,
        Sites({"one": renumbered}),
        reporter,
        run="alone",
        pool="small",
        ask={"samples": None},
        judge={"pool_labels": "small.npy"},
    )
    images = Pool.open(home / "test-pool").read(0, TEST)
    for name in ("student", "oracle"):
        scores = [StudentModel(home / run / name).log_probs(images) for run in ("run", "alone")]
        assert np.array_equal(scores[0], scores[1])
    assert part["baselines"] == alone["baselines"]
    assert part["quality"] == alone["quality"]


def test_a_run_that_goes_on_asks_for_the_rest_of_the_same_samples(
    home: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConsilienceError, match="two lacks 37 samples"):
        do(home, Sites({"one": honest, "two": refusing}, keys=KEYS), reporter)
    ids = np.load(home / "run" / "asked.npy")
    # another release of NumPy may draw others: a run keeps those that it began with
    monkeypatch.setattr("consilience.server.asked_pool.drawn", lambda job, size: np.arange(ASKED))
    sites = Noting(dict.fromkeys(KEYS, honest), keys=KEYS)
    do(home, sites, reporter)
    assert ("one", Pool.open(home / "pool").digest, "log-probs") not in sites.asked
    assert sorted(sites.asked["two", Pool.open(home / "pool").digest, "log-probs"]) == ids.tolist()
    assert np.array_equal(np.load(home / "run" / "asked.npy"), ids)


def test_what_sites_signed_of_a_part_can_be_checked(home: Path, reporter: Reporter) -> None:
    report = do(home, Sites(dict.fromkeys(KEYS, honest), keys=KEYS), reporter)
    assert [site["signed"] for site in report["sites"]] == [ASKED + TEST] * 2
    found = check_signatures(Signatures.read(home / "run" / "student"), home / "run" / "answers")
    assert complaint(found) is None
    assert [(site.vouched, site.compared, site.unsigned) for site in found] == [(ASKED + TEST, ASKED + TEST, 0)] * 2
    path = home / "run" / "student" / "signatures.json"
    told = json.loads(path.read_text())
    assert told["sites"][0]["answers"][0]["size"] == SAMPLES
    part = next(each for each in told["sites"][0]["answers"][0]["signed"] if each["subset"] is not None)
    part["subset"] = None  # as if the whole range had been answered
    path.write_text(json.dumps(told))
    found = check_signatures(Signatures.read(home / "run" / "student"), home / "run" / "answers")
    assert "the signature is not the site's" in found[0].problems[0]


def test_as_many_samples_as_the_pool_has_are_the_pool(home: Path, reporter: Reporter) -> None:
    sites = Noting({"one": honest})
    report = do(home, sites, reporter, ask={"samples": SAMPLES})
    assert report["pool"]["whole"] is None
    assert not (home / "run" / "asked.npy").exists()
    assert {contract.subset for _, contract in sites.contracts} == {None}


def test_another_seed_draws_others_and_the_same_one_the_same(home: Path) -> None:
    first, again, other = (drawn(settings(home, seed=seed), SAMPLES) for seed in (0, 0, 1))
    assert first is not None
    assert other is not None
    assert again is not None
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    every = np.concatenate([held for k in range(200) if (held := drawn(settings(home, seed=k), SAMPLES)) is not None])
    counts = np.bincount(every, minlength=SAMPLES)
    expected = 200 * ASKED / SAMPLES
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected * (1 - ASKED / SAMPLES))


def test_a_test_pool_that_is_the_pool_is_refused(home: Path, reporter: Reporter) -> None:
    pixels = Pool.open(home / "pool").read(0, SAMPLES)
    np.savez(home / "all.npz", x=pixels[..., 0], y=np.arange(SAMPLES) % 3, names=np.array(["c", "b", "a"]))
    judge = {"test_pool": "pool", "test": {"kind": "npz", "path": "all.npz"}}
    with pytest.raises(PoolError, match=r"judge\.test_pool is the pool itself, of which ask\.samples"):
        do(home, Sites({"one": honest}), reporter, judge=judge)


def test_more_samples_than_the_pool_has_are_refused_before_asking(home: Path, reporter: Reporter) -> None:
    sites = Noting({"one": honest})
    with pytest.raises(SettingsError, match=r"'ask\.samples' is 61; the pool has 60 samples; allowed: 1 to 60"):
        do(home, sites, reporter, ask={"samples": SAMPLES + 1})
    assert sites.asked == {}


@pytest.mark.parametrize("number", [0, -1, 2.5, "many"])
def test_a_number_that_is_none_is_refused(home: Path, number: Any) -> None:
    with pytest.raises(SettingsError, match=r"ask\.samples"):
        settings(home, ask={"samples": number})


def test_sums_are_made_of_the_whole_pool(home: Path) -> None:
    with pytest.raises(SettingsError, match=r"ask\.samples is 25, and privacy\.secure_sum is true.*leave ask\.samples"):
        settings(home, privacy={"secure_sum": True})


@pytest.mark.parametrize(
    "held",
    [
        np.arange(ASKED)[::-1].copy(),
        np.arange(ASKED - 1),
        np.arange(ASKED) + SAMPLES - ASKED + 1,
        np.arange(ASKED) - 1,
        np.zeros(ASKED, np.int64),
        np.arange(ASKED, dtype=np.float64),
        np.arange(ASKED).reshape(5, 5),
        np.array([{}], dtype=object),
    ],
)
def test_a_damaged_record_of_the_samples_is_refused(home: Path, reporter: Reporter, held: np.ndarray) -> None:
    (home / "run").mkdir()
    np.save(home / "run" / "asked.npy", held, allow_pickle=True)
    with pytest.raises(StorageError, match=r"asked\.npy: is not 25 samples of a pool of 60, each once, ascending"):
        do(home, Sites({"one": honest}), reporter)


def test_answers_about_other_samples_than_the_run_asks_about_are_not_learnt_from(
    home: Path, reporter: Reporter
) -> None:
    do(home, Sites({"one": honest}), reporter)
    ids = np.load(home / "run" / "asked.npy")
    other = np.setdiff1d(np.arange(SAMPLES), ids)[:ASKED]
    np.save(home / "run" / "asked.npy", other)
    with pytest.raises(StorageError, match="answers about other samples of the pool"):
        do(home, Sites({"one": honest}), reporter)


def test_a_long_gap_is_bridged_by_no_question(tmp_path: Path) -> None:
    """Samples that are far apart are asked about in several questions: no part is longer than a record holds."""
    ids = np.array([3, 4, 5, 3 + MOST_SPAN, 7 + MOST_SPAN, 10**12], np.int64)
    assert [reach(ids, low, 6) for low in range(6)] == [3, 4, 4, 5, 5, 6]
    assert reach(ids, 0, 2) == 2
    assert span(ids, 0, 3) == (3, 6, None)
    start, stop, subset = span(ids, 1, 4)
    question = Question(
        job="j", pool=DIGEST, start=start, stop=stop, subset=subset, encoding="f32", teacher=DIGEST, policy=POLICY
    )
    assert question.ids.tolist() == ids[1:4].tolist()
    about = About(site="one", pool=DIGEST, size=6, teacher=DIGEST, policy=POLICY, encoding="f32", classes=3)
    store = AnswerStore(tmp_path, about, None, ids)
    assert store.reach(3, 6) == 5


def test_places_out_of_the_part_are_refused(home: Path) -> None:
    pool = Pool.open(home / "pool")
    part = AskedPool(pool.folder, pool.manifest, np.array([4, 9, 30]), 3)
    assert len(part) == 3
    assert np.array_equal(part.read(1, 3), pool.take([9, 30]))
    assert np.array_equal(part.take([2, 0]), pool.take([30, 4]))
    assert [(start, len(images)) for start, images in part.blocks(2)] == [(0, 2), (2, 1)]
    for wrong in (lambda: part.read(0, 4), lambda: part.take([3]), lambda: part.take([-1])):
        with pytest.raises(ConsilienceError, match="not all in the part of the pool"):
            wrong()
