"""Jobs with sites that answer on groups of classes: their labels, what is judged and said, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict
from numpy.typing import NDArray

from consilience.common.cards import SiteCard
from consilience.common.encoding import encode, encode_coverage
from consilience.common.errors import AskingError, LabelError, RunError, SettingsError, UnifyError
from consilience.common.files import read_json
from consilience.common.labels import LabelSpace
from consilience.common.pool import Pool
from consilience.common.progress import Reporter
from consilience.common.protocol import Answer, Question
from consilience.common.settings import JobSettings, Unify
from consilience.server.answers import AnswerStore
from consilience.server.answers_about import About
from consilience.server.contract import RunContract
from consilience.server.labelling import labels_key, unify_pool
from consilience.server.report import comparable
from consilience.server.stores import stores_about
from consilience.server.unify import GroupUnifier, unify
from helpers.feature_answers import features_card, images, tap_cards, teacher, telling
from helpers.jobs import JUDGED, build_home, job_settings, run_job
from helpers.sites import Handler, Sites, refusing

SAMPLES, TEST = 48, 24
GROUPS = {"animal": ["cat", "dog", "cow"], "pet": ["cat", "dog"]}
CLASSES = {"coarse": ("animal", "bus"), "fine": ("cat", "dog", "cow"), "mixed": ("bus", "pet", "car", "cow")}
NAMES = np.array(["cat", "dog", "cow", "bus", "car", "ship"])
"""Classes of the test images, in turn; nobody knows the last."""

pytestmark = pytest.mark.usefixtures("one_thread", "unsynced")


def answers(name: str, size: int) -> NDArray[np.float32]:
    """A site's answers: each sample's own row."""
    logits = np.random.default_rng(ord(name[0])).normal(0, 2, (SAMPLES, size))
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), np.float32)


def covers(name: str) -> NDArray[np.float32]:
    return np.random.default_rng(ord(name[0])).uniform(0.1, 0.9, SAMPLES).astype(np.float32)


def site(name: str, size: int) -> Handler:
    def handler(question: Question, attempt: int) -> RecordDict:
        part = slice(question.start, question.stop)
        if question.kind == "coverage":
            return Answer(question, encode_coverage(covers(name)[part], "f16"), 0.1).to_content()
        return Answer(question, encode(answers(name, size)[part], question.encoding), 0.1).to_content()

    return handler


def sites_of(classes: dict[str, tuple[str, ...]] = CLASSES, covered: tuple[str, ...] = ()) -> Sites:
    handlers = {name: site(name, len(held)) for name, held in classes.items()}
    return Sites(handlers, classes=classes, coverage=dict.fromkeys(covered, ("f16",)))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    pool, test = images(SAMPLES)[..., 0], images(TEST, 5)[..., 0]
    truth, labels = np.arange(TEST) % len(NAMES), np.arange(SAMPLES) % len(NAMES)
    return build_home(tmp_path, pool, test, truth, NAMES.tolist(), pool_labels=labels)


def settings(home: Path, **changes: Any) -> JobSettings:
    fit = {"epochs": 1, "batch_size": 16, "precision": "f32", "learning_rate": 0.05}
    own = {"labels": {"groups": GROUPS}, "student": {"architecture": "cnn3@0.25", "fit": fit}}
    return job_settings(home, JUDGED, own, changes)


def do(home: Path, sites: Sites, run: str = "run", *, fold_in: bool = False, **changes: Any) -> Any:
    with Reporter(quiet=True) as reporter:
        return run_job(home, sites, settings(home, **changes), reporter, run, fold_in=fold_in)


def told(home: Path, pool: str = "pool", run: str = "run", **changes: Any) -> list[AnswerStore]:
    contract = RunContract.load(home / run / "contract.json")
    return stores_about(home / run, settings(home, **changes), contract.sites, Pool.open(home / pool))[0]


ENTRIES = [((0, 1, 2), (3,)), ((0,), (1,), (2,)), ((3,), (0, 1), (4,), (2,))]
"""What the answers of coarse, fine and mixed are about, in a space cat, dog, cow, bus, car."""


@pytest.mark.parametrize("encoding", ["f32", "u8", "top-2", "top-2-u8", "votes"])
def test_labels_are_those_of_the_group_unifier(home: Path, encoding: str) -> None:
    about: dict[str, Any] = {"ask": {"encoding": encoding}, "unify": {"weights": {"mixed": 2.0}}}
    report = do(home, sites_of(), **about)
    space = RunContract.load(home / "run" / "contract.json").space
    assert space.names == ("cat", "dog", "cow", "bus", "car")
    assert [space.entries(i) for i in range(3)] == ENTRIES
    rows = [store.read(0, SAMPLES) for store in told(home, **about)]
    expected = GroupUnifier(ENTRIES, 5, weights=[1.0, 1.0, 2.0])(rows).probs
    q = np.load(home / "run" / "labels" / "q.npy")
    assert np.allclose(q, expected, atol=1e-6)
    tested = [store.read(0, TEST) for store in told(home, "test-pool", **about)]
    top = GroupUnifier(ENTRIES, 5, weights=[1.0, 1.0, 2.0])(tested).probs.argmax(axis=1)
    right = np.mean([NAMES[k % 6] == space.names[c] for k, c in enumerate(top)])
    assert report["baselines"]["unified_ensemble"]["accuracy"] == pytest.approx(right)
    assert report["unify"]["converged"] == 1.0


def test_each_site_is_told_where_its_answers_are_and_the_report_names_the_groups(home: Path) -> None:
    sites = sites_of()
    report = do(home, sites)
    contracts = dict(sites.contracts)
    plain = ("cat", "dog", "cow", "bus", "car")
    assert (contracts["fine"].labels, contracts["fine"].class_set) == (plain, (0, 1, 2))
    assert (contracts["coarse"].labels, contracts["coarse"].class_set) == ((*plain, "animal"), (5, 3))
    assert (contracts["mixed"].labels, contracts["mixed"].class_set) == ((*plain, "pet"), (3, 5, 4, 2))
    assert report["labels"]["groups"] == {
        "coarse": {"animal": ["cat", "dog", "cow"]},
        "mixed": {"pet": ["cat", "dog"]},
    }
    assert report["labels"]["synonyms"] == {}
    assert report["labels"]["owners"]["cat"] == ["coarse", "fine", "mixed"]
    card, page = (home / "run" / "card.md").read_text(), (home / "run" / "report.html").read_text()
    assert "| cat |  | coarse (in a group), fine, mixed (in a group) |" in card
    assert "| cow |  | coarse (in a group), fine, mixed |" in card
    for text in (card, page):
        assert "coarse on animal (cat, dog, cow)" in text
        assert "mixed on pet (cat, dog)" in text
    assert "if it holds the class" in page
    assert "on cat, dog, cow together" in page  # of the samples shown, what was said of them


def test_a_site_is_judged_by_what_it_can_tell(home: Path) -> None:
    report = do(home, sites_of())
    by_name = {each["name"]: each for each in report["sites"]}
    rows = answers("coarse", 2)[:TEST].argmax(axis=1)
    truth = [NAMES[k % 6] for k in range(TEST)]
    own = [t in GROUPS["animal"] if top == 0 else t == "bus" for top, t in zip(rows, truth, strict=True)]
    mine = [t in ("cat", "dog", "cow", "bus") for t in truth]
    assert by_name["coarse"]["test_images"] == 16
    assert by_name["coarse"]["teacher_accuracy"] == pytest.approx(np.mean(own, where=mine))
    assert by_name["coarse"]["accuracy"] == pytest.approx(np.mean(own))
    single = {
        "coarse": [top == 1 and t == "bus" for top, t in zip(rows, truth, strict=True)],
        "fine": [CLASSES["fine"][top] == t for top, t in zip(answers("fine", 3).argmax(axis=1), truth, strict=False)],
        "mixed": [CLASSES["mixed"][k] == t for k, t in zip(answers("mixed", 4).argmax(axis=1), truth, strict=False)],
    }
    best = max(float(np.mean(each)) for each in single.values())
    assert report["baselines"]["best_site"]["accuracy"] == pytest.approx(best)


@pytest.mark.parametrize("other", [0.0, 0.5])
def test_coverage_is_of_the_whole_site(home: Path, other: float) -> None:
    about: dict[str, Any] = {"unify": {"other": other, "strengths": {"fine": 0.5}}}
    do(home, sites_of(covered=("coarse", "fine", "mixed")), **about)
    rows = [store.read(0, SAMPLES) for store in told(home, **about)]
    given = [covers(name).astype(np.float16).astype(np.float32) for name in CLASSES]
    found = GroupUnifier(ENTRIES, 5, strength=[0.1, 0.5, 0.1], other=other)(rows, coverage=given)
    assert np.allclose(np.load(home / "run" / "labels" / "q.npy"), found.probs, atol=1e-6)
    if other:
        assert found.other is not None
        assert np.allclose(np.load(home / "run" / "labels" / "other.npy"), found.other, atol=1e-6)


def test_a_sample_whose_classes_nobody_tells_alone_is_not_learnt_from(home: Path) -> None:
    """Cats and dogs are told by one site; where it is silent, a group says only that it is one of them."""
    sites = sites_of()
    whole = sites.handlers["fine"]
    sites.handlers["fine"] = lambda question, attempt: (
        refusing(question, attempt) if question.start >= 16 else whole(question, attempt)
    )
    report = do(home, sites, ask={"min_sites": 1})
    assert report["pool"]["left_out"] == SAMPLES - 16
    assert report["pool"]["unknown"] == {"cat": SAMPLES - 16, "dog": SAMPLES - 16}
    assert report["baselines"]["unified_ensemble"]["accuracy"] is None
    q = np.load(home / "run" / "labels" / "q.npy")
    assert not q[16:].any()
    assert np.allclose(q[:16].sum(axis=1), 1)


def test_without_the_fine_site_the_space_is_made_anew(home: Path) -> None:
    """Its classes stay, for others know them in groups; two of them nobody tells apart."""
    sites = sites_of()
    sites.handlers["fine"] = refusing
    report = do(home, sites, ask={"min_sites": 2}, labels={"classes": ["car", "bus", "cow", "dog", "cat"]})
    assert report["labels"]["names"] == ["car", "bus", "cow", "dog", "cat"]
    assert any("No site tells dog, cat apart" in warning for warning in report["warnings"])
    q = np.load(home / "run" / "labels" / "q.npy")
    assert np.allclose(q[:, 3], q[:, 4], atol=1e-6)
    rows = [answers("coarse", 2), answers("mixed", 4)]
    expected = GroupUnifier([((4, 3, 2), (1,)), ((1,), (4, 3), (0,), (2,))], 5)(rows).probs
    assert np.allclose(q, expected, atol=1e-6)


def test_a_run_goes_on_with_its_groups_and_with_no_others(home: Path) -> None:
    first = do(home, sites_of())
    q = home / "run" / "labels" / "q.npy"
    before, again = q.stat().st_mtime_ns, sites_of()
    assert comparable(do(home, again)) == comparable(first)
    assert not again.attempts
    assert q.stat().st_mtime_ns == before
    path = home / "run" / "contract.json"
    held = RunContract.load(path)
    held.check_same(RunContract.build(settings(home), held.sites, held.pools), path)
    larger = settings(home, labels={"groups": {**GROUPS, "animal": ["cat", "dog", "cow", "car"]}})
    with pytest.raises(RunError, match="began under another contract; changed: "):
        held.check_same(RunContract.build(larger, held.sites, held.pools), path)
    # Alike in all else: the same classes of the same sites, in other groups.
    turned = held.model_copy(update={"grouped": (((0, 1), (2,)), *held.grouped[1:])})
    with pytest.raises(RunError, match="changed: grouped"):
        held.check_same(turned, path)


def test_a_coarse_site_is_folded_in(home: Path) -> None:
    two = {name: CLASSES[name] for name in ("fine", "mixed")}
    alone = do(home, sites_of(two))
    assert alone["labels"]["groups"] == {"mixed": {"pet": ["cat", "dog"]}}
    report = do(home, sites_of(), fold_in=True)
    assert report["labels"]["groups"].keys() == {"coarse", "mixed"}
    expected = GroupUnifier(ENTRIES, 5)([answers(name, len(held)) for name, held in CLASSES.items()]).probs
    order = [report["labels"]["names"].index(name) for name in ("cat", "dog", "cow", "bus", "car")]
    assert np.allclose(np.load(home / "run" / "labels" / "q.npy")[:, order], expected, atol=1e-6)


def test_groups_that_nobody_answers_on_change_nothing_but_a_warning(home: Path) -> None:
    classes = {"east": ("cat", "dog", "bus"), "west": ("bus", "car")}
    without = do(home, sites_of(classes), "without", labels={"groups": {}})
    report = do(home, sites_of(classes), "with")
    assert (home / "with" / "labels" / "q.npy").read_bytes() == (home / "without" / "labels" / "q.npy").read_bytes()
    assert report["labels"] == without["labels"]
    assert report["baselines"] == without["baselines"]


def test_the_contract_warns_of_what_groups_leave_open(home: Path) -> None:
    do(home, sites_of({"coarse": ("animal", "bus"), "other": ("bus", "car")}))
    warnings = read_json(home / "run" / "contract.json")["warnings"]
    assert any("No site tells cat, dog, cow apart" in warning for warning in warnings)
    assert any("No site answers on pet" in warning for warning in warnings)


@pytest.mark.parametrize("learning", ["layer-wise", "common-feature"])
def test_students_that_learn_from_features_too(home: Path, learning: str) -> None:
    networks = {name: teacher("cnn3@0.2", 1) for name in ("fine", "other")}
    cards = {name: tap_cards(network, name) for name, network in networks.items()}
    handlers = {name: telling(networks[name], images(SAMPLES), cards[name]) for name in networks}
    handlers["coarse"] = site("coarse", 2)
    classes = {"fine": ("cat", "dog", "cow"), "other": ("bus", "car", "pet"), "coarse": ("animal", "bus")}
    sites = Sites(handlers, classes=classes, features={name: features_card(held) for name, held in cards.items()})
    student = {"learning": learning, "layer_wise": {"epochs": 1}}
    report = do(home, sites, student=student, judge={"test": {"kind": "npz", "path": "test.npz"}})
    assert report["amalgamation"] is not None
    assert report["labels"]["groups"].keys() == {"coarse", "other"}
    assert np.isfinite(report["learning"]["student"][-1]["loss"])


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "a group and a class of it": (("animal", "cat"), "'animal' and 'cat'"),
    "groups that overlap": (("animal", "bus", "pet"), "'animal' and 'pet'"),
    "one group alone": (("animal",), "'animal' alone"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_site_that_does_not_fit_stops_the_job_or_is_left_out(home: Path, case: str) -> None:
    classes, words = WRONG[case]
    sites = sites_of({**CLASSES, "wrong": classes})
    with pytest.raises(LabelError, match=words) as caught:
        do(home, sites)
    assert caught.value.hint
    assert "Site wrong" in caught.value.message
    assert not sites.attempts
    report = do(home, sites_of({**CLASSES, "wrong": classes}), "enough", ask={"min_sites": 3})
    assert words in report["left_out"]["wrong"]


def test_a_member_that_the_label_space_lacks_is_a_settings_error(home: Path) -> None:
    with pytest.raises(SettingsError, match=r"'animal' holds 'cow', which labels\.classes lacks"):
        do(home, sites_of(), labels={"classes": ["cat", "dog", "bus", "car"]})


def test_multi_label_sites_have_no_groups(home: Path) -> None:
    sites = Sites({"one": refusing}, classes={"one": ("cat", "dog")}, labels={"one": "multi"})
    with pytest.raises(SettingsError, match=r"'labels.groups' is \{.*with multi-label sites") as caught:
        do(home, sites)
    assert caught.value.hint
    assert not sites.attempts


def test_names_of_groups_are_shown_as_they_are(home: Path) -> None:
    name = "<script>alert(1)</script> | **pets**"
    classes = {"coarse": (name, "bus"), "fine": ("cat", "dog", "bus")}
    report = do(home, sites_of(classes), labels={"groups": {name: ["cat", "dog"]}})
    assert report["labels"]["groups"] == {"coarse": {name: ["cat", "dog"]}}
    assert "<script>" not in (home / "run" / "report.html").read_text()
    assert "<script>" not in (home / "run" / "card.md").read_text()
    assert "**pets**" not in (home / "run" / "card.md").read_text()


def test_no_site_but_refused_ones_is_an_error_without_a_trace(home: Path) -> None:
    with pytest.raises(AskingError):
        do(home, sites_of({"coarse": ("animal",)}), ask={"min_sites": 1, "wait": 0})


DIGEST, POLICY, MANY = "a" * 64, "c" * 16, 400


def stores(folder: Path, rows: dict[str, np.ndarray], kind: str = "log-probs") -> list[AnswerStore]:
    made = []
    for name, held in rows.items():
        encoding: Any = "f32" if kind == "log-probs" else "f16"
        about: dict[str, Any] = {
            "pool": DIGEST,
            "teacher": DIGEST,
            "policy": POLICY,
            "encoding": encoding,
            "kind": kind,
        }
        width = held.shape[1] if held.ndim == 2 else 1
        store = AnswerStore(folder / kind / name, About(site=name, size=MANY, classes=width, **about))
        data = encode(held, "f32") if kind == "log-probs" else encode_coverage(held, "f16")
        store.append(Answer(Question(job="job", start=0, stop=MANY, **about), data, 0.0))
        made.append(store)
    return made


def world(classes: dict[str, tuple[str, ...]]) -> tuple[LabelSpace, dict[str, np.ndarray], np.ndarray]:
    """A label space, what perfect sites answer, and the truth (n, L)."""
    space = LabelSpace.build(classes, groups=GROUPS)
    truth = np.random.default_rng(3).dirichlet(np.full(len(space), 0.3), MANY)
    rows = {}
    for i, name in enumerate(space.sites):
        mass = np.stack([truth[:, list(entry)].sum(axis=1) for entry in space.entries(i)], axis=1) + 1e-9
        rows[name] = np.log(mass / mass.sum(axis=1, keepdims=True)).astype(np.float32)
    return space, rows, truth


def cards_of(classes: dict[str, tuple[str, ...]]) -> list[SiteCard]:
    about: dict[str, Any] = {"encodings": ("f32",), "teacher": DIGEST, "description": "", "policy": POLICY}
    return [SiteCard(name=name, classes=held, **about) for name, held in classes.items()]


def test_labels_are_kept_for_their_groups_alone(tmp_path: Path) -> None:
    """The same names, sites and files, and other groups: the labels are made anew."""
    _, rows, _ = world(CLASSES)
    held, cards = stores(tmp_path, rows), cards_of(CLASSES)
    spaces = []
    for groups in (GROUPS, {**GROUPS, "pet": ["cat", "cow"]}):
        classes = {**CLASSES, "mixed": ("bus", "pet", "car", "dog" if groups is not GROUPS else "cow")}
        spaces.append(LabelSpace.build(classes, order=["cat", "dog", "cow", "bus", "car"], groups=groups))
    assert spaces[0].names == spaces[1].names
    assert [sorted(c) for c in spaces[0].class_sets] == [sorted(c) for c in spaces[1].class_sets]
    one, two = (labels_key(space, held, Unify()) for space in spaces)
    assert one != two
    with Reporter(quiet=True) as reporter:
        for space in (*spaces, spaces[0]):
            q, about = unify_pool(tmp_path / "labels", space, held, cards, Unify(), reporter)
            answers_ = [rows[name] for name in space.sites]
            assert about.key == (one if space is spaces[0] else two)
            assert np.allclose(q, GroupUnifier([space.entries(i) for i in range(3)], 5)(answers_).probs, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"method": "sd"}, {"temperature": 2.0}, {"prior_correction": True}])
def test_labels_of_groups_are_made_in_one_way_alone(tmp_path: Path, wrong: dict[str, Any]) -> None:
    space, rows, _ = world(CLASSES)
    held, chosen = stores(tmp_path, rows), Unify(**wrong)
    with Reporter(quiet=True) as reporter, pytest.raises(UnifyError, match="on groups are unified by method 'ce'"):
        unify_pool(tmp_path / "q", space, held, cards_of(CLASSES), chosen, reporter)


def test_coverage_that_is_inverted_is_noticed_among_sites_with_groups(tmp_path: Path) -> None:
    space, rows, truth = world(CLASSES)
    told_ = {n: truth[:, list(space.class_sets[i])].sum(axis=1) for i, n in enumerate(space.sites)}
    told_["fine"] = 1 - told_["fine"]
    given = stores(tmp_path, {n: c.astype(np.float32) for n, c in told_.items()}, "coverage")
    held = stores(tmp_path, rows)
    with Reporter(quiet=True) as reporter:
        _, about = unify_pool(tmp_path / "q", space, held, cards_of(CLASSES), Unify(), reporter, coverage=given)
    assert {name for name, verdict in about.checks.items() if verdict.reason} == {"fine"}
    assert about.coverage == {"coarse": MANY, "fine": 0, "mixed": MANY}


def test_perfect_coarse_and_fine_sites_give_the_truth_where_fine_ones_alone_do_not(tmp_path: Path) -> None:
    classes = {"coarse": ("animal", "bus", "car"), "fine": ("cat", "dog", "cow"), "other": ("bus", "car")}
    space, rows, truth = world(classes)
    with Reporter(quiet=True) as reporter:
        q, _ = unify_pool(tmp_path / "q", space, stores(tmp_path, rows), cards_of(classes), Unify(), reporter)
    assert np.allclose(q, truth, atol=1e-4)
    fine = unify([rows["fine"], rows["other"]], [space.class_sets[i] for i in (1, 2)], len(space)).probs
    assert np.abs(fine - truth).max() > 0.5
