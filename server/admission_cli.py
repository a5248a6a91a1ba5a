"""`consilience server init`, `approve`, `sites`, `suspend`, `resume`: what the coordinator types to admit sites.

Lives here: the commands about the folder, its certificates and who is admitted. Does not live here: starting the
server, and jobs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from consilience.common.cli import AsJson, Result, emit
from consilience.common.errors import IdentityError, SettingsError
from consilience.common.files import make_folder, storage_error, write_bytes
from consilience.common.identity import Request, certificate_fingerprint, words
from consilience.common.settings_file import parse_settings
from consilience.server.admission import Record, Register
from consilience.server.authority import authority_pem, certificate_names, ensure_authority, renew_if_due
from consilience.server.settings import HOME_VARIABLE, Home, ServerSettings, split_address

app = typer.Typer(help="The coordinator's side.", no_args_is_help=True, add_completion=False)

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", help=f"The server's folder; by default ${HOME_VARIABLE}, here if server.yaml is, else ./server."
    ),
]
SiteName = Annotated[str, typer.Argument(help="The site's name.")]

TEMPLATE = """\
# The server's settings. A change holds from the next `consilience server start`.

# host:port that sites connect to. It stands in the kits that sites got: after a change they need new ones.
address: {address}

# Further DNS names and IP addresses under which this machine is reached; its certificate is for them too.
names: {names}

# Where connections of sites arrive on this machine: the one port that a firewall must let through.
listen: {listen}

# Port on 127.0.0.1 for this machine's own commands. It asks for no password: never let others reach it.
control_port: {control_port}
"""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="The server's folder.")],
    address: Annotated[str | None, typer.Option(help="HOST:PORT that sites connect to; needed the first time.")] = None,
    names: Annotated[
        list[str] | None, typer.Option("--name", help="A further DNS name or IP address of the server; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make the server's folder, certificate authority and certificate; again: renew the certificate when it is due."""

    def action() -> Result:
        home = Home(folder)
        if home.settings_file.exists():
            settings = home.settings()
            _same_settings(home, settings, address, names or [])
            _make_folders(home)
        else:
            settings = _first_settings(home, address, names or [])
            _make_folders(home)
            values = {name: json.dumps(value) for name, value in settings.model_dump(mode="json").items()}
            write_bytes(home.settings_file, TEMPLATE.format(**values).encode())  # JSON is YAML
        ca_pem = ensure_authority(home)
        renewed = renew_if_due(home, settings)
        ca_words = words(certificate_fingerprint(ca_pem))
        data = {
            "home": str(folder),
            "address": settings.address,
            "names": list(certificate_names(settings)),
            "ca_words": ca_words,
            "certificate_made": renewed,
        }
        view = Text.assemble(
            f"The server's folder is {folder}; sites connect to {settings.address}.\n",
            f"Made the server's certificate: {renewed}.\n" if renewed else "The server's certificate is good.\n",
            f"\nWords of its certificate authority, which sites compare:\n  {ca_words}\n\n",
            f"Next: keep {home.ca_key} safe and copied; approve a site's request with\n",
            f"  consilience server approve request.json --home {folder}",
        )
        return data, view

    emit(as_json, action)


def _first_settings(home: Home, address: str | None, names: list[str]) -> ServerSettings:
    """Return the settings that the command line gives. Raises `SettingsError`."""
    if address is None:
        raise SettingsError(
            f"{home.folder} holds no server.yaml yet, and --address is missing",
            hint="Add --address HOST:PORT, the address that sites connect to",
        )
    raw = {"address": address, "names": names}
    settings = parse_settings(raw, ServerSettings, source="the command line", folder=Path())
    port = split_address(settings.address)[1]
    raw = {**raw, "listen": f"0.0.0.0:{port}"}
    return parse_settings(raw, ServerSettings, source="the command line", folder=Path())


def _make_folders(home: Home) -> None:
    """Make the server's folder, for its owner alone. Raises `StorageError`."""
    try:
        make_folder(home.folder, 0o700)
        home.folder.chmod(0o700)  # it may have been there
        make_folder(home.sites, 0o700)
        make_folder(home.runs)
    except OSError as error:
        raise storage_error(error, home.folder, "write") from error


