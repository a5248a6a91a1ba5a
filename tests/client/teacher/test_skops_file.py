from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skops.io
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    VotingClassifier,
)
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.tree import DecisionTreeClassifier

from consilience.client.teacher import load_teacher
from consilience.client.teacher.protocol import SMALLEST_LOG_PROB
from consilience.client.teacher.skops_file import tree_fault
from consilience.common.errors import MissingExtraError, TeacherError
from consilience.common.preprocessing import preprocess
from consilience.common.settings import Preprocessing, SiteSettings

Site = Callable[..., SiteSettings]
Blobs = tuple[np.ndarray, np.ndarray]
SMALL = {"channels": 1, "size": (8, 8), "mean": (0.4,), "std": (0.3,)}

ESTIMATORS = [
    LogisticRegression(),
    RandomForestClassifier(5, random_state=0),
    GradientBoostingClassifier(n_estimators=2),
    AdaBoostClassifier(n_estimators=2),
    BaggingClassifier(DecisionTreeClassifier(), n_estimators=2, max_features=0.5, random_state=0),
    CalibratedClassifierCV(GaussianNB(), cv=2),
    MLPClassifier((4,), max_iter=3),
    VotingClassifier([("a", GaussianNB()), ("b", DecisionTreeClassifier())], voting="soft"),
    make_pipeline(PCA(3), RandomForestClassifier(3, random_state=0)),
]


def rows(images: np.ndarray) -> np.ndarray:
    return preprocess(images, Preprocessing.model_validate(SMALL)).reshape(len(images), -1)


def save(estimator: Any, blobs: Blobs, path: Path) -> Any:
    images, labels = blobs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator.fit(rows(images), labels)
    skops.io.dump(estimator, path)
    return estimator


def load(site: Site, name: str = "m.skops", **teacher: Any) -> Any:
    return load_teacher(site(kind="sklearn", path=name, **({"preprocessing": SMALL} | teacher)))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_classifiers_answer_as_they_did_before_saving(estimator: Any, site: Site, blobs: Blobs, tmp_path: Path) -> None:
    save(estimator, blobs, tmp_path / "m.skops")
    found = load(site).log_probs(blobs[0])
    with np.errstate(divide="ignore"):
        expected = np.maximum(np.log(estimator.predict_proba(rows(blobs[0]))), SMALLEST_LOG_PROB)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected) > 0.1


def test_classes_are_named_in_the_estimators_order(site: Site, blobs: Blobs, tmp_path: Path) -> None:
    """classes_ is sorted, whatever order the labels come in: the first name is that of the smallest label."""
    images, labels = blobs
    save(LogisticRegression(), (images, np.array(["z", "b", "m"])[labels]), tmp_path / "m.skops")
    teacher = load(site, classes=("middle", "right", "left"))  # b, m, z
    best = np.array(teacher.classes)[teacher.log_probs(images).argmax(axis=1)]
    assert np.mean(best == np.array(["left", "middle", "right"])[labels]) > 0.9


def test_one_class_alone(site: Site, blobs: Blobs, tmp_path: Path) -> None:
    save(DummyClassifier(), (blobs[0], np.zeros(60, int)), tmp_path / "m.skops")
    assert (load(site, classes=("only",)).log_probs(blobs[0]) == np.zeros((60, 1))).all()


def test_another_number_of_classes_is_refused(site: Site, blobs: Blobs, tmp_path: Path) -> None:
    save(GaussianNB(), blobs, tmp_path / "m.skops")
    with pytest.raises(TeacherError, match=r"has 3 classes \(0, 1, 2\); teacher.classes names 2"):
        load(site, classes=("a", "b"))


def test_other_objects_are_refused(site: Site, blobs: Blobs, tmp_path: Path) -> None:
    save(KMeans(2), blobs, tmp_path / "m.skops")
    with pytest.raises(TeacherError, match="holds KMeans without classes_ and predict_proba"):
        load(site)
    skops.io.dump(GaussianNB(), tmp_path / "m.skops")
    with pytest.raises(TeacherError, match="holds GaussianNB without classes_"):
        load(site)


@pytest.mark.parametrize(
    ("estimator", "kind"),
    [
        (HistGradientBoostingClassifier(max_iter=2), "TreePredictor"),
        (KNeighborsClassifier(algorithm="kd_tree"), "KDTree"),
    ],
)
def test_estimators_that_cannot_be_checked_are_refused_by_name(
    estimator: Any, kind: str, site: Site, blobs: Blobs, tmp_path: Path
) -> None:
    save(estimator, blobs, tmp_path / "m.skops")
    with pytest.raises(TeacherError, match=rf"types that are not trusted: .*\.{kind}") as caught:
        load(site)
    assert "ONNX" in caught.value.hint


@pytest.mark.parametrize("name", ["m.pkl", "m.joblib", "m.pickle", "m.skops"])
def test_pickles_are_refused_with_a_way_out(name: str, site: Site, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(GaussianNB()))
    with pytest.raises(TeacherError, match=r"refused, because it holds no skops archive; a pickle would run") as caught:
        load(site, name)
    assert "skops.io.dump" in caught.value.hint


