"""What every command shares: the JSON envelope, errors as one line and an exit code, results on stdout, and groups that
import a command when it is called: torch, matplotlib and their like take seconds, which `--help` should not.

Does not live here: any command.
"""

from __future__ import annotations

import errno
import importlib
import json
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, NoReturn

import click
import typer
from rich.console import Console, RenderableType
from rich.text import Text
from typer.core import TyperGroup

from consilience.common.errors import ConsilienceError, StorageError

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON envelope on stdout: ok, data, error.")]
Result = tuple[dict[str, Any], RenderableType]
"""What a command found: for machines, and for people."""


def emit(as_json: bool, action: Callable[[], Result]) -> None:
    """Run `action` and print its result on stdout, or its error on stderr (in the envelope with `--json`).

    Exits with the error's code of the registry; 130 when interrupted.
    """
    try:
        data, view = action()
    except ConsilienceError as error:
        _fail(as_json, error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        _fail(
            as_json,
            StorageError(
                f"Cannot write {error.filename or 'to the disk'}: {error.strerror}",
                hint="Make room on the disk or mend the folder's rights, then run the same command again",
            ),
        )
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted. Run the same command again to go on from here.")
        raise typer.Exit(130) from None
    _show(as_json, data, view)


def emit_findings(as_json: bool, result: Result, error: ConsilienceError | None) -> None:
    """Print what was found, and after it the first problem among it, if any; exits with that one's code."""
    data, view = result
    if error is None or not as_json:
        _show(as_json, data, view)
    if error is not None:
        _fail(as_json, error, data)


def emit_checked(as_json: bool, check: Callable[[], tuple[Result, ConsilienceError | None]]) -> None:
    """As `emit_findings`, of a check that may itself fail before it has found anything."""
    try:
        result, error = check()
    except ConsilienceError as failure:
        _fail(as_json, failure)
    emit_findings(as_json, result, error)


def _show(as_json: bool, data: dict[str, Any], view: RenderableType) -> None:
    if as_json:
        typer.echo(json.dumps({"ok": True, "data": data, "error": None}))
    else:
        # text keeps its lines as they are, for copying commands and paths; tables fit the terminal
        Console(highlight=False).print(view, markup=False, soft_wrap=isinstance(view, str | Text))


def _fail(as_json: bool, error: ConsilienceError, data: dict[str, Any] | None = None) -> NoReturn:
    if as_json:
        about = {"code": error.exit_code, "name": error.name, "message": error.message, "hint": error.hint}
        typer.echo(json.dumps({"ok": False, "data": data, "error": about}))
    else:
        console = Console(stderr=True, highlight=False)
        console.print(f"Error ({error.name}, {error.exit_code}): {error}", markup=False, soft_wrap=True)
    raise typer.Exit(error.exit_code)


class LateCommands(TyperGroup):
    """A group of commands of which each is imported when it is called."""

    parts: ClassVar[dict[str, tuple[str, str]]] = {}
    """Command -> `module:name` of the function or `typer.Typer` that it is, and what the group's help says of it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of `parts`, and after them those of commands that the group has by itself."""
        return [*self.parts, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of a name, not yet imported; None where there is none."""
        if cmd_name not in self.parts:
            return super().get_command(ctx, cmd_name)
        return LateCommand(cmd_name, *self.parts[cmd_name])


class LateCommand(click.Command):
    """Stands for a command until it is called."""

    def __init__(self, name: str, target: str, about: str) -> None:
        super().__init__(name, help=about)
        self._target = target

    def load(self) -> click.Command:
        """Import the command and return it."""
        module, _, name = self._target.partition(":")
        found = getattr(importlib.import_module(module), name)
        if not isinstance(found, typer.Typer):
            function, found = found, typer.Typer(add_completion=False)
            found.command(self.name)(function)
        return typer.main.get_command(found)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Return a context of the command that this one stands for."""
        return self.load().make_context(info_name, args, parent, **extra)
