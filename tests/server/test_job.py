"""A job with sites that fail, and with true labels that do not fit: what is used, what is said."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from rich.console import Console
from sklearn.metrics import roc_auc_score

from consilience.common.cards import SiteCard
from consilience.common.data import from_arrays
from consilience.common.encoding import encode
from consilience.common.errors import AskingError, DataError, PoolError, RunError, SettingsError, StorageError
from consilience.common.files import read_json
from consilience.common.pool import Pool
from consilience.common.progress import Reporter
from consilience.common.protocol import Answer, Question
from consilience.common.settings import JobSettings
from consilience.common.settings_file import dump_settings, parse_settings
from consilience.server import lessons, publishing_classes
from consilience.server.answers import AnswerStore
from consilience.server.app import app as server_app
from consilience.server.contract import RunContract
from consilience.server.job import Job
from consilience.server.report import comparable
from helpers.jobs import JUDGED, build_home, job_settings, noise, run_job
from helpers.sites import COVERAGE, DIGEST, POLICY, Handler, Sites, covered, grid_of, honest, refusing

SAMPLES, TEST = 40, 12


@pytest.fixture
def home(tmp_path: Path) -> Path:
    pool, test = noise(0, SAMPLES, TEST)
    names, labels = ("c", "b", "a", "z"), np.arange(SAMPLES) % 4
    return build_home(tmp_path, pool, test, np.arange(TEST) % 4, names, pool_labels=labels)


def settings(home: Path, **changes: Any) -> JobSettings:
    return job_settings(home, JUDGED, changes)


def do(
    home: Path,
    handlers: dict[str, Handler],
    reporter: Reporter,
    *,
    classes: dict[str, tuple[str, ...]] | None = None,
    cards: dict[str, str] | None = None,
    run: str = "run",
    fold_in: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    return do_with(home, Sites(handlers, cards, classes), reporter, run=run, fold_in=fold_in, **changes)


def do_with(
    home: Path,
    sites: Sites,
    reporter: Reporter,
    *,
    run: str = "run",
    fold_in: bool = False,
    submission: float = 0.0,
    **changes: Any,
) -> dict[str, Any]:
    return run_job(home, sites, settings(home, **changes), reporter, run, fold_in=fold_in, submission=submission)


def test_a_site_that_fails_stops_the_job_by_default_and_names_itself(home: Path, reporter: Reporter) -> None:
    with pytest.raises(AskingError, match=r"1 of 2 sites.*2 are needed: bad lacks 52 samples.*teacher-failed"):
        do(home, {"bad": refusing, "good": honest}, reporter)
    assert len(list((home / "run" / "answers" / "good").glob("*/answers.bin"))) == 2
    report = do(home, {"bad": honest, "good": honest}, reporter)
    assert [site["answers"] for site in report["sites"]] == [52, 52]
    events = [json.loads(line) for line in (home / "run" / "events.jsonl").read_text().splitlines()]
    good = [(e["pool"], e["start"]) for e in events if e["event"] == "asked" and e["site"] == "good"]
    assert len(good) == len(set(good)) == 4


def test_with_fewer_sites_allowed_the_rest_is_used_and_the_report_says_so(home: Path, reporter: Reporter) -> None:
    report = do(home, {"bad": refusing, "good": honest}, reporter, ask={"min_sites": 1})
    by_name = {site["name"]: site for site in report["sites"]}
    assert by_name["good"]["answers"] == 52
    assert by_name["bad"]["answers"] == 0
    assert "teacher-failed" in json.dumps(by_name["bad"])
    assert report["student"]["accuracy"] is not None


def test_a_class_no_site_knows_counts_as_wrong_for_all(home: Path, reporter: Reporter) -> None:
    report = do(home, {"one": honest}, reporter)
    assert report["student"]["accuracy"] <= 0.75  # every fourth test image is a "z"
    assert report["baselines"]["oracle"]["accuracy"] <= 0.75


def test_without_true_labels_there_is_no_oracle_and_without_a_test_set_no_score(home: Path, reporter: Reporter) -> None:
    report = do(home, {"one": honest}, reporter, judge={"pool_labels": None})
    assert report["baselines"]["oracle"] is None or report["baselines"]["oracle"]["accuracy"] is None
    for path in (home / "run").rglob("*.safetensors"):
        assert "oracle" not in str(path)
    bare = settings(home).model_copy(update={"judge": type(settings(home).judge)()})
    run = home / "bare"
    run.mkdir()
    dump_settings(bare, run / "job.yaml")
    with grid_of(Sites({"one": honest})) as grid:
        Job.open(run, reporter).do(grid)
    assert read_json(run / "report.json")["student"]["accuracy"] is None
    assert (run / "report.html").exists()


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.arange(SAMPLES - 1), "has shape"),
        (np.full(SAMPLES, 0.5), "float64"),
        (np.full(SAMPLES, 4), "label 4 of sample 0 is out of range; allowed: 0 to 3"),
        (np.full(SAMPLES, -1), "label -1 of sample 0"),
    ],
)
def test_true_labels_that_do_not_fit(home: Path, reporter: Reporter, labels: np.ndarray, words: str) -> None:
    np.save(home / "labels.npy", labels)
    with pytest.raises(DataError, match=words):
        do(home, {"one": honest}, reporter)


def test_true_labels_that_are_no_array(home: Path, reporter: Reporter) -> None:
    (home / "labels.npy").write_bytes(b"junk")
    with pytest.raises(DataError, match="cannot be read as a NumPy array"):
        do(home, {"one": honest}, reporter)


def test_test_images_of_another_shape_or_number_are_refused_before_asking(home: Path, reporter: Reporter) -> None:
    np.savez(home / "test.npz", x=np.zeros((TEST, 8, 8), np.uint8), y=np.zeros(TEST, int), names=np.array(["a"]))
    with pytest.raises(DataError, match=r"\(8, 8, 1\); the pool's have \(16, 16, 1\)"):
        do(home, {"one": honest}, reporter)
    np.savez(home / "test.npz", x=np.zeros((5, 16, 16), np.uint8), y=np.zeros(5, int), names=np.array(["a"]))
    with pytest.raises(PoolError, match="has 12 samples"):
        do(home, {"one": honest}, reporter)
    np.savez(home / "test.npz", x=np.zeros((0, 16, 16), np.uint8), y=np.zeros(0, int), names=np.array(["a"]))
    with pytest.raises(DataError, match="holds no images"):
        do(home, {"one": honest}, reporter)
    np.savez(home / "test.npz", x=np.zeros((TEST, 16, 16), np.uint8))
    with pytest.raises(DataError, match="no labels"):
        do(home, {"one": honest}, reporter)


def test_a_job_without_a_pool_and_an_encoding_no_site_allows(home: Path, reporter: Reporter) -> None:
    with pytest.raises(SettingsError, match="'pool' is missing"):
        do(home, {"one": honest}, reporter, pool=None)


def test_a_site_that_changed_since_the_run_began_is_named(home: Path, reporter: Reporter) -> None:
    do(home, {"one": honest, "two": honest}, reporter)
    contract = home / "run" / "contract.json"
    held = read_json(contract)
    held["sites"][1]["teacher"] = "b" * 64
    contract.write_text(json.dumps(held))
    for index in (home / "run" / "answers" / "one").glob("*/index.jsonl"):
        index.unlink()
    with pytest.raises(RunError, match="another"):
        do(home, {"one": honest, "two": honest}, reporter)


def test_a_pool_that_changed_since_the_run_began_is_refused(home: Path, reporter: Reporter) -> None:
    do(home, {"one": honest}, reporter)
    for path in (home / "pool").iterdir():
        path.unlink()
    other = np.zeros((SAMPLES, 16, 16), np.uint8)
    Pool.build(from_arrays(other, None, (), where="test"), home / "pool")
    with pytest.raises(PoolError, match="a pool has changed"):
        do(home, {"one": honest}, reporter)


def test_a_test_pool_with_other_images_is_refused(home: Path, reporter: Reporter) -> None:
    with np.load(home / "test.npz") as file:
        held = dict(file)
    np.savez(home / "test.npz", x=held["x"][::-1], y=held["y"], names=held["names"])
    with pytest.raises(PoolError, match=r"other images than judge\.test, or another order"):
        do(home, {"one": honest}, reporter)


def test_a_pool_whose_bytes_changed_at_the_server_is_not_learnt_from(home: Path, reporter: Reporter) -> None:
    do(home, {"one": honest}, reporter)
    shard = home / "pool" / "shard-00000.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(PoolError, match="bytes differ from the manifest"):
        do(home, {"one": honest}, reporter)


@pytest.mark.parametrize("method", ["sd", "mf-p", "mf-lv", "mf-lf"])
def test_every_method_of_unification_makes_labels(home: Path, reporter: Reporter, method: str) -> None:
    report = do(home, {"one": honest, "two": honest}, reporter, unify={"method": method}, judge={"pool_labels": None})
    assert report["unify"]["method"] == method
    labels = np.load(home / "run" / "labels" / "q.npy")
    assert labels.shape == (SAMPLES, 3)
    assert np.allclose(labels.sum(axis=1), 1, atol=1e-5)


OTHER = {"other": ("c", "d", "e")}


def first_half(question: Question, attempt: int) -> RecordDict:
    return refusing(question, attempt) if question.start >= 16 else honest(question, attempt)


def not_the_test_pool(question: Question, attempt: int) -> RecordDict:
    return refusing(question, attempt) if question.stop == TEST else honest(question, attempt)


@pytest.mark.parametrize("learning", ["soft-labels", "direct-ce", "direct-mf-lf"])
def test_partial_answers_are_used_and_completed_later(home: Path, reporter: Reporter, learning: str) -> None:
    changes: dict[str, Any] = {"ask": {"min_sites": 1}, "student": {"learning": learning}, "classes": OTHER}
    partial = do(home, {"other": first_half, "good": honest}, reporter, **changes)
    assert partial["labels"]["names"] == ["a", "b", "c", "d", "e"]
    assert partial["pool"]["left_out"] == SAMPLES - 16
    assert partial["pool"]["unknown"] == {"d": SAMPLES - 16, "e": SAMPLES - 16}
    other = next(site for site in partial["sites"] if site["name"] == "other")
    assert (other["took_part"], other["answers"], other["missed"]) == (True, 16 + TEST, SAMPLES - 16)
    assert "teacher-failed" in other["reason"]
    assert any("left out of learning" in warning for warning in partial["warnings"])
    assert partial["baselines"]["unified_ensemble"]["accuracy"] is not None
    labels = np.load(home / "run" / "labels" / "q.npy")
    assert np.allclose(labels[:16].sum(axis=1), 1, atol=1e-5)
    assert not labels[16:].any()

    completed = do(home, {"other": honest, "good": honest}, reporter, **changes)
    fresh = do(home, {"other": honest, "good": honest}, reporter, run="fresh", **changes)
    assert comparable(completed) == comparable(fresh)
    assert comparable(completed)["learning"] != comparable(partial)["learning"]
    student = ["student", "model.safetensors"]
    assert home.joinpath("run", *student).read_bytes() == home.joinpath("fresh", *student).read_bytes()


def test_without_a_sample_that_can_be_learnt_from_the_job_stops(home: Path, reporter: Reporter) -> None:
    def last_half(question: Question, attempt: int) -> RecordDict:
        return honest(question, attempt) if question.start >= 16 else refusing(question, attempt)

    handlers = {"one": honest, "two": first_half, "three": last_half}
    classes = {"two": ("c", "d", "b"), "three": ("c", "e", "b")}
    with pytest.raises(AskingError, match=r"No pool sample was answered by sites that together know every class.*e, d"):
        do(home, handlers, reporter, classes=classes, ask={"min_sites": 1})


def test_baselines_are_judged_with_the_sites_that_answered_the_whole_test_pool(home: Path, reporter: Reporter) -> None:
    handlers = {"good": honest, "other": not_the_test_pool}
    report = do(home, handlers, reporter, classes=OTHER, ask={"min_sites": 1})
    assert report["pool"]["left_out"] == 0
    assert report["baselines"]["unified_ensemble"]["accuracy"] is None
    assert report["baselines"]["best_site"]["site"] == "good"
    assert any("judged without other" in warning for warning in report["warnings"])
    assert any("no unified ensemble" in warning for warning in report["warnings"])


def test_a_site_that_does_not_agree_is_left_out_where_enough_others_are_there(home: Path, reporter: Reporter) -> None:
    report = do(home, {"good": honest, "stubborn": honest}, reporter, ask={"min_sites": 1})
    assert [site["name"] for site in report["sites"]] == ["good"]
    assert "unknown-pool" in report["left_out"]["stubborn"]
    assert any(warning.startswith("Stubborn does not take part") for warning in report["warnings"])
    events = [json.loads(line) for line in (home / "run" / "events.jsonl").read_text().splitlines()]
    assert [e["who"] for e in events if e["event"] == "left-out"] == ["stubborn"]
    assert "stubborn" not in {card["name"] for card in read_json(home / "run" / "contract.json")["sites"]}
    again = do(home, {"good": honest, "stubborn": honest}, reporter, ask={"min_sites": 1})
    assert comparable(again) == comparable(report)


@pytest.mark.parametrize(
    ("odd", "changes", "words"),
    [
        (("a", "b", "b"), {}, "names 'b' twice"),
        (("a", "b", "beta"), {"labels": {"synonyms": {"b": ["beta"]}}}, "both 'b'"),
        (("a", "x"), {"labels": {"classes": ["a", "b", "c"]}}, "labels.classes lacks x"),
    ],
)
def test_a_site_whose_classes_do_not_fit_is_left_out_where_enough_others_are_there(
    home: Path, reporter: Reporter, odd: tuple[str, ...], changes: dict[str, Any], words: str
) -> None:
    handlers, classes = {"good": honest, "odd": honest}, {"odd": odd}
    report = do(home, handlers, reporter, classes=classes, ask={"min_sites": 1}, **changes)
    assert [site["name"] for site in report["sites"]] == ["good"]
    assert words in report["left_out"]["odd"]
    with pytest.raises(AskingError, match=f"1 of 2 sites.*odd: .*{words}"):
        do(home, handlers, reporter, run="few", classes=classes, ask={"min_sites": 2}, **changes)


def test_a_site_whose_policy_lacks_the_encoding_is_left_out_where_enough_others_are_there(
    home: Path, reporter: Reporter
) -> None:
    class Half(Sites):
        def card(self, message: Message, context: Context) -> Message:
            reply = super().card(message, context)
            held = SiteCard.from_content(reply.content)
            if held.name == "half":
                held = held.model_copy(update={"encodings": ("f16",)})
            return Message(held.to_content(), reply_to=message)

    sites = Half({"good": honest, "half": honest})
    report = do_with(home, sites, reporter, ask={"min_sites": 1})
    assert "site half allows: f16" in report["left_out"]["half"]
    with pytest.raises(SettingsError, match="site half allows: f16"):
        do_with(home, sites, reporter, run="strict")


def test_a_site_that_changed_counts_as_away_where_enough_others_remain(home: Path, reporter: Reporter) -> None:
    ask = {"min_sites": 1, "wait": 0}
    with pytest.raises(AskingError, match="0 of 2 sites answered"):
        do(home, {"one": first_half, "two": first_half}, reporter, ask=ask)
    changed = {"two": ("x", "y", "z")}
    with pytest.raises(AskingError, match=r"1 of the 2 sites this run needs.*two: its card is not the one"):
        do(home, {"one": honest, "two": honest}, reporter, classes=changed, ask={"min_sites": 2, "wait": 0})
    report = do(home, {"one": honest, "two": honest}, reporter, classes=changed, ask=ask)
    two = next(site for site in report["sites"] if site["name"] == "two")
    assert (two["took_part"], two["missed"]) == (True, 24)
    assert "its card is not the one this run began with" in two["reason"]
    report = do(home, {"two": honest}, reporter, ask=ask)
    assert [site["missed"] for site in report["sites"]] == [0, 0]


def test_where_too_few_remain_each_reason_is_told(home: Path, reporter: Reporter) -> None:
    handlers = {"good": honest, "rude": honest, "stubborn": honest}
    with pytest.raises(AskingError, match=r"1 of 2 sites.*node 101: .*; stubborn: .*unknown-pool"):
        do(home, handlers, reporter, cards={"rude": "../rude"}, ask={"min_sites": 2})
    assert not (home / "run" / "contract.json").exists()
    with pytest.raises(AskingError, match=r"Site stubborn cannot take part.*unknown-pool"):
        do(home, {"good": honest, "stubborn": honest}, reporter, run="strict")


def test_a_resumed_run_waits_for_its_sites_and_names_those_that_are_not_there(home: Path, reporter: Reporter) -> None:
    with pytest.raises(AskingError, match="two lacks 24 samples"):
        do(home, {"one": honest, "two": first_half}, reporter, ask={"wait": 0})
    with pytest.raises(AskingError, match=r"1 of the 2 sites this run needs.*not there: two"):
        do(home, {"one": honest}, reporter, ask={"wait": 0})
    sites = Sites({"two": honest})  # a site that is done need not be there
    report = do_with(home, sites, reporter, ask={"wait": 0})
    assert [site["missed"] for site in report["sites"]] == [0, 0]
    assert sites.attempts == {("two", 16): 1, ("two", 32): 1}


def test_with_fewer_sites_needed_a_resumed_run_uses_what_an_absent_site_gave(home: Path, reporter: Reporter) -> None:
    with pytest.raises(AskingError):
        do(home, {"one": first_half, "two": first_half}, reporter, ask={"min_sites": 1})
    report = do(home, {"one": honest}, reporter, ask={"min_sites": 1})
    two = next(site for site in report["sites"] if site["name"] == "two")
    assert (two["took_part"], two["missed"], two["reason"]) == (True, 24, "it was not connected")


NEW = {"new": ("c", "d", "e")}


@pytest.mark.parametrize("learning", ["soft-labels", "direct-ce"])
def test_a_site_that_joins_later_is_folded_in_by_asking_only_it(home: Path, reporter: Reporter, learning: str) -> None:
    student = {"learning": learning}
    before = do(home, {"one": honest, "two": honest}, reporter, student=student)
    sites = Sites({"new": honest, "two": honest}, classes=NEW)  # one is not there
    report = do_with(home, sites, reporter, fold_in=True, student=student)
    assert {name for name, _ in sites.attempts} == {"new"}
    assert report["labels"]["names"] == ["c", "d", "e", "a", "b"]
    everybody = {"one": honest, "two": honest, "new": honest}
    fresh = do(home, everybody, reporter, run="fresh", classes=NEW, student=student)
    assert comparable(report) == comparable(fresh)
    assert comparable(report) != comparable(before)
    assert read_json(home / "run" / "contract.json") == read_json(home / "fresh" / "contract.json")


def test_without_fold_in_a_new_site_is_not_asked(home: Path, reporter: Reporter) -> None:
    with pytest.raises(AskingError):
        do(home, {"one": first_half}, reporter)
    shown = io.StringIO()
    sites = Sites({"one": honest, "new": honest})
    with Reporter(console=Console(file=shown, width=200)) as loud:
        report = do_with(home, sites, loud)
    assert [site["name"] for site in report["sites"]] == ["one"]
    assert {name for name, _ in sites.attempts} == {"one"}
    assert "new joined after this run began" in shown.getvalue()
    assert "--fold-in" in shown.getvalue()


def test_folding_in_waits_for_a_new_site_and_says_when_none_came(home: Path, reporter: Reporter) -> None:
    do(home, {"one": honest}, reporter, ask={"wait": 0})
    with pytest.raises(AskingError, match="No new site is connected"):
        do(home, {"one": honest}, reporter, fold_in=True, ask={"wait": 0})


def test_a_fold_in_that_was_stopped_goes_on(home: Path, reporter: Reporter) -> None:
    do(home, {"one": honest}, reporter, ask={"wait": 0})
    with pytest.raises(AskingError, match="1 of 2 sites answered every question"):
        do(home, {"one": honest, "new": first_half}, reporter, fold_in=True, ask={"wait": 0})
    report = do(home, {"new": honest}, reporter, fold_in=True, ask={"wait": 0})
    assert [(site["name"], site["missed"]) for site in report["sites"]] == [("new", 0), ("one", 0)]


def test_a_run_goes_on_with_a_site_that_tells_figures_of_its_data_no_more() -> None:
    """It may tell them to a job that is approved, and to none after its policy's end."""
    card = SiteCard(
        name="one", classes=("a", "b"), encodings=("f32", "f16"), teacher=DIGEST, description="x", policy=POLICY,
        class_priors=(0.5, 0.5), holdout_accuracy=0.9,
    )  # fmt: skip
    job = parse_settings({"name": "job", "pool": "pool"}, JobSettings, source="job.yaml", folder=Path("/"))
    contract = RunContract.build(job, [card], (DIGEST,))
    assert not contract.differs(card.model_copy(update={"class_priors": None, "holdout_accuracy": None}))
    assert contract.differs(card.model_copy(update={"classes": ("a", "c")}))


