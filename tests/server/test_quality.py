"""The estimate without labels: exact where labels are calibrated, sharpened where they are not, refused where blind."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.common.labels import LabelSpace
from consilience.server.quality import FEWEST, HeldOut, Quality, Rows, estimate

SPACE = LabelSpace.build({"one": ["a", "b", "c", "d"], "two": ["a", "b", "c", "d"], "three": ["a", "b"]})


def world(
    seed: int, n: int, softness: float = 1.0, spike: float = 0.4
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], np.ndarray]:
    """Return true posteriors, labels softened to the power 1 / softness, answers of perfect sites, true classes."""
    random = np.random.default_rng(seed)
    posterior = np.maximum(random.dirichlet(np.full(4, spike), n), 1e-9)
    posterior /= posterior.sum(axis=1, keepdims=True)
    truth = (posterior.cumsum(axis=1) > random.random((n, 1))).argmax(axis=1)
    labels = posterior ** (1 / softness)
    answers = [np.log(posterior[:, list(classes)]) for classes in SPACE.class_sets]
    return posterior, labels / labels.sum(axis=1, keepdims=True), answers, truth


def accuracy(answers: list[np.ndarray], truth: np.ndarray) -> list[HeldOut]:
    """Return what sites find on held-out images: samples of their classes."""
    found = []
    for classes, rows in zip(SPACE.class_sets, answers, strict=True):
        mine = np.isin(truth, classes)
        found.append(HeldOut(float((np.array(classes)[rows.argmax(1)] == truth)[mine].mean()), int(mine.sum())))
    return found


def cut(rows: Rows, places: list[int]) -> list[Rows]:
    edges = [0, *sorted(places), len(rows.student)]
    return [
        Rows(rows.labels[a:b], rows.student[a:b], [None if r is None else r[a:b] for r in rows.answers])
        for a, b in itertools.pairwise(edges)
    ]


@pytest.mark.parametrize("softness", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("told", [True, False])
def test_labels_that_are_too_timid_or_too_bold_are_sharpened(softness: float, told: bool) -> None:
    """Sites are calibrated; labels are the truth to a power: the estimate finds the power and the accuracy."""
    posterior, labels, answers, truth = world(1, 20_000, softness)
    student = np.where(np.arange(len(truth)) % 3 == 0, (posterior.argmax(1) + 1) % 4, posterior.argmax(1))
    held = accuracy(answers, truth) if told else [None] * 3
    found = estimate(SPACE, [Rows(labels, student, answers)], held)
    assert found.accuracy is not None
    assert found.accuracy.value == pytest.approx((student == truth).mean(), abs=0.015)
    assert found.accuracy.low < (student == truth).mean() < found.accuracy.high
    assert found.sharpening == pytest.approx(softness, rel=0.12)
    for c, name in enumerate(SPACE.names):
        mine, recall = truth == c, found.classes[name].recall
        assert recall is not None
        assert recall.value == pytest.approx((student == truth)[mine].mean(), abs=0.03)
    for classes, name in zip(SPACE.class_sets, SPACE.sites, strict=True):
        mine = np.isin(truth, classes)
        student_there = found.sites[name].student
        assert student_there is not None
        assert student_there.value == pytest.approx((student == truth)[mine].mean(), abs=0.03)
        assert found.sites[name].by == ("held-out" if told else "claimed")


@pytest.mark.parametrize("softness", [0.5, 3.0])
def test_how_likely_a_sample_is_of_a_site_s_classes_stays_as_the_labels_have_it(softness: float) -> None:
    """Labels are right about sites' classes together, and too timid or too bold within a site's."""
    space = LabelSpace.build({"one": ["a", "b"], "two": ["c", "d"]})
    random = np.random.default_rng(3)
    n = 20_000
    posterior = np.maximum(random.dirichlet(np.full(4, 0.5), n), 1e-6)
    posterior /= posterior.sum(axis=1, keepdims=True)
    truth = (posterior.cumsum(axis=1) > random.random((n, 1))).argmax(axis=1)
    answers = [np.log(posterior[:, list(own)]) for own in space.class_sets]
    labels = posterior ** (1 / softness)
    for own in map(list, space.class_sets):
        labels[:, own] *= (posterior[:, own].sum(axis=1) / labels[:, own].sum(axis=1))[:, None]
    student = labels.argmax(axis=1)
    held = []
    for own, rows in zip(space.class_sets, answers, strict=True):
        mine = np.isin(truth, own)
        held.append(HeldOut(float((np.array(own)[rows.argmax(1)] == truth)[mine].mean()), int(mine.sum())))
    found = estimate(space, [Rows(labels, student, answers)], held)
    assert found.accuracy is not None
    assert found.accuracy.value == pytest.approx((student == truth).mean(), abs=0.012)
    assert found.sharpening == pytest.approx(softness, rel=0.12)


def test_of_a_class_s_owners_those_that_know_the_most_tell_it_apart() -> None:
    """A site of two classes, beside one of all four, changes nothing about these two."""
    posterior, labels, answers, truth = world(2, 5_000, 2.0)
    student = posterior.argmax(axis=1)
    wide = LabelSpace.build({"one": ["a", "b", "c", "d"]})
    told = [estimate(wide, [Rows(labels, student, answers[:1])], accuracy(answers, truth)[:1])]
    told += [estimate(SPACE, [Rows(labels, student, [answers[0], None, None])], accuracy(answers, truth))]
    assert told[0].accuracy == told[1].accuracy is not None


def halves(seed: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], dict[str, HeldOut]]:
    """Return labels of a, b, c, d right about {a, b} and too timid within, true classes, answers, held-out images."""
    posterior, labels, _, truth = world(seed, 20_000, 3.0)
    answers, held = {}, {}
    for name, own in {"one": [0, 1], "two": [2, 3]}.items():
        labels[:, own] *= (posterior[:, own].sum(axis=1) / labels[:, own].sum(axis=1))[:, None]
        answers[name] = np.log(posterior[:, own])
        mine = np.isin(truth, own)
        right = (np.array(own)[answers[name].argmax(axis=1)] == truth)[mine]
        held[name] = HeldOut(float(right.mean()), int(mine.sum()))
    labels /= labels.sum(axis=1, keepdims=True)
    answers["zealot"] = np.log(np.stack([posterior[:, :2].sum(axis=1), posterior[:, 2:].sum(axis=1)], axis=1))
    right = answers["zealot"].argmax(axis=1) == truth // 2
    held["zealot"] = HeldOut(float(right.mean()), len(truth))
    return labels, truth, answers, held


def test_a_site_that_was_left_out_tells_no_class_apart() -> None:
    """A liar beside two honest sites names every class, so that it would be the one that knows the most."""
    labels, truth, answers, held = halves(4)
    sites = {"one": ["a", "b"], "two": ["c", "d"]}
    student, told, known = labels.argmax(axis=1), [answers["one"], answers["two"]], [held["one"], held["two"]]
    without = estimate(LabelSpace.build(sites), [Rows(labels, student, told)], known)
    space = LabelSpace.build({**sites, "zealot": ["a", "b", "c", "d"]})
    with_it = estimate(space, [Rows(labels, student, [*told, None])], [*known, None], [2])
    assert without.accuracy is not None
    assert without.accuracy == with_it.accuracy
    assert without.accuracy.value == pytest.approx((student == truth).mean(), abs=0.012)


def test_a_class_of_sites_that_were_left_out_stays_as_the_labels_have_it() -> None:
    labels, _, answers, held = halves(5)
    space = LabelSpace.build({"one": ["a", "b"], "zealot": ["c", "d"]})
    rows = Rows(labels, np.full(len(labels), 2), [answers["one"], None])
    found = estimate(space, [rows], [held["one"], None], [1])
    assert found.accuracy is not None
    assert found.accuracy.value == pytest.approx(labels[:, 2].mean())


def test_a_site_that_answers_on_groups_tells_none_of_their_classes_apart() -> None:
    labels, truth, answers, held = halves(6)
    sites = {"one": ["a", "b"], "two": ["c", "d"], "zealot": ["ab", "cd"]}
    space = LabelSpace.build(sites, groups={"ab": ["a", "b"], "cd": ["c", "d"]})
    student = labels.argmax(axis=1)
    found = estimate(space, [Rows(labels, student, [answers[name] for name in sites])], [held[name] for name in sites])
    assert found.accuracy is not None
    assert found.accuracy.value == pytest.approx((student == truth).mean(), abs=0.012)
    assert found.sharpening == pytest.approx(3.0, rel=0.15)


def test_by_hand_without_a_site_that_pulls() -> None:
    """Labels that say 3/4 and a site that claims 3/4: nothing is sharpened, and a student that follows is right so."""
    space = LabelSpace.build({"one": ["a", "b"]})
    labels = np.tile([[0.75, 0.25], [0.25, 0.75]], (100, 1))
    student = labels.argmax(1)
    found = estimate(space, [Rows(labels, student, [np.log(labels)])], [None])
    assert found.accuracy is not None
    assert (found.accuracy.value, found.sharpening) == (pytest.approx(0.75), pytest.approx(1.0))
    against = estimate(space, [Rows(labels, 1 - student, [np.log(labels)])], [None])
    assert against.accuracy is not None
    assert against.accuracy.value == pytest.approx(0.25)
    assert [told.advice for told in against.classes.values()] == ["more pool"] * 2


@given(st.integers(0, 1000), st.lists(st.integers(1, 299), max_size=4, unique=True))
@settings(max_examples=20, deadline=None)
def test_blocks_do_not_matter_and_every_number_is_a_share(seed: int, places: list[int]) -> None:
    _, labels, answers, _ = world(seed, 300)
    rows = Rows(labels, np.random.default_rng(seed).integers(0, 4, 300), answers)
    whole, parts = (estimate(SPACE, held, [None, HeldOut(0.9, 50), None]) for held in ([rows], cut(rows, places)))
    assert (whole.accuracy is None) == (parts.accuracy is None) == bool(whole.reason)
    if whole.accuracy is None or parts.accuracy is None:
        return
    assert whole.accuracy.value == pytest.approx(parts.accuracy.value, abs=1e-9)
    told = [whole.accuracy, *(s.student for s in whole.sites.values() if s.student is not None)]
    told += [c.recall for c in whole.classes.values() if c.recall is not None]
    assert all(0 <= e.low <= e.value <= e.high <= 1 for e in told)


@pytest.mark.parametrize("size", [1, FEWEST - 1])
def test_a_few_samples_say_nothing(size: int) -> None:
    _, labels, answers, _ = world(0, size)
    found = estimate(SPACE, [Rows(labels, labels.argmax(1), answers)], [None] * 3)
    assert found == Quality(reason=found.reason)
    assert str(size) in found.reason


def test_sites_of_one_class_say_nothing() -> None:
    space = LabelSpace.build({"one": ["a"], "two": ["b"]})
    labels = np.full((200, 2), 0.5)
    found = estimate(space, [Rows(labels, labels.argmax(1), [np.zeros((200, 1))] * 2)], [None, None])
    assert found.accuracy is None
    assert found.reason


def test_labels_without_doubt_stay_finite() -> None:
    labels = np.tile(np.eye(4), (60, 1))
    with np.errstate(divide="ignore"):
        answers = [np.log(labels[:, list(c)] + (np.arange(240)[:, None] % 4 > 1)) for c in SPACE.class_sets]
    found = estimate(SPACE, [Rows(labels, labels.argmax(1), answers)], [HeldOut(1.0, 10)] * 3)
    assert found.accuracy is None  # no power of certainty is anything but certain
    assert "cannot be reconciled" in found.reason


def test_a_site_unlike_the_labels_is_to_recalibrate() -> None:
    posterior, labels, answers, truth = world(2, 5000)
    told = accuracy(answers, truth)
    found = estimate(SPACE, [Rows(labels, posterior.argmax(1), answers)], told)
    assert {name: site.advice for name, site in found.sites.items()} == dict.fromkeys(SPACE.sites, "")
    space = LabelSpace.build({f"s{k}": ["a", "b", "c", "d"] for k in range(8)})
    boast = [*[told[0]] * 7, HeldOut(told[0].accuracy - 0.25, 5000)]
    found = estimate(space, [Rows(labels, posterior.argmax(1), [answers[0]] * 8)], boast)
    assert [name for name, site in found.sites.items() if site.advice] == ["s7"]


def test_where_sites_and_labels_say_otherwise_of_the_sites_nothing_is_estimated() -> None:
    """Held-out images of other proportions: two sites boast, one is too modest, and no sharpening fits them all."""
    posterior, labels, answers, truth = world(2, 5000)
    told = accuracy(answers, truth)
    boast = [HeldOut(told[0].accuracy - 0.4, 5000), HeldOut(0.99, 5000), HeldOut(0.99, 5000)]
    found = estimate(SPACE, [Rows(labels, posterior.argmax(1), answers)], boast)
    assert found.accuracy is None
    assert not found.classes
    assert "beyond chance" in found.reason
    assert found.sites["one"].advice == "recalibrate"
    assert all(site.student is None for site in found.sites.values())


@pytest.mark.parametrize(("count", "told"), [(50, None), (50_000, None), (50, 400), (50_000, 400)])
def test_the_interval_by_hand(count: int, told: int | None) -> None:
    """Two standard errors: of what sites say of themselves and 2 points of the model, then of chance in the pool."""
    space = LabelSpace.build({"one": ["a", "b"]})
    labels = np.tile([[0.75, 0.25], [0.25, 0.75]], (count, 1))
    held = None if told is None else HeldOut(0.75, told)
    found = estimate(space, [Rows(labels, labels.argmax(1), [np.log(labels)])], [held]).accuracy
    assert found is not None
    variance = 0.75 * 0.25
    error = np.sqrt(0.02**2 + (variance / told if told else 0))
    half = 2 * np.hypot(error, np.sqrt(variance / (2 * count)))
    assert (found.low, found.high) == (pytest.approx(0.75 - half), pytest.approx(0.75 + half))
