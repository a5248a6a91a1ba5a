"""The largest classes alone: `top-K`, and `votes`, the one largest.

A row of `top-K` over k classes, m = min(K, k), is m ids (position in the site's own order of classes: u8, u16 or u32,
the narrowest that k classes fit), m log-probabilities (f16), and, where classes are left, the logarithm of what these
have together (f16). It begins with the largest; equal ones stand in the order of their ids. What is not sent is
decoded as shared out evenly over the classes left, which of all completions has the largest entropy; a decoded row
sums to 1.

A row of `votes` is the id of the largest class, of equal ones the first. It is decoded to 1 - OTHERS for that class and
the rest evenly for all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from consilience.common.encoding.floats import LOWEST_F16, RowProblem, first, log_prob_problem

OTHERS = 0.1
"""What a vote leaves to all other classes together."""


def id_type(classes: int) -> np.dtype[Any]:
    """Return the narrowest type that holds the position of one of `classes` classes."""
    return next(np.dtype(name) for name, most in (("u1", 2**8), ("<u2", 2**16), ("<u4", 2**32)) if classes <= most)


@dataclass(frozen=True)
class Sent:
    """Rows of log-probabilities of which m are told one by one and all others are the same.

    `ids` (n, m) int64 positions in the site's own order of classes, `values` (n, m) float32, `other` (n,) float32: the
    log-probability of each class that is not told, -inf where there is none.
    """

    ids: NDArray[np.int64]
    values: NDArray[np.float32]
    other: NDArray[np.float32]

    def in_full(self, classes: int) -> NDArray[np.float32]:
        """Return the rows over all classes, (n, classes)."""
        out = np.empty((len(self.ids), classes), np.float32)
        out[:] = self.other[:, None]
        np.put_along_axis(out, self.ids, self.values, axis=1)
        return out


@dataclass(frozen=True)
class LargestRows:
    """Rows of the `most` largest numbers, by ids and values, and one number for what is not sent."""

    most: int
    number: ClassVar[str] = "<f2"
    """The type of a number, as it is sent."""

    def _record(self, classes: int) -> np.dtype[Any]:
        """Return the layout of a row."""
        sent = min(self.most, classes)
        parts: list[Any] = [("ids", id_type(classes), (sent,)), ("values", self.number, (sent,))]
        return np.dtype(parts + [("rest", self.number)] * (sent < classes))

    def _as_sent(self, numbers: NDArray[np.floating[Any]]) -> NDArray[Any]:
        """Return numbers as they are sent."""
        return numbers.astype(self.number)

    def _as_read(self, numbers: NDArray[Any]) -> NDArray[np.float32]:
        """Return what sent numbers stand for, NaN where for none."""
        return numbers.astype(np.float32)

    def row_bytes(self, classes: int) -> int:
        """Return the bytes of one row."""
        return self._record(classes).itemsize

    def _begun(
        self, rows: NDArray[np.float32], least: float, most: float
    ) -> tuple[NDArray[np.void], NDArray[np.int64]]:
        """Return the (n,) records of (n, k) numbers without what is not sent, and the ids (n, m) of what is.

        Values are held between `least` and `most`.
        """
        count, classes = rows.shape
        record = self._record(classes)
        ids = largest(rows, record["ids"].shape[0])
        values = self._as_sent(np.clip(np.take_along_axis(rows, ids, axis=1), least, most))
        order = np.argsort(-values, axis=1, kind="stable")
        out = np.empty(count, record)
        out["ids"] = np.take_along_axis(ids, order, axis=1)
        out["values"] = np.take_along_axis(values, order, axis=1)
        return out, ids

    def _parts(
        self, raw: NDArray[np.uint8], classes: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32] | None]:
        """Return ids (n, m), values (n, m) and rest (n, 1), None where every class is sent."""
        rows = raw.view(self._record(classes))[:, 0]
        rest = self._as_read(rows["rest"])[:, None] if "rest" in (rows.dtype.names or ()) else None
        return rows["ids"].astype(np.int64), self._as_read(rows["values"]), rest


def names_none(ids: NDArray[Any], classes: int, what: str = "class") -> RowProblem | None:
    """Say which of (n, m) rows names a class, or label, that does not exist, the first; None when none does."""
    row = first(np.any(ids >= classes, axis=1))
    return None if row is None else (row, f"names {what} {int(ids[row].max())} of {classes}, which are counted from 0")


def not_in_order(ids: NDArray[np.int64], values: NDArray[np.float32]) -> int | None:
    """Return the first of (n, m) rows whose values do not fall, equal ones by id; None when all do."""
    falls = (values[:, :-1] > values[:, 1:]) | ((values[:, :-1] == values[:, 1:]) & (ids[:, :-1] < ids[:, 1:]))
    return first(~falls.all(axis=1))


def named_twice(ids: NDArray[np.int64]) -> int | None:
    """Return the first of (n, m) rows that names an id twice; None when none does."""
    return first((np.diff(np.sort(ids, axis=1), axis=1) == 0).any(axis=1))


class Largest(LargestRows):
    """The `most` largest classes, and what the others have together."""

    def pack(self, rows: NDArray[np.float32]) -> bytes:
        """Encode (n, k) log-probabilities."""
        out, ids = self._begun(rows, LOWEST_F16, np.inf)
        if ids.shape[1] < rows.shape[1]:
            left = np.exp(rows, dtype=np.float64)
            np.put_along_axis(left, ids, 0.0, axis=1)
            with np.errstate(divide="ignore"):
                rest = np.log(left.sum(axis=1))
            out["rest"] = np.clip(rest, LOWEST_F16, 0)
        return out.tobytes()

    def problem(self, raw: NDArray[np.uint8], classes: int) -> RowProblem | None:
        """Say which of (n, row_bytes) encoded rows is not as it must be; None when all are."""
        ids, values, rest = self._parts(raw, classes)
        if found := names_none(ids, classes):
            return found
        known = values if rest is None else np.concatenate([values, rest], axis=1)
        if found := log_prob_problem(known):
            return found
        if (row := not_in_order(ids, values)) is not None:
            return row, "is not in order: the largest first, equal ones by class"
        if (row := named_twice(ids)) is not None:
            return row, "names a class twice"
        if rest is None:
            return None
        if (row := first(rest[:, 0] > 0)) is not None:
            return row, "leaves more than everything to the classes not sent"
        smallest = values[:, -1:]
        rounding = 2.0**-10 * (np.abs(smallest) + np.abs(rest)) + 1e-6
        each = rest - np.float32(np.log(classes - ids.shape[1]))
        row = first((each > smallest + rounding)[:, 0])
        return None if row is None else (row, "leaves more to a class not sent than to one that is")

    def unpack(self, raw: NDArray[np.uint8], classes: int) -> NDArray[np.float32]:
        """Return the (n, k) log-probabilities of (n, row_bytes) encoded rows that have no problem; they sum to 1."""
        return self.sent(raw, classes).in_full(classes)

    def sent(self, raw: NDArray[np.uint8], classes: int) -> Sent:
        """Return what `unpack` does, but not more than was sent."""
        ids, values, rest = self._parts(raw, classes)
        total = np.exp(values, dtype=np.float64).sum(axis=1, keepdims=True)
        each = np.full((len(raw), 1), -np.inf)
        if rest is not None:
            total += np.exp(rest, dtype=np.float64)
            each = rest - np.log(total) - np.log(classes - ids.shape[1])
        return Sent(ids, (values - np.log(total)).astype(np.float32), each[:, 0].astype(np.float32))


class Votes:
    """The largest class alone."""

    def row_bytes(self, classes: int) -> int:
        """Return the bytes of one row."""
        return id_type(classes).itemsize

    def pack(self, rows: NDArray[np.float32]) -> bytes:
        """Encode (n, k) log-probabilities."""
        return bytes(rows.argmax(axis=1).astype(id_type(rows.shape[1])).tobytes())

    def problem(self, raw: NDArray[np.uint8], classes: int) -> RowProblem | None:
        """Say which of (n, row_bytes) encoded rows names no class; None when all do."""
        ids = raw.view(id_type(classes))[:, 0]
        return names_none(ids[:, None], classes)

    def unpack(self, raw: NDArray[np.uint8], classes: int) -> NDArray[np.float32]:
        """Return the (n, k) log-probabilities of (n, row_bytes) encoded rows that have no problem; they sum to 1."""
        ids = raw.view(id_type(classes)).astype(np.int64)
        if classes == 1:
            return np.zeros((len(raw), 1), np.float32)
        out = np.full((len(raw), classes), np.log(OTHERS / (classes - 1)), np.float32)
        np.put_along_axis(out, ids, np.float32(np.log(1 - OTHERS)), axis=1)
        return out


def largest(rows: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Return the positions (n, count) of the largest values of each row, ascending; of equal ones the first."""
    least = np.partition(rows, rows.shape[1] - count, axis=1)[:, rows.shape[1] - count, None]
    chosen, equal = rows > least, rows == least
    wanted = count - chosen.sum(axis=1, keepdims=True, dtype=np.int32)
    chosen |= equal & (equal.cumsum(axis=1, dtype=np.int32) <= wanted)
    return np.nonzero(chosen)[1].reshape(len(rows), count)