def test_a_site_that_changed_is_not_folded_in(home: Path, reporter: Reporter) -> None:
    do(home, {"one": honest}, reporter)
    with pytest.raises(RunError, match="changed: site one"):
        do(home, {"one": honest, "new": honest}, reporter, fold_in=True, classes={"one": ("x", "y", "z")})


def test_the_server_app_takes_fold_in_from_the_run_configuration(home: Path, reporter: Reporter) -> None:
    do(home, {"one": honest}, reporter)
    run_config: dict[str, str | bool] = {"run": str(home / "run"), "quiet": True, "fold-in": True}
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config))
    with grid_of(Sites({"one": honest, "two": honest})) as grid:
        server_app(grid=grid, context=context)
    assert [site["name"] for site in read_json(home / "run" / "report.json")["sites"]] == ["one", "two"]


def test_a_server_killed_while_it_learns_does_not_ask_again_until_the_next_submission(
    home: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    ask = {"min_sites": 1}
    monkeypatch.setattr(Job, "learn", killed)
    with pytest.raises(KeyboardInterrupt):
        do_with(home, Sites({"one": honest, "two": first_half}), reporter, submission=5.0, ask=ask)
    monkeypatch.undo()
    sites = Sites({"one": honest, "two": honest})
    report = do_with(home, sites, reporter, submission=5.0, ask=ask)
    assert sites.attempts == {}
    two = next(site for site in report["sites"] if site["name"] == "two")
    assert two["missed"] == 24
    assert "teacher-failed" in two["reason"]
    report = do_with(home, sites, reporter, submission=6.0, ask=ask)
    assert sites.attempts == {("two", 16): 1, ("two", 32): 1}
    assert [site["missed"] for site in report["sites"]] == [0, 0]


def test_the_deadline_counts_from_when_asking_first_began_for_a_submission(
    home: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise StorageError("No space left on device")

    run_config: dict[str, str | bool | float] = {"run": str(home / "run"), "quiet": True, "submission": 5.0}
    ask, sites = {"deadline": 20.0, "retries": 2}, Sites({"one": honest})
    monkeypatch.setattr(AnswerStore, "append", full)
    with pytest.raises(StorageError):
        do_with(home, sites, reporter, submission=5.0, ask=ask)
    monkeypatch.undo()
    sites.attempts.clear()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 21)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config))
    with grid_of(sites) as grid, pytest.raises(AskingError, match="the deadline of 20 s passed"):
        server_app(grid=grid, context=context)
    assert sites.attempts == {}
    assert do_with(home, sites, reporter, submission=6.0, ask=ask)["sites"][0]["missed"] == 0


