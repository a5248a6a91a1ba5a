"""The projection in two dimensions against a singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest

from consilience.server.student.picture import picture


@pytest.mark.parametrize("shape", [(30, 5), (6, 50)])
def test_it_is_the_first_two_principal_components(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    vectors = {"a": rng.normal(size=shape) * 3 + 1, "b": rng.normal(size=(4, shape[1]))}
    found = picture(vectors)
    assert found is not None
    rows = np.concatenate([*vectors.values()])
    rows = rows - rows.mean(axis=0)
    left, values, _ = np.linalg.svd(rows, full_matrices=False)
    points = np.concatenate([found["points"]["a"], found["points"]["b"]])
    np.testing.assert_allclose(np.abs(points), np.abs(left[:, :2] * values[:2]), atol=1e-4)
    assert found["shown"] == pytest.approx((values**2 / (values**2).sum())[:2])
    assert (points.max(axis=0) >= -points.min(axis=0)).all()
    assert len(found["points"]["b"]) == 4


def test_nothing_one_number_and_points_that_coincide() -> None:
    assert picture({}) is None
    assert picture({"a": np.empty((0, 3))}) is None
    same = picture({"a": np.ones((3, 2)), "b": np.empty((0, 2))})
    assert same == {"points": {"a": [[0, 0]] * 3}, "shown": [0.0, 0.0]}
    line = picture({"a": np.array([[1.0], [2.0], [6.0]])})
    assert line is not None
    assert line["points"]["a"] == [[-2, 0], [-1, 0], [3, 0]]
    assert line["shown"] == [1.0, 0.0]
