"""The unify stage: streamed labels are those of one call, are kept, and are made anew when anything changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from consilience.common.cards import SiteCard
from consilience.common.encoding import encode, encode_coverage
from consilience.common.labels import LabelSpace
from consilience.common.progress import Reporter
from consilience.common.protocol import Answer, Question
from consilience.common.settings import Unify
from consilience.server import answered, sharpness, solvers
from consilience.server.answered import usable
from consilience.server.answers import AnswerStore
from consilience.server.answers_about import About
from consilience.server.labelling import labels_key, load_other, solved_pool, unify_pool
from consilience.server.unify import Prior, Unifier, unify

DIGEST, POLICY, SIZE = "a" * 64, "c" * 16, 50
CLASSES = {"one": ["a", "b", "c"], "two": ["c", "d"]}
PRIORS = {"one": (0.6, 0.3, 0.1), "two": None}


@pytest.fixture
def space() -> LabelSpace:
    return LabelSpace.build(CLASSES)


@pytest.fixture
def cards() -> list[SiteCard]:
    return [
        SiteCard(
            name=name,
            classes=tuple(classes),
            encodings=("f32",),
            teacher=DIGEST,
            description="",
            policy=POLICY,
            class_priors=PRIORS[name],
        )
        for name, classes in CLASSES.items()
    ]


def answers() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [log_softmax(rng.normal(0, 2, (SIZE, len(c))), axis=1).astype(np.float32) for c in CLASSES.values()]


@pytest.fixture
def stores(tmp_path: Path) -> list[AnswerStore]:
    made = []
    for (name, classes), rows in zip(CLASSES.items(), answers(), strict=True):
        about = About(
            site=name, pool=DIGEST, size=SIZE, teacher=DIGEST, policy=POLICY, encoding="f32", classes=len(classes)
        )
        store = AnswerStore(tmp_path / "answers" / name, about)
        question = Question(job="job", pool=DIGEST, start=0, stop=SIZE, encoding="f32", teacher=DIGEST, policy=POLICY)
        store.append(Answer(question, encode(rows, "f32"), 0.0))
        made.append(store)
    return made


def run(
    folder: Path, space: LabelSpace, stores: list[AnswerStore], cards: list[SiteCard], settings: Unify
) -> np.ndarray:
    with Reporter(quiet=True) as reporter:
        labels, diagnostics = unify_pool(folder, space, stores, cards, settings, reporter)
    assert diagnostics.samples == SIZE
    assert diagnostics.not_converged == 0
    return np.array(labels)  # a copy: the file is written anew by the next run


@pytest.mark.parametrize("values", [4, 28, 10**6])
def test_labels_do_not_depend_on_the_block(
    tmp_path: Path,
    space: LabelSpace,
    stores: list[AnswerStore],
    cards: list[SiteCard],
    monkeypatch: pytest.MonkeyPatch,
    values: int,
) -> None:
    monkeypatch.setattr(answered, "BLOCK_VALUES", values)
    labels = run(tmp_path / "labels", space, stores, cards, Unify())
    assert np.allclose(labels, unify(answers(), space.class_sets).probs, atol=1e-7)


def test_weights_temperature_and_priors_arrive(
    tmp_path: Path, space: LabelSpace, stores: list[AnswerStore], cards: list[SiteCard]
) -> None:
    settings = Unify(method="mf-lf", weights={"two": 3.0}, temperature=2.0, prior_correction=True)
    labels = run(tmp_path / "labels", space, stores, cards, settings)
    flat = [1 / 4] * 4
    prior = Prior(flat, [[0.6, 0.3, 0.1], flat[:2]])
    expected = unify(
        answers(), space.class_sets, method="mf-lf", weights=[1.0, 3.0], temperature=2.0, prior=prior
    ).probs
    assert np.allclose(labels, expected, atol=1e-6)
    assert not np.allclose(labels, unify(answers(), space.class_sets, method="mf-lf").probs, atol=1e-3)


def test_labels_are_kept_until_the_settings_change(
    tmp_path: Path, space: LabelSpace, stores: list[AnswerStore], cards: list[SiteCard], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path / "labels", space, stores, cards, Unify())
    with monkeypatch.context() as patched:
        patched.setattr(solvers, "unifier", lambda *arguments, **more: pytest.fail("unified again"))
        assert np.array_equal(run(tmp_path / "labels", space, stores, cards, Unify()), first)
    other = run(tmp_path / "labels", space, stores, cards, Unify(method="sd"))
    assert not np.allclose(other, first, atol=1e-3)
    (tmp_path / "labels" / "diagnostics.json").unlink()
    assert np.array_equal(run(tmp_path / "labels", space, stores, cards, Unify()), first)


def store_of(folder: Path, site: str, rows: np.ndarray, ranges: list[tuple[int, int]]) -> AnswerStore:
    about = About(
        site=site, pool=DIGEST, size=SIZE, teacher=DIGEST, policy=POLICY, encoding="f32", classes=rows.shape[1]
    )
    store = AnswerStore(folder / site, about)
    for start, stop in ranges:
        give(store, rows, start, stop)
    return store


def give(store: AnswerStore, rows: np.ndarray, start: int, stop: int) -> None:
    question = Question(
        job="job", pool=DIGEST, start=start, stop=stop, encoding="f32", teacher=DIGEST, policy=store.about.policy
    )
    store.append(Answer(question, encode(rows[start:stop], "f32"), 0.0))


def cards_for(classes: dict[str, list[str]]) -> list[SiteCard]:
    return [
        SiteCard(name=n, classes=tuple(c), encodings=("f32",), teacher=DIGEST, description="", policy=POLICY)
        for n, c in classes.items()
    ]


@pytest.mark.parametrize("values", [12, 10**6])
def test_a_sample_is_labelled_by_the_sites_that_answered_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: int
) -> None:
    """Sites that know the same classes: cross-entropy gives the weighted mean of those who answered."""
    monkeypatch.setattr(answered, "BLOCK_VALUES", values)
    classes = {"one": ["a", "b", "c"], "two": ["a", "b", "c"]}
    rng = np.random.default_rng(1)
    one, two = (log_softmax(rng.normal(0, 2, (SIZE, 3)), axis=1).astype(np.float32) for _ in range(2))
    held = [
        store_of(tmp_path, "one", one, [(0, 30), (40, 45)]),
        store_of(tmp_path, "two", two, [(20, 44)]),
    ]
    space = LabelSpace.build(classes)
    with Reporter(quiet=True) as reporter:
        labels, diagnostics = unify_pool(
            tmp_path / "q", space, held, cards_for(classes), Unify(weights={"two": 3.0}), reporter
        )
    both = [*range(20, 30), *range(40, 44)]
    expected = np.zeros((SIZE, 3))
    expected[:20], expected[44] = np.exp(one[:20]), np.exp(one[44])
    expected[30:40] = np.exp(two[30:40])
    expected[both] = np.exp(one[both]) / 4 + np.exp(two[both]) * 3 / 4
    assert np.allclose(labels, expected, atol=1e-5)
    assert (diagnostics.samples, diagnostics.apart) == (45, 0)
    found = usable(held, space)
    assert found.count == 45
    assert found.unknown == {"a": 5, "b": 5, "c": 5}
    assert found.ids is not None
    assert found.ids.tolist() == [*range(45)]


def test_samples_that_nobody_who_knows_a_class_answered_have_no_label(tmp_path: Path, space: LabelSpace) -> None:
    one, two = answers()
    held = [store_of(tmp_path, "one", one, [(0, 40)]), store_of(tmp_path, "two", two, [(10, SIZE)])]
    found = usable(held, space)
    assert found.unknown == {"a": 10, "b": 10, "d": 10}
    with Reporter(quiet=True) as reporter:
        labels, diagnostics = unify_pool(tmp_path / "q", space, held, cards_for(CLASSES), Unify(), reporter)
    expected = unify([one[10:40], two[10:40]], space.class_sets).probs
    assert np.allclose(labels[10:40], expected, atol=1e-7)
    assert not labels[:10].any()
    assert not labels[40:].any()
    assert diagnostics.samples == 30


def test_answers_that_come_in_later_are_unified_anew(
    tmp_path: Path, space: LabelSpace, stores: list[AnswerStore], cards: list[SiteCard]
) -> None:
    one, two = answers()
    held = [store_of(tmp_path, "one", one, [(0, SIZE)]), store_of(tmp_path, "two", two, [(0, 20)])]
    with Reporter(quiet=True) as reporter:
        _, before = unify_pool(tmp_path / "q", space, held, cards, Unify(), reporter)
        give(held[1], two, 20, SIZE)
        labels, after = unify_pool(tmp_path / "q", space, held, cards, Unify(), reporter)
    assert (before.samples, after.samples) == (20, SIZE)
    assert before.key != after.key
    assert np.array_equal(labels, run(tmp_path / "labels", space, stores, cards, Unify()))


def test_samples_that_fewer_sites_link_are_counted(tmp_path: Path) -> None:
    classes = {"one": ["a", "b"], "three": ["b", "c"], "two": ["c", "d"]}
    rng = np.random.default_rng(2)
    rows = log_softmax(rng.normal(0, 1, (SIZE, 2)), axis=1).astype(np.float32)
    ranges = {"one": [(0, SIZE)], "three": [(0, 35)], "two": [(0, SIZE)]}
    held = [store_of(tmp_path, name, rows, ranges[name]) for name in classes]
    with Reporter(quiet=True) as reporter:
        labels, diagnostics = unify_pool(
            tmp_path / "q", LabelSpace.build(classes), held, cards_for(classes), Unify(), reporter
        )
    assert (diagnostics.samples, diagnostics.apart) == (SIZE, 15)
    assert np.allclose(labels.sum(axis=1), 1, atol=1e-5)


def coverage_of(folder: Path, site: str, told: np.ndarray, ranges: list[tuple[int, int]]) -> AnswerStore:
    about = About(
        site=site, pool=DIGEST, size=SIZE, teacher=DIGEST, policy=POLICY, kind="coverage", encoding="f16", classes=1
    )
    store = AnswerStore(folder / f"{site}-coverage", about)
    for start, stop in ranges:
        cover(store, told, start, stop)
    return store


def cover(store: AnswerStore, told: np.ndarray, start: int, stop: int) -> None:
    question = Question(
        job="job", pool=DIGEST, start=start, stop=stop, kind="coverage", encoding="f16", teacher=DIGEST, policy=POLICY
    )
    store.append(Answer(question, encode_coverage(told[start:stop], "f16"), 0.0))


class Recorder:
    """Stands before the real unifier and keeps what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.options: list[dict[str, Any]] = []
        self.calls: list[tuple[list[np.ndarray], Any]] = []
        self.other = 0.25
        recorder = self

        class Recorded(Unifier):
            def __init__(self, *sets: Any, **options: Any) -> None:
                recorder.options.append(options)
                super().__init__(*sets, **options)

            def __call__(self, log_probs: Any, **options: Any) -> Any:
                recorder.calls.append((list(log_probs), options["coverage"]))
                unified = super().__call__(log_probs, **options)
                return replace(unified, other=np.full(len(log_probs[0]), recorder.other, np.float32))

        monkeypatch.setattr(solvers, "Unifier", Recorded)