def test_progress_names_the_stage_and_ends_with_done(home: Path, reporter: Reporter) -> None:
    do(home, {"one": honest}, reporter)
    progress = read_json(home / "run" / "progress.json")
    assert progress["stage"] == "done"
    assert [(site["name"], site["answered"], site["asked"]) for site in progress["sites"]] == [("one", 52, 52)]


OFFERS: dict[str, Any] = {"coarse": ("u8",), "fine": ("u8", "f16")}
THREE: dict[str, Handler] = {"coarse": honest, "fine": honest, "none": honest}
CLASSES_OF = {"coarse": ("a", "b", "c"), "fine": ("c", "d", "e"), "none": ("e", "a", "b")}


def covering(handlers: dict[str, Handler] | None = None, **changes: Any) -> Sites:
    return Sites(handlers or THREE, classes=CLASSES_OF, coverage=OFFERS, **changes)


def no_coverage(question: Question, attempt: int) -> RecordDict:
    return refusing(question, attempt) if question.kind == "coverage" else honest(question, attempt)


def some_coverage(question: Question, attempt: int) -> RecordDict:
    return (
        refusing(question, attempt)
        if question.kind == "coverage" and question.start < 16
        else honest(question, attempt)
    )


def sites_of(report: dict[str, Any]) -> dict[str, Any]:
    return {site["name"]: site for site in report["sites"]}


