"""Admission as both sides type it: `site init`; `server init`, `approve`, `sites`, `suspend`, `resume`."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from cryptography.hazmat.primitives import serialization
from typer.testing import CliRunner

import consilience
from consilience.__main__ import app
from consilience.common.identity import Kit, Request, certificate_fingerprint, load_key, make_key, words
from consilience.common.settings import SiteSettings
from consilience.common.settings_file import load_settings
from consilience.server.settings import Home

SITE_INIT = ("site", "init", "site", "--name", "hospital-a", "--contact", "Ada [bold]Lovelace, +41 44 000 00 00")
SERVER_INIT = ("server", "init", "server", "--address", "learn.example.org:9444", "--name", "10.0.0.1")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("CONSILIENCE_SERVER_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def type_in(*words: str) -> Result:
    return CliRunner().invoke(app, words)


def done(*words: str) -> dict[str, Any]:
    result = type_in(*words, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)["data"]
    assert isinstance(data, dict)
    return data


def refused(code: int, *words: str) -> str:
    result = type_in(*words, "--json")
    assert result.exit_code == code, result.output
    envelope = json.loads(result.stdout)
    assert (envelope["ok"], envelope["error"]["code"]) == (False, code)
    return f"{envelope['error']['message']}. {envelope['error']['hint']}"


def snapshot(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def approved() -> dict[str, Any]:
    """Do what both sides do until the site is admitted."""
    site = done(*SITE_INIT)
    done(*SERVER_INIT)
    return done("server", "approve", "site/request.json", "--words", site["words"])


# The site


def test_a_new_site_has_settings_a_key_and_a_request(here: Path) -> None:
    said = type_in(*SITE_INIT)
    assert said.exit_code == 0
    request = Request.read(here / "site/request.json")
    assert f"\n  {request.words}\n" in said.stdout
    assert "request.json to the coordinator" in said.stdout
    assert (request.name, request.contact) == ("hospital-a", SITE_INIT[-1])
    settings = load_settings(here / "site/site.yaml", SiteSettings)
    assert settings.name == "hospital-a"
    assert settings.data is not None
    assert (settings.data.kind, settings.teacher.kind) == ("npz", "train")
    assert settings.key == here / "site/site.key"
    assert settings.key.stat().st_mode & 0o777 == 0o600
    assert (here / "site").stat().st_mode & 0o077 == 0
    assert load_key(settings.key).public_key() == request.key
    assert_no_private_key(here / "site/request.json", settings.key)


def assert_no_private_key(path: Path, key_file: Path) -> None:
    key = load_key(key_file)
    number = key.private_numbers().private_value
    formats = serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    body = "".join(key_file.read_text().splitlines()[1:-1])
    sent = path.read_bytes()
    assert b"PRIVATE" not in sent
    for secret in (
        number.to_bytes(48, "big"),
        f"{number:x}".encode(),
        key.private_bytes(*formats),
        body[-60:].encode(),
    ):
        assert secret not in sent


@pytest.mark.parametrize("name", ["123", "true", "1e5", "0x1f", "null", "2026-01-01"])
def test_a_name_that_yaml_would_read_as_something_else_stays_a_name(here: Path, name: str) -> None:
    done("site", "init", "site", "--name", name, "--contact", "Ada")
    assert load_settings(here / "site/site.yaml", SiteSettings).name == name


def test_init_again_shows_the_same_words_and_changes_nothing(here: Path) -> None:
    first = done(*SITE_INIT)
    before = snapshot(here)
    assert done(*SITE_INIT) == first
    assert done("site", "init", "site") == first
    assert snapshot(here) == before
    (here / "site/request.json").unlink()
    assert "--contact is missing" in refused(3, "site", "init", "site")
    assert done(*SITE_INIT)["words"] == first["words"]
    assert Request.read(here / "site/request.json").words == first["words"]


def test_what_the_engineer_changed_is_kept(here: Path) -> None:
    first = done(*SITE_INIT)
    (here / "site/site.key").rename(here / "elsewhere.key")
    text = (here / "site/site.yaml").read_text() + "key: ../elsewhere.key\n"
    (here / "site/site.yaml").write_text(text)
    assert done("site", "init", "site")["words"] == first["words"]
    assert (here / "site/site.yaml").read_text() == text
    assert not (here / "site/site.key").exists()


def test_rotation_puts_the_old_key_aside(here: Path) -> None:
    first = done(*SITE_INIT)
    old = (here / "site/site.key").read_bytes()
    second = done("site", "init", "site", "--rotate")
    assert second["words"] != first["words"]
    aside = Path(second["old_key"])
    assert aside.name.startswith("site.key.2")
    assert (aside.read_bytes(), aside.stat().st_mode & 0o777) == (old, 0o600)
    request = Request.read(here / "site/request.json")
    assert (request.words, request.contact) == (second["words"], SITE_INIT[-1])
    assert done("site", "init", "site")["words"] == second["words"]


def test_rotation_never_overwrites_an_older_key(here: Path) -> None:
    done(*SITE_INIT)
    made = {(here / "site/site.key").read_bytes()}
    for _ in range(4):  # within one second the old keys' names would be the same
        assert type_in("site", "init", "site", "--rotate").exit_code in (0, 15)
        made.add((here / "site/site.key").read_bytes())
        done("site", "init", "site")  # refused or not: key and request still go together
    assert {path.read_bytes() for path in (here / "site").glob("site.key*")} == made


def test_a_site_that_contradicts_itself_is_refused(here: Path) -> None:
    done(*SITE_INIT)
    before = snapshot(here)
    assert "'name' is 'hospital-a'" in refused(3, "site", "init", "site", "--name", "hospital-b")
    assert "its contact is" in refused(3, "site", "init", "site", "--contact", "Bob")
    assert snapshot(here) == before
    (here / "site/site.key").chmod(0o644)
    assert "chmod 600" in refused(15, "site", "init", "site")
    assert "chmod 600" in refused(15, "site", "init", "site", "--rotate")
    (here / "site/site.key").unlink()
    make_key(here / "site/site.key")
    assert "another name or key" in refused(15, "site", "init", "site")


@pytest.mark.parametrize("name", ["../a", "A", "a_b", "", "a" * 64, "-a", "a\n"])
def test_a_bad_name_makes_nothing(here: Path, name: str) -> None:
    assert "--name is" in refused(3, "site", "init", "site", "--name", name, "--contact", "Ada")
    assert not (here / "site").exists()


def test_a_bad_contact_makes_no_key(here: Path) -> None:
    for contact in ("two\nlines", "\x1b[2J", "x" * 201):
        assert "--contact is" in refused(3, "site", "init", "site", "--name", "a", "--contact", contact)
    assert "--name is missing" in refused(3, "site", "init", "other", "--contact", "Ada")
    assert not list(here.rglob("site.key"))


# The server


def test_a_new_server_has_its_folder(here: Path) -> None:
    said = type_in(*SERVER_INIT)
    assert said.exit_code == 0
    home = Home(here / "server")
    assert home.folder.stat().st_mode & 0o077 == 0
    assert {path.name for path in home.folder.iterdir()} == {
        "server.yaml", "ca.key", "ca.crt", "server.key", "server.crt", "sites", "runs"
    }  # fmt: skip
    settings = home.settings()
    assert (settings.address, settings.listen, settings.control_port) == (
        "learn.example.org:9444",
        "0.0.0.0:9444",
        9093,
    )
    assert settings.names == ("10.0.0.1",)
    assert f"\n  {words(certificate_fingerprint(home.ca_certificate.read_text()))}\n" in said.stdout


def test_a_folder_that_was_there_is_closed_to_others(here: Path) -> None:
    folder = here / "server"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    assert type_in(*SERVER_INIT).exit_code == 0
    assert folder.stat().st_mode & 0o777 == 0o700


def test_server_init_again_renews_what_is_due_and_keeps_the_rest(here: Path) -> None:
    first = done(*SERVER_INIT)
    before = snapshot(here)
    again = done("server", "init", "server")
    assert again == {**first, "certificate_made": None}
    assert done(*SERVER_INIT) == again
    assert snapshot(here) == before
    yaml = here / "server/server.yaml"
    yaml.write_text(yaml.read_text().replace('["10.0.0.1"]', "[10.0.0.1, other.example.org]"))
    renewed = done("server", "init", "server")
    assert renewed["certificate_made"] == "the server's names changed"
    assert renewed["ca_words"] == first["ca_words"]
    changed = {path.name for path, held in snapshot(here).items() if before.get(path) != held}
    assert changed == {"server.yaml", "server.key", "server.crt"}


def test_a_server_is_not_changed_by_the_command_line(here: Path) -> None:
    assert "--address is missing" in refused(3, "server", "init", "server")
    assert "no address that a site could connect to" in refused(3, "server", "init", "server", "--address", "0.0.0.0:1")
    assert "control_port" in refused(3, "server", "init", "server", "--address", "a:9093")
    assert "neither a DNS name" in refused(3, "server", "init", "server", "--address", "a:1", "--name", "a b")
    assert not (here / "server").exists()
    done(*SERVER_INIT)
    before = snapshot(here)
    assert "'address' is 'learn.example.org:9444'" in refused(3, "server", "init", "server", "--address", "b.org:1")
    assert "lacks new.org" in refused(3, "server", "init", "server", "--name", "new.org")
    assert snapshot(here) == before


def test_an_approved_site_gets_a_kit_without_secrets(here: Path) -> None:
    data = approved()
    assert data["kit"] == "hospital-a-kit.json"
    kit = Kit.read(here / "hospital-a-kit.json")
    site = Request.read(here / "site/request.json")
    assert (kit.site, kit.site_fingerprint, kit.address) == ("hospital-a", site.fingerprint, "learn.example.org:9444")
    assert kit.words == data["ca_words"] == done("server", "init", "server")["ca_words"]
    assert_no_private_key(here / "hospital-a-kit.json", here / "site/site.key")
    for name in ("ca.key", "server.key"):
        body = "".join((here / "server" / name).read_text().splitlines()[1:-1])
        assert body[20:] not in kit.model_dump_json()
    said = type_in("server", "approve", "site/request.json", "--words", data["words"], "--out", "to-send.json")
    assert Kit.read(here / "to-send.json") == kit
    assert kit.words in said.stdout
    assert SITE_INIT[-1] in said.stdout  # as it stands: brackets are no markup


@pytest.mark.parametrize("change", ["", "zoo " * 8, "UPPER", "one less", "reversed"])
def test_without_a_terminal_only_the_right_words_approve(here: Path, change: str) -> None:
    right = done(*SITE_INIT)["words"]
    done(*SERVER_INIT)
    wrong = {"UPPER": right.upper(), "one less": right.rpartition(" ")[0], "reversed": " ".join(right.split()[::-1])}
    text = refused(15, "server", "approve", "site/request.json", "--words", wrong.get(change, change))
    assert "words" in text
    assert right not in text
    assert "--words is missing" in refused(3, "server", "approve", "site/request.json")
    assert done("server", "sites") == {"sites": []}
    assert not list(here.glob("*kit.json"))


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 15)])
def test_at_a_terminal_the_words_are_shown_and_asked_about(here: Path, answer: str, code: int) -> None:
    right = done(*SITE_INIT)["words"]
    done(*SERVER_INIT)
    ours, theirs = pty.openpty()
    try:
        os.write(ours, f"{answer}\n".encode())
        result = subprocess.run(
            [sys.executable, "-m", "consilience", "server", "approve", "site/request.json"],
            env={**os.environ, "PYTHONPATH": str(Path(consilience.__file__).parents[1])},
            stdin=theirs,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert result.returncode == code, result.stderr
    for shown in ("hospital-a", SITE_INIT[-1], right, "Do these words match"):
        assert shown in result.stderr
    assert "Do these words" not in result.stdout
    assert [site["name"] for site in done("server", "sites")["sites"]] == (["hospital-a"] if code == 0 else [])


def test_sites_are_listed_suspended_and_resumed(here: Path) -> None:
    data = approved()
    assert "hospital-a is suspended" in type_in("server", "suspend", "hospital-a").stdout
    (site,) = done("server", "sites")["sites"]
    assert (site["status"], site["words"], site["contact"]) == ("suspended", data["words"], SITE_INIT[-1])
    assert "is suspended" in refused(15, "server", "approve", "site/request.json", "--words", data["words"])
    assert done("server", "resume", "hospital-a")["status"] == "approved"
    table = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["server", "sites"]).stdout
    for shown in ("hospital-a", "approved", data["words"], SITE_INIT[-1], "UTC"):
        assert shown in table
    assert "no site 'hospital-b'; known: hospital-a" in refused(15, "server", "suspend", "hospital-b")


def test_a_rotated_key_is_approved_with_rotate(here: Path) -> None:
    old = approved()
    new = done("site", "init", "site", "--rotate")
    approve = ("server", "approve", "site/request.json", "--words", new["words"])
    assert "known with another key" in refused(15, *approve)
    assert Kit.read(here / old["kit"]).site_fingerprint == old["fingerprint"]
    data = done(*approve, "--rotate")
    assert data["history"][0]["fingerprint"] == old["fingerprint"]
    assert Kit.read(here / old["kit"]).site_fingerprint == data["fingerprint"] != old["fingerprint"]


def test_the_folder_is_named_or_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words_of_site = done(*SITE_INIT)["words"]
    assert "server init" in refused(22, "server", "sites")
    done("server", "init", "elsewhere", "--address", "a.org:9092")
    done("server", "approve", "site/request.json", "--words", words_of_site, "--home", "elsewhere")
    monkeypatch.setenv("CONSILIENCE_SERVER_HOME", str(here / "elsewhere"))
    assert len(done("server", "sites")["sites"]) == 1
    monkeypatch.delenv("CONSILIENCE_SERVER_HOME")
    monkeypatch.chdir(here / "elsewhere")
    assert len(done("server", "sites")["sites"]) == 1
