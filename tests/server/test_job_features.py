"""A job that learns from features: what is asked, learnt and told, and what is refused before anything is asked."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict

from consilience.common.cards import TapCard
from consilience.common.data import from_arrays
from consilience.common.encoding.features import basis_bytes
from consilience.common.epochs import EpochRecord
from consilience.common.errors import AskingError, ConsilienceError, SettingsError, StudentError
from consilience.common.files import read_json
from consilience.common.identity import make_key
from consilience.common.nets import loop, precision
from consilience.common.pages.numbers import size
from consilience.common.pool import Pool
from consilience.common.progress import Reporter
from consilience.common.protocol import Answer, Question
from consilience.common.settings import JobSettings
from consilience.common.settings_file import parse_settings
from consilience.server.asked_pool import span
from helpers.feature_answers import features_card, images, in_components, tap_cards, teacher, telling
from helpers.jobs import build_home, job_settings, run_job
from helpers.sites import Handler, Sites, refusing

SAMPLES, TEST = 48, 12
PIXELS = images(SAMPLES)
APART = {"east": ("a", "b", "c"), "north": ("d", "e", "f")}
CHAIN = {"east": ("a", "b", "c"), "north": ("c", "d", "e"), "west": ("e", "f", "a")}
LAYERS = {"east": "cnn3@0.2", "north": "cnn3@0.15", "west": "cnn3@0.2"}
MIXED = {"east": "cnn3@0.2", "north": "resnet8@0.2", "west": "vgg6@0.1"}
Cards = dict[str, tuple[TapCard, ...]]


pytestmark = pytest.mark.usefixtures("one_thread", "unsynced")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    about = (PIXELS[..., 0], images(TEST, 5)[..., 0], np.arange(TEST) % 6, "abcdef")
    return build_home(tmp_path, *about, test_pool=False)


def cards_of(architectures: dict[str, str], sites: Sequence[str], names: Sequence[str] | None = None) -> Cards:
    return {site: tap_cards(teacher(architectures[site], 1), site, names) for site in sites}


def sites_of(classes: dict[str, tuple[str, ...]], architectures: dict[str, str], cards: Cards) -> Sites:
    """Sites whose teachers answer; those in `cards` tell features too."""
    handlers = {site: telling(teacher(architectures[site], 1), PIXELS, cards.get(site, ())) for site in classes}
    return Sites(handlers, classes=classes, features={site: features_card(held) for site, held in cards.items()})


def settings(home: Path, learning: str, **student: Any) -> JobSettings:
    ask, layer_wise = student.pop("ask", {}), {"epochs": 2, **student.pop("layer_wise", {})}
    fit = {"epochs": 3, "batch_size": 16, "precision": "f32", "learning_rate": 0.05}
    own = {"architecture": "cnn3@0.25", "learning": learning, "fit": fit, "layer_wise": layer_wise}
    return job_settings(home, {"student": {**own, **student}, "ask": ask})


def do(home: Path, sites: Sites, reporter: Reporter, learning: str, run: str = "run", **student: Any) -> dict[str, Any]:
    return run_job(home, sites, settings(home, learning, **student), reporter, run)


def weights(home: Path, run: str = "run") -> bytes:
    return (home / run / "student" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("learning", ["layer-wise", "common-feature"])
def test_features_of_a_part_of_the_pool_are_those_of_its_samples(home: Path, reporter: Reporter, learning: str) -> None:
    part, cards = SAMPLES // 2, cards_of(LAYERS, ("east", "west"))
    do(home, sites_of(CHAIN, LAYERS, cards), reporter, learning, ask={"samples": part})
    ids = np.load(home / "run" / "asked.npy")
    shutil.rmtree(home / "pool")
    Pool.build(from_arrays(PIXELS[ids][..., 0], None, (), where="test"), home / "pool")
    sites = sites_of(CHAIN, LAYERS, cards)

    def renumbered(handler: Handler) -> Handler:
        def handle(question: Question, attempt: int) -> RecordDict:
            start, stop, subset = span(ids, question.start, question.stop)
            asked = question.model_copy(update={"start": start, "stop": stop, "subset": subset})
            return dataclasses.replace(
                Answer.from_content(handler(asked, attempt), asked), question=question
            ).to_content()

        return handle

    sites.handlers = {name: renumbered(handler) for name, handler in sites.handlers.items()}
    do(home, sites, reporter, learning, run="small")
    assert weights(home) == weights(home, "small")


def test_layers_are_amalgamated_and_everything_is_told(home: Path, reporter: Reporter) -> None:
    cards = cards_of(LAYERS, ("east", "west"))
    sites = sites_of(CHAIN, LAYERS, cards)
    report = do(home, sites, reporter, "layer-wise")
    told = report["amalgamation"]
    assert told == read_json(home / "run" / "student" / "amalgamation.json")
    assert told["without"] == ["north"]
    assert told["samples"] == SAMPLES
    assert [layer["tap"] for layer in told["layers"]] == ["layer1", "layer2", "layer3", "scores"]
    assert [layer["width"] for layer in told["layers"][:3]] == [8, 16, 32]
    assert told["layers"][0]["channels"] == {"east": 6, "west": 6}
    assert all(0.5 < layer["explained"] <= 1 for layer in told["layers"][:3])
    assert told["picture"]["points"].keys() == {"amalgamated", "student"}
    assert len(report["learning"]["student"]) == 3
    by_name = {site["name"]: site for site in report["sites"]}
    values = sum(card.values for card in cards["east"])
    assert by_name["east"]["features"] == {
        "taps": ["layer1", "layer2", "layer3"],
        "encoding": "f16",
        "bytes": 2 * values * SAMPLES,
        "answers": 3 * SAMPLES,
        "missed": 0,
    }
    assert by_name["north"]["features"] is None
    assert by_name["north"]["answers"] == SAMPLES
    page, card = (home / "run" / "report.html").read_text(), (home / "run" / "card.md").read_text()
    for text in (page, card):
        assert "layer-wise amalgamation (Shen et al., AAAI 2019) from features of east, west" in text
        assert "by their labels alone: north." in text
    assert "What it learned from features" in page
    assert "6 + 6" in page
    assert "east (features of layer1, layer2, layer3)" in card


def test_all_taps_are_asked_about_together(home: Path, reporter: Reporter) -> None:
    """What a site computes for one of them it has for the others, where it is asked about the same samples."""
    sites = sites_of(CHAIN, LAYERS, LAYERED)
    do(home, sites, reporter, "layer-wise", ask={"in_flight": 1})
    fingerprints = [card.fingerprint for card in LAYERED["east"]]
    asked = [(start, at) for site, at, start in sites.asked_features if site == "east"]
    assert asked == [(start, at) for start in (0, 16, 32) for at in fingerprints]


def test_a_site_that_tells_no_layer_takes_part_by_its_labels(home: Path, reporter: Reporter) -> None:
    cards = LAYERED | cards_of(LAYERS, ("north",), ["penultimate"])
    sites = sites_of(CHAIN, LAYERS, cards)
    report = do(home, sites, reporter, "layer-wise")
    assert report["amalgamation"]["without"] == ["north"]
    assert "north" in {site["name"] for site in report["sites"]}
    assert not report["left_out"]
    assert {site for site, _, _ in sites.asked_features} == {"east", "west"}


def test_common_features_of_a_mixed_federation(home: Path, reporter: Reporter) -> None:
    cards = cards_of(MIXED, ("east", "north"), ["layer2", "layer3"])
    report = do(
        home, sites_of(CHAIN, MIXED, cards), reporter, "common-feature", common_feature={"spaces": [{"width": 8}]}
    )
    told = report["amalgamation"]
    assert told["without"] == ["west"]
    (space,) = told["spaces"]
    assert space["sites"] == {"east": "layer3", "north": "layer3"}
    assert space["student"] == "layer3"
    assert space["missed"].keys() == {"east", "north"}
    assert all(0 < missed < 2 for missed in space["missed"].values())
    assert space["picture"]["points"].keys() == {"student", "site east", "site north"}
    terms = [epoch["terms"] for epoch in report["learning"]["student"]]
    assert [each.keys() for each in terms] == [{"soft", "mmd", "reconstruction"}] * 3
    losses = [epoch["loss"] for epoch in report["learning"]["student"]]
    assert losses == pytest.approx([t["soft"] + 10 * t["mmd"] + 10 * t["reconstruction"] for t in terms], rel=1e-4)
    page = (home / "run" / "report.html").read_text()
    assert "Terms of the loss" in page
    assert "common-feature learning (Luo et al., IJCAI 2019) from features of east, north" in page


def test_a_space_has_the_tap_that_was_asked_for_or_none(home: Path, reporter: Reporter) -> None:
    """A site that did not answer about its last tap does not meet there by another."""
    cards = cards_of(LAYERS, ("east", "west"), ["layer1", "layer3"])
    sites = sites_of(CHAIN, LAYERS, cards)
    whole, lost = sites.handlers["east"], cards["east"][1].fingerprint
    sites.handlers["east"] = lambda question, attempt: (
        refusing(question, attempt) if question.teacher == lost else whole(question, attempt)
    )
    spaces = [{"width": 4, "sites": {"east": "layer1"}}, {"width": 4}]
    report = do(home, sites, reporter, "common-feature", ask={"min_sites": 2}, common_feature={"spaces": spaces})
    assert [space["sites"] for space in report["amalgamation"]["spaces"]] == [
        {"east": "layer1", "west": "layer3"},
        {"west": "layer3"},
    ]


def test_only_the_taps_that_the_job_names_are_asked_for(home: Path, reporter: Reporter) -> None:
    cards = cards_of(MIXED, ("east", "north"), ["layer1", "layer3", "penultimate"])
    space = {"sites": {"east": "penultimate"}, "width": 4}
    sites = sites_of(CHAIN, MIXED, cards)
    report = do(home, sites, reporter, "common-feature", common_feature={"spaces": [space]})
    asked = {(site, fingerprint) for site, fingerprint, _ in sites.asked_features}
    assert asked == {(site, cards[site][2].fingerprint) for site in cards}
    (told,) = report["amalgamation"]["spaces"]
    assert told["student"] == "penultimate"
    assert told["size"] is None


@pytest.mark.parametrize("learning", ["layer-wise", "common-feature"])
def test_a_run_killed_while_it_learns_goes_on_to_the_same_student(
    home: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch, learning: str
) -> None:
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    cards = cards_of(LAYERS, ("east", "west"))
    spaces: dict[str, Any] = {"common_feature": {"spaces": [{"width": 4}]}}
    report = do(home, sites_of(CHAIN, LAYERS, cards), reporter, learning, run="whole", **spaces)
    real = loop._Run.epoch

    def killed(self: Any, epoch: int) -> EpochRecord:
        if epoch == 2:
            raise KeyboardInterrupt
        return real(self, epoch)

    monkeypatch.setattr(loop._Run, "epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        do(home, sites_of(CHAIN, LAYERS, cards), reporter, learning, run="cut", **spaces)
    monkeypatch.setattr(loop._Run, "epoch", real)
    again = do(home, sites_of(CHAIN, LAYERS, cards), reporter, learning, run="cut", **spaces)
    assert weights(home, "cut") == weights(home, "whole")
    assert (home / "cut" / "amalgamation").exists()
    shown = {path.name for path in (home / "cut" / "student").iterdir()}  # what tells of teachers lies beside it
    assert shown - {"training"} == {
        "amalgamation.json",
        "labels.json",
        "learning_curve.json",
        "model.safetensors",
        "preprocessing.json",
        "signatures.json",
    }
    assert again["amalgamation"] == report["amalgamation"]


def test_the_target_is_unified_or_the_sites_scores_side_by_side(home: Path, reporter: Reporter) -> None:
    cards = cards_of(LAYERS, ("east", "north"))
    for learning, field in (("layer-wise", "layer_wise"), ("common-feature", "common_feature")):
        spaces: dict[str, Any] = {"spaces": [{"width": 4}]} if field == "common_feature" else {}
        for target in ("unified", "concatenated"):
            student: dict[str, Any] = {field: {"target": target, **spaces}}
            report = do(
                home,
                sites_of(APART, LAYERS, cards),
                reporter,
                learning,
                run=f"{field}-{target}",
                **student,
            )
            assert report["amalgamation"]["target"] == target
            said = any("says nothing about the odds between components" in line for line in report["warnings"])
            assert said == (target == "concatenated")
        assert weights(home, f"{field}-unified") != weights(home, f"{field}-concatenated")


@pytest.mark.parametrize("layers", [True, False])
def test_the_whole_student_learns_the_squared_error_of_scores_at_three_tenths_of_its_rate(
    home: Path, reporter: Reporter, layers: bool
) -> None:
    cards, rates = cards_of(LAYERS, ("east", "north")), {}
    for target in ("unified", "concatenated"):
        sites = sites_of(APART, LAYERS, cards)
        report = do(home, sites, reporter, "layer-wise", target, layer_wise={"layers": layers, "target": target})
        rates[target] = [epoch["learning_rate"] for epoch in report["learning"]["student"]]
    assert rates["concatenated"] == pytest.approx([0.3 * rate for rate in rates["unified"]])


@pytest.mark.parametrize("target", ["unified", "concatenated"])
def test_without_mmd_no_features_are_asked_for_and_none_are_claimed(home: Path, target: str) -> None:
    """Reconstruction trains the common networks alone: the student would be that of labels."""
    sites = sites_of(APART, LAYERS, cards_of(LAYERS, ("east", "north")))
    said: list[tuple[str, int]] = []

    class Heard(Reporter):
        def say(self, line: str) -> None:
            said.append((line, len(sites.attempts)))

    with Heard(quiet=True) as reporter:
        report = do(home, sites, reporter, "common-feature", common_feature={"mmd": 0, "target": target})
        assert report["amalgamation"] is None
        assert not sites.asked_features
        assert sum("common_feature.mmd is 0" in line and "labels alone" in line for line in report["warnings"]) == 1
        assert [asked for line, asked in said if "common_feature.mmd is 0" in line] == [0]
        page, card = (home / "run" / "report.html").read_text(), (home / "run" / "card.md").read_text()
        for text in (page, card):
            assert "common-feature, from labels alone" in text
            assert "by common-feature learning" not in text
        if target == "unified":
            do(home, sites_of(APART, LAYERS, {}), reporter, "soft-labels", run="labels")
            assert weights(home) == weights(home, "labels")


@pytest.mark.parametrize("weight", [10, 0])
def test_a_site_whose_features_are_not_explained_is_warned_of(home: Path, reporter: Reporter, weight: float) -> None:
    """Decoders that have hardly learned miss more than all; those that are not to learn say nothing."""
    sites = sites_of(APART, LAYERS, cards_of(LAYERS, ("east", "north")))
    terms = {"reconstruction": weight, "spaces": [{"width": 4}]}
    fit = {"epochs": 1, "batch_size": 16, "precision": "f32", "learning_rate": 1e-6}
    report = do(home, sites, reporter, "common-feature", common_feature=terms, fit=fit)
    (space,) = report["amalgamation"]["spaces"]
    assert min(space["missed"].values()) > 1
    words = "in common at the student's layer3 reconstruction misses"
    said = sum(words in line and f"Site {site}:" in line for line in report["warnings"] for site in APART)
    assert said == (2 if weight else 0)


def test_scores_that_nothing_teaches_are_warned_of(home: Path, reporter: Reporter) -> None:
    sites = sites_of(APART, LAYERS, cards_of(LAYERS, ("east", "north")))
    report = do(home, sites, reporter, "common-feature", common_feature={"soft": 0, "spaces": [{"width": 4}]})
    assert sum("common_feature.soft is 0: nothing teaches" in line for line in report["warnings"]) == 1
    assert "common-feature learning (Luo et al., IJCAI 2019)" in (home / "run" / "card.md").read_text()


def test_what_a_job_will_bring_is_said_before_it_is_asked_for(home: Path) -> None:
    sites, said = sites_of(CHAIN, LAYERS, LAYERED), list[tuple[str, int]]()

    class Heard(Reporter):
        def say(self, line: str) -> None:
            said.append((line, len(sites.asked_features)))

    with Heard(quiet=True) as reporter:
        do(home, sites, reporter, "layer-wise", layer_wise={"joint": False})
    ((line, asked),) = [each for each in said if each[0].startswith("Features of")]
    west = sum(card.values for card in LAYERED["west"])
    each = [f"{size(2 * SAMPLES * values)} from site {name}" for name, values in (("east", EAST), ("west", west))]
    assert line == f"Features of 48 samples: {', '.join(each)}; {size(2 * SAMPLES * (EAST + west))} in all"
    assert not asked


@pytest.mark.parametrize("learning", ["layer-wise", "common-feature"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: b"\x00\x7e" * (len(data) // 2), "row 0 has a value that is not finite or too large"),
        (lambda data: data[: len(data) // 2], "bytes; allowed: "),
    ],
    ids=["NaN", "half of each row"],
)
def test_features_that_are_none_leave_the_site_by_its_labels_or_stop_the_job_with_its_name(
    home: Path, reporter: Reporter, spoil: Any, reason: str, learning: str
) -> None:
    """As from a site that changes a tap's shape, or whose classifier fails, in the middle of a job."""
    sites = sites_of(CHAIN, LAYERS, LAYERED)
    whole = sites.handlers["west"]

    def spoilt(question: Question, attempt: int) -> RecordDict:
        told = whole(question, attempt)
        if question.kind != "features" or question.start < 16:
            return told
        answer = Answer.from_content(told, question)
        return Answer(question, spoil(answer.data), answer.seconds).to_content()

    sites.handlers["west"] = spoilt
    spaces: dict[str, Any] = {"common_feature": {"spaces": [{"width": 4}]}}
    with pytest.raises(AskingError, match=rf"west lacks .*{reason}.* Mend those sites"):
        do(home, sites, reporter, learning, run="all", **spaces)
    report = do(home, sites, reporter, learning, ask={"min_sites": 2}, **spaces)
    assert any("Site west: features of" in line for line in report["warnings"])
    told = report["amalgamation"]
    samples = told["samples"] if learning == "layer-wise" else told["spaces"][0]["measured"]
    assert samples == (16 if learning == "layer-wise" else {"east": SAMPLES, "west": 16})