TOLD = [np.arange(SIZE, dtype=np.float32) / 64, 1 - np.arange(SIZE, dtype=np.float32) / 64]
"""Exact in binary16, another number for every sample and site."""


@pytest.mark.parametrize("values", [4, 28, 10**6])
def test_coverage_arrives_with_its_samples_and_sites(
    tmp_path: Path,
    space: LabelSpace,
    stores: list[AnswerStore],
    cards: list[SiteCard],
    monkeypatch: pytest.MonkeyPatch,
    values: int,
) -> None:
    monkeypatch.setattr(answered, "BLOCK_VALUES", values)
    recorder = Recorder(monkeypatch)
    covers = [coverage_of(tmp_path, name, told, [(0, SIZE)]) for name, told in zip(CLASSES, TOLD, strict=True)]
    with Reporter(quiet=True) as reporter:
        _, diagnostics = unify_pool(
            tmp_path / "q", space, stores, cards, Unify(), reporter, coverage=[covers[0], covers[1]]
        )
        assert [np.concatenate([told[i] for _, told in recorder.calls]).tolist() for i in (0, 1)] == [
            told.tolist() for told in TOLD
        ]
        assert diagnostics.coverage == {"one": SIZE, "two": SIZE}
        recorder.calls.clear()
        _, one = unify_pool(tmp_path / "one", space, stores, cards, Unify(), reporter, coverage=[None, covers[1]])
        assert all(told[0] is None for _, told in recorder.calls)
        assert np.concatenate([told[1] for _, told in recorder.calls]).tolist() == TOLD[1].tolist()
        assert one.coverage == {"two": SIZE}
        recorder.calls.clear()
        _, none = unify_pool(tmp_path / "none", space, stores, cards, Unify(), reporter, coverage=[None, None])
        assert all(told is None for _, told in recorder.calls)
        assert none.coverage == {}
    assert {options["other"] for options in recorder.options} == {0.0}
    assert not (tmp_path / "q" / "other.npy").exists()


