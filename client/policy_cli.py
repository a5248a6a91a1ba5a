"""`consilience site approve` and `explain`: a person's consent, and what it would be to.

Does not live here: the decisions (client/policy), what a job would take (client/explain).
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError

from consilience.client.explain import Explanation, tell_site
from consilience.client.explain import explain as explain_job
from consilience.client.ledger import Ledger
from consilience.client.ledger_rows import Approval, approval
from consilience.client.policy import component_bytes
from consilience.client.privacy import Spent
from consilience.client.site import Site
from consilience.common.cli import AsJson, Result, emit
from consilience.common.errors import LabelError, LedgerError, PoolError, SettingsError
from consilience.common.labels import LabelSpace
from consilience.common.protocol import TailDemand
from consilience.common.settings import JobSettings, Name, SiteSettings
from consilience.common.settings_file import load_settings

SiteFile = Annotated[Path, typer.Argument(help="The site's site.yaml.")]


def approve(
    job: Annotated[
        str, typer.Argument(help="The job.yaml, as the coordinator sends it; with --withdraw the job's name will do.")
    ],
    site: SiteFile,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Take an approval back.")] = False,
    as_json: AsJson = False,
) -> None:
    """Let a job ask for what its job.yaml says, under the policy as it is now, and show that. The ledger keeps it."""

    def action() -> Result:
        return _withdraw(job, site) if withdraw else _approve(job, site)

    emit(as_json, action)


def _approve(job: str, site: Path) -> Result:
    if _is_name(job) and not Path(job).is_file():
        raise SettingsError(
            f"JOB is {job!r}, a job's name, and a name does not say what would be asked for",
            hint="Give the job.yaml that the coordinator sent",
        )
    wanted, held = load_settings(Path(job), JobSettings), Site.load(site)
    with closing(held):
        policy, before, found = held.settings.policy, _rows(held), explain_job(wanted, held)
        if not found.parts:
            raise PoolError(
                f"{site}: there is no pool here that the job could ask about", hint="Put the job's pool into 'pools'"
            )
        if found.unfit:
            raise SettingsError(
                f"{job}: asks for what site {held.settings.name} does not tell, and an approval would be of "
                f"less than it asks for: {found.unfit}",
                hint="Let policy.features or policy.tail tell it, or ask the coordinator for another job.yaml",
            )
        with held.ledger.alone():
            if held.ledger.count != before:
                raise LedgerError(
                    f"{held.ledger.path}: answers left while the job was explained", hint="Type the same command again"
                )
            given = _approval(found, held.ledger, wanted)
            if held.ledger.approved(wanted.name, policy.version) != given:
                held.ledger.append(approval(wanted.name, policy.version, given))
        found = explain_job(wanted, held)
    lines = [f"Job {wanted.name} is approved under policy {policy.version}, for:", *_parts(found), _sealing(wanted)]
    lines.append(f"That is {found.new:,} samples newly released, and no more under this name.")
    if not policy.approval:
        lines.append("The policy asks for no approval: set policy.approval: true, and approve again.")
    lines += [f"Yet it would be refused: {found.refusal}."] if found.refusal else []
    data = {"job": wanted.name, "policy": policy.version, "approved": True, "needed": policy.approval}
    return {**data, "parts": [vars(part) for part in found.parts], "refusal": found.refusal or None}, "\n".join(lines)


def _rows(site: Site) -> int:
    site.ledger.refresh()
    return site.ledger.count


def _approval(found: Explanation, ledger: Ledger, job: JobSettings) -> Approval:
    """Return the approval of what is explained, beside what left for the job before."""
    spent, new, tail = ledger.spent, found.demand.counted([part.new for part in found.parts]), (0, 0, 0)
    if found.tail is not None and found.tail.samples:
        asked = spent.tails
        tail = (
            asked[job.name, "rounds"] + found.tail.rounds,
            asked[job.name, "samples"] + found.tail.samples,
            asked[job.name, "bytes"] + found.tail.bytes,
        )
    counts = {part: spent.asked[job.name, part] + count for part, count in new.items()}
    return Approval(counts, job.privacy.sealed and not job.privacy.secure_sum, tail)


def _withdraw(job: str, site: Path) -> Result:
    name, settings = (
        job if _is_name(job) else load_settings(Path(job), JobSettings).name,
        load_settings(site, SiteSettings),
    )
    policy = settings.policy
    with closing(Ledger.open(settings)) as ledger, ledger.alone():
        versions = ledger.approved_under(name)
        if versions:  # under whichever version: an agent may know another than the file tells now
            ledger.append(*(approval(name, version, None) for version in versions))
    data = {"job": name, "policies": list(versions), "approved": False, "needed": policy.approval}
    if not versions:
        return data, f"Job {name} was not approved under any policy."
    return data, f"Job {name} is no longer approved under policy {', '.join(versions)}."


def _is_name(job: str) -> bool:
    try:
        TypeAdapter(Name).validate_python(job)
    except ValidationError:
        return False
    return True


def _parts(found: Explanation) -> list[str]:
    """Return what a job would take, a line a kind of answers and pool."""
    lines = [f"- {part.words}" for part in found.parts] or ["- nothing: there is no pool here"]
    for tap in found.demand.components:
        assert tap.components is not None
        known = "" if tap in found.new_components else ", released before"
        lines.append(
            f"- with the agreement, the principal components of tap {tap.name} themselves: {tap.components.number} of "
            f"{tap.channels} channels, {tap.components.bytes:,} bytes{known}"
        )
    if found.tail is not None:
        lines.append(f"- {_tail_words(found.tail)}")
    if not found.here:
        lines.append("Its pools are not on this machine under the job's names: these are the pools of site.yaml.")
        if any(part.kind == "features" for part in found.parts):
            lines.append("A job takes features of one of them alone.")
    return lines


def _tail_words(tail: TailDemand) -> str:
    if not tail.samples:
        return f"the weights of the teacher's last blocks and head, {tail.bytes:,} bytes"
    return (
        f"answers of the teacher's last blocks about features that the server makes: at most {tail.rounds:,} questions "
        f"about {tail.samples:,} samples, {tail.bytes:,} bytes to the site and back"
    )


def explain(
    job: Annotated[Path, typer.Argument(help="The job.yaml, as the coordinator sends it.")],
    site: SiteFile,
    as_json: AsJson = False,
) -> None:
    """Say what a job would take from the site, and what would be left of its limits. Nothing leaves."""

    def action() -> Result:
        wanted, held = load_settings(job, JobSettings), Site.load(site)
        try:
            found = explain_job(wanted, held)
            groups, misfit = _groups(wanted, held)
        finally:
            held.close()
        lines = [f"Job {wanted.name} would take from {held.settings.name}:"]
        lines += _parts(found)
        lines += [
            f"It takes the class {own} for the group of {', '.join(classes)}: answers on it are about these together."
            for own, classes in groups.items()
        ]
        lines += [f"The coordinator would have to leave the site out: {misfit}."] if misfit else []
        lines.append(_sealing(wanted))
        if told := found.demand.feature_bytes():
            lines.append(
                f"Features are {told:,} bytes in all{_components(found)}; a job may ask for "
                f"{held.settings.policy.features.bytes:,}."
            )
        lines.append(f"That is {found.new:,} samples newly released. Left of the limits, before and after:")
        for name, (before, after) in found.left.items():
            lines.append(f"- {name}: {_left(before, after)}")
        for name, (before, after) in found.bytes_left.items():
            lines.append(f"- {name}: {_left(before, after)} bytes")
        for name, (before, after) in found.tail_left.items():
            lines.append(f"- {name}: {_left(before, after)}")
        if found.loss is not None:
            losses = " -> ".join(_epsilon(spent) for spent in found.loss)
            lines.append(f"Privacy loss of all that left, before and after: {losses}")
            for name, (most, spent) in found.most.items():
                lines.append(f"- {name}: epsilon {'unknown' if spent is None else f'{spent:.3g}'} of {most:g} is spent")
        lines += ["By the policy:", *(f"- {line}" for line in tell_site(held.settings))]
        lines.append(f"It would be refused: {found.refusal}." if found.refusal else "It would be answered.")
        data = {
            "job": wanted.name,
            "policy": held.settings.policy.version,
            "parts": [{**vars(part)} for part in found.parts],
            "pools_are_the_job_s": found.here,
            "feature_bytes": {
                "asked": found.demand.feature_bytes(),
                "components": component_bytes(found.demand.components),
                "new": found.new_bytes,
                "most": held.settings.policy.features.bytes,
                "left": {name: {"before": was, "after": then} for name, (was, then) in found.bytes_left.items()},
            },
            "tail": None if found.tail is None else found.tail.model_dump(),
            "tail_left": {name: {"before": was, "after": then} for name, (was, then) in found.tail_left.items()},
            "groups": groups,
            "misfit": misfit or None,
            "sealed": wanted.privacy.sealed,
            "new": found.new,
            "left": {name: {"before": before, "after": after} for name, (before, after) in found.left.items()},
            "privacy": None if found.loss is None else [spent.model_dump(mode="json") for spent in found.loss],
            "epsilon_limits": {name: {"most": most, "spent": spent} for name, (most, spent) in found.most.items()},
            "refusal": found.refusal or None,
        }
        return data, "\n".join(lines)

    emit(as_json, action)


def _groups(job: JobSettings, site: Site) -> tuple[dict[str, list[str]], str]:
    """Return the site's class names that the job takes for groups, with their classes, and why they do not fit."""
    name, classes = site.settings.name, site.teacher.classes
    try:
        space = LabelSpace.build({name: classes}, job.labels.synonyms, groups=job.labels.groups)
    except LabelError as error:
        return {}, error.message
    entries = zip(classes, space.entries(0), strict=True)
    return {own: [space.names[c] for c in entry] for own, entry in entries if len(entry) > 1}, ""


def _components(found: Explanation) -> str:
    count = component_bytes(found.demand.components)
    return f", with {count:,} of principal components that leave with the agreement" if count else ""


def _sealing(job: JobSettings) -> str:
    """Say who could read the job's answers on their way."""
    if job.privacy.secure_sum:
        return "They would leave masked, in secure sums, which are not sealed."
    if job.privacy.sealed:
        return "They would leave sealed: encrypted for the coordinator alone."
    return "They would leave unsealed: a SuperLink that carries them could read them."


def _left(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return "no limit"
    return f"{before:,} -> {after:,}" if after >= 0 else f"{before:,}, which are {-after:,} too few"


def _epsilon(spent: Spent) -> str:
    if spent.epsilon is None:
        return spent.why
    return f"epsilon {spent.epsilon:.3g} at delta {spent.delta:g}" + (f", of a {spent.unit}" if spent.unit else "")
