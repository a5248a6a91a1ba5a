"""Which key an agent uses while a new one waits for its kit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from consilience.client.agent_cli import papers
from consilience.client.cli import app
from consilience.common.errors import IdentityError
from consilience.common.identity import Kit, Request, key_fingerprint
from consilience.common.settings import SiteSettings
from consilience.common.settings_file import load_settings
from consilience.server.authority import ensure_authority
from consilience.server.settings import Home


def init(folder: Path, *options: str) -> Request:
    words = ["init", str(folder), "--name", "hospital-a", "--contact", "Ada", *options, "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return Request.read(Path(json.loads(result.stdout)["data"]["request"]))


def put_kit(folder: Path, request: Request, ca: str) -> None:
    kit = Kit(site=request.name, site_fingerprint=request.fingerprint, address="learn.example.org:9092", ca=ca)
    kit.write(folder / "kit.json")


def test_the_old_key_is_used_until_the_new_kit_is_there(tmp_path: Path) -> None:
    site, ca = tmp_path / "site", ensure_authority(Home(tmp_path / "home"))
    first = init(site)
    put_kit(site, first, ca)
    settings = load_settings(site / "site.yaml", SiteSettings)
    second = init(site, "--rotate")
    assert second.fingerprint != first.fingerprint
    key, kit = papers(settings)
    assert key_fingerprint(key.public_key()) == first.fingerprint == kit.site_fingerprint
    put_kit(site, second, ca)
    key, _ = papers(settings)
    assert key_fingerprint(key.public_key()) == second.fingerprint


def test_a_kit_of_no_key_of_ours_is_refused(tmp_path: Path) -> None:
    site, ca = tmp_path / "site", ensure_authority(Home(tmp_path / "home"))
    init(site)
    put_kit(site, init(tmp_path / "other"), ca)
    init(site, "--rotate")
    with pytest.raises(IdentityError, match="was made for another key"):
        papers(load_settings(site / "site.yaml", SiteSettings))


def test_a_lost_key_is_replaced_by_one_command(tmp_path: Path) -> None:
    first = init(tmp_path)
    (tmp_path / "site.key").unlink()
    second = init(tmp_path, "--rotate")
    assert second.fingerprint != first.fingerprint
    assert init(tmp_path).fingerprint == second.fingerprint
