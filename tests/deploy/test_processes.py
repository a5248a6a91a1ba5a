"""The whole job with real processes over TLS: the same report as in one process, and nothing is left running."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from consilience.common.files import read_json
from consilience.server.report import comparable

JOB: dict[str, Any] = {
    "name": "five",
    "simulation": {
        "data": {"kind": "embedded"},
        "test": {"kind": "embedded", "split": "test"},
        "pool_share": 0.2,
        "partition": {
            "kind": "class-lists",
            "classes": [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 8], [8, 9, 0]],
        },
        "teachers": [
            {"kind": "train", "architecture": "cnn3", "fit": {"epochs": 1, "precision": "f32"}},
            {"kind": "train", "architecture": "resnet8", "fit": {"epochs": 1, "precision": "f32"}},
        ],
        "policy": {"features": {"taps": {"penultimate": {"channels": 16}}}},
    },
    "student": {"architecture": "cnn3", "learning": "common-feature", "fit": {"epochs": 1, "precision": "f32"}},
}
LAYERS: dict[str, Any] = {
    "name": "layers",
    "simulation": {
        **JOB["simulation"],
        "pool_share": 0.05,
        "partition": {"kind": "class-lists", "classes": [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8, 9]]},
        "teachers": [{"kind": "train", "architecture": "cnn3@0.25", "fit": {"epochs": 1, "precision": "f32"}}],
        "policy": {"features": {"taps": {"*": {"channels": 6}}}},
    },
    "student": {
        "architecture": "cnn3@0.25",
        "learning": "layer-wise",
        "layer_wise": {"epochs": 1},
        "fit": {"epochs": 1, "precision": "f32"},
    },
}
ORDERED: dict[str, Any] = {
    "name": "ordered",
    "simulation": {
        **JOB["simulation"],
        "pool_share": 0.02,
        "partition": {"kind": "class-lists", "classes": [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8, 9]]},
        "teachers": [{"kind": "train", "architecture": "cnn3@0.25", "fit": {"epochs": 1, "precision": "f32"}}],
        "policy": {"tail": {"allow": "questions"}},
    },
    "student": {
        "architecture": "cnn3@0.25",
        "learning": "filtered",
        "classes": ["Bag", "Coat", "Sneaker"],
        "filtered": {"epochs": 1},
        "fit": {"epochs": 1, "precision": "f32", "batch_size": 32},
    },
}
# Takes away every network but a fresh loopback, then becomes the command: no interface, no route, nothing to reach.
ALONE = """
import ctypes, fcntl, os, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x40000000) and libc.unshare(0x40000000 | 0x10000000):
    sys.exit(77)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as loopback:
    fcntl.ioctl(loopback, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))
assert open("/proc/net/route").read().count("\\n") == 1, "there is a route"
os.execv(sys.executable, [sys.executable, "-m", "consilience", *sys.argv[1:]])
"""


def simulate(job: Path, out: Path, *options: str, alone: bool = False) -> subprocess.CompletedProcess[str]:
    start = ["-c", ALONE] if alone else ["-m", "consilience"]
    command = [sys.executable, *start, "simulate", str(job), "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def ours() -> set[str]:
    """Return the command lines of processes that a simulation starts."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "consilience-" in line and ("site start" in line or "server start" in line or "superlink" in line):
            found.add(line)
    return found