@pytest.mark.parametrize("settings", [Unify(), Unify(temperature=2.0), Unify(other=0.1)], ids=["", "soft", "other"])
def test_labels_with_coverage_are_a_power_that_the_sites_claims_ask_for(
    tmp_path: Path, space: LabelSpace, cards: list[SiteCard], monkeypatch: pytest.MonkeyPatch, settings: Unify
) -> None:
    whole = log_softmax(np.random.default_rng(2).normal(0, 2, (SIZE, 4)), axis=1).astype(np.float32)
    sets = ([0, 1, 2], [2, 3])
    rows = [log_softmax(whole[:, own], axis=1).astype(np.float32) for own in sets]
    stores = [store_of(tmp_path, name, held, [(0, SIZE)]) for name, held in zip(CLASSES, rows, strict=True)]
    told = [np.exp(whole[:, own]).sum(axis=1) for own in sets]
    told[1][:] = told[1].mean()  # who knows less makes labels timid
    covers = [coverage_of(tmp_path, name, values, [(0, SIZE)]) for name, values in zip(CLASSES, told, strict=True)]
    given = (space, stores, cards, settings)
    with Reporter(quiet=True) as reporter:
        plain, before = unify_pool(tmp_path / "few", *given, reporter, coverage=covers)
        monkeypatch.setattr(sharpness, "FEWEST", SIZE)
        powers, after = unify_pool(tmp_path / "enough", *given, reporter, coverage=covers)
        _, sd = unify_pool(tmp_path / "sd", space, stores, cards, Unify(method="sd"), reporter, coverage=covers)
        corrected = Unify(prior_correction=True)
        _, moved = unify_pool(tmp_path / "moved", space, stores, cards, corrected, reporter, coverage=covers)
        _, idle = unify_pool(tmp_path / "without", *given, reporter)
    assert before.exponent == sd.exponent == moved.exponent == idle.exponent == 1
    assert after.exponent is not None
    assert 0.25 < after.exponent < 4
    assert abs(after.exponent - 1) > 0.02
    expected = plain.astype(np.float64) ** after.exponent
    np.testing.assert_allclose(powers, expected / expected.sum(axis=1, keepdims=True), rtol=1e-4)


