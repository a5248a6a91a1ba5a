"""What a decoder takes of memory for megabytes: 4 times what arrived, and 6 MiB; for JSON of very many values, 32 MiB.

For every decoder that faces the network. What is measured is the process's own resident memory at its highest, in a
process forked for each input: what pydantic, OpenSSL and PyCryptodome take is in it, and so are the copies that a
target itself makes, and pages of code that are used for the first time.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MEASURE = """
import os, re, sys
from consilience.common.bounded import MOST_SPARE, MOST_TIMES
from consilience.common.sealing import info_of, seal
from helpers.fuzz_targets import JOB_SECRET, SEALED_QUESTION, TARGETS

SIZE, SPARE = 4 * 2**20, 6 * 2**20
VALUES = (b"[]", b"{}", b"0")


def at(name, seed):
    if not seed:
        return
    if name == "sealed-answer":  # a first byte that is odd lets the target itself seal what follows
        yield "sealed", SPARE, bytes(1) + seal(JOB_SECRET.public, info_of(SEALED_QUESTION, "site-0"), bytes(SIZE))
        seed = bytes(1) + seed[1:]
    yield "again", SPARE, (seed[:1] + seed[1:] * (SIZE // max(1, len(seed) - 1) + 1))[:SIZE]
    yield "spaces", SPARE, seed + b" " * SIZE
    yield "zeros", SPARE, seed + bytes(SIZE)
    if b"{" not in seed:
        return
    for place in {seed.find(b"["), seed.rfind(b"[")} - {-1}:
        head, tail = seed[: place + 1], seed[place + 1 :]
        for value in VALUES:
            yield "values " + value.decode(), MOST_SPARE, head + (value + b",") * (SIZE // (len(value) + 1)) + tail
        yield "as many as may be", MOST_SPARE, head + b"{}," * (MOST_SPARE // 800) + tail
    head, _, tail = seed.partition(b"{")
    yield "fields", MOST_SPARE, head + b"{" + b"".join(b'"%x" :0,' % k for k in range(SIZE // 9)) + tail
    yield "few fields", MOST_SPARE, head + b"{" + b"".join(b'"%x" :0,' % k for k in range(9000)) + tail
    yield "text", SPARE, head + b'{"x":"' + b"a" * SIZE + b'",' + tail
    first = re.search(rb'":"', seed)
    if first:
        yield "long", SPARE, seed[: first.end()] + b"a" * SIZE + seed[first.end() :]


def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def taken(run, data):
    here, there = os.pipe()
    child = os.fork()
    if not child:
        before = status("VmRSS")
        try:
            run(data)
        except BaseException as error:
            os.write(there, repr(error)[:400].encode())
            os._exit(1)
        os.write(there, str(status("VmHWM") - before).encode())
        os._exit(0)
    os.close(there)
    with os.fdopen(here, "rb") as pipe:
        said = pipe.read().decode()
    return int(said) if os.waitpid(child, 0)[1] == 0 else sys.exit(f"{name}, {kind}: {said}")


tried, wrong, highest = 0, [], 0
for name in TARGETS:
    for seed in TARGETS[name].seeds:
        for kind, spare, data in at(name, seed):
            found, tried = taken(TARGETS[name].run, data), tried + 1
            highest = max(highest, found)
            if found > MOST_TIMES * len(data) + spare:
                wrong.append(f"{name}, {kind}: {found:,} bytes for {len(data):,}")
print(tried, highest)
sys.exit("\\n".join(wrong) or 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_decoder_takes_more_memory_than_is_said() -> None:
    # Else malloc keeps what it was given back, and a second input would seem to take nothing
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tried, highest = map(int, done.stdout.split())
    assert tried > 250
    assert highest > 4 * 2**20, "nothing was measured"