def _same_settings(home: Home, settings: ServerSettings, address: str | None, names: list[str]) -> None:
    """Refuse to change what server.yaml says. Raises `SettingsError`."""
    wanted = {"address": address or settings.address, "names": names}
    given = parse_settings(wanted, ServerSettings, source="the command line", folder=Path())
    if given.address != settings.address:
        raise SettingsError(
            f"{home.settings_file}: field 'address' is {settings.address!r}, not {given.address!r}",
            hint="Change it there and run the command without --address; sites then need new kits",
        )
    if missing := [name for name in given.names if name not in certificate_names(settings)]:
        raise SettingsError(
            f"{home.settings_file}: field 'names' lacks {', '.join(missing)}",
            hint="Add it there and run the command without --name",
        )


@app.command()
def approve(
    request_file: Annotated[Path, typer.Argument(metavar="REQUEST.json", help="The request that the site sent.")],
    said: Annotated[
        str | None, typer.Option("--words", help="The words that the site read out; needed without a terminal.")
    ] = None,
    rotate: Annotated[bool, typer.Option("--rotate", help="Replace the key of a site that is known.")] = False,
    home_folder: HomeOption = None,
    out: Annotated[Path | None, typer.Option(help="The kit to write; by default NAME-kit.json, here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Admit a site: compare the words of its request's key with what the site reads out, and write its kit."""

    def action() -> Result:
        home = Home.find(home_folder)
        settings, ca_pem = home.settings(), authority_pem(home)
        request = Request.read(request_file)
        _compare(request, said, ask=not as_json and sys.stdin.isatty())
        register = Register(home)
        record = register.approve(request, rotate=rotate)
        kit = register.kit(record, settings, ca_pem)
        path = out or Path(f"{record.name}-kit.json")
        kit.write(path)
        data = {**_about(record), "kit": str(path), "ca_words": kit.words}
        view = Text.assemble(
            f"Site {record.name} is approved. Its kit is {path}; it holds no secret.\n\n",
            f"Next: send it to {record.contact}, to be put beside site.yaml as kit.json,\n",
            f"and let the site compare these words of the certificate authority with you:\n  {kit.words}",
        )
        return data, view

    emit(as_json, action)


def _compare(request: Request, said: str | None, *, ask: bool) -> None:
    """Make sure that the request's words are those of the site. Raises `IdentityError`, `SettingsError`."""
    if said is not None:
        if " ".join(said.split()) != request.words:
            raise IdentityError(
                f"The words given with --words are not those of {request.name!r}'s request",
                hint="Do not approve it: ask the site for its words and its request once more",
            )
        return
    if not ask:
        raise SettingsError(
            "--words is missing, and there is no terminal to ask at",
            hint='Call the site and add --words "..." with the eight words that it reads out',
        )
    shown = f"Site:    {request.name}\nContact: {request.contact}\nWords:   {request.words}\n"
    typer.echo(f"{shown}\nCall the site, by a number that you did not get with the request.", err=True)
    if not typer.confirm("Do these words match those that the site reads out?", err=True):
        raise IdentityError(
            f"{request.name!r} is not approved: the words do not match",
            hint="Ask the site for its request once more, by another way",
        )


@app.command()
def sites(home_folder: HomeOption = None, as_json: AsJson = False) -> None:
    """Show the sites that were approved or suspended."""

    def action() -> Result:
        records = Register(Home.find(home_folder)).records()
        if not records:
            return {"sites": []}, "No site was approved yet: consilience server approve REQUEST.json"
        table = Table("name", "status", "words", "contact", "since")
        for record in records:
            since = f"{record.approved:%Y-%m-%d %H:%M} UTC"
            table.add_row(*map(Text, (record.name, record.status, record.words, record.contact, since)))
        return {"sites": [_about(record) for record in records]}, table

    emit(as_json, action)


@app.command()
def suspend(name: SiteName, home_folder: HomeOption = None, as_json: AsJson = False) -> None:
    """Stop admitting a site; other sites notice nothing."""
    emit(as_json, lambda: _changed(Register(Home.find(home_folder)).suspend(name)))


@app.command()
def resume(name: SiteName, home_folder: HomeOption = None, as_json: AsJson = False) -> None:
    """Admit a suspended site again."""
    emit(as_json, lambda: _changed(Register(Home.find(home_folder)).resume(name)))


def _changed(record: Record) -> Result:
    return _about(record), f"Site {record.name} is {record.status}."


def _about(record: Record) -> dict[str, object]:
    held = record.model_dump(mode="json", exclude={"public_key"})
    return {**held, "words": record.words}