@pytest.mark.parametrize("values", [12, 10**6])
def test_labels_that_are_not_written_are_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: int
) -> None:
    """With answers and coverage that are missing here and there, and a power; and they are not made anew."""
    monkeypatch.setattr(answered, "BLOCK_VALUES", values)
    monkeypatch.setattr(sharpness, "FEWEST", 10)
    classes = {"one": ["a", "b", "c"], "two": ["c", "d"]}
    whole = log_softmax(np.random.default_rng(2).normal(0, 2, (SIZE, 4)), axis=1).astype(np.float32)
    sets = ([0, 1, 2], [2, 3])
    rows = [log_softmax(whole[:, own], axis=1).astype(np.float32) for own in sets]
    told = [np.exp(whole[:, own]).sum(axis=1) for own in sets]
    told[1][:] = told[1].mean()
    held = [store_of(tmp_path, "one", rows[0], [(0, 45)]), store_of(tmp_path, "two", rows[1], [(5, 50)])]
    ranges = ([(0, 40)], [(0, SIZE)])
    covers = [coverage_of(tmp_path, *about) for about in zip(CLASSES, told, ranges, strict=True)]
    about = (LabelSpace.build(classes), held, cards_for(classes), Unify())
    with Reporter(quiet=True) as reporter:
        written, first = unify_pool(tmp_path / "q", *about, reporter, coverage=covers)
        rest, second = solved_pool(tmp_path / "none", *about, reporter, coverage=covers)
        again, third = solved_pool(tmp_path / "none", *about, reporter, coverage=covers)
    assert first.exponent != 1
    assert second.model_dump(exclude={"seconds"}) == first.model_dump(exclude={"seconds"})
    assert third == second
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["diagnostics.json"]
    usable_ids = np.arange(5, 45)
    for ids in (usable_ids, usable_ids[[3]], usable_ids[::7], usable_ids[:0]):
        for found in (rest, again):
            np.testing.assert_allclose(found[ids], written[ids], atol=1e-7)
    assert rest.shape == written.shape == (SIZE, 4)