@pytest.mark.parametrize("pool_labels", ["labels.npy", None])
def test_sites_that_offer_coverage_are_asked_for_it_as_finely_as_they_allow(
    home: Path, reporter: Reporter, pool_labels: str | None
) -> None:
    sites = covering()
    report = do_with(home, sites, reporter, judge={"pool_labels": pool_labels})
    assert {name for name, _ in sites.asked_coverage} == {"coarse", "fine"}
    found = sites_of(report)
    told = {"answers": SAMPLES + TEST, "missed": 0, "asked": True}
    assert found["fine"]["coverage"].items() >= {**told, "encoding": "f16", "bytes": 2 * (SAMPLES + TEST)}.items()
    assert found["coarse"]["coverage"].items() >= {**told, "encoding": "u8", "bytes": SAMPLES + TEST}.items()
    nothing = {"answers": 0, "missed": 0, "asked": False}
    assert found["none"]["coverage"].items() >= {**nothing, "encoding": None, "bytes": 0}.items()
    assert [site["answers"] for site in report["sites"]] == [SAMPLES + TEST] * 3
    pool = Pool.open(home / "pool")
    for name, kinds in (("fine", 4), ("coarse", 4), ("none", 2)):
        folders = list((home / "run" / "answers" / name).iterdir())
        assert len(folders) == kinds
    about = read_json(home / "run" / "answers" / "fine" / f"{pool.digest[:12]}-coverage" / "about.json")
    assert (about["kind"], about["teacher"], about["classes"]) == ("coverage", COVERAGE, 1)
    # AUROC of the numbers themselves against "the true class is one of mine"; the classes of the data are c, b, a, z
    count = SAMPLES if pool_labels else TEST
    names = np.array(["c", "b", "a", "z"])[np.arange(count) % 4]
    question = Question(job="j", pool="a" * 64, start=0, stop=count, encoding="f32", teacher="a" * 64, policy="c" * 16)
    for name in ("fine", "coarse"):
        mine = np.isin(names, CLASSES_OF[name])
        expected = roc_auc_score(mine, covered(question))
        assert found[name]["coverage_auroc"] == pytest.approx(expected)
    assert found["none"]["coverage_auroc"] is None
    card = (home / "run" / "card.md").read_text()
    assert "| fine (coverage) | 52 | 1 | 16-bit (f16) | 104 (104" in card
    assert "| coarse (coverage) | 52 | 1 | 8-bit (u8) | 52 (52" in card
    assert "none (coverage)" not in card


