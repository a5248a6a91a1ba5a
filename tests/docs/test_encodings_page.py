"""docs/encodings.md says what the code does: sizes, and bytes that are written out by hand."""

from __future__ import annotations

import re
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import pytest

from consilience.common.encoding import check, check_features, encode, encode_features, row_bytes
from consilience.common.settings import FeatureEncoding

PAGE = (Path(__file__).parents[2] / "docs" / "encodings.md").read_text()


def table(head: str) -> list[list[str]]:
    """Return the cells of the table whose first line is `head`, without `head`."""
    lines = PAGE[PAGE.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


SIZES = table("| encoding | 10 classes | 100 | 1,000 | 100,000 |")
ROWS = table("| encoding | probabilities | bytes |")
FEATURES = table("| encoding | features | bytes |")
ODDS = table("| encoding | log-odds | bytes |")


def test_the_table_of_sizes_is_right() -> None:
    shown = ["f32", "f16", "u8", "top-100", "top-10", "top-3", "top-3-u8", "top-1-u8", "votes"]
    assert [row[0] for row in SIZES] == shown
    for encoding, *sizes in SIZES:
        for classes, size in zip((10, 100, 1_000, 100_000), sizes, strict=True):
            assert row_bytes(classes, encoding) == int(size.replace(",", "")), (encoding, classes)


@pytest.mark.parametrize(("encoding", "written", "expected"), ROWS, ids=[f"{row[0]}-{row[2]}" for row in ROWS])
def test_the_bytes_on_the_page_are_those_that_are_sent(encoding: str, written: str, expected: str) -> None:
    probs = list(
        chain.from_iterable(
            repeat(float(value), int(times or 1)) for value, times in re.findall(r"([\d.]+)(?:\*(\d+))?", written)
        )
    )
    with np.errstate(divide="ignore"):
        row = np.log(np.array([probs], np.float32))
    data = bytes.fromhex(expected)
    assert encode(row, encoding) == data
    check(data, 1, len(probs), encoding)


@pytest.mark.parametrize(("encoding", "written", "expected"), FEATURES, ids=[f"{row[0]}-{row[2]}" for row in FEATURES])
def test_the_bytes_of_features_on_the_page_are_those_that_are_sent(
    encoding: FeatureEncoding, written: str, expected: str
) -> None:
    row = np.array([[float(value) for value in written.split()]], np.float32)
    data = bytes.fromhex(expected)
    assert encode_features(row, encoding) == data
    check_features(data, 1, row.shape[1], encoding)


@pytest.mark.parametrize(("encoding", "written", "expected"), ODDS, ids=[f"{row[0]}-{row[2]}" for row in ODDS])
def test_the_bytes_of_log_odds_on_the_page_are_those_that_are_sent(encoding: str, written: str, expected: str) -> None:
    row = np.array([[float(value) for value in written.split()]], np.float32)
    data = bytes.fromhex(expected)
    assert encode(row, encoding, odds=True) == data
    check(data, 1, row.shape[1], encoding, odds=True)


def test_every_encoding_has_bytes_on_the_page() -> None:
    assert {row[0] for row in ROWS} >= {"f32", "f16", "u8", "top-2", "votes"}
