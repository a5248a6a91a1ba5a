"""Who contradicts whom: closed forms, a synthetic Dawid-Skene model, properties, and hostile input."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from consilience.common.errors import UnifyError
from consilience.server.unify.trust import Comparisons
from consilience.server.unify.verdicts import outvoted

FIVE = [tuple(sorted(c for c in range(10) if (c // 2 - site) % 5 in (0, 1, 2))) for site in range(5)]
"""Five sites; every class has three owners."""


def compare(class_sets: list[tuple[int, ...]], answers: Sequence[np.ndarray | None], cuts: tuple[int, ...] = ()):  # type: ignore[no-untyped-def]
    made = Comparisons(class_sets)
    size = next(len(a) for a in answers if a is not None)
    for start, stop in zip((0, *cuts), (*cuts, size), strict=True):
        made.add([None if a is None else a[start:stop] for a in answers])
    return made.results()


def judge(class_sets: list[tuple[int, ...]], answers: list[np.ndarray]):  # type: ignore[no-untyped-def]
    return outvoted(class_sets, compare(class_sets, answers))


def dawid_skene(
    class_sets: list[tuple[int, ...]], truth: np.ndarray, accuracy: list[float], random: np.random.Generator
) -> list[np.ndarray]:
    """Sites that name the true class of a sample with some probability, else any of theirs, and say so."""
    answers = []
    for classes, right in zip(class_sets, accuracy, strict=True):
        held = np.array(classes)
        told = random.integers(0, len(held), len(truth))
        sure = np.isin(truth, held) & (random.random(len(truth)) < right)
        told[sure] = np.searchsorted(held, truth[sure])
        # Of samples of other classes it is not sure of anything.
        top = np.where(np.isin(truth, held), right, 1.5 / len(held))[:, None]
        rows = np.repeat((1 - top) / (len(held) - 1), len(held), axis=1)
        rows[np.arange(len(truth)), told] = top[:, 0]
        answers.append(np.log(rows))
    return answers


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(5)


def lies(rows: np.ndarray, kind: str, random: np.random.Generator) -> np.ndarray:
    k = rows.shape[1]
    if kind == "flipped":
        return np.roll(rows, 1, axis=1)
    told = random.integers(0, k, len(rows)) if kind == "random" else np.zeros(len(rows), np.int64)
    return np.where(np.arange(k) == told[:, None], np.log(0.9), np.log(0.1 / (k - 1)))


def test_correlations_are_those_of_numpy_over_restricted_answers(random: np.random.Generator) -> None:
    """With masses that are equal everywhere weights cancel, and what is left is Pearson's correlation."""
    sets = [(0, 1, 2), (2, 1, 5)]
    one, two = random.normal(size=(500, 3)), random.normal(size=(500, 3))
    two[:, 1] += one[:, 1]
    # Half of each site's mass is on its shared classes.
    one[:, 0] = np.logaddexp(one[:, 1], one[:, 2])
    two[:, 2] = np.logaddexp(two[:, 0], two[:, 1])
    (found,) = compare(sets, [one, two]).values()
    s, t = softmax(one[:, 1:], axis=1), softmax(two[:, [1, 0]], axis=1)
    expected = [np.corrcoef(s[:, k], t[:, k])[0, 1] for k in range(2)]
    assert found.classes == (1, 2)
    assert np.allclose(found.by_class, expected, atol=1e-12)
    covariance = [np.cov(s[:, k], t[:, k]) for k in range(2)]
    whole = sum(c[0, 1] for c in covariance) / np.sqrt(
        sum(c[0, 0] for c in covariance) * sum(c[1, 1] for c in covariance)
    )
    assert found.correlation == pytest.approx(whole, abs=1e-12)
    assert found.samples == pytest.approx(250)
    assert np.allclose(found.samples_by_class, np.maximum(s.sum(0), t.sum(0)) / 2)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 59), max_size=4, unique=True))