def test_three_sites_are_amalgamated_one_after_another_and_by_descent(home: Path, reporter: Reporter) -> None:
    cards = cards_of(LAYERS, tuple(CHAIN))
    kept = {}
    for run, ways in {"best": {}, "order": {"order": "incremental"}, "descent": {"autoencoder": "descent"}}.items():
        chosen = {"layer_wise": {**ways, "joint": False, "epochs": 20}}
        report = do(home, sites_of(CHAIN, LAYERS, cards), reporter, "layer-wise", run=run, **chosen)
        layers = report["amalgamation"]["layers"][:-1]
        assert [len(layer["channels"]) for layer in layers] == [3, 3, 3]
        kept[run] = [layer["explained"] for layer in layers]
    for run, least in (("order", 0.99), ("descent", 0.9)):
        pairs = list(zip(kept[run], kept["best"], strict=True))
        assert all(least * best < found <= best + 1e-9 for found, best in pairs)
        assert any(found < best - 1e-6 for found, best in pairs)


def test_without_the_joint_phase_the_layers_are_the_student(home: Path, reporter: Reporter) -> None:
    cards = cards_of(LAYERS, ("east", "west"))
    report = do(home, sites_of(CHAIN, LAYERS, cards), reporter, "layer-wise", layer_wise={"joint": False})
    assert report["learning"]["student"] == []
    assert report["student"]["accuracy"] is not None
    assert not (home / "run" / "student" / "training").exists()


