"""`consilience simulate`: the whole job on one machine."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType

from consilience.common.cli import AsJson, Result, emit
from consilience.common.errors import SettingsError
from consilience.common.files import read_json
from consilience.common.progress import Reporter
from consilience.common.settings import JobSettings
from consilience.common.settings_file import load_settings
from consilience.server.summary import summary


class Engine(StrEnum):
    """What carries the messages of a simulation in one place."""

    THREADS = "threads"
    FLOWER = "flower"


def simulate(
    job: Annotated[Path | None, typer.Argument(help="A job.yaml; without one, the embedded example.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; by default runs/NAME of the job.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the job's seed.")] = None,
    processes: Annotated[
        bool, typer.Option("--processes", help="Start a server and one agent a site as processes, over TLS.")
    ] = False,
    engine: Annotated[
        Engine | None, typer.Option(help="What carries the messages: threads of this process, or Flower's Ray engine.")
    ] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="First let every site attack its own answers; see RUN/audit/SITE.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Simulate a job on one machine: make the sites, train their teachers, ask, unify, train the student, judge.

    The same command again goes on where the last one stopped.
    """

    def action() -> Result:
        if processes and engine is not None:
            raise SettingsError("--processes and --engine exclude each other", hint="Leave one of them out")
        # late: these import torch and both sides, which `--help` does without
        from consilience.deploy import simulation

        settings = simulation.embedded_job() if job is None else load_settings(job, JobSettings)
        if seed is not None:
            settings = settings.model_copy(update={"seed": seed})
        run = out or Path("runs") / settings.name
        pages: RenderableType | None = None
        with Reporter() as reporter:
            if audit:
                from consilience.deploy.audits import audit_run, shown  # which take a second to import

                pages = shown(audit_run(settings, run, reporter), run)
            if processes:
                from consilience.deploy.processes import simulate_processes

                simulate_processes(settings, run, reporter)
            elif engine is Engine.FLOWER:
                from consilience.deploy.flower_engine import simulate_on_flower

                simulate_on_flower(settings, run, reporter)
            else:
                simulation.simulate(settings, run, reporter)
        report: dict[str, Any] = read_json(run / "report.json")
        view: RenderableType = summary(run, report)
        if pages is not None:
            view = Group(view, pages)
        return {"run": str(run), "report": report}, view

    emit(as_json, action)
