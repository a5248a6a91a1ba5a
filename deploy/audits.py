"""Audits of all sites of a simulation, before it asks them.

Lives here: auditing each site once, and handing what came of it to the run's report. Does not live here: the attacks
(client/audit). Only a simulation holds both sides: over a network an audit stays at its site.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError
from rich.console import Group, RenderableType
from rich.text import Text

from consilience.client.audit.cli import attack_table, audit_to
from consilience.client.audit.record import Audit
from consilience.client.site import Site
from consilience.common.errors import RunError, TeacherError
from consilience.common.files import lock, read_json
from consilience.common.progress import Reporter
from consilience.common.settings import JobSettings
from consilience.deploy.simulation import prepare_run
from consilience.server.audits import SiteAudit, write_audits


def audit_run(job: JobSettings, run: Path, reporter: Reporter) -> list[Audit]:
    """Make the sites of a simulation, if they are not there yet, and audit each into RUN/audit/SITE.

    A site whose teacher and policy are those of its audit is not audited again; one that cannot be is told in the
    report, with the reason, and left out of the result. Raises what `prepare_run` and `audit_site` raise.
    """
    run = run.resolve()
    done, told = list[Audit](), dict[str, SiteAudit]()
    with lock(run):
        _, paths = prepare_run(job, run, reporter)
        for path in paths:
            site = Site.load(path)
            name, folder = site.settings.name, run / "audit" / site.settings.name
            try:
                found = _earlier(site, folder) or audit_to(site, folder, reporter)
            except TeacherError as error:
                reporter.say(f"Warning: {name} is not audited: {error}")
                told[name] = SiteAudit(verdict=f"not audited: {error}", auc=None, low=None, high=None, page=None)
                continue
            finally:
                site.close()
            done.append(found)
            best = found.strongest
            told[name] = SiteAudit(
                verdict=found.verdict,
                auc=None if best is None else best.auc,
                low=None if best is None else best.low,
                high=None if best is None else best.high,
                page=f"audit/{name}/audit.html",
            )
        write_audits(run, told)
    return done


def shown(audits: list[Audit], run: Path) -> RenderableType | None:
    """Return what a person is shown of a run's audits, and where their pages lie; None without any."""
    if not audits:
        return None
    pages = [f"Audit: {(run / 'audit' / one.site / 'audit.html').resolve()}" for one in audits]
    return Group(attack_table(audits), Text("\n".join(pages)))


def _earlier(site: Site, folder: Path) -> Audit | None:
    """Return the audit that is there, if it is of this teacher and policy. Raises `RunError` when it is damaged."""
    path = folder / "audit.json"
    if not path.exists():
        return None
    try:
        found = Audit.model_validate(read_json(path))
    except ValidationError as error:
        raise RunError(
            f"{path}: is not as it must be", hint=f"Remove {path}, then run the same command again"
        ) from error
    same = (site.teacher.fingerprint, site.settings.policy.version)
    return found if (found.fingerprint, found.policy) == same else None