def test_the_joint_phase_alone_asks_for_no_features(home: Path, reporter: Reporter) -> None:
    cards = cards_of(LAYERS, ("east", "north"))
    alone: dict[str, Any] = {"layers": False}
    for run, target in (("unified", "unified"), ("concatenated", "concatenated")):
        chosen = {"layer_wise": {**alone, "target": target}}
        report = do(home, sites_of(APART, LAYERS, cards), reporter, "layer-wise", run=run, **chosen)
        assert report["amalgamation"] is None
        assert all(site["features"] is None for site in report["sites"])
    do(home, sites_of(APART, LAYERS, cards), reporter, "soft-labels", run="labels")
    assert weights(home, "unified") == weights(home, "labels")
    assert weights(home, "concatenated") != weights(home, "labels")
    sites = sites_of(CHAIN, LAYERS, {})
    with pytest.raises(SettingsError, match="several know"):
        do(home, sites, reporter, "layer-wise", run="shared", layer_wise={**alone, "target": "concatenated"})


@pytest.mark.parametrize("learning", ["layer-wise", "common-feature"])
def test_sites_that_sign_and_arithmetic_that_is_tried_out(
    home: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch, learning: str
) -> None:
    """The loop tries on a copy of what it trains; a store knows its site's key, which cannot be copied."""
    monkeypatch.setattr(precision, "MIN_STEPS", 2)
    cards = cards_of(LAYERS, ("east", "west"))
    sites = sites_of(CHAIN, LAYERS, cards)
    sites.keys = {site: make_key(home / f"{site}.key") for site in CHAIN}
    spaces: dict[str, Any] = {"common_feature": {"spaces": [{"width": 4}]}}
    fit = {"epochs": 3, "batch_size": 16, "learning_rate": 0.05}
    report = do(home, sites, reporter, learning, fit=fit, **spaces)
    assert report["amalgamation"]["without"] == ["north"]
    beside = home / "run" / ("student/training" if learning == "layer-wise" else "amalgamation")
    assert read_json(beside / "precision.json")["f32_step_seconds"] > 0


