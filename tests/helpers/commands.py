"""The command line: its own idea of itself, and typing `consilience site`."""

from __future__ import annotations

import json
from typing import Any

import click
from typer.main import get_command
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.common.cli import LateCommand


def command_of(*words: str) -> tuple[click.Command, list[str]]:
    """Return the command that the first of the words name, imported, and the words that are left for it."""
    command, left = get_command(app), list(words)
    while left and isinstance(command, click.Group):
        found = command.get_command(click.Context(command), left.pop(0))
        assert found is not None, words
        command = found.load() if isinstance(found, LateCommand) else found
    return command, left


def call(*words: object, code: int = 0) -> Any:
    """Return the data of `consilience site WORDS --json`, or, where it is to exit with `code`, its error."""
    result = CliRunner().invoke(app, ["site", *map(str, words), "--json"])
    assert result.exit_code == code, result.output
    held = json.loads(result.stdout)
    return held["data"] if code == 0 else held["error"]


def said(*words: object) -> str:
    """Return what `consilience site WORDS` shows a person."""
    result = CliRunner().invoke(app, ["site", *map(str, words)], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    return result.stdout
