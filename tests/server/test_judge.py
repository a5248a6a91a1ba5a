"""The metrics of server/judge against closed forms on small arrays, scikit-learn, SciPy and plain loops."""

from __future__ import annotations

import json
import tracemalloc
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, entropy
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

from consilience.common.labels import LabelSpace
from consilience.server import judge_tops
from consilience.server.judge import BASELINES, BINS, agreement, calibration, judge, score, wilson
from consilience.server.judge_tops import uncertainty

SPACE = LabelSpace(("a", "b", "c", "d"), ("east", "north", "west"), ((0, 1), (2, 1), (3, 2, 0)))


def logs(*rows: list[float]) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows)).astype(np.float32)


def one_hot(labels: list[int], width: int = 4) -> np.ndarray:
    return np.log(0.9 * np.eye(width)[labels] + 0.1 / width)


def random_case(seed: int = 0, m: int = 200) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "truth": rng.integers(-1, 4, m),
        "answers": [np.log(rng.dirichlet(np.ones(len(c)), m)).astype(np.float32) for c in SPACE.class_sets],
        "unified": rng.dirichlet(np.ones(4), m),
        "student": np.log(rng.dirichlet(np.ones(4), m)),
        "oracle": np.log(rng.dirichlet(np.ones(4), m)),
    }


def padded(case: dict[str, Any], space: LabelSpace = SPACE) -> np.ndarray:
    """Probabilities (N, m, L), zero outside a site's classes, by plain loops."""
    out = np.zeros((len(space.sites), len(case["truth"]), len(space)))
    for i, (rows, classes) in enumerate(zip(case["answers"], space.class_sets, strict=True)):
        for n, row in enumerate(rows):
            for value, label in zip(row, classes, strict=True):
                out[i, n, label] = np.exp(float(value))
    return out


