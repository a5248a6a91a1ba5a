"""`consilience site ledger`: what left, for whoever must answer for it.

Does not live here: the ledger itself (client/ledger), beginning another one (client/ledger_restart).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from consilience.client.ledger import COLUMNS, Ledger
from consilience.client.ledger_restart import restart as restart_ledger
from consilience.client.ledger_rows import Row
from consilience.client.privacy import account
from consilience.client.privacy.spending import delta_of, loss_limits
from consilience.common.cli import AsJson, Result, emit
from consilience.common.errors import LedgerError, SettingsError
from consilience.common.files import atomic
from consilience.common.settings import NoPrivacy, SiteSettings
from consilience.common.settings_file import load_settings

app = typer.Typer(help="The record of what left the site.", no_args_is_help=True, add_completion=False)
SiteFile = Annotated[Path, typer.Argument(help="The site's site.yaml.")]


@app.command()
def show(site: SiteFile, as_json: AsJson = False) -> None:
    """Show what was released, by job and month, and what the limits leave."""

    def action() -> Result:
        settings = load_settings(site, SiteSettings)
        with closing(Ledger.open(settings)) as ledger:
            spent, most, month = ledger.spent, settings.policy.limits, ledger.now[:7]
            data = {
                **_state(ledger),
                "spent": {"jobs": dict(spent.jobs), "months": dict(spent.months), "lifetime": spent.lifetime},
                "features": {
                    "jobs": dict(spent.features),
                    "lifetime": spent.features.total(),
                    "components": [
                        {"job": job, "tap": tap, "bytes": count}
                        for (job, tap), count in sorted(spent.components.items())
                    ],
                },
                "tail": [
                    {"job": job, "what": what, "count": count} for (job, what), count in sorted(spent.tails.items())
                ],
                "limits": most.model_dump(),
            }
            table = Table("what", "samples released", "limit")
            for job, samples in sorted(spent.jobs.items()):
                if job:
                    table.add_row(Text(f"job {job}"), f"{samples:,}", _limit(most.per_job))
            table.add_row(f"month {month}", f"{spent.months[month]:,}", _limit(most.per_month))
            table.add_row("lifetime", f"{spent.lifetime:,}", _limit(most.lifetime))
            features = settings.policy.features
            for job, count in sorted(spent.features.items()):
                if job:
                    table.add_row(Text(f"features of job {job}"), f"{count:,} bytes", f"{features.bytes:,} bytes")
            for (job, tap), count in sorted(spent.components.items()):
                table.add_row(Text(f"of these, components of {tap} to job {job}"), f"{count:,} bytes", "")
            if spent.features or features.taps:
                told = f"{features.bytes_lifetime:,} bytes"
                table.add_row("features, lifetime", f"{spent.features.total():,} bytes", told)
            for (job, what), count in sorted(spent.tails.items()):
                limit = f"{getattr(settings.policy.tail, what):,}"
                table.add_row(Text(f"{what} of questions about the last blocks, job {job}"), f"{count:,}", limit)
            for row in ledger.rows():
                if row.entry.kind == "tail" and row.entry.body["what"] == "blocks":
                    told = f"{row.entry.body['bytes']:,} bytes"
                    table.add_row(Text(f"the last blocks themselves, to job {row.entry.job}"), told, "")
            for row in ledger.rows():
                if row.entry.kind == "card":
                    told = ", ".join(row.entry.body["told"])
                    table.add_row(Text(f"on the site card, to job {row.entry.job} first"), told, "")
            if sums := spent.sums.values():
                opened = sum(state == "opened" for state, _ in sums)
                data["sums"] = {"given": len(sums), "opened": opened}
                table.add_row("secure sums with rows of this site", f"{len(sums):,}, {opened:,} opened", "")
            if loss := _loss(settings, ledger):
                data["privacy"] = loss
                for name, epsilon, limit in loss["epsilon"]:
                    shown = "none" if epsilon is None else f"epsilon {epsilon:.3g}, delta {loss['delta']:g}"
                    table.add_row(f"{name}: {loss['unit'] or 'no guarantee'}", shown, _limit(limit))
            below = f"{ledger.count:,} rows, verified. The last one's hash:\n{ledger.chain}"
            return data, Group(table, Text(below, no_wrap=True, overflow="ignore"))

    emit(as_json, action)


def _loss(settings: SiteSettings, ledger: Ledger) -> dict[str, Any] | None:
    """Return what privacy loss the month and all time come to; None where nothing is behind a mechanism, or was."""
    if isinstance(settings.privacy, NoPrivacy) and all(key[2] == "none" for key in ledger.spent.mechanisms):
        return None
    limits = loss_limits(settings, ledger, "")[1:]
    spent = [account(limit.events, delta_of(settings)) for limit in limits]
    return {
        "unit": spent[-1].unit,
        "delta": spent[-1].delta,
        "why": spent[-1].why,
        "epsilon": [(limit.name, found.epsilon, limit.most) for limit, found in zip(limits, spent, strict=True)],
    }


@app.command()
def verify(
    site: SiteFile,
    noted: Annotated[
        str | None, typer.Option(help="A hash that was shown before and noted elsewhere: its row must still be there.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Verify every row of the ledger, and that no older copy was put back."""

    def action() -> Result:
        with closing(Ledger.open(load_settings(site, SiteSettings))) as ledger:
            data: dict[str, Any] = _state(ledger)
            text = f"{ledger.count:,} rows are as they were written. The last one's hash: {ledger.chain}"
            if noted is not None:
                if re.fullmatch("[0-9a-f]{64}", noted) is None:
                    raise SettingsError(
                        f"--noted is {noted[:80]!r}; allowed: 64 digits of 0-9 and a-f, as `ledger show` prints them",
                        hint="Give all of its digits, without spaces",
                    )
                row = next((row for row in ledger.rows() if row.chain == noted), None)
                if row is None:
                    raise LedgerError(
                        f"{ledger.path}: no row has the hash {noted[:80]!r}",
                        hint="Look whether it was noted right; if so, this ledger is another one or an older copy",
                    )
                data["noted_row"] = row.seq
                text += f"\nThe hash that was noted is that of row {row.seq:,}."
            return data, text

    emit(as_json, action)


