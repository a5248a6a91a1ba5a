"""What every test runs under: no telemetry, no network of Flower's own, no state outside a temporary folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

# At import and not in a fixture: test modules import flwr, torch and matplotlib while they are collected, and these
# read their switches then. Processes that tests start inherit them.
os.environ.update(
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MPLBACKEND="Agg",
    # Workers of xdist run beside each other; more threads than that only wait for each other.
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
)
# What a user's shell or a CI service says about its terminal changes what rich prints, which tests read.
for _variable in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(_variable, None)

settings.register_profile("consilience", derandomize=True, deadline=None, database=None)
settings.load_profile("consilience")


def pytest_configure(config: pytest.Config) -> None:
    """Give Flower a home of this session's own (each xdist worker has one)."""
    home = tempfile.mkdtemp(prefix="consilience-flwr-")
    os.environ["FLWR_HOME"] = home
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with slow tests: they mostly wait, while other workers compute, and none of them is the last one."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing wait for the disk: for tests that write a great many small files and cut no power."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread, so that what is trained is the same bit for bit."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