class TestEnsembles:
    # One image; a table of what each site says about its classes and what each rule must choose.
    @pytest.mark.parametrize(
        ("east", "north", "west", "naive", "vote", "confident"),
        [
            # sums a .9+.2, b .1+.3, c .7+.2, d .6; votes a, c, d tie and the sum decides; top probability a
            ([0.9, 0.1], [0.7, 0.3], [0.6, 0.2, 0.2], 0, 0, 0),
            # sums a .45, b .55+.75, c .25+.5, d .05; votes b, b, c; most confident north's b
            ([0.4, 0.6], [0.3, 0.7], [0.05, 0.9, 0.05], 1, 1, 2),
            # sums b 0.98, c 1.1; votes b, c, c
            ([0.02, 0.98], [0.6, 0.4], [0.25, 0.5, 0.25], 1, 2, 1),
        ],
    )
    def test_rules_on_one_image(
        self, east: list[float], north: list[float], west: list[float], naive: int, vote: int, confident: int
    ) -> None:
        for truth in range(4):
            verdict = judge([truth], SPACE, [logs(east), logs(north), logs(west)], None, one_hot([0]), None).baselines
            got = {name: found.correct for name, found in verdict.items() if found is not None}
            assert got["naive"] == (truth == naive)
            assert got["hard_vote"] == (truth == vote)
            assert got["max_confidence"] == (truth == confident)

    def test_against_loops(self) -> None:
        case = random_case()
        p, truth = padded(case), case["truth"]
        naive = p.mean(0).argmax(1)
        vote, confident = [], []
        for n in range(len(truth)):
            tally = np.zeros(4)
            for i in range(3):
                tally[p[i, n].argmax()] += 1
            tied = [c for c in range(4) if tally[c] == tally.max()]
            vote.append(max(tied, key=lambda c: p[:, n, c].sum()))
            confident.append(p[p[:, n].max(1).argmax(), n].argmax())
        found = judge(space=SPACE, **case)
        assert found.baselines["naive"] == score(naive, truth)
        assert found.baselines["hard_vote"] == score(vote, truth)
        assert found.baselines["max_confidence"] == score(confident, truth)
        assert found.baselines["unified_ensemble"] == score(case["unified"].argmax(1), truth)
        assert found.baselines["oracle"] == score(case["oracle"].argmax(1), truth)
        assert found.student == score(case["student"].argmax(1), truth)
        single = [(p[i].argmax(1) == truth).mean() for i in range(3)]
        assert found.best_site == SPACE.sites[int(np.argmax(single))]
        assert found.baselines["best_site"] is not None
        assert found.baselines["best_site"].accuracy == pytest.approx(max(single))
        assert [s.accuracy for s in found.sites] == pytest.approx(single)

    def test_the_least_uncertain_site_answers_against_scipy(self) -> None:
        case = random_case(11)
        chosen = []
        for n in range(len(case["truth"])):
            doubt = [entropy(np.exp(rows[n].astype(float))) / np.log(len(rows[n])) for rows in case["answers"]]
            site = int(np.argmin(doubt))
            chosen.append(SPACE.class_sets[site][case["answers"][site][n].argmax()])
        found = judge(space=SPACE, **case).baselines
        assert found["least_uncertain"] == score(chosen, case["truth"])
        assert found["least_uncertain"] != found["max_confidence"]

    @pytest.mark.parametrize(
        ("north", "west", "chosen"),
        [
            ([0.75, 0.25], [0.2, 0.6, 0.2], 2),  # 0.81 of one bit against 0.87 of log2(3) bits; order of sets (c, b)
            ([0.6, 0.4], [0.15, 0.7, 0.15], 2),  # more sure of three classes than of two; west's c
            ([0.8, 0.2], [0.8, 0.1, 0.1], 3),  # a probability of 0.8 each, but 0.72 against 0.58 of the most
        ],
    )
    def test_entropy_counts_relative_to_the_number_of_classes(
        self, north: list[float], west: list[float], chosen: int
    ) -> None:
        for truth in range(4):
            found = judge([truth], SPACE, [None, logs(north), logs(west)], None, one_hot([0]), None)
            least = found.baselines["least_uncertain"]
            assert least is not None
            assert least.correct == (truth == chosen)

    def test_sites_that_are_equally_certain_tie_and_one_class_says_nothing(self) -> None:
        # east is certain of a, north of c; west adds to c: the summed probability decides.
        for order, chosen in (([0.6, 0.3, 0.1], 2), ([0.3, 0.1, 0.6], 0)):
            west = logs([order[1], order[0], order[2]])
            found = judge([chosen], SPACE, [logs([1, 0]), logs([1, 0]), west], None, one_hot([0]), None)
            assert found.baselines["least_uncertain"] == score([chosen], [chosen])
        space = LabelSpace(("a", "b", "c"), ("one", "two"), ((0,), (1, 2)))
        found = judge([1], space, [logs([1.0]), logs([0.6, 0.4])], None, one_hot([0], 3), None)
        assert found.baselines["least_uncertain"] == score([1], [1])

    def test_uncertainty_is_between_certain_and_a_guess(self) -> None:
        assert uncertainty(np.array([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])) == pytest.approx([0, 1])

    def test_offset_of_a_row_changes_nothing(self) -> None:
        case = random_case()
        shifted = {**case, "answers": [a + 3.0 * np.arange(len(a))[:, None] / 100 for a in case["answers"]]}
        assert judge(space=SPACE, **case).baselines == judge(space=SPACE, **shifted).baselines

    def test_a_site_that_did_not_answer_is_left_out(self) -> None:
        case = random_case()
        case["answers"][1] = None
        found = judge(space=SPACE, **case)
        smaller = LabelSpace(SPACE.names, ("east", "west"), (SPACE.class_sets[0], SPACE.class_sets[2]))
        other = judge(space=smaller, **{**case, "answers": [case["answers"][0], case["answers"][2]]})
        assert found.baselines == other.baselines
        assert found.best_site == other.best_site
        north = found.sites[1]
        assert (north.teacher_accuracy, north.accuracy, north.confidence_auroc) == (None, None, None)
        assert north.student_accuracy is not None
        assert north.count > 0

    def test_without_answers_unified_and_oracle_the_baselines_are_none(self) -> None:
        case = random_case()
        found = judge(case["truth"], SPACE, [None, None, None], None, case["student"], None)
        assert found.baselines == dict.fromkeys(BASELINES)
        assert found.best_site is None
        assert all(c.unified_recall is None for c in found.classes)

    def test_equal_sites_first_name_is_best(self) -> None:
        space = LabelSpace(("a", "b"), ("west", "east"), ((0, 1), (0, 1)))
        answers = [logs([0.9, 0.1]), logs([0.8, 0.2])]
        assert judge([0], space, answers, None, one_hot([0], 2), None).best_site == "east"

    def test_order_of_sites_changes_nothing_but_order(self) -> None:
        case = random_case()
        # Ties on purpose: coarse values make equal votes and equal top probabilities common.
        case["answers"] = [np.round(a).astype(np.float32) for a in case["answers"]]
        order = [2, 0, 1]
        turned = LabelSpace(
            SPACE.names, tuple(SPACE.sites[i] for i in order), tuple(SPACE.class_sets[i] for i in order)
        )
        found = judge(space=SPACE, **case).as_dict()
        other = judge(space=turned, **{**case, "answers": [case["answers"][i] for i in order]}).as_dict()
        assert list(other.pop("sites")) == [found["sites"][i] for i in order]
        del found["sites"]
        assert other == found

    def test_rounding_does_not_let_the_order_of_sites_decide(self) -> None:
        # Every class gets the same three probabilities, from other sites each: all sums tie but for rounding.
        rows = np.log(np.random.default_rng(0).dirichlet(np.ones(3), 300))
        names = ("x", "y", "z")
        answers = {name: np.roll(rows, k, axis=1) for k, name in enumerate(names)}
        found = []
        for order in permutations(names):
            space = LabelSpace(("a", "b", "c"), order, ((0, 1, 2),) * 3)
            for truth in (0, 1):
                given = [answers[name] for name in order]
                verdict = judge([truth] * 300, space, given, None, one_hot([0] * 300, 3), None)
                found.append((truth, verdict.baselines["naive"], verdict.baselines["hard_vote"]))
        assert len(set(found)) == 2