@pytest.mark.parametrize("other", [0.1, 0.3])
def test_one_site_s_answers_are_its_labels_whatever_is_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: float
) -> None:
    """However likely the job takes it that a sample is of no class: that is not for the power to make up for."""
    monkeypatch.setattr(sharpness, "FEWEST", SIZE)
    classes = {"one": ["a", "b", "c"]}
    whole = log_softmax(np.random.default_rng(1).normal(0, 2, (SIZE, 3)), axis=1).astype(np.float32)
    held = [store_of(tmp_path, "one", whole, [(0, SIZE)])]
    covers = [coverage_of(tmp_path, "one", np.full(SIZE, 0.95, np.float32), [(0, SIZE)])]
    with Reporter(quiet=True) as reporter:
        given = (LabelSpace.build(classes), held, cards_for(classes), Unify(other=other), reporter)
        labels, diagnostics = unify_pool(tmp_path / "q", *given, coverage=covers)
    assert diagnostics.exponent == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(labels, np.exp(whole), atol=1e-3)


def test_who_knows_every_class_claims_nothing_by_coverage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharpness, "FEWEST", SIZE)
    classes = {"one": ["a", "b", "c"], "two": ["a", "b", "c"]}
    whole = log_softmax(np.random.default_rng(1).normal(0, 2, (SIZE, 3)), axis=1).astype(np.float32)
    held = [store_of(tmp_path, name, whole, [(0, SIZE)]) for name in classes]
    covers = [coverage_of(tmp_path, name, np.full(SIZE, 0.75, np.float32), [(0, SIZE)]) for name in classes]
    with Reporter(quiet=True) as reporter:
        given = (LabelSpace.build(classes), held, cards_for(classes), Unify(), reporter)
        _, diagnostics = unify_pool(tmp_path / "q", *given, coverage=covers)
    assert diagnostics.exponent == 1


@pytest.mark.parametrize("values", [12, 10**6])
def test_a_sample_without_a_site_s_coverage_is_unified_as_if_the_site_had_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: int
) -> None:
    monkeypatch.setattr(answered, "BLOCK_VALUES", values)
    recorder = Recorder(monkeypatch)
    classes = {"one": ["a", "b", "c"], "two": ["a", "b", "c"]}
    rng = np.random.default_rng(1)
    rows = [log_softmax(rng.normal(0, 2, (SIZE, 3)), axis=1).astype(np.float32) for _ in classes]
    held = [
        store_of(tmp_path, "one", rows[0], [(0, 30), (40, 45)]),
        store_of(tmp_path, "two", rows[1], [(20, 44)]),
    ]
    covers = [
        coverage_of(tmp_path, "one", TOLD[0], [(5, 25), (28, 42)]),
        coverage_of(tmp_path, "two", TOLD[1], [(0, 24), (30, 50)]),
    ]
    with Reporter(quiet=True) as reporter:
        labels, diagnostics = unify_pool(
            tmp_path / "q", LabelSpace.build(classes), held, cards_for(classes), Unify(), reporter, coverage=covers
        )
    number = {tuple(row): (site, at) for site in (0, 1) for at, row in enumerate(rows[site].tolist())}
    seen: dict[tuple[int, int], float | None] = {}
    for given, told in recorder.calls:
        for column, block in enumerate(given):
            for at, row in enumerate(block.tolist()):
                values_told = None if told is None else told[column]
                seen[number[tuple(row)]] = None if values_told is None else float(values_told[at])
    answering = [{*range(30), *range(40, 45)}, {*range(20, 44)}]
    covering = [{*range(5, 25), *range(28, 42)}, {*range(24), *range(30, 50)}]
    assert seen == {
        (site, at): float(TOLD[site][at]) if at in covering[site] else None for site in (0, 1) for at in answering[site]
    }
    assert diagnostics.coverage == {"one": len(answering[0] & covering[0]), "two": len(answering[1] & covering[1])}
    assert diagnostics.samples == 45
    assert np.allclose(labels[:45].sum(axis=1), 1, atol=1e-5)