@settings(max_examples=30, deadline=None)
def test_neither_blocks_nor_offsets_nor_the_order_of_sites_matter(seed: int, cuts: list[int]) -> None:
    random = np.random.default_rng(seed)
    sets = [(0, 1, 2, 3), (3, 2, 1), (0, 2, 3)]
    answers = [random.normal(0, 3, (60, len(s))) for s in sets]
    whole = compare(sets, answers)
    moved = [a + random.normal(0, 5, (60, 1)) for a in answers]
    parts = compare(sets, moved, tuple(sorted(cuts)))
    turned = compare(sets[::-1], answers[::-1])
    for (i, j), found in whole.items():
        other, mirror = parts[i, j], turned[2 - j, 2 - i]
        assert found.correlation == pytest.approx(other.correlation, abs=1e-9)
        assert np.allclose(found.by_class, other.by_class, atol=1e-9)
        assert found.correlation == pytest.approx(mirror.correlation, abs=1e-9)
        assert -1 <= found.correlation <= 1


@pytest.mark.parametrize("accuracy", [[0.9] * 5, [0.95, 0.9, 0.8, 0.7, 0.5]])
def test_honest_sites_are_never_outvoted_however_weak(accuracy: list[float], random: np.random.Generator) -> None:
    for _ in range(5):
        truth = random.integers(0, 10, 2000)
        found = judge(FIVE, dawid_skene(FIVE, truth, accuracy, random))
        assert not found.sites
        assert not found.cells
        assert not found.unjudged
        assert found.compared == (4,) * 5


@pytest.mark.parametrize("kind", ["random", "flipped", "constant"])
@pytest.mark.parametrize("liar", range(5))
def test_one_liar_of_five_is_outvoted(kind: str, liar: int, random: np.random.Generator) -> None:
    truth = random.integers(0, 10, 2000)
    answers = dawid_skene(FIVE, truth, [0.9, 0.8, 0.7, 0.8, 0.9], random)
    answers[liar] = lies(answers[liar], kind, random)
    found = judge(FIVE, answers)
    assert found.sites == {liar}
    assert not found.cells
    assert found.correlations[liar] < 0.3 < min(np.delete(found.correlations, liar))


def test_a_colluding_pair_of_five_is_outvoted(random: np.random.Generator) -> None:
    truth = random.integers(0, 10, 3000)
    answers = dawid_skene(FIVE, truth, [0.9] * 5, random)
    for liar in (1, 2):
        answers[liar] = lies(answers[liar], "flipped", random)
    assert judge(FIVE, answers).sites == {1, 2}


def test_a_site_that_swaps_two_classes_is_outvoted_on_these_alone(random: np.random.Generator) -> None:
    truth = random.integers(0, 10, 3000)
    answers = dawid_skene(FIVE, truth, [0.9, 0.8, 0.7, 0.8, 0.9], random)
    answers[3] = answers[3][:, [1, 0, 2, 3, 4, 5]]
    found = judge(FIVE, answers)
    assert not found.sites
    assert found.cells == {(3, FIVE[3][0]), (3, FIVE[3][1])}


def test_of_two_sites_neither_is_outvoted_and_nothing_is_known(random: np.random.Generator) -> None:
    truth = random.integers(0, 4, 2000)
    sets = [(0, 1, 2, 3)] * 2
    answers = dawid_skene(sets, truth, [0.9, 0.9], random)
    answers[1] = lies(answers[1], "flipped", random)
    found = judge(sets, answers)
    assert (found.sites, found.cells, found.unjudged) == (frozenset(), frozenset(), (0, 1, 2, 3))


def test_where_all_contradict_one_another_nobody_is_outvoted(random: np.random.Generator) -> None:
    sets = [(0, 1, 2, 3)] * 5
    found = judge(sets, [lies(np.zeros((2000, 4)), "random", random) for _ in sets])
    assert found.divided
    assert (found.sites, found.cells, found.unjudged) == (frozenset(), frozenset(), (0, 1, 2, 3))


def test_two_camps_of_equal_size_are_divided(random: np.random.Generator) -> None:
    truth = random.integers(0, 4, 2000)
    sets = [(0, 1, 2, 3)] * 4
    answers = dawid_skene(sets, truth, [0.9] * 4, random)
    answers[2:] = [lies(a, "flipped", random) for a in answers[2:]]
    found = judge(sets, answers)
    assert found.divided
    assert not found.sites
    assert found.weights == (1.0,) * 4


HUB = [(0, 1, 2, 3, 4, 5, 6, 7), (0, 1, 2), (3, 4, 5), (6, 7, 0)]
CHAIN = [(0, 1, 2), (1, 2, 3, 4), (3, 4, 5)]