class TestStudent:
    def test_closed_forms(self) -> None:
        truth, predicted = [0, 0, 0, 1, 1, 3, -1, -1], [0, 0, 1, 1, 0, 3, 3, 0]
        found = judge(truth, SPACE, [None] * 3, None, one_hot(predicted), None)
        assert (found.count, found.outside) == (8, 2)
        assert (found.student.correct, found.student.accuracy) == (4, 0.5)
        by_name = {c.name: c for c in found.classes}
        assert [c.support for c in found.classes] == [3, 2, 0, 1]
        assert by_name["a"].recall == pytest.approx(2 / 3)
        assert by_name["a"].precision == pytest.approx(2 / 4)
        assert by_name["b"].precision == pytest.approx(1 / 2)
        assert (by_name["c"].recall, by_name["c"].precision) == (None, None)
        assert (by_name["d"].recall, by_name["d"].precision) == (1.0, 0.5)
        assert found.confusion == ((2, 1, 0, 0), (1, 1, 0, 0), (0, 0, 0, 0), (0, 0, 0, 1))
        assert found.confusion_outside == (1, 0, 0, 1)
        assert found.mistakes == ((0, 1, 1), (1, 0, 1))

    def test_the_most_common_mistakes_are_those_of_the_matrix(self) -> None:
        found = judge(space=SPACE, **random_case(4))
        assert found.confusion is not None
        table = [(t, p, n) for t, row in enumerate(found.confusion) for p, n in enumerate(row) if t != p and n]
        assert len(table) == 12
        assert found.mistakes == tuple(sorted(table, key=lambda mistake: -mistake[2])[:10])

    @pytest.mark.parametrize("width", [201, 3000])
    def test_nothing_of_the_size_of_classes_times_classes_is_held(self, width: int) -> None:
        names = tuple(map(str, range(width)))
        space = LabelSpace(names, ("east",), (tuple(range(width)),))
        truth, predicted = [0, 0, 7, width - 1, -1], [0, 5, 7, 5, 3]
        student = one_hot(predicted, width)
        tracemalloc.start()
        found = judge(truth, space, [student], student, student, None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (found.confusion, found.confusion_outside) == (None, None)
        assert found.mistakes == ((0, 5, 1), (width - 1, 5, 1))
        told = {
            c.name: (c.support, c.recall, c.precision) for c in found.classes if c.support or c.precision is not None
        }
        assert told == {
            "0": (2, 0.5, 1.0),
            "3": (0, None, 0.0),
            "5": (0, None, 0.0),
            "7": (1, 1.0, 1.0),
            names[-1]: (1, 0.0, None),
        }
        if width == 3000:
            assert peak < 8 * width**2 / 4

    @pytest.mark.parametrize("values", [1, 12, 399])
    def test_blocks_of_images_change_nothing(self, monkeypatch: pytest.MonkeyPatch, values: int) -> None:
        case = {**random_case(5, 100), "answers": [None, *random_case(5, 100)["answers"][1:]]}
        expected = judge(space=SPACE, **case)
        monkeypatch.setattr(judge_tops, "BLOCK_VALUES", values)
        assert judge(space=SPACE, **case) == expected
        with pytest.raises(ValueError, match="student: NaN"):
            judge(space=SPACE, **{**case, "student": np.where(np.arange(100)[:, None] < 99, case["student"], np.nan)})

    def test_scores_are_copied_a_block_at_a_time(self) -> None:
        space = LabelSpace(tuple(map(str, range(4096))), ("east",), (tuple(range(4096)),))
        scores = np.zeros((2048, 4096), np.float32)
        tracemalloc.start()
        judge(np.zeros(2048, np.int64), space, [scores], scores, scores, scores)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3 * scores.nbytes

    def test_against_scikit_learn(self) -> None:
        case = random_case(3)
        found = judge(space=SPACE, **case)
        truth, predicted = case["truth"], case["student"].argmax(1)
        labels = list(range(4))
        np.testing.assert_array_equal(found.confusion, confusion_matrix(truth, predicted, labels=labels))
        precision, recall, _, support = precision_recall_fscore_support(truth, predicted, labels=labels)
        assert [c.precision for c in found.classes] == pytest.approx(precision)
        assert [c.recall for c in found.classes] == pytest.approx(recall)
        assert [c.support for c in found.classes] == np.asarray(support).tolist()
        unified = precision_recall_fscore_support(truth, case["unified"].argmax(1), labels=labels)[1]
        assert [c.unified_recall for c in found.classes] == pytest.approx(unified)

    def test_calibration_error_by_hand(self) -> None:
        # Two images at 0.9 (one right), one at 0.5 (right): 2/3 |1/2 - 0.9| + 1/3 |1 - 0.5|
        probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.5, 0.5]])
        error, bins = calibration(probs, np.array([0, 1, 0]))
        assert error == pytest.approx((2 * 0.4 + 0.5) / 3)
        assert len(bins) == BINS
        full = [b for b in bins if b.count]
        assert [(b.count, b.accuracy) for b in full] == [(1, 1.0), (2, 0.5)]
        assert all(b.low < b.confidence <= b.high for b in full if b.confidence is not None)
        assert [b.confidence for b in bins if not b.count] == [None] * 13

    def test_a_bin_holds_its_upper_edge(self) -> None:
        edge = float(np.linspace(0, 1, BINS + 1)[9])
        _, bins = calibration(np.array([[edge, 1 - edge]]), np.array([0]))
        assert [b.count for b in bins] == [0] * 8 + [1] + [0] * 6

    def test_calibration_error_against_a_loop(self) -> None:
        case = random_case(5)
        probs, truth = np.exp(case["student"]), case["truth"]
        expected = 0.0
        for b in range(15):
            inside = [n for n in range(len(truth)) if b / 15 < probs[n].max() <= (b + 1) / 15]
            if inside:
                right = np.mean([probs[n].argmax() == truth[n] for n in inside])
                expected += len(inside) / len(truth) * abs(right - np.mean([probs[n].max() for n in inside]))
        assert judge(space=SPACE, **case).calibration_error == pytest.approx(expected)

    def test_certain_and_right_is_calibrated(self) -> None:
        student = np.where(np.eye(4)[[0, 1, 2]] == 1, 0.0, -1e4)
        found = judge([0, 1, 2], SPACE, [None] * 3, None, student, None)
        assert found.calibration_error == pytest.approx(0.0)
        assert found.reliability[-1].count == 3


