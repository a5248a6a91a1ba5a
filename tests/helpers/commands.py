"""The command line's own idea of itself."""

from __future__ import annotations

import click
from typer.main import get_command

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
