"""Claim: no bytes crash a decoder of answers, or make it take more memory than 4 times the bytes and 8 MiB.

Encoded rows are changed at random (bytes set, copied, cut, added; special numbers put in), checked and decoded: what
comes back must be a distribution, or a `ProtocolError`. So are the records of secure sums, as their JSON text, of which
parts are also repeated thousands of times: what comes back must be a record that says the same when it is written and
read again, or a `ProtocolError`, for at most `RECORD_FACTOR` times the text and 8 MiB. The first other outcome ends the
program and says how to have it again. Ten minutes, as the claim wants, unless told otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, RecordDict

from consilience.common.encoding import check, decode, encode, row_bytes
from consilience.common.errors import ProtocolError
from consilience.common.protocol import Record, SumNoiseCard
from consilience.common.sums.messages import (
    Advert,
    Delivered,
    Delivery,
    Member,
    Opened,
    OpenedShare,
    Roster,
    RowsQuestion,
    Sealed,
    SealedShares,
    Terms,
    Unmask,
)
from consilience.common.sums.shares import SEALED_BYTES
from harness import options, show

ENCODINGS = ("f32", "f16", "u8", "top-1", "top-3", "top-40", "votes")
SPECIAL = [bytes.fromhex(text) for text in ("007c", "00fc", "007e", "fffb", "ff7b", "0000", "0080", "0000c07f", "ffff")]
MOST_SPARE = 8 * 2**20
RECORD_FACTOR = 30
"""Times a record's text that may be taken while it is read: lists of small things, as JSON, are long for Python."""
SITES = ("ant", "bee", "cow")
TOKENS = ("{}", "[]", "null", "0", "1e400", '"x"', "-1", "99999999999999999999", '{"site":1}', '"\\ud800"', "[[]]")
FIELDS = ("classes", "labels", "synonyms", "members", "adverts", "shares", "holds", "survivors", "signatures")
Trial = Callable[[np.random.Generator], tuple[bool, int]]


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


def changed_text(text: str, random: np.random.Generator) -> str:
    """Return JSON text with a few changes; now and then a part of it is there thousands of times."""
    for _ in range(int(random.integers(0, 4))):
        at = int(random.integers(0, len(text)))
        match random.integers(0, 4):
            case 0:
                text = text[:at] + str(random.choice(list('0a"{}[],:-.\\\u00e9'))) + text[at + 1 :]
            case 1:
                text = text[:at] + str(random.choice(TOKENS)) + text[at:]
            case 2 if random.random() < 0.3:
                places = [place for place, letter in enumerate(text) if letter in ",[{"]
                first = int(random.choice(places)) if places else 0
                part = text[first : first + int(random.integers(2, 200))]
                text = text[:first] + part * (200_000 // len(part)) + text[first:]
            case 3 if random.random() < 0.3:
                found = [name for name in FIELDS if f'"{name}":[' in text]
                if found:
                    start = text.index(f'"{random.choice(found)}":[')
                    start = text.index("[", start) + 1
                    item = f"{random.choice(TOKENS)},"
                    text = text[:start] + item * (100_000 // len(item)) + text[start:]
    return text


def sum_records() -> dict[type[Record], str]:
    """One of each record of a secure sum, as its text."""
    digest, mark = "a" * 64, "00"
    members = tuple(
        Member(
            site=site,
            classes=(0, 2, 1),
            teacher=digest,
            policy="c" * 16,
            identity=digest,
            noise=SumNoiseCard(sigma=2.0, honest=2),
        )
        for site in SITES
    )
    terms = Terms(
        job="job",
        contract=digest,
        pool=digest,
        start=0,
        stop=5,
        labels=("cat", "dog", "hen"),
        synonyms=(("cat", "feline"),),
        threshold=2,
        members=members,
    )
    identity = ec.generate_private_key(ec.SECP384R1())
    adverts = tuple(
        Advert.make(identity, terms, site, "b" * 63 + place, "d" * 63 + place, digest)
        for site, place in zip(SITES, "123", strict=True)
    )
    sealed = tuple(Sealed(sender=site, holder="bee", data="ab" * SEALED_BYTES) for site in ("ant", "cow"))
    shares = tuple(OpenedShare(of=site, kind="self", share="ab" * 16) for site in SITES)
    records: list[Record] = [
        terms,
        *adverts[:1],
        Roster(terms=terms.digest, adverts=adverts),
        SealedShares(roster=digest, site="ant", shares=sealed),
        Delivery(terms=digest, roster=digest, site="bee", shares=sealed),
        Delivered(terms=digest, roster=digest, site="bee", holds=SITES, signature=mark),
        RowsQuestion(terms=digest, start=0, stop=5),
        Unmask(terms=digest, survivors=SITES, signatures=(mark,) * 3),
        Opened(terms=digest, site="ant", shares=shares),
    ]
    return {type(record): record.model_dump_json() for record in records}


def record_trial(kind: type[Record], whole: str, random: np.random.Generator) -> tuple[bool, int]:
    """Do one; return whether the text was taken, and the bytes of memory beyond `RECORD_FACTOR` times it."""
    text = changed_text(whole, random)
    content = RecordDict({"record": ConfigRecord({"json": text})})
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    record = None
    with contextlib.suppress(ProtocolError):
        record = kind.from_content(content)
    spare = tracemalloc.get_traced_memory()[1] - before - RECORD_FACTOR * len(text)
    if record is not None:
        assert kind.from_content(record.to_content()) == record, "another record when it is read again"
    return record is not None, spare


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--seconds", type=float, default=600, help="how long to go on, for all decoders together")
        parser.add_argument("--seed", type=int, default=0)

    arguments = options(__doc__, add)
    random = np.random.default_rng(arguments.seed)
    records = sum_records()
    trials: dict[str, tuple[Trial, int]] = {e: (partial(trial, e), 4) for e in ENCODINGS}
    trials |= {k.__name__: (partial(record_trial, k, text), RECORD_FACTOR) for k, text in records.items()}
    counts = {name: [0, 0, 0] for name in trials}
    tracemalloc.start()
    end = time.monotonic() + (3 if arguments.quick else arguments.seconds)
    while time.monotonic() < end:
        for name, (run, factor) in trials.items():
            state = random.bit_generator.state
            try:
                taken, spare = run(random)
                assert spare <= MOST_SPARE, f"{spare:,} bytes more than {factor} times the message"
            except Exception:
                print(f"{name}: failed; the random generator's state was {state}")
                raise
            held = counts[name]
            held[0], held[1], held[2] = held[0] + 1, held[1] + taken, max(held[2], spare)
    rows = [
        (e, f"{n:,}", f"{taken:,}", trials[e][1], f"{spare / 2**20:.1f} MiB") for e, (n, taken, spare) in counts.items()
    ]
    columns = ("encoding or record", "trials", "taken", "times the message", "memory beyond")
    show(
        "Decoders of answers and of secure sums, fuzzed: no crash",
        columns,
        rows,
        {"counts": counts, "seed": arguments.seed},
        arguments.json,
    )


if __name__ == "__main__":
    main()
