"""A teacher from a scikit-learn classifier saved by skops.

Lives here: loading it with the types we trust, and checking decision trees. skops builds objects only of types that
it trusts by itself or that are allowed here; pickles and joblib files are refused, since loading one runs its code.

skops does not trust decision trees: they hold indices that scikit-learn follows without bounds checks, so a crafted
file could read memory that is not its own. Every tree is therefore checked here before it is ever used.
HistGradientBoosting and the k-d trees of nearest neighbours have the same trouble and are refused: save those as ONNX.
Other estimators' arrays are trusted as far as skops does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.tree._tree import Tree

from consilience.client.teacher.protocol import Scores, brief, refuse
from consilience.common.errors import MissingExtraError, TeacherError
from consilience.common.preprocessing import Images, preprocess
from consilience.common.settings import SklearnTeacher

TRUSTED = (
    "sklearn.tree._tree.Tree",  # checked below
    # Plain Python classes of scikit-learn: attributes, and arithmetic on arrays that Python checks.
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
    "sklearn.utils._bunch.Bunch",
)
"""Types allowed beyond those that skops trusts by default."""

_HINT = "Save it with skops: skops.io.dump(model, 'model.skops')"


def scores_of(settings: SklearnTeacher, data: bytes) -> Scores:
    """Return the scoring function for a file's bytes. Raises `MissingExtraError`, `TeacherError`."""
    if settings.path.suffix in (".pkl", ".pickle", ".joblib") or not data.startswith(b"PK"):
        refuse(settings.path, "no skops archive; a pickle would run code when loaded", _HINT)
    try:
        import skops.io
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{settings.path} is a scikit-learn model, which needs skops", hint="pip install 'consilience[sklearn]'"
        ) from error
    try:
        foreign = sorted(set(skops.io.get_untrusted_types(data=data)) - set(TRUSTED))
        estimator: Any = None if foreign else skops.io.loads(data, trusted=list(TRUSTED))
    except Exception as error:  # skops raises nearly anything for a file that is not its own
        raise TeacherError(f"{settings.path}: skops cannot load it: {brief(error)}", hint=_HINT) from error
    if foreign:
        refuse(
            settings.path,
            f"types that are not trusted: {', '.join(foreign)}",
            "Use another estimator, or save the model as ONNX",
        )
    _check(settings, estimator)

    def scores(images: Images) -> Any:
        return estimator.predict_proba(preprocess(images, settings.preprocessing).reshape(len(images), -1))

    return scores


def _check(settings: SklearnTeacher, estimator: Any) -> None:
    """Raise `TeacherError` unless it is a classifier with these many classes whose trees are sound."""
    known = getattr(estimator, "classes_", None)
    if known is None or not hasattr(estimator, "predict_proba"):
        raise TeacherError(
            f"{settings.path}: holds {type(estimator).__name__} without classes_ and predict_proba",
            hint="Save a fitted classifier that gives probabilities",
        )
    if len(known) != len(settings.classes):
        raise TeacherError(
            f"{settings.path}: the classifier has {len(known)} classes ({', '.join(map(str, known[:8]))}); "
            f"teacher.classes names {len(settings.classes)}",
            hint="Name the classes of estimator.classes_, in that order",
        )
    for tree, width in _trees(estimator, None, set()):
        fault = tree_fault(tree, width)
        if fault:
            refuse(settings.path, f"a damaged decision tree: {fault}", "Save the fitted model again")


def _trees(value: Any, width: int | None, seen: set[tuple[int, int | None]]) -> Iterator[tuple[Tree, int]]:
    """Yield every tree inside `value` with the number of features its estimators were fitted on, the fewest counting.

    A forest checks its input against its own number of features only, so each tree must keep within all numbers
    above it.
    """
    if isinstance(value, Tree):
        # A tree whose owner does not say how many features it takes gets no check by scikit-learn: none are allowed it.
        yield value, width or 0
        return
    if (id(value), width) in seen:
        return
    # With its width: what is reached twice must be sound for the narrower input, too.
    seen.add((id(value), width))
    inner: list[Any] = []
    if isinstance(value, BaseEstimator):
        own = getattr(value, "n_features_in_", None)
        if not isinstance(own, int | np.integer):
            own = 0 if "tree_" in vars(value) or "estimators_" in vars(value) else None
        if own is not None:
            width = int(own) if width is None else min(width, int(own))
    elif isinstance(value, dict):
        inner += value.values()
    elif isinstance(value, list | tuple | set) or (isinstance(value, np.ndarray) and value.dtype == object):
        inner += np.ravel(value).tolist() if isinstance(value, np.ndarray) else value
    inner += vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, type) else ()
    for part in inner:
        yield from _trees(part, width, seen)


def tree_fault(tree: Tree, width: int) -> str | None:
    """Return what makes a tree unsafe to follow for inputs of `width` features, or None.

    Sound: every inner node's children come later in the array than itself (so every walk ends), and its feature exists.
    """
    n = tree.capacity  # as many nodes as there is memory for; node_count is only what the file claims
    if tree.node_count != n or n < 1:
        return f"{tree.node_count} nodes claimed, {n} held"
    left, right, feature = tree.children_left, tree.children_right, tree.feature
    inner = np.flatnonzero(left != -1)
    for children in (left[inner], right[inner]):
        if (children <= inner).any() or (children >= n).any():
            return "a child that does not come after its parent"
    if (feature[inner] < 0).any() or (feature[inner] >= width).any():
        return f"a feature beyond the {width} of the input"
    return None
