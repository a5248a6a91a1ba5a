"""Claim: both simulation engines do the same job with the same result, also with hundreds of sites.

One job with 200 sites is done on the in-process engine and on Flower's Ray engine. Seconds are those of the stages
that the engines carry (asking); the reports are compared.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from consilience.common.files import read_json
from consilience.common.progress import Reporter
from consilience.common.settings import JobSettings
from consilience.common.settings_file import parse_settings
from consilience.deploy.flower_engine import simulate_on_flower
from consilience.deploy.simulation import simulate
from consilience.server.report import comparable
from harness import options, show


def job(sites: int) -> JobSettings:
    """Return a job whose sites have three classes and a handful of images each."""
    raw: dict[str, Any] = {
        "name": "engines",
        "simulation": {
            "data": {"kind": "embedded"},
            "test": {"kind": "embedded", "split": "test"},
            "pool_share": 0.2,
            "partition": {"kind": "random-classes", "sites": sites, "overlap": sites * 0.3},
            "teachers": [{"kind": "train", "architecture": "cnn3", "fit": {"epochs": 1, "precision": "f32"}}],
        },
        "ask": {"question_size": 1024},
        "student": {"architecture": "cnn3", "fit": {"epochs": 1, "precision": "f32"}},
    }
    return parse_settings(raw, JobSettings, source="benchmark", folder=Path())


def main() -> None:
    arguments = options(__doc__)
    sites = 12 if arguments.quick else 200
    rows: list[tuple[str, float, float]] = []
    reports = []
    with tempfile.TemporaryDirectory() as name, Reporter(quiet=True) as reporter:
        for engine, do in (("threads", simulate), ("flower", simulate_on_flower)):
            run = Path(name) / engine
            began = time.perf_counter()
            do(job(sites), run, reporter)
            rows.append((engine, time.perf_counter() - began, read_json(run / "timing.json")["ask"]))
            reports.append(comparable(read_json(run / "report.json")))
    equal = reports[0] == reports[1]
    figures = {
        "sites": sites,
        "equal": equal,
        "seconds": {engine: {"whole": whole, "asking": asking} for engine, whole, asking in rows},
    }
    show(f"{sites} sites; reports equal: {equal}", ("engine", "whole s", "asking s"), rows, figures, arguments.json)
    if not equal:
        sys.exit(json.dumps(figures))


if __name__ == "__main__":
    main()