@pytest.mark.parametrize("learning", ["layer-wise", "common-feature"])
def test_a_site_that_told_half_of_its_features(home: Path, reporter: Reporter, learning: str) -> None:
    cards = cards_of(LAYERS, ("east", "west"))
    sites = sites_of(CHAIN, LAYERS, cards)
    whole = sites.handlers["west"]
    sites.handlers["west"] = lambda question, attempt: (
        refusing(question, attempt)
        if question.kind == "features" and question.start >= 16
        else whole(question, attempt)
    )
    spaces: dict[str, Any] = {"common_feature": {"spaces": [{"width": 4}]}}
    report = do(home, sites, reporter, learning, ask={"min_sites": 2}, **spaces)
    assert any("Site west: features of" in line for line in report["warnings"])
    told = report["amalgamation"]
    samples = told["samples"] if learning == "layer-wise" else told["spaces"][0]["measured"]
    assert samples == (16 if learning == "layer-wise" else {"east": SAMPLES, "west": 16})
    said = any("Layers learned from 16\u00a0samples of 48" in line for line in report["warnings"])
    assert said == (learning == "layer-wise")
    assert told["without"] == ["north"]


def test_sites_that_told_disjoint_parts_are_measured_each_on_its_own(home: Path, reporter: Reporter) -> None:
    cards = cards_of(LAYERS, ("east", "west"), ["layer3"])
    sites = sites_of(CHAIN, LAYERS, cards)
    for site, first in (("east", 0), ("west", 32)):

        def part(question: Question, attempt: int, whole: Handler = sites.handlers[site], first: int = first) -> Any:
            told = question.kind != "features" or (question.start >= 32) == (first == 32)
            return whole(question, attempt) if told else refusing(question, attempt)

        sites.handlers[site] = part
    spaces = {"spaces": [{"width": 4}]}
    report = do(home, sites, reporter, "common-feature", ask={"min_sites": 1}, common_feature=spaces)
    (space,) = report["amalgamation"]["spaces"]
    assert space["measured"] == {"east": 32, "west": 16}
    assert all(missed > 0 for missed in (space["missed"]["east"], space["missed"]["west"]))
    points = {who: len(held) for who, held in space["picture"]["points"].items()}
    assert points == {"student": SAMPLES, "site east": 32, "site west": 16}
    page = (home / "run" / "report.html").read_text()
    assert re.search(r"of 32\s+samples", page)


