"""Every command that the README shows is run, in its order, in a folder with the files that it names.

The three paths' commands (console blocks) are taken by the command line as they stand here, and run in test_paths.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.client.app import forget_sites
from consilience.common.settings import JobSettings
from consilience.common.settings_file import parse_settings
from consilience.deploy import simulation
from helpers.commands import command_of
from helpers.pages import PAGES, ROOT, blocks, typed

SETTING_UP = (
    "python3 -m venv consilience",
    ". consilience/bin/activate",
    "pip install consilience",
    "pip install 'consilience[simulation]'",
)
FIT = {"epochs": 1, "precision": "f32", "augment": False}
JOB = {
    "name": "small",
    "simulation": {
        "data": {"kind": "embedded"},
        "test": {"kind": "embedded", "split": "test"},
        "pool_share": 0.02,
        "partition": {"kind": "class-lists", "classes": [["Bag", "Coat"], ["Coat", "Shirt"]]},
        "teachers": [{"kind": "train", "architecture": "cnn3", "fit": FIT}],
    },
    "student": {"architecture": "cnn3", "fit": FIT},
}


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page, "") for line in block.splitlines() if line.strip()]
    inline = re.findall(r"`(consilience [a-z][^`A-Z]*)`", page.read_text())
    return [*lines, *(command for command in inline if re.search(r"\d$", command))]


def prepare(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for group in ("private/cat", "private/dog", "images"):
        (folder / group).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.integers(0, 256, (32, 32), np.uint8)).save(folder / group / f"{i}.png")
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / "photo.png")
    images = rng.integers(0, 256, (4, 28, 28), np.uint8)
    np.savez(folder / "labelled.npz", x=images, y=np.array([0, 1, 1, 0]), names=np.array(["Bag", "Coat"]))
    (folder / "my-job.yaml").write_text(yaml.safe_dump(JOB))
    (site,) = blocks(ROOT / "README.md", "yaml")
    raw = yaml.safe_load(site)
    raw["teacher"]["fit"] = FIT
    (folder / "site.yaml").write_text(yaml.safe_dump(raw))


def test_every_command_of_the_pages_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    small = parse_settings(JOB, JobSettings, source="job.yaml", folder=tmp_path)
    monkeypatch.setattr(simulation, "embedded_job", lambda: small)
    wanted = [command for page in PAGES for command in commands(page)]
    assert len(wanted) >= 12
    # the coordinator's commands make the pool that the site's read
    ordered = sorted(wanted, key=lambda command: not command.startswith("consilience pool build"))
    for command in ordered:
        program, *words = shlex.split(command)
        if program == "make":
            targets = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, check=False)
            assert targets.returncode == 0, command
            continue
        assert program == "consilience", command
        forget_sites()
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{command}\n{result.output}"


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_line_of_the_paths_is_one_that_the_command_line_takes() -> None:
    lines = [line for page in PAGES for line in typed(page)]
    assert len(lines) >= 20
    for line in lines:
        program, *words = shlex.split(line)
        if program != "consilience":
            assert line in SETTING_UP, line
            continue
        command, left = command_of(*words)
        command.make_context(words[0], left)  # refuses what the command would refuse


def test_every_inline_command_of_the_paths_exists() -> None:
    for page in PAGES:
        for line in re.findall(r"`((?:consilience )?(?:site|server|pool|student) [a-z]+)", page.read_text()):
            command_of(*line.removeprefix("consilience ").split())
