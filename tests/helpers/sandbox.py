"""Run a command under what a systemd unit forbids, without systemd: `python sandbox.py UNIT COMMAND...`, as root.

Lives here: the unit's system call filter, address families, no capabilities, a read-only view of the machine but for
/tmp. Does not live here: the user (root without capabilities is one like others, and owns the files that tests
make), and what only systemd has (devices, control groups).
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ALLOW, REFUSE, EQUAL = 0x7FFF0000, 0x00050001, 4  # SCMP_ACT_ALLOW, SCMP_ACT_ERRNO(EPERM), SCMP_CMP_EQ
CLONE_NEWNS, MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 1, 32, 4096, 16384, 1 << 18
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}


class Comparison(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = [
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    ]


def options(unit: Path) -> dict[str, list[str]]:
    """Return the options of a unit, each with all its values in order."""
    held: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if match := re.match(r"([A-Za-z]+)=(.*)", line):
            held.setdefault(match[1], []).append(match[2])
    return held


@cache
def members(group: str) -> frozenset[str]:
    """Return the system calls of a group of systemd, such as @system-service."""
    said = subprocess.run(["systemd-analyze", "syscall-filter", group], capture_output=True, text=True, check=True)
    names = [line.strip() for line in said.stdout.splitlines()[1:] if line.strip() and not line.strip().startswith("#")]
    return frozenset().union(*(members(name) if name.startswith("@") else {name} for name in names))


def allowed(filters: list[str]) -> set[str]:
    """Return the system calls that a unit's SystemCallFilter= lines leave."""
    left: set[str] = set(members("@default"))
    for line in filters:
        named = set().union(*(members(word) if word[0] == "@" else {word} for word in line.lstrip("~").split()))
        left = left - named if line.startswith("~") else left | named
    return left | members("@default")


def read_only(writable: str) -> None:
    """Make every file system read-only for this process, but for what lies in `writable`."""
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(source: str | None, target: str, flags: int) -> bool:
        return libc.mount(source and source.encode(), target.encode(), None, flags, None) == 0

    assert libc.unshare(CLONE_NEWNS) == 0, "unshare"
    assert mount(None, "/", MS_REC | MS_PRIVATE), "private"
    assert mount(writable, writable, MS_BIND), writable
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place = line.split()[4]
        if place != writable and not place.startswith(("/proc", "/sys", "/dev")):
            assert mount(None, place, MS_REMOUNT | MS_BIND | MS_RDONLY), place


def restrict(unit: dict[str, list[str]]) -> None:
    """Take from this process what the unit takes, for ever."""
    calls = sorted(allowed(unit["SystemCallFilter"]))
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    if unit.get("MemoryDenyWriteExecute") == ["yes"]:
        assert libc.prctl(65, 1, 0, 0, 0) == 0  # PR_SET_MDWE
    seccomp = ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(REFUSE))
    for name in calls:
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number < 0:
            continue  # of another machine
        if name != "socket":
            seccomp.seccomp_rule_add_array(context, ctypes.c_uint32(ALLOW), number, 0, None)
            continue
        for family in unit["RestrictAddressFamilies"][0].split():
            only = Comparison(0, EQUAL, FAMILIES[family], 0)
            seccomp.seccomp_rule_add_array(context, ctypes.c_uint32(ALLOW), number, 1, ctypes.byref(only))
    assert seccomp.seccomp_load(context) == 0, "seccomp"


def main() -> None:
    """Restrict this process and become the command."""
    unit = options(Path(sys.argv[1]))
    keep = [line.partition("=") for line in unit["Environment"]]
    read_only("/tmp")
    restrict(unit)
    os.umask(int(unit["UMask"][0], 8))
    os.environ.update({name: value for name, _, value in keep})
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