def test_a_site_that_lacks_a_layer_is_left_out_of_the_layers_where_others_suffice(
    home: Path, reporter: Reporter
) -> None:
    """What it told of other layers is of no use, and would stop the job after all had been asked."""
    wide = {**LAYERS, "north": "cnn3@0.2"}
    cards = cards_of(wide, ("east", "west", "north"))
    sites = sites_of(CHAIN, wide, cards)
    whole, lost = sites.handlers["north"], cards["north"][1].fingerprint
    sites.handlers["north"] = lambda question, attempt: (
        refusing(question, attempt) if question.teacher == lost else whole(question, attempt)
    )
    report = do(home, sites, reporter, "layer-wise", ask={"min_sites": 2})
    told = report["amalgamation"]
    assert told["without"] == ["north"]
    assert told["samples"] == SAMPLES
    assert told["layers"][0]["channels"].keys() == {"east", "west"}
    assert any("Site north: its features were left out" in line for line in report["warnings"])
    with pytest.raises(StudentError, match=r"every layer of the same sites.*layer1 3, layer2 2, layer3 3"):
        do(home, sites, reporter, "layer-wise", run="wide", architecture="cnn3@0.5", ask={"min_sites": 2})


WIDE: dict[str, str] = dict.fromkeys(("east", "north", "south", "west"), "cnn3@0.2")
FOUR = {**CHAIN, "south": ("a", "b", "c")}