def test_the_key_tells_which_coverage_there_is(
    tmp_path: Path, space: LabelSpace, stores: list[AnswerStore], cards: list[SiteCard], monkeypatch: pytest.MonkeyPatch
) -> None:
    cover_one = coverage_of(tmp_path, "one", TOLD[0], [(0, 20)])
    cover_two = coverage_of(tmp_path, "two", TOLD[1], [(0, 20)])
    settings = Unify()
    keys = [labels_key(space, stores, settings, given) for given in (None, [cover_one, None], [None, cover_two])]
    assert labels_key(space, stores, settings, [None, None]) == keys[0]
    cover(cover_one, TOLD[0], 20, SIZE)
    keys.append(labels_key(space, stores, settings, [cover_one, None]))
    keys.append(labels_key(space, stores, Unify(other=0.1), [cover_one, None]))
    assert len(set(keys)) == 5
    recorder = Recorder(monkeypatch)
    with Reporter(quiet=True) as reporter:
        given = (space, stores, cards, settings, reporter)
        unify_pool(tmp_path / "q", *given)
        unify_pool(tmp_path / "q", *given)
        assert len(recorder.calls) == 1
        unify_pool(tmp_path / "q", *given, coverage=[cover_one, None])
        assert len(recorder.calls) == 2
        unify_pool(tmp_path / "q", *given, coverage=[None, cover_two])  # every answer, and coverage of 20 samples
        assert sorted(len(rows[0]) for rows, _ in recorder.calls[2:]) == [20, SIZE - 20]


def test_how_likely_a_sample_is_outside_is_written_where_the_settings_say_so(
    tmp_path: Path, space: LabelSpace, stores: list[AnswerStore], cards: list[SiteCard], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    covers = [coverage_of(tmp_path, "one", TOLD[0], [(0, SIZE)]), None]
    with Reporter(quiet=True) as reporter:

        def unify_with(other: float) -> None:
            unify_pool(tmp_path / "q", space, stores, cards, Unify(other=other), reporter, coverage=covers)

        unify_with(0.5)
        assert recorder.options[-1]["other"] == 0.5
        other = load_other(tmp_path / "q")
        assert other is not None
        assert (other.shape, other.dtype) == ((SIZE,), np.float32)
        assert np.all(other == 0.25)
        calls = len(recorder.calls)
        unify_with(0.5)
        assert len(recorder.calls) == calls
        (tmp_path / "q" / "other.npy").unlink()
        unify_with(0.5)
        assert len(recorder.calls) == 2 * calls
        unify_with(0.0)
        assert load_other(tmp_path / "q") is None


def test_without_coverage_no_sample_is_outside_and_sd_takes_coverage_of_all_or_none(
    tmp_path: Path, space: LabelSpace, stores: list[AnswerStore], cards: list[SiteCard], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    covers = [
        coverage_of(tmp_path, "one", TOLD[0], [(0, 30)]),
        coverage_of(tmp_path, "two", TOLD[1], [(20, 40)]),
    ]
    with Reporter(quiet=True) as reporter:
        unify_pool(tmp_path / "ce", space, stores, cards, Unify(other=0.5), reporter, coverage=covers)
        assert sorted(options["other"] for options in recorder.options) == [0.0, 0.5]
        assert [len(rows[0]) for rows, told in recorder.calls if told is None] == [10]
        recorder.calls.clear()
        _, found = unify_pool(tmp_path / "sd", space, stores, cards, Unify(method="sd"), reporter, coverage=covers)
    given = [(len(rows[0]), told) for rows, told in recorder.calls if told is not None]
    assert [length for length, _ in given] == [10]
    assert found.coverage == {"one": 10, "two": 10}
