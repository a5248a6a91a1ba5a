"""`consilience site plan`: what each mechanism needs and gives, as a table.

Does not live here: where the numbers come from (plan).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from consilience.client.privacy.plan import Alternative, alternatives
from consilience.common.cli import AsJson, Result, emit
from consilience.common.settings import DpSgd, Pate, SiteSettings
from consilience.common.settings_file import load_settings


def plan(
    site: Annotated[Path, typer.Argument(help="The site's site.yaml.")],
    epsilon: Annotated[float, typer.Option(help="Privacy loss that all the answers together may come to.")],
    samples: Annotated[int, typer.Option(help="How many pool samples are answered.")],
    delta: Annotated[
        float | None, typer.Option(help="Chance with which epsilon may not hold; by default the settings'.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what noise each mechanism needs for that many answers at that epsilon, and what its labels would be worth.

    Nothing is changed or released. Accuracies are measured on private data without noise, or assumed, as the table
    says: they are for the site's own eyes.
    """

    def action() -> Result:
        settings = load_settings(site, SiteSettings)
        found = alternatives(settings, epsilon, samples, delta)
        rows = [_about(one) for one in found]
        data = {"epsilon": epsilon, "samples": samples, "delta": found[0].spent.delta, "alternatives": rows}
        return data, _view(found, data)

    emit(as_json, action)


def _view(found: list[Alternative], data: dict[str, Any]) -> Group:
    """Return the table, and below it what is to be known about it."""
    bases = list(dict.fromkeys(one.value.basis for one in found))
    table = Table()
    for head in ("mechanism", "protects", "noise", "epsilon", "accuracy", "nets"):
        table.add_column(head, no_wrap=head != "noise", overflow="fold")
    for one, row in zip(found, data["alternatives"], strict=True):
        table.add_row(*map(Text, _shown(one, row, bases.index(one.value.basis) + 1)))
    trains = any(isinstance(one.settings, Pate | DpSgd) for one in found)
    notes = [
        f"For {data['samples']:,} samples at delta {data['delta']:g}; * as set now."
        + " dp-sgd is paid once, for any number." * trains,
        *["Of pate (confident): noise on votes and on the threshold; accuracy of the share that is labelled."] * trains,
        "Accuracies are not private: they are for you alone. They come from:",
        *(f"{number}. {basis}" for number, basis in enumerate(bases, 1)),
    ]
    return Group(table, Text("\n".join(notes)))


def _about(one: Alternative) -> dict[str, Any]:
    return {
        "settings": one.settings.model_dump(mode="json", exclude_none=True, exclude={"delta"}),
        "configured": one.configured,
        "unit": one.spent.unit,
        "epsilon": one.spent.epsilon,
        "epsilon_rdp": one.spent.rdp,
        "epsilon_pld": one.spent.pld,
        "accuracy": one.value.accuracy,
        "answered": one.value.answered,
        "basis": one.value.basis,
        "trainings": one.trainings,
        "paid": one.payment,
    }


def _shown(one: Alternative, row: dict[str, Any], basis: int) -> tuple[str, ...]:
    held, value = row["settings"], one.value
    name = f"{held['mechanism']} ({held['answer']})" if "answer" in held else str(held["mechanism"])
    noises = [held[field] for field in ("noise_multiplier", "sigma", "threshold_sigma") if field in held]
    accuracy = "not known" if value.accuracy is None else f"{value.accuracy:.1%}"
    if value.answered is not None and value.answered < 1:
        accuracy += f" of {value.answered:.0%}"
    return (
        f"{name} *" if one.configured else name,
        one.spent.unit or "nothing",
        ", ".join(f"{noise:.4g}" for noise in noises) or "none",
        "no bound" if one.spent.epsilon is None else f"{one.spent.epsilon:.3g}",
        f"{accuracy} ({basis})",
        str(one.trainings),
    )
