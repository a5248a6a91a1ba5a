"""`consilience site audit`: attack the site's own answers before they leave, and say what came of it.

Lives here: the command, its table, and the two files. Does not live here: what is done (auditing).
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from consilience.client.audit.auditing import SHADOWS, audit_site, check_audit
from consilience.client.audit.canaries import check_canaries
from consilience.client.audit.lira import LEAST_SHADOWS
from consilience.client.audit.page import ATTACKS, PARTS, render_page, shown_rates
from consilience.client.audit.planted import forget_planted, planted_canaries
from consilience.client.audit.record import NO_PROOF, Audit
from consilience.client.privacy import training_epochs
from consilience.client.site import Site
from consilience.common.cli import AsJson, Result, emit
from consilience.common.epochs import epoch_task
from consilience.common.errors import SettingsError
from consilience.common.files import lock, make_private, storage_error, write_bytes, write_json
from consilience.common.progress import Reporter

NOT_ASKED = (
    "How much epsilon is at least was not tried: `--canaries N` trains a copy with N wrong records, which takes about "
    "as long as training the teacher did."
)
NOT_HERE = "The teacher was not trained here, so that no copy of it can be."


def audit(
    site: Annotated[Path, typer.Argument(help="The site's site.yaml.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for audit.html and audit.json; by default audit in the site's state.")
    ] = None,
    shadows: Annotated[
        int, typer.Option(help=f"Shadow teachers, at least {LEAST_SHADOWS}: more make a stronger attack.")
    ] = SHADOWS,
    canaries: Annotated[
        int, typer.Option(help="Wrong records for the training of a copy, which show how much epsilon is at least.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Attack the site's own answers: who was learned from, how frequent classes are, whether asking again helps.

    Nothing is sent, released or counted. The same command again goes on where the last one was interrupted.
    """

    def action() -> Result:
        loaded = Site.load(site)
        folder = out or loaded.settings.state / "audit"
        with Reporter() as reporter:
            found = audit_to(loaded, folder, reporter, shadows, canaries)
        return {"page": str(folder / "audit.html"), "audit": found.model_dump(mode="json")}, _view(found, folder)

    emit(as_json, action)


def audit_to(site: Site, folder: Path, reporter: Reporter, shadows: int = SHADOWS, canaries: int = 0) -> Audit:
    """Audit a site and write audit.json and audit.html into a folder, for the owner's eyes alone.

    With `canaries` a copy of the teacher is trained for these too. What was trained stays in state/audit until both
    files are written, so that the next audit goes on where one was interrupted. Raises what `audit_site` and
    `planted_canaries` raise, `SettingsError` and `StorageError` for a folder that cannot be written to, and `RunError`
    when another process audits the site.
    """
    settings, planted, on_epoch = site.settings, None, None
    home = settings.state / "audit"
    check_audit(site, shadows)
    if canaries:
        check_canaries(settings, canaries)
    _check_folder(folder)
    make_private(settings.state)
    make_private(home)
    with lock(home, hint="Wait for the other audit of this site to end, then run the same command again"):
        if canaries:
            name = f"auditing {settings.name}: a copy with canaries"
            planted = planted_canaries(settings, canaries, epoch_task(reporter, name, training_epochs(settings)))
        if settings.teacher.kind == "train":
            name = f"auditing {settings.name}: {shadows} shadows"
            on_epoch = epoch_task(reporter, name, shadows * training_epochs(settings))
        found = audit_site(site, home / "shadows", shadows, on_epoch)
        if not canaries:
            why = NOT_ASKED if settings.teacher.kind == "train" else NOT_HERE
            found = found.model_copy(update={"left_out": found.left_out | {"canaries": why}})
        found = found.model_copy(update={"canaries": planted})
        write_json(folder / "audit.json", found.model_dump(mode="json"), mode=0o600)
        write_bytes(folder / "audit.html", render_page(found).encode(), mode=0o600)
        forget_planted(settings)
        shutil.rmtree(home / "shadows", ignore_errors=True)
    return found


def _check_folder(folder: Path) -> None:
    """Make the folder of the two files, if it is not there, and see that it can be written to."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise SettingsError(
                f"{folder}: {path} is a file; audit.html and audit.json need a folder", hint="Name another by --out"
            )
    make_private(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise storage_error(PermissionError(errno.EACCES, os.strerror(errno.EACCES)), folder, "write")


def _view(found: Audit, folder: Path) -> Group:
    """Return the table of attacks, the findings and what was left out."""
    lines = [*found.findings, found.guarantee, *found.notes]
    lines += [f"Not audited: {PARTS[part]}. {why}" for part, why in found.left_out.items()]
    return Group(
        Text(f"{found.site}: {found.verdict}."),
        attack_table([found]),
        Text("\n".join([*lines, NO_PROOF])),
        Text(f"Page: {(folder / 'audit.html').resolve()}"),
    )


def attack_table(audits: list[Audit]) -> Table:
    """Return a table of the attacks on membership, a line each."""
    heads = ("site", "attack", "pairs told apart, 95 %", "found at 0.1 %", "at 1 % false alarms")
    table = Table(*(Column(head, no_wrap=at < 3) for at, head in enumerate(heads)))
    for found in audits:
        for key, name in ATTACKS.items():
            if (attack := getattr(found, key)) is not None:
                apart = f"{attack.auc:.1%} ({attack.low:.1%} to {attack.high:.1%})"
                table.add_row(found.site, name, apart, *shown_rates(attack))
    return table
