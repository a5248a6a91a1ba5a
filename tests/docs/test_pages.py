"""Pages made from the code are as the code is now, and their examples of settings are taken."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from consilience.common.settings import JobSettings, Settings, SiteSettings
from consilience.common.settings_file import parse_settings
from helpers.pages import blocks

DOCS = Path(__file__).parents[2] / "docs"
TRAIN = {"kind": "train", "architecture": "cnn3"}


def test_the_settings_page_is_up_to_date() -> None:
    code = f"import sys; sys.path.insert(0, {str(DOCS)!r}); import make_settings; print(make_settings.page(), end='')"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert (DOCS / "settings.md").read_text() == made, "run: python docs/make_settings.py"


def test_every_model_of_settings_has_a_section() -> None:
    page = (DOCS / "settings.md").read_text()
    known, left = set[type[Settings]](), [Settings]
    while left:
        known.update(found := left.pop().__subclasses__())
        left += found
    names = {
        model.__name__
        for model in known
        if model.__module__.startswith("consilience.common.settings.") and not model.__name__.startswith("_")
    }
    assert {"JobSettings", "SiteSettings", "Filtered"} < names
    assert sorted(names - set(re.findall(r"^## (\w+)$", page, re.MULTILINE))) == []


def examples() -> Iterator[tuple[Path, str]]:
    for page in (*sorted(DOCS.glob("*.md")), DOCS.parent / "README.md"):
        for example in blocks(page, "yaml"):
            yield page, example


@pytest.mark.parametrize(("page", "example"), [pytest.param(*each, id=each[0].stem) for each in examples()])
def test_every_example_of_settings_is_taken(page: Path, example: str) -> None:
    """As it stands there, beside what every file of its kind has."""
    raw = yaml.safe_load(example)
    if raw.keys() & set(SiteSettings.model_fields) - set(JobSettings.model_fields):
        common = {"name": "a", "teacher": TRAIN, "data": {"kind": "npz", "path": "private.npz"}}
        parse_settings({**common, **raw}, SiteSettings, source=page.name, folder=DOCS)
    else:
        sites = {"partition": {"kind": "class-lists", "classes": [[0, 1], [1, 2]]}, "teachers": [TRAIN]}
        common = {"simulation": {**sites, **raw["simulation"]}} if "simulation" in raw else {"pool": "pool"}
        parse_settings({"name": "a", **raw, **common}, JobSettings, source=page.name, folder=DOCS)
