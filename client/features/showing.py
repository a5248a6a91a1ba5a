"""What the person at the terminal sees of features: `consilience site taps`, and the learning of components.

Does not live here: the taps (taps) and their learning (bases).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from consilience.client.features.taps import Found, OpenTap, find, kept_shares, learn_bases
from consilience.client.teacher import MultiTeacher, Teacher, load_any
from consilience.common.cli import AsJson, Result, emit
from consilience.common.encoding import feature_bytes
from consilience.common.encoding.features import basis_bytes
from consilience.common.pool import Pool
from consilience.common.progress import Reporter, Task
from consilience.common.settings import SiteSettings
from consilience.common.settings_file import load_settings


def learn_and_show_bases(
    settings: SiteSettings, reporter: Reporter, teacher: Teacher | MultiTeacher | None = None
) -> None:
    """Learn the principal components that the policy lets out; errors as `learn_bases`'."""
    if not any(reduction.channels is not None for reduction in settings.policy.features.taps.values()):
        return
    tasks: list[Task] = []

    def on_images(count: int, total: int) -> None:
        if not tasks:
            tasks.append(reporter.start(f"learning the principal components of {settings.name}", total))
        tasks[0].advance(count)

    learn_bases(settings, load_any(settings) if teacher is None else teacher, on_images)


def tell_shape(shape: tuple[int, ...]) -> str:
    """Return a sample's features in words: 128, or 64 x 8 x 8."""
    return " x ".join(str(length) for length in shape)


def tell_taps(settings: SiteSettings, taps: tuple[OpenTap, ...]) -> str:
    """Return in one line what leaves of each tap, and how many bytes a sample that is in the finest encoding."""
    encodings = settings.policy.features.encodings
    if not taps:
        return "none (the policy lets none out)"
    told = []
    for tap in taps:
        card = tap.card
        share = ""
        if (held := card.components) is not None:
            share = f" of {card.channels} channels, with {held.kept:.1%} of their variance"
            share += f" (components: {held.bytes:,} bytes)"
        size = feature_bytes(card.values, encodings[0])
        told.append(f"{card.name}: {tell_shape(card.shape)}{share}, {size:,} bytes a sample")
    return f"{'; '.join(told)}; as {' or '.join(encodings)}"


def taps(
    site: Annotated[Path, typer.Argument(help="The site's site.yaml.")],
    as_json: AsJson = False,
) -> None:
    """List the teacher's taps with their shapes, which of them the policy lets out, and how many bytes that is."""

    def action() -> Result:
        settings = load_settings(site, SiteSettings)
        found = find(settings, load_any(settings), lenient=True)
        if found is None:
            told = f"A teacher of kind {settings.teacher.kind} has no taps here: it takes part by its labels."
            return {"taps": [], "limit": None}, told
        pools = [Pool.open(folder) for folder in settings.pools]
        rows = _rows(settings, found, pools)
        return {"taps": rows, "limit": settings.policy.features.bytes}, _table(settings, rows, pools)

    emit(as_json, action)


def _rows(settings: SiteSettings, found: Found, pools: list[Pool]) -> list[dict[str, Any]]:
    encodings, shares = settings.policy.features.encodings, kept_shares(settings, found)
    rows = []
    for layer in found.all:
        row: dict[str, Any] = {"tap": layer.name, "shape": layer.shape, "leaves": None}
        if (allowed := found.allowed.get(layer.name)) is not None:
            values = math.prod(allowed.shape)
            kept = 1.0 if allowed.wanted is None else shares.get(layer.name)
            sizes = {encoding: feature_bytes(values, encoding) for encoding in encodings}
            totals = {pool.digest: {encoding: size * len(pool) for encoding, size in sizes.items()} for pool in pools}
            held = 0 if allowed.wanted is None else basis_bytes(allowed.shape[0], allowed.wanted.channels)
            row |= {"leaves": allowed.shape, "kept": kept, "bytes_a_sample": sizes, "bytes": totals, "components": held}
        rows.append(row)
    return rows + [{"tap": name, "shape": None, "leaves": None} for name in found.unknown]


def _table(settings: SiteSettings, rows: list[dict[str, Any]], pools: list[Pool]) -> Table:
    encodings = settings.policy.features.encodings
    table = Table(
        "tap", "shape, channels first", "leaves as", "variance kept", *(f"bytes a sample, {name}" for name in encodings)
    )
    finest = encodings[0] if encodings else None
    for pool in pools if finest else []:
        table.add_column(f"bytes of pool {pool.digest[:12]}, {finest}")
    for row in rows:
        cells = [row["tap"], "" if row["shape"] is None else tell_shape(row["shape"])]
        if row["shape"] is None:
            cells += ["is no tap of the teacher; the policy names it"]
        elif row["leaves"] is None:
            cells += ["does not leave"]
        else:
            kept = "not learned yet" if row["kept"] is None else f"{row['kept']:.1%}"
            cells += [tell_shape(row["leaves"]), kept]
            cells += [f"{row['bytes_a_sample'][name]:,}" for name in encodings]
            cells += [f"{row['bytes'][pool.digest][finest]:,}" for pool in pools]
        table.add_row(*(Text(cell) for cell in cells))
    if finest:
        table.caption = f"A job may ask for at most {settings.policy.features.bytes:,} bytes of features."
        if components := sum(row.get("components", 0) for row in rows):
            table.caption += (
                f" Principal components themselves are {components:,} bytes, which count among these and leave with "
                "the agreement to a job that needs them."
            )
    return table
