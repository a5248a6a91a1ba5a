"""Which other files an ONNX file refers to, read from its protocol buffers.

Lives here: as much of the wire format as that takes, so that the onnx package is not needed. Does not live here:
anything about operators; onnxruntime judges those.
"""

from __future__ import annotations

from collections.abc import Iterator

_TENSOR = "tensor"
_ENTRY = "entry"
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: _TENSOR, 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: _TENSOR, 6: "graph", 10: _TENSOR, 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: _TENSOR, 2: _TENSOR},
    _TENSOR: {13: _ENTRY},
}
"""Message -> number of each field that leads to a tensor -> message it holds (onnx.proto3)."""

_DEPTH = 100
"""Deeper nesting than any model's; protocol buffers themselves stop there."""


def external_files(data: bytes) -> list[str]:
    """Return the locations of all external tensors, sorted, once each. Raises `ValueError` for malformed bytes."""
    return sorted(set(_walk(memoryview(data), "model", 0)))


def _walk(data: memoryview, message: str, depth: int) -> Iterator[str]:
    if depth > _DEPTH:
        raise ValueError("messages nested too deep")
    if message == _ENTRY:
        parts = {number: bytes(value) for number, value in _fields(data)}
        if parts.get(1) == b"location":
            yield parts.get(2, b"").decode("utf-8", "surrogateescape")
        return
    for number, value in _fields(data):
        inner = _FIELDS[message].get(number)
        if inner is not None:
            yield from _walk(value, inner, depth + 1)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the number and bytes of each length-delimited field; skip the others."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            _, at = _varint(data, at)
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError("not protocol buffers")
        if length > len(data) - at:
            raise ValueError("it ends too early")
        if kind == 2:
            yield key >> 3, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the number at `at` and where the next thing begins."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends too early")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("not protocol buffers")