def test_missing_and_damaged_files(site: Site, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"m\.skops: no such file"):
        load(site)
    (tmp_path / "m.skops").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(TeacherError, match=r"m\.skops: skops cannot load it: BadZipFile"):
        load(site)


def test_a_missing_library_names_its_extra(
    site: Site, blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(GaussianNB(), blobs, tmp_path / "m.skops")
    monkeypatch.setitem(__import__("sys").modules, "skops", None)
    monkeypatch.setitem(__import__("sys").modules, "skops.io", None)
    with pytest.raises(
        MissingExtraError, match=r"m\.skops is a scikit-learn model.*pip install 'consilience\[sklearn\]'"
    ):
        load(site)


def test_rows_of_another_width_fail_in_one_line(site: Site, blobs: Blobs, tmp_path: Path) -> None:
    save(RandomForestClassifier(2), blobs, tmp_path / "m.skops")
    teacher = load(site, preprocessing={"channels": 1})
    with pytest.raises(TeacherError, match=r"failed on 60 images .* ValueError: X has 256 features"):
        teacher.log_probs(blobs[0])


# A tree's node array as skops stores it: fields of one structured array, hence plain to falsify.
FALSIFIED: dict[str, Callable[[np.ndarray], None]] = {
    "child": lambda nodes: nodes["left_child"].__setitem__(0, 10**6),
    "cycle": lambda nodes: nodes["right_child"].__setitem__(0, 0),
    "half a leaf": lambda nodes: nodes["right_child"].__setitem__(0, -1),
    "feature": lambda nodes: nodes["feature"].__setitem__(0, 64),
    "negative feature": lambda nodes: nodes["feature"].__setitem__(0, -3),
}


def falsify(tree: Any, change: Callable[[np.ndarray], None]) -> None:
    state = tree.__getstate__()
    change(state["nodes"])
    tree.__setstate__(state)


@pytest.mark.parametrize("fault", FALSIFIED)
@pytest.mark.parametrize("which", ["RandomForestClassifier", "GradientBoostingClassifier", "Pipeline"])
def test_crafted_trees_are_refused_before_use(which: str, fault: str, site: Site, blobs: Blobs, tmp_path: Path) -> None:
    """scikit-learn would follow these indices out of bounds or for ever."""
    estimator: Any = {
        "RandomForestClassifier": RandomForestClassifier(3, random_state=0),
        "GradientBoostingClassifier": GradientBoostingClassifier(n_estimators=2),
        "Pipeline": make_pipeline(PCA(20), RandomForestClassifier(3, random_state=0)),
    }[which]
    save(estimator, blobs, tmp_path / "m.skops")
    load(site)  # sound before
    trees = np.ravel((estimator[-1] if which == "Pipeline" else estimator).estimators_)
    falsify(trees[-1].tree_, FALSIFIED[fault])
    skops.io.dump(estimator, tmp_path / "m.skops")
    with pytest.raises(TeacherError, match="refused, because it holds a damaged decision tree"):
        load(site)


def test_a_tree_is_bound_to_what_its_forest_checks(site: Site, blobs: Blobs, tmp_path: Path) -> None:
    """A forest checks the width of its input by its own number of features, not by each tree's."""
    estimator: Any = save(RandomForestClassifier(3, random_state=0), blobs, tmp_path / "m.skops")
    estimator.estimators_[2].n_features_in_ = 1000
    falsify(estimator.estimators_[2].tree_, lambda nodes: nodes["feature"].__setitem__(0, 900))
    skops.io.dump(estimator, tmp_path / "m.skops")
    with pytest.raises(TeacherError, match="a feature beyond the 64 of the input"):
        load(site)
    del estimator.n_features_in_
    skops.io.dump(estimator, tmp_path / "m.skops")
    with pytest.raises(TeacherError, match="a feature beyond the 0 of the input"):
        load(site)


def test_a_tree_reached_twice_is_bound_by_the_narrower_way(site: Site, blobs: Blobs, tmp_path: Path) -> None:
    images, labels = blobs
    wide = DecisionTreeClassifier(random_state=0).fit(rows(images)[:, :40], labels)
    narrow: Any = RandomForestClassifier(1).fit(rows(images)[:, :8], labels)
    falsify(wide.tree_, lambda nodes: nodes["feature"].__setitem__(0, 39))
    narrow.estimators_ = [wide]
    pair: Any = save(VotingClassifier([("a", GaussianNB())], voting="soft"), blobs, tmp_path / "m.skops")
    pair.estimators_ = [wide, narrow]
    skops.io.dump(pair, tmp_path / "m.skops")
    with pytest.raises(TeacherError, match="a feature beyond the 8 of the input"):
        load(site)


def test_a_tree_that_claims_more_nodes_than_it_holds(blobs: Blobs) -> None:
    tree: Any = DecisionTreeClassifier().fit(rows(blobs[0]), blobs[1]).tree_
    assert tree_fault(tree, 64) is None
    state = tree.__getstate__()
    state["node_count"] += 1000
    tree.__setstate__(state)
    assert "nodes claimed" in str(tree_fault(tree, 64))
