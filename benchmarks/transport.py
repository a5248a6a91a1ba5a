"""Claim: carrying answers costs at most three bare gRPC streams of the same bytes, plus five seconds.

Real processes on loopback, TLS and authentication on: a server, and sites whose teacher gives rows that were computed
before. Measured is the time from `submit` to the last answer on disk. In the same run the same bytes go through a bare
grpcio client stream with TLS (1 MiB pieces, all sites side by side), and the same job through stock SuperNodes.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from consilience.common.data import ImageData
from consilience.common.pool import Pool
from consilience.common.settings import Ask, CallableTeacher, JobSettings, Policy, Preprocessing, SiteSettings
from consilience.common.settings_file import dump_settings, load_settings
from consilience.deploy.processes import free_ports, join, make_server, online, start, stop
from consilience.server.runs import Run, submit
from consilience.server.settings import Home
from harness import options, show

CLASSES = 10
PIECE = 2**20
ROWS = np.random.default_rng(0).dirichlet(np.ones(CLASSES), 65_536).astype(np.float32)


def teacher(images: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return rows computed before: a teacher that takes no time."""
    return ROWS[: len(images)]


def make_sites(home: Home, folder: Path, sites: int, samples: int) -> list[Path]:
    """Make the pool and admitted sites; returns their settings."""
    images = np.random.default_rng(1).integers(0, 256, (samples, 4, 4, 1), np.uint8)
    Pool.build(ImageData((4, 4, 1), None, (), samples, lambda ids: images[ids]), folder / "pool")
    paths = []
    for i in range(sites):
        settings = SiteSettings(
            name=f"site-{i}",
            teacher=CallableTeacher(
                kind="callable",
                callable="transport:teacher",
                classes=tuple(f"class-{3 * i + k}" for k in range(CLASSES)),
                preprocessing=Preprocessing(),
            ),
            policy=Policy(precision="f16"),
            pools=(folder / "pool",),
            batch_size=8192,
        )
        path = folder / f"site-{i}" / "site.yaml"
        dump_settings(settings, path)
        paths.append(join(home, path, folder / "sites"))
    return paths


def seconds_to_all_answers(home: Home, pool: Path, sites: int, samples: int, question_size: int | None) -> float:
    """Submit a job and return the seconds until the last answer was on disk."""
    job = JobSettings(
        name="transport",
        pool=pool,
        ask=Ask(encoding="f16", question_size=question_size, wait_for=sites),
    )
    time.sleep(5)  # the server is idle: the process for the next run is warm
    began = time.time()
    run, _ = submit(home.folder, job, token=f"run-{int(began * 1000)}")
    while True:
        time.sleep(0.05)
        last = last_answer(run, sites * samples)
        if last is not None:
            run.stop()
            while run.state.state in ("queued", "running"):
                time.sleep(0.1)
            return last - began
        if run.state.state == "failed":
            sys.exit(f"the run failed: {run.state.failure}")


def last_answer(run: Run, wanted: int) -> float | None:
    """Return when the last answer was stored, None before all are there."""
    path = run.folder / "events.jsonl"
    if not path.exists():
        return None
    events = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    answered = [event for event in events if event["event"] == "answered"]
    if sum(event["stop"] - event["start"] for event in answered) < wanted:
        return None
    return float(max(event["time"] for event in answered))


@contextlib.contextmanager
def agents(home: Home, paths: list[Path]) -> Iterator[None]:
    """Run our agents until the block ends."""
    children = [start(["site", "start", str(path)]) for path in paths]
    try:
        wait_online(home, len(paths))
        yield
    finally:
        stop(children)


@contextlib.contextmanager
def supernodes(home: Home, paths: list[Path], folder: Path) -> Iterator[None]:
    """Run Flower's own SuperNodes with the same ClientApp until the block ends."""
    settings = home.settings()
    binary = Path(sys.executable).with_name("flower-supernode")
    children = []
    for i, path in enumerate(paths):
        (port,) = free_ports(1)
        environment = {
            **os.environ,
            "FLWR_HOME": str(folder / f"flower-{i}"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{binary.parent}:{os.environ['PATH']}",
        }
        command = [str(binary), "--root-certificates", str(home.ca_certificate), "--superlink", settings.address]
        command += ["--auth-supernode-private-key", str(load_settings(path, SiteSettings).key), "--host", "127.0.0.1"]
        command += ["--port", str(port), "--node-config", f'site="{path}"']
        children.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
    try:
        wait_online(home, len(paths))
        yield
    finally:
        stop(children)


def wait_online(home: Home, sites: int) -> None:
    """Wait until that many sites are connected."""
    while sum(online(home).values()) < sites:
        time.sleep(0.1)


def bare_stream(home: Home, sites: int, size: int) -> float:
    """Return the seconds in which `sites` clients stream `size` bytes each to one gRPC server over TLS."""
    key, certificate = home.server_key.read_bytes(), home.server_certificate.read_bytes()
    received: list[int] = []

    def take(pieces: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        received.append(sum(len(piece) for piece in pieces))
        return b"ok"

    server = grpc.server(futures.ThreadPoolExecutor(sites))
    handler = grpc.stream_unary_rpc_method_handler(take)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Stream", {"Take": handler}),))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    server.start()
    payload = os.urandom(size)

    def send() -> None:
        credentials = grpc.ssl_channel_credentials(home.ca_certificate.read_bytes())
        with grpc.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
            channel.stream_unary("/bare.Stream/Take")(payload[at : at + PIECE] for at in range(0, size, PIECE))

    began = time.perf_counter()
    threads = [threading.Thread(target=send) for _ in range(sites)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    server.stop(None)
    assert received == [size] * sites
    return seconds


def main() -> None:
    arguments = options(__doc__)
    sites, samples, repeats = (2, 2_000, 1) if arguments.quick else (5, 50_000, 5)
    # The processes find the teacher of this file.
    os.environ["PYTHONPATH"] = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    size = samples * CLASSES * 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        home = make_server(folder / "server")
        paths = make_sites(home, folder, sites, samples)
        bare = sorted(bare_stream(home, sites, size) for _ in range(repeats))[repeats // 2]
        server = start(["server", "start", "--home", str(home.folder)])
        try:
            with agents(home, paths):
                ours = [
                    seconds_to_all_answers(home, folder / "pool", sites, samples, question_size=None)
                    for _ in range(repeats)
                ]
            stock = None
            if not arguments.quick:
                with supernodes(home, paths, folder):
                    stock = seconds_to_all_answers(home, folder / "pool", sites, samples, question_size=samples)
        finally:
            stop([server])
    median = sorted(ours)[repeats // 2]
    bar = 3 * bare + 5
    rows = [
        ("bare grpcio stream, TLS", bare, size * sites / bare / 1e6, ""),
        ("our agents", median, size * sites / median / 1e6, f"{min(ours):.2f} to {max(ours):.2f} s, bar {bar:.2f} s"),
    ]
    if stock is not None:
        rows.append(("stock SuperNodes", stock, size * sites / stock / 1e6, "one question a site, once"))
    figures = {"sites": sites, "samples": samples, "bare": bare, "ours": ours, "stock": stock, "bar": bar}
    columns = ("submit to all answers", "seconds", "MB/s", "")
    show(f"{sites} sites x {samples:,} samples x {CLASSES} classes, f16", columns, rows, figures, arguments.json)
    if not arguments.quick and median > bar:
        sys.exit(1)


if __name__ == "__main__":
    main()
