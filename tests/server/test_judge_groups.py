"""Judging sites that answer on groups: what baselines, sites' scores, agreement and the estimate make of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import entropy

from consilience.common.labels import LabelSpace
from consilience.server.judge import agreement, judge, score
from consilience.server.judge_groups import meeting
from consilience.server.quality import HeldOut, Rows, estimate

SPACE = LabelSpace.build(
    {"coarse": ["animal", "bus"], "fine": ["cat", "dog", "cow"], "mixed": ["pet", "cow", "car"]},
    groups={"animal": ["cat", "dog", "cow"], "pet": ["cat", "dog"]},
)
CAT, DOG, COW, BUS, CAR = range(5)


def logs(*rows: list[float]) -> np.ndarray:
    return np.log(np.array(rows)).astype(np.float32)


def one_hot(labels: list[int]) -> np.ndarray:
    return np.log(0.9 * np.eye(5)[labels] + 0.1 / 5)


def test_the_space_is_as_the_tests_below_take_it() -> None:
    assert SPACE.names == ("cat", "dog", "cow", "bus", "car")
    assert [SPACE.entries(i) for i in range(3)] == [((0, 1, 2), (3,)), ((0,), (1,), (2,)), ((0, 1), (2,), (4,))]


def spelled(site: int, row: np.ndarray) -> np.ndarray:
    """A row of probabilities over all classes, groups shared out evenly."""
    out = np.zeros(5)
    for value, entry in zip(row, SPACE.entries(site), strict=True):
        out[list(entry)] = value / len(entry)
    return out


def test_baselines_share_a_group_out_evenly_against_loops() -> None:
    random = np.random.default_rng(5)
    m, truth = 300, random.integers(-1, 5, 300)
    probs = [random.dirichlet(np.ones(len(SPACE.entries(i))), m) for i in range(3)]
    student = np.log(random.dirichlet(np.ones(5), m))
    chosen: dict[str, list[int]] = {"naive": [], "hard_vote": [], "max_confidence": [], "least_uncertain": []}
    for n in range(m):
        rows = [spelled(i, probs[i][n]) for i in range(3)]
        summed = np.sum(rows, axis=0)
        votes, sure = np.zeros(5), []
        for i in range(3):
            entry = list(SPACE.entries(i)[probs[i][n].argmax()])
            votes[entry] += 1 / len(entry)
            sure.append((entropy(rows[i]) / np.log(len(SPACE.class_sets[i])), entry))
        tied = np.flatnonzero(np.isclose(votes, votes.max()))
        largest = np.max(rows, axis=0)
        top = np.flatnonzero(np.isclose(largest, largest.max()))
        least = min(sure, key=lambda each: each[0])[1]
        chosen["naive"].append(int(summed.argmax()))
        for name, among in (("hard_vote", tied), ("max_confidence", top), ("least_uncertain", least)):
            chosen[name].append(int(max(among, key=lambda c: (summed[c], -c))))
    found = judge(truth, SPACE, [np.log(p) for p in probs], None, student, None).baselines
    for name, labels in chosen.items():
        assert found[name] == score(labels, truth), name


def test_the_best_site_is_right_only_where_it_names_a_class() -> None:
    truth = [CAT, CAT, BUS, COW]
    coarse = logs([0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.7, 0.3])  # animal, animal, bus, animal
    fine = logs([0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.8, 0.1, 0.1])  # cat throughout
    found = judge(truth, SPACE, [coarse, fine, None], None, one_hot([0] * 4), None)
    assert found.best_site == "fine"
    assert found.baselines["best_site"] == score([0, 0, 1, 1], [0, 0, 0, 0])
    alone = judge(truth, SPACE, [coarse, None, None], None, one_hot([0] * 4), None)
    assert alone.best_site == "coarse"
    assert alone.baselines["best_site"] == score([0, 0, 1, 0], [1, 1, 1, 1])


def test_a_site_and_the_student_beside_it_are_right_where_they_name_the_group() -> None:
    truth = [CAT, DOG, BUS, CAR, -1]
    coarse = logs([0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.6, 0.4], [0.7, 0.3])
    student = [DOG, BUS, BUS, CAT, CAT]
    site = judge(truth, SPACE, [coarse, None, None], None, one_hot(student), None).sites[0]
    assert (site.name, site.count) == ("coarse", 3)
    assert site.teacher_accuracy == pytest.approx(2 / 3)  # animal for a cat, bus for a dog, bus for a bus
    assert site.student_accuracy == pytest.approx(2 / 3)  # dog for a cat is an animal
    assert site.accuracy == pytest.approx(2 / 5)
    # Only its classes: three animals' shares together outweigh a bus of which each of them has less.
    close = np.log(np.array([[0.2, 0.2, 0.2, 0.3, 0.1]] * 2 + [[0.1, 0.1, 0.1, 0.6, 0.1]] * 3))
    again = judge(truth, SPACE, [coarse, None, None], None, close, None).sites[0]
    assert again.student_accuracy == pytest.approx(1 / 3)
    assert again.student_accuracy_restricted == 1.0


def test_agreement_is_about_the_least_sets_that_both_tell_of() -> None:
    coarse = logs([0.6, 0.4], [0.3, 0.7])
    mixed = logs([0.35, 0.25, 0.4], [0.1, 0.2, 0.7])
    fine = logs([0.3, 0.3, 0.4], [0.2, 0.1, 0.7])
    found = agreement([[coarse, fine, mixed]], SPACE)
    # coarse knows all animals in one group, and neither other site a bus: nothing to compare.
    assert np.isnan(found[0]).all()
    # Of pet and cow: fine says .6 to .4 and .3 to .7, mixed .35 to .25 and .1 to .2.
    assert found[1, 2] == found[2, 1] == 1.0
    turned = agreement([[coarse, fine, logs([0.25, 0.35, 0.4], [0.1, 0.2, 0.7])]], SPACE)
    assert turned[1, 2] == 0.5


def test_sites_meet_on_sets_that_both_know_as_a_whole() -> None:
    space = LabelSpace.build(
        {"one": ["ab", "cd", "e", "g"], "two": ["bc", "a", "d", "e", "f"], "three": ["fg", "e", "a"]},
        groups={"ab": ["a", "b"], "cd": ["c", "d"], "bc": ["b", "c"], "fg": ["f", "g"]},
    )
    names = {tuple(space.names[c] for c in entry): k for k, entry in enumerate(space.entries(0))}
    (one, two) = meeting(space, *(space.sites.index(site) for site in ("one", "two"))) or (None, None)
    assert one is not None
    assert two is not None
    # a to d hang together through bc; e is alone; g and f are of one site each.
    assert one.shape == (4, 2)
    assert two.shape == (5, 2)
    assert (one[names["a", "b"]] == one[names["c", "d"]]).all()
    assert one[names["g",]].sum() == 0
    assert one.sum(axis=0).tolist() == [2, 1]
    assert two.sum(axis=0).tolist() == [3, 1]
    # one knows g and two f, not fg: of the three's answers e and a are left; one knows a in a group with b.
    assert meeting(space, space.sites.index("one"), space.sites.index("three")) is None


def test_the_estimate_takes_a_site_for_right_on_its_group() -> None:
    """Calibrated labels and calibrated coarse sites: the estimate is the truth, and nothing is sharpened."""
    random = np.random.default_rng(1)
    space = LabelSpace.build({"coarse": ["ab", "c"], "fine": ["a", "b", "c"]}, groups={"ab": ["a", "b"]})
    n = 20_000
    posterior = random.dirichlet([0.3, 0.3, 0.3], n)
    posterior = np.maximum(posterior, 1e-9) / np.maximum(posterior, 1e-9).sum(axis=1, keepdims=True)
    truth = (posterior.cumsum(axis=1) > random.random((n, 1))).argmax(axis=1)
    coarse = np.stack([posterior[:, 0] + posterior[:, 1], posterior[:, 2]], axis=1)
    right = float(((coarse.argmax(axis=1) == 1) == (truth == 2)).mean())
    student = posterior.argmax(axis=1)
    held = [HeldOut(right, n), HeldOut(float((student == truth).mean()), n)]
    found = estimate(space, [Rows(posterior, student, [np.log(coarse), np.log(posterior)])], held)
    assert found.accuracy is not None
    assert found.accuracy.value == pytest.approx((student == truth).mean(), abs=0.01)
    assert found.sharpening == pytest.approx(1, rel=0.1)
    assert found.sites["coarse"].labels == pytest.approx(right, abs=0.01)
    assert {name: told.owners for name, told in found.classes.items()} == {"a": 1, "b": 1, "c": 2}
