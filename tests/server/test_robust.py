"""Answers that a majority contradicts are left out of unification, and no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from consilience.common.cards import SiteCard
from consilience.common.encoding import encode
from consilience.common.labels import LabelSpace
from consilience.common.progress import Reporter
from consilience.common.protocol import Answer, Question
from consilience.common.settings import JobSettings, Unify
from consilience.server.answered import Block, Usable, usable
from consilience.server.answers import AnswerStore
from consilience.server.answers_about import About
from consilience.server.labelling import Diagnostics, unify_pool
from consilience.server.robust import SiteTrust, Trust, cut, find_trust, kept, labelled
from consilience.server.unify import unify

DIGEST, POLICY, SIZE = "a" * 64, "c" * 16, 600
CLASSES = {
    "east": ["a", "b", "c", "d", "f"],
    "liar": ["a", "b", "c", "d", "f", "e"],
    "north": ["a", "b", "c", "d", "f"],
    "south": ["a", "b", "c", "d", "f"],
}


def answers(swap: bool = False, turn: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 6, SIZE)
    found = {}
    for site, classes in CLASSES.items():
        place = np.array(["abcdef".index(c) for c in classes])
        rows = rng.normal(0, 1, (SIZE, len(place))) + 4.0 * (truth[:, None] == place)
        found[site] = log_softmax(rows, axis=1).astype(np.float32)
    if swap:
        found["liar"] = found["liar"][:, [1, 0, 2, 3, 4, 5]]
    if turn:
        found["liar"] = np.roll(found["liar"], 1, axis=1)
    return found


def five(random: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, list[str]]]:
    """Return true classes of ten, and answers and classes of five sites, three of which own each class."""
    truth, told, classes = random.integers(0, 10, SIZE), {}, {}
    for i in range(5):
        held = np.array([c for c in range(10) if (c // 2 - i) % 5 in (0, 1, 2)])
        rows = random.normal(0, 1, (SIZE, len(held))) + 4.0 * (truth[:, None] == held)
        told[f"s{i}"] = log_softmax(rows, axis=1).astype(np.float32)
        classes[f"s{i}"] = [f"c{c}" for c in held]
    return truth, told, classes


def stores(folder: Path, told: dict[str, np.ndarray], missing: dict[str, int] | None = None) -> list[AnswerStore]:
    made = []
    for site, rows in told.items():
        about = About(
            site=site, pool=DIGEST, size=SIZE, teacher=DIGEST, policy=POLICY, encoding="f32", classes=rows.shape[1]
        )
        store = AnswerStore(folder / site, about)
        stop = SIZE - (missing or {}).get(site, 0)
        question = Question(job="job", pool=DIGEST, start=0, stop=stop, encoding="f32", teacher=DIGEST, policy=POLICY)
        store.append(Answer(question, encode(rows[:stop], "f32"), 0.0))
        made.append(store)
    return made


@pytest.fixture
def space() -> LabelSpace:
    return LabelSpace.build(CLASSES)


@pytest.fixture
def cards() -> list[SiteCard]:
    return [
        SiteCard(name=n, classes=tuple(c), encodings=("f32",), teacher=DIGEST, description="", policy=POLICY)
        for n, c in CLASSES.items()
    ]


def run(
    folder: Path, space: LabelSpace, cards: list[SiteCard], held: list[AnswerStore], **settings: object
) -> tuple[np.ndarray, Diagnostics]:
    with Reporter(quiet=True) as reporter:
        labels, about = unify_pool(folder / "labels", space, held, cards, Unify(**settings), reporter)  # type: ignore[arg-type]
    return np.array(labels), about


def test_honest_sites_lose_nothing_at_all(tmp_path: Path, space: LabelSpace, cards: list[SiteCard]) -> None:
    held = stores(tmp_path, answers())
    plain, without = run(tmp_path / "plain", space, cards, held)
    robust, about = run(tmp_path / "robust", space, cards, held, robust=True)
    assert np.array_equal(plain, robust)
    assert without.trust is None
    assert about.trust is not None
    assert about.trust.everyone
    assert {site.trust for site in about.trust.sites.values()} == {1.0}
    assert about.trust.unjudged == ("e",)


def test_two_swapped_classes_are_left_out_of_a_sites_answers(
    tmp_path: Path, space: LabelSpace, cards: list[SiteCard]
) -> None:
    told = answers(swap=True)
    labels, about = run(tmp_path, space, cards, stores(tmp_path, told), robust=True)
    assert about.trust is not None
    assert about.trust.sites["liar"].left_out == ("a", "b")
    assert about.trust.sites["liar"].trust == 1.0
    sets = [list(s) for s in space.class_sets]
    rows = list(told.values())
    sets[1], rows[1] = sets[1][2:], rows[1][:, 2:]
    assert np.allclose(labels, unify(rows, sets, len(space)).probs, atol=1e-7)


@pytest.mark.parametrize("method", ["sd", "ce", "mf-p", "mf-lv", "mf-lf"])
def test_classes_that_a_liar_alone_knows_are_left_out_and_named(
    tmp_path: Path, space: LabelSpace, cards: list[SiteCard], method: str
) -> None:
    """Labels are those of the other sites alone, whatever the liar says of its own class."""
    told = answers(turn=True)
    settings = {"robust": True, "method": method, "weights": {"liar": 2.0}}
    labels, about = run(tmp_path, space, cards, stores(tmp_path, told), **settings)
    assert about.trust is not None
    assert about.trust.sites["liar"].trust == 0.0
    assert about.trust.sites["liar"].left_out == ("a", "b", "c", "d", "f", "e")
    assert about.trust.lost == ("e",)
    assert about.trust.unjudged == ()
    assert about.apart == 0
    others = [told[name] for name in CLASSES if name != "liar"]
    expected = unify(others, [range(5)] * 3, 5, method=method).probs  # type: ignore[arg-type]
    assert np.allclose(labels[:, :5], expected, atol=1e-6)
    assert not labels[:, 5].any()


@pytest.mark.parametrize("left", [0.02, 1e-4])
@pytest.mark.parametrize("rest", ["even", "noise", "turned"])
def test_a_liar_that_always_names_its_own_class_costs_the_others_classes_nothing(
    tmp_path: Path, cards: list[SiteCard], left: float, rest: str
) -> None:
    """There is a class `x` that only the liar knows, to which it gives all but `left`."""
    random = np.random.default_rng(1)
    truth, told, classes = five(random)
    order = [f"c{c}" for c in range(10)]
    honest = LabelSpace.build(classes, order=order)
    whole, _ = run(tmp_path / "honest", honest, cards, stores(tmp_path / "honest", told))
    among = {"even": 0.0, "noise": random.normal(0, 2, (SIZE, 6)), "turned": np.roll(told["s2"], 1, axis=1)}[rest]
    shared = log_softmax(np.zeros((SIZE, 6)) + among, axis=1) + np.log(left)
    told["s2"] = np.concatenate([shared, np.full((SIZE, 1), np.log1p(-left))], axis=1).astype(np.float32)
    space = LabelSpace.build({**classes, "s2": [*classes["s2"], "x"]}, order=[*order, "x"])
    held = stores(tmp_path / "lied", told)
    plain, _ = run(tmp_path / "plain", space, cards, held)
    robust, about = run(tmp_path / "robust", space, cards, held, robust=True)
    assert about.trust is not None
    assert (about.trust.sites["s2"].trust, about.trust.sites["s2"].sites) == (0.0, 4)
    assert about.trust.lost == ("x",)
    right = [float((labels.argmax(axis=1) == truth).mean()) for labels in (whole, plain, robust)]
    assert right[1] < 0.5
    assert right[2] > right[0] - 0.02


@pytest.mark.parametrize("liars", [("s2",), ("s1", "s3")])
def test_sites_that_lie_half_of_the_time_pull_labels_less(
    tmp_path: Path, cards: list[SiteCard], liars: tuple[str, ...]
) -> None:
    random = np.random.default_rng(4)
    truth, told, classes = five(random)
    space = LabelSpace.build(classes, order=[f"c{c}" for c in range(10)])
    honest, _ = run(tmp_path / "honest", space, cards, stores(tmp_path / "honest", told), robust=True)
    for name in liars:
        rows = told[name]
        lie = np.where(np.arange(6) == random.integers(0, 6, SIZE)[:, None], np.log(0.98), np.log(0.02 / 5))
        told[name] = np.where(random.random((SIZE, 1)) < 0.5, lie, rows).astype(np.float32)
    held = stores(tmp_path / "lied", told)
    plain, _ = run(tmp_path / "plain", space, cards, held)
    robust, about = run(tmp_path / "robust", space, cards, held, robust=True)
    assert about.trust is not None
    assert about.trust.doubted == set(liars)
    assert not any(site.left_out for site in about.trust.sites.values())
    right = [float((labels.argmax(axis=1) == truth).mean()) for labels in (honest, plain, robust)]
    assert right[2] > right[1] + 0.4 * (right[0] - right[1])


def test_samples_that_only_outvoted_sites_answered_have_no_label(
    tmp_path: Path, space: LabelSpace, cards: list[SiteCard]
) -> None:
    """The last samples were answered by `liar` alone, which swaps two classes."""
    told = answers(swap=True)
    held = stores(tmp_path, told, {"north": 50, "south": 50, "east": 50})
    samples = usable(held, space)
    assert samples.mask is None
    trust = find_trust(space, held, samples)
    assert trust.sites["liar"].left_out == ("a", "b")
    assert kept(space, trust, (0, 1)).class_sets(space) == [space.class_sets[0], space.class_sets[1][2:]]
    labels, about = run(tmp_path, space, cards, held, robust=True)
    assert about.samples == SIZE - 50
    assert not labels[-50:].any()
    left = labelled(space, held, samples, trust)
    assert left.count == SIZE - 50
    assert left.unknown == {"a": 50, "b": 50}
    only = Usable(SIZE, np.arange(SIZE) % 2 == 0, {})
    both = labelled(space, held, only, trust)
    assert both.ids is not None
    assert np.array_equal(both.ids, np.arange(0, SIZE - 50, 2))


def test_a_site_that_is_needed_for_nothing_is_left_out(space: LabelSpace) -> None:
    trust = Trust(
        sites={
            name: SiteTrust(
                agreement=None, sites=0, samples=0, trust=float(name != "east"), left_out=("a",) * (name == "east")
            )
            for name in CLASSES
        }
    )
    trust.sites["east"] = trust.sites["east"].model_copy(update={"left_out": ("a", "b", "c", "d", "f")})
    keep = kept(space, trust, (0, 1, 2, 3))
    assert keep.sites == (1, 2, 3)
    assert keep.weights == (1.0,) * 3


def test_coverage_is_that_of_what_is_left(space: LabelSpace) -> None:
    rows = np.log(np.array([[0.1, 0.2, 0.3, 0.3, 0.1]], np.float32))
    liar = np.log(np.array([[0.1, 0.2, 0.3, 0.3, 0.05, 0.05]], np.float32))
    block = Block(np.array([0]), [rows, liar, rows, rows], [None, np.array([0.5], np.float32), None, None])
    swapped = {"liar": SiteTrust(agreement=0.5, sites=3, samples=9, left_out=("a", "b"))}
    whole = {name: SiteTrust(agreement=0.9, sites=3, samples=9) for name in CLASSES}
    left, told = cut(block, kept(space, Trust(sites=whole | swapped), (0, 1, 2, 3)))
    assert [a.shape[1] for a in left] == [5, 4, 5, 5]
    assert told[1] is not None
    assert told[1][0] == pytest.approx(0.5 * 0.7)
    lied = {"liar": SiteTrust(agreement=0.0, sites=3, samples=9, trust=0.0, left_out=("a", "b", "c", "d", "f", "e"))}
    keep = kept(space, Trust(sites=whole | lied), (0, 1, 2, 3))
    left, told = cut(block, keep)
    assert (keep.sites, keep.classes) == ((0, 2, 3), (0, 1, 2, 3, 4))
    assert [a.shape[1] for a in left] == [5, 5, 5]
    assert told == [None] * 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"privacy": {"secure_sum": True}}, "unify.robust"),
        ({"student": {"learning": "direct-ce"}}, "unify.robust is True"),
        ({"student": {"learning": "filtered", "classes": ["a", "b"]}}, "unify.robust is True, .*'filtered'.*branches"),
    ],
)
def test_what_cannot_go_with_it_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        JobSettings.model_validate({"name": "job", "unify": {"robust": True}, **changes})