@pytest.mark.parametrize(
    "changes", [{"ask": {"coverage": False}}, *({"unify": {"method": m}} for m in ("mf-p", "mf-lv", "mf-lf"))]
)
def test_nobody_is_asked_for_coverage_that_is_not_wanted(
    home: Path, reporter: Reporter, changes: dict[str, Any]
) -> None:
    sites = covering()
    report = do_with(home, sites, reporter, **changes)
    assert sites.asked_coverage == {}
    assert not any(site["coverage"]["asked"] for site in report["sites"])
    assert not list((home / "run" / "answers").glob("*/*-coverage"))


def test_a_site_that_fails_at_its_coverage_takes_part_without_and_is_asked_again(
    home: Path, reporter: Reporter
) -> None:
    report = do_with(home, covering({**THREE, "fine": no_coverage}), reporter)
    assert [site["took_part"] for site in report["sites"]] == [True] * 3
    assert any(re.match(r"Site fine: no coverage for 52.*teacher-failed", w) for w in report["warnings"])
    do_with(home, Sites(THREE, classes=CLASSES_OF, coverage={"coarse": ("u8",)}), reporter, run="none")
    labels = [np.load(home / run / "labels" / "q.npy") for run in ("run", "none")]
    assert np.array_equal(*labels)
    sites = covering()
    do_with(home, sites, reporter)
    assert sites.attempts == {}
    assert sites.asked_coverage == {("fine", 0): 2, ("fine", 16): 1, ("fine", 32): 1}  # 0 in both pools


