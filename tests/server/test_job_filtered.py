"""A job that learns by filtered amalgamation: through blocks lent or asked, told and used; and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from flwr.common import RecordDict

from consilience.common.encoding import encode
from consilience.common.errors import AskingError, ConsilienceError, ProtocolError, SettingsError, StudentError
from consilience.common.files import read_json, write_json
from consilience.common.nets.tail_plan import sides, tail_demand
from consilience.common.progress import Reporter
from consilience.common.protocol import Answer, Question, Refusal
from consilience.common.settings import JobSettings
from consilience.common.settings_file import dump_settings
from consilience.deploy.local_grid import FIRST_NODE
from consilience.server.contract import RunContract
from consilience.server.export import export_student
from consilience.server.job import Job
from consilience.server.learning import StudentModel
from consilience.server.student.filtered_student import FilteredStudent
from helpers.feature_answers import images, log_probs, teacher
from helpers.filtered import TailSite, logits
from helpers.jobs import build_home, job_settings, run_job
from helpers.sites import Handler, ScriptedGrid, Sites

pytestmark = pytest.mark.usefixtures("one_thread", "unsynced")
CLASSES = {"east": ("a", "b", "c"), "west": ("c", "d", "e")}
SAMPLES = 60
PIXELS = images(SAMPLES)
WANTED = ["a", "b", "d"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    test, names = images(20, 3), ("a", "b", "c", "d", "e")
    many = np.random.default_rng(0).integers(0, 2, (20, 5)).astype(np.int8)
    np.savez(tmp_path / "many.npz", x=test, y=many, names=np.array(names))
    return build_home(tmp_path, PIXELS, test, np.arange(20) % 5, names, test_pool=False)


def handler(answers: np.ndarray) -> Handler:
    def handle(question: Question, attempt: int) -> RecordDict:
        rows = answers[question.start : question.stop]
        return Answer(question, encode(rows, question.encoding, odds=question.kind == "log-odds"), 0.1).to_content()

    return handle


def sites_of(
    allow: dict[str, str] | str = "questions", *, multi: bool = False, architecture: str = "cnn3@0.2", first: int = 1
) -> Sites:
    """Two sites with networks of their own, and tails where `allow` says so."""
    networks = {site: teacher(architecture, seed) for seed, site in enumerate(CLASSES, 1)}
    tell = logits if multi else log_probs
    each = dict.fromkeys(CLASSES, allow) if isinstance(allow, str) else allow
    return Sites(
        {site: handler(tell(network, PIXELS)) for site, network in networks.items()},
        classes=CLASSES,
        labels=dict.fromkeys(CLASSES, "multi") if multi else None,
        tails={site: TailSite(networks[site], architecture, first=first, allow=how) for site, how in each.items()},
    )


def settings(home: Path, filtered: dict[str, Any], student: dict[str, Any], **more: Any) -> JobSettings:
    own = {
        "architecture": "cnn3@0.3",
        "learning": "filtered",
        "classes": WANTED,
        "filtered": {"epochs": 1, **filtered},
        "fit": {"epochs": 2, "batch_size": 8, "precision": "f32", "augment": False},
    }
    return job_settings(home, {"student": own, "ask": {"question_size": 32, "wait": 5}}, {"student": student}, more)


def do(
    home: Path,
    sites: Sites,
    reporter: Reporter,
    filtered: dict[str, Any] | None = None,
    student: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    return run_job(home, sites, settings(home, filtered or {}, student or {}, **more), reporter)


def told_of(home: Path) -> dict[str, Any]:
    told: dict[str, Any] = read_json(home / "run" / "report.json")["student"]["filtered"]
    return told


def test_a_student_of_lent_blocks_is_told_loaded_and_exported(home: Path, reporter: Reporter) -> None:
    report = do(home, sites_of("blocks"), reporter)
    told = report["student"]["filtered"]
    assert [(b["site"], b["classes"], b["begins"]) for b in told["branches"]] == [
        ("east", ["a", "b"], "teacher"),
        ("west", ["d"], "teacher"),
    ]
    assert (list(told["lent"]), told["asked"], told["target"]) == (["east", "west"], {}, "unified")
    parts = told["parameters"]
    assert report["student"]["parameters"] == parts["total"] == parts["trunk"] + parts["filters"] + parts["branches"]
    assert report["student"]["classes"] == WANTED
    page, card = ((home / "run" / name).read_text().replace("\xa0", " ") for name in ("report.html", "card.md"))
    for text in (page, card):
        assert "made to order by filtered amalgamation (Ye et al., 2019)" in text
        assert f"It has {parts['total']:,} parameters" in text
        assert f"for all 5 classes that the sites know has {parts['whole']:,}" in text
    assert "Trunk and branches" in page
    assert "without their data (UHC" in card, "weights did leave"
    for text in (page, card):
        assert "No private sample or gradient left a site. The weights of the teacher’s last blocks did, from" in text
    assert "kept its data, and answered" in page
    assert f"east (last blocks, lent) | – | – | f32 | {told['lent']['east']:,} (" in card
    student = StudentModel(home / "run" / "student")
    assert isinstance(student.model, FilteredStudent)
    assert sum(each.numel() for each in student.model.parameters()) == parts["total"]
    export_student(student, home / "student.pt2")
    found = student.log_probs(PIXELS[:7])
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-5)
    exported = torch.export.load(home / "student.pt2").module()(torch.from_numpy(PIXELS[:7]))
    np.testing.assert_allclose(exported.detach().numpy(), found, atol=1e-4)


@pytest.mark.parametrize(
    ("filtered", "multi"),
    [
        ({}, False),
        ({"order": "sampled"}, False),
        ({"tasks": "label", "filters": "task", "epochs": 2}, True),
        ({"held_out": 0.5}, True),
    ],
)
def test_asked_blocks_teach_what_lent_ones_do_and_all_is_counted(
    home: Path, reporter: Reporter, filtered: dict[str, Any], multi: bool
) -> None:
    sites, more = sites_of(multi=multi), {"judge": {"test": None}}
    report = do(home, sites, reporter, filtered, **more)
    asked = report["student"]["filtered"]
    job = settings(home, filtered, {})
    contract = RunContract.load(home / "run" / "contract.json")
    for card in contract.sites:
        plan = tail_demand(job, card, SAMPLES, sides(job, (16, 16, 1)))
        (agreed,) = [c for name, c in sites.contracts if name == card.name]
        assert agreed.tail == plan
        assert plan is not None
        spent = asked["asked"][card.name]
        if "order" not in filtered:
            assert spent["rounds"] == plan.rounds == sites.tails[card.name].asked  # type: ignore[attr-defined]
            assert (spent["samples"], spent["sent"] + spent["received"]) == (plan.samples, plan.bytes)
        else:
            assert spent["samples"] <= plan.samples
            assert spent["sent"] + spent["received"] <= plan.bytes
    assert {branch["begins"] for branch in asked["branches"]} == {"fresh"}
    assert "stayed there, and were asked" in (home / "run" / "card.md").read_text()
    card = (home / "run" / "card.md").read_text().replace("\xa0", " ")
    assert "without their data or weights" in card
    assert "No private sample or weight left a site. What last blocks give for features that the server sent" in card
    spent = asked["asked"]["east"]
    assert f"east (last blocks, asked) | {spent['samples']:,} | – | f32 | {spent['received']:,} (" in card
    shutil.rmtree(home / "run")
    do(home, sites_of("blocks", multi=multi), reporter, filtered, **more)
    lent = told_of(home)
    for name, losses in asked["blocks"].items():
        np.testing.assert_allclose(losses, lent["blocks"][name], atol=1e-4)
    for one, other in zip(asked["branches"], lent["branches"], strict=True):
        assert one["agreement"] == pytest.approx(other["agreement"], abs=1e-4)


def test_sites_may_differ_in_what_they_allow(home: Path, reporter: Reporter) -> None:
    do(home, sites_of({"east": "blocks", "west": "questions"}), reporter)
    told = told_of(home)
    assert (list(told["lent"]), list(told["asked"])) == (["east"], ["west"])
    assert [branch["begins"] for branch in told["branches"]] == ["teacher", "fresh"]


def test_a_site_of_no_wanted_class_needs_no_tail_and_is_asked_nothing_of_it(home: Path, reporter: Reporter) -> None:
    sites = sites_of({"west": "blocks"})
    with pytest.raises(SettingsError, match="site east knows wanted classes"):
        do(home, sites, reporter, student={"classes": ["c", "d", "e"]})
    do(home, sites, reporter, student={"classes": ["d", "e"]})
    assert [branch["site"] for branch in told_of(home)["branches"]] == ["west"]
    assert dict(sites.contracts)["east"].tail is None


@pytest.mark.parametrize(
    ("filtered", "wanted", "branches"),
    [
        ({}, ["a", "c", "d"], [["a", "c"], ["c", "d"]]),
        ({"tasks": "label", "filters": "task", "hard": True}, ["a", "c", "d"], [["a"], ["c"], ["c"], ["d"]]),
        ({"target": "unified"}, ["e"], [["e"]]),
    ],
)
def test_labels_that_do_not_exclude_one_another(
    home: Path, reporter: Reporter, filtered: dict[str, Any], wanted: list[str], branches: list[list[str]]
) -> None:
    judge = {"test": {"kind": "npz", "path": "many.npz"}}
    report = do(home, sites_of("blocks", multi=True), reporter, filtered, {"classes": wanted}, judge=judge)
    assert [branch["classes"] for branch in report["student"]["filtered"]["branches"]] == branches
    assert report["student"]["filtered"]["target"] == filtered.get("target", "teachers")
    assert [score["name"] for score in report["multi_label"]["per_label"]] == wanted
    assert all(0 <= score["student"] <= 1 for score in report["multi_label"]["per_label"])
    student = StudentModel(home / "run" / "student")
    assert (student.labels, student.multi) == (tuple(wanted), True)
    assert student.log_probs(PIXELS[:4]).shape == (4, len(wanted))


def test_some_labels_are_wanted_of_unified_ones_too(home: Path, reporter: Reporter) -> None:
    sites, judge = sites_of({}, multi=True), {"test": {"kind": "npz", "path": "many.npz"}}
    report = do(home, sites, reporter, student={"learning": "soft-labels", "classes": ["e", "b"]}, judge=judge)
    assert [score["name"] for score in report["multi_label"]["per_label"]] == ["b", "e"]
    assert "wanted of 5 classes that the sites know." in (home / "run" / "card.md").read_text().replace("\xa0", " ")


def test_what_is_done_is_not_asked_again(home: Path, reporter: Reporter) -> None:
    sites = sites_of()
    first = do(home, sites, reporter)
    again = sites_of()
    (home / "run" / "student" / "learning_curve.json").unlink()
    second = do(home, again, reporter)
    assert [tail.asked for tail in again.tails.values()] == [0, 0]  # type: ignore[attr-defined]
    assert second["student"] == first["student"]


def test_a_run_goes_on_where_a_site_stopped_it(home: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consilience.common.nets.loop.SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    whole = do(home, sites_of(), reporter)["student"]["filtered"]
    shutil.rmtree(home / "run")
    sites = sites_of()
    refusal = Refusal(code="tail-limits", reason="no more").to_content()
    sites.tails["east"].spoil = lambda content, at: content if at < 20 else refusal  # type: ignore[attr-defined]
    with pytest.raises(AskingError, match=r"Site east does not answer about its teacher's last blocks.*no more"):
        do(home, sites, reporter)
    sites.tails["east"].spoil = lambda content, at: content  # type: ignore[attr-defined]
    told = do(home, sites, reporter)["student"]["filtered"]
    assert told["blocks"] == whole["blocks"]
    assert told["branches"] == whole["branches"]
    assert told["asked"]["east"]["rounds"] >= whole["asked"]["east"]["rounds"]


@pytest.mark.parametrize("back", [True, False])
def test_a_site_that_goes_away_is_waited_for(home: Path, reporter: Reporter, back: bool) -> None:
    sites = sites_of()
    (home / "run").mkdir()
    dump_settings(settings(home, {}, {}, ask={"wait": 5 if back else 0.3}), home / "run" / "job.yaml")

    class Leaving(ScriptedGrid):
        left = 0

        def looked(self) -> None:
            self.left -= back
            if back and self.left <= 0:
                self.away.clear()

    with Leaving(sites) as grid:

        def leave(content: RecordDict, at: int) -> RecordDict:
            if at == 4:
                grid.left = 4
                grid.leave(FIRST_NODE)  # east
            return content

        sites.tails["east"].spoil = leave  # type: ignore[attr-defined]
        if not back:
            with pytest.raises(AskingError, match="Site east is not connected, whose blocks are needed"):
                Job.open(home / "run", reporter).do(grid)
            return
        Job.open(home / "run", reporter).do(grid)
    told = told_of(home)
    assert told["asked"]["east"] == told["asked"]["west"], "what was lost on the way is counted by the site alone"
    assert sites.tails["east"].asked == told["asked"]["east"]["rounds"] + 1  # type: ignore[attr-defined]
    assert "tail-away" in (home / "run" / "events.jsonl").read_text()


def with_data(content: RecordDict, change: Any) -> RecordDict:
    held = dict(content["record"])  # type: ignore[arg-type]
    return RecordDict({"record": ConfigRecord({**held, "data": change(held["data"])})})  # type: ignore[dict-item]


HOSTILE: dict[str, tuple[Any, type[ConsilienceError], str]] = {
    "too short": (lambda c: with_data(c, lambda data: data[:-1]), AskingError, "Site east.*bytes; expected"),
    "too long": (lambda c: with_data(c, lambda data: data + b"1234"), AskingError, "Site east.*bytes; expected"),
    "no numbers": (
        lambda c: with_data(c, lambda data: np.full(len(data) // 4, np.nan, "<f4").tobytes()),
        ProtocolError,
        "tail of site east answered gradients.*not finite",
    ),
    "nothing": (lambda c: RecordDict({}), AskingError, "Site east"),
    "more records": (lambda c: RecordDict({**c, "more": ConfigRecord({})}), AskingError, "Site east"),
    "a refusal": (
        lambda c: Refusal(code="tail-not-allowed", reason="no").to_content(),
        AskingError,
        "Site east.*tail-not-allowed",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_answers_end_the_run_by_the_site_s_name(home: Path, reporter: Reporter, case: str) -> None:
    spoil, error, words = HOSTILE[case]
    sites = sites_of()
    sites.tails["east"].spoil = lambda content, at: spoil(content) if at > 3 else content  # type: ignore[attr-defined]
    with pytest.raises(error, match=words) as caught:
        do(home, sites, reporter)
    assert caught.value.hint
    assert not (home / "run" / "student").exists()


def test_an_answer_to_another_question_is_refused(home: Path, reporter: Reporter) -> None:
    sites, held = sites_of(), list[RecordDict]()

    def late(content: RecordDict, at: int) -> RecordDict:
        held.append(content)
        return held[max(at - 2, 0)]

    sites.tails["west"].spoil = late  # type: ignore[attr-defined]
    with pytest.raises(AskingError, match=r"Site west.*not to the question"):
        do(home, sites, reporter)


@pytest.mark.parametrize("change", [lambda data: data[:-4] + b"\0\0\0\1", lambda data: bytes(len(data))])
def test_lent_blocks_must_be_those_of_the_card(home: Path, reporter: Reporter, change: Any) -> None:
    sites = sites_of("blocks")
    sites.tails["east"].spoil = lambda content, at: with_data(content, change)  # type: ignore[attr-defined]
    with pytest.raises(ProtocolError, match="Site east lent blocks that are not those of its card"):
        do(home, sites, reporter)
    assert not (home / "run" / "tails" / "east.safetensors").exists()


def test_blocks_of_another_form_are_refused_though_their_digest_is_right(home: Path, reporter: Reporter) -> None:
    sites = sites_of("blocks")
    tail = sites.tails["east"]
    tail.lent = TailSite(teacher("cnn3@0.5", 1), "cnn3@0.5", allow="blocks").lent  # type: ignore[attr-defined]
    with pytest.raises(ProtocolError, match=r"Site east lent blocks that are not laid out as its card says"):
        do(home, sites, reporter)


REFUSED: dict[str, tuple[dict[str, str], dict[str, Any], dict[str, Any], str]] = {
    "no tail": ({"east": "blocks"}, {}, {}, r"site west knows wanted classes, and neither lends.*nor answers"),
    "another layout": ({"east": "blocks", "west": "blocks"}, {"architecture": "resnet8"}, {}, "differ in layout"),
    "no blocks of its own": ({"east": "blocks", "west": "blocks"}, {"architecture": "resnet18"}, {}, "none of ours"),
    "too large": (
        {"east": "blocks", "west": "blocks"},
        {},
        {"ask": {"tail_bytes": 1000}},
        r"'ask.tail_bytes' is 1,000; site east lends [\d,]+ bytes",
    ),
    "one label a task": (
        {"east": "blocks", "west": "blocks"},
        {"filtered": {"tasks": "label"}},
        {},
        "'student.filtered.tasks' is 'label'",
    ),
    "hard answers of classes": (
        {"east": "blocks", "west": "blocks"},
        {"filtered": {"hard": True}},
        {},
        "'student.filtered.hard' is True; the classes of site east exclude one another",
    ),
    "a branch that nothing teaches": (
        {"east": "blocks", "west": "questions"},
        {"filtered": {"joint": False}},
        {},
        "'student.filtered.joint' is False; the blocks of site west stay there",
    ),
    "nobody's": ({"east": "blocks", "west": "blocks"}, {"classes": ["a", "z"]}, {}, "'z', which no site knows"),
    "one class": ({"east": "blocks", "west": "blocks"}, {"classes": ["a"]}, {}, "nothing to tell apart"),
    "other": ({"east": "blocks", "west": "blocks"}, {"other": True}, {}, "other is true, and learning is 'filtered'"),
    "sealed": ({"east": "blocks", "west": "blocks"}, {}, {"privacy": {"sealed": True}}, "privacy.sealed is true"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_before_anything_is_asked(home: Path, reporter: Reporter, case: str) -> None:
    allow, student, more, words = REFUSED[case]
    sites = sites_of(allow)
    with pytest.raises((SettingsError, StudentError), match=words) as caught:
        do(home, sites, reporter, student=student, **more)
    assert caught.value.hint
    assert not sites.attempts
    assert [tail.asked for tail in sites.tails.values()] == [0] * len(sites.tails)  # type: ignore[attr-defined]


def test_a_temperature_that_branches_would_not_follow_is_refused(home: Path, reporter: Reporter) -> None:
    more = {"judge": {"test": None}, "unify": {"temperature": 2.0}}
    sites = sites_of("blocks", multi=True)
    with pytest.raises(
        SettingsError, match=r"'unify.temperature' is 2; with multi-label sites branches learn"
    ) as caught:
        do(home, sites, reporter, **more)
    assert caught.value.hint == "Set it to 1, or student.filtered.target to unified"
    assert not sites.attempts
    do(home, sites, reporter, {"target": "unified"}, **more)


def test_with_min_sites_a_site_without_a_tail_is_left_out(home: Path, reporter: Reporter) -> None:
    sites = sites_of({"west": "blocks"})
    report = do(home, sites, reporter, student={"classes": ["c", "d", "e"]}, ask={"min_sites": 1})
    assert list(report["left_out"]) == ["east"]
    assert "neither lends" in report["left_out"]["east"]


def test_a_description_that_does_not_fit_the_student_is_refused(home: Path, reporter: Reporter) -> None:
    do(home, sites_of("blocks"), reporter, {"joint": False})
    path = home / "run" / "student" / "filtered.json"
    held = read_json(path)
    for change, words in (
        ({"channels": 3}, "1 channels|have 1"),
        ({"classes": 2}, "names classes twice, or others"),
        ({"architecture": "../x"}, "none of ours"),
        ({"branches": []}, "branches"),
    ):
        write_json(path, {**held, **change})
        with pytest.raises(StudentError, match=words):
            StudentModel(home / "run" / "student")
