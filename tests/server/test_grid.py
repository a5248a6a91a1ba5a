"""Losses of the link to the SuperLink are told plainly, whichever of Flower's exceptions says so."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.run import RunNotRunningException
from flwr.superlink.grid import HttpGrid

from consilience.server.grid import LinkLostError, SuperLinkGrid
from consilience.server.settings import Home
from consilience.server.superlink import Endpoint
from helpers.superlink import Authority


@pytest.mark.parametrize(
    "error",
    [httpx.ConnectError("refused"), RunNotRunningException(), ObjectPushError("an-object", 1, "a-session")],
    ids=lambda error: type(error).__name__,
)
def test_a_push_into_a_superlink_that_was_restarted_is_a_lost_link(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise error

    home = Home(tmp_path)
    home.ca_certificate.write_text(Authority().pem)
    grid = SuperLinkGrid(Endpoint(home, 1), "token")
    monkeypatch.setattr(HttpGrid, "push_messages", refuse)
    with pytest.raises(LinkLostError, match=type(error).__name__):
        grid.push_messages([])
    grid.close()