@pytest.mark.parametrize(("sets", "liars"), [(HUB, (1, 2)), (HUB, (1, 2, 3)), (CHAIN, (0, 2))])
def test_an_honest_site_between_liars_is_not_outvoted(
    sets: list[tuple[int, ...]], liars: tuple[int, ...], random: np.random.Generator
) -> None:
    """The liars contradict it, but share no classes, so that nothing says that they go with one another."""
    truth = random.integers(0, max(map(max, sets)) + 1, 4000)
    answers = dawid_skene(sets, truth, [0.9] * len(sets), random)
    honestly = judge(sets, answers)
    assert (honestly.sites, honestly.cells, honestly.divided) == (frozenset(), frozenset(), False)
    for site in liars:
        answers[site] = lies(answers[site], "flipped", random)
    found = judge(sets, answers)
    assert (found.sites, found.cells, found.divided) == (frozenset(), frozenset(), True)
    assert found.unjudged == tuple(range(max(map(max, sets)) + 1))
    assert found.weights == (1.0,) * len(sets)


def test_two_liars_who_share_no_classes_do_not_outvote_even_where_most_sites_go_with_somebody(
    random: np.random.Generator,
) -> None:
    sets = [HUB[0], HUB[1], HUB[2], (6, 7, 8, 9), *[(8, 9, 10)] * 3]
    answers = dawid_skene(sets, random.integers(0, 11, 5000), [0.9] * len(sets), random)
    for site in (1, 2):
        answers[site] = lies(answers[site], "flipped", random)
    found = judge(sets, answers)
    assert (found.sites, found.divided) == (frozenset(), False)


def test_of_owners_who_cannot_all_be_compared_nothing_is_known(random: np.random.Generator) -> None:
    """Class 0 has three owners, the first and the last of whom share nothing else."""
    sets = [(0, 1), (0, 1, 2), (0, 2)]
    assert judge(sets, dawid_skene(sets, random.integers(0, 3, 2000), [0.9] * 3, random)).unjudged == (0, 1, 2)


def test_a_liar_is_outvoted_by_two_who_go_with_one_another(random: np.random.Generator) -> None:
    sets = [(0, 1, 2, 3), (0, 1, 2), (1, 2, 3)]
    answers = dawid_skene(sets, random.integers(0, 4, 3000), [0.9] * 3, random)
    answers[0] = lies(answers[0], "flipped", random)
    found = judge(sets, answers)
    assert found.sites == {0}
    assert found.unjudged == (0, 3)


@pytest.mark.parametrize("left", [0.5, 1e-4, 1e-9])
def test_a_site_does_not_get_out_of_comparisons_by_claiming_samples_for_its_own_class(
    left: float, random: np.random.Generator
) -> None:
    """What it says of the others' classes is judged, however little of a sample it leaves them."""
    sets = [*FIVE[:2], (*FIVE[2], 10), *FIVE[3:]]
    answers = dawid_skene(FIVE, random.integers(0, 10, 2000), [0.9] * 5, random)
    for kind, out in (("random", {2}), ("flipped", {2}), ("honest", set())):
        rows = answers[2] if kind == "honest" else lies(answers[2], kind, random)
        claim = np.full((len(rows), 1), np.log1p(-left))
        told = [*answers[:2], np.concatenate([rows + np.log(left), claim], axis=1), *answers[3:]]
        found = judge(sets, told)
        assert found.sites == out
        assert found.compared == (4,) * 5


def calibrated(noise: Sequence[float], random: np.random.Generator, size: int = 3000) -> list[np.ndarray]:
    """Return answers of the sites of `FIVE` who see the truth under noise of their own, and know how much."""
    truth, answers = random.integers(0, 10, size), []
    for classes, own in zip(FIVE, noise, strict=True):
        seen = (truth[:, None] == np.array(classes)) + random.normal(0, own, (size, len(classes)))
        answers.append(log_softmax(seen / own**2, axis=1))
    return answers


@pytest.mark.parametrize("noise", [(0.4,) * 5, (0.7,) * 5, (0.3, 0.4, 0.9, 0.4, 0.3), (0.3, 0.5, 0.5, 0.7, 0.7)])
@pytest.mark.parametrize("size", [200, 3000])
def test_honest_sites_count_fully_however_little_they_know(
    noise: tuple[float, ...], size: int, random: np.random.Generator
) -> None:
    for _ in range(3):
        assert judge(FIVE, calibrated(noise, random, size)).weights == (1.0,) * 5