@pytest.mark.parametrize(("correct", "count"), [(0, 1), (1, 1), (0, 50), (50, 50), (3, 10), (789, 1000)])
def test_wilson_is_scipys(correct: int, count: int) -> None:
    expected = binomtest(correct, count).proportion_ci(0.95, method="wilson")
    assert wilson(correct, count) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson(correct, count)[0] <= correct / count <= wilson(correct, count)[1]


class TestSites:
    def test_closed_forms(self) -> None:
        # west knows d, c, a in that order; images of a, c and b
        truth = [0, 2, 1, 2]
        west = logs([0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.4, 0.3, 0.3], [0.2, 0.7, 0.1])
        student = logs([0.3, 0.5, 0.1, 0.1], [0.2, 0.1, 0.6, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.6, 0.2, 0.1])
        found = judge(truth, SPACE, [None, None, west], None, student, None).sites[2]
        assert found.count == 3
        assert found.teacher_accuracy == pytest.approx(2 / 3)  # a right, c taken for d, c right
        assert found.student_accuracy == pytest.approx(1 / 3)  # takes the a and one c for b
        assert found.student_accuracy_restricted == 1.0  # with b out of the question all are right
        assert found.accuracy == pytest.approx(2 / 4)
        assert found.confidence_auroc == pytest.approx(1.0)  # 0.7, 0.6, 0.7 for its own against 0.4

    def test_auroc_is_scikit_learns(self) -> None:
        case = random_case(7)
        for site, classes, answers in zip(
            judge(space=SPACE, **case).sites, SPACE.class_sets, case["answers"], strict=True
        ):
            mine = [t in classes for t in case["truth"]]
            assert site.confidence_auroc == pytest.approx(roc_auc_score(mine, np.exp(answers).max(1)))

    @pytest.mark.parametrize("truth", [[0, 1, 0], [2, 3, -1]])
    def test_auroc_is_none_when_all_or_no_images_are_its_own(self, truth: list[int]) -> None:
        east = logs([0.9, 0.1], [0.2, 0.8], [0.6, 0.4])
        found = judge(truth, SPACE, [east, None, None], None, one_hot([0, 0, 0]), None).sites[0]
        assert found.confidence_auroc is None
        assert (found.teacher_accuracy is None) == (truth[0] == 2)

    def test_the_json_is_strict(self) -> None:
        case = random_case(1)
        found = judge(space=SPACE, **{**case, "answers": [None, *case["answers"][1:]]})
        text = json.dumps(found.as_dict(), allow_nan=False)
        assert json.loads(text)["student"]["accuracy"] == found.student.accuracy


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"truth": []}, "truth has shape"),
            ({"truth": [0.0, 1.0]}, "truth has shape"),
            ({"truth": [0, 4]}, "labels outside"),
            ({"truth": [0, -2]}, "labels outside"),
            ({"answers": [None]}, "1 sites' answers for 3"),
            ({"answers": [np.zeros((2, 3)), None, None]}, "answers of east: shape"),
            ({"student": np.zeros((2, 3))}, "student: shape"),
            ({"student": np.full((2, 4), np.nan)}, "student: NaN"),
            ({"unified": np.zeros((1, 4))}, "unified: shape"),
            ({"oracle": np.zeros((2, 5))}, "oracle: shape"),
        ],
    )
    def test_arrays_that_do_not_fit(self, change: dict[str, Any], message: str) -> None:
        good: dict[str, Any] = {
            "truth": [0, 1],
            "answers": [None] * 3,
            "unified": None,
            "student": one_hot([0, 1]),
            "oracle": None,
        }
        judge(space=SPACE, **good)
        with pytest.raises(ValueError, match=message):
            judge(space=SPACE, **{**good, **change})


