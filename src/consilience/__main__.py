"""The command line's root: it only puts the sides' commands together."""

from __future__ import annotations

import os
from typing import Annotated, ClassVar

import typer

import consilience

# Before anything imports flwr: no telemetry, no look for updates, no installation at run time.
for _switch in ("FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"):
    os.environ.setdefault(_switch, "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
# Before anything imports grpc: what it has to say reaches us as errors; its own lines name internals only.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# Before anything imports torch: its threads sleep while they wait. Spinning ones slow each other down several times
# over as soon as sites answer side by side or the machine has other work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from consilience.common.cli import AsJson, LateCommands, Result, emit  # noqa: E402
from consilience.common.errors import REGISTRY, SettingsError  # noqa: E402

OTHER_CODES = {
    0: "Success.",
    2: "The command line itself is wrong; --help of the command shows what it takes.",
    130: "Interrupted (Ctrl-C). The same command again goes on from there.",
}


class _Parts(LateCommands):
    """The root's group: its own commands, and those of each side."""

    parts: ClassVar = {
        "simulate": ("consilience.deploy.cli:simulate", "The whole job on one machine."),
        "pool": ("consilience.common.pool_cli:app", "Public unlabelled pools."),
        "site": ("consilience.client.cli:app", "A data owner's side."),
        "server": ("consilience.server.server_cli:app", "The coordinator's side."),
        "student": ("consilience.server.cli:app", "Trained students."),
    }


app = typer.Typer(
    cls=_Parts,
    name="consilience",
    help="One classifier from many private ones.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def explain(
    code: Annotated[int, typer.Argument(help="The exit code of a failed command.")], as_json: AsJson = False
) -> None:
    """Say what an exit code means and what to do next."""

    def action() -> Result:
        if code in OTHER_CODES:
            return {"code": code, "name": "", "explanation": OTHER_CODES[code]}, OTHER_CODES[code]
        if code not in REGISTRY:
            known = ", ".join(str(number) for number in sorted({*REGISTRY, *OTHER_CODES}))
            raise SettingsError(f"{code} is no exit code of consilience; known: {known}", hint="Correct the code")
        kind = REGISTRY[code]
        return {"code": code, "name": kind.name, "explanation": kind.explanation}, f"{kind.name}: {kind.explanation}"

    emit(as_json, action)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"consilience {consilience.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