def job_in(settings: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


def both_ways(settings: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Do a job with processes, which have no network but a loopback, and in one process; return the runs."""
    job = job_in(settings, folder / "job.yaml")
    before = ours()
    alone = simulate(job, folder / "processes", "--processes", alone=True)
    if alone.returncode == 77:
        pytest.skip("this account may not make a network namespace")
    assert alone.returncode == 0, alone.stderr
    assert ours() == before
    threads = simulate(job, folder / "threads")
    assert threads.returncode == 0, threads.stderr
    return {"processes": folder / "processes", "threads": folder / "threads"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return both_ways(JOB, tmp_path_factory.mktemp("runs"))


@pytest.mark.slow
def test_five_sites_without_any_route_give_the_report_of_one_process_bit_for_bit(runs: dict[str, Path]) -> None:
    reports = {name: comparable(read_json(run / "report.json")) for name, run in runs.items()}
    assert reports["processes"] == reports["threads"]
    assert len(reports["processes"]["sites"]) == 5
    for name in ("labels/q.npy", "student/model.safetensors"):
        assert (runs["processes"] / name).read_bytes() == (runs["threads"] / name).read_bytes()
    assert np.load(runs["processes"] / "labels" / "q.npy").shape == (1000, 10)
    (space,) = reports["processes"]["amalgamation"]["spaces"]
    assert space["sites"] == {site["name"]: "penultimate" for site in reports["processes"]["sites"]}


@pytest.mark.slow
def test_layers_and_their_components_over_the_network_are_those_of_one_process(tmp_path: Path) -> None:
    runs = both_ways(LAYERS, tmp_path)
    reports = {name: comparable(read_json(run / "report.json")) for name, run in runs.items()}
    assert reports["processes"] == reports["threads"]
    sites = [site["name"] for site in reports["processes"]["sites"]]
    layers = reports["processes"]["amalgamation"]["layers"]
    assert [layer["tap"] for layer in layers] == ["layer1", "layer2", "layer3", "scores"]
    assert all(sorted(layer["components"]) == sorted(sites) for layer in layers[:-1])
    sent = sorted(path.relative_to(runs["threads"]) for path in (runs["threads"] / "components").rglob("*.bin"))
    assert len(sent) == 3 * len(sites)
    for name in (*sent, "labels/q.npy", "student/model.safetensors"):
        assert (runs["processes"] / name).read_bytes() == (runs["threads"] / name).read_bytes()


@pytest.mark.slow
def test_blocks_are_asked_over_the_network_as_in_one_process_and_teach_what_lent_ones_do(tmp_path: Path) -> None:
    runs = both_ways(ORDERED, tmp_path)
    reports = {name: comparable(read_json(run / "report.json")) for name, run in runs.items()}
    assert reports["processes"] == reports["threads"]
    asked = reports["processes"]["student"]["filtered"]
    assert all(spent["rounds"] > 10 for spent in asked["asked"].values())
    for name in ("student/filtered.json", "student/model.safetensors"):
        assert (runs["processes"] / name).read_bytes() == (runs["threads"] / name).read_bytes()
    lending = {**ORDERED["simulation"], "policy": {"tail": {"allow": "blocks"}}}
    lent = simulate(job_in({**ORDERED, "simulation": lending}, tmp_path / "lent.yaml"), tmp_path / "lent")
    assert lent.returncode == 0, lent.stderr
    told = read_json(tmp_path / "lent" / "report.json")["student"]["filtered"]
    assert sorted(told["lent"]) == sorted(asked["asked"])
    for name, losses in asked["blocks"].items():
        np.testing.assert_allclose(losses, told["blocks"][name], atol=1e-4)
    for one, other in zip(asked["branches"], told["branches"], strict=True):
        assert one["agreement"] == pytest.approx(other["agreement"], abs=1e-4)


@pytest.mark.slow
def test_the_server_s_keys_are_gone_with_the_processes_and_the_simulated_ones_are_private(
    runs: dict[str, Path],
) -> None:
    run = runs["processes"]
    assert not {path.name for path in run.rglob("*")} & {"server.key", "runner.secret", "superlink.db"}
    keys = [path for path in run.rglob("*") if path.name in {"site.key", "ca.key"}]
    assert len(keys) == 6
    assert {path.relative_to(run).parts[0] for path in keys} == {"simulation"}, "they are the simulated sites' own"
    assert {path.stat().st_mode & 0o777 for path in keys} == {0o600}


def test_processes_and_an_engine_exclude_each_other(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(JOB))
    refused = simulate(job, tmp_path / "out", "--processes", "--engine", "flower")
    assert refused.returncode == 3
    assert "exclude each other" in refused.stderr
    assert not (tmp_path / "out").exists()