@pytest.mark.parametrize("learning", ["soft-labels", "direct-ce", "direct-mf-lf"])
def test_partial_coverage_is_used_and_completed_later(home: Path, reporter: Reporter, learning: str) -> None:
    changes: dict[str, Any] = {"ask": {"min_sites": 2}, "student": {"learning": learning}}
    partial = do_with(home, covering({**THREE, "fine": some_coverage}), reporter, **changes)
    fine = sites_of(partial)["fine"]
    assert (fine["coverage"]["answers"], fine["coverage"]["missed"], fine["missed"]) == (24, 28, 0)
    assert fine["took_part"] is True
    assert any("Site fine: no coverage for 28" in warning for warning in partial["warnings"])
    assert any("judged without the coverage of fine" in warning for warning in partial["warnings"])
    assert partial["pool"]["left_out"] == 0
    diagnostics = read_json(home / "run" / "labels" / "diagnostics.json")
    assert diagnostics["coverage"] == {"coarse": SAMPLES, "fine": 24}

    completed = do_with(home, covering(), reporter, **changes)
    fresh = do_with(home, covering(), reporter, run="fresh", **changes)
    assert comparable(completed) == comparable(fresh)
    if learning == "direct-ce":
        assert completed["learning"]["student"][0]["loss"] != partial["learning"]["student"][0]["loss"]
    student = ["student", "model.safetensors"]
    assert home.joinpath("run", *student).read_bytes() == home.joinpath("fresh", *student).read_bytes()