@app.command()
def export(
    site: SiteFile,
    file: Annotated[Path, typer.Argument(help="What to write: FILE.csv, or FILE.jsonl with a JSON object a line.")],
    as_json: AsJson = False,
) -> None:
    """Write every row into a file, hashes and all, so that others can verify it."""

    def action() -> Result:
        lines = {".csv": _csv, ".jsonl": _json_lines}.get(file.suffix)
        if lines is None:
            raise SettingsError(f"FILE is {file.name!r}; allowed: a name that ends in .csv or .jsonl", hint="Rename it")
        with closing(Ledger.open(load_settings(site, SiteSettings))) as ledger, atomic(file) as out:
            for line in lines(ledger.rows()):
                out.write(line.encode())
            return {**_state(ledger), "file": str(file)}, f"{ledger.count:,} rows are in {file}"

    emit(as_json, action)


@app.command()
def restart(
    site: SiteFile,
    confirm: Annotated[bool, typer.Option("--yes", help="Do it: what is put aside is not used any more.")] = False,
    spent: Annotated[
        int | None, typer.Option(min=0, help="Samples that were released at least, where you know of more than it.")
    ] = None,
    spent_bytes: Annotated[
        int | None, typer.Option(min=0, help="Bytes of features that were released at least, where you know of more.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put a damaged ledger aside and begin another, in which all that was spent counts as spent this month."""

    def action() -> Result:
        settings = load_settings(site, SiteSettings)
        if not confirm:
            raise SettingsError(
                "The ledger and the released answers would be put aside, and --yes is missing",
                hint="Look for a newer copy first; then run the same command with --yes",
            )
        carried = restart_ledger(settings, spent, spent_bytes)
        samples, size = carried.of_no_job
        data = {
            "aside": str(carried.aside),
            "carried": carried.samples,
            "carried_bytes": carried.features,
            "sums_known": carried.sums_known,
            "of_no_job": samples,
            "of_no_job_bytes": size,
        }
        told = f"A new ledger begins with {_amount(carried.samples, carried.features)} spent. "
        if samples or size:
            told += (
                f"Of {_amount(samples, size)} no row tells the job any more: they count for the month and the "
                "lifetime, and towards no job's limit. "
            )
        if not carried.sums_known:
            told += (
                "It is not known what was summed with this classifier: the site takes part in no secure sum until it "
                "has another one (train it with another seed). "
            )
        return data, f"{told}The old one is in {carried.aside}: keep it."

    emit(as_json, action)


def _state(ledger: Ledger) -> dict[str, Any]:
    return {"rows": ledger.count, "chain": ledger.chain, "last": ledger.last or None}


def _amount(samples: int, size: int) -> str:
    return f"{samples:,} samples" + (f" and {size:,} bytes of features" if size else "")


def _limit(most: float | None) -> str:
    return "none" if most is None else f"{most:,}"


def _values(row: Row) -> tuple[Any, ...]:
    entry = row.entry
    return (row.seq, row.time, entry.kind, entry.job, entry.samples, entry.subject, row.body, row.chain)


def _csv(rows: Iterator[Row]) -> Iterator[str]:
    def line(values: tuple[Any, ...]) -> str:
        held = io.StringIO()
        csv.writer(held).writerow(values)
        return held.getvalue()

    yield line(COLUMNS)
    yield from (line(_values(row)) for row in rows)


def _json_lines(rows: Iterator[Row]) -> Iterator[str]:
    for row in rows:
        yield json.dumps({**dict(zip(COLUMNS, _values(row), strict=True)), "body": row.entry.body}) + "\n"