@pytest.mark.parametrize(
    ("upto", "out", "samples"),
    [
        ({"south": 4}, ["south"], SAMPLES),
        ({"south": 4, "west": 4}, ["south", "west"], SAMPLES),  # neither leaves alone to any gain
        ({"north": 20, "south": 4}, ["south", "north"], SAMPLES),
        ({"south": 24}, [], 24),  # half is enough
        ({"north": 4, "south": 4, "west": 4}, [], 4),  # east alone is too narrow
    ],
)
def test_sites_that_told_few_samples_leave_the_layers_to_those_that_told_more(
    home: Path, reporter: Reporter, upto: dict[str, int], out: list[str], samples: int
) -> None:
    sites = sites_of(FOUR, WIDE, cards_of(WIDE, tuple(WIDE)))

    def fewer(whole: Handler, told: int) -> Handler:
        return lambda question, attempt: (
            refusing(question, attempt)
            if question.kind == "features" and question.start >= told
            else whole(question, attempt)
        )

    for site, told in upto.items():
        sites.handlers[site] = fewer(sites.handlers[site], told)
    report = do(home, sites, reporter, "layer-wise", ask={"min_sites": 1, "question_size": 4})
    told = report["amalgamation"]
    assert (told["samples"], told["without"]) == (samples, sorted(out))
    assert told["layers"][0]["channels"].keys() == WIDE.keys() - set(out)
    for site in WIDE:
        words = f"Site {site}: its features were left out: it told features of too few samples, {upto.get(site)} of 48."
        assert any(words in line for line in report["warnings"]) == (site in out)
    assert any("Layers learned from" in line for line in report["warnings"]) == (samples < SAMPLES / 2)
    assert {site["name"] for site in report["sites"] if site["took_part"]} == WIDE.keys()


def changed(cards: Cards, site: str, **fields: Any) -> Cards:
    return cards | {site: (cards[site][0].model_copy(update=fields), *cards[site][1:])}


def changed_last(cards: Cards, site: str, **fields: Any) -> Cards:
    return cards | {site: (*cards[site][:-1], cards[site][-1].model_copy(update=fields))}