class TestAgreement:
    SPACE = LabelSpace(("a", "b", "c"), ("one", "three", "two"), ((0, 1, 2), (2, 0), (1, 2, 0)))

    def test_by_hand(self) -> None:
        one = logs([0.6, 0.3, 0.1], [0.1, 0.5, 0.4])  # among a, c: a, c; among all: a, b
        three = logs([0.2, 0.8], [0.1, 0.9])  # a, a
        two = logs([0.3, 0.1, 0.6], [0.2, 0.7, 0.1])  # among all: a, c; among a, c: a, c
        found = agreement([[one, three, two]], self.SPACE)
        expected = np.array([[np.nan, 0.5, 0.5], [0.5, np.nan, 0.5], [0.5, 0.5, np.nan]])
        np.testing.assert_array_equal(found, expected)

    def test_blocks_change_nothing_and_pairs_that_share_one_class_are_nan(self) -> None:
        space = LabelSpace(("a", "b", "c", "d"), ("x", "y", "z"), ((0, 1, 2), (2, 1), (3, 2)))
        rng = np.random.default_rng(0)
        answers = [rng.normal(size=(50, len(c))) for c in space.class_sets]
        whole = agreement([answers], space)
        parts = agreement(([a[i : i + 7] for a in answers] for i in range(0, 50, 7)), space)
        np.testing.assert_array_equal(whole, parts)
        same = np.mean([answers[0][n, 1:].argmax() == 1 - answers[1][n].argmax() for n in range(50)])
        assert whole[0, 1] == whole[1, 0] == pytest.approx(same)
        assert np.isnan(whole[:, 2]).all()
        assert np.isnan(whole.diagonal()).all()

    def test_sites_without_answers_and_no_blocks(self) -> None:
        rows = np.zeros((3, 3))
        found = agreement([[rows, None, rows]], self.SPACE)
        assert found[0, 2] == 1.0  # a tie is settled alike: the first shared class
        assert np.isnan(found[0, 1])
        assert np.isnan(agreement([], self.SPACE)).all()