def test_a_server_killed_while_coverage_comes_in_asks_for_the_rest_only(
    home: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = AnswerStore.append
    stored: list[Question] = []

    def killed(store: AnswerStore, answer: Any) -> None:
        if sum(question.kind == "coverage" for question in stored) == 3:
            raise KeyboardInterrupt
        append(store, answer)
        stored.append(answer.question)

    monkeypatch.setattr(AnswerStore, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        do_with(home, covering(), reporter)
    monkeypatch.undo()
    sites = covering()
    report = do_with(home, sites, reporter)
    logs = sum(question.kind == "log-probs" for question in stored)
    assert sum(sites.attempts.values()) == 3 * 4 - logs
    assert sum(sites.asked_coverage.values()) == 2 * 4 - 3
    assert comparable(report) == comparable(do_with(home, covering(), reporter, run="fresh"))


def test_a_site_with_coverage_is_folded_in(home: Path, reporter: Reporter) -> None:
    coarse = {"coarse": honest}
    do_with(home, covering(coarse), reporter)
    sites = covering()
    report = do_with(home, sites, reporter, fold_in=True)
    assert {name for name, _ in sites.asked_coverage} == {"fine"}
    assert comparable(report) == comparable(do_with(home, covering(), reporter, run="fresh"))


def test_a_site_whose_coverage_changed_is_named(home: Path, reporter: Reporter) -> None:
    do_with(home, covering({**THREE, "fine": no_coverage}), reporter)
    other = Sites(THREE, classes=CLASSES_OF, coverage={**OFFERS, "fine": ("u8",)})
    with pytest.raises(RunError, match="changed: site fine"):
        do_with(home, other, reporter)


def test_the_unified_ensemble_takes_the_coverage_of_the_test_pool(
    home: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    real = publishing_classes.unifier

    def recorded(*about: Any, **more: Any) -> Any:
        solve = real(*about, **more)

        def call(log_probs: Any, *, coverage: Any) -> Any:
            given.append(coverage)
            return solve(log_probs, coverage=coverage)

        return call

    monkeypatch.setattr(publishing_classes, "unifier", recorded)
    report = do_with(home, covering(), reporter)
    question = Question(job="j", pool="a" * 64, start=0, stop=TEST, encoding="f32", teacher="a" * 64, policy="c" * 16)
    ((coarse, fine, none),) = given
    assert none is None
    assert np.array_equal(fine, covered(question))
    assert np.allclose(coarse, covered(question), atol=1 / 512)
    assert report["baselines"]["unified_ensemble"]["accuracy"] is not None


APART: dict[str, tuple[str, ...]] = {"one": ("a", "b"), "three": ("e", "f", "g"), "two": ("c", "d")}


def apart(question: Question, attempt: int) -> RecordDict:
    if question.kind == "coverage":
        return honest(question, attempt)
    rows = np.full((len(question), 2), np.log(0.5), np.float32)
    return Answer(question, encode(rows, "f32"), 0.1).to_content()


@pytest.mark.parametrize(
    ("covers", "learning", "warned"),
    [
        ({}, "soft-labels", ["fall apart"]),
        ({"two"}, "soft-labels", ["fall apart"]),
        ({"two", "three"}, "soft-labels", []),
        ({"two", "three"}, "direct-ce", []),
        ({"two"}, "direct-ce", ["fall apart", "learnt by direct-ce"]),
        ({"two", "three"}, "direct-mf-lf", ["learnt by direct-mf-lf"]),
    ],
)
def test_what_decides_between_components_is_said(
    home: Path, reporter: Reporter, covers: set[str], learning: str, warned: list[str]
) -> None:
    handlers: dict[str, Handler] = {"one": apart, "three": honest, "two": apart}
    sites = Sites(handlers, classes=APART, coverage=dict.fromkeys(covers, ("f16",)))
    report = do_with(home, sites, reporter, student={"learning": learning}, judge={"pool_labels": None})
    words = ("fall apart", "learnt by")
    assert [w for w in report["warnings"] if any(word in w for word in words)] == [
        next(w for w in report["warnings"] if word in w) for word in warned
    ]
    joined = covers == {"two", "three"}
    assert report["unify"]["joined"] is joined
    card = (home / "run" / "card.md").read_text()
    assert ("settled by the sites' coverage" in card) is joined
    assert ("Across components the sites’ coverage decides" in (home / "run" / "report.html").read_text()) is joined


def test_how_likely_samples_are_outside_goes_into_learning(
    home: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"unify": {"other": 0.5}, "judge": {"pool_labels": None}}
    report = do_with(home, covering(), reporter, **changes)
    assert np.load(home / "run" / "labels" / "other.npy").shape == (SAMPLES,)
    with monkeypatch.context() as patched:
        patched.setattr(lessons, "load_other", lambda _: None)
        blind = do_with(home, covering(), reporter, run="blind", **changes)
    for name in ("q.npy", "other.npy"):  # the labels are the same, and only what is learnt of them differs
        assert np.array_equal(*(np.load(home / run / "labels" / name) for run in ("run", "blind")))
    assert report["learning"]["student"][0]["loss"] != blind["learning"]["student"][0]["loss"]
    models = [(home / run / "student" / "model.safetensors").read_bytes() for run in ("run", "blind")]
    assert (models[0] == models[1]) is False
    do_with(home, covering(), reporter, run="plain", judge={"pool_labels": None})
    assert not (home / "plain" / "labels" / "other.npy").exists()


def test_samples_that_only_a_liar_answered_and_its_own_class_are_not_learnt(home: Path, reporter: Reporter) -> None:
    def telling(step: int, width: int, stop: int) -> Handler:
        def answer(question: Question, attempt: int) -> RecordDict:
            if question.start >= stop:
                return refusing(question, attempt)
            likely = np.arange(question.start, question.stop)[:, None] % 3 == (np.arange(width) + step) % 3
            rows = np.where(likely & (np.arange(width) < 3), 0.8, 0.1)
            rows = np.log(rows / rows.sum(axis=1, keepdims=True))
            return Answer(question, encode(rows, question.encoding), 0.1).to_content()

        return answer

    handlers = {"liar": telling(1, 4, 99), "one": telling(0, 3, 32), "two": telling(0, 3, 32)}
    classes = {"liar": ("a", "b", "c", "own"), "one": ("a", "b", "c"), "two": ("a", "b", "c")}
    report = do(home, handlers, reporter, classes=classes, unify={"robust": True}, ask={"min_sites": 1})
    assert report["unify"]["trust"]["lost"] == ["own"]
    assert report["pool"]["left_out"] == 8
    assert any("No label has own" in warning for warning in report["warnings"])
    labels = np.load(home / "run" / "labels" / "q.npy")
    assert not labels[32:].any()
    assert not labels[:, 3].any()
    assert np.array_equal(labels[:32].argmax(axis=1), np.arange(32) % 3)
    assert report["baselines"]["unified_ensemble"]["accuracy"] is not None


def test_a_site_that_the_others_contradict_is_left_out_and_named(home: Path, reporter: Reporter) -> None:
    def telling(step: int) -> Handler:
        def answer(question: Question, attempt: int) -> RecordDict:
            likely = np.arange(question.start, question.stop)[:, None] % 3 == (np.arange(3) + step) % 3
            return Answer(question, encode(np.log(np.where(likely, 0.8, 0.1)), question.encoding), 0.1).to_content()

        return answer

    sites = {"liar": telling(1), "one": telling(0), "two": telling(0)}
    report = do(home, sites, reporter, unify={"robust": True})
    trust = report["unify"]["trust"]
    assert {name: told["trust"] for name, told in trust["sites"].items()} == {"liar": 0.0, "one": 1.0, "two": 1.0}
    assert trust["unjudged"] == ["a", "b", "c"]  # thirteen samples of each are too few
    assert any("Site liar: its answers are left out" in warning for warning in report["warnings"])
    events = [json.loads(line) for line in (home / "run" / "events.jsonl").read_text().splitlines()]
    assert [e["site"] for e in events if e["event"] == "answers-left-out"] == ["liar"]
    honestly = do(home, {"one": telling(0), "two": telling(0)}, reporter, run="honest", unify={"robust": True})
    labels = [np.load(home / run / "labels" / "q.npy") for run in ("run", "honest")]
    assert np.allclose(*labels, atol=1e-6)
    assert report["baselines"]["unified_ensemble"] == honestly["baselines"]["unified_ensemble"]
    # forty samples are too few to estimate anything
    assert report["quality"]["accuracy"] is None
    assert "40 samples" in report["quality"]["reason"]
    assert do(home, sites, reporter, run="plain")["unify"]["trust"] is None
