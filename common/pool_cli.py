"""`consilience pool`: build, show, verify. Both sides use it: the coordinator builds, sites verify their copies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from consilience.common.cli import AsJson, Result, emit
from consilience.common.data import open_data
from consilience.common.errors import PoolError, SettingsError
from consilience.common.pool import Pool
from consilience.common.progress import Reporter
from consilience.common.settings import DataSource, FolderData, NpzData, TorchvisionData

app = typer.Typer(help="The public unlabelled pool.", no_args_is_help=True, add_completion=False)

PoolFolder = Annotated[Path, typer.Argument(help="Folder of the pool.")]


@app.command()
def build(
    source: Annotated[Path, typer.Argument(help="An .npz file, a folder of images, or a torchvision root.")],
    folder: PoolFolder,
    images: Annotated[str, typer.Option(help="Name of the array in an .npz file.")] = "x",
    torchvision: Annotated[str, typer.Option(help="Name of a torchvision data set class.")] = "",
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH to bring every image to.")] = "",
    channels: Annotated[int, typer.Option(help="1 for grey, 3 for colour (folders and torchvision).")] = 3,
    as_json: AsJson = False,
) -> None:
    """Build a pool from images; labels are not taken along."""

    def action() -> Result:
        data = open_data(_source(source, images, torchvision, size, channels))
        with Reporter() as reporter:
            task = reporter.start("building the pool", len(data))
            pool = Pool.build(data, folder, on_progress=lambda n: task.advance(n))
        return _about(pool)

    emit(as_json, action)


@app.command()
def show(folder: PoolFolder, as_json: AsJson = False) -> None:
    """Show a pool's size, shape and digest; checks sizes, not bytes."""
    emit(as_json, lambda: _about(Pool.open(folder)))


@app.command()
def verify(
    folder: PoolFolder,
    digest: Annotated[str, typer.Option(help="The digest the pool must have.")] = "",
    as_json: AsJson = False,
) -> None:
    """Hash every byte of a pool and compare with its manifest, and with a digest where one is given."""

    def action() -> Result:
        pool = Pool.open(folder)
        if digest and digest != pool.digest:
            raise PoolError(
                f"The pool's digest is {pool.digest}, not {digest}", hint="Get the pool that the job speaks of"
            )
        with Reporter() as reporter:
            task = reporter.start("verifying", len(pool))
            pool.verify(on_progress=lambda n: task.advance(n))
        return _about(pool)

    emit(as_json, action)


def _source(source: Path, images: str, torchvision: str, size: str, channels: int) -> DataSource:
    wanted: tuple[int, int] | None = None
    if size:
        parts = size.lower().split("x")
        if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise SettingsError(f"--size is {size!r}; allowed: HEIGHTxWIDTH, for example 96x96", hint="Correct it")
        wanted = (int(parts[0]), int(parts[1]))
    if channels not in (1, 3):
        raise SettingsError(f"--channels is {channels}; allowed: 1, 3", hint="Correct it")
    depth = cast(Any, channels)
    if torchvision:
        return TorchvisionData(kind="torchvision", dataset=torchvision, root=source, size=wanted, channels=depth)
    if source.suffix == ".npz":
        if wanted:
            raise SettingsError("--size goes with folders and torchvision sets", hint="Resize the array itself")
        return NpzData(kind="npz", path=source, images=images, labels=None)
    return FolderData(kind="folder", path=source, size=wanted, channels=depth)


def _about(pool: Pool) -> Result:
    data = {
        "folder": str(pool.folder),
        "digest": pool.digest,
        "samples": len(pool),
        "shape": list(pool.shape),
        "shards": len(pool.manifest.shards),
    }
    table = Table(show_header=False)
    table.add_row("samples", f"{len(pool):,}")
    table.add_row("shape", " x ".join(map(str, pool.shape)))
    table.add_row("shards", str(len(pool.manifest.shards)))
    table.add_row("digest", pool.digest)
    return data, table