LAYERED = cards_of(LAYERS, ("east", "west"))
EAST = sum(card.values for card in LAYERED["east"])
REFUSED: dict[str, tuple[Cards, str, dict[str, Any], str]] = {
    "no features": ({}, "layer-wise", {}, "no site tells features"),
    "no features in common": ({}, "common-feature", {}, "no site tells features"),
    "another layout": (
        LAYERED | {"north": tap_cards(teacher("vgg6@0.1", 1), "north")},
        "layer-wise",
        {},
        r"site north and the student \(cnn3@0.25\) differ in layout at layer2.*common-feature",
    ),
    "no layout": (changed(LAYERED, "east", layout=""), "layer-wise", {}, "differ in layout at layer1.*common-feature"),
    "a layer missing": (
        LAYERED | {"west": LAYERED["west"][:2]},
        "layer-wise",
        {},
        "site west does not tell: layer3.*policy.features.taps",
    ),
    "no layers": (cards_of(LAYERS, ("east",), ["penultimate"]), "layer-wise", {}, "no site tells features"),
    "maps averaged": (
        changed(LAYERED, "west", shape=(6, 8, 8)),
        "layer-wise",
        {},
        r"at layer1 site west tells maps of 8x8, and the student's are of 16x16.*policy.features.taps.layer1.size",
    ),
    "a student too wide": (
        LAYERED,
        "layer-wise",
        {"architecture": "cnn3@1"},
        r"32 channels at layer1; the sites' have 6 \+ 6 there.*narrower",
    ),
    "shortcuts without weights": (LAYERED, "layer-wise", {"architecture": "resnet8"}, "resnet8@1,"),
    "a student of no layout": (LAYERED, "layer-wise", {"architecture": "resnet18"}, "none of ours"),
    "a tap that the student has not": (
        LAYERED,
        "common-feature",
        {"common_feature": {"spaces": [{"student": "layer7"}]}},
        r"spaces.0.student' is 'layer7'; the student cnn3@0.25 has: layer1, layer2, layer3, penultimate",
    ),
    "a tap that the site does not tell": (
        LAYERED,
        "common-feature",
        {"common_feature": {"spaces": [{"sites": {"east": "layer9"}}]}},
        "spaces.0.sites.east' is 'layer9'; site east tells the features of: layer1, layer2, layer3",
    ),
    "too many bytes": (
        LAYERED,
        "layer-wise",
        {"ask": {"feature_bytes": 2 * EAST * SAMPLES - 1}},
        rf"ask.feature_bytes' is {2 * EAST * SAMPLES - 1:,}; site east declares {2 * EAST * SAMPLES:,} bytes of.* 48 ",
    ),
    "too many bytes in common": (
        LAYERED,
        "common-feature",
        {"ask": {"feature_bytes": 2 * LAYERED["east"][-1].values * SAMPLES - 1}},
        r"ask.feature_bytes' is .*; site east declares",
    ),
    "too many channels together": (
        changed(changed(LAYERED, "east", channels=4_096, shape=(4_096, 16, 16)), "west", channels=1, shape=(1, 16, 16)),
        "layer-wise",
        {},
        r"the sites have 4096 \+ 1 channels at layer1; allowed are 4,096 together",
    ),
    "too many channels in common": (
        changed_last(LAYERED, "east", channels=4_097, shape=(4_097, 4, 4)),
        "common-feature",
        {"ask": {"feature_bytes": 2**40}},
        r"site east's tap layer3 has 4,097 channels.* 4,096 .*policy.features.taps.layer3.channels.*another",
    ),
    "a size of vectors": (
        cards_of(LAYERS, ("east", "west"), ["layer2", "penultimate"]),
        "common-feature",
        {"common_feature": {"spaces": [{}, {"sites": {"west": "layer2"}, "size": 2}]}},
        "spaces.1.size' is 2, of maps; in this space vectors meet: site east's penultimate, the student's penultimate",
    ),
    "a site that is not there": (
        LAYERED,
        "common-feature",
        {"common_feature": {"spaces": [{}, {"sites": {"eest": "layer1"}}]}},
        "spaces.1.sites.eest' names no connected site; connected: east, north, west",
    ),
    "overlap and scores side by side": (
        LAYERED,
        "layer-wise",
        {"layer_wise": {"target": "concatenated"}},
        r"student.layer_wise.target' is 'concatenated'.*several know: a, c, e.*unified",
    ),
    "overlap in common": (
        LAYERED,
        "common-feature",
        {"common_feature": {"target": "concatenated"}},
        r"student.common_feature.target' is 'concatenated'.*several know: a, c, e",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_asked(home: Path, reporter: Reporter, case: str) -> None:
    cards, learning, student, words = REFUSED[case]
    if student.get("architecture") == "resnet18":
        pytest.importorskip("consilience.common.nets.vision")
    sites = sites_of(CHAIN, LAYERS, {})
    sites.features = {site: features_card(held) for site, held in cards.items()}
    with pytest.raises(SettingsError) as caught:
        do(home, sites, reporter, learning, **student)
    assert re.search(words, str(caught.value)), str(caught.value)
    assert caught.value.hint
    assert not sites.attempts
    assert not sites.asked_features


def test_where_others_are_enough_a_site_of_another_layout_is_left_out(home: Path, reporter: Reporter) -> None:
    odd = {**LAYERS, "extra": "vgg6@0.1"}
    classes = {**CHAIN, "extra": ("a", "b", "c")}
    cards = {**LAYERED, "extra": tap_cards(teacher("vgg6@0.1", 1), "extra")}
    report = do(home, sites_of(classes, odd, cards), reporter, "layer-wise", ask={"min_sites": 3})
    assert "differ in layout" in report["left_out"]["extra"]
    assert "extra" not in report["amalgamation"]["without"]


def test_principal_components_of_a_tap_with_many_channels_meet_in_common(home: Path, reporter: Reporter) -> None:
    """What counts is what leaves: a layer of more channels than a space takes may be reduced at its site."""
    network = teacher(LAYERS["east"], 1)
    cards = cards_of(LAYERS, ("east", "west"), ["layer3"])
    reduced, bases = in_components(network, PIXELS, cards["east"], 4)
    many = 4_097
    about = reduced[0].components
    assert about is not None
    about = about.model_copy(update={"bytes": basis_bytes(4, many)})
    cards["east"] = (reduced[0].model_copy(update={"channels": many, "components": about}),)
    sites = sites_of(CHAIN, LAYERS, cards)
    sites.handlers["east"] = telling(network, PIXELS, cards["east"], bases)
    report = do(home, sites, reporter, "common-feature", common_feature={"spaces": [{"width": 4}]})
    assert report["amalgamation"]["spaces"][0]["missed"].keys() == {"east", "west"}


def test_a_site_that_declares_too_many_bytes_is_left_out_alone(home: Path, reporter: Reporter) -> None:
    cards = {**LAYERED, "extra": tap_cards(teacher("cnn3@0.3", 1), "extra")}
    sites = sites_of({**CHAIN, "extra": ("a", "b", "c")}, {**LAYERS, "extra": "cnn3@0.3"}, cards)
    report = do(home, sites, reporter, "layer-wise", ask={"min_sites": 3, "feature_bytes": 2 * EAST * SAMPLES})
    assert report["left_out"].keys() == {"extra"}
    assert "site extra declares" in report["left_out"]["extra"]
    assert {site for site, _, _ in sites.asked_features} == {"east", "west"}


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ({"common_feature": {"soft": 0, "mmd": 0}}, "nothing reaches the student"),
        ({"common_feature": {"mmd": -1}}, "mmd"),
        ({"common_feature": {"spaces": []}}, "spaces"),
        ({"common_feature": {"spaces": [{"width": 4_097}]}}, r"width.*4097"),  # its weights would be beyond memory
        ({"layer_wise": {"order": "sideways"}}, "order"),
        ({"layer_wise": {"layers": False, "joint": False}}, "nothing is trained"),
    ],
)
def test_settings_that_cannot_be(home: Path, student: dict[str, Any], words: str) -> None:
    with pytest.raises(ConsilienceError, match=words):
        settings(home, "common-feature", **student)


