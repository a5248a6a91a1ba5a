"""`consilience simulate`: the whole job on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from consilience.common.cli import AsJson, Result, emit
from consilience.common.files import read_json
from consilience.common.progress import Reporter
from consilience.common.settings import JobSettings
from consilience.common.settings_file import load_settings
from consilience.deploy.simulation import embedded_job
from consilience.deploy.simulation import simulate as run_simulation

CONTENDERS = {
    "naive": "naive ensemble",
    "best_site": "best site",
    "hard_vote": "hard vote",
    "max_confidence": "max confidence",
    "unified_ensemble": "unified ensemble",
}


def simulate(
    job: Annotated[Path | None, typer.Argument(help="A job.yaml; without one, the embedded example.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; by default runs/NAME of the job.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the job's seed.")] = None,
    as_json: AsJson = False,
) -> None:
    """Simulate a job on one machine: make the sites, train their teachers, ask, unify, train the student, judge.

    The same command again goes on where the last one stopped.
    """

    def action() -> Result:
        settings = embedded_job() if job is None else load_settings(job, JobSettings)
        if seed is not None:
            settings = settings.model_copy(update={"seed": seed})
        run = out or Path("runs") / settings.name
        with Reporter() as reporter:
            run_simulation(settings, run, reporter)
        report: dict[str, Any] = read_json(run / "report.json")
        return {"run": str(run), "report": report}, _summary(run, report)

    emit(as_json, action)


def _summary(run: Path, report: dict[str, Any]) -> Group:
    table = Table("", "accuracy", title=f"{report['job']}: one classifier from {len(report['sites'])} sites")
    for key, name in CONTENDERS.items():
        table.add_row(name, _percent(report["baselines"][key]))
    table.add_row("student", _percent(report["student"]), style="bold")
    table.add_row("oracle (pool's true labels)", _percent(report["baselines"]["oracle"]))
    return Group(table, f"Report: {(run / 'report.html').resolve()}", f"Student: {(run / 'student').resolve()}")


def _percent(entry: dict[str, Any] | None) -> str:
    value = entry.get("accuracy") if entry else None
    return "-" if value is None else f"{value:.1%}"
