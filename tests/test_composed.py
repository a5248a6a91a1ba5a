"""Canvases composed of objects: labels say what is there, attributes how it lies, and the seed decides all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.composing import ATTRIBUTES, compose

SIDE = 5


def objects() -> tuple[np.ndarray, np.ndarray]:
    """Three objects, told apart by their brightness: class k has (k + 1) * 50 in its middle pixel."""
    images = np.zeros((3, SIDE, SIDE, 1), np.uint8)
    images[:, 2, 2, 0] = (50, 100, 150)
    return images, np.arange(3)


def cells(canvas: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return (rows, columns) the class in each cell of a canvas, -1 for none."""
    parts = canvas[..., 0].reshape(rows, SIDE, columns, SIDE).max(axis=(1, 3)).astype(np.int64)
    return parts // 50 - 1


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(0, 100), st.data())
def test_labels_and_attributes_are_what_is_on_the_canvas(
    rows: int, columns: int, shift: int, seed: int, data: st.DataObject
) -> None:
    most = data.draw(st.integers(1, rows * columns))
    found, told, names = compose(
        *objects(), ("a", "b", "c"), 6, seed, grid=(rows, columns), most=most, shift=shift, attributes=True
    )
    assert found.shape == (6, rows * SIDE, columns * SIDE, 1)
    assert found.dtype == np.uint8
    assert names == ["a", "b", "c", *ATTRIBUTES]
    for canvas, label in zip(found, told, strict=True):
        held = cells(canvas, rows, columns)
        there = held[held >= 0]
        assert 1 <= len(there) <= most
        assert label[:3].tolist() == [int(k in there) for k in range(3)]
        row, column = np.nonzero(held >= 0)
        assert label[3] == (2 * len(there) > rows * columns)
        assert label[4] == (len(set(there.tolist())) < len(there))
        assert label[5] == ((column < (columns - 1) / 2).sum() > (column > (columns - 1) / 2).sum())
        assert label[6] == ((row < (rows - 1) / 2).sum() > (row > (rows - 1) / 2).sum())


def test_the_seed_decides_all() -> None:
    first, again, other = (compose(*objects(), ("a", "b", "c"), 20, seed) for seed in (3, 3, 4))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])
    assert first[2] == ["a", "b", "c"]


def test_every_number_of_objects_and_every_class_is_as_likely() -> None:
    found, told, _ = compose(*objects(), ("a", "b", "c"), 4000, 0)
    counts = np.bincount([(cells(canvas, 2, 2) >= 0).sum() for canvas in found], minlength=5)
    assert counts[0] == 0
    assert np.allclose(counts[1:] / 4000, 0.25, atol=0.03)
    # A class is missing from n objects with probability (2 / 3) ** n.
    expected = 1 - np.mean([(2 / 3) ** n for n in (1, 2, 3, 4)])
    assert np.allclose(told.mean(axis=0), expected, atol=0.03)


@pytest.mark.parametrize("most", [0, 5])
def test_no_canvas_holds_more_than_its_cells(most: int) -> None:
    with pytest.raises(ValueError, match=f"most is {most}; allowed: 1 to 4"):
        compose(*objects(), ("a", "b", "c"), 2, 0, most=most)
