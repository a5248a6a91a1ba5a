"""Claim: no bytes crash a decoder of answers, or make it take more memory than 4 times the bytes and 8 MiB.

Encoded rows are changed at random (bytes set, copied, cut, added; special numbers put in), checked and decoded: what
comes back must be a distribution, or a `ProtocolError`. The first other outcome ends the program and says how to have
it again. Ten minutes, as the claim wants, unless told otherwise.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc

import numpy as np

from consilience.common.encoding import check, decode, encode, row_bytes
from consilience.common.errors import ProtocolError
from harness import options, show

ENCODINGS = ("f32", "f16", "u8", "top-1", "top-3", "top-40", "votes")
SPECIAL = [bytes.fromhex(text) for text in ("007c", "00fc", "007e", "fffb", "ff7b", "0000", "0080", "0000c07f", "ffff")]
MOST_SPARE = 8 * 2**20


def changed(data: bytearray, random: np.random.Generator) -> bytes:
    """Return `data` with a few changes."""
    for _ in range(int(random.integers(0, 5))):
        at = int(random.integers(0, len(data) + 1))
        match random.integers(0, 5):
            case 0:
                data[at : at + 1] = random.bytes(1)
            case 1:
                special = SPECIAL[random.integers(0, len(SPECIAL))]
                data[at : at + len(special)] = special
            case 2:
                source = int(random.integers(0, len(data) + 1))
                data[at : at + 4] = data[source : source + 4]
            case 3 if random.random() < 0.1:
                del data[at : at + int(random.integers(1, 9))]
            case 4 if random.random() < 0.1:
                data[at:at] = random.bytes(int(random.integers(1, 9)))
    return bytes(data)


def trial(encoding: str, random: np.random.Generator) -> tuple[bool, int]:
    """Do one; return whether the bytes were taken, and the bytes of memory that the check took beyond 4 times them."""
    classes = int(random.choice([1, 2, 5, 41, 256, 257, 70_000], p=[0.16] * 6 + [0.04]))
    rows = int(random.integers(0, 4))
    logits = random.normal(0, random.choice([0, 1, 10, 1000]), (rows, classes))
    whole = encode((logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32), encoding)
    data = random.bytes(rows * row_bytes(classes, encoding)) if random.random() < 0.1 else whole
    data = changed(bytearray(data), random)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    refused = False
    try:
        check(data, rows, classes, encoding)
    except ProtocolError:
        refused = True
    spare = tracemalloc.get_traced_memory()[1] - before - 4 * len(data)
    if refused:
        return False, spare
    found = decode(data, rows, classes, encoding)
    sums = np.exp(found.astype(np.float64)).sum(axis=1)
    assert found.shape == (rows, classes), "another shape"
    assert np.all(np.isfinite(found)), "not finite"
    assert np.all(np.abs(sums - 1) <= 0.0101), "no distribution"
    return True, spare


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--seconds", type=float, default=600, help="how long to go on, for all decoders together")
        parser.add_argument("--seed", type=int, default=0)

    arguments = options(__doc__, add)
    random = np.random.default_rng(arguments.seed)
    counts = {encoding: [0, 0, 0] for encoding in ENCODINGS}
    tracemalloc.start()
    end = time.monotonic() + (3 if arguments.quick else arguments.seconds)
    while time.monotonic() < end:
        for encoding in ENCODINGS:
            state = random.bit_generator.state
            try:
                taken, spare = trial(encoding, random)
                assert spare <= MOST_SPARE, f"{spare:,} bytes more than 4 times the answer"
            except Exception:
                print(f"{encoding}: failed; the random generator's state was {state}")
                raise
            held = counts[encoding]
            held[0], held[1], held[2] = held[0] + 1, held[1] + taken, max(held[2], spare)
    rows = [(e, f"{n:,}", f"{taken:,}", f"{spare / 2**20:.1f} MiB") for e, (n, taken, spare) in counts.items()]
    columns = ("encoding", "trials", "taken", "memory beyond 4 times the answer")
    show(
        "Decoders of answers, fuzzed: no crash",
        columns,
        rows,
        {"counts": counts, "seed": arguments.seed},
        arguments.json,
    )


if __name__ == "__main__":
    main()
