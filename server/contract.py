"""contract.json: what the sites and the server agreed on before the first question.

Lives here: the label space, the site cards and the pools of a run, written once. Does not live here: sending it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from consilience.common.errors import RunError, SettingsError
from consilience.common.files import read_json, write_json
from consilience.common.labels import LabelSpace
from consilience.common.protocol import Contract, SiteCard
from consilience.common.settings import JobSettings


class RunContract(BaseModel):
    """The whole agreement of a run; sites sorted by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: str
    labels: tuple[str, ...]
    class_sets: tuple[tuple[int, ...], ...]
    sites: tuple[SiteCard, ...]
    pools: tuple[str, ...]
    """Digests: the pool, then the test pool where there is one."""
    owners: dict[str, tuple[str, ...]]
    """Class -> the sites that know it."""
    components: tuple[int, ...]
    warnings: tuple[str, ...]

    @classmethod
    def build(cls, job: JobSettings, cards: Mapping[int, SiteCard], pools: tuple[str, ...]) -> RunContract:
        """Align the cards' classes. Raises `LabelError`, or `SettingsError` for weights of unknown sites."""
        sites = sorted(cards.values(), key=lambda card: card.name)
        space = LabelSpace.build({card.name: card.classes for card in sites}, job.labels.synonyms, job.labels.classes)
        unknown = sorted(set(job.unify.weights) - set(space.sites))
        if unknown:
            raise SettingsError(
                f"job.yaml: field 'unify.weights.{unknown[0]}' names no connected site; "
                f"connected: {', '.join(space.sites)}",
                hint="Correct the name or start that site",
            )
        for card in sites:
            if job.ask.encoding not in card.encodings:
                raise SettingsError(
                    f"job.yaml: field 'ask.encoding' is {job.ask.encoding!r}; site {card.name} allows: "
                    f"{', '.join(card.encodings)}",
                    hint="Choose an encoding that every site allows",
                )
        owners = {
            name: tuple(space.sites[i] for i in owned) for name, owned in zip(space.names, space.owners, strict=True)
        }
        return cls(
            job=job.name,
            labels=space.names,
            class_sets=space.class_sets,
            sites=tuple(sites),
            pools=pools,
            owners=owners,
            components=space.components,
            warnings=tuple(space.warnings()),
        )

    @property
    def space(self) -> LabelSpace:
        """The label space."""
        return LabelSpace(self.labels, tuple(card.name for card in self.sites), self.class_sets)

    def for_site(self, name: str) -> Contract:
        """Return the part that site `name` is asked to agree to."""
        at = [card.name for card in self.sites].index(name)
        return Contract(
            job=self.job,
            labels=self.labels,
            class_set=self.class_sets[at],
            pools=self.pools,
            teacher=self.sites[at].teacher,
        )

    def keep(self, path: Path) -> None:
        """Write contract.json, or compare with the one that is there.

        Raises `RunError` when the run began under another contract: a site, its classes, its teacher or its policy
        has changed, or a pool.
        """
        if not path.exists():
            write_json(path, self.model_dump(mode="json"))
            return
        earlier = RunContract.load(path)
        if earlier == self:
            return
        for name in type(self).model_fields:
            if getattr(earlier, name) != getattr(self, name):
                before = {card.name: card for card in earlier.sites}
                changed = [card.name for card in self.sites if before.get(card.name) != card]
                what = f"site {', '.join(changed)}" if changed and name != "pools" else name
                raise RunError(
                    f"{path.parent}: this run began under another contract; changed: {what}",
                    hint="Start a new run in another folder with --out",
                )

    @classmethod
    def load(cls, path: Path) -> RunContract:
        """Read contract.json. Raises `StorageError`."""
        return cls.model_validate(read_json(path), strict=False)
