"""A finished run in a few lines for the terminal. Does not live here: report.html and what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from consilience.server.report_multi import multi_lines

CONTENDERS = {
    "naive": "naive ensemble",
    "best_site": "best site",
    "hard_vote": "hard vote",
    "max_confidence": "max confidence",
    "least_uncertain": "least uncertain",
    "unified_ensemble": "unified ensemble",
}


def summary(run: Path, report: dict[str, Any]) -> Group:
    """Return the table of a run's report.json and where the rest is."""
    if report["labels"]["kind"] == "multi":
        table = Table("", "mean average precision", title=_title(report))
        for name, value in multi_lines(report):
            table.add_row(name.lower(), value, style="bold" if name == "Student" else None)
        return Group(table, *_where(run))
    table = Table("", "accuracy", title=_title(report))
    for key, name in CONTENDERS.items():
        table.add_row(name, _percent(report["baselines"][key]))
    table.add_row("student", _percent(report["student"]), style="bold")
    table.add_row("oracle (pool's true labels)", _percent(report["baselines"]["oracle"]))
    return Group(table, *_where(run))


def _title(report: dict[str, Any]) -> str:
    return f"{report['job']}: one classifier from {len(report['sites'])} sites"


def _where(run: Path) -> tuple[str, str]:
    return f"Report: {(run / 'report.html').resolve()}", f"Student: {(run / 'student').resolve()}"


def _percent(entry: dict[str, Any] | None) -> str:
    value = entry.get("accuracy") if entry else None
    return "-" if value is None else f"{value:.1%}"