@pytest.mark.parametrize(
    ("kind", "liars", "most"), [("random", (2,), 0.95), ("flipped", (2,), 0.3), ("flipped", (1, 3), 0.3)]
)
def test_sites_that_lie_half_of_the_time_count_less_and_others_fully(
    kind: str, liars: tuple[int, ...], most: float, random: np.random.Generator
) -> None:
    answers = calibrated((0.3, 0.3, 0.3, 0.4, 0.3), random)
    for site in liars:
        half = random.random(len(answers[site])) < 0.5
        answers[site] = np.where(half[:, None], lies(answers[site], kind, random), answers[site])
    found = judge(FIVE, answers)
    assert found.sites <= set(liars)
    for site, weight in enumerate(found.weights):
        if site not in liars:
            assert weight == 1.0
        elif site not in found.sites:
            assert 0.1 <= weight < most


def test_a_weight_is_the_fourth_power_of_what_a_site_delivers(random: np.random.Generator) -> None:
    """The share is of 0.7 of what others do: here two sites alike, beside a third that is right half of the time."""
    sets, truth = [(0, 1, 2, 3)] * 3, np.arange(200_000) % 4
    sure = np.log(np.where(truth[:, None] == np.arange(4), 0.97, 0.01))
    half = np.where(random.random((len(truth), 1)) < 0.5, lies(sure, "random", random), sure)
    found = judge(sets, [sure, sure, half])
    covariance = np.cov(np.exp(sure[:, 0]), np.exp(half[:, 0]))
    share = covariance[0, 1] / min(covariance[1, 1], np.sqrt(covariance[0, 0] * covariance[1, 1]))
    assert found.weights[:2] == (1.0, 1.0)
    assert found.weights[2] == pytest.approx(((share + 2 / np.sqrt(len(truth))) / 0.7) ** 4, rel=0.05)
    assert judge(sets[:2], [sure, half]).weights == (1.0, 1.0)


def test_classes_with_fewer_than_three_owners_are_unjudged(random: np.random.Generator) -> None:
    sets = [(0, 1, 2, 3), (0, 1, 2), (0, 1, 3)]
    truth = random.integers(0, 4, 2000)
    assert judge(sets, dawid_skene(sets, truth, [0.9] * 3, random)).unjudged == (2, 3)


@pytest.mark.parametrize("size", [1, 19])
def test_a_few_samples_say_nothing(size: int, random: np.random.Generator) -> None:
    sets = [(0, 1, 2, 3)] * 3
    answers = [random.normal(0, 5, (size, 4)) for _ in sets]
    found = judge(sets, answers)
    assert (found.sites, found.cells, found.compared) == (frozenset(), frozenset(), (0, 0, 0))
    assert np.isnan(found.correlations).all()


def test_sites_that_share_one_class_or_none_are_not_compared(random: np.random.Generator) -> None:
    sets = [(0, 1), (1, 2), (3, 4)]
    assert compare(sets, [random.normal(size=(50, 2)) for _ in sets]) == {}


def test_answers_without_mass_on_the_shared_classes_count_for_nothing() -> None:
    """-inf for every shared class, as a row of the largest classes alone may have it."""
    rows = np.tile(np.log([0.5, 0.3, 0.2]), (30, 1))
    silent = np.tile([-np.inf, -np.inf, 0.0], (30, 1))
    ((found),) = compare([(0, 1, 2), (0, 1, 3)], [rows, silent]).values()
    assert found.samples == 0
    assert found.correlation == 0
    assert np.isfinite(found.by_class).all()


def test_a_block_that_a_site_did_not_answer_is_skipped(random: np.random.Generator) -> None:
    sets = [(0, 1, 2)] * 3
    answers = [log_softmax(random.normal(size=(40, 3)), axis=1) for _ in sets]
    made = Comparisons(sets)
    made.add([answers[0], answers[1], None])
    assert made.results()[0, 1].samples == pytest.approx(40)
    assert made.results()[0, 2].samples == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_refused(bad: float) -> None:
    made = Comparisons([(0, 1), (0, 1)])
    with pytest.raises(UnifyError, match="site 1 hold NaN"):
        made.add([np.zeros((2, 2)), np.array([[0.0, bad], [0.0, 0.0]])])
    with pytest.raises(UnifyError, match=r"site 0 have shape \(2, 3\)"):
        made.add([np.zeros((2, 3)), np.zeros((2, 2))])
