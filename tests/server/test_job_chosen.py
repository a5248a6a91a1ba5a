"""A job whose student tells apart some classes alone: what it learns, is judged by and says; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.common.encoding import encode, encode_coverage
from consilience.common.errors import ConsilienceError, DataError, SettingsError
from consilience.common.files import read_json
from consilience.common.progress import Reporter
from consilience.common.protocol import Answer, Question
from consilience.common.settings import JobSettings
from consilience.server.learning import StudentModel
from consilience.server.report import comparable
from consilience.server.unify import unify
from helpers.feature_answers import features_card, images, tap_cards, teacher, telling
from helpers.jobs import JUDGED, build_home, job_settings, run_job
from helpers.sites import Handler, Sites, refusing

SAMPLES, TEST = 48, 24
CLASSES = {"east": ("a", "b", "c"), "north": ("c", "d", "e"), "west": ("e", "f", "a")}
APART = {"east": ("a", "b", "c"), "north": ("d", "e", "f")}
NAMES = np.array(["f", "e", "d", "c", "b", "a", "z", "y"])
"""Classes of the test images, in turn; nobody knows the last two."""

pytestmark = pytest.mark.usefixtures("one_thread", "unsynced")


def log_probs(start: int, stop: int, site: str) -> NDArray[np.float32]:
    """A site's answers: each sample's own row."""
    logits = np.random.default_rng(ord(site[0])).normal(0, 2, (SAMPLES, 3))
    logits = logits[start:stop]
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), np.float32)


def site(name: str) -> Handler:
    def handler(question: Question, attempt: int) -> RecordDict:
        if question.kind == "coverage":
            told = np.random.default_rng(ord(name[0])).uniform(0.1, 0.9, SAMPLES)[question.start : question.stop]
            return Answer(question, encode_coverage(told.astype(np.float32), "f16"), 0.1).to_content()
        rows = log_probs(question.start, question.stop, name)
        return Answer(question, encode(rows, question.encoding), 0.1).to_content()

    return handler


def sites_of(classes: dict[str, tuple[str, ...]] = CLASSES, covers: tuple[str, ...] = ()) -> Sites:
    return Sites({name: site(name) for name in classes}, classes=classes, coverage=dict.fromkeys(covers, ("f16",)))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    pool, test = images(SAMPLES)[..., 0], images(TEST, 5)[..., 0]
    truth, labels = np.arange(TEST) % len(NAMES), np.arange(SAMPLES) % len(NAMES)
    return build_home(tmp_path, pool, test, truth, NAMES.tolist(), pool_labels=labels)


def settings(home: Path, student: dict[str, Any], **changes: Any) -> JobSettings:
    fit = {"epochs": 2, "batch_size": 16, "precision": "f32", "learning_rate": 0.05}
    own = {"student": {"architecture": "cnn3@0.25", "fit": fit}}
    return job_settings(home, JUDGED, own, {"student": student}, changes)


def do(home: Path, sites: Sites, run: str = "run", *, changes: dict[str, Any] | None = None, **student: Any) -> Any:
    with Reporter(quiet=True) as reporter:
        return run_job(home, sites, settings(home, student, **(changes or {})), reporter, run)


def plain(text: str) -> str:
    return text.replace("\u00a0", " ")


def unified(home: Path, run: str = "run") -> tuple[list[str], NDArray[np.float64]]:
    return read_json(home / run / "contract.json")["labels"], np.load(home / run / "labels" / "q.npy").astype(
        np.float64
    )


@pytest.mark.parametrize("learning", ["soft-labels", "direct-ce", "direct-mf-lf"])
def test_the_student_has_the_wanted_classes_and_nothing_else(home: Path, learning: str) -> None:
    report = do(home, sites_of(), classes=["e", "b", "c"], learning=learning)
    names, q = unified(home)
    assert len(names) == 6
    wanted = [name for name in names if name in "bce"]
    for folder in ("student", "oracle"):
        assert read_json(home / "run" / folder / "labels.json") == {"labels": wanted, "other": False}
    model = StudentModel(home / "run" / "student")
    assert model.labels == tuple(wanted)
    share = 1 - q[:, [names.index(name) for name in wanted]].sum(axis=1).mean()
    assert report["student"]["classes"] == wanted
    assert report["student"]["other"] is False
    assert report["student"]["other_share"] == pytest.approx(share, abs=1e-6)
    assert report["labels"]["names"] == names
    assert report["test"] == {"count": 9, "outside": 0, "unwanted": 15}
    assert [row["name"] for row in report["student"]["per_class"]] == wanted
    assert [row["support"] for row in report["student"]["per_class"]] == [3, 3, 3]
    assert all(report["baselines"][name]["accuracy"] is not None for name in report["baselines"])
    assert plain(report["headline"]).startswith("One classifier for 3 of 6 classes, from 3 sites: ")
    card, page = (home / "run" / "card.md").read_text(), (home / "run" / "report.html").read_text()
    for text in (card, page):
        assert f"{100 * share:.1f} % of the pool, by its unified labels, is of others" in plain(text)
    assert "15 more images of classes that were not wanted are left out." in plain(card)
    table = card.split("## Labels")[1].split("##")[0]
    assert [name for name in names if f"| {name} |" in table] == wanted
    whole = do(home, sites_of(), "whole", learning=learning)
    assert report["student"]["parameters"] < whole["student"]["parameters"]
    assert (whole["student"]["classes"], whole["student"]["other_share"]) == (None, None)
    assert read_json(home / "whole" / "student" / "labels.json") == {"labels": names}


@pytest.mark.parametrize("learning", ["soft-labels", "direct-ce"])
def test_other_is_one_more_output(home: Path, learning: str) -> None:
    report = do(home, sites_of(), classes=["c", "b"], other=True, learning=learning)
    names, q = unified(home)
    wanted = [name for name in names if name in "bc"]
    assert read_json(home / "run" / "student" / "labels.json") == {"labels": [*wanted, "other"], "other": True}
    assert report["student"]["classes"] == [*wanted, "other"]
    assert report["student"]["other_share"] == pytest.approx(
        1 - q[:, [names.index(name) for name in wanted]].sum(axis=1).mean(), abs=1e-6
    )
    assert report["test"] == {"count": TEST, "outside": 0, "unwanted": 0}
    assert [row["support"] for row in report["student"]["per_class"]] == [3, 3, TEST - 6]
    by_name = {row["name"]: row for row in report["sites"]}
    assert by_name["west"]["took_part"]
    assert by_name["west"]["test_images"] is None  # it knows no wanted class: nothing it is judged by
    assert by_name["east"]["test_images"] == 9  # images of its own classes, of which one is unwanted
    assert "of 6 classes, and “other”" in plain(report["headline"])
    assert "call other" in (home / "run" / "card.md").read_text()


def test_contenders_are_judged_by_the_student_s_classes(home: Path) -> None:
    """The unified ensemble and a site, with only the wanted classes to choose from, on images of these."""
    report = do(home, sites_of(), classes=["b", "c", "e"])
    names = unified(home)[0]
    rows = {name: log_probs(0, TEST, name) for name in CLASSES}
    sets = [[names.index(label) for label in CLASSES[name]] for name in CLASSES]
    q = unify(list(rows.values()), sets, len(names)).probs
    truth = [names.index(NAMES[k % 8]) if NAMES[k % 8] in names else -1 for k in range(TEST)]
    wanted = [names.index(name) for name in "bce"]
    ids = [k for k in range(TEST) if truth[k] in wanted]
    right = np.mean([wanted[q[k, wanted].argmax()] == truth[k] for k in ids])
    assert report["baselines"]["unified_ensemble"]["accuracy"] == pytest.approx(right)
    east = np.mean([sets[0][1 + rows["east"][k, 1:].argmax()] == truth[k] for k in ids])
    by_name = {row["name"]: row for row in report["sites"]}
    assert by_name["east"]["accuracy"] == pytest.approx(east)
    assert by_name["west"]["accuracy"] == pytest.approx(3 / 9)  # it knows one of them, and says it always


@pytest.mark.parametrize("learning", ["soft-labels", "direct-ce"])
def test_all_classes_named_are_the_student_of_all_to_the_bit(home: Path, learning: str) -> None:
    null = do(home, sites_of(), "null", learning=learning)
    named = do(home, sites_of(), "named", classes=["f", "e", "d", "c", "b", "a"], learning=learning)
    for name in ("model.safetensors", "labels.json", "preprocessing.json"):
        both = [(home / run / "student" / name).read_bytes() for run in ("null", "named")]
        assert both[0] == both[1], name
    a, b = comparable(null), comparable(named)
    assert a.pop("settings") != b.pop("settings")
    assert a == b


def test_the_order_in_which_classes_are_named_does_not_matter(home: Path) -> None:
    for run, classes in (("one", ["b", "c", "e"]), ("two", ["e", "b", "c"])):
        do(home, sites_of(), run, classes=classes)
    both = [(home / run / "student" / "model.safetensors").read_bytes() for run in ("one", "two")]
    assert both[0] == both[1]


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("learning", ["soft-labels", "direct-ce"])
def test_coverage_and_what_is_outside_of_all_classes(home: Path, learning: str, other: bool) -> None:
    chosen = {"other": 1.0} if learning == "soft-labels" else {"strength": 0.5}
    report = do(
        home,
        sites_of(covers=("east", "north", "west")),
        changes={"unify": chosen},
        classes=["b", "c", "e"],
        other=other,
        learning=learning,
    )
    names, q = unified(home)
    mass = q[:, [names.index(name) for name in "bce"]].sum(axis=1)
    if learning == "soft-labels":
        outside = np.load(home / "run" / "labels" / "other.npy").astype(np.float64)
        assert outside.max() > 0
        mass = mass * (1 - outside)
    assert report["student"]["other_share"] == pytest.approx(1 - mass.mean(), abs=1e-6)


def test_a_site_that_answers_in_part(home: Path) -> None:
    sites = sites_of()
    whole = sites.handlers["west"]
    sites.handlers["west"] = lambda question, attempt: (
        refusing(question, attempt) if question.start >= 16 else whole(question, attempt)
    )
    report = do(home, sites, changes={"ask": {"min_sites": 1}}, classes=["b", "c"], learning="direct-ce")
    assert report["pool"]["left_out"] == SAMPLES - 16


FEATURES = {
    "layer-wise": {"learning": "layer-wise", "layer_wise": {"epochs": 1}},
    "layer-wise side by side": {"learning": "layer-wise", "layer_wise": {"epochs": 1, "target": "concatenated"}},
    "common-feature": {"learning": "common-feature"},
    "common-feature side by side": {"learning": "common-feature", "common_feature": {"target": "concatenated"}},
}


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("kind", FEATURES)
def test_students_that_learn_from_features(home: Path, kind: str, other: bool) -> None:
    networks = {name: teacher("cnn3@0.2", 1) for name in APART}
    cards = {name: tap_cards(network, name) for name, network in networks.items()}
    handlers = {name: telling(networks[name], images(SAMPLES), cards[name]) for name in APART}
    sites = Sites(handlers, classes=APART, features={name: features_card(held) for name, held in cards.items()})
    changes = {"judge": {"test": {"kind": "npz", "path": "test.npz"}}}
    student = {**FEATURES[kind], "classes": ["b", "c", "e"], "other": other}
    if other and kind == "layer-wise side by side":
        with pytest.raises(SettingsError, match=r"target is 'concatenated'.*many classes in one have none"):
            do(home, sites, changes=changes, **student)
        return
    report = do(home, sites, changes=changes, **student)
    assert report["amalgamation"] is not None
    assert len(read_json(home / "run" / "student" / "labels.json")["labels"]) == 3 + other
    assert np.isfinite(report["learning"]["student"][-1]["loss"])


LONG = "x" * 300
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "nobody's": ({"classes": ["a", "cat", "dog"]}, {}, "'cat', 'dog', which no site knows; known: a, b, c, d, e, f"),
    "case counts": ({"classes": ["A", "b"]}, {}, "'A', which no site knows"),
    "hostile": ({"classes": ["a", "../../<script>\n"]}, {}, r"script>\\n', which no site knows"),
    "long": ({"classes": ["a", LONG]}, {}, "which no site knows"),
    "twice": ({"classes": ["a", "b", "a"]}, {}, "student.classes' names 'a' twice"),
    "twice by spaces": ({"classes": ["a", "b", " a "]}, {}, "which are both 'a'"),
    "twice by synonyms": ({"classes": ["a", "alpha"]}, {"labels": {"synonyms": {"a": ["alpha"]}}}, "both 'a'"),
    "empty": ({"classes": ["a", " "]}, {}, "a class has an empty name"),
    "nothing is other": ({"other": True}, {}, "nothing is other"),
    "nothing is other, named": ({"classes": list("abcdef"), "other": True}, {}, "nothing is other"),
    "a class is called other": (
        {"classes": ["a", "b"], "other": True},
        {"labels": {"synonyms": {"other": ["f"]}}},
        "a class of the sites is called 'other'",
    ),
    "alone": ({"classes": ["a"]}, {}, "names 'a' alone, so that there is nothing to tell apart"),
    "no odds": ({"classes": ["b", "d"], "learning": "direct-ce"}, {}, "no site knows two of those"),
    "no pairs": ({"classes": ["b", "d"], "learning": "direct-mf-lf"}, {}, "no site knows two of those"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_learnt_is_refused_before_anything_is_asked(home: Path, case: str) -> None:
    student, changes, words = REFUSED[case]
    sites = sites_of()
    with pytest.raises(SettingsError, match=words) as caught:
        do(home, sites, changes=changes, **student)
    assert caught.value.hint
    assert not sites.attempts
    assert not (home / "run" / "contract.json").exists()


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ({"classes": []}, "classes"),
        ({"classes": ["a", 3]}, "classes"),
        ({"classes": ["a", "b"], "other": True, "learning": "direct-mf-lf"}, "direct-mf-lf"),
    ],
)
def test_settings_that_name_classes_wrongly(home: Path, student: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        settings(home, student)


def test_one_class_and_other(home: Path) -> None:
    report = do(home, sites_of(), classes=["b"], other=True)
    assert report["student"]["classes"] == ["b", "other"]


def test_a_test_set_without_wanted_classes_is_refused_before_anything_is_asked(home: Path) -> None:
    with np.load(home / "test.npz") as file:
        held = dict(file)
    np.savez(home / "test.npz", x=held["x"], y=np.zeros(TEST, int), names=NAMES)
    sites = sites_of()
    with pytest.raises(DataError, match=r"judge.test shows no image of the classes in student.classes \(b, c\)"):
        do(home, sites, classes=["b", "c"])
    assert not sites.attempts


def test_a_wanted_class_that_only_a_lost_site_knows(home: Path) -> None:
    sites = sites_of()
    sites.handlers["west"] = refusing
    with pytest.raises(SettingsError, match="names 'f', which no site knows"):
        do(home, sites, changes={"ask": {"min_sites": 1}}, classes=["b", "f"])


def test_classes_are_named_by_their_synonyms_and_hostile_names_are_escaped(home: Path) -> None:
    names = ("<img src=x>", "b|*x*", "c")
    classes = {"east": names, "north": ("c", "d", "e")}
    changes = {"labels": {"synonyms": {"b|*x*": ["beta"]}}}
    report = do(home, sites_of(classes), changes=changes, classes=["<img src=x>", "beta", "d"])
    assert report["student"]["classes"] == ["<img src=x>", "b|*x*", "d"]
    for name in ("report.html", "card.md"):
        assert "<img src=x>" not in (home / "run" / name).read_text()


def type_in(*words: Any) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("other", [False, True])
def test_the_commands_take_such_a_student(home: Path, tmp_path: Path, other: bool) -> None:
    report = do(home, sites_of(), classes=["b", "c"], other=other)
    student = home / "run" / "student"
    found = type_in("student", "evaluate", home / "test.npz", "--student", student)["data"]
    assert found["accuracy"] == pytest.approx(report["student"]["accuracy"])
    assert (found["images"], found["unwanted"]) == ((TEST, 0) if other else (6, TEST - 6))
    assert len(found["per_class"]) == 2 + other
    exported = type_in("student", "export", tmp_path / "s.pt2", "--student", student)["data"]
    assert exported["labels"] == report["student"]["classes"]
    program = torch.export.load(tmp_path / "s.pt2").module()
    assert program(torch.from_numpy(images(3))).shape == (3, 2 + other)
    Image.fromarray(images(1)[0, ..., 0]).save(tmp_path / "a.png")
    row = type_in("student", "predict", tmp_path / "a.png", "--student", student, "--top", "5")["data"]
    assert {top["class"] for top in row["predictions"][0]["top"]} == set(report["student"]["classes"])


def test_evaluating_without_an_image_of_its_classes(home: Path) -> None:
    do(home, sites_of(), classes=["b", "c"])
    with np.load(home / "test.npz") as file:
        np.savez(home / "few.npz", x=file["x"], y=np.zeros(TEST, int), names=NAMES)
    told = type_in("student", "evaluate", home / "few.npz", "--student", home / "run" / "student")
    assert "holds no images of the student's classes" in told["error"]["message"]


def test_every_error_has_a_next_step(home: Path) -> None:
    with pytest.raises(ConsilienceError) as caught:
        do(home, sites_of(), classes=["b", "nobody"])
    assert "synonym" in (caught.value.hint or "")
