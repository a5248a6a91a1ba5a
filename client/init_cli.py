"""`consilience site init`: a site's folder, key and request.

Lives here: making site.yaml, site.key and request.json, and replacing the key. Does not live here: the teacher and
the connection. The key is made here, at the site, and never leaves it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter, ValidationError
from rich.text import Text

from consilience.common.cli import AsJson, Result, emit
from consilience.common.errors import IdentityError, SettingsError
from consilience.common.files import make_private, storage_error, sync_folder, write_bytes
from consilience.common.identity import Line, PrivateKey, Request, key_fingerprint, load_key, make_key
from consilience.common.settings import Name, SiteSettings
from consilience.common.settings_file import load_settings

TEMPLATE = """\
# What this site has, and what it lets out. Nothing that the server sends can change it. Every field: docs/settings.md
# Relative paths are relative to this file.

# The name under which the coordinator knows this site. It stands in request.json too.
name: "{name}"

# The private images. They are read here and sent nowhere.
#   {{kind: npz, path: FILE}}       arrays x (n, height, width[, 3]) uint8, y (n,) integers, names (class names)
#   {{kind: folder, path: FOLDER, size: [32, 32]}}       one folder of images a class
data:
  kind: npz
  path: private.npz

# The classifier that answers. `train` makes one from the private images with `consilience site train site.yaml`; a
# classifier that exists already is named by another kind: state_dict, torchscript, export, onnx, sklearn, callable.
teacher:
  kind: train
  architecture: cnn3

# What may leave, at most: log-probabilities as f32, f16, u8, top-3 (or another number), top-3-u8 or votes, the finest
# first, whether two facts about the private data may be told, about how many samples in all, and whether a person must
# approve each job. More: docs/privacy.md
policy:
  precision: f16
  class_priors: false
  holdout_accuracy: false
  limits: {{per_job: 100000, per_month: 200000, lifetime: 1000000}}
  approval: false

# Folders of the public pools that this site holds a copy of, for example [pool].
pools: []
"""


def init(
    folder: Annotated[Path, typer.Argument(help="The site's folder.")],
    name: Annotated[str | None, typer.Option(help="The site's name: a-z, 0-9, hyphens; needed the first time.")] = None,
    contact: Annotated[
        str | None, typer.Option(help="Whom the coordinator calls to compare words; needed the first time.")
    ] = None,
    rotate: Annotated[bool, typer.Option("--rotate", help="Put the key aside and make a new one.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make the site's settings, key and request; what is there already stays as it is."""

    def action() -> Result:
        settings_file, request_file = folder / "site.yaml", folder / "request.json"
        settings = _settings(settings_file, name)
        old = Request.read(request_file) if request_file.exists() else None
        line = _contact(contact, old, request_file, rotate=rotate)
        aside = _put_aside(settings.key, request_file) if rotate and settings.key.exists() else None
        if rotate and aside is None:  # the key is lost: its request is of no use
            request_file.unlink(missing_ok=True)
        key = load_key(settings.key) if settings.key.exists() else make_key(settings.key)
        request = _request(key, settings.name, line, request_file)
        data = {
            "site": settings.name,
            "settings": str(settings_file),
            "key": str(settings.key),
            "request": str(request_file),
            "words": request.words,
            "old_key": str(aside) if aside else None,
        }
        view = Text.assemble(
            f"Site {settings.name}: settings {settings_file}, key {settings.key}, request {request_file}\n",
            f"The old key is {aside}; the agent uses it until the new kit is there. Then remove it.\n" if aside else "",
            f"\nWords of the key:\n  {request.words}\n\n",
            f"Next: send {request_file} to the coordinator, and read these words out when you are called.\n",
            f"Put the kit that comes back at {settings.kit}. The key stays here: nobody else needs it.",
        )
        return data, view

    emit(as_json, action)


def _settings(path: Path, name: str | None) -> SiteSettings:
    """Read site.yaml, or write it when there is none. Raises `SettingsError`, `StorageError`."""
    if not path.exists():
        if name is None:
            raise SettingsError(f"{path} does not exist yet, and --name is missing", hint="Add --name NAME")
        _validate("--name", Name, name, "lower-case letters, digits and hyphens, at most 63, no hyphen first")
        make_private(path.parent)
        write_bytes(path, TEMPLATE.format(name=name).encode())
    settings = load_settings(path, SiteSettings)
    if name not in (None, settings.name):
        raise SettingsError(
            f"{path}: field 'name' is {settings.name!r}, not {name!r}", hint="Name another folder, or leave --name out"
        )
    return settings


def _contact(contact: str | None, old: Request | None, request_file: Path, *, rotate: bool) -> str:
    """Return the contact for the request. Raises `SettingsError`."""
    if contact is None:
        if old is None:
            raise SettingsError(f"{request_file} does not exist yet, and --contact is missing", hint="Add --contact")
        return old.contact
    _validate("--contact", Line, contact, "one line of at most 200 printable characters")
    if old is not None and contact != old.contact and not rotate:
        raise SettingsError(
            f"{request_file}: its contact is {old.contact!r}, not {contact!r}",
            hint="Remove the request to make it anew, or leave --contact out",
        )
    return contact


def _validate(option: str, kind: Any, value: str, allowed: str) -> None:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError:
        raise SettingsError(f"{option} is {value[:80]!r}; allowed: {allowed}", hint="Correct it") from None


def _put_aside(key: Path, request_file: Path) -> Path:
    """Rename the key to KEY.DATE, never over another file, and remove the request that was made with it.

    Stopped in between, the next call goes on. Raises `IdentityError`, `StorageError`.
    """
    load_key(key)  # a key that cannot be used is for its owner to look at, not to be moved
    aside = key.with_name(f"{key.name}.{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
    try:
        aside.hardlink_to(key)  # fails where a file is; a rename would replace it
        request_file.unlink(missing_ok=True)
        key.unlink()
        sync_folder(key.parent)
    except FileExistsError as error:
        raise IdentityError(f"{aside} exists already", hint="Wait a second and run the same command again") from error
    except OSError as error:
        raise storage_error(error, key, "write") from error
    return aside


def _request(key: PrivateKey, name: str, contact: str, path: Path) -> Request:
    """Read the request, or write it when there is none. Raises `IdentityError`, `StorageError`."""
    if not path.exists():
        request = Request.make(key, name, contact)
        request.write(path)
        return request
    request = Request.read(path)
    if (request.name, request.fingerprint) != (name, key_fingerprint(key.public_key())):
        raise IdentityError(
            f"{path} is the request of another name or key", hint="Remove it and run the same command again"
        )
    return request
