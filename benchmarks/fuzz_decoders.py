"""Claim: no bytes crash a decoder that faces the network, make it hang, or take more than 4 times their size and 8 MiB.

Each decoder of tests/helpers/fuzz_targets.py is attacked by libFuzzer for ten minutes of a processor's time, through
atheris, which keeps inputs that reach other lines of our code and changes them further. It begins with those in
tests/attacks/corpus and those that the decoder takes. An input that a decoder neither takes nor refuses is shown, and
kept in the folder that is named. With `--keep`, the hundred shortest inputs found are put into the corpus, which the
tests try again; with `--work`, a second call leaves out the decoders that were attacked.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import options, show

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the targets are the tests' too
SECONDS_AN_INPUT = 10
MOST_BYTES, MOST_KEPT, MOST_MIB = 4_096, 100, 2_048


def attack(name: str) -> None:
    """Become libFuzzer, with what stands after the target's name on the command line as its options. Never returns."""
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed: pip install 'consilience[test]' on Linux with an x86-64 processor")
    with atheris.instrument_imports(include=["consilience"]):  # pyright: ignore[reportAttributeAccessIssue]
        from helpers.fuzz_targets import TARGETS, measured
    target = TARGETS[name]
    tracemalloc.start()

    def once(data: bytes) -> None:
        measured(target, data)

    atheris.Setup([sys.argv[0], *sys.argv[3:]], once)
    atheris.Fuzz()


class FoundError(Exception):
    """An input did to a decoder what no input may do."""


def libfuzzer(name: str, *arguments: str) -> tuple[str, float]:
    """Run libFuzzer on a target in a process of its own; return what it said and the seconds a processor was at it.

    Raises `FoundError`.
    """
    command = [sys.executable, __file__, "--attack", name, *arguments]
    with tempfile.TemporaryFile("w+", errors="replace") as told:
        process = subprocess.Popen(command, stdout=told, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        told.seek(0)
        said = told.read()
    if process.returncode != 0:
        _, found, why = said.partition("=== Uncaught Python exception")
        raise FoundError(f"{name}: failed\n{(found + why)[:4000] if found else said[-4000:]}")
    return said, used.ru_utime + used.ru_stime


def fuzz(name: str, seconds: int, folder: Path, keeping: bool) -> tuple[int, int, int]:
    """Attack one target; return inputs tried, lines and branches reached, and inputs that reach them.

    libFuzzer counts the time that passes; what counts here is a processor's, so that a busy machine attacks for longer.
    """
    from helpers.fuzz_targets import TARGETS, keep, kept

    found = folder / name
    found.mkdir()
    for number, data in enumerate((*TARGETS[name].seeds, *kept(name))):
        (found / f"first-{number}").write_bytes(data)
    tried, covered, left, turn = 0, 0, float(seconds), 0
    while left >= 1:
        turn += 1
        said, took = libfuzzer(
            name,
            f"-max_total_time={math.ceil(left)}",
            f"-timeout={SECONDS_AN_INPUT}",
            f"-max_len={MOST_BYTES}",
            f"-malloc_limit_mb={MOST_MIB}",
            f"-rss_limit_mb={4 * MOST_MIB}",  # atheris never frees what arrays are compared to: 100 bytes an input
            f"-seed={turn}",
            "-print_final_stats=1",
            f"-artifact_prefix={folder}/failed-{name}-",
            str(found),
        )
        executed, reached = re.search(r"number_of_executed_units: *(\d+)", said), re.findall(r"cov: (\d+)", said)
        if executed is None or not reached:
            raise FoundError(f"{name}: libFuzzer did not say what it did\n{said[-2000:]}")
        tried, covered, left = tried + int(executed[1]), int(reached[-1]), left - took
    inputs = sorted({path.read_bytes() for path in found.iterdir()}, key=lambda data: (len(data), data))
    if keeping:
        keep(name, inputs[:MOST_KEPT])
    return tried, covered, len(inputs)


def main() -> None:
    if sys.argv[1:2] == ["--attack"]:
        attack(sys.argv[2])
    from consilience.common.files import read_json, write_json  # not above: atheris must import what it attacks
    from helpers.fuzz_targets import TARGETS

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--seconds", type=int, default=600, help="how long to attack each decoder")
        parser.add_argument("--only", nargs="*", choices=sorted(TARGETS), metavar="DECODER")
        parser.add_argument("--jobs", type=int, default=2, help="decoders at once")
        parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep figures here, and go on from them")
        parser.add_argument("--keep", action="store_true", help="put the inputs found into the corpus")

    arguments = options(__doc__, add)
    names = arguments.only or (["rows-squares", "records-to-sites"] if arguments.quick else list(TARGETS))
    seconds = 2 if arguments.quick else arguments.seconds
    folder = Path(tempfile.mkdtemp(prefix="consilience-fuzz-"))
    print(f"An input that fails is kept in {folder}", file=sys.stderr)

    def once(name: str) -> tuple[int, int, int]:
        kept = None if arguments.work is None else arguments.work / f"{name}.json"
        if kept is not None and kept.exists() and read_json(kept)["seconds"] >= seconds:
            return tuple(read_json(kept)["found"])
        found = fuzz(name, seconds, folder, arguments.keep)
        if kept is not None:
            write_json(kept, {"seconds": seconds, "found": found})
        return found

    with ThreadPoolExecutor(arguments.jobs) as pool:
        attacks = {name: pool.submit(once, name) for name in names}
    failed = [str(attack.exception()) for attack in attacks.values() if attack.exception() is not None]
    found = {name: attack.result() for name, attack in attacks.items() if attack.exception() is None}
    show(
        f"Decoders, attacked for {seconds} s each: no crash, no hang, no memory beyond the bound",
        ("decoder", "inputs tried", "lines and branches reached", "inputs that reach them"),
        [(name, f"{tried:,}", f"{reached:,}", f"{few:,}") for name, (tried, reached, few) in found.items()],
        {"decoders": found, "seconds": seconds},
        arguments.json,
    )
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