def test_features_are_open_so_secure_sums_exclude_them(home: Path) -> None:
    raw = settings(home, "layer-wise").model_dump(mode="json")
    raw["privacy"]["secure_sum"] = True
    with pytest.raises(SettingsError, match=r"student.learning is 'layer-wise', which needs single answers"):
        parse_settings(raw, JobSettings, source="job.yaml", folder=home)


def test_what_corrects_soft_labels_goes_with_unified_targets_alone(home: Path) -> None:
    raw = settings(home, "layer-wise").model_dump(mode="json")
    raw["unify"]["prior_correction"] = True
    assert parse_settings(raw, JobSettings, source="job.yaml", folder=home).unify.prior_correction
    raw["student"]["layer_wise"]["target"] = "concatenated"
    with pytest.raises(SettingsError, match=r"prior_correction corrects soft labels"):
        parse_settings(raw, JobSettings, source="job.yaml", folder=home)


@pytest.mark.parametrize("learning", ["layer-wise", "common-feature"])
@pytest.mark.parametrize(
    ("unify", "words"),
    [
        ({"temperature": 2.0}, r"unify.temperature is 2, and student.layer_wise.target is 'concatenated'.*to unified"),
        (
            {"weights": {"east": 0.5}},
            r"unify.weights.east is 0.5, and student.\w*.target is 'concatenated'.*to unified",
        ),
        ({"weights": {"east": 1.0}}, ""),
    ],
    ids=["temperature", "weights", "weights of one"],
)
def test_what_scores_side_by_side_do_not_follow_is_refused(
    home: Path, learning: str, unify: dict[str, Any], words: str
) -> None:
    raw = settings(home, learning).model_dump(mode="json")
    raw["unify"].update(unify)
    assert parse_settings(raw, JobSettings, source="job.yaml", folder=home)
    raw["student"][learning.replace("-", "_")]["target"] = "concatenated"
    if not words or ("temperature" in unify and learning == "common-feature"):  # its softmax is of that temperature
        assert parse_settings(raw, JobSettings, source="job.yaml", folder=home)
    else:
        with pytest.raises(SettingsError, match=words):
            parse_settings(raw, JobSettings, source="job.yaml", folder=home)
