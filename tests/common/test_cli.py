"""How results reach the terminal: a stranger's text is text."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from rich.table import Table
from typer.main import get_command
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.client.cli import app as site
from consilience.common.cli import LateCommand, LateCommands, emit

TEXT = "[/x] [link=http://evil]here[/link] pip install 'consilience[onnx]' /data/[1]"


@pytest.mark.parametrize("as_table", [False, True])
def test_square_brackets_are_no_markup(as_table: bool, capsys: pytest.CaptureFixture[str]) -> None:
    def view() -> str | Table:
        if not as_table:
            return TEXT
        table = Table("found", width=200)
        table.add_row(TEXT)
        return table

    emit(False, lambda: ({}, view()))
    assert TEXT.split()[1:4] == [word for word in capsys.readouterr().out.split() if word in TEXT.split()[1:4]]


def parts() -> list[tuple[str, LateCommand]]:
    found = []
    for group in (get_command(app), get_command(site)):
        assert isinstance(group, LateCommands)
        for name in group.parts:
            part = group.get_command(click.Context(group), name)
            assert isinstance(part, LateCommand)
            found.append((name, part))
    return found


@pytest.mark.parametrize(("name", "part"), parts(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_that_is_listed_is_there_with_a_help_of_its_own(name: str, part: LateCommand) -> None:
    command = part.load()
    assert command.help
    if not isinstance(command, click.Group):
        assert command.name == name


def test_help_lists_every_command_and_imports_none() -> None:
    for words in ([], ["site"]):
        shown = CliRunner().invoke(app, [*words, "--help"])
        assert shown.exit_code == 0
        group = get_command(site if words else app)
        assert isinstance(group, LateCommands)
        assert all(
            name in shown.output and about in " ".join(shown.output.split()) for name, (_, about) in group.parts.items()
        )
    heavy = "torch", "flwr", "matplotlib", "sklearn"
    code = (
        "import sys; from consilience.__main__ import app; from typer.testing import CliRunner; "
        f"assert CliRunner().invoke(app, ['site', '--help']).exit_code == 0; assert not set({heavy}) & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_unknown_command_is_refused() -> None:
    for words in (["what"], ["site", "what"]):
        refused = CliRunner().invoke(app, words)
        assert refused.exit_code == 2
        assert "what" in refused.output
