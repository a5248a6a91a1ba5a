"""`consilience site train`, `show` and `check`: the teacher, what the server learns of it, what may be amiss."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from consilience.client.check import Preflight
from consilience.client.coverage import learn_and_show, tell_coverage
from consilience.client.explain import tell_policy
from consilience.client.features import learn_and_show_bases, tell_taps
from consilience.client.policy import limits
from consilience.client.privacy import train_private, training_epochs
from consilience.client.site import Site
from consilience.client.teacher import calibrate_any
from consilience.common.cli import AsJson, Result, emit, emit_findings
from consilience.common.epochs import epoch_task
from consilience.common.errors import SettingsError
from consilience.common.progress import Reporter
from consilience.common.settings import SiteSettings
from consilience.common.settings_file import load_settings

SiteFile = Annotated[Path, typer.Argument(help="The site's site.yaml.")]


def train(site: SiteFile, as_json: AsJson = False) -> None:
    """Train the site's teacher on its private data, calibrate it, learn coverage; goes on where it was interrupted.

    A teacher that exists already is calibrated only. Coverage is learned where the policy lets it out, and so are the
    principal components of features.
    """

    def action() -> Result:
        settings = load_settings(site, SiteSettings)
        covers = settings.policy.coverage != "off"
        calibrates = settings.calibration != "off" and settings.data is not None
        reduces = any(reduction.channels is not None for reduction in settings.policy.features.taps.values())
        if settings.teacher.kind == "train":
            if settings.policy.features.taps:
                from consilience.client.features.untrained import check_untrained  # torch is imported in there

                check_untrained(settings)
            with Reporter() as reporter:
                train_private(settings, epoch_task(reporter, f"training {settings.name}", training_epochs(settings)))
        elif not (calibrates or (covers and settings.data is not None) or reduces):
            raise SettingsError(
                f"{site}: field 'teacher.kind' is {settings.teacher.kind!r}, which is not trained here, and there is "
                f"nothing to calibrate: "
                + ("'calibration' is off" if settings.calibration == "off" else "'data' is not given"),
                hint="Such a teacher answers as it is: `consilience site show` shows it",
            )
        if calibrates:
            calibrate_any(settings)
        if covers:
            with Reporter() as reporter:
                learn_and_show(settings, reporter)
        if reduces:
            with Reporter() as reporter:
                learn_and_show_bases(settings, reporter)
        return _about(Site.load(site))

    emit(as_json, action)


def show(site: SiteFile, as_json: AsJson = False) -> None:
    """Load the site's teacher and show the site card: all that the server learns before it asks.

    The table also says what stays here: how calibration and coverage came out.
    """
    emit(as_json, lambda: _about(Site.load(site)))


def check(site: SiteFile, as_json: AsJson = False) -> None:
    """Look at everything that an agent needs, from the settings to the server, and say what to mend."""
    preflight = Preflight(site)
    preflight.run()
    table = Table("check", "result", "found", "fix")
    colours = {"ok": "green", "warning": "yellow", "problem": "red", "skipped": "dim"}
    for row in preflight.rows:
        table.add_row(row.check, Text(row.result, colours[row.result]), Text(row.found), Text(row.fix))
    rows = [{"check": row.check, "result": row.result, "found": row.found, "fix": row.fix} for row in preflight.rows]
    emit_findings(as_json, ({"rows": rows}, table), preflight.error)


def _about(site: Site) -> Result:
    card = site.card.model_dump(mode="json")
    table = Table(show_header=False)
    for field, value in card.items():
        if field == "calibration":  # how it is applied concerns the site whether or not its policy tells it
            table.add_row(field, Text(site.calibration + ("; not told" if value is None else "")))
        elif field == "features" and value is not None:
            table.add_row(field, Text(tell_taps(site.settings, site.taps)))
        elif value is not None:
            table.add_row(field, Text(_shown(value)))
    table.add_row("coverage, not told", Text(tell_coverage(site.settings)))
    policy = site.settings.policy
    table.add_row("policy, not told", Text("; ".join(tell_policy(policy))))
    # of one job: that of a job that took nothing yet
    for limit in limits(policy, site.ledger, ""):
        most = "no limit" if limit.most is None else f"at most {limit.most:,} samples"
        name = limit.name.strip()
        spent = f"; {limit.spent:,} released" if name != "job" else " each"
        table.add_row(f"{name}, not told", Text(most + spent))
    site.close()
    return card, table


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_shown(part)}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
