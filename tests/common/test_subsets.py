"""A part of a range of samples as text: one text for each part, and nothing else is taken for one."""

from __future__ import annotations

import base64
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilience.common.subsets import runs, subset_mask, subset_text, text_length

MASKS = st.lists(st.booleans(), min_size=1, max_size=200).map(lambda held: np.array(held, np.bool_))


@given(MASKS)
def test_what_is_written_is_read(mask: np.ndarray) -> None:
    text = subset_text(mask)
    assert len(text) == text_length(len(mask))
    assert np.array_equal(subset_mask(text, len(mask)), mask)


@given(MASKS, st.data())
def test_a_part_has_one_text(mask: np.ndarray, data: st.DataObject) -> None:
    """Whatever else of the right length is read is another part."""
    text = subset_text(mask)
    other = data.draw(st.text("ABCDgQ+/=", min_size=len(text), max_size=len(text)))
    try:
        read = subset_mask(other, len(mask))
    except ValueError:
        return
    assert subset_text(read) == other
    assert (other == text) == np.array_equal(read, mask)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 17, 24, 25, 1000])
def test_a_text_of_another_length_is_refused(size: int) -> None:
    for other in {size - 24, size + 24} - {size}:
        if other > 0:
            with pytest.raises(ValueError, match="characters"):
                subset_mask(subset_text(np.ones(other, np.bool_)), size)


def test_bits_beyond_the_last_sample_are_refused() -> None:
    assert subset_mask(base64.b64encode(b"\xf8").decode(), 5).all()
    with pytest.raises(ValueError, match="after its last sample"):
        subset_mask(base64.b64encode(b"\xfc").decode(), 5)


@given(MASKS)
def test_runs_are_what_the_mask_has(mask: np.ndarray) -> None:
    found = list(runs(mask))
    again = np.zeros(len(mask), np.bool_)
    for low, high in found:
        assert low < high
        assert not again[low:high].any()
        again[low:high] = True
    assert np.array_equal(again, mask)
    assert all(before[1] < after[0] for before, after in pairwise(found))
